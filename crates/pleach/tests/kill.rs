//! SIGKILL at random moments of a deletion, merge or rebase: every node that stays reads right at once, and `resume` finishes.
//!
//! `PLEACH_LONG=1` kills more often; `PLEACH_SEED=…` draws other moments, `PLEACH_KEEP=1` keeps the files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use pleach_testkit::files::{changes, contents, copy_dir, image_names, unfinished};
use pleach_testkit::forest::content_problems;
use pleach_testkit::layers::{Layer, fill, qcow2, raw};
use pleach_testkit::oracle::{self, text};
use pleach_testkit::{
    Forest, Format, OnFailure, Outcome, Removal, Rng, Tool, WorkDir, chosen_seed, long_mode,
};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Bytes of a guest disk.
const DISK: u64 = 16 << 20;

/// A tree, and what is done to it.
struct Scenario {
    name: &'static str,
    build: fn(&Path) -> Forest,
    /// The words, images named from the tree's directory; for `delete` and `squash` the directory comes after the verb.
    command: Vec<&'static str>,
    /// Nodes that are not promised to be read any more.
    goes: Vec<&'static str>,
    /// A node that may be found under the name of another one of these.
    moves: Option<(&'static str, &'static str)>,
    after: Box<dyn Fn(&Forest) -> Forest + Sync>,
}

impl Scenario {
    fn delete(
        name: &'static str,
        build: fn(&Path) -> Forest,
        flags: &[&'static str],
        removal: Removal,
        heir: Option<&'static str>,
    ) -> Self {
        let command = [&["delete", ".", "N"], flags].concat();
        let after = Box::new(move |forest: &Forest| forest.after("N", &removal));
        Self { name, build, command, goes: vec!["N"], moves: heir.map(|heir| (heir, "N")), after }
    }
}

/// What became of the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The killed process had not begun, or what it began was taken back.
    Before,
    /// The operation is complete.
    After,
}

#[test]
fn several_dependents() {
    let scenario = Scenario::delete("several", wide, &[], Removal::Pull, None);
    kill_often(&scenario, if long_mode() { 200 } else { 30 });
}

#[test]
fn several_dependents_one_takes_over_the_name() {
    let removal = Removal::TakeOver("D2".to_owned());
    let scenario = Scenario::delete("heir", wide, &["--keep", "parent=D2"], removal, Some("D2"));
    kill_often(&scenario, few());
}

#[test]
fn one_dependent_keeps_its_name() {
    for (name, build) in [("narrow-child", narrow as fn(&Path) -> Forest), ("thin-child", thin)] {
        let scenario = Scenario::delete(name, build, &["--keep", "child"], Removal::Pull, None);
        kill_often(&scenario, few());
    }
}

#[test]
fn one_dependent_takes_over_the_name() {
    for (name, build) in
        [("narrow-parent", narrow as fn(&Path) -> Forest), ("thin-parent", thin), ("raw", on_raw)]
    {
        let removal = Removal::TakeOver("D".to_owned());
        let scenario = Scenario::delete(name, build, &["--keep", "parent"], removal, Some("D"));
        kill_often(&scenario, few());
    }
}

/// Both directions, under both names.
#[test]
fn a_run_becomes_one_image() {
    for (name, build) in [("narrow-run", narrow as fn(&Path) -> Forest), ("thin-run", thin)] {
        for keep_top in [false, true] {
            let keep = if keep_top { "top" } else { "base" };
            let command = vec!["merge", "D.qcow2", "--into", "P.qcow2", "--keep", keep];
            let after = Box::new(move |forest: &Forest| forest.merged("D", "P", keep_top));
            let moves = (!keep_top).then_some(("D", "P"));
            kill_often(&Scenario { name, build, command, goes: vec!["N", "P"], moves, after }, few());
        }
    }
}

#[test]
fn a_run_is_squashed() {
    let command = vec!["squash", ".", "N", "D"];
    let after = Box::new(|forest: &Forest| forest.merged("D", "N", true));
    let scenario = Scenario { name: "squash", build: narrow, command, goes: vec!["N"], moves: None, after };
    kill_often(&scenario, few());
}

