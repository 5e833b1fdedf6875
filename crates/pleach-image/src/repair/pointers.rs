//! Tables: each in clusters of its own, and every entry readable.

use std::collections::{BTreeMap, HashMap};

use pleach_format::{ExtensionKind, Geometry, HostOffset, L1Entry};

use super::draft::Stage;
use super::entry::{Becomes, Judge};
use super::snapshots::Kept;
use super::{Repairer, links};
use crate::image::{check_inside, read_l1};
use crate::walk::walk;
use crate::{Image, ImageError};

/// What metadata is in which cluster. Refcount structures are not among it: they can be made anew elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Roles {
    clusters: BTreeMap<u64, &'static str>,
}

impl Roles {
    /// What is in a cluster.
    pub(crate) fn get(&self, cluster: u64) -> Option<&'static str> {
        self.clusters.get(&cluster).copied()
    }

    /// Takes the clusters of a range, unless something else has one of them.
    pub(crate) fn take(
        &mut self,
        g: Geometry,
        offset: u64,
        len: u64,
        what: &'static str,
    ) -> Result<(), &'static str> {
        if len == 0 {
            return Ok(());
        }
        let range = links::clusters(g, offset, len);
        if let Some(other) = range.clone().find_map(|c| self.get(c)) {
            return Err(other);
        }
        self.clusters.extend(range.map(|c| (c, what)));
        Ok(())
    }
}

pub(crate) fn judge(repairer: &Repairer<'_>, image: &Image) -> Judge {
    Judge {
        geometry: image.geometry(),
        version: image.header().version(),
        // What leads behind the old end must not seem right because the repair made the file longer.
        file_len: repairer.draft.old_len(),
        elsewhere: image.external_data(),
        backing: image.header().backing().is_some(),
    }
}

/// Where an L1 table is.
#[derive(Clone, Debug)]
struct Level1 {
    at: u64,
    entries: Vec<L1Entry>,
    what: String,
}

/// The L1 tables of all states, each place once.
fn level1(image: &Image) -> Result<Vec<Level1>, ImageError> {
    let active = image.header().l1_table_offset().0;
    let mut tables = vec![Level1 { at: active, entries: image.l1().to_vec(), what: "the disk".to_owned() }];
    let mut places: BTreeMap<u64, (u32, String)> = BTreeMap::new();
    for snapshot in image.snapshots()? {
        let what = format!("snapshot \"{}\"", crate::escape(&snapshot.name));
        let place = places.entry(snapshot.l1_table_offset).or_insert((0, what));
        place.0 = place.0.max(snapshot.l1_size);
    }
    for (at, (size, what)) in places {
        let entries = read_l1(&**image.store(), image.geometry(), HostOffset(at), size)?;
        tables.push(Level1 { at, entries, what });
    }
    Ok(tables)
}

/// Gives every table clusters of its own, so that mending one does not change another. Returns who is where.
pub(crate) fn separate_tables(repairer: &mut Repairer<'_>, kept: Vec<Kept>) -> Result<Roles, ImageError> {
    let image = repairer.image()?;
    let (g, header) = (image.geometry(), image.header());
    let cluster = g.cluster_size();
    let mut roles = Roles::default();
    let overlap = |what: &str, other: &str| ImageError::CannotRepair {
        what: format!(
            "the header says that {what} is where {other} is, and nothing tells which of them is there"
        ),
    };
    let mut take = |offset, len, what| roles.take(g, offset, len, what).map_err(|other| overlap(what, other));
    take(0, cluster, "the header")?;
    take(header.l1_table_offset().0, u64::from(header.l1_size()) * 8, "the L1 table")?;
    if let Some(last) = kept.last() {
        let at = header.snapshots_offset().0;
        take(at, (last.at + 40).saturating_sub(at), "the snapshot table")?;
    }
    if let Some(luks) = header.extension(ExtensionKind::EncryptionHeader)
        && let Some(([at, len], _)) = luks.data.as_chunks::<8>().0.split_first_chunk::<2>()
        && check_inside("", u64::from_be_bytes(*at), u64::from_be_bytes(*len), image.file_len(), g).is_ok()
    {
        take(u64::from_be_bytes(*at), u64::from_be_bytes(*len), "the encryption header")?;
    }
    snapshot_tables(repairer, g, &kept, &mut roles)?;
    drop(image);
    second_level(repairer, &mut roles)?;
    Ok(roles)
}

