//! An image and what it stands on, opened for reading or for writing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_image::{Chain, Image, Layer, RawImage, WriteOptions, Writer, backing_path, escape};
use pleach_store::{Access, Disk, FileId, FileKind, Role, Store};

use crate::survey::{FileFormat, Trust, Why, broken};
use crate::trust::{Roots, named_format};
use crate::workers::Threads;
use crate::{Error, ErrorKind, Result};

/// Longest chain that is followed.
const MAX_DEPTH: usize = 512;

/// How an image is opened for reading.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// The format of the image that was named; by its first bytes if that is not said. Backing files have the format that
    /// their readers say.
    pub format: Option<FileFormat>,
    /// Read this internal snapshot, by id or name, instead of the active state.
    pub snapshot: Option<String>,
    /// What the image may make us open.
    pub trust: Trust,
    /// Read even while somebody writes; what is read may then be of no one moment.
    pub share: bool,
}

/// An image over its backing files, every file locked as long as this lives.
#[derive(Debug)]
pub struct Source {
    /// The image, readable as the guest would.
    pub chain: Chain,
    /// Whether the image was taken to be raw because nothing says otherwise.
    pub guessed_raw: bool,
}

impl Source {
    /// Opens the image at `path` and what it stands on, down to the root.
    ///
    /// Backing files are followed within the directory of `path` and where [`Trust`] allows; a data file is opened if
    /// [`Trust`] names it, else reading from that layer says that it is missing.
    ///
    /// # Errors
    /// A file that cannot be opened, read, locked ([`ErrorKind::InUse`]) or followed; a loop; no such snapshot.
    pub fn open(disk: &dyn Disk, path: &Path, options: &SourceOptions) -> Result<Self> {
        let mut opening = Opening {
            disk,
            roots: Roots::of(disk, &[directory(path)], &options.trust)?,
            options,
            seen: Vec::new(),
        };
        let (store, format, guessed_raw) = opening.top(path)?;
        let mut layers = vec![(path.to_owned(), Arc::new(opening.layer(path, store, format)?))];
        while let Some((path, layer)) = layers.last() {
            let Some(next) = opening.below(path, layer)? else { break };
            layers.push(next);
        }
        if let Some(wanted) = &options.snapshot {
            let (path, top) = layers.first_mut().expect("the image itself is there");
            let Layer::Qcow2(image) = &**top else {
                return Err(
                    Error::new(ErrorKind::NotFound, "a raw image has no internal snapshots").at(&*path)
                );
            };
            let state = image.at_snapshot(wanted.as_bytes()).map_err(|e| Error::image(path, e))?;
            *top = Arc::new(Layer::Qcow2(state));
        }
        Ok(Self { chain: Chain::with_paths(layers), guessed_raw })
    }

    /// Refuses, before anything is read, a layer whose guest data cannot be.
    ///
    /// # Errors
    /// Encryption; a data file that was not allowed.
    pub fn check_readable(&self) -> Result<()> {
        for (layer, path) in self.chain.layers().iter().zip(self.chain.paths()) {
            let Some(Err(error)) = layer.image().map(Image::check_readable) else { continue };
            return Err(Error::image(path, error));
        }
        Ok(())
    }
}

/// Opens the image at `path` for writing, locked; what it stands on is opened as by [`Source::open`], for reading. A
/// snapshot cannot be written to, so that option counts for nothing here.
///
/// # Errors
/// As [`Source::open`] and [`Writer::open`]; a file that is not a qcow2 image.
pub fn open_writer(disk: &dyn Disk, path: &Path, options: &SourceOptions) -> Result<Writer> {
    let mut opening = Opening {
        disk,
        roots: Roots::of(disk, &[directory(path)], &options.trust)?,
        options,
        seen: Vec::new(),
    };
    let store = open_locked(disk, path)?;
    let wrap = |e| Error::image(path, e);
    opening.seen.push(store.stat().map_err(|e| Error::io("look at the image", path, e))?.id);
    let image = Image::open(Arc::clone(&store)).map_err(wrap)?;
    let data_file = opening.data_file(path, &image, Access::Write)?;
    let top = Layer::Qcow2(image);
    let mut layers = Vec::new();
    let mut next = opening.below(path, &top)?;
    while let Some((path, layer)) = next {
        next = opening.below(&path, &layer)?;
        layers.push((path, layer));
    }
    let backing = (!layers.is_empty()).then(|| Chain::with_paths(layers));
    Writer::open(store, WriteOptions { backing, data_file, level: None, workers: Some(Arc::new(Threads)) })
        .map_err(wrap)
}

/// Opens the image at `path` for writing, locked, without opening anything else: for what concerns the image alone.
///
/// # Errors
/// As [`Writer::open`]; [`ErrorKind::InUse`]; a file that is not a qcow2 image.
pub fn open_writer_alone(disk: &dyn Disk, path: &Path) -> Result<Writer> {
    Writer::open(
        open_locked(disk, path)?,
        WriteOptions { workers: Some(Arc::new(Threads)), ..WriteOptions::default() },
    )
    .map_err(|e| Error::image(path, e))
}

/// The file at `path`, which is a qcow2 image, locked for writing.
pub(crate) fn open_locked(disk: &dyn Disk, path: &Path) -> Result<Arc<dyn Store>> {
    let store = disk.open(path, Access::Write).map_err(|e| Error::io("open the image", path, e))?;
    store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
    check_magic(path, &*store)?;
    Ok(store)
}

