//! `pleach compare` against `qemu-img compare`: the same words and the same exit codes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use pleach_testkit::files::patch;
use pleach_testkit::layers::{self, Layer};
use pleach_testkit::oracle::{Format, qemu_img_in, text};
use pleach_testkit::{OnFailure, RandomTree, Rng, Tool, WorkDir, long_mode};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Runs both tools in `dir`, which must agree. The words are `None` where only the exit code is compared.
fn judge(dir: &Path, args: &[&str], name: &str) -> String {
    let run = |program: &str| {
        let output = Command::new(program).current_dir(dir).arg("compare").args(args).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (ours, theirs) = (run(PLEACH), run("qemu-img"));
    assert_eq!(ours, theirs, "{name}: compare {args:?}");
    ours.1
}

fn qcow2(dir: &Path, name: &str, backing: Option<&str>, options: &str, kib: u64, commands: &[&str]) {
    let backing = backing.map(|b| (b, Format::Qcow2));
    layers::qcow2(&dir.join(name), Layer { size: kib << 10, backing, options }, commands);
}

#[test]
fn verdicts_are_those_of_qemu() {
    let work = WorkDir::new("compare");
    let dir = &*work;
    qcow2(dir, "a.qcow2", None, "", 1024, &["write -q -P 5 0 256k", "write -q -P 6 900k 100k"]);
    for (name, options) in [("small.qcow2", "cluster_size=512"), ("zstd.qcow2", "compression_type=zstd")] {
        let flags: &[&str] = if name == "zstd.qcow2" { &["-c"] } else { &[] };
        let args = ["convert", "-f", "qcow2", "-O", "qcow2", "-o", options];
        qemu_img_in(dir, &[&args[..], flags, &["a.qcow2", name]].concat());
    }
    qemu_img_in(dir, &["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "a.raw"]);
    qcow2(dir, "over.qcow2", Some("a.qcow2"), "", 1024, &[]);
    qcow2(dir, "one-byte.qcow2", Some("a.qcow2"), "", 1024, &["write -q -P 7 204801 1"]);
    qcow2(dir, "in-zeros.qcow2", Some("a.qcow2"), "", 1024, &["write -q -P 1 700000 3"]);
    qcow2(dir, "zeroed.qcow2", Some("a.qcow2"), "", 1024, &["write -q -z 950k 1k"]);
    qcow2(
        dir,
        "same-again.qcow2",
        Some("a.qcow2"),
        "",
        1024,
        &["write -q -P 5 64k 100k", "write -q -P 0 400k 9k"],
    );
    qcow2(dir, "longer.qcow2", Some("a.qcow2"), "", 2048, &[]);
    qcow2(dir, "longer-data.qcow2", Some("a.qcow2"), "", 2048, &["write -q -P 9 1600k 1k"]);
    qcow2(dir, "longer-zeros.qcow2", Some("a.qcow2"), "", 2048, &["write -q -P 0 1600k 1k"]);
    qcow2(dir, "short-base.qcow2", None, "", 128, &["write -q -P 5 0 128k"]);
    qcow2(dir, "over-short.qcow2", Some("short-base.qcow2"), "", 1024, &[]);
    let images = [
        "a.qcow2",
        "small.qcow2",
        "zstd.qcow2",
        "over.qcow2",
        "one-byte.qcow2",
        "in-zeros.qcow2",
        "zeroed.qcow2",
        "same-again.qcow2",
        "longer.qcow2",
        "longer-data.qcow2",
        "longer-zeros.qcow2",
        "over-short.qcow2",
    ];
    let mut identical = 0;
    for (i, a) in images.iter().enumerate() {
        for b in &images[i..] {
            identical +=
                u32::from(judge(dir, &["-f", "qcow2", "-F", "qcow2", a, b], "pair").contains("identical"));
        }
        judge(dir, &["-f", "raw", "-F", "qcow2", "a.raw", a], "raw");
        judge(dir, &["-f", "qcow2", "-F", "raw", a, "a.raw"], "raw");
        judge(dir, &["-s", "-f", "qcow2", "-F", "qcow2", a, a], "strict, itself");
    }
    assert!(identical > 20, "{identical} identical pairs");
    for (a, b) in [("a.qcow2", "longer.qcow2"), ("a.qcow2", "zstd.qcow2")] {
        judge(dir, &["-s", "-f", "qcow2", "-F", "qcow2", a, b], "strict");
    }
}

#[test]
fn random_trees() {
    let seeds: Vec<u64> = match pleach_testkit::chosen_seed() {
        Some(seed) => vec![seed],
        None => (0..if long_mode() { 20 } else { 2 }).map(|i| 0xc0 + i).collect(),
    };
    for seed in seeds {
        let _guard = OnFailure::print_seed(seed, "compare random_trees");
        let work = WorkDir::new("compare");
        let tree = RandomTree::build(&work.join("tree"), &mut Rng::new(seed), 6);
        for (i, a) in tree.nodes.iter().enumerate() {
            for b in &tree.nodes[i..] {
                judge(&tree.dir, &["-f", a.format.name(), "-F", b.format.name(), &a.file, &b.file], "nodes");
            }
        }
    }
}

/// Whichever worker is first, the first difference is named, and damage behind it does not matter.
#[test]
fn the_first_of_many_differences() {
    let work = WorkDir::new("compare");
    let sizes = 16 << 20;
    let (a, b) = (work.join("a.raw"), work.join("b.raw"));
    let bytes: Vec<u8> = (0..sizes).map(|i: u32| (i / 512).to_be_bytes()[3] | 1).collect();
    fs::write(&a, &bytes).unwrap();
    fs::write(&b, &bytes).unwrap();
    let mut differences: Vec<u64> = (1..12).map(|i| i * 1_310_123).collect();
    while let Some(at) = differences.pop() {
        patch(&b, at, &[0]);
        let outcome =
            Tool::new(PLEACH).run(&["compare", "-f", "raw", "-F", "raw", "--json", text(&a), text(&b)]);
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert_eq!(outcome.json()["offset"], at / 512 * 512, "{outcome}");
    }
}

#[test]
fn a_snapshot_against_the_active_state() {
    let work = WorkDir::new("compare");
    let path = work.join("a.qcow2");
    qcow2(&work, "a.qcow2", None, "", 512, &["write -q -P 5 0 512k"]);
    qemu_img_in(&work, &["snapshot", "-c", "s", "a.qcow2"]);
    let run = |flags: &[&str]| {
        Tool::new(PLEACH).run(&[&["compare", "--json", text(&path), text(&path)], flags].concat())
    };
    assert_eq!(run(&["--snapshot-a", "s"]).code, Some(0));
    pleach_testkit::oracle::qemu_io(&path, Format::Qcow2, &["write -q -P 6 300k 1k"]);
    let differs = run(&["--snapshot-b", "s"]);
    assert_eq!((differs.code, &differs.json()["offset"]), (Some(1), &(300 << 10).into()), "{differs}");
    assert_eq!(run(&["--snapshot-a", "s", "--snapshot-b", "s"]).code, Some(0));
}

/// What both read from the same place is equal only if it can be read; a quarter of a petabyte of nothing is not read.
#[test]
fn what_is_shared_must_be_readable_and_what_is_empty_is_not_read() {
    let work = WorkDir::new("compare");
    let dir = &*work;
    qcow2(dir, "base.qcow2", None, "", 4096, &["write -q -P 5 0 64k", "write -q -c -P 6 1M 64k"]);
    qcow2(dir, "a.qcow2", Some("base.qcow2"), "", 4096, &[]);
    qcow2(dir, "b.qcow2", Some("base.qcow2"), "", 4096, &[]);
    let compare = |a: &str, b: &str| {
        Tool::new(PLEACH).run(&["compare", "--json", text(&dir.join(a)), text(&dir.join(b))])
    };
    let shared = compare("a.qcow2", "b.qcow2");
    assert_eq!(shared.code, Some(0), "{shared}");
    // From here on the compressed cluster, which both would read, cannot be read.
    let map = Tool::new(PLEACH).json(&["map", "--json", text(&dir.join("base.qcow2"))]);
    let data = map["extents"][0]["offset"].as_u64().unwrap();
    let bytes = fs::read(dir.join("base.qcow2")).unwrap();
    let l2 = u64::from_be_bytes(bytes[0x30000..0x30008].try_into().unwrap()) & 0xffff_ffff_ffff;
    let at = usize::try_from(l2 + 16 * 8).unwrap();
    let packed = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & ((1 << 54) - 1);
    assert!(data < packed);
    patch(&dir.join("base.qcow2"), packed, &[0xff; 64]);
    let shared = compare("a.qcow2", "b.qcow2");
    assert_eq!(shared.code, Some(4), "{shared}");
    qcow2(dir, "c.qcow2", None, "", 4096, &["write -q -P 5 0 64k", "write -q -P 6 1M 64k"]);
    let damaged = compare("a.qcow2", "c.qcow2");
    assert_eq!(damaged.code, Some(4), "{damaged}");
    for name in ["p1.qcow2", "p2.qcow2"] {
        qemu_img_in(dir, &["create", "-q", "-f", "qcow2", name, "256T"]);
    }
    let empty = compare("p1.qcow2", "p2.qcow2");
    assert_eq!(empty.code, Some(0), "{empty}");
    assert!(empty.elapsed.as_secs() < 5, "{empty}");
}

/// 1 means that the images differ: failures are something else.
#[test]
fn failures_are_not_differences() {
    let work = WorkDir::new("compare");
    let dir = &*work;
    qcow2(dir, "a.qcow2", None, "", 64, &[]);
    qcow2(dir, "lost.qcow2", None, "", 64, &[]);
    qcow2(dir, "orphan.qcow2", Some("lost.qcow2"), "", 64, &[]);
    fs::remove_file(dir.join("lost.qcow2")).unwrap();
    qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "external.qcow2", "64k"]);
    let (external, data) = (dir.join("external.qcow2"), dir.join("d.raw"));
    let cases: [(&str, &[&str], i32); 5] = [
        ("orphan.qcow2", &[], 2),
        ("nosuch.qcow2", &[], 7),
        ("external.qcow2", &[], 8),
        ("external.qcow2", &["--allow-data-file", text(&data)], 0),
        ("a.qcow2", &["--snapshot-b", "nosuch"], 7),
    ];
    for (other, flags, code) in cases {
        let args =
            ["compare", "--json", text(&dir.join("a.qcow2")), text(&dir.join(other))].map(str::to_owned);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        let outcome = Tool::new(PLEACH).run(&args);
        assert_eq!(outcome.code, Some(code), "{outcome}");
    }
    assert!(external.exists());
}
