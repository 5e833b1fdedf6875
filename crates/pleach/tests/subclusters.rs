//! Merging into images with extended L2 entries, in every direction: what is written is subclusters, and no more of them than
//! need be; every image reads as before, for stock QEMU too.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::files::{copy_dir, listing, unfinished};
use pleach_testkit::layers::{Layer, qcow2};
use pleach_testkit::oracle::{check_clean, digest, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const SIZE: u64 = (1 << 20) + 40 * 1024;

/// Over the base: a middle, and a top whose disk is longer. Every subcluster of the first clusters is a case of its own:
/// data, zeros or nothing in each of the three.
fn chain(dir: &Path, extended: [bool; 3]) {
    let options = |on: bool| if on { "cluster_size=64k,extended_l2=on" } else { "cluster_size=64k" };
    let layer = |n: usize, backing| Layer { size: SIZE, backing, options: options(extended[n]) };
    let base = [
        // Compressed: a part of it can only change with all of it.
        "write -q -c -P 1 0 64k",
        "write -q -c -P 2 128k 64k",
        "write -q -c -P 7 192k 64k",
        "write -q -P 3 256k 40k",
        "write -q -z 300k 12k",
        "write -q -P 4 512k 128k",
        "write -q -c -P 9 1M 40k",
    ];
    qcow2(&dir.join("base.qcow2"), layer(0, None), &base);
    let middle = [
        "write -q -P 11 4k 6k",
        "write -q -z 130k 62k",
        "write -q -P 12 258k 2k",
        "write -q -P 13 320k 1k",
        "write -q -P 0 516k 16k",
        "discard -q 576k 64k",
    ];
    qcow2(&dir.join("middle.qcow2"), layer(1, Some(("base.qcow2", Format::Qcow2))), &middle);
    let top = [
        "write -q -P 21 8k 4k",
        "write -q -z 40k 24k",
        "write -q -z 192k 64k",
        "write -q -P 22 260k 30k",
        "write -q -z 272k 4k",
        "write -q -P 23 390k 20k",
        "write -q -P 0 640k 10k",
        "write -q -P 24 1030k 2k",
    ];
    let over = Layer { size: SIZE + 70 * 1024, ..layer(2, Some(("middle.qcow2", Format::Qcow2))) };
    qcow2(&dir.join("top.qcow2"), over, &top);
    let other = ["write -q -P 31 0 20k", "write -q -P 3 256k 40k", "write -q -P 32 900k 300k"];
    let longer = Layer { size: SIZE + (1 << 20), backing: None, options: options(extended[0]) };
    qcow2(&dir.join("other.qcow2"), longer, &other);
}

/// What the verb says that it would do, and then does.
fn carry_out(dir: &Path, args: &[&str], label: &str) -> Value {
    let run = |more: &[&str]| {
        let path = dir.join(args[1]);
        let words: Vec<&str> = [args[0], text(&path)].into_iter().chain(args[2..].iter().copied()).collect();
        Tool::new(PLEACH).json(&words.iter().chain(more).collect::<Vec<_>>())["plan"].clone()
    };
    let before = listing(dir);
    let planned = run(&["-n", "--json"]);
    assert_eq!(listing(dir), before, "{label}: a dry run changes nothing");
    let done = run(&["--yes", "--json"]);
    for key in ["bytes_written", "bytes_cloned"] {
        assert_eq!(planned[key], done[key], "{label}: {planned} {done}");
    }
    assert_eq!(unfinished(dir), Vec::<String>::new(), "{label}");
    done
}

#[test]
fn every_direction_keeps_the_content() {
    let verbs: &[(&[&str], &str)] = &[
        (&["merge", "top.qcow2", "--into", "base.qcow2", "--keep", "top"], "top.qcow2"),
        (&["merge", "top.qcow2", "--into", "base.qcow2", "--keep", "base"], "base.qcow2"),
        (&["merge", "top.qcow2", "--into", "middle.qcow2", "--keep", "top"], "top.qcow2"),
        (&["merge", "top.qcow2", "--into", "middle.qcow2", "--keep", "base"], "middle.qcow2"),
        (&["merge", "middle.qcow2", "--into", "base.qcow2"], "top.qcow2"),
        (&["rebase", "top.qcow2", "--onto", "none"], "top.qcow2"),
        (&["rebase", "top.qcow2", "--onto", "base.qcow2"], "top.qcow2"),
        (&["rebase", "top.qcow2", "--onto", "other.qcow2"], "top.qcow2"),
    ];
    let mut directions = [0; 2];
    for extended in (0..8).map(|n| [n & 1 != 0, n & 2 != 0, n & 4 != 0]) {
        let made = WorkDir::new("subclusters");
        chain(&made, extended);
        let before = digest(&made.join("top.qcow2"), Format::Qcow2);
        for (args, result) in verbs {
            let label = format!("{extended:?} {args:?}");
            let work = WorkDir::new("subclusters");
            let dir = work.join("images");
            copy_dir(&made, &dir);
            let done = carry_out(&dir, args, &label);
            let committed = done["copies"][0]["into"].as_str().is_some_and(|into| !into.starts_with("top"));
            directions[usize::from(committed)] += 1;
            assert_eq!(digest(&dir.join(result), Format::Qcow2), before, "{label}: {done}");
            check_clean(&dir.join(result));
        }
    }
    assert!(directions.iter().all(|&n| n > 5), "{directions:?}");
}

/// A few bytes of a cluster are a subcluster to be written, not a cluster.
#[test]
fn no_more_than_subclusters_is_written() {
    let work = WorkDir::new("subclusters-few");
    let layer = |backing| Layer { size: 1 << 20, backing, options: "extended_l2=on" };
    qcow2(&work.join("base.qcow2"), layer(None), &["write -q -P 1 0 128k"]);
    let over = |backing| layer(Some((backing, Format::Qcow2)));
    qcow2(&work.join("middle.qcow2"), over("base.qcow2"), &["write -q -P 2 2k 2k", "write -q -z 68k 2k"]);
    qcow2(&work.join("top.qcow2"), over("middle.qcow2"), &["write -q -P 3 10k 2k"]);
    let before = digest(&work.join("top.qcow2"), Format::Qcow2);
    let done = carry_out(&work, &["merge", "top.qcow2", "--into", "middle.qcow2", "--keep", "top"], "pull");
    assert_eq!(done["bytes_written"], 2048, "{done}");
    assert_eq!(digest(&work.join("top.qcow2"), Format::Qcow2), before);
    let done = carry_out(&work, &["merge", "top.qcow2", "--into", "base.qcow2", "--keep", "base"], "commit");
    assert_eq!(done["bytes_written"], 2 * 2048, "{done}");
    assert_eq!(digest(&work.join("base.qcow2"), Format::Qcow2), before);
    check_clean(&work.join("base.qcow2"));
}
