//! What is easily repaired wrongly, or not at all: each trap made with stock tools and patched bytes, repaired, and
//! judged by stock QEMU.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pleach_testkit::files::patch;
use pleach_testkit::oracle::{Format, qemu_img, qemu_io, text};
use pleach_testkit::tool::Outcome;
use pleach_testkit::{Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const COPIED: u64 = 1 << 63;
const K: usize = 1024;

fn pleach(args: &[&str]) -> Outcome {
    Tool::new(PLEACH).run(args)
}

/// A 1 MiB image of 4 KiB clusters, by `create` options and qemu-io commands.
fn make(work: &WorkDir, name: &str, options: &str, commands: &[&str]) -> PathBuf {
    let path = work.join(name);
    let options = if options.contains("cluster_size") {
        options.to_owned()
    } else {
        format!("cluster_size=4k,{options}")
    };
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options.trim_end_matches(','), text(&path), "1M"]);
    qemu_io(&path, Format::Qcow2, commands);
    path
}

const DATA: [&str; 4] = ["write -P 1 0 4k", "write -P 2 4k 4k", "write -P 3 8k 4k", "write -P 4 512k 64k"];

fn word(path: &Path, at: u64) -> u64 {
    let bytes = fs::read(path).unwrap();
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

fn offset(value: u64) -> u64 {
    value & 0x00ff_ffff_ffff_fe00
}

fn set(path: &Path, at: u64, value: u64) {
    patch(path, at, &value.to_be_bytes());
}

/// Where L2 entry `i` of the first table is.
fn l2(path: &Path, i: u64) -> u64 {
    offset(word(path, offset(word(path, 40)))) + i * if bytes_at(path, 79) & 16 != 0 { 16 } else { 8 }
}

fn bytes_at(path: &Path, at: usize) -> u8 {
    fs::read(path).unwrap()[at]
}

/// Where the 16-bit count of a cluster is.
fn count(path: &Path, cluster: u64) -> u64 {
    offset(word(path, offset(word(path, 48)))) + cluster * 2
}

/// Exit code of `qemu-img check`.
fn qemu_check(path: &Path) -> i32 {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2", text(path)]).output().unwrap();
    output.status.code().unwrap()
}

/// What the guest reads, `None` where stock QEMU cannot; by 512 bytes.
fn read(path: &Path, from: usize, len: usize) -> Option<Vec<u8>> {
    let out = path.with_extension("read");
    let _ = fs::remove_file(&out);
    let dd = ["dd", "-f", "qcow2", "-O", "raw", "bs=512"].map(str::to_owned);
    let place = [format!("skip={}", from / 512), format!("count={}", (from + len) / 512)];
    let files = [format!("if={}", text(path)), format!("of={}", text(&out))];
    let output = Command::new("qemu-img").args(dd).args(place).args(files).output().unwrap();
    let bytes = output.status.success().then(|| fs::read(&out).unwrap());
    let _ = fs::remove_file(&out);
    bytes
}

/// Repairs all, which must succeed; the image is clean then, and comes back by `--undo`. Returns the report.
fn repair(path: &Path, what: &str) -> Value {
    let damaged = fs::read(path).unwrap();
    let outcome = pleach(&["check", "--repair", "all", "--json", text(path)]);
    assert_eq!(outcome.code, Some(0), "{what}: {outcome}");
    assert_eq!(qemu_check(path), 0, "{what}: {outcome}");
    let report = outcome.json()["images"][0].clone();
    let repaired = fs::read(path).unwrap();
    let undo = report["undo_file"].as_str().unwrap_or_else(|| panic!("{what}: {outcome}")).to_owned();
    let back = pleach(&["check", "--undo", &undo, text(path)]);
    assert_eq!(back.code, Some(0), "{what}: {back}");
    assert!(fs::read(path).unwrap() == damaged, "{what}: every byte is back");
    fs::write(path, &repaired).unwrap();
    fs::remove_file(undo).unwrap();
    report
}

fn says(report: &Value, code: &str) -> bool {
    report["repairs"].as_array().unwrap().iter().any(|r| r["code"] == code)
}

/// What stock `-r all` leaves is mended, and what it accepts is separated.
#[test]
fn t26_repair_all_fixes_what_stock_repair_leaves() {
    let work = WorkDir::new("t26");
    // Name, options, what entry 1 becomes, the code of the repair, what the guest then reads there; 2 is what it held.
    type Case = (&'static str, &'static str, fn(u64) -> u64, &'static str, u8);
    let cases: [Case; 7] = [
        ("unaligned", "", |e| e | 0x200, "l2-pointer", 0),
        ("reserved high", "", |e| e | 1 << 57, "l2-reserved", 2),
        ("reserved low", "", |e| e | 0x10, "l2-reserved", 2),
        ("past the end", "", |_| COPIED | 0x1000_0000, "l2-pointer", 0),
        ("past the end in version 2", "compat=0.10", |_| COPIED | 0x1000_0000, "l2-pointer", 0),
        ("cross-linked", "", |e| e - 4096, "cross-link", 1),
        ("compressed, out of the file", "", |_| 1 << 62 | 0x1000_0000, "l2-pointer", 0),
    ];
    for (name, options, change, code, want) in cases {
        let path = make(&work, &name.replace([' ', ','], "-"), options, &DATA);
        let at = l2(&path, 1);
        set(&path, at, change(word(&path, at)));
        assert_eq!(qemu_check(&path), 2, "{name}");
        let report = repair(&path, name);
        assert!(says(&report, code), "{name}: {report}");
        assert_eq!(report["repairs"][0]["guest_start"], 4096, "{name}: {report}");
        assert_eq!(read(&path, 4 * K, 4 * K), Some(vec![want; 4 * K]), "{name}");
        assert_eq!(read(&path, 0, 4 * K), Some(vec![1; 4 * K]), "{name}");
        assert_eq!(read(&path, 8 * K, 4 * K), Some(vec![3; 4 * K]), "{name}");
        // What was shared is not: a write to one does not show in the other.
        qemu_io(&path, Format::Qcow2, &["write -P 9 4k 4k"]);
        assert_eq!(read(&path, 0, 4 * K), Some(vec![1; 4 * K]), "{name}, after a write");
        assert_eq!(qemu_check(&path), 0, "{name}, after a write");
    }
}

#[test]
fn t26_compressed_and_extended_entries() {
    let work = WorkDir::new("t26-more");
    let path = make(&work, "copied", "", &["write -c -P 1 0 4k", "write -P 2 4k 4k"]);
    set(&path, l2(&path, 0), word(&path, l2(&path, 0)) | COPIED);
    assert_eq!(qemu_check(&path), 2);
    assert!(says(&repair(&path, "COPIED on a compressed entry"), "l2-compressed-copied"));
    assert_eq!(read(&path, 0, 8 * K), Some([[1; 4096], [2; 4096]].concat()));

    // Bitmap: subcluster 0 both, 1 data.
    let path = make(&work, "extended", "cluster_size=64k,extended_l2=on", &["write -P 5 0 4k"]);
    let bitmap = l2(&path, 0) + 8;
    set(&path, bitmap, word(&path, bitmap) | 1 << 32);
    assert_eq!(qemu_check(&path), 2);
    assert!(says(&repair(&path, "both data and zeros"), "l2-subclusters"));
    assert_eq!(read(&path, 0, 4 * K), Some(vec![5; 4 * K]));
    set(&path, l2(&path, 0), 0);
    assert!(says(&repair(&path, "data without a cluster"), "l2-subclusters"));
    assert_eq!(read(&path, 0, 4 * K), Some(vec![0; 4 * K]));
}

/// The safe repair works beside a count of 0, and one bad bit in the refcount table does not spoil the image.
#[test]
fn t27_leaks_are_freed_beside_other_damage_and_the_refcount_table_is_mended() {
    let work = WorkDir::new("t27");
    let path = make(&work, "zeroed", "", &DATA);
    let (data, leak) = (offset(word(&path, l2(&path, 0))) / 4096, offset(word(&path, l2(&path, 2))) / 4096);
    patch(&path, count(&path, data), &[0, 0]);
    patch(&path, count(&path, leak), &[0, 7]);
    let copy = work.join("copy");
    fs::copy(&path, &copy).unwrap();
    let stock = Command::new("qemu-img").args(["check", "-r", "leaks", text(&copy)]).output().unwrap();
    assert_eq!(stock.status.code(), Some(1), "qemu-img gives up");
    let outcome = pleach(&["check", "--repair", "leaks", "--json", text(&path)]);
    let report = &outcome.json()["images"][0];
    assert_eq!(
        (outcome.code, &report["leaks_fixed"], &report["leaks"]),
        (Some(4), &1.into(), &0.into()),
        "{outcome}"
    );
    assert_eq!(word(&path, count(&path, leak)) >> 48, 1);
    repair(&path, "a count of 0");
    assert_eq!(read(&path, 0, 12 * K), Some([[1; 4096], [2; 4096], [3; 4096]].concat()));

    for (name, flip) in [("reserved bit", 1), ("unaligned", 0x200), ("out of the file", 1 << 40)] {
        let path = make(&work, &name.replace(' ', "-"), "", &DATA);
        let table = offset(word(&path, 48));
        set(&path, table, word(&path, table) ^ flip);
        assert!(says(&repair(&path, name), "refcounts-rebuilt"), "{name}");
        assert_eq!(bytes_at(&path, 79), 0, "{name}: not marked corrupt");
        qemu_io(&path, Format::Qcow2, &["write -P 9 600k 100k"]);
        assert_eq!(qemu_check(&path), 0, "{name}, after a write");
        assert_eq!(read(&path, 0, 12 * K), Some([[1; 4096], [2; 4096], [3; 4096]].concat()), "{name}");
    }
}

/// A leak is not freed where a damaged entry may lead to the cluster.
#[test]
fn t27_leaks_stay_where_a_damaged_entry_may_lead_to_them() {
    let work = WorkDir::new("t27-doubt");
    let path = make(&work, "doubt", "", &DATA);
    let (entry, at) = (word(&path, l2(&path, 0)), offset(word(&path, l2(&path, 0))));
    set(&path, l2(&path, 0), entry | 0x200);
    let outcome = pleach(&["check", "--repair", "leaks", "--json", text(&path)]);
    assert_eq!(outcome.code, Some(4), "{outcome}");
    assert!(says(&outcome.json()["images"][0], "leak-left"), "{outcome}");
    assert_eq!(word(&path, count(&path, at / 4096)) >> 48, 1, "still counted");
    // With a damaged L1 entry nothing is freed.
    let l1 = offset(word(&path, 40));
    set(&path, l1, word(&path, l1) | 0x200);
    let before = fs::read(&path).unwrap();
    let outcome = pleach(&["check", "--repair", "leaks", "--json", text(&path)]);
    assert!(says(&outcome.json()["images"][0], "leaks-left"), "{outcome}");
    assert!(fs::read(&path).unwrap() == before);
}

/// What stock check does not see: counts behind the end are left alone as there, zero flags in version 2 are not.
#[test]
fn t28_blind_spots_of_stock_check() {
    let work = WorkDir::new("t28");
    let path = make(&work, "behind", "", &DATA);
    patch(&path, count(&path, 400), &[0, 1]);
    assert_eq!((qemu_check(&path), pleach(&["check", text(&path)]).code), (0, Some(0)));
    let outcome = pleach(&["check", "--repair", "all", "--json", text(&path)]);
    assert_eq!(outcome.json()["images"][0]["undo_file"], Value::Null, "{outcome}");

    let path = make(&work, "v2", "compat=0.10", &DATA);
    set(&path, l2(&path, 1), word(&path, l2(&path, 1)) | 1);
    assert_eq!((qemu_check(&path), pleach(&["check", text(&path)]).code), (0, Some(4)));
    assert_eq!(read(&path, 4 * K, 4 * K), None, "stock QEMU cannot read it");
    assert!(says(&repair(&path, "zero flag"), "l2-zero-flag"));
    assert_eq!(read(&path, 4 * K, 4 * K), Some(vec![2; 4 * K]));
}

/// A dirty image reads right, and its counts follow from its tables.
#[test]
fn t29_dirty_images_are_read_and_repaired() {
    let work = WorkDir::new("t29");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden/lazy-dirty.qcow2");
    let path = work.join("dirty");
    fs::copy(golden, &path).unwrap();
    let size = fs::metadata(&path).unwrap().len() as usize;
    let before = read(&path, 0, 64 * K);
    assert!(before.is_some() && size > 0);
    let report = repair(&path, "dirty");
    assert!(says(&report, "mark") && report["dirty"] == false, "{report}");
    assert_eq!(read(&path, 0, 64 * K), before);
    qemu_io(&path, Format::Qcow2, &["write -P 9 0 64k"]);
    assert_eq!(qemu_check(&path), 0);
    // Only the mark: nothing else is wrong.
    patch(&path, 79, &[1]);
    let outcome = pleach(&["check", "--repair", "leaks", "--json", text(&path)]);
    assert_eq!((outcome.code, bytes_at(&path, 79)), (Some(0), 0), "{outcome}");
}

/// Counts that lie about metadata, and data that lie in it: the guest reads the same, and may write again.
#[test]
fn t30_lying_counts_and_data_in_metadata() {
    let work = WorkDir::new("t30");
    type Case = (&'static str, fn(&Path) -> u64);
    let cases: [Case; 6] = [
        ("the header", |_| 0),
        ("the L1 table", |p| offset(word(p, 40))),
        ("the refcount table", |p| offset(word(p, 48))),
        ("a refcount block", |p| offset(word(p, offset(word(p, 48))))),
        ("an L2 table", |p| l2(p, 0)),
        ("data", |p| offset(word(p, l2(p, 2)))),
    ];
    for (name, place) in cases {
        let path = make(&work, &name.replace(' ', "-"), "", &DATA);
        let at = place(&path);
        patch(&path, count(&path, at / 4096), &[0, 0]);
        let want = read(&path, 0, 12 * K);
        repair(&path, name);
        assert_eq!(read(&path, 0, 12 * K), want, "{name}");
        if at == 0 {
            continue;
        }
        // And now a guest cluster is there too.
        set(&path, l2(&path, 1), COPIED | at);
        let want = read(&path, 0, 12 * K);
        assert!(want.is_some(), "{name}");
        repair(&path, name);
        assert_eq!(read(&path, 0, 12 * K), want, "data in {name}");
        qemu_io(&path, Format::Qcow2, &["write -P 9 4k 4k", "write -P 8 700k 40k"]);
        assert_eq!(qemu_check(&path), 0, "data in {name}, after a write");
        assert_eq!(read(&path, 0, 4 * K), want.map(|w| w[..4 * K].to_vec()), "data in {name}, after a write");
    }
}

/// The two repairs of stock QEMU that destroy data.
#[test]
fn no_repair_makes_it_worse() {
    let work = WorkDir::new("worse");
    // A compressed entry that claims far more than the file has: stock `-r leaks` frees its data.
    for mode in ["leaks", "all"] {
        let path = make(&work, &format!("sectors-{mode}"), "cluster_size=64k", &["write -c -P 7 0 64k"]);
        let bits = 70 - 16;
        set(&path, l2(&path, 0), word(&path, l2(&path, 0)) | 0xff << bits);
        let outcome = pleach(&["check", "--repair", mode, text(&path)]);
        assert!([Some(0), Some(4)].contains(&outcome.code), "{outcome}");
        assert_eq!(read(&path, 0, 64 * K), Some(vec![7; 64 * K]), "{mode}: {outcome}");
        qemu_io(&path, Format::Qcow2, &["write -P 9 512k 64k"]);
        assert_eq!(read(&path, 0, 64 * K), Some(vec![7; 64 * K]), "{mode}, after a write");
    }
    // An L1 table of a snapshot that claims 32 MiB of foreign clusters: stock `-r all` "repairs" entries in them.
    let path = make(&work, "l1", "", &DATA);
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    qemu_io(&path, Format::Qcow2, &["write -P 9 0 8k", "write -P 6 512k 400k"]);
    let want = read(&path, 0, 1024 * K);
    let entry = offset(word(&path, 64));
    fs::File::options().write(true).open(&path).unwrap().set_len(40 << 20).unwrap();
    patch(&path, entry + 8, &(4u32 << 20).to_be_bytes());
    let report = repair(&path, "an L1 table of 32 MiB");
    assert!(says(&report, "snapshot-l1"), "{report}");
    assert_eq!(read(&path, 0, 1024 * K), want);
    qemu_img(&["snapshot", "-a", "s", text(&path)]);
    assert_eq!(read(&path, 0, 12 * K), Some([[1; 4096], [2; 4096], [3; 4096]].concat()));
    assert_eq!(qemu_check(&path), 0);
}

#[test]
fn a_dry_run_changes_nothing_and_an_image_in_use_is_left_alone() {
    let work = WorkDir::new("repair-cli");
    let path = make(&work, "image", "", &DATA);
    set(&path, l2(&path, 1), COPIED | 0x1000_0000);
    let damaged = fs::read(&path).unwrap();
    let outcome = pleach(&["check", "--repair", "all", "-n", "--json", text(&path)]);
    let report = &outcome.json()["images"][0];
    assert_eq!(outcome.code, Some(4), "{outcome}");
    assert_eq!(
        (&report["errors_fixed"], &report["plan"]["errors_fixed"]),
        (&0.into(), &1.into()),
        "{outcome}"
    );
    assert!(report["plan"]["repairs"][0]["message"].as_str().unwrap().contains("reads zeros"), "{outcome}");
    let text_form = pleach(&["check", "--repair", "all", "--dry-run", text(&path)]);
    assert!(text_form.text().contains("would do this"), "{text_form}");

    let mut io = Command::new("qemu-io")
        .args(["-f", "qcow2", text(&path)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 8];
    io.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    let outcome = pleach(&["check", "--repair", "all", "--json", text(&path)]);
    assert_eq!(outcome.code, Some(5), "{outcome}");
    drop(io.stdin.take());
    io.wait().unwrap();
    assert!(fs::read(&path).unwrap() == damaged, "not a byte has changed");
    assert!(pleach_testkit::files::image_names(path.parent().unwrap()).len() <= 1, "no undo file");

    for wrong in [
        vec!["check", "-n", text(&path)],
        vec!["check", "--repair", "some", text(&path)],
        vec!["check", "--undo", "x", text(&path), text(&path)],
        vec!["check", "--repair", "all", "--undo", "x", text(&path)],
    ] {
        assert_eq!(pleach(&wrong).code, Some(2), "{wrong:?}");
    }
    let outcome = pleach(&["check", "--undo", text(&path), text(&path)]);
    assert_ne!(outcome.code, Some(0), "{outcome}");
    assert!(fs::read(&path).unwrap() == damaged);
}

/// What fuzzing found: no repair leaves more errors than there were, and a second one finds nothing to do.
#[test]
fn finds_of_the_fuzzer_are_not_made_worse() {
    let finds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/hostile");
    let work = WorkDir::new("finds");
    for find in std::fs::read_dir(finds).unwrap() {
        let find = find.unwrap().path();
        for mode in ["leaks", "all"] {
            let copy = work.join("image");
            std::fs::copy(&find, &copy).unwrap();
            let errors = || {
                let outcome = Tool::new(PLEACH).run(&["check", "--json", text(&copy)]);
                outcome.json()["images"][0]["errors"].as_u64().unwrap_or(u64::MAX)
            };
            let before = errors();
            Tool::new(PLEACH).run(&["check", "--repair", mode, text(&copy)]);
            assert!(errors() <= before, "{} --repair {mode}", find.display());
        }
    }
}
