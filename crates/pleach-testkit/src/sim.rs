//! A disk in memory that remembers every change, and tells what a kill or a loss of power may leave of them.
//!
//! What is assumed of the medium is in `docs/crash-safety.md`: what was not flushed may be there or not, whatever its order;
//! a write may be torn between sectors of 512 bytes; names change whole, and in order. Directories themselves are there at
//! once, and locks are granted to everybody.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pleach_store::{Access, Disk, FileId, FileKind, LockError, Role, Stat, Store, Window};

use crate::files::WorkDir;
use crate::rng::Rng;
use crate::{chosen_seed, oracle};

const SECTOR: usize = 512;

/// One change.
#[derive(Clone, Debug)]
enum Op {
    Write {
        file: u64,
        offset: usize,
        bytes: Vec<u8>,
    },
    SetLen {
        file: u64,
        len: usize,
    },
    Flush {
        file: u64,
    },
    /// Names that lead to a file, or to nothing, from now on, all at once.
    Names(Vec<(PathBuf, Option<u64>)>),
    FlushDirectory(PathBuf),
}

/// When changes fail, and how.
#[derive(Copy, Clone, Debug)]
pub struct Fault {
    /// Changes that still succeed.
    pub after: usize,
    /// Whether only one fails, and the disk works again then.
    pub once: bool,
    /// The system's number for what is wrong.
    pub errno: i32,
}

/// What a medium with bad places says.
pub const EIO: i32 = 5;
/// What a full file system says.
pub const ENOSPC: i32 = 28;

/// Everything on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    files: BTreeMap<u64, Vec<u8>>,
    names: BTreeMap<PathBuf, u64>,
    directories: BTreeSet<PathBuf>,
}

impl Contents {
    /// The files that a directory has names of, with their names and bytes.
    pub fn names(&self) -> impl Iterator<Item = (&Path, &[u8])> {
        let bytes = |file| self.files.get(file).map_or(&[][..], Vec::as_slice);
        self.names.iter().map(move |(path, file)| (path.as_path(), bytes(file)))
    }

