//! The survey as a hierarchy: a node for every image and internal snapshot, with names that people can type.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pleach_image::escape;
use pleach_lineage::{Kind, Lineage, Node, NodeId, Storage, order, smallvec};
use pleach_store::FileId;

use crate::survey::{Backing, FileFormat, Survey};
use crate::{Error, ErrorKind, Result};

/// The one disk of a tree that no catalog describes.
pub const ONLY_DISK: &str = "vda";

/// What a node stands for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The active state of a file, by index into [`Survey::files`].
    File(usize),
    /// An internal snapshot: file index, index into its snapshot table.
    Snapshot(usize, usize),
}

/// The nodes of a survey.
#[derive(Debug)]
pub struct Family {
    /// The hierarchy.
    pub lineage: Lineage,
    states: BTreeMap<NodeId, Vec<State>>,
    nodes: BTreeMap<usize, NodeId>,
}

impl Family {
    /// Builds the hierarchy from backing links and snapshot tables; file names are shown relative to `base`.
    ///
    /// The parent of an internal snapshot is not recorded anywhere: the snapshots of a file are taken to follow one
    /// another in the order of their creation, and marked as guessed.
    ///
    /// # Errors
    /// None in practice: names are made unique.
    pub fn of(survey: &Survey, base: &Path) -> Result<Self> {
        let names = Names::of(survey, base);
        let reads = survey.reads();
        let by_path: BTreeMap<&Path, usize> =
            survey.files.iter().enumerate().map(|(i, f)| (f.path.as_path(), i)).collect();
        let sorted: Vec<FileId> =
            by_path.values().filter_map(|&i| survey.files.get(i)).map(|f| f.stat.id).collect();
        let mut family = Self { lineage: Lineage::new(), states: BTreeMap::new(), nodes: BTreeMap::new() };
        for id in order::backing_first(sorted, &reads) {
            if let Some(index) = survey.find_id(id) {
                family.add(survey, index, &names)?;
            }
        }
        let heads: Vec<NodeId> = family.heads().collect();
        if let [only] = heads.as_slice() {
            let parent = family.lineage.parent(*only);
            family.lineage.set_current(parent)?;
        }
        Ok(family)
    }

    /// A hierarchy that is known already, with what each of its nodes stands for.
    pub(crate) fn of_states(lineage: Lineage, states: BTreeMap<NodeId, Vec<State>>) -> Self {
        let files = states.iter().flat_map(|(&id, states)| {
            states.iter().filter_map(move |state| match state {
                State::File(index) => Some((*index, id)),
                State::Snapshot(..) => None,
            })
        });
        let nodes = files.collect();
        Self { lineage, states, nodes }
    }

    fn add(&mut self, survey: &Survey, index: usize, names: &Names) -> Result<()> {
        let Some(file) = survey.files.get(index) else { return Ok(()) };
        if file.format == FileFormat::Raw && file.dependents.is_empty() {
            return Ok(());
        }
        let shown = names.file(index);
        let mut parent = match file.backing {
            Backing::File(b) => self.nodes.get(&b).copied(),
            _ => None,
        };
        let mut guessed = false;
        for (i, snapshot) in file.snapshots.iter().enumerate() {
            let storage = Storage::Internal {
                file: shown.clone(),
                snapshot: escape(&snapshot.name),
                id: escape(&snapshot.id),
            };
            let node = Node {
                parent,
                storage: smallvec![(ONLY_DISK.to_owned(), storage)],
                created: Some(snapshot.date_seconds.into()),
                parent_guessed: guessed,
                ..Node::new(names.snapshot(index, i), Kind::Snapshot)
            };
            let id = self.lineage.insert(node)?;
            self.states.insert(id, vec![State::Snapshot(index, i)]);
            parent = Some(id);
            guessed = true;
        }
        let kind = if file.dependents.is_empty() { Kind::Head } else { Kind::Snapshot };
        let node = Node {
            parent,
            storage: smallvec![(ONLY_DISK.to_owned(), Storage::External { file: shown })],
            parent_guessed: guessed,
            ..Node::new(names.node(index), kind)
        };
        let id = self.lineage.insert(node)?;
        self.states.insert(id, vec![State::File(index)]);
        self.nodes.insert(index, id);
        Ok(())
    }

    /// The writable ends of all branches.
    pub fn heads(&self) -> impl Iterator<Item = NodeId> {
        self.lineage.ids().filter(|&id| self.lineage.get(id).is_some_and(|n| n.kind == Kind::Head))
    }

    /// What a node stands for, on its first disk.
    pub fn state(&self, id: NodeId) -> Option<State> {
        self.states(id).first().copied()
    }

