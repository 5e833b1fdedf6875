//! Operations on chains, on a disk in memory: whatever a kill, a loss of power or a failing disk leaves, every node that stays
//! reads right before anything else is run, and a write to it hurts no other; `resume` finishes, `undo` takes back what it
//! does not refuse, and a second `resume` finds nothing to do; all of that also where these are ended early themselves.
//!
//! `PLEACH_CRASH_STATES=n` goes on with further seeds until that many states were judged (`cargo xtask crash n`).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pleach_engine::family::Family;
use pleach_engine::survey::{FileFormat, Survey, Trust};
use pleach_engine::{
    DeleteRequest, ErrorKind, Keep, Onto, Prepared, RebaseRequest, Result, Source, SourceOptions, Watch,
    execute, open_writer, prepare, prepare_merge, prepare_rebase, resume, undo,
};
use pleach_format::{BackingFile, Version};
use pleach_image::{CreateOptions, Image, Layer, check, create};
use pleach_lineage::DeleteMode;
use pleach_store::{Access, Disk};
use pleach_testkit::oracle::{self, Format, text};
use pleach_testkit::sim::{Effort, SimDisk, Subject, crash_rounds, endings};
use pleach_testkit::{OnFailure, Rng};

const DIR: &str = "/d";

/// What is done, and which nodes are promised.
struct Operation {
    name: &'static str,
    plan: fn(&SimDisk, &Survey) -> Result<Prepared>,
    /// Nodes that are not promised any more.
    goes: &'static [&'static str],
    /// The names that a node may have: its own, and perhaps another one's.
    moves: Option<(&'static str, &'static str)>,
}

