//! Fields of the header.

use super::{
    ANY, BAD, Case, DAMAGED, Edit, Expect, OPENS, REFUSED, Read, SOUND, UNREAD, Verdict, edits, numbers,
    plain,
};
use crate::image::{Built, ImageBuilder, Shape};

/// Stock QEMU refuses it, although nothing is there.
const UNSURE: Expect = Expect { opens: None, check: Verdict::Any, read: Read::RightOrRefused };
/// Not an image of this format at all: whether it may be read as raw is not for this case to say.
const FOREIGN: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::Any };

pub(super) fn cases() -> Vec<Case> {
    let mut cases = numbers("header", plain, |_| 0, FIELDS);
    cases.extend(edits("header", plain, COMBINED));
    cases.extend(edits("header-v2", version_2, VERSION_2));
    cases.extend((5..64).step_by(3).map(|bit| {
        Case::built(format!("header-unknown-incompatible-bit-{bit}"), REFUSED, move || {
            let mut built = plain();
            built.bytes.put_be(72, 8, 1 << bit);
            built
        })
    }));
    cases
}

fn version_2() -> Built {
    ImageBuilder::rich(Shape { version: 2, ..Shape::default() }).finish()
}

const MAX: u64 = u64::MAX;
const HIGH: u64 = 1 << 63;
const ALIGNED_MAX: u64 = !4095;

