//! Whether two images read the same: only what may differ is read, in parallel, and the first difference is found.

use std::ops::Range;

use pleach_image::{Chain, Image};
use pleach_store::FileId;
use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::map::{Extent, Mapper};
use crate::scan::indexed;
use crate::{Error, ErrorKind, Result, Source, Watch, is_zero};

/// Most bytes that one worker compares before it asks for more. No cluster is larger.
const PIECE: u64 = 2 << 20;
/// Bytes of each side that are read in one go, where compressed clusters are not larger: both stay in a small cache.
const STEP: u64 = 128 << 10;
/// Pieces that are read before more of the maps is looked at.
const BATCH: usize = 256;
/// The unit in which a difference is located.
const SECTOR: u64 = 512;

/// How two images compare.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Virtual sizes in bytes.
    pub sizes: [u64; 2],
    /// The first difference; `None` if both read the same, the longer one as zeros behind the end of the other.
    pub difference: Option<Difference>,
}

/// The first difference between two images.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Strict: the virtual sizes differ.
    Size,
    /// Strict: from this guest offset on, one has something else allocated than the other.
    Status(u64),
    /// The 512-byte sector at this guest offset reads differently.
    Content(u64),
}

/// Compares what two images read as; if `strict`, also their sizes and what they have allocated.
///
/// # Errors
/// A layer whose data cannot be read, damage up to the first difference, a failed read, [`ErrorKind::Interrupted`].
pub fn compare(sides: [&Source; 2], strict: bool, watch: &Watch) -> Result<Comparison> {
    for side in sides {
        side.check_readable()?;
    }
    let chains = [indexed(&sides[0].chain)?, indexed(&sides[1].chain)?];
    let sides = [Side::of(&chains[0])?, Side::of(&chains[1])?];
    let sizes = [sides[0].chain.size(), sides[1].chain.size()];
    if strict && sizes[0] != sizes[1] {
        return Ok(Comparison { sizes, difference: Some(Difference::Size) });
    }
    let all = sizes[0].max(sizes[1]);
    watch.expect(all);
    let window = sides[0].mapper.grain.min(sides[1].mapper.grain) * 2;
    let mut at = 0;
    while at < all {
        let range = at..(at + window).min(all);
        let difference = compare_window(&sides, range.clone(), strict, watch)?;
        if difference.is_some() {
            return Ok(Comparison { sizes, difference });
        }
        at = range.end;
    }
    Ok(Comparison { sizes, difference: None })
}

/// One image, and which file and state each of its layers is.
struct Side<'a> {
    chain: &'a Chain,
    mapper: Mapper<'a>,
    layers: Vec<(FileId, Option<u64>)>,
    /// Bytes that are read in one go.
    step: u64,
}

impl<'a> Side<'a> {
    fn of(chain: &'a Chain) -> Result<Self> {
        let mut layers = Vec::new();
        for (layer, path) in chain.layers().iter().zip(chain.paths()) {
            let stat = layer.data_store().stat().map_err(|e| Error::io("look at the image", path, e))?;
            let tables = layer.image().filter(|i| !i.external_data()).map(Image::l1_table_offset);
            layers.push((stat.id, tables.map(|at| at.0)));
        }
        let clusters = chain.layers().iter().filter_map(|l| l.image()).map(|i| i.geometry().cluster_size());
        let step = clusters.fold(STEP, u64::max);
        Ok(Self { chain, mapper: Mapper::of(chain), layers, step })
    }

    /// The extents of `range`; behind the end of the disk there are zeros.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let inside = range.start..range.end.min(self.chain.size());
        if !inside.is_empty() {
            self.mapper.map(inside.clone(), &mut |extent| {
                extents.push(extent);
                Ok(())
            })?;
        }
        let behind = inside.end.max(range.start)..range.end;
        if !behind.is_empty() {
            extents.push(Extent {
                start: behind.start,
                length: behind.end - behind.start,
                depth: self.layers.len(),
                present: false,
                zero: true,
                data: false,
                compressed: false,
                offset: None,
            });
        }
        Ok(extents)
    }

    /// What of an extent a strict comparison looks at: the zeros behind the end of a backing file count as allocated.
    fn status(&self, e: &Extent) -> (bool, bool, bool, bool, bool) {
        let short = !e.present && e.depth + 1 < self.layers.len();
        (e.present || short, e.zero, e.data, e.compressed, e.offset.is_some() && !short)
    }
}

/// A stretch of guest bytes that has to be read, at least on one side.
#[derive(Clone)]
struct Piece {
    range: Range<u64>,
    reading: Reading,
}

/// What a stretch is read for.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Reading {
    /// Its bytes on the sides that do not read as zeros anyway.
    Sides([bool; 2]),
    /// Whether it can be read at all: both sides are the same bytes.
    Whether,
}

