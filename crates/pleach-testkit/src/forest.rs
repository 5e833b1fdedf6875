//! The model: which node is in which file, on which parent, with which content, and what a deletion makes of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::files::image_names;
use crate::oracle::{self, Digest, Format};
use crate::trees::RandomTree;

/// What is known of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The file's name in the directory.
    pub file: String,
    /// What the file is.
    pub format: Format,
    /// Name of the node whose file backs this one.
    pub parent: Option<String>,
    /// What the node reads as.
    pub digest: Digest,
    /// Whether the backing name is absolute; `None` where either is right.
    pub absolute: Option<bool>,
    /// What the internal snapshots of the file read as, by their ids.
    pub snapshots: Vec<(String, Digest)>,
}

/// A way to delete a node, as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The node's file goes; its children keep their files and get its parent.
    Pull,
    /// The node's file goes on with the content of this child, whose own file goes.
    TakeOver(String),
    /// The node and everything below it go.
    Subtree,
    /// Everything below the node goes.
    Descendants,
}

/// Every node of a directory, by name.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Forest {
    nodes: BTreeMap<String, State>,
}

impl Forest {
    /// Reads every node of a tree once, by stock qemu-img.
    ///
    /// # Panics
    /// If one cannot be read.
    #[must_use]
    pub fn survey(tree: &RandomTree) -> Self {
        let digests = oracle::in_parallel(&tree.nodes, |node| oracle::digest(&tree.path(node), node.format));
        let state = |(node, digest): (&crate::trees::Node, Digest)| {
            let parent =
                node.parent.and_then(|parent| tree.nodes.get(parent)).map(|parent| parent.name.clone());
            let absolute = parent.is_some().then_some(node.absolute);
            (
                node.name.clone(),
                State {
                    file: node.file.clone(),
                    format: node.format,
                    parent,
                    digest,
                    absolute,
                    snapshots: snapshots_of(&tree.path(node), node.format),
                },
            )
        };
        Self { nodes: tree.nodes.iter().zip(digests).map(state).collect() }
    }

    /// Reads the nodes of `dir` that are named here, each with its file, format and parent's name.
    ///
    /// # Panics
    /// If one cannot be read.
    #[must_use]
    pub fn read(dir: &Path, nodes: &[(&str, &str, Format, Option<&str>)]) -> Self {
        let state = |(name, file, format, parent): &(&str, &str, Format, Option<&str>)| {
            let digest = oracle::digest(&dir.join(file), *format);
            let parent = parent.map(str::to_owned);
            let snapshots = snapshots_of(&dir.join(file), *format);
            let file = (*file).to_owned();
            ((*name).to_owned(), State { file, format: *format, parent, digest, absolute: None, snapshots })
        };
        Self { nodes: oracle::in_parallel(nodes, state).into_iter().collect() }
    }

