//! A file that gets its name when it is whole.

use std::ffi::OsString;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Access, Disk, LockError, Role, Store};

/// Mode bit of a file that is not whole yet. It has no effect on regular files, so nobody else sets it.
const UNFINISHED: u32 = 0o1000;

/// A new file under the name `.NAME.partial` beside its own, which it gets when somebody says that it is whole. Dropped
/// before, it is removed.
///
/// Until then the file is locked and has the sticky bit: a later run of the same user removes what a killed one left, and
/// nothing else of that name.
#[derive(Debug)]
pub struct NewFile<'a> {
    disk: &'a dyn Disk,
    path: PathBuf,
    partial: PathBuf,
    store: Arc<dyn Store>,
    /// The file has its own name, and no other.
    renamed: bool,
}

/// Why a new file could not be made, or not be given its name. The caller adds the file's name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NewFileError {
    /// Something has that name.
    #[error("the file is there already")]
    Exists,
    /// The path ends in no name.
    #[error("is not the name of a file")]
    NoName,
    /// The name that the file has until it is whole is taken by something that no run of this kind left.
    #[error("\"{}\" is in the way: it is not what a run that was killed has left", .partial.display())]
    InTheWay {
        /// That name.
        partial: PathBuf,
    },
    /// Another run makes the same file.
    #[error("another run is writing \"{}\"", .partial.display())]
    InUse {
        /// The name that the file has until it is whole.
        partial: PathBuf,
    },
    /// The system failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl NewFileError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

impl<'a> NewFile<'a> {
    /// Starts the file that will be `path`, in place of what a killed run may have left of it.
    ///
    /// # Errors
    /// A file of that name; something else under the other name; another run that is writing it; what the system says.
    pub fn create(disk: &'a dyn Disk, path: &Path) -> Result<Self, NewFileError> {
        if disk.stat(path).is_ok() || disk.is_symlink(path) {
            return Err(NewFileError::Exists);
        }
        let partial = partial_of(path)?;
        remove_left_over(disk, &partial)?;
        let store = disk.create_new(&partial).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => NewFileError::InUse { partial: partial.clone() },
            _ => NewFileError::Io { what: "create the file", source },
        })?;
        let made = Self { disk, path: path.to_owned(), partial, store, renamed: false };
        match made.store.lock(Role::Write) {
            Err(LockError::InUse { .. }) => {
                return Err(NewFileError::InUse { partial: made.partial.clone() });
            }
            // Where nothing can be locked, the name alone keeps others away.
            Ok(()) | Err(LockError::System(_)) => {}
        }
        // On a file system without modes, what a killed run leaves is not removed.
        let _ = set_unfinished(&*made.store, true);
        Ok(made)
    }

    /// Removes what a killed run has left of the file that is `path`, or was to be. The file itself stays.
    ///
    /// # Errors
    /// As [`create`](Self::create), but for a file at `path`.
    pub fn clear(disk: &dyn Disk, path: &Path) -> Result<(), NewFileError> {
        let partial = partial_of(path)?;
        let Ok(there) = disk.stat(&partial) else { return Ok(()) };
        match disk.stat(path) {
            Ok(whole) if whole.id == there.id => {
                if let Ok(store) = disk.open(path, Access::Read) {
                    let _ = set_unfinished(&*store, false);
                }
                disk.unlink(&partial).map_err(NewFileError::io("remove the other name of the new file"))?;
            }
            _ => remove_left_over(disk, &partial)?,
        }
        sync_home(disk, path)
    }

    /// The file.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Gives the file, which is whole and durable, its name.
    ///
    /// # Errors
    /// A file that took the name meanwhile; what the system says.
    pub fn publish(mut self) -> Result<(), NewFileError> {
        self.name()?;
        self.finish()
    }

    /// Gives two files, both whole and durable, their names: `first` has its own, durably, before `second` gets one; if
    /// that fails, neither has.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn publish_both(mut first: Self, mut second: Self) -> Result<(), NewFileError> {
        first.name()?;
        if let Err(error) = first.sync_dir().and_then(|()| second.name()) {
            // What made this necessary is what the caller reports.
            let _ = first.disk.unlink(&first.path);
            return Err(error);
        }
        // Both have their names: the others go.
        let removed = first.finish();
        second.finish().and(removed)
    }

    fn name(&mut self) -> Result<(), NewFileError> {
        let io = NewFileError::io;
        let here = self.disk.stat(&self.partial).map_err(io("find the new file"))?.id;
        if here != self.store.stat().map_err(io("look at the new file"))?.id {
            return Err(NewFileError::InUse { partial: self.partial.clone() });
        }
        match self.disk.link(&self.partial, &self.path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(NewFileError::Exists),
            // Not every file system has hard links.
            Err(e) if matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                if self.disk.stat(&self.path).is_ok() || self.disk.is_symlink(&self.path) {
                    return Err(NewFileError::Exists);
                }
                self.disk.rename(&self.partial, &self.path).map_err(io("give the file its name"))?;
                self.renamed = true;
                Ok(())
            }
            Err(e) => Err(io("give the file its name")(e)),
        }
    }

    /// Removes the mark and the other name, so that one flush makes all changes durable.
    fn finish(mut self) -> Result<(), NewFileError> {
        // The mark goes only now: without it, what a run that was killed before the name was given leaves would be nobody's.
        let _ = set_unfinished(&*self.store, false);
        if !self.renamed {
            self.renamed = true;
            self.disk
                .unlink(&self.partial)
                .map_err(NewFileError::io("remove the other name of the new file"))?;
        }
        self.sync_dir()
    }

    fn sync_dir(&self) -> Result<(), NewFileError> {
        sync_home(self.disk, &self.path)
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if !self.renamed {
            // If it cannot be removed, the next run will say so.
            let _ = self.disk.unlink(&self.partial);
        }
    }
}