const FIELDS: &[super::Number] = &[
    ("magic-zero", 0, 4, 0, FOREIGN),
    ("magic-last-byte", 3, 1, 0xfa, FOREIGN),
    ("magic-swapped", 0, 4, 0xfb49_4651, FOREIGN),
    ("version-0", 4, 4, 0, REFUSED),
    ("version-1", 4, 4, 1, REFUSED),
    ("version-4", 4, 4, 4, REFUSED),
    ("version-9", 4, 4, 9, REFUSED),
    ("version-swapped", 4, 4, 0x0300_0000, REFUSED),
    ("version-max", 4, 4, MAX, REFUSED),
    ("cluster-bits-0", 20, 4, 0, REFUSED),
    ("cluster-bits-1", 20, 4, 1, REFUSED),
    ("cluster-bits-8", 20, 4, 8, REFUSED),
    ("cluster-bits-9-too-few-l1-entries", 20, 4, 9, REFUSED),
    ("cluster-bits-21-unaligned-tables", 20, 4, 21, REFUSED),
    ("cluster-bits-22", 20, 4, 22, REFUSED),
    ("cluster-bits-31", 20, 4, 31, REFUSED),
    ("cluster-bits-32", 20, 4, 32, REFUSED),
    ("cluster-bits-40", 20, 4, 40, REFUSED),
    ("cluster-bits-63", 20, 4, 63, REFUSED),
    ("cluster-bits-64", 20, 4, 64, REFUSED),
    ("cluster-bits-max", 20, 4, MAX, REFUSED),
    ("backing-offset-1", 8, 8, 1, REFUSED),
    ("backing-offset-in-header", 8, 8, 100, REFUSED),
    ("backing-offset-no-length", 8, 8, 512, REFUSED),
    ("backing-offset-cluster", 8, 8, 4096, REFUSED),
    ("backing-offset-behind-cluster", 8, 8, 4097, REFUSED),
    ("backing-offset-4g", 8, 8, 1 << 32, REFUSED),
    ("backing-offset-high", 8, 8, HIGH, REFUSED),
    ("backing-offset-max", 8, 8, MAX, REFUSED),
    ("backing-size-without-offset", 16, 4, MAX, SOUND),
    ("size-0", 24, 8, 0, OPENS),
    ("size-1", 24, 8, 1, OPENS),
    ("size-511", 24, 8, 511, OPENS),
    ("size-odd", 24, 8, (2 << 20) + 100, OPENS),
    ("size-all-that-l1-holds", 24, 8, 4 << 20, OPENS),
    ("size-more-than-l1-holds", 24, 8, (4 << 20) + 512, REFUSED),
    ("size-one-byte-more-than-l1-holds", 24, 8, (4 << 20) + 1, OPENS),
    ("size-1t", 24, 8, 1 << 40, REFUSED),
    ("size-1e", 24, 8, 1 << 60, REFUSED),
    ("size-signed-max", 24, 8, HIGH - 512, REFUSED),
    ("size-high", 24, 8, HIGH, REFUSED),
    ("size-max", 24, 8, MAX, REFUSED),
    ("encryption-1", 32, 4, 1, UNREAD),
    ("encryption-3", 32, 4, 3, REFUSED),
    ("encryption-max", 32, 4, MAX, REFUSED),
    ("l1-size-0", 36, 4, 0, REFUSED),
    ("l1-size-1", 36, 4, 1, REFUSED),
    ("l1-size-3", 36, 4, 3, SOUND),
    ("l1-size-fills-its-cluster", 36, 4, 512, SOUND),
    ("l1-size-into-the-next-structure", 36, 4, 513, DAMAGED),
    ("l1-size-out-of-the-file", 36, 4, 1 << 20, REFUSED),
    ("l1-size-32m", 36, 4, 4 << 20, REFUSED),
    ("l1-size-over-32m", 36, 4, (4 << 20) + 1, REFUSED),
    ("l1-size-wraps", 36, 4, 0x2000_0001, REFUSED),
    ("l1-size-max", 36, 4, MAX, REFUSED),
    ("l1-offset-0", 40, 8, 0, REFUSED),
    ("l1-offset-1", 40, 8, 1, REFUSED),
    ("l1-offset-512", 40, 8, 512, REFUSED),
    ("l1-offset-1g", 40, 8, 1 << 30, REFUSED),
    ("l1-offset-64p", 40, 8, 1 << 56, REFUSED),
    ("l1-offset-high", 40, 8, HIGH, REFUSED),
    ("l1-offset-wraps", 40, 8, ALIGNED_MAX, REFUSED),
    ("l1-offset-max", 40, 8, MAX, REFUSED),
    ("refcount-offset-0", 48, 8, 0, BAD),
    ("refcount-offset-1", 48, 8, 1, BAD),
    ("refcount-offset-512", 48, 8, 512, BAD),
    ("refcount-offset-1g", 48, 8, 1 << 30, BAD),
    ("refcount-offset-64p", 48, 8, 1 << 56, BAD),
    ("refcount-offset-high", 48, 8, HIGH, BAD),
    ("refcount-offset-wraps", 48, 8, ALIGNED_MAX, BAD),
    ("refcount-offset-max", 48, 8, MAX, BAD),
    ("refcount-clusters-0", 56, 4, 0, BAD),
    ("refcount-clusters-2", 56, 4, 2, BAD),
    ("refcount-clusters-8m", 56, 4, 2048, BAD),
    ("refcount-clusters-over-8m", 56, 4, 2049, BAD),
    ("refcount-clusters-wraps", 56, 4, 0x0010_0001, BAD),
    ("refcount-clusters-max", 56, 4, MAX, BAD),
    ("snapshots-1-at-0", 60, 4, 1, BAD),
    ("snapshots-offset-without-snapshots", 64, 8, 4097, UNSURE),
    ("incompatible-dirty", 72, 8, 1, OPENS),
    ("incompatible-corrupt", 72, 8, 2, OPENS),
    ("incompatible-data-file-without-name", 72, 8, 4, UNREAD),
    ("incompatible-compression-type-0", 72, 8, 8, REFUSED),
    ("incompatible-extended-l2-with-4k-clusters", 72, 8, 16, REFUSED),
    ("incompatible-all", 72, 8, MAX, REFUSED),
    ("compatible-all", 80, 8, MAX, SOUND),
    ("autoclear-all-unknown", 88, 8, !3, SOUND),
    ("autoclear-bitmaps-without-extension", 88, 8, 1, OPENS),
    ("autoclear-raw-without-data-file", 88, 8, 2, OPENS),
    ("refcount-order-0", 96, 4, 0, DAMAGED),
    ("refcount-order-3", 96, 4, 3, DAMAGED),
    ("refcount-order-5", 96, 4, 5, DAMAGED),
    ("refcount-order-6", 96, 4, 6, DAMAGED),
    ("refcount-order-7", 96, 4, 7, REFUSED),
    ("refcount-order-8", 96, 4, 8, REFUSED),
    ("refcount-order-31", 96, 4, 31, REFUSED),
    ("refcount-order-64", 96, 4, 64, REFUSED),
    ("refcount-order-max", 96, 4, MAX, REFUSED),
    ("length-0", 100, 4, 0, REFUSED),
    ("length-72", 100, 4, 72, REFUSED),
    ("length-103", 100, 4, 103, REFUSED),
    ("length-104", 100, 4, 104, SOUND),
    ("length-105", 100, 4, 105, REFUSED),
    ("length-of-the-cluster", 100, 4, 4096, SOUND),
    ("length-over-the-cluster", 100, 4, 4104, REFUSED),
    ("length-16m", 100, 4, 1 << 24, REFUSED),
    ("length-wraps", 100, 4, 0xffff_fff8, REFUSED),
    ("length-max", 100, 4, MAX, REFUSED),
    ("compression-zstd-without-bit", 104, 1, 1, REFUSED),
    ("compression-2-without-bit", 104, 1, 2, REFUSED),
    ("compression-255-without-bit", 104, 1, 255, REFUSED),
    ("padding", 105, 7, MAX, SOUND),
];

