//! Random trees, and random calls of the verbs that let every node read as before: all of them do, and are clean, every
//! time, and the plan says what happens. Every verb is met in every run.
//!
//! `PLEACH_LONG=1` runs ten times as many; `PLEACH_SEED=…` runs one tree again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;

use pleach_testkit::files::{Listing, changes, copy_dir, image_names, listing, unfinished};
use pleach_testkit::oracle::{self, text};
use pleach_testkit::{
    Extras, Forest, Format, OnFailure, RandomTree, Removal, Rng, Tool, WorkDir, chosen_seed, long_mode,
};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Operations that the run must reach.
const USUAL: usize = 200;
const LONG: usize = 2000;

#[test]
fn every_node_reads_as_before() {
    let mut used = BTreeMap::new();
    if let Some(seed) = chosen_seed() {
        run_tree(seed, &mut used);
        println!("{used:?}");
        return;
    }
    let target = if long_mode() { LONG } else { USUAL };
    let mut seed = 0xbed;
    while used.values().sum::<usize>() < target || VERBS.iter().any(|verb| !used.contains_key(verb)) {
        run_tree(seed, &mut used);
        seed += 1;
    }
    println!("{used:?}");
}

const VERBS: &[&str] =
    &["merge", "squash", "commit", "delete", "rebase", "flatten", "convert", "refused, 6", "refused, 8"];

/// Builds the tree of `seed` and works on it for a while. Counts operations by verb.
fn run_tree(seed: u64, used: &mut BTreeMap<&'static str, usize>) {
    let _seed = OnFailure::print_seed(seed, "random_verbs");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("verbs");
    let chain = rng.chance(30);
    let n_files = match rng.below(20) {
        0 if chain => rng.between(30, 60),
        _ if chain => rng.between(1, 12),
        _ => rng.between(3, 9),
    };
    let extras = Extras { subclusters: rng.chance(30), snapshots: rng.chance(30), chain };
    let n_files = usize::try_from(n_files).unwrap();
    let tree = RandomTree::build_with(&work.join("tree"), &mut rng, n_files, extras);
    let plain = |name: &str| tree.nodes.iter().all(|n| n.name != name || !n.subclusters);
    let sizes = tree.nodes.iter().map(|n| (n.name.clone(), n.virtual_size)).collect();
    let mut state = State {
        dir: &tree.dir,
        out: &work,
        subclusters: tree.nodes.iter().map(|n| n.name.clone()).filter(|name| !plain(name)).collect(),
        sizes,
        forest: Forest::survey(&tree),
    };
    for step in 0..2 * n_files.min(10) {
        if std::env::var_os("PLEACH_KEEP").is_some() {
            copy_dir(&tree.dir, &work.join(format!("before-{step}")));
        }
        if state.forest.iter().all(|(_, node)| node.format == Format::Raw) {
            break;
        }
        let operation = state.choose(&mut rng);
        let label = format!("seed {seed:#x}, step {step}: {:?}", operation.command);
        *used.entry(state.carry_out(operation, &label)).or_default() += 1;
    }
}

/// A call of pleach, and what it makes of the model.
struct Operation {
    verb: &'static str,
    command: Vec<String>,
    /// One model, or two where pleach chooses.
    after: Vec<Forest>,
    /// Why it must be refused: the exit code.
    refused: Option<i32>,
    /// Whether it may be refused because a target has subclusters.
    may_be_refused: bool,
    /// A new file, and the node that it reads as.
    copy: Option<(String, Format, String)>,
}

/// A tree, and what is known of it.
struct State<'a> {
    dir: &'a Path,
    out: &'a Path,
    /// Nodes with extended L2 entries, by the names that they were made with.
    subclusters: Vec<String>,
    sizes: BTreeMap<String, u64>,
    forest: Forest,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

