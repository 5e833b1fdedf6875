//! SIGKILL at random moments of each verb that changes one image where it lies, or makes a new one: by stock QEMU every state
//! is at once as before or as after, with no error that the dirty bit does not explain, and a write hurts none; a repair,
//! or the same verb again, leaves nothing wrong.
//!
//! `PLEACH_LONG=1` kills each verb 200 times; `PLEACH_SEED=…` draws other moments, `PLEACH_KEEP=1` keeps the files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use pleach_testkit::files::{copy_dir, patch};
use pleach_testkit::oracle::{self, Digest, qemu_img, qemu_io, text};
use pleach_testkit::{Format, OnFailure, Outcome, Rng, Tool, WorkDir, chosen_seed, long_mode};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// What is done: the words, with files named from the image's directory, and what the image must be like.
struct Verb {
    words: &'static [&'static str],
    kind: Kind,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Changes an image that has a backing file and snapshots.
    Image,
    /// Mends one that has counts that are wrong.
    Damaged,
    /// Makes a new file, the last word.
    New,
}

const VERBS: &[Verb] = &[
    Verb { words: &["resize", "image.qcow2", "40M"], kind: Kind::Image },
    Verb { words: &["resize", "image.qcow2", "8M", "--shrink", "-y"], kind: Kind::Image },
    Verb { words: &["compact", "image.qcow2", "-y"], kind: Kind::Image },
    Verb { words: &["compact", "image.qcow2", "-y", "--zeroes"], kind: Kind::Image },
    Verb { words: &["snapshot", "image.qcow2", "new", "--internal"], kind: Kind::Image },
    Verb { words: &["revert", "image.qcow2", "s1", "--discard", "-y"], kind: Kind::Image },
    Verb { words: &["delete", "image.qcow2", "s1", "-y"], kind: Kind::Image },
    Verb { words: &["rename", "image.qcow2", "s1", "renamed"], kind: Kind::Image },
    Verb { words: &["check", "image.qcow2", "--repair", "leaks"], kind: Kind::Damaged },
    Verb { words: &["check", "image.qcow2", "--repair", "all"], kind: Kind::Damaged },
    Verb { words: &["bitmap", "add", "image.qcow2", "b"], kind: Kind::Image },
    Verb { words: &["create", "-b", "image.qcow2", "new.qcow2", "24M"], kind: Kind::New },
    Verb { words: &["flatten", "image.qcow2", "new.qcow2"], kind: Kind::New },
    Verb { words: &["convert", "-c", "image.qcow2", "new.qcow2"], kind: Kind::New },
    Verb { words: &["convert", "-O", "raw", "image.qcow2", "new.raw"], kind: Kind::New },
    Verb { words: &["convert", "--snapshot", "s2", "image.qcow2", "new.qcow2"], kind: Kind::New },
];

/// What the active state and each snapshot, by its name, read as.
type States = BTreeMap<String, Digest>;

#[test]
fn every_state_is_old_or_new() {
    let seed = chosen_seed().unwrap_or(0x1a9e);
    let _seed = OnFailure::print_seed(seed, "image_kill");
    let work = WorkDir::new("image-kill");
    let template = work.join("template");
    fs::create_dir(&template).unwrap();
    build(&template);
    let copy = work.join("copy");
    // One after the other: what runs beside it moves the moments.
    for verb in VERBS {
        let case = Case::new(verb, &template, &copy);
        let mut rng = Rng::new(seed);
        let kills = if long_mode() { 200 } else { 3 };
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        for n in 0..kills {
            let slice = case.whole / kills;
            let delay = slice * n + slice * u32::try_from(rng.below(1000)).unwrap() / 1000;
            *seen.entry(case.kill_once(delay, n)).or_default() += 1;
        }
        println!("{:?}: one run takes {:?}; {seen:?}", verb.words, case.whole);
    }
}

