//! Trees of several disks, and plans: what verbs once got wrong.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pleach_lineage::Record;
use pleach_testkit::files::listing;
use pleach_testkit::oracle::{check_clean, digest, info, qemu_img_in, qemu_io};
use pleach_testkit::tool::Running;
use pleach_testkit::{Format, Outcome, Rng, WorkDir};
use serde_json::Value;

/// Runs a line of words in `dir`.
fn run(dir: &Path, words: &str) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pleach"));
    command.current_dir(dir).args(words.split(' '));
    Running::start(command).finish(Duration::from_secs(60))
}

fn done(dir: &Path, words: &str) -> Outcome {
    let outcome = run(dir, words);
    assert_eq!(outcome.code, Some(0), "{words}\n{outcome}");
    outcome
}

fn json(dir: &Path, words: &str) -> Value {
    serde_json::from_str(&done(dir, &format!("{words} --json")).stdout).unwrap()
}

/// The parent of every node that is there, and how `tree` and the catalog differ: not at all.
fn parents(dir: &Path) -> Vec<(String, Value)> {
    let tree = json(dir, "tree .");
    assert_eq!(tree["differences"], serde_json::json!([]), "{tree}");
    done(dir, "check .");
    let nodes = tree["nodes"].as_array().unwrap().iter().filter(|n| n["kind"] == "snapshot");
    nodes.map(|n| (n["name"].as_str().unwrap().to_owned(), n["parent"].clone())).collect()
}

fn refused(dir: &Path, words: &str, code: i32, says: &str) {
    let before = listing(dir);
    let outcome = run(dir, words);
    assert_eq!(outcome.code, Some(code), "{words}\n{outcome}");
    assert!(outcome.stderr.contains(says), "{words}\n{outcome}");
    assert_eq!(listing(dir), before, "{words}");
}

/// New images `d0.qcow2` and so on, in one tree.
fn init(dir: &Path, disks: usize) {
    let mut words = "init vm".to_owned();
    for n in 0..disks {
        qemu_img_in(dir, &["create", "-q", "-f", "qcow2", &format!("d{n}.qcow2"), "1M"]);
        words.push_str(&format!(" --disk disk{n}=d{n}.qcow2"));
    }
    done(dir, &words);
}

fn pairs(of: &[(&str, Option<&str>)]) -> Vec<(String, Value)> {
    of.iter().map(|(name, parent)| ((*name).to_owned(), Value::from(*parent))).collect()
}

#[test]
fn images_of_a_damaged_catalog_get_no_second_one() {
    let work = WorkDir::new("scan");
    init(&work, 1);
    done(&work, "snapshot . s1");
    let catalog = work.join(".pleach/vm.tree");
    let mut bytes = fs::read(&catalog).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(&catalog, &bytes).unwrap();
    refused(&work, "scan . --write", 4, "vm.tree");
    refused(&work, "scan . --write", 4, "move the file away");
    fs::rename(&catalog, work.join("kept")).unwrap();
    done(&work, "scan . --write");
}

