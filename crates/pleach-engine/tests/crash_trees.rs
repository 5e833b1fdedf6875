//! Verbs on a tree of two disks, on a disk in memory: whatever a kill, a loss of power or a failing disk leaves, every node
//! that stays reads right before anything else is run; `resume` makes all disks old or all new; and what `undo` takes back
//! is as before.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pleach_engine::survey::{FileFormat, Trust};
use pleach_engine::tree::Tree;
use pleach_engine::verbs::{
    Job, RemoveRequest, RevertRequest, TakeKind, TakeRequest, Unsaved, remove, rename, revert, take,
};
use pleach_engine::{ErrorKind, Keep, Result, Source, SourceOptions, Watch, open_writer, resume, undo};
use pleach_image::{CreateOptions, Image, check, create};
use pleach_lineage::{DeleteMode, Record, Storage};
use pleach_store::{Access, Disk};
use pleach_testkit::oracle::{self, Format, text};
use pleach_testkit::sim::{Effort, SimDisk, Subject, crash_rounds, endings};
use pleach_testkit::{OnFailure, Rng, Tool};

const DIR: &str = "/d";
const CATALOG: &str = "/d/.pleach/vm.tree";
const WHEN: i64 = 1_700_000_000;

/// What is done.
struct Operation {
    name: &'static str,
    plan: fn(&SimDisk, &Tree) -> Result<Job>,
}

fn taken(disk: &SimDisk, tree: &Tree, kind: TakeKind) -> Result<Job> {
    let request =
        TakeRequest { name: "new".into(), created: WHEN, kind: Some(kind), ..TakeRequest::default() };
    take(disk, tree, &request)
}

fn reverted(disk: &SimDisk, tree: &Tree, name: &str, unsaved: Unsaved) -> Result<Job> {
    let request = RevertRequest { name: name.into(), unsaved, created: WHEN, ..RevertRequest::default() };
    revert(disk, tree, &request)
}

fn removed(disk: &SimDisk, tree: &Tree, name: &str, mode: DeleteMode) -> Result<Job> {
    let request = RemoveRequest {
        name: name.into(),
        mode,
        keep: Keep::Child,
        whole_tree: false,
        files: BTreeMap::new(),
        created: WHEN,
    };
    remove(disk, tree, &request)
}

/// The tree is e1 <- i1 <- e2 <- i2, the machine stands on i2; e1 and e2 are external, i1 and i2 internal.
const OPERATIONS: &[Operation] = &[
    Operation { name: "take external", plan: |d, t| taken(d, t, TakeKind::External) },
    Operation { name: "take internal", plan: |d, t| taken(d, t, TakeKind::Internal) },
    Operation { name: "revert in place", plan: |d, t| reverted(d, t, "i2", Unsaved::Discard) },
    Operation { name: "revert to an external one", plan: |d, t| reverted(d, t, "e1", Unsaved::Discard) },
    Operation { name: "revert by a copy", plan: |d, t| reverted(d, t, "i1", Unsaved::Discard) },
    Operation { name: "revert and save", plan: |d, t| reverted(d, t, "e2", Unsaved::SaveAs("kept".into())) },
    Operation { name: "delete internal", plan: |d, t| removed(d, t, "i1", DeleteMode::Single) },
    Operation { name: "delete the current", plan: |d, t| removed(d, t, "i2", DeleteMode::Single) },
    Operation { name: "delete external", plan: |d, t| removed(d, t, "e1", DeleteMode::Single) },
    Operation {
        name: "delete what stands on it",
        plan: |d, t| removed(d, t, "e1", DeleteMode::ChildrenOnly),
    },
    Operation { name: "rename", plan: |d, t| rename(d, t, "i2", "renamed") },
];

fn trusting() -> SourceOptions {
    let trust = Trust { everything: true, ..Trust::default() };
    SourceOptions { format: Some(FileFormat::Qcow2), trust, ..SourceOptions::default() }
}

fn load(disk: &SimDisk) -> Tree {
    Tree::load(disk, Path::new(CATALOG), &[], &Trust::default()).unwrap()
}

