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

/// All combinations of what a header may say, over all versions; those that the format lacks are refused.
fn every_new_header(mut each: impl FnMut(&NewHeader)) {
    let data_file = |name: &str, raw| Some(DataFile { name: name.as_bytes().to_vec(), raw });
    let backing = BackingFile { name: b"base.qcow2".to_vec(), format: Some(b"qcow2".to_vec()) };
    for version in [Version::V2, Version::V3] {
        for cluster_bits in [9, 13, 14, 16, 21] {
            for flags in 0..64u32 {
                for data_file in [None, data_file("d", false), data_file("data.raw", true)] {
                    each(&NewHeader {
                        version,
                        cluster_bits,
                        size: 3 << 20,
                        refcount_width: RefcountWidth::new(4 + (flags >> 5 & 1)).unwrap(),
                        l1_table_offset: 3 << cluster_bits,
                        refcount_table_offset: 1 << cluster_bits,
                        refcount_table_clusters: 1,
                        backing: (flags & 1 != 0).then(|| backing.clone()),
                        compression: [CompressionType::Deflate, CompressionType::Zstd]
                            [usize::from(flags & 2 != 0)],
                        extended_l2: flags & 4 != 0,
                        lazy_refcounts: flags & 8 != 0,
                        data_file,
                        in_progress: flags & 16 != 0,
                    });
                }
            }
        }
    }
}

#[test]
fn what_a_new_header_says_is_what_is_read_or_it_is_refused() {
    let (mut read, mut refused) = (0, 0);
    every_new_header(|new| {
        let v2 = new.version == Version::V2;
        let only_v3 = new.compression == CompressionType::Zstd
            || new.extended_l2
            || new.lazy_refcounts
            || new.data_file.is_some()
            || new.in_progress
            || new.refcount_width != RefcountWidth::DEFAULT;
        let raw = new.data_file.as_ref().is_some_and(|d| d.raw);
        let bad = v2 && only_v3 || new.extended_l2 && new.cluster_bits < 14 || raw && new.backing.is_some();
        let Ok(mut bytes) = new.encode() else {
            assert!(bad, "{new:?}: {:?}", new.encode());
            refused += 1;
            return;
        };
        assert!(!bad, "{new:?}");
        assert_eq!(new.encode().unwrap(), bytes, "equal values, equal bytes");
        if new.in_progress {
            let error = Header::parse(&bytes).expect_err("no tool opens a file that is not whole");
            assert!(alloc::format!("{error}").contains("never finished"), "{error}");
            bytes.resize(bytes.len().max(512), 0);
            let mut sector: [u8; 512] = bytes[..512].try_into().unwrap();
            root::set_incompatible(&mut sector, new.incompatible().0);
            put(&mut bytes, 0, &sector);
        }
        let header = Header::parse(&bytes).unwrap();
        read += 1;
        assert_eq!(header.version(), new.version, "{new:?}");
        assert_eq!(header.geometry(), new.geometry().unwrap(), "{new:?}");
        assert_eq!(u64::from(header.l1_size()), header.geometry().required_l1(new.size), "{new:?}");
        assert_eq!(header.size(), new.size);
        assert_eq!(header.refcount_width(), new.refcount_width);
        assert_eq!(header.backing(), new.backing.as_ref());
        assert_eq!(header.compression(), new.compression);
        assert_eq!(header.compatible().has(Compatible::LAZY_REFCOUNTS), new.lazy_refcounts);
        assert_eq!(header.data_file(), new.data_file.as_ref().map(|d| d.name.as_slice()));
        assert_eq!(header.autoclear().has(Autoclear::RAW_DATA_FILE), raw);
        assert_eq!(header.incompatible(), new.incompatible());
    });
    assert!(read > 300 && refused > 300, "{read} {refused}");
}

