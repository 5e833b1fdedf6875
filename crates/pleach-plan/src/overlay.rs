//! Who answers for which guest bytes when layers lie over each other.

use alloc::vec::Vec;
use core::ops::Range;

use pleach_format::{CompressedExtent, RunKind, RunList};

use crate::{Cover, Say};

/// What answers for a stretch of guest bytes. Equal owners at equal guest bytes mean equal content.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody: it reads as zeros.
    Zero,
    /// Plain bytes of a layer.
    Data {
        /// The number that the caller gave the layer.
        layer: usize,
        /// Byte offset in that layer's file, or in its external data file.
        host: u64,
    },
    /// A compressed cluster of a layer, or a part of one.
    Compressed {
        /// The number that the caller gave the layer.
        layer: usize,
        /// Where the whole cluster lies.
        extent: CompressedExtent,
    },
}

impl Owner {
    /// The owner of the bytes that lie `skipped` bytes further on.
    fn after(self, skipped: u64) -> Self {
        match self {
            Self::Data { layer, host } => Self::Data { layer, host: host + skipped },
            other => other,
        }
    }
}

/// A stretch of guest bytes with one owner.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// First guest byte.
    pub start: u64,
    /// One past the last guest byte.
    pub end: u64,
    /// What answers for it.
    pub owner: Owner,
}

impl Part {
    fn cut(self, start: u64, end: u64) -> Self {
        Self { start, end, owner: self.owner.after(start - self.start) }
    }
}

/// Layers folded into one: its virtual size, and who answers for what. Where nobody does, a layer further below may;
/// behind its end there are zeros, whatever lies below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    size: u64,
    parts: Vec<Part>,
}

impl Overlay {
    /// One layer of `size` bytes, called `layer` from here on.
    pub fn of_runs(layer: usize, size: u64, runs: &RunList) -> Self {
        let mut parts = Parts::default();
        for run in runs.as_slice().iter().filter(|run| run.guest.0 < size) {
            let owner = match run.kind {
                RunKind::Zero => Owner::Zero,
                RunKind::Data(host) => Owner::Data { layer, host: host.0 },
                RunKind::Compressed(extent) => Owner::Compressed { layer, extent },
            };
            parts.push(Part { start: run.guest.0, end: run.end().min(size), owner });
        }
        Self { size, parts: parts.0 }
    }

    /// This one with `lower` under it. Associative, so that many layers can be folded in any grouping.
    #[must_use]
    pub fn over(&self, lower: &Self) -> Self {
        let mut parts = Parts::default();
        let mut below = lower.parts.as_slice();
        let mut at = 0;
        let last = Part { start: self.size, end: self.size, owner: Owner::Zero };
        for part in self.parts.iter().copied().chain([last]) {
            while let Some((first, rest)) = below.split_first() {
                if first.start >= part.start {
                    break;
                }
                if first.end > at {
                    parts.push(first.cut(first.start.max(at), first.end.min(part.start)));
                }
                if first.end > part.start {
                    break;
                }
                below = rest;
            }
            // What the lower end cuts off would else show what lies even further below.
            parts.push(Part { start: at.max(lower.size), end: part.start, owner: Owner::Zero });
            parts.push(part);
            at = part.end;
        }
        Self { size: self.size, parts: parts.0 }
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Who answers for what, in guest order; gaps are where nobody does.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The same without regard to where the bytes are.
    pub fn cover(&self) -> Cover {
        let says = self.parts.iter().map(|p| {
            let say = if p.owner == Owner::Zero { Say::Zero } else { Say::Data };
            (p.start, p.end - p.start, say)
        });
        Cover::new(self.size, says)
    }

    /// The first `size` bytes, all of them covered, of a chain that has nothing below: gaps and what lies behind its end
    /// are zeros.
    pub fn whole(&self, size: u64) -> Vec<Part> {
        let nothing = Self { size: 0, parts: Vec::new() };
        let top = Self { size, parts: Vec::new() };
        top.over(self).over(&nothing).parts
    }
}

/// The parts of the first `size` bytes that two chains, each with nothing below, do not read from the same place.
pub fn changed(old: &Overlay, new: &Overlay, size: u64) -> Vec<Range<u64>> {
    let (old, new) = (old.whole(size), new.whole(size));
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let mut out: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let (Some(a), Some(b)) = (old.peek(), new.peek()) {
        let end = a.end.min(b.end);
        if a.owner.after(at - a.start) != b.owner.after(at - b.start) {
            match out.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => out.push(at..end),
            }
        }
        if a.end == end {
            old.next();
        }
        if new.peek().is_some_and(|b| b.end == end) {
            new.next();
        }
        at = end;
    }
    out
}

