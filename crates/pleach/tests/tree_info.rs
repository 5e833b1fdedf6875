//! `pleach tree` and `pleach info`: what they show of images whose every cluster is known, and how fast.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pleach_testkit::files::copy_dir;
use pleach_testkit::layers::{Layer, fill, qcow2, raw};
use pleach_testkit::oracle::{self, in_parallel, qemu_img, qemu_img_in, text};
use pleach_testkit::tool::Running;
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::{Value, json};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const CLUSTER: u64 = 65536;
const DISK: u64 = 64 * CLUSTER;

/// One layer of a hand-made tree: name, parent, and the runs of 64 KiB clusters (first, count) that it holds.
type Row = (&'static str, Option<&'static str>, &'static [(u64, u64)]);

/// A <- B <- D and A <- C <- E, as in the documentation.
const KNOWN: &[Row] = &[
    ("A", None, &[(0, 20), (50, 2)]),
    ("B", Some("A"), &[(5, 12)]),
    ("C", Some("A"), &[(0, 3), (18, 4)]),
    ("D", Some("B"), &[(8, 3), (30, 3)]),
    ("E", Some("C"), &[(1, 1), (40, 1)]),
];

fn build(dir: &Path, rows: &[Row]) {
    fs::create_dir_all(dir).unwrap();
    for ((name, parent, runs), pattern) in rows.iter().zip(1..) {
        let commands: Vec<String> =
            runs.iter().map(|(first, count)| fill(pattern, *first, *count, CLUSTER)).collect();
        let backing = parent.map(|parent| format!("{parent}.qcow2"));
        let backing = backing.as_deref().map(|backing| (backing, Format::Qcow2));
        qcow2(&dir.join(format!("{name}.qcow2")), Layer { size: DISK, backing, options: "" }, &commands);
    }
}

fn tree_of(target: &Path) -> Value {
    Tool::new(PLEACH).json(&["tree", text(target), "--sizes", "--json"])
}

/// Nodes by name, each of which must have the keys that every node has.
fn nodes(tree: &Value) -> BTreeMap<String, Value> {
    for key in ["schema", "tree", "catalog", "current", "disks", "nodes"] {
        assert!(tree.get(key).is_some(), "no {key}: {tree}");
    }
    for disk in tree["disks"].as_array().unwrap() {
        for key in ["name", "active", "virtual_size"] {
            assert!(disk.get(key).is_some(), "a disk without {key}: {tree}");
        }
    }
    let list = tree["nodes"].as_array().unwrap();
    let named: BTreeMap<_, _> =
        list.iter().map(|node| (node["name"].as_str().unwrap().to_owned(), node.clone())).collect();
    assert_eq!(named.len(), list.len(), "a name comes twice: {tree}");
    for node in list {
        for key in ["name", "kind", "parent", "storage", "sizes"] {
            assert!(node.get(key).is_some(), "a node without {key}: {node}");
        }
        let extra: &[&str] =
            if node["kind"] == "snapshot" { &["created", "description", "state"] } else { &[] };
        assert!(
            extra.iter().all(|key| node.get(*key).is_some()),
            "a snapshot lacks one of {extra:?}: {node}"
        );
        for key in ["on_disk", "freed_if_deleted", "written_if_deleted"] {
            assert!(node["sizes"][key].is_u64(), "sizes without {key}: {node}");
        }
    }
    named
}

/// The one disk's storage of a node.
fn storage(node: &Value) -> &Value {
    let disks = node["storage"].as_object().unwrap();
    assert_eq!(disks.len(), 1, "one disk, one storage: {node}");
    disks.values().next().unwrap()
}

fn relations(nodes: &BTreeMap<String, Value>) -> BTreeMap<&str, (&str, Option<&str>)> {
    nodes
        .iter()
        .map(|(name, node)| (name.as_str(), (node["kind"].as_str().unwrap(), node["parent"].as_str())))
        .collect()
}

fn external(file: &str) -> Value {
    json!({"kind": "external", "file": file})
}

#[test]
fn branches_of_external_files() {
    let work = WorkDir::new("branches");
    let dir = work.join("tree");
    build(&dir, KNOWN);
    let tree = tree_of(&dir);
    assert_eq!(tree["catalog"], Value::Null);
    let nodes = nodes(&tree);
    let wanted = BTreeMap::from([
        ("A", ("snapshot", None)),
        ("B", ("snapshot", Some("A"))),
        ("C", ("snapshot", Some("A"))),
        ("D", ("head", Some("B"))),
        ("E", ("head", Some("C"))),
    ]);
    assert_eq!(relations(&nodes), wanted);
    for (name, node) in &nodes {
        assert_eq!(storage(node), &external(&format!("{name}.qcow2")));
    }
    // From one of its images, at least the way from there to the root is shown.
    let from_image = self::nodes(&tree_of(&dir.join("D.qcow2")));
    for name in ["A", "B", "D"] {
        assert_eq!(from_image[name]["parent"], nodes[name]["parent"]);
    }
}

#[test]
fn the_text_names_every_node_and_plain_ascii_is_plain() {
    let work = WorkDir::new("text");
    let dir = work.join("tree");
    build(&dir, KNOWN);
    let tool = Tool::new(PLEACH);
    for flags in [&[][..], &["--sizes"], &["--ascii"], &["--ascii", "--sizes"]] {
        let shown = tool.succeed(&[&["tree", text(&dir)], flags].concat());
        for name in ["A", "B", "C", "D", "E"] {
            let named = shown.stdout.split(|c: char| !c.is_alphanumeric()).any(|word| word == name);
            assert!(named, "{name} is not shown: {shown}");
        }
        assert!(shown.stdout.is_ascii() || !flags.contains(&"--ascii"), "{shown}");
        assert!(!shown.stdout.contains('\u{1b}'), "colour without a terminal: {shown}");
        let sizes = shown.stdout.contains("KiB") || shown.stdout.contains("MiB");
        assert!(sizes || !flags.contains(&"--sizes"), "no sizes: {shown}");
    }
}

#[test]
fn internal_snapshots_are_nodes() {
    let work = WorkDir::new("internal");
    let dir = work.join("tree");
    build(&dir, &[("base", None, &[(0, 4)]), ("disk", Some("base"), &[(2, 4)])]);
    let disk = dir.join("disk.qcow2");
    for (snapshot, pattern) in [("s1", 7), ("s two", 8)] {
        qemu_img(&["snapshot", "-c", snapshot, text(&disk)]);
        oracle::qemu_io(&disk, Format::Qcow2, &[fill(pattern, 3, 2, CLUSTER)]);
    }
    let nodes = nodes(&tree_of(&dir));
    let wanted = BTreeMap::from([
        ("base", ("snapshot", None)),
        ("s1", ("snapshot", Some("base"))),
        ("s two", ("snapshot", Some("s1"))),
        ("disk", ("head", Some("s two"))),
    ]);
    assert_eq!(relations(&nodes), wanted);
    for (name, id) in [("s1", "1"), ("s two", "2")] {
        let internal = json!({"kind": "internal", "file": "disk.qcow2", "snapshot": name, "id": id});
        assert_eq!(storage(&nodes[name]), &internal);
        let created = nodes[name]["created"].as_u64().unwrap_or_else(|| panic!("no time: {}", nodes[name]));
        assert!(created > 1_500_000_000, "{created} is long ago");
    }
    assert_eq!(storage(&nodes["disk"]), &external("disk.qcow2"));
}

#[test]
fn several_roots_and_files_that_are_no_nodes() {
    let work = WorkDir::new("roots");
    let dir = work.join("tree");
    build(&dir, &[("X", None, &[(0, 1)]), ("Y", Some("X"), &[]), ("Z", None, &[(1, 1)])]);
    raw(&dir.join("base.raw"), DISK, &[fill(1, 0, 4, CLUSTER)]);
    let over_raw = Layer { size: DISK, backing: Some(("base.raw", Format::Raw)), options: "" };
    qcow2(&dir.join("over.qcow2"), over_raw, &[fill(2, 1, 1, CLUSTER)]);
    raw(&dir.join("alone.raw"), DISK, &[fill(1, 0, 4, CLUSTER)]);
    fs::write(dir.join("notes.txt"), "not an image\n").unwrap();
    fs::write(dir.join("empty.qcow2"), "").unwrap();
    fs::create_dir(dir.join("folder.qcow2")).unwrap();
    let nodes = nodes(&tree_of(&dir));
    let wanted = BTreeMap::from([
        ("X", ("snapshot", None)),
        ("Y", ("head", Some("X"))),
        ("Z", ("head", None)),
        ("base", ("snapshot", None)),
        ("over", ("head", Some("base"))),
    ]);
    assert_eq!(relations(&nodes), wanted);
    assert_eq!(storage(&nodes["base"]), &external("base.raw"));
}

/// Clusters of `name` that some other node reads: a node reads a cluster of the nearest layer that has it.
fn shared_clusters(rows: &[Row], name: &str) -> u64 {
    let row = |name: &str| *rows.iter().find(|row| row.0 == name).unwrap();
    let holds = |name: &str, cluster: u64| {
        row(name).2.iter().any(|(first, count)| (*first..first + count).contains(&cluster))
    };
    let owner = |reader: &'static str, cluster: u64| {
        std::iter::successors(Some(reader), |name| row(name).1).find(|name| holds(name, cluster))
    };
    let shared: BTreeSet<u64> = (0..DISK / CLUSTER)
        .filter(|cluster| {
            rows.iter().any(|(reader, _, _)| *reader != name && owner(reader, *cluster) == Some(name))
        })
        .collect();
    u64::try_from(shared.len()).unwrap()
}

