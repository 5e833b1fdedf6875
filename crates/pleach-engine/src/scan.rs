//! Reading what layers say, in parallel over L1 slots.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pleach_format::{GuestOffset, HostOffset, L1Entry, Mapping, Run, RunList};
use pleach_image::{Chain, Image, ImageError, Layer, Piece, PieceKind};
use pleach_plan::{Cover, Found, Overlay, Owner};
use rayon::prelude::*;

use crate::{Error, Result};

/// What a layer says about its whole virtual disk.
///
/// # Errors
/// Damage in its tables, or a feature that keeps it from being read.
pub fn layer_runs(path: &Path, layer: &Layer) -> Result<RunList> {
    match layer {
        Layer::Qcow2(image) => image_runs(image).map_err(|e| Error::image(path, e)),
        Layer::Raw(raw) => {
            let mut runs = RunList::new();
            let data =
                raw.store().data_ranges(0..raw.size()).map_err(|e| Error::io("find the data of", path, e))?;
            let mut at = 0;
            for range in data {
                runs.push(GuestOffset(at), range.start - at, Mapping::Zero);
                runs.push(
                    GuestOffset(range.start),
                    range.end - range.start,
                    Mapping::Data(HostOffset(range.start)),
                );
                at = range.end;
            }
            runs.push(GuestOffset(at), raw.size() - at, Mapping::Zero);
            Ok(runs)
        }
    }
}

/// Most bytes of L1 tables that are read for all snapshots together: far more than disks have, and soon read.
const MOST_L1_BYTES: u64 = 1 << 30;

/// What each internal snapshot of an image says, in table order. Those of one L1 table and size are read once.
///
/// # Errors
/// As [`layer_runs`]; more than a GiB of L1 tables.
pub(crate) fn snapshot_covers(path: &Path, image: &Image) -> Result<Vec<Cover>> {
    let wrap = |e| Error::image(path, e);
    let mut known: HashMap<_, Cover> = HashMap::new();
    let (mut bytes, mut covers) = (0, Vec::new());
    for snapshot in image.each_snapshot().map_err(wrap)? {
        let snapshot = snapshot.map_err(wrap)?;
        let key = (snapshot.l1_table_offset, snapshot.l1_size, snapshot.disk_size);
        if let Some(cover) = known.get(&key) {
            covers.push(cover.clone());
            continue;
        }
        bytes += u64::from(snapshot.l1_size) * 8;
        if bytes > MOST_L1_BYTES {
            let feature = "an image with more than 1 GiB of snapshot L1 tables";
            return Err(wrap(ImageError::Unsupported { feature }));
        }
        let (l1, size) = image.snapshot_l1(&snapshot).map_err(wrap)?;
        let cover = Cover::of_runs(size, &state_runs(image, &l1, size).map_err(wrap)?);
        covers.push(cover.clone());
        known.insert(key, cover);
    }
    Ok(covers)
}

fn image_runs(image: &Image) -> Result<RunList, ImageError> {
    state_runs(image, image.l1(), image.size())
}

fn state_runs(image: &Image, l1: &[L1Entry], size: u64) -> Result<RunList, ImageError> {
    let left = AtomicUsize::new(usize::MAX);
    Ok(state_runs_within(image, l1, size, &left)?.unwrap_or_default())
}

/// The runs of a state, which are taken from `left`; `None` as soon as there are more.
fn state_runs_within(
    image: &Image,
    l1: &[L1Entry],
    size: u64,
    left: &AtomicUsize,
) -> Result<Option<RunList>, ImageError> {
    image.check_readable()?;
    let slots = usize::try_from(image.geometry().required_l1(size)).unwrap_or(usize::MAX);
    let span = image.geometry().l1_span();
    // A table that answers for several stretches is read once. One that is cut off by the disk's end is not like the
    // others, and where guest data is elsewhere, no two are alike.
    let mut first: HashMap<u64, usize> = HashMap::new();
    let used: Vec<(usize, usize)> = l1
        .iter()
        .take(slots)
        .enumerate()
        .filter(|(_, entry)| entry.0 != 0)
        .map(|(i, entry)| {
            let whole = (i as u64 + 1).saturating_mul(span) <= size && !image.external_data();
            (i, if whole { *first.entry(entry.0).or_insert(i) } else { i })
        })
        .collect();
    let within = |runs: &RunList| {
        let enough = |left: usize| left.checked_sub(runs.as_slice().len());
        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough).is_ok()
    };
    let parts: Option<HashMap<usize, RunList>> = used
        .par_iter()
        .filter(|(i, like)| i == like)
        .map(|&(i, _)| match left.load(Ordering::Relaxed) {
            0 => Ok(None),
            _ => image.runs_of(l1, size, i).map(|runs| within(&runs).then_some((i, runs))),
        })
        .collect::<Result<_, _>>()?;
    let Some(parts) = parts else { return Ok(None) };
    let mut all = RunList::new();
    for (i, like) in used {
        let Some(part) = parts.get(&like) else { continue };
        if i != like && !within(part) {
            return Ok(None);
        }
        for run in part.as_slice() {
            let guest = GuestOffset(run.guest.0 + (i - like) as u64 * span);
            all.push_run(Run { guest, ..*run });
        }
    }
    Ok(Some(all))
}

