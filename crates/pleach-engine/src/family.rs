//! The survey as a hierarchy: a node for every image and internal snapshot, with names that people can type.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pleach_image::escape;
use pleach_lineage::{Kind, Lineage, Node, NodeId, Storage, order, smallvec};
use pleach_store::FileId;

use crate::naming::{Candidate, Names, meant};
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
        Self::around(survey, base, None)
    }

    /// As [`of`](Self::of); what hangs together with the file `centre`, by index, is named as if there were no other files.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn around(survey: &Survey, base: &Path, centre: Option<usize>) -> Result<Self> {
        let near: BTreeSet<usize> = centre.map(|centre| survey.linked(centre)).unwrap_or_default();
        let (near, far): (Vec<usize>, Vec<usize>) =
            (0..survey.files.len()).partition(|file| near.contains(file));
        let names = Names::of(survey, base, &[near, far]);
        let reads = survey.reads();
        let by_path: BTreeMap<&Path, usize> =
            survey.files.iter().enumerate().map(|(i, f)| (f.path.as_path(), i)).collect();
        let sorted: Vec<FileId> =
            by_path.values().filter_map(|&i| survey.files.get(i)).map(|f| f.stat.id).collect();
        let mut family = Self { lineage: Lineage::new(), states: BTreeMap::new(), nodes: BTreeMap::new() };
        for id in order::backing_first(sorted, &reads) {
            if let Some(index) = survey.find_id(id) {
                family.add(survey, base, index, &names)?;
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

    fn add(&mut self, survey: &Survey, base: &Path, index: usize, names: &Names) -> Result<()> {
        let Some(file) = survey.files.get(index) else { return Ok(()) };
        if file.format == FileFormat::Raw && file.dependents.is_empty() {
            return Ok(());
        }
        let shown = shown(&file.path, base);
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

    /// The node that `name` means: a node's name, or another word for it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none; [`ErrorKind::Usage`] if it may mean several.
    pub fn resolve(&self, survey: &Survey, name: &str) -> Result<NodeId> {
        let exact = self.lineage.find(name).filter(|_| !name.contains("\\x"));
        if let Some(id) = exact {
            return Ok(id);
        }
        let candidates = self.lineage.ids().filter_map(|id| {
            let node = self.lineage.get(id)?;
            let paths = self.states(id).iter().map(|state| match state {
                State::File(file) | State::Snapshot(file, _) => survey.files.get(*file),
            });
            let paths = paths.map(|file| Cow::Borrowed(file.map_or(Path::new(""), |f| &*f.path)));
            let states = paths.zip(node.storage.iter().map(|(_, storage)| storage)).collect();
            Some(Candidate { name: &node.name, states })
        });
        let name = meant(name, candidates)?;
        self.lineage.find(name).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such node"))
    }
}

/// `path` as people see it: relative to `base` where it lies under it.
pub fn shown(path: &Path, base: &Path) -> String {
    let relative: PathBuf = path.strip_prefix(base).map_or_else(|_| path.to_owned(), Path::to_owned);
    escape(relative.as_os_str().as_encoded_bytes())
}
