//! `pleach demo`: the first thing that anybody runs, and it proves itself.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pleach_testkit::oracle::{self, text};
use pleach_testkit::tool::Running;
use pleach_testkit::{Format, Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

#[test]
fn demo_ends_in_time_with_equal_digests_and_clean_images() {
    let work = WorkDir::new("demo");
    let dir = work.join("demo");
    let outcome = Tool::new(PLEACH).succeed(&["demo", text(&dir)]);
    assert!(outcome.elapsed < Duration::from_secs(20), "{outcome}");

    let mut digests: BTreeMap<String, usize> = BTreeMap::new();
    for word in outcome.stdout.split(|c: char| !c.is_ascii_alphanumeric()) {
        // Long enough for a digest, also where only the start of it is shown.
        if word.len() >= 16
            && word.chars().all(|c| c.is_ascii_hexdigit())
            && word.chars().any(|c| !c.is_numeric())
        {
            *digests.entry(word.to_owned()).or_default() += 1;
        }
    }
    assert!(digests.len() >= 4, "the nodes that survive are A, C, D, E and more: {digests:?} in {outcome}");
    assert!(
        digests.values().all(|times| *times >= 2),
        "a digest was printed once only: {digests:?} in {outcome}"
    );

    let images = images_below(&dir);
    assert!(images.len() >= 3, "few images are left: {images:?}, {outcome}");
    for image in &images {
        oracle::check_clean(image);
        let _ = oracle::digest(image, Format::Qcow2);
    }
}

/// Without a directory it finds a place of its own; here both candidates lie in the test's directory.
#[test]
fn demo_needs_no_directory() {
    let work = WorkDir::new("demo-nowhere");
    let mut command = std::process::Command::new(PLEACH);
    command.arg("demo").current_dir(&*work).env("TMPDIR", &*work);
    let outcome = Running::start(command).finish(Duration::from_secs(60));
    assert_eq!(outcome.code, Some(0), "{outcome}");
}

/// Files below `dir` that start with the qcow2 magic.
fn images_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(images_below(&path));
        } else if fs::read(&path).unwrap().starts_with(b"QFI\xfb") {
            found.push(path);
        }
    }
    found
}