/// The name that the file at `path` has until it is whole.
fn partial_of(path: &Path) -> Result<PathBuf, NewFileError> {
    let mut partial = OsString::from(".");
    partial.push(path.file_name().ok_or(NewFileError::NoName)?);
    partial.push(".partial");
    Ok(path.with_file_name(partial))
}

/// Makes the names beside `path` durable.
fn sync_home(disk: &dyn Disk, path: &Path) -> Result<(), NewFileError> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk.sync_dir(dir).map_err(NewFileError::io("flush the directory of the new file"))
}

/// Sets or clears the mark of a file that is not whole.
fn set_unfinished(store: &dyn Store, unfinished: bool) -> io::Result<()> {
    let Some(file) = store.as_file() else { return Ok(()) };
    let mode = file.metadata()?.permissions().mode() & 0o7777;
    let wanted = if unfinished { mode | UNFINISHED } else { mode & !UNFINISHED };
    if wanted == mode { Ok(()) } else { file.set_permissions(Permissions::from_mode(wanted)) }
}

/// Whether `store` is what a killed run of this user has left. An empty one may have been killed before it set its mark.
fn is_left_over(disk: &dyn Disk, store: &dyn Store) -> io::Result<bool> {
    let stat = store.stat()?;
    let marked = match store.as_file() {
        Some(file) => file.metadata()?.permissions().mode() & UNFINISHED != 0,
        None => true,
    };
    Ok(stat.owner == disk.user() && stat.links == 1 && (marked || stat.len == 0))
}