#[test]
fn runs_of_a_catalog_are_squashed() {
    let work = WorkDir::new("squash");
    init(&work, 1);
    for name in ["i1", "i2", "i3"] {
        done(&work, &format!("snapshot . {name} --internal"));
    }
    for (name, file) in [("e1", "d0"), ("e2", "d0.e1"), ("e3", "d0.e2")] {
        qemu_io(&work.join(format!("{file}.qcow2")), Format::Qcow2, &["write -q -P 7 0 64k"]);
        done(&work, &format!("snapshot . {name} --external"));
    }
    refused(&work, "squash . e1 e1 -y", 2, "a run of one");
    refused(&work, "squash . e2 e1 -y", 2, "does not stand on");
    refused(&work, "squash . i3 e2 -y", 8, "one by one");
    let before = digest(&work.join("d0.e3.qcow2"), Format::Qcow2);
    let plan = json(&work, "squash . i1 i3 -n");
    assert_eq!(plan["plan"]["reparented"], serde_json::json!([{ "name": "i3", "parent": null }]), "{plan}");
    done(&work, "squash . i1 i3 -y");
    done(&work, "squash . e2 e3 -y");
    assert_eq!(parents(&work), pairs(&[("i3", None), ("e1", Some("i3")), ("e3", Some("e1"))]));
    assert_eq!(digest(&work.join("d0.e3.qcow2"), Format::Qcow2), before);
    // Without a catalog.
    let plain = work.join("plain");
    fs::create_dir(&plain).unwrap();
    qemu_img_in(&plain, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    refused(&plain, "squash . a a -y", 2, "a run of one");
}

#[test]
fn several_disks_over_raw_images_have_one_root() {
    let work = WorkDir::new("raw-roots");
    let mut words = "init vm".to_owned();
    for n in 0..2 {
        let (base, top) = (format!("b{n}.raw"), format!("d{n}.qcow2"));
        qemu_img_in(&work, &["create", "-q", "-f", "raw", &base, "1M"]);
        qemu_img_in(&work, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
        words.push_str(&format!(" --disk disk{n}={top}"));
    }
    done(&work, &words);
    done(&work, "snapshot . s1 --disk disk0");
    done(&work, "snapshot . s2");
    assert_eq!(parents(&work), pairs(&[("b0", None), ("s1", Some("b0")), ("s2", Some("s1"))]));
    // A root for each disk, as a catalog may have them: what is recorded stays if one disk bears it out.
    done(&work, "delete . b0 --metadata -y");
    let settled = parents(&work);
    done(&work, "scan . --write");
    assert_eq!(parents(&work), settled);
}

#[test]
fn disks_that_take_no_part_in_a_snapshot_settle_under_it() {
    let work = WorkDir::new("part");
    init(&work, 2);
    for words in ["s1", "s2 --disk disk0", "s3"] {
        done(&work, &format!("snapshot . {words}"));
    }
    done(&work, "revert . s2 --discard -y");
    done(&work, "snapshot . s4");
    let wanted = [("s1", None), ("s2", Some("s1")), ("s3", Some("s2")), ("s4", Some("s2"))];
    assert_eq!(parents(&work), pairs(&wanted));
    done(&work, "delete . s3 -y");
    assert_eq!(parents(&work), pairs(&[("s1", None), ("s2", Some("s1")), ("s4", Some("s2"))]));
    done(&work, "delete . s4 --children -n");
    let first = digest(&work.join("d1.qcow2"), Format::Qcow2);
    done(&work, "delete . s4 --children -y");
    assert_eq!(parents(&work), pairs(&[("s1", None), ("s2", Some("s1"))]));
    let tree = json(&work, "tree .");
    let active = tree["disks"][1]["active"].as_str().unwrap();
    assert_eq!(digest(&work.join(active), Format::Qcow2), first);
}

#[test]
fn plans_say_what_the_run_does() {
    let work = WorkDir::new("plans");
    init(&work, 1);
    qemu_io(&work.join("d0.qcow2"), Format::Qcow2, &["write -q -P 3 0 256k"]);
    done(&work, "snapshot . i1 --internal");
    done(&work, "snapshot . A --external");
    qemu_io(&work.join("d0.A.qcow2"), Format::Qcow2, &["write -q -P 4 0 64k"]);
    done(&work, "snapshot . B");
    qemu_io(&work.join("d0.B.qcow2"), Format::Qcow2, &["write -q -P 5 64k 64k"]);
    let verbs = [
        ("delete . B", 64 << 10),
        ("revert . i1 --save-as C", 256 << 10),
        ("revert . A --discard", 0),
        ("revert . i1 --discard", 256 << 10),
        ("revert . A --discard", 0),
        ("snapshot . D --external", 0),
        ("delete . i1 --children-only", 256 << 10),
    ];
    for (verb, written) in verbs {
        // On tmpfs, the first look at a hole takes room.
        done(&work, &format!("{verb} -n"));
        let plan = json(&work, &format!("{verb} -n"))["plan"].clone();
        assert_eq!(plan["bytes_written"], written, "{verb}: {plan}");
        let report = json(&work, &format!("{verb} -y"))["plan"].clone();
        for key in ["bytes_read", "bytes_written", "bytes_freed"] {
            assert_eq!(plan[key], report[key], "{verb}: {key}: {plan}\n{report}");
        }
    }
}

/// Puts an image that stands on `secret` at the start of a raw one, as a guest may that wants to read it.
fn pretend(raw: &Path, secret: &Path) {
    let image = raw.with_extension("bait");
    let base = secret.file_name().unwrap().to_str().unwrap();
    let dir = raw.parent().unwrap();
    qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "pretend.bait"]);
    fs::rename(dir.join("pretend.bait"), &image).unwrap();
    let bytes = fs::read(&image).unwrap();
    fs::remove_file(&image).unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(raw).unwrap();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
}

