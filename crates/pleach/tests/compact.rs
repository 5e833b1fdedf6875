//! `pleach compact`: the file becomes as long as was said, every state reads as before, and a kill at any moment harms nothing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use pleach_testkit::files::patch;
use pleach_testkit::oracle::{self, Digest, check, check_clean, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::{Value, json};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// An image with snapshots, bitmaps, compressed clusters, zeros, and much that was dropped again.
fn worn(path: &Path, options: &str) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(path), "64M"]);
    let io = |commands: &[&str]| qemu_io(path, Format::Qcow2, commands);
    io(&["write -q -P 1 0 24M", "write -q -P 0 16M 2M", "write -q -c -P 2 40M 64k", "write -q -z 20M 1M"]);
    qemu_img(&["snapshot", "-c", "gone", text(path)]);
    io(&["write -q -P 3 4M 12M", "write -q -P 4 48M 8M"]);
    qemu_img(&["snapshot", "-c", "kept", text(path)]);
    qemu_img(&["bitmap", "--add", "-g", "64k", text(path), "b"]);
    io(&["write -q -P 5 30M 6M", "discard -q 0 9M", "write -q -c -P 6 60M 64k", "write -q -c -P 7 61M 64k"]);
    qemu_img(&["snapshot", "-d", "gone", text(path)]);
}

fn states(path: &Path) -> [Digest; 2] {
    let raw = path.with_extension("raw");
    qemu_img(&["convert", "-O", "raw", "-l", "snapshot.name=kept", text(path), text(&raw)]);
    [oracle::digest(path, Format::Qcow2), oracle::digest(&raw, Format::Raw)]
}

#[test]
fn the_size_is_as_predicted_and_nothing_else_changes() {
    let work = WorkDir::new("compact");
    for options in
        ["cluster_size=64k", "cluster_size=4k,refcount_bits=8", "cluster_size=512", "extended_l2=on"]
    {
        let path = work.join("image.qcow2");
        worn(&path, options);
        let before = states(&path);
        let bitmaps = oracle::info(&path)["format-specific"]["data"]["bitmaps"].clone();
        for more in [&[][..], &["--zeroes"]] {
            let run = |args: &[&str]| {
                Tool::new(PLEACH).json(&[&["compact", text(&path), "--json"], args, more].concat())
            };
            let len = fs::metadata(&path).unwrap().len();
            let said = run(&["-n"])["plan"].clone();
            assert_eq!(fs::metadata(&path).unwrap().len(), len, "{options}: -n changes nothing");
            let done = run(&["-y"])["plan"].clone();
            assert_eq!(said, done, "{options} {more:?}");
            assert_eq!(fs::metadata(&path).unwrap().len(), said["size_after"], "{options} {more:?}");
            assert!(said["size_after"].as_u64() < Some(len), "{options} {more:?}: {said}");
            check_clean(&path);
            assert_eq!(states(&path), before, "{options} {more:?}");
            assert_eq!(oracle::info(&path)["format-specific"]["data"]["bitmaps"], bitmaps, "{options}");
        }
    }
}

/// A count of 64 bits may be wrong by more than can be counted down.
#[test]
fn a_huge_count_of_a_leaked_cluster_is_lowered_at_once() {
    let work = WorkDir::new("compact");
    let path = work.join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "refcount_bits=64", text(&path), "4M"]);
    qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 256k", "write -q -P 2 1M 64k"]);
    let before = oracle::digest(&path, Format::Qcow2);
    // Behind the last cluster in use, in the only refcount block.
    let last = fs::metadata(&path).unwrap().len() / (64 << 10);
    fs::File::options().write(true).open(&path).unwrap().set_len((last + 1) * (64 << 10)).unwrap();
    patch(&path, (2 << 16) + 8 * last, &[0x80, 0, 0, 0, 0, 0, 0, 3]);
    Tool::new(PLEACH).succeed(&["compact", "-y", text(&path)]);
    check_clean(&path);
    assert_eq!(fs::metadata(&path).unwrap().len(), last * (64 << 10));
    assert_eq!(oracle::digest(&path, Format::Qcow2), before);
}

