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
//! All integers are big-endian. `BEGIN` (1) holds the operation as JSON, with paths relative to the directory of the
//! images where they lie under it, so that a moved directory can be resumed; `HEADER` (2) holds an image's inode number,
//! and the old and the new bytes of its header. Only its owner may write a journal, and nobody else's is followed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_store::{Access, Disk, LockError, Role, Stat, Store};
use serde::{Deserialize, Serialize};

use crate::bitmaps::BitmapPolicy;
use crate::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"PLJ1";
const FIXED: usize = 16;
const BEGIN: u8 = 1;
const HEADER: u8 = 2;
/// Directory of everything that pleach keeps beside images.
pub(crate) const DIRECTORY: &str = ".pleach";
/// Ending of the journals of operations on whole trees.
pub(crate) const STEPS: &str = "steps";

/// An image as the journal knows it. The device number is not part of it: it may change when a machine restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalImage {
    /// Absolute path; in the journal relative to the directory of the images, if it lies under that.
    #[serde(with = "encoded")]
    pub path: PathBuf,
    /// Inode number.
    pub inode: u64,
    /// When the file was made, where the file system tells.
    pub born: Option<u64>,
}

impl JournalImage {
    /// Whether `stat` is of this image.
    pub(crate) fn is(&self, stat: &Stat) -> bool {
        self.inode == stat.id.inode && (self.born == stat.born || self.born.is_none() || stat.born.is_none())
    }
}

/// Paths as JSON strings: bytes that are no UTF-8, and `%`, as `%NN`.
pub(crate) mod encoded {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn text(path: &Path) -> String {
        let mut out = String::new();
        for chunk in path.as_os_str().as_bytes().utf8_chunks() {
            out.push_str(&chunk.valid().replace('%', "%25"));
            chunk.invalid().iter().for_each(|b| out.push_str(&format!("%{b:02x}")));
        }
        out
    }

    pub(crate) fn path(text: &str) -> PathBuf {
        let mut parts = text.split('%');
        let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
        for part in parts {
            match part.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => bytes.push(byte),
                None => bytes.push(b'%'),
            }
            bytes.extend(part.get(2..).unwrap_or_default().as_bytes());
        }
        PathBuf::from(OsString::from_vec(bytes))
    }

    pub(crate) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&text(path))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        String::deserialize(deserializer).map(|t| path(&t))
    }

    /// The same for lists.
    pub(crate) mod list {
        use serde::{Deserialize, Deserializer, Serializer};

        use super::{Path, PathBuf};

        pub(crate) fn serialize<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(paths.iter().map(|p: &PathBuf| super::text(Path::new(p))))
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<PathBuf>, D::Error> {
            Ok(Vec::<String>::deserialize(d)?.iter().map(|t| super::path(t)).collect())
        }
    }
}

/// The operation, as it was meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub enum Intent {
    /// Several files go; nothing is copied. Leaves first.
    Remove {
        /// The files.
        files: Vec<JournalImage>,
        /// Directories searched for dependents; paths as of images.
        #[serde(with = "encoded::list")]
        directories: Vec<PathBuf>,
    },
    /// One file goes, its content merged into those that stand on it.
    Merge {
        /// The file whose state goes.
        victim: JournalImage,
        /// The files that read it; of several files that go, the one that reads the uppermost.
        dependents: Vec<JournalImage>,
        /// Files between the victim and its only dependent, top first, that go too.
        #[serde(default)]
        between: Vec<JournalImage>,
        /// The one of them that is merged with the victim's file by copying into that, if any.
        committed: Option<JournalImage>,
        /// The one of them that takes the victim's name, if any.
        renamed: Option<JournalImage>,
        /// The files that read the renamed one, and must be told its new name.
        followers: Vec<JournalImage>,
        /// The name that the merged file gets, if it is a new one.
        #[serde(default)]
        name: Option<NewName>,
        /// The dependent stays on the victim, and holds nothing afterwards.
        #[serde(default)]
        emptied: bool,
        /// What becomes of bitmaps.
        #[serde(default)]
        bitmaps: BitmapPolicy,
        /// Directories searched for dependents; paths as of images.
        #[serde(with = "encoded::list")]
        directories: Vec<PathBuf>,
    },
    /// One image gets another backing file, and reads the same.
    Rebase {
        /// The image.
        image: JournalImage,
        /// What it is to stand on; nothing if that is left out.
        onto: Option<NewBacking>,
        /// Only the header changes.
        unchecked: bool,
        /// Directories searched for images; paths as of images.
        #[serde(with = "encoded::list")]
        directories: Vec<PathBuf>,
    },
}

