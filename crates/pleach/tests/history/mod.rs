//! A tree with several disks, and the model of what it should be: checked by stock qemu-img.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    dead_code,
    reason = "tests, each of which uses a part"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pleach_testkit::oracle::{self, Digest, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Outcome, Rng, Tool};
use serde_json::Value;

pub(crate) const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
/// Bytes of every disk.
pub(crate) const SIZE: u64 = 1 << 20;

/// What a node reads as, by disk.
pub(crate) type Content = BTreeMap<String, Digest>;

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) parent: Option<String>,
    pub(crate) content: Content,
}

/// What the tree should be.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) nodes: BTreeMap<String, Node>,
    pub(crate) current: Option<String>,
    pub(crate) heads: Content,
}

impl Model {
    pub(crate) fn below(&self, name: &str) -> Vec<String> {
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

    pub(crate) fn take(&mut self, name: &str, disks: &[String]) {
        let content = disks.iter().map(|d| (d.clone(), self.heads[d])).collect();
        let parent = self.current.replace(name.to_owned());
        self.nodes.insert(name.to_owned(), Node { parent, content });
    }

    pub(crate) fn go_to(&mut self, name: &str) {
        let content = self.nodes[name].content.clone();
        self.heads.extend(content);
        self.current = Some(name.to_owned());
    }

    pub(crate) fn delete(&mut self, name: &str) {
        let gone = self.nodes.remove(name).unwrap();
        for node in self.nodes.values_mut().filter(|n| n.parent.as_deref() == Some(name)) {
            node.parent.clone_from(&gone.parent);
        }
        if self.current.as_deref() == Some(name) {
            self.current = gone.parent;
        }
    }

    /// The branch goes; its root too, unless that is to stay.
    pub(crate) fn delete_branch(&mut self, name: &str, root_too: bool) {
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

    pub(crate) fn rename(&mut self, name: &str, to: &str) {
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

pub(crate) struct History {
    pub(crate) dir: PathBuf,
    pub(crate) catalog: String,
    pub(crate) model: Model,
    pub(crate) disks: Vec<String>,
    pub(crate) log: Vec<String>,
    /// Snapshots may be of some disks only.
    pub(crate) in_part: bool,
    /// Digests of states, by the files that they are read from, as these were then.
    seen: BTreeMap<String, Digest>,
    /// Images in which qemu-img has found nothing wrong, as they were then.
    clean: BTreeSet<String>,
    /// What `tree --json` said last, until something may have changed it.
    shown: Option<Value>,
}

pub(crate) fn scribble(rng: &mut Rng, image: &Path) {
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
    /// A tree called `vm` in the new directory `dir`: an image of each disk, with something in it.
    pub(crate) fn new(rng: &mut Rng, dir: PathBuf, disks: &[&str]) -> Self {
        fs::create_dir(&dir).unwrap();
        let mut init = vec!["init".to_owned(), "vm".to_owned()];
        let mut model = Model::default();
        for &disk in disks {
            let image = dir.join(format!("{disk}.qcow2"));
            let cluster = rng.pick::<&str>(&["512", "4k", "64k"]);
            let options = format!("cluster_size={cluster}");
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&image), &SIZE.to_string()]);
            scribble(rng, &image);
            model.heads.insert(disk.to_owned(), oracle::digest(&image, Format::Qcow2));
            init.extend(["--disk".to_owned(), format!("{disk}={}", text(&image))]);
        }
        let args: Vec<&str> = init.iter().map(String::as_str).collect();
        let made = Tool::new(PLEACH).run(&args);
        assert_eq!(made.code, Some(0), "{made}");
        let catalog = text(&dir.join(".pleach/vm.tree")).to_owned();
        let disks = disks.iter().map(|&d| d.to_owned()).collect();
        let (seen, clean) = (BTreeMap::new(), BTreeSet::new());
        Self { dir, catalog, model, disks, log: Vec::new(), seen, clean, shown: None, in_part: false }
    }

    /// The machine writes something.
    pub(crate) fn write(&mut self, rng: &mut Rng, disk: &str) {
        let image = self.active(disk);
        scribble(rng, &image);
        self.log.push(format!("(write to {})", image.display()));
        self.model.heads.insert(disk.to_owned(), oracle::digest(&image, Format::Qcow2));
    }

    pub(crate) fn snapshot(&mut self, name: &str, flags: &[&str]) {
        let catalog = self.catalog.clone();
        self.pleach(&[&["snapshot", &catalog, name], flags].concat());
        self.model.take(name, &self.disks.clone());
    }

    /// A snapshot of some disks, or of all if none is named.
    pub(crate) fn snapshot_of(&mut self, name: &str, disks: &[String]) {
        let catalog = self.catalog.clone();
        let named = disks.iter().flat_map(|disk| ["--disk", disk.as_str()]);
        let args: Vec<&str> = ["snapshot", &catalog, name].into_iter().chain(named).collect();
        self.pleach(&args);
        let all = self.disks.clone();
        self.model.take(name, if disks.is_empty() { &all } else { disks });
    }

    pub(crate) fn revert(&mut self, name: &str, save: Option<&str>) {
        let catalog = self.catalog.clone();
        match save {
            None => self.pleach(&["revert", &catalog, name, "--discard", "--yes"]),
            Some(save) => {
                let done = self.pleach(&["revert", &catalog, name, "--save-as", save, "--yes"]);
                let disks: Vec<String> = self.model.nodes[name].content.keys().cloned().collect();
                self.model.take(save, &disks);
                done
            }
        };
        self.model.go_to(name);
    }

    pub(crate) fn delete(&mut self, name: &str, flags: &[&str]) {
        let catalog = self.catalog.clone();
        let args = [&["delete", &catalog, name, "--yes"], flags].concat();
        if self.in_part && flags.iter().any(|flag| flag.starts_with("--children")) {
            // A disk that took no part in the node that stays goes on, or back to what it stood on.
            self.shown = None;
            self.log.push(args.join(" "));
            let outcome = Tool::new(PLEACH).run(&args);
            if outcome.code == Some(6) {
                self.log.push("(refused)".to_owned());
                return;
            }
            assert_eq!(outcome.code, Some(0), "{outcome}\nafter:\n{}", self.log.join("\n"));
            let before = self.model.clone();
            self.model.delete_branch(name, flags == ["--children"]);
            for disk in self.disks.clone() {
                let active = self.active(&disk);
                let digest = oracle::digest(&active, Format::Qcow2);
                let states = before.nodes.values().filter_map(|node| node.content.get(&disk));
                let to = self.model.current.as_ref().and_then(|c| self.model.nodes.get(c));
                if to.is_some_and(|to| !to.content.contains_key(&disk)) {
                    assert!(
                        states.chain([&before.heads[&disk]]).any(|d| *d == digest),
                        "{}",
                        self.log.join("\n")
                    );
                    self.model.heads.insert(disk, digest);
                }
            }
            return;
        }
        self.pleach(&args);
        match flags {
            ["--children"] => self.model.delete_branch(name, true),
            ["--children-only"] => self.model.delete_branch(name, false),
            _ => self.model.delete(name),
        }
    }

    /// What must not work, and must change nothing.
    pub(crate) fn refused(&mut self, args: &[&str]) -> Outcome {
        self.log.push(format!("{} (refused)", args.join(" ")));
        let outcome = Tool::new(PLEACH).run(args);
        assert!(outcome.code.is_some_and(|c| c > 0 && c < 100), "{outcome}");
        self.check();
        outcome
    }

    pub(crate) fn pleach(&mut self, args: &[&str]) -> Value {
        self.shown = None;
        self.log.push(args.join(" "));
        let outcome = Tool::new(PLEACH).run(args);
        assert_eq!(outcome.code, Some(0), "{outcome}\nafter:\n{}", self.log.join("\n"));
        serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null)
    }