#[test]
fn sizes_are_exact() {
    let work = WorkDir::new("sizes");
    let dir = work.join("tree");
    build(&dir, KNOWN);
    let tool = Tool::new(PLEACH);
    for (name, node) in nodes(&tree_of(&dir)) {
        let sizes = &node["sizes"];
        let on_disk = fs::metadata(dir.join(format!("{name}.qcow2"))).unwrap().blocks() * 512;
        assert_eq!(sizes["on_disk"], on_disk, "{name}");
        let freed = on_disk - shared_clusters(KNOWN, &name) * CLUSTER;
        assert_eq!(sizes["freed_if_deleted"], freed, "{name}: {sizes}");

        // What it would write is what the plan says, and what deleting it from a copy writes.
        let copy = work.join(format!("without-{name}"));
        copy_dir(&dir, &copy);
        let planned = tool.json(&["delete", text(&copy), &name, "-n", "--json"]);
        let done = tool.json(&["delete", text(&copy), &name, "--yes", "--json"]);
        for (what, document) in [("plan", &planned), ("run", &done)] {
            assert_eq!(
                document["plan"]["bytes_written"], sizes["written_if_deleted"],
                "{name}, {what}: {document}"
            );
        }
        if node["kind"] == "head" {
            assert_eq!(
                (&sizes["written_if_deleted"], &sizes["freed_if_deleted"]),
                (&json!(0), &json!(on_disk))
            );
        }
    }
}

