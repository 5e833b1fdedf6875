//! One qcow2 image, or a chain of them, opened: guest bytes in and out, and the one writer of root pointers.
//!
//! An [`Image`] is one qcow2 file with its tables checked as they are met; a [`Chain`] is an image over its backing
//! files, read as the guest would read it; a [`Writer`] is an image that guest bytes are written to. [`publish`] carries out a prepared change in the order that keeps every
//! instant readable. What is not supported is refused by name ([`ImageError::Unsupported`]), never read wrongly.
//!
//! ```
//! use std::sync::Arc;
//! use pleach_image::{Chain, CreateOptions, Image, Layer, create};
//! use pleach_store::{Access, Disk, RealDisk};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("disk.qcow2");
//! create(&RealDisk, &path, &CreateOptions { size: 1 << 20, ..CreateOptions::default() })?;
//!
//! let image = Image::open(RealDisk.open(&path, Access::Read)?)?;
//! let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
//! let mut sector = [1; 512];
//! chain.read_at(4096, &mut sector)?;
//! assert_eq!(sector, [0; 512]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Not for: deciding what to copy where (that is `pleach-plan`), nor for threads (`pleach-engine`).
#![forbid(unsafe_code)]

mod bulk;
mod cell;
mod census;
mod chain;
mod check;
mod codec;
mod compact;
mod create;
mod emptying;
mod error;
mod image;
#[cfg(test)]
mod medium;
mod names;
mod packing;
mod publish;
mod records;
mod recount;
mod repair;
mod spans;
mod states;
mod status;
mod tables;
mod walk;
mod workers;
mod write;

pub use bulk::{Bulk, Content, Finished, Measure, Piecework, measure};
pub use census::{census, leaked, leaked_with};
pub use chain::{Chain, Layer, Piece, PieceKind, RawImage};
pub use check::{CheckReport, check, check_with};
pub use codec::Compressor;
pub use compact::{CompactOptions, Compaction, Steps, compact, plan_compact};
pub use create::{CreateOptions, NewDataFile, Preallocation, create, create_in};
pub use emptying::Emptying;
pub use error::ImageError;
pub use image::{Head, Image, read_head};
pub use names::{NameError, backing_path, escape, is_printable};
pub use packing::Packing;
pub use publish::{Switch, clear_unknown_autoclear, publish, release, set_backing, set_bitmaps};
pub use recount::{copied_fits, fit_copied};
pub use repair::{RepairMode, RepairPlan, UndoFile, plan_repair, repair, undo};
pub use states::StatesEditor;
pub use status::{Status, Stretch};
pub use tables::{PartChange, TableEditor};
pub use walk::Finding;
pub use workers::{Alone, Workers};
pub use write::{Bits, NewSnapshot, WantedBitmap, WriteOptions, Writer};