/// L1 tables of snapshots that reach into something else are cut to what they need, or copied.
fn snapshot_tables(
    repairer: &mut Repairer<'_>,
    g: Geometry,
    kept: &[Kept],
    roles: &mut Roles,
) -> Result<(), ImageError> {
    let mut seen: HashMap<(u64, u32), u64> = HashMap::new();
    for snapshot in kept {
        let (at, size) = (snapshot.l1_offset, snapshot.l1_size);
        if seen.contains_key(&(at, size)) || size == 0 {
            // Two snapshots may have one table: it counts for both.
            continue;
        }
        seen.insert((at, size), at);
        let Err(other) = roles.take(g, at, u64::from(size) * 8, "the L1 table of a snapshot") else {
            continue;
        };
        let needed = u32::try_from(snapshot.needed).unwrap_or(size);
        let (place, name) = (Some(snapshot.at), &snapshot.name);
        if needed < size && roles.take(g, at, u64::from(needed) * 8, "the L1 table of a snapshot").is_ok() {
            repairer.draft.write(Stage::Drop, snapshot.at + 8, &needed.to_be_bytes())?;
            let message = format!(
                "the L1 table of snapshot \"{name}\" reaches into {other}: it is cut from {size} to the {needed} entries \
                 that its disk needs, and the snapshot reads the same"
            );
            repairer.note("snapshot-l1", "snapshot table", place, None, message);
            continue;
        }
        let copy = repairer.copy(at, u64::from(size) * 8, g.cluster_size())?;
        roles.take(g, copy, u64::from(size) * 8, "the L1 table of a snapshot").ok();
        repairer.draft.write(Stage::Mend, snapshot.at, &copy.to_be_bytes())?;
        let message = format!(
            "the L1 table of snapshot \"{name}\" at {at:#x} is also {other}: the snapshot gets a copy of its own at \
             {copy:#x}, and reads the same"
        );
        repairer.note("snapshot-l1", "snapshot table", place, None, message);
    }
    Ok(())
}

/// L2 tables that are also another table, or that more entries lead to than can be counted, are copied.
fn second_level(repairer: &mut Repairer<'_>, roles: &mut Roles) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let (g, most) = (image.geometry(), image.header().refcount_width().max());
    let tables = level1(&image)?;
    let mut references: HashMap<u64, u64> = HashMap::new();
    let mut copies: HashMap<u64, u64> = HashMap::new();
    for table in &tables {
        let mut changes = Changes::default();
        for (slot, entry) in (0..).zip(&table.entries) {
            let Ok(Some(at)) = L1Entry(entry.0 & 0x80ff_ffff_ffff_fe00).l2_table(g) else { continue };
            if check_inside("L2 table", at.0, g.cluster_size(), repairer.draft.old_len(), g).is_err() {
                continue;
            }
            let other = match roles.get(g.host_cluster(at).0) {
                Some("an L2 table") | None => None,
                other => other,
            };
            let count = references.entry(at.0).or_default();
            if other.is_none() && *count < most {
                *count += 1;
                roles.take(g, at.0, g.cluster_size(), "an L2 table").ok();
                continue;
            }
            // One copy for as many as can be counted.
            let latest = copies.get(&at.0).copied();
            let copy = match latest.filter(|c| references.get(c).is_some_and(|&n| n < most)) {
                Some(copy) => copy,
                None => repairer.copy(at.0, g.cluster_size(), g.cluster_size())?,
            };
            roles.take(g, copy, g.cluster_size(), "an L2 table").ok();
            copies.insert(at.0, copy);
            *references.entry(copy).or_default() += 1;
            let place = table.at + slot * 8;
            repairer.written_entries.insert(place);
            changes.add(repairer, Stage::Mend, place, L1Entry::owned(HostOffset(copy)))?;
            let message = format!(
                "the L2 table at {:#x} is also {}: this range of {} gets a copy at {copy:#x}, and reads the same",
                at.0,
                other.unwrap_or("that of another range"),
                table.what
            );
            let guest = Some((slot * g.l1_span(), g.l1_span()));
            repairer.note("l1-shared", "L1 table", Some(place), guest, message);
        }
        changes.put(repairer)?;
    }
    Ok(())
}

