//! Bytes that a copy need not write, because its file system lets several files have the same blocks.

use std::ops::Range;
use std::path::Path;

use pleach_image::{Chain, Piece, PieceKind};
use pleach_store::Disk;

/// Which layers of a source lie where their blocks can be shared with a new file.
#[derive(Debug)]
pub(super) struct Sharing {
    /// Bytes a block.
    align: u64,
    layers: Vec<bool>,
}

impl Sharing {
    /// What of `source` can be shared with a new file `out`; `None` if nothing can.
    pub(super) fn of(disk: &dyn Disk, source: &Chain, out: &Path) -> Option<Self> {
        let dir = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let home = disk.stat(dir).ok()?.id.device;
        let mut align = 0;
        let mut shares = |layer: &pleach_image::Layer| {
            let store = layer.data_store();
            let block = store.clones_at().filter(|_| store.stat().is_ok_and(|s| s.id.device == home));
            align = align.max(block.unwrap_or(0));
            block.is_some()
        };
        let layers: Vec<bool> = source.layers().iter().map(|layer| shares(layer)).collect();
        layers.contains(&true).then_some(Self { align, layers })
    }

    /// Whether blocks are no larger than `unit` bytes, which are what is placed as one.
    pub(super) fn fits(&self, unit: u64) -> bool {
        unit.is_multiple_of(self.align)
    }

    /// The part of a piece of the source that can be shared in units of `unit` bytes: its layer, where in that layer's file,
    /// and its guest range.
    pub(super) fn part(&self, piece: &Piece, unit: u64) -> Option<(usize, u64, Range<u64>)> {
        let PieceKind::Data { layer, host } = piece.kind else { return None };
        let (start, end) = (piece.guest.next_multiple_of(unit), (piece.guest + piece.len) / unit * unit);
        let from = host + (start - piece.guest);
        let shared = self.layers.get(layer).is_some_and(|shared| *shared);
        (shared && start < end && from.is_multiple_of(self.align)).then_some((layer, from, start..end))
    }
}