    /// Writes all files into a directory that is there, as if its path were the first part of theirs.
    fn write_to(&self, dir: &Path) {
        for (path, bytes) in self.names() {
            let inside: PathBuf = path.components().skip(2).collect();
            let path = dir.join(inside);
            let home = path.parent().expect("it lies in the directory");
            std::fs::create_dir_all(home)
                .and_then(|()| std::fs::write(&path, bytes))
                .expect("a file written out");
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Write { file, offset, bytes } => {
                let content = self.files.entry(*file).or_default();
                content.resize(content.len().max(offset + bytes.len()), 0);
                if let Some(place) = content.get_mut(*offset..offset + bytes.len()) {
                    place.copy_from_slice(bytes);
                }
            }
            Op::SetLen { file, len } => self.files.entry(*file).or_default().resize(*len, 0),
            Op::Names(names) => {
                for (path, file) in names {
                    self.directories.extend(path.parent().map(Path::to_owned));
                    match file {
                        Some(file) => self.names.insert(path.clone(), *file),
                        None => self.names.remove(path),
                    };
                }
            }
            Op::Flush { .. } | Op::FlushDirectory(_) => {}
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    now: Contents,
    next: u64,
    /// Since when, and what, is remembered.
    recorded: Option<(Contents, Vec<Op>)>,
    /// What goes wrong, if anything does.
    fault: Option<Fault>,
    /// Changes that failed.
    failed: usize,
}

/// A disk in memory.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<Inner>>);

impl SimDisk {
    /// An empty disk with one directory.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        let disk = Self::default();
        disk.inner().now.directories.insert(directory.to_owned());
        disk
    }

    /// A disk with these contents.
    #[must_use]
    pub fn of(contents: Contents) -> Self {
        let next = contents.files.last_key_value().map_or(0, |(file, _)| file + 1);
        Self(Arc::new(Mutex::new(Inner { now: contents, next, ..Inner::default() })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on it, as a reader sees it.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.inner().now.clone()
    }

    /// Takes what is there now as durable, and remembers every change from here on.
    pub fn record(&self) {
        let mut inner = self.inner();
        inner.recorded = Some((inner.now.clone(), Vec::new()));
    }

    /// Lets changes fail from now on as `fault` says; none if that is `None`.
    pub fn fail(&self, fault: Option<Fault>) {
        self.inner().fault = fault;
    }

    /// How many changes were recorded.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.inner().recorded.as_ref().map_or(0, |(_, ops)| ops.len())
    }

    fn change(&self, op: Op) -> io::Result<()> {
        let mut inner = self.inner();
        if let Some(fault) = inner.fault {
            match fault.after.checked_sub(1) {
                Some(after) => inner.fault = Some(Fault { after, ..fault }),
                None => {
                    inner.fault = inner.fault.filter(|f| !f.once);
                    inner.failed += 1;
                    return Err(io::Error::from_raw_os_error(fault.errno));
                }
            }
        }
        inner.now.apply(&op);
        if let Some((_, ops)) = &mut inner.recorded {
            ops.push(op);
        }
        Ok(())
    }

    /// A recorded change, for people.
    fn described(&self, n: usize) -> String {
        let inner = self.inner();
        let op = inner.recorded.as_ref().and_then(|(_, ops)| ops.get(n));
        match op {
            Some(Op::Write { file, offset, bytes }) => {
                format!("{n} (file {file}: {} bytes at {offset})", bytes.len())
            }
            Some(op) => format!("{n} ({op:?})"),
            None => format!("{n}"),
        }
    }

    /// Calls `judge` with every state that a kill may leave: the page cache survives, so what was done up to some instant.
    ///
    /// # Panics
    /// If nothing was recorded.
    pub fn kills(&self, judge: &mut dyn FnMut(Contents, &str)) {
        let (start, ops) = self.inner().recorded.clone().expect("recorded before");
        let mut state = start;
        judge(state.clone(), "killed before the first change");
        for (n, op) in ops.iter().enumerate() {
            state.apply(op);
            judge(state.clone(), &format!("killed after change {n}"));
        }
    }

    /// Calls `judge` with states that a loss of power may leave. Just before each flush, of what was not durable: nothing,
    /// all, each beginning, each change alone, each one missing, `random` more choices; each with the names as flushed, as
    /// they were last, and at each step between; and writes torn at a sector, either part of them missing, or of which only
    /// the file's new length is there.
    ///
    /// # Panics
    /// If nothing was recorded.
    pub fn power_losses(&self, rng: &mut Rng, random: usize, judge: &mut dyn FnMut(Contents, &str)) {
        let (start, ops) = self.inner().recorded.clone().expect("recorded before");
        for (at, op) in ops.iter().enumerate() {
            if !matches!(op, Op::Flush { .. } | Op::FlushDirectory(_)) && at + 1 != ops.len() {
                continue;
            }
            let past = ops.get(..at).unwrap_or(&[]);
            let (durable, pending, names) = split(past);
            let mut sure = start.clone();
            durable.iter().for_each(|op| sure.apply(op));
            for (chosen, what) in choices(pending.len(), rng, random) {
                let mut state = sure.clone();
                chosen.iter().filter_map(|&i| pending.get(i)).for_each(|op| state.apply(op));
                for known in names_to_try(names.len(), &what) {
                    let mut state = state.clone();
                    names.iter().take(known).for_each(|op| state.apply(op));
                    let text =
                        format!("power lost at change {at}: of {} {what}, {known} names", pending.len());
                    judge(state, &text);
                }
            }
            for (i, op) in pending.iter().enumerate() {
                let Op::Write { file, offset, bytes } = op else { continue };
                let mut before = sure.clone();
                pending.iter().take(i).for_each(|op| before.apply(op));
                if let Some(cut) = tear(*offset, bytes.len(), rng) {
                    let (first, second) = bytes.split_at(cut.min(bytes.len()));
                    for (offset, part) in [(*offset, first), (offset + cut, second)] {
                        let mut state = before.clone();
                        state.apply(&Op::Write { file: *file, offset, bytes: part.to_vec() });
                        judge(
                            state,
                            &format!("power lost at change {at}: write {i} torn at {cut}, from {offset}"),
                        );
                    }
                }
                let len = offset + bytes.len();
                if before.files.get(file).is_none_or(|content| content.len() < len) {
                    before.apply(&Op::SetLen { file: *file, len });
                    judge(before, &format!("power lost at change {at}: of write {i} only the length"));
                }
            }
        }
    }
}

/// Something that is done to a disk, and what must hold of everything that is left of it when it ends early.
///
/// # Panics
/// All but [`act`](Self::act) panic where something does not hold, with `when` in the message.
pub trait Subject {
    /// Does it.
    ///
    /// # Errors
    /// Why it could not be done.
    fn act(&self, disk: &SimDisk) -> Result<(), String>;

    /// Ways of recovery: each of them ends well from any state.
    fn ways(&self) -> &'static [&'static str];

    /// Finishes, or takes back, what was begun, in one of the ways.
    ///
    /// # Errors
    /// Why that could not be done.
    fn recover(&self, disk: &SimDisk, way: &str) -> Result<(), String>;

    /// Judges a state as somebody finds it who knows of nothing.
    fn always(&self, disk: &SimDisk, when: &str);

    /// Judges a state after a recovery in one of the ways.
    fn in_the_end(&self, disk: &SimDisk, way: &str, when: &str);

    /// Judges a state by other tools: its files are in `dir`.
    fn by_stock(&self, dir: &Path, when: &str);
}

/// How thorough [`endings`] is.
#[derive(Copy, Clone, Debug)]
pub struct Effort {
    /// Choices at random of what a loss of power leaves, besides those that are made each time.
    pub random: usize,
    /// Of so many states one is judged; 1 judges all.
    pub one_in: u64,
    /// Of so many states that are judged, in one the recovery is ended early itself, in every way.
    pub deep_one_in: u64,
    /// Of so many states that are judged, one is judged by other tools as well.
    pub stock_one_in: u64,
}

/// Everything that kills, losses of power and failing changes leave of `subject` done to `start`, judged, recovered in one
/// of the ways, judged again, and recovered once more without any effect. Returns how many states were judged.
///
/// # Panics
/// If anything does not hold.
pub fn endings(start: &Contents, subject: &dyn Subject, effort: Effort, rng: &mut Rng) -> usize {
    let mut endings = Endings { subject, effort, judged: 0 };
    let mut chance = Rng::new(rng.bits());
    each_ending(start, &|disk| subject.act(disk), effort.random, rng, &mut |state, when| {
        if chance.below(effort.one_in) == 0 {
            endings.judge(&state, when, &mut chance);
        }
    });
    endings.judged
}

/// Runs `run` on each of `operations` with one seed after the other, `rounds` times; or, if `PLEACH_CRASH_STATES` is a number,
/// with every state judged, until there were so many; or once with the seed that `PLEACH_SEED` names.
///
/// # Panics
/// If `run` does.
pub fn crash_rounds<T: Sync>(operations: &[T], rounds: u64, run: impl Fn(u64, &T, Effort) -> usize + Sync) {
    let wanted: Option<usize> = std::env::var("PLEACH_CRASH_STATES").ok().and_then(|n| n.parse().ok());
    let effort = match wanted {
        Some(_) => Effort { random: 4, one_in: 1, deep_one_in: 40, stock_one_in: 2000 },
        None => Effort { random: 2, one_in: 12, deep_one_in: 60, stock_one_in: 80 },
    };
    let (first, rounds) = chosen_seed().map_or((1, rounds), |seed| (seed, 1));
    let (mut states, mut seed) = (0, first);
    while seed < first + rounds || wanted.is_some_and(|wanted| states < wanted) {
        states +=
            oracle::in_parallel(operations, |operation| run(seed, operation, effort)).iter().sum::<usize>();
        seed += 1;
    }
    println!("{} configurations, {states} states", (seed - first) * operations.len() as u64);
}

struct Endings<'a> {
    subject: &'a dyn Subject,
    effort: Effort,
    judged: usize,
}

