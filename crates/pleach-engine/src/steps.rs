//! One operation on several files and their catalog: steps that are written down first, and carried out one by one.
//!
//! `.pleach/TREE.steps` holds all steps of the operation and how many of them are done; it is durable before the first
//! one and goes last. Each step is one change that is whole or not there, or has a journal of its own, and can be told
//! from the files to be done; so after a crash [`resume`] goes on where it stopped. As long as nothing but new files and
//! new internal snapshots has been made, [`undo`] takes it back, and so does an error.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_format::{BackingFile, Version};
use pleach_image::{Chain, CreateOptions, Image, NewSnapshot, create, escape};
use pleach_store::{Access, Disk, Role, Store};
use serde::{Deserialize, Serialize};

use crate::catalog::{CatalogText, read, replace, replace_held};
use crate::convert::{self, Converted, NewImage, Target};
use crate::delete::{Decided, DeletePlan, Keep, Prepared, plan_single};
use crate::execute::{execute, nobody_reads};
use crate::internal::Internal;
use crate::journal::{JournalImage, STEPS, directory_of, encoded};
use crate::leaks::mend;
use crate::rebase::{Onto, RebaseRequest, plan_rebase};
use crate::source::{Source, SourceOptions};
use crate::survey::{Backing, FileFormat, Survey, Trust};
use crate::{Error, ErrorKind, Outcome, Result, Watch, open_writer_alone};

const VERSION: u32 = 1;

/// An operation, as it was meant, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Steps {
    version: u32,
    /// What it is, for people: `snapshot "s1"`.
    pub(crate) what: String,
    /// Directories that are searched for readers before a file goes.
    #[serde(with = "encoded::list")]
    pub(crate) directories: Vec<PathBuf>,
    /// How many steps are done.
    done: usize,
    /// All of them, in order.
    pub(crate) steps: Vec<Step>,
}

/// An internal snapshot, known by id and name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inner {
    /// The image.
    pub(crate) image: JournalImage,
    /// Its id, hexadecimal.
    id: String,
    /// Its name, hexadecimal.
    name: String,
}

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NewFile {
    /// Where it is made.
    #[serde(with = "encoded")]
    pub(crate) path: PathBuf,
    /// How its header names its backing file, hexadecimal.
    backing: Option<String>,
    /// The backing file's format.
    format: FileFormatName,
    /// Size of its disk in bytes.
    size: u64,
    cluster_bits: u32,
}

