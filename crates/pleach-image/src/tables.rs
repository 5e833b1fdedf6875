//! Changing L2 entries in memory: which tables change in place, which are made new, what is dropped.

use std::collections::BTreeMap;

use pleach_alloc::{Allocator, Write};
use pleach_format::{GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, Mapping};

use crate::publish::NewRoot;
use crate::{Image, ImageError, Switch};

#[derive(Debug)]
struct Edited {
    bytes: Vec<u8>,
    offset: HostOffset,
    /// The table is not yet in the L1 table.
    new: bool,
    /// First and last entry changed.
    changed: Option<(usize, usize)>,
}

/// Entries of one image as they will be. Only for standard L2 entries.
#[derive(Debug)]
pub struct TableEditor<'a> {
    image: &'a Image,
    l1: Vec<L1Entry>,
    tables: BTreeMap<usize, Edited>,
    drops: Vec<HostCluster>,
}

impl<'a> TableEditor<'a> {
    /// An editor of the active state of `image`, which passed [`Image::check_writable`].
    pub fn new(image: &'a Image) -> Self {
        Self { image, l1: image.l1().to_vec(), tables: BTreeMap::new(), drops: Vec::new() }
    }

    /// Makes room for guest clusters behind the image's present end.
    pub fn extend_to(&mut self, size: u64) {
        let needed = usize::try_from(self.image.geometry().required_l1(size)).unwrap_or(usize::MAX);
        if needed > self.l1.len() {
            self.l1.resize(needed, L1Entry::default());
        }
    }

    /// What the entry of `cluster` says now.
    ///
    /// # Errors
    /// A damaged entry or table.
    pub fn mapping(&mut self, cluster: GuestCluster) -> Result<Mapping, ImageError> {
        let g = self.image.geometry();
        let entry = match self.index(cluster) {
            (l1, slot) if self.tables.contains_key(&l1) => {
                self.tables.get(&l1).map_or(L2Entry::default(), |t| get(&t.bytes, slot))
            }
            (l1, slot) => {
                let stored = self.l1.get(l1).copied().unwrap_or_default();
                let Some(bytes) = self.image.l2_table(stored)? else { return Ok(Mapping::Unallocated) };
                let offset = stored.l2_table(g).map_err(ImageError::format("L1 entry", None))?;
                let entry = get(&bytes, slot);
                if let Some(offset) = offset {
                    // Kept as it is: a later change decides whether it can stay where it is.
                    self.tables.insert(l1, Edited { bytes, offset, new: false, changed: None });
                }
                entry
            }
        };
        entry.decode(g, self.image.header().version()).map_err(ImageError::format("L2 entry", None))
    }

    /// Lets the entry of `cluster` say something else. What the old entry referred to is dropped unless the new one
    /// refers to the same place.
    ///
    /// # Errors
    /// A damaged entry or table, or an image that cannot grow.
    pub fn set(
        &mut self,
        allocator: &mut Allocator,
        cluster: GuestCluster,
        entry: L2Entry,
    ) -> Result<(), ImageError> {
        let g = self.image.geometry();
        let old = self.mapping(cluster)?;
        let new =
            entry.decode(g, self.image.header().version()).map_err(ImageError::format("L2 entry", None))?;
        if host(old) != host(new) || matches!(old, Mapping::Compressed(_)) {
            self.drop_target(old);
        }
        let (l1, slot) = self.index(cluster);
        let table = self.own_table(allocator, l1)?;
        if let Some(field) = table.bytes.get_mut(slot * 8..slot * 8 + 8) {
            field.copy_from_slice(&entry.0.to_be_bytes());
        }
        let (first, last) = table.changed.unwrap_or((slot, slot));
        table.changed = Some((first.min(slot), last.max(slot)));
        Ok(())
    }

    fn index(&self, cluster: GuestCluster) -> (usize, usize) {
        let g = self.image.geometry();
        (usize::try_from(g.l1_index(cluster)).unwrap_or(usize::MAX), g.l2_index(cluster))
    }

