//! Operations on a disk in memory: whatever a kill, a loss of power or a failing disk leaves, every node that stays reads
//! right before anything else is run, `resume` finishes, and a second `resume` finds nothing to do.
//!
//! `PLEACH_CRASH_STATES=n` goes on with further seeds until that many states were judged (`cargo xtask crash n`).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pleach_engine::family::Family;
use pleach_engine::survey::{FileFormat, Survey, Trust};
use pleach_engine::{
    DeleteRequest, Keep, Onto, Prepared, RebaseRequest, Result, Source, SourceOptions, Watch, execute,
    open_writer, prepare, prepare_merge, prepare_rebase, resume,
};
use pleach_format::{BackingFile, Version};
use pleach_image::{CreateOptions, Image, Layer, check, create};
use pleach_lineage::DeleteMode;
use pleach_store::{Access, Disk};
use pleach_testkit::sim::{Contents, SimDisk};
use pleach_testkit::{OnFailure, Rng, chosen_seed};

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
    let family = Family::of(survey, Path::new(DIR))?;
    let request = DeleteRequest { name: name.into(), mode: DeleteMode::Single, keep, whole_tree: false };
    prepare(disk, survey, &family, &request, true)
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
    label: String,
}

impl Case<'_> {
    /// Every node that stays reads as before, under one of its names.
    fn nodes(&self, disk: &SimDisk, text: &str) {
        for (name, bytes) in self.before.iter().filter(|(n, _)| !self.operation.goes.contains(&n.as_str())) {
            let moved = self.operation.moves.filter(|(mover, _)| mover == name).map(|(_, heir)| heir);
            let there = disk.stat(&path(name)).is_ok();
            let found = read(disk, if there { name } else { moved.unwrap_or(name) });
            assert_eq!(found.as_ref(), Ok(bytes), "{}: {text}: {name} reads differently", self.label);
        }
    }

    /// Nothing is lost in this state, and `resume` makes it whole.
    fn judge(&self, state: Contents, text: &str) {
        let disk = SimDisk::of(state);
        self.nodes(&disk, text);
        let resumed = resume(&disk, &[DIR.into()], &Watch::new());
        resumed.unwrap_or_else(|e| panic!("{}: {text}: resume: {} {:?}", self.label, e.full(), e.path));
        self.nodes(&disk, &format!("{text}, then resume"));
        for (name, _) in disk.contents().names() {
            assert_eq!(name.parent(), Some(Path::new(DIR)), "{}: {text}: left over", self.label);
            let image = Image::open(disk.open(name, Access::Read).unwrap()).unwrap();
            let report = check(&image).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{}: {text}: {name:?}", self.label);
        }
        let done = disk.contents();
        assert_eq!(resume(&disk, &[DIR.into()], &Watch::new()).unwrap(), [], "{}: {text}", self.label);
        assert_eq!(disk.contents(), done, "{}: {text}: a second resume changes something", self.label);
    }
}

/// One tree, one operation, every state. Returns how many there were.
fn run(seed: u64, operation: &Operation) -> usize {
    let _seed = OnFailure::print_seed(seed, "crash");
    let mut rng = Rng::new(seed);
    let start = build(&mut rng).contents();
    let names: Vec<String> =
        start.names().map(|(p, _)| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let before =
        names.into_iter().map(|n| (n.clone(), read(&SimDisk::of(start.clone()), &n).unwrap())).collect();
    let case = Case { operation, before, label: format!("seed {seed}, {}", operation.name) };
    let disk = SimDisk::of(start.clone());
    let all = survey(&disk);
    let prepared = (operation.plan)(&disk, &all).unwrap();
    disk.record();
    execute(&disk, &all, prepared, &Watch::new()).unwrap();
    let mut states = 0;
    let mut judge = |state: Contents, text: &str| {
        states += 1;
        case.judge(state, text);
    };
    disk.kills(&mut judge);
    disk.power_losses(&mut rng, 4, &mut judge);
    for n in 0..disk.changes() {
        let failing = SimDisk::of(start.clone());
        let all = survey(&failing);
        let prepared = (operation.plan)(&failing, &all).unwrap();
        failing.fail_after(Some(n));
        let failed = execute(&failing, &all, prepared, &Watch::new());
        assert!(failed.is_err(), "{}: change {n} fails, and nobody says so", case.label);
        judge(failing.contents(), &format!("change {n} fails, and all after it"));
    }
    states
}

#[test]
fn no_crash_loses_anything() {
    let wanted: Option<usize> = std::env::var("PLEACH_CRASH_STATES").ok().and_then(|n| n.parse().ok());
    let (mut states, mut seed) = (0, chosen_seed().unwrap_or(1));
    let mut rounds = 0;
    while rounds < 2 || wanted.is_some_and(|wanted| states < wanted) {
        for operation in OPERATIONS {
            states += run(seed, operation);
            seed += 1;
        }
        rounds += 1;
    }
    println!("{states} states");
}
