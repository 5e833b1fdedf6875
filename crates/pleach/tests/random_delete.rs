//! Random trees, random deletions in every mode: what stays must read as before, and be clean, every time.
//!
//! `PLEACH_LONG=1` runs ten times as many; `PLEACH_SEED=…` runs one tree again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pleach_testkit::files::{changes, copy_dir, image_names, listing, unfinished};
use pleach_testkit::layers::{Layer, fill, qcow2};
use pleach_testkit::oracle::text;
use pleach_testkit::{
    Forest, Format, OnFailure, RandomTree, Removal, Rng, Tool, WorkDir, chosen_seed, long_mode,
};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Operations that the run must reach.
const USUAL: usize = 60;
const LONG: usize = 600;

/// One way to ask for a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    Leaf,
    OneKeepDefault,
    OneKeepChild,
    OneKeepParent,
    OneKeepAuto,
    SeveralPull,
    SeveralTakeOver,
    RootPull,
    RootKeepParent,
    Children,
    ChildrenOfRoot,
    ChildrenOnly,
}

const ALL_MODES: &[Mode] = &[
    Mode::Leaf,
    Mode::OneKeepDefault,
    Mode::OneKeepChild,
    Mode::OneKeepParent,
    Mode::OneKeepAuto,
    Mode::SeveralPull,
    Mode::SeveralTakeOver,
    Mode::RootPull,
    Mode::RootKeepParent,
    Mode::Children,
    Mode::ChildrenOfRoot,
    Mode::ChildrenOnly,
];

impl Mode {
    /// Whether the mode is for a node with so many dependents, at the root or not.
    fn fits(self, dependents: usize, root: bool, nodes: usize) -> bool {
        match self {
            Self::Leaf => dependents == 0,
            Self::OneKeepDefault | Self::OneKeepChild | Self::OneKeepParent | Self::OneKeepAuto => {
                dependents == 1
            }
            Self::SeveralPull | Self::SeveralTakeOver => dependents > 1 && !root,
            Self::RootPull | Self::RootKeepParent => dependents > 0 && root,
            Self::Children => dependents > 0 && !root,
            // Ends the tree, so it comes when little is left of it.
            Self::ChildrenOfRoot => dependents > 0 && root && nodes <= 4,
            Self::ChildrenOnly => dependents > 0,
        }
    }
}

/// A deletion that has been decided on.
struct Deletion {
    mode: Mode,
    victim: String,
    flags: Vec<String>,
    /// `None` where the name that survives is pleach's choice.
    removal: Option<Removal>,
}

#[test]
fn every_surviving_node_reads_as_before() {
    let target = if long_mode() { LONG } else { USUAL };
    let mut used: BTreeMap<Mode, usize> = ALL_MODES.iter().map(|mode| (*mode, 0)).collect();
    if let Some(seed) = chosen_seed() {
        run_tree(seed, &mut used);
        return;
    }
    let mut seed = 0xd00d;
    while used.values().sum::<usize>() < target || used.values().any(|count| *count == 0) {
        run_tree(seed, &mut used);
        seed += 1;
    }
    println!("operations: {} {used:?}", used.values().sum::<usize>());
}

/// Builds the tree of `seed` and deletes from it until one node is left.
fn run_tree(seed: u64, used: &mut BTreeMap<Mode, usize>) {
    let _seed = OnFailure::print_seed(seed, "random_delete");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("delete");
    let large = rng.chance(15);
    let n_files = if large { rng.between(20, 40) } else { rng.between(2, 12) };
    let tree = RandomTree::build(&work.join("tree"), &mut rng, usize::try_from(n_files).unwrap());
    let mut forest = Forest::survey(&tree);
    let mut step = 0;
    while forest.visible().len() > 1 {
        let deletion = choose(&mut rng, &forest, used);
        let label = format!("seed {seed:#x}, step {step}: {} {:?}", deletion.victim, deletion.mode);
        if std::env::var_os("PLEACH_KEEP").is_some() {
            copy_dir(&tree.dir, &work.join(format!("before-{step}")));
        }
        forest = delete(&tree.dir, &forest, &deletion, &label);
        *used.entry(deletion.mode).or_default() += 1;
        step += 1;
    }
}

