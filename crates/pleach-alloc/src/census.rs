//! Counts by walking, against counts as stored.

use std::collections::BTreeMap;

use pleach_format::{HostCluster, HostOffset};

use crate::{Place, RefcountTable};

const PAGE: u64 = 4096;

/// The references to this many clusters in a row.
type Page = [u32; 4096];

static NONE: Page = [0; 4096];

/// How many references to each host cluster a walk has met. Memory follows the clusters met, not the file's length.
#[derive(Debug, Default)]
pub struct Census {
    /// In the order in which they were met.
    pages: Vec<Box<Page>>,
    /// Where each page is in `pages`, by its number.
    places: BTreeMap<u64, usize>,
    /// Number and place of the page that was used last: the next cluster is mostly on it, too.
    last: Option<(u64, usize)>,
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
        self.add_run(cluster, 1, times);
    }

    /// Meets `times` references to each of `n` clusters in a row, the first of which is `cluster`.
    fn add_run(&mut self, cluster: HostCluster, n: u64, times: u64) {
        let times = u32::try_from(times).unwrap_or(u32::MAX);
        let (mut first, mut left) = (cluster.0, n);
        while left > 0 {
            let (number, start) = (first / PAGE, slot(HostCluster(first)));
            let n = left.min(PAGE - first % PAGE);
            let place = match self.last {
                Some((last, place)) if last == number => place,
                _ => self.turn_to(number),
            };
            let page = self.pages.get_mut(place);
            let counts = page.and_then(|page| page.get_mut(start..start + in_memory(n)));
            for count in counts.unwrap_or_default() {
                *count = count.saturating_add(times);
            }
            (first, left) = (first + n, left - n);
        }
    }

    /// Makes page `number`, if there is none, and remembers its place.
    #[cold]
    fn turn_to(&mut self, number: u64) -> usize {
        let place = *self.places.entry(number).or_insert(self.pages.len());
        if place == self.pages.len() {
            // Not on the stack first.
            let page = vec![0; NONE.len()].into_boxed_slice();
            self.pages.push(page.try_into().expect("as long as a page"));
        }
        self.last = Some((number, place));
        place
    }

    fn page(&self, number: u64) -> Option<&Page> {
        self.places.get(&number).and_then(|&place| self.pages.get(place)).map(|page| &**page)
    }

    /// Numbers and pages in order.
    fn pages(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.places.iter().filter_map(|(&number, &place)| Some((number, &**self.pages.get(place)?)))
    }

    /// One past the highest cluster met.
    pub fn end(&self) -> u64 {
        let last = self.places.last_key_value().and_then(|(&number, _)| Some((number, self.page(number)?)));
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
        self.add_run(HostCluster(first), last - first + 1, times);
    }

    /// Forgets one reference to a cluster.
    pub fn forget(&mut self, cluster: HostCluster) {
        let place = self.places.get(&(cluster.0 / PAGE));
        let page = place.and_then(|&place| self.pages.get_mut(place));
        if let Some(count) = page.and_then(|page| page.get_mut(slot(cluster))) {
            *count = count.saturating_sub(1);
        }
    }

    /// Calls `each` with every cluster that was met and its references, in order.
    pub fn for_each(&self, mut each: impl FnMut(HostCluster, u64)) {
        for (page, counts) in self.pages() {
            for (slot, &references) in (0..).zip(counts) {
                if references > 0 {
                    each(HostCluster(page * PAGE + slot), references.into());
                }
            }
        }
    }

    /// References met to `cluster`.
    pub fn count(&self, cluster: HostCluster) -> u64 {
        let page = self.page(cluster.0 / PAGE);
        page.and_then(|page| page.get(slot(cluster))).copied().unwrap_or(0).into()
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
        // What lies both in one block and on one page: both hold a power of two.
        let stride = per_block.min(PAGE);
        let mut shared: Option<(HostOffset, Vec<u8>, Option<Used>)> = None;
        let mut blocks: Vec<u64> = Vec::new();
        for (index, block) in (0..bound.div_ceil(per_block)).zip(table.blocks()) {
            let Some(offset) = *block else { continue };
            blocks.push(index);
            if shared.as_ref().is_none_or(|(at, ..)| *at != offset) {
                let bytes = table.read_block(index).map(|(_, bytes)| bytes).unwrap_or_default();
                shared = Some((offset, bytes, None));
            }
            let Some((_, bytes, used)) = &mut shared else { continue };
            let first = index * per_block;
            let nobody = self.places.range(first / PAGE..=(first + per_block - 1) / PAGE).next().is_none();
            if nobody && first + per_block <= clusters {
                let used = used.get_or_insert_with(|| {
                    let empty = bytes.iter().all(|&b| b == 0);
                    Used::of(|slot| width.get(bytes, slot), per_block, empty)
                });
                if used.count == 0 || found.listed_leaks >= most {
                    found.leaks += used.count;
                    found.end = used.last.map_or(found.end, |last| found.end.max(first + last + 1));
                    continue;
                }
            }
            let last = (first + per_block).min(bound);
            let parts = (first..last).step_by(in_memory(stride));
            for (part, bytes) in parts.zip(bytes.chunks(in_memory(stride * u64::from(width.bits()) / 8))) {
                let counts = self.page(part / PAGE).unwrap_or(&NONE);
                let counts = portion(counts, part, stride.min(last - part));
                if width.holds(bytes, counts) {
                    // What is counted here is referred to as well: the end is known.
                    continue;
                }
                for ((slot, at), &references) in (0..).zip(part..).zip(counts) {
                    let (stored, references) = (width.get(bytes, slot), u64::from(references));
                    if at >= clusters && stored > references {
                        continue;
                    }
                    if stored != 0 && at < clusters {
                        found.end = found.end.max(at + 1);
                    }
                    found.meet(Discrepancy { cluster: HostCluster(at), stored, references }, most);
                }
            }
        }
        for (page, counts) in self.pages() {
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

/// Where a cluster is on its page.
fn slot(cluster: HostCluster) -> usize {
    in_memory(cluster.0 % PAGE)
}

/// The `len` counts of a page from that of cluster `first`.
fn portion(page: &Page, first: u64, len: u64) -> &[u32] {
    let start = slot(HostCluster(first));
    page.get(start..start + in_memory(len)).unwrap_or(&[])
}

/// A number of things in memory, as an index.
fn in_memory(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
