//! The order in which new files reach the disk: whole and durable first, then the header, then the name, then its directory.
//! Taking out any flush of `create`, of `convert` or of a repair's undo file makes this fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pleach_engine::convert::{NewImage, Target, convert};
use pleach_engine::{Repair, Source, SourceOptions, Watch};
use pleach_format::DataFile;
use pleach_image::{CreateOptions, NewDataFile, Preallocation, RepairMode, create};
use pleach_store::{Access, Disk, LockError, RealDisk, Role, Stat, Store, Window};

/// What was done, in order: to a file by its first name, or to a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Write(PathBuf, u64),
    Flush(PathBuf),
    Name(PathBuf),
    Directory,
}

type Log = Arc<Mutex<Vec<Event>>>;

/// The operating system's disk, with a record.
#[derive(Debug)]
struct Recorder(Log);

#[derive(Debug)]
struct Recorded {
    store: Arc<dyn Store>,
    path: PathBuf,
    log: Log,
}

impl Recorder {
    fn note(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }

    fn recorded(&self, store: Arc<dyn Store>, path: &Path) -> Arc<dyn Store> {
        Arc::new(Recorded { store, path: path.to_owned(), log: Arc::clone(&self.0) })
    }
}

impl Recorded {
    fn wrote(&self, offset: u64) {
        self.log.lock().unwrap().push(Event::Write(self.path.clone(), offset));
    }
}

impl Disk for Recorder {
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        RealDisk.list(dir)
    }
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        RealDisk.stat(path)
    }
    fn is_symlink(&self, path: &Path) -> bool {
        RealDisk.is_symlink(path)
    }
    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        RealDisk.canonical(path)
    }
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Store>> {
        Ok(self.recorded(RealDisk.open(path, access)?, path))
    }
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Store>> {
        Ok(self.recorded(RealDisk.create_new(path)?, path))
    }
    fn create_private(&self, path: &Path) -> io::Result<Arc<dyn Store>> {
        Ok(self.recorded(RealDisk.create_private(path)?, path))
    }
    fn user(&self) -> u32 {
        RealDisk.user()
    }
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.make_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.note(Event::Name(from.to_owned()));
        RealDisk.rename(from, to)
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.note(Event::Name(from.to_owned()));
        RealDisk.link(from, to)
    }
    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.note(Event::Name(path.to_owned()));
        RealDisk.unlink(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.note(Event::Directory);
        RealDisk.sync_dir(dir)
    }
    fn copy_attributes(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.copy_attributes(from, to)
    }
}

impl Store for Recorded {
    fn len(&self) -> io::Result<u64> {
        self.store.len()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.store.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.wrote(offset);
        self.store.write_at(offset, bytes)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.wrote(len.max(1));
        self.store.set_len(len)
    }
    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        self.wrote(range.start.max(1));
        self.store.reserve(range)
    }
    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.wrote(range.start.max(1));
        self.store.discard(range)
    }
    fn copy_from(&self, _: &dyn Store, _: u64, _: u64, _: u64) -> io::Result<bool> {
        Ok(false)
    }
    fn barrier(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(Event::Flush(self.path.clone()));
        self.store.barrier()
    }
    fn window(&self) -> io::Result<Window> {
        self.store.window()
    }
    fn lock(&self, role: Role) -> Result<(), LockError> {
        self.store.lock(role)
    }
    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.store.data_ranges(range)
    }
    fn stat(&self) -> io::Result<Stat> {
        self.store.stat()
    }
}

/// Everything that was written to any file is durable before each name is given, and before the last header is written
/// (of `headed` files); the last change of a name is followed by a flush of its directory.
fn judge(log: &[Event], headed: bool, what: &str) {
    let header = log.iter().rposition(|e| matches!(e, Event::Write(_, 0))).filter(|_| headed);
    let mut dirty: Vec<&PathBuf> = Vec::new();
    for (i, event) in log.iter().enumerate() {
        match event {
            Event::Write(path, _) => {
                assert!(
                    header != Some(i) || dirty.is_empty(),
                    "{what}: a header before {dirty:?} is flushed"
                );
                dirty.push(path);
            }
            Event::Flush(path) => dirty.retain(|p| *p != path),
            Event::Name(path) => assert!(dirty.is_empty(), "{what}: {path:?} before {dirty:?} is flushed"),
            Event::Directory => {}
        }
    }
    let name = log.iter().rposition(|e| matches!(e, Event::Name(_)));
    let directory = log.iter().rposition(|e| *e == Event::Directory);
    assert!(directory > name, "{what}: the directory is not flushed after the last name");
    assert!(dirty.is_empty(), "{what}: {dirty:?} is never flushed");
}

