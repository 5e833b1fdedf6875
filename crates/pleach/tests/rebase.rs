//! `pleach rebase`: what is compared and what is not, names, internal snapshots, and what is refused.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::files::listing;
use pleach_testkit::layers::{Layer, qcow2, raw};
use pleach_testkit::oracle::{check_clean, digest, info, qemu_img_in, text};
use pleach_testkit::{Format, Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

fn image(dir: &Path, name: &str, backing: Option<&str>, kib: u64, commands: &[&str]) {
    let backing = backing.map(|b| (b, Format::Qcow2));
    qcow2(&dir.join(name), Layer { size: kib << 10, backing, options: "" }, commands);
}

fn rebase(dir: &Path, image: &str, onto: &str, more: &[&str]) -> serde_json::Value {
    let path = dir.join(image);
    let mut args = vec!["rebase", text(&path), "--onto", onto, "-y", "--json"];
    args.extend(more);
    Tool::new(PLEACH).json(&args)["plan"].clone()
}

/// Only where the chains differ is anything compared, and only what differs is written.
#[test]
fn equal_content_and_common_ancestors_cost_nothing() {
    let work = WorkDir::new("rebase");
    let dir = &*work;
    image(dir, "root.qcow2", None, 4096, &["write -q -P 1 0 4M"]);
    let writes = ["write -q -P 2 64k 128k", "write -q -P 3 1M 64k", "write -q -z 2M 64k"];
    image(dir, "one.qcow2", Some("root.qcow2"), 4096, &writes);
    // The same at 64 KiB and at 2 MiB, something else at 1 MiB, and more at 3 MiB.
    let writes =
        ["write -q -P 2 64k 128k", "write -q -P 4 1M 64k", "write -q -P 0 2M 64k", "write -q -P 5 3M 64k"];
    image(dir, "two.qcow2", Some("root.qcow2"), 4096, &writes);
    image(dir, "top.qcow2", Some("one.qcow2"), 4096, &["write -q -P 9 3072k 32k", "write -q -P 9 512k 64k"]);
    let before = digest(&dir.join("top.qcow2"), Format::Qcow2);
    let plan = rebase(dir, "top.qcow2", "two.qcow2", &[]);
    assert_eq!(plan["bytes_written"], 64 << 10, "{plan}");
    assert_eq!(plan["rebases"][0]["backing_file"], "two.qcow2");
    assert_eq!(digest(&dir.join("top.qcow2"), Format::Qcow2), before);
    check_clean(&dir.join("top.qcow2"));
    let known = info(&dir.join("top.qcow2"));
    assert_eq!(known["backing-filename"], "two.qcow2");
    assert_eq!(known["backing-filename-format"], "qcow2");
    let plan = rebase(dir, "top.qcow2", "two.qcow2", &[]);
    assert_eq!(plan["bytes_written"], 0, "again is nothing: {plan}");
}

#[test]
fn what_a_short_backing_file_hid_stays_hidden() {
    for (name, options) in [("v3", ""), ("v2", "compat=0.10")] {
        let work = WorkDir::new(name);
        let dir = &*work;
        raw(&dir.join("long.raw"), 4 << 20, &["write -q -P 7 0 4M"]);
        image(dir, "short.qcow2", None, 1024, &["write -q -P 7 0 1M"]);
        let over = Layer { size: 2 << 20, backing: Some(("short.qcow2", Format::Qcow2)), options };
        qcow2(&dir.join("top.qcow2"), over, &["write -q -P 1 0 64k"]);
        let before = digest(&dir.join("top.qcow2"), Format::Qcow2);
        let plan = rebase(dir, "top.qcow2", "long.raw", &["-F", "raw"]);
        assert_eq!(plan["bytes_written"], if name == "v3" { 0 } else { 1 << 20 }, "{name}: {plan}");
        assert_eq!(digest(&dir.join("top.qcow2"), Format::Qcow2), before, "{name}");
        check_clean(&dir.join("top.qcow2"));
        let plan = rebase(dir, "top.qcow2", "none", &[]);
        assert_eq!(digest(&dir.join("top.qcow2"), Format::Qcow2), before, "{name}");
        assert!(info(&dir.join("top.qcow2"))["backing-filename"].is_null(), "{plan}");
    }
}

#[test]
fn every_internal_snapshot_keeps_its_content() {
    let work = WorkDir::new("rebase-snapshots");
    let dir = &*work;
    image(dir, "one.qcow2", None, 1024, &["write -q -P 1 0 1M"]);
    image(dir, "two.qcow2", None, 2048, &["write -q -P 1 0 256k", "write -q -P 2 256k 1M"]);
    image(dir, "top.qcow2", Some("one.qcow2"), 1024, &["write -q -P 3 0 64k"]);
    qemu_img_in(dir, &["snapshot", "-c", "s1", "top.qcow2"]);
    qemu_img_in(dir, &["resize", "-q", "top.qcow2", "1536k"]);
    pleach_testkit::oracle::qemu_io(&dir.join("top.qcow2"), Format::Qcow2, &["write -q -P 4 300k 64k"]);
    qemu_img_in(dir, &["snapshot", "-c", "s2", "top.qcow2"]);
    pleach_testkit::oracle::qemu_io(&dir.join("top.qcow2"), Format::Qcow2, &["write -q -P 5 700k 64k"]);
    // Applied, not converted: only then the state has the size that it had.
    let states = || {
        ["s1", "s2"].map(|s| {
            std::fs::copy(dir.join("top.qcow2"), dir.join("copy.qcow2")).unwrap();
            qemu_img_in(dir, &["snapshot", "-a", s, "copy.qcow2"]);
            digest(&dir.join("copy.qcow2"), Format::Qcow2)
        })
    };
    let (active, inside) = (digest(&dir.join("top.qcow2"), Format::Qcow2), states());
    rebase(dir, "top.qcow2", "two.qcow2", &[]);
    check_clean(&dir.join("top.qcow2"));
    assert_eq!((digest(&dir.join("top.qcow2"), Format::Qcow2), states()), (active, inside));
}

#[test]
fn names_stay_relative_or_absolute_and_unsafe_changes_nothing_else() {
    let work = WorkDir::new("rebase-names");
    let dir = &*work;
    std::fs::create_dir(dir.join("sub")).unwrap();
    image(dir, "a.qcow2", None, 1024, &["write -q -P 1 0 64k"]);
    image(&dir.join("sub"), "b.qcow2", None, 1024, &["write -q -P 2 0 64k"]);
    image(dir, "top.qcow2", Some("a.qcow2"), 1024, &[]);
    let base = dir.join("sub/b.qcow2");
    let before = digest(&dir.join("top.qcow2"), Format::Qcow2);
    rebase(dir, "top.qcow2", text(&base), &[]);
    assert_eq!(info(&dir.join("top.qcow2"))["backing-filename"], "sub/b.qcow2");
    assert_eq!(digest(&dir.join("top.qcow2"), Format::Qcow2), before);
    let plan = rebase(dir, "top.qcow2", "a.qcow2", &["--unsafe"]);
    assert_eq!(plan["bytes_written"], 0);
    assert_eq!(info(&dir.join("top.qcow2"))["backing-filename"], "a.qcow2");
    rebase(dir, "top.qcow2", "gone.qcow2", &["--unsafe", "-F", "qcow2"]);
    assert_eq!(info(&dir.join("top.qcow2"))["backing-filename"], "gone.qcow2");
    rebase(dir, "top.qcow2", "none", &["--unsafe"]);
    rebase(dir, "top.qcow2", text(&dir.join("a.qcow2")), &[]);
    assert_eq!(info(&dir.join("top.qcow2"))["backing-filename"], text(&dir.join("a.qcow2")));
}

#[test]
fn what_cannot_be_right_is_refused_and_nothing_changes() {
    let work = WorkDir::new("rebase-refused");
    let dir = &*work;
    image(dir, "a.qcow2", None, 1024, &["write -q -P 1 0 64k"]);
    image(dir, "b.qcow2", Some("a.qcow2"), 1024, &[]);
    image(dir, "c.qcow2", Some("b.qcow2"), 1024, &[]);
    raw(&dir.join("r.raw"), 1 << 20, &["write -q -P 2 0 64k"]);
    let before = listing(dir);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["a.qcow2", "--onto", "c.qcow2", "-y"], 2, "stand on itself"),
        (&["b.qcow2", "--onto", "b.qcow2", "-y"], 2, "stand on itself"),
        (&["c.qcow2", "--onto", "a.qcow2"], 9, "confirmed"),
        (&["c.qcow2", "--onto", "none.qcow2", "-y"], 7, "none.qcow2"),
        (&["c.qcow2", "--onto", "a.qcow2", "-F", "raw", "-y"], 6, "qcow2"),
        (&["c.qcow2", "--onto", "none.qcow2", "--unsafe", "-y"], 2, "-F"),
        (&["r.raw", "--onto", "a.qcow2", "-y"], 7, "not a qcow2 image"),
    ];
    for (args, code, word) in cases {
        let path = dir.join(args[0]);
        let mut all = vec!["rebase", text(&path)];
        all.extend(&args[1..]);
        let outcome = Tool::new(PLEACH).run(&all);
        assert_eq!(outcome.code, Some(*code), "{args:?}: {}", outcome.text());
        assert!(outcome.text().contains(word), "{args:?}: {}", outcome.text());
        assert_eq!(listing(dir), before, "{args:?}");
    }
}
