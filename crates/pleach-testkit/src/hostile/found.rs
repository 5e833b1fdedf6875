//! What fuzzing found: whole files, each with what is wrong in it.

use std::fs;
use std::path::Path;

use super::{Case, DAMAGED, Expect, IMAGE};

/// Name of a file of `testdata/hostile` without its end, and what a careful tool does with it.
const FINDS: &[(&str, Expect)] =
    &[("compressed-claim-behind-the-end", DAMAGED), ("leaks-beside-a-reserved-bit", DAMAGED)];

pub(super) fn cases() -> Vec<Case> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/hostile");
    FINDS
        .iter()
        .map(|(name, expect)| {
            let from = directory.join(format!("{name}.qcow2"));
            Case::files(format!("found-{name}"), *expect, move |dir| {
                fs::copy(&from, dir.join(IMAGE)).expect("a stored image");
            })
        })
        .collect()
}
