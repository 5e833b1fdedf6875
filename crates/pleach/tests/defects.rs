//! What libvirt 11.3.0 gets wrong on real images, step by step: here every node reads right after every step.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod history;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use history::{History, PLEACH};
use pleach_lineage::Record;
use pleach_testkit::files::listing;
use pleach_testkit::oracle::{digest, info, qemu_img_in, qemu_io, text};
use pleach_testkit::tool::Running;
use pleach_testkit::{Format, Outcome, Rng, Tool, WorkDir};

/// A new tree with one disk, or two.
fn tree(work: &WorkDir, disks: &[&str]) -> (History, Rng) {
    let mut rng = Rng::new(7);
    let history = History::new(&mut rng, work.join("tree"), disks);
    (history, rng)
}

/// Changes the catalog behind the tool's back.
fn edit(history: &History, change: impl FnOnce(&mut Record)) {
    let mut record = Record::parse(&fs::read(&history.catalog).unwrap()).unwrap();
    change(&mut record);
    fs::write(&history.catalog, record.encode()).unwrap();
}

/// The steps of each row: `ext NAME`, `int NAME`, `revert NAME`, `delete NAME [FLAG]`. Something is written before each.
#[test]
fn histories_in_which_data_were_lost() {
    let rows = [
        ("D1", "ext p, ext x, revert p, ext y, delete y, revert x, revert p"),
        ("D2", "ext s1, ext s2, ext s3, revert s1, revert s3, revert s2"),
        ("D3", "ext s1, ext s2, ext s3, ext s4, revert s3, ext b4, delete s2, revert s4"),
        ("D6", "int S, int B, revert S, int A, int G, delete S --children-only"),
        ("D6, mixed", "int S, ext B, revert S, int A, ext G, delete S --children-only, ext T"),
        ("D6, with a parent", "int R, int S, int B, revert S, int A, int G, delete S --children"),
        ("D9", "int i1, ext s2, revert i1, ext t, revert s2, revert i1"),
        ("D11", "ext s1, int i1, ext s2, delete s1, revert i1, revert s2"),
        ("R1", "ext s1, ext s2, revert s1, ext s3, revert s1, ext s4, delete s1"),
        ("R2", "ext s1, ext s2, revert s1, delete s1"),
        ("R3", "ext s1, ext s2, ext s3, revert s1, ext b, delete s2"),
        ("R4", "ext s1, ext s2, delete s2 --children, ext s3"),
        ("R5", "ext s1, ext s2, ext s3, delete s1 --children-only, ext s4"),
        ("R6", "ext s1, int s2, ext s3, delete s1 --children-only, ext s4"),
        ("R7", "int i1, ext s2, ext s3, delete s2, revert i1, revert s3"),
        ("R7, at the end", "int i1, ext s2, delete s2, revert i1"),
        ("R8", "int i1, ext s2, delete i1, revert s2"),
        (
            "the state of a file goes, its snapshot stays",
            "int i1, ext s2, revert s2, ext s3, delete s2, delete i1",
        ),
        ("back and forth within one second", "ext s1, revert s1, revert s1, revert s1, ext s2, revert s1"),
    ];
    for (row, steps) in rows {
        let work = WorkDir::new("defects");
        let (mut history, mut rng) = tree(&work, &["vda"]);
        history.log.push(row.to_owned());
        for step in steps.split(", ") {
            history.write(&mut rng, "vda");
            match step.split(' ').collect::<Vec<_>>().as_slice() {
                ["ext", name] => history.snapshot(name, &["--external"]),
                ["int", name] => history.snapshot(name, &["--internal"]),
                ["revert", name] => history.revert(name, None),
                ["delete", name, flags @ ..] => history.delete(name, flags),
                other => panic!("{other:?}"),
            }
            history.check();
        }
    }
}

#[test]
fn current_is_what_the_images_stand_on() {
    // D2: to call another snapshot current would make the next revert throw away the wrong file.
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    for name in ["s1", "s2", "s3"] {
        history.write(&mut rng, "vda");
        history.snapshot(name, &[]);
    }
    let catalog = history.catalog.clone();
    history.refused(&["current", &catalog, "s1"]);
    // D10: nobody says what is current.
    edit(&history, |record| record.current = None);
    history.revert("s1", None);
    history.check();
    edit(&history, |record| record.current = None);
    history.delete("s2", &[]);
    history.check();
}

#[test]
fn a_state_with_two_nodes_goes_with_the_last_one() {
    // D5: a second record of one state.
    for kind in ["--external", "--internal"] {
        let work = WorkDir::new("defects");
        let (mut history, mut rng) = tree(&work, &["vda"]);
        for name in ["s1", "s2"] {
            history.write(&mut rng, "vda");
            history.snapshot(name, &[kind]);
        }
        for flags in [&[][..], &["--children"]] {
            edit(&history, |record| {
                let mut clone = record.find("s2").unwrap().clone();
                clone.name = "clone".to_owned();
                record.nodes.push(clone);
            });
            let catalog = history.catalog.clone();
            history.pleach(&[&["delete", &catalog, "clone", "--yes"], flags].concat());
            history.check();
        }
    }
}

