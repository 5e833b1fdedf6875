//! What one image says about stretches of guest bytes, owned host clusters included.

use std::ops::Range;

use pleach_alloc::{Place, RefcountTable};
use pleach_format::{ExtendedL2Entry, Geometry, GuestOffset, HostOffset, L2Entry, Mapping};

use crate::image::check_inside;
use crate::{Image, ImageError};

/// What an image says about a stretch of guest bytes. A host offset is that of the first byte, in the image or in its
/// external data file; encrypted bytes have none.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Nothing: the backing file answers. A host offset, where a cluster is owned all the same (subclusters).
    Unallocated(Option<u64>),
    /// Zeros. A host offset, where a cluster is owned all the same.
    Zero(Option<u64>),
    /// Data.
    Data(Option<u64>),
    /// Compressed clusters.
    Compressed,
}

impl Status {
    /// The status of the bytes `by` further on.
    #[must_use]
    pub fn shifted(self, by: u64) -> Self {
        let shift = |host: Option<u64>| host.map(|h| h + by);
        match self {
            Self::Unallocated(host) => Self::Unallocated(shift(host)),
            Self::Zero(host) => Self::Zero(shift(host)),
            Self::Data(host) => Self::Data(shift(host)),
            Self::Compressed => Self::Compressed,
        }
    }

    /// Whether `next` goes on, behind `len` bytes, as this would.
    fn continues(self, len: u64, next: Self) -> bool {
        self.shifted(len) == next
    }
}

/// A stretch of guest bytes of one status.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// First guest byte.
    pub guest: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// What the image says.
    pub status: Status,
}

impl Stretch {
    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.guest + self.len
    }
}

/// A bitmap of subclusters that all hold data.
const ALL_DATA: u64 = 0xffff_ffff;

impl Image {
    /// What the image says about the guest bytes of `range`, which lies inside its size: in order, all of it covered,
    /// neighbours that continue each other joined. Reads tables only, and works on images whose data cannot be read.
    ///
    /// # Errors
    /// An L2 table outside the file; entries that break the format or lead out of the file.
    pub fn stretches(&self, range: Range<u64>) -> Result<Vec<Stretch>, ImageError> {
        let g = self.geometry();
        let mut out = Joined::default();
        let mut table = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let empty = self.empty_until(at, range.end);
            if empty > at {
                out.push(at, empty - at, Status::Unallocated(None));
                at = empty;
                continue;
            }
            let end = ((at / g.l1_span() + 1) * g.l1_span()).min(range.end);
            self.read_entries(at..end, &mut table)?;
            self.table_stretches(at..end, &table, &mut out)?;
            at = end;
        }
        Ok(out.stretches)
    }

    /// The end of the stretch from `at` that has no L2 tables at all; `at` itself if there is one. At most `end`.
    pub fn empty_until(&self, at: u64, end: u64) -> u64 {
        let span = self.geometry().l1_span();
        let index = |slot| usize::try_from(slot).unwrap_or(usize::MAX).min(self.l1().len());
        let rest = self.l1().get(index(at / span)..index(end.div_ceil(span))).unwrap_or_default();
        match rest.iter().position(|entry| entry.with_copied(false).0 != 0) {
            Some(0) => at,
            Some(slots) => ((at / span + slots as u64) * span).min(end),
            None => end,
        }
    }

    /// Whether far more clusters are counted than the file takes on disk: then some clusters that count as data were
    /// never written, and the file's holes say which. QEMU's measure is this one: a tenth more, and at least two.
    pub fn preallocated_metadata(&self) -> bool {
        let (g, Ok(stat)) = (self.geometry(), self.store().stat()) else { return false };
        let on_disk = stat.allocated / g.cluster_size();
        let enough = (on_disk + 2).max(on_disk.saturating_mul(10) / 9);
        let clusters = self.file_len().div_ceil(g.cluster_size());
        if enough > clusters {
            return false;
        }
        let place = Place::of(self.header());
        let Ok(table) = RefcountTable::load(&**self.store(), place) else { return false };
        let per_block = place.width.per_block(g);
        let mut counted = 0u64;
        for index in 0..clusters.div_ceil(per_block) {
            let Some((_, block)) = table.read_block(index) else { continue };
            let slots = usize::try_from((clusters - index * per_block).min(per_block)).unwrap_or(0);
            counted += (0..slots).filter(|&slot| place.width.get(&block, slot) != 0).count() as u64;
            if counted >= enough {
                return true;
            }
        }
        false
    }

    /// Reads the L2 entries of `range`, which lies in one table, that exists.
    fn read_entries(&self, range: Range<u64>, out: &mut Vec<u8>) -> Result<(), ImageError> {
        let g = self.geometry();
        let slot = usize::try_from(range.start / g.l1_span()).unwrap_or(usize::MAX);
        let entry = self.l1().get(slot).copied().unwrap_or_default();
        let table = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))?.unwrap_or_default();
        check_inside("L2 table", table.0, g.cluster_size(), self.file_len(), g)?;
        let cluster = |guest| g.guest_cluster(GuestOffset(guest));
        let first = g.l2_index(cluster(range.start));
        let count = cluster(range.end - 1).0 - cluster(range.start).0 + 1;
        out.resize(usize::try_from(count).unwrap_or(0) * g.l2_entry_bytes(), 0);
        let at = table.0 + (first * g.l2_entry_bytes()) as u64;
        // By `pread`: pages of a map would count as this process's memory, and these are read once.
        self.store().read_at(at, out).map_err(ImageError::io("read an L2 table"))
    }

    /// The stretches of `range`, whose entries are `table`.
    fn table_stretches(&self, range: Range<u64>, table: &[u8], out: &mut Joined) -> Result<(), ImageError> {
        let g = self.geometry();
        let (words, _) = table.as_chunks::<8>();
        let step = g.l2_entry_bytes() / 8;
        let entry = |i: usize| {
            let word = |i: usize| words.get(i).map_or(0, |w| u64::from_be_bytes(*w));
            ExtendedL2Entry {
                descriptor: L2Entry(word(i * step)),
                subclusters: if step == 2 { word(i * step + 1) } else { ALL_DATA },
            }
        };
        let count = words.len() / step;
        let base = range.start & !(g.cluster_size() - 1);
        let mut clipped = Clip { range, out };
        let mut i = 0;
        while i < count {
            let first = entry(i);
            let guest = base + i as u64 * g.cluster_size();
            let advance = advance_of(first, g);
            let same = (i + 1..count)
                .zip(1u64..)
                .take_while(|&(next, n)| {
                    advance.is_some_and(|by| entry(next) == moved(first, by.wrapping_mul(n)))
                })
                .count();
            self.entry_stretches(first, guest, same as u64 + 1, &mut clipped)?;
            if same > 0 {
                // The last one is judged like the first, and those between lie between.
                let behind = guest + same as u64 * g.cluster_size();
                self.entry_stretches(entry(i + same), behind, 1, &mut Clip::nowhere(&mut Joined::default()))?;
            }
            i += same + 1;
        }
        Ok(())
    }

    /// The stretches of the cluster at `guest`, and of the `clusters - 1` behind it that go on as it does.
    fn entry_stretches(
        &self,
        entry: ExtendedL2Entry,
        guest: u64,
        clusters: u64,
        out: &mut Clip<'_>,
    ) -> Result<(), ImageError> {
        let g = self.geometry();
        let bad = ImageError::format("L2 entry", None);
        let host = |at: HostOffset| self.header().encryption().is_none().then_some(at.0);
        let owned = self.descriptor_mapping(entry, guest);
        if !g.extended_l2() {
            let mapping = owned.map_err(bad)?;
            self.check_mapping(mapping, guest)?;
            let status = match mapping {
                Mapping::Unallocated => Status::Unallocated(None),
                Mapping::Zero => Status::Zero(None),
                Mapping::ZeroAllocated(at) => Status::Zero(host(at)),
                Mapping::Data(at) => Status::Data(host(at)),
                Mapping::Compressed(_) => Status::Compressed,
            };
            out.push(guest, clusters * g.cluster_size(), status);
            return Ok(());
        }
        let external = self.external_data();
        let at = GuestOffset(guest);
        let runs = if external { entry.decode_external(g, at) } else { entry.decode(g) };
        let runs = runs.map_err(bad)?;
        for run in &runs {
            self.check_mapping(run.mapping, guest)?;
            let from = u64::from(run.first) * g.subcluster_size();
            let status = match (run.mapping, &owned) {
                (Mapping::Unallocated, Ok(Mapping::Data(at))) => {
                    Status::Unallocated(host(*at).map(|h| h + from))
                }
                (Mapping::Unallocated, _) => Status::Unallocated(None),
                (Mapping::Zero, _) => Status::Zero(None),
                (Mapping::ZeroAllocated(at), _) => Status::Zero(host(at)),
                (Mapping::Data(at), _) => Status::Data(host(at)),
                (Mapping::Compressed(_), _) => Status::Compressed,
            };
            // Several clusters are handed over only where each is one run.
            let len = u64::from(run.count) * g.subcluster_size() * if runs.len() == 1 { clusters } else { 1 };
            out.push(guest + from, len, status);
        }
        Ok(())
    }

    /// What the descriptor of an entry says, its subclusters left aside.
    fn descriptor_mapping(
        &self,
        entry: ExtendedL2Entry,
        guest: u64,
    ) -> Result<Mapping, pleach_format::FormatError> {
        if self.external_data() {
            entry.descriptor.decode_external(self.geometry(), GuestOffset(guest))
        } else {
            entry.descriptor.decode(self.geometry(), self.header().version())
        }
    }
}

