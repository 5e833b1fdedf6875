//! `pleach resize`: what stays reads as before, what is new reads as zeros, whatever lay there; nothing is lost unasked.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::os::unix::fs::MetadataExt;

use pleach_testkit::oracle::{self, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

fn image(work: &WorkDir, name: &str, options: &str, size: &str) -> std::path::PathBuf {
    let path = work.join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
    path
}

#[test]
fn it_grows_and_shrinks_as_qemu_img_says() {
    let work = WorkDir::new("resize");
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "compat=0.10",
        "refcount_bits=1",
    ] {
        let path = image(&work, &format!("{options}.qcow2"), options, "3M");
        qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 3M"]);
        let run = |size: &str, more: &[&str]| {
            Tool::new(PLEACH).succeed(&[&["resize", text(&path), size][..], more].concat())
        };
        run("+2M", &[]);
        assert_eq!(oracle::info(&path)["virtual-size"], 5 << 20);
        qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 3M", "read -q -P 0 3M 2M", "write -q -P 9 4M 1M"]);
        run("1M", &["--shrink", "-y"]);
        qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 1M"]);
        run("6M", &[]);
        qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 1M", "read -q -P 0 1M 5M"]);
        oracle::check_clean(&path);
    }
}

#[test]
fn the_new_part_of_a_raw_image_has_its_space_if_asked() {
    let work = WorkDir::new("resize-raw");
    let path = work.join("disk.raw");
    let run = |more: &[&str]| Tool::new(PLEACH).run(&[&["resize", text(&path), "+1M"][..], more].concat());
    let raw = |kind| run(&["-f", "raw", "--preallocation", kind]);
    for kind in ["off", "falloc", "full"] {
        fs::write(&path, [7; 65536]).unwrap();
        assert_eq!(raw(kind).code, Some(0), "{kind}");
        let bytes = fs::read(&path).unwrap();
        assert!(
            bytes.len() == 65536 + (1 << 20) && bytes[65535] == 7 && bytes[65536..].iter().all(|&b| b == 0)
        );
        let full = fs::metadata(&path).unwrap().blocks() * 512 >= 65536 + (1 << 20);
        assert_eq!(full, kind != "off", "{kind}");
    }
    assert_eq!(raw("metadata").code, Some(2));
    let path = image(&work, "i.qcow2", "cluster_size=4k", "1M");
    let outcome = Tool::new(PLEACH).run(&["resize", text(&path), "+1M", "--preallocation", "falloc"]);
    assert!(outcome.code == Some(8) && outcome.stderr.contains("falloc"), "{outcome}");
}

/// L1 tables longer than what one refcount block covers.
#[test]
fn long_tables_of_small_clusters_find_room() {
    let work = WorkDir::new("resize-small");
    for (bits, size) in [("64", "2G"), ("16", "8G"), ("1", "8G")] {
        let path = image(&work, bits, &format!("cluster_size=512,refcount_bits={bits}"), "1M");
        Tool::new(PLEACH).succeed(&["resize", text(&path), size]);
        assert!(fs::metadata(&path).unwrap().len() < 40 << 20);
        io_at_the_end(&path, size);
        Tool::new(PLEACH).succeed(&["resize", text(&path), "1G", "--shrink", "-y"]);
        oracle::check_clean(&path);
    }
}

fn io_at_the_end(path: &std::path::Path, size: &str) {
    let end = size.trim_end_matches('G').parse::<u64>().unwrap() << 30;
    qemu_io(path, Format::Qcow2, &[format!("write -q -P 7 {} 4k", end - 4096)]);
    oracle::check_clean(path);
}

#[test]
fn a_shrunk_file_gives_its_space_back() {
    let work = WorkDir::new("resize-space");
    let path = image(&work, "a.qcow2", "cluster_size=64k", "64M");
    qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 64M"]);
    let before = fs::metadata(&path).unwrap().len();
    Tool::new(PLEACH).succeed(&["resize", text(&path), "1M", "--shrink", "-y"]);
    let after = fs::metadata(&path).unwrap().len();
    assert!(after < 3 << 20 && before > 64 << 20, "{before} -> {after}");
    oracle::check_clean(&path);
}

