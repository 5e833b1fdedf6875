//! Persistent bitmaps. Whatever is wrong with them, the guest's data read as ever.

use super::{Case, Edit, Expect, Read, SOUND, Verdict, edits, numbers};
use crate::image::{BITMAPS, Built, ImageBuilder, Shape};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = numbers("bitmap-extension", two, |b| extension(b) + 8, EXTENSION);
    cases.extend(numbers("bitmap", two, |b| b.at.directory.first().copied().unwrap_or(0), ENTRY));
    cases.extend(numbers("bitmap-table", two, |b| table(b, 0), TABLE));
    cases.extend(edits("bitmap", two, ROWS));
    for (name, text) in [
        ("escapes", b"\x1b[2J".as_slice()),
        ("not-utf8", b"\xff\xfe"),
        ("nul", b"a\0b"),
        ("path", b"../../x"),
    ] {
        cases.push(Case::built(format!("bitmap-name-{name}"), UNSURE, move || {
            let mut image = ImageBuilder::rich(Shape::default());
            image.bitmap(&"?".repeat(text.len()), 2, 16);
            let mut built = image.finish();
            let at = built.at.directory.first().copied().unwrap_or(0);
            built.bytes.put(at + 24, text);
            built
        }));
    }
    cases
}

const BAD: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::RightOrRefused };
/// Legal, or wrong in a way that the space of the file does not show.
const UNSURE: Expect = Expect { opens: None, check: Verdict::Any, read: Read::RightOrRefused };

fn two() -> Built {
    let mut image = ImageBuilder::rich(Shape::default());
    image.bitmap("first", 2, 16);
    image.bitmap("second", 0, 12);
    image.finish()
}

fn extension(built: &Built) -> u64 {
    built.at.extensions.get(&BITMAPS).copied().unwrap_or(0)
}

fn table(built: &Built, number: usize) -> u64 {
    built.at.bitmap_tables.get(number).copied().unwrap_or(0)
}

const MAX: u64 = u64::MAX;

/// By offset in the data of the extension: the directory has two entries of 32 bytes.
const EXTENSION: &[super::Number] = &[
    ("count-0", 0, 4, 0, BAD),
    ("count-1", 0, 4, 1, BAD),
    ("count-3", 0, 4, 3, BAD),
    ("count-65536", 0, 4, 65536, BAD),
    ("count-max", 0, 4, MAX, BAD),
    ("reserved", 4, 4, 1, UNSURE),
    ("directory-size-0", 8, 8, 0, BAD),
    ("directory-size-8", 8, 8, 8, BAD),
    ("directory-size-72", 8, 8, 72, BAD),
    ("directory-size-64m", 8, 8, 1024 * 65535, BAD),
    ("directory-size-1t", 8, 8, 1 << 40, BAD),
    ("directory-size-max", 8, 8, MAX, BAD),
    ("directory-offset-0", 16, 8, 0, BAD),
    ("directory-offset-8", 16, 8, 8, BAD),
    ("directory-offset-1t", 16, 8, 1 << 40, BAD),
    ("directory-offset-high", 16, 8, 1 << 63, BAD),
    ("directory-offset-wraps", 16, 8, !4095, BAD),
    ("directory-offset-max", 16, 8, MAX, BAD),
];

/// By offset in the first directory entry.
const ENTRY: &[super::Number] = &[
    ("table-offset-0", 0, 8, 0, BAD),
    ("table-offset-512", 0, 8, 512, BAD),
    ("table-offset-1t", 0, 8, 1 << 40, BAD),
    ("table-offset-max", 0, 8, MAX, BAD),
    ("table-size-0", 8, 4, 0, UNSURE),
    ("table-size-2", 8, 4, 2, UNSURE),
    ("table-size-1m", 8, 4, 1 << 20, BAD),
    ("table-size-over-512m-of-bits", 8, 4, (1 << 17) + 1, BAD),
    ("table-size-max", 8, 4, MAX, BAD),
    ("flag-in-use", 12, 4, 1, UNSURE),
    ("flag-extra-data-compatible", 12, 4, 4, UNSURE),
    ("flag-reserved", 12, 4, 8, UNSURE),
    ("flag-all", 12, 4, MAX, UNSURE),
    ("type-0", 16, 1, 0, UNSURE),
    ("type-2", 16, 1, 2, UNSURE),
    ("granularity-0", 17, 1, 0, UNSURE),
    ("granularity-8", 17, 1, 8, UNSURE),
    ("granularity-31", 17, 1, 31, UNSURE),
    ("granularity-63", 17, 1, 63, UNSURE),
    ("granularity-64", 17, 1, 64, UNSURE),
    ("granularity-255", 17, 1, 255, UNSURE),
    ("name-length-0", 18, 2, 0, BAD),
    ("name-length-1024", 18, 2, 1024, BAD),
    ("name-length-max", 18, 2, MAX, BAD),
    ("extra-8", 20, 4, 8, BAD),
    ("extra-max", 20, 4, MAX, BAD),
];

/// The only entry of the first bitmap's table.
const TABLE: &[super::Number] = &[
    ("entry-all-ones", 0, 8, 1, UNSURE),
    ("entry-reserved", 0, 8, 2, UNSURE),
    ("entry-unaligned", 0, 8, 512, BAD),
    ("entry-end-of-file", 0, 8, 1 << 30, BAD),
    ("entry-32p", 0, 8, 1 << 55, BAD),
    ("entry-max", 0, 8, MAX, BAD),
];

const ROWS: &[(&str, Expect, Edit)] = &[
    ("plain", SOUND, |_| ()),
    ("stale", Expect { check: Verdict::Any, ..SOUND }, |b| b.bytes.put_be(88, 8, 0)),
    ("extension-short", BAD, |b| {
        let at = extension(b);
        b.bytes.put_be(at + 4, 4, 16);
    }),
    ("same-name", UNSURE, |b| {
        let at = b.at.directory.clone();
        if let [first, second] = at[..] {
            // Both are called "firsts" then: six letters of the one, six of the other.
            b.bytes.put(first + 18, &[0, 6]);
            b.bytes.put(first + 24, b"firsts");
            b.bytes.put(second + 24, b"firsts");
        }
    }),
    ("same-table", BAD, |b| {
        let at = b.at.directory.first().copied().unwrap_or(0);
        b.bytes.put_be(at, 8, table(b, 1));
    }),
    ("table-is-the-l1-table", BAD, |b| {
        let at = b.at.directory.first().copied().unwrap_or(0);
        b.bytes.put_be(at, 8, b.at.l1);
    }),
    ("directory-is-the-header", BAD, |b| {
        let at = extension(b);
        b.bytes.put_be(at + 8 + 16, 8, 0);
    }),
    ("directory-cut-by-the-end-of-the-file", BAD, |b| {
        let (at, end) = (extension(b), b.bytes.len());
        let entry = b.bytes.get(b.at.directory.first().copied().unwrap_or(0), 40);
        b.bytes.put(end, &entry);
        b.bytes.put_be(at + 8 + 16, 8, end);
    }),
    ("data-is-guest-data", BAD, |b| {
        let (at, data) = (table(b, 0), b.at.data.get(&0).copied().unwrap_or(0));
        b.bytes.put_be(at, 8, data);
    }),
];
