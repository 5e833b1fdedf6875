//! The hierarchy of a virtual machine's snapshots: which state stands on which, which one is current, and what
//! each deletion means for the rest.
//!
//! qcow2 files know their backing file and hold a flat list of internal snapshots; they hold no tree. This crate
//! is the tree, as plain data: a forest of named nodes ([`Lineage`]), the four ways of deleting one
//! ([`DeleteMode`]), what a deletion must leave in place because something that stays reads it ([`Reach`]), and
//! the picture of it ([`text`]). The rules for parents and for the current node are libvirt's.
//!
//! ```
//! use pleach_lineage::{DeleteMode, Kind, Lineage, Node, text};
//!
//! let mut tree = Lineage::new();
//! let a = tree.insert(Node::new("A", Kind::Snapshot))?;
//! let b = tree.insert(Node { parent: Some(a), ..Node::new("B", Kind::Snapshot) })?;
//! let c = tree.insert(Node { parent: Some(a), ..Node::new("C", Kind::Snapshot) })?;
//! tree.insert(Node { parent: Some(b), ..Node::new("D", Kind::Head) })?;
//! tree.insert(Node { parent: Some(c), ..Node::new("E", Kind::Head) })?;
//! tree.revert(c)?;
//!
//! // The root goes; what stood on it stays, and becomes roots.
//! let gone = tree.delete(a, DeleteMode::Single)?;
//! assert_eq!(gone.reparented, [(b, None), (c, None)]);
//! let picture = text::render(&tree, text::Style::Ascii, |id| tree[id].name.clone());
//! assert_eq!(picture, "B\n`- D\nC\n`- E\n");
//! # Ok::<(), pleach_lineage::LineageError>(())
//! ```
//!
//! **What it is not for.** It opens no file and parses no image: the caller reads backing names and snapshot
//! tables and tells it. It moves no data: that a node is deleted here says nothing yet about the bytes of its
//! children. It keeps nothing on disk. It is not a general tree container: names are unique, and the order of
//! children is the order in which they came.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod delete;
mod error;
mod node;
pub mod order;
pub mod reach;
pub mod record;
pub mod text;
mod tree;

#[cfg(test)]
mod model;

pub use delete::{DeleteMode, Deletion};
pub use error::LineageError;
pub use node::{Kind, Node, NodeId, Storage};
pub use reach::{Reach, Reads};
pub use record::{DiskRecord, NodeRecord, Record, RecordError};
pub use tree::Lineage;

/// Re-exported because [`Node::storage`] is one.
pub use smallvec::{SmallVec, smallvec};