impl Endings<'_> {
    fn judge(&mut self, state: &Contents, when: &str, rng: &mut Rng) {
        self.judged += 1;
        self.subject.always(&SimDisk::of(state.clone()), when);
        if rng.below(self.effort.stock_one_in) == 0 {
            let work = WorkDir::new("sim");
            state.write_to(&work);
            self.subject.by_stock(&work, when);
        }
        let way = *rng.pick(self.subject.ways());
        self.recovered(state, way, when);
        if rng.below(self.effort.deep_one_in) == 0 {
            let mut chance = Rng::new(rng.bits());
            each_ending(state, &|disk| self.subject.recover(disk, way), 1, rng, &mut |state, then| {
                if chance.below(self.effort.one_in) == 0 {
                    let when = format!("{when}; then {way}, {then}");
                    self.judged += 1;
                    self.subject.always(&SimDisk::of(state.clone()), &when);
                    let way = *chance.pick(self.subject.ways());
                    self.recovered(&state, way, &when);
                }
            });
        }
    }

    /// Recovers, twice, and judges that.
    fn recovered(&self, state: &Contents, way: &str, when: &str) {
        let disk = SimDisk::of(state.clone());
        let when = format!("{when}; then {way}");
        self.subject.recover(&disk, way).unwrap_or_else(|e| panic!("{when}: {e}"));
        self.subject.in_the_end(&disk, way, &when);
        let done = disk.contents();
        self.subject.recover(&disk, way).unwrap_or_else(|e| panic!("{when}, twice: {e}"));
        assert!(disk.contents() == done, "{when}, twice: the second time changes something");
    }
}

