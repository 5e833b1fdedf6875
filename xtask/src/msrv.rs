//! The promise of `rust-version`, kept: by the versions that dependencies ask for, and by that very compiler if it is there.

use std::collections::BTreeSet;

use crate::json::Json;
use crate::run::{Result, cargo, cargo_of, is_installed, output, program, read, run};

pub(crate) fn msrv(_: &[String]) -> Result {
    let promised = rust_version(&read("Cargo.toml")?).ok_or("Cargo.toml states no rust-version")?;
    let used = used_packages()?;
    let platform = host_platform()?;
    let metadata = output(cargo().args(["metadata", "--format-version=1", "--filter-platform", &platform]))?;
    let metadata = Json::parse(&metadata).ok_or("cargo metadata did not write JSON")?;
    let packages = metadata.get("packages").and_then(Json::list).ok_or("cargo metadata lists no packages")?;
    let (mut checked, mut newer) = (0, Vec::new());
    for package in packages {
        let field = |name| package.get(name).and_then(Json::text);
        let (Some(name), Some(version)) = (field("name"), field("version")) else { continue };
        if !used.contains(&format!("{name} v{version}")) {
            continue;
        }
        checked += 1;
        if let Some(wants) = field("rust_version").filter(|wants| order_of(wants) > order_of(&promised)) {
            newer.push(format!("{name} {version} wants Rust {wants}"));
        }
    }
    if checked != used.len() {
        return Err(format!(
            "cargo metadata knows {checked} of the {} packages that cargo tree lists",
            used.len()
        ));
    }
    if !newer.is_empty() {
        return Err(format!("Cargo.toml promises Rust {promised}, but {}", newer.join(", ")));
    }
    println!("msrv: none of the {checked} packages that are built asks for more than Rust {promised}");

    match installed_toolchain(&promised)? {
        Some(toolchain) => {
            run(cargo_of(&toolchain).args(["check", "--workspace"]))?;
            println!("msrv: Rust {promised} itself compiles the workspace");
        }
        None => println!("msrv: Rust {promised} is not installed, so it did not compile the workspace"),
    }
    Ok(())
}

/// `name vVERSION` of every package that building (not testing) the workspace needs on this platform.
fn used_packages() -> Result<BTreeSet<String>> {
    let tree = output(cargo().args([
        "tree",
        "--workspace",
        "--all-features",
        "--edges=normal,build",
        "--prefix=none",
        "--format={p}",
    ]))?;
    let name_and_version = |line: &str| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    Ok(tree.lines().filter(|line| !line.is_empty()).map(name_and_version).collect())
}

fn host_platform() -> Result<String> {
    let version = output(program("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(String::from).ok_or_else(|| "rustc -vV names no host".into())
}

/// The first `rust-version = "…"` of a manifest.
fn rust_version(manifest: &str) -> Option<String> {
    let line = manifest.lines().find(|line| line.starts_with("rust-version = "))?;
    line.split('"').nth(1).map(String::from)
}

/// A version as numbers, so that 1.100 comes after 1.89; a missing part counts as 0.
fn order_of(version: &str) -> [u64; 3] {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

/// The name of an installed toolchain of this version: `1.89` also finds `1.89.0-x86_64-…`.
fn installed_toolchain(version: &str) -> Result<Option<String>> {
    if !is_installed("rustup") {
        return Ok(None);
    }
    let list = output(program("rustup").args(["toolchain", "list"]))?;
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    Ok(names
        .filter(|name| {
            name.strip_prefix(version).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
        })
        .map(String::from)
        .next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_by_number() {
        for (older, newer) in [("1.89", "1.100"), ("1.89", "1.89.1"), ("1", "1.1"), ("0.9", "1")] {
            assert!(order_of(older) < order_of(newer), "{older} {newer}");
        }
        assert_eq!(order_of("1.89"), order_of("1.89.0"));
    }

    #[test]
    fn reads_the_promise() {
        assert_eq!(rust_version("[package]\nrust-version = \"1.89\"\n"), Some("1.89".into()));
        assert_eq!(rust_version("rust-version.workspace = true"), None);
    }
}
