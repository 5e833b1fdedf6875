//! `ci`: every check in order, stopping at the first that fails.

use std::path::Path;
use std::time::Instant;

use crate::run::{Result, cargo, read, run};
use crate::{msrv, setup, tidy};

/// Name, how.
type Step = (&'static str, fn() -> Result);

const STEPS: &[Step] = &[
    ("setup", || setup::setup(&[])),
    ("fmt", || run(cargo().args(["fmt", "--all", "--check"]))),
    ("tidy", || tidy::tidy(&[])),
    ("clippy", clippy),
    ("test", || crate::test(&[])),
    // The README's first command, as a newcomer types it.
    ("demo", || run(cargo().args(["run", "--release", "--", "demo"]))),
    ("doc", || crate::docs(&[])),
    ("benches compile", check_benches),
    ("fuzz targets compile", check_fuzz),
    ("msrv", || msrv::msrv(&[])),
];

pub(crate) fn ci(_: &[String]) -> Result {
    let start = Instant::now();
    for (name, step) in STEPS {
        println!("==> {name}");
        let began = Instant::now();
        step().map_err(|why| format!("{name}: {why}"))?;
        println!("<== {name}: {:.1} s", began.elapsed().as_secs_f64());
    }
    println!("ci: all {} checks passed in {:.0} s", STEPS.len(), start.elapsed().as_secs_f64());
    Ok(())
}

fn clippy() -> Result {
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn check_benches() -> Result {
    if !read("benches/Cargo.toml")?.contains("[[bench]]") {
        println!("there are none yet");
        return Ok(());
    }
    run(cargo().args(["check", "--package", "pleach-benches", "--benches"]))
}

fn check_fuzz() -> Result {
    const MANIFEST: &str = "fuzz/Cargo.toml";
    if !Path::new(MANIFEST).is_file() {
        println!("there are none yet");
        return Ok(());
    }
    run(cargo().args(["fmt", "--manifest-path", MANIFEST, "--check"]))?;
    run(cargo().args(["check", "--manifest-path", MANIFEST]))
}