/// Calls `judge` with everything that `act`, done to `start`, may leave: if it is killed, if power is lost, if a change fails,
/// alone or with all after it.
fn each_ending(
    start: &Contents,
    act: &dyn Fn(&SimDisk) -> Result<(), String>,
    random: usize,
    rng: &mut Rng,
    judge: &mut dyn FnMut(Contents, &str),
) {
    let disk = SimDisk::of(start.clone());
    disk.record();
    act(&disk).unwrap_or_else(|e| panic!("without any trouble: {e}"));
    disk.kills(judge);
    disk.power_losses(rng, random, judge);
    for after in 0..disk.changes() {
        for (errno, once) in [(EIO, false), (ENOSPC, true)] {
            let failing = SimDisk::of(start.clone());
            failing.fail(Some(Fault { after, once, errno }));
            let done = act(&failing);
            let change = disk.described(after);
            // Several threads may make fewer changes another time.
            let failed = failing.inner().failed > 0;
            assert!(once || done.is_err() || !failed, "change {change} fails, and nobody says so");
            let what = if once { "alone" } else { "and all after it" };
            judge(failing.contents(), &format!("change {change} fails, {what}: {done:?}"));
        }
    }
}

/// What is durable after `past`; what is not yet, of files; and of names. All in order.
fn split(past: &[Op]) -> (Vec<&Op>, Vec<&Op>, Vec<&Op>) {
    let mut flushed: BTreeMap<u64, usize> = BTreeMap::new();
    let mut directories: BTreeMap<&Path, usize> = BTreeMap::new();
    for (at, op) in past.iter().enumerate() {
        match op {
            Op::Flush { file } => drop(flushed.insert(*file, at)),
            Op::FlushDirectory(dir) => drop(directories.insert(dir, at)),
            _ => {}
        }
    }
    let (mut durable, mut pending, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for (at, op) in past.iter().enumerate() {
        match op {
            Op::Write { file, .. } | Op::SetLen { file, .. } => {
                let list =
                    if flushed.get(file).is_some_and(|f| at < *f) { &mut durable } else { &mut pending };
                list.push(op);
            }
            Op::Names(changed) => {
                let home = |path: &PathBuf| path.parent().and_then(|dir| directories.get(dir));
                let sure = changed.iter().all(|(path, _)| home(path).is_some_and(|f| at < *f));
                if sure { durable.push(op) } else { names.push(op) }
            }
            Op::Flush { .. } | Op::FlushDirectory(_) => {}
        }
    }
    (durable, pending, names)
}

/// Which of `n` changes made it, and that in words.
fn choices(n: usize, rng: &mut Rng, random: usize) -> Vec<(Vec<usize>, String)> {
    let mut all = vec![(Vec::new(), "none".to_owned())];
    if n == 0 {
        return all;
    }
    all.push(((0..n).collect(), "all".to_owned()));
    for i in 0..n {
        all.push(((0..i).collect(), format!("the first {i}")));
        all.push((vec![i], format!("only {i}")));
        all.push(((0..n).filter(|&k| k != i).collect(), format!("all but {i}")));
    }
    for _ in 0..random {
        let some: Vec<usize> = (0..n).filter(|_| rng.chance(50)).collect();
        let text = format!("{some:?}");
        all.push((some, text));
    }
    all
}

/// How many of `n` changes of names made it: every number where all or none of the rest did, else only the ends.
fn names_to_try(n: usize, what: &str) -> Vec<usize> {
    match (n, what) {
        (0, _) => vec![0],
        (_, "none" | "all") => (0..=n).collect(),
        _ => vec![0, n],
    }
}

/// Where a write may be torn, if it reaches over a border of sectors.
fn tear(offset: usize, len: usize, rng: &mut Rng) -> Option<usize> {
    let first = SECTOR - offset % SECTOR;
    let borders: Vec<usize> = (first..len).step_by(SECTOR).collect();
    (!borders.is_empty()).then(|| *rng.pick(&borders))
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: u64,
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

fn place(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

impl Store for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.inner().now.files.get(&self.file).map_or(0, |bytes| bytes.len() as u64))
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inner = self.disk.inner();
        let bytes = inner.now.files.get(&self.file).map_or(&[][..], Vec::as_slice);
        let from = bytes.get(place(offset)?..).unwrap_or(&[]);
        let (inside, behind) = buf.split_at_mut(from.len().min(buf.len()));
        inside.copy_from_slice(from.get(..inside.len()).unwrap_or(&[]));
        behind.fill(0);
        Ok(())
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.change(Op::Write { file: self.file, offset: place(offset)?, bytes: bytes.to_vec() })
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.change(Op::SetLen { file: self.file, len: place(len)? })
    }
    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if range.end > self.len()? { self.set_len(range.end) } else { Ok(()) }
    }
    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.len()?);
        let zeros = vec![0; place(end.saturating_sub(range.start))?];
        if zeros.is_empty() { Ok(()) } else { self.write_at(range.start, &zeros) }
    }
    fn copy_from(&self, _: &dyn Store, _: u64, _: u64, _: u64) -> io::Result<bool> {
        Ok(false)
    }
    fn barrier(&self) -> io::Result<()> {
        self.disk.change(Op::Flush { file: self.file })
    }
    fn window(&self) -> io::Result<Window> {
        Window::owned(self)
    }
    fn lock(&self, _: Role) -> Result<(), LockError> {
        Ok(())
    }
    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let range = range.start..range.end.min(self.len()?);
        Ok(if range.is_empty() { Vec::new() } else { vec![range] })
    }
    fn stat(&self) -> io::Result<Stat> {
        Ok(self.disk.inner().stat(self.file))
    }
}

