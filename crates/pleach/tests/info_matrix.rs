//! `pleach info` and `pleach check` against `qemu-img`: every fact of every kind of image, without opening another file.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use pleach_testkit::files::patch;
use pleach_testkit::oracle::{Format, qemu_img_in, qemu_io, text};
use pleach_testkit::{Tool, WorkDir};
use serde_json::{Value, json};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const KEY: &str = "secret,id=key,data=secret";
const LUKS: &str = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";

/// A name, options of `create`, and what is done with the image `a.qcow2` afterwards.
type Case = (&'static str, &'static str, fn(&Path));

const CASES: &[Case] = &[
    ("plain", "compat=1.1", |_| ()),
    ("version 2", "compat=0.10", |dir| drop(qemu_img_in(dir, &["snapshot", "-c", "old", "a.qcow2"]))),
    ("zstd, wide counts", "compression_type=zstd,refcount_bits=64,cluster_size=4k", |_| ()),
    ("subclusters", "extended_l2=on,cluster_size=128k", |_| ()),
    ("lazy and dirty", "lazy_refcounts=on", |dir| patch(&dir.join("a.qcow2"), 79, &[1])),
    ("corrupt", "compat=1.1", |dir| patch(&dir.join("a.qcow2"), 79, &[2])),
    ("over another", "backing_file=sub/base.raw,backing_fmt=raw", |_| ()),
    ("snapshots", "compat=1.1", |dir| {
        for name in ["one", "", "one", "grün"] {
            qemu_img_in(dir, &["snapshot", "-c", name, "a.qcow2"]);
            qemu_img_in(dir, &["resize", "-q", "a.qcow2", "+1M"]);
        }
    }),
    ("bitmaps", "compat=1.1", |dir| {
        for (name, flags) in [("b0", &["-g", "32k"][..]), ("b1", &["--disable"])] {
            qemu_img_in(dir, &[&["bitmap", "--add", "a.qcow2", name], flags].concat());
        }
    }),
    ("data file", "data_file=d.raw", |_| ()),
    ("raw data file", "data_file=d.raw,data_file_raw=on", |_| ()),
    ("LUKS", LUKS, |_| ()),
    ("AES", "encrypt.format=aes,encrypt.key-secret=key", |_| ()),
];

/// The facts as QEMU tells them, in our words.
fn theirs(dir: &Path) -> Value {
    let info: Value =
        serde_json::from_str(&qemu_img_in(dir, &["info", "-U", "--output=json", "a.qcow2"])).unwrap();
    let specific = &info["format-specific"]["data"];
    let yes = |value: &Value| value == &Value::Bool(true);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let snapshots: Vec<Value> = list(&info["snapshots"])
        .iter()
        .map(|s| json!([s["id"], s["name"], s["vm-state-size"], s["icount"]]))
        .collect();
    let encrypt = &specific["encrypt"];
    let slots: Vec<Value> = list(&encrypt["slots"])
        .iter()
        .map(|s| {
            json!([s["active"], s["key-offset"], if yes(&s["active"]) { &s["iters"] } else { &Value::Null }])
        })
        .collect();
    json!({
        "virtual_size": info["virtual-size"], "actual_size": info["actual-size"],
        "cluster_size": info["cluster-size"], "version": if specific["compat"] == "0.10" { 2 } else { 3 },
        "refcount_bits": specific["refcount-bits"], "compression": specific["compression-type"],
        "backing_file": info["backing-filename"], "backing_format": info["backing-filename-format"],
        "full_backing_file": info["full-backing-filename"], "data_file": specific["data-file"],
        "data_file_raw": yes(&specific["data-file-raw"]), "encryption": encrypt["format"],
        "dirty": yes(&info["dirty-flag"]), "corrupt": yes(&specific["corrupt"]),
        "lazy": yes(&specific["lazy-refcounts"]), "extended": yes(&specific["extended-l2"]),
        "snapshots": snapshots, "bitmaps": list(&specific["bitmaps"]),
        "luks": [encrypt["uuid"], encrypt["payload-offset"], encrypt["master-key-iters"]], "slots": slots,
    })
}

fn ours(dir: &Path) -> Value {
    let outcome = Command::new(PLEACH).current_dir(dir).args(["info", "--json", "a.qcow2"]).output().unwrap();
    let document: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    let info = &document["images"][0];
    let has = |word: &str, name: &str| {
        info["features"][word].as_array().unwrap().iter().any(|feature| feature == name)
    };
    let snapshots = info["snapshots"].as_array().unwrap().iter();
    let luks = &info["luks"];
    let slots = luks["slots"].as_array().cloned().unwrap_or_default();
    let slots: Vec<Value> = slots
        .iter()
        .map(|s| {
            let active = s["active"] == true;
            json!([s["active"], s["key_offset"], if active { &s["iterations"] } else { &Value::Null }])
        })
        .collect();
    json!({
        "virtual_size": info["virtual_size"], "actual_size": info["actual_size"],
        "cluster_size": info["cluster_size"], "version": info["version"],
        "refcount_bits": info["refcount_bits"], "compression": info["compression"],
        "backing_file": info["backing_file"], "backing_format": info["backing_format"],
        "full_backing_file": info["full_backing_file"], "data_file": info["data_file"],
        "data_file_raw": has("autoclear", "data-file-raw"), "encryption": info["encryption"],
        "dirty": info["dirty"], "corrupt": info["corrupt"],
        "lazy": has("compatible", "lazy-refcounts"), "extended": has("incompatible", "extended-l2"),
        "snapshots": snapshots.map(|s| json!([s["id"], s["name"], s["vm_state_size"], s["icount"]])).collect::<Vec<_>>(),
        "bitmaps": info["bitmaps"],
        "luks": [luks["uuid"], luks["payload_offset"], luks["iterations"]], "slots": slots,
    })
}

