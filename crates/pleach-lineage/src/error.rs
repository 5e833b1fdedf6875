//! What the hierarchy refuses, and what to do instead.

use alloc::string::String;

use crate::NodeId;

/// Why an operation on a [`Lineage`](crate::Lineage) was refused. A refused operation has changed nothing.
///
/// Names are quoted and escaped as Rust string literals are, so a message is always one printable line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineageError {
    /// Two nodes of one tree would have the same name.
    #[error("there already is a node named {name:?}; choose another name, or rename that one first")]
    DuplicateName {
        /// The name, as it was asked for.
        name: String,
    },
    /// The id is not that of a node of this tree: it was removed, or belongs to another tree.
    #[error("node {id} is not in this tree; it was removed, or its id comes from another tree")]
    NoSuchNode {
        /// The id that was handed in.
        id: NodeId,
    },
    /// The parent of a node is not in the tree.
    #[error(
        "the parent of {name:?}, node {parent}, is not in this tree; insert parents before their children"
    )]
    NoSuchParent {
        /// The node whose parent is missing.
        name: String,
        /// The parent that was asked for.
        parent: NodeId,
    },
    /// A node would be its own parent.
    #[error("{name:?} cannot be its own parent")]
    OwnParent {
        /// The node.
        name: String,
    },
    /// A node would stand on one of its own descendants.
    #[error(
        "{name:?} cannot stand on {parent:?}, which already stands on {name:?}; give {parent:?} another parent \
         first"
    )]
    Cycle {
        /// The node that was to get another parent.
        name: String,
        /// The parent that was asked for, a descendant of `name`.
        parent: String,
    },
    /// All 2³² ids of this tree have been given out.
    #[error("this tree has given out all of its 2^32 node ids; copy it into a new one")]
    Full,
}
