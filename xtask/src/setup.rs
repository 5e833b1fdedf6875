//! What the tests need besides a Rust toolchain: found, installed, or named.

use crate::run::{Result, cargo, is_installed, output, program, run, succeeds};

/// A program the checks call, and the Debian packages that have it, likeliest first.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("qemu-img", &["qemu-utils"]),
    ("qemu-io", &["qemu-utils"]),
    // Moved from one package to the other between two Debian releases.
    ("qemu-storage-daemon", &["qemu-utils", "qemu-system-common"]),
    ("mkfs.ext4", &["e2fsprogs"]),
    ("debugfs", &["e2fsprogs"]),
    ("mkfs.xfs", &["xfsprogs"]),
    ("virsh", &["libvirt-clients"]),
    ("git", &["git"]),
    ("cc", &["gcc"]),
    ("c++", &["g++"]), // libFuzzer is built from C++
];

/// Components of the toolchain, and how to ask for each.
const COMPONENTS: &[(&str, &str)] = &[("rustfmt", "fmt"), ("clippy", "clippy")];

/// Installs what is missing, if it may; does nothing if nothing is missing.
pub(crate) fn setup(_: &[String]) -> Result {
    add_components()?;
    // A second round asks the second package for what the first turned out not to have.
    for round in 0..2 {
        let packages = missing_packages(round);
        if packages.is_empty() {
            break;
        }
        install(&packages)?;
    }
    match PROGRAMS.iter().find(|(name, _)| !is_installed(name)) {
        None => Ok(()),
        Some((name, packages)) => {
            Err(format!("{name} is still missing after installing {}", packages.join(", ")))
        }
    }
}

fn add_components() -> Result {
    for (component, subcommand) in COMPONENTS {
        if succeeds(cargo().args([*subcommand, "--version"])) {
            continue;
        }
        if !is_installed("rustup") {
            return Err(format!(
                "cargo {subcommand} is missing, and so is rustup; install {component}, then run this again"
            ));
        }
        run(program("rustup").args(["component", "add", *component]))?;
    }
    Ok(())
}

fn missing_packages(round: usize) -> Vec<&'static str> {
    let mut packages: Vec<&str> = PROGRAMS
        .iter()
        .filter(|(name, _)| !is_installed(name))
        .filter_map(|(_, packages)| packages.get(round).or(packages.last()).copied())
        .collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn install(packages: &[&str]) -> Result {
    let list = packages.join(" ");
    if !is_installed("apt-get") {
        return Err(format!("missing; install what Debian calls: {list}"));
    }
    if output(program("id").arg("-u"))?.trim() != "0" {
        return Err(format!(
            "missing packages; run this, then try again:\n  \
             sudo apt-get update && sudo apt-get install -y --no-install-recommends --no-remove {list}"
        ));
    }
    println!("setup: installing {list}");
    run(program("apt-get").args(["update", "-q"]).env("DEBIAN_FRONTEND", "noninteractive"))?;
    run(program("apt-get")
        .args(["install", "-q", "-y", "--no-install-recommends", "--no-remove"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}
