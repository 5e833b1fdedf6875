//! Random layers of mixed geometry: carrying out a plan to pull, commit or rebase on bytes gives what folding them gave.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{GuestOffset, HostOffset, Mapping, RunList};
use pleach_plan::{
    Content, Cover, Found, How, Need, Overlay, Say, Target, candidates, clusters, commit, pull, rebase,
    settle, settle_against,
};

#[derive(Arbitrary, Debug)]
struct Input {
    /// The chain, top first: top, those that go, those that stay.
    chain: Vec<Spec>,
    /// How many of them stay.
    stay: u8,
    /// What a rebase puts in place of those that go.
    other: Vec<Spec>,
}

/// A layer as bytes: `None` is transparent.
#[derive(Clone)]
struct Layer {
    size: u64,
    unit: u64,
    zero_flag: bool,
    bytes: Vec<Option<u8>>,
}

#[derive(Arbitrary, Debug)]
struct Spec {
    unit: u8,
    /// Without the zero flag, zeros are data.
    zero_flag: bool,
    size: u8,
    /// What a cluster says: nothing, zeros, data.
    clusters: Vec<u8>,
}

const MOST_LAYERS: usize = 6;

impl Layer {
    fn of(spec: &Spec) -> (Self, Vec<(u64, u64, Say)>) {
        let unit = 8u64 << (spec.unit % 3);
        let size = (u64::from(spec.size) % 32 + 1) * 8;
        let mut bytes = vec![None; usize::try_from(size.next_multiple_of(unit)).unwrap()];
        let mut says = Vec::new();
        let parts = bytes.chunks_mut(usize::try_from(unit).unwrap()).zip(&spec.clusters);
        for (i, (cluster, kind)) in (0u64..).zip(parts) {
            let (fill, say) = match kind % 4 {
                0 => continue,
                1 if spec.zero_flag => (0, Say::Zero),
                1 => (0, Say::Data),
                _ => (*kind, Say::Data),
            };
            cluster.fill(Some(fill));
            says.push((i * unit, unit, say));
        }
        (Self { size, unit, zero_flag: spec.zero_flag, bytes }, says)
    }

    fn at(&self, at: u64) -> Option<u8> {
        self.bytes[usize::try_from(at).unwrap()]
    }

    /// Carries out settled needs; the size becomes the target's.
    fn execute(&mut self, target: Target, needs: &[Need], view: &dyn Fn(u64) -> u8) {
        self.size = target.size;
        let len = usize::try_from(target.size.next_multiple_of(self.unit)).unwrap();
        self.bytes.resize(len.max(self.bytes.len()), None);
        for need in needs {
            for at in need.clusters.start * self.unit..need.clusters.end * self.unit {
                let byte = &mut self.bytes[usize::try_from(at).unwrap()];
                match need.how {
                    How::Fill => *byte = Some(view(at)),
                    How::Zero => {
                        assert!(target.zero_flag, "there are no zeros to be said");
                        *byte = Some(0);
                    }
                    How::Unmap => *byte = None,
                    How::Patch if need.pieces.iter().any(|p| p.contains(&at)) => {
                        assert!(byte.is_some(), "only what is there is overwritten");
                        *byte = Some(view(at));
                    }
                    How::Patch | How::Skip => {}
                }
            }
        }
    }
}

fn read(layers: &[&Layer], at: u64) -> u8 {
    for layer in layers {
        if at >= layer.size {
            return 0;
        }
        if let Some(byte) = layer.at(at) {
            return byte;
        }
    }
    0
}

/// One layer, or several folded, as a plan knows them.
fn fold(says: &[(u64, &[(u64, u64, Say)])], first: usize) -> Overlay {
    let of = |(i, (size, says)): (usize, &(u64, &[(u64, u64, Say)]))| {
        let mut runs = RunList::new();
        for &(start, len, say) in *says {
            let mapping = if say == Say::Zero { Mapping::Zero } else { Mapping::Data(HostOffset(start)) };
            runs.push(GuestOffset(start), len.min(size.saturating_sub(start)), mapping);
        }
        Overlay::of_runs(first + i, *size, &runs)
    };
    says.iter().enumerate().map(of).reduce(|upper, lower| upper.over(&lower)).expect("a layer")
}

fn bytes(target: Target, cluster: u64) -> std::ops::Range<u64> {
    cluster << target.cluster_bits..(cluster + 1) << target.cluster_bits
}