    /// What a node stands for, on every disk on which it could be found.
    pub fn states(&self, id: NodeId) -> &[State] {
        self.states.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    /// The node of a file's active state.
    pub fn node_of_file(&self, index: usize) -> Option<NodeId> {
        self.nodes.get(&index).copied()
    }

    /// The nodes that hang together with `node`: ancestors, descendants, and their other branches.
    pub fn tree_of(&self, node: NodeId) -> BTreeSet<NodeId> {
        let root = self.lineage.ancestors(node).last().unwrap_or(node);
        std::iter::once(root).chain(self.lineage.descendants(root)).collect()
    }

    /// The node that `name` means: a node's name, or the file name of an image.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none.
    pub fn resolve(&self, survey: &Survey, name: &str) -> Result<NodeId> {
        if let Some(id) = self.lineage.find(name) {
            return Ok(id);
        }
        let matches = |path: &Path| {
            path == Path::new(name)
                || path.file_name().is_some_and(|n| n == name)
                || path.file_stem().is_some_and(|n| n == name)
        };
        let found: Vec<NodeId> = survey
            .files
            .iter()
            .enumerate()
            .filter(|(_, f)| matches(&f.path))
            .filter_map(|(i, _)| self.node_of_file(i))
            .collect();
        match found.as_slice() {
            [one] => Ok(*one),
            [] => {
                let known: Vec<String> = self
                    .lineage
                    .ids()
                    .filter_map(|id| self.lineage.get(id))
                    .map(|n| n.name.clone())
                    .take(20)
                    .collect();
                Err(Error::new(ErrorKind::NotFound, format!("there is no node named \"{name}\""))
                    .hint(format!("the nodes are: {}", known.join(", "))))
            }
            several => {
                let names: Vec<&str> =
                    several.iter().filter_map(|&id| self.lineage.get(id)).map(|n| n.name.as_str()).collect();
                Err(Error::new(ErrorKind::Usage, format!("\"{name}\" may mean several nodes"))
                    .hint(format!("say which: {}", names.join(", "))))
            }
        }
    }
}

/// Names for nodes: the file's stem where that is unique, else its name, else its path.
struct Names {
    nodes: Vec<String>,
    files: Vec<String>,
    snapshots: BTreeMap<(usize, usize), String>,
}

impl Names {
    fn of(survey: &Survey, base: &Path) -> Self {
        let files: Vec<String> = survey.files.iter().map(|f| shown(&f.path, base)).collect();
        let part = |pick: fn(&Path) -> Option<&std::ffi::OsStr>| -> Vec<String> {
            let name = |f: &crate::survey::SurveyFile| pick(&f.path).map(|n| escape(n.as_encoded_bytes()));
            survey.files.iter().map(|f| name(f).unwrap_or_default()).collect()
        };
        let (stems, full) = (part(Path::file_stem), part(Path::file_name));
        let (stem_uses, full_uses) = (uses(&stems), uses(&full));
        let once = |uses: &BTreeMap<&str, usize>, name: &str| uses.get(name) == Some(&1);
        let mut taken = BTreeSet::new();
        let mut nodes = Vec::new();
        for ((stem, full), file) in stems.iter().zip(&full).zip(&files) {
            let name = if once(&stem_uses, stem) {
                stem
            } else if once(&full_uses, full) && !stem_uses.contains_key(full.as_str()) {
                full
            } else {
                file
            };
            taken.insert(name.clone());
            nodes.push(name.clone());
        }
        let mut snapshots = BTreeMap::new();
        for (i, file) in survey.files.iter().enumerate() {
            for (k, snapshot) in file.snapshots.iter().enumerate() {
                let (plain, id) = (escape(&snapshot.name), escape(&snapshot.id));
                let owner = nodes.get(i).cloned().unwrap_or_default();
                let options = [plain.clone(), format!("{owner}@{plain}"), format!("{owner}@{id}")];
                let free = options.into_iter().find(|n| !n.is_empty() && !taken.contains(n));
                let name = free.unwrap_or_else(|| format!("{owner}@{id}#{k}"));
                taken.insert(name.clone());
                snapshots.insert((i, k), name);
            }
        }
        Self { nodes, files, snapshots }
    }

    fn node(&self, file: usize) -> String {
        self.nodes.get(file).cloned().unwrap_or_default()
    }

    fn file(&self, file: usize) -> String {
        self.files.get(file).cloned().unwrap_or_default()
    }

    fn snapshot(&self, file: usize, index: usize) -> String {
        self.snapshots.get(&(file, index)).cloned().unwrap_or_default()
    }
}

fn uses(names: &[String]) -> BTreeMap<&str, usize> {
    let mut uses = BTreeMap::new();
    for name in names {
        *uses.entry(name.as_str()).or_default() += 1;
    }
    uses
}

/// `path` as people see it: relative to `base` where it lies under it.
pub fn shown(path: &Path, base: &Path) -> String {
    let relative: PathBuf = path.strip_prefix(base).map_or_else(|_| path.to_owned(), Path::to_owned);
    escape(relative.as_os_str().as_encoded_bytes())
}