/// A format as a word.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FileFormatName {
    Qcow2,
    Raw,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Step {
    /// Makes an empty image over another one.
    Overlay {
        /// The image.
        new: NewFile,
    },
    /// Adds an empty bitmap that records to an image that was made.
    Bitmap {
        /// The image.
        #[serde(with = "encoded")]
        path: PathBuf,
        /// Its name, hexadecimal.
        name: String,
        /// Guest bytes a bit.
        granularity: u64,
    },
    /// Makes an image with the content of an internal snapshot.
    Copy {
        /// The image.
        new: NewFile,
        /// The snapshot.
        from: Inner,
    },
    /// Keeps the active state of an image as a snapshot inside it.
    Take {
        /// The snapshot that comes to be.
        inner: Inner,
        /// When, in seconds since the Epoch.
        date: u32,
    },
    /// Lets the active state of an image be what a snapshot inside it keeps.
    Apply {
        /// The snapshot.
        inner: Inner,
    },
    /// Deletes a snapshot inside an image.
    Drop {
        /// The snapshot.
        inner: Inner,
    },
    /// Gives a snapshot inside an image another name.
    Relabel {
        /// The snapshot as it was.
        inner: Inner,
        /// Its new name, hexadecimal.
        to: String,
    },
    /// Merges an image into those that stand on it.
    Merge {
        /// The image.
        victim: JournalImage,
        /// Those that stand on it.
        dependents: Vec<JournalImage>,
        /// The one of them that takes its name.
        heir: Option<JournalImage>,
    },
    /// Gives an image another backing file, and the same content.
    Rebase {
        /// The image.
        image: JournalImage,
        /// What it is to stand on.
        onto: Option<JournalImage>,
        /// Whether its header names that absolutely.
        absolute: bool,
    },
    /// Removes an image.
    Remove {
        /// The image.
        image: JournalImage,
    },
    /// Puts up a sign that says where the catalog is.
    Sign {
        /// The file.
        #[serde(with = "encoded")]
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// Replaces the catalog.
    Save {
        /// The file.
        #[serde(with = "encoded")]
        path: PathBuf,
        /// What it says then.
        text: String,
    },
    /// Removes the catalog, or a sign.
    Forget {
        /// The file.
        #[serde(with = "encoded")]
        path: PathBuf,
    },
}

impl Inner {
    pub(crate) fn new(image: JournalImage, id: &[u8], name: &[u8]) -> Self {
        Self { image, id: hex(id), name: hex(name) }
    }

    fn id(&self) -> Vec<u8> {
        unhex(&self.id)
    }

    /// Its name, for people.
    pub(crate) fn shown(&self) -> String {
        escape(&unhex(&self.name))
    }
}

impl NewFile {
    pub(crate) fn new(
        path: PathBuf,
        backing: Option<(Vec<u8>, FileFormat)>,
        size: u64,
        cluster_bits: u32,
    ) -> Self {
        let format = match backing {
            Some((_, FileFormat::Raw)) => FileFormatName::Raw,
            _ => FileFormatName::Qcow2,
        };
        Self { path, backing: backing.map(|(name, _)| hex(&name)), format, size, cluster_bits }
    }

    /// Whether `image` could be the one that was made.
    fn is_like(&self, image: &Image) -> bool {
        let (options, header) = (self.options(), image.header());
        image.size() == options.size.next_multiple_of(512)
            && image.geometry().cluster_bits() == options.cluster_bits
            && header.backing() == options.backing.as_ref()
    }

    fn options(&self) -> CreateOptions {
        let format = match self.format {
            FileFormatName::Qcow2 => FileFormat::Qcow2,
            FileFormatName::Raw => FileFormat::Raw,
        };
        CreateOptions {
            size: self.size,
            cluster_bits: self.cluster_bits,
            version: Version::V3,
            backing: self.backing.as_ref().map(|name| BackingFile {
                name: unhex(name),
                format: Some(format.name().as_bytes().to_vec()),
            }),
            ..CreateOptions::default()
        }
    }
}

impl Step {
    /// Gives `inner` another name.
    pub(crate) fn relabel(inner: Inner, to: &[u8]) -> Self {
        Self::Relabel { inner, to: hex(to) }
    }

    /// Adds an empty bitmap to the image at `path`.
    pub(crate) fn bitmap(path: PathBuf, name: &[u8], granularity: u64) -> Self {
        Self::Bitmap { path, name: hex(name), granularity }
    }

    /// The snapshot that it makes, applies, deletes or renames.
    fn inner(&self) -> Option<&Inner> {
        match self {
            Self::Take { inner, .. }
            | Self::Apply { inner }
            | Self::Drop { inner }
            | Self::Relabel { inner, .. } => Some(inner),
            _ => None,
        }
    }

    /// Whether what it has made can be taken away again.
    fn can_be_undone(&self) -> bool {
        matches!(
            self,
            Self::Overlay { .. }
                | Self::Bitmap { .. }
                | Self::Copy { .. }
                | Self::Take { .. }
                | Self::Sign { .. }
        )
    }

    /// Calls `change` with every path.
    fn map(&mut self, change: &impl Fn(&mut PathBuf)) {
        match self {
            Self::Overlay { new } => change(&mut new.path),
            Self::Bitmap { path, .. } => change(path),
            Self::Copy { new, from } => {
                change(&mut new.path);
                change(&mut from.image.path);
            }
            Self::Take { inner, .. }
            | Self::Apply { inner }
            | Self::Drop { inner }
            | Self::Relabel { inner, .. } => change(&mut inner.image.path),
            Self::Merge { victim, dependents, heir } => {
                let others = dependents.iter_mut().chain(heir);
                std::iter::once(victim).chain(others).for_each(|image| change(&mut image.path));
            }
            Self::Rebase { image, onto, .. } => {
                change(&mut image.path);
                onto.iter_mut().for_each(|onto| change(&mut onto.path));
            }
            Self::Remove { image } => change(&mut image.path),
            Self::Sign { path, .. } | Self::Save { path, .. } | Self::Forget { path } => change(path),
        }
    }
}

impl Steps {
    /// An operation of which nothing is done.
    pub(crate) fn new(what: String, directories: Vec<PathBuf>) -> Self {
        Self { version: VERSION, what, directories, done: 0, steps: Vec::new() }
    }

    /// Bytes that it copies out of internal snapshots into new images. What is to be copied is read.
    ///
    /// # Errors
    /// An image that cannot be read.
    pub(crate) fn bytes_copied(&self, disk: &dyn Disk) -> Result<u64> {
        let watch = Watch::new();
        let one = |step: &Step| match step {
            Step::Copy { new, from } => {
                let make = |source: &Chain, target: &Target<'_>| {
                    convert::rehearse(disk, source, &new.path, target, &watch)
                };
                copied(disk, new, from, make)
            }
            _ => Ok(0),
        };
        self.steps.iter().map(one).sum()
    }

    fn encode(&self, base: &Path) -> Result<String> {
        let mut written = self.clone();
        written.map(|path| {
            if let Ok(inside) = path.strip_prefix(base) {
                *path = inside.to_owned();
            }
        });
        let text = serde_json::to_string_pretty(&written)
            .map_err(|e| Error::new(ErrorKind::Failed, "cannot write down the operation").caused(e))?;
        Ok(format!("{text}\ncrc32 {:08x}\n", crc32fast::hash(text.as_bytes())))
    }

    fn decode(bytes: &[u8], base: &Path, path: &Path) -> Result<Self> {
        let damaged = || Error::new(ErrorKind::Corrupt, "the journal is damaged").at(path);
        let text = str::from_utf8(bytes).map_err(|_| damaged())?;
        let (text, crc) = text.trim_end().rsplit_once("\ncrc32 ").ok_or_else(damaged)?;
        if format!("{:08x}", crc32fast::hash(text.as_bytes())) != crc {
            return Err(damaged());
        }
        let foreign = |_| {
            Error::new(ErrorKind::Unsupported, "the journal was written by another version of pleach")
                .at(path)
                .hint("resume with the version that began the operation")
        };
        let mut steps: Self = serde_json::from_str(text).map_err(foreign)?;
        if steps.version != VERSION || steps.done > steps.steps.len() {
            return Err(damaged());
        }
        steps.map(|path| *path = base.join(&*path));
        Ok(steps)
    }

    fn map(&mut self, change: impl Fn(&mut PathBuf)) {
        self.directories.iter_mut().for_each(&change);
        self.steps.iter_mut().for_each(|step| step.map(&change));
    }
}

