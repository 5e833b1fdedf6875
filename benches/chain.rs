//! Chains of images beside qemu-img: copied, rebased, committed and merged, in one run, in one table.
//!
//! `cargo xtask bench chain`, or `chain convert siblings` for some rows; `PLEACH_SMALL=1` takes smaller ones. Both tools work
//! in turns, each on its own copy, and leave the same content, which is compared afterwards. A directory among the arguments is
//! taken to lie on XFS or btrfs: there, files share blocks (`cloned`).
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench")]

use std::path::{Path, PathBuf};
use std::process::Command;

use pleach_benches::beside::{Took, qemu_img, run, text};
use pleach_engine::open_writer_alone;
use pleach_format::BackingFile;
use pleach_image::{CreateOptions, Preallocation, create};
use pleach_store::RealDisk;

const CLUSTER: u64 = 64 << 10;

/// How large everything is.
struct Scale {
    /// Files of the deep chain, and bytes of its disk.
    depth: u64,
    disk: u64,
    /// Bytes of data of each of two layers.
    layer: u64,
    /// Bytes of the disk of siblings.
    siblings: u64,
}

const FULL: Scale = Scale { depth: 300, disk: 4 << 30, layer: 1 << 30, siblings: 100 << 30 };
const SMALL: Scale = Scale { depth: 40, disk: 512 << 20, layer: 128 << 20, siblings: 8 << 30 };

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if !args.iter().any(|arg| arg == "chain") {
        println!("chain: only if asked for by name");
        return;
    }
    let scale = if std::env::var_os("PLEACH_SMALL").is_some() { SMALL } else { FULL };
    let rows = args.iter().filter(|arg| *arg != "chain" && !arg.contains('/')).count();
    let asked = |name: &str| rows == 0 || args.iter().any(|arg| arg == name);
    println!("seconds by the clock (of all processors):\n");
    println!("| what | qemu-img | pleach | times faster | wanted |");
    println!("|---|---|---|---|---|");
    if ["convert", "rebase", "commit"].into_iter().any(asked) {
        deep(&scale, asked);
    }
    if asked("merge") {
        merge("two layers, nothing in common", &scale, scale.layer);
        merge("two layers, half in common", &scale, scale.layer / 2);
    }
    if asked("siblings") {
        siblings(&scale);
    }
    match args.iter().find(|arg| arg.contains('/')) {
        Some(dir) => cloned(&scale, Path::new(dir)),
        None if asked("cloned") => {
            println!("\ncloned: left out; name a directory on XFS or btrfs: chain DIR")
        }
        None => {}
    }
}

/// A run and a copy where the file system shares blocks; and how many bytes of it each of them takes.
fn cloned(scale: &Scale, place: &Path) {
    let dir = tempfile::tempdir_in(place).expect("a directory that can be written");
    let dir = dir.path();
    let (stock, ours) = (&dir.join("stock"), &dir.join("ours"));
    std::fs::create_dir(stock).unwrap();
    let (data, all) = (4 * scale.layer, 4 * scale.layer / CLUSTER);
    image(stock, "base.qcow2", 2 * data, None, |write| write(0, all, 1));
    image(stock, "top.qcow2", 2 * data, Some("base.qcow2"), |write| write(all, all, 2));
    run(Command::new("cp").args(["-r", "--reflink=always", text(stock), text(ours)]));
    let used = || {
        run(Command::new("sync").args(["-f", text(dir)]));
        let df = Command::new("df").args(["--output=used", "-B1", text(dir)]).output().unwrap();
        let text = String::from_utf8(df.stdout).unwrap();
        text.lines().nth(1).and_then(|line| line.trim().parse::<i64>().ok()).expect("df says so")
    };
    let tell = |what: &str, before: [i64; 3]| {
        let percent = |from: i64, to: i64| 100.0 * (to - from) as f64 / data as f64;
        let (theirs, we) = (percent(before[0], before[1]), percent(before[1], before[2]));
        println!("| {what}: blocks taken, of the data | {theirs:.1} % | {we:.1} % | | 2 % |");
    };
    let gib = data >> 20;
    let before = used();
    let took = qemu_img(dir, &["convert", "-O", "qcow2", "stock/base.qcow2", "stock.qcow2"]);
    let between = used();
    let our = pleach(dir, &["flatten", "ours/base.qcow2", "ours.qcow2"]);
    row(&format!("flatten, {gib} MiB, cloned"), took, our, "20");
    tell("flatten", [before, between, used()]);
    same(dir, "stock.qcow2", "ours.qcow2");
    std::fs::remove_file(dir.join("stock.qcow2")).unwrap();
    let before = used();
    let took = qemu_img(stock, &["commit", "-q", "-b", "base.qcow2", "top.qcow2"]);
    let between = used();
    let our = pleach(ours, &["merge", "top.qcow2", "--into", "base.qcow2", "--yes"]);
    row(&format!("merge, {gib} MiB each, cloned"), took, our, "20");
    tell("merge", [before, between, used()]);
    same(dir, "stock/base.qcow2", "ours/base.qcow2");
}

