//! Persistent bitmaps of files that become one: what any of them marks stays marked, as `qemu-img bitmap --merge` has it,
//! and what was written where nobody recorded it is marked too.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::ops::Range;
use std::path::Path;

use pleach_image::Image;
use pleach_store::{Access, Disk, RealDisk};
use pleach_testkit::files::{changes, copy_dir, listing};
use pleach_testkit::layers::{Layer, fill, qcow2};
use pleach_testkit::oracle::{check_clean, digest, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const DISK: u64 = 8 << 20;

/// A <- B <- C, each with the bitmaps that it is given, which record what is written to it then.
fn chain(dir: &Path, bitmaps: [&[&str]; 3], options: &str) {
    let layers =
        [("a.qcow2", None, 0, 40), ("b.qcow2", Some("a.qcow2"), 30, 4), ("c.qcow2", Some("b.qcow2"), 70, 6)];
    for ((name, backing, first, count), recorded) in layers.into_iter().zip(bitmaps) {
        let path = dir.join(name);
        let backing = backing.map(|name| (name, Format::Qcow2));
        let options = if name == "c.qcow2" { options } else { "" };
        qcow2(&path, Layer { size: DISK, backing, options }, &[fill(1, first, count, 65536)]);
        for bitmap in recorded {
            qemu_img(&["bitmap", "--add", "-g", "65536", text(&path), bitmap]);
        }
        qemu_io(&path, Format::Qcow2, &[fill(2, first + 1, 3, 65536), fill(3, first + 20, 1, 65536)]);
    }
}

/// What a bitmap marks; `None` if it is not there.
fn marked(path: &Path, name: &str) -> Option<Vec<Range<u64>>> {
    let image = Image::open(RealDisk.open(path, Access::Read).unwrap()).unwrap();
    let records = image.bitmaps().unwrap();
    let record = records.iter().find(|r| r.name == name.as_bytes())?;
    Some(image.bitmap_bits(record).unwrap().ranges())
}

/// What is marked when stock qemu-img puts the bitmap `name` of each of `from` into the first, which has it.
fn oracle(dir: &Path, from: &[&str], name: &str) -> Vec<Range<u64>> {
    let copy = dir.with_extension("oracle");
    copy_dir(dir, &copy);
    let first = copy.join(from[0]);
    for other in &from[1..] {
        let other = copy.join(other);
        qemu_img(&["bitmap", "--merge", name, "-b", text(&other), "-F", "qcow2", text(&first), name]);
    }
    let found = marked(&first, name).unwrap();
    std::fs::remove_dir_all(copy).unwrap();
    found
}

fn planned_and_done(words: &[&str], dir: &Path) -> Value {
    let before = listing(dir);
    let planned = Tool::new(PLEACH).json(&[words, &["-n", "--json"]].concat());
    assert_eq!(changes(&before, &listing(dir)), Vec::<String>::new(), "{words:?}: a dry run");
    let done = Tool::new(PLEACH).json(&[words, &["-y", "--json"]].concat());
    assert_eq!(planned, done, "{words:?}");
    planned["plan"].clone()
}

fn work(name: &str, bitmaps: [&[&str]; 3], options: &str) -> (WorkDir, std::path::PathBuf) {
    let work = WorkDir::new(name);
    let dir = work.join("d");
    std::fs::create_dir(&dir).unwrap();
    chain(&dir, bitmaps, options);
    (work, dir)
}

#[test]
fn bitmaps_of_one_name_become_one() {
    for options in ["", "cluster_size=512", "cluster_size=2M"] {
        let (_work, dir) = work("bitmaps", [&["x", "y"], &["x", "y"], &["x"]], options);
        let wanted = oracle(&dir, &["c.qcow2", "b.qcow2", "a.qcow2"], "x");
        let (top, base) = (dir.join("c.qcow2"), dir.join("a.qcow2"));
        let before = digest(&top, Format::Qcow2);
        let cover: Vec<Range<u64>> = vec![70 << 16..76 << 16, 90 << 16..91 << 16];
        let y = oracle(&dir, &["b.qcow2", "a.qcow2"], "y");
        let plan = planned_and_done(&["merge", text(&top), "--into", text(&base), "--keep", "top"], &dir);
        assert_eq!(marked(&top, "x"), Some(wanted), "{options}: {plan}");
        // Nobody recorded for "y" what was written to C: all that C holds.
        let found = marked(&top, "y").unwrap();
        for range in y.iter().chain(&cover) {
            assert!(
                found.iter().any(|r| r.start <= range.start && range.end <= r.end),
                "{range:?}: {found:?}"
            );
        }
        if options.is_empty() {
            let len = |ranges: &[Range<u64>]| ranges.iter().map(|r| r.end - r.start).sum::<u64>();
            assert_eq!(len(&found), len(&y) + len(&cover), "{found:?}");
        }
        assert_eq!(digest(&top, Format::Qcow2), before, "{options}");
        check_clean(&top);
        // They go on to record.
        qemu_io(&top, Format::Qcow2, &[fill(9, 127, 1, 65536)]);
        for name in ["x", "y"] {
            assert_eq!(marked(&top, name).unwrap().last().unwrap().end, DISK, "{options} {name}");
        }
    }
}

#[test]
fn what_stays_is_a_matter_of_policy() {
    let cases: &[(&[&str], Option<&str>, Option<&str>)] = &[
        (&["--bitmaps", "merge"], Some("x"), Some("y")),
        (&["--bitmaps", "keep-top"], Some("x"), None),
        (&["--bitmaps", "drop"], None, None),
    ];
    for (flags, x, y) in cases {
        let (_work, dir) = work("policy", [&["y"], &[], &["x"]], "");
        let (top, base) = (dir.join("c.qcow2"), dir.join("b.qcow2"));
        let own = marked(&top, "x");
        let words = ["merge", text(&top), "--into", text(&base), "--keep", "top"];
        planned_and_done(&[&words[..], flags].concat(), &dir);
        assert_eq!(marked(&top, "x"), x.and(own), "{flags:?}");
        assert_eq!(marked(&top, "y"), None, "{flags:?}: B had none");
        let base = dir.join("a.qcow2");
        planned_and_done(
            &[&["merge", text(&top), "--into", text(&base), "--keep", "top"], *flags].concat(),
            &dir,
        );
        assert_eq!(marked(&top, "y").is_some(), y.is_some(), "{flags:?}");
        check_clean(&top);
    }
}

#[test]
fn a_commit_lets_the_base_say_what_has_changed() {
    let (_work, dir) = work("commit-bitmaps", [&["x"], &["x"], &["x", "z"]], "");
    let wanted = oracle(&dir, &["a.qcow2", "b.qcow2", "c.qcow2"], "x");
    let (top, base) = (dir.join("c.qcow2"), dir.join("a.qcow2"));
    let (own, z) = (marked(&top, "x"), marked(&top, "z"));
    planned_and_done(&["commit", text(&top), "--into", text(&base)], &dir);
    assert_eq!((marked(&base, "x"), marked(&base, "z")), (Some(wanted), z.clone()));
    assert_eq!((marked(&top, "x"), marked(&top, "z")), (own, z));
    [&top, &base].iter().for_each(|path| check_clean(path));
}

#[test]
fn a_deletion_keeps_what_was_recorded() {
    let (_work, dir) = work("delete-bitmaps", [&[], &["x"], &["x"]], "");
    let wanted = oracle(&dir, &["c.qcow2", "b.qcow2"], "x");
    planned_and_done(&["delete", text(&dir), "b"], &dir);
    assert_eq!(marked(&dir.join("c.qcow2"), "x"), Some(wanted));
    check_clean(&dir.join("c.qcow2"));
}

#[test]
fn an_image_without_room_for_bitmaps_is_no_place_for_them() {
    let (_work, dir) = work("no-bitmaps", [&[], &["x"], &[]], "compat=0.10");
    let before = listing(&dir);
    let (top, base) = (dir.join("c.qcow2"), dir.join("b.qcow2"));
    let words = ["merge", text(&top), "--into", text(&base), "--keep", "top"];
    for how in ["-n", "-y"] {
        let outcome = Tool::new(PLEACH).run(&[&words[..], &[how]].concat());
        assert_eq!(outcome.code, Some(8), "{}", outcome.text());
        assert!(
            outcome.text().contains("\"x\"") && outcome.text().contains("--bitmaps drop"),
            "{}",
            outcome.text()
        );
    }
    assert_eq!(changes(&before, &listing(&dir)), Vec::<String>::new());
    planned_and_done(&[&words[..], &["--bitmaps", "drop"]].concat(), &dir);
    check_clean(&top);
}