    /// All nodes, including raw files that nothing is backed by any more.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &State)> {
        self.nodes.iter().map(|(name, state)| (name.as_str(), state))
    }

    /// A node that must be there.
    ///
    /// # Panics
    /// If it is not.
    #[must_use]
    pub fn state(&self, name: &str) -> &State {
        self.nodes.get(name).unwrap_or_else(|| panic!("the model has no node {name}"))
    }

    /// Names of the nodes backed by `name`.
    #[must_use]
    pub fn children(&self, name: &str) -> Vec<String> {
        let backed = self.nodes.iter().filter(|(_, state)| state.parent.as_deref() == Some(name));
        backed.map(|(name, _)| name.clone()).collect()
    }

    /// Names of the nodes that stand on `name`, directly or not.
    #[must_use]
    pub fn descendants(&self, name: &str) -> Vec<String> {
        let mut found = self.children(name);
        let mut next = 0;
        while let Some(name) = found.get(next).cloned() {
            found.extend(self.children(&name));
            next += 1;
        }
        found
    }

    /// Names of the nodes that a tool without a catalog shows: a raw file counts only if something is backed by it.
    #[must_use]
    pub fn visible(&self) -> Vec<String> {
        let shown =
            |name: &str, state: &State| state.format == Format::Qcow2 || !self.children(name).is_empty();
        self.iter().filter(|(name, state)| shown(name, state)).map(|(name, _)| name.to_owned()).collect()
    }

    /// The model after deleting `name`.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn after(&self, name: &str, removal: &Removal) -> Self {
        let mut after = self.clone();
        match removal {
            Removal::Pull => after.reparent(name, self.state(name).parent.as_deref()),
            Removal::TakeOver(child) => after.take_over(name, child),
            Removal::Subtree | Removal::Descendants => {
                after.nodes.retain(|other, _| !self.descendants(name).contains(other));
            }
        }
        if matches!(removal, Removal::Pull | Removal::Subtree) {
            after.nodes.remove(name);
        }
        after
    }

    /// The model after `name` got another backing file, or none, and reads the same.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn rebased(&self, name: &str, parent: Option<&str>) -> Self {
        let mut after = self.clone();
        let state = after.nodes.get_mut(name).unwrap_or_else(|| panic!("the model has no node {name}"));
        state.parent = parent.map(str::to_owned);
        state.absolute = if parent.is_some() { state.absolute } else { None };
        after
    }

    /// The model after the run from `top` down to `base` has become one file, called as `top` was or as `base` was.
    ///
    /// # Panics
    /// If there is no such run.
    #[must_use]
    pub fn merged(&self, top: &str, base: &str, keep_top: bool) -> Self {
        let mut after = self.clone();
        let above_base = |name: &String| name != base;
        let between: Vec<String> = self.ancestors(top).into_iter().take_while(above_base).collect();
        after.nodes.retain(|name, _| !between.contains(name));
        let parent = self.state(base).parent.clone();
        if keep_top {
            after.nodes.remove(base);
            return after.rebased(top, parent.as_deref());
        }
        after.take_over(base, top);
        after
    }

    /// Names of the nodes that `name` stands on, nearest first.
    #[must_use]
    pub fn ancestors(&self, name: &str) -> Vec<String> {
        std::iter::successors(self.state(name).parent.clone(), |name| self.state(name).parent.clone())
            .collect()
    }

    fn reparent(&mut self, from: &str, to: Option<&str>) {
        for state in self.nodes.values_mut().filter(|state| state.parent.as_deref() == Some(from)) {
            state.parent = to.map(str::to_owned);
            state.absolute = if to.is_some() { state.absolute } else { None };
        }
    }

    fn take_over(&mut self, name: &str, child: &str) {
        let old = self.state(name).clone();
        let child_state = self.nodes.remove(child).unwrap_or_else(|| panic!("the model has no node {child}"));
        self.reparent(name, old.parent.as_deref());
        self.reparent(child, Some(name));
        let (digest, snapshots) = (child_state.digest, child_state.snapshots);
        self.nodes.insert(name.to_owned(), State { digest, snapshots, absolute: None, ..old });
    }

    /// The model after `name` got another name and another file.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn renamed(&self, name: &str, new: &str, file: &str, format: Format) -> Self {
        let mut after = self.clone();
        let old = after.nodes.remove(name).unwrap_or_else(|| panic!("the model has no node {name}"));
        after.reparent(name, Some(new));
        after.nodes.insert(new.to_owned(), State { file: file.to_owned(), format, absolute: None, ..old });
        after
    }

    /// The model after everything that the files from `top` down to `base` hold has gone down into `base`.
    ///
    /// # Panics
    /// If there is no such run.
    #[must_use]
    pub fn committed(&self, top: &str, base: &str) -> Self {
        let mut after = self.clone();
        let above_base = |name: &String| name != base;
        let between: Vec<String> = self.ancestors(top).into_iter().take_while(above_base).collect();
        after.nodes.retain(|name, _| !between.contains(name));
        let digest = self.state(top).digest;
        if let Some(base) = after.nodes.get_mut(base) {
            base.digest = digest;
        }
        if let Some(state) = after.nodes.get_mut(top) {
            state.parent = Some(base.to_owned());
        }
        after
    }

    /// Everything in which `dir` differs from the model: files, contents, backing links, consistency.
    /// Empty if nothing does.
    #[must_use]
    pub fn problems(&self, dir: &Path) -> Vec<String> {
        let mut found = self.file_problems(dir);
        let states: Vec<&State> = self.nodes.values().collect();
        found.extend(
            oracle::in_parallel(&states, |state| self.node_problems(dir, state)).into_iter().flatten(),
        );
        found
    }

    /// As [`problems`](Self::problems), but only what may have come from a change of the files that are named: nodes that
    /// stand on none of them are not read, and only these files are checked.
    #[must_use]
    pub fn problems_of(&self, dir: &Path, changed: &[String]) -> Vec<String> {
        let mut found = self.file_problems(dir);
        let touched = |name: &str| changed.contains(&self.state(name).file);
        let names: Vec<&str> = self.nodes.keys().map(String::as_str).collect();
        let reads = |name: &&str| touched(name) || self.ancestors(name).iter().any(|name| touched(name));
        let names: Vec<&str> = names.into_iter().filter(reads).collect();
        let problems = |name: &&str| match touched(name) {
            true => self.node_problems(dir, self.state(name)),
            false => content_problems_of(dir, self.state(name)),
        };
        found.extend(oracle::in_parallel(&names, problems).into_iter().flatten());
        found
    }

    /// Files that should be there and are not, and the other way round.
    fn file_problems(&self, dir: &Path) -> Vec<String> {
        let there = image_names(dir);
        let wanted: Vec<&String> = self.nodes.values().map(|state| &state.file).collect();
        let missing =
            wanted.iter().filter(|name| !there.contains(name)).map(|name| format!("{name} is missing"));
        let extra =
            there.iter().filter(|name| !wanted.contains(name)).map(|name| format!("{name} is left over"));
        missing.chain(extra).collect()
    }

    fn node_problems(&self, dir: &Path, state: &State) -> Vec<String> {
        let path = dir.join(&state.file);
        let mut found = content_problems_of(dir, state);
        let check = oracle::check(&path, state.format);
        if !check.is_clean() {
            found.push(format!("{}: not clean: {check:?}", state.file));
        }
        if state.format == Format::Qcow2 {
            found.extend(self.link_problems(dir, state));
        }
        found
    }

    fn link_problems(&self, dir: &Path, state: &State) -> Vec<String> {
        let info = match oracle::try_info(&dir.join(&state.file)) {
            Ok(info) => info,
            Err(error) => return vec![error],
        };
        let word = |key| info.get(key).and_then(Value::as_str);
        let stored = word("backing-filename");
        let parent = state.parent.as_deref().map(|parent| self.state(parent));
        let target = stored.map(|stored| dir.join(stored));
        let wanted = parent.map(|parent| dir.join(&parent.file));
        let same = target.as_deref().map(real) == wanted.as_deref().map(real);
        let format = word("backing-filename-format") == parent.map(|parent| parent.format.name());
        let style =
            state.absolute.is_none() || stored.map(|stored| stored.starts_with('/')) == state.absolute;
        [
            (same, "names another backing file"),
            (format, "names another backing format"),
            (style, "changed between relative and absolute"),
        ]
        .iter()
        .filter(|(fine, _)| !fine)
        .map(|(_, what)| {
            format!("{}: {what}: {stored:?} ({:?})", state.file, word("backing-filename-format"))
        })
        .collect()
    }

    /// What `pleach tree --json` says differently from the model; empty if nothing.
    #[must_use]
    pub fn tree_problems(&self, document: &Value) -> Vec<String> {
        let shown = document.get("nodes").and_then(Value::as_array).cloned().unwrap_or_default();
        let word = |node: &Value, key| node.get(key).and_then(Value::as_str).map(str::to_owned);
        let describe = |node: &Value| {
            let file = node.get("storage").and_then(Value::as_object).and_then(|disks| disks.values().next());
            let file = file.and_then(|storage| word(storage, "file"));
            (word(node, "name"), (word(node, "kind"), word(node, "parent"), file))
        };
        let expected = |name: String| {
            let kind = if self.children(&name).is_empty() { "head" } else { "snapshot" };
            let state = self.state(&name);
            (Some(name), (Some(kind.to_owned()), state.parent.clone(), Some(state.file.clone())))
        };
        let shown: BTreeMap<_, _> = shown.iter().map(describe).collect();
        let wanted: BTreeMap<_, _> = self.visible().into_iter().map(expected).collect();
        crate::files::changes(&keyed(wanted), &keyed(shown))
    }
}

