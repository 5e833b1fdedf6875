//! What is done to a whole tree: every disk or none.
//!
//! Each verb makes a [`Job`] of a [`Tree`]: the steps, and what the tree will be. Nothing has happened until
//! [`Job::run`].

mod label;
mod remove;
mod revert;
mod take;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pleach_format::{BitmapRecord, Incompatible};
use pleach_image::{Image, escape};
use pleach_lineage::{NodeRecord, Record, Storage};
use pleach_store::{Access, Disk, FileId, Role};

use crate::catalog::CatalogText;
use crate::delete::{DeletePlan, refuse_unknown_readers, still_read};
use crate::journal::{JournalImage, directory_of, pending, unfinished};
use crate::names::express;
use crate::reconcile::quoted;
use crate::steps::{Inner, NewFile, Step, Steps};
use crate::survey::{Backing, FileFormat, SurveyFile};
use crate::tree::{Place, Tree, free_name};
use crate::{Error, ErrorKind, Outcome, Result, Watch};

pub use self::label::{forget, make_current, note, rename};
pub use self::remove::{RemoveRequest, remove, squash};
pub use self::revert::{RevertRequest, Unsaved, revert};
pub use self::take::{TakeKind, TakeRequest, take};

/// Longest name of a node, in bytes: QEMU cuts longer names of snapshots.
const MAX_NAME: usize = 255;

/// What a verb will do, decided before anything is written.
#[derive(Debug)]
pub struct Job {
    /// What it is, for people.
    pub what: String,
    /// Merges of images, with figures; indexes are those of the tree's survey.
    pub merges: Vec<DeletePlan>,
    /// What else happens to images, in order.
    pub acts: Vec<Act>,
    /// Nodes that get another parent, and that parent.
    pub reparented: Vec<(String, Option<String>)>,
    /// Files that others read and that change or go: who reads them.
    pub dependents: Vec<PathBuf>,
    /// What is lost although the names do not show it; for people.
    pub warnings: Vec<String>,
    /// Bytes on disk of the files that go without a merge.
    pub bytes_removed: u64,
    /// The tree afterwards.
    pub record: Record,
    /// Images that must not be in use.
    locks: Vec<PathBuf>,
    steps: Steps,
    catalog: PathBuf,
    planned_on: CatalogText,
}

/// One change of an image that is no merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// A new, empty image over another one.
    Overlay {
        /// The image.
        file: PathBuf,
        /// How its header names its backing file.
        backing: String,
    },
    /// A new image gets an empty bitmap that records, as the one below it has.
    Bitmap {
        /// The image.
        file: PathBuf,
        /// The bitmap's name.
        name: String,
    },
    /// A new image with the content of an internal snapshot.
    Copy {
        /// The image.
        file: PathBuf,
        /// The image that holds the snapshot.
        from: PathBuf,
        /// The snapshot's name.
        snapshot: String,
    },
    /// The active state is kept as an internal snapshot.
    Take {
        /// The image.
        file: PathBuf,
        /// The snapshot's name.
        snapshot: String,
    },
    /// The active state becomes what an internal snapshot keeps.
    Apply {
        /// The image.
        file: PathBuf,
        /// The snapshot's name.
        snapshot: String,
    },
    /// An internal snapshot goes.
    Drop {
        /// The image.
        file: PathBuf,
        /// The snapshot's name.
        snapshot: String,
    },
    /// An internal snapshot gets another name.
    Relabel {
        /// The image.
        file: PathBuf,
        /// The snapshot's name.
        from: String,
        /// Its new name.
        to: String,
    },
    /// A file goes.
    Remove {
        /// The file.
        file: PathBuf,
    },
}

