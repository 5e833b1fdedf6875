//! Giving back what an interrupted operation left counted but unused.

use std::path::Path;

use pleach_alloc::{Allocator, Place};
use pleach_image::{Image, copied_fits, fit_copied, leaked_with};
use pleach_store::{Disk, Store};

use crate::source::{open_locked, open_writer_alone};
use crate::{Error, Result, Threads};

/// Lowers the counts of every cluster that nothing refers to, and cuts the file behind the last one in use. Returns
/// how many clusters were given back.
///
/// Safe at any instant: counts are only lowered to what the pointers say, and COPIED flags follow the counts.
///
/// # Errors
/// A damaged image, or what the system says.
pub(crate) fn give_back(path: &Path, image: &Image) -> Result<u64> {
    let wrap = |e| Error::image(path, e);
    let store = &**image.store();
    let mut allocator = Allocator::load(store, Place::of(image.header())).map_err(|e| wrap(e.into()))?;
    let leaks = leaked_with(image, &Threads).map_err(wrap)?;
    for leak in &leaks {
        allocator.set_count(leak.cluster, leak.references).map_err(|e| wrap(e.into()))?;
    }
    for write in allocator.take_writes().counts {
        store.write_at(write.offset.0, &write.bytes).map_err(|e| Error::io("write refcounts of", path, e))?;
    }
    if !leaks.is_empty() {
        store.barrier().map_err(|e| Error::io("flush the image", path, e))?;
    }
    // What several states should have shared may have reached only the active one, which then owns it alone.
    if fit_copied(image, &Threads).map_err(wrap)? {
        store.barrier().map_err(|e| Error::io("flush the image", path, e))?;
    }
    cut(path, image, &mut allocator)?;
    Ok(leaks.len() as u64)
}

/// Repairs the image at `path` if it is marked dirty, then gives back what leaked and lets COPIED flags fit. An image
/// without damage is not written to.
///
/// # Errors
/// As [`open_writer_alone`] and [`give_back`].
pub(crate) fn mend(disk: &dyn Disk, path: &Path) -> Result<()> {
    open_writer_alone(disk, path)?.close().map_err(|e| Error::image(path, e))?;
    let wrap = |e| Error::image(path, e);
    let image = Image::open(open_locked(disk, path)?).map_err(wrap)?;
    let leaks = leaked_with(&image, &Threads).map_err(wrap)?;
    if !leaks.is_empty() || !copied_fits(&image, &Threads).map_err(wrap)? {
        give_back(path, &image)?;
    }
    Ok(())
}

/// Makes the file long enough for every cluster that is counted: counts may be on the disk, and the growth of the file that
/// they are for may be lost. True if it was too short.
///
/// # Errors
/// A damaged refcount table, or what the system says.
pub(crate) fn cover_counted(path: &Path, image: &Image) -> Result<bool> {
    let store: &dyn Store = &**image.store();
    let place = Place::of(image.header());
    let allocator = Allocator::load(store, place).map_err(|e| Error::image(path, e.into()))?;
    let counted = allocator.used_end().0.saturating_mul(image.geometry().cluster_size());
    if counted <= image.file_len() {
        return Ok(false);
    }
    store.set_len(counted).map_err(|e| Error::io("set the length of", path, e))?;
    Ok(true)
}

/// Cuts clusters without a count off the end of the file.
fn cut(path: &Path, image: &Image, allocator: &mut Allocator) -> Result<()> {
    let store: &dyn Store = &**image.store();
    let cluster = image.geometry().cluster_size();
    let len = store.len().map_err(|e| Error::io("find the length of", path, e))?;
    let mut end = len.div_ceil(cluster);
    while end > 1 && allocator.count(pleach_format::HostCluster(end - 1)) == 0 {
        end -= 1;
    }
    if end * cluster < len {
        store.set_len(end * cluster).map_err(|e| Error::io("cut the end of", path, e))?;
        store.barrier().map_err(|e| Error::io("flush the image", path, e))?;
    }
    Ok(())
}
