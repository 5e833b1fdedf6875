//! `tidy`: the project's own rules, each a search; every finding is a line `file:line: what`.

use std::fs;
use std::path::Path;

use crate::run::{Result, cargo, output, program};
use crate::source::{code_only, is_word, words};

/// A crate, and what must not be in its dependencies, however indirectly. The right column of docs/architecture.md.
const FORBIDDEN_EDGES: &[(&str, &[&str])] = &[
    ("pleach-format", &["memmap2", "nix", "rayon", "pleach-*"]),
    ("pleach-lineage", &["memmap2", "nix", "rayon", "pleach-*"]),
    (
        "pleach-plan",
        &["memmap2", "nix", "rayon", "pleach-store", "pleach-alloc", "pleach-image", "pleach-engine"],
    ),
    (
        "pleach-store",
        &["rayon", "pleach-lineage", "pleach-plan", "pleach-alloc", "pleach-image", "pleach-engine"],
    ),
    ("pleach-alloc", &["rayon", "pleach-lineage", "pleach-plan", "pleach-image", "pleach-engine"]),
    ("pleach-image", &["rayon", "pleach-lineage", "pleach-plan", "pleach-engine"]),
    ("pleach-engine", &["clap", "anyhow", "indicatif", "pleach-libvirt", "pleach"]),
    (
        "pleach-libvirt",
        &["rayon", "pleach-format", "pleach-store", "pleach-plan", "pleach-image", "pleach-engine"],
    ),
    ("pleach", &["pleach-testkit"]),
    ("xtask", &["*"]),
];

/// Crates that can open no file and start no thread, because they are `no_std`.
const PURE: &[&str] = &["pleach-format", "pleach-lineage", "pleach-plan"];

/// The one module with unsafe code, and the crate that therefore cannot forbid it.
const UNSAFE_MODULE: &str = "crates/pleach-store/src/map.rs";
const UNSAFE_CRATE: &str = "pleach-store";

/// Helpers of our own tests: no published first page.
const WITHOUT_EXAMPLE: &str = "pleach-testkit";

// Spelt in two halves, or this file would find itself.
const LEFTOVER_WORDS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
const LEFTOVER_MACROS: &[&str] = &["todo", "unimplemented", "dbg"];
const PRIVATE_PATHS: &[&str] = &[concat!("/wo", "rk/"), concat!("/ro", "ot/")];
const REGISTRIES: &[&str] =
    &[concat!("crates", ".io"), concat!("pypi", ".org"), concat!("npm", "js"), concat!("deb.debian", ".org")];

/// C libraries that would silently replace the deflate we measured and chose.
const BANNED_PACKAGES: &[&str] = &["libz-ng-sys", "libz-sys"];

pub(crate) fn tidy(_: &[String]) -> Result {
    let mut findings = Vec::new();
    for path in files()? {
        // A file that git knows but that was removed since has nothing to say.
        let Ok(bytes) = fs::read(&path) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        findings
            .extend(in_file(&path, &text).into_iter().map(|(line, what)| format!("{path}:{line}: {what}")));
    }
    for name in crates()? {
        check_manifest(&name, &mut findings);
        check_first_page(&name, &mut findings);
    }
    check_edges(&mut findings)?;
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        1 => Err("1 finding".into()),
        n => Err(format!("{n} findings")),
    }
}

/// Every file of the repository that git tracks or would add; without git, every file that is not built.
fn files() -> Result<Vec<String>> {
    let mut files = Vec::new();
    if Path::new(".git").exists() {
        let mut git = program("git");
        git.args(["-c", "safe.directory=*"]); // a checkout may belong to another user
        git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]);
        files.extend(output(&mut git)?.split_terminator('\0').map(String::from));
    } else {
        walk(Path::new("."), &mut files)?;
    }
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

