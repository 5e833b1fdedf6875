//! `pleach map` against `qemu-img map`: every field of every extent, on golden images, on random trees, and where the
//! rules meet each other.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use pleach_testkit::files::patch;
use pleach_testkit::layers::{self, Layer};
use pleach_testkit::oracle::{Format, qemu_img_in, qemu_io, text};
use pleach_testkit::{OnFailure, RandomTree, Rng, Tool, WorkDir, long_mode};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const KEYS: [&str; 8] = ["start", "length", "depth", "present", "zero", "data", "compressed", "offset"];
const KEY: &str = "secret,id=key,data=secret";

/// Extents as rows of the fields that QEMU has; absent ones are null.
fn rows(extents: &Value) -> Vec<Vec<Value>> {
    let row = |extent: &Value| KEYS.iter().map(|key| extent[*key].clone()).collect();
    extents.as_array().unwrap().iter().map(row).collect()
}

fn ours(args: &[&str]) -> Vec<Vec<Value>> {
    rows(&Tool::new(PLEACH).json(&[&["map", "--json"], args].concat())["extents"])
}

fn qemu(dir: &Path, args: &[&str]) -> Vec<Vec<Value>> {
    let output = qemu_img_in(dir, &[&["map", "--output=json"], args].concat());
    rows(&serde_json::from_str(&output).unwrap())
}

fn assert_same(name: &str, ours: &[Vec<Value>], qemu: &[Vec<Value>]) {
    let first = ours.iter().zip(qemu).position(|(a, b)| a != b).unwrap_or(ours.len().min(qemu.len()));
    assert_eq!(ours.get(first), qemu.get(first), "{name}: extent {first} of {}, {}", ours.len(), qemu.len());
}

/// Judges the map of `image` in `dir`, all of it and some of it.
fn judge(dir: &Path, image: &str, format: Format, name: &str) {
    let path = dir.join(image);
    let args = [text(&path), "-f", format.name()];
    assert_same(name, &ours(&args), &qemu(dir, &args));
    for part in [["-s", "70000", "-l", "100000"], ["-s", "1M", "-l", "1"], ["-s", "0", "-l", "0"]] {
        let args = [&args[..], &part].concat();
        assert_same(&format!("{name} {part:?}"), &ours(&args), &qemu(dir, &args));
    }
}

#[test]
fn golden_images() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden");
    let mut maps = 0;
    for entry in fs::read_dir(&golden).unwrap() {
        let list = entry.unwrap().path();
        let Some(name) = list.file_name().unwrap().to_str().unwrap().strip_suffix(".map.json") else {
            continue;
        };
        // Not what is stored: copies of the images may have holes that the originals have not.
        let image = format!("{name}.qcow2");
        assert_same(name, &ours(&[text(&golden.join(&image))]), &qemu(&golden, &[&image]));
        maps += 1;
    }
    assert!(maps > 30, "{maps}");
}

#[test]
fn random_trees() {
    let seeds: Vec<u64> = match pleach_testkit::chosen_seed() {
        Some(seed) => vec![seed],
        None => (0..if long_mode() { 40 } else { 4 }).map(|i| 0x3a90 + i).collect(),
    };
    for seed in seeds {
        let _guard = OnFailure::print_seed(seed, "map random_trees");
        let work = WorkDir::new("map");
        let tree = RandomTree::build(&work.join("tree"), &mut Rng::new(seed), 8);
        for node in &tree.nodes {
            judge(&tree.dir, &node.file, node.format, &node.file);
        }
    }
}

/// A name, and what makes the image `top.qcow2` (or another) in a directory.
type Case = (&'static str, &'static str, fn(&Path));

