//! `pleach measure`: what `qemu-img measure` says, and the length of the file that `pleach convert` makes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;

use pleach_testkit::layers::{Layer, qcow2};
use pleach_testkit::oracle::{Format, qemu_img, qemu_io, text};
use pleach_testkit::{OnFailure, RandomTree, Rng, Tool, WorkDir, chosen_seed, long_mode};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Options of a new image, as pleach and as qemu-img spell them.
const KINDS: &[(&[&str], &str)] = &[
    (&[], "compat=1.1"),
    (&["--cluster-size", "512"], "cluster_size=512"),
    (&["--cluster-size", "4k", "--refcount-bits", "1"], "cluster_size=4k,refcount_bits=1"),
    (&["--cluster-size", "1k", "--refcount-bits", "64"], "cluster_size=1k,refcount_bits=64"),
    (&["--cluster-size", "2M", "--refcount-bits", "8"], "cluster_size=2M,refcount_bits=8"),
    (&["--extended-l2"], "extended_l2=on"),
    (&["--extended-l2", "--cluster-size", "16k"], "extended_l2=on,cluster_size=16k"),
    (&["--compat", "v2", "--cluster-size", "8k"], "compat=0.10,cluster_size=8k"),
    (&["--preallocation", "falloc"], "preallocation=falloc"),
    (&["--preallocation", "full", "--cluster-size", "4k"], "preallocation=full,cluster_size=4k"),
];

fn ours(args: &[&str]) -> Value {
    Tool::new(PLEACH).json(&[&["measure", "--json"], args].concat())
}

fn qemus(args: &[&str]) -> Value {
    let all = [&["measure", "--output=json"], args].concat();
    serde_json::from_str(&qemu_img(&all)).unwrap()
}

/// (required, fully allocated, bitmaps or 0).
fn figures(json: &Value) -> [Option<u64>; 3] {
    let field = |names: [&str; 2]| names.iter().find_map(|n| json.get(*n).and_then(Value::as_u64));
    let bitmaps = field(["bitmaps", "bitmaps"]).or(Some(0));
    [field(["required", "required"]), field(["fully_allocated", "fully-allocated"]), bitmaps]
}

#[test]
fn empty_images_of_every_geometry() {
    let sizes = ["0", "1000", "7777777", "100G", "3T"];
    for (options, qemu) in KINDS {
        for size in sizes {
            // QEMU has no disks of that size with such clusters.
            if size == "3T" && (qemu.contains("=512") || qemu.contains("=1k") || qemu.contains("=4k")) {
                continue;
            }
            let want = qemus(&["-O", "qcow2", "-o", qemu, "--size", size]);
            let got = ours(&[&["-O", "qcow2", "--size", size], *options].concat());
            assert_eq!(figures(&got), figures(&want), "{options:?} {size}");
        }
    }
    let got = ours(&["-O", "raw", "--size", "1000"]);
    assert_eq!(figures(&got), figures(&qemus(&["-O", "raw", "--size", "1000"])));
}

/// QEMU's figure for preallocated metadata leaves out the data area, which the file then has; and its own writer needs more
/// than it says, because it leaves refcount tables behind as it grows. Ours makes what it says.
#[test]
fn t41_small_clusters_with_preallocated_metadata() {
    let work = WorkDir::new("t41");
    let (source, out) = (work.join("empty.raw"), work.join("out.qcow2"));
    fs::File::create(&source).unwrap().set_len(64 << 20).unwrap();
    let options = ["-f", "raw", "-O", "qcow2", "--cluster-size", "512", "--preallocation", "metadata"];
    let needed = ours(&[&[text(&source)], &options[..]].concat());
    Tool::new(PLEACH).succeed(&[&["convert", text(&source), text(&out)], &options[..]].concat());
    let length = fs::metadata(&out).unwrap().len();
    assert_eq!(
        (needed["required"].as_u64(), needed["fully_allocated"].as_u64()),
        (Some(length), Some(length))
    );
    let qemu = qemus(&["-O", "qcow2", "-o", "cluster_size=512,preallocation=metadata", "--size", "64M"]);
    assert_eq!(figures(&qemu)[1], Some(length));
}

#[test]
fn random_images_make_files_of_that_length() {
    let seed = chosen_seed().unwrap_or(77);
    let _seed = OnFailure::print_seed(seed, "measure");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("measure");
    let out = work.join("out.qcow2");
    for round in 0..if long_mode() { 30 } else { 2 } {
        let tree = RandomTree::build(&work.join(format!("tree{round}")), &mut rng, 5);
        for node in &tree.nodes {
            let source = tree.path(node);
            for _ in 0..2 {
                let (options, _) = *rng.pick(KINDS);
                let all = [&["-f", node.format.name(), "-O", "qcow2"], options].concat();
                let needed = ours(&[&[text(&source)], &all[..]].concat());
                Tool::new(PLEACH).succeed(&[&["convert", text(&source), text(&out)], &all[..]].concat());
                let length = fs::metadata(&out).unwrap().len();
                assert_eq!(needed["required"].as_u64(), Some(length), "{} {options:?}", node.name);
                assert!(needed["fully_allocated"].as_u64() >= Some(length), "{} {options:?}", node.name);
                fs::remove_file(&out).unwrap();
            }
        }
    }
}

/// Where no cluster with data, and no page of a raw file, holds only zeros, QEMU's figures are exact too.
#[test]
fn images_without_stored_zeros_agree_with_qemu() {
    let work = WorkDir::new("measure-agree");
    let mut rng = Rng::new(9);
    for (n, cluster) in ["512", "64k"].into_iter().enumerate() {
        let source = work.join(format!("{n}.qcow2"));
        let writes: Vec<String> = (0..20)
            .map(|_| format!("write -q -P 5 {}k {}k", rng.below(480) * 64, (1 + rng.below(5)) * 64))
            .collect();
        let options = format!("cluster_size={cluster}");
        qcow2(&source, Layer { size: 40 << 20, backing: None, options: &options }, &writes);
        qemu_img(&["bitmap", "--add", "-g", "4k", text(&source), "bits"]);
        qemu_img(&["bitmap", "--add", text(&source), "more bits"]);
        qemu_io(&source, Format::Qcow2, &["write -q -P 1 3M 64k"]);
        judge(&source, "qcow2");
        let flat = work.join(format!("{n}.raw"));
        // QEMU's own raw files have zeros stored at their start.
        fs::File::create(&flat).unwrap().set_len(40 << 20).unwrap();
        qemu_io(&flat, Format::Raw, &writes);
        judge(&flat, "raw");
    }
}

fn judge(source: &Path, format: &str) {
    for (options, qemu) in KINDS {
        let want = qemus(&["-f", format, "-O", "qcow2", "-o", qemu, text(source)]);
        let got = ours(&[&[text(source), "-f", format, "-O", "qcow2"], *options].concat());
        assert_eq!(figures(&got), figures(&want), "{} {options:?}", source.display());
    }
}
