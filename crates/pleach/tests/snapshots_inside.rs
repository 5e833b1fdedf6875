//! Deleting what an image with internal snapshots stands on: all its states read on as before, not just the active one.
//!
//! `PLEACH_LONG=1` runs more rounds; `PLEACH_SEED=…` runs one round again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;

use pleach_testkit::oracle::{self, Digest, qemu_img, qemu_io, text};
use pleach_testkit::{Format, OnFailure, Rng, Tool, WorkDir, chosen_seed, long_mode};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const SNAPSHOTS: usize = 3;

#[test]
fn every_state_of_a_dependent_reads_as_before() {
    if let Some(seed) = chosen_seed() {
        round(seed);
        return;
    }
    let rounds = if long_mode() { 150 } else { 12 };
    (0x5a0..0x5a0 + rounds).for_each(round);
}

/// base.raw, N on it, D with snapshots on N, E on D; disks of different sizes and cluster sizes at each level, and D's
/// disk changes its size between snapshots. Then N goes.
fn round(seed: u64) {
    let _seed = OnFailure::print_seed(seed, "snapshots_inside");
    let rng = &mut Rng::new(seed);
    let work = WorkDir::new("inside");
    let dir = work.join("tree");
    fs::create_dir(&dir).unwrap();
    let path = |name: &str| dir.join(name);
    let clusters = ["512", "4k", "16k", "64k"];
    let base = path("base.raw");
    qemu_img(&["create", "-q", "-f", "raw", text(&base), "3M"]);
    scribble(rng, &base, Format::Raw, 3 << 20, 5);
    let size = (1 + rng.below(6)) << 20;
    create(rng.pick::<&str>(&clusters), &path("N.qcow2"), "base.raw", "raw", size);
    scribble(rng, &path("N.qcow2"), Format::Qcow2, size, 8);
    qemu_io(&path("N.qcow2"), Format::Qcow2, &[format!("write -q -z {}k 128k", rng.below(10) * 64)]);

    let disk = path("D.qcow2");
    let mut size = 3 << 20;
    create(rng.pick::<&str>(&clusters), &disk, "N.qcow2", "qcow2", size);
    for i in 1..=SNAPSHOTS {
        scribble(rng, &disk, Format::Qcow2, size, 3);
        qemu_img(&["snapshot", "-c", &format!("s{i}"), text(&disk)]);
        // Not a multiple of any cluster size.
        size += rng.below(2000) * 512;
        qemu_img(&["resize", "-q", text(&disk), &size.to_string()]);
    }
    scribble(rng, &disk, Format::Qcow2, size, 2);
    create("64k", &path("E.qcow2"), "D.qcow2", "qcow2", size);

    let before = states(&dir);
    let planned = Tool::new(PLEACH).json(&["tree", text(&dir), "--json"]);
    let nodes = planned["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|n| n["name"] == "N").unwrap();
    let report = Tool::new(PLEACH).json(&["delete", text(&dir), "N", "--yes", "--json"]);
    assert_eq!(node["sizes"]["written_if_deleted"], report["plan"]["bytes_written"], "{report}");
    assert_eq!(states(&dir), before, "{report}");
    assert!(!path("N.qcow2").exists());
    oracle::check_clean(&disk);
    oracle::check_clean(&path("E.qcow2"));
}

fn create(cluster: &str, image: &Path, backing: &str, format: &str, size: u64) {
    let options = format!("cluster_size={cluster}");
    let size = size.to_string();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &options,
        "-b",
        backing,
        "-F",
        format,
        text(image),
        &size,
    ]);
}

fn scribble(rng: &mut Rng, image: &Path, format: Format, size: u64, times: u64) {
    let write = |_| {
        let len = (1 + rng.below(100)) * 512;
        let at = rng.below((size - len) / 512) * 512;
        format!("write -q -P {} {at} {len}", 1 + rng.below(250))
    };
    let writes: Vec<String> = (0..times).map(write).collect();
    qemu_io(image, format, &writes);
}

/// What every state reads: snapshots by applying them to a copy, since qemu-img exports them with the active size.
fn states(dir: &Path) -> Vec<Digest> {
    let copy = dir.join("copy.qcow2");
    let mut all = Vec::new();
    for i in 1..=SNAPSHOTS {
        fs::copy(dir.join("D.qcow2"), &copy).unwrap();
        qemu_img(&["snapshot", "-a", &format!("s{i}"), text(&copy)]);
        all.push(oracle::digest(&copy, Format::Qcow2));
    }
    fs::remove_file(&copy).unwrap();
    for name in ["D.qcow2", "E.qcow2"] {
        all.push(oracle::digest(&dir.join(name), Format::Qcow2));
    }
    all
}
