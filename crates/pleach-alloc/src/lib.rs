//! Refcounts and free clusters of one qcow2 image, read through a map, changed in memory, written when the caller says.
//!
//! An [`Allocator`] hands out clusters that no count claims, makes refcount blocks and a bigger refcount table where
//! they are missing (self-describing: no used cluster is ever without a counter), and lowers counts later. It never
//! writes: [`Allocator::take_writes`] gives what must reach the file, and the caller puts barriers between. A
//! [`Census`] is the other side: counts gathered by walking the pointers, to compare with what is stored.
//!
//! ```
//! use pleach_alloc::{Allocator, Place};
//! use pleach_format::{Geometry, HostOffset, NewHeader, RefcountWidth};
//! use pleach_store::{Disk, RealDisk, Store};
//!
//! let dir = tempfile::tempdir()?;
//! let store = RealDisk.create_new(&dir.path().join("image"))?;
//! // Cluster 0 header, 1 refcount table, 2 its first block: three clusters in use.
//! store.write_at(0x10000, &0x20000u64.to_be_bytes())?;
//! store.write_at(0x20000, &[0, 1, 0, 1, 0, 1])?;
//! let place = Place {
//!     geometry: Geometry::new(16, false)?,
//!     width: RefcountWidth::DEFAULT,
//!     table: HostOffset(0x10000),
//!     table_clusters: 1,
//! };
//! let mut allocator = Allocator::load(&*store, place)?;
//! let cluster = allocator.allocate()?;
//! assert_eq!(cluster.0, 3);
//! for write in allocator.take_writes().counts {
//!     store.write_at(write.offset.0, &write.bytes)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Not for: knowing which pointers exist. Guest addresses and backing files belong to `pleach-image`.
#![forbid(unsafe_code)]

mod allocator;
mod census;
mod table;

use std::io;

use pleach_format::{FormatError, HostCluster};

pub use allocator::{Allocator, TableMove, Write, Writes};
pub use census::{Census, Change, Comparison, Discrepancy};
pub use table::{Place, RefcountTable};

/// What can go wrong with refcounts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AllocError {
    /// The file could not be read.
    #[error("cannot read the refcounts")]
    Io(#[from] io::Error),
    /// A table entry breaks the format, or a count does not fit its width.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The refcount table or a block lies outside the file.
    #[error("the {structure} at {offset:#x} lies outside the file ({len} bytes)")]
    Outside {
        /// Which structure.
        structure: &'static str,
        /// Where it should be.
        offset: u64,
        /// Length of the file.
        len: u64,
    },
    /// A count that should be lowered is already 0.
    #[error("the refcount of cluster {} is 0, but something refers to it", .cluster.0)]
    Underflow {
        /// Which cluster.
        cluster: HostCluster,
    },
    /// A count that should be raised is as high as its width allows.
    #[error("cluster {} is counted as often as {bits} bits can say; another state cannot share it", .cluster.0)]
    Overflow {
        /// Which cluster.
        cluster: HostCluster,
        /// Bits a count.
        bits: u32,
    },
    /// The image cannot grow any more.
    #[error("the image is full: a refcount table has at most {max} bytes")]
    Full {
        /// Largest table.
        max: u64,
    },
}