/// A name that no file has when an operation begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewName {
    /// Where; paths as of images.
    #[serde(with = "encoded")]
    pub path: PathBuf,
}

/// What an image is to stand on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewBacking {
    /// Where it is; paths as of images.
    #[serde(with = "encoded")]
    pub path: PathBuf,
    /// The file that was looked at, if one was.
    pub file: Option<JournalImage>,
    /// QEMU's name of its format.
    pub format: String,
    /// Whether the header calls it by an absolute name.
    pub absolute: bool,
}

/// A journal read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// The operation; `None` if the journal was not finished when the crash came, and nothing had begun.
    pub(crate) intent: Option<Intent>,
    /// The operation is written down, but not in words that are known here.
    pub(crate) foreign: bool,
    /// Headers that one write could not switch.
    pub(crate) headers: Vec<HeaderRecord>,
}

/// The header of one image, before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeaderRecord {
    /// Inode number of the image.
    pub(crate) inode: u64,
    /// The start of the file as it was.
    pub(crate) old: Vec<u8>,
    /// As it is to be; of the same length.
    pub(crate) new: Vec<u8>,
}

impl Intent {
    /// Every image that is named.
    pub(crate) fn images(&self) -> Vec<&JournalImage> {
        match self {
            Self::Remove { files, .. } => files.iter().collect(),
            Self::Merge { victim, dependents, between, followers, .. } => {
                std::iter::once(victim).chain(dependents).chain(between).chain(followers).collect()
            }
            Self::Rebase { image, .. } => vec![image],
        }
    }

    /// Whether what is said of single files is said of those that are named.
    fn is_sound(&self) -> bool {
        match self {
            Self::Merge { dependents, committed, renamed, .. } => {
                committed.iter().chain(renamed).all(|one| dependents.contains(one))
            }
            Self::Remove { .. } | Self::Rebase { .. } => true,
        }
    }

    /// The same with each path changed.
    fn map(self, change: impl Fn(PathBuf) -> PathBuf) -> Self {
        let image = |i: JournalImage| JournalImage { path: change(i.path.clone()), ..i };
        let images = |all: Vec<JournalImage>| all.into_iter().map(image).collect();
        let paths = |all: Vec<PathBuf>| all.into_iter().map(&change).collect();
        match self {
            Self::Remove { files, directories } => {
                Self::Remove { files: images(files), directories: paths(directories) }
            }
            Self::Merge {
                victim,
                dependents,
                between,
                committed,
                renamed,
                followers,
                name,
                emptied,
                bitmaps,
                directories,
            } => Self::Merge {
                victim: image(victim),
                dependents: images(dependents),
                between: images(between),
                committed: committed.map(image),
                renamed: renamed.map(image),
                followers: images(followers),
                name: name.map(|name| NewName { path: change(name.path) }),
                emptied,
                bitmaps,
                directories: paths(directories),
            },
            Self::Rebase { image: rebased, onto, unchecked, directories } => Self::Rebase {
                image: image(rebased),
                onto: onto.map(|new| NewBacking {
                    path: change(new.path.clone()),
                    file: new.file.clone().map(image),
                    ..new
                }),
                unchecked,
                directories: paths(directories),
            },
        }
    }
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
    let entries = match disk.list(&inside) {
        // Whoever had the last file in it has just ended.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io("read the directory", &inside, e))?,
    };
    let is_journal = |p: &PathBuf| p.extension().is_some_and(|e| e == "journal" || e == STEPS);
    Ok(entries.into_iter().filter(is_journal).collect())
}

