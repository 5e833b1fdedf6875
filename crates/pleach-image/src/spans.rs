//! L2 tables by spans: neighbouring entries that lead to neighbouring clusters are looked at once.

use pleach_format::{ExtendedL2Entry, Geometry, L2Entry};

use crate::ImageError;

/// An entry of an L2 table that says something, and those behind it that go on as it does.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index of the first entry.
    pub(crate) slot: usize,
    /// How many entries, at least 1. More than one only if none is compressed.
    pub(crate) len: usize,
    /// The first entry. Each following one leads one cluster further, and is the same otherwise.
    pub(crate) entry: ExtendedL2Entry,
}

impl Span {
    /// The entry number `i` of the span.
    pub(crate) fn entry(&self, g: Geometry, i: usize) -> ExtendedL2Entry {
        let descriptor = L2Entry(self.entry.descriptor.0.wrapping_add((i as u64) << g.cluster_bits()));
        ExtendedL2Entry { descriptor, ..self.entry }
    }
}

/// Calls `each` with the spans of `table` in order; entries that say nothing are skipped.
///
/// # Errors
/// What `each` says.
pub(crate) fn spans(
    table: &[u8],
    g: Geometry,
    mut each: impl FnMut(Span) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let words = table.as_chunks::<8>().0;
    if g.extended_l2() {
        let pairs = words.as_chunks::<2>().0;
        return spans_of(pairs, g, |pair| pair.map(u64::from_be_bytes), &mut each);
    }
    spans_of(words, g, |word| [u64::from_be_bytes(*word), 0], &mut each)
}

fn spans_of<T: PartialEq>(
    entries: &[T],
    g: Geometry,
    read: impl Fn(&T) -> [u64; 2],
    each: &mut impl FnMut(Span) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let cluster = g.cluster_size();
    let mut slot = 0;
    while let Some(rest) = entries.get(slot..).filter(|rest| !rest.is_empty()) {
        let empty = rest.iter().take_while(|e| read(e) == [0, 0]).count();
        slot += empty;
        let Some((first, behind)) = rest.get(empty..).and_then(<[T]>::split_first) else { break };
        let [descriptor, subclusters] = read(first);
        let entry = ExtendedL2Entry { descriptor: L2Entry(descriptor), subclusters };
        let leads = !entry.descriptor.is_compressed() && entry.descriptor.with_copied(false).0 > 1;
        let mut wanted = descriptor;
        let alike = behind.iter().take_while(|next| {
            wanted = wanted.wrapping_add(cluster);
            read(next) == [wanted, subclusters]
        });
        let len = 1 + if leads { alike.count() } else { 0 };
        each(Span { slot, len, entry })?;
        slot += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_nothing_else() {
        let g = Geometry::new(12, false).unwrap();
        let entries: [u64; 10] =
            [0, 0x8000_0000_0000_1000, 0x8000_0000_0000_2000, 0x3000, 0x4001, 0x5001, 1, 1, 0, 4 << 60];
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        let mut seen = Vec::new();
        spans(&bytes, g, |span| {
            seen.extend((0..span.len).map(|i| (span.slot + i, span.entry(g, i).descriptor.0, span.len)));
            Ok(())
        })
        .unwrap();
        let lens = [0, 2, 2, 1, 2, 2, 1, 1, 0, 1];
        let want: Vec<_> = (0..10).filter(|i| entries[*i] != 0).map(|i| (i, entries[i], lens[i])).collect();
        assert_eq!(seen, want);
    }
}