#[test]
fn plans_have_every_key_and_the_report_has_them_too() {
    let work = WorkDir::new("plan");
    let dir = work.join("tree");
    build(&dir, KNOWN);
    let tool = Tool::new(PLEACH);
    let planned = tool.json(&["delete", text(&dir), "B", "-n", "--json"]);
    let done = tool.json(&["delete", text(&dir), "B", "--yes", "--json"]);
    for document in [&planned, &done] {
        let plan = &document["plan"];
        for key in ["bytes_read", "bytes_written", "bytes_cloned", "bytes_freed"] {
            assert!(plan[key].is_u64(), "{key}: {document}");
        }
        for key in ["copies", "renames", "unlinks", "rebases", "dependents"] {
            assert!(plan[key].is_array(), "{key}: {document}");
        }
        assert_eq!(plan.get("refused"), Some(&Value::Null), "{document}");
    }
    let text_plan = tool.succeed(&["delete", text(&dir), "C", "-n"]);
    assert!(text_plan.stdout.contains("C.qcow2"), "the plan names what goes: {text_plan}");
}

const INFO_KEYS: &[&str] = &[
    "filename",
    "format",
    "version",
    "virtual_size",
    "actual_size",
    "cluster_size",
    "refcount_bits",
    "backing_file",
    "backing_format",
    "full_backing_file",
    "data_file",
    "compression",
    "encryption",
    "features",
    "dirty",
    "corrupt",
    "snapshots",
    "bitmaps",
];

