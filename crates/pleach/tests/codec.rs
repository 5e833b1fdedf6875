//! Structures that stock QEMU wrote are, read and encoded again, the same bytes; and those put into a header stock QEMU
//! reads.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

use std::fs;
use std::path::Path;

use pleach_format::{
    BitmapCluster, BitmapRecord, BitmapTableEntry, CompressionType, ExtendedL2Entry, HostOffset, L2Entry,
    Mapping, NewHeader, SnapshotRecord, Version, root,
};
use pleach_image::{Image, ImageError, set_bitmaps};
use pleach_store::{Access, Disk, RealDisk};
use pleach_testkit::oracle::{self, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

fn open(path: &Path) -> Image {
    Image::open(RealDisk.open(path, Access::Read).unwrap()).unwrap()
}

fn cut(bytes: &[u8], at: u64, len: usize) -> &[u8] {
    &bytes[at as usize..at as usize + len]
}

#[test]
fn snapshot_tables_and_bitmap_directories_are_encoded_as_qemu_does() {
    let work = WorkDir::new("codec-same-bytes");
    for (i, options) in
        ["cluster_size=64k", "cluster_size=4k", "cluster_size=1k,refcount_bits=32"].iter().enumerate()
    {
        let path = work.join(format!("{i}.qcow2"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "9M"]);
        for (name, granularity) in [("a", "64k"), ("longer name", "512"), ("b2", "2M")] {
            qemu_img(&["bitmap", "--add", "-g", granularity, text(&path), name]);
        }
        qemu_img(&["bitmap", "--disable", text(&path), "b2"]);
        qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 300k", "write -q -P 1 4M 1M"]);
        for name in ["one", "a name of some length", "", "ünï"] {
            qemu_img(&["snapshot", "-c", name, text(&path)]);
        }
        let (image, bytes) = (open(&path), fs::read(&path).unwrap());
        let snapshots = image.snapshots().unwrap();
        assert_eq!(snapshots.len(), 4);
        let table = SnapshotRecord::encode_table(&snapshots).unwrap();
        assert_eq!(table, cut(&bytes, image.header().snapshots_offset().0, table.len()), "{options}");

        let extension = image.header().bitmaps().unwrap().unwrap();
        let bitmaps = image.bitmaps().unwrap();
        let directory = BitmapRecord::encode_directory(&bitmaps).unwrap();
        assert_eq!(directory.len() as u64, extension.directory_size, "{options}");
        assert_eq!(directory, cut(&bytes, extension.directory_offset, directory.len()), "{options}");
        for bitmap in &bitmaps {
            bitmap.check(image.geometry(), image.size()).unwrap();
            let table = cut(&bytes, bitmap.table_offset, bitmap.table_size as usize * 8);
            for raw in table.as_chunks::<8>().0 {
                let entry = BitmapTableEntry(u64::from_be_bytes(*raw));
                let cluster = entry.decode(image.geometry()).unwrap();
                assert_eq!(BitmapTableEntry::new(cluster), entry, "{cluster:?}");
            }
            let first = BitmapTableEntry(u64::from_be_bytes(table[..8].try_into().unwrap()));
            let enabled = bitmap.flags & BitmapRecord::AUTO != 0;
            let written = first.decode(image.geometry()).unwrap() != BitmapCluster::Zeros;
            assert_eq!(enabled, written, "{}", bitmap.name.escape_ascii());
        }
    }
}

/// Compressed descriptors and extended entries, made again from what they say.
#[test]
fn entries_are_encoded_as_qemu_does() {
    let work = WorkDir::new("codec-entries");
    let mut compressed = 0;
    for bits in [9, 12, 16, 21] {
        let cluster = 1u64 << bits;
        let path = work.join(format!("packed-{bits}.qcow2"));
        let options = format!("cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "8M"]);
        let writes: Vec<_> =
            (0..3).map(|i| format!("write -q -c -P {} {} {cluster}", i + 1, i * cluster)).collect();
        qemu_io(&path, Format::Qcow2, &writes);
        let image = open(&path);
        let table = image.l2_table(image.l1()[0]).unwrap().unwrap();
        for raw in &table.as_chunks::<8>().0[..3] {
            let entry = L2Entry(u64::from_be_bytes(*raw));
            let Ok(Mapping::Compressed(extent)) = entry.decode(image.geometry(), Version::V3) else {
                panic!("{bits}: {entry:?}");
            };
            let again = L2Entry::compressed(image.geometry(), extent.offset, extent.bytes);
            assert_eq!(again, Some(entry), "{bits}");
            compressed += 1;
        }
    }
    assert_eq!(compressed, 12);

    let path = work.join("extended.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", text(&path), "1M"]);
    let writes = ["write -q -P 1 0 2k", "write -q -P 1 6k 2k", "write -q -z 10k 2k", "write -q -z 64k 64k"];
    qemu_io(&path, Format::Qcow2, &writes);
    let image = open(&path);
    let table = image.l2_table(image.l1()[0]).unwrap().unwrap();
    let host = HostOffset(u64::from_be_bytes(table[..8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00);
    let first = ExtendedL2Entry::preallocated(host).with_data(0..1).with_data(3..4).with_zeros(5..6);
    assert_eq!(first.to_bytes(), table[..16]);
    assert_eq!(ExtendedL2Entry::ZERO.to_bytes(), table[16..32]);
}

#[test]
fn bitmaps_taken_out_of_a_header_and_put_back_are_what_qemu_reads() {
    let work = WorkDir::new("codec-bitmaps");
    qemu_img(&["create", "-q", "-f", "raw", text(&work.join("base.raw")), "4M"]);
    let long = format!("./{}base.raw", "./".repeat(150));
    let mut n = 0;
    for cluster in ["1k", "4k", "64k"] {
        for backing in ["", "base.raw", &long] {
            n += 1;
            let path = work.join(format!("{n}.qcow2"));
            let options = format!("cluster_size={cluster}");
            let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "4M"];
            if !backing.is_empty() {
                create.extend(["-b", backing, "-F", "raw"]);
            }
            qemu_img(&create);
            qemu_img(&["bitmap", "--add", text(&path), "one"]);
            qemu_img(&["bitmap", "--add", text(&path), "two"]);
            let before = oracle::info(&path);
            let extension = open(&path).header().bitmaps().unwrap().unwrap();
            let change = |new| {
                let store = RealDisk.open(&path, Access::Write).unwrap();
                set_bitmaps::<ImageError>(&*store, new, |_, _| panic!("{n}: no record is needed")).unwrap();
            };
            change(None);
            let without = oracle::info(&path);
            assert!(without["format-specific"]["data"]["bitmaps"].is_null(), "{without}");
            assert_eq!(without["backing-filename"], before["backing-filename"]);
            change(Some(&extension));
            let after = oracle::info(&path);
            for key in ["format-specific", "backing-filename", "backing-filename-format", "virtual-size"] {
                assert_eq!(after[key], before[key], "{n}");
            }
            oracle::check_clean(&path);
            qemu_img(&["bitmap", "--remove", text(&path), "one"]);
            oracle::check_clean(&path);
        }
    }
}

/// The mark of a file that is not yet whole keeps everybody off; without it the same bytes are an image.
#[test]
fn nobody_opens_an_image_that_is_being_written() {
    let work = WorkDir::new("codec-unfinished");
    let path = work.join("new.qcow2");
    let new = NewHeader {
        size: 1 << 20,
        in_progress: true,
        compression: CompressionType::Zstd,
        ..NewHeader::default()
    };
    Tool::new(PLEACH).succeed(&["create", text(&path), "1M", "--compression", "zstd"]);
    let whole = fs::read(&path).unwrap();
    let mut bytes = whole.clone();
    let header = new.encode().unwrap();
    bytes[..header.len()].copy_from_slice(&header);
    fs::write(&path, &bytes).unwrap();
    for program in ["qemu-img", "qemu-io"] {
        let args = if program == "qemu-img" {
            vec!["info", text(&path)]
        } else {
            vec!["-c", "read 0 1k", text(&path)]
        };
        let outcome = Tool::new(program).run(&args);
        assert!(outcome.code == Some(1) && outcome.text().contains("Unsupported qcow2 feature"), "{outcome}");
    }
    let outcome = Tool::new(PLEACH).run(&["info", text(&path)]);
    assert!(outcome.code == Some(8) && outcome.stderr.contains("never finished"), "{outcome}");
    let mut sector: [u8; 512] = bytes[..512].try_into().unwrap();
    root::set_incompatible(&mut sector, new.incompatible().0);
    bytes[..512].copy_from_slice(&sector);
    assert!(bytes == whole);
}

#[test]
fn info_shows_of_luks_what_qemu_img_shows() {
    let work = WorkDir::new("codec-luks");
    let path = work.join("luks.qcow2");
    let secret = "secret,id=key,data=pass";
    let mode = "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256";
    let options = format!("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,{mode}");
    qemu_img(&["create", "-q", "-f", "qcow2", "--object", secret, "-o", &options, text(&path), "1M"]);
    let theirs = &oracle::info(&path)["format-specific"]["data"]["encrypt"];
    let document = Tool::new(PLEACH).json(&["info", "--json", text(&path)]);
    let ours = &document["images"][0]["luks"];
    assert_eq!((&ours["cipher"], &ours["mode"]), (&"aes".into(), &"cbc-essiv:sha256".into()));
    for (our_key, their_key) in [
        ("uuid", "uuid"),
        ("hash", "hash-alg"),
        ("payload_offset", "payload-offset"),
        ("iterations", "master-key-iters"),
    ] {
        assert_eq!(ours[our_key], theirs[their_key], "{our_key}");
    }
    let (ours, theirs) = (ours["slots"].as_array().unwrap(), theirs["slots"].as_array().unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!((&ours["active"], &ours["key_offset"]), (&theirs["active"], &theirs["key-offset"]));
        if theirs["active"] == true {
            assert_eq!((&ours["iterations"], &ours["stripes"]), (&theirs["iters"], &theirs["stripes"]));
        }
    }
    let shown = Tool::new(PLEACH).succeed(&["info", text(&path)]).stdout;
    assert!(shown.contains("1 of 8 key slots used"), "{shown}");
}