fn build(dir: &Path) {
    let (base, image) = (dir.join("base.qcow2"), dir.join("image.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", text(&base), "24M"]);
    qemu_io(&base, Format::Qcow2, &["write -q -P 1 0 3M", "write -q -P 2 15M 3M"]);
    let backing = ["-b", "base.qcow2", "-F", "qcow2"];
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    qemu_img(&[&create[..], &backing, &[text(&image), "24M"]].concat());
    let io = |commands: &[&str]| qemu_io(&image, Format::Qcow2, commands);
    io(&["write -q -P 3 1536k 4M", "write -q -P 0 11M 1M", "write -q -z 16M 512k"]);
    qemu_img(&["snapshot", "-c", "s1", text(&image)]);
    io(&["write -q -P 4 4M 4M", "write -q -P 5 19M 3M", "write -q -c -P 6 13M 4k"]);
    qemu_img(&["snapshot", "-c", "s2", text(&image)]);
    io(&["write -q -P 7 512k 2M", "discard -q 4M 2M", "write -q -P 8 22M 1M"]);
}

/// Clusters behind the last one that is in use are counted; with `more`, some that are in use too often.
fn damage(image: &Path, more: bool) {
    const CLUSTER: usize = 4096;
    const PER_BLOCK: usize = CLUSTER / 2;
    let bytes = fs::read(image).unwrap();
    let word = |at: usize| {
        let offset = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & !511;
        usize::try_from(offset).unwrap()
    };
    let clusters = bytes.len() / CLUSTER;
    let block = word(word(48) + clusters / PER_BLOCK * 8);
    assert_ne!(block, 0, "the last clusters are counted");
    let count = |slot: usize| block + slot % PER_BLOCK * 2;
    let end = clusters.next_multiple_of(PER_BLOCK);
    (clusters..end).for_each(|slot| patch(image, count(slot) as u64, &[0, 1]));
    fs::File::options().write(true).open(image).unwrap().set_len((end * CLUSTER) as u64).unwrap();
    if more {
        let used = clusters / PER_BLOCK * PER_BLOCK..clusters;
        used.step_by(3).for_each(|slot| patch(image, count(slot) as u64, &[0, 9]));
    }
}

struct Case<'a> {
    verb: &'a Verb,
    template: &'a Path,
    dir: &'a Path,
    before: States,
    after: States,
    new: Option<Digest>,
    whole: Duration,
}

fn states(dir: &Path) -> States {
    let image = dir.join("image.qcow2");
    let mut all = States::from([(String::new(), oracle::digest(&image, Format::Qcow2))]);
    for snapshot in oracle::info(&image)["snapshots"].as_array().into_iter().flatten() {
        let (id, name) = (snapshot["id"].as_str().unwrap(), snapshot["name"].as_str().unwrap());
        all.insert(name.to_owned(), oracle::try_snapshot_digest(&image, id).unwrap());
    }
    all
}

impl<'a> Case<'a> {
    fn new(verb: &'a Verb, template: &'a Path, dir: &'a Path) -> Self {
        let none = (States::new(), Duration::ZERO);
        let mut case =
            Self { verb, template, dir, before: none.0.clone(), after: none.0, new: None, whole: none.1 };
        case.copy();
        case.before = states(dir);
        let done = Tool::fastest(PLEACH).0.spawn(&case.words()).finish(Duration::from_secs(120));
        assert!(matches!(done.code, Some(0)), "{done}");
        case.after = states(dir);
        case.new = case.new_file();
        case.whole = done.elapsed;
        case.clean(&format!("{done}"));
        case
    }

    fn words(&self) -> Vec<String> {
        let place = |word: &&str| match word.split_once('.') {
            Some((_, "qcow2" | "raw")) => text(&self.dir.join(word)).to_owned(),
            _ => (*word).to_owned(),
        };
        self.verb.words.iter().map(place).collect()
    }

