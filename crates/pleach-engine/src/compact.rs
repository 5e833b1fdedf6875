//! Compaction of one image, locked, on all threads.

use std::path::Path;
use std::sync::Arc;

use pleach_image::{CompactOptions, Compaction, Image, Steps};
use pleach_store::{Access, Disk, Role};

use crate::source::{check_magic, open_locked};
use crate::{Error, ErrorKind, Result, Threads, Watch};

/// What [`compact`] would do with the image at `path`.
///
/// # Errors
/// [`ErrorKind::InUse`]; an image that needs repair, is encrypted, or is no qcow2 image; what the system says.
pub fn plan_compact(disk: &dyn Disk, path: &Path, options: CompactOptions) -> Result<Compaction> {
    let store = disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
    store.lock(Role::Read).map_err(|e| Error::locked(path, e))?;
    check_magic(path, &*store)?;
    let image = Image::open(store).map_err(|e| Error::image(path, e))?;
    pleach_image::plan_compact(&image, options, &Threads).map_err(|e| Error::image(path, e))
}

/// Gives back what the image at `path` takes and does not need, in place. `watch` is told how many bytes were moved.
///
/// # Errors
/// As [`plan_compact`]; [`ErrorKind::Interrupted`] if `watch` says so: doing it again goes on.
pub fn compact(disk: &dyn Disk, path: &Path, options: CompactOptions, watch: &Watch) -> Result<Compaction> {
    let store = open_locked(disk, path)?;
    let done = pleach_image::compact(&Arc::clone(&store), options, &Threads, watch);
    done.map_err(|e| Error::image(path, e))?.ok_or_else(|| {
        Error::new(ErrorKind::Interrupted, "the compaction was interrupted; the image is whole")
            .at(path)
            .hint(format!("pleach compact {} goes on", path.display()))
    })
}

impl Steps for Watch {
    fn expect(&self, bytes: u64) {
        Watch::expect(self, bytes);
    }

    fn advance(&self, bytes: u64) {
        Watch::advance(self, bytes);
    }

    fn stop(&self) -> bool {
        self.should_stop()
    }
}