impl Inner {
    fn stat(&self, file: u64) -> Stat {
        let len = self.now.files.get(&file).map_or(0, |bytes| bytes.len() as u64);
        let links = self.now.names.values().filter(|f| **f == file).count() as u64;
        let id = FileId { device: 1, inode: file };
        Stat { id, kind: FileKind::Regular, len, allocated: len, links, owner: 0, born: Some(file) }
    }

    fn find(&self, path: &Path) -> io::Result<u64> {
        self.now.names.get(path).copied().ok_or_else(missing)
    }
}

impl SimDisk {
    fn file(&self, file: u64) -> Arc<dyn Store> {
        Arc::new(SimFile { disk: self.clone(), file })
    }
}

impl Disk for SimDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let inner = self.inner();
        if !inner.now.directories.contains(dir) {
            return Err(missing());
        }
        let files = inner.now.names.keys().chain(&inner.now.directories);
        let mut found: Vec<PathBuf> = files.filter(|p| p.parent() == Some(dir)).cloned().collect();
        found.sort();
        Ok(found)
    }
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let inner = self.inner();
        if inner.now.directories.contains(path) {
            let id = FileId { device: 1, inode: u64::MAX };
            let (kind, len) = (FileKind::Directory, 0);
            return Ok(Stat { id, kind, len, allocated: 0, links: 1, owner: 0, born: None });
        }
        Ok(inner.stat(inner.find(path)?))
    }
    fn is_symlink(&self, _: &Path) -> bool {
        false
    }
    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        self.stat(path).map(|_| path.to_owned())
    }
    fn open(&self, path: &Path, _: Access) -> io::Result<Arc<dyn Store>> {
        let file = self.inner().find(path)?;
        Ok(self.file(file))
    }
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Store>> {
        let file = {
            let mut inner = self.inner();
            if inner.now.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            inner.next += 1;
            inner.next
        };
        self.change(Op::SetLen { file, len: 0 })?;
        self.change(Op::Names(vec![(path.to_owned(), Some(file))]))?;
        Ok(self.file(file))
    }
    fn create_private(&self, path: &Path) -> io::Result<Arc<dyn Store>> {
        self.create_new(path)
    }
    fn user(&self) -> u32 {
        0
    }
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.inner().now.directories.insert(path.to_owned());
        Ok(())
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        if !self.list(path)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.inner().now.directories.remove(path);
        Ok(())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let file = self.inner().find(from)?;
        self.change(Op::Names(vec![(from.to_owned(), None), (to.to_owned(), Some(file))]))
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let file = {
            let inner = self.inner();
            if inner.now.names.contains_key(to) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            inner.find(from)?
        };
        self.change(Op::Names(vec![(to.to_owned(), Some(file))]))
    }
    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.inner().find(path)?;
        self.change(Op::Names(vec![(path.to_owned(), None)]))
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.change(Op::FlushDirectory(dir.to_owned()))
    }
    fn copy_attributes(&self, _: &Path, _: &Path) -> io::Result<()> {
        Ok(())
    }
}