fn walk(directory: &Path, found: &mut Vec<String>) -> Result {
    const MADE: &[&str] = &[".git", "target", "corpus", "artifacts", "coverage"];
    let entries =
        fs::read_dir(directory).map_err(|why| format!("cannot list {}: {why}", directory.display()))?;
    for entry in entries.flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        if MADE.iter().any(|made| name == *made) {
            continue;
        }
        if path.is_dir() {
            walk(&path, found)?;
        } else {
            let path = path.strip_prefix(".").unwrap_or(&path);
            found.push(path.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// Names of the directories under `crates/`, sorted.
fn crates() -> Result<Vec<String>> {
    let entries = fs::read_dir("crates").map_err(|why| format!("cannot list crates/: {why}"))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("Cargo.toml").is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// What is wrong with the text of one file, with line numbers.
fn in_file(path: &str, text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let is_lock_file = path.ends_with("Cargo.lock"); // names the registry's index, by design
    let is_rust = path.ends_with(".rs");
    let is_source =
        is_rust || [".sh", ".toml", ".md"].iter().any(|end| path.ends_with(end)) || path == ".ci/run";
    for (line, number) in text.lines().zip(1..) {
        if is_lock_file {
            let banned = BANNED_PACKAGES.iter().find(|name| line == format!("name = \"{name}\""));
            found.extend(banned.map(|name| (number, format!("the package {name} is banned"))));
            continue;
        }
        let private = PRIVATE_PATHS.iter().find(|path| names_path(line, path));
        found.extend(private.map(|path| (number, format!("names a path of one machine, {path}"))));
        let host = REGISTRIES.iter().find(|host| line.contains(**host));
        found.extend(host.map(|host| (number, format!("names a package registry, {host}"))));
        if is_source {
            let leftover = words(line).find(|word| LEFTOVER_WORDS.contains(word));
            found.extend(leftover.map(|word| (number, format!("{word} left over"))));
        }
    }
    if is_rust {
        for (line, number) in code_only(text).lines().zip(1..) {
            let leftover = LEFTOVER_MACROS.iter().find(|name| calls_macro(line, name));
            found.extend(leftover.map(|name| (number, format!("{name}! left over"))));
            if path != UNSAFE_MODULE && words(line).any(|word| word == "unsafe") {
                found.push((number, format!("unsafe code outside {UNSAFE_MODULE}")));
            }
        }
    }
    found.sort();
    found
}

/// Whether `path` is in `line` as the start of an absolute path, not as the middle of a longer one.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line.get(..at).and_then(|before| before.chars().next_back());
        before.is_none_or(|c| !is_word(c) && !"-.})>*".contains(c))
    })
}

fn calls_macro(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let starts = code.get(..at).and_then(|before| before.chars().next_back()).is_none_or(|c| !is_word(c));
        starts && code.get(at + name.len()..).is_some_and(|after| after.starts_with('!'))
    })
}

fn check_manifest(name: &str, findings: &mut Vec<String>) {
    let path = format!("crates/{name}/Cargo.toml");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if !lines.contains(&"rust-version.workspace = true") {
        findings.push(format!("{path}:1: does not say `rust-version.workspace = true`"));
    }
    if !lines.windows(2).any(|pair| pair == ["[lints]", "workspace = true"]) {
        findings.push(format!("{path}:1: does not take the workspace's lints"));
    }
}

fn check_first_page(name: &str, findings: &mut Vec<String>) {
    let library = format!("crates/{name}/src/lib.rs");
    let program = format!("crates/{name}/src/main.rs");
    for path in [&library, &program] {
        let Ok(text) = fs::read_to_string(path) else { continue };
        let code = code_only(&text);
        let mut require = |holds: bool, what: &str| {
            if !holds {
                findings.push(format!("{path}:1: {what}"));
            }
        };
        require(
            name == UNSAFE_CRATE || code.contains("#![forbid(unsafe_code)]"),
            "does not forbid unsafe_code",
        );
        require(text.starts_with("//!"), "does not open with a `//!` line");
        if *path == library {
            let has_example = text.lines().any(|line| line.trim_start().starts_with("//! ```"));
            require(name == WITHOUT_EXAMPLE || has_example, "has no example on its first page");
            let is_pure =
                code.lines().any(|line| line.starts_with("#![") && words(line).any(|word| word == "no_std"));
            require(!PURE.contains(&name) || is_pure, "is not no_std");
        }
    }
}