#[test]
fn every_fact_of_every_kind_of_image() {
    for (name, options, then) in CASES {
        let work = WorkDir::new("info");
        fs::create_dir(work.join("sub")).unwrap();
        fs::write(work.join("sub/base.raw"), vec![1; 1 << 20]).unwrap();
        let create = ["create", "-q", "--object", KEY, "-f", "qcow2", "-o", options, "a.qcow2", "1M"];
        qemu_img_in(&work, &create);
        let path = work.join("a.qcow2");
        if !options.contains("encrypt") && !options.contains("data_file") {
            qemu_io(&path, Format::Qcow2, &["write -q -P 5 64k 200k"]);
        }
        then(&work);
        if options.contains("data_file") {
            // Whoever opened it would wait here for ever.
            fs::remove_file(work.join("d.raw")).unwrap();
            assert!(Command::new("mkfifo").arg(work.join("d.raw")).status().unwrap().success());
        }
        assert_eq!(ours(&work), theirs(&work), "{name}");
        if options.contains("data_file") {
            let check = Tool::new(PLEACH).run(&["check", "--json", text(&path)]);
            assert_eq!(check.code, Some(0), "{name}: {check}");
        }
    }
}

/// Metadata are not encrypted: no key is needed to check them.
#[test]
fn encrypted_images_are_checked_like_others() {
    for options in [LUKS, "encrypt.format=aes,encrypt.key-secret=key"] {
        let work = WorkDir::new("info");
        qemu_img_in(&work, &["create", "-q", "--object", KEY, "-f", "qcow2", "-o", options, "a.qcow2", "1M"]);
        let opened = "driver=qcow2,encrypt.key-secret=key,file.filename=a.qcow2";
        let mut io = Command::new("qemu-io");
        io.current_dir(&*work).args(["--object", KEY, "--image-opts", "-c", "write -q -P 5 0 300k", opened]);
        assert!(io.output().unwrap().status.success());
        let verdict = || {
            let mut qemu = Command::new("qemu-img");
            qemu.current_dir(&*work).args([
                "check",
                "--object",
                KEY,
                "--output=json",
                "--image-opts",
                opened,
            ]);
            let report: Value = serde_json::from_slice(&qemu.output().unwrap().stdout).unwrap();
            let theirs = ["corruptions", "leaks", "allocated-clusters", "total-clusters", "image-end-offset"];
            let theirs = theirs.map(|key| report[key].as_u64().unwrap_or(0));
            let report = Tool::new(PLEACH).run(&["check", "--json", text(&work.join("a.qcow2"))]).json();
            let ours = ["errors", "leaks", "allocated_clusters", "total_clusters", "image_end_offset"];
            (ours.map(|key| report["images"][0][key].as_u64().unwrap()), theirs)
        };
        let (ours, theirs) = verdict();
        assert_eq!(ours, theirs, "{options}");
        // The count of the first data cluster is one too high, that of the second one too low.
        let map = Tool::new(PLEACH).json(&["map", "--json", text(&work.join("a.qcow2"))]);
        assert_eq!(map["extents"][0]["length"], 320 << 10);
        let bytes = fs::read(work.join("a.qcow2")).unwrap();
        let word =
            |at: usize| usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap();
        let block = u64::try_from(word(word(48))).unwrap();
        let l2 = word(word(40)) & 0xffff_ffff_ffff;
        let cluster = |slot: usize| u64::try_from((word(l2 + 8 * slot) & 0xffff_ffff_ffff) >> 16).unwrap();
        patch(&work.join("a.qcow2"), block + 2 * cluster(0), &[0, 2]);
        patch(&work.join("a.qcow2"), block + 2 * cluster(1), &[0, 0]);
        let (ours, theirs) = verdict();
        assert_eq!(ours, theirs, "{options}, damaged");
        assert!(ours[0] > 0 && ours[1] > 0);
    }
}

/// However large an image is, `info` reads its header, its snapshot table and its list of bitmaps.
#[test]
fn info_takes_little_memory() {
    let work = WorkDir::new("info");
    let path = work.join("a.qcow2");
    let create =
        ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4k", "a.qcow2", "8G"];
    qemu_img_in(&work, &create);
    qemu_img_in(&work, &["snapshot", "-c", "s", "a.qcow2"]);
    // All private memory together: what is more cannot be had. Tables are not mapped, so there is little else.
    let script = format!("ulimit -d 16384; exec '{PLEACH}' info --json '{}'", text(&path));
    let info = Tool::new("/bin/sh").json(&["-c", &script]);
    assert_eq!(info["images"][0]["snapshots"][0]["name"], "s");
}