#[test]
fn a_guest_may_write_anything_into_a_raw_image() {
    for header in [true, false] {
        let work = WorkDir::new("raw-head");
        let (image, secret) = (work.join("disk.img"), work.join("secret.img"));
        fs::write(&image, Rng::new(3).noise(1 << 20)).unwrap();
        fs::write(&secret, vec![7; 1 << 20]).unwrap();
        done(&work, "init vm --disk vda=disk.img");
        if header {
            pretend(&image, &secret);
        } else {
            let mut bytes = fs::read(&image).unwrap();
            bytes[..4].copy_from_slice(b"QFI\xfb");
            fs::write(&image, bytes).unwrap();
        }
        let content = digest(&image, Format::Raw);
        assert_eq!(parents(&work), []);
        let scan = json(&work, "scan .");
        assert_eq!(scan["trees"].as_array().unwrap().len(), 1, "{scan}");
        assert_eq!(json(&work, "check .")["images"], serde_json::json!([]));
        refused(&work, "snapshot . no --internal", 8, "raw");
        done(&work, "snapshot . s1 --file vda=a.qcow2");
        let read = |name: &str| digest(&work.join(name), Format::Qcow2);
        assert_eq!(info(&work.join("a.qcow2"))["backing-filename-format"], "raw");
        assert_eq!(read("a.qcow2"), content);
        qemu_io(&work.join("a.qcow2"), Format::Qcow2, &["write -q -P 9 64k 128k"]);
        let changed = read("a.qcow2");
        done(&work, "revert . s1 --save-as s2 -y --file vda=b.qcow2");
        assert_eq!(read("b.qcow2"), content);
        done(&work, "revert . s2 --discard -y --file vda=c.qcow2");
        assert_eq!(read("c.qcow2"), changed);
        done(&work, "delete . s2 -y");
        // The raw file takes over, and is still raw.
        qemu_io(&work.join("c.qcow2"), Format::Qcow2, &["write -q -P 5 512k 64k"]);
        let changed = read("c.qcow2");
        done(&work, "delete . s1 --keep parent -y");
        assert_eq!(json(&work, "tree .")["disks"][0]["active"], "disk.img");
        assert_eq!(digest(&image, Format::Raw), changed);
        done(&work, "scan . --write");
        done(&work, "snapshot . s3 --file vda=d.qcow2");
        assert_eq!(read("d.qcow2"), changed);
        assert_eq!(info(&work.join("d.qcow2"))["backing-filename-format"], "raw");
    }
}

#[test]
fn what_is_raw_is_recorded_in_catalogs_that_do_not_say_it_yet() {
    let work = WorkDir::new("raw-old");
    let (image, catalog) = (work.join("disk.img"), work.join(".pleach/vm.tree"));
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    done(&work, "init vm --disk vda=disk.img");
    let mut record = Record::parse(&fs::read(&catalog).unwrap()).unwrap();
    assert_eq!(std::mem::take(&mut record.raw), ["disk.img".to_owned()].into());
    fs::write(&catalog, record.encode()).unwrap();
    done(&work, "snapshot . s1");
    assert_eq!(Record::parse(&fs::read(&catalog).unwrap()).unwrap().raw, ["disk.img".to_owned()].into());
    // An overlay that says otherwise is not followed.
    qemu_img_in(
        &work,
        &["create", "-q", "-f", "qcow2", "-u", "-b", "disk.img", "-F", "qcow2", "x.qcow2", "1M"],
    );
    let outcome = run(&work, "tree . --all");
    assert!(outcome.code == Some(1) && outcome.stderr.contains("raw by the catalog"), "{outcome}");
}