    pub(crate) fn tree(&mut self) -> Value {
        if let Some(shown) = &self.shown {
            return shown.clone();
        }
        let catalog = self.catalog.clone();
        let tree = self.pleach(&["tree", &catalog, "--json"]);
        self.shown = Some(tree.clone());
        tree
    }

    pub(crate) fn active(&mut self, disk: &str) -> PathBuf {
        let tree = self.tree();
        let all = tree["disks"].as_array().unwrap();
        let found = all.iter().find(|d| d["name"] == disk).unwrap();
        self.dir.join(found["active"].as_str().unwrap())
    }

    /// How many files stand on a node's, at most on one disk.
    pub(crate) fn dependents(&mut self, name: &str) -> usize {
        let tree = self.tree();
        let node = tree["nodes"].as_array().unwrap().iter().find(|n| n["name"] == name).unwrap().clone();
        let counts = node["storage"].as_object().unwrap().values().map(|s| {
            let file = s["file"].as_str().unwrap();
            let over = |p: &PathBuf| backing(p).is_some_and(|b| b.file_name().is_some_and(|n| n == file));
            images(&self.dir).iter().filter(|p| over(p)).count()
        });
        counts.max().unwrap_or(0)
    }

    pub(crate) fn check(&mut self) {
        // Whatever was done since may have changed it.
        self.shown = None;
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
            let Ok(key) = state_of(&image) else { continue };
            if self.clean.contains(&key) {
                continue;
            }
            let check = oracle::check(&image, Format::Qcow2);
            if check.is_clean() {
                self.clean.insert(key);
            } else {
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
    pub(crate) fn digest(&mut self, storage: &Value) -> Result<Digest, String> {
        let file = self.dir.join(storage["file"].as_str().unwrap());
        let id = storage["id"].as_str();
        let mut key = format!("{id:?}");
        let mut at = Some(file.clone());
        while let Some(path) = at {
            key.push_str(&state_of(&path)?);
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

/// A file and when it was changed last, as text.
fn state_of(path: &Path) -> Result<String, String> {
    let meta = fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(format!(" {} {} {} {}", meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

pub(crate) fn images(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    all.filter(|p| p.extension().is_some_and(|e| e == "qcow2")).collect()
}

/// The backing file that the header names.
pub(crate) fn backing(path: &Path) -> Option<PathBuf> {
    let bytes = fs::read(path).ok()?;
    let at = usize::try_from(u64::from_be_bytes(*bytes.get(8..)?.first_chunk()?)).ok()?;
    let len = usize::try_from(u32::from_be_bytes(*bytes.get(16..)?.first_chunk()?)).ok()?;
    let name = str::from_utf8(bytes.get(at..at + len)?).ok()?;
    (at > 0).then(|| path.with_file_name(name))
}
