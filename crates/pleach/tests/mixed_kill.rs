//! SIGKILL at random moments of operations on several disks: every snapshot that stays reads right at once by stock QEMU;
//! after `resume` or `undo` all disks are as before or all as after, never mixed.
//!
//! `PLEACH_LONG=1` kills more often; `PLEACH_SEED=…` draws other moments, `PLEACH_KEEP=1` keeps the files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod history;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use history::{History, PLEACH, images};
use pleach_testkit::files::{copy_dir, listing};
use pleach_testkit::oracle::{self, Digest, text};
use pleach_testkit::{Format, OnFailure, Rng, Tool, WorkDir, chosen_seed, long_mode};

/// Everything that can be known of a tree: parents and contents of nodes, what is current.
type State = BTreeMap<String, (Option<String>, BTreeMap<String, Digest>)>;

const OPERATIONS: &[&[&str]] = &[
    &["snapshot", "n", "--external"],
    &["snapshot", "n", "--internal"],
    &["snapshot", "n", "--kind", "vda=internal", "--kind", "vdb=external"],
    &["revert", "s1", "--discard", "--yes"],
    &["revert", "s2", "--save-as", "n", "--yes"],
    &["delete", "s1", "--yes"],
    &["delete", "s2", "--yes"],
    &["delete", "s3", "--yes"],
    &["delete", "s3", "--yes", "--keep", "parent"],
    &["delete", "s2", "--children", "--yes"],
    &["rename", "s2", "n"],
];

#[test]
fn all_disks_are_old_or_all_are_new() {
    let seed = chosen_seed().unwrap_or(0x4b1);
    let _seed = OnFailure::print_seed(seed, "mixed_kill");
    let rng = &mut Rng::new(seed);
    let work = WorkDir::new("mixed-kill");
    let mut history = History::new(rng, work.join("tree"), &["vda", "vdb"]);
    for (name, kind) in [("s1", "--external"), ("s2", "--internal"), ("s3", "--external")] {
        history.write(rng, "vda");
        history.write(rng, "vdb");
        history.snapshot(name, &[kind]);
    }
    history.write(rng, "vda");
    history.write(rng, "vdb");
    history.check();
    let (before, was) = (state(&history.dir), places(&history.dir));
    for operation in OPERATIONS {
        let there = work.join("copy");
        copy_dir(&history.dir, &there);
        let done = start(&there, operation).kill_after(Duration::from_secs(600));
        assert_eq!(done.code, Some(0), "{done}");
        let (after, will) = (state(&there), places(&there));
        assert_ne!(before, after, "{operation:?}");
        std::fs::remove_dir_all(&there).unwrap();
        for n in 0..if long_mode() { 200 } else { 4 } {
            copy_dir(&history.dir, &there);
            let delay = done.elapsed.mul_f64(f64::from(u32::try_from(rng.below(1000)).unwrap()) / 1000.0);
            let killed = start(&there, operation).kill_after(delay);
            let mut what = vec![format!("{killed}")];
            found(&there, &before, [&was, &will], &what[0]);
            let dir = text(&there);
            if n % 2 == 0 {
                let undone = Tool::fastest(PLEACH).0.run(&["undo", dir]);
                what.push(format!("{undone}"));
                assert!(matches!(undone.code, Some(0 | 6)), "{}", what.join("\n"));
            }
            let resumed = Tool::fastest(PLEACH).0.run(&["resume", dir]);
            what.push(format!("{resumed}"));
            assert_eq!(resumed.code, Some(0), "{}", what.join("\n"));
            let now = state(&there);
            assert!(now == before || now == after, "{operation:?}\n{}\n{now:#?}", what.join("\n"));
            for image in images(&there) {
                oracle::check_clean(&image);
            }
            let left: Vec<_> = listing(&there).into_iter().filter(|f| f.0.ends_with(".partial")).collect();
            assert!(left.is_empty(), "{operation:?}\n{}\n{left:?}", what.join("\n"));
            std::fs::remove_dir_all(&there).unwrap();
        }
    }
}

/// Where each snapshot keeps each disk: the file, and the id of a snapshot inside it.
type Places = BTreeMap<(String, String), (String, Option<String>)>;

fn places(dir: &Path) -> Places {
    let tree = Tool::fastest(PLEACH).0.json(&["tree", text(&dir.join(".pleach/vm.tree")), "--json"]);
    let mut places = Places::new();
    for node in tree["nodes"].as_array().unwrap().iter().filter(|node| node["kind"] != "head") {
        for (disk, storage) in node["storage"].as_object().unwrap() {
            let word = |key: &str| storage[key].as_str().map(str::to_owned);
            let name = node["name"].as_str().unwrap().to_owned();
            places.insert((name, disk.clone()), (word("file").unwrap(), word("id")));
        }
    }
    places
}

/// Before anything else is run: every snapshot that stays reads right by stock QEMU, where it was or where it will be, and no
/// image has an error that its dirty bit does not explain.
fn found(dir: &Path, before: &State, [was, will]: [&Places; 2], what: &str) {
    for image in images(dir) {
        let check = oracle::check(&image, Format::Qcow2);
        let dirty = || oracle::info(&image)["dirty-flag"] == true;
        assert!(check.is_safe() || dirty(), "{what}: {image:?}: {}", check.text);
    }
    for (key, place) in was {
        let Some(later) = will.get(key) else { continue };
        let reads = |(file, id): &(String, Option<String>)| match id {
            Some(id) => oracle::try_snapshot_digest(&dir.join(file), id),
            None => oracle::try_digest(&dir.join(file), Format::Qcow2),
        };
        let wanted = before[&key.0].1[&key.1];
        assert!(
            reads(place) == Ok(wanted) || reads(later) == Ok(wanted),
            "{what}: {key:?} at {place:?} or {later:?}"
        );
    }
}

fn start(dir: &Path, operation: &[&str]) -> pleach_testkit::tool::Running {
    let catalog = dir.join(".pleach/vm.tree");
    let mut words = operation.to_vec();
    words.insert(1, text(&catalog));
    Tool::fastest(PLEACH).0.spawn(&words)
}

fn state(dir: &Path) -> State {
    let tree = Tool::fastest(PLEACH).0.json(&["tree", text(&dir.join(".pleach/vm.tree")), "--json"]);
    assert_eq!(tree["differences"], serde_json::json!([]), "{tree}");
    let word = |v: &serde_json::Value| v.as_str().map(str::to_owned);
    let mut state = State::new();
    for node in tree["nodes"].as_array().unwrap() {
        let mut content = BTreeMap::new();
        for (disk, storage) in node["storage"].as_object().unwrap() {
            let file = dir.join(storage["file"].as_str().unwrap());
            let digest = match storage["id"].as_str() {
                Some(id) => oracle::try_snapshot_digest(&file, id).unwrap(),
                None => oracle::digest(&file, Format::Qcow2),
            };
            content.insert(disk.clone(), digest);
        }
        let head = node["kind"] == "head";
        let name = if head { "(the head)".to_owned() } else { word(&node["name"]).unwrap() };
        state.insert(name, (word(&node["parent"]), content));
    }
    state.insert("(current)".to_owned(), (word(&tree["current"]), BTreeMap::new()));
    state
}