fn row(what: &str, theirs: Took, ours: Took, wanted: &str) {
    let (clock, cpu) = theirs.over(ours);
    println!("| {what} | {theirs} | {ours} | {clock:.1} ({cpu:.1}) | {wanted} |");
}

/// A deep chain of scattered clusters over a large base.
fn deep(scale: &Scale, asked: impl Fn(&str) -> bool) {
    let dir = pleach_benches::work_dir();
    let (stock, ours) = (&dir.path().join("stock"), &dir.path().join("ours"));
    std::fs::create_dir(stock).unwrap();
    let name = |n: u64| format!("{n}.qcow2");
    let (mut rng, clusters) = (1u64, scale.disk / CLUSTER);
    for n in 0..scale.depth {
        let below = n.checked_sub(1).map(name);
        image(stock, &name(n), scale.disk, below.as_deref(), |write| match n {
            // 40 %: four clusters in ten.
            0 => (0..clusters).filter(|c| c % 10 < 4).for_each(|c| write(c, 1, 1)),
            _ => (0..20).for_each(|_| write(random(&mut rng) % clusters, 1, n)),
        });
    }
    let (top, base) = (name(scale.depth - 1), name(0));
    if asked("convert") {
        let theirs = qemu_img(stock, &["convert", "-O", "qcow2", &top, "../stock.qcow2"]);
        let we = pleach(stock, &["convert", &top, "../ours.qcow2"]);
        row(&format!("convert, {} layers", scale.depth), theirs, we, "12");
        same(dir.path(), "stock.qcow2", "ours.qcow2");
        for made in ["stock.qcow2", "ours.qcow2"] {
            std::fs::remove_file(dir.path().join(made)).unwrap();
        }
    }
    if asked("rebase") {
        let (theirs, we) = ("stock-top.qcow2", "ours-top.qcow2");
        [theirs, we].into_iter().for_each(|copy| copy_file(&stock.join(&top), &stock.join(copy)));
        let took = qemu_img(stock, &["rebase", "-q", "-b", &base, "-F", "qcow2", theirs]);
        let our = pleach(stock, &["rebase", we, "--onto", &base, "--yes"]);
        row(&format!("rebase onto the base, {} layers", scale.depth), took, our, "10");
        same(stock, theirs, we);
        [theirs, we].into_iter().for_each(|copy| std::fs::remove_file(stock.join(copy)).unwrap());
    }
    if asked("commit") {
        run(Command::new("cp").args(["-r", "--sparse=always", text(stock), text(ours)]));
        let took = qemu_img(stock, &["commit", "-q", "-b", &base, &top]);
        let our = pleach(ours, &["merge", &top, "--into", &base, "--yes"]);
        row(&format!("commit of {} layers into one", scale.depth - 1), took, our, "10");
        same(dir.path(), "stock/0.qcow2", "ours/0.qcow2");
        assert!(!ours.join(&top).exists(), "nothing of the chain but one file is left");
    }
}

