//! Ways in which images lose each other, each met once.
//!
//! `PLEACH_SEED=…` draws other moments for the kills, `PLEACH_KEEP=1` keeps the files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pleach_testkit::files::{changes, contents, copy_dir, patch, unfinished};
use pleach_testkit::layers::{Layer, fill, qcow2, raw};
use pleach_testkit::oracle::{self, check_clean, qemu_img, qemu_img_in, qemu_io, text};
use pleach_testkit::{Digest, Forest, Format, OnFailure, Outcome, Removal, Rng, Tool, WorkDir, chosen_seed};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const CLUSTER: u64 = 65536;
const DISK: u64 = 32 * CLUSTER;
const PATIENCE: Duration = Duration::from_secs(60);

/// A user who owns nothing here.
const NOBODY: u32 = 65534;

/// How often something is tried that depends on the moment.
const TRIES: usize = 20;

/// The directory of a test's images.
fn tree_in(work: &WorkDir) -> PathBuf {
    let dir = work.join("tree");
    fs::create_dir(&dir).unwrap();
    dir
}

/// A qcow2 image `NAME.qcow2` on `PARENT.qcow2`, filled by qemu-io.
fn image(dir: &Path, name: &str, parent: Option<&str>, options: &str, commands: &[String]) -> PathBuf {
    let path = dir.join(format!("{name}.qcow2"));
    let backing = parent.map(|parent| format!("{parent}.qcow2"));
    let backing = backing.as_deref().map(|backing| (backing, Format::Qcow2));
    qcow2(&path, Layer { size: DISK, backing, options }, commands);
    path
}

/// An image of the usual size on a raw one.
fn on_raw(path: &Path, backing: &str, commands: &[String]) {
    qcow2(path, Layer { size: DISK, backing: Some((backing, Format::Raw)), options: "" }, commands);
}

fn delete<'a>(dir: &'a Path, name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["delete", text(dir), name], more].concat()
}

fn run(args: &[&str]) -> Outcome {
    Tool::new(PLEACH).run(args)
}

fn succeed(args: &[&str]) -> Outcome {
    Tool::new(PLEACH).succeed(args)
}

/// Runs `pleach ARGS`, for people and with `--json`: the code is one of `codes`, each of `words` (`a|b`: either) is in
/// the message, and below `dir` nothing has changed.
#[track_caller]
fn refused(dir: &Path, args: &[&str], codes: &[i32], words: &[&str]) {
    refused_line(dir, &[&[PLEACH], args].concat(), codes, words);
}

/// As [`refused`], for a whole command line.
#[track_caller]
fn refused_line(dir: &Path, line: &[&str], codes: &[i32], words: &[&str]) {
    for flag in [&[][..], &["--json"]] {
        let before = contents(dir);
        let outcome = Tool::new(line[0]).spawn(&[&line[1..], flag].concat()).finish(PATIENCE);
        assert!(
            outcome.code.is_some_and(|code| codes.contains(&code)),
            "{codes:?} would be right: {outcome}"
        );
        let message =
            if flag.is_empty() { outcome.stderr.clone() } else { outcome.json()["error"].to_string() };
        let message = message.to_lowercase();
        for word in words {
            let said = word.split('|').any(|word| message.contains(&word.to_lowercase()));
            assert!(said, "the message does not say {word:?}: {outcome}");
        }
        unchanged(dir, &before, &outcome);
    }
}

#[track_caller]
fn unchanged(dir: &Path, before: &BTreeMap<String, Digest>, outcome: &Outcome) {
    assert_eq!(changes(before, &contents(dir)), Vec::<String>::new(), "{outcome}");
}

fn digests(paths: &[&Path]) -> Vec<Digest> {
    paths.iter().map(|path| oracle::digest(path, Format::Qcow2)).collect()
}

