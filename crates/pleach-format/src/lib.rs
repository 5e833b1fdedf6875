//! The qcow2 on-disk format as values: bytes in, checked types out, and back.
//!
//! Everything here takes `&[u8]` and gives values, or takes values and gives bytes: no file is opened, no thread
//! started (`no_std` + alloc). A [`Header`] that exists has passed every check; an [`L2Entry`] is judged by
//! [`L2Entry::decode`], which tests the compressed bit first; refcounts of every width are read and written through
//! [`RefcountWidth`].
//!
//! ```
//! use pleach_format::{Header, L2Entry, Mapping, NewHeader};
//!
//! // A header for a 1 GiB disk with default geometry, as bytes, and back.
//! let new = NewHeader { size: 1 << 30, ..NewHeader::default() };
//! let bytes = new.encode()?;
//! let header = Header::parse(&bytes)?;
//! assert_eq!(header.size(), 1 << 30);
//! assert_eq!(header.geometry().cluster_size(), 65536);
//!
//! // An L2 entry: bit 62 is tested before bit 0.
//! let entry = L2Entry(0x8000_0000_0005_0000);
//! let mapping = entry.decode(header.geometry(), header.version())?;
//! assert!(matches!(mapping, Mapping::Data(offset) if offset.0 == 0x50000));
//! # Ok::<(), pleach_format::FormatError>(())
//! ```
//!
//! Not for: reading guest bytes (that is `pleach-image`), or deciding whether a structure lies inside the file, which
//! needs the file's length and belongs to the caller.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod bitmap;
mod encryption;
mod entry;
mod error;
mod header;
mod refcount;
mod run;
mod snapshot;
mod units;

pub use bitmap::{BitmapCluster, BitmapRecord, BitmapTableEntry, BitmapsExtension};
pub use encryption::{EncryptionPointer, KeySlot, LuksHeader};
pub use entry::{CompressedExtent, ExtendedL2Entry, L1Entry, L2Entry, Mapping, RefcountTableEntry, SubRun};
pub use error::FormatError;
pub use header::{
    Autoclear, BackingFile, Compatible, CompressionType, DataFile, Encryption, Extension, ExtensionKind,
    FeatureName, Header, HeaderChange, Incompatible, NewHeader, RawHeader, RawHeaderV3, Version,
    rewrite_backing, rewrite_bitmaps, root,
};
pub use refcount::RefcountWidth;
pub use run::{Run, RunKind, RunList};
pub use snapshot::SnapshotRecord;
pub use units::{ClusterCount, Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset};