/// What the internal snapshots of an image read as, by their ids.
fn snapshots_of(path: &Path, format: Format) -> Vec<(String, Digest)> {
    if format == Format::Raw {
        return Vec::new();
    }
    let info = oracle::info(path);
    let ids = info.get("snapshots").and_then(Value::as_array).into_iter().flatten();
    let ids = ids.filter_map(|snapshot| snapshot.get("id")?.as_str());
    let digest = |id| oracle::try_snapshot_digest(path, id).unwrap_or_else(|error| panic!("{error}"));
    ids.map(|id| (id.to_owned(), digest(id))).collect()
}

/// In what the node and its internal snapshots read differently from the model.
fn content_problems_of(dir: &Path, state: &State) -> Vec<String> {
    let path = dir.join(&state.file);
    let mut found = content_problems(&path, state.format, state.digest);
    for (id, wanted) in &state.snapshots {
        match oracle::try_snapshot_digest(&path, id) {
            Ok(digest) if digest == *wanted => {}
            Ok(digest) => found.push(format!("{}@{id}: reads as {digest}, was {wanted}", state.file)),
            Err(error) => found.push(error),
        }
    }
    found
}

/// What `path` reads as, if that is not `wanted`.
#[must_use]
pub fn content_problems(path: &Path, format: Format, wanted: Digest) -> Vec<String> {
    match oracle::try_digest(path, format) {
        Ok(digest) if digest == wanted => Vec::new(),
        Ok(digest) => vec![format!("{}: reads as {digest}, was {wanted}", path.display())],
        Err(error) => vec![error],
    }
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

fn keyed<T>(map: BTreeMap<Option<String>, T>) -> BTreeMap<String, T> {
    map.into_iter()
        .map(|(name, value)| (name.unwrap_or_else(|| "(a node without a name)".to_owned()), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Forest, Removal};
    use crate::files::WorkDir;
    use crate::layers::{Layer, fill, qcow2, raw};
    use crate::oracle::{Format, qemu_img_in};

    const SIZE: u64 = 1 << 20;

    /// A (raw) <- B <- D, A <- C.
    fn sample(dir: &std::path::Path) -> Forest {
        raw(&dir.join("A.raw"), SIZE, &[fill(1, 0, 4, 65536)]);
        let over = |backing| Layer { size: SIZE, backing: Some(backing), options: "" };
        qcow2(&dir.join("B.qcow2"), over(("A.raw", Format::Raw)), &[fill(2, 1, 1, 65536)]);
        qcow2(&dir.join("C.qcow2"), over(("A.raw", Format::Raw)), &[fill(3, 2, 1, 65536)]);
        qcow2(&dir.join("D.qcow2"), over(("B.qcow2", Format::Qcow2)), &[fill(4, 3, 1, 65536)]);
        Forest::read(
            dir,
            &[
                ("A", "A.raw", Format::Raw, None),
                ("B", "B.qcow2", Format::Qcow2, Some("A")),
                ("C", "C.qcow2", Format::Qcow2, Some("A")),
                ("D", "D.qcow2", Format::Qcow2, Some("B")),
            ],
        )
    }

    #[test]
    fn a_fresh_tree_has_no_problems_and_damage_shows() {
        let work = WorkDir::new("forest");
        let forest = sample(&work);
        assert_eq!(forest.problems(&work), Vec::<String>::new());
        // A deletion that qemu-img makes: what B has goes into D.
        qemu_img_in(&work, &["rebase", "-b", "A.raw", "-F", "raw", "D.qcow2"]);
        std::fs::remove_file(work.join("B.qcow2")).unwrap();
        assert_eq!(forest.after("B", &Removal::Pull).problems(&work), Vec::<String>::new());
        assert!(!forest.problems(&work).is_empty(), "B is gone, and the model before must say so");
        // The same without the data: D loses what it read through B.
        qemu_img_in(&work, &["rebase", "-u", "-b", "C.qcow2", "-F", "qcow2", "D.qcow2"]);
        assert!(!forest.after("B", &Removal::Pull).problems(&work).is_empty());
    }

    #[test]
    fn removals_change_names_and_parents() {
        let work = WorkDir::new("removals");
        let forest = sample(&work);
        let parents = |forest: &Forest| -> Vec<(String, Option<String>)> {
            forest.iter().map(|(name, state)| (name.to_owned(), state.parent.clone())).collect()
        };
        let some = |name: &str| Some(name.to_owned());
        let named = |name: &str, parent: Option<&str>| (name.to_owned(), parent.and_then(some));
        let cases = [
            (Removal::Pull, "A", vec![named("B", None), named("C", None), named("D", Some("B"))]),
            (
                Removal::TakeOver("B".into()),
                "A",
                vec![named("A", None), named("C", None), named("D", Some("A"))],
            ),
            (Removal::Subtree, "B", vec![named("A", None), named("C", Some("A"))]),
            (Removal::Descendants, "A", vec![named("A", None)]),
        ];
        for (removal, victim, wanted) in cases {
            assert_eq!(parents(&forest.after(victim, &removal)), wanted, "{removal:?}");
        }
        assert_eq!(forest.after("A", &Removal::Descendants).visible(), Vec::<String>::new());
    }

    #[test]
    fn tree_documents_are_compared_by_name_kind_parent_and_file() {
        let work = WorkDir::new("documents");
        let forest = sample(&work).after("A", &Removal::Pull);
        let node = |name: &str, kind: &str, parent: Option<&str>| {
            json!({"name": name, "kind": kind, "parent": parent,
                "storage": {"vda": {"kind": "external", "file": format!("{name}.qcow2")}}})
        };
        let right = json!({"nodes": [node("B", "snapshot", None), node("C", "head", None), node("D", "head", Some("B"))]});
        assert_eq!(forest.tree_problems(&right), Vec::<String>::new());
        let wrong = json!({"nodes": [node("B", "snapshot", None), node("D", "head", Some("C"))]});
        assert_eq!(forest.tree_problems(&wrong).len(), 2);
    }
}
