//! `pleach create` with every option of `qemu-img create -f qcow2`: each image beside the one that qemu-img makes.
//!
//! `PLEACH_LONG=1` takes the whole matrix, else every seventh row of it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pleach_testkit::mount::TinyFs;
use pleach_testkit::oracle::{self, in_parallel, qemu_img, qemu_img_in, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::{Value, json};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
/// Neither whole clusters nor whole L2 tables.
const SIZE: u64 = (3 << 20) + 1536;

#[derive(Clone, Debug)]
struct Row {
    version: &'static str,
    cluster: &'static str,
    width: &'static str,
    extended: bool,
    lazy: bool,
    zstd: bool,
    preallocation: &'static str,
    /// No data file, one, or a raw one.
    data: Option<bool>,
}

fn matrix() -> Vec<Row> {
    let mut rows = Vec::new();
    for (version, widths) in [("v2", &["16"][..]), ("v3", &["1", "16", "64"])] {
        for width in widths {
            for cluster in ["512", "4k", "16k", "64k", "2M"] {
                for extended in [false, true] {
                    for preallocation in ["off", "metadata", "falloc", "full"] {
                        for data in [None, Some(false), Some(true)] {
                            let v3 = version == "v3";
                            if extended && (!v3 || matches!(cluster, "512" | "4k")) || data.is_some() && !v3 {
                                continue;
                            }
                            let (lazy, zstd) = (v3 && rows.len() % 2 == 1, v3 && rows.len() % 3 == 1);
                            let row =
                                Row { version, cluster, width, extended, lazy, zstd, preallocation, data };
                            rows.push(row);
                        }
                    }
                }
            }
        }
    }
    rows
}

impl Row {
    fn ours(&self, image: &Path, data: &Path) -> Vec<String> {
        let mut args = vec!["create", text(image)];
        let size = SIZE.to_string();
        args.push(&size);
        args.extend([
            "--cluster-size",
            self.cluster,
            "--compat",
            self.version,
            "--refcount-bits",
            self.width,
        ]);
        args.extend(["--preallocation", self.preallocation, "--json"]);
        args.extend(self.extended.then_some("--extended-l2"));
        args.extend(self.lazy.then_some("--lazy-refcounts"));
        if self.zstd {
            args.extend(["--compression", "zstd"]);
        }
        if let Some(raw) = self.data {
            args.extend(["--data-file", text(data)]);
            args.extend(raw.then_some("--data-file-raw"));
        }
        args.iter().map(ToString::to_string).collect()
    }

    fn theirs(&self, image: &Path, data: &Path) {
        let on = |set| if set { "on" } else { "off" };
        let mut options = format!(
            "compat={},cluster_size={},refcount_bits={},preallocation={}",
            self.version, self.cluster, self.width, self.preallocation
        );
        if self.version == "v3" {
            options += &format!(",extended_l2={},lazy_refcounts={}", on(self.extended), on(self.lazy));
            options += if self.zstd { ",compression_type=zstd" } else { "" };
        }
        if let Some(raw) = self.data {
            options += &format!(",data_file={},data_file_raw={}", text(data), on(raw));
        }
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(image), &SIZE.to_string()]);
    }

    fn preallocates(&self) -> bool {
        self.preallocation != "off" || self.data == Some(true)
    }
}

/// What `qemu-img map` says of where guest data is, without host offsets: start, length, present, data.
fn mapped(path: &Path) -> Vec<(u64, u64, bool, bool)> {
    let map: Value =
        serde_json::from_str(&qemu_img(&["map", "--output=json", "-f", "qcow2", text(path)])).unwrap();
    let mut out: Vec<(u64, u64, bool, bool)> = Vec::new();
    for extent in map.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap();
        let flag = |key: &str| extent[key].as_bool().unwrap();
        let (length, says) = (number("length"), (flag("present"), flag("data")));
        match out.last_mut() {
            Some(last) if (last.2, last.3) == says => last.1 += length,
            _ => out.push((number("start"), length, says.0, says.1)),
        }
    }
    out
}