#[test]
fn what_stands_on_one_of_two_nodes_with_one_state_stands_on_the_other() {
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    for name in ["s1", "s2", "s3"] {
        history.write(&mut rng, "vda");
        history.snapshot(name, &[]);
    }
    let catalog = history.catalog.clone();
    for current in ["s3", "s2"] {
        edit(&history, |record| {
            assert_eq!(record.current.as_deref(), Some(current));
            let mut twin = record.find("s2").unwrap().clone();
            twin.name = "twin".to_owned();
            record.nodes.push(twin);
        });
        let deleted = Tool::new(PLEACH).run(&["delete", &catalog, "s2", "--yes"]);
        assert!(deleted.code == Some(0) && deleted.stderr.contains("twin"), "{deleted}");
        history.pleach(&["rename", &catalog, "twin", "s2"]);
        history.check();
        history.revert("s2", None);
        history.check();
    }
}

#[test]
fn what_only_the_catalog_forgets_is_still_protected() {
    // D4: records deleted, and made again without current.
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    for name in ["s1", "s2"] {
        history.write(&mut rng, "vda");
        history.snapshot(name, &[]);
    }
    history.write(&mut rng, "vda");
    let catalog = history.catalog.clone();
    for name in ["s2", "s1"] {
        history.pleach(&["delete", &catalog, name, "--metadata", "--yes"]);
        history.model.delete(name);
        history.check();
    }
    history.snapshot("s3", &[]);
    history.delete("s3", &[]);
    history.check();
}

#[test]
fn names() {
    // D7: a name too long for its file; and what else a name may have.
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    let catalog = history.catalog.clone();
    history.refused(&["snapshot", &catalog, &"x".repeat(256), "--internal"]);
    history.refused(&["snapshot", &catalog, ""]);
    let long = "x".repeat(248);
    for (n, name) in [long.as_str(), " ", "-", "a/b", ".", "..", "\n\u{1b}[31m", "grün ✓", "a\"b\\c", "%00"]
        .iter()
        .enumerate()
    {
        history.write(&mut rng, "vda");
        let kind = if n % 2 == 0 { "--internal" } else { "--external" };
        let mut args = vec!["snapshot", kind, "--", &*catalog];
        args.push(name);
        history.pleach(&args);
        history.model.take(name, &["vda".to_owned()]);
        history.check();
        let shown = Tool::new(PLEACH).run(&["tree", &catalog]).stdout;
        assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown:?}");
    }
    assert!(
        fs::read_dir(&history.dir)
            .unwrap()
            .all(|e| e.unwrap().path().is_file() || history.catalog.contains(".pleach"))
    );
}

#[test]
fn a_node_without_disks_harms_nothing() {
    // D8: a record that says nothing of disks.
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    history.write(&mut rng, "vda");
    history.snapshot("s1", &[]);
    edit(&history, |record| {
        let mut empty = record.find("s1").unwrap().clone();
        empty.name = "empty".to_owned();
        empty.parent = Some("s1".to_owned());
        empty.storage.clear();
        record.nodes.push(empty);
    });
    let catalog = history.catalog.clone();
    history.pleach(&["revert", &catalog, "empty", "--discard", "--yes"]);
    history.pleach(&["delete", &catalog, "empty", "--yes"]);
    history.check();
}

#[test]
fn a_disk_that_takes_no_part_stays_as_it_is() {
    // D12, R9, R10: snapshots of some disks, and of each in its own way.
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda", "vdb"]);
    let catalog = history.catalog.clone();
    history.pleach(&["snapshot", &catalog, "s1", "--disk", "vda"]);
    history.model.take("s1", &["vda".to_owned()]);
    for disk in ["vda", "vdb"] {
        history.write(&mut rng, disk);
    }
    history.check();
    history.revert("s1", None);
    history.check();
    history.pleach(&["snapshot", &catalog, "s2", "--kind", "vda=internal", "--kind", "vdb=external"]);
    history.model.take("s2", &["vda".to_owned(), "vdb".to_owned()]);
    history.write(&mut rng, "vdb");
    history.check();
    history.revert("s1", None);
    history.check();
    history.delete("s2", &[]);
    history.check();
}

