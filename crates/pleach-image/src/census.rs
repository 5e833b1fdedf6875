//! Counting the references of one image by walking all its pointers (spec: refcounts).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pleach_alloc::{Census, Discrepancy, Place, RefcountTable};
use pleach_format::{ExtensionKind, HostCluster, HostOffset, L1Entry, Mapping};

use crate::image::{check_inside, read_l1};
use crate::{Image, ImageError};

/// Every reference that the image's structures make to its host clusters.
///
/// # Errors
/// Pointers that break the format or lead out of the file: an image with such a pointer cannot be counted.
pub fn census(image: &Image) -> Result<Census, ImageError> {
    let header = image.header();
    let place = Place::of(header);
    let g = image.geometry();
    let mut census = Census::new();
    census.add(HostCluster(0));
    let table = RefcountTable::load(&**image.store(), place)?;
    census.add_refcount_structures(&table);

    let mut tables = HashMap::new();
    census.add_bytes(&place, header.l1_table_offset(), u64::from(header.l1_size()) * 8);
    walk(image, image.l1(), &place, &mut census, &mut tables)?;
    let snapshots = image.snapshots()?;
    let last = snapshots.len().saturating_sub(1);
    let mut table_bytes = 0;
    for (i, snapshot) in snapshots.iter().enumerate() {
        let stored = snapshot.stored_bytes;
        table_bytes += if i == last { stored } else { stored.next_multiple_of(8) };
        let offset = HostOffset(snapshot.l1_table_offset);
        let l1 = read_l1(&**image.store(), g, offset, snapshot.l1_size)?;
        census.add_bytes(&place, offset, u64::from(snapshot.l1_size) * 8);
        walk(image, &l1, &place, &mut census, &mut tables)?;
    }
    if !snapshots.is_empty() {
        census.add_bytes(&place, header.snapshots_offset(), table_bytes as u64);
    }
    add_bitmaps(image, &place, &mut census)?;
    if let Some(luks) = header.extension(ExtensionKind::EncryptionHeader)
        && let Some(([offset, length], _)) = luks.data.as_chunks::<8>().0.split_first_chunk::<2>()
    {
        census.add_bytes(&place, HostOffset(u64::from_be_bytes(*offset)), u64::from_be_bytes(*length));
    }
    Ok(census)
}

/// What is stored too high: clusters that are lost until their counts are lowered.
///
/// # Errors
/// As [`census`]; [`ImageError::Refcount`] if any count is too low, which makes it unsafe to write to the image.
pub fn leaked(image: &Image) -> Result<Vec<Discrepancy>, ImageError> {
    let table = RefcountTable::load(&**image.store(), Place::of(image.header()))?;
    let found = census(image)?.compare(&table);
    match found.iter().find(|d| !d.is_leak()) {
        Some(d) => {
            Err(ImageError::Refcount { cluster: d.cluster.0, stored: d.stored, references: d.references })
        }
        None => Ok(found),
    }
}

/// What one L2 table refers to: each is read once, however many L1 tables share it.
type Targets = Vec<(u64, u64)>;

fn walk(
    image: &Image,
    l1: &[L1Entry],
    place: &Place,
    census: &mut Census,
    tables: &mut HashMap<u64, Targets>,
) -> Result<(), ImageError> {
    let g = image.geometry();
    for &entry in l1 {
        let Some(offset) = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))? else { continue };
        census.add_bytes(place, offset, g.cluster_size());
        let targets = match tables.entry(offset.0) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(targets_of(image, entry)?),
        };
        for &(at, len) in targets.iter() {
            census.add_bytes(place, HostOffset(at), len);
        }
    }
    Ok(())
}

/// The host ranges that one L2 table refers to.
fn targets_of(image: &Image, entry: L1Entry) -> Result<Targets, ImageError> {
    let g = image.geometry();
    let elsewhere = image.header().incompatible().has(pleach_format::Incompatible::DATA_FILE);
    let mut targets = Targets::new();
    let table = image.l2_table(entry)?.unwrap_or_default();
    image.for_each_entry(&table, |_, entry| {
        let mapping = entry
            .descriptor
            .decode(g, image.header().version())
            .map_err(ImageError::format("L2 entry", None))?;
        match mapping {
            Mapping::Data(_) | Mapping::ZeroAllocated(_) if elsewhere => {}
            Mapping::Data(at) | Mapping::ZeroAllocated(at) => {
                check_inside("data cluster", at.0, g.cluster_size(), image.file_len(), g)?;
                targets.push((at.0, g.cluster_size()));
            }
            Mapping::Compressed(extent) => targets.push((extent.offset.0, image.counted_bytes(extent))),
            Mapping::Zero | Mapping::Unallocated => {}
        }
        Ok(())
    })?;
    Ok(targets)
}

impl Image {
    /// The host clusters of each internal snapshot's data, VM state included: sorted, each once.
    ///
    /// # Errors
    /// As [`census`].
    pub fn snapshot_clusters(&self) -> Result<Vec<Vec<u64>>, ImageError> {
        let g = self.geometry();
        let place = Place::of(self.header());
        let mut tables = HashMap::new();
        let mut states = Vec::new();
        for snapshot in self.snapshots()? {
            let l1 = read_l1(&**self.store(), g, HostOffset(snapshot.l1_table_offset), snapshot.l1_size)?;
            walk(self, &l1, &place, &mut Census::new(), &mut tables)?;
            let mut clusters = Vec::new();
            for entry in l1 {
                let table = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))?;
                for &(at, len) in table.and_then(|t| tables.get(&t.0)).into_iter().flatten() {
                    let end = at.saturating_add(len.max(1)) - 1;
                    clusters.extend(g.host_cluster(HostOffset(at)).0..=g.host_cluster(HostOffset(end)).0);
                }
            }
            clusters.sort_unstable();
            clusters.dedup();
            states.push(clusters);
        }
        Ok(states)
    }
}

fn add_bitmaps(image: &Image, place: &Place, census: &mut Census) -> Result<(), ImageError> {
    let g = image.geometry();
    let header = image.header();
    let bad = |source| ImageError::Format { structure: "bitmaps extension", offset: None, source };
    if let Some(extension) = header.bitmaps().map_err(bad)? {
        census.add_bytes(place, HostOffset(extension.directory_offset), extension.directory_size);
    }
    let file = image.store().len().map_err(ImageError::io("find the file's length"))?;
    for bitmap in image.bitmaps()? {
        let bytes = u64::from(bitmap.table_size) * 8;
        check_inside("bitmap table", bitmap.table_offset, bytes, file, g)?;
        census.add_bytes(place, HostOffset(bitmap.table_offset), bytes);
        let mut table = vec![0; usize::try_from(bytes).unwrap_or(0)];
        image
            .store()
            .read_at(bitmap.table_offset, &mut table)
            .map_err(ImageError::io("read a bitmap table"))?;
        for entry in table.as_chunks::<8>().0 {
            let at = u64::from_be_bytes(*entry) & 0x00ff_ffff_ffff_fe00;
            if at != 0 {
                check_inside("bitmap data", at, g.cluster_size(), file, g)?;
                census.add_bytes(place, HostOffset(at), g.cluster_size());
            }
        }
    }
    Ok(())
}