/// A random node, by a mode that has been used least among those that some node allows.
fn choose(rng: &mut Rng, forest: &Forest, used: &BTreeMap<Mode, usize>) -> Deletion {
    let visible = forest.visible();
    let fits = |mode: Mode, name: &str| {
        let root = forest.state(name).parent.is_none();
        mode.fits(forest.children(name).len(), root, visible.len())
    };
    let possible: Vec<Mode> =
        ALL_MODES.iter().copied().filter(|mode| visible.iter().any(|name| fits(*mode, name))).collect();
    let least = possible.iter().map(|mode| used[mode]).min().unwrap();
    // Usually one of the least used, sometimes any: the order of modes must not follow the order of needs.
    let wanted: Vec<Mode> = possible.iter().copied().filter(|mode| used[mode] == least).collect();
    let any = rng.chance(30);
    let mode = *rng.pick(if any { &possible } else { &wanted });
    let nodes: Vec<&String> = visible.iter().filter(|name| fits(mode, name)).collect();
    let victim = (*rng.pick(&nodes)).clone();
    let child = forest.children(&victim).first().cloned();
    decide(rng, mode, victim, child, forest)
}

fn decide(rng: &mut Rng, mode: Mode, victim: String, child: Option<String>, forest: &Forest) -> Deletion {
    let flags = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let children = forest.children(&victim);
    let (flags, removal) = match mode {
        Mode::Leaf | Mode::OneKeepDefault | Mode::SeveralPull | Mode::RootPull => {
            (flags(&[]), Some(Removal::Pull))
        }
        Mode::OneKeepChild => (flags(&["--keep", "child"]), Some(Removal::Pull)),
        Mode::OneKeepParent => (flags(&["--keep", "parent"]), child.map(Removal::TakeOver)),
        Mode::OneKeepAuto => (flags(&["--keep", "auto"]), None),
        Mode::RootKeepParent if children.len() == 1 => {
            (flags(&["--keep", "parent"]), child.map(Removal::TakeOver))
        }
        Mode::SeveralTakeOver | Mode::RootKeepParent => {
            let heir = rng.pick(&children).clone();
            (flags(&["--keep", &format!("parent={heir}")]), Some(Removal::TakeOver(heir)))
        }
        Mode::Children => (flags(&["--children"]), Some(Removal::Subtree)),
        Mode::ChildrenOfRoot => (flags(&["--children", "--yes-everything"]), Some(Removal::Subtree)),
        Mode::ChildrenOnly => (flags(&["--children-only"]), Some(Removal::Descendants)),
    };
    Deletion { mode, victim, flags, removal }
}

