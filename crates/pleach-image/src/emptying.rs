//! Letting the active state of an image say nothing, once what lies below it reads the same.
//!
//! ```text
//! written so far            a crash leaves
//! 1  L1 entries, zeroed     each entry old or new: both read the same, since what lies below does; plus leaks
//! 2  lowered counts         the new state, plus leaks
//! 3  the file cut           the new state
//! ```

use std::ops::Range;

use pleach_alloc::{Allocator, Census, Change, Place};
use pleach_format::HostCluster;

use crate::publish::barrier;
use crate::recount::{Effect, change_counts, references};
use crate::{Image, ImageError, Workers};

/// What the active state of an image takes, which can be given up.
#[derive(Debug)]
pub struct Emptying<'a> {
    image: &'a Image,
    lost: Census,
    /// Clusters that become free, in order.
    freed: Vec<Range<u64>>,
    /// Clusters of the file afterwards.
    end: u64,
}

impl<'a> Emptying<'a> {
    /// Counts what would be given up. `image` passed [`Image::check_writable`], and has no count that is too low.
    ///
    /// # Errors
    /// A damaged table.
    pub fn of(image: &'a Image, workers: &dyn Workers) -> Result<Self, ImageError> {
        let (store, place) = (&**image.store(), Place::of(image.header()));
        let lost = references(image, image.l1(), workers)?;
        let freed = change_counts(store, place, &lost, Change::Lower, Effect::Try, workers)?;
        let mut counts = Allocator::load(store, place)?;
        let mut end = image.file_len().div_ceil(image.geometry().cluster_size());
        let mut last = freed.len();
        while end > 1 {
            let cluster = end - 1;
            while last > 0 && freed.get(last - 1).is_some_and(|r| r.start > cluster) {
                last -= 1;
            }
            match last.checked_sub(1).and_then(|i| freed.get(i)).filter(|r| r.contains(&cluster)) {
                Some(range) => end = range.start.max(1),
                None if counts.count(HostCluster(cluster)) == 0 => end -= 1,
                None => break,
            }
        }
        Ok(Self { image, lost, freed, end })
    }

    /// Bytes of the clusters that become free.
    pub fn bytes(&self) -> u64 {
        let clusters: u64 = self.freed.iter().map(|r| r.end - r.start).sum();
        clusters * self.image.geometry().cluster_size()
    }

    /// Length of the file afterwards, in bytes.
    pub fn file_len(&self) -> u64 {
        (self.end * self.image.geometry().cluster_size()).min(self.image.file_len())
    }

    /// Gives it up. What lies below must durably read the same.
    ///
    /// # Errors
    /// What the system says. After a failed barrier nothing more is written.
    pub fn run(&self, workers: &dyn Workers) -> Result<(), ImageError> {
        let (image, store) = (self.image, &**self.image.store());
        let l1 = vec![0; image.l1().len() * 8];
        let at = image.header().l1_table_offset().0;
        if image.l1().iter().any(|entry| entry.0 != 0) {
            store.write_at(at, &l1).map_err(ImageError::io("write metadata"))?;
        }
        // A cluster must not become free while a durable pointer still leads to it.
        barrier(store)?;
        change_counts(store, Place::of(image.header()), &self.lost, Change::Lower, Effect::Write, workers)?;
        barrier(store)?;
        let cluster = image.geometry().cluster_size();
        for range in self.freed.iter().filter(|r| r.start < self.end) {
            let bytes = range.start * cluster..range.end.min(self.end) * cluster;
            // What is free reads as anything: if it cannot be punched, it stays as it is.
            let _ = store.discard(bytes);
        }
        if self.file_len() < image.file_len() {
            store.set_len(self.file_len()).map_err(ImageError::io("cut the end of the image"))?;
            barrier(store)?;
        }
        Ok(())
    }
}
