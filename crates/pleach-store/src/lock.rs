//! Image locks as QEMU understands them: shared OFD byte locks as flags.
//!
//! For permission i (0 consistent read, 1 write, 3 resize) byte 100 + i says "I use it" and byte 200 + i "nobody else
//! may". Everybody only takes shared locks; a conflict is found by asking whether an exclusive lock could be had.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// What a file is used for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Content is read and must not change meanwhile: sources, backing files.
    Read,
    /// The file is changed, renamed or unlinked.
    Write,
    /// Only looked at, even while somebody writes: what is read may be inconsistent.
    Look,
}

impl Role {
    /// Bytes that are locked, then bytes that nobody else may have locked.
    fn bytes(self) -> (&'static [i64], &'static [i64]) {
        match self {
            Self::Read => (&[100, 201, 203], &[200, 101, 103]),
            Self::Write => (&[100, 101, 103, 201, 203], &[200, 201, 203, 101, 103]),
            Self::Look => (&[100], &[200]),
        }
    }
}

/// Why a file could not be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody else uses the file in a way that excludes ours.
    #[error("in use by another process{}: it {what}", holder(.pid))]
    InUse {
        /// What the other one does.
        what: &'static str,
        /// Its process id, where the system tells.
        pid: Option<u32>,
    },
    /// The file system does not support open file description locks, or the system failed.
    #[error("cannot lock the file")]
    System(#[source] io::Error),
}

fn holder(pid: &Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// Locks `file` for `role`, in the order that QEMU uses: lock, then look for conflicts.
pub(crate) fn lock(file: &File, role: Role) -> Result<(), LockError> {
    let (take, free) = role.bytes();
    for &byte in take {
        set(file, byte, libc::F_RDLCK).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => in_use(file, byte),
            other => LockError::System(other.into()),
        })?;
    }
    for &byte in free {
        if held_by_other(file, byte).map_err(|errno| LockError::System(errno.into()))? {
            for &byte in take {
                // The file is closed right after this; failing to unlock changes nothing.
                let _ = set(file, byte, libc::F_UNLCK);
            }
            return Err(in_use(file, byte));
        }
    }
    Ok(())
}

fn flock(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(file: &File, byte: i64, kind: i32) -> Result<(), Errno> {
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(byte, kind))).map(drop)
}

fn held_by_other(file: &File, byte: i64) -> Result<bool, Errno> {
    let mut probe = flock(byte, libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut probe))?;
    Ok(i32::from(probe.l_type) != libc::F_UNLCK)
}

fn in_use(file: &File, byte: i64) -> LockError {
    let what = match byte {
        101 | 103 => "writes to it",
        201 | 203 => "reads it and does not share it with writers",
        _ => "does not share it",
    };
    LockError::InUse { what, pid: holder_of(file) }
}

/// The process that has a lock on the file, found by what `/proc` says of open files: OFD locks carry no pid.
fn holder_of(file: &File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let me = std::process::id();
    let inode = format!(":{} ", meta.ino());
    let processes = std::fs::read_dir("/proc").ok()?;
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        if pid == me {
            continue;
        }
        let Ok(infos) = std::fs::read_dir(process.path().join("fdinfo")) else { continue };
        for info in infos.flatten() {
            let text = std::fs::read_to_string(info.path()).unwrap_or_default();
            if text.lines().any(|l| l.starts_with("lock:") && l.contains(&inode)) {
                return Some(pid);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two descriptions of one file, as two processes would have.
    #[test]
    fn readers_share_writers_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let cases = [
            (Role::Read, Role::Read, true),
            (Role::Read, Role::Write, false),
            (Role::Write, Role::Read, false),
            (Role::Write, Role::Write, false),
            (Role::Write, Role::Look, true),
            (Role::Look, Role::Write, true),
        ];
        for (first, second, together) in cases {
            let (a, b) = (open(), open());
            lock(&a, first).unwrap();
            assert_eq!(lock(&b, second).is_ok(), together, "{first:?} then {second:?}");
            drop(a);
            assert!(lock(&b, second).is_ok(), "{second:?} after {first:?} is gone");
        }
    }

    #[test]
    fn a_refused_lock_leaves_nothing_behind() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (reader, writer, other) = (open(), open(), open());
        lock(&reader, Role::Read).unwrap();
        assert!(matches!(lock(&writer, Role::Write), Err(LockError::InUse { .. })));
        drop(reader);
        lock(&other, Role::Write).unwrap();
    }
}
