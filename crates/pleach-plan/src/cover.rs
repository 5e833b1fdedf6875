//! Who says what about which guest bytes, without regard to where the bytes are.

use alloc::vec::Vec;
use core::ops::Range;

use pleach_format::{RunKind, RunList};

/// What a layer says about a stretch of guest bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Say {
    /// Data, which may happen to be zeros.
    Data,
    /// Reads as zeros.
    Zero,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Span {
    start: u64,
    end: u64,
    say: Say,
}

/// One layer: its virtual size, and what it says. Where it says nothing the layer below answers; behind its end there
/// are zeros, whatever lies below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cover {
    size: u64,
    spans: Vec<Span>,
}

impl Cover {
    /// A layer of `size` bytes that says each (start, length, what) of `says`, in guest order and not overlapping.
    /// What lies behind `size` is cut off.
    pub fn new(size: u64, says: impl IntoIterator<Item = (u64, u64, Say)>) -> Self {
        let mut spans: Vec<Span> = Vec::new();
        for (start, len, say) in says {
            let end = start.saturating_add(len).min(size);
            if start >= end {
                continue;
            }
            match spans.last_mut() {
                Some(last) if last.end == start && last.say == say => last.end = end,
                last => {
                    debug_assert!(last.is_none_or(|l| l.end <= start), "spans come in guest order");
                    spans.push(Span { start, end, say });
                }
            }
        }
        Self { size, spans }
    }

    /// The cover of a layer's runs.
    pub fn of_runs(size: u64, runs: &RunList) -> Self {
        let says = runs.as_slice().iter().map(|run| {
            let say = match run.kind {
                RunKind::Data(_) | RunKind::Compressed(_) => Say::Data,
                RunKind::Zero => Say::Zero,
            };
            (run.guest.0, run.len, say)
        });
        Self::new(size, says)
    }

    /// Only what can be overwritten where it is: plain data, not compressed.
    pub fn of_plain_data(size: u64, runs: &RunList) -> Self {
        let plain = runs.as_slice().iter().filter(|run| matches!(run.kind, RunKind::Data(_)));
        Self::new(size, plain.map(|run| (run.guest.0, run.len, Say::Data)))
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What it says, in guest order: range and what.
    pub fn says(&self) -> impl Iterator<Item = (Range<u64>, Say)> {
        self.spans.iter().map(|s| (s.start..s.end, s.say))
    }

    /// Whether the layer says anything about any byte of `range`.
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let first = self.spans.partition_point(|s| s.end <= range.start);
        self.spans.get(first).is_some_and(|s| s.start < range.end)
    }

    /// What it says inside `range`, cut to it.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Say)> {
        let first = self.spans.partition_point(|s| s.end <= range.start);
        self.spans
            .get(first..)
            .unwrap_or(&[])
            .iter()
            .take_while(move |s| s.start < range.end)
            .map(move |s| (s.start.max(range.start)..s.end.min(range.end), s.say))
    }

    /// The parts of `range` about which the layer says nothing and that lie inside its size.
    pub fn transparent(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        let end = range.end.min(self.size);
        let mut at = range.start;
        for (said, _) in self.within(range.start..end.max(range.start)) {
            if at < said.start {
                out.push(at..said.start);
            }
            at = said.end;
        }
        if at < end {
            out.push(at..end);
        }
        out
    }
}

/// Where a chain read as a whole may hold something else than zeros. Everywhere else it reads as zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    ranges: Vec<Range<u64>>,
}

impl Content {
    /// No content: what lies below the last layer.
    pub fn none() -> Self {
        Self::default()
    }

    /// The content of this chain with `upper` put on top of it.
    #[must_use]
    pub fn under(&self, upper: &Cover) -> Self {
        let mut ranges = Vec::new();
        let mut below = self.ranges.iter().peekable();
        let mut add = |range: Range<u64>| {
            if range.is_empty() {
                return;
            }
            match ranges.last_mut() {
                Some(last) if Range::<u64>::clone(last).end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        };
        let mut through = |gap: Range<u64>, add: &mut dyn FnMut(Range<u64>)| {
            while let Some(range) = below.peek() {
                if range.end <= gap.start {
                    below.next();
                    continue;
                }
                if range.start >= gap.end {
                    break;
                }
                add(range.start.max(gap.start)..range.end.min(gap.end));
                if range.end > gap.end {
                    break;
                }
                below.next();
            }
        };
        let mut at = 0;
        for (said, say) in upper.says() {
            through(at..said.start, &mut add);
            at = said.end;
            if say == Say::Data {
                add(said);
            }
        }
        through(at..upper.size().max(at), &mut add);
        Self { ranges }
    }

    /// The ranges, in order.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Whether any byte of `range` may be something else than zero.
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let first = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges.get(first).is_some_and(|r| r.start < range.end)
    }

    /// The content inside `range`, cut to it.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges
            .get(first..)
            .unwrap_or(&[])
            .iter()
            .take_while(move |r| r.start < range.end)
            .map(move |r| r.start.max(range.start)..r.end.min(range.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn stacking_hides_zeros_and_what_lies_behind_a_short_layer() {
        let base = Content::none().under(&Cover::new(100, [(0, 100, Say::Data)]));
        let middle = Cover::new(60, [(10, 10, Say::Zero), (30, 5, Say::Data), (55, 50, Say::Zero)]);
        let seen = base.under(&middle);
        assert_eq!(seen.ranges(), [0..10, 20..55]);
        // A layer that says nothing and is longer adds nothing.
        assert_eq!(seen.under(&Cover::new(1000, [])), seen);
        assert!(seen.touches(&(9..11)) && !seen.touches(&(10..20)) && !seen.touches(&(55..1000)));
    }

    #[test]
    fn transparent_is_the_complement_inside_the_size() {
        let cover = Cover::new(50, [(10, 10, Say::Data), (20, 5, Say::Data), (40, 5, Say::Zero)]);
        assert_eq!(cover.transparent(0..100), vec![0..10, 25..40, 45..50]);
        assert_eq!(cover.transparent(12..44), vec![25..40]);
        assert_eq!(cover.transparent(60..70), vec![]);
    }

    /// Against a byte array, over many small layers.
    #[test]
    fn agrees_with_a_byte_model() {
        let mut state = 1u64;
        let mut rand = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..500 {
            let mut content = Content::none();
            let mut model = [false; 64];
            for _ in 0..4 {
                let size = 1 + rand(64);
                let mut says = Vec::new();
                let mut at = rand(8);
                while at < size {
                    let len = 1 + rand(8);
                    says.push((at, len, if rand(2) == 0 { Say::Data } else { Say::Zero }));
                    at += len + rand(8);
                }
                let cover = Cover::new(size, says);
                let mut next = model;
                for (i, byte) in next.iter_mut().enumerate() {
                    if i as u64 >= size {
                        *byte = false;
                    }
                }
                for (range, say) in cover.says() {
                    for i in range {
                        next[usize::try_from(i).unwrap()] = say == Say::Data;
                    }
                }
                model = next;
                content = content.under(&cover);
                for (i, &want) in model.iter().enumerate() {
                    assert_eq!(content.touches(&(i as u64..i as u64 + 1)), want);
                }
            }
        }
    }
}
