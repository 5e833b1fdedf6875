//! What careful readers of the format trip over when they write: one test a trap, named by its number in docs/testing.md.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use pleach_engine::{SourceOptions, open_writer};
use pleach_format::RefcountWidth;
use pleach_image::{ImageError, Writer};
use pleach_store::RealDisk;
use pleach_testkit::files::patch;
use pleach_testkit::oracle::{self, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

fn image(work: &WorkDir, name: &str, options: &str, size: &str) -> PathBuf {
    let path = work.join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
    path
}

fn over(work: &WorkDir, name: &str, options: &str, base: &str, size: &str) -> PathBuf {
    let path = work.join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", text(&path), size]);
    path
}

fn open(path: &Path) -> Writer {
    open_writer(&RealDisk, path, &SourceOptions::default()).unwrap()
}

fn io(path: &Path, commands: &[&str]) {
    qemu_io(path, Format::Qcow2, commands);
}

fn be(path: &Path, at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(fs::read(path).unwrap()[at..at + 8].try_into().unwrap())
}

/// Where the L2 entry of guest cluster `n` is, in an image with one L2 table.
fn l2_entry(path: &Path, n: u64) -> u64 {
    (be(path, be(path, 40)) & 0x00ff_ffff_ffff_fe00) + 8 * n
}

#[test]
fn t03_a_shrunk_disk_that_grows_again_reads_zeros() {
    let work = WorkDir::new("t03");
    let path = image(&work, "a", "cluster_size=64k", "128k");
    io(&path, &["write -q -P 7 0 128k"]);
    Tool::new(PLEACH).succeed(&["resize", text(&path), "4k", "--shrink", "-y"]);
    qemu_img(&["resize", "-q", text(&path), "64k"]);
    io(&path, &["read -q -P 7 0 4k", "read -q -P 0 4k 60k"]);
    // And one that QEMU shrank, which leaves the old data there.
    let path = image(&work, "b", "cluster_size=64k", "128k");
    io(&path, &["write -q -P 7 0 128k"]);
    qemu_img(&["resize", "-q", "--shrink", text(&path), "4k"]);
    Tool::new(PLEACH).succeed(&["resize", text(&path), "64k"]);
    io(&path, &["read -q -P 7 0 4k", "read -q -P 0 4k 60k"]);
}

#[test]
fn t04_counts_below_a_byte_start_with_the_low_bits() {
    let work = WorkDir::new("t04");
    for bits in ["1", "2", "4", "8", "32", "64"] {
        let path = image(&work, bits, &format!("cluster_size=4k,refcount_bits={bits}"), "1M");
        let writer = open(&path);
        writer.write_at(5000, &[7; 20000]).unwrap();
        writer.close().unwrap();
        oracle::check_clean(&path);
        io(&path, &["read -q -P 7 5000 20000"]);
    }
    let width = RefcountWidth::new(2).unwrap();
    let mut block = [0; 8];
    width.set(&mut block, 10, 1).unwrap();
    assert_eq!(block[5], 0x01);
}

/// Whatever a COPIED flag claims, counts decide: the snapshot keeps its data.
#[test]
fn t06_t07_stale_copied_flags_are_not_believed() {
    let work = WorkDir::new("t07");
    let path = image(&work, "a", "cluster_size=64k", "1M");
    io(&path, &["write -q -P 7 0 128k"]);
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    // COPIED set again on the shared L2 table and on the shared cluster.
    let (l1, entry) = (be(&path, 40), l2_entry(&path, 0));
    for at in [l1, entry] {
        let value = be(&path, at) | 1 << 63;
        patch(&path, at, &value.to_be_bytes());
    }
    let writer = open(&path);
    writer.write_at(0, &[9; 4096]).unwrap();
    writer.close().unwrap();
    io(&path, &["read -q -P 9 0 4k", "read -q -P 7 4k 124k"]);
    qemu_img(&["snapshot", "-a", "s", text(&path)]);
    io(&path, &["read -q -P 7 0 128k"]);
}

#[test]
fn t09_growing_over_a_longer_backing_file_shows_none_of_it() {
    let work = WorkDir::new("t09");
    fs::write(work.join("base"), vec![5; 128 << 10]).unwrap();
    for (name, options, size) in
        [("a", "cluster_size=64k", "64k"), ("b", "cluster_size=64k", "63k"), ("c", "extended_l2=on", "5k")]
    {
        let path = over(&work, name, options, "base", size);
        Tool::new(PLEACH).succeed(&["resize", text(&path), "192k"]);
        let rest = 192 - size.trim_end_matches('k').parse::<u64>().unwrap();
        io(&path, &[&format!("read -q -P 5 0 {size}"), &format!("read -q -P 0 {size} {rest}k")]);
        oracle::check_clean(&path);
    }
    let old = over(&work, "v2", "compat=0.10", "base", "64k");
    let refused = Tool::new(PLEACH).run(&["resize", text(&old), "128k"]);
    assert_eq!(refused.code, Some(1), "{}", refused.text());
}

#[test]
fn t11_a_version_2_image_never_gets_a_zero_flag() {
    let work = WorkDir::new("t11");
    fs::write(work.join("base"), vec![5; 256 << 10]).unwrap();
    let alone = image(&work, "alone", "compat=0.10", "256k");
    io(&alone, &["write -q -P 7 0 256k"]);
    let over = over(&work, "over", "compat=0.10", "base", "256k");
    for path in [alone, over] {
        let writer = open(&path);
        writer.write_zeroes(0, 64 << 10, true).unwrap();
        writer.write_zeroes(65 << 10, 1 << 10, false).unwrap();
        writer.close().unwrap();
        io(&path, &["read -q -P 0 0 64k", "read -q -P 0 65k 1k"]);
        for cluster in 0..4 {
            let entry = be(&path, l2_entry(&path, cluster));
            assert_eq!(entry & 1, 0, "{}: {entry:#x}", path.display());
        }
        oracle::check_clean(&path);
    }
}

#[test]
fn t12_unknown_autoclear_bits_go_before_the_first_write_and_not_before() {
    let work = WorkDir::new("t12");
    let path = image(&work, "a", "cluster_size=64k", "1M");
    patch(&path, 88, &(1u64 << 40).to_be_bytes());
    let writer = open(&path);
    writer.read_at(0, &mut [0; 512]).unwrap();
    writer.close().unwrap();
    assert_eq!(be(&path, 88), 1 << 40);
    let writer = open(&path);
    writer.write_at(0, &[7; 512]).unwrap();
    writer.close().unwrap();
    assert_eq!(be(&path, 88), 0);
}

#[test]
fn t15_nothing_is_written_through_a_pointer_out_of_the_file() {
    let work = WorkDir::new("t15");
    let path = image(&work, "a", "cluster_size=64k", "1M");
    io(&path, &["write -q -P 7 0 64k"]);
    patch(&path, l2_entry(&path, 0), &(1u64 << 63 | 256 << 20).to_be_bytes());
    let len = fs::metadata(&path).unwrap().len();
    let refused = open_writer(&RealDisk, &path, &SourceOptions::default()).unwrap_err();
    assert!(refused.to_string().contains("outside the file"), "{refused}");
    assert_eq!(fs::metadata(&path).unwrap().len(), len);
}

#[test]
fn t19_l1_tables_of_other_lengths() {
    let work = WorkDir::new("t19");
    let path = image(&work, "a", "cluster_size=512", "1M");
    io(&path, &["write -q -P 7 0 1M"]);
    qemu_img(&["resize", "-q", "--shrink", text(&path), "100k"]);
    let writer = open(&path);
    writer.write_at(50 << 10, &[8; 512]).unwrap();
    writer.resize(300 << 10).unwrap();
    writer.write_at(299 << 10, &[9; 1024]).unwrap();
    writer.close().unwrap();
    oracle::check_clean(&path);
    io(
        &path,
        &["read -q -P 7 0 50k", "read -q -P 8 50k 512", "read -q -P 0 100k 199k", "read -q -P 9 299k 1k"],
    );
}

#[test]
fn t21_t22_encrypted_images_are_refused_by_name_and_never_written() {
    let work = WorkDir::new("t22");
    let path = work.join("a");
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img(&["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, text(&path), "1M"]);
    let before = oracle::hash_file(&path).unwrap();
    let writer = open(&path);
    let tries = [
        writer.write_at(0, &[7; 512]),
        writer.write_compressed(0, &[7; 65536]),
        writer.write_zeroes(0, 512, false),
        writer.discard(0, 65536),
        writer.resize(2 << 20),
    ];
    for refused in tries {
        assert!(matches!(refused, Err(ImageError::Unsupported { .. })), "{refused:?}");
    }
    writer.close().unwrap();
    assert_eq!(oracle::hash_file(&path).unwrap(), before);
    assert_eq!(Tool::new(PLEACH).run(&["resize", text(&path), "2M"]).code, Some(8));
    // What needs no key works.
    Tool::new(PLEACH).succeed(&["bitmap", "add", text(&path), "b"]);
    Tool::new(PLEACH).succeed(&["check", text(&path)]);
}

#[test]
fn t23_subclusters() {
    let work = WorkDir::new("t23");
    fs::write(work.join("base"), vec![5; 256 << 10]).unwrap();
    // 2 KiB subclusters; a write of part of one fills the rest from below, and no other.
    let path = over(&work, "a", "extended_l2=on", "base", "256k");
    let writer = open(&path);
    writer.write_at(5000, &[7; 100]).unwrap();
    writer.write_zeroes(10 << 10, 2 << 10, false).unwrap();
    writer.flush().unwrap();
    writer.close().unwrap();
    let at = (be(&path, be(&path, 40)) & 0x00ff_ffff_ffff_fe00) + 8;
    assert_eq!(be(&path, at), 0x20_0000_0004);
    io(
        &path,
        &["read -q -P 5 0 5000", "read -q -P 7 5000 100", "read -q -P 5 5100 5140", "read -q -P 0 10k 2k"],
    );
    // Copy on write of a shared cluster keeps what other subclusters say.
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    let writer = open(&path);
    writer.write_at(20 << 10, &[8; 2048]).unwrap();
    writer.close().unwrap();
    oracle::check_clean(&path);
    let at = (be(&path, be(&path, 40)) & 0x00ff_ffff_ffff_fe00) + 8;
    assert_eq!(be(&path, at), 0x20_0000_0404);
    io(
        &path,
        &["read -q -P 7 5000 100", "read -q -P 0 10k 2k", "read -q -P 8 20k 2k", "read -q -P 5 22k 42k"],
    );
    qemu_img(&["snapshot", "-a", "s", text(&path)]);
    io(&path, &["read -q -P 7 5000 100", "read -q -P 5 20k 2k"]);
    // A preallocated cluster has a host cluster and no data: the backing file shows until it is written.
    let path = over(&work, "b", "extended_l2=on,preallocation=metadata", "base", "256k");
    let writer = open(&path);
    writer.write_at(64 << 10, &[6; 512]).unwrap();
    writer.close().unwrap();
    oracle::check_clean(&path);
    io(&path, &["read -q -P 5 0 64k", "read -q -P 6 64k 512", "read -q -P 5 66048 100k"]);
}

/// What a virtual machine's state left behind the disk's end is no part of a disk that grows.
#[test]
fn t24_vm_state_behind_the_disk_never_shows() {
    let work = WorkDir::new("t24");
    let path = image(&work, "a", "cluster_size=64k", "1M");
    io(&path, &["write -q -P 7 0 64k", "write -q -P 86 512k 64k"]);
    // As after applying a snapshot with VM state: an entry behind the disk's end leads to data.
    let entry = be(&path, l2_entry(&path, 8));
    patch(&path, l2_entry(&path, 20), &entry.to_be_bytes());
    patch(&path, l2_entry(&path, 8), &[0; 8]);
    oracle::check_clean(&path);
    Tool::new(PLEACH).succeed(&["resize", text(&path), "2M"]);
    io(&path, &["read -q -P 7 0 64k", "read -q -P 0 64k 1984k"]);
    oracle::check_clean(&path);
}

#[test]
fn t31_a_discard_hides_the_backing_file_and_touches_no_part_of_a_cluster() {
    let work = WorkDir::new("t31");
    fs::write(work.join("base"), vec![5; 1 << 20]).unwrap();
    let cases = [
        ("over", "cluster_size=64k", true, 0, 5),
        ("alone", "cluster_size=64k", false, 0, 0),
        ("old over", "compat=0.10", true, 7, 5),
        ("old alone", "compat=0.10", false, 0, 0),
    ];
    for (name, options, backed, written, untouched) in cases {
        let path = match backed {
            true => over(&work, name, options, "base", "1M"),
            false => image(&work, name, options, "1M"),
        };
        io(&path, &["write -q -P 7 0 256k"]);
        let writer = open(&path);
        // From the middle of cluster 0 into the middle of cluster 2; a whole unallocated one; the disk's last bytes.
        writer.discard(32 << 10, 128 << 10).unwrap();
        writer.discard(512 << 10, 64 << 10).unwrap();
        writer.close().unwrap();
        let hidden = if options.contains("0.10") { untouched } else { 0 };
        io(
            &path,
            &[
                "read -q -P 7 0 64k",
                &format!("read -q -P {written} 64k 64k"),
                "read -q -P 7 128k 128k",
                &format!("read -q -P {hidden} 512k 64k"),
                &format!("read -q -P {untouched} 576k 448k"),
            ],
        );
        oracle::check_clean(&path);
    }
}

#[test]
fn t32_a_partial_write_into_a_zero_cluster_leaves_the_rest_zero() {
    let work = WorkDir::new("t32");
    let path = image(&work, "a", "cluster_size=64k", "1M");
    io(&path, &["write -q -P 7 0 64k", "write -q -z 0 64k"]);
    assert_ne!(be(&path, l2_entry(&path, 0)) & 0x00ff_ffff_ffff_fe00, 0, "the host cluster is kept");
    let writer = open(&path);
    writer.write_at(8192, &[9; 4096]).unwrap();
    writer.close().unwrap();
    io(&path, &["read -q -P 0 0 8k", "read -q -P 9 8k 4k", "read -q -P 0 12k 52k"]);
    oracle::check_clean(&path);
}

#[test]
fn t33_compressed_writes_are_whole_clusters_and_overwrite_nothing() {
    let work = WorkDir::new("t33");
    let path = image(&work, "a", "cluster_size=64k", "100k");
    let writer = open(&path);
    let refused = |result: Result<(), ImageError>| assert!(matches!(result, Err(ImageError::Refused { .. })));
    writer.write_compressed(0, &[7; 65536]).unwrap();
    refused(writer.write_compressed(0, &[8; 65536]));
    refused(writer.write_compressed(65536, &[8; 512]));
    refused(writer.write_compressed(512, &[8; 65536 - 512]));
    // The last cluster of this disk has 36 KiB.
    writer.write_compressed(65536, &[9; 36 << 10]).unwrap();
    writer.write_at(512, &[6; 512]).unwrap();
    writer.close().unwrap();
    oracle::check_clean(&path);
    io(&path, &["read -q -P 7 0 512", "read -q -P 6 512 512", "read -q -P 7 1k 63k", "read -q -P 9 64k 36k"]);
}

/// Merging down makes a short base longer, and what a short middle hid stays hidden.
#[test]
fn t35_t37_a_short_middle_goes_and_what_it_hid_stays_hidden() {
    let work = WorkDir::new("t35");
    fs::write(work.join("base"), vec![5; 512 << 10]).unwrap();
    for keep in ["child", "parent"] {
        let mid = over(&work, "mid.qcow2", "cluster_size=64k", "base", "128k");
        io(&mid, &["write -q -P 6 0 4k"]);
        let top = work.join("top.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", text(&top), "512k"]);
        io(&top, &["write -q -P 7 64k 4k"]);
        Tool::new(PLEACH).succeed(&["delete", text(&work), "mid", "--keep", keep, "--yes"]);
        let left = if keep == "child" { &top } else { &mid };
        io(
            left,
            &[
                "read -q -P 6 0 4k",
                "read -q -P 5 4k 60k",
                "read -q -P 7 64k 4k",
                "read -q -P 5 68k 60k",
                "read -q -P 0 128k 384k",
            ],
        );
        oracle::check_clean(left);
        fs::remove_file(left).unwrap();
    }
}

#[test]
fn t36_no_option_shrinks_unasked() {
    let work = WorkDir::new("t36");
    let path = image(&work, "a", "cluster_size=64k", "2M");
    for args in [&["1M"][..], &["1M", "-y"], &["-1M", "-y"]] {
        let outcome = Tool::new(PLEACH).run(&[&["resize", text(&path)][..], args].concat());
        assert_eq!(outcome.code, Some(2), "{}", outcome.text());
    }
    assert_eq!(oracle::info(&path)["virtual-size"], 2 << 20);
}

/// There is no `dd`, so no `count` that is taken before `skip`.
#[test]
fn t40_there_is_no_dd() {
    assert_eq!(Tool::new(PLEACH).run(&["dd", "if=a", "of=b"]).code, Some(2));
}