/// Where the journal of an operation on the catalog at `catalog` is.
pub(crate) fn place(catalog: &Path) -> PathBuf {
    catalog.with_extension(STEPS)
}

/// Carries out an operation on the tree whose catalog is, or will be, at `catalog`.
///
/// # Errors
/// What keeps it from going on. If only new things were made by then they are gone again; else the journal stays, and
/// every node that stays reads as before.
pub(crate) fn run(
    disk: &dyn Disk,
    catalog: &Path,
    planned_on: CatalogText,
    mut steps: Steps,
    watch: &Watch,
) -> Result<Outcome> {
    let path = place(catalog);
    let images = directory_of(&directory_of(catalog));
    let base = disk.canonical(&images).map_err(|e| Error::io("find the directory", &images, e))?;
    if let [Step::Save { path, text }] = &*steps.steps {
        // One change that is whole or not there.
        let inside = directory_of(path);
        disk.make_dir(&inside).map_err(|e| Error::io("make the directory of the catalog", &inside, e))?;
        planned_on.still_holds(disk, catalog)?;
        replace(disk, path, text.as_bytes())?;
        disk.sync_dir(&base).map_err(|e| Error::io("flush the directory", &base, e))?;
        return Ok(Outcome::default());
    }
    let held = begin(disk, &path, &steps.encode(&base)?, &base)?;
    // Nobody else begins from here on; somebody may have ended since this was planned.
    if let Err(error) = planned_on.still_holds(disk, catalog) {
        end(disk, &path)?;
        return Err(error);
    }
    let mut journal = OpenSteps::of(disk, &path, &base, &mut steps, held);
    let error = match journal.go_on(watch, false) {
        Ok(outcome) => {
            end(disk, &path)?;
            return Ok(outcome);
        }
        Err(error) => error,
    };
    if journal.take_back().is_ok() && end(disk, &path).is_ok() {
        return Err(error);
    }
    let hint = format!("nothing is lost; finish with: pleach resume {}", images.display());
    let hint = error.hint.as_ref().map_or(hint.clone(), |h| format!("{h}; {hint}"));
    Err(error.hint(hint))
}

