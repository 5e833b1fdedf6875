//! Catalogs on disk: `.pleach/NAME.tree` in the directory of the images.
//!
//! [`Record`] is what a catalog says and [`Catalog`] is the file: loaded whole, replaced whole. File names in a record are
//! relative to the directory of the images where they lie under it, so that this may be moved, else absolute; bytes that
//! are no UTF-8, and `%`, are `%NN`.
//!
//! ```
//! use pleach_engine::catalog::Catalog;
//! use pleach_lineage::{DiskRecord, Record};
//! use pleach_store::RealDisk;
//!
//! let dir = tempfile::tempdir()?;
//! let mut record = Record::new("vm1");
//! record.disks.push(DiskRecord::new("vda", Some("A.qcow2".into())));
//! let catalog = Catalog::create(&RealDisk, dir.path(), record)?;
//!
//! let paths = Catalog::list(&RealDisk, dir.path())?;
//! let mut again = Catalog::load(&RealDisk, &paths[0])?;
//! assert_eq!(again.record, catalog.record);
//! assert_eq!(again.path_of("A.qcow2"), dir.path().canonicalize()?.join("A.qcow2"));
//!
//! again.record.disks[0].active = Some("B.qcow2".into());
//! again.save(&RealDisk)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_image::escape;
use pleach_lineage::{Kind, Record, RecordError, Storage, record};
use pleach_store::{Access, Disk, FileId, Role, Store};

use crate::family::shown;
use crate::journal::{DIRECTORY, directory_of, encoded};
use crate::{Error, ErrorKind, Result, signpost};

/// Longest catalog that is read, in bytes.
const MAX_BYTES: u64 = 1 << 30;
/// Longest name of a tree, in bytes: its files are called that, with endings.
const MAX_NAME: usize = 200;
pub(crate) const EXTENSION: &str = "tree";

/// A catalog, and the file that it came from.
#[derive(Clone, Debug)]
pub struct Catalog {
    /// What it says.
    pub record: Record,
    /// The file.
    path: PathBuf,
    /// The directory of the images, behind all links.
    base: PathBuf,
    /// The bytes of the file when it was read or written last: it is replaced only if it still has them.
    text: String,
}

impl Catalog {
    /// The catalogs of a directory of images, sorted by name; then those elsewhere that name some of its images.
    ///
    /// # Errors
    /// What the system says.
    pub fn list(disk: &dyn Disk, images: &Path) -> Result<Vec<PathBuf>> {
        let inside = images.join(DIRECTORY);
        if disk.stat(&inside).is_err() {
            return Ok(Vec::new());
        }
        let entries = disk.list(&inside).map_err(|e| Error::io("read the directory", &inside, e))?;
        let here = entries.into_iter().filter(|p| p.extension() == Some(OsStr::new(EXTENSION)));
        Ok(here.chain(signpost::follow(disk, images)?).collect())
    }

    /// Where the catalog of the tree `name` is, if the images are in the directory `images`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a name that cannot be a file's.
    pub fn place(images: &Path, name: &str) -> Result<PathBuf> {
        let fine = !name.is_empty()
            && name.len() <= MAX_NAME
            && !name.starts_with('.')
            && !name.contains(|c: char| c == '/' || c.is_control());
        if !fine {
            let text = format!(
                "\"{}\" cannot be the name of a tree: it must have 1 to {MAX_NAME} bytes, begin with no dot, and have no \
                 slash or control character",
                escape(name.as_bytes())
            );
            return Err(Error::new(ErrorKind::Usage, text));
        }
        Ok(images.join(DIRECTORY).join(format!("{name}.{EXTENSION}")))
    }

