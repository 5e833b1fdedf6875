//! The way back: what was in each place that a repair writes.
//!
//! ```text
//! "PLEACHU1"
//! length of the image before
//! number of regions, then each: offset, length, bytes before
//! number of writes, then each: offset, length, bytes            (in order)
//! number of witnesses, then each: offset, length
//! CRC-32 of the witnesses, without what the repair writes
//! CRC-32 of all of this
//! ```
//! Numbers are big-endian and 64 bits wide, the last one 32. Witnesses are the tables: a table that changed outside of
//! the repair shows that somebody has written to the image since.

use std::collections::{BTreeMap, BTreeSet};

use pleach_alloc::Write;
use pleach_format::HostOffset;
use pleach_store::Store;

use super::Repairer;
use crate::ImageError;
use crate::walk::walk;

const MAGIC: [u8; 8] = *b"PLEACHU1";
/// Longest undo file that is read.
const MAX_FILE: u64 = 2 << 30;

/// The bytes of an undo file.
#[derive(Clone, Debug)]
pub struct UndoFile {
    bytes: Vec<u8>,
}

impl UndoFile {
    pub(super) fn of(
        store: &dyn Store,
        old_len: u64,
        stages: &[Vec<Write>],
        witnesses: &[(u64, u64)],
    ) -> Result<Self, ImageError> {
        let mut bytes = MAGIC.to_vec();
        number(&mut bytes, old_len);
        let writes: Vec<&Write> = stages.iter().flatten().collect();
        let regions = regions(&writes, old_len);
        number(&mut bytes, regions.len() as u64);
        for (&at, &end) in &regions {
            let mut old = vec![0; usize::try_from(end - at).unwrap_or(0)];
            store.read_at(at, &mut old).map_err(ImageError::io("read the image"))?;
            record(&mut bytes, at, &old);
        }
        number(&mut bytes, writes.len() as u64);
        for write in &writes {
            record(&mut bytes, write.offset.0, &write.bytes);
        }
        number(&mut bytes, witnesses.len() as u64);
        for &(at, len) in witnesses {
            number(&mut bytes, at);
            number(&mut bytes, len);
        }
        let sum = testimony(store, witnesses, &self::regions(&writes, u64::MAX))?;
        number(&mut bytes, sum.into());
        let sum = crc32fast::hash(&bytes);
        bytes.extend(sum.to_be_bytes());
        Ok(Self { bytes })
    }

    /// Writes the file and makes it durable; its name is the caller's to make durable.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, file: &dyn Store) -> Result<(), ImageError> {
        file.write_at(0, &self.bytes).map_err(ImageError::io("write the undo file"))?;
        file.barrier().map_err(ImageError::io("flush the undo file"))
    }
}