/// Removes what is left of journals that were never begun, and of journals and catalogs that were not put in place: nothing
/// was changed by them.
///
/// # Errors
/// What the system says.
pub(crate) fn clear_unbegun(disk: &dyn Disk, directory: &Path) -> Result<()> {
    let inside = directory.join(DIRECTORY);
    if disk.stat(&inside).is_err() {
        return Ok(());
    }
    for path in disk.list(&inside).map_err(|e| Error::io("read the directory", &inside, e))? {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if ["journal-new", "steps-begun", "steps-new", "tree-new", "elsewhere-new"].contains(&extension) {
            disk.unlink(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    // Other journals or catalogs may be in it.
    let _ = disk.remove_dir(&inside);
    Ok(())
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
            return Err(unfinished(disk, &path));
        }
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
            let store = disk.create_private(&temp).map_err(io("create the journal"))?;
            let images = directory_of(&dir);
            let base = disk.canonical(&images).map_err(|e| Error::io("find the directory", &images, e))?;
            let inside = |p: PathBuf| p.strip_prefix(&base).map(Path::to_owned).unwrap_or(p);
            let payload = serde_json::to_vec(&intent.clone().map(inside))
                .map_err(|e| Error::new(ErrorKind::Failed, "cannot write down the operation").caused(e))?;
            let record = encode(BEGIN, 0, &payload)?;
            store.write_at(0, &record).map_err(io("write the journal"))?;
            store.barrier().map_err(io("flush the journal"))?;
            store.lock(Role::Write).map_err(|e| Error::locked(&temp, e))?;
            disk.rename(&temp, &path).map_err(io("give the journal its name"))?;
            disk.sync_dir(&dir).map_err(io("flush the directory of the journal"))?;
            // An earlier run may have made the directory and gone before this.
            let above = directory_of(&dir);
            disk.sync_dir(&above).map_err(io("flush the directory of the images"))?;
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
        if store.stat().map_err(io("look at the journal"))?.owner != disk.user() {
            return Err(Error::new(
                ErrorKind::Refused,
                "the journal belongs to another user; it is not followed",
            )
            .at(path)
            .hint("resume as the user who began the operation"));
        }
        store.lock(Role::Write).map_err(|_| at_work(path))?;
        let len = store.len().map_err(io("read the journal"))?;
        let mut bytes = vec![0; usize::try_from(len.min(64 << 20)).unwrap_or(0)];
        store.read_at(0, &mut bytes).map_err(io("read the journal"))?;
        let (mut contents, end, number) = decode(&bytes);
        if contents.foreign {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the journal was written by another version of pleach",
            )
            .at(path)
            .hint("resume with the version that began the operation"));
        }
        let images = directory_of(&directory_of(path));
        let base = disk.canonical(&images).map_err(|e| Error::io("find the directory", &images, e))?;
        contents.intent = contents.intent.map(|intent| intent.map(|p| base.join(p)));
        Ok((Self { disk, path: path.to_owned(), store, end, number }, contents))
    }

    /// Records the header of the image with that inode number, before and after; durable when this returns.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn header(&mut self, inode: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let payload = [&inode.to_be_bytes()[..], old, new].concat();
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

/// The error for an operation that meets another's journal: that one is at work, or was interrupted. Whoever works has
/// the journal locked.
pub fn unfinished(disk: &dyn Disk, journal: &Path) -> Error {
    let now = || disk.stat(journal).ok().map(|stat| stat.id);
    // One that is another file by now, or gone, is somebody's who goes on, or has just ended.
    let alive = match disk.open(journal, Access::Read) {
        Ok(store) => {
            matches!(store.lock(Role::Read), Err(LockError::InUse { .. }))
                || store.stat().ok().map(|stat| stat.id) != now()
        }
        Err(_) => now().is_none(),
    };
    if alive {
        return at_work(journal);
    }
    let images = directory_of(&directory_of(journal));
    Error::new(ErrorKind::Failed, "an earlier operation on these images was interrupted")
        .at(journal)
        .hint(format!("finish it first: pleach resume {}", images.display()))
}

