//! Counts and COPIED flags of whole trees: by refcount blocks and by spans of L2 entries, without a look-up a cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pleach_alloc::{AllocError, Census, Change, Place, RefcountTable};
use pleach_format::{HostCluster, HostOffset, L1Entry, Mapping};
use pleach_store::Store;

use crate::check::Counts;
use crate::publish::barrier;
use crate::spans::spans;
use crate::workers::{collect, tables_a_piece};
use crate::{Image, ImageError, Workers};

/// Where the L2 tables are that `l1` leads to, in order, and how many entries lead to each.
///
/// # Errors
/// An entry that breaks the format.
pub(crate) fn tables_of(image: &Image, l1: &[L1Entry]) -> Result<Vec<(u64, u64)>, ImageError> {
    let mut tables: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in l1 {
        if let Some(at) = entry.l2_table(image.geometry()).map_err(ImageError::format("L1 entry", None))? {
            *tables.entry(at.0).or_insert(0) += 1;
        }
    }
    Ok(tables.into_iter().collect())
}

/// What the trees under the entries `l1` are counted for: each cluster once for each path that leads there.
///
/// # Errors
/// A damaged entry or table.
pub(crate) fn references(image: &Image, l1: &[L1Entry], workers: &dyn Workers) -> Result<Census, ImageError> {
    let (g, version, place) = (image.geometry(), image.header().version(), Place::of(image.header()));
    let tables = tables_of(image, l1)?;
    let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
    let census = Mutex::new(Census::new());
    let done = collect(workers, pieces.len(), |i| -> Result<(), ImageError> {
        let mut bytes = vec![0; g.cluster_bytes()];
        // First byte, length, and how often they are referred to.
        let mut met: Vec<(u64, u64, u64)> = Vec::new();
        for &(at, times) in pieces.get(i).copied().unwrap_or_default() {
            met.push((at, g.cluster_size(), times));
            image.read_table(HostOffset(at), &mut bytes)?;
            spans(&bytes, g, |span| {
                let mapping = span.entry.descriptor.decode(g, version);
                match mapping.map_err(ImageError::format("L2 entry", None))? {
                    _ if image.external_data() => {}
                    Mapping::Data(at) | Mapping::ZeroAllocated(at) => {
                        met.push((at.0, span.len as u64 * g.cluster_size(), times));
                    }
                    Mapping::Compressed(extent) => {
                        met.push((extent.offset.0, image.counted_bytes(extent).max(1), times));
                    }
                    Mapping::Unallocated | Mapping::Zero => {}
                }
                Ok(())
            })?;
        }
        let mut census = census.lock().unwrap_or_else(PoisonError::into_inner);
        for (offset, len, times) in met {
            census.add_bytes(&place, HostOffset(offset), len, times);
        }
        Ok(())
    });
    done.into_iter().collect::<Result<(), _>>()?;
    Ok(census.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Whether the counts are only looked at or changed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Find out whether it can be done.
    Try,
    /// Write. Nothing is flushed.
    Write,
}

/// Changes the counts in `store` by the references of `census`. Returns what became free: ranges of clusters, in order.
///
/// # Errors
/// A count that would not fit, [`ImageError::Refused`], or would be below 0; what the system says.
pub(crate) fn change_counts(
    store: &dyn Store,
    place: Place,
    census: &Census,
    change: Change,
    effect: Effect,
    workers: &dyn Workers,
) -> Result<Vec<Range<u64>>, ImageError> {
    let table = RefcountTable::load(store, place)?;
    let mut known: Vec<_> = table.blocks().iter().flatten().collect();
    known.sort_unstable();
    if known.windows(2).any(|pair| pair.first() == pair.last()) {
        let what = "two entries of the refcount table lead to one block".to_owned();
        return Err(ImageError::Damaged { what, offset: Some(place.table.0) });
    }
    let blocks = census.blocks(&place);
    let pieces: Vec<_> = blocks.chunks(tables_a_piece(place.geometry.cluster_bytes())).collect();
    let done = collect(workers, pieces.len(), |i| -> Result<Vec<Range<u64>>, ImageError> {
        let mut bytes = vec![0; place.geometry.cluster_bytes()];
        let mut freed = Vec::new();
        for &index in pieces.get(i).copied().unwrap_or_default() {
            let at = usize::try_from(index).ok().and_then(|i| *table.blocks().get(i)?);
            match at {
                Some(at) => store.read_at(at.0, &mut bytes).map_err(ImageError::io("read refcounts"))?,
                None => bytes.fill(0),
            }
            let changed = census.change(&place, index, change, &mut bytes, &mut freed);
            if !changed.map_err(refusal)? || effect == Effect::Try {
                continue;
            }
            let first = HostCluster(index * place.width.per_block(place.geometry));
            let at = at.ok_or(AllocError::Underflow { cluster: first })?;
            store.write_at(at.0, &bytes).map_err(ImageError::io("write refcounts"))?;
        }
        Ok(freed)
    });
    let mut all: Vec<Range<u64>> = Vec::new();
    for freed in done {
        for range in freed? {
            match all.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => all.push(range),
            }
        }
    }
    Ok(all)
}

