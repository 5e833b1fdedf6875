//! Work directories on memory, and what a directory holds, for "nothing changed".

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use tempfile::TempDir;

use crate::oracle::{Digest, hash_file};

/// Where tests put their images: memory when there is some, else the temporary directory.
#[must_use]
pub fn scratch_root() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() && tempfile::tempfile_in(&memory).is_ok() { memory } else { std::env::temp_dir() }
}

/// A directory that goes when the test ends, unless `PLEACH_KEEP` is set.
pub struct WorkDir(TempDir);

impl WorkDir {
    /// A fresh, empty directory with `label` in its name.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn new(label: &str) -> Self {
        let prefix = format!("pleach-{label}-");
        let mut dir =
            tempfile::Builder::new().prefix(&prefix).tempdir_in(scratch_root()).expect("a work directory");
        if std::env::var_os("PLEACH_KEEP").is_some() {
            dir.disable_cleanup(true);
            eprintln!("kept: {}", dir.path().display());
        }
        Self(dir)
    }
}

impl Deref for WorkDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.0.path()
    }
}

/// Names, sizes and times of everything below a directory: cheap, and moved by any write.
pub type Listing = BTreeMap<String, (u64, SystemTime)>;

/// Names and bytes of everything below a directory.
pub type Contents = BTreeMap<String, Digest>;

/// Names, sizes and modification times of every file below `dir`. Directories count only by what is in them.
///
/// # Panics
/// If the directory cannot be read.
#[must_use]
pub fn listing(dir: &Path) -> Listing {
    let stat = |path: &Path| {
        let metadata =
            fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (metadata.len(), metadata.modified().expect("this platform has modification times"))
    };
    files_below(dir).into_iter().map(|(name, path)| (name, stat(&path))).collect()
}

/// Names and bytes of every file below `dir`. Directories count only by what is in them.
///
/// # Panics
/// If something cannot be read.
#[must_use]
pub fn contents(dir: &Path) -> Contents {
    let hash = |path: &Path| hash_file(path).unwrap_or_else(|error| panic!("{error}"));
    files_below(dir).into_iter().map(|(name, path)| (name, hash(&path))).collect()
}

/// Names of the files directly in `dir`, without pleach's own directory.
///
/// # Panics
/// If the directory cannot be read.
#[must_use]
pub fn image_names(dir: &Path) -> Vec<String> {
    files_below(dir).into_keys().filter(|name| !name.starts_with(".pleach/")).collect()
}

/// What differs between two listings or contents, a line a name; empty if nothing.
#[must_use]
pub fn changes<T: PartialEq + Debug>(
    before: &BTreeMap<String, T>,
    after: &BTreeMap<String, T>,
) -> Vec<String> {
    let gone = before.keys().filter(|name| !after.contains_key(*name)).map(|name| format!("{name} is gone"));
    let rest = after.iter().filter_map(|(name, now)| match before.get(name) {
        None => Some(format!("{name} is new")),
        Some(then) if then != now => Some(format!("{name} changed: {then:?} -> {now:?}")),
        Some(_) => None,
    });
    gone.chain(rest).collect()
}

/// Copies a directory with everything in it, holes kept as holes, extents cloned where that works.
///
/// # Panics
/// If `cp` fails.
pub fn copy_dir(from: &Path, to: &Path) {
    let flags = ["-a", "--sparse=always", "--reflink=auto", "-T"];
    let status = Command::new("cp").args(flags).arg(from).arg(to).status().expect("cp is everywhere");
    assert!(status.success(), "cp {} {}: {status}", from.display(), to.display());
}

/// Overwrites bytes of a file in place, as a broken or hostile writer would.
///
/// # Panics
/// If the file cannot be written.
pub fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(path).expect("the file to patch exists");
    file.write_all_at(bytes, offset).expect("patching a test file");
}

/// What an unfinished operation has in `dir`: everything of pleach's own but catalogs and lock files.
#[must_use]
pub fn unfinished(dir: &Path) -> Vec<String> {
    let stays = |name: &str| name.ends_with(".tree") || name.ends_with("lock");
    files_below(dir).into_keys().filter(|name| name.starts_with(".pleach/") && !stays(name)).collect()
}

/// Every file and link below `dir`, by its name relative to `dir`.
fn files_below(dir: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![dir.to_path_buf()];
    while let Some(next) = waiting.pop() {
        let entries = fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display()));
        for entry in entries {
            let path = entry.expect("directory entry").path();
            if path.is_dir() && !path.is_symlink() {
                waiting.push(path);
            } else {
                let name = path.strip_prefix(dir).expect("found below dir").to_string_lossy().into_owned();
                found.insert(name, path);
            }
        }
    }
    found
}
