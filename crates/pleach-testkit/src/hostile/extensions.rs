//! Header extensions.

use super::{ANY, Case, Edit, Expect, OPENS, REFUSED, SOUND, UNREAD, edits};
use crate::image::{
    BACKING_FORMAT, BITMAPS, Built, DATA_FILE, ENCRYPTION, FEATURE_NAMES, ImageBuilder, Shape,
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = edits("extension", one_extension, ROWS);
    cases.extend(with("many-256", SOUND, |image| {
        for number in 0..256 {
            image.extension(0x1000_0000 + number, b"");
        }
    }));
    cases.extend(with("many-257", REFUSED, |image| {
        for number in 0..257 {
            image.extension(0x1000_0000 + number, b"");
        }
    }));
    cases.extend(with("unknown-twice", SOUND, |image| {
        image.extension(0x1000_0000, b"one");
        image.extension(0x1000_0000, b"two");
    }));
    for (name, kind, data) in [
        ("format", BACKING_FORMAT, b"raw".as_slice()),
        ("feature-names", FEATURE_NAMES, &[0; 48]),
        ("data-file", DATA_FILE, b"name"),
        ("encryption", ENCRYPTION, &[0; 16]),
        ("bitmaps", BITMAPS, &[0; 24]),
    ] {
        let twice = move |image: &mut ImageBuilder| {
            image.extension(kind, data);
            image.extension(kind, data);
        };
        cases.extend(with(&format!("{name}-twice"), REFUSED, twice));
    }
    for (name, expect, data) in [
        ("cut", REFUSED_BIT, [0u8; 47].as_slice()),
        ("escapes", REFUSED_BIT, b"\x00\x05\x1b[2J\x1b]0;owned\x07\r\n and more of the same; 46 bytes"),
        ("not-utf8", REFUSED_BIT, b"\x00\x05\xff\xfe\xc0\x80 and more of it, as long as such a name is"),
        ("bit-255", REFUSED_BIT, &[0xff; 480]),
    ] {
        let make = move |image: &mut ImageBuilder| {
            image.incompatible = 1 << 5;
            image.extension(FEATURE_NAMES, data);
        };
        cases.extend(with(&format!("feature-names-{name}"), expect, make));
    }
    for (name, format) in
        [("empty", ""), ("long", "sixteen-letters."), ("nul", "raw\0"), ("escape", "\x1b[2J")]
    {
        let make = move |image: &mut ImageBuilder| {
            image.backing("base.raw", "");
            image.extension(BACKING_FORMAT, format.as_bytes());
        };
        cases.extend(with(&format!("format-{name}"), super::Expect { opens: None, ..UNREAD }, make));
    }
    // QEMU opens none of these, though nothing in them is used.
    let unused = Expect { read: super::Read::Any, ..super::DAMAGED };
    for (name, version) in [("v2", 2), ("v3", 3)] {
        let built = move |kind, data: &'static [u8]| {
            move || {
                let mut image = ImageBuilder::rich(Shape { version, ..Shape::default() });
                image.extension(kind, data);
                image.finish()
            }
        };
        let short = built(BITMAPS, &[0; 16]);
        cases.push(Case::built(format!("extension-{name}-unused-bitmaps-short"), unused, short));
        let long = built(BACKING_FORMAT, b"sixteen letters.");
        cases.push(Case::built(format!("extension-{name}-unused-format-long"), unused, long));
    }
    cases.extend(with("format-without-backing", SOUND, |image| image.extension(BACKING_FORMAT, b"raw")));
    cases.extend(with("data-file-without-bit", OPENS, |image| image.extension(DATA_FILE, b"data.raw")));
    cases
}

const REFUSED_BIT: Expect = REFUSED;

fn with(
    name: &str,
    expect: Expect,
    change: impl Fn(&mut ImageBuilder) + Send + Sync + 'static,
) -> Option<Case> {
    Some(Case::built(format!("extension-{name}"), expect, move || {
        let mut image = ImageBuilder::rich(Shape::default());
        change(&mut image);
        image.finish()
    }))
}

/// An unknown extension of 5 bytes at 112, the end marker at 128.
fn one_extension() -> Built {
    let mut image = ImageBuilder::rich(Shape::default());
    image.extension(0x1234_5678, b"hello");
    image.finish()
}

const ROWS: &[(&str, Expect, Edit)] = &[
    ("unknown", SOUND, |_| ()),
    ("length-to-the-end", SOUND, |b| b.bytes.put_be(116, 4, 4096 - 120)),
    ("length-over-the-end", REFUSED, |b| b.bytes.put_be(116, 4, 4096 - 119)),
    ("length-2g", REFUSED, |b| b.bytes.put_be(116, 4, 1 << 31)),
    ("length-rounds-to-0", REFUSED, |b| b.bytes.put_be(116, 4, 0xffff_fff9)),
    ("length-max", REFUSED, |b| b.bytes.put_be(116, 4, u64::MAX)),
    ("padding-is-not-zero", SOUND, |b| b.bytes.put(125, &[0xff; 3])),
    ("end-with-length", SOUND, |b| b.bytes.put_be(132, 4, 4096)),
    ("no-end", ANY, |b| b.bytes.put(128, &[0xff; 3968])),
    ("no-end-but-the-cluster's", SOUND, |b| {
        b.bytes.put_be(128, 4, 0x1234_5679);
        b.bytes.put_be(132, 4, 4096 - 136);
    }),
    ("over-the-backing-name", REFUSED, |b| {
        b.bytes.put_be(8, 8, 124);
        b.bytes.put_be(16, 4, 4);
    }),
    ("7-bytes-before-the-backing-name", super::Expect { opens: None, ..UNREAD }, |b| {
        b.bytes.put(135, b"nowhere");
        b.bytes.put_be(8, 8, 135);
        b.bytes.put_be(16, 4, 7);
    }),
];
