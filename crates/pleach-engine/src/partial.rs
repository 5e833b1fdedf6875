//! A file that gets its name when it is whole.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_store::{Access, Disk, LockError, Role, Store};

use crate::{Error, ErrorKind, Result};

/// A new file under the name `.NAME.partial`, removed when this is dropped before [`publish`](Self::publish).
#[derive(Debug)]
pub(crate) struct Partial<'a> {
    disk: &'a dyn Disk,
    path: PathBuf,
    partial: PathBuf,
    store: Arc<dyn Store>,
}

impl<'a> Partial<'a> {
    /// Starts the file that will be `path`, in place of what a killed run may have left of it.
    ///
    /// # Errors
    /// A file of that name; another run that is writing it; what the system says.
    pub(crate) fn create(disk: &'a dyn Disk, path: &Path) -> Result<Self> {
        if disk.stat(path).is_ok() || disk.is_symlink(path) {
            return Err(there_already(path));
        }
        let Some(name) = path.file_name() else {
            return Err(Error::new(ErrorKind::Usage, "is not the name of a file").at(path));
        };
        let mut partial = OsString::from(".");
        partial.push(name);
        partial.push(".partial");
        let partial = path.with_file_name(partial);
        remove_left_over(disk, &partial)?;
        let store = disk.create_new(&partial).map_err(|e| Error::io("create the file", &partial, e))?;
        let made = Self { disk, path: path.to_owned(), partial, store };
        made.store.lock(Role::Write).map_err(|e| Error::locked(&made.partial, e))?;
        Ok(made)
    }

    /// The file.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Gives the file, which is whole and durable, its name.
    ///
    /// # Errors
    /// A file that took the name meanwhile; what the system says.
    pub(crate) fn publish(self) -> Result<()> {
        match self.disk.link(&self.partial, &self.path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(there_already(&self.path)),
            // Not every file system has hard links.
            Err(e) if matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                if self.disk.stat(&self.path).is_ok() {
                    return Err(there_already(&self.path));
                }
                self.disk
                    .rename(&self.partial, &self.path)
                    .map_err(|e| Error::io("give the file its name", &self.path, e))?;
            }
            Err(e) => return Err(Error::io("give the file its name", &self.path, e)),
        }
        let dir = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (disk, dir, path) = (self.disk, dir.to_owned(), self.path.clone());
        // The other name goes first, so that one flush makes both durable.
        drop(self);
        disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory of", &path, e))
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        // It may have been renamed; and if it cannot be removed, the next run will say so.
        let _ = self.disk.unlink(&self.partial);
    }
}

fn there_already(path: &Path) -> Error {
    Error::new(ErrorKind::Failed, "the file is there already")
        .at(path)
        .hint("nothing is overwritten; remove the file first, or choose another name")
}

/// Removes what a killed run left, unless somebody is still writing it.
fn remove_left_over(disk: &dyn Disk, partial: &Path) -> Result<()> {
    let store = match disk.open(partial, Access::Read) {
        Ok(store) => store,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("look at the old partial file", partial, e)),
    };
    if let Err(e @ LockError::InUse { .. }) = store.lock(Role::Write) {
        return Err(Error::locked(partial, e).hint("another run is writing this file; wait for it"));
    }
    disk.unlink(partial).map_err(|e| Error::io("remove the old partial file", partial, e))
}

#[cfg(test)]
mod tests {
    use pleach_store::RealDisk;

    use super::*;

    #[test]
    fn a_name_is_given_once_and_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let names = || std::fs::read_dir(dir.path()).unwrap().count();
        drop(Partial::create(&RealDisk, &path).unwrap());
        assert_eq!(names(), 0);
        std::fs::write(dir.path().join(".a.partial"), b"left over").unwrap();
        let one = Partial::create(&RealDisk, &path).unwrap();
        one.store().write_at(0, b"whole").unwrap();
        let second = Partial::create(&RealDisk, &path).unwrap_err();
        assert_eq!(second.kind, ErrorKind::InUse, "{}", second.full());
        one.publish().unwrap();
        assert_eq!((names(), std::fs::read(&path).unwrap()), (1, b"whole".to_vec()));
        assert!(Partial::create(&RealDisk, &path).is_err());
        assert_eq!(names(), 1);
    }
}