/// Each edge of the table must be absent; `cargo tree --invert` then shows the path of one that is there.
fn check_edges(findings: &mut Vec<String>) -> Result {
    for (from, targets) in FORBIDDEN_EDGES {
        let is_there = *from == "xtask" || Path::new("crates").join(from).is_dir();
        if !is_there {
            continue;
        }
        let tree = output(cargo().args([
            "tree",
            "-p",
            from,
            "-e",
            "normal",
            "--prefix=none",
            "--format={p}",
            "--all-features",
        ]))?;
        let mut reached: Vec<&str> = tree.lines().skip(1).filter_map(|line| line.split(' ').next()).collect();
        reached.sort_unstable();
        reached.dedup();
        reached.retain(|name| name != from && targets.iter().any(|target| is_named(name, target)));
        for to in reached {
            let path = output(cargo().args(["tree", "-p", from, "-e", "normal", "--all-features", "-i", to]));
            let manifest = if *from == "xtask" {
                "xtask/Cargo.toml".into()
            } else {
                format!("crates/{from}/Cargo.toml")
            };
            findings.push(format!(
                "{manifest}:1: {from} must not depend on {to}, but does:\n{}",
                path?.trim_end()
            ));
        }
    }
    Ok(())
}

/// Whether a package has this name; a `*` at the end stands for any rest.
fn is_named(package: &str, pattern: &str) -> bool {
    pattern.strip_suffix('*').map_or(package == pattern, |start| package.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_in_a_file() {
        let leftover = LEFTOVER_WORDS.first().copied().unwrap_or_default();
        let path = PRIVATE_PATHS.first().copied().unwrap_or_default();
        let host = REGISTRIES.first().copied().unwrap_or_default();
        let cases: &[(&str, &str, String, usize)] = &[
            ("clean", "a.rs", "fn a() {}".into(), 0),
            ("a word", "a.rs", format!("// {leftover}: later"), 1),
            ("a word inside a word", "a.rs", format!("let a{leftover} = 1;"), 0),
            ("a word in data", "a.bin", leftover.into(), 0),
            ("a macro", "a.rs", "dbg!(1)".into(), 1),
            ("a macro in a comment", "a.rs", "// dbg!(1)".into(), 0),
            ("a longer macro", "a.rs", "my_dbg!(1)".into(), 0),
            ("unsafe", "a.rs", "unsafe { f() }".into(), 1),
            ("unsafe in a string", "a.rs", "\"unsafe\"".into(), 0),
            ("unsafe in a lint", "a.rs", "#![forbid(unsafe_code)]".into(), 0),
            ("unsafe where it belongs", UNSAFE_MODULE, "unsafe { f() }".into(), 0),
            ("a path", "a.bin", format!("see {path}main"), 1),
            ("a path in quotes", "a.md", format!("\"{path}main\""), 1),
            ("the middle of a path", "a.md", format!("net{path}main ${{dir}}{path}main"), 0),
            ("a registry", "a.md", format!("from {host}"), 1),
            ("a registry in the lock file", "fuzz/Cargo.lock", format!("from {host}"), 0),
            ("a banned package", "Cargo.lock", "name = \"libz-sys\"".into(), 1),
        ];
        for (name, path, text, want) in cases {
            assert_eq!(in_file(path, text).len(), *want, "{name}");
        }
    }

    #[test]
    fn patterns_name_packages() {
        for (package, pattern, want) in [
            ("rayon", "rayon", true),
            ("rayon-core", "rayon", false),
            ("pleach", "pleach-*", false),
            ("pleach-plan", "pleach-*", true),
            ("any", "*", true),
        ] {
            assert_eq!(is_named(package, pattern), want, "{package} {pattern}");
        }
    }
}
