//! Which images there are, and which file each of them reads: found by looking, not by trusting names.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pleach_format::{Header, SnapshotRecord};
use pleach_image::{Image, backing_path, escape, read_head};
use pleach_lineage::Reads;
use pleach_store::{Access, Disk, FileId, FileKind, Stat, Store};

use crate::catalog::raw_files;
pub use crate::trust::Trust;
use crate::trust::{Roots, named_format};
use crate::{Error, ErrorKind, Result};

/// How the bytes of a file are to be read.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// A qcow2 image.
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl FileFormat {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// The backing file of an image, as far as it could be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// The image stands alone.
    None,
    /// The file with this index in [`Survey::files`].
    File(usize),
    /// The header names a file that was not followed, and why.
    Broken {
        /// The name, escaped.
        name: String,
        /// Why it was not followed.
        why: Why,
        /// The file that the name leads to, where there is one: it may be read although we do not.
        id: Option<FileId>,
    },
}

/// Why a backing file name was not followed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// No such file.
    Missing,
    /// `json:` or a protocol.
    NotAPath,
    /// The header does not say what format the file has.
    NoFormat,
    /// A format that is neither qcow2 nor raw.
    Format,
    /// The file lies outside the directories that may be read.
    Outside,
    /// The file is not a regular file, or cannot be opened.
    Unreadable,
    /// Others say that the file is qcow2, this image says that it is raw.
    Mixed,
    /// A catalog says that the file is raw, this image says that it is qcow2.
    Raw,
}

/// A name of an image from where its backing file name means another file than from its own place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherName {
    /// The name: a symbolic link, or a second hard link.
    pub path: PathBuf,
    /// The image.
    pub reader: FileId,
    /// What it reads when it is opened under this name.
    pub read: FileId,
}

/// One image file.
#[derive(Debug)]
pub struct SurveyFile {
    /// How it was reached first.
    pub path: PathBuf,
    /// The file itself.
    pub stat: Stat,
    /// How its bytes are read.
    pub format: FileFormat,
    /// The header of a qcow2 image.
    pub header: Option<Header>,
    /// Internal snapshots of a qcow2 image.
    pub snapshots: Vec<SnapshotRecord>,
    /// What it stands on.
    pub backing: Backing,
    /// Files that read it, by index, in order.
    pub dependents: Vec<usize>,
}

/// A file with the qcow2 magic that could not be read as an image.
#[derive(Debug)]
pub struct BrokenImage {
    /// Where it is.
    pub path: PathBuf,
    /// The file itself.
    pub id: FileId,
    /// The backing file that its header seems to name, if that could be made out.
    pub reads: Option<FileId>,
    /// What is wrong.
    pub error: Error,
}

/// Everything found.
#[derive(Debug, Default)]
pub struct Survey {
    /// The images, and the files that they read.
    pub files: Vec<SurveyFile>,
    /// Files with the magic that are no readable images.
    pub broken: Vec<BrokenImage>,
    /// Regular files that could not be opened: they may be images, and may read others.
    pub unreadable: Vec<Error>,
    /// Names under which images read something else.
    pub other_names: Vec<OtherName>,
    /// Directories that were searched for dependents.
    pub directories: Vec<PathBuf>,
    aliases: Vec<(PathBuf, FileId)>,
    /// Internal snapshots were looked at, but are not kept.
    links_only: bool,
    by_id: HashMap<FileId, usize>,
    /// What the catalogs of the directories call raw.
    raw: HashSet<FileId>,
    roots: Roots,
}

impl Survey {
    /// Looks at every image in `directories`, and at what they stand on.
    ///
    /// # Errors
    /// A directory that cannot be read. Images that cannot be read are part of the result.
    pub fn of_directories(disk: &dyn Disk, directories: &[PathBuf], trust: &Trust) -> Result<Self> {
        Self { roots: Roots::of(disk, directories, trust)?, ..Self::default() }.over(disk, directories)
    }

    /// As [`of_directories`](Self::of_directories), for those who only ask who stands on whom: the internal snapshots, of
    /// which there may be much, are left out of [`SurveyFile::snapshots`].
    ///
    /// # Errors
    /// As [`of_directories`](Self::of_directories).
    pub fn of_links(disk: &dyn Disk, directories: &[PathBuf], trust: &Trust) -> Result<Self> {
        let roots = Roots::of(disk, directories, trust)?;
        Self { roots, links_only: true, ..Self::default() }.over(disk, directories)
    }