const COMBINED: &[(&str, Expect, Edit)] = &[
    ("compression-2", REFUSED, |b| {
        b.bytes.put_be(72, 8, 8);
        b.bytes.put_be(104, 1, 2);
    }),
    // Deflate streams in what says to be zstd.
    ("compression-type-lies", UNREAD, |b| {
        b.bytes.put_be(72, 8, 8);
        b.bytes.put_be(104, 1, 1);
    }),
    ("compression-bit-in-a-header-too-short-for-it", REFUSED, |b| {
        b.bytes.put_be(72, 8, 8);
        b.bytes.put_be(100, 4, 104);
        b.bytes.put_be(104, 1, 1);
    }),
    ("l1-on-the-refcount-table", ANY, |b| b.bytes.put_be(40, 8, b.at.table)),
    ("l1-on-an-l2-table", ANY, |b| {
        let l2 = b.at.l2.get(&0).copied().unwrap_or(0);
        b.bytes.put_be(40, 8, l2);
    }),
    ("l1-in-the-last-cluster-cut", REFUSED, |b| {
        let end = b.bytes.len();
        b.bytes.put_be(36, 4, 1024);
        b.bytes.put_be(40, 8, end - 4096);
    }),
    ("refcount-table-on-the-l1-table", BAD, |b| b.bytes.put_be(48, 8, b.at.l1)),
    ("refcount-table-on-the-header", BAD, |b| {
        b.bytes.put_be(48, 8, 0);
        b.bytes.put_be(56, 4, 1);
    }),
    ("snapshots-65537", BAD, |b| {
        b.bytes.put_be(60, 4, 65537);
        b.bytes.put_be(64, 8, b.at.table);
    }),
    ("snapshots-max", BAD, |b| {
        b.bytes.put_be(60, 4, MAX);
        b.bytes.put_be(64, 8, b.at.table);
    }),
    ("snapshots-unaligned", BAD, |b| {
        b.bytes.put_be(60, 4, 1);
        b.bytes.put_be(64, 8, b.at.table + 8);
    }),
    ("snapshots-out-of-the-file", BAD, |b| {
        b.bytes.put_be(60, 4, 1);
        b.bytes.put_be(64, 8, 1 << 30);
    }),
    ("snapshots-wrap", BAD, |b| {
        b.bytes.put_be(60, 4, 65536);
        b.bytes.put_be(64, 8, ALIGNED_MAX);
    }),
    ("backing-size-0", REFUSED, |b| b.bytes.put_be(8, 8, 512)),
    ("backing-size-1024", REFUSED, |b| {
        b.bytes.put(512, &[b'a'; 1024]);
        b.bytes.put_be(8, 8, 512);
        b.bytes.put_be(16, 4, 1024);
    }),
    ("backing-size-max", REFUSED, |b| {
        b.bytes.put_be(8, 8, 512);
        b.bytes.put_be(16, 4, MAX);
    }),
    ("backing-name-over-the-cluster", REFUSED, |b| {
        b.bytes.put(4090, b"base.r");
        b.bytes.put_be(8, 8, 4090);
        b.bytes.put_be(16, 4, 8);
    }),
    ("backing-name-with-nul", REFUSED, |b| {
        b.bytes.put(512, b"a\0b");
        b.bytes.put_be(8, 8, 512);
        b.bytes.put_be(16, 4, 3);
    }),
    ("everything-max", REFUSED, |b| b.bytes.put(8, &[0xff; 104])),
    ("everything-zero", REFUSED, |b| b.bytes.put(8, &[0; 104])),
];

const VERSION_2: &[(&str, Expect, Edit)] = &[
    ("plain", SOUND, |_| ()),
    ("words-are-no-extensions", REFUSED, |b| b.bytes.put(72, &[0xff; 32])),
    // Bytes 72 and up are extensions here, so this is one of an unknown type.
    ("unknown-extension", SOUND, |b| b.bytes.put(72, &[0, 0, 0, 0x20, 0, 0, 0, 0])),
    ("zero-flag", Expect { opens: Some(true), check: Verdict::Any, read: Read::Refused }, |b| {
        let at = b.entry_of(3);
        b.bytes.put_be(at, 8, 1);
    }),
    ("crypt-2", Expect { opens: None, check: Verdict::Any, read: Read::Refused }, |b| {
        b.bytes.put_be(32, 4, 2)
    }),
];