#[test]
fn images_that_nobody_recorded_are_kept() {
    // D13, R21: an overlay that was made by hand on the active image.
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    history.write(&mut rng, "vda");
    history.snapshot("s1", &[]);
    history.write(&mut rng, "vda");
    let active = history.active("vda");
    let below = history.model.heads["vda"];
    let name = active.file_name().unwrap().to_str().unwrap().to_owned();
    qemu_img_in(&history.dir, &["create", "-q", "-f", "qcow2", "-b", &name, "-F", "qcow2", "hand.qcow2"]);
    let catalog = history.catalog.clone();
    history.pleach(&["revert", &catalog, "s1", "--discard", "--yes"]);
    let hand = history.dir.join("hand.qcow2");
    assert_eq!(digest(&hand, Format::Qcow2), below);
    let tree = history.tree();
    assert_eq!(tree["current"], "s1");
    assert!(tree["nodes"].as_array().unwrap().iter().any(|n| n["name"] == "hand" && n["kind"] == "head"));
}

#[test]
fn names_of_backing_files_stay_relative() {
    // D16
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    for name in ["s1", "s2", "s3"] {
        history.write(&mut rng, "vda");
        history.snapshot(name, &[]);
    }
    history.delete("s2", &[]);
    let active = history.active("vda");
    assert!(!info(&active)["backing-filename"].as_str().unwrap().starts_with('/'));
    // The directory may be moved: the catalog, too, names nothing absolutely.
    let moved = work.join("moved");
    fs::rename(&history.dir, &moved).unwrap();
    history.catalog = text(&moved.join(".pleach/vm.tree")).to_owned();
    history.dir = moved;
    history.check();
    history.revert("s1", None);
    history.check();
}

#[test]
fn a_snapshot_that_one_disk_lacks_changes_no_disk() {
    // D17
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda", "vdb"]);
    history.snapshot("i1", &["--internal"]);
    for disk in ["vda", "vdb"] {
        history.write(&mut rng, disk);
    }
    qemu_img_in(&history.dir, &["snapshot", "-d", "i1", "vdb.qcow2"]);
    let before = fs::read(history.dir.join("vda.qcow2")).unwrap();
    let catalog = history.catalog.clone();
    let outcome = Tool::new(PLEACH).run(&["revert", &catalog, "i1", "--discard", "--yes"]);
    assert_eq!(outcome.code, Some(7), "{outcome}");
    assert!(outcome.stderr.contains("vdb"), "{outcome}");
    assert_eq!(fs::read(history.dir.join("vda.qcow2")).unwrap(), before);
    // What is left of it can still go.
    history.pleach(&["delete", &catalog, "i1", "--yes"]);
    history.model.delete("i1");
    history.check();
}

