//! Internal snapshots of an open image: take, go back to, delete, rename (spec: snapshots).
//!
//! Every cluster is counted once for each path that leads to it, so a snapshot is another L1 table and one more count on
//! each L2 table and on everything these lead to. What the header names changes in one write; while counts and COPIED
//! flags do not fit each other yet, a version 3 image is marked dirty.

use pleach_alloc::{Allocator, Place, Write};
use pleach_format::{HostCluster, HostOffset, Incompatible, L1Entry, SnapshotRecord, Version};

use super::{State, Writer};
use crate::check::copied_entries;
use crate::image::find_snapshot;
use crate::publish::{NewRoot, mark, set_snapshots};
use crate::{ImageError, Switch, clear_unknown_autoclear, publish};

/// What a new snapshot says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name; need not be unique.
    pub name: Vec<u8>,
    /// When it was taken: seconds since the Epoch, and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
}

impl Writer {
    /// Keeps the active state as an internal snapshot, without state of a virtual machine. Returns its id.
    ///
    /// # Errors
    /// [`ImageError::Refused`] if the image's refcounts are too narrow, or its snapshots too many;
    /// [`ImageError::Unsupported`] with an external data file.
    pub fn take_snapshot(&self, new: &NewSnapshot) -> Result<Vec<u8>, ImageError> {
        let mut state = self.write();
        state.may_have_snapshots()?;
        state.settle()?;
        let mut records = state.records()?;
        if records.len() >= SnapshotRecord::MAX_COUNT as usize {
            let what = format!("the image has {} snapshots, and can have no more", records.len());
            return Err(ImageError::Refused { what });
        }
        let l1 = state.image.l1().to_vec();
        if let Err(error) = state.raise_tree(&l1) {
            // Nothing was written: forget what was counted.
            state.reload()?;
            return Err(error);
        }
        let id = next_id(&records);
        records.push(SnapshotRecord {
            l1_table_offset: 0,
            l1_size: state.image.header().l1_size(),
            id: id.clone(),
            name: new.name.clone(),
            date_seconds: new.date.0,
            date_nanoseconds: new.date.1,
            vm_clock_nanoseconds: new.vm_clock_nanoseconds,
            vm_state_size: 0,
            disk_size: Some(state.image.size()),
            icount: None,
            unknown_extra: Vec::new(),
            stored_bytes: 0,
        });
        state.guard(|state| state.take(records))?;
        Ok(id)
    }

    /// Lets the active state be what an internal snapshot keeps, its size included. What is active now is lost.
    ///
    /// # Errors
    /// [`ImageError::NoSnapshot`], [`ImageError::AmbiguousSnapshot`]; [`ImageError::Refused`] if the image has bitmaps
    /// (what changes is not recorded), or its refcounts are too narrow.
    pub fn apply_snapshot(&self, wanted: &[u8]) -> Result<(), ImageError> {
        let mut state = self.write();
        state.may_have_snapshots()?;
        state.settle()?;
        if !state.image.bitmaps()?.is_empty() {
            let what =
                "the image has bitmaps, which cannot say what changes with another state; remove them first";
            return Err(ImageError::Refused { what: what.to_owned() });
        }
        let record = find_snapshot(state.image.snapshots()?, wanted)?;
        let (l1, size) = state.image.snapshot_l1(&record)?;
        if let Err(error) = state.raise_tree(&l1) {
            state.reload()?;
            return Err(error);
        }
        state.guard(|state| state.apply(l1, size))
    }

    /// Deletes an internal snapshot; what only it kept is given back.
    ///
    /// # Errors
    /// [`ImageError::NoSnapshot`], [`ImageError::AmbiguousSnapshot`].
    pub fn delete_snapshot(&self, wanted: &[u8]) -> Result<(), ImageError> {
        let mut state = self.write();
        state.may_have_snapshots()?;
        state.settle()?;
        let mut records = state.records()?;
        let gone = find_snapshot(records.clone(), wanted)?;
        records.retain(|r| r.l1_table_offset != gone.l1_table_offset || r.id != gone.id);
        state.guard(|state| state.delete(&gone, &records))
    }

    /// Gives an internal snapshot another name.
    ///
    /// # Errors
    /// As [`delete_snapshot`](Self::delete_snapshot).
    pub fn rename_snapshot(&self, wanted: &[u8], name: &[u8]) -> Result<(), ImageError> {
        let mut state = self.write();
        state.may_have_snapshots()?;
        state.settle()?;
        let mut records = state.records()?;
        let old = find_snapshot(records.clone(), wanted)?;
        for record in records.iter_mut().filter(|r| **r == old) {
            record.name = name.to_vec();
        }
        state.guard(|state| {
            clear_unknown_autoclear(&*state.store)?;
            let mut switch = Switch::default();
            let table = state.place_records(&records, &mut switch)?;
            publish(&*state.store, &mut state.allocator, &switch)?;
            state.switch_records(&records, table)
        })
    }
}

