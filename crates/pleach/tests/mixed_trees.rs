//! Random histories of trees with one to three disks, internal and external snapshots mixed: after every operation each
//! node reads as it should, by stock qemu-img, and the tree is what the rules say.
//!
//! `PLEACH_LONG=1` runs 1,000 histories; `PLEACH_SEED=…` runs one again, `PLEACH_KEEP=1` keeps its files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pleach_testkit::oracle::{self, Digest, qemu_img, qemu_io, text};
use pleach_testkit::{Format, OnFailure, Rng, Tool, WorkDir, chosen_seed, long_mode};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const SIZE: u64 = 1 << 20;
const OPERATIONS: usize = 24;

#[test]
fn every_node_reads_as_it_should_after_every_operation() {
    if let Some(seed) = chosen_seed() {
        history(seed);
        return;
    }
    let histories = if long_mode() { 1000 } else { 8 };
    let seeds: Vec<u64> = (0x3e0..0x3e0 + histories).collect();
    oracle::in_parallel(&seeds, |&seed| history(seed));
}

/// What a node reads as, by disk.
type Content = BTreeMap<String, Digest>;

#[derive(Clone, Debug)]
struct Node {
    parent: Option<String>,
    content: Content,
}

/// What the tree should be.
#[derive(Clone, Debug, Default)]
struct Model {
    nodes: BTreeMap<String, Node>,
    current: Option<String>,
    heads: Content,
}

impl Model {
    fn below(&self, name: &str) -> Vec<String> {
        let mut found = vec![name.to_owned()];
        let mut at = 0;
        while at < found.len() {
            let on = found[at].clone();
            found.extend(
                self.nodes.iter().filter(|(_, n)| n.parent.as_ref() == Some(&on)).map(|(n, _)| n.clone()),
            );
            at += 1;
        }
        found
    }

    fn take(&mut self, name: &str, disks: &[String]) {
        let content = disks.iter().map(|d| (d.clone(), self.heads[d])).collect();
        let parent = self.current.replace(name.to_owned());
        self.nodes.insert(name.to_owned(), Node { parent, content });
    }

    fn go_to(&mut self, name: &str) {
        let content = self.nodes[name].content.clone();
        self.heads.extend(content);
        self.current = Some(name.to_owned());
    }

    fn delete(&mut self, name: &str) {
        let gone = self.nodes.remove(name).unwrap();
        for node in self.nodes.values_mut().filter(|n| n.parent.as_deref() == Some(name)) {
            node.parent.clone_from(&gone.parent);
        }
        if self.current.as_deref() == Some(name) {
            self.current = gone.parent;
        }
    }

    /// The branch goes; its root too, unless that is to stay.
    fn delete_branch(&mut self, name: &str, root_too: bool) {
        let mut below = self.below(name);
        let parent = self.nodes[name].parent.clone();
        if !root_too {
            below.remove(0);
        }
        let moves = self.current.as_ref().is_some_and(|c| below.contains(c));
        self.nodes.retain(|n, _| !below.contains(n));
        if moves {
            let to = if root_too { parent } else { Some(name.to_owned()) };
            self.go_to(&to.unwrap());
        }
    }

    fn rename(&mut self, name: &str, to: &str) {
        let node = self.nodes.remove(name).unwrap();
        self.nodes.insert(to.to_owned(), node);
        for node in self.nodes.values_mut().filter(|n| n.parent.as_deref() == Some(name)) {
            node.parent = Some(to.to_owned());
        }
        if self.current.as_deref() == Some(name) {
            self.current = Some(to.to_owned());
        }
    }
}

struct History {
    dir: PathBuf,
    catalog: String,
    model: Model,
    disks: Vec<String>,
    log: Vec<String>,
    /// Digests of states, by the files that they are read from, as these were then.
    seen: BTreeMap<String, Digest>,
}