#[test]
fn leaves_and_branches_are_listed_in_full() {
    // D14, D15
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    for name in ["s1", "s2", "s3"] {
        history.write(&mut rng, "vda");
        history.snapshot(name, &["--internal"]);
    }
    let catalog = history.catalog.clone();
    let names = |tree: serde_json::Value| -> Vec<String> {
        tree["nodes"].as_array().unwrap().iter().map(|n| n["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(history.pleach(&["tree", &catalog, "--json", "--from", "s2"])), ["s2", "s3", "vda"]);
    assert_eq!(names(history.pleach(&["tree", &catalog, "--json", "--leaves"])), ["vda"]);
    assert_eq!(names(history.pleach(&["tree", &catalog, "--json", "--roots"])), ["s1"]);
    let both = history.pleach(&["tree", &catalog, "--json", "--roots", "--leaves"]);
    assert_eq!(names(both), Vec::<String>::new());
}

#[test]
fn snapshots_made_elsewhere_are_adopted() {
    // R25
    let work = WorkDir::new("defects");
    let (mut history, mut rng) = tree(&work, &["vda"]);
    history.snapshot("s1", &["--internal"]);
    history.write(&mut rng, "vda");
    qemu_img_in(&history.dir, &["snapshot", "-c", "by hand", "vda.qcow2"]);
    history.model.take("by hand", &["vda".to_owned()]);
    let dir = text(&history.dir).to_owned();
    let found = history.pleach(&["scan", &dir, "--write", "--json"]);
    assert_eq!(found["trees"][0]["written"], true, "{found}");
    history.check();
    // Without a catalog at all.
    fs::remove_dir_all(history.dir.join(".pleach")).unwrap();
    let found = history.pleach(&["scan", &dir, "--write", "--json"]);
    assert_eq!(found["trees"][0]["written"], true, "{found}");
    history.catalog = text(&history.dir.join(".pleach/vda.tree")).to_owned();
    history.check();
}

#[test]
fn a_raw_disk_can_be_the_root() {
    let work = WorkDir::new("defects");
    let image = work.join("disk.img");
    fs::write(&image, Rng::new(3).noise(1 << 20)).unwrap();
    let raw = digest(&image, Format::Raw);
    let dir = text(&work);
    let run = |args: &[&str]| {
        let outcome = Tool::new(PLEACH).run(args);
        assert_eq!(outcome.code, Some(0), "{outcome}");
    };
    run(&["init", "vm", "--disk", &format!("vda={}", text(&image))]);
    let inside = Tool::new(PLEACH).run(&["snapshot", dir, "no", "--internal"]);
    assert_eq!(inside.code, Some(8), "{inside}");
    run(&["snapshot", dir, "s1", "--file", "vda=a.qcow2"]);
    qemu_io(&work.join("a.qcow2"), Format::Qcow2, &["write -q -P 9 64k 128k"]);
    let first = digest(&work.join("a.qcow2"), Format::Qcow2);
    run(&["snapshot", dir, "s2", "--file", "vda=b.qcow2"]);
    run(&["revert", dir, "s1", "--discard", "--yes", "--file", "vda=c.qcow2"]);
    assert_eq!(digest(&work.join("c.qcow2"), Format::Qcow2), raw);
    assert!(!work.join("b.qcow2").exists());
    run(&["delete", dir, "s1", "--yes"]);
    assert!(!image.exists());
    assert_eq!(digest(&work.join("a.qcow2"), Format::Qcow2), first);
    assert_eq!(digest(&work.join("c.qcow2"), Format::Qcow2), raw);
}

fn run_in(dir: &Path, args: &[&str]) -> Outcome {
    let mut command = Command::new(PLEACH);
    command.current_dir(dir).args(args);
    Running::start(command).finish(Duration::from_secs(60))
}

/// A merge by file names would leave a catalog that names what is gone, or finds another content under its name.
#[test]
fn what_a_catalog_keeps_is_changed_by_its_verbs_alone() {
    let work = WorkDir::new("kept");
    let dir = &*work;
    qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "d.qcow2", "2M"]);
    let pleach = |args: &[&str]| run_in(dir, args);
    assert_eq!(pleach(&["init", "vm", "--disk", "vda=d.qcow2"]).code, Some(0));
    for (name, file) in [("A", "d.qcow2"), ("B", "d.A.qcow2"), ("C", "d.B.qcow2")] {
        qemu_io(&dir.join(file), Format::Qcow2, &["write -q -P 1 0 64k"]);
        assert_eq!(pleach(&["snapshot", ".", name]).code, Some(0), "{name}");
    }
    let before = listing(dir);
    let refused: [&[&str]; 4] = [
        &["merge", "d.B.qcow2", "--into", "d.A.qcow2", "-y"],
        &["merge", "d.C.qcow2", "--into", "d.B.qcow2", "-y"],
        &["merge", "d.C.qcow2", "--into", "d.B.qcow2", "-n"],
        &["resize", "d.B.qcow2", "3M", "-y"],
    ];
    for args in refused {
        let outcome = pleach(args);
        assert_eq!(outcome.code, Some(6), "{outcome}");
        assert!(outcome.stderr.contains("vm.tree"), "{outcome}");
    }
    assert_eq!(listing(dir), before);
    assert_eq!(pleach(&["resize", "d.C.qcow2", "3M"]).code, Some(0));
}

/// QEMU gives the ids of deleted snapshots again.
#[test]
fn an_id_that_was_given_again_is_another_snapshot() {
    let work = WorkDir::new("defects");
    for ours in [false, true] {
        let name = if ours { "b.qcow2" } else { "a.qcow2" };
        let dir = work.join(name.trim_end_matches(".qcow2"));
        fs::create_dir(&dir).unwrap();
        let image = dir.join(name);
        qemu_img_in(&dir, &["create", "-q", "-f", "qcow2", name, "1M"]);
        qemu_io(&image, Format::Qcow2, &["write -q -P 1 0 64k"]);
        let run = |args: &[&str]| Tool::new(PLEACH).run(args);
        assert_eq!(run(&["snapshot", text(&image), "--internal", "old"]).code, Some(0));
        qemu_img_in(&dir, &["snapshot", "-d", "old", name]);
        qemu_io(&image, Format::Qcow2, &["write -q -P 2 0 64k"]);
        if ours {
            let taken = run(&["snapshot", text(&image), "--internal", "new"]);
            assert_eq!(taken.code, Some(0), "{taken}");
        } else {
            qemu_img_in(&dir, &["snapshot", "-c", "new", name]);
        }
        let before = digest(&image, Format::Qcow2);
        let revert = run(&["revert", "--discard", "--yes", text(&image), "old"]);
        assert_eq!(revert.code, Some(7), "{revert}");
        assert_eq!(digest(&image, Format::Qcow2), before);
        for (gone, left) in [("old", 1), ("new", 0)] {
            let outcome = run(&["delete", "--yes", text(&image), gone]);
            assert_eq!(outcome.code, Some(0), "{outcome}");
            let snapshots = info(&image)["snapshots"].as_array().map_or(0, Vec::len);
            assert_eq!(snapshots, left, "{outcome}");
            assert_eq!(digest(&image, Format::Qcow2), before);
        }
    }
}