    fn drop_target(&mut self, mapping: Mapping) {
        let g = self.image.geometry();
        match mapping {
            Mapping::Data(at) | Mapping::ZeroAllocated(at) => self.drops.push(g.host_cluster(at)),
            Mapping::Compressed(extent) => {
                let touched = self.image.counted_bytes(extent);
                let end = HostOffset(extent.offset.0 + touched.max(1) - 1);
                self.drops.extend((g.host_cluster(extent.offset).0..=g.host_cluster(end).0).map(HostCluster));
            }
            Mapping::Unallocated | Mapping::Zero => {}
        }
    }

    /// The table of L1 slot `l1` as one that this image may change: in place if nobody else refers to it.
    fn own_table(&mut self, allocator: &mut Allocator, l1: usize) -> Result<&mut Edited, ImageError> {
        let g = self.image.geometry();
        let existing = self.tables.remove(&l1);
        let edited = match existing {
            Some(table) if table.new || table.changed.is_some() => table,
            Some(table) if allocator.count(g.host_cluster(table.offset)) == 1 => table,
            other => {
                let at = allocator.allocate()?;
                if let Some(shared) = &other {
                    self.drops.push(g.host_cluster(shared.offset));
                }
                let bytes = other.map_or_else(|| vec![0; g.cluster_bytes()], |t| t.bytes);
                Edited { bytes, offset: g.host_offset(at), new: true, changed: None }
            }
        };
        Ok(self.tables.entry(l1).or_insert(edited))
    }

    /// Everything as bytes to be written; `size` is the new virtual size, if it changes.
    ///
    /// # Errors
    /// An image that cannot grow.
    pub fn finish(self, allocator: &mut Allocator, size: Option<u64>) -> Result<Switch, ImageError> {
        let g = self.image.geometry();
        let header = self.image.header();
        let mut switch = Switch { drops: self.drops, ..Switch::default() };
        let mut l1 = self.l1;
        let moved = l1.len() > self.image.l1().len();
        for (index, table) in self.tables {
            if table.new {
                let entry = L1Entry::owned(table.offset);
                if let Some(slot) = l1.get_mut(index) {
                    *slot = entry;
                }
                switch.new_tables.push(Write { offset: table.offset, bytes: table.bytes });
                if !moved {
                    let offset = HostOffset(header.l1_table_offset().0 + index as u64 * 8);
                    switch.entries.push(Write { offset, bytes: entry.0.to_be_bytes().to_vec() });
                }
            } else if let Some((first, last)) = table.changed {
                let bytes = table.bytes.get(first * 8..last * 8 + 8).unwrap_or(&[]).to_vec();
                switch.entries.push(Write { offset: HostOffset(table.offset.0 + first as u64 * 8), bytes });
            }
        }
        let size = size.unwrap_or(header.size());
        if moved {
            let bytes: Vec<u8> = l1.iter().flat_map(|e| e.0.to_be_bytes()).collect();
            let clusters = g.clusters_for(bytes.len() as u64).0;
            let at = g.host_offset(allocator.allocate_contiguous(clusters)?);
            let l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
            switch.new_tables.push(Write { offset: at, bytes });
            switch.root = Some(NewRoot { size, l1_size, l1_table_offset: at });
            let old = u64::from(header.l1_size()) * 8;
            let first = g.host_cluster(header.l1_table_offset()).0;
            switch.drops.extend((first..first + g.clusters_for(old).0).map(HostCluster));
        } else if size != header.size() {
            let (l1_size, l1_table_offset) = (header.l1_size(), header.l1_table_offset());
            switch.root = Some(NewRoot { size, l1_size, l1_table_offset });
        }
        Ok(switch)
    }
}

fn get(table: &[u8], slot: usize) -> L2Entry {
    let word = table.as_chunks::<8>().0.get(slot).copied().unwrap_or_default();
    L2Entry(u64::from_be_bytes(word))
}

fn host(mapping: Mapping) -> Option<HostOffset> {
    match mapping {
        Mapping::Data(at) | Mapping::ZeroAllocated(at) => Some(at),
        _ => None,
    }
}