fn compare_window(
    sides: &[Side<'_>; 2],
    range: Range<u64>,
    strict: bool,
    watch: &Watch,
) -> Result<Option<Difference>> {
    let maps = [sides[0].extents(range.clone())?, sides[1].extents(range.clone())?];
    let mut indexes = [0, 0];
    let mut at = range.start;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut seen = range.start;
    let mut status = None;
    while at < range.end {
        let (Some(a), Some(b)) = (maps[0].get(indexes[0]), maps[1].get(indexes[1])) else { break };
        let end = a.end().min(b.end());
        let (a_here, b_here) = (a.clipped(&(at..end)), b.clipped(&(at..end)));
        indexes[0] += usize::from(a.end() == end);
        indexes[1] += usize::from(b.end() == end);
        if strict && sides[0].status(&a_here) != sides[1].status(&b_here) {
            status = Some(Difference::Status(at));
            break;
        }
        let read = [!a_here.zero, !b_here.zero];
        let reading = match same_bytes(sides, &a_here, &b_here) {
            _ if read == [false, false] => None,
            false => Some(Reading::Sides(read)),
            // What cannot be decompressed is equal to nothing.
            true => a_here.compressed.then_some(Reading::Whether),
        };
        if let Some(reading) = reading {
            add(&mut pieces, at..end, reading);
        }
        at = end;
        if pieces.len() >= BATCH {
            if let Some(found) = read_pieces(sides, &pieces, watch)? {
                return Ok(Some(found));
            }
            pieces.clear();
            watch.advance(at - seen);
            seen = at;
        }
    }
    let found = read_pieces(sides, &pieces, watch)?;
    watch.advance(range.end - seen);
    Ok(found.or(status))
}

/// Whether both extents are the same bytes of the same file.
fn same_bytes(sides: &[Side<'_>; 2], a: &Extent, b: &Extent) -> bool {
    let (Some(one), Some(other)) = (sides[0].layers.get(a.depth), sides[1].layers.get(b.depth)) else {
        return false;
    };
    // The same place, or the same tables, which lead every guest byte to the same place.
    one.0 == other.0
        && (a.offset.is_some() && a.offset == b.offset || one.1.is_some() && one.1 == other.1)
        && a.data == b.data
}

/// Adds a stretch in pieces of at most [`PIECE`], joined with what comes before where that is read alike.
fn add(pieces: &mut Vec<Piece>, range: Range<u64>, reading: Reading) {
    let mut at = range.start;
    while at < range.end {
        // Pieces end at multiples, so that most reads are aligned.
        let end = ((at / PIECE + 1) * PIECE).min(range.end);
        match pieces.last_mut() {
            Some(last) if last.range.end == at && last.reading == reading && !at.is_multiple_of(PIECE) => {
                last.range.end = end;
            }
            _ => pieces.push(Piece { range: at..end, reading }),
        }
        at = end;
    }
}

/// The first difference in the pieces, which are in order. What lies behind it does not matter, errors included.
fn read_pieces(sides: &[Side<'_>; 2], pieces: &[Piece], watch: &Watch) -> Result<Option<Difference>> {
    let first = pieces
        .par_iter()
        .map_init(
            || [Buffer::default(), Buffer::default()],
            |buffers, piece| {
                if watch.should_stop() {
                    return Some(Err(Error::new(ErrorKind::Interrupted, "the comparison was interrupted")));
                }
                difference(sides, piece, buffers).transpose()
            },
        )
        .find_map_first(|outcome| outcome);
    first.transpose().map(|found| found.map(Difference::Content))
}

fn difference(sides: &[Side<'_>; 2], piece: &Piece, buffers: &mut [Buffer; 2]) -> Result<Option<u64>> {
    let step = sides[0].step.max(sides[1].step);
    let mut at = piece.range.start;
    while at < piece.range.end {
        // Steps end at multiples, so that no compressed cluster is read twice.
        let end = ((at / step + 1) * step).min(piece.range.end);
        if let Some(found) = difference_within(sides, at..end, piece.reading, buffers)? {
            return Ok(Some(found));
        }
        at = end;
    }
    Ok(None)
}

fn difference_within(
    sides: &[Side<'_>; 2],
    range: Range<u64>,
    reading: Reading,
    buffers: &mut [Buffer; 2],
) -> Result<Option<u64>> {
    let len = usize::try_from(range.end - range.start).unwrap_or(0);
    let read = match reading {
        Reading::Sides(read) => read,
        Reading::Whether => [true, false],
    };
    for ((side, buffer), read) in sides.iter().zip(&mut *buffers).zip(read) {
        if read {
            let path = side.chain.paths().first().map(|p| p.as_path()).unwrap_or_else(|| "".as_ref());
            side.chain.read_at(range.start, buffer.fresh(len)).map_err(|e| Error::image(path, e))?;
        }
    }
    let [a, b] = &*buffers;
    let (a, b) = (a.bytes(), b.bytes());
    let first = match read {
        _ if reading == Reading::Whether => None,
        [true, true] if a == b => None,
        [true, true] => a.iter().zip(b).position(|(a, b)| a != b),
        [true, false] => nonzero(a),
        _ => nonzero(b),
    };
    Ok(first.map(|at| (range.start + at as u64) / SECTOR * SECTOR))
}

fn nonzero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|&byte| byte != 0) }
}
