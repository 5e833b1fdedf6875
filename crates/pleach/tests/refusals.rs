//! What pleach must not do: each case ends with the right exit code, a message that names the reason, and a
//! directory that is as it was, names and bytes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pleach_testkit::files::{changes, contents, patch};
use pleach_testkit::layers::{Layer, fill, qcow2};
use pleach_testkit::mount::TinyFs;
use pleach_testkit::oracle::{qemu_img_in, text};
use pleach_testkit::{Forest, Format, Outcome, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const CLUSTER: u64 = 65536;
const DISK: u64 = 32 * CLUSTER;

/// Nothing here may take longer: a loop that is followed for ever is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which exit codes are right.
type Codes = &'static [i32];

const FAILED: Codes = &[1];
const USAGE: Codes = &[2];
const IN_USE: Codes = &[5];
const NO_SUCH: Codes = &[7];
const NOT_SUPPORTED: Codes = &[8];
const NOT_CONFIRMED: Codes = &[9];
/// Images that do not fit together: failed, corrupt, or the file is not there.
const BROKEN: Codes = &[1, 4, 7];
/// Backing names that are no file names.
const FOREIGN: Codes = &[1, 6, 8];

/// Judges refusals, and collects everything that is wrong with them.
#[derive(Default)]
struct Judge {
    dir: PathBuf,
    problems: Vec<String>,
    /// A case changed the directory, so what comes after it would prove nothing.
    spoiled: bool,
}

impl Judge {
    fn of(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), ..Self::default() }
    }

    /// From now on another directory is the one that must not change.
    fn turn_to(&mut self, dir: &Path) {
        self.dir = dir.to_path_buf();
        self.spoiled = false;
    }

    /// Runs `pleach ARGS` twice, as a person and as a program (`--json`), and checks all that a refusal promises.
    ///
    /// Each of `words` must be in the message, whatever the case; `a|b` means either.
    fn refused(&mut self, case: &str, args: &[&str], codes: Codes, words: &[&str]) {
        for flag in [&[][..], &["--json"]] {
            if self.spoiled {
                return;
            }
            let before = contents(&self.dir);
            let outcome = Tool::new(PLEACH).spawn(&[args, flag].concat()).finish(PATIENCE);
            let mut found = Vec::new();
            if !outcome.code.is_some_and(|code| codes.contains(&code)) {
                found.push(format!("exit code {:?} where {codes:?} is right", outcome.code));
            }
            found.extend(if flag.is_empty() {
                text_problems(&outcome, words)
            } else {
                json_problems(&outcome, words)
            });
            let changed = changes(&before, &contents(&self.dir));
            self.spoiled = !changed.is_empty();
            found.extend(changed);
            if !found.is_empty() {
                self.problems.push(format!("== {case}: {found:#?}{outcome}\n"));
            }
        }
    }

    /// Fails the test if anything was wrong.
    fn verdict(self) {
        assert!(self.problems.is_empty(), "{} problems\n{}", self.problems.len(), self.problems.concat());
    }
}

fn text_problems(outcome: &Outcome, words: &[&str]) -> Vec<String> {
    let coded =
        outcome.stderr.contains("error[") || outcome.code == Some(2) && outcome.stderr.contains("error");
    let uncoded = (!coded).then(|| "stderr has no error[CODE]".to_owned());
    uncoded.into_iter().chain(unsaid(&outcome.stderr, words)).collect()
}

fn json_problems(outcome: &Outcome, words: &[&str]) -> Vec<String> {
    let document: Value = match serde_json::from_str(&outcome.stdout) {
        Ok(document) => document,
        Err(error) => return vec![format!("stdout is not JSON: {error}")],
    };
    let error = &document["error"];
    let missing =
        ["code", "message", "path", "offset", "hint"].into_iter().filter(|key| error.get(key).is_none());
    let mut found: Vec<String> = missing.map(|key| format!("the error object has no {key}")).collect();
    let filled = |key: &str| error[key].as_str().is_some_and(|word| !word.is_empty());
    let nothing_or = |key: &str, fits: bool| error[key].is_null() || fits;
    let rules = [
        (filled("code"), "code is no text"),
        (filled("message"), "message is no text"),
        (nothing_or("path", error["path"].is_string()), "path is neither null nor text"),
        (nothing_or("hint", error["hint"].is_string()), "hint is neither null nor text"),
        (nothing_or("offset", error["offset"].is_u64()), "offset is neither null nor a number"),
    ];
    found.extend(rules.iter().filter(|(holds, _)| !holds).map(|(_, what)| (*what).to_owned()));
    found.extend(unsaid(&error.to_string(), words));
    found
}