/// Puts everything back that the repair of `file` changed in `store`: the same bytes, the same length. Also after a
/// repair that was interrupted.
///
/// # Errors
/// [`ImageError::Undo`] for a file that is damaged, or an image that is not the repaired one or was written to since:
/// nothing is changed then. What the system says.
pub fn undo(store: &dyn Store, file: &dyn Store) -> Result<(), ImageError> {
    let len = file.len().map_err(ImageError::io("find the undo file's length"))?;
    if len > MAX_FILE {
        return Err(refuse("it is too long"));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_at(0, &mut bytes).map_err(ImageError::io("read the undo file"))?;
    let parsed = Parsed::read(&bytes).ok_or_else(|| refuse("it is damaged, or not an undo file"))?;
    parsed.compare(store)?;
    for (at, old) in &parsed.regions {
        store.write_at(*at, old).map_err(ImageError::io("write the image"))?;
    }
    // The old tables must be there before what only the new ones used is cut off.
    store.barrier().map_err(ImageError::io("flush the image"))?;
    if store.len().map_err(ImageError::io("find the file's length"))? > parsed.old_len {
        store.set_len(parsed.old_len).map_err(ImageError::io("cut the image"))?;
        store.barrier().map_err(ImageError::io("flush the image"))?;
    }
    Ok(())
}

/// The places of all tables, before and after: what a writer cannot leave alone.
pub(super) fn witnesses(repairer: &Repairer<'_>) -> Result<Vec<(u64, u64)>, ImageError> {
    let Ok(image) = repairer.image() else { return Ok(vec![(0, 512)]) };
    let cluster = image.geometry().cluster_size();
    let old_len = repairer.draft.old_len();
    let mut all = BTreeSet::from([(0, 512)]);
    let walked = walk(&image, repairer.workers, &mut |_| Ok(()))?;
    let header = image.header();
    all.insert((header.l1_table_offset().0, u64::from(header.l1_size()) * 8));
    all.extend(walked.tables.keys().map(|&at| (at, cluster)));
    all.extend(walked.counts.blocks().iter().flatten().map(|b| (b.0, cluster)));
    for snapshot in image.snapshots().unwrap_or_default() {
        all.insert((snapshot.l1_table_offset, u64::from(snapshot.l1_size) * 8));
    }
    all.retain(|&(at, len)| at.saturating_add(len) <= old_len && len > 0);
    Ok(all.into_iter().collect())
}

/// The checksum of the witnesses, with zeros where the repair writes: start and end of each place in `written`.
fn testimony(
    store: &dyn Store,
    witnesses: &[(u64, u64)],
    written: &BTreeMap<u64, u64>,
) -> Result<u32, ImageError> {
    let mut sum = crc32fast::Hasher::new();
    for &(at, len) in witnesses {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        store.read_at(at, &mut bytes).map_err(ImageError::io("read the image"))?;
        let end = at + len;
        let first = written.range(..=at).next_back().map_or(at, |(&from, _)| from);
        for (&from, &to) in written.range(first..end) {
            let (from, to) = (from.max(at), to.min(end));
            if from < to {
                let range = usize::try_from(from - at).unwrap_or(0)..usize::try_from(to - at).unwrap_or(0);
                bytes.get_mut(range).unwrap_or(&mut []).fill(0);
            }
        }
        sum.update(&bytes);
    }
    Ok(sum.finalize())
}

/// The places of `writes` below `limit`, joined where they touch: start and end of each.
fn regions(writes: &[&Write], limit: u64) -> BTreeMap<u64, u64> {
    let mut ranges: Vec<(u64, u64)> = writes
        .iter()
        .map(|w| (w.offset.0, (w.offset.0 + w.bytes.len() as u64).min(limit)))
        .filter(|(at, end)| at < end)
        .collect();
    ranges.sort_unstable();
    let mut joined: BTreeMap<u64, u64> = BTreeMap::new();
    for (at, end) in ranges {
        match joined.last_entry() {
            Some(mut last) if *last.get() >= at => *last.get_mut() = (*last.get()).max(end),
            _ => {
                joined.insert(at, end);
            }
        }
    }
    joined
}

struct Parsed {
    old_len: u64,
    regions: Vec<(u64, Vec<u8>)>,
    writes: Vec<Write>,
    witnesses: Vec<(u64, u64)>,
    testimony: u64,
}

impl Parsed {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(body) != u32::from_be_bytes(*sum) {
            return None;
        }
        let mut rest = body.strip_prefix(&MAGIC)?;
        let old_len = take(&mut rest)?;
        let mut regions = Vec::new();
        for _ in 0..take(&mut rest)? {
            regions.push(take_record(&mut rest)?);
        }
        let mut writes = Vec::new();
        for _ in 0..take(&mut rest)? {
            let (at, bytes) = take_record(&mut rest)?;
            writes.push(Write { offset: HostOffset(at), bytes });
        }
        let mut witnesses = Vec::new();
        for _ in 0..take(&mut rest)? {
            witnesses.push((take(&mut rest)?, take(&mut rest)?));
        }
        let testimony = take(&mut rest)?;
        rest.is_empty().then_some(Self { old_len, regions, writes, witnesses, testimony })
    }

    /// Refuses an image in which anything is neither as before the repair nor as some moment of it left it.
    fn compare(&self, store: &dyn Store) -> Result<(), ImageError> {
        let len = store.len().map_err(ImageError::io("find the file's length"))?;
        let writes: Vec<&Write> = self.writes.iter().collect();
        let most = writes.iter().map(|w| w.offset.0 + w.bytes.len() as u64).max().unwrap_or(0);
        if len < self.old_len || len > most.max(self.old_len) {
            return Err(refuse("the image has another length: it was changed after the repair"));
        }
        for (at, old) in &self.regions {
            let mut now = vec![0; old.len()];
            store.read_at(*at, &mut now).map_err(ImageError::io("read the image"))?;
            let mut known: Vec<bool> = old.iter().zip(&now).map(|(a, b)| a == b).collect();
            let end = at + old.len() as u64;
            for write in writes.iter().filter(|w| w.offset.0 < end && w.offset.0 + w.bytes.len() as u64 > *at)
            {
                for (i, byte) in (write.offset.0..).zip(&write.bytes) {
                    let slot = i.checked_sub(*at).and_then(|s| usize::try_from(s).ok());
                    let Some(slot) = slot else { continue };
                    if let (Some(known), Some(now)) = (known.get_mut(slot), now.get(slot)) {
                        *known |= now == byte;
                    }
                }
            }
            if let Some(slot) = known.iter().position(|known| !known) {
                let at = at + slot as u64;
                return Err(refuse(&format!("the image was changed after the repair, at {at:#x}")));
            }
        }
        if u64::from(testimony(store, &self.witnesses, &regions(&writes, u64::MAX))?) != self.testimony {
            return Err(refuse("the image was changed after the repair, in its tables"));
        }
        Ok(())
    }
}

fn refuse(what: &str) -> ImageError {
    ImageError::Undo { what: what.to_owned() }
}

fn number(bytes: &mut Vec<u8>, value: u64) {
    bytes.extend(value.to_be_bytes());
}

fn record(bytes: &mut Vec<u8>, at: u64, data: &[u8]) {
    number(bytes, at);
    number(bytes, data.len() as u64);
    bytes.extend(data);
}

fn take(rest: &mut &[u8]) -> Option<u64> {
    let (first, behind) = rest.split_first_chunk::<8>()?;
    *rest = behind;
    Some(u64::from_be_bytes(*first))
}

fn take_record(rest: &mut &[u8]) -> Option<(u64, Vec<u8>)> {
    let (at, len) = (take(rest)?, usize::try_from(take(rest)?).ok()?);
    let (data, behind) = rest.split_at_checked(len)?;
    *rest = behind;
    Some((at, data.to_vec()))
}
