//! Executing a plan on byte arrays gives what the overlay read before, for random layers of mixed geometry.

use alloc::vec;

use pleach_format::{GuestOffset, HostOffset, Mapping, RunList};

use super::*;
use crate::{Found, Summary, candidates, clusters, settle, settle_against};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// A layer as bytes: `None` is transparent.
#[derive(Clone)]
struct Layer {
    size: u64,
    unit: u64,
    bytes: Vec<Option<u8>>,
}

impl Layer {
    /// Clusters of `unit` bytes that say nothing, zeros, data, or data of zeros.
    fn random(rng: &mut Rng, unit: u64, zero_flag: bool) -> (Self, Cover) {
        let size = 8 * (1 + rng.below(24));
        let mut bytes = vec![None; usize::try_from(size.next_multiple_of(unit)).unwrap()];
        let mut says = Vec::new();
        for (i, cluster) in bytes.chunks_mut(usize::try_from(unit).unwrap()).enumerate() {
            let (fill, say) = match rng.below(6) {
                0 if zero_flag => (0, Say::Zero),
                1 => (0, Say::Data),
                2 | 3 => (1 + u8::try_from(rng.below(250)).unwrap(), Say::Data),
                _ => continue,
            };
            for byte in cluster.iter_mut() {
                *byte = Some(if fill == 0 { 0 } else { fill });
            }
            says.push((i as u64 * unit, unit, say));
        }
        (Self { size, unit, bytes }, Cover::new(size, says))
    }
}

fn read(layers: &[&Layer], at: u64) -> u8 {
    for layer in layers {
        if at >= layer.size {
            return 0;
        }
        if let Some(byte) = layer.bytes[usize::try_from(at).unwrap()] {
            return byte;
        }
    }
    0
}

/// Carries out settled needs on `layer`, whose size becomes `target.size`.
fn execute(layer: &mut Layer, target: Target, needs: &[Need], view: &dyn Fn(u64) -> u8) {
    layer.size = target.size;
    let len = usize::try_from(target.size.next_multiple_of(layer.unit)).unwrap();
    if layer.bytes.len() < len {
        layer.bytes.resize(len, None);
    }
    for need in needs {
        for cluster in need.clusters.clone() {
            for at in target.bytes(cluster) {
                let byte = &mut layer.bytes[usize::try_from(at).unwrap()];
                match need.how {
                    How::Fill => *byte = Some(view(at)),
                    How::Zero => *byte = Some(0),
                    How::Unmap => *byte = None,
                    How::Patch if need.pieces.iter().any(|p| p.contains(&at)) => {
                        assert!(byte.is_some(), "only owned bytes are patched");
                        *byte = Some(view(at));
                    }
                    How::Patch | How::Skip => {}
                }
            }
        }
    }
}

fn settled(target: Target, needs: &[Need], view: &dyn Fn(u64) -> u8) -> Vec<Need> {
    let zero: Vec<bool> = candidates(needs).map(|c| target.bytes(c).all(|at| view(at) == 0)).collect();
    settle(needs, zero)
}

#[test]
fn merging_either_way_keeps_what_the_overlay_reads() {
    let mut rng = Rng(7);
    let mut commits = 0;
    for round in 0..20_000 {
        let units = [8, 16, 32];
        let mut unit = || units[usize::try_from(rng.below(3)).unwrap()];
        let (top_unit, victim_unit, base_unit) = (unit(), unit(), unit());
        let zero_flags = [rng.below(2) == 0, rng.below(2) == 0];
        let (base, base_cover) = Layer::random(&mut rng, base_unit, true);
        let (victim, victim_cover) = Layer::random(&mut rng, victim_unit, zero_flags[0]);
        let (top, top_cover) = Layer::random(&mut rng, top_unit, zero_flags[1]);
        let below = Content::none().under(&base_cover);
        let view = |at| if at < top.size { read(&[&top, &victim, &base], at) } else { 0 };

        let target = Target { cluster_bits: top_unit.ilog2(), size: top.size, zero_flag: zero_flags[1] };
        let needs = settled(target, &pull(target, &top_cover, &victim_cover, &below), &view);
        let mut pulled = top.clone();
        execute(&mut pulled, target, &needs, &view);
        for at in 0..top.size {
            assert_eq!(read(&[&pulled, &base], at), view(at), "pull, round {round}, byte {at}");
        }
        for need in &needs {
            assert!(!matches!(need.how, How::Patch | How::Unmap), "pulling only fills what is not there");
            for c in need.clusters.clone() {
                let zero = target.bytes(c).all(|at| view(at) == 0);
                let shows = target
                    .bytes(c)
                    .any(|at| at < top.size && read(&[&base], at) != 0 || below.touches(&(at..at + 1)));
                assert!(!zero || need.how == How::Zero || (!zero_flags[1] && shows), "zeros are not copied");
            }
        }

        if top.size < victim.size {
            continue;
        }
        commits += 1;
        let target = Target { cluster_bits: victim_unit.ilog2(), size: top.size, zero_flag: zero_flags[0] };
        let plain = Cover::new(
            victim.size,
            victim_cover.says().filter(|s| s.1 == Say::Data).map(|(r, s)| (r.start, r.end - r.start, s)),
        );
        let needs = commit(target, &top_cover, &victim_cover, &plain, &below);
        let needs = settled(target, &needs, &view);
        let mut merged = victim.clone();
        execute(&mut merged, target, &needs, &view);
        for at in 0..top.size {
            assert_eq!(read(&[&merged, &base], at), view(at), "commit, round {round}, byte {at}");
        }
        let cost = Summary::of(target, &needs);
        let filled: u64 =
            needs.iter().filter(|n| n.how == How::Fill).map(|n| n.clusters.end - n.clusters.start).sum();
        assert_eq!(cost.new_clusters, filled);
    }
    assert!(commits > 5_000);
}