/// Goes on with the operation whose journal is at `path`. Returns what it was.
///
/// # Errors
/// What keeps it from being finished; the journal stays.
pub(crate) fn resume(disk: &dyn Disk, path: &Path, watch: &Watch) -> Result<String> {
    let (mut steps, base, held) = reopen(disk, path)?;
    let what = steps.what.clone();
    OpenSteps::of(disk, path, &base, &mut steps, held).go_on(watch, true)?;
    end(disk, path)?;
    Ok(what)
}

/// Takes back the operation whose journal is at `path`. Returns what it was.
///
/// # Errors
/// [`ErrorKind::Refused`] if it has begun to change what was there before; the journal stays.
pub(crate) fn undo(disk: &dyn Disk, path: &Path) -> Result<String> {
    let (mut steps, base, held) = reopen(disk, path)?;
    let what = steps.what.clone();
    OpenSteps::of(disk, path, &base, &mut steps, held).take_back()?;
    end(disk, path)?;
    Ok(what)
}

fn reopen(disk: &dyn Disk, path: &Path) -> Result<(Steps, PathBuf, Arc<dyn Store>)> {
    let store = disk.open(path, Access::Write).map_err(|e| Error::io("open the journal", path, e))?;
    if store.stat().map_err(|e| Error::io("look at the journal", path, e))?.owner != disk.user() {
        return Err(Error::new(
            ErrorKind::Refused,
            "the journal belongs to another user; it is not followed",
        )
        .at(path)
        .hint("resume as the user who began the operation"));
    }
    let images = directory_of(&directory_of(path));
    let base = disk.canonical(&images).map_err(|e| Error::io("find the directory", &images, e))?;
    store.lock(Role::Write).map_err(|_| crate::journal::at_work(path))?;
    let steps = Steps::decode(&read(disk, path)?, &base, path)?;
    Ok((steps, base, store))
}

/// Makes the journal; durable when this returns. Only one operation on a tree has one, and it is locked as long as what is
/// returned lives.
fn begin(disk: &dyn Disk, path: &Path, text: &str, base: &Path) -> Result<Arc<dyn Store>> {
    let dir = directory_of(path);
    disk.make_dir(&dir).map_err(|e| Error::io("make the directory of the journal", &dir, e))?;
    // Another process may be about to begin, too.
    let temp = path.with_extension(format!("{}.steps-begun", std::process::id()));
    if disk.stat(&temp).is_ok() {
        disk.unlink(&temp).map_err(|e| Error::io("remove an old, unfinished journal", &temp, e))?;
    }
    let io = |what: &'static str| move |e| Error::io(what, path, e);
    let store = disk.create_private(&temp).map_err(io("create the journal"))?;
    store.lock(Role::Write).map_err(|e| Error::locked(&temp, e))?;
    let written = store.write_at(0, text.as_bytes()).and_then(|()| store.barrier());
    let made = written.and_then(|()| disk.link(&temp, path));
    // The name that counts is the other one.
    let _ = disk.unlink(&temp);
    match made {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(crate::journal::unfinished(disk, path));
        }
        made => made.map_err(io("write the journal"))?,
    }
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory of the journal", &dir, e))?;
    disk.sync_dir(base).map_err(|e| Error::io("flush the directory of the images", base, e))?;
    Ok(store)
}

fn end(disk: &dyn Disk, path: &Path) -> Result<()> {
    let dir = directory_of(path);
    disk.unlink(path).map_err(|e| Error::io("remove the journal", path, e))?;
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory of the journal", &dir, e))?;
    // Other journals or catalogs may be in it.
    let _ = disk.remove_dir(&dir);
    Ok(())
}

/// A journal that is on disk.
struct OpenSteps<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
    base: &'a Path,
    steps: &'a mut Steps,
    /// The journal, locked: while it is, nobody takes it for an interrupted operation's.
    held: Arc<dyn Store>,
    /// Whether the step that is not done may have changed something: one that found its image damaged has not.
    touched: Cell<bool>,
}

