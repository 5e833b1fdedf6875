//! Small files that claim much: time and memory must follow what the file holds.

use super::{ANY, Case, DAMAGED, Expect, OPENS, REFUSED, Read, SOUND, Verdict};
use crate::image::{BITMAPS, Built, COMPRESSED, COPIED, ImageBuilder, Shape, deflate};

const T: u64 = 1 << 40;

pub(super) fn cases() -> Vec<Case> {
    vec![
        // One L2 table under 131072 L1 entries, with clusters of 512 bytes: 64 guest clusters each.
        Case::built("bomb-fan-in".to_owned(), FAN_IN, || fan_in(9, 131_072, 1)).amplifies(),
        // The same with clusters of 64 KiB, and a table of plain zeros: 64 TiB that are all there, and all zeros.
        Case::built("bomb-fan-in-zeros-64t".to_owned(), ANY, || fan_in(16, 131_072, 8192)).slow(),
        // A few entries of data: 8 GiB of it.
        Case::built("bomb-fan-in-data".to_owned(), ANY, || fan_in_data(16, 131_072)).slow().amplifies(),
        Case::built("bomb-snapshots-share-a-sparse-l1-table".to_owned(), OPENS, || snapshots(20_000, 0))
            .hangs_qemu(),
        Case::built("bomb-snapshots-overlap-in-a-sparse-l1-table".to_owned(), OPENS, || snapshots(20_000, 1))
            .hangs_qemu(),
        Case::built("bomb-snapshots-share-a-full-l1-table".to_owned(), OPENS, full_snapshots).slow(),
        Case::built("bomb-snapshots-65536-with-names".to_owned(), OPENS, long_names).slow(),
        Case::built("bomb-hole-8t-512".to_owned(), SOUND, || hole(9, 4, 8 * T)).hangs_qemu(),
        Case::built("bomb-hole-8t-64-bits".to_owned(), SOUND, || hole(16, 6, 8 * T)).hangs_qemu(),
        Case::built("bomb-data-behind-a-hole-8t".to_owned(), DAMAGED, || far_data(12, 8 * T)).hangs_qemu(),
        Case::built("bomb-disk-1e".to_owned(), EMPTY, || empty(21, 1 << 60)).hangs_qemu(),
        Case::built("bomb-disk-2e-largest-l1-table".to_owned(), EMPTY, || empty(21, 1 << 61)).hangs_qemu(),
        Case::built("bomb-disk-64t-512".to_owned(), REFUSED, || empty_lie(9, 64 * T)),
        Case::built("bomb-refcount-table-8m-of-one-block".to_owned(), BAD, refcount_fan_in).hangs_qemu(),
        Case::built("bomb-refcount-table-8m-in-a-hole".to_owned(), BAD, refcount_hole).hangs_qemu(),
        Case::built("bomb-bitmaps-share-a-table".to_owned(), ANY, bitmap_fan_in).hangs_qemu(),
        Case::built("bomb-bitmaps-65535".to_owned(), ANY, many_bitmaps).slow(),
        Case::built("bomb-compressed-clusters-of-2m".to_owned(), ANY, compressed_fan_in).slow(),
        Case::built("bomb-l2-table-of-2m-all-wrong".to_owned(), ANY, wrong_entries).hangs_qemu(),
        Case::built("bomb-l1-table-32m-all-wrong".to_owned(), ANY, wrong_l1).slow(),
        Case::built("bomb-header-of-2m-full-of-extensions".to_owned(), REFUSED, extensions),
        Case::built("bomb-header-of-2m-one-extension".to_owned(), SOUND, one_extension),
    ]
}

const BAD: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::RightOrRefused };
/// Table and cluster are counted once and used 131072 times.
const FAN_IN: Expect = Expect { opens: Some(true), check: Verdict::Bad, read: Read::Any };
/// Sound, but too large to read and compare here.
const EMPTY: Expect = Expect { read: Read::Any, ..SOUND };

/// `entries` L1 entries to one L2 table; its first `zeros` entries say zeros, its last one is data where there is room.
fn fan_in(bits: u32, entries: u64, zeros: u64) -> Built {
    let (cluster, per_table) = (1u64 << bits, (1u64 << bits) / 8);
    let mut image =
        ImageBuilder::new(Shape { cluster_bits: bits, size: cluster * per_table, ..Shape::default() });
    for guest in 0..zeros {
        image.zero(guest);
    }
    if zeros < per_table {
        image.data(per_table - 1);
    }
    spread(image.finish(), entries, cluster * per_table)
}

fn fan_in_data(bits: u32, entries: u64) -> Built {
    let (cluster, per_table) = (1u64 << bits, (1u64 << bits) / 8);
    let mut image =
        ImageBuilder::new(Shape { cluster_bits: bits, size: cluster * per_table, ..Shape::default() });
    image.data(0);
    spread(image.finish(), entries, cluster * per_table)
}