/// A count that cannot be higher is no damage: the image is made for fewer references.
fn refusal(error: AllocError) -> ImageError {
    match error {
        AllocError::Overflow { .. } => ImageError::Refused { what: error.to_string() },
        other => other.into(),
    }
}

/// How many refcount blocks are needed: those behind count nothing but one another.
pub(crate) fn needed_blocks(table: &RefcountTable) -> u64 {
    let place = table.place();
    let (g, width) = (place.geometry, place.width);
    let per_block = width.per_block(g);
    let mut dropped = BTreeSet::new();
    let last = table.blocks().len() as u64;
    for index in (0..last).rev() {
        let Some((at, bytes)) = table.read_block(index) else { continue };
        dropped.insert(g.host_cluster(at).0);
        let mut slot = 0;
        while slot < usize::try_from(per_block).unwrap_or(0) {
            let alike = width.alike(&bytes, slot, usize::MAX - slot).max(1);
            let first = index * per_block + slot as u64;
            let only_blocks = || (first..first + alike as u64).all(|c| dropped.contains(&c));
            if width.get(&bytes, slot) != 0 && !only_blocks() {
                return index + 1;
            }
            slot += alike;
        }
    }
    0
}

/// Lets the refcount table lead to no block from number `keep` on; they count nothing but one another. Flushed. Returns the
/// counts that the other blocks have of them.
///
/// A crash leaves clusters that nothing leads to: uncounted, or leaks.
///
/// # Errors
/// What the system says.
pub(crate) fn drop_blocks(store: &dyn Store, place: Place, keep: u64) -> Result<Census, ImageError> {
    let table = RefcountTable::load(store, place)?;
    let per_block = place.width.per_block(place.geometry);
    let mut left = Census::new();
    let kept = usize::try_from(keep).unwrap_or(usize::MAX);
    let mut last = None;
    for (index, block) in table.blocks().iter().enumerate().skip(kept) {
        let Some(at) = block else { continue };
        last = Some(index);
        let cluster = place.geometry.host_cluster(*at);
        if cluster.0 / per_block < keep {
            left.add(cluster, 1);
        }
    }
    if let Some(last) = last {
        let zeros = vec![0; (last + 1 - kept) * 8];
        let io = ImageError::io("write the refcount table");
        store.write_at(place.table.0 + keep * 8, &zeros).map_err(io)?;
        barrier(store)?;
    }
    Ok(left)
}

/// What COPIED flags shall say.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Flags<'a> {
    /// Nobody owns anything alone.
    Clear,
    /// What these counts say.
    Fit(&'a RefcountTable),
}

/// Whether the COPIED flags of the active state fit the counts in the file. For an image in which nothing else is wrong.
///
/// # Errors
/// A damaged entry or table; what the system says.
pub fn copied_fits(image: &Image, workers: &dyn Workers) -> Result<bool, ImageError> {
    let table = RefcountTable::load(&**image.store(), Place::of(image.header()))?;
    Ok(!set_copied(image, Flags::Fit(&table), Effect::Try, workers)?)
}

/// Lets the COPIED flags of the active state fit the counts in the file, which are durable. Nothing is flushed. True if
/// anything was written.
///
/// # Errors
/// As [`copied_fits`].
pub fn fit_copied(image: &Image, workers: &dyn Workers) -> Result<bool, ImageError> {
    let table = RefcountTable::load(&**image.store(), Place::of(image.header()))?;
    set_copied(image, Flags::Fit(&table), Effect::Write, workers)
}

