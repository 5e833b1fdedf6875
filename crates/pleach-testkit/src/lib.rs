//! What pleach's tests judge it by: stock qemu-img as the oracle, random trees of images, and a model of them.
//!
//! Images are made by `qemu-img` and `qemu-io`, or byte by byte from the specification ([`image`]), contents are
//! read back by `qemu-img convert`, and consistency is what `qemu-img check` says, so that a mistake in pleach
//! cannot hide behind the same mistake in its tests. One `u64` seed reproduces any tree and any run.
//!
//! ```
//! use pleach_testkit::{Forest, RandomTree, Rng, WorkDir, oracle};
//!
//! # if !oracle::available() { return }
//! let work = WorkDir::new("example");
//! let tree = RandomTree::build(&work.join("tree"), &mut Rng::new(7), 4);
//! let forest = Forest::survey(&tree);
//!
//! // … run something that must not change what any node reads as …
//!
//! assert_eq!(forest.problems(&tree.dir), Vec::<String>::new());
//! ```
//!
//! Functions here panic when a tool fails: in a test, that is the clearest message there is. Not for anything
//! but tests.

#![forbid(unsafe_code)]

pub mod files;
pub mod forest;
pub mod hostile;
pub mod image;
pub mod layers;
pub mod mount;
pub mod oracle;
pub mod rng;
pub mod sim;
pub mod tool;
pub mod trees;
pub mod virsh;

pub use files::WorkDir;
pub use forest::{Forest, Removal, State};
pub use oracle::{Digest, Format};
pub use rng::{OnFailure, Rng};
pub use tool::{Outcome, Tool};
pub use trees::{Extras, Node, RandomTree};

/// Whether the long version of the tests was asked for (`PLEACH_LONG=1`).
#[must_use]
pub fn long_mode() -> bool {
    std::env::var_os("PLEACH_LONG").is_some_and(|value| !value.is_empty() && value != "0")
}

/// The seed that `PLEACH_SEED` names, decimal or `0x` hexadecimal, to run one failing case again.
///
/// # Panics
/// If the variable is set to something that is not a number.
#[must_use]
pub fn chosen_seed() -> Option<u64> {
    let text = std::env::var("PLEACH_SEED").ok()?;
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    Some(parsed.expect("PLEACH_SEED must be a number"))
}
