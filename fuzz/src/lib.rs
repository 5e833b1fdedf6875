//! What the targets share: a file in memory that may fail, and writing into bytes.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use pleach_store::{FileId, FileKind, LockError, Role, Stat, Store, Window};

/// `bytes` with `new` written at `at`, longer if need be.
pub fn written(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(at + new.len()), 0);
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

/// A file in memory.
#[derive(Debug)]
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Operations that still succeed; `None`: all of them.
    left: Mutex<Option<u32>>,
}

/// Longest file: a target that wants more is stopped as a full disk stops it.
const MOST: u64 = 64 << 20;

impl Memory {
    /// A file that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), left: Mutex::new(None) })
    }

    /// Lets `n` more writing operations succeed, and then none; `None` lets all of them.
    pub fn fail_after(&self, n: Option<u32>) {
        *self.left.lock().unwrap() = n;
    }

    /// What it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock_bytes().clone()
    }

    fn lock_bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    fn step(&self) -> io::Result<()> {
        match &mut *self.left.lock().unwrap() {
            Some(0) => Err(io::Error::other("the disk fails")),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn resize(&self, len: u64) -> io::Result<MutexGuard<'_, Vec<u8>>> {
        self.step()?;
        if len > MOST {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut bytes = self.lock_bytes();
        bytes.resize(usize::try_from(len).unwrap(), 0);
        Ok(bytes)
    }
}

impl Store for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock_bytes().len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.lock_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let n = buf.len().min(bytes.len() - from);
        buf[..n].copy_from_slice(&bytes[from..from + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, new: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(new.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let len = self.len()?.max(end);
        let mut bytes = self.resize(len)?;
        let at = usize::try_from(offset).unwrap();
        bytes[at..at + new.len()].copy_from_slice(new);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.resize(len).map(drop)
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        let len = self.len()?.max(range.end);
        self.resize(len).map(drop)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.step()?;
        let mut bytes = self.lock_bytes();
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let end = at(range.end).min(bytes.len());
        let start = at(range.start).min(end);
        bytes[start..end].fill(0);
        Ok(())
    }

    fn copy_from(&self, _: &dyn Store, _: u64, _: u64, _: u64) -> io::Result<bool> {
        Ok(false)
    }

    fn barrier(&self) -> io::Result<()> {
        self.step()
    }

    fn window(&self) -> io::Result<Window> {
        Window::owned(self)
    }

    fn lock(&self, _: Role) -> Result<(), LockError> {
        Ok(())
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        Ok(vec![range])
    }

    fn stat(&self) -> io::Result<Stat> {
        let len = self.len()?;
        let id = FileId { device: 0, inode: 0 };
        Ok(Stat { id, kind: FileKind::Regular, len, allocated: len, links: 1, owner: 0, born: None })
    }
}
