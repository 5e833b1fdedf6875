//! A [`Store`] on a file of the operating system.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, copy_file_range, fallocate, posix_fadvise};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use crate::disk::{FileKind, Stat};
use crate::{LockError, Role, Store, Window, lock};

/// An open file.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    /// The stretch of data that was found last: looking for the end of a long one takes time, on some file systems. Writing
    /// makes no data a hole; what does, through this store, forgets the stretch. So it may name too much, if somebody else
    /// punches holes, but never a hole that holds data: holes are always looked for.
    data: Mutex<Range<u64>>,
}

impl FileStore {
    /// A store on `file`, which stays open as long as the store.
    pub fn new(file: File) -> Self {
        Self { file, data: Mutex::new(0..0) }
    }

    /// The first stretch of data at or behind `at`, cut off before it; `None` behind the last one.
    fn data_from(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let last = self.known_data().clone();
        if last.contains(&at) {
            return Ok(Some(at..last.end));
        }
        let Some(data) = seek(&self.file, at, Whence::SeekData)? else { return Ok(None) };
        let hole = match seek(&self.file, data, Whence::SeekHole)? {
            Some(hole) => hole,
            None => self.len()?,
        };
        *self.known_data() = data..hole;
        Ok(Some(data.max(at)..hole))
    }

    fn known_data(&self) -> MutexGuard<'_, Range<u64>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        static ZEROS: [u8; 65536] = [0; 65536];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all_at(ZEROS.get(..len).unwrap_or(&ZEROS), at)?;
            at += len as u64;
        }
        Ok(())
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        let meta = self.file.metadata()?;
        if Stat::of(&meta).kind == FileKind::BlockDevice {
            // Its metadata say 0.
            return Ok(u64::try_from(lseek(self.file.as_fd(), 0, Whence::SeekEnd)?).unwrap_or(0));
        }
        Ok(meta.len())
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

    fn start_writing_back(&self, range: Range<u64>) {
        let (Ok(start), Ok(len)) = (offset(range.start), offset(range.end - range.start)) else { return };
        // Pages that are dirty are not dropped, but written: that is all that is wanted, and nothing depends on it.
        let _ = posix_fadvise(&self.file, start, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)?;
        *self.known_data() = 0..0;
        Ok(())
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (start, len) = (offset(range.start)?, offset(range.end - range.start)?);
        match fallocate(self.file.as_fd(), FallocateFlags::empty(), start, len) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) if self.len()? < range.end => self.set_len(range.end),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.len()?);
        if range.start >= end {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self.file.as_fd(), flags, offset(range.start)?, offset(end - range.start)?) {
            Ok(()) => {
                *self.known_data() = 0..0;
                Ok(())
            }
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.write_zeros(range.start..end),
            Err(other) => Err(other.into()),
        }
    }

    fn copy_from(&self, from: &dyn Store, from_offset: u64, to_offset: u64, len: u64) -> io::Result<bool> {
        let Some(source) = from.as_file() else { return Ok(false) };
        let (mut at, mut to) = (offset(from_offset)?, offset(to_offset)?);
        let mut left = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        while left > 0 {
            match copy_file_range(source.as_fd(), Some(&mut at), self.file.as_fd(), Some(&mut to), left) {
                Ok(0) => return Ok(false),
                Ok(n) => left -= n,
                Err(Errno::EINTR) => {}
                Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => return Ok(false),
                Err(other) => return Err(other.into()),
            }
        }
        Ok(true)
    }

    fn clones_at(&self) -> Option<u64> {
        let info = fstatfs(self.file.as_fd()).ok()?;
        let kind = info.filesystem_type();
        (kind == XFS_SUPER_MAGIC || kind == BTRFS_SUPER_MAGIC)
            .then(|| u64::try_from(info.block_size()).ok())?
    }

    fn barrier(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn window(&self) -> io::Result<Window> {
        // There, a page of a hole that is read through a map becomes a page of the file.
        let in_memory = fstatfs(self.file.as_fd()).is_ok_and(|info| info.filesystem_type() == TMPFS_MAGIC);
        Window::map(&self.file, self.len()?, in_memory)
    }

    fn lock(&self, role: Role) -> Result<(), LockError> {
        lock::lock(&self.file, role)
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end = range.end.min(self.len()?);
        let mut found = Vec::new();
        let mut at = range.start;
        while at < end {
            let Some(data) = self.data_from(at)?.filter(|data| data.start < end) else { break };
            at = data.end.min(end);
            found.push(data.start..at);
        }
        Ok(found)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        seek(&self.file, offset, Whence::SeekData)
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(Stat::of(&self.file.metadata()?))
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

fn offset(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
}

/// The next data or hole from `at`; `None` behind the last one.
fn seek(file: &File, at: u64, whence: Whence) -> io::Result<Option<u64>> {
    let at = offset(at)?;
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
        assert!(store.next_data(0).unwrap().is_some_and(|at| at <= 256 << 10));
        assert_eq!(store.next_data(2 << 20).unwrap(), None);
    }

    /// Whatever changes a file through its store, the next look at its data is right: the same as that of a store that has
    /// seen nothing yet.
    #[test]
    fn data_that_were_found_are_not_remembered_for_longer_than_they_are_there() {
        const BLOCK: u64 = 64 << 10;
        const BLOCKS: u64 = 32;
        let mut state = 3u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let (dir, bytes) = (tempfile::tempdir().unwrap(), vec![1; usize::try_from(BLOCK).unwrap()]);
        let path = dir.path().join("file");
        let store = FileStore::new(File::create_new(&path).unwrap());
        let source = FileStore::new(tempfile::tempfile().unwrap());
        source.write_at(0, &bytes).unwrap();
        for step in 0..2000 {
            let (at, n) = (random(BLOCKS) * BLOCK, 1 + random(4));
            let what = random(6);
            match what {
                0 => (0..n).for_each(|i| store.write_at(at + i * BLOCK, &bytes).unwrap()),
                1 => store.discard(at..at + n * BLOCK).unwrap(),
                2 if random(4) == 0 => store.set_len(at).unwrap(),
                2 => store.set_len(store.len().unwrap().max(at)).unwrap(),
                3 => drop(store.copy_from(&source, 0, at, BLOCK).unwrap()),
                _ => {}
            }
            let range = random(BLOCKS) * BLOCK..BLOCKS * BLOCK;
            let fresh = FileStore::new(File::open(&path).unwrap());
            let joined = |store: &FileStore| {
                let mut out: Vec<Range<u64>> = Vec::new();
                for part in store.data_ranges(range.clone()).unwrap() {
                    match out.last_mut() {
                        Some(last) if last.end == part.start => last.end = part.end,
                        _ => out.push(part),
                    }
                }
                out
            };
            assert_eq!(joined(&store), joined(&fresh), "step {step}: {what} at {at}, {n} blocks");
        }
    }

    #[test]
    fn reading_metadata_fills_no_holes() {
        let memory = std::path::Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let store = FileStore::new(tempfile::tempfile_in(place).unwrap());
        store.set_len(1 << 20).unwrap();
        let (before, window) = (store.stat().unwrap().allocated, store.window().unwrap());
        let mut bytes = vec![1; 1 << 20];
        window.read_at(0, &mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 0));
        assert_eq!(store.stat().unwrap().allocated, before);
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