/// Refuses what is not a qcow2 image.
pub(crate) fn check_magic(path: &Path, store: &dyn Store) -> Result<()> {
    let mut magic = [0; 4];
    store.read_at(0, &mut magic).map_err(|e| Error::io("read the image", path, e))?;
    if magic != *b"QFI\xfb" {
        return Err(Error::new(ErrorKind::Unsupported, "is not a qcow2 image").at(path));
    }
    Ok(())
}

struct Opening<'a> {
    disk: &'a dyn Disk,
    roots: Roots,
    options: &'a SourceOptions,
    seen: Vec<FileId>,
}

impl Opening<'_> {
    /// The file that was named, how it is to be read, and whether that is a guess.
    fn top(&self, path: &Path) -> Result<(Arc<dyn Store>, FileFormat, bool)> {
        let store = self.disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
        if let Some(format) = self.options.format {
            return Ok((store, format, false));
        }
        let mut magic = [0; 4];
        store.read_at(0, &mut magic).map_err(|e| Error::io("read the image", path, e))?;
        let qcow2 = magic == *b"QFI\xfb";
        Ok((store, if qcow2 { FileFormat::Qcow2 } else { FileFormat::Raw }, !qcow2))
    }

    fn layer(&mut self, path: &Path, store: Arc<dyn Store>, format: FileFormat) -> Result<Layer> {
        self.lock(path, &*store)?;
        let stat = store.stat().map_err(|e| Error::io("look at the image", path, e))?;
        self.seen.push(stat.id);
        let wrap = |e| Error::image(path, e);
        match format {
            FileFormat::Raw => RawImage::open(store).map(Layer::Raw).map_err(wrap),
            FileFormat::Qcow2 => {
                let image = Image::open(store).map_err(wrap)?;
                match self.data_file(path, &image, Access::Read)? {
                    Some(data) => image.with_data_file(data).map(Layer::Qcow2).map_err(wrap),
                    None => Ok(Layer::Qcow2(image)),
                }
            }
        }
    }

    /// The backing file of `layer`, which is at `path`.
    fn below(&mut self, path: &Path, layer: &Layer) -> Result<Option<(PathBuf, Arc<Layer>)>> {
        let Some(named) = layer.image().and_then(|i| i.header().backing()) else { return Ok(None) };
        let refuse = |why| broken(path, &escape(&named.name), why);
        let next = backing_path(path, &named.name).map_err(|_| refuse(Why::NotAPath))?;
        let stat = self.disk.stat(&next).map_err(|_| refuse(Why::Missing))?;
        let format = named_format(named).map_err(refuse)?;
        if !self.roots.allow(self.disk, &next) {
            return Err(refuse(Why::Outside));
        }
        if self.seen.contains(&stat.id) {
            return Err(Error::looping(path, &next));
        }
        if self.seen.len() >= MAX_DEPTH {
            let text = format!("the chain of backing files is longer than {MAX_DEPTH} files");
            return Err(Error::new(ErrorKind::Unsupported, text).at(path));
        }
        // A device is opened only if the user named it.
        if stat.kind != FileKind::Regular {
            return Err(refuse(Why::Unreadable));
        }
        let store =
            self.disk.open(&next, Access::Read).map_err(|e| Error::io("open the backing file", &next, e))?;
        if store.stat().map_err(|e| Error::io("look at the backing file", &next, e))?.id != stat.id {
            let text = "another file took the name of the backing file while it was opened";
            return Err(Error::new(ErrorKind::Failed, text).at(&next).hint("try again"));
        }
        let layer = self.layer(&next, store, format)?;
        Ok(Some((next, Arc::new(layer))))
    }

    /// The external data file of the image at `path`, if it has one and that may be opened: one that was named on the
    /// command line, and is the very file that the header's name leads to, from the working directory (as QEMU takes it) or
    /// from the image's. A header without a name takes the only one that was named.
    fn data_file(&self, path: &Path, image: &Image, access: Access) -> Result<Option<Arc<dyn Store>>> {
        let allowed = &self.options.trust.data_files;
        if !image.external_data() || allowed.is_empty() {
            return Ok(None);
        }
        let chosen = match (image.header().data_file(), &**allowed) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(name), _) => {
                let from = [Path::new(""), path];
                let named =
                    from.iter().map(|from| backing_path(from, name)).collect::<Result<Vec<_>, _>>()?;
                let meant: Vec<FileId> =
                    named.iter().filter_map(|p| self.disk.stat(p).ok()).map(|s| s.id).collect();
                allowed.iter().find(|a| self.disk.stat(a).is_ok_and(|s| meant.contains(&s.id)))
            }
        };
        let Some(chosen) = chosen else { return Ok(None) };
        let store = self.disk.open(chosen, access).map_err(|e| Error::io("open the data file", chosen, e))?;
        match access {
            Access::Read => self.lock(chosen, &*store)?,
            Access::Write => store.lock(Role::Write).map_err(|e| Error::locked(chosen, e))?,
        }
        Ok(Some(store))
    }

    fn lock(&self, path: &Path, store: &dyn Store) -> Result<()> {
        let role = if self.options.share { Role::Look } else { Role::Read };
        store.lock(role).map_err(|e| Error::locked(path, e).hint("-U looks at it all the same"))
    }
}

/// The directory that a file lies in.
fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
