//! What a merge of layers will do, decided before anything is written.
//!
//! Pure: this crate cannot open a file or start a thread (`no_std` + alloc). It is told what each layer says about
//! which guest bytes ([`Cover`]), and answers which clusters of the surviving image must change and how ([`Need`]),
//! so that a plan can be printed, compared and carried out twice without harm. Equal inputs give equal plans.
//!
//! ```
//! use pleach_plan::{Content, Cover, How, Say, Target, pull};
//!
//! // base: data in the first 128 KiB; middle: data in the second 64 KiB; top says nothing there. The middle goes.
//! let base = Content::none().under(&Cover::new(1 << 20, [(0, 128 << 10, Say::Data)]));
//! let middle = Cover::new(1 << 20, [(64 << 10, 64 << 10, Say::Data)]);
//! let top = Cover::new(1 << 20, []);
//! let target = Target { cluster_bits: 16, size: 1 << 20, zero_flag: true };
//!
//! let needs = pull(target, &top, &middle, &base);
//! assert_eq!(needs.len(), 1);
//! assert_eq!((needs[0].clusters.clone(), needs[0].how), (1..2, How::Fill));
//! ```
//!
//! Not for: how bytes are stored or copied; targets are guest clusters here, the allocator gives them host clusters.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod cover;
mod merge;
mod overlay;
mod settle;

pub use cover::{Content, Cover, Say};
pub use merge::{How, Need, Target, commit, pull, rebase, rewrite_whole};
pub use overlay::{Overlay, Owner, Part, changed};
pub use settle::{Found, Summary, candidates, clusters, settle, settle_against};
