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

use crate::rng::Rng;

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
    /// Changes that still succeed; then each one fails.
    left: Option<usize>,
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

    /// Lets `n` more changes succeed, and no more; all of them if that is `None`.
    pub fn fail_after(&self, n: Option<usize>) {
        self.inner().left = n;
    }

    /// How many changes were recorded.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.inner().recorded.as_ref().map_or(0, |(_, ops)| ops.len())
    }

    fn change(&self, op: Op) -> io::Result<()> {
        let mut inner = self.inner();
        if let Some(left) = inner.left {
            inner.left = Some(left.checked_sub(1).ok_or_else(|| io::Error::other("the disk fails"))?);
        }
        inner.now.apply(&op);
        if let Some((_, ops)) = &mut inner.recorded {
            ops.push(op);
        }
        Ok(())
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
    /// they were last, and at each step between; and writes torn at a sector.
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
                if let Op::Write { file, offset, bytes } = op
                    && let Some(cut) = tear(*offset, bytes.len(), rng)
                {
                    let mut state = sure.clone();
                    pending.iter().take(i).for_each(|op| state.apply(op));
                    let part = bytes.get(..cut).unwrap_or(&[]).to_vec();
                    state.apply(&Op::Write { file: *file, offset: *offset, bytes: part });
                    judge(state, &format!("power lost at change {at}: write {i} torn at {cut}"));
                }
            }
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