fn index(disk: &SimDisk, survey: &Survey, name: &str) -> usize {
    survey.find(disk, &path(name)).unwrap()
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn delete(disk: &SimDisk, survey: &Survey, name: &str, keep: Keep) -> Result<Prepared> {
    delete_in(disk, survey, name, DeleteMode::Single, keep)
}

fn delete_in(disk: &SimDisk, survey: &Survey, name: &str, mode: DeleteMode, keep: Keep) -> Result<Prepared> {
    let family = Family::of(survey, Path::new(DIR))?;
    prepare(disk, survey, &family, &DeleteRequest { name: name.into(), mode, keep, whole_tree: false }, true)
}

fn merge(disk: &SimDisk, survey: &Survey, keep: Keep) -> Result<Prepared> {
    prepare_merge(disk, survey, (index(disk, survey, "D"), index(disk, survey, "P")), &keep, true)
}

fn rebase(disk: &SimDisk, survey: &Survey, onto: Option<&str>) -> Result<Prepared> {
    let onto = onto.map(|name| Onto {
        path: path(name),
        absolute: false,
        file: Some(index(disk, survey, name)),
        format: FileFormat::Qcow2,
    });
    let request = RebaseRequest { image: index(disk, survey, "E"), onto, unchecked: false };
    prepare_rebase(disk, survey, &request, true)
}

/// P <- N <- D <- E, and F on D: the run above P has no other readers.
const OPERATIONS: &[Operation] = &[
    Operation { name: "delete", plan: |d, s| delete(d, s, "N", Keep::Child), goes: &["N"], moves: None },
    Operation {
        name: "delete, the parent's name",
        plan: |d, s| delete(d, s, "N", Keep::Parent(None)),
        goes: &["N"],
        moves: Some(("D", "N")),
    },
    Operation {
        name: "delete with two dependents",
        plan: |d, s| delete(d, s, "D", Keep::Parent(Some("E".into()))),
        goes: &["D"],
        moves: Some(("E", "D")),
    },
    Operation {
        name: "delete the root",
        plan: |d, s| delete(d, s, "P", Keep::Child),
        goes: &["P"],
        moves: None,
    },
    Operation {
        name: "delete with all that stands on it",
        plan: |d, s| delete_in(d, s, "D", DeleteMode::Children, Keep::Child),
        goes: &["D", "E", "F"],
        moves: None,
    },
    Operation {
        name: "delete what stands on it",
        plan: |d, s| delete_in(d, s, "D", DeleteMode::ChildrenOnly, Keep::Child),
        goes: &["E", "F"],
        moves: None,
    },
    Operation { name: "merge", plan: |d, s| merge(d, s, Keep::Child), goes: &["N", "P"], moves: None },
    Operation {
        name: "merge, the base's name",
        plan: |d, s| merge(d, s, Keep::Parent(None)),
        goes: &["N", "P"],
        moves: Some(("D", "P")),
    },
    Operation {
        name: "merge, a new name",
        plan: |d, s| merge(d, s, Keep::Named(path("X"))),
        goes: &["N", "P"],
        moves: Some(("D", "X")),
    },
    Operation {
        name: "commit",
        // It is refused where P is longer.
        plan: |d, s| merge(d, s, Keep::Both).or_else(|_| merge(d, s, Keep::Child)),
        goes: &["N", "P"],
        moves: None,
    },
    Operation { name: "rebase", plan: |d, s| rebase(d, s, Some("F")), goes: &[], moves: None },
    Operation { name: "rebase onto nothing", plan: |d, s| rebase(d, s, None), goes: &[], moves: None },
];

/// Images of a few clusters, each written here and there.
fn build(rng: &mut Rng) -> SimDisk {
    let disk = SimDisk::new(Path::new(DIR));
    let sectors = 16 + rng.below(48);
    for (name, backing) in
        [("P", None), ("N", Some("P")), ("D", Some("N")), ("E", Some("D")), ("F", Some("D"))]
    {
        let version = if rng.chance(25) { Version::V2 } else { Version::V3 };
        let backing = backing.map(|b: &str| BackingFile { name: b.into(), format: Some(b"qcow2".to_vec()) });
        let size = if rng.chance(80) { sectors * 512 } else { (8 + rng.below(64)) * 512 };
        let cluster_bits = 9 + u32::try_from(rng.below(4)).unwrap();
        let options = CreateOptions { size, cluster_bits, version, backing, ..CreateOptions::default() };
        create(&disk, &path(name), &options).unwrap();
        let writer = open_writer(&disk, &path(name), &trusting()).unwrap();
        let most = *rng.pick(&[3, 12]);
        for _ in 0..rng.below(most) {
            let at = rng.below(size / 512) * 512;
            let len = ((1 + rng.below(6)) * 512).min(size - at);
            match rng.below(5) {
                0 => writer.write_zeroes(at, len, rng.chance(50)).unwrap(),
                _ => {
                    let byte = u8::try_from(1 + rng.below(255)).unwrap();
                    writer.write_at(at, &vec![byte; usize::try_from(len).unwrap()]).unwrap();
                }
            }
        }
        writer.close().unwrap();
    }
    disk
}

fn trusting() -> SourceOptions {
    let trust = Trust { everything: true, ..Trust::default() };
    SourceOptions { format: Some(FileFormat::Qcow2), trust, ..SourceOptions::default() }
}

fn survey(disk: &SimDisk) -> Survey {
    Survey::of_directories(disk, &[DIR.into()], &Trust::default()).unwrap()
}

/// What a node reads as.
fn read(disk: &SimDisk, name: &str) -> std::result::Result<Vec<u8>, String> {
    let source = Source::open(disk, &path(name), &trusting()).map_err(|e| e.full())?;
    let mut bytes = vec![0; usize::try_from(source.chain.size()).unwrap()];
    source.chain.read_at(0, &mut bytes).map_err(|e| e.to_string())?;
    for layer in source.chain.layers() {
        if let Layer::Qcow2(image) = &**layer {
            let report = check(image).map_err(|e| e.to_string())?;
            if report.errors > 0 {
                return Err(format!("{} errors", report.errors));
            }
        }
    }
    Ok(bytes)
}

struct Case<'a> {
    operation: &'a Operation,
    before: BTreeMap<String, Vec<u8>>,
}

