//! Handing out clusters, and everything that makes counts change.

use std::collections::{BTreeMap, BTreeSet};

use pleach_format::{HostCluster, HostOffset};
use pleach_store::Store;

use crate::{AllocError, Place, RefcountTable};

/// Largest refcount table that QEMU opens.
const MAX_TABLE: u64 = 8 << 20;

/// Bytes that must reach the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub offset: HostOffset,
    /// What.
    pub bytes: Vec<u8>,
}

/// A refcount table that moved because it had to grow.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct TableMove {
    /// Where the new table is.
    pub offset: HostOffset,
    /// Clusters of the new table.
    pub clusters: u32,
}

/// What changed since the last time: written in this order, with a barrier between `counts` and `table`, and another
/// one before anything refers to a new cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Refcount blocks, and the new table if it moved: nothing that is durable leads to the new ones yet.
    pub counts: Vec<Write>,
    /// Entries of the existing table that lead to new blocks.
    pub table: Vec<Write>,
    /// The table's new place, to be put into the header after a barrier.
    pub moved: Option<TableMove>,
}

#[derive(Debug)]
struct Block {
    offset: HostOffset,
    bytes: Vec<u8>,
    dirty: bool,
    new: bool,
}

/// Refcounts of one image with changes in memory.
#[derive(Debug)]
pub struct Allocator {
    table: RefcountTable,
    /// Where the table will be once everything that was taken is written.
    place: Place,
    /// The table as it will be: longer than the stored one after growth.
    entries: Vec<Option<HostOffset>>,
    blocks: BTreeMap<u64, Block>,
    moved: Option<TableMove>,
    /// Old table places, to be freed once the header names another.
    abandoned: Vec<(HostCluster, u64)>,
    /// Lowered to 0: not handed out before [`reuse`](Self::reuse).
    quarantine: BTreeSet<u64>,
    cursor: u64,
    end: u64,
}

impl Allocator {
    /// The allocator of `store`.
    ///
    /// # Errors
    /// As [`RefcountTable::load`].
    pub fn load(store: &dyn Store, place: Place) -> Result<Self, AllocError> {
        let table = RefcountTable::load(store, place)?;
        let entries = table.blocks().to_vec();
        let end = store.len()?.div_ceil(place.geometry.cluster_size());
        Ok(Self {
            table,
            place,
            entries,
            blocks: BTreeMap::new(),
            moved: None,
            abandoned: Vec::new(),
            quarantine: BTreeSet::new(),
            cursor: 0,
            end,
        })
    }

    fn place(&self) -> Place {
        self.place
    }

    fn per_block(&self) -> u64 {
        self.place().width.per_block(self.place().geometry)
    }

    /// One past the highest cluster that the file has or will have.
    pub fn end(&self) -> HostCluster {
        HostCluster(self.end)
    }

    /// The count of `cluster`, changes included.
    pub fn count(&mut self, cluster: HostCluster) -> u64 {
        let (index, slot) = self.locate(cluster.0);
        let width = self.place().width;
        self.block(index).map_or(0, |block| width.get(&block.bytes, slot))
    }

    /// The first free cluster, now with count 1.
    ///
    /// # Errors
    /// [`AllocError::Full`] if the refcount table cannot grow.
    pub fn allocate(&mut self) -> Result<HostCluster, AllocError> {
        loop {
            let (index, _) = self.locate(self.cursor);
            self.ensure_block(index, self.cursor)?;
            let (width, per_block) = (self.place().width, self.per_block());
            let start = usize::try_from(self.cursor % per_block).unwrap_or(0);
            let Some(slot) = self.first_free(index, start) else {
                self.cursor = (index + 1) * per_block;
                continue;
            };
            if self.quarantine.contains(&(index * per_block + slot as u64)) {
                self.cursor = index * per_block + slot as u64 + 1;
                continue;
            }
            let block = self.block(index).expect("made just now");
            width.set(&mut block.bytes, slot, 1)?;
            block.dirty = true;
            let cluster = index * per_block + slot as u64;
            self.cursor = cluster + 1;
            self.end = self.end.max(cluster + 1);
            return Ok(HostCluster(cluster));
        }
    }

