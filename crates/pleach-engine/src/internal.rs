//! Internal snapshots of one image: taken, applied, deleted and renamed where the image lies.
//!
//! Each is one crash-safe change of one file; what belongs together on several disks is the caller's.

use std::path::{Path, PathBuf};

use pleach_image::{NewSnapshot, Writer};
use pleach_store::Disk;

use crate::survey::Survey;
use crate::{Error, ErrorKind, Result, open_writer_alone};

/// An image locked for changes of its internal snapshots.
#[derive(Debug)]
pub struct Internal {
    path: PathBuf,
    writer: Writer,
}

impl Internal {
    /// Locks the image at `path` and counts everything in it, so that nothing in use can be overwritten.
    ///
    /// # Errors
    /// As [`open_writer_alone`]: [`ErrorKind::InUse`], an image that needs repair, a file that is no qcow2 image.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<Self> {
        let writer = open_writer_alone(disk, path)?;
        Ok(Self { path: path.to_owned(), writer })
    }

    /// Keeps the active state as a snapshot; returns its id.
    ///
    /// # Errors
    /// Refcounts that are too narrow, too many snapshots, an external data file; what the system says.
    pub fn take(&self, new: &NewSnapshot) -> Result<Vec<u8>> {
        self.writer.take_snapshot(new).map_err(|e| Error::image(&self.path, e))
    }

    /// Refuses what [`apply`](Self::apply) must not do: an image that is backed by this one reads its active state, which
    /// would be another.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], naming the readers that `survey` found.
    pub fn check_apply(&self, disk: &dyn Disk, survey: &Survey) -> Result<()> {
        let id = disk.stat(&self.path).map_err(|e| Error::io("find", &self.path, e))?.id;
        let readers: Vec<_> = survey.reads().into_iter().filter(|r| r.read == id).map(|r| r.reader).collect();
        let names = survey.files.iter().map(|f| (f.stat.id, &f.path));
        let names = names.chain(survey.broken.iter().map(|b| (b.id, &b.path)));
        let names: Vec<String> = names
            .filter(|(id, _)| readers.contains(id))
            .map(|(_, path)| path.display().to_string())
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let text = format!("other images read the state that would be replaced: {}", names.join(", "));
        Err(Error::new(ErrorKind::Refused, text)
            .at(&self.path)
            .hint("delete them first, or make an overlay of the snapshot's content instead"))
    }

    /// Lets the active state be what the snapshot `wanted` (an id or, if none has that id, a name) keeps. What is active
    /// now is lost: call [`check_apply`](Self::check_apply), and ask, before.
    ///
    /// # Errors
    /// No such snapshot, an ambiguous name, bitmaps in the image; what the system says.
    pub fn apply(&self, wanted: &[u8]) -> Result<()> {
        self.writer.apply_snapshot(wanted).map_err(|e| Error::image(&self.path, e))
    }

    /// Deletes the snapshot `wanted`; what only it kept is given back.
    ///
    /// # Errors
    /// No such snapshot, an ambiguous name; what the system says.
    pub fn delete(&self, wanted: &[u8]) -> Result<()> {
        self.writer.delete_snapshot(wanted).map_err(|e| Error::image(&self.path, e))
    }

    /// Gives the snapshot `wanted` another name.
    ///
    /// # Errors
    /// As [`delete`](Self::delete).
    pub fn rename(&self, wanted: &[u8], name: &[u8]) -> Result<()> {
        self.writer.rename_snapshot(wanted, name).map_err(|e| Error::image(&self.path, e))
    }

    /// Closes the image; dropping does the same, but cannot say what went wrong.
    ///
    /// # Errors
    /// What the system says.
    pub fn close(self) -> Result<()> {
        self.writer.close().map_err(|e| Error::image(&self.path, e))
    }
}