/// Fewer layers than this are read by their tables.
const INDEXED_DEPTH: usize = 3;

/// Most runs of an index: some 100 MiB of memory while it is made, half of that afterwards.
const MOST_RUNS: usize = 1 << 20;

/// The chain with an index, unless it is so short that this would save nothing, or its layers say more than an index may
/// hold: then it is read by its tables.
///
/// # Errors
/// As [`layer_runs`].
pub(crate) fn indexed(chain: &Chain) -> Result<Chain> {
    if chain.layers().len() < INDEXED_DEPTH {
        return Ok(chain.clone());
    }
    let left = AtomicUsize::new(MOST_RUNS);
    let overlay = |(depth, layer): (usize, &Arc<Layer>)| -> Result<Option<Overlay>> {
        let path = chain.paths().get(depth).cloned().unwrap_or_default();
        let runs = match &**layer {
            Layer::Raw(_) => Some(layer_runs(&path, layer)?),
            Layer::Qcow2(image) => state_runs_within(image, image.l1(), image.size(), &left)
                .map_err(|e| Error::image(&path, e))?,
        };
        Ok(runs.map(|runs| Overlay::of_runs(depth, layer.size(), &runs)))
    };
    let layers: Option<Vec<Overlay>> =
        chain.layers().par_iter().enumerate().map(overlay).collect::<Result<_>>()?;
    Ok(match layers.and_then(fold) {
        Some(overlay) => chain.clone().with_index(pieces_of(&overlay)),
        None => chain.clone(),
    })
}

/// Layers over each other, top first, as one; `None` of none.
pub(crate) fn fold(layers: Vec<Overlay>) -> Option<Overlay> {
    layers.into_par_iter().reduce_with(|upper, lower| upper.over(&lower))
}

/// A chain whose layers were called by their depth, with nothing below, as an index for reading.
pub(crate) fn pieces_of(chain: &Overlay) -> Vec<Piece> {
    let piece = |part: pleach_plan::Part| {
        let kind = match part.owner {
            Owner::Zero => PieceKind::Zero,
            Owner::Data { layer, host } => PieceKind::Data { layer, host },
            Owner::Compressed { layer, .. } => PieceKind::Compressed { layer },
        };
        Piece { guest: part.start, len: part.end - part.start, kind }
    };
    chain.whole(chain.size()).into_iter().map(piece).collect()
}

/// Which of the guest clusters read as zeros; `clusters` are indexes of clusters of `1 << bits` bytes.
///
/// # Errors
/// What reading says.
pub fn zero_clusters(path: &Path, chain: &Chain, bits: u32, clusters: &[u64]) -> Result<Vec<bool>> {
    let cluster = 1usize << bits;
    clusters
        .par_iter()
        .map_init(
            || vec![0; cluster],
            |buf, &index| {
                // Nearly every cluster with data shows it at its start.
                let (head, tail) = buf.split_at_mut(cluster.min(4096));
                let at = index << bits;
                let read = |at, part: &mut [u8]| chain.read_at(at, part).map_err(|e| Error::image(path, e));
                read(at, head)?;
                if !is_zero(head) {
                    return Ok(false);
                }
                read(at + head.len() as u64, tail)?;
                Ok(is_zero(tail))
            },
        )
        .collect()
}

/// How two chains differ in each of the guest ranges.
///
/// # Errors
/// What reading says.
pub(crate) fn compare_ranges(
    path: &Path,
    old: &Chain,
    new: &Chain,
    ranges: &[Range<u64>],
) -> Result<Vec<Found>> {
    let compare = |buf: &mut Vec<u8>, range: &Range<u64>| -> Result<Found> {
        let (mut same, mut zero) = (true, true);
        for at in range.clone().step_by(BLOCK) {
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(BLOCK);
            buf.resize(2 * BLOCK, 0);
            let (was, will) = buf.split_at_mut(BLOCK);
            let (Some(was), Some(will)) = (was.get_mut(..len), will.get_mut(..len)) else { continue };
            old.read_at(at, was).map_err(|e| Error::image(path, e))?;
            new.read_at(at, will).map_err(|e| Error::image(path, e))?;
            same &= was == will;
            zero &= is_zero(was);
            if !same && !zero {
                return Ok(Found::Data);
            }
        }
        Ok(if same { Found::Same } else { Found::Zero })
    };
    ranges.par_iter().map_init(Vec::new, compare).collect()
}

/// Bytes that are compared in one go.
const BLOCK: usize = 16 << 10;

/// Whether all bytes are zero; 256 bytes a step, so that the compiler uses wide registers.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| block.iter().fold(0, |all, &byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_detection_sees_every_byte() {
        let mut bytes = vec![0; 1000];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for i in 0..bytes.len() {
            bytes[i] = 0x80;
            assert!(!is_zero(&bytes), "{i}");
            bytes[i] = 0;
        }
    }
}