/// The error for a journal that is locked.
pub(crate) fn at_work(journal: &Path) -> Error {
    Error::new(ErrorKind::InUse, "another operation on these images is at work")
        .at(journal)
        .hint("wait until it has ended, then try again")
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
            BEGIN if number == 0 => {
                contents.intent = serde_json::from_slice(payload).ok().filter(Intent::is_sound);
                contents.foreign = contents.intent.is_none();
            }
            HEADER => {
                if let Some((inode, both)) = payload.split_first_chunk::<8>()
                    && let Some((old, new)) = both.split_at_checked(both.len() / 2)
                {
                    let inode = u64::from_be_bytes(*inode);
                    contents.headers.push(HeaderRecord { inode, old: old.to_vec(), new: new.to_vec() });
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

    fn intent(dir: &Path) -> Intent {
        let image = |n: &str| JournalImage { path: dir.join(n), inode: 2, born: Some(7) };
        Intent::Merge {
            victim: image("B 100%"),
            dependents: vec![image("D")],
            between: vec![],
            committed: None,
            renamed: Some(image("D")),
            followers: vec![],
            name: None,
            emptied: false,
            bitmaps: BitmapPolicy::Merge,
            directories: vec![dir.into(), "/elsewhere".into()],
        }
    }

    #[test]
    fn survives_a_torn_tail_and_ends_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        let image = real.join("B.qcow2");
        let mut journal = Journal::begin(&RealDisk, &image, &intent(&real)).unwrap();
        assert!(Journal::begin(&RealDisk, &image, &intent(&real)).is_err(), "one at a time");
        journal.header(9, b"old header", b"new header").unwrap();
        let path = journal_path(&image);
        let whole = std::fs::read(&path).unwrap();
        let want = decode(&whole).0;
        let header = HeaderRecord { inode: 9, old: b"old header".to_vec(), new: b"new header".to_vec() };
        assert_eq!(want.headers, [header]);
        for cut in 0..whole.len() {
            let (contents, end, _) = decode(&whole[..cut]);
            assert!(contents.headers.is_empty() && end <= cut as u64, "{cut}");
            let mut torn = whole.clone();
            torn[cut] ^= 0x10;
            assert_ne!(decode(&torn).0, want, "byte {cut} flipped");
        }
        assert_eq!(pending(&RealDisk, &real).unwrap(), std::slice::from_ref(&path));
        // Nobody goes on with it while somebody does.
        assert_eq!(unfinished(&RealDisk, &path).kind, ErrorKind::InUse);
        assert!(Journal::reopen(&RealDisk, &path).is_err_and(|e| e.kind == ErrorKind::InUse));
        drop(journal);
        assert_eq!(unfinished(&RealDisk, &path).kind, ErrorKind::Failed);
        // Another place, the same images.
        let (journal, contents) = Journal::reopen(&RealDisk, &path).unwrap();
        assert_eq!(contents.intent, Some(intent(&real)));
        let moved = tempfile::tempdir().unwrap();
        std::fs::create_dir(moved.path().join(DIRECTORY)).unwrap();
        let there = journal_path(&moved.path().join("B.qcow2"));
        std::fs::copy(&path, &there).unwrap();
        let (_, contents) = Journal::reopen(&RealDisk, &there).unwrap();
        assert_eq!(contents.intent, Some(intent(&std::fs::canonicalize(moved.path()).unwrap())));
        journal.end().unwrap();
        assert_eq!(std::fs::read_dir(&real).unwrap().count(), 0);
    }

    #[test]
    fn words_of_another_version_are_not_taken_for_nothing() {
        let record = encode(BEGIN, 0, b"{\"operation\":\"compact\"}").unwrap();
        assert!(decode(&record).0.foreign);
        assert!(!decode(&record[..record.len() - 1]).0.foreign);
        // A file that takes part must be one of those that are named.
        let mut meant = intent(Path::new("/there"));
        let text = |meant: &Intent| encode(BEGIN, 0, &serde_json::to_vec(meant).unwrap()).unwrap();
        assert!(!decode(&text(&meant)).0.foreign);
        if let Intent::Merge { renamed: Some(renamed), .. } = &mut meant {
            renamed.inode += 1;
        }
        assert!(decode(&text(&meant)).0.foreign);
    }

    #[test]
    fn any_name_survives() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        for name in [&b"plain"[..], b"100%", b"%41", b"\xff\xfe/x", "gr\u{fc}n".as_bytes(), b"%"] {
            let path = Path::new(OsStr::from_bytes(name));
            assert_eq!(encoded::path(&encoded::text(path)), path, "{path:?}");
        }
    }
}
