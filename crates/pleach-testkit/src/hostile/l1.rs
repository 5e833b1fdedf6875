//! The active L1 table.

use super::{ANY, Case, DAMAGED, Edit, Expect, SOUND, UNREADABLE, edits, plain};
use crate::image::{Built, COPIED};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = edits("l1", plain, ROWS);
    for bit in [0u32, 1, 8, 56, 59, 62] {
        cases.push(Case::built(format!("l1-reserved-bit-{bit}"), DAMAGED, move || {
            let mut built = plain();
            let entry = built.bytes.be(built.at.l1, 8);
            built.bytes.put_be(built.at.l1, 8, entry | 1 << bit);
            built
        }));
    }
    cases
}

fn first(built: &mut Built, entry: u64) {
    built.bytes.put_be(built.at.l1, 8, entry);
}

const ROWS: &[(&str, Expect, Edit)] = &[
    ("unaligned-512", UNREADABLE, |b| {
        let entry = b.bytes.be(b.at.l1, 8);
        first(b, entry + 512);
    }),
    ("end-of-file", UNREADABLE, |b| first(b, b.bytes.len() | COPIED)),
    ("behind-the-file", UNREADABLE, |b| first(b, 1 << 40 | COPIED)),
    ("32p", UNREADABLE, |b| first(b, 1 << 55 | COPIED)),
    ("highest", UNREADABLE, |b| first(b, 0x00ff_ffff_ffff_f000 | COPIED)),
    ("itself", ANY, |b| first(b, b.at.l1 | COPIED)),
    ("refcount-table", ANY, |b| first(b, b.at.table | COPIED)),
    ("refcount-block", ANY, |b| first(b, b.at.blocks.first().copied().unwrap_or(0) | COPIED)),
    ("guest-data", ANY, |b| first(b, b.at.data.get(&0).copied().unwrap_or(0) | COPIED)),
    ("shared-by-two-entries", super::Expect { read: super::Read::Any, ..DAMAGED }, |b| {
        let entry = b.bytes.be(b.at.l1, 8);
        b.bytes.put_be(b.at.l1 + 8, 8, entry);
    }),
    ("copied-missing", DAMAGED, |b| {
        let entry = b.bytes.be(b.at.l1, 8);
        first(b, entry & !COPIED);
    }),
    ("copied-of-nothing", super::Expect { check: super::Verdict::Any, ..SOUND }, |b| {
        b.bytes.put_be(36, 4, 3);
        b.bytes.put_be(b.at.l1 + 16, 8, COPIED);
    }),
    ("behind-the-disk", SOUND, |b| b.bytes.put_be(36, 4, 100)),
    ("behind-the-disk-leads-nowhere", super::Expect { check: super::Verdict::Bad, ..DAMAGED }, |b| {
        b.bytes.put_be(36, 4, 3);
        b.bytes.put_be(b.at.l1 + 16, 8, 1 << 40);
    }),
    ("lost-table", super::Expect { read: super::Read::Any, ..super::LEAKS }, |b| first(b, 0)),
    ("all-ones", UNREADABLE, |b| first(b, u64::MAX)),
];