#[test]
fn t10_version_2_refuses_what_its_header_has_no_room_for() {
    type Edit = fn(&mut NewHeader);
    let cases: &[(&str, Edit)] = &[
        ("lazy refcounts", |n| n.lazy_refcounts = true),
        ("extended L2", |n| n.extended_l2 = true),
        ("compression", |n| n.compression = CompressionType::Zstd),
        ("data file", |n| n.data_file = Some(DataFile { name: b"d".to_vec(), raw: false })),
        ("refcount_order is 0", |n| n.refcount_width = RefcountWidth::new(0).unwrap()),
        ("unfinished", |n| n.in_progress = true),
    ];
    for (want, edit) in cases {
        let mut new = NewHeader { version: Version::V2, size: 1 << 20, ..NewHeader::default() };
        let bytes = new.encode().unwrap();
        assert_eq!(&bytes[V2_LENGTH..], [0; 8], "extensions start at 72");
        edit(&mut new);
        let error = alloc::format!("{}", new.encode().expect_err(want));
        assert!(error.contains(want), "{want}: {error}");
        new.version = Version::V3;
        new.encode().expect(want);
    }
}

#[test]
fn t16_a_new_header_has_whole_sectors() {
    let new = |size| NewHeader { size, ..NewHeader::default() };
    assert!(matches!(new(1000).encode(), Err(FormatError::Unaligned { field: "size", .. })));
    // What others wrote is rounded down.
    let mut bytes = new(1024).encode().unwrap();
    put(&mut bytes, 24, &1400u64.to_be_bytes());
    assert_eq!(Header::parse(&bytes).unwrap().size(), 1024);
}

#[test]
fn names_of_data_files_have_limits() {
    for (name, fine) in [("", false), ("a", true), ("a\0b", false), (&*"n".repeat(1023), true)] {
        let data_file = Some(DataFile { name: name.into(), raw: true });
        let new = NewHeader { data_file, ..NewHeader::default() };
        assert_eq!(new.encode().is_ok(), fine, "{name}");
    }
    let long = Some(DataFile { name: vec![b'n'; 1024], raw: false });
    assert!(NewHeader { data_file: long, ..NewHeader::default() }.encode().is_err());
    let wide = Some(DataFile { name: vec![b'n'; 400], raw: false });
    let small =
        NewHeader { data_file: wide, cluster_bits: 9, refcount_table_offset: 512, ..NewHeader::default() };
    assert!(matches!(small.encode(), Err(FormatError::HeaderFull { .. })));
}

