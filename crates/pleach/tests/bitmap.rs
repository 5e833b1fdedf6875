//! `pleach bitmap`: stock QEMU sees the bitmaps that were asked for, and goes on recording in them.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::oracle::{self, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::{Value, json};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

fn pleach(args: &[&str]) {
    Tool::new(PLEACH).succeed(&[&["bitmap"][..], args].concat());
}

/// Name, granularity, flags: what QEMU says.
fn seen(path: &Path) -> Vec<(String, u64, Value)> {
    let info = oracle::info(path);
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let field = |b: &Value| {
        let name = b["name"].as_str().unwrap().to_owned();
        (name, b["granularity"].as_u64().unwrap(), b["flags"].clone())
    };
    bitmaps.iter().map(field).collect()
}

/// Guest bytes that are dirty: what we say.
fn dirty(path: &Path, name: &str) -> Value {
    let list = Tool::new(PLEACH).json(&["bitmap", "list", text(path), "--json"]);
    let found = list["bitmaps"].as_array().unwrap().iter().find(|b| b["name"] == name);
    found.unwrap_or_else(|| panic!("{list}"))["dirty_bytes"].clone()
}

#[test]
fn every_verb_is_what_qemu_sees() {
    let work = WorkDir::new("bitmap");
    // Small clusters have no feature table, larger ones push the extension out of the first sector; a backing file's name
    // has to move for it.
    for options in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M"] {
        for backing in [false, true] {
            let path = work.join(format!("{options}-{backing}.qcow2"));
            qemu_img(&["create", "-q", "-f", "raw", text(&work.join("base.raw")), "4M"]);
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
            if backing {
                args.extend(["-b", "base.raw", "-F", "raw"]);
            }
            args.extend([text(&path), "4M"]);
            qemu_img(&args);
            let image = text(&path);

            pleach(&["add", image, "a"]);
            pleach(&["add", image, "b", "--granularity", "128k", "--disabled"]);
            let default = oracle::info(&path)["cluster-size"].as_u64().unwrap().clamp(4096, 65536);
            let wanted = [("a".to_owned(), default, json!(["auto"])), ("b".to_owned(), 128 << 10, json!([]))];
            assert_eq!(seen(&path), wanted, "{options}");
            qemu_io(&path, Format::Qcow2, &["write -q -P 7 1M 256k"]);
            assert_eq!((dirty(&path, "a"), dirty(&path, "b")), (json!(256 << 10), json!(0)));

            pleach(&["merge", image, "b", "--from", "a"]);
            pleach(&["clear", image, "a"]);
            assert_eq!((dirty(&path, "a"), dirty(&path, "b")), (json!(0), json!(256 << 10)));
            pleach(&["disable", image, "a"]);
            pleach(&["enable", image, "b"]);
            qemu_io(&path, Format::Qcow2, &["write -q -P 7 0 128k"]);
            assert_eq!((dirty(&path, "a"), dirty(&path, "b")), (json!(0), json!(384 << 10)));
            // QEMU can use what we wrote.
            qemu_img(&["bitmap", "--merge", "b", image, "a"]);
            assert_eq!(dirty(&path, "a"), json!(384 << 10));
            pleach(&["remove", image, "a"]);
            pleach(&["remove", image, "b"]);
            assert_eq!(seen(&path), []);
            oracle::check_clean(&path);
            assert_eq!(
                oracle::info(&path)["backing-filename"],
                if backing { json!("base.raw") } else { Value::Null }
            );
        }
    }
}

#[test]
fn a_bitmap_comes_from_another_image() {
    let work = WorkDir::new("bitmap-merge");
    let (a, b) = (work.join("a.qcow2"), work.join("b.qcow2"));
    for path in [&a, &b] {
        qemu_img(&["create", "-q", "-f", "qcow2", text(path), "4M"]);
        qemu_img(&["bitmap", "--add", text(path), "x"]);
    }
    qemu_io(&b, Format::Qcow2, &["write -q -P 7 1M 64k"]);
    pleach(&["merge", text(&a), "x", "--from", "x", "--source-file", text(&b)]);
    assert_eq!(dirty(&a, "x"), json!(64 << 10));
}

