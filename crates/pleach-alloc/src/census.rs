//! Counts by walking, against counts as stored.

use std::collections::BTreeMap;
use std::ops::Range;

use pleach_format::{HostCluster, HostOffset};

use crate::{AllocError, Place, RefcountTable};

const PAGE: u64 = 4096;

/// The references to this many clusters in a row.
type Page = [u32; 4096];

/// A page in memory: a byte a cluster, unless one of them is referred to more often than a byte can say.
#[derive(Debug)]
enum Counts {
    Narrow(Box<[u8; 4096]>),
    Wide(Box<Page>),
}

/// A page of counts as numbers of one width, to be used again.
struct Leaf(Box<Page>);

/// How many references to each host cluster a walk has met. Memory follows the clusters met, not the file's length: a byte
/// each, or four where a cluster among 4096 has more than 255.
#[derive(Debug, Default)]
pub struct Census {
    /// In the order in which they were met.
    pages: Vec<Counts>,
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
    pub fn add_run(&mut self, cluster: HostCluster, n: u64, times: u64) {
        let times = u32::try_from(times).unwrap_or(u32::MAX);
        let (mut first, mut left) = (cluster.0, n);
        while left > 0 {
            let (number, start) = (first / PAGE, slot(HostCluster(first)));
            let n = left.min(PAGE - first % PAGE);
            let place = match self.last {
                Some((last, place)) if last == number => place,
                _ => self.turn_to(number),
            };
            if let Some(page) = self.pages.get_mut(place) {
                page.add(start..start + in_memory(n), times);
            }
            (first, left) = (first + n, left - n);
        }
    }

    /// Makes page `number`, if there is none, and remembers its place.
    #[cold]
    fn turn_to(&mut self, number: u64) -> usize {
        let place = *self.places.entry(number).or_insert(self.pages.len());
        if place == self.pages.len() {
            self.pages.push(Counts::Narrow(boxed()));
        }
        self.last = Some((number, place));
        place
    }

    fn page(&self, number: u64) -> Option<&Counts> {
        self.places.get(&number).and_then(|&place| self.pages.get(place))
    }

    /// Calls `each` with the numbers and counts of all pages, in order.
    fn for_each_page(&self, mut each: impl FnMut(u64, &Page)) {
        let mut leaf = Leaf::new();
        for (&number, &place) in &self.places {
            if let Some(page) = self.pages.get(place) {
                each(number, leaf.of(Some(page)));
            }
        }
    }

    /// One past the highest cluster met.
    pub fn end(&self) -> u64 {
        let last = self.places.last_key_value().and_then(|(&number, _)| Some((number, self.page(number)?)));
        let slot = last.and_then(|(_, counts)| Leaf::new().of(Some(counts)).iter().rposition(|&c| c > 0));
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
        match place.and_then(|&place| self.pages.get_mut(place)) {
            Some(Counts::Narrow(page)) => lower(&mut page[..], slot(cluster)),
            Some(Counts::Wide(page)) => lower(&mut page[..], slot(cluster)),
            None => {}
        }
    }

    /// Calls `each` with every cluster that was met and its references, in order.
    pub fn for_each(&self, mut each: impl FnMut(HostCluster, u64)) {
        self.for_each_page(|page, counts| {
            for (slot, &references) in (0..).zip(counts) {
                if references > 0 {
                    each(HostCluster(page * PAGE + slot), references.into());
                }
            }
        });
    }

    /// Takes from both what both have met: of each cluster's references the lesser number.
    pub fn cancel(&mut self, other: &mut Self) {
        for (number, &place) in &self.places {
            let theirs = other.places.get(number).and_then(|&place| other.pages.get_mut(place));
            let (Some(ours), Some(theirs)) = (self.pages.get_mut(place), theirs) else { continue };
            match (&mut *ours, &mut *theirs) {
                (Counts::Narrow(a), Counts::Narrow(b)) => {
                    for (a, b) in a.iter_mut().zip(&mut **b) {
                        let common = (*a).min(*b);
                        (*a, *b) = (*a - common, *b - common);
                    }
                }
                _ => {
                    for (a, b) in ours.widen().iter_mut().zip(theirs.widen()) {
                        let common = (*a).min(*b);
                        (*a, *b) = (*a - common, *b - common);
                    }
                }
            }
        }
    }

    /// The numbers of the refcount blocks that count any cluster met, in order.
    pub fn blocks(&self, place: &Place) -> Vec<u64> {
        let per_block = place.width.per_block(place.geometry);
        let mut blocks: Vec<u64> = Vec::new();
        let mut last = None;
        for &number in self.places.keys() {
            let first = number * PAGE / per_block;
            let end = ((number + 1) * PAGE).div_ceil(per_block);
            blocks.extend((first..end).filter(|&block| last.is_none_or(|last| block > last)));
            last = Some(end - 1);
        }
        blocks
    }