fn judge(dir: &Path, index: usize, row: &Row) {
    let name = |what: &str| dir.join(format!("{index}-{what}"));
    let (ours, theirs) = (name("ours.qcow2"), name("theirs.qcow2"));
    let (our_data, their_data) = (name("ours.raw"), name("theirs.raw"));
    let made = Tool::new(PLEACH).json(&row.ours(&ours, &our_data));
    row.theirs(&theirs, &their_data);
    assert_eq!(made["created"]["virtual_size"], SIZE, "{row:?}");

    // What it says of itself.
    let (info, their_info) = (oracle::info(&ours), oracle::info(&theirs));
    let features = |info: &Value| {
        let mut data = info["format-specific"]["data"].clone();
        data.as_object_mut().unwrap().remove("data-file");
        (data, info["virtual-size"].clone(), info["cluster-size"].clone(), info["dirty-flag"].clone())
    };
    assert_eq!(features(&info), features(&their_info), "{row:?}");
    oracle::check_clean(&ours);
    Tool::new(PLEACH).succeed(&["check", text(&ours)]);
    let ours_says = &Tool::new(PLEACH).json(&["info", "--json", text(&ours)])["images"][0];
    assert_eq!(ours_says["compression"], if row.zstd { "zstd" } else { "zlib" }, "{row:?}");
    assert_eq!(ours_says["data_file"], row.data.map_or(Value::Null, |_| json!(text(&our_data))), "{row:?}");
    let words = |key: &str| ours_says["features"][key].clone();
    let named =
        |flags: &[(bool, &str)]| -> Vec<Value> { flags.iter().filter(|f| f.0).map(|f| json!(f.1)).collect() };
    let incompatible =
        [(row.data.is_some(), "data-file"), (row.zstd, "compression-type"), (row.extended, "extended-l2")];
    assert_eq!(words("incompatible"), json!(named(&incompatible)), "{row:?}");
    assert_eq!(words("compatible"), json!(named(&[(row.lazy, "lazy-refcounts")])), "{row:?}");
    assert_eq!(words("autoclear"), json!(named(&[(row.data == Some(true), "data-file-raw")])), "{row:?}");

    // Where things are.
    assert_eq!(mapped(&ours), mapped(&theirs), "{row:?}");
    let (size, their_size) = (fs::metadata(&ours).unwrap(), fs::metadata(&theirs).unwrap());
    // In the smallest clusters qemu-img leaves outgrown refcount tables behind.
    assert!(size.len() <= their_size.len(), "{row:?}: {} {}", size.len(), their_size.len());
    if row.cluster != "512" {
        assert_eq!(size.len(), their_size.len(), "{row:?}");
    }
    let holder = if row.data.is_some() { fs::metadata(&our_data).unwrap() } else { size };
    if row.data.is_some() {
        assert_eq!(holder.len(), SIZE, "{row:?}: a data file is as long as the disk");
    }
    if matches!(row.preallocation, "falloc" | "full") {
        assert!(holder.blocks() * 512 >= SIZE, "{row:?}: space is reserved");
    } else if row.cluster != "2M" {
        assert!(holder.blocks() * 512 < SIZE / 4, "{row:?}: nothing but tables");
    }

    // It can be written, and what was written is read.
    let before = fs::metadata(&ours).unwrap().len();
    let last = SIZE - 1024;
    qemu_io(
        &ours,
        Format::Qcow2,
        &[
            "write -q -P 7 1000k 100k",
            &format!("write -q -P 9 {last} 1k"),
            "write -q -z 1010k 4k",
            "read -q -P 7 1000k 10k",
            "read -q -P 0 1010k 4k",
            "read -q -P 0 2M 100k",
            &format!("read -q -P 9 {last} 1k"),
        ],
    );
    oracle::check_clean(&ours);
    if row.preallocates() {
        assert_eq!(fs::metadata(&ours).unwrap().len(), before, "{row:?}: everything had its place");
    }
    if row.data.is_some() {
        let bytes = fs::read(&our_data).unwrap();
        assert!(bytes[1000 << 10..1010 << 10].iter().all(|&b| b == 7), "{row:?}");
        assert!(bytes[last as usize..last as usize + 1024].iter().all(|&b| b == 9), "{row:?}");
    }
    for path in [ours, theirs, our_data, their_data] {
        let _ = fs::remove_file(path);
    }
}