/// Words that the message should have in it and has not.
fn unsaid(message: &str, words: &[&str]) -> Vec<String> {
    let message = message.to_lowercase();
    let said = |word: &&&str| word.split('|').any(|word| message.contains(&word.to_lowercase()));
    words.iter().filter(|word| !said(word)).map(|word| format!("the message does not say {word:?}")).collect()
}

/// A <- B <- D and A <- C <- E, 64 KiB clusters.
fn known_tree(dir: &Path) -> Forest {
    fs::create_dir_all(dir).unwrap();
    let rows = [("A", None), ("B", Some("A")), ("C", Some("A")), ("D", Some("B")), ("E", Some("C"))];
    for ((name, parent), pattern) in rows.iter().zip(1..) {
        let place = u64::from(pattern);
        image(
            dir,
            name,
            *parent,
            "",
            &[fill(pattern, place, 6, CLUSTER), fill(pattern + 50, 20 + place, 1, CLUSTER)],
        );
    }
    let files: Vec<String> = rows.iter().map(|(name, _)| format!("{name}.qcow2")).collect();
    let named: Vec<_> = rows
        .iter()
        .zip(&files)
        .map(|((name, up), file)| (*name, file.as_str(), Format::Qcow2, *up))
        .collect();
    Forest::read(dir, &named)
}

fn image(dir: &Path, name: &str, parent: Option<&str>, options: &str, commands: &[String]) -> PathBuf {
    let path = dir.join(format!("{name}.qcow2"));
    let backing = parent.map(|parent| format!("{parent}.qcow2"));
    let backing = backing.as_deref().map(|backing| (backing, Format::Qcow2));
    qcow2(&path, Layer { size: DISK, backing, options }, commands);
    path
}

/// qemu-io with an image open, until dropped.
struct Holder(Child);

