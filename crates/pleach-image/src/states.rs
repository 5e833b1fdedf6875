//! Giving clusters to several states of one image at once: the active one and its internal snapshots.
//!
//! States share L2 tables, and after this also the clusters that they lacked alike. A shared table is changed where it
//! is: the entries that change said nothing, and say afterwards what was read through them before.

use std::collections::{BTreeMap, BTreeSet};

use pleach_alloc::{Allocator, Write};
use pleach_format::{GuestCluster, HostOffset, L1Entry, L2Entry};

use crate::{Image, ImageError, Switch};

#[derive(Debug)]
struct State {
    l1: Vec<L1Entry>,
    offset: HostOffset,
    /// Slots of the L1 table that lead to new tables.
    changed: Vec<usize>,
}

#[derive(Debug)]
struct Table {
    bytes: Vec<u8>,
    new: bool,
    /// First and last entry changed.
    changed: Option<(usize, usize)>,
    /// How many L1 entries, of all states, lead here.
    references: u64,
}

/// Entries of all states of one image as they will be. Only for standard L2 entries that say nothing yet.
#[derive(Debug)]
pub struct StatesEditor<'a> {
    image: &'a Image,
    states: Vec<State>,
    references: BTreeMap<u64, u64>,
    tables: BTreeMap<u64, Table>,
}

impl<'a> StatesEditor<'a> {
    /// An editor of `image`, which passed [`Image::check_mergeable`]: state 0 is the active one, state i + 1 is internal
    /// snapshot i.
    ///
    /// # Errors
    /// A damaged snapshot or L1 table.
    pub fn new(image: &'a Image) -> Result<Self, ImageError> {
        let active =
            State { l1: image.l1().to_vec(), offset: image.header().l1_table_offset(), changed: Vec::new() };
        let mut states = vec![active];
        for snapshot in image.snapshots()? {
            let (l1, _) = image.snapshot_l1(&snapshot)?;
            states.push(State { l1, offset: HostOffset(snapshot.l1_table_offset), changed: Vec::new() });
        }
        let mut references = BTreeMap::new();
        for entry in states.iter().flat_map(|s| &s.l1) {
            if let Some(at) =
                entry.l2_table(image.geometry()).map_err(ImageError::format("L1 entry", None))?
            {
                *references.entry(at.0).or_default() += 1;
            }
        }
        Ok(Self { image, states, references, tables: BTreeMap::new() })
    }

    /// Gives `cluster` to each of `states`: the host cluster at `host`, or zeros where it is `None`.
    ///
    /// # Errors
    /// A damaged table, an entry that says something already, a count that does not fit the image's refcounts.
    pub fn fill(
        &mut self,
        allocator: &mut Allocator,
        cluster: GuestCluster,
        states: &[usize],
        host: Option<HostOffset>,
    ) -> Result<(), ImageError> {
        let g = self.image.geometry();
        let l1_index = usize::try_from(g.l1_index(cluster)).unwrap_or(usize::MAX);
        let slot = g.l2_index(cluster);
        let mut tables = BTreeSet::new();
        for &state in states {
            tables.insert(self.table_of(allocator, state, l1_index)?);
        }
        let references: u64 = tables.iter().filter_map(|at| self.tables.get(at)).map(|t| t.references).sum();
        let entry = match host {
            None => L2Entry::ZERO,
            Some(host) => {
                allocator.set_count(g.host_cluster(host), references)?;
                L2Entry::owned(host).with_copied(references == 1)
            }
        };
        for at in tables {
            let Some(table) = self.tables.get_mut(&at) else { continue };
            let field = table.bytes.get_mut(slot * 8..slot * 8 + 8);
            let Some(field) = field.filter(|f| f.iter().all(|&b| b == 0)) else {
                return Err(ImageError::Changed { what: "an L2 entry that said nothing" });
            };
            field.copy_from_slice(&entry.0.to_be_bytes());
            let (first, last) = table.changed.unwrap_or((slot, slot));
            table.changed = Some((first.min(slot), last.max(slot)));
        }
        Ok(())
    }

    /// Where the table of a state is, loaded; a new one where there is none.
    fn table_of(&mut self, allocator: &mut Allocator, state: usize, index: usize) -> Result<u64, ImageError> {
        let g = self.image.geometry();
        let slot = self.states.get_mut(state).and_then(|s| s.l1.get_mut(index).map(|e| (e, &mut s.changed)));
        let Some((entry, changed)) = slot else {
            return Err(ImageError::Changed { what: "an L1 table that was long enough" });
        };
        if let Some(at) = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))? {
            if !self.tables.contains_key(&at.0) {
                let bytes = self.image.l2_table(*entry)?.unwrap_or_default();
                let references = self.references.get(&at.0).copied().unwrap_or(1);
                self.tables.insert(at.0, Table { bytes, new: false, changed: None, references });
            }
            return Ok(at.0);
        }
        let at = g.host_offset(allocator.allocate()?);
        // The COPIED flag counts in the active L1 table only.
        *entry = L1Entry::owned(at).with_copied(state == 0);
        changed.push(index);
        let table = Table { bytes: vec![0; g.cluster_bytes()], new: true, changed: None, references: 1 };
        self.tables.insert(at.0, table);
        Ok(at.0)
    }

    /// Everything as bytes to be written.
    pub fn finish(self) -> Switch {
        let mut switch = Switch::default();
        for (at, table) in self.tables {
            if table.new {
                switch.new_tables.push(Write { offset: HostOffset(at), bytes: table.bytes });
            } else if let Some((first, last)) = table.changed {
                let bytes = table.bytes.get(first * 8..last * 8 + 8).unwrap_or(&[]).to_vec();
                switch.entries.push(Write { offset: HostOffset(at + first as u64 * 8), bytes });
            }
        }
        for state in self.states {
            for index in state.changed {
                let entry = state.l1.get(index).copied().unwrap_or_default();
                let offset = HostOffset(state.offset.0 + index as u64 * 8);
                switch.entries.push(Write { offset, bytes: entry.0.to_be_bytes().to_vec() });
            }
        }
        switch
    }
}
