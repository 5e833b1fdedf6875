//! Counting the references of one image, for those who write to it (spec: refcounts).

use pleach_alloc::{Census, Discrepancy};
use pleach_format::HostOffset;

use crate::walk::{entries, walk};
use crate::{Image, ImageError};

/// Every reference that the image's structures make to its host clusters.
///
/// # Errors
/// [`ImageError::Damaged`] for the first pointer that breaks the format or leads out of the file: an image with such a
/// pointer cannot be counted.
pub fn census(image: &Image) -> Result<Census, ImageError> {
    Ok(walk(image, &mut stop)?.census)
}

/// What is stored too high: clusters that are lost until their counts are lowered.
///
/// # Errors
/// As [`census`]; [`ImageError::Refcount`] if any count is too low, which makes it unsafe to write to the image.
pub fn leaked(image: &Image) -> Result<Vec<Discrepancy>, ImageError> {
    let walked = walk(image, &mut stop)?;
    let found = walked.census.compare(&walked.counts);
    match found.iter().find(|d| !d.is_leak()) {
        Some(d) => {
            Err(ImageError::Refcount { cluster: d.cluster.0, stored: d.stored, references: d.references })
        }
        None => Ok(found),
    }
}

fn stop(finding: crate::Finding) -> Result<(), ImageError> {
    Err(ImageError::Damaged { what: finding.message, offset: finding.offset })
}

impl Image {
    /// The host clusters of each internal snapshot's data, VM state included: sorted, each once.
    ///
    /// # Errors
    /// As [`census`].
    pub fn snapshot_clusters(&self) -> Result<Vec<Vec<u64>>, ImageError> {
        let g = self.geometry();
        let mut states = Vec::new();
        for snapshot in self.snapshots()? {
            let l1 = crate::image::read_l1(
                &**self.store(),
                g,
                HostOffset(snapshot.l1_table_offset),
                snapshot.l1_size,
            )?;
            let mut clusters = Vec::new();
            for entry in l1 {
                let table = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))?;
                let Some(table) = table else { continue };
                for (_, _, target) in entries(self, table.0)? {
                    let Ok(target) = target else { continue };
                    let end = target.offset.saturating_add(target.len.max(1)) - 1;
                    let first = g.host_cluster(HostOffset(target.offset)).0;
                    clusters.extend(first..=g.host_cluster(HostOffset(end)).0);
                }
            }
            clusters.sort_unstable();
            clusters.dedup();
            states.push(clusters);
        }
        Ok(states)
    }
}