/// The highest number among the ids, and one more.
fn next_id(records: &[SnapshotRecord]) -> Vec<u8> {
    let numbers = records.iter().filter_map(|r| str::from_utf8(&r.id).ok()?.parse::<u64>().ok());
    (numbers.max().unwrap_or(0).saturating_add(1)).to_string().into_bytes()
}

impl State {
    fn may_have_snapshots(&self) -> Result<(), ImageError> {
        if self.shape.external {
            return Err(ImageError::Unsupported { feature: "internal snapshots with an external data file" });
        }
        Ok(())
    }

    /// The snapshots; each knows the size of its disk.
    fn records(&self) -> Result<Vec<SnapshotRecord>, ImageError> {
        let mut records = self.image.snapshots()?;
        for record in &mut records {
            record.disk_size.get_or_insert(self.image.size());
        }
        Ok(records)
    }

    /// Forgets counts that were changed in memory.
    fn reload(&mut self) -> Result<(), ImageError> {
        self.allocator = Allocator::load(&*self.store, Place::of(self.image.header()))?;
        Ok(())
    }

    /// Calls `each` with every cluster that the tree under `l1` counts, once for each path that leads there.
    fn walk_tree(
        &mut self,
        l1: &[L1Entry],
        each: &mut dyn FnMut(&mut Self, HostCluster) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let image = std::sync::Arc::clone(&self.image);
        for entry in l1 {
            let at = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))?;
            let Some((at, table)) = at.zip(image.l2_table(*entry)?) else { continue };
            each(self, g.host_cluster(at))?;
            image.for_each_entry(&table, |_, entry| {
                let mapping = entry.descriptor.decode(g, image.header().version());
                let mapping = mapping.map_err(ImageError::format("L2 entry", None))?;
                image.counted_clusters(mapping).try_for_each(|cluster| each(self, cluster))
            })?;
        }
        Ok(())
    }

    /// One more count for everything in the tree under `l1`, in memory.
    fn raise_tree(&mut self, l1: &[L1Entry]) -> Result<(), ImageError> {
        self.walk_tree(l1, &mut |state, cluster| {
            if !state.allocator.can_raise(cluster) {
                let width = state.image.header().refcount_width().bits();
                let what = format!(
                    "cluster {} is counted as often as {width} bits can say; another state cannot share it",
                    cluster.0
                );
                return Err(ImageError::Refused { what });
            }
            state.allocator.raise(cluster).map_err(ImageError::from)
        })
    }

    /// ```text
    /// written so far                            a crash leaves
    /// 1  the dirty bit                          the old image, whose counts are rebuilt
    /// 2  raised counts, L1 copy, snapshot table the same, plus leaks
    /// 3  COPIED flags cleared                   the same: nobody writes in place any more
    /// 4  snapshot table pointer (header)        the image with the new snapshot
    /// 5  the old table's count; the bit off     the same
    /// ```
    ///
    /// The last of `records` is the new one.
    fn take(&mut self, mut records: Vec<SnapshotRecord>) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        self.mark_dirty(true)?;
        let mut switch = Switch::default();
        let bytes: Vec<u8> =
            self.image.l1().iter().flat_map(|e| e.with_copied(false).0.to_be_bytes()).collect();
        if !bytes.is_empty() {
            let at = self.allocator.allocate_contiguous(g.clusters_for(bytes.len() as u64).0)?;
            let offset = g.host_offset(at);
            switch.new_tables.push(Write { offset, bytes });
            if let Some(new) = records.last_mut() {
                new.l1_table_offset = offset.0;
            }
        }
        let allocator = &mut self.allocator;
        switch.entries = copied_entries(&self.image, &mut |cluster| allocator.count(cluster))?;
        let table = self.place_records(&records, &mut switch)?;
        publish(&*self.store, &mut self.allocator, &switch)?;
        self.switch_records(&records, table)?;
        self.mark_dirty(false)
    }

    /// ```text
    /// written so far                            a crash leaves
    /// 1  the dirty bit                          the old state, counts to be rebuilt
    /// 2  raised counts, the new L1 table        the same, plus leaks
    /// 3  size and L1 pointer (header)           the new state
    /// 4  lowered counts of the old tree         the same
    /// 5  COPIED flags that fit; the bit off     the same
    /// ```
    fn apply(&mut self, l1: Vec<L1Entry>, size: u64) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        self.mark_dirty(true)?;
        let old = self.image.l1().to_vec();
        let old_at = self.image.header().l1_table_offset();
        let mut l1: Vec<L1Entry> = l1.into_iter().map(|e| e.with_copied(false)).collect();
        let needed = usize::try_from(g.required_l1(size)).unwrap_or(usize::MAX);
        l1.resize(l1.len().max(needed), L1Entry::default());
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.0.to_be_bytes()).collect();
        let mut at = HostOffset(0);
        let mut switch = Switch::default();
        if !bytes.is_empty() {
            let clusters = g.clusters_for(bytes.len() as u64).0;
            at = g.host_offset(self.allocator.allocate_contiguous(clusters)?);
            switch.new_tables.push(Write { offset: at, bytes });
        }
        let l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
        switch.root = Some(NewRoot { size, l1_size, l1_table_offset: at });
        publish(&*self.store, &mut self.allocator, &switch)?;
        let mut drops = Vec::new();
        self.walk_tree(&old, &mut |_, cluster| {
            drops.push(cluster);
            Ok(())
        })?;
        drops.extend(g.touched(old_at, old.len() as u64 * 8));
        self.release(&drops)?;
        self.reopen()?;
        self.fit_copied()?;
        self.mark_dirty(false)
    }

    /// ```text
    /// written so far                            a crash leaves
    /// 1  the dirty bit, the new table           the old image, counts to be rebuilt
    /// 2  snapshot table pointer (header)        the image without the snapshot
    /// 3  lowered counts of its tree             the same
    /// 4  COPIED flags that fit; the bit off     the same
    /// ```
    fn delete(&mut self, gone: &SnapshotRecord, records: &[SnapshotRecord]) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        self.mark_dirty(true)?;
        let at = HostOffset(gone.l1_table_offset);
        let l1 = crate::image::read_l1(&*self.store, g, at, gone.l1_size)?;
        let mut drops = Vec::new();
        self.walk_tree(&l1, &mut |_, cluster| {
            drops.push(cluster);
            Ok(())
        })?;
        drops.extend(g.touched(at, u64::from(gone.l1_size) * 8));
        let mut switch = Switch::default();
        let table = self.place_records(records, &mut switch)?;
        publish(&*self.store, &mut self.allocator, &switch)?;
        self.switch_records(records, table)?;
        self.release(&drops)?;
        self.reopen()?;
        self.fit_copied()?;
        self.mark_dirty(false)
    }

    /// Room for the snapshot table: where it will be.
    fn place_records(
        &mut self,
        records: &[SnapshotRecord],
        switch: &mut Switch,
    ) -> Result<HostOffset, ImageError> {
        let g = self.shape.geometry;
        let bytes =
            SnapshotRecord::encode_table(records).map_err(ImageError::format("snapshot table", None))?;
        if bytes.is_empty() {
            return Ok(HostOffset(0));
        }
        let clusters = g.clusters_for(bytes.len() as u64).0;
        let offset = g.host_offset(self.allocator.allocate_contiguous(clusters)?);
        switch.new_tables.push(Write { offset, bytes });
        Ok(offset)
    }

    /// Lets the header name the table at `table`, which is durable, and gives the old one back.
    fn switch_records(&mut self, records: &[SnapshotRecord], table: HostOffset) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let old = self.image.snapshots()?;
        let mut len = 0usize;
        for record in &old {
            len = len.next_multiple_of(8) + record.stored_bytes;
        }
        let drops: Vec<HostCluster> = g.touched(self.image.header().snapshots_offset(), len as u64).collect();
        let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
        set_snapshots(&*self.store, count, table)?;
        self.release(&drops)?;
        self.reopen()
    }

    /// Writes COPIED flags of the active state that fit the counts, which are durable.
    fn fit_copied(&mut self) -> Result<(), ImageError> {
        let allocator = &mut self.allocator;
        let entries = copied_entries(&self.image, &mut |cluster| allocator.count(cluster))?;
        publish(&*self.store, &mut self.allocator, &Switch { entries, ..Switch::default() })?;
        self.reopen()
    }

    /// Setting the mark is the first change of an operation, clearing it the last.
    fn mark_dirty(&mut self, dirty: bool) -> Result<(), ImageError> {
        if dirty {
            clear_unknown_autoclear(&*self.store)?;
        }
        if self.shape.version == Version::V2 {
            return Ok(());
        }
        mark(&*self.store, Incompatible::DIRTY, dirty)?;
        self.reopen()
    }
}