fn history(seed: u64) {
    let _seed = OnFailure::print_seed(seed, "mixed_trees");
    let rng = &mut Rng::new(seed);
    let work = WorkDir::new("mixed");
    let dir = work.join("tree");
    fs::create_dir(&dir).unwrap();
    let disks: Vec<String> =
        (0..rng.between(1, 3)).map(|n| format!("vd{}", char::from(b'a' + n as u8))).collect();
    let mut init = vec!["init".to_owned(), "vm".to_owned()];
    let mut model = Model::default();
    for disk in &disks {
        let image = dir.join(format!("{disk}.qcow2"));
        let cluster = rng.pick::<&str>(&["512", "4k", "64k"]);
        let options = format!("cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&image), &SIZE.to_string()]);
        scribble(rng, &image);
        model.heads.insert(disk.clone(), oracle::digest(&image, Format::Qcow2));
        init.extend(["--disk".to_owned(), format!("{disk}={}", text(&image))]);
    }
    let args: Vec<&str> = init.iter().map(String::as_str).collect();
    let made = Tool::new(PLEACH).run(&args);
    assert_eq!(made.code, Some(0), "{made}");
    let catalog = text(&dir.join(".pleach/vm.tree")).to_owned();
    let mut history = History { dir, catalog, model, disks, log: Vec::new(), seen: BTreeMap::new() };
    history.check();
    for n in 0..OPERATIONS {
        history.operation(rng, n);
        history.check();
    }
}

fn scribble(rng: &mut Rng, image: &Path) {
    let times = 1 + rng.below(3);
    let write = |_| {
        let len = (1 + rng.below(200)) * 512;
        let at = rng.below((SIZE - len) / 512) * 512;
        match rng.below(5) {
            0 => format!("write -q -z {at} {len}"),
            _ => format!("write -q -P {} {at} {len}", 1 + rng.below(250)),
        }
    };
    let writes: Vec<String> = (0..times).map(write).collect();
    qemu_io(image, Format::Qcow2, &writes);
}

impl History {
    fn pleach(&mut self, args: &[&str]) -> Value {
        self.log.push(args.join(" "));
        let outcome = Tool::new(PLEACH).run(args);
        assert_eq!(outcome.code, Some(0), "{outcome}\nafter:\n{}", self.log.join("\n"));
        serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null)
    }

    fn tree(&mut self) -> Value {
        let catalog = self.catalog.clone();
        self.pleach(&["tree", &catalog, "--json"])
    }

    fn active(&mut self, disk: &str) -> PathBuf {
        let tree = self.tree();
        let all = tree["disks"].as_array().unwrap();
        let found = all.iter().find(|d| d["name"] == disk).unwrap();
        self.dir.join(found["active"].as_str().unwrap())
    }

    fn operation(&mut self, rng: &mut Rng, n: usize) {
        let catalog = self.catalog.clone();
        let names: Vec<String> = self.model.nodes.keys().cloned().collect();
        let fresh = format!("n{n}");
        // Something to lose or to keep.
        if rng.chance(60) {
            let disk = rng.pick(&self.disks).clone();
            let image = self.active(&disk);
            scribble(rng, &image);
            self.log.push(format!("(write to {})", image.display()));
            self.model.heads.insert(disk, oracle::digest(&image, Format::Qcow2));
        }
        let choice = if names.is_empty() { 0 } else { rng.below(100) };
        let name = if names.is_empty() { String::new() } else { rng.pick(&names).clone() };
        match choice {
            0..40 => {
                let mut args = vec!["snapshot".to_owned(), catalog, fresh.clone()];
                match rng.below(4) {
                    0 => args.push("--internal".to_owned()),
                    1 => args.push("--external".to_owned()),
                    2 => args.extend(self.disks.iter().map(|d| {
                        format!("--kind={d}={}", if rng.chance(50) { "internal" } else { "external" })
                    })),
                    _ => {}
                }
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                self.pleach(&args);
                self.model.take(&fresh, &self.disks.clone());
            }
            40..62 => {
                if rng.chance(50) {
                    self.pleach(&["revert", &catalog, &name, "--discard", "--yes"]);
                } else {
                    self.pleach(&["revert", &catalog, &name, "--save-as", &fresh, "--yes"]);
                    self.model.take(&fresh, &self.disks.clone());
                }
                self.model.go_to(&name);
            }
            62..84 => {
                let keep = *rng.pick(&["child", "child", "auto", "parent"]);
                let keep = if keep == "parent" && self.dependents(&name) != 1 { "child" } else { keep };
                self.pleach(&["delete", &catalog, &name, "--keep", keep, "--yes"]);
                self.model.delete(&name);
            }
            84..90 if self.model.nodes[&name].parent.is_some() => {
                self.pleach(&["delete", &catalog, &name, "--children", "--yes"]);
                self.model.delete_branch(&name, true);
            }
            84..95 => {
                self.pleach(&["delete", &catalog, &name, "--children-only", "--yes"]);
                self.model.delete_branch(&name, false);
            }
            _ => {
                self.pleach(&["rename", &catalog, &name, &fresh]);
                self.model.rename(&name, &fresh);
            }
        }
    }

    /// How many files stand on a node's, at most on one disk.
    fn dependents(&mut self, name: &str) -> usize {
        let tree = self.tree();
        let node = tree["nodes"].as_array().unwrap().iter().find(|n| n["name"] == name).unwrap().clone();
        let counts = node["storage"].as_object().unwrap().values().map(|s| {
            let file = s["file"].as_str().unwrap();
            let over = |p: &PathBuf| backing(p).is_some_and(|b| b.file_name().is_some_and(|n| n == file));
            images(&self.dir).iter().filter(|p| over(p)).count()
        });
        counts.max().unwrap_or(0)
    }

    fn check(&mut self) {
        let tree = self.tree();
        let mut problems = Vec::new();
        let mut wanted: Vec<(String, Option<String>)> =
            self.model.nodes.iter().map(|(n, node)| (n.clone(), node.parent.clone())).collect();
        let word = |v: &Value| v.as_str().map(str::to_owned);
        let nodes = tree["nodes"].as_array().unwrap();
        let snapshots = nodes.iter().filter(|n| n["kind"] == "snapshot");
        let mut shown: Vec<(String, Option<String>)> =
            snapshots.map(|n| (word(&n["name"]).unwrap(), word(&n["parent"]))).collect();
        shown.sort();
        wanted.sort();
        if shown != wanted {
            problems.push(format!("the tree is {shown:?}, should be {wanted:?}"));
        }
        if word(&tree["current"]) != self.model.current {
            problems.push(format!("current is {}, should be {:?}", tree["current"], self.model.current));
        }
        if tree["differences"].as_array().is_some_and(|d| !d.is_empty()) {
            problems.push(format!("differences: {}", tree["differences"]));
        }
        for node in nodes {
            let name = word(&node["name"]).unwrap();
            let content = match self.model.nodes.get(&name) {
                Some(node) => node.content.clone(),
                None => self.model.heads.clone(),
            };
            for (disk, storage) in node["storage"].as_object().unwrap() {
                let digest = self.digest(storage);
                if digest.as_ref().ok() != content.get(disk) {
                    problems
                        .push(format!("{name} on {disk} reads as {digest:?}, not {:?}", content.get(disk)));
                }
            }
        }
        for image in images(&self.dir) {
            let check = oracle::check(&image, Format::Qcow2);
            if !check.is_clean() {
                problems.push(format!("{}: {check:?}", image.display()));
            }
        }
        assert!(
            problems.is_empty(),
            "{}\nafter:\n{}\n{}",
            problems.join("\n"),
            self.log.join("\n"),
            Tool::new(PLEACH).run(&["tree", &self.catalog]).stdout
        );
    }

    /// What a state reads as; from memory, if no file that it is read from has changed.
    fn digest(&mut self, storage: &Value) -> Result<Digest, String> {
        let file = self.dir.join(storage["file"].as_str().unwrap());
        let id = storage["id"].as_str();
        let mut key = format!("{id:?}");
        let mut at = Some(file.clone());
        while let Some(path) = at {
            let meta = fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            key.push_str(&format!(" {} {} {} {}", meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()));
            at = backing(&path);
        }
        if let Some(&known) = self.seen.get(&key) {
            return Ok(known);
        }
        let digest = match id {
            Some(id) => oracle::try_snapshot_digest(&file, id)?,
            None => oracle::try_digest(&file, Format::Qcow2)?,
        };
        self.seen.insert(key, digest);
        Ok(digest)
    }
}

fn images(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    all.filter(|p| p.extension().is_some_and(|e| e == "qcow2")).collect()
}

/// The backing file that the header names.
fn backing(path: &Path) -> Option<PathBuf> {
    let bytes = fs::read(path).ok()?;
    let at = usize::try_from(u64::from_be_bytes(*bytes.get(8..)?.first_chunk()?)).ok()?;
    let len = usize::try_from(u32::from_be_bytes(*bytes.get(16..)?.first_chunk()?)).ok()?;
    let name = str::from_utf8(bytes.get(at..at + len)?).ok()?;
    (at > 0).then(|| path.with_file_name(name))
}
