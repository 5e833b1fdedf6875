//! Where a disk may hold something else than zeros, a bounded part of it at a time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use pleach_format::{L1Entry, RunKind};
use pleach_image::{Chain, Image, ImageError, Layer, PieceKind};

/// Windows start at multiples of this, which is the largest cluster.
const ALIGN: u64 = 2 << 20;
/// Guest bytes a window at most.
const WINDOW: u64 = 4 << 30;
/// Clusters a window at most: what is known of a window is kept in memory.
const CLUSTERS: u64 = 1 << 16;

/// L2 tables that are remembered.
const TABLES: usize = 1 << 16;

/// Walks the disk of one or more chains from front to back. Work and memory follow what the files hold, not the size of
/// the disk.
#[derive(Debug)]
pub(crate) struct Extents<'a> {
    chains: Vec<&'a Chain>,
    size: u64,
    at: u64,
    window: u64,
    /// Of L2 tables that were met, by layer and offset; once they were met again, whether they lead to no data. A small image can
    /// have one table for a very large disk.
    blank: RefCell<HashMap<(usize, u64), Option<bool>>>,
}

impl<'a> Extents<'a> {
    /// The first `size` bytes of all `chains` laid over each other.
    pub(crate) fn new(chains: Vec<&'a Chain>, size: u64) -> Self {
        let layers = chains.iter().flat_map(|c| c.layers());
        let smallest = layers.filter_map(|l| l.image()).map(|i| i.geometry().cluster_size()).min();
        let window = smallest.map_or(WINDOW, |cluster| WINDOW.min(cluster * CLUSTERS));
        Self { chains, size, at: 0, window, blank: RefCell::default() }
    }

    /// How far the walk has come.
    pub(crate) fn at(&self) -> u64 {
        self.at.min(self.size)
    }

    /// Bytes of the largest cluster of any layer: one that is compressed is decompressed as often as it is read from.
    pub(crate) fn largest_cluster(&self) -> u64 {
        let layers = self.chains.iter().flat_map(|c| c.layers());
        layers.filter_map(|l| l.image()).map(|i| i.geometry().cluster_size()).max().unwrap_or(0)
    }

    /// The ranges of the next window with any, in order, joined; starts and ends are multiples of `grain`, a power of two
    /// up to 2 MiB, and may lie behind the size. `None` at the end.
    ///
    /// # Errors
    /// Damage in the tables that are met; what the system says.
    pub(crate) fn next(&mut self, grain: u64) -> Result<Option<Vec<Range<u64>>>, ImageError> {
        while let Some(start) = self.skip()? {
            let start = start & !(ALIGN - 1);
            let end = (start + self.window) & !(ALIGN - 1);
            let mut ranges = Vec::new();
            for chain in &self.chains {
                self.look(chain, start..end.min(self.size), &mut ranges)?;
            }
            self.at = end;
            let ranges = joined(ranges, grain);
            if !ranges.is_empty() {
                return Ok(Some(ranges));
            }
        }
        self.at = self.size;
        Ok(None)
    }

    /// The next byte about which any layer may say anything.
    fn skip(&self) -> Result<Option<u64>, ImageError> {
        let mut found: Option<u64> = None;
        for (number, layer) in self.chains.iter().flat_map(|c| c.layers()).enumerate() {
            let next = match &**layer {
                Layer::Qcow2(image) => {
                    let span = image.geometry().l1_span();
                    let mut slot = usize::try_from(self.at / span).unwrap_or(usize::MAX);
                    while let Some(&entry) = image.l1().get(slot)
                        && (entry.0 == 0 || self.is_blank(number, image, slot, entry)?)
                    {
                        slot += 1;
                    }
                    (slot < image.l1().len()).then(|| (slot as u64 * span).max(self.at))
                }
                Layer::Raw(raw) => raw
                    .store()
                    .next_data(self.at)
                    .map_err(|source| ImageError::Io { what: "find the data of the raw file", source })?,
            };
            found = [found, next].into_iter().flatten().min();
        }
        Ok(found.filter(|&at| at < self.size))
    }

