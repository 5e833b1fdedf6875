//! Random trees, and random calls of the verbs that let every node read as before: all of them do, and are clean, every
//! time, and the plan says what happens.
//!
//! `PLEACH_LONG=1` runs ten times as many; `PLEACH_SEED=…` runs one tree again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::files::{changes, copy_dir, image_names, listing, unfinished};
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
        let operation = match rng.below(3) {
            0 => rebase(&mut rng, &tree.dir, &forest),
            _ => merge(&mut rng, &tree.dir, &forest).unwrap_or_else(|| rebase(&mut rng, &tree.dir, &forest)),
        };
        let label = format!("seed {seed:#x}, step {step}: {:?}", operation.command);
        forest = carry_out(&tree.dir, &forest, operation, &label);
    }
    steps
}

/// A call of pleach, and what it makes of the model.
struct Operation {
    command: Vec<String>,
    /// One model, or two where pleach chooses; none where it must refuse.
    after: Vec<Forest>,
}

/// Any run of two files or more.
fn merge(rng: &mut Rng, dir: &Path, forest: &Forest) -> Option<Operation> {
    let tops: Vec<&str> =
        forest.iter().filter(|(_, state)| state.parent.is_some()).map(|(name, _)| name).collect();
    if tops.is_empty() {
        return None;
    }
    // Nobody but the file above may stand on the lower ones: mostly such a run, where there is one.
    let alone =
        |top: &str| forest.ancestors(top).iter().take_while(|n| forest.children(n).len() == 1).count();
    let fine: Vec<&str> = tops.iter().copied().filter(|top| alone(top) > 0).collect();
    let any = fine.is_empty() || rng.chance(10);
    let top = *rng.pick(if any { &tops } else { &fine });
    let ancestors = forest.ancestors(top);
    let (most, all) = (alone(top), ancestors.len());
    let depth = if most == 0 || rng.chance(10) { rng.index(all) } else { rng.index(most) };
    let base = &ancestors[depth];
    let file = |name: &str| text(&dir.join(&forest.state(name).file)).to_owned();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let (command, kept): (_, &[bool]) = match rng.below(5) {
        0 => (words(&["squash", text(dir), base, top]), &[true]),
        1 => (words(&["merge", &file(top), "--into", &file(base), "--keep", "top"]), &[true]),
        2 => (words(&["merge", &file(top), "--into", &file(base), "--keep", "auto"]), &[true, false]),
        3 => (words(&["merge", &file(top), "--into", &file(base), "--keep", "base"]), &[false]),
        _ => (words(&["merge", &file(top), "--into", &file(base)]), &[false]),
    };
    let kept = if depth < most { kept } else { &[] };
    Some(Operation {
        command,
        after: kept.iter().map(|top_kept| forest.merged(top, base, *top_kept)).collect(),
    })
}

/// Any image, onto any other that does not stand on it, or onto nothing.
fn rebase(rng: &mut Rng, dir: &Path, forest: &Forest) -> Operation {
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
    Operation { command, after: vec![forest.rebased(&image, onto.as_deref())] }
}

/// Plans the operation, carries it out, and compares everything that can be seen with the model.
fn carry_out(dir: &Path, before: &Forest, operation: Operation, label: &str) -> Forest {
    let pleach = Tool::new(PLEACH);
    let with = |more: &[&str]| {
        let command = operation.command.iter().map(String::as_str);
        command.chain(more.iter().copied()).map(str::to_owned).collect::<Vec<_>>()
    };
    let files = listing(dir);
    let unchanged = || changes(&files, &listing(dir));
    if operation.after.is_empty() {
        for more in [&["-n"][..], &["--yes"]] {
            let outcome = pleach.run(&with(more));
            assert_eq!(outcome.code, Some(6), "{label}: {}", outcome.text());
            assert!(outcome.text().contains("still read by"), "{label}: {}", outcome.text());
        }
        assert_eq!(unchanged(), Vec::<String>::new(), "{label}");
        return before.clone();
    }
    let planned = pleach.json(&with(&["-n", "--json"]));
    assert_eq!(unchanged(), Vec::<String>::new(), "{label}: a dry run changed something");
    let done = pleach.json(&with(&["--yes", "--json"]));
    for key in ["bytes_written", "bytes_cloned", "bytes_freed"] {
        assert_eq!(number(&planned, key), number(&done, key), "{label}: planned {planned}, done {done}");
    }
    let there = |forest: &&Forest| {
        let mut files: Vec<&str> = forest.iter().map(|(_, state)| state.file.as_str()).collect();
        files.sort_unstable();
        files == image_names(dir)
    };
    let after = operation.after.iter().find(there).unwrap_or(&operation.after[0]);
    assert_eq!(after.problems(dir), Vec::<String>::new(), "{label}: planned {planned}");
    assert_eq!(unfinished(dir), Vec::<String>::new(), "{label}");
    after.clone()
}

fn number(document: &Value, key: &str) -> u64 {
    document["plan"][key].as_u64().unwrap_or_else(|| panic!("no plan.{key}: {document}"))
}