    fn copy(&self) {
        if self.dir.exists() {
            fs::remove_dir_all(self.dir).unwrap();
        }
        fs::create_dir(self.dir).unwrap();
        for name in ["base.qcow2", "image.qcow2"] {
            fs::copy(self.template.join(name), self.dir.join(name)).unwrap();
        }
        if self.verb.kind == Kind::Damaged {
            damage(&self.dir.join("image.qcow2"), self.verb.words.contains(&"all"));
        }
    }

    /// What the new file reads as, if it is there.
    fn new_file(&self) -> Option<Digest> {
        let there = |name: &str| Some(self.dir.join(name)).filter(|path| path.exists());
        let raw = there("new.raw").map(|path| oracle::digest(&path, Format::Raw));
        raw.or_else(|| there("new.qcow2").map(|path| oracle::digest(&path, Format::Qcow2)))
    }

    /// What is there is as before or as after.
    fn content(&self, what: &str) -> States {
        let now = states(self.dir);
        assert!(now == self.before || now == self.after, "{what}: {now:?}");
        if let Some(new) = self.new_file() {
            assert_eq!(Some(new), self.new, "{what}: the new file");
        }
        now
    }

    fn clean(&self, what: &str) {
        for name in ["image.qcow2", "new.qcow2"] {
            let path = self.dir.join(name);
            if path.exists() {
                let check = oracle::check(&path, Format::Qcow2);
                assert!(check.is_clean(), "{what}: {name}: {}", check.text);
            }
        }
    }

    fn kill_once(&self, delay: Duration, number: u32) -> String {
        let pleach = Tool::fastest(PLEACH).0;
        self.copy();
        let killed = pleach.spawn(&self.words()).kill_after(delay);
        let mut what =
            format!("{:?}: kill {number} at {delay:?} of {:?}: {killed}", self.verb.words, self.whole);
        assert!(matches!(killed.code, None | Some(0)), "{what}");
        let now = self.content(&what);
        let image = self.dir.join("image.qcow2");
        let check = oracle::check(&image, Format::Qcow2);
        let dirty = oracle::info(&image)["dirty-flag"] == true;
        assert!(check.is_safe() || dirty || self.verb.kind == Kind::Damaged, "{what}: {}", check.text);
        if number % 2 == 1 && self.verb.kind == Kind::Image {
            self.write_by_stock(now.clone(), &what);
        }
        let dir = text(self.dir);
        let say = |what: &mut String, done: &Outcome| what.push_str(&format!("\nthen {done}"));
        let resumed = pleach.succeed(&["resume", dir]);
        say(&mut what, &resumed);
        if self.verb.kind == Kind::New {
            if self.new_file().is_none() {
                say(&mut what, &pleach.succeed(&self.words()));
            }
            assert_eq!(self.new_file(), self.new, "{what}");
        } else {
            let mended = pleach.run(&["check", text(&image), "--repair", "all"]);
            say(&mut what, &mended);
            assert_eq!(mended.code, Some(0), "{what}");
        }
        self.content(&what);
        self.clean(&what);
        let left: Vec<String> = fs::read_dir(self.dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| !n.contains(".undo-") && n.contains("partial"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "{what}");
        let fate = if killed.code.is_none() { "killed" } else { "too late" };
        format!("{fate}, {}", if now == self.before { "as before" } else { "as after" })
    }

    /// Stock QEMU writes to a copy as it is found: no other state changes.
    fn write_by_stock(&self, mut wanted: States, what: &str) {
        let probe = self.dir.with_file_name("probe");
        copy_dir(self.dir, &probe);
        let image = probe.join("image.qcow2");
        qemu_io(&image, Format::Qcow2, &["write -q -P 0xee 2M 8k"]);
        let now = states(&probe);
        wanted.insert(String::new(), now[""]);
        assert_eq!(now, wanted, "{what}; then a write by stock QEMU");
        let check = oracle::check(&image, Format::Qcow2);
        assert!(check.is_safe(), "{what}; then a write by stock QEMU: {}", check.text);
        fs::remove_dir_all(&probe).unwrap();
    }
}