impl<'a> OpenSteps<'a> {
    /// A journal of which nobody knows how far its next step went.
    fn of(
        disk: &'a dyn Disk,
        path: &'a Path,
        base: &'a Path,
        steps: &'a mut Steps,
        held: Arc<dyn Store>,
    ) -> Self {
        Self { disk, path, base, steps, held, touched: Cell::new(true) }
    }

    /// Does what is left. With `again` the first of it may have been done, or half done.
    fn go_on(&mut self, watch: &Watch, resumed: bool) -> Result<Outcome> {
        let mut total = Outcome::default();
        let mut again = resumed;
        if resumed {
            self.clear()?;
            self.mend()?;
        }
        while let Some(step) = self.steps.steps.get(self.steps.done).cloned() {
            if watch.should_stop() {
                return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
            }
            if !(again && self.is_done(&step)?) {
                let one = self.step(&step, watch)?;
                total.bytes_written += one.bytes_written;
                total.bytes_cloned += one.bytes_cloned;
                total.bytes_freed += one.bytes_freed;
            }
            again = false;
            self.steps.done += 1;
            if self.steps.done < self.steps.steps.len() {
                self.held =
                    replace_held(self.disk, self.path, self.steps.encode(self.base)?.as_bytes(), true)?;
            }
        }
        if resumed {
            // A step that was half done may have left counts behind when it was done again.
            self.mend()?;
        }
        Ok(total)
    }

    /// The steps that are done, and the one that may be half done.
    fn begun(&self) -> &[Step] {
        let end = self.steps.done + usize::from(self.touched.get());
        self.steps.steps.get(..end).unwrap_or(&self.steps.steps)
    }

    /// Removes what is left of new images under the names that they had until they were whole.
    fn clear(&self) -> Result<()> {
        for step in self.begun() {
            if let Step::Overlay { new } | Step::Copy { new, .. } = step {
                pleach_store::NewFile::clear(self.disk, &new.path)
                    .map_err(|e| Error::new_file(&new.path, e))?;
            }
        }
        Ok(())
    }

    /// Puts in order the counts and flags of images inside which a step may have stopped half-way. An image without
    /// damage is not written to.
    fn mend(&self) -> Result<()> {
        for step in self.begun() {
            if let Some(inner) = step.inner()
                && here(self.disk, &inner.image)
            {
                mend(self.disk, &inner.image.path)?;
            }
            if let Step::Bitmap { path, .. } = step
                && self.disk.stat(path).is_ok()
            {
                mend(self.disk, path)?;
            }
        }
        Ok(())
    }