const CASES: &[Case] = &[
    ("a short layer in the middle", "top.qcow2", |dir| {
        qcow2(dir, "base.qcow2", None, "", 512, &["write -q -P 5 0 64k", "write -q -P 5 256k 64k"]);
        qcow2(dir, "mid.qcow2", Some("base.qcow2"), "", 128, &[]);
        qcow2(dir, "top.qcow2", Some("mid.qcow2"), "", 512, &["write -q -P 1 320k 64k"]);
    }),
    ("holes of a raw base that ends early", "top.qcow2", |dir| {
        layers::raw(&dir.join("base.raw"), 1 << 20, &["write -q -P 5 256k 4k"]);
        fs::File::options().write(true).open(dir.join("base.raw")).unwrap().set_len((1 << 20) + 100).unwrap();
        qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", "2M"]);
    }),
    ("clusters that were never written", "top.qcow2", |dir| {
        let writes = ["write -q -P 5 1M 64k", "write -q -z 2M 64k"];
        qcow2(dir, "base.qcow2", None, "preallocation=metadata", 4096, &writes);
        qcow2(dir, "top.qcow2", Some("base.qcow2"), "", 4096, &["write -q -P 1 3M 128k"]);
    }),
    ("clusters with reserved space", "a.qcow2", |dir| {
        qcow2(dir, "a.qcow2", None, "preallocation=falloc", 4096, &["write -q -P 5 1M 64k"]);
    }),
    ("owned subclusters that show the base", "top.qcow2", |dir| {
        qcow2(dir, "base.qcow2", None, "", 100, &["write -q -P 5 0 4k"]);
        let writes = ["write -q -P 5 256k 2k", "write -q -z 8k 2k", "write -q -c -P 3 128k 64k"];
        qcow2(
            dir,
            "mid.qcow2",
            Some("base.qcow2"),
            "extended_l2=on,preallocation=metadata",
            300,
            &writes[..2],
        );
        qcow2(dir, "top.qcow2", Some("mid.qcow2"), "extended_l2=on", 400, &writes[2..]);
    }),
    ("owned subclusters over nothing", "a.qcow2", |dir| {
        let writes = ["write -q -P 5 0 2k", "write -q -z 8k 2k"];
        qcow2(dir, "a.qcow2", None, "extended_l2=on,preallocation=metadata", 512, &writes);
    }),
    ("zeros with and without a cluster, compressed neighbours", "a.qcow2", |dir| {
        let writes = [
            "write -q -P 5 0 256k",
            "write -q -z 0 128k",
            "write -q -z -u 128k 64k",
            "write -q -c -P 3 512k 64k",
            "write -q -c -P 4 576k 64k",
        ];
        qcow2(dir, "a.qcow2", None, "", 1024, &writes);
    }),
    ("a file that ends inside a cluster", "a.qcow2", |dir| {
        qcow2(dir, "a.qcow2", None, "", 256, &["write -q -P 5 0 128k"]);
        let file = fs::File::options().write(true).open(dir.join("a.qcow2")).unwrap();
        file.set_len(file.metadata().unwrap().len() - (44 << 10)).unwrap();
    }),
    ("a data file", "a.qcow2", |dir| {
        let writes = ["write -q -P 5 0 64k", "write -q -z 64k 64k", "write -q -P 5 256k 64k"];
        qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "a.qcow2", "512k"]);
        let mut io = Command::new("qemu-io");
        io.current_dir(dir).args(["-f", "qcow2"]).args(writes.iter().flat_map(|w| ["-c", w])).arg("a.qcow2");
        assert!(io.output().unwrap().status.success());
    }),
    ("tables of 512 bytes", "a.qcow2", |dir| {
        let writes: Vec<String> = (0..40).map(|i| format!("write -q -P 5 {}k {i}k", i * 24)).collect();
        qcow2(
            dir,
            "a.qcow2",
            None,
            "cluster_size=512",
            2048,
            &writes.iter().map(|w| &**w).collect::<Vec<_>>(),
        );
    }),
    ("an empty disk of a petabyte", "a.qcow2", |dir| {
        qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "base.qcow2", "1P"]);
        let over = ["-b", "base.qcow2", "-F", "qcow2", "a.qcow2", "1P"];
        qemu_img_in(dir, &[&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"], &over[..]].concat());
    }),
];

fn qcow2(dir: &Path, name: &str, backing: Option<&str>, options: &str, kib: u64, commands: &[&str]) {
    let backing = backing.map(|b| (b, Format::Qcow2));
    layers::qcow2(&dir.join(name), Layer { size: kib << 10, backing, options }, commands);
}

#[test]
fn where_rules_meet() {
    for (name, image, make) in CASES {
        let work = WorkDir::new("map");
        make(&work);
        judge(&work, image, Format::Qcow2, name);
    }
    let work = WorkDir::new("map");
    layers::raw(&work.join("a.raw"), 1 << 20, &["write -q -P 5 256k 4k"]);
    judge(&work, "a.raw", Format::Raw, "a raw file");
}

