//! The refcount table and its blocks.

use super::{BAD, Case, DAMAGED, Edit, Expect, LEAKS, SOUND, edits, plain};
use crate::image::{Built, ImageBuilder, Shape};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = edits("refcount", plain, ROWS);
    for bit in [0u32, 3, 8] {
        cases.push(Case::built(format!("refcount-table-reserved-bit-{bit}"), DAMAGED, move || {
            let mut built = plain();
            let entry = built.bytes.be(built.at.table, 8);
            built.bytes.put_be(built.at.table, 8, entry | 1 << bit);
            built
        }));
    }
    for order in 0..=6u32 {
        cases.push(Case::built(
            format!("refcount-block-full-of-ones-{}-bits", 1 << order),
            BAD_COUNTS,
            move || {
                let mut image = ImageBuilder::new(Shape { refcount_order: order, ..Shape::default() });
                image.data(0);
                let mut built = image.finish();
                let block = built.at.blocks.first().copied().unwrap_or(0);
                built.bytes.put(block, &[0xff; 4096]);
                built
            },
        ));
    }
    cases
}

/// Counts too high, also of clusters that are not there, and COPIED flags that do not fit them.
const BAD_COUNTS: Expect = Expect { check: super::Verdict::Any, ..DAMAGED };

fn entry(built: &mut Built, value: u64) {
    built.bytes.put_be(built.at.table, 8, value);
}

fn count(built: &mut Built, offset: u64, value: u64) {
    built.put_count(offset / 4096, value);
}

fn block(built: &Built) -> u64 {
    built.at.blocks.first().copied().unwrap_or(0)
}

fn table_of(built: &Built) -> u64 {
    built.at.l2.get(&0).copied().unwrap_or(0)
}

fn data(built: &Built) -> u64 {
    built.at.data.get(&0).copied().unwrap_or(0)
}

const ROWS: &[(&str, Expect, Edit)] = &[
    ("table-empty", DAMAGED, |b| entry(b, 0)),
    ("table-unaligned", DAMAGED, |b| entry(b, block(b) + 512)),
    ("table-end-of-file", DAMAGED, |b| entry(b, b.bytes.len())),
    ("table-behind-the-file", DAMAGED, |b| entry(b, 1 << 40)),
    ("table-8t", DAMAGED, |b| entry(b, 8 << 40)),
    ("table-32p", DAMAGED, |b| entry(b, 1 << 55)),
    ("table-high", DAMAGED, |b| entry(b, 1 << 63)),
    ("table-highest", DAMAGED, |b| entry(b, !4095)),
    ("table-all-ones", DAMAGED, |b| entry(b, u64::MAX)),
    ("table-leads-to-itself", DAMAGED, |b| entry(b, b.at.table)),
    ("table-leads-to-the-l1-table", DAMAGED, |b| entry(b, b.at.l1)),
    ("table-leads-to-guest-data", DAMAGED, |b| entry(b, data(b))),
    ("table-two-entries-one-block", DAMAGED, |b| b.bytes.put_be(b.at.table + 8, 8, block(b))),
    ("table-all-entries-one-block", DAMAGED, |b| {
        for slot in 1..512 {
            b.bytes.put_be(b.at.table + slot * 8, 8, block(b));
        }
    }),
    ("table-last-entry-behind-the-file", DAMAGED, |b| b.bytes.put_be(b.at.table + 4088, 8, 1 << 40)),
    ("table-second-entry-leads-to-the-header", DAMAGED, |b| b.bytes.put_be(b.at.table + 8, 8, 1)),
    ("of-the-header-0", DAMAGED, |b| count(b, 0, 0)),
    ("of-the-header-2", LEAKS, |b| count(b, 0, 2)),
    ("of-the-table-0", DAMAGED, |b| count(b, b.at.table, 0)),
    ("of-the-table-2", LEAKS, |b| count(b, b.at.table, 2)),
    ("of-the-block-0", DAMAGED, |b| count(b, block(b), 0)),
    ("of-the-block-2", LEAKS, |b| count(b, block(b), 2)),
    ("of-the-l1-table-0", DAMAGED, |b| count(b, b.at.l1, 0)),
    ("of-an-l2-table-0", DAMAGED, |b| count(b, table_of(b), 0)),
    ("of-an-l2-table-2", DAMAGED, |b| count(b, table_of(b), 2)),
    ("of-guest-data-0", DAMAGED, |b| count(b, data(b), 0)),
    ("of-guest-data-2", DAMAGED, |b| count(b, data(b), 2)),
    ("of-guest-data-highest", DAMAGED, |b| count(b, data(b), 0xffff)),
    ("of-packed-clusters-1", DAMAGED, |b| {
        let packed = b.bytes.be(b.entry_of(5), 8) & 0x0fff_ffff;
        count(b, packed, 1);
    }),
    ("of-nothing-in-the-file-1", LEAKS, |b| {
        let end = b.bytes.len();
        b.bytes.set_len(end + 4096);
        count(b, end, 1);
    }),
    ("of-nothing-in-the-file-many", LEAKS, |b| {
        let end = b.bytes.len();
        b.bytes.set_len(end + 4096 * 1000);
        for cluster in 0..1000 {
            count(b, end + cluster * 4096, 1);
        }
    }),
    ("of-nothing-behind-the-file", SOUND, |b| count(b, b.bytes.len() + 4096, 1)),
    ("all-0", DAMAGED, |b| b.bytes.put(block(b), &[0; 4096])),
    ("table-cut-by-the-end-of-the-file", BAD, |b| {
        let end = b.bytes.len();
        let old = b.bytes.get(b.at.table, 512);
        b.bytes.put(end, &old);
        b.bytes.put_be(48, 8, end);
    }),
];