#[test]
fn bitmaps_go_on_recording_after_a_snapshot() {
    let work = WorkDir::new("bitmaps");
    init(&work, 2);
    for (name, flags) in [("daily", "-g 64k"), ("paused", "--disable"), ("weekly", "-g 4k")] {
        let args = format!("bitmap --add d0.qcow2 {name} {flags}");
        qemu_img_in(&work, &args.split(' ').collect::<Vec<_>>());
    }
    let plan = json(&work, "snapshot . s1 -n");
    let added = plan["plan"]["bitmaps"].as_array().unwrap().iter().map(|b| b["bitmap"].clone());
    assert_eq!(added.collect::<Vec<_>>(), ["daily", "weekly"], "{plan}");
    done(&work, "snapshot . s1");
    let image = work.join("d0.s1.qcow2");
    qemu_io(&image, Format::Qcow2, &["write -q -P 3 128k 4k"]);
    let list = json(&work, "bitmap list d0.s1.qcow2");
    let all: Vec<_> = list["bitmaps"].as_array().unwrap().iter().map(|b| &b["dirty_bytes"]).collect();
    assert_eq!(all, [65536, 4096], "{list}");
    check_clean(&image);
    assert!(info(&work.join("d1.s1.qcow2"))["format-specific"]["data"]["bitmaps"].is_null());
    // Nothing but new things: it can be taken back.
    done(&work, "check .");
}

#[test]
fn every_image_of_a_tree_leads_to_it_wherever_it_lies() {
    let work = WorkDir::new("elsewhere");
    let (here, there) = (work.join("here"), work.join("th ere"));
    for (dir, name) in [(&here, "a.qcow2"), (&there, "b.qcow2")] {
        fs::create_dir(dir).unwrap();
        qemu_img_in(dir, &["create", "-q", "-f", "qcow2", name, "1M"]);
    }
    let outcome = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pleach"));
        command.current_dir(&*work).args(args);
        Running::start(command).finish(Duration::from_secs(60))
    };
    let done = |args: &[&str]| {
        let outcome = outcome(args);
        assert_eq!(outcome.code, Some(0), "{outcome}");
        outcome.stdout
    };
    done(&["init", "vm", "--disk", "vda=here/a.qcow2", "--disk", "vdb=th ere/b.qcow2"]);
    for (target, name) in [("th ere/b.qcow2", "s1"), ("th ere", "s2"), ("here/a.s2.qcow2", "s3")] {
        assert_eq!(done(&["snapshot", target, name]).trim(), name);
        for target in ["here", "th ere", "th ere/b.qcow2", "here/.pleach/vm.tree"] {
            assert!(done(&["tree", target]).contains(name), "{target}");
        }
    }
    // What the catalog keeps there is kept.
    let merge = outcome(&["merge", "th ere/b.s2.qcow2", "--into", "th ere/b.s1.qcow2", "-y"]);
    assert_eq!(merge.code, Some(6), "{merge}");
    done(&["delete", "th ere", "s2", "-y"]);
    // With the tree goes the sign.
    done(&["delete", "th ere", "s1", "--children", "--yes-everything", "-y"]);
    assert!(listing(&there).is_empty());
    assert!(listing(&here).is_empty());
    assert!(!there.join(".pleach").exists() && !here.join(".pleach").exists());
}

