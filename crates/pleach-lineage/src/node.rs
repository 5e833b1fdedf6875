//! One node: a state of the machine's disks, and where that state is kept.

use alloc::string::String;
use core::fmt;

use smallvec::SmallVec;

/// Names a node of one [`Lineage`](crate::Lineage): stable until that node is removed, and never given out
/// again by the same `Lineage`.
///
/// Ids are given out in ascending order, so sorting by id is sorting by age. An id means nothing in another
/// `Lineage`, and this is not checked.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// The id as an index, counted from 0 in the order of insertion; for tables kept beside the tree. Removed
    /// nodes leave gaps.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Whether a node can still change.
///
/// The kind describes a node and binds nobody: a head that somebody has put an overlay on is a fact that can be
/// met on disk, so a head with children is representable.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A frozen state.
    Snapshot,
    /// The writable end of a branch.
    Head,
}

/// Where a node's state of one disk is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Storage {
    /// In a file of its own; the parent's file is its backing file.
    External {
        /// The file, as the caller names it.
        file: String,
    },
    /// In a snapshot inside a qcow2 file.
    Internal {
        /// The file that holds the snapshot, as the caller names it.
        file: String,
        /// The snapshot's name in that file; not necessarily the node's.
        snapshot: String,
        /// The snapshot's id in that file, unique there while names need not be.
        id: String,
    },
}

impl Storage {
    /// The file that holds the state, on its own or among others.
    pub fn file(&self) -> &str {
        match self {
            Self::External { file } | Self::Internal { file, .. } => file,
        }
    }
}

/// One state of a machine's disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Unique in its tree, compared byte by byte. Any string will do, the empty one included, because qcow2
    /// accepts any: never use it as a file name, and never print it, unchecked.
    pub name: String,
    /// Frozen or writable.
    pub kind: Kind,
    /// What this state stands on; `None` for a root.
    pub parent: Option<NodeId>,
    /// Where the state of each disk is, by the disk's name, in the order of the disks. A disk that takes no part
    /// is absent.
    pub storage: SmallVec<[(String, Storage); 1]>,
    /// When it was taken, in seconds since 1970-01-01 00:00 UTC; `None` if nobody knows.
    pub created: Option<i64>,
    /// Free text; empty if there is none.
    pub description: String,
    /// What the machine was doing when the state was taken, in libvirt's words (`shutoff`, `running`, ...);
    /// `None` if nobody knows.
    pub state: Option<String>,
    /// Whether `parent` was inferred (from the order of creation, say) and not recorded anywhere.
    pub parent_guessed: bool,
}

impl Node {
    /// A root without storage, date, description or state; the rest is filled in with `..Node::new(name, kind)`.
    pub fn new(name: impl Into<String>, kind: Kind) -> Self {
        Self {
            name: name.into(),
            kind,
            parent: None,
            storage: SmallVec::new(),
            created: None,
            description: String::new(),
            state: None,
            parent_guessed: false,
        }
    }

    /// Where the state of `disk` is; `None` if that disk takes no part.
    pub fn storage_of(&self, disk: &str) -> Option<&Storage> {
        self.storage.iter().find(|(name, _)| name == disk).map(|(_, storage)| storage)
    }
}
