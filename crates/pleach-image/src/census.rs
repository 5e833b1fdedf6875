//! Counting the references of one image, for those who write to it (spec: refcounts).

use std::collections::BTreeMap;
use std::sync::Arc;

use pleach_alloc::{Census, Discrepancy};
use pleach_format::{HostOffset, L1Entry};

use crate::image::read_l1;
use crate::walk::{Entries, walk};
use crate::{Alone, Image, ImageError, Workers};

/// Every reference that the image's structures make to its host clusters.
///
/// # Errors
/// [`ImageError::Damaged`] for the first pointer that breaks the format or leads out of the file: an image with such a
/// pointer cannot be counted.
pub fn census(image: &Image) -> Result<Census, ImageError> {
    Ok(walk(image, &Alone, &mut stop)?.census)
}

/// Most wrong counts that are handled in one go; more cannot come from crashes.
pub(crate) const MOST_DIFFERENCES: usize = 4 << 20;

/// What is stored too high: clusters of the file that are lost until their counts are lowered.
///
/// # Errors
/// As [`census`]; [`ImageError::Refcount`] if any count is too low, which makes it unsafe to write to the image.
pub fn leaked(image: &Image) -> Result<Vec<Discrepancy>, ImageError> {
    leaked_with(image, &Alone)
}

/// As [`leaked`], with the tables read by `workers`.
///
/// # Errors
/// As [`leaked`].
pub fn leaked_with(image: &Image, workers: &dyn Workers) -> Result<Vec<Discrepancy>, ImageError> {
    let walked = walk(image, workers, &mut stop)?;
    let clusters = image.file_len().div_ceil(image.geometry().cluster_size());
    let found = walked.census.compare(&walked.counts, clusters, MOST_DIFFERENCES);
    match found.listed.iter().find(|d| !d.is_leak()) {
        Some(d) => {
            Err(ImageError::Refcount { cluster: d.cluster.0, stored: d.stored, references: d.references })
        }
        None if !found.is_whole() => {
            Err(ImageError::Unsupported { feature: "an image that has lost more than 4194304 clusters" })
        }
        None => Ok(found.listed),
    }
}

fn stop(finding: crate::Finding) -> Result<(), ImageError> {
    Err(ImageError::Damaged { what: finding.message, offset: finding.offset })
}

/// Most bytes of L1 tables that are read for all snapshots together: far more than disks have, and soon read.
pub(crate) const MOST_L1_BYTES: u64 = 1 << 30;

impl Image {
    /// The host clusters of each internal snapshot's data, VM state included: sorted, each once. Snapshots of one L1
    /// table share the list.
    ///
    /// # Errors
    /// As [`census`]; [`ImageError::Unsupported`] for more than a GiB of L1 tables.
    pub fn snapshot_clusters(&self) -> Result<Vec<Arc<[u64]>>, ImageError> {
        let g = self.geometry();
        let mut known: BTreeMap<(u64, u32), Arc<[u64]>> = BTreeMap::new();
        let mut bytes = 0;
        let mut states = Vec::new();
        let mut entries = Entries::new(self);
        for snapshot in self.each_snapshot()? {
            let snapshot = snapshot?;
            let key = (snapshot.l1_table_offset, snapshot.l1_size);
            if let Some(clusters) = known.get(&key) {
                states.push(Arc::clone(clusters));
                continue;
            }
            bytes += u64::from(snapshot.l1_size) * 8;
            if bytes > MOST_L1_BYTES {
                return Err(ImageError::Unsupported {
                    feature: "an image with more than 1 GiB of snapshot L1 tables",
                });
            }
            let l1 = read_l1(&**self.store(), g, HostOffset(key.0), key.1)?;
            let mut tables = Vec::new();
            for entry in l1.into_iter().filter(|entry| *entry != L1Entry::default()) {
                tables.extend(entry.l2_table(g).map_err(ImageError::format("L1 entry", None))?);
            }
            tables.sort_unstable();
            tables.dedup();
            let mut clusters = Vec::new();
            for table in tables {
                entries.for_each_span(table.0, |_, _, _, target| {
                    let Ok(target) = target else { return Ok(()) };
                    let end = target.offset.saturating_add(target.len.max(1)) - 1;
                    let first = g.host_cluster(HostOffset(target.offset)).0;
                    clusters.extend(first..=g.host_cluster(HostOffset(end)).0);
                    Ok(())
                })?;
            }
            clusters.sort_unstable();
            clusters.dedup();
            let clusters: Arc<[u64]> = clusters.into();
            known.insert(key, Arc::clone(&clusters));
            states.push(clusters);
        }
        Ok(states)
    }
}