    fn over(mut self, disk: &dyn Disk, directories: &[PathBuf]) -> Result<Self> {
        for dir in directories {
            self.raw.extend(raw_in(disk, dir)?);
        }
        for dir in directories {
            self.add_directory(disk, dir)?;
        }
        self.link(disk);
        Ok(self)
    }

    /// The file at `path`, if it was found.
    pub fn find(&self, disk: &dyn Disk, path: &Path) -> Option<usize> {
        let id = disk.stat(path).ok()?.id;
        self.by_id.get(&id).copied()
    }

    /// The file with that identity, if it was found.
    pub fn find_id(&self, id: FileId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// Adds the images of one more directory, and whatever they stand on.
    ///
    /// # Errors
    /// As [`of_directories`](Self::of_directories).
    pub fn also_directory(&mut self, disk: &dyn Disk, dir: &Path) -> Result<()> {
        let known: Vec<_> = self.directories.iter().filter_map(|d| disk.canonical(d).ok()).collect();
        if disk.canonical(dir).is_ok_and(|d| known.contains(&d)) {
            return Ok(());
        }
        self.raw.extend(raw_in(disk, dir)?);
        self.add_directory(disk, dir)?;
        self.link(disk);
        Ok(())
    }

    /// The file at `path`, which somebody named: found already, or added with whatever it stands on. The format of one that
    /// is not known yet is `format`, else what its first bytes say.
    ///
    /// # Errors
    /// No such file; one that is no regular file or cannot be read; a format other than the one that is known.
    pub fn also_file(&mut self, disk: &dyn Disk, path: &Path, format: Option<FileFormat>) -> Result<usize> {
        let stat = disk.stat(path).map_err(|e| Error::io("find", path, e))?;
        if let Some(&known) = self.by_id.get(&stat.id) {
            let found = self.files.get(known).map(|f| f.format);
            return match (format, found) {
                (Some(said), Some(found)) if said != found => {
                    let text = format!("is a {} image, and was said to be {}", found.name(), said.name());
                    Err(Error::new(ErrorKind::Refused, text).at(path))
                }
                _ => Ok(known),
            };
        }
        if stat.kind != FileKind::Regular {
            return Err(Error::new(ErrorKind::Failed, "is not a regular file").at(path));
        }
        let store = disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
        let seen = if self.is_qcow2(stat.id, &*store) { FileFormat::Qcow2 } else { FileFormat::Raw };
        let own = self.own_path(disk, path);
        let added = self.add(own, stat, format.unwrap_or(seen), &*store, disk);
        self.link(disk);
        added.ok_or_else(|| match self.broken.iter().position(|b| b.id == stat.id) {
            Some(at) => self.broken.swap_remove(at).error,
            None => Error::new(ErrorKind::Failed, "cannot be read as an image").at(path),
        })
    }

    /// Adds raw files that somebody names, each unless it was found or is a qcow2 image.
    pub(crate) fn also_raw(&mut self, disk: &dyn Disk, paths: &[PathBuf]) {
        let mut added = false;
        for path in paths {
            let stat = disk.stat(path).ok().filter(|s| s.kind == FileKind::Regular);
            let Some(stat) = stat.filter(|s| !self.by_id.contains_key(&s.id)) else { continue };
            match disk.open(path, Access::Read) {
                Ok(store) if !self.is_qcow2(stat.id, &*store) => {
                    added |= self.add(path.clone(), stat, FileFormat::Raw, &*store, disk).is_some();
                }
                // A qcow2 image that is not there is among the broken ones.
                _ => {}
            }
        }
        if added {
            self.link(disk);
        }
    }

    /// The files from `file` down to the root of its chain, `file` first.
    ///
    /// # Errors
    /// A loop, or a backing file that could not be followed.
    pub fn chain(&self, file: usize) -> Result<Vec<usize>> {
        let mut chain = vec![file];
        let mut at = file;
        while let Some(f) = self.files.get(at) {
            match &f.backing {
                Backing::None => break,
                Backing::File(next) if chain.contains(next) => {
                    let back = self.files.get(*next).map(|f| f.path.clone()).unwrap_or_default();
                    return Err(Error::looping(&f.path, &back));
                }
                Backing::File(next) => {
                    chain.push(*next);
                    at = *next;
                }
                Backing::Broken { name, why, .. } => return Err(broken(&f.path, name, *why)),
            }
        }
        Ok(chain)
    }

    /// The files that hang together with `file` by backing files, itself among them.
    pub fn linked(&self, file: usize) -> BTreeSet<usize> {
        let mut found = BTreeSet::from([file]);
        let mut left = vec![file];
        while let Some(file) = left.pop().and_then(|at| self.files.get(at)) {
            let below = match file.backing {
                Backing::File(below) => Some(below),
                _ => None,
            };
            left.extend(file.dependents.iter().copied().chain(below).filter(|&next| found.insert(next)));
        }
        found
    }

    /// Whether following the backing files of `file` comes back to where it was.
    pub fn loops(&self, file: usize) -> bool {
        let mut seen = vec![file];
        let mut at = file;
        while let Some(Backing::File(next)) = self.files.get(at).map(|f| &f.backing) {
            if seen.contains(next) {
                return true;
            }
            seen.push(*next);
            at = *next;
        }
        false
    }

    /// Who reads whom, for every link that could be followed.
    pub fn reads(&self) -> Vec<Reads<FileId>> {
        let mut reads = Vec::new();
        for file in &self.files {
            let read = match &file.backing {
                Backing::File(index) => self.files.get(*index).map(|f| f.stat.id),
                Backing::Broken { id, .. } => *id,
                Backing::None => None,
            };
            if let Some(read) = read {
                reads.push(Reads { reader: file.stat.id, read });
            }
        }
        for name in &self.other_names {
            reads.push(Reads { reader: name.reader, read: name.read });
        }
        for broken in &self.broken {
            if let Some(read) = broken.reads {
                reads.push(Reads { reader: broken.id, read });
            }
        }
        reads
    }

    fn add_directory(&mut self, disk: &dyn Disk, dir: &Path) -> Result<()> {
        let entries = disk.list(dir).map_err(|e| Error::io("read the directory", dir, e))?;
        self.directories.push(dir.to_owned());
        for path in entries {
            let partial = path
                .file_name()
                .is_some_and(|n| n.as_bytes().starts_with(b".") && n.as_bytes().ends_with(b".partial"));
            let Some(stat) = disk.stat(&path).ok().filter(|s| s.kind == FileKind::Regular && !partial) else {
                continue;
            };
            let known = self.by_id.contains_key(&stat.id);
            let link = disk.is_symlink(&path);
            if known || link {
                self.aliases.push((path.clone(), stat.id));
            }
            if known {
                continue;
            }
            let real = if link { disk.canonical(&path).unwrap_or(path) } else { path };
            match disk.open(&real, Access::Read) {
                Ok(store) if self.is_qcow2(stat.id, &*store) => {
                    self.add(real, stat, FileFormat::Qcow2, &*store, disk);
                }
                Ok(_) => {}
                Err(e) => self.unreadable.push(Error::io("read", &real, e)),
            }
        }
        Ok(())
    }

    /// Adds a file, reading its header if it is qcow2. `None` for an unreadable image.
    fn add(
        &mut self,
        path: PathBuf,
        stat: Stat,
        format: FileFormat,
        store: &dyn Store,
        disk: &dyn Disk,
    ) -> Option<usize> {
        let (header, snapshots) = match format {
            FileFormat::Raw => (None, Vec::new()),
            FileFormat::Qcow2 => match read_head(store).and_then(|head| {
                let kept = !self.links_only;
                let all = Image::each_snapshot_of(store, &head.header)?;
                let snapshots = all.filter(|s| kept || s.is_err()).collect::<Result<_, _>>()?;
                Ok((head.header, snapshots))
            }) {
                Ok((header, snapshots)) => (Some(header), snapshots),
                Err(e) => {
                    let reads = seeming_backing(store).and_then(|name| {
                        let target = backing_path(&path, &name).ok()?;
                        disk.stat(&target).ok().map(|s| s.id)
                    });
                    let error = Error::image(&path, e);
                    if self.broken.iter().all(|b| b.path != path) {
                        self.broken.push(BrokenImage { path, id: stat.id, reads, error });
                    }
                    return None;
                }
            },
        };
        let index = self.files.len();
        self.by_id.insert(stat.id, index);
        let backing = Backing::None;
        self.files.push(SurveyFile {
            path,
            stat,
            format,
            header,
            snapshots,
            backing,
            dependents: Vec::new(),
        });
        Some(index)
    }

    /// Follows every backing file name, adding files until nothing new turns up.
    fn link(&mut self, disk: &dyn Disk) {
        for file in &mut self.files {
            file.dependents.clear();
        }
        let mut at = 0;
        while at < self.files.len() {
            let backing = self.follow(disk, at);
            if let Some(file) = self.files.get_mut(at) {
                file.backing = backing;
            }
            at += 1;
        }
        self.settle_formats();
        self.broken.retain(|b| !self.by_id.contains_key(&b.id));
        self.find_other_names(disk);
        let edges: Vec<(usize, usize)> = self
            .files
            .iter()
            .enumerate()
            .filter_map(|(i, f)| match f.backing {
                Backing::File(b) => Some((b, i)),
                _ => None,
            })
            .collect();
        for (backing, reader) in edges {
            if let Some(file) = self.files.get_mut(backing) {
                file.dependents.push(reader);
            }
        }
        let paths: Vec<PathBuf> = self.files.iter().map(|f| f.path.clone()).collect();
        for file in &mut self.files {
            file.dependents.sort_by_key(|&d| paths.get(d));
        }
    }

    fn follow(&mut self, disk: &dyn Disk, index: usize) -> Backing {
        let Some(file) = self.files.get(index) else { return Backing::None };
        let Some(named) = file.header.as_ref().and_then(|h| h.backing()) else { return Backing::None };
        let named = named.clone();
        let from = file.path.clone();
        let broken = |why, id| Backing::Broken { name: escape(&named.name), why, id };
        let Ok(path) = backing_path(&from, &named.name) else { return broken(Why::NotAPath, None) };
        let Ok(stat) = disk.stat(&path) else { return broken(Why::Missing, None) };
        if disk.is_symlink(&path) {
            self.aliases.push((path.clone(), stat.id));
        }
        let format = match named_format(&named) {
            Ok(format) => format,
            Err(why) => return broken(why, Some(stat.id)),
        };
        if format == FileFormat::Qcow2 && self.raw.contains(&stat.id) {
            return broken(Why::Raw, Some(stat.id));
        }
        if let Some(&known) = self.by_id.get(&stat.id) {
            return match self.files.get(known) {
                Some(f) if f.format == FileFormat::Raw && format == FileFormat::Qcow2 => {
                    broken(Why::Unreadable, Some(stat.id))
                }
                _ => Backing::File(known),
            };
        }
        if !self.roots.allow(disk, &path) {
            return broken(Why::Outside, Some(stat.id));
        }
        let opened =
            matches!(stat.kind, FileKind::Regular).then(|| disk.open(&path, Access::Read).ok()).flatten();
        let Some(store) = opened else { return broken(Why::Unreadable, Some(stat.id)) };
        let own = self.own_path(disk, &path);
        match self.add(own, stat, format, &*store, disk) {
            Some(added) => Backing::File(added),
            None => broken(Why::Unreadable, Some(stat.id)),
        }
    }

    /// The path behind all links; as a name in one of the directories that were searched, if it lies there.
    fn own_path(&self, disk: &dyn Disk, path: &Path) -> PathBuf {
        let Ok(real) = disk.canonical(path) else { return path.to_owned() };
        let home = real.parent();
        let named = self.directories.iter().find(|d| disk.canonical(d).ok().as_deref() == home);
        match (named, real.file_name()) {
            (Some(dir), Some(name)) => dir.join(name),
            _ => real,
        }
    }

    /// Names of images from where their backing file names mean other files.
    fn find_other_names(&mut self, disk: &dyn Disk) {
        self.other_names.clear();
        for (path, id) in &self.aliases {
            let Some(file) = self.by_id.get(id).and_then(|&i| self.files.get(i)) else { continue };
            let Some(named) = file.header.as_ref().and_then(|h| h.backing()) else { continue };
            let own = match &file.backing {
                Backing::File(index) => self.files.get(*index).map(|f| f.stat.id),
                Backing::Broken { id, .. } => *id,
                Backing::None => None,
            };
            let there = backing_path(path, &named.name).ok().and_then(|p| disk.stat(&p).ok()).map(|s| s.id);
            if let Some(read) = there.filter(|read| Some(*read) != own) {
                self.other_names.push(OtherName { path: path.clone(), reader: *id, read });
            }
        }
    }

    /// Whether a file is to be read as qcow2: by its first bytes, unless a catalog knows better.
    fn is_qcow2(&self, id: FileId, store: &dyn Store) -> bool {
        let mut magic = [0; 4];
        !self.raw.contains(&id) && store.read_at(0, &mut magic).is_ok() && magic == *b"QFI\xfb"
    }

    /// A file that everybody reads as raw is raw, whatever its first bytes look like: a guest wrote them.
    fn settle_formats(&mut self) {
        let mut said: BTreeMap<usize, (bool, bool)> = BTreeMap::new();
        for file in &self.files {
            if let Backing::File(b) = file.backing {
                let raw = file.header.as_ref().and_then(|h| h.backing()).and_then(|b| b.format.as_deref());
                let entry = said.entry(b).or_default();
                match raw {
                    Some(b"raw") => entry.0 = true,
                    _ => entry.1 = true,
                }
            }
        }
        for (&index, _) in said.iter().filter(|(_, (raw, qcow2))| *raw && *qcow2) {
            let id = self.files.get(index).map(|f| f.stat.id);
            for file in &mut self.files {
                let named = file.header.as_ref().and_then(|h| h.backing());
                if file.backing == Backing::File(index)
                    && let Some(named) = named.filter(|b| b.format.as_deref() == Some(b"raw"))
                {
                    file.backing = Backing::Broken { name: escape(&named.name), why: Why::Mixed, id };
                }
            }
        }
        for (index, (raw, qcow2)) in said {
            if let Some(file) = self.files.get_mut(index)
                && raw
                && !qcow2
            {
                file.format = FileFormat::Raw;
                file.header = None;
                file.snapshots.clear();
                file.backing = Backing::None;
            }
        }
    }
}

/// The error for a backing file name that was not followed.
pub fn broken(image: &Path, name: &str, why: Why) -> Error {
    let error = |kind, text: String| Error::new(kind, text).at(image);
    match why {
        Why::Missing => error(ErrorKind::Failed, format!("backing file \"{name}\" is missing"))
            .hint("put the file back, or name another one (qemu-img rebase -u)"),
        Why::NotAPath => error(
            ErrorKind::Unsupported,
            format!("backing file name \"{name}\" is not a plain path; such names are never followed"),
        ),
        Why::NoFormat => error(
            ErrorKind::Failed,
            format!("the header does not say which format the backing file \"{name}\" has"),
        )
        .hint("record it: qemu-img rebase -u -F qcow2|raw -b NAME IMAGE; it is never guessed"),
        Why::Format => error(
            ErrorKind::Unsupported,
            format!("backing file \"{name}\" has a format other than qcow2 and raw"),
        ),
        Why::Outside => error(
            ErrorKind::Failed,
            format!("backing file \"{name}\" lies outside the directories that may be read"),
        )
        .hint("allow its directory with --allow-dir DIR, or all of them with --trust"),
        Why::Mixed => error(
            ErrorKind::Refused,
            format!("the backing file \"{name}\" is raw by this header, and qcow2 by another image's"),
        )
        .hint("one of them is wrong: correct it with qemu-img rebase -u -F"),
        Why::Raw => error(
            ErrorKind::Refused,
            format!("the backing file \"{name}\" is qcow2 by this header, and raw by the catalog"),
        )
        .hint("if the header is right, move the catalog away and make another: pleach scan DIR --write"),
        Why::Unreadable => {
            error(ErrorKind::Failed, format!("backing file \"{name}\" cannot be read as an image"))
        }
    }
}

/// The files that the catalogs of a directory call raw.
fn raw_in(disk: &dyn Disk, dir: &Path) -> Result<Vec<FileId>> {
    let paths = raw_files(disk, dir)?;
    Ok(paths.iter().filter_map(|path| Some(disk.stat(path).ok()?.id)).collect())
}

/// The backing file name that a header which does not parse still seems to have.
fn seeming_backing(store: &dyn Store) -> Option<Vec<u8>> {
    let mut head = [0; 24];
    store.read_at(0, &mut head).ok()?;
    let [_, offset, rest] = head.as_chunks::<8>().0 else { return None };
    let offset = u64::from_be_bytes(*offset);
    let len = u32::from_be_bytes(*rest.first_chunk::<4>()?);
    if offset == 0 || len == 0 || len > 1023 || offset > 2 << 20 {
        return None;
    }
    let mut name = vec![0; len as usize];
    store.read_at(offset, &mut name).ok()?;
    Some(name)
}
