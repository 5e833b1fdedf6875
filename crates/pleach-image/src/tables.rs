//! Changing L2 entries in memory: which tables change in place, which are made new, what is dropped.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use pleach_alloc::{Allocator, Write};
use pleach_format::{
    Autoclear, ExtendedL2Entry, GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, Mapping,
};

use crate::cell::{Cell, Shape};
use crate::image::entry_at;
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

/// What the subclusters of one guest cluster say from now on, by masks that have no bit in common: bit n is subcluster n.
/// A standard cluster is its own only subcluster.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct PartChange {
    /// They hold data, which the caller writes.
    pub data: u32,
    /// They read as zeros.
    pub zero: u32,
    /// They say nothing.
    pub nothing: u32,
}

/// Entries of the active state of one image as they will be.
#[derive(Debug)]
pub struct TableEditor<I> {
    image: I,
    l1: Vec<L1Entry>,
    tables: BTreeMap<usize, Edited>,
    drops: Vec<HostCluster>,
    /// The L1 table is written to another place, even if it does not grow.
    move_l1: bool,
}

impl<I: Borrow<Image>> TableEditor<I> {
    /// An editor of the active state of `image`, which passed [`Image::check_writable`].
    pub fn new(image: I) -> Self {
        let l1 = image.borrow().l1().to_vec();
        Self { image, l1, tables: BTreeMap::new(), drops: Vec::new(), move_l1: false }
    }

    fn image(&self) -> &Image {
        self.image.borrow()
    }

    /// Makes room for guest clusters behind the image's present end.
    pub fn extend_to(&mut self, size: u64) {
        let needed = usize::try_from(self.image().geometry().required_l1(size)).unwrap_or(usize::MAX);
        if needed > self.l1.len() {
            self.l1.resize(needed, L1Entry::default());
        }
    }

    /// Leaves only what a disk of `size` bytes needs, in an L1 table and a last L2 table of their own: the change
    /// becomes visible with the switch of the root, all at once. What the L1 entries behind that lead to is not among the
    /// references that are dropped: the caller counts it.
    ///
    /// # Errors
    /// A damaged entry or table, or an image that cannot grow.
    pub fn cut_to(&mut self, allocator: &mut Allocator, size: u64) -> Result<(), ImageError> {
        let g = self.image().geometry();
        let clusters = g.clusters_for(size).0;
        let keep = usize::try_from(g.required_l1(size)).unwrap_or(usize::MAX);
        self.move_l1 = true;
        self.tables.retain(|&index, _| index < keep);
        self.l1.truncate(keep);
        let Some(last) = keep.checked_sub(1) else { return Ok(()) };
        let end = keep as u64 * g.l2_entries();
        let mut beyond = Vec::new();
        for cluster in (clusters..end).map(GuestCluster) {
            if self.entry(cluster)? != ExtendedL2Entry::default() {
                beyond.push(cluster);
            }
        }
        if beyond.is_empty() {
            return Ok(());
        }
        self.move_table(allocator, last)?;
        beyond.into_iter().try_for_each(|c| self.set_entry(allocator, c, ExtendedL2Entry::default()))
    }

    /// Moves the L1 table, and the L2 table of its last slot, to the first free clusters.
    ///
    /// # Errors
    /// A damaged table, or an image that cannot grow.
    pub(crate) fn move_roots(&mut self, allocator: &mut Allocator) -> Result<(), ImageError> {
        self.move_l1 = true;
        let Some(last) = self.l1.len().checked_sub(1) else { return Ok(()) };
        // Loads the table, if there is one.
        self.entry(GuestCluster(last as u64 * self.image().geometry().l2_entries()))?;
        self.move_table(allocator, last)
    }

    /// Gives the L2 table of L1 slot `index`, which is loaded, another place.
    fn move_table(&mut self, allocator: &mut Allocator, index: usize) -> Result<(), ImageError> {
        let g = self.image().geometry();
        if let Some(table) = self.tables.get_mut(&index).filter(|t| !t.new) {
            let old = std::mem::replace(&mut table.offset, g.host_offset(allocator.allocate()?));
            (table.new, table.changed) = (true, None);
            self.drops.push(g.host_cluster(old));
        }
        Ok(())
    }

    /// What the entry of `cluster` says now. With extended L2 entries: what its first half says.
    ///
    /// # Errors
    /// A damaged entry or table.
    pub fn mapping(&mut self, cluster: GuestCluster) -> Result<Mapping, ImageError> {
        let (g, version) = (self.image().geometry(), self.image().header().version());
        let entry = self.entry(cluster)?.descriptor;
        entry.decode(g, version).map_err(ImageError::format("L2 entry", None))
    }