    /// Whether the table that L1 entry number `slot` leads to is known to lead to no data: other layers may have some there,
    /// and say so themselves.
    fn is_blank(&self, layer: usize, image: &Image, slot: usize, entry: L1Entry) -> Result<bool, ImageError> {
        let key = (layer, entry.0);
        let known = self.blank.borrow().get(&key).copied();
        let blank = match known {
            Some(Some(blank)) => return Ok(blank),
            // A part of a table says nothing about the rest of it.
            Some(None) if (slot as u64 + 1).saturating_mul(image.geometry().l1_span()) <= image.size() => {
                let runs = image.runs(slot)?;
                Some(runs.as_slice().iter().all(|run| run.kind == RunKind::Zero))
            }
            _ => None,
        };
        if known.is_some() || self.blank.borrow().len() < TABLES {
            self.blank.borrow_mut().insert(key, blank);
        }
        Ok(blank.unwrap_or(false))
    }

    fn look(&self, chain: &Chain, window: Range<u64>, out: &mut Vec<Range<u64>>) -> Result<(), ImageError> {
        for piece in chain.pieces(window.start, window.end.saturating_sub(window.start))? {
            match piece.kind {
                PieceKind::Zero => {}
                PieceKind::Compressed { .. } => out.push(piece.guest..piece.guest + piece.len),
                PieceKind::Data { layer, host } => {
                    let Some(layer) = chain.layers().get(layer) else { continue };
                    // Holes of the file are zeros too.
                    let data = layer
                        .data_store()
                        .data_ranges(host..host + piece.len)
                        .map_err(|source| ImageError::Io { what: "find the data of the file", source })?;
                    let to_guest = |at: u64| piece.guest + (at - host);
                    out.extend(data.into_iter().map(|d| to_guest(d.start)..to_guest(d.end)));
                }
            }
        }
        Ok(())
    }
}

/// The ranges, grown to multiples of `grain`, sorted, and joined where they meet.
fn joined(mut ranges: Vec<Range<u64>>, grain: u64) -> Vec<Range<u64>> {
    for range in &mut ranges {
        *range = range.start & !(grain - 1)..range.end.next_multiple_of(grain);
    }
    ranges.retain(|r| !r.is_empty());
    if !ranges.is_sorted_by_key(|r| r.start) {
        ranges.sort_by_key(|r| r.start);
    }
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pleach_image::{CreateOptions, Image, RawImage, create};
    use pleach_store::{Access, Disk, RealDisk};

    use super::*;

    #[test]
    fn an_empty_exabyte_is_no_work_and_data_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("huge");
        let options = CreateOptions { size: 1 << 60, cluster_bits: 21, ..CreateOptions::default() };
        create(&RealDisk, &path, &options).unwrap();
        let image = Image::open(RealDisk.open(&path, Access::Read).unwrap()).unwrap();
        let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
        let mut extents = Extents::new(vec![&chain], chain.size());
        assert_eq!(extents.next(1 << 21).unwrap(), None);

        let store = RealDisk.create_new(&dir.path().join("raw")).unwrap();
        store.set_len(1 << 43).unwrap();
        for at in [5 << 30, (1 << 43) - 4096] {
            store.write_at(at, &[1]).unwrap();
        }
        let chain = Chain::new(vec![Arc::new(Layer::Raw(RawImage::open(store).unwrap()))]);
        let mut extents = Extents::new(vec![&chain], chain.size());
        let mut found = Vec::new();
        while let Some(ranges) = extents.next(65536).unwrap() {
            found.extend(ranges);
        }
        assert_eq!(found, [5 << 30..(5 << 30) + 65536, (1 << 43) - 65536..1 << 43]);
    }
}
