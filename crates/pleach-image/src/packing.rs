//! Places for compressed clusters: as many in a host cluster as fit into it and as its refcount can say.

use pleach_alloc::Allocator;
use pleach_format::{Geometry, HostOffset};

use crate::ImageError;

/// Hands out places for compressed bytes in an image that is in use, one behind the other.
#[derive(Debug, Default)]
pub struct Packing {
    /// Where the next one may start, in a cluster that this has begun.
    open: Option<HostOffset>,
}

impl Packing {
    /// Room for `len` compressed bytes, fewer than a cluster has: behind the last ones if their cluster can be shared, going
    /// on in the next one if that is the next that is free, else in a new cluster. Each cluster is counted once for them.
    ///
    /// # Errors
    /// An image that cannot grow.
    pub fn place(
        &mut self,
        allocator: &mut Allocator,
        g: Geometry,
        len: u64,
    ) -> Result<HostOffset, ImageError> {
        let open = self.open.take().filter(|at| allocator.can_raise(g.host_cluster(*at)));
        let room = open.map_or(0, |at| g.cluster_size() - at.0 % g.cluster_size());
        let at = match open {
            Some(at) if len <= room => {
                allocator.raise(g.host_cluster(at))?;
                at
            }
            _ => {
                let fresh = allocator.allocate()?;
                match open {
                    Some(at) if g.host_cluster(at).0 + 1 == fresh.0 => {
                        allocator.raise(g.host_cluster(at))?;
                        at
                    }
                    _ => g.host_offset(fresh),
                }
            }
        };
        let end = at.0 + len;
        self.open = (!g.is_aligned(end)).then_some(HostOffset(end));
        Ok(at)
    }
}
