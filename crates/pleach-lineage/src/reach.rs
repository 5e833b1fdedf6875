//! What must survive an operation: everything that something surviving still reads.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// One fact read off an image: `reader` gets bytes from `read`.
///
/// Keys are opaque. They have to name the thing itself, not one of its spellings (device and inode, rather than
/// a path), because a file that is missed here is a file that is lost.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reads<K> {
    /// An image.
    pub reader: K,
    /// Its backing file, or its data file.
    pub read: K,
}

/// Every file, and every internal state in it, that must survive an operation: computed from what images read,
/// not from what a record says they should read.
///
/// A state inside a file is a key like any other, one that reads its file: as long as it survives so does the
/// file, though the file's active state may go.
///
/// ```
/// use pleach_lineage::{Reach, Reads};
/// type Key = (&'static str, Option<u32>); // a file's active state, or a snapshot inside it
///
/// let reads = [
///     Reads { reader: ("top", None), read: ("mid", None) },
///     Reads { reader: ("mid", None), read: ("base", None) },
///     Reads { reader: ("base", Some(1)), read: ("base", None) },
/// ];
/// // `top` and `mid` are to go; snapshot 1 inside `base` is to stay.
/// let reach: Reach<Key> = Reach::of([("base", Some(1))], &reads);
/// assert!(reach.needs(&("base", None)) && !reach.needs(&("mid", None)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach<K> {
    needed: BTreeSet<K>,
    /// By what is read: who reads it, of those that survive.
    readers: BTreeMap<K, BTreeSet<K>>,
}

impl<K: Ord + Clone> Reach<K> {
    /// The survivors and everything they read, directly or not. Loops do no harm.
    ///
    /// `survivors` are all files and states known, other than those that are to go; `reads` is all that is known,
    /// whoever reads. A file that is to go and is nevertheless needed is the operation's problem to solve, or its
    /// reason to refuse.
    pub fn of(survivors: impl IntoIterator<Item = K>, reads: &[Reads<K>]) -> Self {
        let mut read_by: BTreeMap<&K, Vec<&K>> = BTreeMap::new();
        for edge in reads {
            read_by.entry(&edge.reader).or_default().push(&edge.read);
        }
        let mut needed = BTreeSet::new();
        let mut readers: BTreeMap<K, BTreeSet<K>> = BTreeMap::new();
        let mut left: Vec<K> = survivors.into_iter().collect();
        while let Some(reader) = left.pop() {
            if needed.contains(&reader) {
                continue;
            }
            for &read in read_by.get(&reader).into_iter().flatten() {
                readers.entry(read.clone()).or_default().insert(reader.clone());
                left.push(read.clone());
            }
            needed.insert(reader);
        }
        Self { needed, readers }
    }

    /// Whether `file` must survive. If not, nothing that survives reads a byte of it.
    pub fn needs(&self, file: &K) -> bool {
        self.needed.contains(file)
    }

    /// Who reads `file` directly, of those that must survive; sorted. Empty for a survivor that nobody reads.
    pub fn needed_by(&self, file: &K) -> Vec<K> {
        self.readers.get(file).into_iter().flatten().cloned().collect()
    }

    /// All that must survive, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &K> {
        self.needed.iter()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use alloc::string::String;
    use alloc::vec::Vec;

    use super::{Reach, Reads};

    /// `"ba ca"`: b reads a, and c reads a.
    pub(crate) fn reads(text: &str) -> Vec<Reads<char>> {
        text.split_whitespace()
            .map(|edge| {
                let mut files = edge.chars();
                Reads { reader: files.next().unwrap(), read: files.next().unwrap() }
            })
            .collect()
    }

    #[test]
    fn what_survives_keeps_what_it_reads() {
        // A case, the links, who survives; then all that is needed.
        let cases: &[(&str, &str, &str, &str)] = &[
            ("nothing survives", "ba", "", ""),
            ("a leaf goes", "ba ca", "ac", "ac"),
            ("the middle of a chain goes", "cb ba", "ac", "abc"),
            ("the root of a branch goes", "ba ca db ec", "bcde", "abcde"),
            ("a whole branch goes", "ba ca db ec", "ace", "ace"),
            ("a survivor nobody knows", "ba", "z", "z"),
            ("a loop among survivors", "ab bc ca", "a", "abc"),
            ("a loop that goes", "ab ba dc", "d", "cd"),
            ("a file backed by itself", "aa", "a", "a"),
            ("several files read", "ab ac cd", "a", "abcd"),
        ];
        for (case, edges, survivors, want) in cases {
            let reach = Reach::of(survivors.chars(), &reads(edges));
            assert_eq!(reach.iter().collect::<String>(), *want, "{case}");
            for file in 'a'..='z' {
                assert_eq!(reach.needs(&file), want.contains(file), "{case}: {file}");
            }
        }
    }

    #[test]
    fn readers_are_named_if_they_survive() {
        let edges = reads("da ca ba ca ed aa");
        let cases: &[(&str, &str, char, &str)] = &[
            ("all survive", "abcde", 'a', "abcd"),
            ("one goes", "abc", 'a', "abc"),
            ("a reader that is itself only read", "e", 'a', "ad"),
            ("nobody reads it", "abcde", 'e', ""),
            ("not known", "abcde", 'z', ""),
        ];
        for (case, survivors, file, want) in cases {
            let got: String = Reach::of(survivors.chars(), &edges).needed_by(file).into_iter().collect();
            assert_eq!(got, *want, "{case}");
        }
    }

    #[test]
    fn a_long_chain_is_no_burden() {
        let edges: Vec<_> = (1..100_000_u32).map(|n| Reads { reader: n, read: n - 1 }).collect();
        let reach = Reach::of([99_999], &edges);
        assert_eq!(reach.iter().count(), 100_000);
        assert!(crate::order::cycles(&edges).is_empty());
    }
}
