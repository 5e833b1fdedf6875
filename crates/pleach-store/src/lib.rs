//! Bytes at offsets and the barriers between them: what an engine needs of files, as traits that tests can replace.
//!
//! [`Store`] is one open file: reads past its end give zeros, writes are `pwrite`s, [`Store::barrier`] makes what was
//! written durable. [`Disk`] is the tree of names around it: open, rename, unlink, and the barrier of a directory.
//! [`RealDisk`] and [`FileStore`] are the operating system's. Metadata may be read through a read-only [`Window`];
//! nothing is ever written through a map. [`Role`] locks a file the way QEMU locks its images.
//!
//! ```
//! use pleach_store::{Access, Disk, RealDisk, Role, Store};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("image");
//! let store = RealDisk.create_new(&path)?;
//! store.write_at(512, b"data")?;
//! store.barrier()?;
//!
//! let again = RealDisk.open(&path, Access::Read)?;
//! again.lock(Role::Read)?;
//! let mut bytes = [0xff; 8];
//! again.read_at(510, &mut bytes)?;
//! assert_eq!(&bytes, b"\0\0data\0\0"); // a hole before, zeros past the end
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Not for: knowing what any byte means.
#![deny(unsafe_code)]

mod disk;
mod file;
mod lock;
mod map;
mod new_file;

use std::fs::File;
use std::io;
use std::ops::Range;

pub use disk::{Access, Disk, FileId, FileKind, RealDisk, Stat};
pub use file::FileStore;
pub use lock::{LockError, Role};
pub use map::{Sector, Window, patch};
pub use new_file::{NewFile, NewFileError};

/// One open file.
///
/// Writes are visible to every reader at once and durable after the next [`barrier`](Self::barrier) that succeeds.
/// After a barrier fails nothing is known about what was written before it: stop.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Length in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; bytes past the end read as zeros.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`, making the file longer if need be.
    ///
    /// # Errors
    /// What the system says; some of the bytes may have been written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Cuts or extends the file (by a hole).
    ///
    /// # Errors
    /// What the system says.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes sure that later writes into the range find space, and that the file covers it. File systems that cannot
    /// reserve only extend the file.
    ///
    /// # Errors
    /// What the system says: `StorageFull` before anything was written.
    fn reserve(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes the range read as zeros, giving its space back where the file system can. The length stays.
    ///
    /// # Errors
    /// What the system says.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// Copies `len` bytes of another store within the kernel, sharing the space where the file system can. False, and
    /// nothing promised about the range, if that is not possible.
    ///
    /// # Errors
    /// What the system says.
    fn copy_from(&self, from: &dyn Store, from_offset: u64, offset: u64, len: u64) -> io::Result<bool>;

    /// Whether [`copy_from`](Self::copy_from) a store of the same file system shares space instead of writing, for
    /// ranges that are aligned to this many bytes.
    fn clones_at(&self) -> Option<u64> {
        None
    }

    /// Lets the system begin to write back the range, if it likes: the next [`barrier`](Self::barrier) then has less to
    /// wait for.
    fn start_writing_back(&self, _range: Range<u64>) {}

    /// Makes everything written so far durable, the length included.
    ///
    /// # Errors
    /// What the system says; see the trait.
    fn barrier(&self) -> io::Result<()>;

    /// A view for reading metadata; covers the file as long as it is now.
    ///
    /// # Errors
    /// What the system says.
    fn window(&self) -> io::Result<Window>;

    /// Locks the file for `role`; the lock lasts as long as the store.
    ///
    /// # Errors
    /// [`LockError`] if somebody else's use of the file excludes ours.
    fn lock(&self, role: Role) -> Result<(), LockError>;

    /// The parts of `range` that may hold something else than zeros, in order. Without knowledge: all of it.
    ///
    /// # Errors
    /// What the system says.
    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>>;

    /// The first byte from `offset` on that may be something else than zero; `None` if there is none in the file. Without
    /// knowledge: `offset`.
    ///
    /// # Errors
    /// What the system says.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }

    /// Facts about the open file.
    ///
    /// # Errors
    /// What the system says.
    fn stat(&self) -> io::Result<Stat>;

    /// The operating system's file, if there is one.
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// Whether the file is empty.
    ///
    /// # Errors
    /// As [`len`](Self::len).
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}