/// A node goes with all that stands on it.
#[test]
fn a_branch_is_deleted() {
    let command = vec!["delete", ".", "D", "--children"];
    let after = Box::new(|forest: &Forest| forest.after("D", &Removal::Subtree));
    let goes = vec!["D", "E1", "E2"];
    let scenario = Scenario { name: "children", build: narrow, command, goes, moves: None, after };
    kill_often(&scenario, few());
}

#[test]
fn an_image_gets_another_backing_file() {
    for (onto, parent) in [("none", None), ("E1.qcow2", Some("E1"))] {
        let command = vec!["rebase", "E2.qcow2", "--onto", onto];
        let after = Box::new(move |forest: &Forest| forest.rebased("E2", parent));
        let scenario = Scenario { name: onto, build: narrow, command, goes: Vec::new(), moves: None, after };
        kill_often(&scenario, if long_mode() { 200 } else { 10 });
    }
}

/// How often a scenario is killed that is one of many.
fn few() -> u32 {
    if long_mode() { 200 } else { 6 }
}

/// P <- N <- D1..D4, each with a child of its own.
fn wide(dir: &Path) -> Forest {
    let mut nodes = vec![("P", None), ("N", Some("P"))];
    layer(dir, "P", None, 65536, &stripes(1, 0, 2, 80));
    layer(dir, "N", Some("P"), 4096, &stripes(2, 0, 1, 230));
    let dependents: &[(&str, &str, u64, u64)] =
        &[("D1", "E1", 65536, 5), ("D2", "E2", 4096, 9), ("D3", "E3", 512, 14), ("D4", "E4", 1 << 20, 40)];
    for (name, child, cluster, every) in dependents.iter().copied() {
        layer(dir, name, Some("N"), cluster, &stripes(3, 2, every, 24));
        layer(dir, child, Some(name), 65536, &stripes(4, 3, every + 1, 6));
        nodes.extend([(name, Some("N")), (child, Some(name))]);
    }
    read(dir, &nodes)
}

/// P <- N <- D <- E1, E2: N holds much, D little, so that copying D's clusters is the cheap way.
fn narrow(dir: &Path) -> Forest {
    layer(dir, "P", None, 65536, &stripes(1, 0, 2, 80));
    layer(dir, "N", Some("P"), 4096, &stripes(2, 0, 1, 230));
    layer(dir, "D", Some("N"), 65536, &stripes(3, 2, 6, 60));
    with_grandchildren(dir)
}

/// As [`narrow`], the other way round: D holds much, N little.
fn thin(dir: &Path) -> Forest {
    layer(dir, "P", None, 65536, &stripes(1, 0, 2, 80));
    layer(dir, "N", Some("P"), 65536, &stripes(2, 1, 6, 60));
    layer(dir, "D", Some("N"), 4096, &stripes(3, 2, 1, 230));
    with_grandchildren(dir)
}

fn with_grandchildren(dir: &Path) -> Forest {
    layer(dir, "E1", Some("D"), 65536, &stripes(4, 3, 9, 10));
    layer(dir, "E2", Some("D"), 512, &stripes(5, 4, 11, 10));
    read(dir, &[("P", None), ("N", Some("P")), ("D", Some("N")), ("E1", Some("D")), ("E2", Some("D"))])
}

/// N (raw) <- D <- E1.
fn on_raw(dir: &Path) -> Forest {
    raw(&dir.join("N.raw"), DISK, &stripes(1, 0, 1, 256));
    let over_raw = Layer { size: DISK + (1 << 20), backing: Some(("N.raw", Format::Raw)), options: "" };
    qcow2(&dir.join("D.qcow2"), over_raw, &stripes(2, 1, 2, 110));
    layer(dir, "E1", Some("D"), 65536, &stripes(3, 2, 9, 10));
    let nodes = [
        ("N", "N.raw", Format::Raw, None),
        ("D", "D.qcow2", Format::Qcow2, Some("N")),
        ("E1", "E1.qcow2", Format::Qcow2, Some("D")),
    ];
    Forest::read(dir, &nodes)
}

fn layer(dir: &Path, name: &str, parent: Option<&str>, cluster: u64, commands: &[String]) {
    let backing = parent.map(|parent| format!("{parent}.qcow2"));
    let options = format!("cluster_size={cluster}");
    let backing = backing.as_deref().map(|backing| (backing, Format::Qcow2));
    qcow2(&dir.join(format!("{name}.qcow2")), Layer { size: DISK, backing, options: &options }, commands);
}

