//! Internal snapshots, check, map, compare and shrink beside qemu-img, on images of nothing but tables: one run, one table.
//!
//! `cargo xtask bench states`, or `states check shrink` for some rows; `PLEACH_SMALL=1` takes disks a 64th as large. Every
//! operation is a process of its own, so that its peak memory is known; stock and ours take turns on two copies of one image.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use pleach_benches::beside::{children, own, qemu_img, run, text};
use pleach_engine::internal::Internal;
use pleach_engine::{Source, SourceOptions, Threads, Watch, compare, map, open_writer};
use pleach_image::{Image, NewSnapshot, check_with};
use pleach_store::{Access, Disk, RealDisk};

/// An operation: its name, what `qemu-img` is told, and how much must be read and written, in copies of the image's L2
/// tables and of its refcounts: L2 read, L2 written, refcounts read, refcounts written.
struct Row {
    name: &'static str,
    stock: &'static [&'static str],
    touched: [u64; 4],
}

const STATES: &[Row] = &[
    Row { name: "take", stock: &["snapshot", "-c", "s"], touched: [1, 1, 1, 1] },
    Row { name: "apply", stock: &["snapshot", "-a", "s"], touched: [1, 0, 0, 0] },
    Row { name: "delete", stock: &["snapshot", "-d", "s"], touched: [1, 1, 1, 1] },
];
const READ: &[Row] = &[
    Row { name: "check", stock: &["check"], touched: [1, 0, 1, 0] },
    Row { name: "map", stock: &["map", "--output=json"], touched: [1, 0, 0, 0] },
    Row { name: "compare", stock: &["compare"], touched: [2, 0, 0, 0] },
];
const SHRINK: &[Row] = &[Row { name: "shrink", stock: &["resize", "-q", "--shrink"], touched: [1, 0, 1, 1] }];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["operation", name, path, other] => operation(name, Path::new(path), other),
        ref all if all.contains(&"states") => {
            table(
                &all.iter()
                    .copied()
                    .filter(|arg| !arg.starts_with('-') && *arg != "states")
                    .collect::<Vec<_>>(),
            );
        }
        _ => println!("states: only if asked for by name"),
    }
}

/// Does one thing, and prints how long it took and the peak of this process's memory in KiB.
fn operation(name: &str, path: &Path, other: &str) {
    let start = Instant::now();
    let source = |path: &Path| Source::open(&RealDisk, path, &SourceOptions::default()).unwrap();
    match name {
        "check" => {
            let image = Image::open(RealDisk.open(path, Access::Read).unwrap()).unwrap();
            let report = check_with(&image, &Threads).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0));
        }
        "map" => map(&source(path).chain, 0..u64::MAX, &mut |_| Ok(())).unwrap(),
        "compare" => {
            let sides = [source(path), source(Path::new(other))];
            let found = compare([&sides[0], &sides[1]], false, &Watch::new()).unwrap();
            assert_eq!(found.difference, None);
        }
        "shrink" => {
            let writer = open_writer(&RealDisk, path, &SourceOptions::default()).unwrap();
            writer.resize(other.parse().unwrap()).unwrap();
            writer.close().unwrap();
        }
        _ => {
            let image = Internal::open(&RealDisk, path).unwrap();
            match name {
                "take" => {
                    image
                        .take(&NewSnapshot { name: b"s".to_vec(), ..NewSnapshot::default() })
                        .map(drop)
                        .unwrap();
                }
                "apply" => image.apply(b"s").unwrap(),
                _ => image.delete(b"s").unwrap(),
            }
            image.close().unwrap();
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    println!("{seconds} {}", peak.trim().trim_end_matches(" kB"));
}

