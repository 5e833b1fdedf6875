//! Encryption headers. No key is ever given.

use super::{Case, Edit, Expect, OPENS, Read, Verdict, edits};
use crate::image::{Built, ENCRYPTION, ImageBuilder, Shape};

pub(super) fn cases() -> Vec<Case> {
    edits("encryption", luks, ROWS)
}

/// Refused or not, no byte of it is read.
const LOCKED: Expect = Expect { opens: None, check: Verdict::Any, read: Read::Refused };
const LOCKED_BAD: Expect = Expect { check: Verdict::Bad, ..LOCKED };

/// LUKS by the header; what it points to is empty.
fn luks() -> Built {
    let mut image = ImageBuilder::rich(Shape { version: 3, ..Shape::default() });
    image.encryption = 2;
    let at = image.allocate(4);
    image.put(at, b"LUKS\xba\xbe\x00\x01");
    image.extension(ENCRYPTION, &[at.to_be_bytes(), 16384u64.to_be_bytes()].concat());
    image.finish()
}

fn extension(built: &mut Built, offset: u64, length: u64) {
    let at = built.at.extensions.get(&ENCRYPTION).copied().unwrap_or(0);
    built.bytes.put_be(at + 8, 8, offset);
    built.bytes.put_be(at + 16, 8, length);
}

const ROWS: &[(&str, Expect, Edit)] = &[
    ("luks-without-a-cipher", LOCKED, |_| ()),
    ("aes-with-luks-header", LOCKED, |b| b.bytes.put_be(32, 4, 1)),
    ("none-with-luks-header", OPENS, |b| b.bytes.put_be(32, 4, 0)),
    ("luks-without-header", LOCKED, |b| {
        let at = b.at.extensions.get(&ENCRYPTION).copied().unwrap_or(0);
        b.bytes.put_be(at, 4, 0x1234_5678);
    }),
    ("header-short", LOCKED, |b| {
        let at = b.at.extensions.get(&ENCRYPTION).copied().unwrap_or(0);
        b.bytes.put_be(at + 4, 4, 8);
    }),
    ("header-behind-the-file", LOCKED_BAD, |b| extension(b, 1 << 40, 4096)),
    ("header-wraps", LOCKED_BAD, |b| extension(b, !4095, 8192)),
    ("header-unaligned", LOCKED, |b| extension(b, 4104, 4096)),
    ("header-empty", LOCKED, |b| extension(b, 4096, 0)),
    ("header-longest", LOCKED_BAD, |b| extension(b, 4096, u64::MAX)),
    ("header-on-the-l1-table", LOCKED_BAD, |b| extension(b, b.at.l1, 4096)),
];