/// Writes here and there into the active image of each disk.
fn scribble(disk: &SimDisk, rng: &mut Rng) {
    for active in load(disk).catalog.record.disks.iter().filter_map(|d| d.active.clone()) {
        let writer = open_writer(disk, &Path::new(DIR).join(active), &trusting()).unwrap();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(writer.size() / 512) * 512;
            let byte = u8::try_from(1 + rng.below(255)).unwrap();
            writer.write_at(at, &[byte; 512]).unwrap();
        }
        writer.close().unwrap();
    }
}

fn build(rng: &mut Rng) -> SimDisk {
    let disk = SimDisk::new(Path::new(DIR));
    let mut disks = Vec::new();
    for name in ["a", "b"] {
        let path = Path::new(DIR).join(name);
        let cluster_bits = 9 + u32::try_from(rng.below(3)).unwrap();
        let size = (8 + rng.below(24)) * 512;
        create(&disk, &path, &CreateOptions { size, cluster_bits, ..CreateOptions::default() }).unwrap();
        disks.push((format!("vd{name}"), path));
    }
    let mut tree = Tree::adopt(&disk, Path::new(DIR), "vm", &disks, &[], &Trust::default()).unwrap();
    for (name, kind) in [
        ("e1", TakeKind::External),
        ("i1", TakeKind::Internal),
        ("e2", TakeKind::External),
        ("i2", TakeKind::Internal),
    ] {
        let request =
            TakeRequest { name: name.into(), created: WHEN, kind: Some(kind), ..TakeRequest::default() };
        take(&disk, &tree, &request).unwrap().run(&disk, &Watch::new()).unwrap();
        scribble(&disk, rng);
        tree = load(&disk);
    }
    disk
}

/// What a disk reads as, short enough to be printed: the byte that each sector is full of, two digits each.
type Content = String;

fn read(disk: &SimDisk, storage: &Storage) -> std::result::Result<Content, String> {
    let snapshot = match storage {
        Storage::Internal { id, .. } => Some(id.clone()),
        Storage::External { .. } => None,
    };
    let path = Path::new(DIR).join(storage.file());
    let source =
        Source::open(disk, &path, &SourceOptions { snapshot, ..trusting() }).map_err(|e| e.full())?;
    let mut bytes = vec![0; usize::try_from(source.chain.size()).unwrap()];
    source.chain.read_at(0, &mut bytes).map_err(|e| e.to_string())?;
    Ok(short(&bytes))
}

fn short(bytes: &[u8]) -> Content {
    let sector = |bytes: &[u8]| {
        let same = bytes.iter().all(|b| *b == bytes[0]);
        if same { format!("{:02x}", bytes[0]) } else { format!("<{bytes:02x?}>") }
    };
    bytes.chunks(512).map(sector).collect()
}

/// What one node keeps of one disk, and where that was found.
type States = BTreeMap<(String, String), (Storage, Content)>;

/// What every snapshot reads as, and the active images under the name of none.
fn states(disk: &SimDisk, record: &Record) -> States {
    let mut found = States::new();
    for node in &record.nodes {
        for (of, storage) in &node.storage {
            found.insert((node.name.clone(), of.clone()), (storage.clone(), read(disk, storage).unwrap()));
        }
    }
    for of in &record.disks {
        let storage = Storage::External { file: of.active.clone().unwrap() };
        found.insert((String::new(), of.name.clone()), (storage.clone(), read(disk, &storage).unwrap()));
    }
    found
}

struct Case<'a> {
    operation: &'a Operation,
    before: (Record, States),
    after: (Record, States),
}

impl Case<'_> {
    /// Every node that stays reads as before, from where it was or from where it will be.
    fn nodes(&self, disk: &SimDisk, when: &str) {
        for (key, places, content) in self.kept() {
            let found = places.map(|place| read(disk, place));
            assert!(
                found.iter().any(|f| f.as_ref() == Ok(content)),
                "{when}: {key:?} at {places:?} reads differently: {found:?}"
            );
        }
    }

    /// The tree is the one that it was, or is to be, on all disks.
    fn whole(&self, disk: &SimDisk, when: &str, may_be_new: bool) {
        let tree = load(disk);
        let record = &tree.catalog.record;
        assert!(tree.missing.is_empty(), "{when}: {:?}", tree.missing);
        assert!(tree.differences.is_empty(), "{when}: {:?}", tree.differences);
        let now = (record.clone(), states(disk, record));
        if !(may_be_new && now == self.after) {
            assert_eq!(now, self.before, "{when}");
        }
        let files: Vec<PathBuf> = record.files().into_iter().map(|f| Path::new(DIR).join(f)).collect();
        for (name, _) in disk.contents().names() {
            if name == Path::new(CATALOG) {
                continue;
            }
            assert!(files.iter().any(|f| f == name), "{when}: {name:?} is left over");
            let image = Image::open(disk.open(name, Access::Read).unwrap()).unwrap();
            let report = check(&image).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{when}: {name:?}");
        }
    }

    /// Where a snapshot's storage may be, and what it holds.
    fn kept(&self) -> impl Iterator<Item = (&(String, String), [&Storage; 2], &Content)> {
        let later: BTreeMap<_, _> = self.after.1.iter().collect();
        self.before.1.iter().filter(|(key, _)| !key.0.is_empty()).filter_map(move |(key, (was, content))| {
            later.get(key).map(|(will, _)| (key, [was, will], content))
        })
    }
}

