//! Names of files, and what happens to them.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc;

use crate::{FileStore, Store};

/// A file, whatever its names: device and inode.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// What kind of thing a name leads to.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A block device.
    BlockDevice,
    /// Something that is never an image: pipe, socket, character device.
    Other,
}

/// Facts about a file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Which file it is.
    pub id: FileId,
    /// What kind.
    pub kind: FileKind,
    /// Length in bytes.
    pub len: u64,
    /// Bytes that it takes on disk.
    pub allocated: u64,
    /// Number of hard links.
    pub links: u64,
    /// User id of the owner.
    pub owner: u32,
    /// Nanoseconds since the Epoch at which the file was made, where the file system tells: an inode number alone may be
    /// given to another file later.
    pub born: Option<u64>,
}

impl Stat {
    pub(crate) fn of(meta: &Metadata) -> Self {
        let kind = meta.file_type();
        Self {
            id: FileId { device: meta.dev(), inode: meta.ino() },
            kind: if kind.is_file() {
                FileKind::Regular
            } else if kind.is_dir() {
                FileKind::Directory
            } else if kind.is_block_device() {
                FileKind::BlockDevice
            } else {
                FileKind::Other
            },
            len: meta.len(),
            allocated: meta.blocks() * 512,
            links: meta.nlink(),
            owner: meta.uid(),
            born: meta
                .created()
                .ok()
                .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok())
                .and_then(|d| u64::try_from(d.as_nanos()).ok()),
        }
    }
}

/// What a file is opened for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing; the last component of the name must not be a symbolic link.
    Write,
}

/// A tree of files: names, and what can be done with them.
///
/// A change of names is durable after [`sync_dir`](Self::sync_dir) of the directory.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// The entries of a directory, sorted by name.
    ///
    /// # Errors
    /// What the system says.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// Facts about what `path` leads to, symbolic links followed.
    ///
    /// # Errors
    /// What the system says.
    fn stat(&self, path: &Path) -> io::Result<Stat>;

    /// Whether the name itself is a symbolic link.
    fn is_symlink(&self, path: &Path) -> bool;

    /// The real path behind all symbolic links.
    ///
    /// # Errors
    /// What the system says.
    fn canonical(&self, path: &Path) -> io::Result<PathBuf>;

    /// Opens a regular file or block device, never waiting for one that is neither.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` for anything that is not a file.
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Store>>;

    /// Creates a file that must not be there yet.
    ///
    /// # Errors
    /// What the system says.
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Store>>;

    /// Creates a file that must not be there yet, and that only its owner may read or write.
    ///
    /// # Errors
    /// What the system says.
    fn create_private(&self, path: &Path) -> io::Result<Arc<dyn Store>>;

    /// The user that this process acts as.
    fn user(&self) -> u32;

    /// Makes a directory unless it is there.
    ///
    /// # Errors
    /// What the system says.
    fn make_dir(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What the system says.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Gives a file another name, in place of whatever had it.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Gives a file a second name, which must be free.
    ///
    /// # Errors
    /// What the system says.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a name.
    ///
    /// # Errors
    /// What the system says.
    fn unlink(&self, path: &Path) -> io::Result<()>;

    /// Bytes that may still be written on the file system of `path`; `None` if nobody knows.
    ///
    /// # Errors
    /// What the system says.
    fn free_space(&self, _path: &Path) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// Makes changes of names in `dir` durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Gives `to` the mode and, where allowed, the owner of `from`.
    ///
    /// # Errors
    /// What the system says about the mode; the owner is kept silently where it cannot be changed.
    fn copy_attributes(&self, from: &Path, to: &Path) -> io::Result<()>;
}

/// The operating system's files.
#[derive(Copy, Clone, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut names = fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        Ok(Stat::of(&fs::metadata(path)?))
    }

    fn is_symlink(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_symlink())
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        fs::canonicalize(path)
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Store>> {
        let follow = if access == Access::Write { libc::O_NOFOLLOW } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::Write)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC | follow)
            .open(path)?;
        match Stat::of(&file.metadata()?).kind {
            FileKind::Regular | FileKind::BlockDevice => Ok(Arc::new(FileStore::new(file))),
            FileKind::Directory => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "is a directory, not an image"))
            }
            FileKind::Other => Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file")),
        }
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Store>> {
        create(path, 0o666)
    }

    fn create_private(&self, path: &Path) -> io::Result<Arc<dyn Store>> {
        create(path, 0o600)
    }

    fn user(&self) -> u32 {
        nix::unistd::geteuid().as_raw()
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            other => other,
        }
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn free_space(&self, path: &Path) -> io::Result<Option<u64>> {
        let stat = nix::sys::statvfs::statvfs(path)?;
        Ok(Some(stat.blocks_available() * stat.fragment_size()))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn copy_attributes(&self, from: &Path, to: &Path) -> io::Result<()> {
        let meta = fs::metadata(from)?;
        let now = fs::metadata(to)?;
        if (meta.uid(), meta.gid()) != (now.uid(), now.gid()) {
            let _ = std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()));
        }
        fs::set_permissions(to, fs::Permissions::from_mode(meta.permissions().mode()))
    }
}

fn create(path: &Path, mode: u32) -> io::Result<Arc<dyn Store>> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)?;
    Ok(Arc::new(FileStore::new(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(RealDisk.open(&fifo, Access::Read).is_err());
        assert!(RealDisk.open(dir.path(), Access::Read).is_err());
        assert!(RealDisk.open(Path::new("/dev/null"), Access::Read).is_err());
        let (file, link) = (dir.path().join("a"), dir.path().join("link"));
        fs::write(&file, b"x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(RealDisk.open(&link, Access::Read).is_ok());
        assert!(RealDisk.open(&link, Access::Write).is_err());
        assert!(RealDisk.create_new(&file).is_err());
        assert_eq!(RealDisk.stat(&link).unwrap(), RealDisk.stat(&file).unwrap());
    }
}