/// Parts in guest order, joined where one continues the other.
#[derive(Default)]
struct Parts(Vec<Part>);

impl Parts {
    fn push(&mut self, part: Part) {
        if part.start >= part.end {
            return;
        }
        if let Some(last) = self.0.last_mut()
            && last.end == part.start
            && last.owner.after(last.end - last.start) == part.owner
            && !matches!(part.owner, Owner::Compressed { .. })
        {
            last.end = part.end;
            return;
        }
        self.0.push(part);
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use pleach_format::{GuestOffset, HostOffset, Mapping};

    use super::*;
    use crate::Content;

    fn random(rand: &mut dyn FnMut(u64) -> u64) -> (u64, RunList) {
        let (size, mut at, mut runs) = (1 + rand(64), rand(8), RunList::new());
        while at < size + 4 {
            let len = 1 + rand(8);
            let mapping = if rand(3) == 0 { Mapping::Zero } else { Mapping::Data(HostOffset(1000 + at)) };
            runs.push(GuestOffset(at), len, mapping);
            at += len + rand(8);
        }
        (size, runs)
    }

    /// The owner of each byte, found by asking one layer after the other.
    fn model(layers: &[(u64, RunList)], at: u64) -> Owner {
        for (layer, (size, runs)) in layers.iter().enumerate() {
            if at >= *size {
                return Owner::Zero;
            }
            let run = runs.as_slice().iter().find(|r| (r.guest.0..r.end()).contains(&at));
            match run.map(|r| r.kind) {
                Some(RunKind::Data(_)) => return Owner::Data { layer, host: 1000 + at },
                Some(_) => return Owner::Zero,
                None => {}
            }
        }
        Owner::Zero
    }

    fn owner(parts: &[Part], at: u64) -> Owner {
        let part = parts.iter().find(|p| (p.start..p.end).contains(&at)).expect("all is covered");
        part.owner.after(at - part.start)
    }

    #[test]
    fn folding_agrees_with_asking_one_layer_after_the_other() {
        let mut state = 7u64;
        let mut rand = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..400 {
            let layers: Vec<_> = (0..1 + rand(5)).map(|_| random(&mut rand)).collect();
            let folded: Vec<Overlay> =
                layers.iter().enumerate().map(|(i, (size, runs))| Overlay::of_runs(i, *size, runs)).collect();
            let from_top = folded.iter().skip(1).fold(folded[0].clone(), |all, layer| all.over(layer));
            let (last, upper) = folded.split_last().unwrap();
            let from_below = upper.iter().rev().fold(last.clone(), |all, layer| layer.over(&all));
            assert_eq!(from_top, from_below);
            let whole = from_top.whole(80);
            assert_eq!((whole.first().unwrap().start, whole.last().unwrap().end), (0, 80));
            for at in 0..80 {
                assert_eq!(owner(&whole, at), model(&layers, at), "{at} of {layers:?}");
            }
            // The content of the fold is that of the layers, put on each other one at a time.
            let covers = layers.iter().rev().map(|(size, runs)| Cover::of_runs(*size, runs));
            let content = covers.fold(Content::none(), |below, cover| below.under(&cover));
            assert_eq!(Content::none().under(&from_top.cover()), content);

            let other: Vec<_> = (0..1 + rand(3)).map(|_| random(&mut rand)).collect();
            let below: Vec<_> = other.iter().chain(&layers[1..]).cloned().collect();
            let number = |i: usize| if i < other.len() { 100 + i } else { i + 1 - other.len() };
            let second =
                below.iter().enumerate().map(|(i, (size, runs))| Overlay::of_runs(number(i), *size, runs));
            let second = second.reduce(|all, layer| all.over(&layer)).unwrap();
            let found = changed(&from_top, &second, 80);
            for at in 0..80 {
                let same = owner(&whole, at) == owner(&second.whole(80), at);
                assert_eq!(found.iter().any(|r| r.contains(&at)), !same, "{at}");
            }
        }
    }

    #[test]
    fn parts_are_joined_and_cut_where_they_lie() {
        let mut runs = RunList::new();
        runs.push(GuestOffset(10), 20, Mapping::Data(HostOffset(500)));
        let lower = Overlay::of_runs(1, 25, &runs);
        let mut runs = RunList::new();
        runs.push(GuestOffset(12), 4, Mapping::Zero);
        let upper = Overlay::of_runs(0, 40, &runs);
        let data = |start, end, host| Part { start, end, owner: Owner::Data { layer: 1, host } };
        let zero = |start, end| Part { start, end, owner: Owner::Zero };
        assert_eq!(
            upper.over(&lower).parts(),
            vec![data(10, 12, 500), zero(12, 16), data(16, 25, 506), zero(25, 40)]
        );
    }
}