/// Gives a finished image an L1 table of `entries` entries behind its end, all to its only L2 table.
fn spread(mut built: Built, entries: u64, span: u64) -> Built {
    let table = built.at.l2.get(&0).copied().unwrap_or(0);
    let at = built.bytes.len();
    let l1: Vec<u8> =
        std::iter::repeat_n(table.to_be_bytes(), usize::try_from(entries).unwrap_or(0)).flatten().collect();
    built.bytes.put(at, &l1);
    built.bytes.set_len((at + entries * 8).next_multiple_of(built.at.cluster));
    built.bytes.put_be(24, 8, entries * span);
    built.bytes.put_be(36, 4, entries);
    built.bytes.put_be(40, 8, at);
    built
}

/// `count` snapshots with L1 tables of about 32 MiB in one hole; each starts `step` clusters behind the one before.
fn snapshots(count: u32, step: u64) -> Built {
    let mut image = ImageBuilder::rich(Shape::default());
    image.snapshot("s");
    let mut built = image.finish();
    let l1 = built.bytes.len();
    built.bytes.set_len(l1 + (32 << 20) + u64::from(count) * step * 4096);
    let place = built.bytes.len();
    let mut table = Vec::new();
    for number in 0..count {
        let name = format!("snapshot {number}");
        table.extend((l1 + u64::from(number) * step * 4096).to_be_bytes());
        table.extend((4u32 << 20).to_be_bytes());
        table.extend([0, 1]);
        table.extend(u16::try_from(name.len()).unwrap_or(0).to_be_bytes());
        table.extend([0; 20]);
        table.extend(16u32.to_be_bytes());
        table.extend(0u64.to_be_bytes());
        table.extend(Shape::default().size.to_be_bytes());
        table.extend(b"1");
        table.extend(name.as_bytes());
        table.resize(table.len().next_multiple_of(8), 0);
    }
    built.bytes.put(place, &table);
    built.bytes.put_be(60, 4, count.into());
    built.bytes.put_be(64, 8, place);
    built
}

/// The same without steps, and every entry of the table leads to one L2 table.
fn full_snapshots() -> Built {
    let mut built = snapshots(20_000, 0);
    let first = built.bytes.be(built.bytes.be(64, 8), 8);
    let table = built.at.l2.get(&0).copied().unwrap_or(0);
    let l1: Vec<u8> = std::iter::repeat_n(table.to_be_bytes(), 4 << 20).flatten().collect();
    built.bytes.put(first, &l1);
    built
}