impl Holder {
    fn open(path: &Path, flags: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(flags).args(["-f", "qcow2"]).arg(path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // The prompt comes after the image was opened and locked.
        let mut prompt = [0; 8];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io>", "qemu-io {flags:?} {}", path.display());
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

#[test]
fn an_image_in_use_is_left_alone() {
    let work = WorkDir::new("busy");
    let dir = work.join("tree");
    known_tree(&dir);
    let place = text(&dir);
    let rows: &[(&str, &str, &[&str], &[&str])] = &[
        ("the victim is being written", "B", &[], &["delete", place, "B", "--yes"]),
        ("the victim is being read", "B", &["-r"], &["delete", place, "B", "--yes"]),
        ("the dependent is being written", "D", &[], &["delete", place, "B", "--yes"]),
        ("the dependent, and its name goes", "D", &[], &["delete", place, "B", "--keep", "parent", "--yes"]),
        ("the dependent is being read", "D", &["-r"], &["delete", place, "B", "--yes"]),
        ("one of two dependents", "C", &[], &["delete", place, "A", "--yes"]),
        ("a leaf that goes", "E", &[], &["delete", place, "E", "--yes"]),
        ("somebody below the node that goes", "E", &[], &["delete", place, "C", "--children", "--yes"]),
        ("a descendant that goes alone", "E", &[], &["delete", place, "C", "--children-only", "--yes"]),
    ];
    let mut judge = Judge::of(&dir);
    for (case, held, flags, args) in rows {
        let held = format!("{held}.qcow2");
        let _holder = Holder::open(&dir.join(&held), flags);
        judge.refused(case, args, IN_USE, &["in use|lock|another process"]);
    }
    judge.verdict();
}

/// A VM on another branch holds the base that both share, for reading; that is no reason to refuse.
#[test]
fn another_branch_in_use_does_not_matter() {
    let work = WorkDir::new("unlocked");
    let dir = work.join("tree");
    let forest = known_tree(&dir);
    let holder = Holder::open(&dir.join("E.qcow2"), &[]);
    let deleted = Tool::new(PLEACH).run(&["delete", text(&dir), "B", "--yes"]);
    drop(holder);
    assert_eq!(deleted.code, Some(0), "{deleted}");
    let after = forest.after("B", &pleach_testkit::Removal::Pull);
    assert_eq!(after.problems(&dir), Vec::<String>::new(), "{deleted}");
}

#[test]
fn names_that_do_not_exist() {
    let work = WorkDir::new("names");
    let dir = work.join("tree");
    known_tree(&dir);
    let place = text(&dir);
    let nowhere = text(&work.join("nowhere")).to_owned();
    let no_image = text(&dir.join("nosuch.qcow2")).to_owned();
    let rows: &[(&str, &[&str], Codes, &[&str])] = &[
        ("node", &["delete", place, "nosuch", "--yes"], NO_SUCH, &["nosuch"]),
        ("node, planned", &["delete", place, "nosuch", "-n"], NO_SUCH, &["nosuch"]),
        (
            "dependent to keep",
            &["delete", place, "A", "--keep", "parent=nosuch", "--yes"],
            NO_SUCH,
            &["nosuch"],
        ),
        ("somebody else's child", &["delete", place, "A", "--keep", "parent=D", "--yes"], &[2, 7], &["D"]),
        ("directory to delete from", &["delete", &nowhere, "B", "--yes"], NO_SUCH, &["nowhere"]),
        ("directory with more", &["delete", place, "B", "--also", &nowhere, "--yes"], &[1, 7], &["nowhere"]),
        ("directory to show", &["tree", &nowhere], NO_SUCH, &["nowhere"]),
        ("image to show", &["info", &no_image], NO_SUCH, &["nosuch.qcow2"]),
    ];
    let mut judge = Judge::of(&dir);
    for (case, args, codes, words) in rows {
        judge.refused(case, args, codes, words);
    }
    judge.verdict();
}

#[test]
fn usage_and_consent() {
    let work = WorkDir::new("usage");
    let dir = work.join("tree");
    known_tree(&dir);
    let place = text(&dir);
    let rows: &[(&str, &[&str], Codes, &[&str])] = &[
        ("no such verb", &["prune", place], USAGE, &["prune"]),
        ("no such option", &["tree", place, "--sideways"], USAGE, &["--sideways"]),
        ("no name", &["delete", place], USAGE, &["NAME"]),
        ("no such side", &["delete", place, "B", "--keep", "sideways", "--yes"], USAGE, &["sideways"]),
        (
            "two modes",
            &["delete", place, "B", "--children", "--children-only", "--yes"],
            USAGE,
            &["--children"],
        ),
        ("no consent to a leaf", &["delete", place, "D"], NOT_CONFIRMED, &["--yes"]),
        ("no consent to a merge", &["delete", place, "B", "--keep", "parent"], NOT_CONFIRMED, &["--yes"]),
        ("no consent to a branch", &["delete", place, "B", "--children"], NOT_CONFIRMED, &["--yes"]),
        (
            "all of it, by half a word",
            &["delete", place, "A", "--children", "--yes"],
            &[6, 9],
            &["--yes-everything"],
        ),
    ];
    let mut judge = Judge::of(&dir);
    for (case, args, codes, words) in rows {
        judge.refused(case, args, codes, words);
    }
    judge.verdict();
}

/// A file system where nothing can be written, or `None` where this cannot be had: root writes everywhere.
enum ReadOnly {
    Mounted(TinyFs),
    Modes(WorkDir),
}

impl ReadOnly {
    fn with_known_tree() -> Option<Self> {
        if fs::metadata("/proc/self").unwrap().uid() != 0 {
            let work = WorkDir::new("modes");
            known_tree(&work.join("tree"));
            fs::set_permissions(work.join("tree"), fs::Permissions::from_mode(0o555)).unwrap();
            return Some(Self::Modes(work));
        }
        let mounted = TinyFs::mount(64 << 20)?;
        known_tree(&mounted.path().join("tree"));
        mounted.make_read_only().then_some(Self::Mounted(mounted))
    }

    fn tree(&self) -> PathBuf {
        match self {
            Self::Mounted(mounted) => mounted.path().join("tree"),
            Self::Modes(work) => work.join("tree"),
        }
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        if let Self::Modes(work) = self {
            let _ = fs::set_permissions(work.join("tree"), fs::Permissions::from_mode(0o755));
        }
    }
}

#[test]
fn a_read_only_directory() {
    let Some(place) = ReadOnly::with_known_tree() else {
        println!("skipped: no read-only file system can be had here");
        return;
    };
    let dir = place.tree();
    let words: &[&str] = &["read-only|permission denied|cannot write|not writable"];
    let mut judge = Judge::of(&dir);
    for (case, args) in [
        ("leaf", vec!["D"]),
        ("merge", vec!["B"]),
        ("merge, keep parent", vec!["B", "--keep", "parent"]),
        ("pull into each", vec!["A"]),
        ("branch", vec!["C", "--children"]),
    ] {
        let args = [&["delete", text(&dir)], args.as_slice(), &["--yes"]].concat();
        judge.refused(case, &args, FAILED, words);
    }
    // What only reads works as anywhere.
    let tool = Tool::new(PLEACH);
    let tree = tool.json(&["tree", text(&dir), "--sizes", "--json"]);
    assert_eq!(tree["nodes"].as_array().unwrap().len(), 5);
    tool.json(&["info", text(&dir.join("D.qcow2")), "--chain", "--json"]);
    tool.json(&["delete", text(&dir), "B", "-n", "--json"]);
    if let ReadOnly::Mounted(mounted) = &place {
        assert!(mounted.path().join("tree").exists());
    }
    judge.verdict();
}

/// P <- N <- D1, D2, D3: N holds 6 MiB that each of the three would have to take.
fn heavy_tree(dir: &Path) -> Forest {
    fs::create_dir_all(dir).unwrap();
    let size = 8 << 20;
    let at = |name: &str| dir.join(format!("{name}.qcow2"));
    let over = |backing| Layer { size, backing: Some((backing, Format::Qcow2)), options: "" };
    qcow2(&at("P"), Layer { size, ..Layer::default() }, &[fill(1, 0, 8, CLUSTER)]);
    qcow2(&at("N"), over("P.qcow2"), &[fill(2, 4, 96, CLUSTER)]);
    for (name, pattern) in [("D1", 3), ("D2", 4), ("D3", 5)] {
        qcow2(&at(name), over("N.qcow2"), &[fill(pattern, u64::from(pattern), 4, CLUSTER)]);
    }
    let row = |name, file, up| (name, file, Format::Qcow2, up);
    Forest::read(
        dir,
        &[
            row("P", "P.qcow2", None),
            row("N", "N.qcow2", Some("P")),
            row("D1", "D1.qcow2", Some("N")),
            row("D2", "D2.qcow2", Some("N")),
            row("D3", "D3.qcow2", Some("N")),
        ],
    )
}

#[test]
fn a_full_disk() {
    let Some(disk) = TinyFs::mount(32 << 20) else {
        println!("skipped: no small file system can be mounted here");
        return;
    };
    let dir = disk.path().join("tree");
    let forest = heavy_tree(&dir);
    let words: &[&str] = &["no space|disk is full|not enough space|free space"];
    let mut judge = Judge::of(&dir);
    // Room for one of three; room for nearly two; for a few clusters; for nothing at all.
    for (case, left) in
        [("two thirds", 11 << 20), ("one third", 7 << 20), ("a little", 256 << 10), ("nothing", 0)]
    {
        let _ = fs::remove_file(disk.path().join("ballast"));
        disk.fill_up_to(left);
        for flags in [&[][..], &["--keep", "parent=D2"]] {
            let args = [&["delete", text(&dir), "N"], flags, &["--yes"]].concat();
            judge.refused(case, &args, FAILED, words);
            assert_eq!(forest.problems(&dir), Vec::<String>::new(), "{case} {flags:?}");
        }
    }
    // The space comes back, and nothing that the failures left is in the way.
    fs::remove_file(disk.path().join("ballast")).unwrap();
    Tool::new(PLEACH).succeed(&["delete", text(&dir), "N", "--yes"]);
    let after = forest.after("N", &pleach_testkit::Removal::Pull);
    assert_eq!(after.problems(&dir), Vec::<String>::new());
    judge.verdict();
}

#[test]
fn a_backing_file_that_is_missing() {
    let work = WorkDir::new("missing");
    let dir = work.join("tree");
    known_tree(&dir);
    fs::remove_file(dir.join("A.qcow2")).unwrap();
    let image = text(&dir.join("D.qcow2")).to_owned();
    let mut judge = Judge::of(&dir);
    judge.refused("info", &["info", &image, "--chain"], BROKEN, &["A.qcow2"]);
    judge.refused("delete", &["delete", text(&dir), "B", "--yes"], BROKEN, &["A.qcow2"]);
    // Without `--chain` nobody needs the backing file.
    let info = Tool::new(PLEACH).json(&["info", &image, "--json"]);
    assert_eq!(info["images"][0]["backing_file"], "B.qcow2");
    // A tree with a hole in it is still worth showing; if it is not, then by name.
    let shown = Tool::new(PLEACH).spawn(&["tree", text(&dir)]).finish(PATIENCE);
    assert!(shown.text().contains("A.qcow2"), "the missing file is not named: {shown}");
    judge.verdict();
}

#[test]
fn backing_files_in_a_loop() {
    let work = WorkDir::new("rounds");
    let own = work.join("own");
    fs::create_dir(&own).unwrap();
    image(&own, "S", None, "", &[fill(1, 0, 1, CLUSTER)]);
    qemu_img_in(&own, &["rebase", "-u", "-b", "S.qcow2", "-F", "qcow2", "S.qcow2"]);
    let two = work.join("two");
    fs::create_dir(&two).unwrap();
    image(&two, "X", None, "", &[fill(1, 0, 1, CLUSTER)]);
    image(&two, "Y", Some("X"), "", &[fill(2, 1, 1, CLUSTER)]);
    image(&two, "Z", Some("Y"), "", &[fill(3, 2, 1, CLUSTER)]);
    qemu_img_in(&two, &["rebase", "-u", "-b", "Y.qcow2", "-F", "qcow2", "X.qcow2"]);
    let words: &[&str] = &["loop|cycle|itself|circular|infinite"];
    let mut judge = Judge::default();
    for (dir, name) in [(&own, "S"), (&two, "X"), (&two, "Y"), (&two, "Z")] {
        let image = dir.join(format!("{name}.qcow2"));
        let codes: Codes = &[1, 4, 6];
        judge.turn_to(dir);
        judge.refused(name, &["info", text(&image), "--chain"], codes, words);
        judge.refused(name, &["delete", text(dir), name, "--yes"], codes, words);
        judge.refused(name, &["tree", text(dir)], codes, words);
        Tool::new(PLEACH).json(&["info", text(&image), "--json"]);
    }
    judge.verdict();
}

/// Overwrites the type of the backing format extension: old images have none, and QEMU would guess.
fn blank_backing_format(path: &Path) {
    const BACKING_FORMAT: [u8; 4] = [0xe2, 0x79, 0x2a, 0xca];
    let bytes = fs::read(path).unwrap();
    let at =
        bytes[..4096].windows(4).position(|window| window == BACKING_FORMAT).expect("qemu-img writes it");
    patch(path, u64::try_from(at).unwrap(), b"none");
    assert!(pleach_testkit::oracle::info(path).get("backing-filename-format").is_none());
}

#[test]
fn a_backing_format_that_nobody_wrote() {
    let mut judge = Judge::default();
    for options in ["compat=v3", "compat=v2"] {
        let work = WorkDir::new("unsaid");
        let dir = work.join("tree");
        fs::create_dir(&dir).unwrap();
        image(&dir, "A", None, options, &[fill(1, 0, 4, CLUSTER)]);
        image(&dir, "B", Some("A"), options, &[fill(2, 2, 4, CLUSTER)]);
        image(&dir, "D", Some("B"), options, &[fill(3, 5, 4, CLUSTER)]);
        blank_backing_format(&dir.join("D.qcow2"));
        let image = text(&dir.join("D.qcow2")).to_owned();
        let codes: Codes = &[1, 8];
        judge.turn_to(&dir);
        judge.refused(options, &["info", &image, "--chain"], codes, &["D.qcow2", "format"]);
        judge.refused(options, &["delete", text(&dir), "B", "--yes"], codes, &["D.qcow2", "format"]);
        let info = Tool::new(PLEACH).json(&["info", &image, "--json"]);
        assert_eq!(info["images"][0]["backing_format"], Value::Null, "{options}: {info}");
        assert_eq!(info["images"][0]["backing_file"], "B.qcow2", "{options}: {info}");
    }
    judge.verdict();
}

#[test]
fn backing_names_that_are_no_file_names() {
    let mut judge = Judge::default();
    for (name, word) in [
        (r#"json:{"driver":"file","filename":"A.qcow2"}"#, "json:"),
        ("nbd://127.0.0.1:1/disk", "nbd:"),
        ("file:A.qcow2", "file:"),
    ] {
        let work = WorkDir::new("protocol");
        let dir = work.join("tree");
        fs::create_dir(&dir).unwrap();
        image(&dir, "A", None, "", &[fill(1, 0, 4, CLUSTER)]);
        image(&dir, "B", Some("A"), "", &[fill(2, 2, 4, CLUSTER)]);
        image(&dir, "D", Some("B"), "", &[fill(3, 5, 4, CLUSTER)]);
        qemu_img_in(&dir, &["rebase", "-u", "-b", name, "-F", "qcow2", "B.qcow2"]);
        let image = text(&dir.join("D.qcow2")).to_owned();
        judge.turn_to(&dir);
        judge.refused(name, &["info", &image, "--chain"], FOREIGN, &[word]);
        judge.refused(name, &["delete", text(&dir), "B", "--yes"], FOREIGN, &[word]);
        let named = text(&dir.join("B.qcow2")).to_owned();
        let info = Tool::new(PLEACH).json(&["info", &named, "--json"]);
        assert_eq!(info["images"][0]["backing_file"], name, "{info}");
    }
    judge.verdict();
}

/// Something about an image that puts its data out of reach.
struct Feature {
    name: &'static str,
    /// Any of these must be in the message.
    words: &'static str,
    /// Makes the image `N` (on A) in the directory, with data in it.
    make: fn(&Path),
    /// What `info --json` must say all the same.
    shown: fn(&Value) -> bool,
}

const FEATURES: &[Feature] = &[
    Feature {
        name: "external data file",
        words: "data file|data-file|external data",
        make: |dir| {
            let data = dir.join("N.data");
            image(dir, "N", Some("A"), &format!("data_file={}", text(&data)), &[fill(2, 2, 8, CLUSTER)]);
        },
        shown: |image| image["data_file"].as_str().is_some_and(|name| name.ends_with("N.data")),
    },
    Feature {
        name: "LUKS",
        words: "luks|encrypt",
        make: encrypted,
        shown: |image| !image["encryption"].is_null(),
    },
];

fn encrypted(dir: &Path) {
    let path = dir.join("N.qcow2");
    let key = "secret,id=key,data=secret";
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let size = DISK.to_string();
    let create =
        ["create", "-q", "--object", key, "-f", "qcow2", "-o", options, "-b", "A.qcow2", "-F", "qcow2"];
    qemu_img_in(dir, &[&create[..], &[text(&path), &size]].concat());
    let opened = format!("driver=qcow2,encrypt.key-secret=key,file.filename={}", text(&path));
    let mut io = Command::new("qemu-io");
    io.args(["--object", key, "--image-opts", &opened, "-c", &fill(2, 2, 8, CLUSTER)]);
    let done = io.output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn features_that_pleach_does_not_read_are_named() {
    let mut judge = Judge::default();
    for feature in FEATURES {
        let work = WorkDir::new("feature");
        let dir = work.join("tree");
        fs::create_dir(&dir).unwrap();
        image(&dir, "A", None, "", &[fill(1, 0, 4, CLUSTER)]);
        (feature.make)(&dir);
        // Two dependents: whatever is merged with whatever, one of them has to take what the victim holds.
        let size = DISK.to_string();
        for name in ["D1.qcow2", "D2.qcow2"] {
            qemu_img_in(
                &dir,
                &["create", "-q", "-u", "-f", "qcow2", "-b", "N.qcow2", "-F", "qcow2", name, &size],
            );
        }
        judge.turn_to(&dir);
        for flags in [&[][..], &["--keep", "parent=D1"]] {
            let args = [&["delete", text(&dir), "N"], flags, &["--yes"]].concat();
            judge.refused(feature.name, &args, NOT_SUPPORTED, &[feature.words]);
        }
        for name in ["D1.qcow2", "D2.qcow2"] {
            fs::remove_file(dir.join(name)).unwrap();
        }
        image(&dir, "C", Some("A"), "", &[]);
        judge.turn_to(&dir);
        let args = ["delete", text(&dir), "A", "--yes"];
        judge.refused(feature.name, &args, NOT_SUPPORTED, &[feature.words]);
        let path = dir.join("N.qcow2");
        let info = Tool::new(PLEACH).json(&["info", text(&path), "--json"]);
        assert!((feature.shown)(&info["images"][0]), "{}: {info}", feature.name);
    }
    judge.verdict();
}

/// Subclusters are read: an image with extended L2 entries can go, and what it held is found in those that stood on it.
#[test]
fn extended_l2_entries_are_read() {
    let work = WorkDir::new("subclusters");
    let dir = work.join("tree");
    fs::create_dir(&dir).unwrap();
    image(&dir, "A", None, "", &[fill(1, 0, 12, CLUSTER)]);
    let writes =
        ["write -q -P 7 2k 6k", "write -q -z 70k 4k", "write -q -P 9 130k 30k", "write -q -c -P 5 256k 64k"];
    image(&dir, "N", Some("A"), "extended_l2=on", &writes.map(String::from));
    image(&dir, "D", Some("N"), "cluster_size=4k", &[fill(3, 3, 1, CLUSTER)]);
    image(&dir, "E", Some("N"), "", &[]);
    let digests = |names: &[&str]| -> Vec<_> {
        let path = |name: &&str| dir.join(format!("{name}.qcow2"));
        names
            .iter()
            .map(|name| pleach_testkit::oracle::digest(&path(name), pleach_testkit::Format::Qcow2))
            .collect()
    };
    let before = digests(&["A", "D", "E"]);
    Tool::new(PLEACH).succeed(&["delete", text(&dir), "N", "--yes"]);
    assert_eq!(digests(&["A", "D", "E"]), before);
    for name in ["A", "D", "E"] {
        pleach_testkit::oracle::check_clean(&dir.join(format!("{name}.qcow2")));
    }
}

/// An incompatible feature bit that nobody has given a meaning.
#[test]
fn an_unknown_feature_is_named_by_its_bit() {
    let work = WorkDir::new("unknown");
    let dir = work.join("tree");
    known_tree(&dir);
    // Byte 80 - 1 holds bits 0 to 7 of the incompatible features; bit 7 has no name.
    patch(&dir.join("D.qcow2"), 79, &[0x80]);
    let mut judge = Judge::of(&dir);
    judge.refused("unknown bit", &["delete", text(&dir), "B", "--yes"], NOT_SUPPORTED, &["bit 7|0x80"]);
    judge.verdict();
}