/// Finds the COPIED flags of the active state that are not as they should be, and writes them with [`Effect::Write`]. Nothing
/// is flushed. True if there are any.
///
/// # Errors
/// A damaged entry or table; what the system says.
pub(crate) fn set_copied(
    image: &Image,
    flags: Flags<'_>,
    effect: Effect,
    workers: &dyn Workers,
) -> Result<bool, ImageError> {
    let write = |at: u64, bytes: &[u8], what: &'static str| match effect {
        Effect::Try => Ok(()),
        Effect::Write => image.store().write_at(at, bytes).map_err(ImageError::io(what)),
    };
    let (g, version) = (image.geometry(), image.header().version());
    let tables = tables_of(image, image.l1())?;
    let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
    let done = collect(workers, pieces.len(), |i| -> Result<bool, ImageError> {
        let mut bytes = vec![0; g.cluster_bytes()];
        let (mut fitted, mut wrong) = (Vec::new(), false);
        let mut owners = Owners::of(flags);
        for &(at, _) in pieces.get(i).copied().unwrap_or_default() {
            image.read_table(HostOffset(at), &mut bytes)?;
            // First and last entry that change.
            let mut changed: Option<(usize, usize)> = None;
            fitted.clone_from(&bytes);
            spans(&bytes, g, |span| {
                let raw = span.entry.descriptor;
                let Ok(Mapping::Data(host) | Mapping::ZeroAllocated(host)) = raw.decode(g, version) else {
                    return Ok(());
                };
                if image.external_data() {
                    // Every allocated entry has the flag: nothing there is counted.
                    return Ok(());
                }
                let (first, mut done) = (g.host_cluster(host).0, 0);
                while done < span.len {
                    let (owned, n) = owners.alike(HostCluster(first + done as u64), span.len - done);
                    if owned != raw.copied() {
                        let from = span.slot + done;
                        flip(&mut fitted, g.l2_entry_bytes(), from..from + n);
                        changed = Some((changed.map_or(from, |c| c.0), from + n - 1));
                    }
                    done += n;
                }
                Ok(())
            })?;
            if let Some((first, last)) = changed {
                let width = g.l2_entry_bytes();
                let part = fitted.get(first * width..(last + 1) * width).unwrap_or_default();
                write(at + (first * width) as u64, part, "write an L2 table")?;
                wrong = true;
            }
        }
        Ok(wrong)
    });
    let mut wrong = false;
    for piece in done {
        wrong |= piece?;
    }
    let mut owners = Owners::of(flags);
    let wanted = |entry: &L1Entry| -> Result<L1Entry, ImageError> {
        let at = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))?;
        Ok(at.map_or(*entry, |at| entry.with_copied(owners.alike(g.host_cluster(at), 1).0)))
    };
    let l1 = image.l1().iter().map(wanted).collect::<Result<Vec<_>, _>>()?;
    let differs = |(a, b): (&L1Entry, &L1Entry)| a != b;
    let first = l1.iter().zip(image.l1()).position(differs);
    let last = l1.iter().zip(image.l1()).rposition(differs);
    if let Some((first, last)) = first.zip(last) {
        let part = l1.get(first..=last).unwrap_or_default();
        let bytes: Vec<u8> = part.iter().flat_map(|e| e.0.to_be_bytes()).collect();
        let at = image.l1_table_offset().0 + first as u64 * 8;
        write(at, &bytes, "write the L1 table")?;
        wrong = true;
    }
    Ok(wrong)
}

/// Changes the COPIED flags of entries.
fn flip(table: &mut [u8], width: usize, entries: Range<usize>) {
    let part = table.get_mut(entries.start * width..entries.end * width).unwrap_or_default();
    for entry in part.chunks_mut(width) {
        if let Some(byte) = entry.first_mut() {
            *byte ^= 0x80;
        }
    }
}

enum Owners<'a> {
    Nobody,
    Counts(Counts<'a>),
}

impl<'a> Owners<'a> {
    fn of(flags: Flags<'a>) -> Self {
        match flags {
            Flags::Clear => Self::Nobody,
            Flags::Fit(table) => Self::Counts(Counts::new(table)),
        }
    }

    /// Whether `first` has one owner, and for how many clusters from there on, at most `most`, that is the same.
    fn alike(&mut self, first: HostCluster, most: usize) -> (bool, usize) {
        match self {
            Self::Nobody => (false, most),
            Self::Counts(counts) => {
                let (count, n) = counts.alike(first, most);
                (count == 1, n)
            }
        }
    }
}
