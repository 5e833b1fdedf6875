//! Random trees, and random calls of the verbs that let every node read as before: all of them do, and are clean, every
//! time, and the plan says what happens.
//!
//! `PLEACH_LONG=1` runs ten times as many; `PLEACH_SEED=…` runs one tree again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::files::{changes, copy_dir, listing, unfinished};
use pleach_testkit::oracle::text;
use pleach_testkit::{Forest, Format, OnFailure, RandomTree, Rng, Tool, WorkDir, chosen_seed, long_mode};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Operations that the run must reach.
const USUAL: usize = 60;
const LONG: usize = 2000;

#[test]
fn every_node_reads_as_before() {
    if let Some(seed) = chosen_seed() {
        run_tree(seed);
        return;
    }
    let target = if long_mode() { LONG } else { USUAL };
    let (mut done, mut seed) = (0, 0xbed);
    while done < target {
        done += run_tree(seed);
        seed += 1;
    }
}

/// Builds the tree of `seed` and works on it for a while. Returns how many operations there were.
fn run_tree(seed: u64) -> usize {
    let _seed = OnFailure::print_seed(seed, "random_verbs");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("verbs");
    let large = rng.chance(10);
    let n_files = if large { rng.between(20, 40) } else { rng.between(3, 9) };
    let tree = RandomTree::build(&work.join("tree"), &mut rng, usize::try_from(n_files).unwrap());
    let mut forest = Forest::survey(&tree);
    let steps = 8;
    for step in 0..steps {
        if std::env::var_os("PLEACH_KEEP").is_some() {
            copy_dir(&tree.dir, &work.join(format!("before-{step}")));
        }
        let (command, after) = rebase(&mut rng, &tree.dir, &forest);
        forest = carry_out(&tree.dir, &command, after, &format!("seed {seed:#x}, step {step}: {command:?}"));
    }
    steps
}

/// Any image, onto any other that does not stand on it, or onto nothing.
fn rebase(rng: &mut Rng, dir: &Path, forest: &Forest) -> (Vec<String>, Forest) {
    let images: Vec<&str> =
        forest.iter().filter(|(_, state)| state.format == Format::Qcow2).map(|(name, _)| name).collect();
    let image = (*rng.pick(&images)).to_owned();
    let above = forest.descendants(&image);
    let others: Vec<&str> = forest
        .iter()
        .map(|(name, _)| name)
        .filter(|name| *name != image && !above.iter().any(|other| other == name))
        .collect();
    let onto = if others.is_empty() || rng.chance(15) { None } else { Some((*rng.pick(&others)).to_owned()) };
    let file = |name: &str| text(&dir.join(&forest.state(name).file)).to_owned();
    let mut command = vec!["rebase".to_owned(), file(&image), "--onto".to_owned()];
    match &onto {
        None => command.push("none".to_owned()),
        Some(base) => {
            command.push(file(base));
            if forest.state(base).format == Format::Raw {
                command.extend(["-F".to_owned(), "raw".to_owned()]);
            }
        }
    }
    let after = forest.rebased(&image, onto.as_deref());
    (command, after)
}

/// Plans the operation, carries it out, and compares everything that can be seen with the model.
fn carry_out(dir: &Path, command: &[String], after: Forest, label: &str) -> Forest {
    let pleach = Tool::new(PLEACH);
    let with = |more: &[&str]| {
        command.iter().map(String::as_str).chain(more.iter().copied()).map(str::to_owned).collect::<Vec<_>>()
    };
    let files = listing(dir);
    let planned = pleach.json(&with(&["-n", "--json"]));
    assert_eq!(changes(&files, &listing(dir)), Vec::<String>::new(), "{label}: a dry run changed something");
    let done = pleach.json(&with(&["--yes", "--json"]));
    for key in ["bytes_written", "bytes_cloned", "bytes_freed"] {
        assert_eq!(number(&planned, key), number(&done, key), "{label}: planned {planned}, done {done}");
    }
    assert_eq!(after.problems(dir), Vec::<String>::new(), "{label}: planned {planned}");
    assert_eq!(unfinished(dir), Vec::<String>::new(), "{label}");
    after
}

fn number(document: &Value, key: &str) -> u64 {
    document["plan"][key].as_u64().unwrap_or_else(|| panic!("no plan.{key}: {document}"))
}
