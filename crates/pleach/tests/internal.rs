//! Internal snapshots through the engine: QEMU sees what was done, and a state that others read is not replaced.
#![allow(clippy::unwrap_used, reason = "tests")]

use pleach_engine::survey::{Survey, Trust};
use pleach_engine::{ErrorKind, internal::Internal};
use pleach_image::NewSnapshot;
use pleach_store::RealDisk;
use pleach_testkit::files::patch;
use pleach_testkit::oracle::{self, Format, check_clean, info, qemu_img, qemu_io, text};
use pleach_testkit::{Tool, WorkDir};

fn named(name: &str) -> NewSnapshot {
    NewSnapshot { name: name.into(), date: (1_795_390_348, 0), ..NewSnapshot::default() }
}

#[test]
fn snapshots_are_taken_applied_renamed_and_deleted() {
    if !oracle::available() {
        return;
    }
    let work = WorkDir::new("internal");
    let path = work.join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "8M"]);
    qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 3M"]);
    let digest = oracle::digest(&path, Format::Qcow2);
    let image = Internal::open(&RealDisk, &path).unwrap();
    assert_eq!(image.take(&named("first")).unwrap(), b"1");
    assert_eq!(Internal::open(&RealDisk, &path).unwrap_err().kind, ErrorKind::InUse);
    image.close().unwrap();
    check_clean(&path);
    qemu_io(&path, Format::Qcow2, &["write -q -P 2 1M 4M"]);
    assert_ne!(oracle::digest(&path, Format::Qcow2), digest);

    let image = Internal::open(&RealDisk, &path).unwrap();
    image.rename(b"first", b"1st").unwrap();
    assert_eq!(image.apply(b"first").unwrap_err().kind, ErrorKind::NotFound);
    image.apply(b"1st").unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(oracle::digest(&path, Format::Qcow2), digest);
    assert_eq!(info(&path)["snapshots"][0]["name"], "1st");

    let image = Internal::open(&RealDisk, &path).unwrap();
    image.delete(b"1").unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(oracle::digest(&path, Format::Qcow2), digest);
    assert!(info(&path)["snapshots"].is_null());
}

/// A damaged image is found before anything is written, and nothing is left that others would stumble over.
#[test]
fn what_is_refused_leaves_nothing_unfinished() {
    if !oracle::available() {
        return;
    }
    let work = WorkDir::new("internal");
    let (bad, good) = (work.join("bad.qcow2"), work.join("good.qcow2"));
    for path in [&bad, &good] {
        qemu_img(&["create", "-q", "-f", "qcow2", text(path), "4M"]);
        qemu_io(path, Format::Qcow2, &["write -q -P 1 0 1M"]);
    }
    qemu_img(&["snapshot", "-c", "s", text(&bad)]);
    let whole = std::fs::read(&bad).unwrap();
    let run = |args: &[&str]| Tool::new(env!("CARGO_BIN_EXE_pleach")).run(args);
    // The corrupt bit; a count that is too low.
    for (at, bytes) in [(79, &[2][..]), ((2 << 16) + 12, &[0, 0])] {
        patch(&bad, at, bytes);
        let before = std::fs::read(&bad).unwrap();
        for args in [&["snapshot", text(&bad), "t", "--internal"][..], &["delete", text(&bad), "s", "-y"]] {
            let done = run(args);
            assert!(matches!(done.code, Some(1 | 4)), "{args:?}: {}", done.stderr);
            assert!(!done.stderr.contains("resume"), "{}", done.stderr);
            assert!(std::fs::read(&bad).unwrap() == before);
            assert_eq!(std::fs::read_dir(work.join("")).unwrap().count(), 2);
        }
        std::fs::write(&bad, &whole).unwrap();
    }
    assert_eq!(run(&["snapshot", text(&good), "t", "--internal"]).code, Some(0));
}

#[test]
fn a_state_that_others_read_is_not_replaced() {
    if !oracle::available() {
        return;
    }
    let work = WorkDir::new("internal");
    let (path, over) = (work.join("disk.qcow2"), work.join("over.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "8M"]);
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    let check = || {
        let survey = Survey::of_directories(&RealDisk, &[work.join("")], &Trust::default()).unwrap();
        Internal::open(&RealDisk, &path).unwrap().check_apply(&RealDisk, &survey)
    };
    check().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", text(&over)]);
    let refused = check().unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Refused);
    assert!(refused.message.contains("over.qcow2"), "{}", refused.message);
}

#[test]
fn images_that_can_have_no_snapshots_are_refused() {
    if !oracle::available() {
        return;
    }
    let work = WorkDir::new("internal");
    for options in ["refcount_bits=1", &format!("data_file={}", text(&work.join("data.raw")))] {
        let path = work.join("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "8M"]);
        qemu_io(&path, Format::Qcow2, &["write -q -P 1 0 3M"]);
        let image = Internal::open(&RealDisk, &path).unwrap();
        assert!(image.take(&named("s")).is_err(), "{options}");
        image.close().unwrap();
        check_clean(&path);
        assert!(info(&path)["snapshots"].is_null(), "{options}");
    }
}