fn long_names() -> Built {
    let mut built = ImageBuilder::rich(Shape::default()).finish();
    let place = built.bytes.len();
    let mut table = Vec::new();
    for _ in 0..65536 {
        table.extend(built.at.l1.to_be_bytes());
        table.extend(2u32.to_be_bytes());
        table.extend([0, 1]);
        table.extend(943u16.to_be_bytes());
        table.extend([0; 20]);
        table.extend(16u32.to_be_bytes());
        table.extend(0u64.to_be_bytes());
        table.extend(Shape::default().size.to_be_bytes());
        table.extend(b"1");
        table.extend([b'n'; 943]);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    built.bytes.put(place, &table);
    built.bytes.put_be(60, 4, 65536);
    built.bytes.put_be(64, 8, place);
    built
}

fn hole(cluster_bits: u32, refcount_order: u32, len: u64) -> Built {
    let size = if cluster_bits == 9 { 64 << 10 } else { 1 << 20 };
    let mut built =
        ImageBuilder::rich(Shape { cluster_bits, refcount_order, size, ..Shape::default() }).finish();
    built.bytes.set_len(len);
    built
}

/// A data cluster at the far end of a hole, which nobody counts.
fn far_data(cluster_bits: u32, at: u64) -> Built {
    let mut built = ImageBuilder::rich(Shape { cluster_bits, ..Shape::default() }).finish();
    let entry = built.entry_of(0);
    built.bytes.put(at, &[1; 4096]);
    built.bytes.put_be(entry, 8, at | COPIED);
    built
}

fn empty(cluster_bits: u32, size: u64) -> Built {
    ImageBuilder::new(Shape { cluster_bits, size, ..Shape::default() }).finish_sparse()
}

/// A disk that needs a larger L1 table than there may be.
fn empty_lie(cluster_bits: u32, size: u64) -> Built {
    let mut built = ImageBuilder::new(Shape { cluster_bits, size: 64 << 10, ..Shape::default() }).finish();
    built.bytes.put_be(24, 8, size);
    built.bytes.put_be(36, 4, u64::from(u32::MAX));
    built
}

/// A million refcount table entries to one block, in which every count is 1.
fn refcount_fan_in() -> Built {
    let mut built =
        ImageBuilder::rich(Shape { cluster_bits: 16, size: 1 << 20, ..Shape::default() }).finish();
    let (block, at) = (built.at.blocks.first().copied().unwrap_or(0), built.bytes.len());
    built.bytes.put(block, &[0, 1].repeat(32768));
    let table: Vec<u8> = std::iter::repeat_n(block.to_be_bytes(), 1 << 20).flatten().collect();
    built.bytes.put(at, &table);
    built.bytes.put_be(48, 8, at);
    built.bytes.put_be(56, 4, 128);
    // Clusters that are there, and counted, and nobody's.
    built.bytes.set_len(8 * T);
    built
}

/// A refcount table of 8 MiB in a hole: no cluster has a count.
fn refcount_hole() -> Built {
    let mut built = ImageBuilder::rich(Shape::default()).finish();
    let at = built.bytes.len();
    built.bytes.set_len(at + (8 << 20));
    built.bytes.put_be(48, 8, at);
    built.bytes.put_be(56, 4, 2048);
    built
}

fn bitmap_fan_in() -> Built {
    let mut image = ImageBuilder::rich(Shape { cluster_bits: 16, size: 1 << 20, ..Shape::default() });
    image.bitmap("b", 0, 16);
    let mut built = image.finish();
    let table = built.bytes.len();
    // 2^27 entries, most of a gibibyte, in a hole; 60000 bitmaps of them.
    built.bytes.set_len(table + T);
    directory(built, table, (1 << 27) - 1, 60_000, 8)
}

fn many_bitmaps() -> Built {
    let mut image = ImageBuilder::rich(Shape::default());
    image.bitmap("b", 0, 16);
    let built = image.finish();
    let table = built.at.bitmap_tables.first().copied().unwrap_or(0);
    directory(built, table, 1, 65535, 1000)
}

/// A directory of `count` bitmaps of one table, with names of `name` bytes.
fn directory(mut built: Built, table: u64, entries: u32, count: u32, name: usize) -> Built {
    let at = built.bytes.len();
    let mut bytes = Vec::new();
    for number in 0..count {
        bytes.extend(table.to_be_bytes());
        bytes.extend(entries.to_be_bytes());
        bytes.extend([0, 0, 0, 1, 1, 16]);
        bytes.extend(u16::try_from(name).unwrap_or(0).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(format!("{number:0name$}").as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    built.bytes.put(at, &bytes);
    let extension = built.at.extensions.get(&BITMAPS).copied().unwrap_or(0);
    built.bytes.put_be(extension + 8, 4, count.into());
    built.bytes.put_be(extension + 16, 8, bytes.len() as u64);
    built.bytes.put_be(extension + 24, 8, at);
    built
}

/// 2 GiB of disk in compressed clusters, all of them the same 2 KiB of stream.
fn compressed_fan_in() -> Built {
    let mut image = ImageBuilder::new(Shape { cluster_bits: 21, size: 2 << 30, ..Shape::default() });
    let packed = deflate(&vec![0; 2 << 20]);
    let at = image.pack(0, &packed);
    let descriptor = image.descriptor(at, packed.len() as u64);
    for guest in 1..1024 {
        image.entry(guest, descriptor, 0);
    }
    image.finish()
}

/// An L2 table of 2 MiB in which every entry leads out of the file.
fn wrong_entries() -> Built {
    let mut image = ImageBuilder::new(Shape { cluster_bits: 21, size: 64 << 30, ..Shape::default() });
    image.zero(0);
    let mut built = image.finish();
    let table = built.at.l2.get(&0).copied().unwrap_or(0);
    let wrong: Vec<u8> =
        std::iter::repeat_n((1u64 << 50 | COPIED).to_be_bytes(), 1 << 18).flatten().collect();
    built.bytes.put(table, &wrong);
    built
}

fn wrong_l1() -> Built {
    let mut built = ImageBuilder::rich(Shape::default()).finish();
    let at = built.bytes.len();
    let wrong: Vec<u8> =
        std::iter::repeat_n((1u64 << 50 | COMPRESSED).to_be_bytes(), 4 << 20).flatten().collect();
    built.bytes.put(at, &wrong);
    built.bytes.put_be(36, 4, 4 << 20);
    built.bytes.put_be(40, 8, at);
    built
}

fn extensions() -> Built {
    let mut built = ImageBuilder::new(Shape { cluster_bits: 21, size: 1 << 20, ..Shape::default() }).finish();
    built.bytes.put(112, &[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0].repeat((1 << 18) - 14));
    built
}

fn one_extension() -> Built {
    let mut image = ImageBuilder::new(Shape { cluster_bits: 21, size: 1 << 20, ..Shape::default() });
    image.extension(0x1234_5678, &vec![0xaa; (2 << 20) - 200]);
    image.finish()
}