    /// The entry of `cluster` as it is now. A standard entry has no subclusters.
    ///
    /// # Errors
    /// A damaged L1 entry or table.
    pub fn entry(&mut self, cluster: GuestCluster) -> Result<ExtendedL2Entry, ImageError> {
        let g = self.image().geometry();
        let (l1, slot) = self.index(cluster);
        if !self.tables.contains_key(&l1) {
            let stored = self.l1.get(l1).copied().unwrap_or_default();
            let offset = stored.l2_table(g).map_err(ImageError::format("L1 entry", None))?;
            let Some((offset, bytes)) = offset.zip(self.image().l2_table(stored)?) else {
                return Ok(ExtendedL2Entry::default());
            };
            // Kept as it is: a later change decides whether it can stay where it is.
            self.tables.insert(l1, Edited { bytes, offset, new: false, changed: None });
        }
        Ok(self.tables.get(&l1).map_or_else(ExtendedL2Entry::default, |t| entry_at(&t.bytes, g, slot)))
    }

    /// The L2 table of L1 slot `index`, if it was looked at or changed here.
    pub(crate) fn table(&self, index: u64) -> Option<&[u8]> {
        let index = usize::try_from(index).ok()?;
        self.tables.get(&index).map(|table| table.bytes.as_slice())
    }

    /// Whether there is an L2 table for `cluster`.
    pub(crate) fn has_table(&self, cluster: GuestCluster) -> bool {
        let (l1, _) = self.index(cluster);
        self.tables.contains_key(&l1) || self.l1.get(l1).is_some_and(|e| e.with_copied(false) != L1Entry(0))
    }

    /// Bytes of the tables held in memory.
    pub(crate) fn held_bytes(&self) -> usize {
        self.tables.len() * self.image().geometry().cluster_bytes()
    }

    /// Lets the standard entry of `cluster` say something else. What the old entry referred to is dropped unless the
    /// new one refers to the same place.
    ///
    /// # Errors
    /// A damaged entry or table, or an image that cannot grow.
    pub fn set(
        &mut self,
        allocator: &mut Allocator,
        cluster: GuestCluster,
        entry: L2Entry,
    ) -> Result<(), ImageError> {
        self.set_entry(allocator, cluster, ExtendedL2Entry { descriptor: entry, subclusters: 0 })
    }