impl Subject for Case<'_> {
    fn act(&self, disk: &SimDisk) -> std::result::Result<(), String> {
        let job = (self.operation.plan)(disk, &load(disk)).map_err(|e| e.full())?;
        job.run(disk, &Watch::new()).map(drop).map_err(|e| e.full())
    }

    fn ways(&self) -> &'static [&'static str] {
        &["resume", "undo"]
    }

    fn recover(&self, disk: &SimDisk, way: &str) -> std::result::Result<(), String> {
        if way == "undo" {
            match undo(disk, &[DIR.into()]) {
                Ok(undone) if !undone.is_empty() => {
                    self.whole(disk, "taken back", false);
                    return Ok(());
                }
                Err(e) if e.kind != ErrorKind::Refused => return Err(e.full()),
                Ok(_) | Err(_) => {}
            }
        }
        resume(disk, &[DIR.into()], &Watch::new()).map(drop).map_err(|e| e.full())
    }

    fn always(&self, disk: &SimDisk, when: &str) {
        self.nodes(disk, when);
    }

    fn in_the_end(&self, disk: &SimDisk, _: &str, when: &str) {
        self.whole(disk, when, true);
    }

    fn by_stock(&self, dir: &Path, when: &str) {
        for (key, places, content) in self.kept() {
            let read = |storage: &&Storage| {
                let (file, raw) = (dir.join(storage.file()), dir.join("raw"));
                let mut command = vec!["convert", "-O", "raw"];
                let chosen;
                if let Storage::Internal { id, .. } = storage {
                    chosen = format!("snapshot.id={id}");
                    command.extend(["-l", &chosen]);
                }
                command.extend([text(&file), text(&raw)]);
                let done = Tool::new("qemu-img").run(&command);
                (done.code == Some(0)).then(|| short(&std::fs::read(&raw).unwrap()))
            };
            assert!(
                places.iter().any(|place| read(place).as_ref() == Some(content)),
                "{when}: stock QEMU reads {key:?} differently"
            );
        }
        for file in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
            // No tool opens a copy that is not whole yet.
            let whole = file.extension().is_none_or(|e| e != "partial");
            if whole && std::fs::read(&file).unwrap().starts_with(b"QFI") {
                let check = oracle::check(&file, Format::Qcow2);
                let dirty = || oracle::info(&file)["dirty-flag"] == true;
                assert!(check.is_safe() || dirty(), "{when}: {file:?}: {}", check.text);
            }
        }
    }
}

/// One tree, one operation, every state. Returns how many there were.
fn run(seed: u64, operation: &Operation, effort: Effort) -> usize {
    let _seed = OnFailure::print_seed(seed, format!("crash_trees: {}", operation.name));
    let mut rng = Rng::new(seed);
    let start = build(&mut rng).contents();
    let disk = SimDisk::of(start.clone());
    let tree = load(&disk);
    let before = (tree.catalog.record.clone(), states(&disk, &tree.catalog.record));
    (operation.plan)(&disk, &tree).unwrap().run(&disk, &Watch::new()).unwrap();
    let record = load(&disk).catalog.record;
    let after = (record.clone(), states(&disk, &record));
    let case = Case { operation, before, after };
    case.whole(&disk, "done", true);
    endings(&start, &case, effort, &mut rng)
}

#[test]
fn all_disks_are_old_or_all_are_new() {
    crash_rounds(OPERATIONS, 5, run);
}