    /// Reads a catalog.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] for a later format; [`ErrorKind::Corrupt`] for a file that is
    /// damaged or not sound.
    pub fn load(disk: &dyn Disk, path: &Path) -> Result<Self> {
        let bytes = read(disk, path)?;
        let record = Record::parse(&bytes).map_err(|e| {
            let error = match e {
                RecordError::Version { .. } => Error::new(ErrorKind::Unsupported, e.to_string())
                    .hint("use the version of pleach that wrote it"),
                _ => Error::new(ErrorKind::Corrupt, e.to_string())
                    .hint("move the file away, so that it is kept, then rebuild it from the images: pleach scan DIR --write"),
            };
            error.at(path)
        })?;
        let images = directory_of(&directory_of(path));
        let base = disk.canonical(&images).map_err(|e| Error::io("find the directory", &images, e))?;
        let text = String::from_utf8(bytes).map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()))?;
        Ok(Self { record, path: path.to_owned(), base, text })
    }

    /// A catalog that is not on disk yet: [`save`](Self::save) makes it, and fails if its name is taken by then.
    ///
    /// # Errors
    /// As [`place`](Self::place); a catalog of that name; a record that is not sound.
    pub fn new(disk: &dyn Disk, images: &Path, record: Record) -> Result<Self> {
        let path = Self::place(images, &record.tree)?;
        if disk.stat(&path).is_ok() {
            let text = format!("there is a tree named \"{}\" already", record.tree);
            return Err(Error::new(ErrorKind::Usage, text)
                .at(path)
                .hint("choose another name, or remove that catalog if it is not needed"));
        }
        record.check().map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))?;
        let base = disk.canonical(images).map_err(|e| Error::io("find the directory", images, e))?;
        Ok(Self { record, path, base, text: String::new() })
    }

    /// Makes a catalog; durable when this returns.
    ///
    /// # Errors
    /// As [`new`](Self::new) and [`save`](Self::save).
    pub fn create(disk: &dyn Disk, images: &Path, record: Record) -> Result<Self> {
        let mut catalog = Self::new(disk, images, record)?;
        catalog.save(disk)?;
        Ok(catalog)
    }

    /// Replaces the file by what the record says now, whole or not at all; durable when this returns.
    ///
    /// # Errors
    /// What the system says; [`ErrorKind::Failed`] if somebody else has changed the file since it was read.
    pub fn save(&mut self, disk: &dyn Disk) -> Result<()> {
        self.record
            .check()
            .map_err(|e| Error::new(ErrorKind::Failed, "the catalog would not be sound").caused(e))?;
        let dir = directory_of(&self.path);
        disk.make_dir(&dir).map_err(|e| Error::io("make the directory of the catalog", &dir, e))?;
        let now = if disk.stat(&self.path).is_ok() { read(disk, &self.path)? } else { Vec::new() };
        if now != self.text.as_bytes() {
            return Err(Error::new(ErrorKind::Failed, "the catalog was changed by somebody else meanwhile")
                .at(&self.path)
                .hint("try again"));
        }
        let text = self.record.encode();
        replace(disk, &self.path, text.as_bytes())?;
        // Whoever made the directory may have gone before this.
        disk.sync_dir(&self.base).map_err(|e| Error::io("flush the directory", &self.base, e))?;
        for (path, text) in signpost::missing(disk, self, &self.record)? {
            let dir = directory_of(&path);
            disk.make_dir(&dir).map_err(|e| Error::io("make the directory of the sign", &dir, e))?;
            replace(disk, &path, text.as_bytes())?;
        }
        self.text = text;
        Ok(())
    }

    /// Removes the file, and its directory if that is empty then.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(self, disk: &dyn Disk) -> Result<()> {
        let dir = directory_of(&self.path);
        for sign in signpost::leading_to(disk, &self)? {
            disk.unlink(&sign).map_err(|e| Error::io("remove", &sign, e))?;
        }
        disk.unlink(&self.path).map_err(|e| Error::io("remove", &self.path, e))?;
        disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))?;
        // Other catalogs may be in it.
        let _ = disk.remove_dir(&dir);
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, with its directory behind all links.
    pub fn real_path(&self) -> PathBuf {
        self.base.join(DIRECTORY).join(self.path.file_name().unwrap_or_default())
    }

    /// The directory of the images, behind all links.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// What its file was when it was read or written last, or is to be: none there.
    pub(crate) fn version(&self) -> CatalogText {
        CatalogText::of(self.text.as_bytes())
    }

    /// Whether it is not on disk yet.
    pub fn is_new(&self) -> bool {
        self.text.is_empty()
    }

    /// The path that a file name of the record means.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.base.join(encoded::path(name))
    }

    /// The file name of the record as people see it: relative to the directory of the images where it lies under it.
    pub fn shown(&self, name: &str) -> String {
        shown(&self.path_of(name), &self.base)
    }

    /// How the record names the file at `path`.
    ///
    /// # Errors
    /// A directory that cannot be found.
    pub fn name_of(&self, disk: &dyn Disk, path: &Path) -> Result<String> {
        let dir = directory_of(path);
        let real = disk.canonical(&dir).map_err(|e| Error::io("find the directory", &dir, e))?;
        let real = real.join(path.file_name().unwrap_or_default());
        Ok(encoded::text(real.strip_prefix(&self.base).unwrap_or(&real)))
    }
}

