//! `pleach check` against `qemu-img check`: the golden images, and copies of them with one thing broken.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pleach_testkit::oracle::text;
use pleach_testkit::{OnFailure, Rng, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// What a check says: qemu-img's exit code, errors, leaks, and the figures where all is well.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    code: i32,
    errors: u64,
    leaks: u64,
    figures: Vec<u64>,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden")
}

fn images() -> Vec<PathBuf> {
    let entries = fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path());
    let mut images: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == "qcow2")).collect();
    images.sort();
    images
}

/// `None` if qemu-img cannot open or finish checking the image.
fn qemu(path: &Path) -> Option<Verdict> {
    let mut command = Command::new("qemu-img");
    // Data file names are relative to the working directory.
    command.current_dir(path.parent().unwrap()).args(["check", "--output=json", "-f", "qcow2", text(path)]);
    let output = command.output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).ok()?;
    let field = |key: &str| json.get(key).and_then(Value::as_u64).unwrap_or(0);
    if field("check-errors") > 0 {
        return None;
    }
    let keys = [
        "allocated-clusters",
        "compressed-clusters",
        "fragmented-clusters",
        "total-clusters",
        "image-end-offset",
    ];
    Some(Verdict {
        code: output.status.code().unwrap(),
        errors: field("corruptions"),
        leaks: field("leaks"),
        figures: keys.map(field).to_vec(),
    })
}

fn pleach(path: &Path) -> Option<Verdict> {
    let outcome = Tool::new(PLEACH).run(&["check", text(path), "--json"]);
    let json = outcome.json();
    let image = json.get("images")?.get(0)?.clone();
    let field = |key: &str| image[key].as_u64().unwrap_or_else(|| panic!("no {key}: {outcome}"));
    let keys = [
        "allocated_clusters",
        "compressed_clusters",
        "fragmented_clusters",
        "total_clusters",
        "image_end_offset",
    ];
    let found = image["findings"].as_array().unwrap().len() as u64;
    let (errors, leaks) = (field("errors"), field("leaks"));
    assert!(found > 0 || errors + leaks == 0, "every error has a finding: {outcome}");
    // Ours tells corruption by 4; qemu-img says 2.
    let code = match outcome.code.unwrap() {
        4 => 2,
        other => other,
    };
    Some(Verdict { code, errors, leaks, figures: keys.map(field).to_vec() })
}

#[test]
fn golden_images_are_judged_as_qemu_img_judges_them() {
    let mut compared = 0;
    for path in images() {
        let (theirs, ours) = (qemu(&path), pleach(&path));
        assert_eq!(ours, theirs, "{}", path.display());
        compared += 1;
    }
    assert!(compared > 40, "{compared}");
}

/// The verdict is the same; counts too where only counts are wrong. A pointer out of the file is one error here: qemu-img
/// also reports that its COPIED flag does not fit the count of a cluster that is not there.
#[test]
fn damage_is_judged_as_qemu_img_judges_it() {
    let work = WorkDir::new("damage");
    // Backing and data files are named by the images.
    pleach_testkit::files::copy_dir(&golden(), &work.join("golden"));
    let all: Vec<PathBuf> = images()
        .into_iter()
        .map(|p| work.join("golden").join(p.file_name().unwrap()))
        .filter(|p| !text(p).contains("data-file") && !text(p).contains("dirty"))
        .collect();
    let (mut wrong, mut clean, mut leaks) = (0, 0, 0);
    for seed in 0..200 {
        let on_failure = OnFailure::print_seed(seed, "check");
        let rng = &mut Rng::new(seed);
        let path: &PathBuf = rng.pick(&all);
        let whole = fs::read(path).unwrap();
        let mut bytes = whole.clone();
        let what = break_something(rng, &mut bytes);
        fs::write(path, &bytes).unwrap();
        let (theirs, ours) = (qemu(path), pleach(path));
        fs::write(path, &whole).unwrap();
        let Some(theirs) = theirs else { continue };
        let ours = ours.unwrap_or_else(|| panic!("{what}: qemu-img says {theirs:?}, pleach cannot check"));
        assert_eq!(
            ours.code,
            theirs.code,
            "{what} in {}: qemu-img says {theirs:?}, pleach {ours:?}",
            path.display()
        );
        match theirs.code {
            0 => clean += 1,
            3 => {
                leaks += 1;
                assert_eq!(ours.leaks, theirs.leaks, "{what} in {}", path.display());
            }
            _ => wrong += 1,
        }
        drop(on_failure);
    }
    assert!(
        wrong > 50 && clean > 3 && leaks > 3,
        "{wrong} wrong, {clean} clean, {leaks} leaky: too few of a kind"
    );
}

/// Changes one field of a structure, and says which.
fn break_something(rng: &mut Rng, bytes: &mut [u8]) -> String {
    let word = |bytes: &[u8], at: usize| -> u64 {
        bytes.get(at..at + 8).map_or(0, |w| u64::from_be_bytes(w.try_into().unwrap()))
    };
    let offset = |value: u64| usize::try_from(value & 0x00ff_ffff_ffff_fe00).unwrap();
    let cluster = 1usize << bytes[23];
    let (l1, table) = (offset(word(bytes, 40)), offset(word(bytes, 48)));
    let l1_size = usize::try_from(word(bytes, 36) >> 32).unwrap();
    let l2: Vec<usize> =
        (0..l1_size).map(|i| offset(word(bytes, l1 + 8 * i))).filter(|&at| at != 0).collect();
    let kind = rng.below(6);
    let (name, at, mask) = match kind {
        0 if l1_size > 0 => ("L1 bit", l1 + 8 * rng.index(l1_size), 1 << rng.below(64)),
        1 | 2 if !l2.is_empty() => {
            let table = *rng.pick(&l2);
            let used: Vec<usize> =
                (0..cluster / 8).map(|i| table + 8 * i).filter(|&at| word(bytes, at) != 0).collect();
            let at = if used.is_empty() { table } else { *rng.pick(&used) };
            if kind == 1 { ("L2 bit", at, 1 << rng.below(64)) } else { ("L2 COPIED", at, 1 << 63) }
        }
        3 => ("refcount table bit", table, 1 << rng.below(64)),
        _ => {
            let block = offset(word(bytes, table));
            ("refcount", block + 8 * rng.index(8), rng.bits() & rng.bits() & rng.bits())
        }
    };
    let new = word(bytes, at) ^ mask;
    if let Some(field) = bytes.get_mut(at..at + 8) {
        field.copy_from_slice(&new.to_be_bytes());
    }
    format!("{name} at {at:#x}, {mask:#x}")
}