impl Job {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.steps.is_empty()
    }

    /// The same without a new catalog, if it does nothing but delete internal snapshots: what is left can be told from the
    /// images as before.
    #[must_use]
    pub fn without_new_catalog(mut self) -> Self {
        let drops = |act: &Act| matches!(act, Act::Drop { .. });
        if self.merges.is_empty() && self.acts.iter().all(drops) {
            self.steps.steps.retain(|step| matches!(step, Step::Drop { .. }));
        }
        self
    }

    /// Does it: all of it, or nothing.
    ///
    /// # Errors
    /// An interrupted operation; [`ErrorKind::InUse`]; what the system says. If only new things were made by then they
    /// are gone again, else the journal stays for [`crate::resume`]; every node that stays reads as before.
    pub fn run(self, disk: &dyn Disk, watch: &Watch) -> Result<Outcome> {
        if self.is_empty() {
            return Ok(Outcome::default());
        }
        // What the files took when the operation was planned: on tmpfs, reading a hole takes some.
        let bytes_freed = self.merges.iter().map(|m| m.bytes_freed).sum::<u64>() + self.bytes_removed;
        let outcome = crate::steps::run(disk, &self.catalog, self.planned_on, self.steps, watch)?;
        Ok(Outcome { bytes_freed, ..outcome })
    }

    /// Bytes that are copied out of internal snapshots into new images, besides what merges write. They are read for that.
    ///
    /// # Errors
    /// An image that cannot be read.
    pub fn bytes_copied(&self, disk: &dyn Disk) -> Result<u64> {
        self.steps.bytes_copied(disk)
    }

    /// Looks whether any image that is concerned is in use.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`].
    pub fn probe(&self, disk: &dyn Disk) -> Result<()> {
        for path in &self.locks {
            let store = disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
            store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
        }
        Ok(())
    }
}

/// A job that is being made.
struct Draft<'a> {
    disk: &'a dyn Disk,
    tree: &'a Tree,
    record: Record,
    acts: Vec<Act>,
    merges: Vec<DeletePlan>,
    steps: Vec<Step>,
    /// Steps that only follow when the catalog says what is to be.
    after: Vec<Step>,
    locks: Vec<PathBuf>,
    warnings: Vec<String>,
    dependents: Vec<PathBuf>,
    reparented: Vec<(String, Option<String>)>,
    bytes_removed: u64,
    /// Files that go.
    removed: BTreeSet<FileId>,
    /// New files, so that no two get one name.
    new_files: Vec<PathBuf>,
}

impl<'a> Draft<'a> {
    /// # Errors
    /// An interrupted operation.
    fn new(disk: &'a dyn Disk, tree: &'a Tree) -> Result<Self> {
        for dir in &tree.survey.directories {
            if let Some(journal) = pending(disk, dir)?.first() {
                return Err(unfinished(disk, journal));
            }
        }
        Ok(Self {
            disk,
            tree,
            record: tree.catalog.record.clone(),
            acts: Vec::new(),
            merges: Vec::new(),
            steps: Vec::new(),
            after: Vec::new(),
            locks: Vec::new(),
            warnings: Vec::new(),
            dependents: Vec::new(),
            reparented: Vec::new(),
            bytes_removed: 0,
            removed: BTreeSet::new(),
            new_files: Vec::new(),
        })
    }

    /// The job: first the steps, then the catalog, then what follows it.
    fn finish(self, what: String) -> Result<Job> {
        self.record
            .check()
            .map_err(|e| Error::new(ErrorKind::Failed, "the catalog would not be sound").caused(e))?;
        let Self { disk, tree, record, acts, merges, mut steps, after, locks, .. } = self;
        let path = tree.catalog.real_path();
        let old = &tree.catalog.record;
        let unchanged = record == *old && !tree.catalog.is_new() && tree.differences.is_empty();
        let empty = record.nodes.is_empty() && record.disks.iter().all(|d| d.active.is_none());
        if empty {
            if !tree.catalog.is_new() {
                let signs = crate::signpost::leading_to(disk, &tree.catalog)?;
                steps.extend(signs.into_iter().map(|path| Step::Forget { path }));
                steps.push(Step::Forget { path: path.clone() });
            }
        } else if !(unchanged && steps.is_empty() && after.is_empty()) {
            let signs = crate::signpost::missing(disk, &tree.catalog, &record)?;
            steps.extend(signs.into_iter().map(|(path, text)| Step::Sign { path, text }));
            steps.push(Step::Save { path: path.clone(), text: record.encode() });
        }
        steps.extend(after);
        let directories = crate::delete::directories(disk, &tree.survey);
        let mut journal = Steps::new(what.clone(), directories);
        journal.steps = steps;
        let job = Job {
            what,
            merges,
            acts,
            reparented: self.reparented,
            dependents: self.dependents,
            warnings: self.warnings,
            bytes_removed: self.bytes_removed,
            record,
            locks,
            steps: journal,
            catalog: path,
            planned_on: tree.catalog.version(),
        };
        job.probe(disk)?;
        Ok(job)
    }

