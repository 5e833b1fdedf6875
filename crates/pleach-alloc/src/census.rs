//! Counts by walking, against counts as stored.

use std::collections::BTreeMap;

use pleach_format::{HostCluster, HostOffset};

use crate::{Place, RefcountTable};

const PAGE: u64 = 4096;

/// How many references to each host cluster a walk has met. Memory follows the clusters met, not the file's length.
#[derive(Debug, Default)]
pub struct Census {
    pages: BTreeMap<u64, Vec<u32>>,
}

/// A cluster whose stored count is not the number of references to it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Discrepancy {
    /// The cluster.
    pub cluster: HostCluster,
    /// The count as stored.
    pub stored: u64,
    /// References met.
    pub references: u64,
}

impl Discrepancy {
    /// The count is too high: space is lost, nothing else.
    pub fn is_leak(&self) -> bool {
        self.stored > self.references
    }
}

impl Census {
    /// Nothing met yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Meets `times` references to a cluster.
    pub fn add(&mut self, cluster: HostCluster, times: u64) {
        let page = self.pages.entry(cluster.0 / PAGE).or_insert_with(|| vec![0; 4096]);
        if let Some(count) = usize::try_from(cluster.0 % PAGE).ok().and_then(|i| page.get_mut(i)) {
            *count = count.saturating_add(u32::try_from(times).unwrap_or(u32::MAX));
        }
    }

    /// One past the highest cluster met.
    pub fn end(&self) -> u64 {
        let last = self.pages.last_key_value();
        let slot = last.and_then(|(_, counts)| counts.iter().rposition(|&c| c > 0));
        last.zip(slot).map_or(0, |((page, _), slot)| page * PAGE + slot as u64 + 1)
    }

    /// Meets `times` references to every cluster that `len` bytes from `offset` touch. The range lies inside the file.
    pub fn add_bytes(&mut self, place: &Place, offset: HostOffset, len: u64, times: u64) {
        if len == 0 {
            return;
        }
        let first = place.geometry.host_cluster(offset).0;
        let last = place.geometry.host_cluster(HostOffset(offset.0.saturating_add(len - 1))).0;
        for cluster in first..=last {
            self.add(HostCluster(cluster), times);
        }
    }

    /// Forgets one reference to a cluster.
    pub fn forget(&mut self, cluster: HostCluster) {
        let slot = usize::try_from(cluster.0 % PAGE).ok();
        let page = self.pages.get_mut(&(cluster.0 / PAGE));
        if let Some(count) = page.zip(slot).and_then(|(page, slot)| page.get_mut(slot)) {
            *count = count.saturating_sub(1);
        }
    }

    /// Calls `each` with every cluster that was met and its references, in order.
    pub fn for_each(&self, mut each: impl FnMut(HostCluster, u64)) {
        for (&page, counts) in &self.pages {
            for (slot, &references) in (0..).zip(counts) {
                if references > 0 {
                    each(HostCluster(page * PAGE + slot), references.into());
                }
            }
        }
    }

    /// References met to `cluster`.
    pub fn count(&self, cluster: HostCluster) -> u64 {
        let page = self.pages.get(&(cluster.0 / PAGE));
        let slot = usize::try_from(cluster.0 % PAGE).ok();
        page.zip(slot).and_then(|(page, slot)| page.get(slot)).copied().unwrap_or(0).into()
    }

    /// Meets what the refcount structures themselves take: the table and every block.
    pub fn add_refcount_structures(&mut self, table: &RefcountTable) {
        let place = table.place();
        let cluster = place.geometry.cluster_size();
        self.add_bytes(&place, place.table, u64::from(place.table_clusters) * cluster, 1);
        for block in table.blocks().iter().flatten() {
            self.add_bytes(&place, *block, cluster, 1);
        }
    }

