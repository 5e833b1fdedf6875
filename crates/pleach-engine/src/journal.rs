//! The journal of one operation: what it set out to do, and the headers that no single write can switch.
//!
//! `.pleach/NAME.journal` beside the image that the operation is named after. It is durable before the first change of
//! any image and goes last. It is never needed for the images to be right: it only lets an interrupted operation be
//! finished. Records are appended; one counts only if its checksum is right and its number follows, so a torn tail is
//! ignored.
//!
//! ```text
//! record = magic "PLJ1" | type u8 | 0 u8 | 0 u16 | length u32 | number u32 | payload | crc32 of all before it
//! ```
//! All integers are big-endian. `BEGIN` (1) holds the operation as JSON; `HEADER` (2) holds a path and the new bytes of
//! that image's header.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_store::{Access, Disk, Store};
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"PLJ1";
const FIXED: usize = 16;
const BEGIN: u8 = 1;
const HEADER: u8 = 2;
/// Directory of everything that pleach keeps beside images.
pub(crate) const DIRECTORY: &str = ".pleach";

/// An image as the journal knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalImage {
    /// Absolute path.
    pub path: PathBuf,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// The operation, as it was meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub enum Intent {
    /// Several files go; nothing is copied. Leaves first.
    Remove {
        /// The files.
        files: Vec<JournalImage>,
        /// Directories searched for dependents, absolute.
        directories: Vec<PathBuf>,
    },
    /// One file goes, its content merged into those that stand on it.
    Merge {
        /// The file whose state goes.
        victim: JournalImage,
        /// The files that read it.
        dependents: Vec<JournalImage>,
        /// The one of them that is merged with the victim's file by copying into that, if any.
        committed: Option<JournalImage>,
        /// The one of them that takes the victim's name, if any.
        renamed: Option<JournalImage>,
        /// The files that read the renamed one, and must be told its new name.
        followers: Vec<JournalImage>,
        /// Directories searched for dependents, absolute.
        directories: Vec<PathBuf>,
    },
}

/// A journal read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// The operation; `None` if the journal was not finished when the crash came, and nothing had begun.
    pub(crate) intent: Option<Intent>,
    /// Headers: absolute path and new bytes.
    pub(crate) headers: Vec<(PathBuf, Vec<u8>)>,
}

/// An open journal.
#[derive(Debug)]
pub(crate) struct Journal<'a> {
    disk: &'a dyn Disk,
    path: PathBuf,
    store: Arc<dyn Store>,
    end: u64,
    number: u32,
}

/// Where the journal of an operation on `image` is.
pub(crate) fn journal_path(image: &Path) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(".journal");
    directory_of(image).join(DIRECTORY).join(name)
}

/// The directory that a file lies in; `.` for a bare name.
pub(crate) fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The journals in a directory of images.
///
/// # Errors
/// What the system says.
pub fn pending(disk: &dyn Disk, directory: &Path) -> Result<Vec<PathBuf>> {
    let inside = directory.join(DIRECTORY);
    if disk.stat(&inside).is_err() {
        return Ok(Vec::new());
    }
    let entries = disk.list(&inside).map_err(|e| Error::io("read the directory", &inside, e))?;
    Ok(entries.into_iter().filter(|p| p.extension() == Some(OsStr::new("journal"))).collect())
}

impl<'a> Journal<'a> {
    /// Begins an operation named after `image`: when this returns, the intent is durable.
    ///
    /// # Errors
    /// What the system says; [`ErrorKind::Failed`] if there is a journal already.
    pub(crate) fn begin(disk: &'a dyn Disk, image: &Path, intent: &Intent) -> Result<Self> {
        let path = journal_path(image);
        let dir = directory_of(&path);
        if disk.stat(&path).is_ok() {
            return Err(unfinished(&path));
        }
        let new_dir = disk.stat(&dir).is_err();
        let io = |what: &'static str| {
            let path = path.clone();
            move |e| Error::io(what, &path, e)
        };
        disk.make_dir(&dir).map_err(io("make the directory of the journal"))?;
        let temp = path.with_extension("journal-new");
        let made = (|| {
            if disk.stat(&temp).is_ok() {
                disk.unlink(&temp).map_err(io("remove an old, unfinished journal"))?;
            }
            let store = disk.create_new(&temp).map_err(io("create the journal"))?;
            let payload = serde_json::to_vec(intent)
                .map_err(|e| Error::new(ErrorKind::Failed, "cannot write down the operation").caused(e))?;
            let record = encode(BEGIN, 0, &payload)?;
            store.write_at(0, &record).map_err(io("write the journal"))?;
            store.barrier().map_err(io("flush the journal"))?;
            disk.rename(&temp, &path).map_err(io("give the journal its name"))?;
            disk.sync_dir(&dir).map_err(io("flush the directory of the journal"))?;
            if new_dir {
                let above = directory_of(&dir);
                disk.sync_dir(&above).map_err(io("flush the directory of the images"))?;
            }
            Ok(Self { disk, path: path.clone(), store, end: record.len() as u64, number: 1 })
        })();
        if made.is_err() {
            // Nothing has begun: leave nothing behind. What cannot be removed is harmless.
            let _ = disk.unlink(&temp);
            let _ = disk.unlink(&path);
            let _ = disk.remove_dir(&dir);
        }
        made
    }

    /// Opens a journal again, to go on with it.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn reopen(disk: &'a dyn Disk, path: &Path) -> Result<(Self, Contents)> {
        let io = |what: &'static str| move |e| Error::io(what, path, e);
        let store = disk.open(path, Access::Write).map_err(io("open the journal"))?;
        let len = store.len().map_err(io("read the journal"))?;
        let mut bytes = vec![0; usize::try_from(len.min(64 << 20)).unwrap_or(0)];
        store.read_at(0, &mut bytes).map_err(io("read the journal"))?;
        let (contents, end, number) = decode(&bytes);
        Ok((Self { disk, path: path.to_owned(), store, end, number }, contents))
    }

    /// Records the new header of the image at `path`; durable when this returns.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn header(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let path = path.as_os_str().as_bytes();
        let len = u32::try_from(path.len()).unwrap_or(u32::MAX);
        let payload = [&len.to_be_bytes(), path, bytes].concat();
        let record = encode(HEADER, self.number, &payload)?;
        let io = |what: &'static str| {
            let path = self.path.clone();
            move |e| Error::io(what, &path, e)
        };
        self.store.write_at(self.end, &record).map_err(io("write the journal"))?;
        self.store.barrier().map_err(io("flush the journal"))?;
        self.end += record.len() as u64;
        self.number += 1;
        Ok(())
    }

    /// Ends the operation: the journal goes.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn end(self) -> Result<()> {
        let dir = directory_of(&self.path);
        self.disk.unlink(&self.path).map_err(|e| Error::io("remove the journal", &self.path, e))?;
        self.disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory of the journal", &dir, e))?;
        // Other journals or catalogs may be in it.
        let _ = self.disk.remove_dir(&dir);
        Ok(())
    }
}

