//! `fuzz`: lists the targets, or runs them with the images and documents of `testdata/` as seeds.

use std::fs;
use std::path::Path;

use crate::run::{Result, cargo_of, program, read, run, succeeds};

/// A target that needs more than this on images of a few hundred KiB has no bound at all.
const MEMORY_LIMIT: &str = "-rss_limit_mb=1024";

/// Where the seeds are.
const SEEDS: &[&str] =
    &["testdata/golden", "testdata/hostile", "testdata/libvirt/read", "testdata/libvirt/refused"];

pub(crate) fn fuzz(args: &[String]) -> Result {
    let known = targets()?;
    let Some((wanted, rest)) = args.split_first() else {
        for name in &known {
            println!("{name:<12} {}", property(name)?);
        }
        return Ok(());
    };
    let (seconds, rest) = match rest.split_first() {
        Some((first, after)) if first.parse::<u32>().is_ok() => (first.as_str(), after),
        _ => ("60", rest),
    };
    let chosen: Vec<&String> = known.iter().filter(|name| wanted == "all" || *name == wanted).collect();
    if chosen.is_empty() {
        return Err(format!("there is no target named {wanted:?}; there are: {}", known.join(", ")));
    }
    install()?;
    for target in chosen {
        let corpus = seed(target)?;
        run(cargo_of("nightly")
            .args(["fuzz", "run", target, &corpus, "--", MEMORY_LIMIT])
            .arg(format!("-max_total_time={seconds}"))
            .args(rest))?;
    }
    Ok(())
}

/// Names of the targets, sorted.
fn targets() -> Result<Vec<String>> {
    let mut names: Vec<String> = files_in("fuzz/fuzz_targets")
        .iter()
        .filter_map(|file| file.strip_suffix(".rs").map(String::from))
        .collect();
    names.sort_unstable();
    if names.is_empty() { Err("there are no targets in fuzz/fuzz_targets".into()) } else { Ok(names) }
}

/// What a target claims: its first line.
fn property(target: &str) -> Result<String> {
    let text = read(format!("fuzz/fuzz_targets/{target}.rs"))?;
    let first = text.lines().find_map(|line| line.strip_prefix("//!"));
    Ok(first.map_or_else(|| "(says nothing)".into(), |line| line.trim().into()))
}

fn install() -> Result {
    if succeeds(cargo_of("nightly").args(["fuzz", "--version"])) {
        return Ok(());
    }
    if !succeeds(cargo_of("nightly").arg("--version")) {
        return Err(
            "fuzzing needs a nightly compiler: rustup toolchain install nightly --profile minimal".into()
        );
    }
    run(program("cargo").args(["install", "cargo-fuzz", "--locked"]))
}

/// Copies the images, or the documents, of `testdata/` into the corpus of `target`; returns the corpus.
fn seed(target: &str) -> Result<String> {
    let corpus = format!("fuzz/corpus/{target}");
    fs::create_dir_all(&corpus).map_err(|why| format!("cannot make {corpus}: {why}"))?;
    for directory in SEEDS {
        // An image is no document.
        let ending = match target {
            "libvirt_xml" => ".xml",
            "catalog" => ".tree",
            _ => ".qcow2",
        };
        for file in files_in(directory).iter().filter(|file| file.ends_with(ending)) {
            let from = format!("{directory}/{file}");
            fs::copy(&from, format!("{corpus}/{file}"))
                .map_err(|why| format!("cannot copy {from}: {why}"))?;
        }
    }
    Ok(corpus)
}

/// Names of the files in a directory; none if there is no such directory.
fn files_in(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
