//! Internal snapshots of an open image: take, go back to, delete, rename (spec: snapshots).
//!
//! Every cluster is counted once for each path that leads to it, so a snapshot is another L1 table and one more count on
//! each L2 table and on everything these lead to. What the header names changes in one write; while counts and COPIED
//! flags do not fit each other yet, a version 3 image is marked dirty.

use pleach_alloc::{Census, Place, RefcountTable, Write};
use pleach_format::{HostCluster, HostOffset, Incompatible, L1Entry, SnapshotRecord, Version};

use super::{State, Writer};
use crate::image::find_snapshot;
use crate::publish::{NewRoot, mark, set_snapshots};
use crate::recount::{Effect, Flags, references, set_copied};
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
        let shared = state.references(state.image.l1())?;
        state.may_raise(&shared)?;
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
        state.guard(|state| state.take(records, &shared))?;
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
        let mut gained = state.references(&l1)?;
        let mut lost = state.references(state.image.l1())?;
        let old = u64::from(state.image.header().l1_size()) * 8;
        lost.add_bytes(&Place::of(state.image.header()), state.image.l1_table_offset(), old, 1);
        // What both lead to is counted as it was.
        gained.cancel(&mut lost);
        state.may_raise(&gained)?;
        state.guard(|state| state.apply(l1, size, &gained, &lost))
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
        let at = HostOffset(gone.l1_table_offset);
        let l1 = crate::image::read_l1(&*state.store, state.shape.geometry, at, gone.l1_size)?;
        let mut lost = state.references(&l1)?;
        lost.add_bytes(&Place::of(state.image.header()), at, u64::from(gone.l1_size) * 8, 1);
        drop(l1);
        state.guard(|state| state.delete(&records, &lost))
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

    fn references(&self, l1: &[L1Entry]) -> Result<Census, ImageError> {
        references(&self.image, l1, &*self.workers)
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
    /// The last of `records` is the new one; `shared` is what it and the active state will both refer to.
    fn take(&mut self, mut records: Vec<SnapshotRecord>, shared: &Census) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        self.mark_dirty(true)?;
        self.raise_all(shared)?;
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
        let table = self.place_records(&records, &mut switch)?;
        publish(&*self.store, &mut self.allocator, &switch)?;
        self.fit_copied(Fit::Shared)?;
        self.switch_records(&records, table)?;
        self.mark_dirty(false)
    }

    /// ```text
    /// written so far                            a crash leaves
    /// 1  the dirty bit                          the old state, counts to be rebuilt
    /// 2  raised counts, the new L1 table        the same, plus leaks
    /// 3  size and L1 pointer (header)           the new state
    /// 4  lowered counts                         the same
    /// 5  COPIED flags that fit; the bit off     the same
    /// ```
    /// `gained` is what only the new state refers to, `lost` what only the old one does.
    fn apply(
        &mut self,
        l1: Vec<L1Entry>,
        size: u64,
        gained: &Census,
        lost: &Census,
    ) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        self.mark_dirty(true)?;
        self.raise_all(gained)?;
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
        self.reopen()?;
        self.lower_all(lost)?;
        self.fit_copied(Fit::Counts)?;
        self.mark_dirty(false)
    }

    /// ```text
    /// written so far                            a crash leaves
    /// 1  the dirty bit, the new table           the old image, counts to be rebuilt
    /// 2  snapshot table pointer (header)        the image without the snapshot
    /// 3  lowered counts of its tree             the same
    /// 4  COPIED flags that fit; the bit off     the same
    /// ```
    /// `lost` is what the snapshot that is not among `records` refers to.
    fn delete(&mut self, records: &[SnapshotRecord], lost: &Census) -> Result<(), ImageError> {
        self.mark_dirty(true)?;
        let mut switch = Switch::default();
        let table = self.place_records(records, &mut switch)?;
        publish(&*self.store, &mut self.allocator, &switch)?;
        self.switch_records(records, table)?;
        self.lower_all(lost)?;
        self.fit_copied(Fit::Counts)?;
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

    /// Writes the COPIED flags of the active state as they should be, for counts that are durable.
    fn fit_copied(&mut self, fit: Fit) -> Result<(), ImageError> {
        let wrote = match fit {
            Fit::Shared => set_copied(&self.image, Flags::Clear, Effect::Write, &*self.workers)?,
            Fit::Counts => {
                let table = RefcountTable::load(&*self.store, Place::of(self.image.header()))?;
                set_copied(&self.image, Flags::Fit(&table), Effect::Write, &*self.workers)?
            }
        };
        if wrote {
            self.barrier()?;
        }
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

/// What COPIED flags have to fit.
#[derive(Copy, Clone, Debug)]
enum Fit {
    /// A snapshot shares all that the active state has.
    Shared,
    /// The counts.
    Counts,
}
