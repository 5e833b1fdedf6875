//! Where every guest byte of a chain comes from: in parallel over the tables, without reading data.

use std::ops::Range;
use std::path::PathBuf;

use pleach_image::{Chain, Image, Layer, RawImage, Status};
use rayon::prelude::*;

use crate::{Error, Result};

/// Most clusters of one layer that one worker looks at in one go.
const GRAIN: u64 = 1 << 17;

/// A stretch of guest bytes from one place, as `qemu-img map` tells them apart.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes; 0 only in the single extent of an empty range.
    pub length: u64,
    /// Index of the layer that answers; 0 is the image itself.
    pub depth: usize,
    /// Whether that layer has something there: data, or zeros that hide what is below.
    pub present: bool,
    /// Whether it reads as zeros, as far as tables and holes tell.
    pub zero: bool,
    /// Whether host clusters are read for it.
    pub data: bool,
    /// Whether these are compressed.
    pub compressed: bool,
    /// Where the first byte is in that layer's file, or in its external data file; `None` for bytes that lie nowhere as
    /// they are.
    pub offset: Option<u64>,
}

impl Extent {
    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// The part of it in `range`, which it overlaps.
    pub(crate) fn clipped(self, range: &Range<u64>) -> Self {
        let (start, end) = (self.start.max(range.start), self.end().min(range.end));
        let offset = self.offset.map(|at| at + (start - self.start));
        Self { start, length: end - start, offset, ..self }
    }

    fn joins(&self, next: &Self) -> bool {
        let offset = self.offset.map(|at| at + self.length);
        self.end() == next.start && Self { start: next.start, length: next.length, offset, ..*self } == *next
    }
}

/// Calls `each` with the extents of the part of `range` that lies inside the disk: in order, all of it covered, neighbours
/// that continue each other joined. An empty part gives one extent of length 0, as `qemu-img map` does.
///
/// # Errors
/// Damage in the tables that are met, and what `each` says.
pub fn map(chain: &Chain, range: Range<u64>, each: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
    let range = range.start..range.end.min(chain.size());
    if range.is_empty() {
        let empty = Extent { start: range.start, length: 0, zero: false, ..nothing(0, 0..0, None) };
        return each(empty);
    }
    Mapper::of(chain).map(range, each)
}

/// Nothing in the chain provides `range`; `offset` is that of a host cluster that is owned all the same.
fn nothing(depth: usize, range: Range<u64>, offset: Option<u64>) -> Extent {
    Extent {
        start: range.start,
        length: range.end - range.start,
        depth,
        present: false,
        zero: true,
        data: false,
        compressed: false,
        offset,
    }
}

/// A chain with what its map needs to know of each layer.
pub(crate) struct Mapper<'a> {
    chain: &'a Chain,
    /// Of each layer: whether holes of its file tell which data clusters were never written.
    sparse: Vec<bool>,
    /// Guest bytes that one worker looks at in one go.
    pub(crate) grain: u64,
}

type Sink<'a> = dyn FnMut(Vec<Extent>) -> Result<()> + 'a;

impl<'a> Mapper<'a> {
    pub(crate) fn of(chain: &'a Chain) -> Self {
        let images = || chain.layers().iter().filter_map(|l| l.image());
        let smallest = images().map(|i| i.geometry().cluster_size()).min().unwrap_or(1 << 16);
        let sparse = chain.layers().iter().map(|l| l.image().is_some_and(Image::preallocated_metadata));
        Self { chain, sparse: sparse.collect(), grain: GRAIN * smallest }
    }

    /// As [`map`], for a range that is not empty and lies inside the disk.
    pub(crate) fn map(&self, range: Range<u64>, each: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        let mut last: Option<Extent> = None;
        self.walk(0, range, &mut |extents| {
            for extent in extents {
                match &mut last {
                    Some(open) if open.joins(&extent) => open.length += extent.length,
                    _ => {
                        if let Some(done) = last.replace(extent) {
                            each(done)?;
                        }
                    }
                }
            }
            Ok(())
        })?;
        last.map_or(Ok(()), each)
    }

    /// Hands on the extents of `range` in order. Stretches without any table cost nothing, whatever their length; the rest
    /// is looked at in parallel, a bounded number of pieces at a time.
    fn walk(&self, depth: usize, range: Range<u64>, sink: &mut Sink<'_>) -> Result<()> {
        let Some(Layer::Qcow2(image)) = self.chain.layers().get(depth).map(|l| &**l) else {
            return sink(self.extents(depth, range)?);
        };
        let batch = rayon::current_num_threads().max(1) * 4;
        let mut at = range.start;
        while at < range.end {
            let empty = image.empty_until(at, range.end);
            if empty > at {
                let below = empty.min(self.size_below(depth).max(at));
                if below > at {
                    self.walk(depth + 1, at..below, sink)?;
                }
                if empty > below {
                    sink(vec![nothing(depth, below..empty, None)])?;
                }
                at = empty;
                continue;
            }
            let mut pieces = Vec::new();
            while at < range.end && pieces.len() < batch && image.empty_until(at, range.end) == at {
                let end = self.piece_end(image, at, range.end);
                pieces.push(at..end);
                at = end;
            }
            let found: Vec<Vec<Extent>> =
                pieces.into_par_iter().map(|piece| self.extents(depth, piece)).collect::<Result<_>>()?;
            found.into_iter().try_for_each(&mut *sink)?;
        }
        Ok(())
    }