impl State<'_> {
    fn choose(&self, rng: &mut Rng) -> Operation {
        let chosen = match rng.below(16) {
            0..6 => self.merge(rng),
            6..8 => self.commit(rng),
            8..11 => self.delete(rng),
            11 => Some(self.copy(rng, "flatten")),
            12 => Some(self.copy(rng, "convert")),
            _ => None,
        };
        chosen.or_else(|| self.rebase(rng)).unwrap_or_else(|| self.copy(rng, "convert"))
    }

    fn file(&self, name: &str) -> String {
        text(&self.dir.join(&self.forest.state(name).file)).to_owned()
    }

    /// Whether one of the nodes has extended L2 entries. What has changed hands since counts as well.
    fn subclusters(&self) -> bool {
        !self.subclusters.is_empty()
    }

    /// Names of the nodes that stand on another one.
    fn tops(&self) -> Vec<&str> {
        self.forest.iter().filter(|(_, state)| state.parent.is_some()).map(|(name, _)| name).collect()
    }

    /// A run of two files or more, mostly one that nobody else stands on: its top and its base.
    fn run(&self, rng: &mut Rng) -> Option<(String, String)> {
        let tops = self.tops();
        // Nobody but the file above may stand on the lower ones.
        let alone = |top: &str| {
            let below = self.forest.ancestors(top);
            below.iter().take_while(|n| self.forest.children(n).len() == 1).count()
        };
        let fine: Vec<&str> = tops.iter().copied().filter(|top| alone(top) > 0).collect();
        let any = fine.is_empty() || rng.chance(5);
        let candidates = if any { &tops } else { &fine };
        if candidates.is_empty() {
            return None;
        }
        let top = *rng.pick(candidates);
        let ancestors = self.forest.ancestors(top);
        let most = alone(top);
        let depth = if most == 0 || rng.chance(5) { rng.index(ancestors.len()) } else { rng.index(most) };
        Some((top.to_owned(), ancestors[depth].clone()))
    }

    /// The nodes below `top` down to `base`.
    fn lower(&self, top: &str, base: &str) -> Vec<String> {
        let mut below = self.forest.ancestors(top);
        let end = below.iter().position(|name| name == base).unwrap();
        below.truncate(end + 1);
        below
    }

    /// Whether something stands on the run that would read differently, or snapshots in it would.
    fn lower_is_needed(&self, top: &str, base: &str) -> bool {
        let lower = self.lower(top, base);
        lower.iter().any(|n| self.forest.children(n).len() > 1 || !self.forest.state(n).snapshots.is_empty())
    }

    fn merge(&self, rng: &mut Rng) -> Option<Operation> {
        let (top, base) = self.run(rng)?;
        let (top_file, base_file) = (self.file(&top), self.file(&base));
        let is_raw = self.forest.state(&base).format == Format::Raw;
        let merge = ["merge", &top_file, "--into", &base_file];
        let (verb, command, kept): (_, _, &[bool]) = match rng.below(6) {
            0 => ("squash", words(&["squash", text(self.dir), &base, &top]), &[true]),
            1 => ("merge", words(&[&merge[..], &["--keep", "top"]].concat()), &[true]),
            2 => ("merge", words(&[&merge[..], &["--keep", "auto"]].concat()), &[true, false]),
            3 => ("merge", words(&[&merge[..], &["--keep", "base"]].concat()), &[false]),
            4 => ("merge", words(&[&merge[..], &["--name", "named.qcow2"]].concat()), &[]),
            _ => ("merge", words(&merge), &[false]),
        };
        let named = kept.is_empty();
        let keeps_base = kept == [false];
        let after = match named {
            true => {
                let merged = self.forest.merged(&top, &base, true);
                vec![merged.renamed(&top, "named", "named.qcow2", Format::Qcow2)]
            }
            false => kept.iter().map(|top_kept| self.forest.merged(&top, &base, *top_kept)).collect(),
        };
        let taken = named && self.forest.iter().any(|(_, state)| state.file == "named.qcow2");
        let into_raw = is_raw && keeps_base && !self.forest.state(&top).snapshots.is_empty();
        let refused = match () {
            () if taken && named => return None,
            () if self.lower_is_needed(&top, &base) || into_raw => Some(6),
            () => None,
        };
        Some(Operation { verb, command, after, refused, may_be_refused: self.subclusters(), copy: None })
    }

    fn commit(&self, rng: &mut Rng) -> Option<Operation> {
        let (top, base) = self.run(rng)?;
        let mut command = words(&["commit", &self.file(&top)]);
        if self.forest.state(&top).parent.as_ref() != Some(&base) || rng.chance(30) {
            command.extend(words(&["--into", &self.file(&base)]));
        }
        let inside = !self.forest.state(&top).snapshots.is_empty();
        let longer = self.size(&base) > self.size(&top);
        let refused = match () {
            () if self.lower_is_needed(&top, &base) || inside => Some(6),
            () if longer => Some(8),
            () => None,
        };
        let after = vec![self.forest.committed(&top, &base)];
        let may_be_refused = self.subclusters();
        Some(Operation { verb: "commit", command, after, refused, may_be_refused, copy: None })
    }

    /// Virtual size of a node now.
    fn size(&self, name: &str) -> u64 {
        let state = self.forest.state(name);
        match state.format {
            Format::Raw => self.dir.join(&state.file).metadata().unwrap().len(),
            Format::Qcow2 => self.sizes.get(name).copied().unwrap_or_else(|| {
                oracle::info(&self.dir.join(&state.file))["virtual-size"].as_u64().unwrap()
            }),
        }
    }

    /// Any node without internal snapshots; a raw one only where something stands on it.
    fn delete(&self, rng: &mut Rng) -> Option<Operation> {
        let fine = |name: &str| self.forest.state(name).snapshots.is_empty();
        let visible: Vec<String> = self.forest.visible().into_iter().filter(|name| fine(name)).collect();
        if visible.len() < 2 {
            return None;
        }
        let name = rng.pick(&visible).clone();
        let children = self.forest.children(&name);
        let is_raw = self.forest.state(&name).format == Format::Raw;
        let mut command = words(&["delete", text(self.dir), &name]);
        let (after, heir) = match children.as_slice() {
            [child] if rng.chance(60) => {
                let take_over = self.forest.after(&name, &Removal::TakeOver(child.clone()));
                match rng.chance(50) {
                    true => {
                        command.extend(words(&["--keep", "parent"]));
                        (vec![take_over], Some(child))
                    }
                    false => {
                        command.extend(words(&["--keep", "auto"]));
                        (vec![self.forest.after(&name, &Removal::Pull), take_over], None)
                    }
                }
            }
            _ => (vec![self.forest.after(&name, &Removal::Pull)], None),
        };
        let into_raw = is_raw && heir.is_some_and(|heir| !fine(heir));
        let refused = into_raw.then_some(6);
        let may_be_refused = self.subclusters();
        Some(Operation { verb: "delete", command, after, refused, may_be_refused, copy: None })
    }

    /// Any image, onto any other that does not stand on it, or onto nothing.
    fn rebase(&self, rng: &mut Rng) -> Option<Operation> {
        let images: Vec<&str> =
            self.forest.iter().filter(|(_, s)| s.format == Format::Qcow2).map(|(name, _)| name).collect();
        if images.is_empty() {
            return None;
        }
        let image = (*rng.pick(&images)).to_owned();
        let above = self.forest.descendants(&image);
        let others: Vec<&str> = self
            .forest
            .iter()
            .map(|(name, _)| name)
            .filter(|name| *name != image && !above.iter().any(|other| other == name))
            .collect();
        let nothing = others.is_empty() || rng.chance(15);
        let onto = (!nothing).then(|| (*rng.pick(&others)).to_owned());
        let mut command = words(&["rebase", &self.file(&image), "--onto"]);
        match &onto {
            None => command.push("none".to_owned()),
            Some(base) => {
                command.push(self.file(base));
                if self.forest.state(base).format == Format::Raw {
                    command.extend(words(&["-F", "raw"]));
                }
            }
        }
        let after = vec![self.forest.rebased(&image, onto.as_deref())];
        let may_be_refused = self.subclusters();
        Some(Operation { verb: "rebase", command, after, refused: None, may_be_refused, copy: None })
    }

    /// A copy of a node with all that it stands on.
    fn copy(&self, rng: &mut Rng, verb: &'static str) -> Operation {
        let names: Vec<&str> =
            self.forest.iter().filter(|(_, s)| s.format == Format::Qcow2).map(|(name, _)| name).collect();
        let name = (*rng.pick(&names)).to_owned();
        let format = if rng.chance(30) { Format::Raw } else { Format::Qcow2 };
        let out = text(&self.out.join("copy")).to_owned();
        let mut command = words(&[verb, &self.file(&name), &out, "-O", format.name()]);
        if format == Format::Qcow2 && rng.chance(40) {
            command.push("-c".to_owned());
        }
        let copy = Some((out, format, name));
        Operation {
            verb,
            command,
            after: vec![self.forest.clone()],
            refused: None,
            may_be_refused: false,
            copy,
        }
    }

    /// Plans the operation, carries it out, and compares everything that can be seen with the model. Returns what it
    /// was.
    fn carry_out(&mut self, operation: Operation, label: &str) -> &'static str {
        let pleach = Tool::new(PLEACH);
        let with = |more: &[&str]| {
            let command = operation.command.iter().map(String::as_str);
            command.chain(more.iter().copied()).map(str::to_owned).collect::<Vec<_>>()
        };
        let files = listing(self.dir);
        let unchanged = |what: &str| {
            assert_eq!(changes(&files, &listing(self.dir)), Vec::<String>::new(), "{label}: {what}");
        };
        if let Some((out, format, name)) = &operation.copy {
            self.copied(&operation, (Path::new(out), *format, name), label);
            unchanged("a copy changed something");
            return operation.verb;
        }
        let planned = pleach.run(&with(&["-n", "--json"]));
        unchanged("a dry run changed something");
        let code = operation.refused.or((operation.may_be_refused && planned.code == Some(8)).then_some(8));
        if let Some(code) = code {
            let outcome = pleach.run(&with(&["--yes"]));
            assert_eq!((planned.code, outcome.code), (Some(code), Some(code)), "{label}: {}", outcome.text());
            unchanged("what was refused changed something");
            return if code == 6 { "refused, 6" } else { "refused, 8" };
        }
        assert_eq!(planned.code, Some(0), "{label}: {}", planned.text());
        let planned: Value = serde_json::from_str(&planned.stdout).unwrap();
        let done = pleach.json(&with(&["--yes", "--json"]));
        assert_eq!(planned, done, "{label}: planned and done");
        self.lengths(&planned, label);
        let there = |forest: &&Forest| {
            let mut files: Vec<&str> = forest.iter().map(|(_, state)| state.file.as_str()).collect();
            files.sort_unstable();
            files == image_names(self.dir)
        };
        let after = operation.after.iter().find(there).unwrap_or(&operation.after[0]).clone();
        let changed = touched(&files, &listing(self.dir));
        assert_eq!(after.problems_of(self.dir, &changed), Vec::<String>::new(), "{label}: {planned}");
        assert_eq!(unfinished(self.dir), Vec::<String>::new(), "{label}");
        self.forest = after;
        // A disk may be as long as another one was.
        self.sizes.clear();
        operation.verb
    }

    /// The files are as long as the plan says.
    fn lengths(&self, planned: &Value, label: &str) {
        for length in planned["plan"]["lengths"].as_array().unwrap() {
            let path = self.dir.join(length["file"].as_str().unwrap());
            let now = path.metadata().unwrap_or_else(|e| panic!("{label}: {}: {e}", path.display())).len();
            assert_eq!(length["after"], now, "{label}: {planned}");
        }
    }

    fn copied(&self, operation: &Operation, (out, format, name): (&Path, Format, &str), label: &str) {
        let pleach = Tool::new(PLEACH);
        let with = |more: &str| [&operation.command[..], &[more.to_owned()]].concat();
        if operation.verb == "flatten" {
            let planned = pleach.json(&[with("--json"), words(&["-n"])].concat());
            assert!(!out.exists(), "{label}");
            let done = pleach.json(&with("--json"));
            assert_eq!(planned, done, "{label}");
            assert_eq!(planned["plan"]["file_size"], out.metadata().unwrap().len(), "{label}");
        } else {
            pleach.succeed(&operation.command);
        }
        assert_eq!(oracle::digest(out, format), self.forest.state(name).digest, "{label}");
        let check = oracle::check(out, format);
        assert!(check.is_clean(), "{label}: {check:?}");
        std::fs::remove_file(out).unwrap();
    }
}

/// Files that are new, or written since.
fn touched(before: &Listing, after: &Listing) -> Vec<String> {
    after.iter().filter(|(name, now)| before.get(*name) != Some(now)).map(|(name, _)| name.clone()).collect()
}