    fn entry(&self, file: usize) -> Result<&'a SurveyFile> {
        self.tree.survey.files.get(file).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file"))
    }

    /// The file as a journal knows it.
    fn image(&self, file: usize) -> Result<JournalImage> {
        let file = self.entry(file)?;
        Ok(JournalImage { path: self.real(&file.path)?, inode: file.stat.id.inode, born: file.stat.born })
    }

    /// The path with its directory behind all links.
    fn real(&self, path: &Path) -> Result<PathBuf> {
        let dir = directory_of(path);
        let real = self.disk.canonical(&dir).map_err(|e| Error::io("find the directory", &dir, e))?;
        Ok(real.join(path.file_name().unwrap_or_default()))
    }

    /// The active image of a disk.
    fn active(&self, disk: &str) -> Result<usize> {
        let none = |what: String| {
            Error::new(ErrorKind::NotFound, what)
                .hint("revert to a snapshot to get a new one, or let pleach scan --write look for it")
        };
        let active = self.record.disk(disk).and_then(|d| d.active.as_deref());
        let Some(name) = active else {
            return Err(none(format!("disk {} has no active image", quoted(disk))));
        };
        self.tree.file(self.disk, name).ok_or_else(|| {
            none(format!("the active image of disk {}, {}, is not there", quoted(disk), quoted(name)))
        })
    }

    /// A snapshot inside a file, for a step.
    fn inner(&self, file: usize, at: usize) -> Result<Inner> {
        let record = self.entry(file)?.snapshots.get(at);
        let record = record.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such internal snapshot"))?;
        Ok(Inner::new(self.image(file)?, &record.id, &record.name))
    }

    /// The file and snapshot that hold a node's state of one disk.
    fn place(&self, node: &str, storage: &Storage) -> Result<Place> {
        self.tree.place(self.disk, storage).ok_or_else(|| {
            let text = format!("the state of {} in {} is not there", quoted(node), quoted(storage.file()));
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// Who reads the active state of a file, followed or not.
    fn readers(&self, file: usize) -> Result<Vec<FileId>> {
        let id = self.entry(file)?.stat.id;
        Ok(self.tree.survey.reads().into_iter().filter(|r| r.read == id).map(|r| r.reader).collect())
    }

    /// Refuses to change or remove a file that something reads, other than `going`, or may read.
    fn nobody_reads(&self, file: usize, going: &[FileId]) -> Result<()> {
        let entry = self.entry(file)?;
        let going: BTreeSet<FileId> = going.iter().chain(&self.removed).copied().collect();
        refuse_unknown_readers(&self.tree.survey, entry, &going)?;
        let readers: Vec<FileId> = self.readers(file)?.into_iter().filter(|r| !going.contains(r)).collect();
        if readers.is_empty() { Ok(()) } else { Err(still_read(&self.tree.survey, entry, &readers)) }
    }

    /// A line for each other name that leads to the same file.
    fn warn_of_links(&mut self, file: usize) -> Result<()> {
        let entry = self.entry(file)?;
        if entry.stat.links > 1 {
            self.warnings.push(format!(
                "{} has {} hard links: images that name another of them are not seen",
                quoted(&entry.path.to_string_lossy()),
                entry.stat.links
            ));
        }
        Ok(())
    }

    /// A new image over the active state of `over`, at `path`.
    fn overlay(&mut self, path: &Path, over: usize) -> Result<String> {
        let entry = self.entry(over)?;
        self.tree.survey.chain(over)?;
        let (size, cluster_bits) = match &entry.header {
            Some(header) => (header.size(), header.geometry().cluster_bits()),
            None => (entry.stat.len, 16),
        };
        let path = self.new_file(path)?;
        let name = self.backing_name(&path, &entry.path)?;
        self.acts.push(Act::Overlay { file: path.clone(), backing: escape(&name) });
        let new = NewFile::new(path.clone(), Some((name, entry.format)), size, cluster_bits);
        self.steps.push(Step::Overlay { new });
        self.tree.catalog.name_of(self.disk, &path)
    }

    /// The new image at `path` gets the bitmaps that record what is written to `below`, so that what is written from now
    /// on is recorded as well.
    fn carry_bitmaps(&mut self, path: &Path, below: usize) -> Result<()> {
        let entry = self.entry(below)?;
        let Some(header) = entry.header.as_ref().filter(|h| h.bitmaps().is_ok_and(|b| b.is_some())) else {
            return Ok(());
        };
        let wrap = |e| Error::image(&entry.path, e);
        let open = self.disk.open(&entry.path, Access::Read);
        let image =
            Image::open(open.map_err(|e| Error::io("open the image", &entry.path, e))?).map_err(wrap)?;
        for bitmap in image.bitmaps().map_err(wrap)? {
            let has = |flag| bitmap.flags & flag != 0;
            let name = escape(&bitmap.name);
            if has(BitmapRecord::IN_USE) || header.size() == 0 {
                self.warnings.push(format!(
                    "the bitmap \"{name}\" of {} was not closed: it is not carried on",
                    quoted(&entry.path.to_string_lossy())
                ));
            } else if has(BitmapRecord::AUTO) {
                let granularity = 1u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0);
                self.acts.push(Act::Bitmap { file: path.to_owned(), name });
                self.steps.push(Step::bitmap(path.to_owned(), &bitmap.name, granularity));
            }
        }
        Ok(())
    }

    /// A new image with the content of an internal snapshot, on the backing file of the image that holds it.
    fn copy(&mut self, path: &Path, file: usize, at: usize) -> Result<String> {
        let entry = self.entry(file)?;
        let header = entry.header.as_ref();
        let header = header.ok_or_else(|| Error::new(ErrorKind::NotFound, "a raw file has no snapshots"))?;
        let record = entry.snapshots.get(at);
        let size = record.and_then(|s| s.disk_size).unwrap_or_else(|| header.size());
        let path = self.new_file(path)?;
        let backing = match entry.backing {
            Backing::File(below) => {
                let below = self.entry(below)?;
                Some((self.backing_name(&path, &below.path)?, below.format))
            }
            _ => {
                self.tree.survey.chain(file)?;
                None
            }
        };
        let from = self.inner(file, at)?;
        self.acts.push(Act::Copy { file: path.clone(), from: entry.path.clone(), snapshot: from.shown() });
        let new = NewFile::new(path.clone(), backing, size, header.geometry().cluster_bits());
        self.steps.push(Step::Copy { new, from });
        self.tree.catalog.name_of(self.disk, &path)
    }

    /// How the header of the image at `path` is to name the file at `file`: from one directory to the other.
    fn backing_name(&self, path: &Path, file: &Path) -> Result<Vec<u8>> {
        let base = file.file_name().unwrap_or_default().as_encoded_bytes();
        let name = express(self.disk, base, &directory_of(file), &directory_of(path))?;
        let plain = pleach_image::backing_path(path, &name).is_ok();
        Ok(if plain { name } else { [b"./", &name[..]].concat() })
    }

    /// A path for a new image, if nothing has it.
    fn new_file(&mut self, path: &Path) -> Result<PathBuf> {
        let path = self.real(path)?;
        if path.file_name().is_none() {
            return Err(Error::new(ErrorKind::Usage, "is not the name of a file").at(path));
        }
        if self.disk.stat(&path).is_ok() || self.disk.is_symlink(&path) {
            return Err(Error::new(ErrorKind::Usage, "the file for the new image is there already")
                .at(path)
                .hint("choose another name with --file DISK=PATH"));
        }
        if self.new_files.contains(&path) {
            return Err(Error::new(ErrorKind::Usage, "two disks would get this file").at(path));
        }
        self.new_files.push(path.clone());
        Ok(path)
    }

    /// Where the new image of a disk goes: where the user says, a bare name beside the active one; else a free name made
    /// of the active image's and `word`.
    fn choose_file(
        &self,
        files: &BTreeMap<String, PathBuf>,
        disk: &str,
        beside: usize,
        word: &str,
    ) -> Result<PathBuf> {
        let old = &self.entry(beside)?.path;
        let dir = directory_of(old);
        if let Some(path) = files.get(disk) {
            let bare = path.components().count() == 1 && !path.is_absolute();
            return Ok(if bare { dir.join(path) } else { path.clone() });
        }
        let stem = old.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // What an earlier snapshot has added is not kept: the names would grow.
        let mut root = stem.as_str();
        for node in &self.record.nodes {
            let ending = format!(".{}", node.name);
            if let Some(rest) =
                stem.strip_suffix(ending.as_str()).filter(|r| !r.is_empty() && r.len() < root.len())
            {
                root = rest;
            }
        }
        let plain = |c: char| c.is_alphanumeric() || "._+-".contains(c);
        let fine = !word.is_empty() && word.len() <= 100 && word.chars().all(plain);
        let number = |end: &str| end.chars().all(|c| c.is_ascii_digit() || c == '-');
        let numbered = root.rsplit_once('.').filter(|(rest, end)| !fine && !rest.is_empty() && number(end));
        let base =
            if fine { format!("{root}.{word}") } else { format!("{}.1", numbered.map_or(root, |r| r.0)) };
        let taken = |name: &str| {
            let path = dir.join(format!("{name}.qcow2"));
            let real = self.real(&path).unwrap_or_else(|_| path.clone());
            self.disk.stat(&path).is_ok() || self.disk.is_symlink(&path) || self.new_files.contains(&real)
        };
        let name = free_name(&base, taken).unwrap_or(base);
        Ok(dir.join(format!("{name}.qcow2")))
    }

    /// Refuses names of disks that the tree does not have.
    fn check_disks<'n>(&self, names: impl Iterator<Item = &'n String>) -> Result<()> {
        for name in names {
            if self.record.disk(name).is_none() {
                let known: Vec<String> = self.record.disks.iter().map(|d| quoted(&d.name)).collect();
                let text = format!("the tree has no disk {}", quoted(name));
                return Err(
                    Error::new(ErrorKind::Usage, text).hint(format!("its disks are {}", known.join(", ")))
                );
            }
        }
        Ok(())
    }

    /// Refuses a name that no node may have, or that one has.
    fn check_new_name(&self, name: &str) -> Result<()> {
        if name.is_empty() || name.len() > MAX_NAME {
            let text = format!("the name has {} bytes, and must have 1 to {MAX_NAME}", name.len());
            return Err(Error::new(ErrorKind::Usage, text));
        }
        if self.record.find(name).is_some() {
            let text = format!("there already is a node named {}", quoted(name));
            return Err(Error::new(ErrorKind::Usage, text)
                .hint("choose another name, or rename that one first: pleach rename"));
        }
        Ok(())
    }

    /// Refuses internal snapshots in an image that cannot have them.
    fn check_can_hold(&self, file: usize) -> Result<()> {
        let entry = self.entry(file)?;
        let Some(header) = &entry.header else {
            return Err(Error::new(ErrorKind::Unsupported, "a raw image cannot hold internal snapshots")
                .at(&entry.path)
                .hint("take an external one: --external"));
        };
        if header.incompatible().has(Incompatible::DATA_FILE) {
            let text = "an image with an external data file cannot hold internal snapshots";
            return Err(Error::new(ErrorKind::Unsupported, text)
                .at(&entry.path)
                .hint("take an external one: --external"));
        }
        Ok(())
    }

    /// Keeps the active state of a file as a snapshot inside it; the storage of the node for it.
    fn take_inside(&mut self, file: usize, name: &str, created: i64) -> Result<Storage> {
        self.check_can_hold(file)?;
        let entry = self.entry(file)?;
        let numbers = entry.snapshots.iter().filter_map(|r| str::from_utf8(&r.id).ok()?.parse::<u64>().ok());
        let id = (numbers.max().unwrap_or(0).saturating_add(1)).to_string();
        let inner = Inner::new(self.image(file)?, id.as_bytes(), name.as_bytes());
        self.acts.push(Act::Take { file: entry.path.clone(), snapshot: escape(name.as_bytes()) });
        self.steps.push(Step::Take { inner, date: u32::try_from(created).unwrap_or(0) });
        let file = self.tree.catalog.name_of(self.disk, &entry.path)?;
        Ok(Storage::Internal { file, snapshot: escape(name.as_bytes()), id })
    }

    /// Lets the active state of a file be what a snapshot inside it keeps, before or after the catalog is written.
    fn apply(&mut self, file: usize, at: usize, late: bool) -> Result<()> {
        let entry = self.entry(file)?;
        let inner = self.inner(file, at)?;
        self.warn_of_links(file)?;
        self.lock(file)?;
        self.acts.push(Act::Apply { file: entry.path.clone(), snapshot: inner.shown() });
        let step = Step::Apply { inner };
        if late {
            self.after.push(step)
        } else {
            self.steps.push(step)
        }
        Ok(())
    }

    /// The image of a file whose active state is to be replaced has no bitmaps: they could not follow.
    fn check_can_apply(&self, file: usize) -> Result<()> {
        let entry = self.entry(file)?;
        let wrap = |e| Error::image(&entry.path, e);
        let store = self
            .disk
            .open(&entry.path, Access::Read)
            .map_err(|e| Error::io("open the image", &entry.path, e))?;
        store.lock(Role::Write).map_err(|e| Error::locked(&entry.path, e))?;
        let image = Image::open(store).map_err(wrap)?;
        if !image.bitmaps().map_err(wrap)?.is_empty() {
            let text = "the image has bitmaps, which cannot say what changes with another state";
            return Err(Error::new(ErrorKind::Refused, text)
                .at(&entry.path)
                .hint("remove them first: pleach bitmap remove"));
        }
        Ok(())
    }

    /// A file goes, when the catalog does not name it any more.
    fn remove_file(&mut self, file: usize) -> Result<()> {
        let entry = self.entry(file)?;
        self.warn_of_links(file)?;
        self.lock(file)?;
        self.bytes_removed += if entry.stat.links > 1 { 0 } else { entry.stat.allocated };
        self.acts.push(Act::Remove { file: entry.path.clone() });
        let image = self.image(file)?;
        self.after.push(Step::Remove { image });
        self.removed.insert(entry.stat.id);
        Ok(())
    }

    /// An image that must not be in use.
    fn lock(&mut self, file: usize) -> Result<()> {
        let path = self.entry(file)?.path.clone();
        if !self.locks.contains(&path) {
            self.locks.push(path);
        }
        Ok(())
    }

    /// Nodes whose state of some disk is in `file`: those of its active state, and of its snapshots, by index.
    fn states_in(&self, file: usize) -> Vec<(&str, &str, Option<usize>)> {
        self.states_of(&self.record, file)
    }

    /// The same for the nodes of `record`, before or after the operation.
    fn states_of<'r>(&self, record: &'r Record, file: usize) -> Vec<(&'r str, &'r str, Option<usize>)> {
        let mut found = Vec::new();
        for node in &record.nodes {
            for (disk, storage) in &node.storage {
                if let Some(place) = self.tree.place(self.disk, storage)
                    && place.file == file
                {
                    found.push((node.name.as_str(), disk.as_str(), place.snapshot));
                }
            }
        }
        found
    }

    /// Takes a node out of the record; `record.current` and parents are the caller's.
    fn drop_node(&mut self, name: &str) -> Option<NodeRecord> {
        let at = self.record.nodes.iter().position(|n| n.name == name)?;
        Some(self.record.nodes.remove(at))
    }
}

/// Whether a file is read as raw bytes.
fn is_raw(file: &SurveyFile) -> bool {
    file.format == FileFormat::Raw
}
