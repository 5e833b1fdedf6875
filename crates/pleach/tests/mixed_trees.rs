//! Random histories of trees with one to three disks, internal and external snapshots mixed: after every operation each
//! node reads as it should, by stock qemu-img, and the tree is what the rules say.
//!
//! `PLEACH_LONG=1` runs 1,000 histories; `PLEACH_SEED=…` runs one again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod history;

use history::History;
use pleach_testkit::{OnFailure, Rng, WorkDir, chosen_seed, long_mode, oracle};

const OPERATIONS: usize = 24;

#[test]
fn every_node_reads_as_it_should_after_every_operation() {
    if let Some(seed) = chosen_seed() {
        run(seed);
        return;
    }
    let histories = if long_mode() { 1000 } else { 30 };
    let seeds: Vec<u64> = (0x3e0..0x3e0 + histories).collect();
    oracle::in_parallel(&seeds, |&seed| run(seed));
}

fn run(seed: u64) {
    let _seed = OnFailure::print_seed(seed, "mixed_trees");
    let rng = &mut Rng::new(seed);
    let work = WorkDir::new("mixed");
    let disks: Vec<&str> = ["vda", "vdb", "vdc"].into_iter().take(1 + rng.index(3)).collect();
    let mut history = History::new(rng, work.join("tree"), &disks);
    history.in_part = disks.len() > 1 && rng.chance(30);
    history.check();
    for n in 0..OPERATIONS {
        operation(&mut history, rng, n);
        history.check();
    }
}

fn operation(history: &mut History, rng: &mut Rng, n: usize) {
    let names: Vec<String> = history.model.nodes.keys().cloned().collect();
    let fresh = format!("n{n}");
    // Something to lose or to keep.
    if rng.chance(60) {
        let disk = rng.pick(&history.disks).clone();
        history.write(rng, &disk);
    }
    let choice = if names.is_empty() { 0 } else { rng.below(100) };
    let name = if names.is_empty() { String::new() } else { rng.pick(&names).clone() };
    match choice {
        0..40 => {
            let mut kinds = Vec::new();
            for disk in &history.disks {
                kinds.push(format!("--kind={disk}={}", if rng.chance(50) { "internal" } else { "external" }));
            }
            let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
            let flags: &[&str] = match rng.below(4) {
                0 => &["--internal"],
                1 => &["--external"],
                2 => &kinds,
                _ => &[],
            };
            if history.in_part && rng.chance(50) {
                let some: Vec<String> = history.disks.iter().filter(|_| rng.chance(60)).cloned().collect();
                history.snapshot_of(&fresh, &some);
            } else {
                history.snapshot(&fresh, flags);
            }
        }
        40..62 => history.revert(&name, rng.chance(50).then_some(&fresh)),
        62..84 => {
            let keep = *rng.pick(&["child", "child", "auto", "parent"]);
            let keep = if keep == "parent" && history.dependents(&name) != 1 { "child" } else { keep };
            history.delete(&name, &["--keep", keep]);
        }
        84..90 if history.model.nodes[&name].parent.is_some() => history.delete(&name, &["--children"]),
        84..95 => history.delete(&name, &["--children-only"]),
        _ => {
            let catalog = history.catalog.clone();
            history.pleach(&["rename", &catalog, &name, &fresh]);
            history.model.rename(&name, &fresh);
        }
    }
}