/// Every one of `paths` reads as it did, and stock QEMU finds nothing wrong with it.
#[track_caller]
fn read_as_before(paths: &[&Path], before: &[Digest], outcome: &Outcome) {
    for (path, before) in paths.iter().zip(before) {
        match oracle::try_digest(path, Format::Qcow2) {
            Ok(now) => assert_eq!(now, *before, "{} reads differently: {outcome}", path.display()),
            Err(error) => panic!("{error}: {outcome}"),
        }
        let check = oracle::check(path, Format::Qcow2);
        assert!(check.is_clean(), "{}: {check:?}: {outcome}", path.display());
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// The backing file name in a header, by the header alone.
fn backing_name(path: &Path) -> Option<Vec<u8>> {
    let file = fs::File::open(path).ok()?;
    let mut head = [0; 20];
    file.read_exact_at(&mut head, 0).ok()?;
    let offset = u64::from_be_bytes(head[8..16].try_into().unwrap());
    let mut name = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    file.read_exact_at(&mut name, offset).ok()?;
    (offset != 0).then_some(name)
}

/// Whether an operation has begun in `dir` and not ended.
fn has_journal(dir: &Path) -> bool {
    let journals = dir.join(".pleach").read_dir().into_iter().flatten().flatten();
    journals.into_iter().any(|entry| entry.path().extension() == Some(OsStr::new("journal")))
}

/// Runs `pleach ARGS` and kills it as soon as `now` holds.
fn kill_when(args: &[&str], now: impl Fn() -> bool) -> Outcome {
    let mut running = Tool::new(PLEACH).spawn(args);
    while !running.ended() && !now() {
        std::hint::spin_loop();
    }
    running.kill_after(Duration::ZERO)
}

/// A <- B, C, D in `dir`, where deleting A was killed at a moment when `now` held and there was a journal. What B, C and
/// D read as.
fn interrupted(dir: &Path, now: impl Fn(&Path) -> bool) -> Vec<Digest> {
    let template = dir.with_extension("template");
    fs::create_dir(&template).unwrap();
    let size = 256 * CLUSTER;
    let over = Layer { size, backing: Some(("A.qcow2", Format::Qcow2)), options: "" };
    let at = |name: &str| template.join(name);
    qcow2(&at("A.qcow2"), Layer { size, ..Layer::default() }, &[fill(7, 0, 200, CLUSTER)]);
    for (name, pattern) in [("B.qcow2", 2), ("C.qcow2", 3), ("D.qcow2", 4)] {
        qcow2(&at(name), over, &[fill(pattern, u64::from(pattern), 1, CLUSTER)]);
    }
    let before = digests(&[&at("B.qcow2"), &at("C.qcow2"), &at("D.qcow2")]);
    for _ in 0..TRIES {
        copy_dir(&template, dir);
        let killed = kill_when(&delete(dir, "A", &["--yes"]), || has_journal(dir) && now(dir));
        if killed.code.is_none() && has_journal(dir) {
            return before;
        }
        fs::remove_dir_all(dir).unwrap();
    }
    panic!("{TRIES} kills, and none came in time");
}

/// qemu-io with an image open, until dropped.
struct Holder(Child);

impl Holder {
    fn open(path: &Path) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]).arg(path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // The prompt comes after the image was opened and locked.
        let mut prompt = [0; 8];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io>", "{}", path.display());
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let quit = self.0.stdin.take().map(|mut stdin| stdin.write_all(b"quit\n"));
        drop(quit);
        let _ = self.0.wait();
    }
}

/// The overlay has two names; a commit would give the merged file one of them, and leave the other on what went.
#[test]
fn both_names_of_a_hard_linked_dependent_are_served() {
    for flags in [&["--yes"][..], &["--keep", "auto", "--yes"]] {
        let work = WorkDir::new("twins");
        let dir = tree_in(&work);
        let base = image(&dir, "A", None, "", &[fill(1, 0, 24, CLUSTER)]);
        let first = image(&dir, "D", Some("A"), "", &[fill(2, 16, 1, CLUSTER)]);
        let second = dir.join("D2.qcow2");
        fs::hard_link(&first, &second).unwrap();
        let before = digests(&[&first, &second]);
        let outcome = succeed(&delete(&dir, "A", flags));
        read_as_before(&[&first, &second], &before, &outcome);
        assert!(!base.exists(), "{outcome}");
    }
}