/// Image files with something special each.
fn varied(dir: &Path) -> Vec<PathBuf> {
    fs::create_dir(dir).unwrap();
    let at = |name: &str| dir.join(name);
    let plain = |options| Layer { size: DISK, backing: None, options };
    let none: &[&str] = &[];
    qcow2(&at("plain.qcow2"), plain(""), &[fill(1, 0, 4, CLUSTER)]);
    qcow2(&at("old.qcow2"), plain("compat=v2,cluster_size=4096"), none);
    qcow2(&at("narrow.qcow2"), plain("refcount_bits=1,lazy_refcounts=on"), none);
    qcow2(&at("zstd.qcow2"), plain("compression_type=zstd"), none);
    qcow2(&at("sub.qcow2"), plain("extended_l2=on"), none);
    let over = |backing| Layer { size: DISK / 2, backing: Some((backing, Format::Qcow2)), options: "" };
    qcow2(&at("over.qcow2"), over("plain.qcow2"), none);
    qcow2(&at("absolute.qcow2"), over(text(&at("over.qcow2"))), none);
    qcow2(&at("snap.qcow2"), plain(""), &[fill(1, 0, 4, CLUSTER)]);
    qemu_img(&["snapshot", "-c", "one", text(&at("snap.qcow2"))]);
    qemu_img(&["snapshot", "-c", "two", text(&at("snap.qcow2"))]);
    qcow2(&at("bitmap.qcow2"), plain(""), none);
    qemu_img(&["bitmap", "--add", "-g", "131072", text(&at("bitmap.qcow2")), "b0"]);
    let data = format!("data_file={}", text(&at("external.data")));
    qcow2(&at("external.qcow2"), plain(&data), none);
    let all = ["plain", "old", "narrow", "zstd", "sub", "over", "absolute", "snap", "bitmap", "external"];
    all.iter().map(|name| at(&format!("{name}.qcow2"))).collect()
}

#[test]
fn info_says_what_qemu_img_says() {
    let work = WorkDir::new("info");
    let images = varied(&work.join("images"));
    let tool = Tool::new(PLEACH);
    for path in &images {
        let document = tool.json(&["info", text(path), "--json"]);
        let list = document["images"].as_array().unwrap();
        assert_eq!(list.len(), 1, "{document}");
        let ours = &list[0];
        for key in INFO_KEYS {
            assert!(ours.get(*key).is_some(), "no {key}: {ours}");
        }
        let theirs = oracle::info(path);
        let data = &theirs["format-specific"]["data"];
        let pairs = [
            ("format", &theirs["format"]),
            ("virtual_size", &theirs["virtual-size"]),
            ("actual_size", &theirs["actual-size"]),
            ("cluster_size", &theirs["cluster-size"]),
            ("refcount_bits", &data["refcount-bits"]),
            ("backing_file", &theirs["backing-filename"]),
            ("backing_format", &theirs["backing-filename-format"]),
            ("data_file", &data["data-file"]),
            ("compression", &data["compression-type"]),
            ("dirty", &theirs["dirty-flag"]),
        ];
        for (key, wanted) in pairs {
            assert_eq!(&ours[key], wanted, "{key} of {}: {ours}", path.display());
        }
        assert_eq!(ours["version"], if data["compat"] == "0.10" { 2 } else { 3 }, "{ours}");
        assert_eq!(ours["corrupt"], false, "{ours}");
        assert_eq!(ours["encryption"], Value::Null, "{ours}");
        assert!(ours["features"].is_object(), "{ours}");
        let names = |list: &Value, key: &str| -> Vec<Value> {
            list.as_array().into_iter().flatten().map(|item| item[key].clone()).collect()
        };
        assert_eq!(names(&ours["snapshots"], "name"), names(&theirs["snapshots"], "name"), "{ours}");
        assert_eq!(names(&ours["snapshots"], "id"), names(&theirs["snapshots"], "id"), "{ours}");
        assert_eq!(names(&ours["bitmaps"], "granularity"), names(&data["bitmaps"], "granularity"), "{ours}");
        let full = ours["full_backing_file"].as_str().map(|full| Path::new(full).canonicalize().unwrap());
        let stored = theirs["backing-filename"].as_str();
        let wanted = stored.map(|stored| path.parent().unwrap().join(stored).canonicalize().unwrap());
        assert_eq!(full, wanted, "full_backing_file: {ours}");

        let shown = tool.succeed(&["info", text(path)]);
        assert!(shown.stdout.contains("qcow2"), "{shown}");
    }
}