#[test]
fn root_fields_are_where_the_header_is_read() {
    let bytes = valid(Version::V3, 16, None);
    let mut sector: [u8; 512] = [0; 512];
    sector.copy_from_slice(&bytes[..512]);
    root::set_snapshots(&mut sector, 7, 5 << 16);
    root::set_incompatible(&mut sector, Incompatible::DIRTY.0);
    root::set_compatible(&mut sector, 1 << 40 | Compatible::LAZY_REFCOUNTS.0);
    root::set_autoclear(&mut sector, 1 << 9);
    let mut whole = bytes.clone();
    put(&mut whole, 0, &sector);
    let header = Header::parse(&whole).unwrap();
    assert_eq!((header.nb_snapshots(), header.snapshots_offset().0), (7, 5 << 16));
    assert_eq!(header.incompatible(), Incompatible::DIRTY);
    assert_eq!(header.compatible().0, 1 << 40 | 1);
    assert_eq!(header.autoclear().0, 1 << 9);
    assert_eq!(header.l1_table_offset(), Header::parse(&bytes).unwrap().l1_table_offset());
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

/// What a crash can leave of `change`: the bytes after each of its steps, the last ones at the end; between two of them
/// all states in which any of the sectors that a step touches have been written, and the others not.
fn crash_states(bytes: &[u8], change: &HeaderChange) -> Vec<Vec<u8>> {
    let HeaderChange::Steps(steps) = change else { panic!("{change:?}") };
    let mut states = vec![bytes.to_vec()];
    for (at, new) in steps {
        let at = usize::try_from(at.0).unwrap();
        let before = states.last().unwrap().clone();
        let sectors = at / 512..(at + new.len()).div_ceil(512);
        for written in 1..1u32 << sectors.len() {
            let mut torn = before.clone();
            for (i, sector) in sectors.clone().enumerate().filter(|(i, _)| written >> i & 1 != 0) {
                let (from, to) = (at.max(sector * 512), (at + new.len()).min(sector * 512 + 512));
                assert!(i < 8 && from < to);
                put(&mut torn, from, &new[from - at..to - at]);
            }
            states.push(torn);
        }
    }
    states
}

/// Applies a change to `bytes` and parses the result; for steps also checks that those before the last one change
/// nothing for a reader.
fn apply(bytes: &[u8], header: &Header, new: Option<&BackingFile>) -> (Header, bool) {
    let change = rewrite_backing(bytes, header, new).unwrap();
    if let HeaderChange::Whole { bytes: whole } = change {
        let mut after = bytes.to_vec();
        put(&mut after, 0, &whole);
        return (Header::parse(&after).unwrap(), false);
    }
    let states = crash_states(bytes, &change);
    let (last, before) = states.split_last().unwrap();
    for between in before {
        assert_eq!(Header::parse(between).unwrap().backing(), header.backing());
    }
    (Header::parse(last).unwrap(), true)
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
        let change = rewrite_backing(&bytes, &header, Some(&new)).unwrap();
        assert!(matches!(change, HeaderChange::Steps(_)), "round {round}");
        bytes = crash_states(&bytes, &change).pop().unwrap();
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

/// A version 3 header of `length` bytes with `extensions` and a backing file `name`, the unknown fields not zero.
fn built(bits: u32, length: u8, extensions: &[(ExtensionKind, Vec<u8>)], name: &str, valid: bool) -> Vec<u8> {
    let mut bytes = NewHeader {
        cluster_bits: 9,
        size: 1 << 20,
        l1_table_offset: 4 << bits,
        refcount_table_offset: 1 << bits,
        ..NewHeader::default()
    }
    .encode()
    .unwrap();
    bytes.truncate(104);
    put(&mut bytes, 20, &bits.to_be_bytes());
    put(&mut bytes, 88, &(1u64 << 40 | u64::from(valid)).to_be_bytes());
    bytes[103] = length;
    bytes.resize(112.min(length.into()), 0);
    bytes.resize(length.into(), 0x5a);
    for (kind, data) in extensions {
        Extension { kind: *kind, data: data.clone(), at: 0 }.encode(&mut bytes);
    }
    bytes.extend([0; 8]);
    if !name.is_empty() {
        let at = bytes.len() as u64;
        put(&mut bytes, 8, &at.to_be_bytes());
        put(&mut bytes, 16, &u32::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend(name.as_bytes());
    }
    bytes
}

type Kept = (Vec<u8>, Vec<(ExtensionKind, Vec<u8>)>, Option<BackingFile>);

/// Everything that a change of the bitmaps must keep: the fixed header but for the autoclear bit and the place of the
/// backing file's name, the other extensions in their order, the backing file.
fn kept(bytes: &[u8]) -> Kept {
    let header = Header::parse(bytes).unwrap();
    let mut fixed = bytes[..header.header_length()].to_vec();
    fixed[8..20].fill(0);
    fixed[95] &= !1;
    let others = header.extensions().iter().filter(|e| e.kind != ExtensionKind::Bitmaps);
    (fixed, others.map(|e| (e.kind, e.data.clone())).collect(), header.backing().cloned())
}

#[test]
fn t18_changes_of_the_bitmaps_keep_all_else_and_a_crash_leaves_the_old_ones_or_the_new() {
    let extension = |n: u64| BitmapsExtension { count: 1, directory_size: 32 * n, directory_offset: n << 16 };
    let (old, new) = (extension(7), extension(9));
    let unknown = |len| (ExtensionKind::Unknown(0xabcd_0001), vec![0xcc; len]);
    let format = (ExtensionKind::BackingFormat, b"raw".to_vec());
    // No two places of a name look the same.
    let text: alloc::string::String = (0..200).map(|i| std::format!("{i:03}")).collect();
    let (mut stepwise, mut whole, mut full) = (0, 0, 0);
    for bits in [9, 10, 12, 16] {
        for (length, padding) in [104, 128].into_iter().flat_map(|l| (0..430).step_by(8).map(move |p| (l, p)))
        {
            for name in [0, 1, 8, 300, 600] {
                for place in [None, Some(0), Some(1), Some(2)] {
                    for valid in [true, false] {
                        let mut extensions = vec![unknown(padding), (ExtensionKind::Unknown(3), vec![3; 5])];
                        extensions.extend((name > 0).then(|| format.clone()));
                        if let Some(place) = place {
                            extensions
                                .insert(place, (ExtensionKind::Bitmaps, old.encode().unwrap().to_vec()));
                        }
                        let mut bytes = built(bits, length, &extensions, &text[..name], valid);
                        if bytes.len() > 1 << bits {
                            continue;
                        }
                        // What lies behind is not looked at.
                        bytes.resize(4096.min(1 << bits), 0x77);
                        let before = Header::parse(&bytes).unwrap();
                        let was = before.bitmaps().unwrap();
                        assert_eq!(was, (valid && place.is_some()).then_some(old));
                        for want in [Some(new), Some(old), None] {
                            let case =
                                std::format!("{bits} {length} {padding} {name} {place:?} {valid} {want:?}");
                            let change = match rewrite_bitmaps(&bytes, &before, want.as_ref()) {
                                Ok(change) => change,
                                Err(FormatError::HeaderFull { .. }) => {
                                    assert!(place.is_none() && want.is_some(), "{case}");
                                    full += 1;
                                    continue;
                                }
                                Err(error) => panic!("{case}: {error}"),
                            };
                            if let HeaderChange::Whole { bytes: relaid } = &change {
                                assert!(
                                    place.is_none() && want.is_some(),
                                    "{case}: only where names are moved"
                                );
                                assert_eq!(kept(relaid), kept(&bytes), "{case}");
                                assert_eq!(Header::parse(relaid).unwrap().bitmaps().unwrap(), want, "{case}");
                                whole += 1;
                                continue;
                            }
                            let states = crash_states(&bytes, &change);
                            for state in &states {
                                assert_eq!(kept(state), kept(&bytes), "{case}");
                                let found = Header::parse(state).unwrap().bitmaps().unwrap();
                                assert!(
                                    found == was || found == want || found.is_none(),
                                    "{case}: {found:?}"
                                );
                            }
                            let after = Header::parse(states.last().unwrap()).unwrap();
                            assert_eq!(after.bitmaps().unwrap(), want, "{case}");
                            assert_eq!(after.autoclear().0 & 1, u64::from(want.is_some()), "{case}");
                            stepwise += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(stepwise > 20_000 && whole > 0 && full > 0, "{stepwise} {whole} {full}");
}

#[test]
fn an_extension_within_one_sector_is_replaced_by_one_write() {
    let encoded = |n: u64| {
        BitmapsExtension { count: 1, directory_size: 32, directory_offset: n << 16 }.encode().unwrap()
    };
    for padding in (0..900).step_by(8) {
        let extensions = [
            (ExtensionKind::Unknown(1), vec![0; padding]),
            (ExtensionKind::Bitmaps, encoded(7).to_vec()),
            (ExtensionKind::Unknown(2), vec![0; 900]),
        ];
        let bytes = built(16, 112, &extensions, "", true);
        let header = Header::parse(&bytes).unwrap();
        let at = header.extension(ExtensionKind::Bitmaps).unwrap().at + 8;
        let new = BitmapsExtension::parse(&encoded(9)).unwrap();
        let HeaderChange::Steps(steps) = rewrite_bitmaps(&bytes, &header, Some(&new)).unwrap() else {
            panic!("{padding}");
        };
        let within = at / 512 == (at + 23) / 512;
        assert_eq!(steps.len(), if within { 1 } else { 3 }, "{padding}");
    }
}

#[test]
fn bitmaps_that_no_header_can_name_are_refused() {
    let fine = BitmapsExtension { count: 1, directory_size: 32, directory_offset: 7 << 16 };
    let v2 = valid(Version::V2, 16, None);
    let mut v3 = valid(Version::V3, 16, None);
    v3.resize(v3.len().max(512), 0);
    let rewrite = |bytes: &[u8], new| rewrite_bitmaps(bytes, &Header::parse(bytes).unwrap(), Some(&new));
    assert!(matches!(rewrite(&v2, fine), Err(FormatError::NeedsV3 { .. })));
    for bad in [
        BitmapsExtension { count: 0, ..fine },
        BitmapsExtension { directory_size: 0, ..fine },
        BitmapsExtension { directory_offset: 0, ..fine },
        BitmapsExtension { directory_offset: 7 << 15, ..fine },
    ] {
        assert!(rewrite(&v3, bad).is_err(), "{bad:?}");
    }
    rewrite(&v3, fine).unwrap();
}

#[test]
fn an_image_encrypted_with_luks_says_where_its_header_is() {
    let mut bytes = valid(Version::V3, 16, None);
    assert_eq!(Header::parse(&bytes).unwrap().encryption_header(), Ok(None));
    put(&mut bytes, 32, &2u32.to_be_bytes());
    assert!(matches!(Header::parse(&bytes).unwrap().encryption_header(), Err(FormatError::Missing { .. })));
    let data = [0x40000u64.to_be_bytes(), 2_068_480u64.to_be_bytes()].concat();
    let mut bytes = built(16, 112, &[(ExtensionKind::EncryptionHeader, data)], "", false);
    put(&mut bytes, 32, &2u32.to_be_bytes());
    let pointer = Header::parse(&bytes).unwrap().encryption_header().unwrap().unwrap();
    assert_eq!((pointer.offset.0, pointer.length), (0x40000, 2_068_480));
}

#[test]
fn t18_a_new_backing_file_keeps_unknown_extensions_and_unknown_header_bytes() {
    let unknown =
        [(ExtensionKind::Unknown(0xabcd_0001), vec![1; 13]), (ExtensionKind::Unknown(2), vec![2; 40])];
    for length in [104, 128] {
        for bits in [9, 16] {
            let mut bytes = built(bits, length, &unknown, "", true);
            bytes.resize(512, 0);
            // Twice, and back to none: neither the order of the extensions nor any byte of the header turns.
            for name in ["one", "another name", ""] {
                let new = BackingFile { name: name.into(), format: Some(b"raw".to_vec()) };
                let new = (!name.is_empty()).then_some(new);
                let header = Header::parse(&bytes).unwrap();
                let change = rewrite_backing(&bytes, &header, new.as_ref()).unwrap();
                let before = kept(&bytes);
                bytes = crash_states(&bytes, &change).pop().unwrap();
                let after = Header::parse(&bytes).unwrap();
                assert_eq!(after.header_length(), usize::from(length));
                assert_eq!(after.backing(), new.as_ref());
                let (fixed, extensions, _) = kept(&bytes);
                assert_eq!(fixed, before.0, "{length} {name}");
                let others = |all: &[(ExtensionKind, Vec<u8>)]| -> Vec<_> {
                    all.iter().filter(|e| e.0 != ExtensionKind::BackingFormat).cloned().collect()
                };
                assert_eq!(others(&extensions), unknown, "{length} {name}");
            }
        }
    }
}

#[test]
fn t10_the_header_of_version_2_ends_at_72() {
    let bytes = valid(Version::V2, 16, Some(("base.raw", "raw")));
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.header_length(), 72);
    assert_eq!(header.extensions()[0].at, 72, "extensions start there");
    assert_eq!((header.refcount_width(), header.incompatible().0), (RefcountWidth::DEFAULT, 0));
    // What would be an unknown incompatible feature is the type of an extension.
    let mut feature = valid(Version::V2, 16, None);
    feature.resize(4096, 0);
    feature[79] = 0x20;
    let header = Header::parse(&feature).unwrap();
    assert_eq!(header.incompatible().0, 0);
    put(&mut feature, 72, &[0xff; 8]);
    assert!(matches!(
        Header::parse(&feature),
        Err(FormatError::OutOfRange { field: "header extension length", .. })
    ));
}