/// The error for an operation that meets another's journal.
pub(crate) fn unfinished(journal: &Path) -> Error {
    let images = directory_of(&directory_of(journal));
    Error::new(ErrorKind::Failed, "an earlier operation on these images was interrupted")
        .at(journal)
        .hint(format!("finish it first: pleach resume {}", images.display()))
}

fn encode(kind: u8, number: u32, payload: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(payload.len())
        .map_err(|_| Error::new(ErrorKind::Failed, "the operation is too large for a journal"))?;
    let mut record = MAGIC.to_vec();
    record.extend([kind, 0, 0, 0]);
    record.extend(len.to_be_bytes());
    record.extend(number.to_be_bytes());
    record.extend(payload);
    let crc = crc32fast::hash(&record);
    record.extend(crc.to_be_bytes());
    Ok(record)
}

/// Reads records until one is not right. Returns what they say, where they end, and the next record's number. Never
/// fails: any bytes are a journal that ends somewhere.
pub(crate) fn decode(bytes: &[u8]) -> (Contents, u64, u32) {
    let mut contents = Contents::default();
    let mut at = 0;
    let mut number = 0u32;
    while let Some((kind, payload, len)) = record(bytes.get(at..).unwrap_or(&[]), number) {
        match kind {
            BEGIN if number == 0 => contents.intent = serde_json::from_slice(payload).ok(),
            HEADER => {
                if let Some((len, rest)) = payload.split_first_chunk::<4>()
                    && let Some((path, bytes)) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)
                {
                    contents.headers.push((PathBuf::from(OsStr::from_bytes(path)), bytes.to_vec()));
                }
            }
            _ => {}
        }
        at += len;
        number = number.saturating_add(1);
    }
    (contents, at as u64, number)
}

fn record(bytes: &[u8], number: u32) -> Option<(u8, &[u8], usize)> {
    let fixed = bytes.get(..FIXED)?;
    let field =
        |at: usize| fixed.get(at..at + 4).and_then(|f| f.first_chunk::<4>()).map(|f| u32::from_be_bytes(*f));
    if !fixed.starts_with(&MAGIC) || field(12)? != number {
        return None;
    }
    let end = FIXED.checked_add(field(8)? as usize)?;
    let payload = bytes.get(FIXED..end)?;
    let crc = bytes.get(end..)?.first_chunk::<4>()?;
    (u32::from_be_bytes(*crc) == crc32fast::hash(bytes.get(..end)?)).then_some(())?;
    Some((*fixed.get(4)?, payload, end + 4))
}

#[cfg(test)]
mod tests {
    use pleach_store::RealDisk;

    use super::*;

    fn intent() -> Intent {
        let image = |n: &str| JournalImage { path: PathBuf::from(n), device: 1, inode: 2 };
        Intent::Merge {
            victim: image("/d/B"),
            dependents: vec![image("/d/D")],
            committed: None,
            renamed: Some(image("/d/D")),
            followers: vec![],
            directories: vec!["/d".into()],
        }
    }

    #[test]
    fn survives_a_torn_tail_and_ends_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("B.qcow2");
        let mut journal = Journal::begin(&RealDisk, &image, &intent()).unwrap();
        assert!(Journal::begin(&RealDisk, &image, &intent()).is_err(), "one at a time");
        journal.header(Path::new("/d/D"), b"new header").unwrap();
        let path = journal_path(&image);
        let whole = std::fs::read(&path).unwrap();
        let want =
            Contents { intent: Some(intent()), headers: vec![("/d/D".into(), b"new header".to_vec())] };
        assert_eq!(decode(&whole).0, want);
        for cut in 0..whole.len() {
            let (contents, end, _) = decode(&whole[..cut]);
            assert!(contents.headers.is_empty() && end <= cut as u64, "{cut}");
            let mut torn = whole.clone();
            torn[cut] ^= 0x10;
            assert_ne!(decode(&torn).0, want, "byte {cut} flipped");
        }
        assert_eq!(pending(&RealDisk, dir.path()).unwrap(), [path]);
        journal.end().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