/// Compressed data are not put into one cluster where it cannot be counted twice.
#[test]
fn compressed_data_share_a_cluster_only_where_counts_say_so() {
    let work = WorkDir::new("compact");
    let path = work.join("image.qcow2");
    for bits in [1, 2, 16] {
        let options = format!("cluster_size=4k,refcount_bits={bits}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "8M"]);
        let io = |commands: &[&str]| qemu_io(&path, Format::Qcow2, commands);
        io(&["write -q -P 1 0 32k", "write -q -P 5 5M 8k"]);
        for at in ["100k", "120k", "140k", "160k", "180k"] {
            io(&[&format!("write -q -c -P 2 {at} 4k")]);
        }
        io(&["discard -q 0 32k"]);
        let before = oracle::digest(&path, Format::Qcow2);
        let run =
            |more: &str| Tool::new(PLEACH).json(&["compact", more, "--json", text(&path)])["plan"].clone();
        let said = run("-n");
        assert_eq!(run("-y"), said, "{bits}");
        assert_eq!(fs::metadata(&path).unwrap().len(), said["size_after"], "{bits}");
        assert!(said["size_after"].as_u64() < said["size_before"].as_u64(), "{bits}: {said}");
        check_clean(&path);
        assert_eq!(oracle::digest(&path, Format::Qcow2), before, "{bits}");
    }
}

/// Most of a file whose disk was full once may be refcount blocks, which go: what lies among them moves.
#[test]
fn compressed_data_among_refcount_blocks_move() {
    let work = WorkDir::new("compact");
    let path = work.join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", text(&path), "64M"]);
    let io = |commands: &[&str]| qemu_io(&path, Format::Qcow2, commands);
    io(&["write -q -P 1 0 30k"]);
    (60..70).for_each(|sector| io(&[&format!("write -q -c -P 7 {} 512", sector * 512)]));
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    io(&["write -q -P 2 200k 30M"]);
    qemu_img(&["snapshot", "-a", "s", text(&path)]);
    qemu_img(&["snapshot", "-d", "s", text(&path)]);
    io(&["discard -q 0 30k"]);
    let before = oracle::digest(&path, Format::Qcow2);
    let run = |more: &str| Tool::new(PLEACH).json(&["compact", more, "--json", text(&path)])["plan"].clone();
    let said = run("-n");
    assert_eq!(run("-y"), said);
    let len = fs::metadata(&path).unwrap().len();
    assert_eq!(len, said["size_after"]);
    assert!(len < 30 << 10, "{len}");
    check_clean(&path);
    assert_eq!(oracle::digest(&path, Format::Qcow2), before);
    assert_eq!(run("-n")["size_after"], len, "nothing is left to do");
}

/// Flags that do not fit the counts are an error to stock tools, though nothing leaked.
#[test]
fn copied_flags_are_set_right() {
    let work = WorkDir::new("compact");
    let path = work.join("image.qcow2");
    // The entry that a kept snapshot shares may not be written in place; the other may.
    for (offset, snapshot, byte) in [(0x3_0000, false, 0), (0x4_0000, false, 0), (0x4_0000, true, 0x80)] {
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
        qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 64k"]);
        if snapshot {
            qemu_img(&["snapshot", "-c", "kept", text(&path)]);
        }
        patch(&path, offset, &[byte]);
        assert!(!check(&path, Format::Qcow2).is_clean(), "{offset:x}");
        let run =
            |more: &str| Tool::new(PLEACH).json(&["compact", more, "--json", text(&path)])["plan"].clone();
        let said = run("-n");
        assert_eq!(said["copied_flags_wrong"], true, "{offset:x}");
        assert_eq!(run("-y"), said, "{offset:x}");
        check_clean(&path);
        qemu_io(&path, Format::Qcow2, &["read -q -P 1 0 64k"]);
        assert_eq!(run("-n")["copied_flags_wrong"], false, "{offset:x}");
    }
}

/// QEMU lets an entry that becomes zeros keep its cluster, which a snapshot may go on reading.
#[test]
fn what_entries_of_zeros_keep_goes_unless_somebody_reads_it() {
    let work = WorkDir::new("compact");
    let path = work.join("image.qcow2");
    for options in ["", "extended_l2=on,cluster_size=16k", "cluster_size=512,refcount_bits=64"] {
        for more in [&["-y"][..], &["-y", "--zeroes"]] {
            let _ = fs::remove_file(&path);
            let options = format!("compat=1.1,{options}");
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options.trim_end_matches(','),
                text(&path),
                "2M",
            ]);
            qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 2M"]);
            qemu_img(&["snapshot", "-c", "kept", text(&path)]);
            // Shared with kept; owned alone; zeros that nothing says are zeros.
            let ops = [
                "write -q -z 0 512k",
                "write -q -P 8 1M 512k",
                "write -q -z 1M 256k",
                "write -q -P 0 1600k 64k",
            ];
            qemu_io(&path, Format::Qcow2, &ops);
            let before = states(&path);
            let plan = |more: &[&str]| {
                let all = [&["compact", "--json"], more, &[text(&path)]].concat();
                Tool::new(PLEACH).json(&all)["plan"].clone()
            };
            let said = plan(&[&["-n"], &more[1..]].concat());
            assert_eq!(plan(more), said, "{options} {more:?}");
            check_clean(&path);
            assert_eq!(states(&path), before, "{options} {more:?}");
            assert_eq!(fs::metadata(&path).unwrap().len(), said["size_after"], "{options} {more:?}");
            let again = plan(&[&["-n"], &more[1..]].concat());
            assert_eq!((&again["size_after"], &again["zeroed_clusters"]), (&said["size_after"], &json!(0)));
        }
    }
    // One state alone is as short as measured.
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "64M"]);
    qemu_io(&path, Format::Qcow2, &["write -q -P 3 0 8M", "write -q -z 1M 5M"]);
    let measured =
        Tool::new("qemu-img").run(&["measure", "--output=json", "-O", "qcow2", text(&path)]).stdout;
    let measured: Value = serde_json::from_str(&measured).unwrap();
    Tool::new(PLEACH).succeed(&["compact", "-y", text(&path)]);
    assert_eq!(fs::metadata(&path).unwrap().len(), measured["required"]);
}

