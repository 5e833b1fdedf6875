//! What images may make us open.

use std::path::{Path, PathBuf};

use pleach_format::BackingFile;
use pleach_store::Disk;

use crate::survey::{FileFormat, Why};
use crate::{Error, Result};

/// What images may make us open. Nothing but plain local names is ever followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// Directories, besides those that were named, whose files may be opened when an image names them.
    pub allowed: Vec<PathBuf>,
    /// Follow backing file names into any directory, but no link that leads out of the directory that it lies in.
    pub chain: bool,
    /// Open whatever local file an image names as its backing file.
    pub everything: bool,
    /// External data files that may be opened for the images that name them. Nothing else allows a data file.
    pub data_files: Vec<PathBuf>,
}

/// The directories whose files may be opened when an image names them.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    roots: Vec<PathBuf>,
    chain: bool,
    everything: bool,
}

impl Roots {
    /// Those that were named, and those that `trust` allows.
    ///
    /// # Errors
    /// A directory that is not there.
    pub(crate) fn of(disk: &dyn Disk, named: &[PathBuf], trust: &Trust) -> Result<Self> {
        let canonical =
            |dir: &PathBuf| disk.canonical(dir).map_err(|e| Error::io("find the directory", dir, e));
        let roots = named.iter().chain(&trust.allowed).map(canonical).collect::<Result<_>>()?;
        Ok(Self { roots, chain: trust.chain, everything: trust.everything })
    }

    /// Whether a file that an image names may be opened: it lies, behind all links, under one of the directories.
    pub(crate) fn allow(&self, disk: &dyn Disk, path: &Path) -> bool {
        if self.everything {
            return true;
        }
        let Ok(real) = disk.canonical(path) else { return false };
        let home = path.parent().and_then(|dir| disk.canonical(dir).ok());
        self.roots.iter().any(|root| real.starts_with(root))
            || self.chain && home.is_some_and(|home| real.parent() == Some(&*home))
    }
}

/// The format that a header says its backing file has: it is never guessed.
pub(crate) fn named_format(backing: &BackingFile) -> Result<FileFormat, Why> {
    match backing.format.as_deref() {
        Some(b"qcow2") => Ok(FileFormat::Qcow2),
        Some(b"raw") => Ok(FileFormat::Raw),
        Some(_) => Err(Why::Format),
        None => Err(Why::NoFormat),
    }
}
