//! A [`Store`] on a file of the operating system.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::disk::Stat;
use crate::{LockError, Role, Store, Window, lock};

/// An open file.
#[derive(Debug)]
pub struct FileStore {
    file: File,
}

impl FileStore {
    /// A store on `file`, which stays open as long as the store.
    pub fn new(file: File) -> Self {
        Self { file }
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = buf.split_at_mut(n).1;
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let as_off = |v: u64| i64::try_from(v).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
        let (start, len) = (as_off(range.start)?, as_off(range.end - range.start)?);
        match fallocate(self.file.as_fd(), FallocateFlags::empty(), start, len) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) if self.len()? < range.end => self.set_len(range.end),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }

    fn barrier(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn window(&self) -> io::Result<Window> {
        Window::map(&self.file, self.len()?)
    }

    fn lock(&self, role: Role) -> Result<(), LockError> {
        lock::lock(&self.file, role)
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end = range.end.min(self.len()?);
        let mut found = Vec::new();
        let mut at = range.start;
        while at < end {
            let Some(data) = seek(&self.file, at, Whence::SeekData)? else { break };
            if data >= end {
                break;
            }
            let hole = seek(&self.file, data, Whence::SeekHole)?.unwrap_or(end).min(end);
            found.push(data.max(at)..hole);
            at = hole;
        }
        Ok(found)
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(Stat::of(&self.file.metadata()?))
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// The next data or hole from `at`; `None` behind the last one.
fn seek(file: &File, at: u64, whence: Whence) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    match lseek(file.as_fd(), at, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        // A file system that does not know: all is data from here, the next hole is the end.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) if matches!(whence, Whence::SeekData) => {
            Ok(u64::try_from(at).ok())
        }
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found() {
        let file = tempfile::tempfile().unwrap();
        let store = FileStore::new(file);
        store.set_len(1 << 20).unwrap();
        store.write_at(256 << 10, &[1; 65536]).unwrap();
        let ranges = store.data_ranges(0..2 << 20).unwrap();
        let covered: u64 = ranges.iter().map(|r| r.end - r.start).sum();
        assert!(ranges.iter().all(|r| r.end <= 1 << 20));
        assert!(covered >= 65536 && ranges.iter().any(|r| r.start <= 256 << 10 && r.end >= 320 << 10));
        assert_eq!(store.data_ranges(2 << 20..3 << 20).unwrap(), []);
    }

    #[test]
    fn reserving_extends() {
        let store = FileStore::new(tempfile::tempfile().unwrap());
        store.reserve(4096..8192).unwrap();
        assert_eq!(store.len().unwrap(), 8192);
        let mut byte = [1];
        store.read_at(5000, &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }
}