/// What tells one text of a catalog from another: its length and CRC-32.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct CatalogText(usize, u32);

impl CatalogText {
    fn of(bytes: &[u8]) -> Self {
        Self(bytes.len(), crc32fast::hash(bytes))
    }

    /// Refuses to go on if the file at `path` is another one by now.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`]; what the system says.
    pub(crate) fn still_holds(self, disk: &dyn Disk, path: &Path) -> Result<()> {
        let now = if disk.stat(path).is_ok() { read(disk, path)? } else { Vec::new() };
        if Self::of(&now) == self {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InUse, "somebody else has changed the catalog meanwhile")
            .at(path)
            .hint("try again"))
    }
}

/// What a catalog keeps in an image as a state of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The catalog.
    pub catalog: PathBuf,
    /// The node, or the disk whose active image it is, in words.
    pub what: String,
    /// Whether it is a snapshot, which must not change any more.
    pub frozen: bool,
}

/// The files that the catalogs of the directory `images` call raw, those of damaged catalogs too.
///
/// # Errors
/// What the system says.
pub(crate) fn raw_files(disk: &dyn Disk, images: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in Catalog::list(disk, images)? {
        let bytes = read(disk, &path)?;
        let base = directory_of(&directory_of(&path));
        found.extend(record::raw_files(&bytes).iter().map(|file| base.join(encoded::path(file))));
    }
    Ok(found)
}

/// What the catalogs of the directory `images` keep in the active state of the image `file`.
///
/// # Errors
/// A catalog that cannot be read: it may keep anything there.
pub fn kept_in(disk: &dyn Disk, images: &Path, file: FileId) -> Result<Vec<Kept>> {
    let mut found = Vec::new();
    for path in Catalog::list(disk, images)? {
        let catalog = Catalog::load(disk, &path)?;
        let is = |name: &str| disk.stat(&catalog.path_of(name)).is_ok_and(|stat| stat.id == file);
        let mut keep = |what: String, frozen| found.push(Kept { catalog: path.clone(), what, frozen });
        for node in &catalog.record.nodes {
            let external = |s: &Storage| matches!(s, Storage::External { file } if is(file));
            if node.storage.iter().any(|(_, storage)| external(storage)) {
                keep(format!("\"{}\"", escape(node.name.as_bytes())), node.kind == Kind::Snapshot);
            }
        }
        for active in &catalog.record.disks {
            if active.active.as_deref().is_some_and(is) {
                keep(format!("the active image of \"{}\"", escape(active.name.as_bytes())), false);
            }
        }
    }
    Ok(found)
}

/// Puts `bytes` in place of the file at `path`, or makes it: whole or not at all, and durable when this returns.
///
/// # Errors
/// What the system says.
pub(crate) fn replace(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<()> {
    replace_held(disk, path, bytes, false).map(drop)
}

/// The same; with `lock` the new file is locked before it has its name, for as long as what is returned lives.
///
/// # Errors
/// As [`replace`].
pub(crate) fn replace_held(disk: &dyn Disk, path: &Path, bytes: &[u8], lock: bool) -> Result<Arc<dyn Store>> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push("-new");
    let temp = path.with_file_name(name);
    let io = |what: &'static str| move |e| Error::io(what, path, e);
    if disk.stat(&temp).is_ok() {
        disk.unlink(&temp).map_err(|e| Error::io("remove what an interrupted write has left", &temp, e))?;
    }
    let store = disk.create_new(&temp).map_err(io("create"))?;
    let written = store.write_at(0, bytes).and_then(|()| store.barrier());
    let dir = directory_of(path);
    if lock {
        store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
    }
    let placed = written
        .and_then(|()| if disk.stat(path).is_ok() { disk.copy_attributes(path, &temp) } else { Ok(()) })
        .and_then(|()| disk.rename(&temp, path))
        .map_err(io("write"));
    if placed.is_err() {
        // The name holds nothing that anybody needs.
        let _ = disk.unlink(&temp);
    }
    placed?;
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))?;
    Ok(store)
}