/// What a writer with lazy refcounts leaves when it is killed: nothing was counted.
#[test]
fn a_dirty_image_is_planned_as_its_repair_leaves_it() {
    let work = WorkDir::new("compact");
    let path = work.join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", text(&path), "8M"]);
    qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 1M", "write -q -P 2 4M 1M", "discard -q 0 512k"]);
    let before = oracle::digest(&path, Format::Qcow2);
    // The mark, and no count for the last clusters.
    patch(&path, 79, &[1]);
    let last = fs::metadata(&path).unwrap().len() / (64 << 10) - 1;
    patch(&path, (2 << 16) + 2 * (last - 3), &[0; 8]);
    let bytes = fs::read(&path).unwrap();
    let run = |more: &str| Tool::new(PLEACH).json(&["compact", more, "--json", text(&path)])["plan"].clone();
    let said = run("-n");
    assert!(fs::read(&path).unwrap() == bytes, "-n changes nothing");
    assert_eq!(run("-y"), said);
    assert_eq!(fs::metadata(&path).unwrap().len(), said["size_after"]);
    assert!(said["size_after"].as_u64() < Some(bytes.len() as u64), "{said}");
    check_clean(&path);
    assert_eq!(oracle::digest(&path, Format::Qcow2), before);
}

#[test]
fn a_kill_at_any_moment_harms_nothing() {
    let work = WorkDir::new("compact-kill");
    let (path, worn_out) = (work.join("image.qcow2"), work.join("worn.qcow2"));
    worn(&worn_out, "cluster_size=4k");
    let before = states(&worn_out);
    let (mut killed, mut wait) = (0, 0u64);
    while wait < 200 {
        fs::copy(&worn_out, &path).unwrap();
        let command = ["compact", text(&path), "--zeroes", "--jobs", "1"];
        let outcome = Tool::new(PLEACH).spawn(&command).kill_after(Duration::from_millis(wait));
        let ended = outcome.code == Some(0);
        let found = check(&path, Format::Qcow2);
        assert!(found.is_safe(), "after {wait} ms: {}", found.text);
        assert_eq!(states(&path), before, "after {wait} ms");
        Tool::new(PLEACH).succeed(&["compact", text(&path), "--zeroes"]);
        check_clean(&path);
        assert_eq!(states(&path), before, "after {wait} ms, gone on");
        if ended {
            break;
        }
        killed += 1;
        wait += 2 + wait / 2;
    }
    assert!(killed > 2, "{killed} kills");
}

#[test]
fn an_image_of_one_state_is_as_short_as_measured() {
    let work = WorkDir::new("compact-measure");
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=2k,compat=0.10"] {
        let path = work.join("image.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "64M"]);
        qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 40M", "discard -q 0 11M", "discard -q 20M 9M"]);
        let cluster = oracle::info(&path)["cluster-size"].to_string();
        let measured =
            Tool::new(PLEACH).json(&["measure", "--json", "--cluster-size", &cluster, text(&path)]);
        Tool::new(PLEACH).succeed(&["compact", text(&path)]);
        let len = fs::metadata(&path).unwrap().len();
        assert!(Some(len) <= measured["required"].as_u64(), "{options}: {len}, {measured}");
        check_clean(&path);
        qemu_io(&path, Format::Qcow2, &["read -q -P 0 0 11M", "read -q -P 1 11M 9M", "read -q -P 1 29M 11M"]);
    }
}

#[test]
fn what_it_cannot_do_is_refused() {
    let work = WorkDir::new("compact-refused");
    let raw = work.join("raw");
    fs::write(&raw, vec![0; 4096]).unwrap();
    let nowhere = work.join("nowhere");
    for (path, code) in [(&raw, 8), (&nowhere, 7)] {
        for more in [&[][..], &["-n"]] {
            let outcome = Tool::new(PLEACH).run(&[&["compact", text(path)], more].concat());
            assert_eq!(outcome.code, Some(code), "{outcome}");
        }
    }
}