    /// Changes the counts of one refcount block, number `index`, by the references met. What became free is added to `freed`,
    /// in order, neighbours joined. True if anything changed.
    ///
    /// # Errors
    /// [`AllocError::Overflow`] or [`AllocError::Underflow`]; the block is of no use then.
    pub fn change(
        &self,
        place: &Place,
        index: u64,
        change: Change,
        block: &mut [u8],
        freed: &mut Vec<Range<u64>>,
    ) -> Result<bool, AllocError> {
        let (width, per_block) = (place.width, place.width.per_block(place.geometry));
        let stride = per_block.min(PAGE);
        let mut changed = false;
        let mut leaf = Leaf::new();
        let parts = (index * per_block..(index + 1) * per_block).step_by(in_memory(stride));
        for (part, bytes) in
            parts.zip(block.chunks_mut(in_memory(stride * u64::from(width.bits()) / 8).max(1)))
        {
            let Some(page) = self.page(part / PAGE) else { continue };
            let by = portion(leaf.of(Some(page)), part, stride);
            if by.iter().all(|&by| by == 0) {
                continue;
            }
            changed = true;
            let done = match change {
                Change::Raise => width.raise(bytes, by).map(|()| false),
                Change::Lower => width.lower(bytes, by),
            };
            let frees = done.map_err(|slot| {
                let cluster = HostCluster(part + slot as u64);
                match change {
                    Change::Raise => AllocError::Overflow { cluster, bits: width.bits() },
                    Change::Lower => AllocError::Underflow { cluster },
                }
            })?;
            if frees {
                for (slot, at) in (0..by.len()).zip(part..) {
                    if by.get(slot).is_some_and(|&by| by > 0) && width.get(bytes, slot) == 0 {
                        match freed.last_mut() {
                            Some(last) if last.end == at => last.end += 1,
                            _ => freed.push(at..at + 1),
                        }
                    }
                }
            }
        }
        Ok(changed)
    }

    /// References met to `cluster`.
    pub fn count(&self, cluster: HostCluster) -> u64 {
        match self.page(cluster.0 / PAGE) {
            Some(Counts::Narrow(page)) => page.get(slot(cluster)).copied().unwrap_or(0).into(),
            Some(Counts::Wide(page)) => page.get(slot(cluster)).copied().unwrap_or(0).into(),
            None => 0,
        }
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
        let mut leaf = Leaf::new();
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
                let counts = portion(leaf.of(self.page(part / PAGE)), part, stride.min(last - part));
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
        self.for_each_page(|page, counts| {
            let counted = |at| blocks.binary_search(&(at / per_block)).is_ok();
            let (first, last) = (page * PAGE, page * PAGE + PAGE - 1);
            if (first / per_block..=last / per_block).all(|block| counted(block * per_block)) {
                return;
            }
            for (at, &references) in (first..).zip(counts) {
                if references > 0 && !counted(at) {
                    let cluster = HostCluster(at);
                    found.meet(Discrepancy { cluster, stored: 0, references: references.into() }, most);
                }
            }
        });
        found.listed.sort_by_key(|d| d.cluster);
        found
    }
}

/// Which way counts change.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// One more for each reference met.
    Raise,
    /// One less for each.
    Lower,
}

impl Counts {
    fn add(&mut self, slots: Range<usize>, times: u32) {
        if let Self::Narrow(page) = self
            && let Ok(times) = u8::try_from(times)
            && let Some(counts) = page.get_mut(slots.clone())
            && counts.iter().fold(0, |most, &count| count.max(most)) <= u8::MAX - times
        {
            counts.iter_mut().for_each(|count| *count += times);
            return;
        }
        for count in self.widen().get_mut(slots).unwrap_or_default() {
            *count = count.saturating_add(times);
        }
    }

    fn widen(&mut self) -> &mut Page {
        if let Self::Narrow(_) = self {
            let mut page: Box<Page> = boxed();
            page.copy_from_slice(Leaf::new().of(Some(self)));
            *self = Self::Wide(page);
        }
        match self {
            Self::Wide(page) => page,
            Self::Narrow(_) => unreachable!("made wide just now"),
        }
    }
}

impl Leaf {
    fn new() -> Self {
        Self(boxed())
    }

    /// The counts of a page; zeros without one.
    fn of<'a>(&'a mut self, page: Option<&'a Counts>) -> &'a Page {
        match page {
            Some(Counts::Wide(page)) => page,
            Some(Counts::Narrow(page)) => {
                for (wide, narrow) in self.0.iter_mut().zip(&**page) {
                    *wide = (*narrow).into();
                }
                &self.0
            }
            None => {
                self.0.fill(0);
                &self.0
            }
        }
    }
}

/// Zeros, not on the stack first.
fn boxed<T: Default + Clone>() -> Box<[T; 4096]> {
    let page = vec![T::default(); 4096].into_boxed_slice();
    page.try_into().ok().expect("as long as a page")
}

fn lower<T: Copy + From<u8> + std::ops::Sub<Output = T> + PartialOrd>(page: &mut [T], slot: usize) {
    if let Some(count) = page.get_mut(slot).filter(|count| **count > T::from(0)) {
        *count = *count - T::from(1);
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