/// Plans the deletion, carries it out, and compares everything that can be seen with the model.
fn delete(dir: &Path, forest: &Forest, deletion: &Deletion, label: &str) -> Forest {
    let pleach = Tool::new(PLEACH);
    let mut command = vec!["delete", text(dir), &deletion.victim];
    command.extend(deletion.flags.iter().map(String::as_str));
    let with =
        |more: &[&'static str]| command.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();

    let files = listing(dir);
    let sizes = sizes_of(&pleach.json(&["tree", text(dir), "--sizes", "--json"]), &deletion.victim);
    let planned = pleach.json(&with(&["-n", "--json"]));
    assert_eq!(changes(&files, &listing(dir)), Vec::<String>::new(), "{label}: a dry run changed something");

    let done = pleach.json(&with(&["--yes", "--json"]));
    let bytes = bytes_written(&planned);
    assert_eq!(bytes, bytes_written(&done), "{label}: planned {planned}, done {done}");
    if matches!(deletion.mode, Mode::Leaf | Mode::OneKeepDefault | Mode::SeveralPull | Mode::RootPull) {
        assert_eq!(sizes["written_if_deleted"], bytes, "{label}: tree said {sizes}, the plan was {planned}");
    }
    if deletion.mode == Mode::Leaf {
        assert_eq!(sizes["freed_if_deleted"], sizes["on_disk"], "{label}: {sizes}");
        assert_eq!(done["plan"]["bytes_freed"], sizes["on_disk"], "{label}: {done}");
    }

    let after = forest.after(&deletion.victim, &removal(dir, forest, deletion));
    assert_eq!(after.problems(dir), Vec::<String>::new(), "{label}: planned {planned}");
    assert_eq!(unfinished(dir), Vec::<String>::new(), "{label}");
    let before: BTreeSet<String> = files.into_keys().filter(|name| !name.starts_with(".pleach/")).collect();
    let now: BTreeSet<String> = image_names(dir).into_iter().collect();
    for gone in before.difference(&now) {
        assert!(announced(&planned, gone), "{label}: {gone} went, and the plan did not say so: {planned}");
    }
    let shown = pleach.json(&["tree", text(dir), "--json"]);
    assert_eq!(after.tree_problems(&shown), Vec::<String>::new(), "{label}: {shown}");
    after
}

/// What was asked for, or, where pleach chose, what it did: whose file is still there.
fn removal(dir: &Path, forest: &Forest, deletion: &Deletion) -> Removal {
    let chosen = || {
        let child = forest.children(&deletion.victim).remove(0);
        let child_stayed = dir.join(&forest.state(&child).file).exists();
        if child_stayed { Removal::Pull } else { Removal::TakeOver(child) }
    };
    deletion.removal.clone().unwrap_or_else(chosen)
}

fn sizes_of(tree: &Value, name: &str) -> Value {
    let nodes = tree["nodes"].as_array().unwrap_or_else(|| panic!("no nodes: {tree}"));
    let node = nodes.iter().find(|node| node["name"] == name).unwrap_or_else(|| panic!("no {name}: {tree}"));
    node["sizes"].clone()
}

fn bytes_written(document: &Value) -> u64 {
    let bytes = &document["plan"]["bytes_written"];
    bytes.as_u64().unwrap_or_else(|| panic!("plan.bytes_written is {bytes}: {document}"))
}

/// Whether the plan lists `file` among what is unlinked or renamed away.
fn announced(planned: &Value, file: &str) -> bool {
    let names =
        |word: Option<&str>| word.is_some_and(|word| Path::new(word).file_name() == Some(file.as_ref()));
    let listed = |key: &str| planned["plan"][key].as_array().cloned().unwrap_or_default();
    listed("unlinks").iter().any(|item| names(item.as_str()) || names(item["file"].as_str()))
        || listed("renames").iter().any(|item| names(item["from"].as_str()))
}

/// A dependent outside the directory is found where `--also` says to look.
#[test]
fn dependents_elsewhere_are_served_too() {
    const CLUSTER: u64 = 65536;
    const SIZE: u64 = 32 * CLUSTER;
    let work = WorkDir::new("also");
    let (here, there) = (work.join("here"), work.join("there"));
    std::fs::create_dir(&here).unwrap();
    std::fs::create_dir(&there).unwrap();
    let over = |backing| Layer { size: SIZE, backing: Some(backing), options: "" };
    qcow2(&here.join("A.qcow2"), Layer { size: SIZE, ..Layer::default() }, &[fill(1, 0, 8, CLUSTER)]);
    qcow2(&here.join("B.qcow2"), over(("A.qcow2", Format::Qcow2)), &[fill(2, 4, 8, CLUSTER)]);
    qcow2(&here.join("C.qcow2"), over(("B.qcow2", Format::Qcow2)), &[fill(3, 6, 1, CLUSTER)]);
    qcow2(&there.join("E.qcow2"), over(("../here/B.qcow2", Format::Qcow2)), &[fill(4, 7, 1, CLUSTER)]);
    let digests = || {
        let outside = Forest::read(&there, &[("E", "E.qcow2", Format::Qcow2, None)]);
        let inside = Forest::read(
            &here,
            &[("A", "A.qcow2", Format::Qcow2, None), ("C", "C.qcow2", Format::Qcow2, Some("A"))],
        );
        (outside.state("E").digest, inside)
    };
    let (outside, inside) = digests();
    let pleach = Tool::new(PLEACH);
    pleach.json(&["delete", text(&here), "B", "--also", text(&there), "--yes", "--json"]);
    assert_eq!(inside.problems(&here), Vec::<String>::new());
    pleach_testkit::oracle::check_clean(&there.join("E.qcow2"));
    assert_eq!(digests().0, outside, "the overlay in the other directory reads differently");
}
