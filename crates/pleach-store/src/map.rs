//! Read-only maps of files, for metadata. The only unsafe code of the workspace.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use memmap2::{Mmap, MmapOptions};

use crate::Store;

/// A read-only view of a file. Reads copy: the bytes of a shared file may change under a reader, so no reference into
/// the map is ever handed out.
///
/// Whoever holds a window holds a lock that keeps others from cutting the file short ([`crate::Role`]); the file is
/// shortened by nobody else in this process. A read beyond what was mapped gives zeros.
#[derive(Debug)]
pub struct Window {
    source: Source,
}

#[derive(Debug)]
enum Source {
    Map {
        map: Mmap,
        /// Where reads go first, on a file system on which reading a hole through a map fills it.
        file: Option<File>,
    },
    Owned(Arc<Vec<u8>>),
    Patched {
        below: Box<Window>,
        sectors: Arc<BTreeMap<u64, Sector>>,
        len: u64,
    },
}

/// 512 bytes, aligned in the file.
pub type Sector = [u8; 512];

impl Window {
    /// Maps all of `file`. With `keep_holes` what is read through the window takes no space in the file.
    ///
    /// # Errors
    /// What the system says, `Unsupported` for a file that cannot be mapped.
    pub(crate) fn map(file: &File, len: u64, keep_holes: bool) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        if len == 0 {
            return Ok(Self { source: Source::Owned(Arc::default()) });
        }
        // SAFETY: the map is read-only and never exposed as a slice. Its bytes are only read by `read_at`, through
        // volatile loads of bytes inside the mapped length, which do not assume that the bytes stay the same between
        // two loads. If another process cuts the file short against its lock, a load raises SIGBUS and ends the
        // process, which every on-disk state of this project survives.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        let file = keep_holes.then(|| file.try_clone()).transpose()?;
        Ok(Self { source: Source::Map { map, file } })
    }

    /// A window over a copy of all of `store`, for stores that are not files.
    ///
    /// # Errors
    /// What the store says.
    pub fn owned(store: &dyn Store) -> io::Result<Self> {
        let len = usize::try_from(store.len()?).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        let mut bytes = vec![0; len];
        store.read_at(0, &mut bytes)?;
        Ok(Self { source: Source::Owned(Arc::new(bytes)) })
    }

    /// A window of `len` bytes over `below` in which some sectors, by their number, read as given.
    pub fn patched(below: Self, sectors: Arc<BTreeMap<u64, Sector>>, len: u64) -> Self {
        Self { source: Source::Patched { below: Box::new(below), sectors, len } }
    }

    /// Bytes that the window covers.
    pub fn len(&self) -> u64 {
        match &self.source {
            Source::Patched { len, .. } => *len,
            Source::Map { map, .. } => map.len() as u64,
            Source::Owned(bytes) => bytes.len() as u64,
        }
    }

    /// Whether it covers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset`; bytes past the window's end read as zeros.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) {
        let have = self.len().saturating_sub(offset).min(buf.len() as u64);
        let (Ok(have), Ok(at)) = (usize::try_from(have), usize::try_from(offset)) else {
            buf.fill(0);
            return;
        };
        let (inside, outside) = buf.split_at_mut(have);
        outside.fill(0);
        match &self.source {
            Source::Owned(bytes) => {
                if let Some(from) = bytes.get(at..at + have) {
                    inside.copy_from_slice(from);
                }
            }
            // What cannot be read that way is met again in the map.
            Source::Map { file: Some(file), .. } if file.read_exact_at(inside, offset).is_ok() => {}
            Source::Map { map, .. } if have > 0 => copy_volatile(map, at, inside),
            Source::Map { .. } => {}
            Source::Patched { below, sectors, .. } => {
                below.read_at(offset, inside);
                patch(sectors, offset, inside);
            }
        }
    }
}

/// Puts what `sectors` say about the bytes from `offset` into `out`.
pub fn patch(sectors: &BTreeMap<u64, Sector>, offset: u64, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    let last = offset.saturating_add(out.len() as u64 - 1) / 512;
    for (number, sector) in sectors.range(offset / 512..=last) {
        let start = number * 512;
        let (skip, to) = (offset.saturating_sub(start), start.saturating_sub(offset));
        let (Ok(skip), Ok(to)) = (usize::try_from(skip), usize::try_from(to)) else { continue };
        let (from, to) = (sector.get(skip..).unwrap_or(&[]), out.get_mut(to..).unwrap_or(&mut []));
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from;
        }
    }
}

/// Copies `out.len()` bytes from `at`; the caller has checked that they lie inside the map.
fn copy_volatile(map: &Mmap, at: usize, out: &mut [u8]) {
    assert!(at.checked_add(out.len()).is_some_and(|end| end <= map.len()));
    // SAFETY: `at` is within the map (asserted above), so the pointer stays inside one allocation.
    let start = unsafe { map.as_ptr().add(at) };
    let (chunks, rest) = out.as_chunks_mut::<8>();
    let whole = chunks.len() * 8;
    for (i, chunk) in chunks.iter_mut().enumerate() {
        // SAFETY: bytes i * 8 .. i * 8 + 8 behind `start` lie inside the map; an array of bytes needs no alignment,
        // and every bit pattern is a valid one.
        *chunk = unsafe { start.add(i * 8).cast::<[u8; 8]>().read_volatile() };
    }
    for (i, byte) in rest.iter_mut().enumerate() {
        // SAFETY: as above, for the bytes behind the last whole chunk.
        *byte = unsafe { start.add(whole + i).read_volatile() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patched_sectors_hide_what_lies_below() {
        let below = Window { source: Source::Owned(Arc::new(vec![1; 2000])) };
        let sectors = Arc::new(BTreeMap::from([(1, [2; 512]), (4, [3; 512])]));
        let window = Window::patched(below, sectors, 2560);
        for (at, len) in [(0, 2560), (500, 30), (600, 10), (1000, 1000), (1990, 100), (2500, 100)] {
            let mut got = vec![0xee; len];
            window.read_at(at, &mut got);
            let byte = |at: u64| match at {
                512..1024 => 2,
                2048..2560 => 3,
                0..2000 => 1,
                _ => 0,
            };
            let want: Vec<u8> = (at..at + len as u64).map(byte).collect();
            assert_eq!(got, want, "{at} {len}");
        }
    }

    #[test]
    fn reads_inside_across_and_past_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        std::fs::write(&path, &bytes).unwrap();
        for keep_holes in [false, true] {
            let window = Window::map(&File::open(&path).unwrap(), 10_000, keep_holes).unwrap();
            for (at, len) in [(0, 16), (3, 1000), (9_990, 30), (20_000, 5), (0, 10_000), (9_999, 1)] {
                let mut got = vec![0xee; len];
                window.read_at(at, &mut got);
                let byte = |i| bytes.get(usize::try_from(at).unwrap() + i).copied().unwrap_or(0);
                let want: Vec<u8> = (0..len).map(byte).collect();
                assert_eq!(got, want, "{at} {len} {keep_holes}");
            }
        }
    }
}