#[test]
fn info_lists_snapshots_and_bitmaps_with_all_their_keys() {
    let work = WorkDir::new("lists");
    let dir = work.join("images");
    varied(&dir);
    let tool = Tool::new(PLEACH);
    let snap = tool.json(&["info", text(&dir.join("snap.qcow2")), "--json"]);
    for snapshot in snap["images"][0]["snapshots"].as_array().unwrap() {
        for key in ["id", "name", "date", "vm_state_size", "virtual_size", "icount"] {
            assert!(snapshot.get(key).is_some(), "no {key}: {snapshot}");
        }
        assert_eq!(snapshot["virtual_size"], DISK);
    }
    let bitmap = tool.json(&["info", text(&dir.join("bitmap.qcow2")), "--json"]);
    for bitmap in bitmap["images"][0]["bitmaps"].as_array().unwrap() {
        for key in ["name", "granularity", "flags"] {
            assert!(bitmap.get(key).is_some(), "no {key}: {bitmap}");
        }
        assert_eq!(bitmap["name"], "b0");
    }
}

#[test]
fn info_follows_chains_and_takes_directories() {
    let work = WorkDir::new("chain");
    let dir = work.join("images");
    varied(&dir);
    raw(&dir.join("base.raw"), DISK, &[fill(9, 0, 1, CLUSTER)]);
    let over_raw = Layer { size: DISK, backing: Some(("base.raw", Format::Raw)), options: "" };
    qcow2(&dir.join("over-raw.qcow2"), over_raw, &[fill(2, 1, 1, CLUSTER)]);
    let tool = Tool::new(PLEACH);
    let names = |args: &[&str]| -> Vec<String> {
        let document = tool.json(args);
        let images = document["images"].as_array().unwrap();
        for image in images {
            assert!(INFO_KEYS.iter().all(|key| image.get(*key).is_some()), "keys are missing: {image}");
        }
        let name =
            |image: &Value| Path::new(image["filename"].as_str().unwrap()).file_name().unwrap().to_owned();
        images.iter().map(|image| name(image).into_string().unwrap()).collect()
    };
    let top = dir.join("absolute.qcow2");
    assert_eq!(
        names(&["info", text(&top), "--chain", "--json"]),
        ["absolute.qcow2", "over.qcow2", "plain.qcow2"]
    );
    let on_raw = dir.join("over-raw.qcow2");
    assert_eq!(names(&["info", text(&on_raw), "--chain", "--json"]), ["over-raw.qcow2", "base.raw"]);
    let both = ["info", text(&on_raw), text(&top), "--json"];
    assert_eq!(names(&both), ["over-raw.qcow2", "absolute.qcow2"]);
    let listed = names(&["info", text(&dir), "--json"]);
    for name in ["plain.qcow2", "old.qcow2", "over.qcow2", "snap.qcow2", "over-raw.qcow2"] {
        assert!(listed.iter().any(|listed| listed == name), "{name} is not in {listed:?}");
    }
}

const LAYERS: usize = 300;
const CLUSTERS_A_LAYER: usize = 20;
const LARGE_DISK: u64 = 4 << 30;

