//! Internal snapshots. Whatever is wrong with them, the active state reads as ever.

use super::{Case, DAMAGED, Edit, Expect, LEAKS, Read, SOUND, Verdict, edits, numbers};
use crate::image::{Built, COPIED, ImageBuilder, Shape};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = numbers("snapshot", two, |b| b.at.snapshots.first().copied().unwrap_or(0), FIELDS);
    cases.extend(edits("snapshot", two, ROWS));
    for (name, text) in [
        ("escapes", "\x1b[2J\x1b]0;owned\x07".as_bytes()),
        ("newlines", b"two\nlines\r\n"),
        ("not-utf8", b"\xff\xfe\xc0\x80"),
        ("path", b"../../../outside/canary.raw"),
        ("absolute-path", b"/etc/passwd"),
        ("option", b"--help"),
        ("nul", b"a\0b"),
        ("right-to-left", "\u{202e}txt.exe".as_bytes()),
        ("long", &[b'x'; 3000]),
    ] {
        cases.push(Case::built(format!("snapshot-name-{name}"), SOUND, move || named(text)));
    }
    cases
}

/// The active state is read with none of this.
const BAD: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::RightOrRefused };
/// A snapshot that only who asks for it cannot read.
const UNSURE: Expect = Expect { opens: None, check: Verdict::Any, read: Read::RightOrRefused };

fn two() -> Built {
    let mut image = ImageBuilder::rich(Shape::default());
    image.snapshot("first");
    image.snapshot("second");
    image.finish()
}

fn named(name: &[u8]) -> Built {
    let mut image = ImageBuilder::rich(Shape::default());
    image.snapshot(&"?".repeat(name.len()));
    let mut built = image.finish();
    let at = built.at.snapshots.first().copied().unwrap_or(0);
    built.bytes.put(at + 40 + 24 + 1, name);
    built
}

const MAX: u64 = u64::MAX;

/// By offset in the entry of the first of two snapshots.
const FIELDS: &[super::Number] = &[
    ("l1-offset-0", 0, 8, 0, BAD),
    ("l1-offset-512", 0, 8, 512, BAD),
    ("l1-offset-behind-the-file", 0, 8, 1 << 40, BAD),
    ("l1-offset-64p", 0, 8, 1 << 56, BAD),
    ("l1-offset-wraps", 0, 8, !4095, BAD),
    ("l1-offset-max", 0, 8, MAX, BAD),
    ("l1-size-0", 8, 4, 0, UNSURE),
    ("l1-size-1", 8, 4, 1, UNSURE),
    ("l1-size-512", 8, 4, 512, UNSURE),
    ("l1-size-513", 8, 4, 513, BAD),
    ("l1-size-32m", 8, 4, 4 << 20, BAD),
    ("l1-size-over-32m", 8, 4, (4 << 20) + 1, BAD),
    ("l1-size-max", 8, 4, MAX, BAD),
    ("id-empty", 12, 2, 0, UNSURE),
    ("id-longest", 12, 2, MAX, UNSURE),
    ("name-longest", 14, 2, MAX, UNSURE),
    ("name-and-id-longest", 12, 4, MAX, UNSURE),
    ("date-max", 16, 8, MAX, SOUND),
    ("clock-max", 24, 8, MAX, SOUND),
    ("vm-state-32-max", 32, 4, MAX, SOUND),
    ("extra-0", 36, 4, 0, UNSURE),
    ("extra-8", 36, 4, 8, UNSURE),
    ("extra-16", 36, 4, 16, UNSURE),
    ("extra-1024", 36, 4, 1024, UNSURE),
    ("extra-1025", 36, 4, 1025, BAD),
    ("extra-wraps", 36, 4, 0xffff_fff8, BAD),
    ("extra-max", 36, 4, MAX, BAD),
    ("vm-state-1e", 40, 8, 1 << 60, UNSURE),
    ("vm-state-max", 40, 8, MAX, UNSURE),
    ("disk-0", 48, 8, 0, UNSURE),
    ("disk-odd", 48, 8, 1_000_001, UNSURE),
    ("disk-larger-than-its-l1", 48, 8, 1 << 40, UNSURE),
    ("disk-max", 48, 8, MAX, UNSURE),
    ("icount-0", 56, 8, 0, SOUND),
];

fn entry(built: &Built, number: usize) -> u64 {
    built.at.snapshots.get(number).copied().unwrap_or(0)
}

fn l1(built: &Built, number: usize) -> u64 {
    built.at.snapshot_l1.get(number).copied().unwrap_or(0)
}

const ROWS: &[(&str, Expect, Edit)] = &[
    ("plain", SOUND, |_| ()),
    ("one-more-than-there-are", BAD, |b| b.bytes.put_be(60, 4, 3)),
    ("one-less-than-there-are", LEAKS, |b| b.bytes.put_be(60, 4, 1)),
    ("none-of-two", LEAKS, |b| b.bytes.put_be(60, 4, 0)),
    ("65536-of-two", BAD, |b| b.bytes.put_be(60, 4, 65536)),
    ("table-unaligned", BAD, |b| b.bytes.put_be(64, 8, entry(b, 0) + 8)),
    ("table-end-of-file", BAD, |b| b.bytes.put_be(64, 8, b.bytes.len())),
    ("table-on-the-header", BAD, |b| b.bytes.put_be(64, 8, 0)),
    ("table-on-the-l1-table", BAD, |b| b.bytes.put_be(64, 8, b.at.l1)),
    ("table-on-the-refcount-table", BAD, |b| b.bytes.put_be(64, 8, b.at.table)),
    ("table-cut-by-the-end-of-the-file", BAD, |b| {
        let (end, table) = (b.bytes.len(), b.bytes.get(entry(b, 0), 60));
        b.bytes.put(end, &table);
        b.bytes.put_be(64, 8, end);
    }),
    ("l1-is-the-active-one", BAD, |b| b.bytes.put_be(entry(b, 0), 8, b.at.l1)),
    ("l1-is-the-other's", BAD, |b| b.bytes.put_be(entry(b, 0), 8, l1(b, 1))),
    ("l1-is-the-snapshot-table", BAD, |b| b.bytes.put_be(entry(b, 0), 8, entry(b, 0))),
    ("l1-is-the-header", BAD, |b| b.bytes.put_be(entry(b, 0), 8, 0)),
    ("l1-entry-unaligned", BAD, |b| b.bytes.put_be(l1(b, 0), 8, 0x1200)),
    ("l1-entry-reserved", BAD, |b| {
        let entry = b.bytes.be(l1(b, 0), 8);
        b.bytes.put_be(l1(b, 0), 8, entry | 1);
    }),
    ("l1-entry-behind-the-file", BAD, |b| b.bytes.put_be(l1(b, 0), 8, 1 << 40)),
    ("l1-entry-32p", BAD, |b| b.bytes.put_be(l1(b, 0), 8, 1 << 55)),
    ("l1-entry-copied", SOUND, |b| {
        let entry = b.bytes.be(l1(b, 0), 8);
        b.bytes.put_be(l1(b, 0), 8, entry | COPIED);
    }),
    ("l1-entry-gone", LEAKS, |b| b.bytes.put_be(l1(b, 0), 8, 0)),
    ("same-id", SOUND, |b| b.bytes.put(entry(b, 1) + 64, b"1")),
    ("active-copied-although-shared", DAMAGED, |b| {
        let entry = b.bytes.be(b.at.l1, 8);
        b.bytes.put_be(b.at.l1, 8, entry | COPIED);
    }),
];