/// What may not be opened may be an overlay all the same.
#[test]
fn an_image_that_may_not_be_read_counts_as_a_reader() {
    if !is_root() {
        println!("skipped: only root can become somebody else");
        return;
    }
    let work = WorkDir::new("secret");
    fs::set_permissions(&*work, fs::Permissions::from_mode(0o755)).unwrap();
    let dir = tree_in(&work);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let base = image(&dir, "A", None, "", &[fill(7, 0, 4, CLUSTER)]);
    let overlay = image(&dir, "B", Some("A"), "", &[]);
    chown(&base, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions(&overlay, fs::Permissions::from_mode(0o600)).unwrap();
    let (user, group) = (format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"));
    let nobody = ["setpriv", &user, &group, "--clear-groups", PLEACH];
    let started = Command::new(nobody[0]).args(&nobody[1..]).arg("--version").output();
    if !started.is_ok_and(|output| output.status.success()) {
        println!("skipped: nobody else can start the program here");
        return;
    }
    let line = [&nobody[..], &delete(&dir, "A", &["--yes"])].concat();
    refused_line(&dir, &line, &[6], &["B.qcow2"]);
    let tree = |more: &[&str]| {
        let line = [&nobody[1..], &["tree", text(&dir)], more].concat();
        Tool::new(nobody[0]).run(&line)
    };
    let shown = tree(&[]);
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(shown.stderr.contains("B.qcow2"), "{shown}");
    let shown = tree(&["--json"]);
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(shown.json()["problems"].to_string().contains("B.qcow2"), "{shown}");
}

/// The directory has only a link to the overlay, which itself lies elsewhere.
#[test]
fn a_dependent_behind_a_symbolic_link_is_served_or_protected() {
    let work = WorkDir::new("link");
    let (here, there) = (work.join("d1"), work.join("d2"));
    fs::create_dir(&here).unwrap();
    fs::create_dir(&there).unwrap();
    let base = image(&here, "A", None, "", &[fill(7, 0, 8, CLUSTER)]);
    let overlay = there.join("B.qcow2");
    let over = Layer { size: DISK, backing: Some((text(&base), Format::Qcow2)), options: "" };
    qcow2(&overlay, over, &[fill(3, 4, 1, CLUSTER)]);
    let link = here.join("B.qcow2");
    symlink("../d2/B.qcow2", &link).unwrap();
    let (before, files) = (digests(&[&link, &overlay]), contents(&work));
    let outcome = run(&delete(&here, "A", &["--yes"]));
    match outcome.code {
        Some(0) => assert!(!base.exists(), "{outcome}"),
        Some(6) => unchanged(&work, &files, &outcome),
        _ => panic!("neither served nor refused: {outcome}"),
    }
    read_as_before(&[&link, &overlay], &before, &outcome);
}

/// The overlay names its backing file in a way that only works from where the link is.
#[test]
fn a_dependent_that_reads_only_through_a_symbolic_link_is_protected() {
    let work = WorkDir::new("lens");
    let (here, there) = (work.join("d1"), work.join("d2"));
    fs::create_dir(&here).unwrap();
    fs::create_dir(&there).unwrap();
    image(&here, "A", None, "", &[fill(7, 0, 8, CLUSTER)]);
    let link = image(&here, "B", Some("A"), "", &[fill(3, 4, 1, CLUSTER)]);
    let overlay = there.join("B.qcow2");
    fs::rename(&link, &overlay).unwrap();
    symlink("../d2/B.qcow2", &link).unwrap();
    assert!(oracle::try_digest(&overlay, Format::Qcow2).is_err(), "its name works from both places");
    let before = digests(&[&link]);
    refused(&work, &delete(&here, "A", &["--yes"]), &[6], &["B.qcow2"]);
    assert_eq!(digests(&[&link]), before);
}

/// One reads the file's bytes, the other what they mean as an image; no deletion suits both.
#[test]
fn a_base_that_is_raw_to_one_and_qcow2_to_another_stays() {
    let work = WorkDir::new("both");
    let dir = tree_in(&work);
    let base = image(&dir, "made", None, "", &[fill(1, 0, 4, CLUSTER)]);
    fs::rename(base, dir.join("base.img")).unwrap();
    for (name, format) in [("D.qcow2", "raw"), ("E.qcow2", "qcow2")] {
        qemu_img_in(&dir, &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", format, name]);
    }
    let (bytes, meaning) = (dir.join("D.qcow2"), dir.join("E.qcow2"));
    let before = digests(&[&bytes, &meaning]);
    for flags in [&["--yes"][..], &["--keep", "parent=D", "--yes"], &["--keep", "parent=E", "--yes"]] {
        refused(&dir, &delete(&dir, "base", flags), &[1, 6, 8], &["base.img"]);
    }
    assert_eq!(digests(&[&bytes, &meaning]), before);
}

/// A0 <- A <- B: A has one compressed cluster that B needs, and B so much that taking it is the cheap way.
fn compressed_between(dir: &Path, options: &str) -> [PathBuf; 3] {
    let root = image(dir, "A0", None, "", &[fill(1, 0, 16, CLUSTER)]);
    let write = format!("write -q -c -P 7 0 {CLUSTER}");
    let victim = image(dir, "A", Some("A0"), options, &[write]);
    // Version 2 cannot say "zeros" in an entry: whatever it takes is copied.
    let overlay = image(dir, "B", Some("A"), "compat=0.10", &[fill(2, 8, 8, CLUSTER)]);
    [root, victim, overlay]
}

/// A deletion that cannot read what it has to copy would stop half-way.
#[test]
fn zstd_clusters_are_read() {
    let work = WorkDir::new("zstd");
    let dir = tree_in(&work);
    let [root, victim, overlay] = compressed_between(&dir, "compression_type=zstd");
    let before = digests(&[&root, &overlay]);
    succeed(&delete(&dir, "A", &["-n"]));
    let outcome = succeed(&delete(&dir, "A", &["--yes"]));
    assert!(!victim.exists(), "{outcome}");
    read_as_before(&[&root, &overlay], &before, &outcome);
    assert_eq!(unfinished(&dir), Vec::<String>::new(), "{outcome}");
}

/// Damage in what has to be copied is found before anything begins, and blocks nobody else.
#[test]
fn a_damaged_compressed_cluster_is_found_before_anything_begins() {
    let work = WorkDir::new("rotten");
    let dir = tree_in(&work);
    let [_, victim, _] = compressed_between(&dir, "");
    // Header, refcount table, refcount block, L1 and L2 table come before it.
    patch(&victim, 5 * CLUSTER, &[0xff; 4]);
    assert!(oracle::try_digest(&victim, Format::Qcow2).is_err(), "the damage hit nothing");
    image(&dir, "X", None, "", &[fill(5, 0, 4, CLUSTER)]);
    let neighbour = image(&dir, "Y", Some("X"), "", &[fill(6, 2, 4, CLUSTER)]);
    let before = digests(&[&neighbour]);
    for flag in ["-n", "--yes"] {
        refused(&dir, &delete(&dir, "A", &[flag]), &[4], &["A.qcow2"]);
        assert!(!dir.join(".pleach").exists(), "a refusal left something behind");
    }
    let outcome = succeed(&delete(&dir, "X", &["--yes"]));
    read_as_before(&[&neighbour], &before, &outcome);
}

/// From where the overlay lies, the name of its new backing file is longer than its small header can hold.
#[test]
fn a_backing_name_that_does_not_fit_is_found_before_anything_begins() {
    let work = WorkDir::new("long");
    let (far, here) = (work.join("far"), work.join("here"));
    let part = "x".repeat(200);
    let deep = far.join(&part).join(&part);
    fs::create_dir_all(&deep).unwrap();
    fs::create_dir(&here).unwrap();
    image(&deep, "A", None, "", &[fill(1, 0, 4, CLUSTER)]);
    image(&deep, "B", Some("A"), "", &[fill(2, 2, 1, CLUSTER)]);
    let short = work.join("s");
    symlink(&deep, &short).unwrap();
    let over =
        Layer { size: DISK, backing: Some(("../s/B.qcow2", Format::Qcow2)), options: "cluster_size=512" };
    let overlay = here.join("C.qcow2");
    qcow2(&overlay, over, &[fill(3, 8, 8, CLUSTER)]);
    let before = (contents(&far), digests(&[&overlay]));
    let codes = ["-n", "--yes"].map(|flag| {
        refused(&here, &delete(&short, "B", &["--also", text(&here), flag]), &[1, 8], &[]);
        let outcome = run(&delete(&short, "B", &["--also", text(&here), flag]));
        unchanged(&far, &before.0, &outcome);
        assert!(![&deep, &here].iter().any(|dir| dir.join(".pleach").exists()), "{outcome}");
        outcome.code
    });
    assert_eq!(codes[0], codes[1], "the dry run ends otherwise than the real one");
    assert_eq!(digests(&[&overlay]), before.1);
}

/// The journal knows its images by where they are now, not by where they were.
#[test]
fn a_directory_that_moved_is_finished_all_the_same() {
    let first_is_done = |dir: &Path| backing_name(&dir.join("B.qcow2")).is_none();
    for now in [|_: &Path| true, first_is_done] {
        let work = WorkDir::new("moved");
        let (old, new) = (work.join("d"), work.join("d2"));
        let before = interrupted(&old, now);
        fs::rename(&old, &new).unwrap();
        let outcome = succeed(&["resume", text(&new)]);
        let names = ["B.qcow2", "C.qcow2", "D.qcow2"].map(|name| new.join(name));
        assert!(!new.join("A.qcow2").exists(), "the node is still there: {outcome}");
        read_as_before(&names.each_ref().map(PathBuf::as_path), &before, &outcome);
        assert!(names.iter().all(|path| backing_name(path).is_none()), "{outcome}");
        assert_eq!(unfinished(&new), Vec::<String>::new(), "{outcome}");
        assert!(!old.exists(), "{outcome}");
    }
}

/// Somebody's file has the name that an image has for an instant.
#[test]
fn a_file_that_has_the_name_in_between_is_kept() {
    let work = WorkDir::new("taken");
    let dir = tree_in(&work);
    image(&dir, "A", None, "", &[fill(1, 0, 2, CLUSTER)]);
    image(&dir, "B", Some("A"), "", &[fill(2, 4, 16, CLUSTER)]);
    image(&dir, "Q", Some("A"), "", &[]);
    image(&dir, "C", Some("B"), "", &[]);
    let precious = dir.join("A.qcow2.pleach-new");
    fs::write(&precious, "precious").unwrap();
    refused(&dir, &delete(&dir, "A", &["--keep", "parent=B", "--yes"]), &[1, 6], &["A.qcow2.pleach-new"]);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
}

/// Its own count says that a cluster is used twice; an overlay must not inherit the file with the mistake in it.
#[test]
fn a_wrong_count_is_not_inherited() {
    for flags in [&["--yes"][..], &["--keep", "auto", "--yes"], &["--keep", "parent", "--yes"]] {
        let work = WorkDir::new("count");
        let dir = tree_in(&work);
        let victim = image(&dir, "A", None, "", &[fill(7, 0, 8, CLUSTER)]);
        let bytes = fs::read(&victim).unwrap();
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let block = number(usize::try_from(number(48)).unwrap());
        // Cluster 5, behind the tables, is the first with data; its entry says COPIED, which means used once.
        patch(&victim, block + 5 * 2, &[0, 2]);
        assert!(!oracle::check(&victim, Format::Qcow2).is_clean(), "the patch hit nothing");
        let overlay = image(&dir, "B", Some("A"), "", &[]);
        check_clean(&overlay);
        let before = digests(&[&overlay]);
        let outcome = succeed(&delete(&dir, "A", flags));
        let left: Vec<&Path> = [&*overlay, &*victim].into_iter().filter(|path| path.exists()).collect();
        assert_eq!(left.len(), 1, "{outcome}");
        read_as_before(&left, &before, &outcome);
    }
}

/// A guest may begin its disk with any bytes, also with those of an image.
#[test]
fn a_raw_base_that_begins_like_an_image_is_raw() {
    let work = WorkDir::new("magic");
    let dir = tree_in(&work);
    let base = dir.join("base.raw");
    let noise = Rng::new(11).noise(usize::try_from(DISK).unwrap() - 8);
    fs::write(&base, [b"QFI\xfb\0\0\0\x03", noise.as_slice()].concat()).unwrap();
    let overlay = dir.join("D.qcow2");
    on_raw(&overlay, "base.raw", &[fill(2, 4, 2, CLUSTER)]);
    let before = digests(&[&overlay]);
    succeed(&["tree", text(&dir)]);
    succeed(&["tree", text(&dir), "--json"]);
    let outcome = succeed(&delete(&dir, "base", &["--yes"]));
    assert!(!base.exists(), "{outcome}");
    read_as_before(&[&overlay], &before, &outcome);
}

/// The target of `tree` is a link to an image in another directory.
#[test]
fn an_image_can_be_pointed_at_by_a_link() {
    let work = WorkDir::new("pointed");
    let there = work.join("t");
    fs::create_dir(&there).unwrap();
    image(&there, "A", None, "", &[]);
    image(&there, "C", Some("A"), "", &[]);
    let link = work.join("LC.qcow2");
    symlink("t/C.qcow2", &link).unwrap();
    succeed(&["tree", text(&link)]);
    let shown = Tool::new(PLEACH).json(&["tree", text(&link), "--json"]);
    assert!(!shown["nodes"].as_array().unwrap().is_empty(), "{shown}");
}

/// A file with another name gives nothing back when one name goes, and reads on under the other.
#[test]
fn a_hard_linked_victim_frees_nothing() {
    for dependents in [0_u8, 2] {
        let work = WorkDir::new("nlink");
        let dir = tree_in(&work);
        let victim = image(&dir, "A", None, "", &[fill(1, 0, 16, CLUSTER)]);
        for number in 0..dependents {
            image(&dir, &format!("D{number}"), Some("A"), "", &[fill(number + 2, 4, 1, CLUSTER)]);
        }
        let other = work.join("other.qcow2");
        fs::hard_link(&victim, &other).unwrap();
        let before = digests(&[&other]);
        let pleach = Tool::new(PLEACH);
        let shown = pleach.json(&["tree", text(&dir), "--sizes", "--json"]);
        let node = shown["nodes"].as_array().unwrap().iter().find(|node| node["name"] == "A").unwrap();
        assert_eq!(node["sizes"]["freed_if_deleted"], 0, "{shown}");
        let planned = pleach.json(&delete(&dir, "A", &["-n", "--json"]));
        assert_eq!(planned["plan"]["bytes_freed"], 0, "{planned}");
        let outcome = succeed(&delete(&dir, "A", &["--yes", "--json"]));
        assert_eq!(outcome.json()["plan"]["bytes_freed"], 0, "{outcome}");
        assert!(!victim.exists(), "{outcome}");
        read_as_before(&[&other], &before, &outcome);
    }
}

/// A plan that cannot be carried out before `resume` has run is no plan.
#[test]
fn a_dry_run_minds_what_is_unfinished() {
    let work = WorkDir::new("pending");
    let dir = work.join("d");
    interrupted(&dir, |_| true);
    for flag in ["-n", "--yes"] {
        refused(&dir, &delete(&dir, "B", &[flag]), &[1], &["resume"]);
    }
    succeed(&["resume", text(&dir)]);
    succeed(&delete(&dir, "B", &["-n"]));
}

/// A name that is not followed may still mean one of the files that go.
#[test]
fn a_json_name_protects_what_it_may_mean() {
    let work = WorkDir::new("json");
    let dir = tree_in(&work);
    let root = image(&dir, "A", None, "", &[fill(1, 0, 4, CLUSTER)]);
    image(&dir, "B", Some("A"), "", &[fill(2, 2, 4, CLUSTER)]);
    let going = image(&dir, "C", Some("B"), "", &[fill(3, 4, 4, CLUSTER)]);
    let survivor = image(&dir, "S", Some("C"), "", &[fill(4, 6, 4, CLUSTER)]);
    let file = format!(r#"{{"driver":"file","filename":"{}"}}"#, going.display());
    let name = format!(r#"json:{{"driver":"qcow2","file":{file}}}"#);
    qemu_img(&["rebase", "-u", "-b", &name, "-F", "qcow2", text(&survivor)]);
    let before = digests(&[&survivor, &root]);
    for args in [
        delete(&dir, "B", &["--children", "--yes"]),
        delete(&dir, "B", &["--children", "-n"]),
        delete(&dir, "B", &["--children-only", "--yes"]),
        delete(&dir, "C", &["--yes"]),
    ] {
        refused(&dir, &args, &[6], &["S.qcow2"]);
    }
    assert_eq!(digests(&[&survivor, &root]), before);
    // It stands in nobody's way when it is the one to go.
    let outcome = succeed(&delete(&dir, "S", &["--yes"]));
    assert!(!survivor.exists() && going.exists(), "{outcome}");
    let outcome = succeed(&delete(&dir, "B", &["--children", "--yes"]));
    assert!(!going.exists(), "{outcome}");
    read_as_before(&[&root], &before[1..], &outcome);
}

/// P <- N <- D: N holds little and D much, so D takes what it lacks, and then N's name.
fn little_under_much(dir: &Path) -> Forest {
    fs::create_dir(dir).unwrap();
    let size = 256 * CLUSTER;
    let over = |backing| Layer { size, backing: Some((backing, Format::Qcow2)), options: "" };
    let spots = |pattern, first: u64, every: usize| -> Vec<String> {
        (first..256).step_by(every).map(|place| fill(pattern, place, 1, CLUSTER)).collect()
    };
    qcow2(&dir.join("P.qcow2"), Layer { size, ..Layer::default() }, &spots(1, 0, 2));
    qcow2(&dir.join("N.qcow2"), over("P.qcow2"), &spots(2, 1, 6));
    qcow2(&dir.join("D.qcow2"), over("N.qcow2"), &[fill(3, 0, 160, CLUSTER)]);
    let row = |name, file, up| (name, file, Format::Qcow2, up);
    let rows = [row("P", "P.qcow2", None), row("N", "N.qcow2", Some("P")), row("D", "D.qcow2", Some("N"))];
    Forest::read(dir, &rows)
}

/// Between the dependent's new backing file and its new name, nothing in the images says that a name was promised.
#[test]
fn the_parents_name_survives_whenever_it_was_promised() {
    const KILLS: u32 = 15;
    let seed = chosen_seed().unwrap_or(0x9a_11);
    let _seed = OnFailure::print_seed(seed, "the parent's name");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("promise");
    let template = work.join("template");
    let before = little_under_much(&template);
    let after = before.after("N", &Removal::TakeOver("D".to_owned()));
    let dir = work.join("tree");
    let dependent = dir.join("D.qcow2");
    // The last look before the names change goes through a crowd: time to be killed in.
    let crowd = work.join("crowd");
    fs::create_dir(&crowd).unwrap();
    (0..500).for_each(|number| fs::write(crowd.join(number.to_string()), "no image").unwrap());
    let keep = ["--keep", "parent", "--also", text(&crowd)];
    let args = [delete(&dir, "N", &keep), vec!["--yes"]].concat();
    copy_dir(&template, &dir);
    let planned = Tool::new(PLEACH).json(&[delete(&dir, "N", &keep), vec!["-n", "--json"]].concat());
    assert_eq!(planned["plan"]["copies"][0]["direction"], "pull", "{planned}");
    let whole = succeed(&args).elapsed;
    assert_eq!(after.problems(&dir), Vec::<String>::new(), "without a kill");
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for index in 0..KILLS {
        fs::remove_dir_all(&dir).unwrap();
        copy_dir(&template, &dir);
        // As soon as the header has another backing file; or at any time after it began; or at any time.
        let delay = whole * u32::try_from(rng.below(1000)).unwrap() / 1000;
        let killed = match index % 3 {
            0 => kill_when(&args, || backing_name(&dependent).as_deref() != Some(b"N.qcow2")),
            1 => {
                let begun = Cell::new(None);
                kill_when(&args, || {
                    if begun.get().is_none() && has_journal(&dir) {
                        begun.set(Some(Instant::now()));
                    }
                    begun.get().is_some_and(|begun: Instant| begun.elapsed() >= delay / 3)
                })
            }
            _ => Tool::new(PLEACH).spawn(&args).kill_after(delay),
        };
        assert!(matches!(killed.code, None | Some(0)), "{killed}");
        let begun = has_journal(&dir);
        let switched = backing_name(&dependent).as_deref() == Some(b"P.qcow2");
        let resumed = succeed(&["resume", text(&dir)]);
        let label =
            format!("kill {index} after {:?}, journal: {begun}, switched: {switched}", killed.elapsed);
        let problems = after.problems(&dir);
        let done = problems.is_empty();
        if !done {
            assert!(!begun, "{label}: {problems:#?} {resumed}");
            assert_eq!(before.problems(&dir), Vec::<String>::new(), "{label}: {resumed}");
        }
        assert_eq!(unfinished(&dir), Vec::<String>::new(), "{label}: {resumed}");
        let when = if killed.code.is_none() { "killed" } else { "too late" };
        *seen.entry(format!("{when}, journal: {begun}, switched: {switched}, done: {done}")).or_default() +=
            1;
    }
    println!("one run takes {whole:?}; {seen:#?}");
    let hits: u32 = seen.iter().filter(|(what, _)| what.starts_with("killed")).map(|(_, count)| count).sum();
    assert!(hits * 3 >= KILLS, "too few kills came in time to mean anything: {seen:?}");
}

/// Somebody has started to use one of the files since the removal was interrupted.
#[test]
fn resuming_a_removal_respects_locks() {
    let work = WorkDir::new("held");
    let template = work.join("template");
    fs::create_dir(&template).unwrap();
    let root = image(&template, "R", None, "", &[fill(1, 0, 4, CLUSTER)]);
    image(&template, "A", Some("R"), "", &[fill(2, 2, 4, CLUSTER)]);
    let leaf = image(&template, "c00", Some("A"), "", &[]);
    for number in 1..60 {
        fs::copy(&leaf, template.join(format!("c{number:02}.qcow2"))).unwrap();
    }
    let before = digests(&[&root]);
    let dir = work.join("tree");
    let victims = || -> Vec<PathBuf> {
        let paths = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let mut left: Vec<PathBuf> =
            paths.filter(|path| path.file_name().is_some_and(|name| name.as_bytes()[0] == b'c')).collect();
        left.sort();
        left
    };
    let mut interrupted = false;
    for _ in 0..TRIES {
        copy_dir(&template, &dir);
        let killed = kill_when(&delete(&dir, "A", &["--children", "--yes"]), || has_journal(&dir));
        interrupted = killed.code.is_none() && has_journal(&dir) && !victims().is_empty();
        if interrupted {
            break;
        }
        fs::remove_dir_all(&dir).unwrap();
    }
    if !interrupted {
        println!("skipped: {TRIES} kills, and none came in time");
        return;
    }
    let held = victims().pop().unwrap();
    let holder = Holder::open(&held);
    let outcome = run(&["resume", text(&dir)]);
    assert_eq!(outcome.code, Some(5), "{outcome}");
    assert!(held.exists(), "a file in use was removed: {outcome}");
    assert!(has_journal(&dir), "{outcome}");
    drop(holder);
    let outcome = succeed(&["resume", text(&dir)]);
    assert_eq!(victims(), Vec::<PathBuf>::new(), "{outcome}");
    assert!(!dir.join("A.qcow2").exists(), "{outcome}");
    read_as_before(&[&dir.join("R.qcow2")], &before, &outcome);
}

/// A journal is a list of files to change and remove: it is believed only from who runs `resume`.
#[test]
fn a_journal_of_somebody_else_is_not_believed() {
    if !is_root() {
        println!("skipped: only root can give files away");
        return;
    }
    let work = WorkDir::new("foreign");
    let dir = work.join("d");
    let before = interrupted(&dir, |_| true);
    let inside = dir.join(".pleach").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let journals: Vec<PathBuf> =
        inside.filter(|path| path.extension() == Some(OsStr::new("journal"))).collect();
    let give = |owner: u32| journals.iter().for_each(|path| chown(path, Some(owner), Some(owner)).unwrap());
    give(NOBODY);
    let files = contents(&dir);
    let outcome = run(&["resume", text(&dir)]);
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome}");
    unchanged(&dir, &files, &outcome);
    give(0);
    let outcome = succeed(&["resume", text(&dir)]);
    let names = ["B.qcow2", "C.qcow2", "D.qcow2"].map(|name| dir.join(name));
    read_as_before(&names.each_ref().map(PathBuf::as_path), &before, &outcome);
}

/// A raw file has no place for the dependent's bitmap, so it cannot stand in for it.
#[test]
fn a_bitmap_does_not_go_with_the_file_that_holds_it() {
    let work = WorkDir::new("bitmap");
    let dir = tree_in(&work);
    let base = dir.join("base.raw");
    raw(&base, DISK, &[fill(1, 0, 16, CLUSTER)]);
    let overlay = dir.join("D.qcow2");
    on_raw(&overlay, "base.raw", &[fill(2, 8, 2, CLUSTER)]);
    qemu_img(&["bitmap", "--add", text(&overlay), "b0"]);
    qemu_io(&overlay, Format::Qcow2, &[fill(3, 20, 1, CLUSTER)]);
    let bitmaps = || oracle::info(&overlay)["format-specific"]["data"]["bitmaps"].clone();
    let (before, listed) = (digests(&[&overlay]), bitmaps());
    assert_eq!(listed[0]["flags"], Value::from(vec!["auto"]), "{listed}");
    for flag in ["-n", "--yes"] {
        refused(&dir, &delete(&dir, "base", &["--keep", "parent", flag]), &[6, 8], &["b0|bitmap"]);
    }
    let outcome = succeed(&delete(&dir, "base", &["--keep", "child", "--yes"]));
    assert!(!base.exists(), "{outcome}");
    read_as_before(&[&overlay], &before, &outcome);
    assert_eq!(bitmaps(), listed, "{outcome}");
}

/// A file name is bytes; what is shown of it is text, and that text is enough to name it.
#[test]
fn a_name_that_is_not_text_can_be_given_as_it_is_shown() {
    for leaf in [false, true] {
        let work = WorkDir::new("bytes");
        let dir = tree_in(&work);
        let root = image(&dir, "A", None, "", &[fill(1, 0, 4, CLUSTER)]);
        let made = image(&dir, "caf_", Some("A"), "", &[fill(2, 2, 4, CLUSTER)]);
        let mut rest = vec![root];
        if !leaf {
            rest.push(image(&dir, "D", Some("caf_"), "", &[fill(3, 5, 2, CLUSTER)]));
        }
        let rest: Vec<&Path> = rest.iter().map(PathBuf::as_path).collect();
        let before = digests(&rest);
        let victim = dir.join(OsStr::from_bytes(b"caf\xe9.qcow2"));
        fs::rename(&made, &victim).unwrap();
        if let Some(dependent) = rest.get(1) {
            let bytes = fs::read(dependent).unwrap();
            let at = bytes.windows(4).position(|window| window == b"caf_").expect("its backing file's name");
            patch(dependent, u64::try_from(at + 3).unwrap(), b"\xe9");
            assert_eq!(backing_name(dependent).unwrap(), b"caf\xe9.qcow2");
        }
        let shown = Tool::new(PLEACH).json(&["tree", text(&dir), "--json"]);
        let names = shown["nodes"].as_array().unwrap().iter().filter_map(|node| node["name"].as_str());
        let name = names.clone().find(|name| name.starts_with("caf")).unwrap_or_else(|| panic!("{shown}"));
        let outcome = succeed(&delete(&dir, name, &["--yes"]));
        assert!(!victim.exists(), "{outcome}");
        read_as_before(&rest, &before, &outcome);
    }
}