    /// Compares with what is stored for a file of `clusters` clusters. At most `most` differences of each kind are listed;
    /// the others are only counted. Counts for what lies behind the file take no space: they are not looked at.
    ///
    /// The work follows the counts that the file holds, however many table entries lead to one block.
    pub fn compare(&self, table: &RefcountTable, clusters: u64, most: usize) -> Comparison {
        // A compressed cluster may claim a part of the cluster behind the end.
        let bound = clusters.max(self.end());
        let mut found = Comparison { end: self.end(), ..Comparison::default() };
        let (width, per_block) = (table.place().width, table.place().width.per_block(table.place().geometry));
        let mut shared: Option<(HostOffset, Vec<u8>, Used)> = None;
        let mut blocks: Vec<u64> = Vec::new();
        for (index, block) in (0..bound.div_ceil(per_block)).zip(table.blocks()) {
            let Some(offset) = *block else { continue };
            blocks.push(index);
            if shared.as_ref().is_none_or(|(at, ..)| *at != offset) {
                let bytes = table.read_block(index).map(|(_, bytes)| bytes).unwrap_or_default();
                let used = Used::of(|slot| width.get(&bytes, slot), per_block, bytes.iter().all(|&b| b == 0));
                shared = Some((offset, bytes, used));
            }
            let Some((_, bytes, used)) = &shared else { continue };
            let first = index * per_block;
            let nobody = self.pages.range(first / PAGE..=(first + per_block - 1) / PAGE).next().is_none();
            if nobody && first + per_block <= clusters && (used.count == 0 || found.listed_leaks >= most) {
                found.leaks += used.count;
                found.end = used.last.map_or(found.end, |last| found.end.max(first + last + 1));
                continue;
            }
            for (slot, at) in (0..).zip(first..(first + per_block).min(bound)) {
                let (stored, references) = (width.get(bytes, slot), self.count(HostCluster(at)));
                if at >= clusters && stored > references {
                    continue;
                }
                if stored != 0 && at < clusters {
                    found.end = found.end.max(at + 1);
                }
                found.meet(Discrepancy { cluster: HostCluster(at), stored, references }, most);
            }
        }
        for (&page, counts) in &self.pages {
            for (at, &references) in (page * PAGE..).zip(counts) {
                if references > 0 && blocks.binary_search(&(at / per_block)).is_err() {
                    let cluster = HostCluster(at);
                    found.meet(Discrepancy { cluster, stored: 0, references: references.into() }, most);
                }
            }
        }
        found.listed.sort_by_key(|d| d.cluster);
        found
    }
}

/// The difference between counts by walking and counts as stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Clusters that are counted less often than they are referred to.
    pub too_low: u64,
    /// Clusters that are counted more often.
    pub leaks: u64,
    /// One past the highest cluster of the file that is counted or referred to.
    pub end: u64,
    /// The differences, in order, at most as many of each kind as were asked for.
    pub listed: Vec<Discrepancy>,
    listed_leaks: usize,
}

impl Comparison {
    fn meet(&mut self, found: Discrepancy, most: usize) {
        if found.stored == found.references {
            return;
        }
        let listed = if found.is_leak() {
            self.leaks += 1;
            self.listed_leaks += 1;
            self.listed_leaks
        } else {
            self.too_low += 1;
            usize::try_from(self.too_low).unwrap_or(usize::MAX)
        };
        if listed <= most {
            self.listed.push(found);
        }
    }

    /// Whether every difference is listed.
    pub fn is_whole(&self) -> bool {
        self.listed.len() as u64 == self.too_low + self.leaks
    }
}

/// What one block counts, for blocks of clusters that nobody refers to.
struct Used {
    count: u64,
    last: Option<u64>,
}

impl Used {
    fn of(get: impl Fn(usize) -> u64, per_block: u64, empty: bool) -> Self {
        let slots = if empty { 0 } else { per_block };
        let (mut count, mut last) = (0, None);
        for (slot, index) in (0..slots).zip(0..) {
            if get(index) != 0 {
                count += 1;
                last = Some(slot);
            }
        }
        Self { count, last }
    }
}
