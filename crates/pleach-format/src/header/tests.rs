use alloc::vec;

use super::*;
use crate::Geometry;

fn valid(version: Version, cluster_bits: u32, backing: Option<(&str, &str)>) -> Vec<u8> {
    NewHeader {
        version,
        cluster_bits,
        size: 1 << 20,
        l1_table_offset: 3 << cluster_bits,
        refcount_table_offset: 1 << cluster_bits,
        backing: backing.map(|(name, format)| BackingFile {
            name: name.as_bytes().to_vec(),
            format: Some(format.as_bytes().to_vec()),
        }),
        ..NewHeader::default()
    }
    .encode()
    .unwrap()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn refuses_each_bad_field_by_name() {
    let cases: &[(&str, usize, &[u8], &str)] = &[
        ("magic", 0, b"QFI ", "magic"),
        ("version", 4, &[0, 0, 0, 4], "version is 4"),
        ("small clusters", 20, &[0, 0, 0, 8], "cluster_bits is 8"),
        ("large clusters", 20, &[0, 0, 0, 22], "cluster_bits is 22"),
        ("crypt", 32, &[0, 0, 0, 3], "crypt_method is 3"),
        ("L1 too small", 36, &[0, 0, 0, 0], "l1_size is 0"),
        ("L1 too large", 36, &[0xff, 0, 0, 0], "l1_size"),
        ("skewed L1", 40, &[0, 0, 0, 0, 0, 3, 2, 0], "l1_table_offset"),
        ("L1 in the header", 40, &[0; 8], "l1_table_offset"),
        ("no refcount table", 56, &[0; 4], "refcount_table_clusters is 0"),
        ("skewed refcount table", 48, &[0, 0, 0, 0, 0, 1, 2, 0], "refcount_table_offset"),
        ("snapshots", 60, &[0, 1, 0, 1], "nb_snapshots is 65537"),
        ("size", 24, &[0xff; 8], "size"),
        ("unknown feature", 72, &[0, 0, 0, 0, 0, 0, 1, 0], "incompatible feature bit 8"),
        ("named unknown feature", 79, &[0x20], "bit 5"),
        ("width", 96, &[0, 0, 0, 7], "refcount_order is 7"),
        ("short header", 100, &[0, 0, 0, 96], "header_length is 96"),
        ("odd header", 100, &[0, 0, 0, 105], "header_length"),
        ("type without bit", 104, &[1], "compression_type"),
        ("bit without type", 79, &[8], "compression_type"),
        ("extension too long", 116, &[0, 1, 0, 0], "header extension length"),
        ("backing outside", 8, &[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 4], "backing_file_offset"),
        ("backing in the header", 8, &[0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 4], "backing_file_offset"),
    ];
    for (name, at, bytes, want) in cases {
        let mut header = valid(Version::V3, 16, None);
        header.resize(4096, 0);
        put(&mut header, *at, bytes);
        let error = Header::parse(&header).expect_err(name);
        assert!(alloc::format!("{error}").contains(want), "{name}: {error}");
    }
}

#[test]
fn every_prefix_is_refused_or_equal() {
    for version in [Version::V2, Version::V3] {
        let bytes = valid(version, 12, Some(("base.raw", "raw")));
        let whole = Header::parse(&bytes).unwrap();
        assert_eq!(whole.backing().unwrap().name, b"base.raw");
        for len in 0..bytes.len() {
            assert!(matches!(Header::parse(&bytes[..len]), Err(FormatError::Truncated { .. })), "{len}");
        }
    }
}

/// Applies a change to `bytes` and parses the result; for an atomic change also checks that the bytes written first
/// change nothing for a reader.
fn apply(bytes: &[u8], header: &Header, new: Option<&BackingFile>) -> (Header, bool) {
    let change = rewrite_backing(bytes, header, new).unwrap();
    let mut after = bytes.to_vec();
    let atomic = match change {
        BackingChange::Atomic { prepare, sector } => {
            if let Some((at, name)) = prepare {
                put(&mut after, usize::try_from(at.0).unwrap(), &name);
                let between = Header::parse(&after).unwrap();
                assert_eq!(between.backing(), header.backing());
            }
            put(&mut after, 0, &sector[..]);
            true
        }
        BackingChange::Whole { bytes } => {
            put(&mut after, 0, &bytes);
            false
        }
    };
    (Header::parse(&after).unwrap(), atomic)
}

#[test]
fn backing_file_changes_are_atomic_and_keep_the_rest() {
    let long = "a".repeat(300);
    let names = ["x", "base.qcow2", long.as_str()];
    for version in [Version::V2, Version::V3] {
        for bits in [9, 10, 12, 16, 21] {
            for from in names {
                for to in names {
                    for format in ["raw", "qcow2"] {
                        let mut bytes = valid(version, bits, Some((from, "qcow2")));
                        bytes.resize(Geometry::new(bits, false).unwrap().cluster_bytes(), 0);
                        let header = Header::parse(&bytes).unwrap();
                        let new = BackingFile { name: to.into(), format: Some(format.into()) };
                        let (after, atomic) = apply(&bytes, &header, Some(&new));
                        assert_eq!(after.backing(), Some(&new), "{version:?} {bits} {from} {to} {format}");
                        assert!(atomic, "{version:?} {bits} {from} {to}");
                        let others = |h: &Header| -> Vec<_> {
                            let all = h.extensions().iter();
                            all.filter(|e| e.kind != ExtensionKind::BackingFormat)
                                .map(|e| e.data.clone())
                                .collect()
                        };
                        assert_eq!(others(&after), others(&header));
                        let (gone, atomic) = apply(&bytes, &header, None);
                        assert!(atomic && gone.backing().is_none());
                    }
                }
            }
        }
    }
}

#[test]
fn names_that_do_not_fit_are_refused_and_overlaps_are_not_called_atomic() {
    let mut bytes = valid(Version::V3, 10, Some((&"b".repeat(500), "raw")));
    bytes.resize(1024, 0);
    let header = Header::parse(&bytes).unwrap();
    let new = |len| BackingFile { name: vec![b'c'; len], format: Some(b"raw".to_vec()) };
    let (after, atomic) = apply(&bytes, &header, Some(&new(600)));
    assert!(!atomic && after.backing() == Some(&new(600)));
    assert!(matches!(
        rewrite_backing(&bytes, &header, Some(&new(1000))),
        Err(FormatError::HeaderFull { .. })
    ));
    assert!(matches!(
        rewrite_backing(&bytes, &header, Some(&new(1024))),
        Err(FormatError::OutOfRange { .. })
    ));
}

#[test]
fn a_second_change_uses_the_room_that_the_first_left() {
    let mut bytes = valid(Version::V3, 16, Some(("one.qcow2", "qcow2")));
    bytes.resize(65536, 0);
    for round in 0..200u32 {
        let header = Header::parse(&bytes).unwrap();
        let new = BackingFile {
            name: alloc::format!("name-{round}.qcow2").into_bytes(),
            format: Some(b"qcow2".to_vec()),
        };
        let BackingChange::Atomic { prepare, sector } = rewrite_backing(&bytes, &header, Some(&new)).unwrap()
        else {
            panic!("round {round} is not atomic");
        };
        if let Some((at, name)) = prepare {
            put(&mut bytes, usize::try_from(at.0).unwrap(), &name);
        }
        put(&mut bytes, 0, &sector[..]);
        assert_eq!(Header::parse(&bytes).unwrap().backing(), Some(&new));
    }
}

/// Found by fuzzing: a format without a backing file, with a name that does not fit the first sector, was prepared over
/// the header; and headers whose extensions are ended by the old name, not by a marker, became unreadable.
#[test]
fn odd_headers_found_by_fuzzing() {
    let name = "n".repeat(450);
    let new = BackingFile { name: name.clone().into(), format: Some(b"raw".to_vec()) };

    let mut left_behind = valid(Version::V3, 16, Some(("old", "qcow2")));
    left_behind.resize(65536, 0);
    put(&mut left_behind, 8, &[0; 12]);
    let header = Header::parse(&left_behind).unwrap();
    assert!(header.backing().is_none() && header.extension(ExtensionKind::BackingFormat).is_some());
    assert_eq!(apply(&left_behind, &header, Some(&new)).0.backing(), Some(&new));

    let mut unmarked = valid(Version::V3, 12, Some((&"o".repeat(450), "qcow2")));
    unmarked.resize(4096, 0);
    // The name where the end marker was: 8 bytes earlier.
    let at = Header::parse(&unmarked).unwrap().backing_name_range().start;
    put(&mut unmarked, at - 8, b"oooooooo");
    put(&mut unmarked, 8, &(at as u64 - 8).to_be_bytes());
    let header = Header::parse(&unmarked).unwrap();
    assert!(!header.has_end_marker());
    assert_eq!(apply(&unmarked, &header, Some(&new)).0.backing(), Some(&new));
    assert!(apply(&unmarked, &header, None).0.backing().is_none());
}
