//! Putting files in the order in which they read each other, and finding those that have none.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::Reads;

/// The loops of backing files: each one once, starting at its smallest key and going on to what that reads;
/// sorted.
///
/// Complete where every file reads at most one other, as backing files do. Where files read several, an empty
/// answer still means that there is no loop, but loops that share files need not all be listed.
pub fn cycles<K: Ord + Clone>(reads: &[Reads<K>]) -> Vec<Vec<K>> {
    walk(reads.iter().map(|edge| &edge.reader), reads).loops
}

/// `files` and everything they read, each file after all that it reads: an order in which nodes can be inserted.
/// Equal inputs give equal orders. In a loop, which has no such order, each file still comes once.
pub fn backing_first<K: Ord + Clone>(files: impl IntoIterator<Item = K>, reads: &[Reads<K>]) -> Vec<K> {
    let files: Vec<K> = files.into_iter().collect();
    walk(files.iter(), reads).order
}

struct Walk<K> {
    /// What is read before who reads it.
    order: Vec<K>,
    loops: Vec<Vec<K>>,
}

#[derive(Copy, Clone)]
enum Visit {
    /// On the path that is being followed, at this place.
    Open(usize),
    Done,
}

fn walk<'a, K: Ord + Clone>(from: impl Iterator<Item = &'a K>, reads: &'a [Reads<K>]) -> Walk<K> {
    let mut read_by: BTreeMap<&K, Vec<&K>> = BTreeMap::new();
    for edge in reads {
        read_by.entry(&edge.reader).or_default().push(&edge.read);
    }
    for read in read_by.values_mut() {
        read.sort();
        read.dedup();
    }
    let reads_of = |file: &K| read_by.get(file).map_or(&[][..], Vec::as_slice).iter();

    let mut seen: BTreeMap<&K, Visit> = BTreeMap::new();
    let mut found = Walk { order: Vec::new(), loops: Vec::new() };
    for start in from {
        if seen.contains_key(start) {
            continue;
        }
        seen.insert(start, Visit::Open(0));
        let mut path = alloc::vec![(start, reads_of(start))];
        while let Some((file, left)) = path.last_mut() {
            let file = *file;
            let Some(&next) = left.next() else {
                seen.insert(file, Visit::Done);
                found.order.push(file.clone());
                path.pop();
                continue;
            };
            match seen.get(next) {
                None => {
                    seen.insert(next, Visit::Open(path.len()));
                    path.push((next, reads_of(next)));
                }
                Some(&Visit::Open(at)) => {
                    found.loops.push(smallest_first(
                        path.iter().skip(at).map(|(file, _)| (*file).clone()).collect(),
                    ));
                }
                Some(Visit::Done) => {}
            }
        }
    }
    found.loops.sort();
    found
}

fn smallest_first<K: Ord>(mut files: Vec<K>) -> Vec<K> {
    if let Some((at, _)) = files.iter().enumerate().min_by_key(|(_, file)| *file) {
        files.rotate_left(at);
    }
    files
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::{backing_first, cycles};
    use crate::reach::tests::reads;

    #[test]
    fn loops_are_found_once() {
        let cases: &[(&str, &str, &[&str])] = &[
            ("nothing", "", &[]),
            ("a chain", "cb ba", &[]),
            ("a tree", "db ec ba ca", &[]),
            ("a file backed by itself", "aa", &["a"]),
            ("two", "ab ba", &["ab"]),
            ("entered from the side", "xc ca ab bc", &["abc"]),
            ("entered twice", "xb yc bc cd db", &["bcd"]),
            ("two loops", "fe ef ab ba xa", &["ab", "ef"]),
            ("said twice", "ab ab ba ba", &["ab"]),
            ("smallest first, then what it reads", "ca ab bc", &["abc"]),
            ("the other way round", "cb ba ac", &["acb"]),
            ("a diamond is no loop", "ab ac bd cd", &[]),
        ];
        for (case, edges, want) in cases {
            let want: Vec<Vec<char>> = want.iter().map(|files| files.chars().collect()).collect();
            assert_eq!(cycles(&reads(edges)), want, "{case}");
        }
    }

    #[test]
    fn backing_files_come_first() {
        let cases: &[(&str, &str, &str, &str)] = &[
            ("no links", "ba", "", "ba"),
            ("a chain, from its top", "c", "cb ba", "abc"),
            ("a tree", "edcba", "db ec ba ca", "acebd"),
            ("only what is asked for, and below", "b", "cb ba", "ab"),
            ("a loop", "a", "ab bc ca", "cba"),
        ];
        for (case, files, edges, want) in cases {
            let got: Vec<char> = backing_first(files.chars(), &reads(edges));
            assert_eq!(got, want.chars().collect::<Vec<_>>(), "{case}");
        }
    }
}