    /// Takes away what was made, last first. Each step counts as begun, not as done, before it is taken back: [`resume`] and
    /// [`undo`] both go on from anywhere in here.
    fn take_back(&mut self) -> Result<()> {
        let disk = self.disk;
        let begun = self.begun().to_vec();
        let (made, next) = match begun.as_slice().split_last() {
            Some((next, made)) if begun.len() > self.steps.done => (made, Some(next)),
            _ => (&*begun, None),
        };
        let untouched = match next {
            None => true,
            Some(next) if next.can_be_undone() => true,
            Some(Step::Save { path, text }) => {
                disk.stat(path).is_err() || read(disk, path)? != text.as_bytes()
            }
            Some(next) => !self.has_begun(next)?,
        };
        if !untouched || !made.iter().all(Step::can_be_undone) {
            let text = format!(
                "{} has begun to change what was there before; it cannot be taken back",
                self.steps.what
            );
            return Err(Error::new(ErrorKind::Refused, text)
                .at(self.path)
                .hint(format!("finish it: pleach resume {}", self.base.display())));
        }
        self.clear()?;
        self.mend()?;
        for (number, step) in begun.iter().enumerate().rev() {
            if number < self.steps.done {
                self.steps.done = number;
                self.held = replace_held(disk, self.path, self.steps.encode(self.base)?.as_bytes(), true)?;
            }
            match step {
                Step::Overlay { new } | Step::Copy { new, .. } if disk.stat(&new.path).is_ok() => {
                    self.remove_new(step, new)?;
                }
                Step::Sign { path, text }
                    if disk.stat(path).is_ok() && read(disk, path)? == text.as_bytes() =>
                {
                    unlink(disk, path)?;
                }
                Step::Take { inner, .. } if self.has(inner)? => {
                    let image = self.inside(inner)?;
                    image.delete(&inner.id())?;
                    image.close()?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes an image that was made, if nobody has used it since.
    fn remove_new(&self, step: &Step, new: &NewFile) -> Result<()> {
        let (disk, path) = (self.disk, &new.path);
        let store = disk.open(path, Access::Write).map_err(|e| Error::io("open the image", path, e))?;
        store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
        let id = store.stat().map_err(|e| Error::io("look at the image", path, e))?.id;
        let image = Image::open(store).map_err(|e| Error::image(path, e))?;
        if !new.is_like(&image) {
            return Err(Error::new(ErrorKind::Refused, "is not the image that the operation made").at(path));
        }
        let written = matches!(step, Step::Overlay { .. }) && image.l1().iter().any(|e| e.0 != 0);
        if written || !image.snapshots().map_err(|e| Error::image(path, e))?.is_empty() {
            return Err(Error::new(ErrorKind::Refused, "the new image has been written to meanwhile")
                .at(path)
                .hint(format!("finish the operation: pleach resume {}", self.base.display())));
        }
        nobody_reads(disk, &self.steps.directories, id, &[])?;
        unlink(disk, path)
    }

    /// Whether an interrupted step was done to its end.
    fn is_done(&self, step: &Step) -> Result<bool> {
        let disk = self.disk;
        Ok(match step {
            Step::Overlay { new } | Step::Copy { new, .. } => disk.stat(&new.path).is_ok(),
            Step::Bitmap { path, name, .. } => {
                let wrap = |e| Error::image(path, e);
                let store =
                    disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
                let all = Image::open(store).and_then(|image| image.bitmaps()).map_err(wrap)?;
                all.iter().any(|bitmap| hex(&bitmap.name) == *name)
            }
            Step::Take { inner, .. } => self.has(inner)?,
            Step::Drop { inner } => here(disk, &inner.image) && !self.has(inner)?,
            Step::Relabel { inner, to } => {
                let renamed = Inner { name: to.clone(), ..inner.clone() };
                self.has(&renamed)?
            }
            Step::Merge { victim, dependents, heir } => match heir {
                // The merged file has the victim's name, and the heir's own is gone.
                Some(heir) => !here(disk, heir) && !dependents.is_empty(),
                // The name is gone, or the file has gone over to the only dependent's name.
                None => !here(disk, victim),
            },
            Step::Rebase { image, onto, .. } => {
                let survey = self.survey()?;
                let file = survey.find(disk, &image.path).and_then(|i| survey.files.get(i));
                match (file.map(|f| &f.backing), onto) {
                    (Some(Backing::File(below)), Some(onto)) => survey.find(disk, &onto.path) == Some(*below),
                    (Some(Backing::None), None) => true,
                    _ => false,
                }
            }
            Step::Remove { image } => !here(disk, image),
            Step::Sign { path, text } | Step::Save { path, text } => {
                disk.stat(path).is_ok() && read(disk, path)? == text.as_bytes()
            }
            Step::Forget { path } => disk.stat(path).is_err(),
            Step::Apply { .. } => false,
        })
    }

    /// Whether an interrupted step has changed anything.
    fn has_begun(&self, step: &Step) -> Result<bool> {
        Ok(match step {
            Step::Remove { .. } | Step::Forget { .. } => self.is_done(step)?,
            Step::Drop { inner } => !self.has(inner)?,
            _ => true,
        })
    }

    fn has(&self, inner: &Inner) -> Result<bool> {
        let path = &inner.image.path;
        let store = self.disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
        let image = Image::open(store).map_err(|e| Error::image(path, e))?;
        let all = image.snapshots().map_err(|e| Error::image(path, e))?;
        Ok(all.iter().any(|s| hex(&s.id) == inner.id && hex(&s.name) == inner.name))
    }

    fn step(&self, step: &Step, watch: &Watch) -> Result<Outcome> {
        let disk = self.disk;
        self.touched.set(false);
        let inside = |inner: &Inner| -> Result<Internal> {
            let image = self.inside(inner)?;
            if let Step::Apply { .. } = step {
                image.check_apply(disk, &self.survey()?)?;
            }
            self.touched.set(true);
            Ok(image)
        };
        if step.inner().is_none() {
            self.touched.set(true);
        }
        let none = Outcome::default();
        match step {
            Step::Overlay { new } => {
                create(disk, &new.path, &new.options()).map_err(|e| Error::image(&new.path, e))?;
                Ok(none)
            }
            Step::Bitmap { path, name, granularity } => {
                let writer = open_writer_alone(disk, path)?;
                let added = writer.add_bitmap(&unhex(name), Some(*granularity), true);
                added.and_then(|()| writer.close()).map_err(|e| Error::image(path, e))?;
                Ok(none)
            }
            Step::Copy { new, from } => self.copy(new, from, watch),
            Step::Take { inner, date } => {
                let image = inside(inner)?;
                let snapshot =
                    NewSnapshot { name: unhex(&inner.name), date: (*date, 0), ..NewSnapshot::default() };
                let id = image.take(&snapshot)?;
                image.close()?;
                if id != inner.id() {
                    let text = format!("the new snapshot has id \"{}\", which was not expected", escape(&id));
                    return Err(Error::new(ErrorKind::Failed, text).at(&inner.image.path));
                }
                Ok(none)
            }
            Step::Apply { inner } => {
                let image = inside(inner)?;
                image.apply(&inner.id())?;
                image.close()?;
                Ok(none)
            }
            Step::Drop { inner } => {
                let image = inside(inner)?;
                image.delete(&inner.id())?;
                image.close()?;
                Ok(none)
            }
            Step::Relabel { inner, to } => {
                let image = inside(inner)?;
                image.rename(&inner.id(), &unhex(to))?;
                image.close()?;
                Ok(none)
            }
            Step::Merge { victim, heir, .. } => self.merge(victim, heir.as_ref(), watch),
            Step::Rebase { image, onto, absolute } => self.rebase(image, onto.as_ref(), *absolute, watch),
            Step::Remove { image } => {
                let stat = disk.stat(&image.path).ok().filter(|s| image.is(s));
                let Some(stat) = stat else { return Err(not_the_same(&image.path)) };
                let store = disk
                    .open(&image.path, Access::Read)
                    .map_err(|e| Error::io("open the image", &image.path, e))?;
                store.lock(Role::Write).map_err(|e| Error::locked(&image.path, e))?;
                nobody_reads(disk, &self.steps.directories, stat.id, &[])?;
                unlink(disk, &image.path)?;
                Ok(Outcome { bytes_freed: if stat.links > 1 { 0 } else { stat.allocated }, ..none })
            }
            Step::Sign { path, text } => {
                let dir = directory_of(path);
                disk.make_dir(&dir).map_err(|e| Error::io("make the directory of the sign", &dir, e))?;
                replace(disk, path, text.as_bytes())?;
                Ok(none)
            }
            Step::Save { path, text } => {
                replace(disk, path, text.as_bytes())?;
                Ok(none)
            }
            Step::Forget { path } => {
                unlink(disk, path)?;
                // Other signs, catalogs and journals may be in it.
                let _ = disk.remove_dir(&directory_of(path));
                Ok(none)
            }
        }
    }

    /// The image of a snapshot, if it still is the one that was meant.
    fn inside(&self, inner: &Inner) -> Result<Internal> {
        if !here(self.disk, &inner.image) {
            return Err(not_the_same(&inner.image.path));
        }
        Internal::open(self.disk, &inner.image.path)
    }

    fn copy(&self, new: &NewFile, from: &Inner, watch: &Watch) -> Result<Outcome> {
        let make = |source: &Chain, target: &Target<'_>| {
            convert::convert(self.disk, source, &new.path, target, watch)
        };
        let written = copied(self.disk, new, from, make)?;
        Ok(Outcome { bytes_written: written, ..Outcome::default() })
    }

    /// All images, as the last look before something goes takes them.
    fn survey(&self) -> Result<Survey> {
        let trust = Trust { everything: true, ..Trust::default() };
        Survey::of_directories(self.disk, &self.steps.directories, &trust)
    }

    fn rebase(
        &self,
        image: &JournalImage,
        onto: Option<&JournalImage>,
        absolute: bool,
        watch: &Watch,
    ) -> Result<Outcome> {
        let disk = self.disk;
        let survey = self.survey()?;
        let find = |image: &JournalImage| {
            let index = survey.find(disk, &image.path).filter(|_| here(disk, image));
            index.ok_or_else(|| not_the_same(&image.path))
        };
        let onto = match onto {
            None => None,
            Some(onto) => {
                let file = find(onto)?;
                let found = survey.files.get(file).ok_or_else(|| not_the_same(&onto.path))?;
                Some(Onto { path: found.path.clone(), absolute, file: Some(file), format: found.format })
            }
        };
        let request = RebaseRequest { image: find(image)?, onto, unchecked: false };
        let prepared = plan_rebase(disk, &survey, &request, true)?;
        execute(disk, &survey, prepared, watch)
    }

    fn merge(&self, victim: &JournalImage, heir: Option<&JournalImage>, watch: &Watch) -> Result<Outcome> {
        let disk = self.disk;
        let survey = self.survey()?;
        let index = survey.find(disk, &victim.path);
        let index = index.filter(|_| here(disk, victim)).ok_or_else(|| not_the_same(&victim.path))?;
        let keep = match heir {
            None => Keep::Child,
            Some(heir) => Keep::Parent(
                survey
                    .find(disk, &heir.path)
                    .and_then(|i| survey.files.get(i))
                    .and_then(|f| f.path.to_str().map(str::to_owned)),
            ),
        };
        let (open, merges, naming) = plan_single(disk, &survey, index, &keep, &Decided::default(), true)?;
        let plan = DeletePlan { single: Some((index, merges, naming)), ..DeletePlan::default() };
        execute(disk, &survey, Prepared { plan, open }, watch)
    }
}

/// Bytes that `make` writes for the new image with the content of the snapshot `from`.
fn copied(
    disk: &dyn Disk,
    new: &NewFile,
    from: &Inner,
    make: impl FnOnce(&Chain, &Target<'_>) -> Result<Converted>,
) -> Result<u64> {
    let trust = Trust { everything: true, ..Trust::default() };
    let id = String::from_utf8_lossy(&from.id()).into_owned();
    let options = SourceOptions { snapshot: Some(id), trust, ..SourceOptions::default() };
    let source = Source::open(disk, &from.image.path, &options)?;
    let layers = source.chain.paths().iter().cloned().zip(source.chain.layers().iter().cloned());
    let below = Chain::with_paths(layers.skip(1).collect());
    let target = Target::Qcow2(NewImage {
        options: new.options(),
        below: new.backing.is_some().then_some(&below),
        compress: None,
        carry: false,
        bitmaps: None,
    });
    Ok(make(&source.chain, &target)?.written)
}

/// Whether the image is where the journal says.
fn here(disk: &dyn Disk, image: &JournalImage) -> bool {
    disk.stat(&image.path).is_ok_and(|s| image.is(&s))
}

fn unlink(disk: &dyn Disk, path: &Path) -> Result<()> {
    disk.unlink(path).map_err(|e| Error::io("remove", path, e))?;
    let dir = directory_of(path);
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))
}

fn not_the_same(path: &Path) -> Error {
    Error::new(ErrorKind::Failed, "the file is not the one that the operation began with; it was not touched")
        .at(path)
        .hint("if the images are as they should be, remove the journal")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks_exact(2)
        .filter_map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use pleach_store::RealDisk;

    use super::*;

    #[test]
    fn what_a_killed_run_has_left_of_a_new_file_is_taken_back_with_it() {
        for whole in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().canonicalize().unwrap();
            let (path, partial) = (base.join("a.qcow2"), base.join(".a.qcow2.partial"));
            let new = NewFile::new(path.clone(), None, 1 << 20, 16);
            let mut steps = Steps::new("snapshot \"a\"".to_owned(), vec![base.clone()]);
            if whole {
                // Killed before its other name went.
                create(&RealDisk, &path, &new.options()).unwrap();
                std::fs::hard_link(&path, &partial).unwrap();
            } else {
                std::fs::write(&partial, "").unwrap();
            }
            steps.steps.push(Step::Overlay { new });
            let journal = place(&base.join(".pleach/vm.tree"));
            drop(begin(&RealDisk, &journal, &steps.encode(&base).unwrap(), &base).unwrap());
            undo(&RealDisk, &journal).unwrap();
            assert_eq!(std::fs::read_dir(&base).unwrap().count(), 0, "{whole}");
        }
    }
}