/// Two images with as much data each, the upper one's from guest byte `from` on.
fn merge(what: &str, scale: &Scale, from: u64) {
    let dir = pleach_benches::work_dir();
    let (stock, ours) = (&dir.path().join("stock"), &dir.path().join("ours"));
    std::fs::create_dir(stock).unwrap();
    let all = scale.layer / CLUSTER;
    image(stock, "base.qcow2", scale.disk, None, |write| write(0, all, 1));
    image(stock, "top.qcow2", scale.disk, Some("base.qcow2"), |write| write(from / CLUSTER, all, 2));
    run(Command::new("cp").args(["-r", "--sparse=always", text(stock), text(ours)]));
    let took = qemu_img(stock, &["commit", "-q", "-b", "base.qcow2", "top.qcow2"]);
    let our = pleach(ours, &["merge", "top.qcow2", "--into", "base.qcow2", "--yes"]);
    row(&format!("merge, {what}, {} MiB each", scale.layer >> 20), took, our, "1");
    same(dir.path(), "stock/base.qcow2", "ours/base.qcow2");
}

/// From one child of a large image to another.
fn siblings(scale: &Scale) {
    let dir = pleach_benches::work_dir();
    let dir = dir.path();
    let options = CreateOptions {
        size: scale.siblings,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    create(&RealDisk, &dir.join("base.qcow2"), &options).unwrap();
    let (mut rng, clusters) = (1u64, scale.siblings / CLUSTER);
    for (name, below) in
        [("old.qcow2", "base.qcow2"), ("new.qcow2", "base.qcow2"), ("stock.qcow2", "old.qcow2")]
    {
        let number = name.len() as u64;
        image(dir, name, scale.siblings, Some(below), |write| {
            (0..64).for_each(|_| write(random(&mut rng) % clusters, 1, number));
        });
    }
    copy_file(&dir.join("stock.qcow2"), &dir.join("ours.qcow2"));
    let took = qemu_img(dir, &["rebase", "-q", "-b", "new.qcow2", "-F", "qcow2", "stock.qcow2"]);
    let our = pleach(dir, &["rebase", "ours.qcow2", "--onto", "new.qcow2", "--yes"]);
    row(&format!("rebase between siblings, {} GiB in common", scale.siblings >> 30), took, our, "50");
    // What they have in common holds nothing but zeros, which would be read for a long time.
    qemu_img(dir, &["rebase", "-q", "-u", "-b", "", "new.qcow2"]);
    same(dir, "stock.qcow2", "ours.qcow2");
}

/// An image of `size` bytes, over `below` if that is said; `content` is handed what writes: first cluster, how many, and
/// with what, of which equal numbers give equal bytes.
fn image(
    dir: &Path,
    name: &str,
    size: u64,
    below: Option<&str>,
    content: impl FnOnce(&mut dyn FnMut(u64, u64, u64)),
) {
    let path = dir.join(name);
    let backing = below.map(|name| BackingFile { name: name.into(), format: Some(b"qcow2".to_vec()) });
    create(&RealDisk, &path, &CreateOptions { size, backing, ..CreateOptions::default() }).unwrap();
    let writer = open_writer_alone(&RealDisk, &path).unwrap();
    let mut bytes = vec![0; usize::try_from(CLUSTER).unwrap()];
    content(&mut |first, clusters, number| {
        for cluster in first..first + clusters {
            bytes.fill(u8::try_from((cluster * 7 + number) % 251 + 1).unwrap());
            writer.write_at(cluster * CLUSTER, &bytes).unwrap();
        }
    });
    writer.close().unwrap();
}

/// The next of a row of numbers.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Both images are sound and read the same.
fn same(dir: &Path, stock: &str, ours: &str) {
    qemu_img(dir, &["check", "-q", ours]);
    qemu_img(dir, &["compare", "-q", stock, ours]);
}

fn copy_file(from: &Path, to: &Path) {
    run(Command::new("cp").args(["--sparse=always", text(from), text(to)]));
}

/// Runs the release build of the command line.
fn pleach(dir: &Path, args: &[&str]) -> Took {
    run(Command::new(program()).current_dir(dir).args(args))
}

/// It lies beside the directory of this bench.
fn program() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let program = this.parent().and_then(Path::parent).unwrap().join("pleach");
    assert!(program.exists(), "{} is missing: cargo build --release --package pleach", program.display());
    program
}