/// Removes what a killed run left, unless somebody is still writing it.
fn remove_left_over(disk: &dyn Disk, partial: &Path) -> Result<(), NewFileError> {
    let in_the_way = || NewFileError::InTheWay { partial: partial.to_owned() };
    if disk.is_symlink(partial) {
        return Err(in_the_way());
    }
    let store = match disk.open(partial, Access::Read) {
        Ok(store) => store,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Err(in_the_way()),
        Err(e) => return Err(NewFileError::io("look at the old partial file")(e)),
    };
    if let Err(LockError::InUse { .. }) = store.lock(Role::Write) {
        return Err(NewFileError::InUse { partial: partial.to_owned() });
    }
    if !is_left_over(disk, &*store).map_err(NewFileError::io("look at the old partial file"))? {
        return Err(in_the_way());
    }
    disk.unlink(partial).map_err(NewFileError::io("remove the old partial file"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::RealDisk;

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_name_is_given_once_and_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        drop(NewFile::create(&RealDisk, &path).unwrap());
        assert!(names(dir.path()).is_empty());
        let one = NewFile::create(&RealDisk, &path).unwrap();
        one.store().write_at(0, b"whole").unwrap();
        let second = NewFile::create(&RealDisk, &path).unwrap_err();
        assert!(matches!(second, NewFileError::InUse { .. }), "{second}");
        one.publish().unwrap();
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["a".into()], b"whole".to_vec()));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & UNFINISHED, 0, "{mode:o}");
        assert!(matches!(NewFile::create(&RealDisk, &path), Err(NewFileError::Exists)));
        assert_eq!(names(dir.path()).len(), 1);
    }

    #[test]
    fn what_is_left_of_a_file_goes_and_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut half = NewFile::create(&RealDisk, &path).unwrap();
        half.store().write_at(0, b"half").unwrap();
        half.renamed = true;
        drop(half);
        NewFile::clear(&RealDisk, &path).unwrap();
        assert!(names(dir.path()).is_empty());
        let mut both = NewFile::create(&RealDisk, &path).unwrap();
        both.store().write_at(0, b"whole").unwrap();
        both.name().unwrap();
        both.renamed = true;
        drop(both);
        assert_eq!(names(dir.path()).len(), 2);
        NewFile::clear(&RealDisk, &path).unwrap();
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["a".into()], b"whole".to_vec()));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & UNFINISHED, 0);
        NewFile::clear(&RealDisk, &path).unwrap();
    }

    #[test]
    fn only_what_a_run_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, partial) = (dir.path().join("a"), dir.path().join(".a.partial"));
        let killed = |content: &[u8]| {
            let file = NewFile::create(&RealDisk, &path).unwrap();
            file.store().write_at(0, content).unwrap();
            // As SIGKILL: nothing is cleaned up, and the lock goes.
            let path = file.partial.clone();
            let copy = dir.path().join("kept");
            fs::hard_link(&path, &copy).unwrap();
            drop(file);
            fs::rename(&copy, &path).unwrap();
        };
        for content in [&b"half"[..], b""] {
            killed(content);
            assert_eq!(names(dir.path()), [".a.partial"]);
            drop(NewFile::create(&RealDisk, &path).unwrap());
            assert!(names(dir.path()).is_empty());
        }
        fs::write(&partial, b"somebody's").unwrap();
        let error = NewFile::create(&RealDisk, &path).unwrap_err();
        assert!(matches!(error, NewFileError::InTheWay { .. }), "{error}");
        assert_eq!(fs::read(&partial).unwrap(), b"somebody's");
        fs::remove_file(&partial).unwrap();
        std::os::unix::fs::symlink("nowhere", &partial).unwrap();
        assert!(matches!(NewFile::create(&RealDisk, &path), Err(NewFileError::InTheWay { .. })));
        fs::remove_file(&partial).unwrap();
        killed(b"linked");
        fs::hard_link(&partial, dir.path().join("other")).unwrap();
        assert!(matches!(NewFile::create(&RealDisk, &path), Err(NewFileError::InTheWay { .. })));
    }

    #[test]
    fn two_names_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let make = |path: &Path| NewFile::create(&RealDisk, path).unwrap();
        let (first, second) = (make(&a), make(&b));
        fs::write(&b, b"somebody's").unwrap();
        assert!(matches!(NewFile::publish_both(first, second), Err(NewFileError::Exists)));
        assert_eq!((names(dir.path()), fs::read(&b).unwrap()), (vec!["b".into()], b"somebody's".to_vec()));
        fs::remove_file(&b).unwrap();
        NewFile::publish_both(make(&a), make(&b)).unwrap();
        assert_eq!(names(dir.path()), ["a", "b"]);
    }
}
