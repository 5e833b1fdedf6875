//! libvirt's snapshot documents: read, checked, and changed in place, with everything unknown kept byte for byte.
//!
//! libvirt keeps the hierarchy of a machine's snapshots as one `<domainsnapshot>` document each. This crate reads
//! such a document ([`Snapshot`]) into plain values ([`Facts`]), changes single values of it by splicing text, so
//! that a `<domain>` with other people's elements stays what it was, checks what libvirt would check
//! ([`Snapshot::check_redefine`]), and puts a set of them together to a tree ([`lineage`]) and to the commands
//! that hand it to libvirt ([`redefine_script`]).
//!
//! ```
//! use pleach_libvirt::{Snapshot, lineage};
//!
//! let a = b"<domainsnapshot><name>A</name><state>shutoff</state><creationTime>1</creationTime></domainsnapshot>";
//! let b = b"<domainsnapshot><name>B</name><state>shutoff</state><parent><name>A</name></parent>
//!     <creationTime>2</creationTime><!-- ours --><active>1</active></domainsnapshot>";
//! let mut snapshots = vec![Snapshot::parse(b)?, Snapshot::parse(a)?];
//! let tree = lineage(&snapshots).expect("every parent is there");
//! assert_eq!(tree.parent(tree.find("B").unwrap()), tree.find("A"));
//! assert_eq!(tree.current(), tree.find("B"));
//!
//! snapshots[0].set_parent(None)?;
//! assert!(snapshots[0].text().contains("<!-- ours --><active>1</active>"));
//! # Ok::<(), pleach_libvirt::DocumentError>(())
//! ```
//!
//! **What is refused.** Documents longer than 1 MiB or nested deeper than 256 elements, as by libvirt; what is not
//! UTF-8; document type declarations, and with them entities, which libvirt never writes.
//!
//! **What it is not for.** It opens no file and looks at no image: whether the images are as the documents say is
//! for others to find out. It talks to no libvirt.

#![forbid(unsafe_code)]

mod align;
mod catalog;
mod disk;
mod domain;
mod edit;
mod error;
mod facts;
mod forest;
mod script;
mod snapshot;
mod verify;
mod xml;

#[cfg(test)]
mod tests;

pub use align::{MOST_NAME_BYTES, file_name, name_problem, root_name};
pub use catalog::{DOCUMENT_KEY, DOMAIN_KEY, Export, ExportError, export, import};
pub use disk::{Disk, DiskMode, DomainDisk, Source, SourceKind};
pub use domain::{Domain, DomainDocument};
pub use error::{DocumentError, Problem};
pub use facts::{Facts, Memory, State};
pub use forest::{ForestProblem, lineage, parents_first, problems, storage};
pub use script::redefine_script;
pub use snapshot::{DiskList, NewDisk, Snapshot};
pub use verify::{Finding, ImageFacts, Severity, verify};
pub use xml::MOST_BYTES;
