//! Where two images read differently: all of it, in order, and only what may differ is read.

use std::ops::Range;

use pleach_image::{Chain, Image, Piece, PieceKind};
use pleach_store::FileId;
use rayon::prelude::*;

use crate::convert::extents::Extents;
use crate::scan::indexed;
use crate::{Error, ErrorKind, Result, Source, Watch, is_zero};

/// Bytes of each side that one worker reads at a time.
const STEP: u64 = 128 << 10;
/// The unit in which differences are told.
const SECTOR: u64 = 512;

/// A stretch of guest bytes in which every sector reads differently.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Whether the second image reads as zeros there.
    pub zero: bool,
}

/// Calls `each` with what reads differently in the second image than in the first, in guest order, joined; the shorter one
/// reads as zeros behind its end. What both read from the same place is not read.
///
/// # Errors
/// A layer whose data cannot be read, damage, a failed read, [`ErrorKind::Interrupted`], and what `each` says.
pub fn diff(sides: [&Source; 2], watch: &Watch, each: &mut dyn FnMut(Changed) -> Result<()>) -> Result<()> {
    for side in sides {
        side.check_readable()?;
    }
    let chains = [indexed(&sides[0].chain)?, indexed(&sides[1].chain)?];
    let sides = [Side::of(&chains[0])?, Side::of(&chains[1])?];
    let size = chains[0].size().max(chains[1].size());
    watch.expect(size);
    let path = chains[1].paths().first().cloned().unwrap_or_default();
    let mut extents = Extents::new(chains.iter().collect(), size);
    let mut last: Option<Changed> = None;
    let mut shown = 0;
    while let Some(ranges) = extents.next(SECTOR).map_err(|e| Error::image(&path, e))? {
        let steps: Vec<Range<u64>> = ranges.into_iter().flat_map(|r| cut(r.start..r.end.min(size))).collect();
        for some in steps.chunks(rayon::current_num_threads().max(1) * 64) {
            if watch.should_stop() {
                return Err(Error::new(ErrorKind::Interrupted, "stopped"));
            }
            let found: Vec<Vec<Changed>> = some
                .par_iter()
                .map_init(<[Vec<u8>; 2]>::default, |bufs, step| changes(&sides, step.clone(), bufs))
                .collect::<Result<_>>()?;
            for next in found.into_iter().flatten() {
                match &mut last {
                    Some(open) if open.start + open.length == next.start && open.zero == next.zero => {
                        open.length += next.length;
                    }
                    _ => last.replace(next).map_or(Ok(()), &mut *each)?,
                }
            }
        }
        watch.advance(extents.at() - shown);
        shown = extents.at();
    }
    last.map_or(Ok(()), each)
}

fn cut(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let step = usize::try_from(STEP).unwrap_or(usize::MAX);
    range.clone().step_by(step).map(move |at| at..(at + STEP).min(range.end))
}

/// One image, and which file and state each of its layers is.
struct Side<'a> {
    chain: &'a Chain,
    layers: Vec<(FileId, Option<u64>)>,
}

impl<'a> Side<'a> {
    fn of(chain: &'a Chain) -> Result<Self> {
        let mut layers = Vec::new();
        for (layer, path) in chain.layers().iter().zip(chain.paths()) {
            let stat = layer.data_store().stat().map_err(|e| Error::io("look at the image", path, e))?;
            layers.push((stat.id, layer.image().map(Image::l1_table_offset).map(|at| at.0)));
        }
        Ok(Self { chain, layers })
    }

    /// What the first byte of a piece cut at `at` is read from; `None` of what has to be read to be known.
    fn place(&self, piece: &Piece, at: u64) -> Option<Place> {
        match piece.kind {
            PieceKind::Zero => Some(Place::Zero),
            PieceKind::Data { layer, host } => {
                self.layers.get(layer).map(|l| Place::Bytes(l.0, host + (at - piece.guest)))
            }
            // The same entry of the same state.
            PieceKind::Compressed { layer } => self.layers.get(layer).map(|l| Place::Cluster(l.0, l.1)),
        }
    }
}

#[derive(PartialEq, Eq)]
enum Place {
    Zero,
    Bytes(FileId, u64),
    Cluster(FileId, Option<u64>),
}

/// The changes in `step`.
fn changes(sides: &[Side<'_>; 2], step: Range<u64>, bufs: &mut [Vec<u8>; 2]) -> Result<Vec<Changed>> {
    let wrap = |side: &Side<'_>| {
        let path = side.chain.paths().first().cloned().unwrap_or_default();
        move |e| Error::image(&path, e)
    };
    let pieces = |side: &Side<'_>| side.chain.pieces(step.start, step.end - step.start).map_err(wrap(side));
    let [first, second] = sides;
    let (a, b) = (pieces(first)?, pieces(second)?);
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut out: Vec<Changed> = Vec::new();
    let mut at = step.start;
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        let end = (x.guest + x.len).min(y.guest + y.len);
        let same = first.place(x, at).zip(second.place(y, at)).is_some_and(|(x, y)| x == y);
        if !same {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX);
            for (side, buf) in sides.iter().zip(&mut *bufs) {
                buf.resize(len, 0);
                side.chain.read_at(at, buf).map_err(wrap(side))?;
            }
            let [was, is] = &*bufs;
            let sector = usize::try_from(SECTOR).unwrap_or(usize::MAX);
            for (n, (was, is)) in was.chunks(sector).zip(is.chunks(sector)).enumerate() {
                if was != is {
                    push(
                        &mut out,
                        Changed { start: at + n as u64 * SECTOR, length: is.len() as u64, zero: is_zero(is) },
                    );
                }
            }
        }
        if x.guest + x.len == end {
            a.next();
        }
        if b.peek().is_some_and(|y| y.guest + y.len == end) {
            b.next();
        }
        at = end;
    }
    Ok(out)
}

fn push(out: &mut Vec<Changed>, next: Changed) {
    match out.last_mut() {
        Some(last) if last.start + last.length == next.start && last.zero == next.zero => {
            last.length += next.length;
        }
        _ => out.push(next),
    }
}