/// The whole of a small file.
///
/// # Errors
/// What the system says; a file that is too long to be a catalog.
pub(crate) fn read(disk: &dyn Disk, path: &Path) -> Result<Vec<u8>> {
    let store = disk.open(path, Access::Read).map_err(|e| Error::io("open", path, e))?;
    let len = store.len().map_err(|e| Error::io("read", path, e))?;
    if len > MAX_BYTES {
        let text = format!("the file has {len} bytes, and may have {MAX_BYTES} at most");
        return Err(Error::new(ErrorKind::Corrupt, text).at(path));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    store.read_at(0, &mut bytes).map_err(|e| Error::io("read", path, e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use pleach_lineage::{DiskRecord, NodeRecord};
    use pleach_store::RealDisk;

    use super::*;

    #[test]
    fn names_of_trees() {
        let dir = Path::new("d");
        for name in ["vm1", "a b", "ä.tree", &"x".repeat(200)] {
            assert!(Catalog::place(dir, name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", ".vm", "a/b", "/", "a\nb", "a\0", &"x".repeat(201)] {
            assert_eq!(Catalog::place(dir, name).unwrap_err().kind, ErrorKind::Usage, "{name:?}");
        }
    }

    #[test]
    fn replaced_whole_and_never_over_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new("vm");
        record.disks.push(DiskRecord::new("vda", None));
        let mut first = Catalog::create(&RealDisk, dir.path(), record.clone()).unwrap();
        assert_eq!(Catalog::create(&RealDisk, dir.path(), record).unwrap_err().kind, ErrorKind::Usage);
        let mut second = Catalog::load(&RealDisk, first.path()).unwrap();
        first.record.nodes.push(NodeRecord::new("s", pleach_lineage::Kind::Snapshot));
        first.save(&RealDisk).unwrap();
        assert!(second.save(&RealDisk).is_err());
        assert_eq!(Catalog::load(&RealDisk, first.path()).unwrap().record, first.record);
        first.record.current = Some("nobody".to_owned());
        assert!(first.save(&RealDisk).is_err());
        // What an interrupted write has left is in nobody's way.
        std::fs::write(dir.path().join(".pleach/vm.tree-new"), "x").unwrap();
        first.record.current = None;
        first.save(&RealDisk).unwrap();
        assert_eq!(Catalog::list(&RealDisk, dir.path()).unwrap(), [first.path()]);
        first.remove(&RealDisk).unwrap();
        assert!(!dir.path().join(".pleach").exists());
    }

    #[test]
    fn damage_and_later_formats_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".pleach/vm.tree");
        std::fs::create_dir(dir.path().join(".pleach")).unwrap();
        for (text, kind) in
            [("pleach-tree 1\n", ErrorKind::Corrupt), ("pleach-tree 9\n", ErrorKind::Unsupported)]
        {
            std::fs::write(&path, text).unwrap();
            let error = Catalog::load(&RealDisk, &path).unwrap_err();
            assert_eq!((error.kind, error.path.as_deref()), (kind, Some(&*path)));
        }
    }

    #[test]
    fn any_file_name_comes_back() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::new(&RealDisk, dir.path(), Record::new("vm")).unwrap();
        let base = dir.path().canonicalize().unwrap();
        for name in ["A.qcow2".as_bytes(), b"50%25.qcow2", b"\xff\xfe.img", "ä\n".as_bytes()] {
            let path = base.join(OsStr::from_bytes(name));
            let named = catalog.name_of(&RealDisk, &path).unwrap();
            assert!(!named.starts_with('/'), "{named}");
            assert_eq!(catalog.path_of(&named), path);
        }
        assert_eq!(catalog.name_of(&RealDisk, Path::new("/A.qcow2")).unwrap(), "/A.qcow2");
    }
}