#[test]
fn what_is_printed_is_printable_and_names_the_files() {
    let work = WorkDir::new("printable");
    let name = "a%41\u{1b}[31m\n\u{202e}b.qcow2";
    qemu_img_in(&work, &["create", "-q", "-f", "qcow2", "x", "3M"]);
    fs::rename(work.join("x"), work.join(name)).unwrap();
    let plain = "c%41.qcow2";
    qemu_img_in(&work, &["create", "-q", "-f", "qcow2", plain, "3M"]);
    let outcome = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pleach"));
        command.current_dir(&*work).args(args);
        let outcome = Running::start(command).finish(Duration::from_secs(60));
        let said = format!("{}{}", outcome.stdout, outcome.stderr);
        assert!(said.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{outcome}");
        outcome
    };
    let odd = format!("./{name}");
    outcome(&["init", "vm", "--disk", &format!("vda={odd}"), "--disk", &format!("vdb={plain}")]);
    outcome(&["snapshot", ".", "s\u{1b}", "-m", "\u{1b}c\nx"]);
    for args in [
        &["tree", "."][..],
        &["tree", ".", "--dot"],
        &["check", "."],
        &["scan", "."],
        &["show", ".", "s\u{1b}"],
        &["note", ".", "s\u{1b}"],
        &["revert", ".", "s\u{1b}", "-n"],
        &["delete", ".", "s\u{1b}", "-n"],
        &["info", &odd],
        &["map", &odd],
        &["compact", &odd, "-n"],
        &["info", "no\u{1b}"],
        &["merge", &odd, "--into", &odd],
    ] {
        outcome(args);
    }
    let tree = json(&work, "tree .");
    assert_eq!(tree["nodes"][0]["storage"]["vdb"]["file"], plain, "{tree}");
    assert!(tree["disks"][1]["active"].as_str().unwrap().starts_with("c%41"), "{tree}");
}

#[test]
fn other_names_of_a_file_that_goes_are_warned_of() {
    let work = WorkDir::new("links");
    for dir in ["a", "b"] {
        let dir = work.join(dir);
        fs::create_dir(&dir).unwrap();
        qemu_img_in(&dir, &["create", "-q", "-f", "qcow2", "A.qcow2", "1M"]);
        qemu_img_in(&dir, &["create", "-q", "-f", "qcow2", "-b", "A.qcow2", "-F", "qcow2", "B.qcow2"]);
        fs::hard_link(dir.join("A.qcow2"), work.join(dir.file_name().unwrap()).with_extension("link"))
            .unwrap();
    }
    done(&work, "init vm --disk vda=b/B.qcow2");
    for dir in ["a", "b"] {
        let outcome = done(&work, &format!("delete {dir} A -n --json"));
        assert!(outcome.stderr.contains("2 hard links"), "{outcome}");
        assert!(outcome.stdout.contains("2 hard links"), "{outcome}");
    }
}

/// The answers of docs/lineage.md are what the commands print; what is freed depends on the file system.
#[test]
fn the_questions_of_2011_are_answered_as_the_documents_say() {
    let document = include_str!("../../../docs/lineage.md");
    let (_, section) = document.split_once("## The questions of 2011").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let work = WorkDir::new("questions");
    let tools = Path::new(env!("CARGO_BIN_EXE_pleach")).parent().unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let without_freed =
        |line: &str| line.split(", ").filter(|part| !part.ends_with(" freed")).collect::<String>();
    let mut functions = String::new();
    let mut commands = 0;
    for block in section.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for entry in block.split("$ ").filter(|entry| entry.contains('\n')) {
            let (command, wanted) = entry.split_once('\n').unwrap();
            if command.contains("() {") {
                functions = format!("{command}\n");
                continue;
            }
            let script = format!("{functions}{command}");
            let mut bash = Command::new("bash");
            bash.current_dir(&*work).env("PATH", &path).args(["-c", &script]);
            let outcome = Running::start(bash).finish(Duration::from_secs(60));
            assert_eq!(outcome.code, Some(0), "{outcome}");
            let lines = |text: &str| text.lines().map(without_freed).collect::<Vec<_>>();
            assert_eq!(lines(&outcome.stdout), lines(wanted), "{command}\n{}", outcome.stdout);
            commands += 1;
        }
    }
    assert_eq!(commands, 12);
}
