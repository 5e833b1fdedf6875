//! The catalog's text: what a tree knows that its images cannot say, as lines of words.
//!
//! ```text
//! pleach-tree 1
//! tree vm1
//! current s2
//! disk vda
//!   active E.qcow2
//! snapshot s1
//!   created 1795390348
//!   description "fresh install"
//!   state shutoff
//!   external vda A.qcow2
//! snapshot s2
//!   parent s1 guessed
//!   internal vda E.qcow2 s2 1
//! crc32 5c1fa2b0
//! ```
//!
//! An item starts in the first column; the lines that belong to it are indented by two blanks. A word is printed as it
//! is where it has nothing but letters, digits and `._/+:@%=,-`, else in quotes with the escapes `\"`, `\\`, `\n`,
//! `\r`, `\t` and `\u{hex}`. The last line is the CRC-32 of all bytes before it. Items and lines that are not known
//! here are kept as they are, word for word; a number other than 1 in the first line is another format, and refused.
//!
//! An item `raw FILE` says that a file named elsewhere in the record is the guest's own bytes, whatever they look like;
//! the other files are what their first bytes say.
//!
//! An item `forgotten`, followed by storage, lists states that are to be no nodes although the images have them.
//!
//! The active heads are no items: a head is what `active` says, standing on `current`. An item `head` is a writable
//! end of another branch.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec::Vec;

mod text;
mod words;

#[cfg(test)]
mod tests;

pub use self::text::raw_files;
use self::words::{put, words};
use crate::{Kind, Lineage, LineageError, Node, NodeId, Storage};

/// The number in the first line.
const VERSION: &str = "1";
const FIRST: &str = "pleach-tree";

/// Everything that a catalog says about one tree.
///
/// What [`Record::parse`] accepts is sound: names of nodes and of disks are unique, every parent and `current` are
/// among the nodes, following parents ends at a root, and storage is on disks that are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The tree's name.
    pub tree: String,
    /// The snapshot that the active heads stand on.
    pub current: Option<String>,
    /// The machine's disks, in order.
    pub disks: Vec<DiskRecord>,
    /// The nodes, in the order in which they came; the active heads are not among them.
    pub nodes: Vec<NodeRecord>,
    /// The files that are raw: a guest can write anything into them, the first bytes of another format too. Those that
    /// the rest of the record does not name are not written down.
    pub raw: BTreeSet<String>,
    /// States, by disk, that are in the images and are no nodes: somebody has let the catalog forget them.
    pub forgotten: Vec<(String, Storage)>,
    /// Lines that are not known here, each unknown item followed by its indented lines.
    pub other: Vec<String>,
}

/// One disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRecord {
    /// Its name, such as `vda`.
    pub name: String,
    /// The file that the machine writes to, as the caller names files; `None` if there is none at the moment.
    pub active: Option<String>,
    /// Lines that are not known here, without their indentation.
    pub other: Vec<String>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its name.
    pub name: String,
    /// Frozen, or the writable end of a branch that is not the active one.
    pub kind: Kind,
    /// The name of the node that it stands on.
    pub parent: Option<String>,
    /// Whether the parent was inferred.
    pub parent_guessed: bool,
    /// Seconds since 1970-01-01 00:00 UTC.
    pub created: Option<i64>,
    /// Free text; empty if there is none.
    pub description: String,
    /// What the machine was doing, in libvirt's words.
    pub state: Option<String>,
    /// Where the state of each disk is, by the disk's name.
    pub storage: Vec<(String, Storage)>,
    /// Lines that are not known here, without their indentation.
    pub other: Vec<String>,
}

