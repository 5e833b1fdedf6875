//! Documents from files and directories.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use pleach_engine::{Error, ErrorKind, Result};
use pleach_libvirt::{DomainDocument, MOST_BYTES, Snapshot, root_name};

use super::refused;
use crate::output;

/// What the files that were named hold.
#[derive(Debug, Default)]
pub(crate) struct Documents {
    /// The snapshots, in the order of the files' names.
    pub(crate) snapshots: Vec<Snapshot>,
    /// The machine's definition, if any file has it.
    pub(crate) domain: Option<DomainDocument>,
}

impl Documents {
    /// Reads files, and all files of directories. A file of a directory that has no XML is passed over, with a
    /// warning; one that has, and cannot be read, is an error.
    pub(crate) fn read(paths: &[PathBuf], domain: Option<&Path>) -> Result<Self> {
        let mut found = Self::default();
        for path in paths {
            let metadata = path.metadata().map_err(|e| Error::io("find", path, e))?;
            if !metadata.is_dir() {
                found.add(path, &bytes(path)?)?;
                continue;
            }
            for file in
                files(path)?.into_iter().chain(files(&path.join(super::DOMAIN_DIRECTORY)).unwrap_or_default())
            {
                let bytes = bytes(&file)?;
                if seems_xml(&bytes) {
                    found.add(&file, &bytes)?;
                } else if file.extension().is_none_or(|ending| ending != "sh") {
                    output::warn(&Error::new(ErrorKind::Failed, "is no XML, and is passed over").at(&file));
                }
            }
        }
        if let Some(path) = domain {
            found.domain = Some(domain_document(path)?);
        }
        if found.snapshots.is_empty() {
            let error = Error::new(ErrorKind::NotFound, "no <domainsnapshot> is there");
            return Err(match paths.first() {
                Some(path) => error.at(path),
                None => error,
            });
        }
        Ok(found)
    }

    fn add(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let root = root_name(bytes).map_err(|e| refused(&e).at(path))?;
        if root == "domain" {
            if self.domain.is_some() {
                let text = "is a second definition of a machine; the snapshots of one are read at a time";
                return Err(Error::new(ErrorKind::Usage, text).at(path));
            }
            self.domain = Some(DomainDocument::parse(bytes).map_err(|e| refused(&e).at(path))?);
        } else {
            self.snapshots.push(Snapshot::parse(bytes).map_err(|e| refused(&e).at(path))?);
        }
        Ok(())
    }

    /// The machine's name, as its definition or a snapshot's has it.
    pub(crate) fn machine(&self) -> Option<&str> {
        let given = self.domain.iter().map(DomainDocument::domain);
        let embedded = self.snapshots.iter().filter_map(|one| one.facts().domain.as_ref());
        given.chain(embedded).find_map(|domain| domain.name.as_deref())
    }
}

/// A machine's definition.
pub(crate) fn domain_document(path: &Path) -> Result<DomainDocument> {
    DomainDocument::parse(&bytes(path)?).map_err(|e| refused(&e).at(path))
}

/// The regular files of a directory, sorted.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let io = |e| Error::io("read the directory", directory, e);
    let mut files = Vec::new();
    for entry in directory.read_dir().map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A file, up to one byte more than a document may have.
fn bytes(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io("read", path, e);
    if !path.metadata().map_err(io)?.is_file() {
        return Err(Error::new(ErrorKind::Failed, "is neither a directory nor a regular file").at(path));
    }
    let mut bytes = Vec::new();
    let most = u64::try_from(MOST_BYTES).unwrap_or(u64::MAX) + 1;
    File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes)).map_err(io)?;
    Ok(bytes)
}

fn seems_xml(bytes: &[u8]) -> bool {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    text.trim_ascii_start().starts_with(b"<")
}