/// Writes of 64 KiB: `count` of them from stripe `first` on, `every` so many, each with a byte of its own.
fn stripes(salt: u64, first: u64, every: u64, count: u64) -> Vec<String> {
    const STRIPE: u64 = 65536;
    let places = (0..count).map(|index| first + index * every).filter(|place| *place < DISK / STRIPE);
    let pattern = |place: u64| u8::try_from((place * 7 + salt * 31) % 255 + 1).unwrap();
    places.map(|place| fill(pattern(place), place, 1, STRIPE)).collect()
}

fn read(dir: &Path, nodes: &[(&str, Option<&str>)]) -> Forest {
    let files: Vec<String> = nodes.iter().map(|(name, _)| format!("{name}.qcow2")).collect();
    let named: Vec<_> = nodes
        .iter()
        .zip(&files)
        .map(|((name, parent), file)| (*name, file.as_str(), Format::Qcow2, *parent))
        .collect();
    Forest::read(dir, &named)
}

/// Kills the operation `kills` times, spread over the time that it takes when nobody kills it.
fn kill_often(scenario: &Scenario, kills: u32) {
    let seed = chosen_seed().unwrap_or(0x5e_ed);
    let _seed = OnFailure::print_seed(seed, scenario.name);
    let mut rng = Rng::new(seed);
    let work = WorkDir::new(&format!("kill-{}", scenario.name));
    let template = work.join("template");
    std::fs::create_dir(&template).unwrap();
    let before = (scenario.build)(&template);
    let after = (scenario.after)(&before);
    let case = Case { scenario, work: &work, template: &template, before: &before, after: &after };
    let whole = case.uninterrupted();
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for index in 0..kills {
        // One moment in each of `kills` equal slices.
        let slice = whole / kills;
        let delay = slice * index + slice * u32::try_from(rng.below(1000)).unwrap() / 1000;
        let again = rng.chance(35).then(|| whole * u32::try_from(rng.below(1000)).unwrap() / 1000);
        let label = format!("{}: kill {index} at {delay:?} of {whole:?}", scenario.name);
        *seen.entry(case.kill_once(delay, again, index % 2 == 1, &label)).or_default() += 1;
    }
    println!("{}: one run takes {whole:?}; {seen:?}", scenario.name);
    let hits: u32 = seen.iter().filter(|(what, _)| what.starts_with("killed")).map(|(_, count)| count).sum();
    assert!(hits * 3 >= kills, "too few kills came in time to mean anything: {seen:?}");
}

struct Case<'a> {
    scenario: &'a Scenario,
    work: &'a Path,
    template: &'a Path,
    before: &'a Forest,
    after: &'a Forest,
}