fn settled(target: Target, needs: &[Need], view: &dyn Fn(u64) -> u8) -> Vec<Need> {
    let zero: Vec<bool> = candidates(needs).map(|c| bytes(target, c).all(|at| view(at) == 0)).collect();
    settle(needs, zero)
}

fuzz_target!(|input: Input| {
    let mut chain: Vec<_> = input.chain.iter().take(MOST_LAYERS).map(Layer::of).collect();
    // A cluster that lies behind the end says nothing there.
    for (layer, says) in &mut chain {
        says.retain(|(start, ..)| *start < layer.size);
    }
    if chain.len() < 2 {
        return;
    }
    let most = chain.len() - 2;
    let stay = usize::from(input.stay).min(most);
    let (going, staying) = chain.split_at(chain.len() - stay);
    let layers: Vec<&Layer> = chain.iter().map(|(layer, _)| layer).collect();
    let below: Vec<&Layer> = staying.iter().map(|(layer, _)| layer).collect();
    let said = |part: &'_ [(Layer, Vec<(u64, u64, Say)>)], first: usize| {
        let says: Vec<(u64, &[_])> = part.iter().map(|(l, s)| (l.size, &**s)).collect();
        fold(&says, first)
    };
    let content = match staying {
        [] => Content::none(),
        staying => Content::none().under(&said(staying, 0).cover()),
    };
    let top = layers[0];
    let view = |at| if at < top.size { read(&layers, at) } else { 0 };
    let stands = |layer: &Layer, on: &[&Layer], what: &str| {
        let read_now: Vec<&Layer> = std::iter::once(layer).chain(on.iter().copied()).collect();
        assert_eq!(layer.size, top.size, "{what}");
        for at in 0..top.size {
            assert_eq!(read(&read_now, at), view(at), "{what}: byte {at}");
        }
    };

    let own = said(&going[..1], 0).cover();
    let target = Target { cluster_bits: top.unit.ilog2(), size: top.size, zero_flag: top.zero_flag };
    let needs = settled(target, &pull(target, &own, &said(&going[1..], 1).cover(), &content), &view);
    let mut pulled = top.clone();
    pulled.execute(target, &needs, &view);
    stands(&pulled, &below, "pull");

    let (base, upper) = going.split_last().expect("two at least");
    if top.size >= base.0.size {
        let target =
            Target { cluster_bits: base.0.unit.ilog2(), size: top.size, zero_flag: base.0.zero_flag };
        let own = said(std::slice::from_ref(base), 0).cover();
        let plain = own.says().filter(|s| s.1 == Say::Data).map(|(r, s)| (r.start, r.end - r.start, s));
        let plain = Cover::new(own.size(), plain.collect::<Vec<_>>());
        let needs = commit(target, &said(upper, 1).cover(), &own, &plain, &content);
        let needs = settled(target, &needs, &view);
        let mut merged = base.0.clone();
        merged.execute(target, &needs, &view);
        stands(&merged, &below, "commit");
    }

    let mut others: Vec<_> = input.other.iter().take(MOST_LAYERS).map(Layer::of).collect();
    for (layer, says) in &mut others {
        says.retain(|(start, ..)| *start < layer.size);
    }
    let new: Vec<&Layer> = others.iter().map(|(layer, _)| layer).chain(below.iter().copied()).collect();
    if new.is_empty() {
        return;
    }
    // What stays is the same layer in both chains, by its number.
    let with_below = |part: &[_], first: usize| match (part, staying) {
        ([], staying) => said(staying, 0),
        (part, []) => said(part, first),
        (part, staying) => said(part, first).over(&said(staying, 0)),
    };
    let (from, to) = (with_below(&going[1..], 100), with_below(&others, 200));
    let target = Target { cluster_bits: top.unit.ilog2(), size: top.size, zero_flag: top.zero_flag };
    let own = said(&going[..1], 0).cover();
    let needs = rebase(target, &own, &from, &to);
    let found = clusters(&needs).map(|c| {
        let visible = bytes(target, c).start..bytes(target, c).end.min(top.size);
        match () {
            () if visible.clone().all(|at| view(at) == read(&new, at)) => Found::Same,
            () if visible.clone().all(|at| view(at) == 0) => Found::Zero,
            () => Found::Data,
        }
    });
    let needs = settle_against(&needs, found.collect::<Vec<_>>());
    let mut rebased = top.clone();
    rebased.execute(target, &needs, &view);
    stands(&rebased, &new, "rebase");
});