    /// As [`set`](Self::set), for entries of either width.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn set_entry(
        &mut self,
        allocator: &mut Allocator,
        cluster: GuestCluster,
        entry: ExtendedL2Entry,
    ) -> Result<(), ImageError> {
        let (g, version) = (self.image().geometry(), self.image().header().version());
        let old = self.mapping(cluster)?;
        let new = entry.descriptor.decode(g, version).map_err(ImageError::format("L2 entry", None))?;
        if host(old) != host(new) || matches!(old, Mapping::Compressed(_)) {
            self.drop_target(old);
        }
        let (l1, slot) = self.index(cluster);
        let table = self.own_table(allocator, l1)?;
        let width = g.l2_entry_bytes();
        if let Some(field) = table.bytes.get_mut(slot * width..(slot + 1) * width) {
            let words = [entry.descriptor.0, entry.subclusters].map(u64::to_be_bytes);
            field.copy_from_slice(words.as_flattened().get(..width).unwrap_or_default());
        }
        let (first, last) = table.changed.unwrap_or((slot, slot));
        table.changed = Some((first.min(slot), last.max(slot)));
        Ok(())
    }

    /// Where the data of `cluster` are, to be overwritten there: a host cluster that nobody else uses.
    ///
    /// # Errors
    /// A damaged entry or table; [`ImageError::Changed`] if there are none; [`ImageError::Refcount`] if the count says that
    /// somebody else has the host cluster too.
    pub fn place(
        &mut self,
        allocator: &mut Allocator,
        cluster: GuestCluster,
    ) -> Result<HostOffset, ImageError> {
        let cell = self.cell(cluster)?;
        let host = cell.host.filter(|_| cell.data != 0);
        let host = host.ok_or(ImageError::Changed { what: "a data cluster is gone" })?;
        self.sole_owner(allocator, host).map(|()| host)
    }

    /// Changes what subclusters of `cluster` say; of a compressed one all are changed that lie on the disk, and the others
    /// say nothing. Gives the host cluster, in which the data of `change` belong at their place in the guest's cluster: one
    /// that the cluster has already, where these bytes are not read, or a new one. A host cluster without data is given up.
    ///
    /// # Errors
    /// A damaged entry or table, an image that cannot grow; [`ImageError::Refcount`] if the count of a host cluster with
    /// data that stay says that somebody else has it too.
    pub fn change(
        &mut self,
        allocator: &mut Allocator,
        cluster: GuestCluster,
        change: PartChange,
    ) -> Result<Option<HostOffset>, ImageError> {
        let (g, shape) = (self.image().geometry(), self.shape());
        let old = self.cell(cluster)?;
        let changed = change.data | change.zero | change.nothing;
        let (data, zero) = (old.data & !changed | change.data, old.zero & !changed | change.zero);
        // A raw data file has a place for everything.
        let keeps = self.image().header().autoclear().has(Autoclear::RAW_DATA_FILE);
        // Data that are read are never overwritten here.
        let unread = old.data & change.data == 0;
        if !unread && (shape.external || data != change.data) {
            return Err(ImageError::Changed { what: "a cluster that had no data there" });
        }
        let host = match old.host {
            _ if data == 0 && !keeps => None,
            Some(host) if change.data == 0 || shape.external => Some(host),
            Some(host) if unread && allocator.count(g.host_cluster(host)) == 1 => Some(host),
            Some(host) if data != change.data => return self.sole_owner(allocator, host).map(|()| None),
            _ if shape.external => Some(HostOffset(g.guest_offset(cluster).0)),
            _ => Some(g.host_offset(allocator.allocate()?)),
        };
        let cell = Cell { host, packed: None, data, zero };
        if cell != old {
            self.set_entry(allocator, cluster, shape.encode(cell))?;
        }
        Ok(host)
    }

    fn shape(&self) -> Shape {
        let image = self.image();
        let (geometry, version) = (image.geometry(), image.header().version());
        Shape { geometry, version, external: image.external_data() }
    }

    fn cell(&mut self, cluster: GuestCluster) -> Result<Cell, ImageError> {
        let (entry, shape) = (self.entry(cluster)?, self.shape());
        let guest = shape.geometry.guest_offset(cluster).0;
        shape.decode(entry, guest).map_err(ImageError::format("L2 entry", None))
    }

    /// # Errors
    /// [`ImageError::Refcount`] unless the host cluster's count is 1. Guest data in another file are not counted.
    fn sole_owner(&self, allocator: &mut Allocator, host: HostOffset) -> Result<(), ImageError> {
        let cluster = self.image().geometry().host_cluster(host);
        match allocator.count(cluster) {
            1 => Ok(()),
            _ if self.image().external_data() => Ok(()),
            stored => Err(ImageError::Refcount { cluster: cluster.0, stored, references: 1 }),
        }
    }

    fn index(&self, cluster: GuestCluster) -> (usize, usize) {
        let g = self.image().geometry();
        (usize::try_from(g.l1_index(cluster)).unwrap_or(usize::MAX), g.l2_index(cluster))
    }

    fn drop_target(&mut self, mapping: Mapping) {
        let targets = self.image().counted_clusters(mapping);
        self.drops.extend(targets);
    }

    /// The table of L1 slot `l1` as one that this image may change: in place if nobody else refers to it.
    fn own_table(&mut self, allocator: &mut Allocator, l1: usize) -> Result<&mut Edited, ImageError> {
        let g = self.image().geometry();
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
        let image = self.image.borrow();
        let (g, header) = (image.geometry(), image.header());
        let width = g.l2_entry_bytes();
        let mut switch = Switch { drops: self.drops, ..Switch::default() };
        let mut l1 = self.l1;
        let moved = self.move_l1 || l1.len() > image.l1().len();
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
                let bytes = table.bytes.get(first * width..(last + 1) * width).unwrap_or(&[]).to_vec();
                let offset = HostOffset(table.offset.0 + (first * width) as u64);
                switch.entries.push(Write { offset, bytes });
            }
        }
        let size = size.unwrap_or(header.size());
        if moved {
            let bytes: Vec<u8> = l1.iter().flat_map(|e| e.0.to_be_bytes()).collect();
            let clusters = g.clusters_for(bytes.len() as u64).0;
            let at = match clusters {
                0 => HostOffset(0),
                n => g.host_offset(allocator.allocate_contiguous(n)?),
            };
            let l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
            if !bytes.is_empty() {
                switch.new_tables.push(Write { offset: at, bytes });
            }
            switch.root = Some(NewRoot { size, l1_size, l1_table_offset: at });
            let old = u64::from(header.l1_size()) * 8;
            switch.drops.extend(g.touched(header.l1_table_offset(), old));
        } else if size != header.size() {
            let (l1_size, l1_table_offset) = (header.l1_size(), header.l1_table_offset());
            switch.root = Some(NewRoot { size, l1_size, l1_table_offset });
        }
        Ok(switch)
    }
}

fn host(mapping: Mapping) -> Option<HostOffset> {
    match mapping {
        Mapping::Data(at) | Mapping::ZeroAllocated(at) => Some(at),
        _ => None,
    }
}
