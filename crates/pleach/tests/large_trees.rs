//! Trees of very many nodes: shown, added to and taken from, and as stock qemu-img has it afterwards.
//!
//! `PLEACH_LONG=1 cargo test --release -p pleach --test large_trees -- --nocapture` takes 100,000 nodes and prints how long
//! each command took, best of three.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use pleach_lineage::{DiskRecord, Kind, NodeRecord, Record, Storage};
use pleach_testkit::oracle::{info, qemu_img_in, qemu_io, text};
use pleach_testkit::{Format, Outcome, Tool, WorkDir, long_mode};

const CLUSTER: usize = 65536;

fn be64(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_be_bytes(*bytes[at..].first_chunk().unwrap())).unwrap()
}

/// A new image with `count` internal snapshots, named `s` and a number from `first`, all of one state.
fn many_snapshots(dir: &Path, file: &str, backing: &[&str], first: usize, count: usize) {
    let create = [&["create", "-q", "-f", "qcow2"][..], backing, &[file, "64M"]].concat();
    qemu_img_in(dir, &create);
    let path = dir.join(file);
    qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 256k"]);
    qemu_img_in(dir, &["snapshot", "-c", "one", file]);
    let mut bytes = fs::read(&path).unwrap();
    let (old, l1) = (be64(&bytes, 64), be64(&bytes, 40));
    let snapshot_l1 = be64(&bytes, old);
    let mut table = Vec::new();
    for n in 0..count {
        let (id, name) = ((n + 1).to_string(), format!("s{}", first + n));
        // L1 table, its size, lengths, date, VM clock, VM state, extra data: VM state, disk size, no icount.
        table.extend_from_slice(&bytes[old..old + 12]);
        table.extend_from_slice(&u16::try_from(id.len()).unwrap().to_be_bytes());
        table.extend_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        table.extend_from_slice(&1_700_000_000u32.to_be_bytes());
        table.extend_from_slice(&[0; 16]);
        table.extend_from_slice(&24u32.to_be_bytes());
        table.extend_from_slice(&[0; 8]);
        table.extend_from_slice(&(64u64 << 20).to_be_bytes());
        table.extend_from_slice(&[0xff; 8]);
        table.extend_from_slice(id.as_bytes());
        table.extend_from_slice(name.as_bytes());
        table.resize(table.len().next_multiple_of(8), 0);
    }
    let at = bytes.len().next_multiple_of(CLUSTER);
    bytes.resize(at, 0);
    bytes.extend_from_slice(&table);
    bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
    bytes[60..64].copy_from_slice(&u32::try_from(count).unwrap().to_be_bytes());
    bytes[64..72].copy_from_slice(&(at as u64).to_be_bytes());
    let block = be64(&bytes, be64(&bytes, 48));
    let l2 = be64(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
    let data: Vec<usize> = (0..4).map(|n| be64(&bytes, l2 + 8 * n) & 0x00ff_ffff_ffff_fe00).collect();
    let mut counted = |offset: usize, count: usize| {
        let at = block + offset / CLUSTER * 2;
        bytes[at..at + 2].copy_from_slice(&u16::try_from(count).unwrap().to_be_bytes());
    };
    counted(old, 0);
    counted(snapshot_l1, count);
    data.into_iter().chain([l2]).for_each(|offset| counted(offset, count + 1));
    (0..table.len().div_ceil(CLUSTER)).for_each(|n| counted(at + n * CLUSTER, 1));
    fs::write(&path, bytes).unwrap();
}

/// A tree of `count` nodes: half of them inside `a.qcow2`, with branches; that file's state; the others inside `b.qcow2`.
fn large(dir: &Path, count: usize) {
    let half = count / 2;
    many_snapshots(dir, "a.qcow2", &[], 0, half);
    many_snapshots(dir, "b.qcow2", &["-b", "a.qcow2", "-F", "qcow2"], half, count - half - 1);
    let mut record = Record::new("vm");
    record.disks.push(DiskRecord::new("vda", Some("b.qcow2".to_owned())));
    let node = |name: String, parent: Option<String>, storage| NodeRecord {
        parent,
        created: Some(1_700_000_000),
        state: Some("shutoff".to_owned()),
        storage: vec![("vda".to_owned(), storage)],
        ..NodeRecord::new(name, Kind::Snapshot)
    };
    for n in 0..count - 1 {
        let (file, id) = if n < half { ("a.qcow2", n + 1) } else { ("b.qcow2", n - half + 1) };
        let name = format!("s{n}");
        let parent = match n {
            0 => None,
            _ if n == half => Some("A".to_owned()),
            _ if n < half && n % 7 == 0 => Some(format!("s{}", n / 2)),
            _ => Some(format!("s{}", n - 1)),
        };
        if n == half {
            let storage = Storage::External { file: "a.qcow2".to_owned() };
            record.nodes.push(node("A".to_owned(), Some(format!("s{}", half - 1)), storage));
        }
        let storage = Storage::Internal { file: file.to_owned(), snapshot: name.clone(), id: id.to_string() };
        record.nodes.push(node(name, parent, storage));
    }
    record.current = record.nodes.last().map(|n| n.name.clone());
    fs::create_dir(dir.join(".pleach")).unwrap();
    fs::write(dir.join(".pleach/vm.tree"), record.encode()).unwrap();
}

#[test]
fn large_trees_are_shown_and_changed() {
    let work = WorkDir::new("large");
    let count = if long_mode() { 100_000 } else { 3_000 };
    large(&work, count);
    let catalog = work.join(".pleach/vm.tree");
    let run = |args: &[&str]| -> Outcome {
        let mut args = args.to_vec();
        args.insert(1, text(&catalog));
        let outcome = Tool::new(env!("CARGO_BIN_EXE_pleach")).run(&args);
        assert_eq!(outcome.code, Some(0), "{outcome}");
        outcome
    };
    let shown = run(&["tree"]).stdout;
    assert_eq!(shown.lines().count(), count + 1);
    assert_eq!(run(&["check"]).stdout.matches("no errors were found").count(), 2);
    let mut times: Vec<(String, Duration)> = Vec::new();
    for n in 0..3 {
        let inside = format!("i{n}");
        let outside = format!("e{n}");
        let (first, last) = (format!("s{}", 100 + n), format!("s{}", count - 10 - n));
        let commands: [(&str, &[&str]); 8] = [
            ("tree", &["tree"]),
            ("show", &["show", &last]),
            ("snapshot, internal", &["snapshot", &inside, "--internal"]),
            ("delete, internal, lower image", &["delete", &first, "-y"]),
            ("delete, internal, upper image", &["delete", &last, "-y"]),
            ("snapshot, external", &["snapshot", &outside, "--external"]),
            ("delete, external", &["delete", &outside, "-y"]),
            ("rename", &["note", &inside, "a note"]),
        ];
        for (what, args) in commands {
            let took = run(args).elapsed;
            match times.iter_mut().find(|(other, _)| other == what) {
                Some((_, best)) => *best = took.min(*best),
                None => times.push((what.to_owned(), took)),
            }
        }
    }
    for (what, took) in times {
        println!("{what:<32} {:>6.0} ms", took.as_secs_f64() * 1000.0);
    }
    let shown = run(&["tree"]).stdout;
    assert_eq!(shown.lines().count(), count + 1 - 3);
    assert!(run(&["check"]).stdout.contains("the catalog and the images agree"));
    let snapshots = |file: &str| info(&work.join(file))["snapshots"].as_array().unwrap().len();
    assert_eq!(snapshots("a.qcow2"), count / 2 - 3);
}