/// Makes every entry of every L1 table readable.
pub(crate) fn mend_l1(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let (g, judge) = (image.geometry(), judge(repairer, &image));
    for table in level1(&image)? {
        let mut changes = Changes::default();
        for (slot, &entry) in (0..).zip(&table.entries) {
            let place = table.at + slot * 8;
            if repairer.written_entries.contains(place) {
                continue;
            }
            let Some((becomes, why)) = judge.l1(entry) else { continue };
            let stage = if becomes == L1Entry::default() { Stage::Drop } else { Stage::Mend };
            changes.add(repairer, stage, place, becomes)?;
            let message = format!("L1 entry {slot} of {} was {:#x}: {why}", table.what, entry.0);
            repairer.note(
                "l1-entry",
                "L1 table",
                Some(place),
                Some((slot * g.l1_span(), g.l1_span())),
                message,
            );
        }
        changes.put(repairer)?;
    }
    Ok(())
}

/// Changed entries of one table that follow one another and are written in the same stage.
#[derive(Default)]
struct Changes {
    stage: Option<Stage>,
    at: u64,
    bytes: Vec<u8>,
}

impl Changes {
    /// Most bytes that are put together.
    const MOST: usize = 64 << 10;

    fn add(
        &mut self,
        repairer: &Repairer<'_>,
        stage: Stage,
        place: u64,
        entry: L1Entry,
    ) -> Result<(), ImageError> {
        let joins = self.stage == Some(stage) && self.at + self.bytes.len() as u64 == place;
        if !joins || self.bytes.len() >= Self::MOST {
            self.put(repairer)?;
            (self.stage, self.at) = (Some(stage), place);
        }
        self.bytes.extend(entry.0.to_be_bytes());
        Ok(())
    }

    fn put(&mut self, repairer: &Repairer<'_>) -> Result<(), ImageError> {
        let bytes = std::mem::take(&mut self.bytes);
        match self.stage.filter(|_| !bytes.is_empty()) {
            Some(stage) => repairer.draft.write(stage, self.at, &bytes),
            None => Ok(()),
        }
    }
}

/// Makes every entry of every L2 table readable.
pub(crate) fn mend_l2(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let (g, judge) = (image.geometry(), judge(repairer, &image));
    let walked = walk(&image, repairer.workers, &mut |_| Ok(()))?;
    for (&at, used) in &walked.tables {
        let table = image.l2_table(L1Entry(at))?.unwrap_or_default();
        let mut verdicts = Vec::new();
        image.for_each_entry(&table, |slot, entry| {
            verdicts.extend(judge.l2(entry).map(|verdict| (slot as u64, entry, verdict)));
            Ok(())
        })?;
        for (slot, entry, verdict) in verdicts {
            let place = at + slot * g.l2_entry_bytes() as u64;
            if repairer.written_entries.contains(place) {
                continue;
            }
            let guest = (used.guest + slot * g.cluster_size(), g.cluster_size());
            let (stage, bytes) = match verdict.becomes {
                Becomes::Entry(new) => {
                    let leads = new.descriptor.is_compressed() || new.descriptor.0 >> 9 << 9 != 0;
                    let stage = if leads { Stage::Mend } else { Stage::Drop };
                    (stage, new.to_bytes())
                }
                Becomes::FreshZeros => {
                    let zeros = repairer.place(&vec![0; g.cluster_bytes()], g.cluster_size())?;
                    let mut bytes = [0; 16];
                    let (first, _) = bytes.split_at_mut(8);
                    first.copy_from_slice(&L1Entry::owned(HostOffset(zeros)).0.to_be_bytes());
                    (Stage::Mend, bytes)
                }
            };
            repairer.draft.write(stage, place, bytes.get(..g.l2_entry_bytes()).unwrap_or(&bytes))?;
            let message = format!("L2 entry {:#x}: {}", entry.descriptor.0, verdict.message);
            repairer.note(verdict.code, "L2 table", Some(place), Some(guest), message);
        }
    }
    Ok(())
}