fn with_data_file(dir: &Path, name: &str) -> CreateOptions {
    let path = dir.join(name);
    let named = DataFile { name: name.as_bytes().to_vec(), raw: false };
    CreateOptions { size: 4 << 20, data_file: Some(NewDataFile { path, named }), ..CreateOptions::default() }
}

/// The data file has its name, durably, before the image has.
fn data_file_first(log: &[Event], data: &str, image: &str) {
    let named = |name: &str| {
        let is = |e: &Event| matches!(e, Event::Name(p) if p.ends_with(name));
        log.iter().position(is).unwrap_or_else(|| panic!("{name}: {log:?}"))
    };
    let (data, image) = (named(data), named(image));
    assert!(data < image && log[data..image].contains(&Event::Directory), "{log:?}");
}

#[test]
fn new_images_get_their_names_last() {
    let dir = tempfile::tempdir().unwrap();
    let run = |options: &CreateOptions, name: &str| {
        let log = Log::default();
        create(&Recorder(Arc::clone(&log)), &dir.path().join(name), options).unwrap();
        let log = log.lock().unwrap().clone();
        judge(&log, true, name);
        log
    };
    run(&CreateOptions { size: 4 << 20, ..CreateOptions::default() }, "plain");
    let preallocation = Preallocation::Full;
    run(&CreateOptions { size: 4 << 20, preallocation, ..CreateOptions::default() }, "full");
    let log = run(&with_data_file(dir.path(), "data"), "image");
    data_file_first(&log, ".data.partial", ".image.partial");
}

#[test]
fn copies_get_their_names_last() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.raw");
    let bytes: Vec<u8> =
        (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_be_bytes()[3]).collect();
    std::fs::write(&input, bytes).unwrap();
    let source = Source::open(&RealDisk, &input, &SourceOptions::default()).unwrap();
    let plain = NewImage {
        options: CreateOptions::default(),
        below: None,
        compress: None,
        carry: false,
        bitmaps: None,
    };
    let targets = [
        ("raw", Target::Raw(Preallocation::Off)),
        ("qcow2", Target::Qcow2(plain.clone())),
        ("compressed", Target::Qcow2(NewImage { compress: Some(None), ..plain.clone() })),
        ("apart", Target::Qcow2(NewImage { options: with_data_file(dir.path(), "data"), ..plain })),
    ];
    for (name, target) in targets {
        let log = Log::default();
        let disk = Recorder(Arc::clone(&log));
        convert(&disk, &source.chain, &dir.path().join(name), &target, &Watch::new()).unwrap();
        let log = log.lock().unwrap().clone();
        judge(&log, name != "raw", name);
        if name == "apart" {
            data_file_first(&log, ".data.partial", ".apart.partial");
        }
    }
}

#[test]
fn the_way_back_is_durable_before_a_repair_begins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&RealDisk, &path, &CreateOptions { size: 4 << 20, ..CreateOptions::default() }).unwrap();
    // A cluster that is counted, and that nothing leads to.
    let store = RealDisk.open(&path, Access::Write).unwrap();
    store.set_len(8 << 16).unwrap();
    store.write_at((2 << 16) + 2 * 6, &[0, 1]).unwrap();
    drop(store);
    let log = Log::default();
    let disk = Recorder(Arc::clone(&log));
    let repair = Repair::plan(&disk, &path, RepairMode::Leaks, false).unwrap();
    assert_eq!(repair.what().leaks_fixed, 1);
    repair.run(&disk, "now").unwrap();
    let log = log.lock().unwrap().clone();
    let first = log.iter().position(|e| matches!(e, Event::Write(p, _) if *p == path)).unwrap();
    let last = |is: &dyn Fn(&Event) -> bool| log[..first].iter().rposition(is);
    let written = last(&|e| matches!(e, Event::Write(..)));
    let flushed = last(&|e| matches!(e, Event::Flush(_)));
    let directory = last(&|e| *e == Event::Directory);
    assert!(written.is_some() && flushed > written, "{log:?}");
    assert!(directory > written, "{log:?}");
    assert!(matches!(log.last(), Some(Event::Flush(p)) if *p == path), "{log:?}");
}