#[test]
fn t16_t17_every_option_makes_what_qemu_img_makes() {
    let work = WorkDir::new("create-options");
    let step = if pleach_testkit::long_mode() { 1 } else { 7 };
    let rows: Vec<(usize, Row)> = matrix().into_iter().enumerate().step_by(step).collect();
    assert!(rows.len() >= 260 / step);
    in_parallel(&rows, |(index, row)| judge(&work, *index, row));
    assert_eq!(fs::read_dir(&*work).unwrap().count(), 0, "no partial file is left");
}

#[test]
fn t23_preallocated_overlays_show_their_backing_file() {
    let work = WorkDir::new("create-over");
    let base = work.join("base.qcow2");
    Tool::new(PLEACH).succeed(&["create", text(&base), "2M"]);
    qemu_io(&base, Format::Qcow2, &["write -q -P 3 0 1M"]);
    for preallocation in ["metadata", "falloc", "full"] {
        let over = work.join(format!("{preallocation}.qcow2"));
        let with = ["--extended-l2", "--preallocation", preallocation];
        let args = [&["create", text(&over), "3M", "-b", "base.qcow2"][..], &with].concat();
        Tool::new(PLEACH).succeed(&args);
        oracle::check_clean(&over);
        qemu_io(&over, Format::Qcow2, &["write -q -P 5 10k 2k", "read -q -P 3 0 10k", "read -q -P 5 10k 2k"]);
        qemu_io(&over, Format::Qcow2, &["read -q -P 3 12k 1000k", "read -q -P 0 1M 2M"]);
        oracle::check_clean(&over);
    }
}

/// QEMU takes a relative data file name from its working directory: the name is stored as given and means the image's
/// directory, so that QEMU finds it from there; an absolute one it finds from anywhere.
#[test]
fn t14_data_files_lie_where_qemu_finds_them_from_the_image_directory() {
    let work = WorkDir::new("create-data");
    let dir = work.join("vm");
    fs::create_dir(&dir).unwrap();
    let image = dir.join("a.qcow2");
    let made =
        Tool::new(PLEACH).succeed(&["create", text(&image), "1M", "--data-file", "a.raw", "--data-file-raw"]);
    assert!(made.stderr.contains("working directory"), "{made}");
    assert_eq!(fs::metadata(dir.join("a.raw")).unwrap().len(), 1 << 20);
    assert_eq!(oracle::info(&image)["format-specific"]["data"]["data-file"], "a.raw");
    qemu_img_in(&dir, &["check", "-q", "a.qcow2"]);
    qemu_img_in(&dir, &["compare", "-q", "-f", "qcow2", "-F", "raw", "a.qcow2", "a.raw"]);

    let (image, data) = (dir.join("b.qcow2"), work.join("b.raw"));
    let made = Tool::new(PLEACH).succeed(&["create", text(&image), "1M", "--data-file", text(&data)]);
    assert_eq!(made.stderr, "");
    oracle::check_clean(&image);
    qemu_io(&image, Format::Qcow2, &["write -q -P 1 64k 64k"]);
    assert_eq!(fs::read(&data).unwrap()[65536], 1);
}