    /// The first slot from `start` on of block `index` with count 0. A block that has none is not kept in memory.
    fn first_free(&mut self, index: u64, start: usize) -> Option<usize> {
        let width = self.place().width;
        let slots = usize::try_from(self.per_block()).unwrap_or(0);
        let in_bytes = |bytes: &[u8]| {
            let mut slot = start;
            while slot < slots && width.get(bytes, slot) != 0 {
                slot += width.alike(bytes, slot, slots - slot).max(1);
            }
            (slot < slots).then_some(slot)
        };
        match self.blocks.get(&index) {
            Some(block) => in_bytes(&block.bytes),
            None => self.table.read_block(index).and_then(|(_, bytes)| in_bytes(&bytes)),
        }
    }

    /// Starts the search for free clusters at `cluster`: there are none below.
    pub fn search_from(&mut self, cluster: HostCluster) {
        self.cursor = cluster.0;
    }

    /// Where the search for free clusters goes on.
    pub fn cursor(&self) -> HostCluster {
        HostCluster(self.cursor)
    }

    /// Up to `most` free clusters in a row, at least one, each now with count 1: the first, and how many.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_run(&mut self, most: u64) -> Result<(HostCluster, u64), AllocError> {
        let first = self.allocate()?;
        let mut n = 1;
        while n < most {
            let next = first.0 + n;
            let (index, slot) = self.locate(next);
            let width = self.place().width;
            if self.quarantine.contains(&next) {
                break;
            }
            // A block that is missing is made, and placed, by the next call.
            let Some(block) = self.block(index).filter(|b| width.get(&b.bytes, slot) == 0) else { break };
            width.set(&mut block.bytes, slot, 1)?;
            block.dirty = true;
            n += 1;
        }
        self.cursor = first.0 + n;
        self.end = self.end.max(self.cursor);
        Ok((first, n))
    }

    /// `n` clusters in a row behind everything in use, each with count 1; returns the first.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_contiguous(&mut self, n: u64) -> Result<HostCluster, AllocError> {
        if n == 1 {
            return self.allocate();
        }
        loop {
            let start = self.end;
            if self.cover(start, n)? {
                continue;
            }
            match (start..start + n).rev().find(|&c| self.count(HostCluster(c)) != 0) {
                Some(counted) => self.end = counted + 1,
                None => {
                    for cluster in start..start + n {
                        self.set(cluster, 1)?;
                    }
                    self.end = start + n;
                    return Ok(HostCluster(start));
                }
            }
        }
    }

    /// Makes the blocks that the `n` clusters from `start` on lack, behind everything in use: so the place to be covered
    /// moves on, by less than what was made covers. True if anything was made.
    fn cover(&mut self, start: u64, n: u64) -> Result<bool, AllocError> {
        let per_block = self.per_block();
        for index in start / per_block..=(start + n - 1) / per_block {
            if self.block(index).is_some() {
                continue;
            }
            let at = self.end;
            if index >= self.entries.len() as u64 {
                self.grow_table(index, at.max(index * per_block))?;
            } else if self.count(HostCluster(at)) != 0 {
                self.end = at + 1;
            } else if !self.ensure_block(at / per_block, at)? {
                self.new_block(index, at);
                self.set(at, 1)?;
                self.end = at + 1;
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// Raises the count of `cluster`, which is in use, by one.
    ///
    /// # Errors
    /// A count that does not fit the image's refcounts.
    pub fn raise(&mut self, cluster: HostCluster) -> Result<(), AllocError> {
        let count = self.count(cluster);
        self.set(cluster.0, count.saturating_add(1))
    }

    /// Whether the count of `cluster` can be raised once more.
    pub fn can_raise(&mut self, cluster: HostCluster) -> bool {
        self.count(cluster) < self.place().width.max()
    }

    /// Lowers the count of `cluster` by one. A cluster that becomes free is not handed out again before
    /// [`reuse`](Self::reuse): it may still be reachable until the next barrier.
    ///
    /// # Errors
    /// [`AllocError::Underflow`] if the count is 0.
    pub fn lower(&mut self, cluster: HostCluster) -> Result<(), AllocError> {
        match self.count(cluster) {
            0 => Err(AllocError::Underflow { cluster }),
            count => {
                if count == 1 {
                    self.quarantine.insert(cluster.0);
                }
                self.set(cluster.0, count - 1)
            }
        }
    }

    /// Lets clusters that became free be handed out again: call it after the barrier that made their lowered counts
    /// durable. Returns them, in order.
    pub fn reuse(&mut self) -> Vec<HostCluster> {
        let freed = std::mem::take(&mut self.quarantine);
        if let Some(&first) = freed.first() {
            self.cursor = self.cursor.min(first);
        }
        freed.into_iter().map(HostCluster).collect()
    }

    /// One past the highest cluster with a count.
    pub fn used_end(&self) -> HostCluster {
        let (width, per_block) = (self.place().width, self.per_block());
        for index in (0..self.entries.len() as u64).rev() {
            let bytes = match self.blocks.get(&index) {
                Some(block) => block.bytes.clone(),
                None => match self.table.read_block(index) {
                    Some((_, bytes)) => bytes,
                    None => continue,
                },
            };
            // A byte that is not 0 has a part in some count.
            let Some(last) = bytes.iter().rposition(|&byte| byte != 0) else { continue };
            let bits = width.bits() as usize;
            let near = ((last + 1) * 8).div_ceil(bits);
            if let Some(slot) = (0..near).rev().find(|&slot| width.get(&bytes, slot) != 0) {
                return HostCluster(index * per_block + slot as u64 + 1);
            }
        }
        HostCluster(0)
    }

    /// The file was cut: nothing lies behind `end` any more.
    pub fn cut(&mut self, end: HostCluster) {
        self.end = self.end.min(end.0);
    }

    /// Sets the count of `cluster`, whatever it was. For repairs.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate); or the count does not fit.
    pub fn set_count(&mut self, cluster: HostCluster, count: u64) -> Result<(), AllocError> {
        self.ensure_block(cluster.0 / self.per_block(), cluster.0)?;
        self.set(cluster.0, count)
    }

    /// Lowers the counts of tables that the header does not name any more. Call once the header's new place is durable.
    ///
    /// # Errors
    /// As [`lower`](Self::lower).
    pub fn free_abandoned_tables(&mut self) -> Result<(), AllocError> {
        for (first, n) in std::mem::take(&mut self.abandoned) {
            for cluster in first.0..first.0 + n {
                self.lower(HostCluster(cluster))?;
            }
        }
        Ok(())
    }

    /// What must be written now; the changes count as written from here on.
    pub fn take_writes(&mut self) -> Writes {
        let mut writes = Writes { moved: self.moved.take(), ..Writes::default() };
        let table = self.place().table;
        for (&index, block) in &mut self.blocks {
            if block.dirty {
                writes.counts.push(Write { offset: block.offset, bytes: block.bytes.clone() });
            }
            if block.new && writes.moved.is_none() {
                let offset = HostOffset(table.0 + index * 8);
                writes.table.push(Write { offset, bytes: block.offset.0.to_be_bytes().to_vec() });
            }
            block.dirty = false;
            block.new = false;
        }
        if let Some(moved) = writes.moved {
            (self.place.table, self.place.table_clusters) = (moved.offset, moved.clusters);
            let mut bytes: Vec<u8> =
                self.entries.iter().flat_map(|e| e.map_or(0, |o| o.0).to_be_bytes()).collect();
            bytes.resize(moved.clusters as usize * self.place().geometry.cluster_bytes(), 0);
            writes.counts.push(Write { offset: moved.offset, bytes });
        }
        writes
    }

    fn locate(&self, cluster: u64) -> (u64, usize) {
        let per_block = self.per_block();
        (cluster / per_block, usize::try_from(cluster % per_block).unwrap_or(usize::MAX))
    }

    fn set(&mut self, cluster: u64, count: u64) -> Result<(), AllocError> {
        let (index, slot) = self.locate(cluster);
        let width = self.place().width;
        let block = self.block(index).ok_or(AllocError::Underflow { cluster: HostCluster(cluster) })?;
        width.set(&mut block.bytes, slot, count)?;
        block.dirty = true;
        Ok(())
    }

    fn block(&mut self, index: u64) -> Option<&mut Block> {
        if !self.blocks.contains_key(&index) {
            let (offset, bytes) = self.table.read_block(index)?;
            self.blocks.insert(index, Block { offset, bytes, dirty: false, new: false });
        }
        self.blocks.get_mut(&index)
    }

    /// Makes the block number `index` exist, placed at `cluster`, which it covers and which must be free if the block
    /// is missing. True if anything was made.
    fn ensure_block(&mut self, index: u64, cluster: u64) -> Result<bool, AllocError> {
        let known = usize::try_from(index).ok().and_then(|i| self.entries.get(i));
        if known.is_some_and(Option::is_some) {
            return Ok(false);
        }
        if index >= self.entries.len() as u64 {
            self.grow_table(index, cluster)?;
            return Ok(true);
        }
        self.new_block(index, cluster);
        self.set(cluster, 1)?;
        self.end = self.end.max(cluster + 1);
        Ok(true)
    }

    fn new_block(&mut self, index: u64, cluster: u64) {
        let geometry = self.place().geometry;
        let offset = geometry.host_offset(HostCluster(cluster));
        let bytes = vec![0; geometry.cluster_bytes()];
        self.blocks.insert(index, Block { offset, bytes, dirty: true, new: true });
        if let Some(entry) = usize::try_from(index).ok().and_then(|i| self.entries.get_mut(i)) {
            *entry = Some(offset);
        }
    }

    /// A bigger table in a region that no block covers yet: from `start` first the blocks that the region itself
    /// needs, then the table.
    fn grow_table(&mut self, index: u64, start: u64) -> Result<(), AllocError> {
        let (cluster, per_block) = (self.place().geometry.cluster_size(), self.per_block());
        let per_table_cluster = cluster / 8;
        let (mut blocks, mut clusters) = (0, 0);
        loop {
            let last = start + blocks + clusters;
            let want_blocks = last / per_block - start / per_block + 1;
            let entries = (last / per_block + 1).max(index + 1);
            let want_clusters = (entries + entries / 2).div_ceil(per_table_cluster);
            if want_blocks <= blocks && want_clusters <= clusters {
                break;
            }
            (blocks, clusters) = (want_blocks.max(blocks), want_clusters.max(clusters));
        }
        let limit = MAX_TABLE / cluster;
        if clusters > limit {
            // Without the margin it may still fit.
            clusters = limit;
            if (start + blocks + clusters) / per_block >= clusters * per_table_cluster {
                return Err(AllocError::Full { max: MAX_TABLE });
            }
        }
        if let Some(moved) = self.moved {
            let first = self.place().geometry.host_cluster(moved.offset);
            self.abandoned.push((first, moved.clusters.into()));
        } else {
            let first = self.place().geometry.host_cluster(self.place().table);
            self.abandoned.push((first, self.place().table_clusters.into()));
        }
        let entries = usize::try_from(clusters * per_table_cluster).unwrap_or(usize::MAX);
        self.entries.resize(entries, None);
        for i in 0..blocks {
            self.new_block(start / per_block + i, start + i);
        }
        for used in start..start + blocks + clusters {
            self.set(used, 1)?;
        }
        self.moved = Some(TableMove {
            offset: self.place().geometry.host_offset(HostCluster(start + blocks)),
            clusters: u32::try_from(clusters).unwrap_or(u32::MAX),
        });
        self.end = self.end.max(start + blocks + clusters);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use pleach_format::{Geometry, RefcountWidth};
    use pleach_store::{Disk, RealDisk};

    use super::*;

    /// A store whose clusters 0 (header), 1 (table) and 2 (first block) are in use.
    fn fresh(bits: u32, order: u32) -> (tempfile::TempDir, Arc<dyn Store>, Place) {
        let dir = tempfile::tempdir().unwrap();
        let store = RealDisk.create_new(&dir.path().join("image")).unwrap();
        let geometry = Geometry::new(bits, false).unwrap();
        let width = RefcountWidth::new(order).unwrap();
        let cluster = geometry.cluster_size();
        store.write_at(cluster, &(2 * cluster).to_be_bytes()).unwrap();
        let mut block = vec![0; geometry.cluster_bytes()];
        for i in 0..3 {
            width.set(&mut block, i, 1).unwrap();
        }
        store.write_at(2 * cluster, &block).unwrap();
        (dir, store, Place { geometry, width, table: HostOffset(cluster), table_clusters: 1 })
    }

    fn write(store: &dyn Store, place: &mut Place, allocator: &mut Allocator) {
        let writes = allocator.take_writes();
        for w in writes.counts.iter().chain(&writes.table) {
            store.write_at(w.offset.0, &w.bytes).unwrap();
        }
        if let Some(moved) = writes.moved {
            (place.table, place.table_clusters) = (moved.offset, moved.clusters);
        }
    }

    /// Everything handed out is distinct, and after a reload every cluster in use has count 1: also the blocks and the
    /// table that were made on the way.
    #[test]
    fn grows_blocks_and_table_and_describes_itself() {
        for (bits, order, n) in [(9, 6, 9000), (9, 4, 9000), (9, 0, 9000), (12, 6, 5000), (16, 4, 40000)] {
            let (_dir, store, mut place) = fresh(bits, order);
            let mut allocator = Allocator::load(&*store, place).unwrap();
            let mut seen = BTreeSet::new();
            for i in 0..n {
                let (first, len) = if i % 500 == 7 {
                    (allocator.allocate_contiguous(9).unwrap(), 9)
                } else {
                    (allocator.allocate().unwrap(), 1)
                };
                for c in first.0..first.0 + len {
                    assert!(seen.insert(c), "bits {bits} order {order}: {c} twice");
                    assert!(c > 2);
                }
            }
            write(&*store, &mut place, &mut allocator);
            store.set_len(allocator.end().0 << bits).unwrap();
            allocator.free_abandoned_tables().unwrap();
            write(&*store, &mut place, &mut allocator);

            let table = RefcountTable::load(&*store, place).unwrap();
            let own: BTreeSet<u64> = table.blocks().iter().flatten().map(|o| o.0 >> bits).collect();
            let first = place.table.0 >> bits;
            let expected: BTreeSet<u64> = seen
                .iter()
                .copied()
                .chain(own)
                .chain(first..first + u64::from(place.table_clusters))
                .chain([0])
                .collect();
            let mut used = BTreeSet::new();
            table.for_each_used(|c, count| {
                assert_eq!(count, 1, "bits {bits} order {order} cluster {}", c.0);
                used.insert(c.0);
            });
            assert_eq!(used, expected, "bits {bits} order {order}");
        }
    }

    /// Runs that need more than one refcount block, and a longer table, are found at once: they end near the sum of all.
    #[test]
    fn long_runs_are_found() {
        for (bits, order, runs) in [
            (9, 6, [1000, 70, 9000]),
            (9, 4, [300, 3000, 40000]),
            (9, 0, [5000, 9000, 2]),
            (12, 6, [600, 5000, 2000]),
        ] {
            let (_dir, store, mut place) = fresh(bits, order);
            let mut allocator = Allocator::load(&*store, place).unwrap();
            let mut last = 3;
            for n in runs {
                let first = allocator.allocate_contiguous(n).unwrap().0;
                assert!(first >= last, "bits {bits} order {order}: {first} is in use");
                assert!((first..first + n).all(|c| allocator.count(HostCluster(c)) == 1));
                last = first + n;
            }
            let sum: u64 = runs.iter().sum();
            let per_block = place.width.per_block(place.geometry);
            assert!(last < 4 * sum + 70 * per_block, "bits {bits} order {order}: {last} for {sum}");
            write(&*store, &mut place, &mut allocator);
            store.set_len(allocator.end().0 << bits).unwrap();
            let table = RefcountTable::load(&*store, place).unwrap();
            for block in table.blocks().iter().flatten() {
                assert_eq!(allocator.count(HostCluster(block.0 >> bits)), 1, "a block counts itself");
            }
        }
    }

    #[test]
    fn lowering_below_zero_is_an_error() {
        let (_dir, store, place) = fresh(16, 4);
        let mut allocator = Allocator::load(&*store, place).unwrap();
        let cluster = HostCluster(4);
        allocator.set_count(cluster, 1).unwrap();
        allocator.lower(cluster).unwrap();
        assert!(matches!(allocator.lower(cluster), Err(AllocError::Underflow { .. })));
        // Not handed out again before a reload.
        let handed_out: Vec<_> = (0..10).map(|_| allocator.allocate().unwrap()).collect();
        assert!(!handed_out.contains(&cluster));
    }

    #[test]
    fn tables_outside_the_file_are_refused() {
        let (_dir, store, place) = fresh(16, 4);
        let outside = Place { table: HostOffset(1 << 40), ..place };
        assert!(matches!(Allocator::load(&*store, outside), Err(AllocError::Outside { .. })));
        store.write_at(0x10008, &(1u64 << 40).to_be_bytes()).unwrap();
        assert!(matches!(Allocator::load(&*store, place), Err(AllocError::Outside { .. })));
    }
}
