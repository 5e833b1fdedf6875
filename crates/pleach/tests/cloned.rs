//! Where the file system lets files share blocks, data are shared and not written: as the plan says, and as the space that is
//! taken says. Needs root and mkfs.xfs; without them it says so, and does nothing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;
use std::process::Command;

use pleach_testkit::layers::{Layer, qcow2};
use pleach_testkit::mount::Xfs;
use pleach_testkit::oracle::{check_clean, digest, text};
use pleach_testkit::{Format, Tool};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const MIB: u64 = 1 << 20;

/// Bytes that all files of the file system take.
fn used(dir: &Path) -> u64 {
    assert!(Command::new("sync").args(["-f", text(dir)]).status().unwrap().success());
    let df = Command::new("df").args(["--output=used", "-B1", text(dir)]).output().unwrap();
    String::from_utf8(df.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap()
}

#[test]
fn merges_rebases_and_copies_share_blocks() {
    let Some(fs) = Xfs::mount(1 << 30) else { return };
    let dir = fs.path();
    let chain = |base: &str, top: &str| {
        for name in ["base.qcow2", "top.qcow2", "copy.qcow2", "copy.raw"] {
            // Most of them are not there yet.
            let _ = std::fs::remove_file(dir.join(name));
        }
        // Data that begin and end within blocks, and within clusters.
        let writes =
            ["write -q -P 1 0 16M", "write -q -P 2 20M 3k", "write -q -P 3 21505k 2M", "write -q -z 4M 1M"];
        qcow2(&dir.join("base.qcow2"), Layer { size: 64 * MIB, backing: None, options: base }, &writes);
        let over = Layer { size: 64 * MIB, backing: Some(("base.qcow2", Format::Qcow2)), options: top };
        qcow2(&dir.join("top.qcow2"), over, &["write -q -P 4 1M 100k", "write -q -P 5 40M 12M"]);
    };
    let cases: &[(&str, &str, &str)] = &[
        ("64 KiB", "", ""),
        ("other clusters", "cluster_size=128k", "cluster_size=16k"),
        ("subclusters", "", "extended_l2=on"),
        ("smaller than a block", "cluster_size=64k", "cluster_size=1k"),
    ];
    for (name, base, top) in cases {
        for args in [
            &["merge", "top.qcow2", "--into", "base.qcow2", "--keep", "top"][..],
            &["rebase", "top.qcow2", "--onto", "none"],
            &["flatten", "top.qcow2", "copy.qcow2"],
            &["flatten", "top.qcow2", "copy.raw"],
        ] {
            let label = format!("{name}: {args:?}");
            chain(base, top);
            let before = digest(&dir.join("top.qcow2"), Format::Qcow2);
            let (image, other) = (dir.join(args[1]), dir.join(args[2]));
            let run = |more: &[&str]| {
                let words: Vec<&str> = match args[0] {
                    "flatten" => vec!["flatten", text(&image), text(&other)],
                    _ => [args[0], text(&image)].into_iter().chain(args[2..].iter().copied()).collect(),
                };
                Tool::new(PLEACH).json(&words.iter().chain(more).collect::<Vec<_>>())["plan"].clone()
            };
            let planned = run(&["-n", "--json"]);
            let space = used(dir);
            let done = run(&["--yes", "--json"]);
            for key in ["bytes_written", "bytes_cloned"] {
                assert_eq!(planned[key], done[key], "{label}: {planned} {done}");
            }
            let bytes = |key: &str| done[key].as_u64().unwrap();
            let (written, cloned) = (bytes("bytes_written"), bytes("bytes_cloned"));
            assert!(written > 8 * MIB, "{label}: {done}");
            if !top.contains("1k") {
                assert!(cloned > written - MIB && cloned <= written, "{label}: {done}");
                let taken = used(dir).saturating_sub(space);
                assert!(taken < 3 * MIB, "{label}: {taken} bytes are taken, and {done}");
            }
            let flat = args[0] == "flatten";
            let result = if flat { other } else { image };
            let format =
                if result.extension().is_some_and(|e| e == "raw") { Format::Raw } else { Format::Qcow2 };
            assert_eq!(digest(&result, format), before, "{label}");
            if format == Format::Qcow2 {
                check_clean(&result);
            }
        }
    }
}