/// Holes of the data file show only if it may be opened.
#[test]
fn holes_of_a_data_file() {
    let work = WorkDir::new("map");
    let create =
        ["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "full.qcow2", "512k"];
    qemu_img_in(&work, &create);
    let mut copy = Command::new("cp");
    copy.arg("--sparse=always").arg(work.join("full.qcow2")).arg(work.join("a.qcow2"));
    assert!(copy.status().unwrap().success());
    let path = work.join("a.qcow2");
    let data = work.join("d.raw");
    let want = qemu(&work, &[text(&path)]);
    let holes = |rows: &[Vec<Value>]| rows.iter().any(|row| row[4] == true);
    assert!(holes(&want), "QEMU sees the hole");
    assert_same("with it", &ours(&[text(&path), "--allow-data-file", text(&data)]), &want);
    assert!(!holes(&ours(&[text(&path)])), "without it");
}

/// No key is needed to know where encrypted bytes are.
#[test]
fn encrypted_images_are_mapped_and_not_read() {
    for format in ["luks", "aes"] {
        let work = WorkDir::new("map");
        let fast = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
        let options = format!("encrypt.format={format},encrypt.key-secret=key{fast}");
        qemu_img_in(
            &work,
            &["create", "-q", "--object", KEY, "-f", "qcow2", "-o", &options, "a.qcow2", "512k"],
        );
        let opened = "driver=qcow2,encrypt.key-secret=key,file.filename=a.qcow2";
        let writes =
            ["write -q -P 5 0 64k", "write -q -P 4 128k 64k", "write -q -z 128k 64k", "write -q -z 256k 64k"];
        let mut io = Command::new("qemu-io");
        io.current_dir(&*work).args(["--object", KEY, "--image-opts"]);
        io.args(writes.iter().flat_map(|w| ["-c", w])).arg(opened);
        assert!(io.output().unwrap().status.success());
        let want = qemu(&work, &["--object", KEY, "--image-opts", opened]);
        assert_same(format, &ours(&[text(&work.join("a.qcow2"))]), &want);
        assert!(want.iter().all(|row| row[7].is_null()), "nothing encrypted has an offset");
        let human = Tool::new(PLEACH).succeed(&["map", text(&work.join("a.qcow2"))]);
        assert!(human.stdout.contains("encrypted"), "{human}");
    }
}

#[test]
fn a_snapshot_is_mapped_at_its_own_size() {
    let work = WorkDir::new("map");
    let path = work.join("a.qcow2");
    qcow2(&work, "a.qcow2", None, "", 256, &["write -q -P 5 0 256k"]);
    let then = qemu(&work, &["a.qcow2"]);
    qemu_img_in(&work, &["snapshot", "-c", "s", "a.qcow2"]);
    qemu_img_in(&work, &["resize", "-q", "--shrink", "a.qcow2", "64k"]);
    qemu_io(&path, Format::Qcow2, &["write -q -P 6 0 64k"]);
    assert_same("s", &ours(&[text(&path), "--snapshot", "s"]), &then);
    let none = Tool::new(PLEACH).run(&["map", text(&path), "--snapshot", "nosuch"]);
    assert_eq!(none.code, Some(7), "{none}");
}

#[test]
fn people_get_the_table_of_qemu() {
    let work = WorkDir::new("map");
    let (name, image, make) = CASES[0];
    make(&work);
    let human = Command::new(PLEACH).current_dir(&*work).args(["map", image]).output().unwrap();
    let human = String::from_utf8(human.stdout).unwrap();
    assert_eq!(human, qemu_img_in(&work, &["map", image]), "{name}");
}

/// Whatever names say, no file is opened but the image and backing files beside it.
#[test]
fn backing_files_elsewhere_are_followed_on_request() {
    let work = WorkDir::new("map");
    let (home, away) = (work.join("home"), work.join("away"));
    fs::create_dir(&home).unwrap();
    fs::create_dir(&away).unwrap();
    qcow2(&away, "base.qcow2", None, "", 128, &["write -q -P 5 0 64k"]);
    qcow2(&home, "top.qcow2", Some("../away/base.qcow2"), "", 128, &[]);
    std::os::unix::fs::symlink("../away/base.qcow2", home.join("link.qcow2")).unwrap();
    qcow2(&home, "over-link.qcow2", Some("link.qcow2"), "", 128, &[]);
    let (top, over_link, away) = (home.join("top.qcow2"), home.join("over-link.qcow2"), away.as_path());
    let cases: [(&Path, &[&str], bool); 8] = [
        (&top, &[], false),
        (&top, &["--chain"], true),
        (&top, &["--trust"], true),
        (&top, &["--allow-dir", text(away)], true),
        (&over_link, &[], false),
        (&over_link, &["--chain"], false),
        (&over_link, &["--trust"], true),
        (&over_link, &["--allow-dir", text(away)], true),
    ];
    for (image, flags, allowed) in cases {
        let outcome = Tool::new(PLEACH).run(&[&["map", "--json", text(image)], flags].concat());
        assert_eq!(outcome.code == Some(0), allowed, "{outcome}");
        assert!(allowed || outcome.text().contains("--allow-dir"), "{outcome}");
    }
}

#[test]
fn damage_is_refused_and_nothing_half_is_printed() {
    let work = WorkDir::new("map");
    qcow2(&work, "a.qcow2", None, "cluster_size=4k", 4096, &["write -q -P 5 0 4M"]);
    let path = work.join("a.qcow2");
    let bytes = fs::read(&path).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    // The second L2 table leads out of the file.
    patch(&path, word(40) + 8, &(1u64 << 63 | 1 << 40).to_be_bytes());
    let outcome = Tool::new(PLEACH).run(&["map", "--json", text(&path)]);
    assert_eq!(outcome.code, Some(4), "{outcome}");
    assert_eq!(outcome.json()["error"]["code"], "corrupt", "{outcome}");
}

#[test]
fn lost_output_is_no_success() {
    let work = WorkDir::new("map");
    qcow2(&work, "a.qcow2", None, "cluster_size=4k", 4096, &["write -q -P 5 0 4M"]);
    let path = work.join("a.qcow2");
    for args in [&["map"][..], &["map", "--json"], &["info"], &["check", "--json"]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let status = std::process::Command::new(PLEACH).args(args).arg(&path).stdout(full).status();
        assert_eq!(status.unwrap().code(), Some(1), "{args:?}");
    }
}