/// By how much the descriptor of each following cluster is larger, in a run of clusters of one kind. `None` for entries
/// that are looked at one by one.
fn advance_of(entry: ExtendedL2Entry, g: Geometry) -> Option<u64> {
    let raw = entry.descriptor;
    match (raw.with_copied(false).0, entry.subclusters) {
        (0, 0) => Some(0),
        (0 | 1, ALL_DATA) if !g.extended_l2() => Some(0),
        (offset, ALL_DATA) if offset > 1 && !raw.is_compressed() => Some(g.cluster_size()),
        _ => None,
    }
}

fn moved(entry: ExtendedL2Entry, by: u64) -> ExtendedL2Entry {
    ExtendedL2Entry { descriptor: L2Entry(entry.descriptor.0.wrapping_add(by)), ..entry }
}

/// Stretches in order, joined where one continues the other.
#[derive(Default)]
struct Joined {
    stretches: Vec<Stretch>,
}

impl Joined {
    fn push(&mut self, guest: u64, len: u64, status: Status) {
        if let Some(last) = self.stretches.last_mut()
            && last.end() == guest
            && last.status.continues(last.len, status)
        {
            last.len += len;
            return;
        }
        self.stretches.push(Stretch { guest, len, status });
    }
}

/// Hands on what lies in a range.
struct Clip<'a> {
    range: Range<u64>,
    out: &'a mut Joined,
}

impl<'a> Clip<'a> {
    fn nowhere(out: &'a mut Joined) -> Self {
        Self { range: 0..0, out }
    }

    fn push(&mut self, guest: u64, len: u64, status: Status) {
        let (from, to) = (guest.max(self.range.start), (guest + len).min(self.range.end));
        if from < to {
            self.out.push(from, to - from, status.shifted(from - guest));
        }
    }
}