    /// A piece of work from `at` on: at most one L2 table of `image`, and not too many clusters of any layer.
    fn piece_end(&self, image: &Image, at: u64, end: u64) -> u64 {
        let step = image.geometry().l1_span().min(self.grain);
        ((at / step + 1) * step).min(end)
    }

    /// Where the layer below the one at `depth` ends: behind it there are zeros.
    fn size_below(&self, depth: usize) -> u64 {
        self.chain.layers().get(depth + 1).map_or(0, |l| l.size())
    }

    /// The extents of `range`, as the layers from `depth` on say.
    fn extents(&self, depth: usize, range: Range<u64>) -> Result<Vec<Extent>> {
        match self.chain.layers().get(depth).map(|l| &**l) {
            None => Ok(Vec::new()),
            Some(Layer::Raw(raw)) => self.raw(depth, raw, range),
            Some(Layer::Qcow2(image)) => self.qcow2(depth, image, range),
        }
    }

    fn raw(&self, depth: usize, raw: &RawImage, range: Range<u64>) -> Result<Vec<Extent>> {
        let whole =
            Extent { present: true, offset: Some(range.start), ..nothing(depth, range.clone(), None) };
        let data = raw.store().data_ranges(range).map_err(|e| self.io(depth, e))?;
        Ok(split(whole, data.iter().cloned(), |part, is_data| Extent {
            zero: !is_data,
            data: is_data,
            ..part
        }))
    }

    fn qcow2(&self, depth: usize, image: &Image, range: Range<u64>) -> Result<Vec<Extent>> {
        let path = || self.path(depth);
        let own = image.stretches(range).map_err(|e| Error::image(&path(), e))?;
        let size_below = self.size_below(depth);
        let mut shown =
            own.iter().filter(|s| matches!(s.status, Status::Unallocated(_)) && s.guest < size_below);
        let (first, last) = (shown.clone().next(), shown.next_back());
        let below = match (first, last) {
            (Some(first), Some(last)) => self.extents(depth + 1, first.guest..last.end().min(size_below))?,
            _ => Vec::new(),
        };
        let mut below = below.into_iter().peekable();
        let mut out = Vec::with_capacity(own.len());
        for s in own {
            let range = s.guest..s.end();
            let blank = nothing(depth, range.clone(), None);
            match s.status {
                Status::Unallocated(host) => {
                    let seam = range.end.min(size_below).max(range.start);
                    while let Some(extent) = below.peek().filter(|e| e.start < seam).copied() {
                        if extent.end() > range.start && seam > range.start {
                            out.push(extent.clipped(&(range.start..seam)));
                        }
                        if extent.end() > seam {
                            break;
                        }
                        below.next();
                    }
                    if seam < range.end {
                        let offset = host.map(|h| h + (seam - range.start));
                        out.push(nothing(depth, seam..range.end, offset));
                    }
                }
                Status::Zero(offset) => out.push(Extent { present: true, offset, ..blank }),
                Status::Compressed => {
                    out.push(Extent { present: true, zero: false, data: true, compressed: true, ..blank });
                }
                Status::Data(offset) => {
                    let extent = Extent { present: true, zero: false, data: true, offset, ..blank };
                    match offset.filter(|_| self.sparse.get(depth) == Some(&true)) {
                        Some(host) => out.extend(self.written(depth, image, extent, host)?),
                        None => out.push(extent),
                    }
                }
            }
        }
        Ok(out)
    }

    /// A data extent at `host`, split by the holes of the file, which read as zeros. The holes of a data file that was
    /// not opened are not known.
    fn written(&self, depth: usize, image: &Image, extent: Extent, host: u64) -> Result<Vec<Extent>> {
        if image.check_readable().is_err() {
            return Ok(vec![extent]);
        }
        let data =
            image.data_store().data_ranges(host..host + extent.length).map_err(|e| self.io(depth, e))?;
        let guest = |at: u64| at - host + extent.start;
        let data = data.iter().map(|r| guest(r.start)..guest(r.end));
        Ok(split(extent, data, |part, is_data| Extent { zero: !is_data, ..part }))
    }

    fn path(&self, depth: usize) -> PathBuf {
        self.chain.paths().get(depth).cloned().unwrap_or_default()
    }

    fn io(&self, depth: usize, source: std::io::Error) -> Error {
        Error::io("find the data of", &self.path(depth), source)
    }
}

/// `whole`, cut at the borders of `data`, which lie inside it in order; `make` says what the parts inside and outside of
/// them are.
fn split(
    whole: Extent,
    data: impl Iterator<Item = Range<u64>>,
    make: impl Fn(Extent, bool) -> Extent,
) -> Vec<Extent> {
    let mut out = Vec::new();
    let mut at = whole.start;
    let mut add = |range: Range<u64>, is_data| {
        if !range.is_empty() {
            out.push(make(whole.clipped(&range), is_data));
        }
    };
    for range in data {
        add(at..range.start, false);
        at = range.end;
        add(range, true);
    }
    add(at..whole.end(), false);
    out
}