impl Case<'_> {
    /// Every node that stays reads as before, under one of its names.
    fn nodes(&self, disk: &SimDisk, before: &BTreeMap<String, Vec<u8>>, when: &str) {
        for (name, bytes) in before.iter().filter(|(n, _)| !self.operation.goes.contains(&n.as_str())) {
            let found = read(disk, self.file_of(name, &|name| disk.stat(&path(name)).is_ok()));
            assert_eq!(found.as_ref(), Ok(bytes), "{when}: {name} reads differently");
        }
    }

    /// What a node's file is called now.
    fn file_of<'n>(&self, name: &'n str, there: &dyn Fn(&str) -> bool) -> &'n str {
        let moved = self.operation.moves.filter(|(mover, _)| *mover == name).map(|(_, heir)| heir);
        if there(name) { name } else { moved.unwrap_or(name) }
    }

    /// Somebody who knows of nothing writes to an image on which no other stands.
    fn write_somewhere(&self, disk: &SimDisk, when: &str) {
        let left =
            ["E", "F"].into_iter().find(|n| !self.operation.goes.contains(n) && disk.stat(&path(n)).is_ok());
        // A node that goes is nobody's to write to, and one that stands below another neither.
        let Some(name) = left else { return };
        let writer =
            open_writer(disk, &path(name), &trusting()).unwrap_or_else(|e| panic!("{when}: {}", e.full()));
        let at = writer.size() / 1024 * 512;
        writer
            .write_at(at, &[0xee; 512])
            .and_then(|()| writer.close())
            .unwrap_or_else(|e| panic!("{when}: {e}"));
        let mut then = self.before.clone();
        let at = usize::try_from(at).unwrap();
        then.get_mut(name).unwrap()[at..at + 512].fill(0xee);
        let when = format!("{when}; then a write to {name}");
        self.nodes(disk, &then, &when);
        let resumed = resume(disk, &[DIR.into()], &Watch::new());
        resumed.unwrap_or_else(|e| panic!("{when}: resume: {} {:?}", e.full(), e.path));
        self.nodes(disk, &then, &format!("{when}; then resume"));
    }
}

impl Subject for Case<'_> {
    fn act(&self, disk: &SimDisk) -> std::result::Result<(), String> {
        let all = survey(disk);
        let prepared = (self.operation.plan)(disk, &all).map_err(|e| e.full())?;
        execute(disk, &all, prepared, &Watch::new()).map(drop).map_err(|e| e.full())
    }

    fn ways(&self) -> &'static [&'static str] {
        &["resume", "resume", "undo"]
    }

    fn recover(&self, disk: &SimDisk, way: &str) -> std::result::Result<(), String> {
        if way == "undo" {
            match undo(disk, &[DIR.into()]) {
                Ok(undone) if !undone.is_empty() => {
                    let before = self.before.iter().all(|(n, bytes)| read(disk, n).as_ref() == Ok(bytes));
                    return if before {
                        Ok(())
                    } else {
                        Err(format!("taken back, but not as before: {undone:?}"))
                    };
                }
                Err(e) if e.kind != ErrorKind::Refused => return Err(e.full()),
                Ok(_) | Err(_) => {}
            }
        }
        resume(disk, &[DIR.into()], &Watch::new()).map(drop).map_err(|e| e.full())
    }

    fn always(&self, disk: &SimDisk, when: &str) {
        self.nodes(disk, &self.before, when);
        self.write_somewhere(disk, when);
    }

    fn in_the_end(&self, disk: &SimDisk, _: &str, when: &str) {
        self.nodes(disk, &self.before, when);
        for (name, _) in disk.contents().names() {
            assert_eq!(name.parent(), Some(Path::new(DIR)), "{when}: left over");
            let image = Image::open(disk.open(name, Access::Read).unwrap()).unwrap();
            let report = check(&image).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{when}: {name:?}");
        }
    }

    fn by_stock(&self, dir: &Path, when: &str) {
        for (name, bytes) in self.before.iter().filter(|(n, _)| !self.operation.goes.contains(&n.as_str())) {
            let file = dir.join(self.file_of(name, &|name| dir.join(name).exists()));
            let check = oracle::check(&file, Format::Qcow2);
            let dirty = || oracle::info(&file)["dirty-flag"] == true;
            assert!(check.is_safe() || dirty(), "{when}: {name}: {}", check.text);
            let raw = dir.join("raw");
            oracle::qemu_img(&["convert", "-O", "raw", text(&file), text(&raw)]);
            assert!(std::fs::read(&raw).unwrap() == *bytes, "{when}: stock QEMU reads {name} differently");
        }
    }
}

/// One tree, one operation, every state. Returns how many there were.
fn run(seed: u64, operation: &Operation, effort: Effort) -> usize {
    let _seed = OnFailure::print_seed(seed, format!("crash: {}", operation.name));
    let mut rng = Rng::new(seed);
    let start = build(&mut rng).contents();
    let names: Vec<String> =
        start.names().map(|(p, _)| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let before =
        names.into_iter().map(|n| (n.clone(), read(&SimDisk::of(start.clone()), &n).unwrap())).collect();
    endings(&start, &Case { operation, before }, effort, &mut rng)
}

#[test]
fn no_crash_loses_anything() {
    crash_rounds(OPERATIONS, 10, run);
}