/// The rows of these names; all if there are none.
fn table(wanted: &[&str]) {
    let dir = pleach_benches::work_dir();
    let (stock, ours) = (dir.path().join("stock.qcow2"), dir.path().join("ours.qcow2"));
    let scale = if std::env::var_os("PLEACH_SMALL").is_some() { 64 } else { 1 };
    let speed = copy_speed(dir.path());
    println!("memory is copied at {:.1} GiB a processor second\n", speed / (1u64 << 30) as f64);
    println!("seconds by the clock (of all processors); the limit is in processor seconds:\n");
    println!("| image | operation | qemu-img | pleach | times faster | limit | peak MiB |");
    println!("|---|---|---|---|---|---|---|");
    let images = [
        ("4 TiB, 64 KiB", "65536", 4u64 << 40, &[STATES, READ][..]),
        ("64 GiB, 4 KiB", "4096", 64 << 30, &[STATES]),
        ("2 TiB to 512 GiB", "65536", 2 << 40, &[SHRINK]),
    ];
    let asked = |row: &&Row| wanted.is_empty() || wanted.contains(&row.name);
    for (label, cluster, size, groups) in images {
        let rows: Vec<&Row> = groups.iter().flat_map(|group| group.iter()).filter(asked).collect();
        if rows.is_empty() {
            continue;
        }
        let (size, options) = (size / scale, format!("preallocation=metadata,cluster_size={cluster}"));
        qemu_img(
            dir.path(),
            &["create", "-q", "-f", "qcow2", "-o", &options, text(&stock), &size.to_string()],
        );
        run(Command::new("cp").args(["--sparse=always", text(&stock), text(&ours)]));
        let clusters = size / cluster.parse::<u64>().unwrap();
        let other = (size / 4).to_string();
        for row in rows {
            let mut args = row.stock.to_vec();
            args.push(text(&stock));
            match row.name {
                "compare" => args.push(text(&ours)),
                "shrink" => args.push(&other),
                _ => {}
            }
            let theirs = qemu_img(dir.path(), &args);
            let between = children();
            let more = if row.name == "shrink" { other.as_str() } else { text(&stock) };
            let (seconds, peak) = measured(row.name, &ours, more);
            let our_cpu = (children() - between).max(0.01);
            let [l2_read, l2_written, counts_read, counts_written] = row.touched;
            let bytes = clusters * (8 * (l2_read + l2_written) + 2 * (counts_read + counts_written));
            // A copy reads and writes each byte.
            let limit = bytes as f64 / 2.0 / speed;
            println!(
                "| {label} | {} | {theirs} | {seconds:.2} ({our_cpu:.2}) | {:.0} ({:.0}) | {limit:.2} | {peak} |",
                row.name,
                theirs.clock / seconds,
                theirs.cpu / our_cpu
            );
        }
        for path in [&stock, &ours] {
            let done = Command::new("qemu-img").args(["check", "-q", text(path)]).status().unwrap();
            assert!(done.success(), "{}: {done}", path.display());
        }
    }
}

/// Seconds, and MiB.
fn measured(name: &str, path: &Path, other: &str) -> (f64, u64) {
    let this = std::env::current_exe().unwrap();
    let done = Command::new(this).args(["operation", name, text(path), other]).output().unwrap();
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    let printed = String::from_utf8(done.stdout).unwrap();
    let (seconds, peak) = printed.trim().split_once(' ').unwrap();
    (seconds.parse().unwrap(), peak.parse::<u64>().unwrap() >> 10)
}

/// Bytes that are copied between two files in memory in a second of one processor.
fn copy_speed(dir: &Path) -> f64 {
    let (from, to) = (dir.join("from"), dir.join("to"));
    let bytes = vec![1; 256 << 20];
    std::fs::write(&from, &bytes).unwrap();
    std::fs::write(&to, &bytes).unwrap();
    let (from_store, to_store) =
        (RealDisk.open(&from, Access::Read).unwrap(), RealDisk.open(&to, Access::Write).unwrap());
    let mut buffer = vec![0; 1 << 20];
    let start = own();
    for _ in 0..4 {
        for at in (0..bytes.len() as u64).step_by(buffer.len()) {
            from_store.read_at(at, &mut buffer).unwrap();
            to_store.write_at(at, &buffer).unwrap();
        }
    }
    let seconds = (own() - start).max(0.01) / 4.0;
    std::fs::remove_file(from).unwrap();
    std::fs::remove_file(to).unwrap();
    bytes.len() as f64 / seconds
}