impl Case<'_> {
    fn command(&self, dir: &Path) -> Vec<String> {
        let place = |word: &&str| match *word {
            "." => text(dir).to_owned(),
            word if word.ends_with(".qcow2") => text(&dir.join(word)).to_owned(),
            word => word.to_owned(),
        };
        self.scenario.command.iter().map(place).chain(["--yes".to_owned()]).collect()
    }

    /// A fresh copy of the tree.
    fn copy(&self) -> std::path::PathBuf {
        let dir = self.work.join("tree");
        if dir.exists() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        copy_dir(self.template, &dir);
        dir
    }

    /// The middle one of three runs that nobody kills, each with the right result.
    fn uninterrupted(&self) -> Duration {
        let mut times = [(); 3].map(|()| {
            let dir = self.copy();
            let outcome = Tool::fastest(PLEACH).0.succeed(&self.command(&dir));
            assert_eq!(self.after.problems(&dir), Vec::<String>::new(), "without a kill: {outcome}");
            assert_eq!(unfinished(&dir), Vec::<String>::new(), "without a kill: {outcome}");
            outcome.elapsed
        });
        times.sort();
        times[1]
    }

    /// One kill, perhaps one of the `resume` that follows, and perhaps `undo` before that; what was seen, in words.
    fn kill_once(&self, delay: Duration, again: Option<Duration>, undo: bool, label: &str) -> String {
        let pleach = Tool::fastest(PLEACH).0;
        let dir = self.copy();
        let killed = pleach.spawn(&self.command(&dir)).kill_after(delay);
        assert!(matches!(killed.code, None | Some(0)), "{label}: {killed}");
        assert_eq!(self.problems_midway(&dir), Vec::<String>::new(), "{label}: {killed}");
        let had_journal = !unfinished(&dir).is_empty();
        if let Some(delay) = again {
            let killed = pleach.spawn(&["resume", text(&dir)]).kill_after(delay);
            assert!(matches!(killed.code, None | Some(0)), "{label}, then in resume: {killed}");
            assert_eq!(self.problems_midway(&dir), Vec::<String>::new(), "{label}, then in resume: {killed}");
        }
        if undo && !unfinished(&dir).is_empty() {
            let undone = pleach.run(&["undo", text(&dir)]);
            match undone.code {
                Some(0) => assert_eq!(self.stage(&dir, label, &undone), Stage::Before, "{label}: {undone}"),
                Some(6) => assert_eq!(self.problems_midway(&dir), Vec::<String>::new(), "{label}: {undone}"),
                _ => panic!("{label}: {undone}"),
            }
        }
        let had_journal_still = !unfinished(&dir).is_empty();
        let resumed = pleach.succeed(&["resume", text(&dir)]);
        assert!(had_journal_still || says_nothing_to_do(&resumed), "{label}: no journal, yet: {resumed}");
        let stage = self.stage(&dir, label, &resumed);
        self.second_resume_changes_nothing(&dir, label);
        if stage == Stage::Before {
            pleach.succeed(&self.command(&dir));
            assert_eq!(self.stage(&dir, label, &resumed), Stage::After, "{label}: once more");
        }
        let shown = pleach.json(&["tree", text(&dir), "--json"]);
        assert_eq!(self.after.tree_problems(&shown), Vec::<String>::new(), "{label}");
        let fate = if killed.code.is_none() { "killed" } else { "too late" };
        format!("{fate}, journal: {had_journal}, after resume: {stage:?}")
    }

    /// What stock QEMU would find wrong right now with any node that stays.
    fn problems_midway(&self, dir: &Path) -> Vec<String> {
        let nodes: Vec<&str> =
            self.before.iter().map(|(name, _)| name).filter(|n| !self.scenario.goes.contains(n)).collect();
        oracle::in_parallel(&nodes, |name| self.node_midway(dir, name)).into_iter().flatten().collect()
    }

    fn node_midway(&self, dir: &Path, name: &str) -> Vec<String> {
        let mut state = self.before.state(name);
        if let Some((mover, heir)) = self.scenario.moves
            && mover == name
            && !dir.join(&state.file).exists()
        {
            // It has moved to the other of its two legal names.
            state = self.after.state(heir);
        }
        let path = dir.join(&state.file);
        let mut found = content_problems(&path, state.format, self.before.state(name).digest);
        let check = oracle::check(&path, state.format);
        // A dirty image may have stale counts: QEMU rebuilds them before it writes.
        let dirty = || oracle::try_info(&path).is_ok_and(|info| info["dirty-flag"] == true);
        if !check.is_safe() && !dirty() {
            found.push(format!("{name}: {check:?}"));
        }
        found
    }

    /// After `resume`, all is as before the operation or as after it, and clean: nothing in between, nothing left.
    fn stage(&self, dir: &Path, label: &str, resumed: &Outcome) -> Stage {
        assert_eq!(unfinished(dir), Vec::<String>::new(), "{label}: {resumed}");
        let not_after = self.after.problems(dir);
        if not_after.is_empty() {
            return Stage::After;
        }
        let not_before = self.before.problems(dir);
        if not_before.is_empty() {
            return Stage::Before;
        }
        let files = image_names(dir);
        panic!("{label}: files {files:?}, not before: {not_before:#?}, not after: {not_after:#?} {resumed}");
    }

    fn second_resume_changes_nothing(&self, dir: &Path, label: &str) {
        let files = contents(dir);
        let resumed = Tool::fastest(PLEACH).0.succeed(&["resume", text(dir)]);
        assert_eq!(
            changes(&files, &contents(dir)),
            Vec::<String>::new(),
            "{label}: a second resume: {resumed}"
        );
        assert!(says_nothing_to_do(&resumed), "{label}: {resumed}");
    }
}

fn says_nothing_to_do(resumed: &Outcome) -> bool {
    resumed.text().to_lowercase().contains("nothing")
}
