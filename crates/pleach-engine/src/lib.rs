//! Everything that runs: look at images, plan, copy in parallel, publish, resume.
//!
//! A [`survey::Survey`] finds out which files read which; a [`family::Family`] is the same as a hierarchy of nodes;
//! [`prepare`] plans a deletion over locked files; [`execute`] carries it out; [`resume()`] finishes what was
//! interrupted. The order of writes of each operation is argued in `docs/crash-safety.md`.
//!
//! ```
//! use pleach_engine::survey::{Survey, Trust};
//! use pleach_engine::{DeleteRequest, Keep, Watch, execute, family::Family, prepare};
//! use pleach_image::{CreateOptions, create};
//! use pleach_lineage::DeleteMode;
//! use pleach_store::RealDisk;
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("A.qcow2");
//! create(&RealDisk, &path, &CreateOptions { size: 1 << 20, ..CreateOptions::default() })?;
//!
//! let survey = Survey::of_directories(&RealDisk, &[dir.path().into()], &Trust::default())?;
//! let family = Family::of(&survey, dir.path())?;
//! let request =
//!     DeleteRequest { name: "A".into(), mode: DeleteMode::Single, keep: Keep::Child, whole_tree: false };
//! let prepared = prepare(&RealDisk, &survey, &family, &request, true)?;
//! execute(&RealDisk, &survey, prepared, &Watch::new())?;
//! assert!(!path.exists());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Not for: showing progress or asking questions; that is the caller's, through [`Watch`] and the plan.
#![forbid(unsafe_code)]

mod bitmaps;
mod buffer;
mod carry;
pub mod catalog;
mod compact;
mod compare;
pub mod convert;
mod delete;
mod diff;
mod error;
mod execute;
pub mod family;
mod files;
mod fingerprint;
pub mod import;
pub mod internal;
mod journal;
mod leaks;
mod map;
mod merge;
mod names;
pub mod naming;
mod open;
mod rebase;
mod reconcile;
mod repair;
mod resume;
mod scan;
mod signpost;
mod sizes;
mod source;
mod steps;
pub mod survey;
pub mod tree;
mod trust;
pub mod verbs;
mod watch;
mod workers;

pub use bitmaps::{BitmapChange, BitmapPolicy};
pub use compact::{compact, plan_compact};
pub use compare::{Comparison, Difference, compare};
pub use delete::{
    DeletePlan, DeleteRequest, Direction, Forecast, Keep, Length, Merge, Naming, Prepared, Rebase, StateFill,
    Work, prepare,
};
pub use diff::{Changed, diff};
pub use error::{Error, ErrorKind, Result};
pub use execute::{Outcome, execute};
pub use fingerprint::Fingerprint;
pub use journal::{Intent, JournalImage, NewBacking, NewName, pending, unfinished};
pub use map::{Extent, map};
pub use merge::{prepare_merge, prepare_run};
pub use open::{OpenFiles, open_one};
pub use rebase::{Onto, RebaseRequest, prepare_rebase};
pub use repair::{Repair, undo_repair};
pub use resume::{Resumed, resume, undo};
pub use scan::{is_zero, layer_runs, zero_clusters};
pub use sizes::{Sizes, sizes};
pub use source::{Source, SourceOptions, open_writer, open_writer_alone};
pub use watch::Watch;
pub use workers::Threads;