#[test]
fn combinations_that_qemu_img_refuses_are_refused_and_leave_nothing() {
    let work = WorkDir::new("create-refused");
    let new = work.join("new.qcow2");
    let there = work.join("there.raw");
    fs::write(&there, b"precious").unwrap();
    qemu_img(&["create", "-q", "-f", "raw", text(&work.join("base.raw")), "1M"]);
    let (new, there, own) = (text(&new), text(&there), text(&new));
    let cases: &[(&[&str], i32, &str)] = &[
        (&["1G", "--cluster-size", "100"], 2, "must be a power of two from 512 to 2M"),
        (&["1G", "--cluster-size", "256"], 2, "must be a power of two from 512 to 2M"),
        (&["1G", "--cluster-size", "4M"], 2, "must be a power of two from 512 to 2M"),
        (&["1G", "--refcount-bits", "3"], 2, "must be 1, 2, 4, 8, 16, 32 or 64"),
        (&["1G", "--refcount-bits", "128"], 2, "must be 1, 2, 4, 8, 16, 32 or 64"),
        (&["1G", "--refcount-bits", "8", "--compat", "v2"], 2, "must be 16 with --compat v2"),
        (&["1G", "--lazy-refcounts", "--compat", "0.10"], 2, "lazy refcounts needs format version 3"),
        (&["1G", "--extended-l2", "--compat", "v2"], 2, "extended L2 entries needs format version 3"),
        (&["1G", "--extended-l2", "--cluster-size", "8k"], 2, "from 16k to 2M with extended L2"),
        (&["1G", "--compression", "zstd", "--compat", "v2"], 2, "needs format version 3"),
        (&["1G", "--compression", "lz4"], 2, "lz4"),
        (
            &["1G", "--data-file", "d.raw", "--compat", "v2"],
            2,
            "an external data file needs format version 3",
        ),
        (&["1G", "--data-file-raw"], 2, "--data-file"),
        (&["1G", "--data-file", "d.raw", "--data-file-raw", "-b", "base.raw"], 2, "exclude each other"),
        (&["1G", "--preallocation", "metadata", "-b", "base.raw"], 2, "exclude each other"),
        (&["1G", "--preallocation", "some"], 2, "some"),
        (&["1G", "--compat", "0.9"], 2, "0.9"),
        (&["1G", "-F", "raw"], 2, "--backing"),
        (&["1G", "-b", ""], 2, ""),
        (&["1G", "-b", "new.qcow2"], 7, "No such file"),
        (&["200G", "--cluster-size", "512"], 2, "larger clusters"),
        (
            &["60G", "--cluster-size", "512", "--refcount-bits", "64", "--preallocation", "metadata"],
            2,
            "larger clusters",
        ),
        (&["9E"], 2, "virtual size"),
        (&["1G", "--data-file", there], 1, "the data file is there already"),
        (&["1G", "--data-file", own], 2, "the same name"),
        (&["1G", "--data-file", "nbd:x"], 2, "not a plain path"),
        (&["1G", "--data-file", ""], 2, "--data-file"),
        (&["1G", "--data-file", "no/such/dir/d.raw"], 7, "No such file"),
        (&["1G", "--data-file", &"d".repeat(300), "--cluster-size", "512"], 1, ""),
    ];
    for (options, code, words) in cases {
        let outcome = Tool::new(PLEACH).run(&[&["create", new][..], options].concat());
        assert_eq!(outcome.code, Some(*code), "{outcome}");
        assert!(outcome.stderr.contains("error") && outcome.stderr.contains(words), "{words}: {outcome}");
        assert_eq!(fs::read_dir(&*work).unwrap().count(), 2, "{outcome}");
    }
    assert_eq!(fs::read(there).unwrap(), b"precious");
    // A data file is not left behind when the image's name is taken.
    let taken = Tool::new(PLEACH).run(&["create", there, "1G", "--data-file", "d.raw"]);
    assert_eq!((taken.code, fs::read_dir(&*work).unwrap().count()), (Some(1), 2), "{taken}");
}

/// Space that is not there is missed before anything is written, and nothing is left.
#[test]
fn a_full_disk_leaves_nothing() {
    let Some(small) = TinyFs::mount(16 << 20) else { return };
    let path = small.path().join("a.qcow2");
    for options in [
        &["1G", "--preallocation", "falloc"][..],
        &["1G", "--preallocation", "full"],
        &["1G", "--preallocation", "full", "--data-file", "a.raw"],
        &["1T", "--preallocation", "metadata"],
    ] {
        let outcome = Tool::new(PLEACH).run(&[&["create", text(&path)][..], options].concat());
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains("No space left"), "{outcome}");
        assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0, "{outcome}");
    }
    Tool::new(PLEACH).succeed(&["create", text(&path), "1G", "--preallocation", "metadata"]);
}

/// A terabyte of tables is written as fast as memory and disk go.
#[test]
fn preallocated_tables_of_large_disks_are_right() {
    let work = WorkDir::new("create-large");
    let sizes: &[(&str, &str)] = if pleach_testkit::long_mode() {
        &[("1T", "64k"), ("8G", "512")]
    } else {
        &[("20G", "64k"), ("64M", "512")]
    };
    for (size, cluster) in sizes {
        let path = work.join("large.qcow2");
        let options = ["--cluster-size", cluster, "--preallocation", "metadata"];
        Tool::new(PLEACH).succeed(&[&["create", text(&path), size][..], &options].concat());
        oracle::check_clean(&path);
        Tool::new(PLEACH).succeed(&["check", text(&path)]);
        fs::remove_file(&path).unwrap();
    }
}
