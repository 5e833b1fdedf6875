//! Compressed clusters: descriptors and streams.

use super::{Case, DAMAGED, Expect, OPENS, Read, SOUND, UNREAD, UNREADABLE, Verdict};
use crate::image::{Built, COMPRESSED, COPIED, ImageBuilder, Shape, deflate, zstd};

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = DESCRIPTORS
        .iter()
        .map(|(name, expect, edit)| {
            Case::built(format!("compressed-{name}"), *expect, move || {
                let mut built = super::plain();
                let at = built.entry_of(5);
                let old = built.bytes.be(at, 8);
                let new = edit(&built, old);
                built.bytes.put_be(at, 8, new);
                built
            })
        })
        .collect();
    for (name, expect, stream) in DEFLATE {
        cases.push(packed(&format!("deflate-{name}"), *expect, false, *stream));
    }
    for (name, expect, stream) in ZSTD {
        cases.push(packed(&format!("zstd-{name}"), *expect, true, *stream));
    }
    cases
}

const SECTOR: u64 = 1 << 58;

/// The data may be whole, or may not: a tool that reads right is as good as one that refuses.
const UNSURE: Expect = Expect { opens: Some(true), check: Verdict::Any, read: Read::RightOrRefused };

type Descriptor = (&'static str, Expect, fn(&Built, u64) -> u64);

/// A sector more or less is `1 << 58` with clusters of 4 KiB.
const DESCRIPTORS: &[Descriptor] = &[
    ("end-of-file", UNREADABLE, |b, _| COMPRESSED | b.bytes.len()),
    ("behind-the-file", UNREADABLE, |_, _| COMPRESSED | 1 << 40),
    ("32p", UNREADABLE, |_, _| COMPRESSED | 1 << 55),
    ("bit-56", UNREADABLE, |_, old| old | 1 << 56),
    ("highest-offset", UNREADABLE, |_, _| COMPRESSED | (SECTOR - 1)),
    ("one-sector-more", UNSURE, |_, old| old + SECTOR),
    ("all-sectors", UNSURE, |_, old| old | (15 * SECTOR)),
    ("last-byte-of-the-file", UNREAD, |b, _| COMPRESSED | (b.bytes.len() - 1)),
    ("last-cluster-all-sectors", UNREAD, |b, _| COMPRESSED | (15 * SECTOR) | (b.bytes.len() - 4096)),
    ("copied", DAMAGED, |_, old| old | COPIED),
    ("in-the-header", UNREAD, |_, _| COMPRESSED | 4),
    ("in-its-own-table", UNREAD, |b, _| COMPRESSED | b.at.l2.get(&0).copied().unwrap_or(0)),
    ("same-as-its-neighbour", Expect { read: Read::Any, ..OPENS }, |b, _| b.bytes.be(b.entry_of(6), 8)),
    ("inside-its-neighbour", UNREAD, |_, old| old + 3),
    ("all-ones-but-copied", UNREADABLE, |_, _| !COPIED),
];

/// An image in which guest cluster 9 has a stream that `stream` makes of its content.
fn packed(name: &str, expect: Expect, zstd: bool, stream: fn(Vec<u8>) -> Vec<u8>) -> Case {
    Case::built(format!("compressed-{name}"), expect, move || {
        let mut image = ImageBuilder::rich(Shape { zstd, ..Shape::default() });
        let byte = image.expect(9);
        image.pack(9, &stream(vec![byte; 4096]));
        image.finish()
    })
}

type Stream = (&'static str, Expect, fn(Vec<u8>) -> Vec<u8>);

/// A stream that is wrong: `check` need not inflate it.
const BROKEN: Expect = UNREAD;
const FINE: Expect = Expect { check: Verdict::Any, ..SOUND };

const DEFLATE: &[Stream] = &[
    ("plain", FINE, |p| deflate(&p)),
    ("garbage", BROKEN, |_| vec![0xff; 600]),
    ("zeros", BROKEN, |_| vec![0; 600]),
    ("with-a-zlib-header", BROKEN, |p| [&[0x78, 0x9c][..], &deflate(&p)].concat()),
    ("with-a-gzip-header", BROKEN, |p| [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], &deflate(&p)].concat()),
    ("shorter-than-a-cluster", BROKEN, |p| deflate(p.get(..4095).unwrap_or(&[]))),
    ("empty", BROKEN, |_| deflate(&[])),
    ("longer-than-a-cluster", FINE, |p| deflate(&[p, vec![1; 4096]].concat())),
    ("a-thousand-clusters", FINE, |p| deflate(&[p, vec![1; 4 << 20]].concat())),
    ("cut", BROKEN, |p| {
        let noise: Vec<u8> = (0..4096u32).map(|i| u8::try_from(((i * i) >> 5) % 251).unwrap_or(0)).collect();
        let whole = deflate(&[noise, p].concat());
        whole.get(..700).unwrap_or(&[]).to_vec()
    }),
    ("distance-before-the-start", BROKEN, |_| vec![0x4b, 0x04, 0x02, 0x00, 0xff, 0xff]),
    ("reserved-block-type", BROKEN, |_| vec![0x07; 64]),
    ("junk-behind-it", FINE, |p| [deflate(&p), vec![0xff; 300]].concat()),
];

const ZSTD: &[Stream] = &[
    ("plain", FINE, |p| zstd(&p)),
    ("garbage", BROKEN, |_| vec![0xff; 600]),
    ("zeros", BROKEN, |_| vec![0; 600]),
    ("two-frames", FINE, |p| {
        [zstd(p.get(..1000).unwrap_or(&[])), zstd(p.get(1000..).unwrap_or(&[]))].concat()
    }),
    ("skippable-frame-first", FINE, |p| {
        [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &zstd(&p)].concat()
    }),
    ("only-skippable-frames", BROKEN, |_| [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].repeat(60)),
    ("skippable-frame-of-4g", BROKEN, |_| vec![0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff]),
    ("shorter-than-a-cluster", BROKEN, |p| zstd(p.get(..4095).unwrap_or(&[]))),
    ("empty-frames", BROKEN, |_| zstd(&[]).repeat(40)),
    ("longer-than-a-cluster", BROKEN, |p| zstd(&[p, vec![10; 1]].concat())),
    ("a-gigabyte", BROKEN, |_| zstd(&vec![10; 64 << 20])),
    // A frame that asks for a window of 1 TiB, and one of 128 MiB.
    ("huge-window", BROKEN, |_| vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x01, 0x00, 0x00]),
    ("large-window", BROKEN, |_| vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x88, 0x01, 0x00, 0x00]),
    ("content-size-lies", BROKEN, |p| {
        let mut frame = zstd(&p);
        for byte in frame.iter_mut().skip(5).take(2) {
            *byte ^= 0x55;
        }
        frame
    }),
    ("cut", BROKEN, |p| {
        let frame = zstd(&p);
        frame.get(..frame.len() / 2).unwrap_or(&[]).to_vec()
    }),
    ("dictionary", BROKEN, |_| vec![0x28, 0xb5, 0x2f, 0xfd, 0x23, 1, 2, 3, 4, 16, 1, 0, 0]),
    ("junk-behind-it", FINE, |p| [zstd(&p), vec![0xff; 300]].concat()),
];
