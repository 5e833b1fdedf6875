//! `pleach flatten` makes copies that stand alone, and `pleach diff` tells where images differ, byte for byte.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;

use pleach_testkit::files::listing;
use pleach_testkit::layers::{Layer, qcow2};
use pleach_testkit::oracle::{check_clean, digest, info, qemu_img_in, text};
use pleach_testkit::{Format, OnFailure, RandomTree, Rng, Tool, WorkDir, chosen_seed, long_mode};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

#[test]
fn what_is_planned_is_what_is_made() {
    let work = WorkDir::new("flatten");
    let dir = &*work;
    let over = |backing| Layer { size: 4 << 20, backing, options: "" };
    qcow2(&dir.join("a.qcow2"), over(None), &["write -q -P 1 0 1M", "write -q -P 0 1M 64k"]);
    qcow2(
        &dir.join("b.qcow2"),
        over(Some(("a.qcow2", Format::Qcow2))),
        &["write -q -P 2 64k 10k", "write -q -z 512k 64k"],
    );
    qcow2(&dir.join("c.qcow2"), over(Some(("b.qcow2", Format::Qcow2))), &["write -q -c -P 3 2M 64k"]);
    let (from, to) = (dir.join("c.qcow2"), dir.join("flat.qcow2"));
    for more in [&[][..], &["--cluster-size", "4k"], &["-c"], &["-O", "raw"]] {
        let mut args = vec!["flatten", text(&from), text(&to), "--json"];
        args.extend(more);
        let before = listing(dir);
        let planned = Tool::new(PLEACH).json(&[&args[..], &["-n"]].concat());
        assert_eq!(listing(dir), before, "{more:?}");
        let done = Tool::new(PLEACH).json(&args);
        assert_eq!(planned, done, "{more:?}");
        assert_eq!(done["plan"]["file_size"], fs::metadata(&to).unwrap().len(), "{more:?}");
        let format = if more.contains(&"raw") { Format::Raw } else { Format::Qcow2 };
        assert_eq!(digest(&to, format), digest(&from, Format::Qcow2), "{more:?}");
        if format == Format::Qcow2 {
            check_clean(&to);
            assert!(info(&to)["backing-filename"].is_null());
        }
        fs::remove_file(&to).unwrap();
    }
    let args = ["flatten", text(&from), text(&to), "-b", "a.qcow2"];
    assert_eq!(Tool::new(PLEACH).run(&args).code, Some(2));
}

/// The sectors that `pleach diff` names are those that differ between raw copies made by qemu-img.
#[test]
fn every_sector_that_differs_is_named_and_no_other() {
    let seeds = match chosen_seed() {
        Some(seed) => seed..seed + 1,
        None => 900..900 + if long_mode() { 60 } else { 4 },
    };
    for seed in seeds {
        let _seed = OnFailure::print_seed(seed, "flatten_diff");
        let work = WorkDir::new("diff");
        let mut rng = Rng::new(seed);
        let tree = RandomTree::build(&work.join("tree"), &mut rng, 7);
        for _ in 0..5 {
            let (a, b) = (rng.pick(&tree.nodes).clone(), rng.pick(&tree.nodes).clone());
            let names = [tree.path(&a), tree.path(&b)];
            let mut args = vec!["diff", text(&names[0]), text(&names[1]), "--json"];
            args.extend(["-f", a.format.name(), "-F", b.format.name()]);
            let shown = Tool::new(PLEACH).json(&args);
            let raw = |node: &pleach_testkit::Node, name: &str| raw_bytes(&tree.dir, node, &work.join(name));
            let (was, is) = (raw(&a, "a.raw"), raw(&b, "b.raw"));
            let wanted = differing(&was, &is);
            let mut told = Vec::new();
            for extent in shown["extents"].as_array().unwrap() {
                let (start, length) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
                for at in (start..start + length).step_by(512) {
                    told.push((at, extent["zero"].as_bool().unwrap()));
                }
            }
            assert_eq!(told, wanted, "{} and {}", a.name, b.name);
        }
    }
}

fn raw_bytes(dir: &Path, node: &pleach_testkit::Node, to: &Path) -> Vec<u8> {
    qemu_img_in(dir, &["convert", "-f", node.format.name(), "-O", "raw", &node.file, text(to)]);
    fs::read(to).unwrap()
}

/// Each sector that differs, and whether the second one is zeros there; behind an end there are zeros.
fn differing(was: &[u8], is: &[u8]) -> Vec<(u64, bool)> {
    let sector = |bytes: &[u8], n: usize| {
        let mut sector = [0; 512];
        let some = bytes.get(n * 512..bytes.len().min(n * 512 + 512)).unwrap_or(&[]);
        sector[..some.len()].copy_from_slice(some);
        sector
    };
    let count = was.len().max(is.len()).div_ceil(512);
    let pairs = (0..count).map(|n| (n, sector(was, n), sector(is, n))).filter(|(_, a, b)| a != b);
    pairs.map(|(n, _, b)| (n as u64 * 512, b == [0; 512])).collect()
}