#[test]
fn what_cannot_be_is_said() {
    let work = WorkDir::new("bitmap-refused");
    let (new, old) = (work.join("new.qcow2"), work.join("old.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", text(&new), "4M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", text(&old), "4M"]);
    let empty = work.join("empty.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&empty), "0"]);
    pleach(&["add", text(&new), "a"]);
    let before = oracle::hash_file(&new).unwrap();
    let long = "n".repeat(1024);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["add", text(&new), "a"], 1, "already"),
        (&["add", text(&new), ""], 1, "1 to 1023"),
        (&["add", text(&new), &long], 1, "1 to 1023"),
        (&["add", text(&new), "g", "--granularity", "100"], 1, "power of two"),
        (&["add", text(&old), "a"], 1, "version 2"),
        (&["add", text(&empty), "a"], 1, "0 bytes"),
        (&["remove", text(&new), "b"], 7, "no bitmap"),
        (&["merge", text(&new), "a", "--from", "b"], 7, "no bitmap"),
    ];
    for (args, code, words) in cases {
        let outcome = Tool::new(PLEACH).run(&[&["bitmap"][..], args].concat());
        assert_eq!(outcome.code, Some(*code), "{args:?}: {}", outcome.text());
        assert!(outcome.text().contains(words), "{args:?}: {}", outcome.text());
    }
    assert_eq!(oracle::hash_file(&new).unwrap(), before);
}

/// An inconsistent bitmap can only be removed, and keeps the image from being resized.
#[test]
fn t34_inconsistent_bitmaps() {
    let work = WorkDir::new("bitmap-in-use");
    let path = work.join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    qemu_img(&["bitmap", "--add", text(&path), "a"]);
    // As a crash leaves it: marked in use in the directory.
    let mut bytes = std::fs::read(&path).unwrap();
    let header = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
    let directory = u64::from_be_bytes(bytes[header + 24..header + 32].try_into().unwrap());
    let flags = usize::try_from(directory).unwrap() + 15;
    bytes[flags] |= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(seen(&path)[0].2, json!(["in-use", "auto"]));
    for args in [&["bitmap", "clear"][..], &["bitmap", "enable"], &["bitmap", "disable"]] {
        let outcome = Tool::new(PLEACH).run(&[args, &[text(&path), "a"]].concat());
        assert_eq!(outcome.code, Some(1), "{args:?}: {}", outcome.text());
    }
    assert_eq!(dirty(&path, "a"), Value::Null);
    let refused = Tool::new(PLEACH).run(&["resize", text(&path), "8M"]);
    assert!(refused.text().contains("inconsistent"), "{}", refused.text());
    pleach(&["remove", text(&path), "a"]);
    Tool::new(PLEACH).succeed(&["resize", text(&path), "8M"]);
    oracle::check_clean(&path);
}

/// Where the name of the backing file leaves no room, nothing is written.
#[test]
fn without_room_in_the_header_nothing_happens() {
    let work = WorkDir::new("bitmap");
    let (base, path) = (work.join("base.raw"), work.join("image.qcow2"));
    qemu_img(&["create", "-q", "-f", "raw", text(&base), "64k"]);
    for len in [350, 370, 376] {
        let name = format!("{}{}", "./".repeat((len - 8) / 2), "base.raw");
        let options = format!("cluster_size=512,backing_file={name},backing_fmt=raw");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "64k"]);
        let before = std::fs::read(&path).unwrap();
        let done = Tool::new(PLEACH).run(&["bitmap", "add", text(&path), "b"]);
        assert!(matches!(done.code, Some(1 | 8)), "{len}: {:?} {}", done.code, done.stderr);
        assert!(std::fs::read(&path).unwrap() == before, "{len}");
        std::fs::remove_file(&path).unwrap();
    }
}
