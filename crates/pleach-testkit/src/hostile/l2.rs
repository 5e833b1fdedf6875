//! L2 tables, standard and extended.

use super::{
    ANY, BAD, Case, DAMAGED, Edit, Expect, LEAKS, OPENS, Read, SOUND, UNREADABLE, Verdict, edits, plain,
};
use crate::image::{Built, COPIED, ImageBuilder, Shape};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = edits("l2", plain, STANDARD);
    cases.extend(edits("l2-extended", extended, EXTENDED));
    for bit in [1u32, 4, 8, 56, 58, 61] {
        cases.push(Case::built(format!("l2-reserved-bit-{bit}"), DAMAGED, move || {
            let mut built = plain();
            let at = built.entry_of(1);
            let entry = built.bytes.be(at, 8);
            built.bytes.put_be(at, 8, entry | 1 << bit);
            built
        }));
    }
    cases
}

/// The entry of the guest's second cluster, which is data.
fn put(built: &mut Built, entry: u64) {
    let at = built.entry_of(1);
    built.bytes.put_be(at, 8, entry);
}

fn get(built: &Built) -> u64 {
    built.bytes.be(built.entry_of(1), 8)
}

/// What a guest reads is a part of the image's own tables: a careful tool may refuse, and `check` must object.
const OVER_METADATA: Expect = Expect { opens: Some(true), check: Verdict::Bad, read: Read::Any };

const STANDARD: &[(&str, Expect, Edit)] = &[
    ("unaligned-512", UNREADABLE, |b| {
        let entry = get(b);
        put(b, entry + 512);
    }),
    ("unaligned-zero-cluster", UNREADABLE, |b| {
        let entry = get(b);
        put(b, entry + 512 + 1);
    }),
    ("end-of-file", UNREADABLE, |b| put(b, b.bytes.len() | COPIED)),
    ("one-cluster-behind-the-file", UNREADABLE, |b| put(b, b.bytes.len() + 4096)),
    ("behind-the-file", UNREADABLE, |b| put(b, 1 << 40 | COPIED)),
    ("32p", UNREADABLE, |b| put(b, 1 << 55 | COPIED)),
    ("highest", UNREADABLE, |b| put(b, 0x00ff_ffff_ffff_f000 | COPIED)),
    ("zero-cluster-behind-the-file", BAD, |b| put(b, 1 << 40 | 1)),
    ("its-own-table", OVER_METADATA, |b| put(b, b.at.l2.get(&0).copied().unwrap_or(0) | COPIED)),
    ("the-l1-table", OVER_METADATA, |b| put(b, b.at.l1 | COPIED)),
    ("the-refcount-table", OVER_METADATA, |b| put(b, b.at.table | COPIED)),
    ("a-refcount-block", OVER_METADATA, |b| put(b, b.at.blocks.first().copied().unwrap_or(0) | COPIED)),
    ("shared-by-two-entries", OVER_METADATA, |b| {
        let other = b.bytes.be(b.entry_of(0), 8);
        put(b, other);
    }),
    ("shared-by-two-entries-not-copied", OVER_METADATA, |b| {
        let other = b.bytes.be(b.entry_of(0), 8);
        put(b, other & !COPIED);
    }),
    ("copied-missing", DAMAGED, |b| {
        let entry = get(b);
        put(b, entry & !COPIED);
    }),
    ("copied-of-nothing", Expect { read: Read::Any, ..LEAKS }, |b| put(b, COPIED)),
    ("lost-data", Expect { read: Read::Any, ..LEAKS }, |b| put(b, 0)),
    ("plain-zero-with-copied", Expect { read: Read::Any, ..OPENS }, |b| put(b, COPIED | 1)),
    ("all-ones", UNREADABLE, |b| put(b, u64::MAX)),
    ("behind-the-disk-leads-nowhere", DAMAGED, |b| {
        // The disk ends inside the second table's range; the entry is behind it.
        let at = b.entry_of(900);
        b.bytes.put_be(at, 8, 1 << 40);
    }),
    ("cut-by-the-end-of-the-file", ANY, |b| {
        // A new table in the last cluster, of which the file has the half.
        let (end, entry) = (b.bytes.len(), get(b));
        b.bytes.put_be(end + 8, 8, entry);
        b.bytes.set_len(end + 2048);
        b.bytes.put_be(b.at.l1, 8, end);
    }),
];

/// Clusters of 16 KiB, subclusters of 512 bytes.
fn extended() -> Built {
    let shape = Shape { cluster_bits: 14, extended_l2: true, size: 17 << 20, ..Shape::default() };
    ImageBuilder::rich(shape).finish()
}

fn bitmap(built: &mut Built, guest: u64, bitmap: u64) {
    let at = built.entry_of(guest);
    built.bytes.put_be(at + 8, 8, bitmap);
}

const EXTENDED: &[(&str, Expect, Edit)] = &[
    ("plain", SOUND, |_| ()),
    ("zero-flag-is-ignored", Expect { check: Verdict::Any, read: Read::RightOrRefused, ..SOUND }, |b| {
        let entry = get(b);
        put(b, entry | 1);
    }),
    ("data-and-zero", UNREADABLE, |b| bitmap(b, 1, u64::MAX)),
    ("data-and-zero-of-one-subcluster", UNREADABLE, |b| bitmap(b, 1, 1 << 31 | 1 << 63)),
    ("data-without-cluster", UNREADABLE, |b| bitmap(b, 3, 1)),
    ("data-and-zero-without-cluster", UNREADABLE, |b| bitmap(b, 3, 1 | 1 << 32)),
    ("bitmap-of-a-hole", UNREADABLE, |b| bitmap(b, 20, 0xffff_ffff)),
    ("compressed-with-data", UNREADABLE, |b| bitmap(b, 5, 1)),
    ("compressed-with-zeros", UNREADABLE, |b| bitmap(b, 5, 1 << 32)),
    ("no-subcluster-of-a-cluster", Expect { read: Read::Any, ..SOUND }, |b| bitmap(b, 1, 0)),
    ("unaligned-512", UNREADABLE, |b| {
        let entry = get(b);
        put(b, entry + 512);
    }),
    ("behind-the-file", UNREADABLE, |b| put(b, 1 << 40 | COPIED)),
    ("reserved", DAMAGED, |b| {
        let entry = get(b);
        put(b, entry | 1 << 57);
    }),
    ("copied-missing", DAMAGED, |b| {
        let entry = get(b);
        put(b, entry & !COPIED);
    }),
];