/// 300 layers, 20 clusters each, scattered over 4 GiB; no layer is opened together with those below it.
fn deep_chain(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let layers: Vec<usize> = (0..LAYERS).collect();
    in_parallel(&layers, |layer| {
        let name = format!("l{layer:03}.qcow2");
        let below = layer.checked_sub(1).map(|below| format!("l{below:03}.qcow2"));
        let size = LARGE_DISK.to_string();
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if let Some(below) = &below {
            create.extend(["-u", "-b", below, "-F", "qcow2"]);
        }
        create.extend([name.as_str(), &size]);
        qemu_img_in(dir, &create);
        let mut rng = pleach_testkit::Rng::new(u64::try_from(*layer).unwrap());
        let mut places = BTreeSet::new();
        while places.len() < CLUSTERS_A_LAYER {
            places.insert(rng.below(LARGE_DISK / CLUSTER));
        }
        // Whole clusters need nothing from below, so the layer is written without its backing file.
        let alone = format!("driver=qcow2,backing=,file.filename={}", text(&dir.join(&name)));
        let mut io = Command::new("qemu-io");
        io.args(["--image-opts", &alone]);
        for place in &places {
            io.args(["-c", &fill(u8::try_from(layer % 255 + 1).unwrap(), *place, 1, CLUSTER)]);
        }
        let done = io.output().unwrap();
        assert!(done.status.success(), "{done:?}");
    });
}

#[test]
fn three_hundred_layers_take_less_than_a_second_and_100_mib() {
    let work = WorkDir::new("deep");
    let dir = work.join("chain");
    deep_chain(&dir);
    let (tool, optimised) = Tool::fastest(PLEACH);
    let binary = tool.path().to_owned();
    let (time_limit, memory_limit) =
        if optimised { (Duration::from_secs(1), 100 << 20) } else { (Duration::from_secs(4), 150 << 20) };
    // Once to warm up, and then the better of two: this machine has other things to do.
    let _ = Tool::new(&binary).json(&["tree", text(&dir), "--json"]);
    let runs = [(); 2].map(|()| measured(&binary, &dir));
    let (elapsed, memory) = runs.into_iter().min().unwrap();
    println!("{}: {elapsed:?}, {} KiB", binary.display(), memory >> 10);
    assert!(elapsed < time_limit, "{elapsed:?} with {}", binary.display());
    assert!(memory < memory_limit, "{memory} bytes with {}", binary.display());
    let tree = Tool::new(&binary).json(&["tree", text(&dir), "--json"]);
    let nodes = tree["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), LAYERS);
    for node in nodes {
        let layer: usize = node["name"].as_str().unwrap()[1..].parse().unwrap();
        let below = layer.checked_sub(1).map(|below| format!("l{below:03}"));
        assert_eq!(node["parent"].as_str(), below.as_deref());
    }
}

/// Wall time and peak memory of one `tree --json`.
fn measured(binary: &Path, dir: &Path) -> (Duration, u64) {
    let args = ["tree", text(dir), "--json"];
    let time = Path::new("/usr/bin/time");
    if !time.exists() {
        return watched(binary, &args);
    }
    let report = dir.with_file_name("time.txt");
    let mut command = Command::new(time);
    command.args(["-f", "%M", "-o", text(&report)]).arg(binary).args(args);
    let outcome = Running::start(command).finish(Duration::from_secs(60));
    assert_eq!(outcome.code, Some(0), "{outcome}");
    let kib: u64 = fs::read_to_string(&report).unwrap().trim().parse().unwrap();
    (outcome.elapsed, kib << 10)
}

/// The same where there is no `time`: the high-water mark is read as long as the process is there.
fn watched(binary: &Path, args: &[&str]) -> (Duration, u64) {
    let started = Instant::now();
    let mut running = Tool::new(binary).spawn(args);
    let status = format!("/proc/{}/status", running.id());
    let mut peak = 0;
    while !running.ended() {
        let lines = fs::read_to_string(&status).unwrap_or_default();
        let kib = lines
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak = peak.max(kib.unwrap_or(0) << 10);
    }
    let elapsed = started.elapsed();
    let outcome = running.finish(Duration::from_secs(60));
    assert_eq!(outcome.code, Some(0), "{outcome}");
    (elapsed, peak)
}
