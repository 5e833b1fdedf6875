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

    /// Every cluster whose stored count differs, in order.
    pub fn compare(&self, table: &RefcountTable) -> Vec<Discrepancy> {
        let mut stored = BTreeMap::new();
        let mut found = Vec::new();
        table.for_each_used(|cluster, count| {
            let references = self.count(cluster);
            let page = stored.entry(cluster.0 / PAGE).or_insert_with(|| vec![false; 4096]);
            if let Some(known) = usize::try_from(cluster.0 % PAGE).ok().and_then(|i| page.get_mut(i)) {
                *known = true;
            }
            if references != count {
                found.push(Discrepancy { cluster, stored: count, references });
            }
        });
        for (&page, counts) in &self.pages {
            for (slot, &references) in counts.iter().enumerate() {
                let known = stored.get(&page).and_then(|p| p.get(slot)).copied().unwrap_or(false);
                if references > 0 && !known {
                    let cluster = HostCluster(page * PAGE + slot as u64);
                    found.push(Discrepancy { cluster, stored: 0, references: references.into() });
                }
            }
        }
        found.sort_by_key(|d| d.cluster);
        found
    }
}
