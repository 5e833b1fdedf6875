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
use pleach_engine::{Keep, Result, Source, SourceOptions, Watch, open_writer, resume, undo};
use pleach_image::{CreateOptions, Image, check, create};
use pleach_lineage::{DeleteMode, Record, Storage};
use pleach_store::{Access, Disk};
use pleach_testkit::sim::{Contents, SimDisk};
use pleach_testkit::{OnFailure, Rng, chosen_seed};

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
    let sector = |bytes: &[u8]| {
        let same = bytes.iter().all(|b| *b == bytes[0]);
        if same { format!("{:02x}", bytes[0]) } else { format!("<{bytes:02x?}>") }
    };
    Ok(bytes.chunks(512).map(sector).collect())
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

struct Case {
    label: String,
    before: (Record, States),
    after: (Record, States),
}

impl Case {
    /// Every node that stays reads as before, from where it was or from where it will be.
    fn nodes(&self, disk: &SimDisk, text: &str) {
        let later: BTreeMap<_, _> = self.after.1.iter().collect();
        for (key, (was, bytes)) in self.before.1.iter().filter(|(key, _)| !key.0.is_empty()) {
            let Some((will, _)) = later.get(key) else { continue };
            let found = [read(disk, was), read(disk, will)];
            assert!(
                found.iter().any(|f| f.as_ref() == Ok(bytes)),
                "{}: {text}: {key:?} at {was:?} or {will:?} reads differently: {found:?}",
                self.label
            );
        }
    }

    /// The tree is the one that it was, or is to be, on all disks.
    fn whole(&self, disk: &SimDisk, text: &str, may_be_new: bool) {
        let tree = load(disk);
        let record = &tree.catalog.record;
        assert!(tree.missing.is_empty(), "{}: {text}: {:?}", self.label, tree.missing);
        assert!(tree.differences.is_empty(), "{}: {text}: {:?}", self.label, tree.differences);
        let now = (record.clone(), states(disk, record));
        if !(may_be_new && now == self.after) {
            assert_eq!(now, self.before, "{}: {text}", self.label);
        }
        let files: Vec<PathBuf> = record.files().into_iter().map(|f| Path::new(DIR).join(f)).collect();
        for (name, _) in disk.contents().names() {
            if name == Path::new(CATALOG) {
                continue;
            }
            assert!(files.iter().any(|f| f == name), "{}: {text}: {name:?} is left over", self.label);
            let image = Image::open(disk.open(name, Access::Read).unwrap()).unwrap();
            let report = check(&image).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{}: {text}: {name:?}", self.label);
        }
    }

    fn judge(&self, state: &Contents, text: &str) {
        let disk = SimDisk::of(state.clone());
        self.nodes(&disk, text);
        let back = SimDisk::of(state.clone());
        if undo(&back, &[DIR.into()]).is_ok_and(|undone| !undone.is_empty()) {
            self.whole(&back, &format!("{text}, then undo"), false);
        }
        let resumed = resume(&disk, &[DIR.into()], &Watch::new());
        resumed.unwrap_or_else(|e| panic!("{}: {text}: resume: {} {:?}", self.label, e.full(), e.path));
        self.whole(&disk, &format!("{text}, then resume"), true);
        let done = disk.contents();
        assert_eq!(resume(&disk, &[DIR.into()], &Watch::new()).unwrap(), [], "{}: {text}", self.label);
        assert_eq!(disk.contents(), done, "{}: {text}: a second resume changes something", self.label);
    }
}

/// One tree, one operation, every state. Returns how many there were.
fn run(seed: u64, operation: &Operation) -> usize {
    let _seed = OnFailure::print_seed(seed, "crash_trees");
    let mut rng = Rng::new(seed);
    let start = build(&mut rng).contents();
    let disk = SimDisk::of(start.clone());
    let tree = load(&disk);
    let before = (tree.catalog.record.clone(), states(&disk, &tree.catalog.record));
    let job = (operation.plan)(&disk, &tree).unwrap();
    disk.record();
    job.run(&disk, &Watch::new()).unwrap();
    let record = load(&disk).catalog.record;
    let after = (record.clone(), states(&disk, &record));
    let case = Case { label: format!("seed {seed}, {}", operation.name), before, after };
    case.whole(&disk, "done", true);
    let mut count = 0;
    let mut judge = |state: Contents, text: &str| {
        count += 1;
        case.judge(&state, text);
    };
    disk.kills(&mut judge);
    disk.power_losses(&mut rng, 2, &mut judge);
    for n in 0..disk.changes() {
        let failing = SimDisk::of(start.clone());
        let tree = load(&failing);
        let job = (operation.plan)(&failing, &tree).unwrap();
        failing.fail_after(Some(n));
        let failed = job.run(&failing, &Watch::new());
        assert!(failed.is_err(), "{}: change {n} fails, and nobody says so", case.label);
        judge(failing.contents(), &format!("change {n} fails, and all after it"));
    }
    count
}

#[test]
fn all_disks_are_old_or_all_are_new() {
    let wanted: Option<usize> = std::env::var("PLEACH_CRASH_STATES").ok().and_then(|n| n.parse().ok());
    let (mut count, mut seed) = (0, chosen_seed().unwrap_or(1));
    let mut rounds = 0;
    while rounds < 1 || wanted.is_some_and(|wanted| count < wanted) {
        for operation in OPERATIONS {
            count += run(seed, operation);
            seed += 1;
        }
        rounds += 1;
    }
    println!("{count} states");
}
