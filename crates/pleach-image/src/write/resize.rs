//! Another virtual size (reliability: one write of the header's first sector makes it visible).

use pleach_alloc::{Allocator, Place, RefcountTable};
use pleach_format::{FormatError, GuestCluster, GuestOffset, HostOffset, Version};

use super::{State, Writer};
use crate::cell::Cell;
use crate::recount::{drop_blocks, needed_blocks, references};
use crate::{ImageError, clear_unknown_autoclear};

impl Writer {
    /// Refuses what [`resize`](Self::resize) would refuse.
    ///
    /// # Errors
    /// As there.
    pub fn check_resize(&self, size: u64) -> Result<(), ImageError> {
        self.read().may_resize(size)
    }

    /// Makes the disk `size` bytes long. What is new reads as zeros, whatever the image, a longer backing file or a
    /// virtual machine's saved state held there. What is cut off is gone: ask before.
    ///
    /// ```text
    /// grow    written so far                      a crash leaves
    ///         1  zeros behind the old end         the old disk: nothing there is read
    ///         2  size and L1 table (one write)    the old disk or the new one
    /// shrink  1  copies of the L1 table and of    the old disk
    ///            the last L2 table, cut
    ///         2  size and L1 table (one write)    the old disk or the new one, plus leaks
    ///         3  lowered counts, no refcount      the new disk, plus leaks
    ///            blocks that count nothing else,
    ///            a shorter file
    /// ```
    ///
    /// # Errors
    /// [`ImageError::Refused`] for sizes that are not a positive multiple of 512, for version 2 images over a longer backing
    /// file, and for images with inconsistent bitmaps; [`ImageError::Format`] for sizes too large for the cluster size;
    /// [`ImageError::Unsupported`] for version 2 images with snapshots.
    pub fn resize(&self, size: u64) -> Result<(), ImageError> {
        let mut state = self.write();
        state.may_resize(size)?;
        state.settle()?;
        state.guard(|state| {
            clear_unknown_autoclear(&*state.store)?;
            let bitmaps = state.suspend_bitmaps()?;
            match size >= state.image.size() {
                true => state.grow(size)?,
                false => state.shrink(size)?,
            }
            state.resume_bitmaps(bitmaps, size)?;
            state.barrier()
        })
    }
}

impl State {
    fn may_resize(&self, size: u64) -> Result<(), ImageError> {
        self.image.check_readable()?;
        let refuse = |what: String| Err(ImageError::Refused { what });
        let (g, header) = (self.shape.geometry, self.image.header());
        if size == 0 || !size.is_multiple_of(512) {
            return refuse(format!("the new size is {size}, must be a positive multiple of 512"));
        }
        let most = g.max_disk();
        if size > most {
            let source = FormatError::OutOfRange { field: "virtual size", value: size, min: 512, max: most };
            return Err(ImageError::Format { structure: "option", offset: None, source });
        }
        if header.version() == Version::V2 {
            if header.nb_snapshots() != 0 {
                return Err(ImageError::Unsupported {
                    feature: "resizing a version 2 image with internal snapshots",
                });
            }
            if self.image.size() < size && self.backing.size() > self.image.size() {
                return refuse(
                    "the backing file is longer than the image: what is new could not read as zeros in a version 2 image"
                        .to_owned(),
                );
            }
        }
        match self.image.bitmaps()?.iter().find(|b| b.flags & pleach_format::BitmapRecord::IN_USE != 0) {
            Some(bitmap) if self.bitmaps.is_empty() => refuse(format!(
                "the bitmap \"{}\" is inconsistent; remove it first",
                crate::escape(&bitmap.name)
            )),
            _ => Ok(()),
        }
    }

    fn grow(&mut self, size: u64) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let old = self.image.size();
        if let Some(data) = &self.data {
            let io = ImageError::io("extend the data file");
            if data.len().map_err(ImageError::io("find the data file's length"))? < size {
                data.set_len(size).map_err(io)?;
            }
        }
        self.editor.extend_to(size);
        self.clear_tail(old)?;
        let (first, end) = (g.clusters_for(old).0, g.clusters_for(size).0);
        let hidden = g.clusters_for(self.backing.size().min(size)).0;
        let mut cluster = first;
        while cluster < end {
            let stale = self.editor.has_table(GuestCluster(cluster));
            if !stale && !self.raw && cluster >= hidden {
                // Nothing is said about the rest of this table's clusters, and nothing lies below.
                cluster = (cluster / g.l2_entries() + 1) * g.l2_entries();
                continue;
            }
            let old = self.cell(GuestCluster(cluster))?;
            let new = if self.raw {
                let host = Some(HostOffset(g.guest_offset(GuestCluster(cluster)).0));
                Cell { host, packed: None, data: self.shape.all(), zero: 0 }
            } else if cluster < hidden {
                Cell::zeros(self.shape)
            } else {
                Cell::default()
            };
            if new != old {
                self.set_cell(GuestCluster(cluster), new)?;
            }
            cluster += 1;
        }
        self.publish_with(Some(size))
    }

    fn shrink(&mut self, size: u64) -> Result<(), ImageError> {
        let kept = usize::try_from(self.shape.geometry.required_l1(size)).unwrap_or(usize::MAX);
        let lost = references(&self.image, self.image.l1().get(kept..).unwrap_or_default(), &*self.workers)?;
        self.editor.cut_to(&mut self.allocator, size)?;
        self.publish_with(Some(size))?;
        self.lower_all(&lost)?;
        drop(lost);
        self.clear_tail(size)?;
        self.publish()?;
        // The copies had to lie behind everything; now there is room further down, and the file can be cut before them.
        self.editor.move_roots(&mut self.allocator)?;
        self.publish_with(None)?;
        if let Some(data) = &self.data {
            data.set_len(size).map_err(ImageError::io("cut the data file"))?;
        }
        let place = Place::of(self.image.header());
        let blocks = needed_blocks(&RefcountTable::load(&*self.store, place)?);
        let left = drop_blocks(&*self.store, place, blocks)?;
        self.lower_all(&left)?;
        let end = self.allocator.used_end();
        let bytes = self.shape.geometry.host_offset(end).0;
        if bytes < self.store.len().map_err(ImageError::io("find the file's length"))? {
            self.store.set_len(bytes).map_err(ImageError::io("cut the file"))?;
        }
        self.reopen()?;
        self.allocator = Allocator::load(&*self.store, Place::of(self.image.header()))?;
        Ok(())
    }

    /// Zeros behind byte `end` in its cluster, which are not on the disk but may be after it grows.
    fn clear_tail(&mut self, end: u64) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        if g.is_aligned(end) {
            return Ok(());
        }
        let cell = self.cell(g.guest_cluster(GuestOffset(end)))?;
        let shows = cell.data != 0 || cell.packed.is_some();
        let below = self.backing.size() > end && cell.zero != self.shape.all();
        if !shows && !below {
            return Ok(());
        }
        let len = g.cluster_size() - end % g.cluster_size();
        self.write(end, &vec![0; usize::try_from(len).unwrap_or(0)])
    }
}
