//! Any bytes: parsing never panics, and what parses is in bounds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pleach_format::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes) {
        tables_are_in_bounds(&header);
        parts_are_in_bounds(&header, bytes);
        let _ = header.bitmaps();
    }
});

fn tables_are_in_bounds(header: &Header) {
    let geometry = header.geometry();
    assert!((9..=21).contains(&geometry.cluster_bits()));
    assert!(header.size().is_multiple_of(512));
    assert!(u64::from(header.l1_size()) >= geometry.required_l1(header.size()));
    assert!(u64::from(header.l1_size()) * 8 <= 32 << 20, "QEMU opens no larger L1 table");
    assert!(header.refcount_table_clusters() > 0);
    assert!(u64::from(header.refcount_table_clusters()) * geometry.cluster_size() <= 8 << 20);
    let mut tables = vec![header.refcount_table_offset()];
    tables.extend((header.l1_size() > 0).then(|| header.l1_table_offset()));
    tables.extend((header.nb_snapshots() > 0).then(|| header.snapshots_offset()));
    for table in tables {
        assert!(geometry.is_aligned(table.0));
        assert!(table.0 >= geometry.cluster_size(), "a table lies on the header");
        assert!(table.0 < 1 << 56);
    }
}

fn parts_are_in_bounds(header: &Header, bytes: &[u8]) {
    let cluster = header.geometry().cluster_bytes();
    assert!(header.header_length() >= 72 && header.header_length() <= cluster);
    assert!(header.used_bytes() <= cluster);
    let mut end = header.header_length();
    for extension in header.extensions() {
        assert!(extension.at >= end, "extensions overlap");
        let data = extension.at + 8..extension.at + 8 + extension.data.len();
        end = data.end;
        assert_eq!(bytes.get(data), Some(extension.data.as_slice()));
    }
    if let Some(backing) = header.backing() {
        let range = header.backing_name_range();
        assert!(range.start >= end, "the name lies on an extension");
        assert!((1..=1023).contains(&backing.name.len()));
        assert_eq!(bytes.get(range), Some(backing.name.as_slice()));
    }
}
