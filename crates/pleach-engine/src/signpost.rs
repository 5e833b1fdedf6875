//! Signs in directories whose images belong to a tree that has its catalog elsewhere: `.pleach/NAME.elsewhere` is one line,
//! the path of the catalog.
//!
//! A sign only helps to find a catalog. One that leads nowhere is passed over.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use pleach_lineage::Record;
use pleach_store::Disk;

use crate::Result;
use crate::catalog::{Catalog, EXTENSION, read};
use crate::journal::{DIRECTORY, directory_of, encoded};

const SIGN: &str = "elsewhere";

/// The catalogs to which the signs in the directory `images` lead.
///
/// # Errors
/// What the system says.
pub(crate) fn follow(disk: &dyn Disk, images: &Path) -> Result<Vec<PathBuf>> {
    let mut found = BTreeSet::new();
    for sign in signs(disk, images)? {
        found.extend(destination(&read(disk, &sign)?).filter(|path| disk.stat(path).is_ok()));
    }
    Ok(found.into_iter().collect())
}

/// The signs that are missing if the catalog is to say `record`: where, and with what text.
///
/// # Errors
/// What the system says.
pub(crate) fn missing(disk: &dyn Disk, catalog: &Catalog, record: &Record) -> Result<Vec<(PathBuf, String)>> {
    let directories: BTreeSet<PathBuf> =
        record.files().into_iter().map(|file| directory_of(&catalog.path_of(file))).collect();
    let elsewhere =
        |dir: &PathBuf| dir != catalog.base() && disk.canonical(dir).is_ok_and(|real| real == *dir);
    let text = format!("{}\n", encoded::text(&catalog.real_path()));
    let mut all = Vec::new();
    for dir in directories.into_iter().filter(elsewhere) {
        let mut taken = BTreeSet::new();
        let mut there = false;
        for sign in signs(disk, &dir)? {
            let says = read(disk, &sign)?;
            there |= says == text.as_bytes();
            // One that leads nowhere is in nobody's way.
            if destination(&says).is_some_and(|path| disk.stat(&path).is_ok()) {
                taken.insert(sign);
            }
        }
        let name = |n: usize| {
            let number = if n == 0 { String::new() } else { format!("-{}", n + 1) };
            dir.join(DIRECTORY).join(format!("{}{number}.{SIGN}", record.tree))
        };
        let free = (0..=taken.len()).map(name).find(|path| !taken.contains(path));
        all.extend(free.filter(|_| !there).map(|path| (path, text.clone())));
    }
    Ok(all)
}

/// The signs that lead to `catalog`, in the directories of its files.
///
/// # Errors
/// What the system says.
pub(crate) fn leading_to(disk: &dyn Disk, catalog: &Catalog) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    let directories: BTreeSet<PathBuf> =
        catalog.record.files().into_iter().map(|file| directory_of(&catalog.path_of(file))).collect();
    for dir in directories {
        for sign in signs(disk, &dir)? {
            if destination(&read(disk, &sign)?) == Some(catalog.real_path()) {
                all.push(sign);
            }
        }
    }
    Ok(all)
}

fn signs(disk: &dyn Disk, images: &Path) -> Result<Vec<PathBuf>> {
    let inside = images.join(DIRECTORY);
    if disk.stat(&inside).is_err() {
        return Ok(Vec::new());
    }
    let entries = disk.list(&inside).map_err(|e| crate::Error::io("read the directory", &inside, e))?;
    Ok(entries.into_iter().filter(|p| p.extension() == Some(OsStr::new(SIGN))).collect())
}

/// Where a sign leads, if that can be a catalog.
fn destination(text: &[u8]) -> Option<PathBuf> {
    let path = encoded::path(str::from_utf8(text).ok()?.strip_suffix('\n')?);
    let inside = path.parent().and_then(Path::file_name) == Some(OsStr::new(DIRECTORY));
    (path.is_absolute() && inside && path.extension() == Some(OsStr::new(EXTENSION))).then_some(path)
}