#[test]
fn a_huge_growth_over_nothing_costs_nothing() {
    let top = Cover::new(1 << 50, [(0, 65536, Say::Data)]);
    let victim = Cover::new(1 << 20, []);
    let target = Target { cluster_bits: 16, size: 1 << 50, zero_flag: true };
    let needs = commit(target, &top, &victim, &victim, &Content::none());
    assert_eq!(needs.len(), 1);
    assert_eq!(needs[0].clusters, 0..1);
}

#[test]
fn content_behind_a_short_victim_stays_hidden() {
    let below = Content::none().under(&Cover::new(1 << 20, [(0, 1 << 20, Say::Data)]));
    let victim = Cover::new(128 << 10, []);
    let top = Cover::new(512 << 10, []);
    let target = Target { cluster_bits: 16, size: 512 << 10, zero_flag: true };
    let needs = pull(target, &top, &victim, &below);
    assert_eq!(needs.len(), 1);
    assert_eq!((needs[0].clusters.clone(), needs[0].how), (2..8, How::Zero));
    let v2 = Target { zero_flag: false, ..target };
    assert_eq!(pull(v2, &top, &victim, &below)[0].how, How::Fill);
}

/// The layer as one with places, called `name`.
fn placed(name: usize, cover: &Cover) -> Overlay {
    let mut runs = RunList::new();
    for (range, say) in cover.says() {
        let mapping = if say == Say::Zero { Mapping::Zero } else { Mapping::Data(HostOffset(range.start)) };
        runs.push(GuestOffset(range.start), range.end - range.start, mapping);
    }
    Overlay::of_runs(name, cover.size(), &runs)
}

#[test]
fn rebasing_keeps_what_the_image_reads_and_leaves_a_common_ancestor_alone() {
    let mut rng = Rng(11);
    let mut untouched = 0;
    for round in 0..20_000 {
        let units = [8, 16, 32];
        let mut unit = || units[usize::try_from(rng.below(3)).unwrap()];
        let (top_unit, old_unit, new_unit, base_unit) = (unit(), unit(), unit(), unit());
        let zero_flag = rng.below(2) == 0;
        let (base, base_cover) = Layer::random(&mut rng, base_unit, true);
        let (old, old_cover) = Layer::random(&mut rng, old_unit, true);
        let (new, new_cover) = Layer::random(&mut rng, new_unit, true);
        let (top, top_cover) = Layer::random(&mut rng, top_unit, zero_flag);
        let view = |at| if at < top.size { read(&[&top, &old, &base], at) } else { 0 };

        let target = Target { cluster_bits: top_unit.ilog2(), size: top.size, zero_flag };
        let shared = placed(0, &base_cover);
        let (from, to) = (placed(1, &old_cover).over(&shared), placed(2, &new_cover).over(&shared));
        let needs = rebase(target, &top_cover, &from, &to);
        let found = clusters(&needs).map(|c| {
            let visible = target.bytes(c).start..target.bytes(c).end.min(top.size);
            if visible.clone().all(|at| view(at) == read(&[&new, &base], at)) {
                Found::Same
            } else if visible.clone().all(|at| view(at) == 0) {
                Found::Zero
            } else {
                Found::Data
            }
        });
        let settled = settle_against(&needs, found.collect::<Vec<_>>());
        let mut rebased = top.clone();
        execute(&mut rebased, target, &settled, &view);
        for at in 0..top.size {
            assert_eq!(read(&[&rebased, &new, &base], at), view(at), "round {round}, byte {at}");
        }
        for c in clusters(&needs) {
            assert!(!top_cover.touches(&target.bytes(c)), "its own clusters stay");
        }
        for c in 0..top.size.div_ceil(top_unit) {
            let visible = target.bytes(c).start..target.bytes(c).end.min(top.size);
            let says = |cover: &Cover| cover.touches(&visible) || visible.end > cover.size();
            if !says(&old_cover) && !says(&new_cover) {
                untouched += 1;
                assert!(clusters(&needs).all(|n| n != c), "only the common ancestor answers there");
            }
        }
        assert!(rebase(target, &top_cover, &from, &from).is_empty());
    }
    assert!(untouched > 5_000);
}
