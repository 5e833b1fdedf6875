//! Compressed clusters that a merge takes over as they are.

use std::collections::BTreeMap;

use pleach_image::{Chain, Image, ImageError, Piece, PieceKind};
use pleach_plan::{Need, Summary, Target};
use rayon::prelude::*;

use crate::execute::parts;

/// Guest clusters that are taken over compressed, each with the number of its compressed bytes.
pub(crate) type Carried = BTreeMap<u64, u64>;

/// Which of the clusters that `needs` fill are taken over from `chain` as they are: those that are compressed there as
/// `target` compresses, in clusters of the same size. Each is decompressed once, to see that it is whole and where it ends.
///
/// # Errors
/// Damage in the tables that are met; compressed bytes that do not give a cluster.
pub(crate) fn carried(
    target: &Image,
    chain: &Chain,
    shape: Target,
    needs: &[Need],
) -> Result<Carried, ImageError> {
    let g = target.geometry();
    let alike = |image: &Image| {
        image.geometry().cluster_bits() == g.cluster_bits()
            && image.header().compression() == target.header().compression()
    };
    if target.external_data() || !chain.layers().iter().filter_map(|l| l.image()).any(alike) {
        return Ok(Carried::new());
    }
    let all = if g.extended_l2() { u32::MAX } else { 1 };
    let whole = parts(shape, g, needs).filter(|part| part.change.data == all);
    let mut found: Vec<Piece> = Vec::new();
    for part in whole {
        let pieces = chain.pieces(g.guest_offset(part.cluster).0, g.cluster_size())?;
        let [piece] = pieces.as_slice() else { continue };
        found.extend(matches!(piece.kind, PieceKind::Compressed { .. }).then_some(*piece));
    }
    let lengths = found.par_iter().map_init(
        || (Vec::new(), vec![0; g.cluster_bytes()]),
        |(packed, out), piece| {
            packed.clear();
            let len = chain.read_packed(piece, target.header().compression(), packed, out)?;
            let len = len.filter(|&len| len < g.cluster_bytes());
            Ok(len.map(|len| (piece.guest >> g.cluster_bits(), len as u64)))
        },
    );
    lengths.filter_map(Result::transpose).collect()
}

/// Guest bytes that settled needs write as data, compressed ones as they are.
pub(crate) fn bytes_written(target: &Image, shape: Target, needs: &[Need], carried: &Carried) -> u64 {
    let plain = Summary::of(shape, needs).bytes_written;
    let cluster = target.geometry().cluster_size();
    plain - carried.len() as u64 * cluster + carried.values().sum::<u64>()
}