/// Why bytes are no catalog, or one that is not sound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Not the first line of a catalog.
    #[error("the first line is not \"{FIRST} {VERSION}\": this is no catalog")]
    NotACatalog,
    /// A later format.
    #[error("the catalog has format {found:?}; this program knows format {VERSION}")]
    Version {
        /// The number in the first line.
        found: String,
    },
    /// The bytes are not those that were written.
    #[error(
        "the last line must be crc32 {computed:08x}, the checksum of what is before it, and is {stored:?}"
    )]
    Checksum {
        /// The last line.
        stored: String,
        /// What it should be.
        computed: u32,
    },
    /// Bytes that are no UTF-8.
    #[error("byte {at} of the catalog is not UTF-8")]
    NotText {
        /// Where.
        at: usize,
    },
    /// A line that is no words, or not those that it should have.
    #[error("line {line}: {what}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Two disks of one name.
    #[error("there are two disks named {name:?}")]
    DuplicateDisk {
        /// The name.
        name: String,
    },
    /// A node that names something which is not there.
    #[error("{node:?} names {what} {name:?}, which is not in the catalog")]
    Dangling {
        /// The node; `current` for the line of that name.
        node: String,
        /// What sort of thing is missing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Nodes that stand on each other.
    #[error("{name:?} stands on itself, directly or not")]
    Cycle {
        /// One of them.
        name: String,
    },
    /// Two nodes of one name.
    #[error(transparent)]
    Lineage(#[from] LineageError),
}

impl DiskRecord {
    /// A disk whose active file is `active`.
    pub fn new(name: impl Into<String>, active: Option<String>) -> Self {
        Self { name: name.into(), active, other: Vec::new() }
    }
}

impl NodeRecord {
    /// A root without anything; the rest is filled in with `..NodeRecord::new(name, kind)`.
    pub fn new(name: impl Into<String>, kind: Kind) -> Self {
        Self {
            name: name.into(),
            kind,
            parent: None,
            parent_guessed: false,
            created: None,
            description: String::new(),
            state: None,
            storage: Vec::new(),
            other: Vec::new(),
        }
    }

    /// Where the state of `disk` is; `None` if that disk takes no part.
    pub fn storage_of(&self, disk: &str) -> Option<&Storage> {
        self.storage.iter().find(|(name, _)| name == disk).map(|(_, storage)| storage)
    }

    fn with_parent(&self, parent: Option<NodeId>) -> Node {
        Node {
            name: self.name.clone(),
            kind: self.kind,
            parent,
            storage: self.storage.iter().cloned().collect(),
            created: self.created,
            description: self.description.clone(),
            state: self.state.clone(),
            parent_guessed: self.parent_guessed,
        }
    }

    /// The words behind `key` in the first unknown line that starts with it.
    pub fn field(&self, key: &str) -> Option<Vec<String>> {
        field(&self.other, key)
    }

    /// Puts a line `key words…` among the unknown ones, in place of those that start with `key`; none for no words.
    pub fn set_field(&mut self, key: &str, values: &[&str]) {
        set_field(&mut self.other, key, values);
    }
}

fn field(other: &[String], key: &str) -> Option<Vec<String>> {
    let mut lines = other.iter().filter_map(|line| words(line).ok());
    let found = lines.find(|words| words.first().is_some_and(|first| first == key))?;
    Some(found.into_iter().skip(1).map(|word| word.into_owned()).collect())
}

fn set_field(other: &mut Vec<String>, key: &str, values: &[&str]) {
    other.retain(|line| words(line).ok().is_none_or(|w| w.first().is_none_or(|first| first != key)));
    if !values.is_empty() {
        let mut line = String::new();
        put(&mut line, key);
        for value in values {
            line.push(' ');
            put(&mut line, value);
        }
        other.push(line);
    }
}

impl Record {
    /// A tree without nodes.
    pub fn new(tree: impl Into<String>) -> Self {
        Self { tree: tree.into(), ..Self::default() }
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<&NodeRecord> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The same, to be changed.
    pub fn find_mut(&mut self, name: &str) -> Option<&mut NodeRecord> {
        self.nodes.iter_mut().find(|node| node.name == name)
    }

    /// The words behind `key` in the first unknown item that starts with it.
    pub fn field(&self, key: &str) -> Option<Vec<String>> {
        field(&self.other, key)
    }

    /// Puts an item `key words…` among the unknown ones, in place of those that start with `key`; none for no words.
    pub fn set_field(&mut self, key: &str, values: &[&str]) {
        set_field(&mut self.other, key, values);
    }

    /// The disk of that name.
    pub fn disk(&self, name: &str) -> Option<&DiskRecord> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    /// Every file that is named, each once, in a fixed order.
    pub fn files(&self) -> BTreeSet<&str> {
        let active = self.disks.iter().filter_map(|disk| disk.active.as_deref());
        let stored = self.nodes.iter().flat_map(|n| &n.storage).chain(&self.forgotten);
        let mut all: BTreeSet<&str> = active.collect();
        let mut last = "";
        for (_, storage) in stored {
            // Many states lie in one file.
            if storage.file() != last {
                last = storage.file();
                all.insert(last);
            }
        }
        all
    }

    /// Changes every file name for which `new` has another one.
    pub fn rename_files(&mut self, new: impl Fn(&str) -> Option<String>) {
        let active = self.disks.iter_mut().filter_map(|disk| disk.active.as_mut());
        let stored =
            self.nodes.iter_mut().flat_map(|node| &mut node.storage).map(|(_, storage)| match storage {
                Storage::External { file } | Storage::Internal { file, .. } => file,
            });
        for file in active.chain(stored) {
            if let Some(name) = new(file) {
                *file = name;
            }
        }
        self.raw =
            core::mem::take(&mut self.raw).into_iter().map(|file| new(&file).unwrap_or(file)).collect();
    }

    /// The nodes as a hierarchy, parents first, with `current`; and the id of each of [`Self::nodes`].
    ///
    /// # Errors
    /// What makes the record unsound; nothing for one that was parsed.
    pub fn lineage(&self) -> Result<(Lineage, Vec<NodeId>), RecordError> {
        let parents = self.parents()?;
        let mut nodes: Vec<Node> = Vec::with_capacity(self.nodes.len());
        let mut ids: Vec<Option<NodeId>> = alloc::vec![None; self.nodes.len()];
        let mut path = Vec::new();
        for start in 0..self.nodes.len() {
            // Up to a node that has its id, or a root; then back down.
            let mut at = Some(start);
            while let Some(here) = at.filter(|&i| ids.get(i).copied().flatten().is_none()) {
                path.push(here);
                at = parents.get(here).copied().flatten();
            }
            let mut parent = at.and_then(|i| ids.get(i).copied().flatten());
            for here in path.drain(..).rev() {
                let (Some(node), Some(slot)) = (self.nodes.get(here), ids.get_mut(here)) else { continue };
                let id = NodeId(u32::try_from(nodes.len()).map_err(|_| LineageError::Full)?);
                nodes.push(node.with_parent(parent));
                *slot = Some(id);
                parent = Some(id);
            }
        }
        let mut lineage = Lineage::of_parents_first(nodes);
        let current = self.current.as_ref().and_then(|name| lineage.find(name));
        lineage.set_current(current)?;
        Ok((lineage, ids.into_iter().flatten().collect()))
    }

    /// The place of each node's parent among the nodes, if the record is sound as far as nodes go.
    fn parents(&self) -> Result<Vec<Option<usize>>, RecordError> {
        let mut index: Vec<(&str, usize)> =
            self.nodes.iter().enumerate().map(|(at, node)| (node.name.as_str(), at)).collect();
        index.sort_unstable();
        let twice = index.windows(2).find_map(|pair| match pair {
            [(one, _), (two, _)] if one == two => Some(*one),
            _ => None,
        });
        if let Some(name) = twice {
            return Err(LineageError::DuplicateName { name: name.to_owned() }.into());
        }
        let find = |name: &str| {
            let at = index.binary_search_by_key(&name, |(other, _)| other).ok();
            at.and_then(|at| index.get(at)).map(|(_, place)| *place)
        };
        let dangling = |node: &str, what, name: &str| RecordError::Dangling {
            node: node.to_owned(),
            what,
            name: name.to_owned(),
        };
        let mut parents = Vec::with_capacity(self.nodes.len());
        let mut before: Option<&str> = None;
        for (at, node) in self.nodes.iter().enumerate() {
            parents.push(match &node.parent {
                None => None,
                // Most nodes stand on the one before.
                Some(parent) if Some(parent.as_str()) == before => at.checked_sub(1),
                Some(parent) => Some(find(parent).ok_or_else(|| dangling(&node.name, "the parent", parent))?),
            });
            before = Some(&node.name);
        }
        if let Some(current) = self.current.as_deref().filter(|current| find(current).is_none()) {
            return Err(dangling("current", "the node", current));
        }
        // Where the walk that has seen a node began.
        let mut seen: Vec<Option<usize>> = alloc::vec![None; self.nodes.len()];
        for start in 0..self.nodes.len() {
            let mut at = Some(start);
            while let Some(here) = at {
                let Some(slot) = seen.get_mut(here) else { break };
                match *slot {
                    Some(walk) if walk == start => {
                        let name = self.nodes.get(here).map(|node| node.name.clone()).unwrap_or_default();
                        return Err(RecordError::Cycle { name });
                    }
                    Some(_) => break,
                    None => *slot = Some(start),
                }
                at = parents.get(here).copied().flatten();
            }
        }
        Ok(parents)
    }

    /// Whether the record is sound; see there.
    ///
    /// # Errors
    /// The first thing that is not.
    pub fn check(&self) -> Result<(), RecordError> {
        let mut disks = BTreeSet::new();
        for disk in &self.disks {
            if !disks.insert(disk.name.as_str()) {
                return Err(RecordError::DuplicateDisk { name: disk.name.clone() });
            }
        }
        for node in &self.nodes {
            let mut seen = BTreeSet::new();
            for (disk, _) in &node.storage {
                if !disks.contains(disk.as_str()) {
                    let (node, name) = (node.name.clone(), disk.clone());
                    return Err(RecordError::Dangling { node, what: "the disk", name });
                }
                if !seen.insert(disk) {
                    return Err(RecordError::DuplicateDisk { name: disk.clone() });
                }
            }
        }
        self.parents().map(drop)
    }
}