#[test]
fn snapshots_keep_their_content_and_their_size() {
    let work = WorkDir::new("resize-snapshots");
    let path = image(&work, "a.qcow2", "cluster_size=4k", "2M");
    qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 2M"]);
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    Tool::new(PLEACH).succeed(&["resize", text(&path), "300k", "--shrink", "-y"]);
    Tool::new(PLEACH).succeed(&["resize", text(&path), "5M"]);
    oracle::check_clean(&path);
    qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 300k", "read -q -P 0 300k 4M"]);
    qemu_img(&["snapshot", "-a", "s", text(&path)]);
    assert_eq!(oracle::info(&path)["virtual-size"], 2 << 20);
    qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 2M"]);
    // A version 2 image has no place for the snapshot's own size.
    let old = image(&work, "old.qcow2", "compat=0.10", "2M");
    qemu_img(&["snapshot", "-c", "s", text(&old)]);
    for more in [&[][..], &["-n"]] {
        let refused = Tool::new(PLEACH).run(&[&["resize", text(&old), "3M"][..], more].concat());
        assert_eq!(refused.code, Some(8), "{}", refused.text());
    }
}

#[test]
fn nothing_is_lost_unasked() {
    let work = WorkDir::new("resize-refused");
    let path = image(&work, "a.qcow2", "cluster_size=64k", "2M");
    qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 2M"]);
    let before = oracle::hash_file(&path).unwrap();
    let cases: &[(&[&str], i32)] = &[
        (&["1M"], 2),
        (&["1M", "-y"], 2),
        (&["1M", "--shrink"], 9),
        (&["1M", "--shrink", "-n"], 0),
        (&["+1M", "-n"], 0),
        (&["1000"], 2),
        (&["0"], 2),
        (&["-5M"], 2),
        (&["x"], 2),
        (&["8E"], 2),
    ];
    for (args, want) in cases {
        let outcome = Tool::new(PLEACH).run(&[&["resize", text(&path)][..], args].concat());
        assert_eq!(outcome.code, Some(*want), "{args:?}: {}", outcome.text());
        assert_eq!(oracle::hash_file(&path).unwrap(), before, "{args:?}");
    }
    let over = work.join("over.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", text(&over)]);
    let refused = Tool::new(PLEACH).run(&["resize", text(&path), "1M", "--shrink", "-y"]);
    assert_eq!(refused.code, Some(6), "{}", refused.text());
    assert!(refused.text().contains("over.qcow2"), "{}", refused.text());
    assert_eq!(oracle::hash_file(&path).unwrap(), before);
    // Longer is no harm to those that read it: they have zeros there, and go on having them.
    Tool::new(PLEACH).succeed(&["resize", text(&path), "3M"]);
    let plan = Tool::new(PLEACH).json(&["resize", text(&over), "1M", "--shrink", "-n", "--json"]);
    assert_eq!((&plan["plan"]["from"], &plan["plan"]["lost"]), (&(2u64 << 20).into(), &(1u64 << 20).into()));
}

#[test]
fn raw_images_must_be_called_raw() {
    let work = WorkDir::new("resize-raw");
    let path = work.join("a.raw");
    qemu_img(&["create", "-q", "-f", "raw", text(&path), "1M"]);
    assert_eq!(Tool::new(PLEACH).run(&["resize", text(&path), "2M"]).code, Some(8));
    Tool::new(PLEACH).succeed(&["resize", "-f", "raw", text(&path), "2M"]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 2 << 20);
}

#[test]
fn data_files_follow() {
    let work = WorkDir::new("resize-data");
    for raw in ["off", "on"] {
        let data = work.join(format!("{raw}.data"));
        let options = format!("data_file={},data_file_raw={raw}", text(&data));
        let path = image(&work, &format!("{raw}.qcow2"), &options, "1M");
        qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 1M"]);
        let refused = Tool::new(PLEACH).run(&["resize", text(&path), "2M"]);
        assert_eq!(refused.code, Some(8), "{}", refused.text());
        Tool::new(PLEACH).succeed(&["resize", text(&path), "2M", "--allow-data-file", text(&data)]);
        qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 1M", "read -q -P 0 1M 1M", "write -q -P 8 1M 1M"]);
        Tool::new(PLEACH).succeed(&[
            "resize",
            text(&path),
            "512k",
            "--shrink",
            "-y",
            "--allow-data-file",
            text(&data),
        ]);
        qemu_io(&path, Format::Qcow2, &["read -q -P 7 0 512k"]);
        assert_eq!(fs::metadata(&data).unwrap().len(), 512 << 10);
        oracle::check_clean(&path);
    }
}
