//! Compressed clusters that are taken over as they are: several in a host cluster, counted right, and only where the target
//! compresses in the same way.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::files::copy_dir;
use pleach_testkit::layers::{Layer, qcow2};
use pleach_testkit::oracle::{check_clean, digest, qemu_img, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const SIZE: u64 = (8 << 20) + 10 * 1024;
const CLUSTER: u64 = 64 << 10;
/// Clusters of the base that are compressed, besides the one at the end of the disk.
const PACKED: u64 = 40;

/// The run's files: in the base compressed clusters, of which the top hides one and overwrites a part of another.
fn chain(dir: &Path, base: &str, top: &str) {
    let writes: Vec<String> = (0..PACKED)
        .map(|n| format!("write -q -c -P {} {} {CLUSTER}", n + 1, n * 2 * CLUSTER))
        .chain([format!("write -q -P 99 {CLUSTER} {CLUSTER}"), "write -q -c -P 77 8M 10k".to_owned()])
        .collect();
    qcow2(&dir.join("base.qcow2"), Layer { size: SIZE, backing: None, options: base }, &writes);
    let over = |backing| Layer { size: SIZE, backing: Some((backing, Format::Qcow2)), options: top };
    qcow2(&dir.join("middle.qcow2"), over("base.qcow2"), &["write -q -c -P 55 7M 64k"]);
    let writes = ["write -q -P 56 0 64k", "write -q -P 57 130k 3k", "write -q -c -P 58 7232k 64k"];
    qcow2(&dir.join("top.qcow2"), over("middle.qcow2"), &writes);
}

fn packed_clusters(path: &Path) -> u64 {
    let report = qemu_img(&["check", "--output=json", text(path)]);
    let report: Value = serde_json::from_str(&report).unwrap();
    report["compressed-clusters"].as_u64().unwrap_or(0)
}

#[test]
fn what_both_compress_alike_is_not_compressed_anew() {
    // A pull hides one of the base's clusters, changes another, and the one at the disk's end is no whole one.
    let pulled = PACKED - 2 + 1;
    let cases: &[(&str, &str, &str, u64)] = &[
        ("alike", "", "", pulled),
        ("zstd", "compression_type=zstd", "compression_type=zstd", pulled),
        ("one count a cluster", "", "refcount_bits=1", pulled),
        ("few counts a cluster", "", "refcount_bits=2", pulled),
        ("subclusters", "", "extended_l2=on", pulled),
        ("version 2", "", "compat=0.10", pulled),
        ("other clusters", "", "cluster_size=32k", 2),
        ("other compression", "compression_type=zstd", "", 1),
    ];
    for (name, base, top, wanted) in cases {
        let made = WorkDir::new("carry");
        chain(&made, base, top);
        let before = digest(&made.join("top.qcow2"), Format::Qcow2);
        let own = packed_clusters(&made.join("top.qcow2"));
        for args in [
            &["merge", "top.qcow2", "--into", "base.qcow2", "--keep", "top"][..],
            &["rebase", "top.qcow2", "--onto", "none"],
            &["flatten", "top.qcow2", "flat.qcow2"],
        ] {
            let label = format!("{name}: {args:?}");
            let work = WorkDir::new("carry");
            let dir = work.join("images");
            copy_dir(&made, &dir);
            let run = |more: &[&str]| {
                let path = dir.join(args[1]);
                let out = dir.join(args[2]);
                let words: Vec<&str> = match args[0] {
                    "flatten" => vec!["flatten", text(&path), text(&out)],
                    _ => [args[0], text(&path)].into_iter().chain(args[2..].iter().copied()).collect(),
                };
                Tool::new(PLEACH).json(&words.iter().chain(more).collect::<Vec<_>>())["plan"].clone()
            };
            let planned = run(&["-n", "--json"]);
            let done = run(&["--yes", "--json"]);
            assert_eq!(planned["bytes_written"], done["bytes_written"], "{label}: {planned} {done}");
            let result = dir.join(if args[0] == "flatten" { "flat.qcow2" } else { "top.qcow2" });
            assert_eq!(digest(&result, Format::Qcow2), before, "{label}");
            check_clean(&result);
            let flat = args[0] == "flatten";
            let pull = done["copies"][0]["direction"] == "pull";
            if pull {
                assert_eq!(packed_clusters(&result), own + wanted, "{label}: {done}");
            }
            if flat {
                // The copy is an image as `create` makes it: 64 KiB and zlib. The middle and the top have one each.
                let alike = |options: &str| !options.contains("zstd") && !options.contains("32k");
                let of_base = if alike(base) { PACKED - 2 } else { 0 };
                let of_others = if alike(top) { 2 } else { 0 };
                assert_eq!(packed_clusters(&result), of_base + of_others, "{label}");
            }
            if *wanted == pulled && pull {
                let written = done["bytes_written"].as_u64().unwrap();
                assert!(written < 4 * CLUSTER, "{label}: {written}");
            }
        }
    }
}

#[test]
fn a_commit_takes_them_over_too() {
    let work = WorkDir::new("carry-down");
    chain(&work, "", "");
    let before = digest(&work.join("top.qcow2"), Format::Qcow2);
    let packed = packed_clusters(&work.join("base.qcow2"));
    let (top, base) = (work.join("top.qcow2"), work.join("base.qcow2"));
    let done = Tool::new(PLEACH).json(&["merge", text(&top), "--into", text(&base), "--yes", "--json"]);
    assert_eq!(digest(&base, Format::Qcow2), before, "{done}");
    check_clean(&base);
    let copies = &done["plan"]["copies"][0];
    if copies["direction"] == "commit" {
        // One is hidden and one is changed; those of the middle and of the top come.
        assert_eq!(packed_clusters(&base), packed - 2 + 2, "{done}");
    }
    let written = done["plan"]["bytes_written"].as_u64().unwrap();
    assert!(written < 4 * CLUSTER, "{done}");
}
