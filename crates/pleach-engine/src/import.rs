//! Writing guest content into a new overlay: only what differs from what it reads already.

use std::path::Path;
use std::sync::Arc;

use pleach_alloc::{Allocator, Place};
use pleach_format::{GuestCluster, L2Entry};
use pleach_image::{Chain, Image, Layer, TableEditor, clear_unknown_autoclear, publish, release};
use pleach_store::{Access, Disk, Role, Store};

use crate::{Error, ErrorKind, Result, is_zero};

/// Makes the image at `path`, which has no data of its own and stands on `below` (top first), read as `content` does.
/// Returns how many clusters were written.
///
/// # Errors
/// What the system says; an image that cannot be written.
pub fn import(disk: &dyn Disk, path: &Path, below: Vec<Arc<Layer>>, content: &dyn Store) -> Result<u64> {
    let io = |what: &'static str| move |e| Error::io(what, path, e);
    let wrap = |e| Error::image(path, e);
    let store = disk.open(path, Access::Write).map_err(io("open the image"))?;
    store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
    let image = Image::open(Arc::clone(&store)).map_err(wrap)?;
    image.check_mergeable().map_err(wrap)?;
    if image.geometry().extended_l2() {
        let feature = "importing into an image with extended L2 entries";
        return Err(wrap(pleach_image::ImageError::Unsupported { feature }));
    }
    if image.l1().iter().any(|e| e.0 != 0) {
        return Err(Error::new(ErrorKind::Failed, "the image has data of its own already").at(path));
    }
    clear_unknown_autoclear(&*store).map_err(wrap)?;
    let chain = Chain::new(below);
    let g = image.geometry();
    let (mut new, mut old) = (vec![0; g.cluster_bytes()], vec![0; g.cluster_bytes()]);
    let mut allocator = Allocator::load(&*store, Place::of(image.header())).map_err(|e| wrap(e.into()))?;
    let mut editor = TableEditor::new(&image);
    let mut written = 0;
    for index in 0..g.clusters_for(image.size()).0 {
        let cluster = GuestCluster(index);
        let at = g.guest_offset(cluster).0;
        content.read_at(at, &mut new).map_err(io("read the content for"))?;
        chain.read_at(at, &mut old).map_err(wrap)?;
        if new == old {
            continue;
        }
        if is_zero(&new) && image.header().version() == pleach_format::Version::V3 {
            editor.set(&mut allocator, cluster, L2Entry::ZERO).map_err(wrap)?;
            continue;
        }
        let host = g.host_offset(allocator.allocate().map_err(|e| wrap(e.into()))?);
        store.write_at(host.0, &new).map_err(io("write"))?;
        editor.set(&mut allocator, cluster, L2Entry::owned(host)).map_err(wrap)?;
        written += 1;
    }
    let switch = editor.finish(&mut allocator, None).map_err(wrap)?;
    publish(&*store, &mut allocator, &switch).map_err(wrap)?;
    release(&*store, &mut allocator, &switch.drops).map_err(wrap)?;
    Ok(written)
}
