//! Any bytes as a snapshot table, bitmap directory, LUKS header or entry: what is read, written and read again is the same.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{
    BitmapRecord, BitmapTableEntry, BitmapsExtension, EncryptionPointer, Geometry, L2Entry, LuksHeader,
    Mapping, SnapshotRecord, Version,
};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    cluster_bits: u8,
    count: u8,
    entry: u64,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input| {
    let geometry = Geometry::new(9 + u32::from(input.cluster_bits % 13), false).unwrap();
    let count = u32::from(input.count);
    snapshots(input.bytes, count);
    bitmaps(input.bytes, count);
    if let Ok(extension) = BitmapsExtension::parse(input.bytes) {
        assert_eq!(extension.encode().unwrap(), input.bytes);
    }
    let _ = LuksHeader::parse(input.bytes);
    let _ = EncryptionPointer::parse(input.bytes, geometry);
    if let Ok(cluster) = BitmapTableEntry(input.entry).decode(geometry) {
        assert_eq!(BitmapTableEntry::new(cluster), BitmapTableEntry(input.entry));
    }
    if let Ok(Mapping::Compressed(extent)) = L2Entry(input.entry).decode(geometry, Version::V3)
        && let Some(again) = L2Entry::compressed(geometry, extent.offset, extent.bytes)
    {
        assert_eq!(again, L2Entry(input.entry));
    }
});

fn snapshots(bytes: &[u8], count: u32) {
    let Ok(mut records) = SnapshotRecord::parse_table(bytes, count) else { return };
    for record in &mut records {
        let missing = 24 - (record.stored_bytes - 40 - record.id.len() - record.name.len()).min(24);
        record.stored_bytes += missing;
        record.disk_size.get_or_insert(512);
    }
    if let Ok(table) = SnapshotRecord::encode_table(&records) {
        assert_eq!(SnapshotRecord::parse_table(&table, count), Ok(records));
    }
}

fn bitmaps(bytes: &[u8], count: u32) {
    let Ok(records) = BitmapRecord::parse_directory(bytes, count) else { return };
    if let Ok(directory) = BitmapRecord::encode_directory(&records) {
        assert_eq!(BitmapRecord::parse_directory(&directory, count), Ok(records));
    }
}
