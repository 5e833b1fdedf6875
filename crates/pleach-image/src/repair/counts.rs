//! Counts: as many as there are pointers, and the flags that follow from them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use pleach_alloc::{Census, Discrepancy, Place, RefcountTable};
use pleach_format::{FormatError, HostCluster, HostOffset, L2Entry};

use super::Repairer;
use super::draft::Stage;
use super::links::clusters;
use crate::census::MOST_DIFFERENCES;
use crate::check::copied_findings;
use crate::walk::{Walked, walk};
use crate::{CheckReport, Image, ImageError};

/// Largest refcount table that QEMU opens.
const MAX_TABLE: u64 = 8 << 20;

/// Findings that only counts are behind.
const OF_COUNTS: [&str; 3] = ["leak", "refcount-too-low", "copied-flag"];
/// Findings about one entry of which every possible reading is known.
const OF_ENTRIES: [&str; 5] =
    ["l2-pointer", "l2-reserved", "l2-compressed-copied", "l2-compressed-length", "l2-subclusters"];

/// Lowers counts that are too high, and nothing else. Where a pointer is damaged, what it may have led to stays counted;
/// where a table is, everything does. With `unused_only`, so does everything that is in use.
pub(crate) fn lower_leaks(
    repairer: &mut Repairer<'_>,
    before: &CheckReport,
    unused_only: bool,
) -> Result<(), ImageError> {
    let codes = || before.findings.iter().map(|f| f.code);
    if let Some(code) = codes().find(|c| !OF_COUNTS.contains(c) && !OF_ENTRIES.contains(c)) {
        let message = format!(
            "{} leaked clusters stay counted: with the damage called \"{code}\" nobody can tell what led to them",
            before.leaks
        );
        repairer.note("leaks-left", "refcount block", None, None, message);
        return Ok(());
    }
    let listed: u64 = before.findings.iter().filter(|f| f.code != "leak").map(|f| f.times).sum();
    if listed != before.errors {
        let message = format!(
            "{} leaked clusters stay counted: there are too many errors to look at each",
            before.leaks
        );
        repairer.note("leaks-left", "refcount block", None, None, message);
        return Ok(());
    }
    let image = repairer.image()?;
    let walked = walk(&image, repairer.workers, &mut |_| Ok(()))?;
    if shared(&walked) {
        let message = format!(
            "{} leaked clusters stay counted: a refcount block is where something else is, too",
            before.leaks
        );
        repairer.note("leaks-left", "refcount block", None, None, message);
        return Ok(());
    }
    let mut doubtful = BTreeSet::new();
    for finding in &before.findings {
        if OF_ENTRIES.contains(&finding.code)
            && let Some(offset) = finding.offset
        {
            doubtful.extend(readings(&image, repairer.word(offset)?));
        }
    }
    let end = image.file_len().div_ceil(image.geometry().cluster_size());
    let (leaks, left): (Vec<Discrepancy>, Vec<Discrepancy>) = wrong_counts(&walked, end)?
        .into_iter()
        .filter(Discrepancy::is_leak)
        .partition(|d| !doubtful.contains(&d.cluster.0) && (!unused_only || d.references == 0));
    for leak in left {
        let offset = Some(image.geometry().host_offset(leak.cluster).0);
        let why = match leak.references {
            0 => "a damaged entry may lead to it",
            _ => "it is in use, and flags would have to change with its count; --repair all does that",
        };
        let message = format!("cluster {} stays counted: {why}", leak.cluster.0);
        repairer.note("leak-left", "refcount block", offset, None, message);
    }
    set(repairer, &walked.counts, &leaks)?;
    drop(image);
    // A cluster that has one owner now gets the flag that says so; no other flag is touched.
    let lowered: BTreeSet<u64> = leaks.iter().filter(|d| d.references == 1).map(|d| d.cluster.0).collect();
    if !lowered.is_empty() && codes().all(|c| c == "leak") {
        flags(repairer)?;
    }
    Ok(())
}

/// Every count of a file of `clusters` clusters that is not what the pointers say; one for what is not there takes no
/// space.
fn wrong_counts(walked: &Walked, clusters: u64) -> Result<Vec<Discrepancy>, ImageError> {
    let found = walked.census.compare(&walked.counts, clusters, MOST_DIFFERENCES);
    if !found.is_whole() {
        let what = format!("{} counts are wrong, more than fit into memory", found.too_low + found.leaks);
        return Err(ImageError::CannotRepair { what });
    }
    Ok(found.listed)
}

/// Every cluster that `entry` leads to, read as an entry of either kind, as it is or with one bit flipped.
fn readings(image: &Image, entry: u64) -> BTreeSet<u64> {
    let g = image.geometry();
    let mut all = BTreeSet::new();
    for flip in (0..64).map(|bit| 1 << bit).chain([0]) {
        let raw = L2Entry(entry ^ flip);
        let offset = raw.0 & 0x00ff_ffff_ffff_fe00;
        all.extend(clusters(g, offset, 1));
        let packed = raw.0 & ((1 << g.compressed_offset_bits()) - 1);
        all.extend(clusters(g, packed, 2 * g.cluster_size()));
    }
    all
}

/// Makes every count what the pointers say, in place where the refcount structures can be trusted, else in new ones.
pub(crate) fn settle(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let mut damaged = repairer.rebuild;
    let mut walked = walk(&image, repairer.workers, &mut |finding| {
        damaged |= matches!(finding.code, "refcount-block-pointer" | "refcount-table");
        Ok(())
    })?;
    let g = image.geometry();
    let place = walked.counts.place();
    damaged |= shared(&walked);
    if damaged {
        // They will be elsewhere.
        forget_structures(&mut walked);
    }
    let most = place.width.max();
    let mut too_many = None;
    walked.census.for_each(|cluster, references| {
        if references > most {
            too_many.get_or_insert((cluster, references));
        }
    });
    if let Some((cluster, references)) = too_many {
        let what =
            format!("{references} pointers lead to cluster {}, and the largest count is {most}", cluster.0);
        return Err(ImageError::CannotRepair { what });
    }
    let end = repairer.len()?.div_ceil(g.cluster_size());
    let mut found = wrong_counts(&walked, end)?;
    if !damaged && let Some(blocks) = missing_blocks(repairer, &image, &walked, &found)? {
        for &(cluster, _) in blocks.values() {
            found.retain(|d| d.cluster.0 != cluster);
        }
        let (in_new, in_place): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|d| blocks.contains_key(&(d.cluster.0 / per_block(place))));
        set(repairer, &walked.counts, &in_place)?;
        return put_blocks(repairer, place, &blocks, &in_new);
    }
    if !damaged && found.is_empty() {
        return Ok(());
    }
    if !damaged {
        forget_structures(&mut walked);
    }
    rebuild(repairer, place, &walked.census)
}

fn per_block(place: Place) -> u64 {
    place.width.per_block(place.geometry)
}

/// The clusters that the refcount table and its blocks are in, each as often as it is used.
fn structures(counts: &RefcountTable) -> Vec<u64> {
    let place = counts.place();
    let bytes = u64::from(place.table_clusters) * place.geometry.cluster_size();
    let mut all: Vec<u64> = clusters(place.geometry, place.table.0, bytes).collect();
    all.extend(counts.blocks().iter().flatten().map(|b| place.geometry.host_cluster(*b).0));
    all
}

/// Whether the refcount table or a block is where something else is, or another block.
fn shared(walked: &Walked) -> bool {
    structures(&walked.counts).iter().any(|&c| walked.census.count(HostCluster(c)) != 1)
}

fn forget_structures(walked: &mut Walked) {
    for cluster in structures(&walked.counts) {
        walked.census.forget(HostCluster(cluster));
    }
}

/// Sets counts in blocks that exist: first what rises, in a later stage what is lowered.
fn set(repairer: &mut Repairer<'_>, counts: &RefcountTable, found: &[Discrepancy]) -> Result<(), ImageError> {
    let place = counts.place();
    let mut by_block: BTreeMap<u64, Vec<&Discrepancy>> = BTreeMap::new();
    for d in found {
        by_block.entry(d.cluster.0 / per_block(place)).or_default().push(d);
    }
    for (index, of_block) in by_block {
        let Some((at, stored)) = counts.read_block(index) else { continue };
        let mut bytes = stored;
        for (leaks, stage) in [(false, Stage::Fresh), (true, Stage::Lower)] {
            let old = bytes.clone();
            for d in of_block.iter().filter(|d| d.is_leak() == leaks) {
                let slot = usize::try_from(d.cluster.0 % per_block(place)).unwrap_or(usize::MAX);
                place.width.set(&mut bytes, slot, d.references).map_err(format)?;
            }
            for (from, to) in differences(&old, &bytes) {
                let new = bytes.get(from..to).unwrap_or(&[]);
                repairer.draft.write(stage, at.0 + from as u64, new)?;
            }
        }
    }
    report(repairer, place, found);
    Ok(())
}

fn report(repairer: &mut Repairer<'_>, place: Place, found: &[Discrepancy]) {
    for d in found {
        let (code, effect) = if d.is_leak() {
            ("leak", "nobody reads the rest: it is free again")
        } else {
            ("refcount-too-low", "no write will take it from those who read it")
        };
        let offset = Some(place.geometry.host_offset(d.cluster).0);
        let message = format!(
            "the count of cluster {} becomes {} (was {}): {effect}",
            d.cluster.0, d.references, d.stored
        );
        repairer.note(code, "refcount block", offset, None, message);
    }
}

/// Where two blocks differ, in whole words, neighbours joined.
fn differences(old: &[u8], new: &[u8]) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (i, (a, b)) in old.chunks(8).zip(new.chunks(8)).enumerate() {
        if a == b {
            continue;
        }
        match found.last_mut() {
            Some((_, end)) if *end == i * 8 => *end += b.len(),
            _ => found.push((i * 8, i * 8 + b.len())),
        }
    }
    found
}

/// New blocks by their index: the cluster that each is in, and where that starts.
type NewBlocks = BTreeMap<u64, (u64, u64)>;

/// Blocks that must be there and are not; `None` if the table has no room for them.
fn missing_blocks(
    repairer: &mut Repairer<'_>,
    image: &Image,
    walked: &Walked,
    found: &[Discrepancy],
) -> Result<Option<NewBlocks>, ImageError> {
    let (g, place) = (image.geometry(), walked.counts.place());
    let entry = |index: u64| usize::try_from(index).ok().and_then(|i| walked.counts.blocks().get(i));
    let mut wanted: Vec<u64> =
        found.iter().filter(|d| d.references > 0).map(|d| d.cluster.0 / per_block(place)).collect();
    let mut blocks = NewBlocks::new();
    while let Some(index) = wanted.pop() {
        match entry(index) {
            None => return Ok(None),
            Some(Some(_)) => continue,
            Some(None) if blocks.contains_key(&index) => continue,
            Some(None) => {}
        }
        let at = repairer.draft.fresh(1, g.cluster_size())?;
        let cluster = g.host_cluster(HostOffset(at)).0;
        blocks.insert(index, (cluster, at));
        wanted.push(cluster / per_block(place));
    }
    // A block in a region that an existing block counts is one more reference there: left to new structures.
    let counted = |cluster: u64| blocks.contains_key(&(cluster / per_block(place)));
    Ok(blocks.values().all(|&(cluster, _)| counted(cluster)).then_some(blocks))
}

fn put_blocks(
    repairer: &mut Repairer<'_>,
    place: Place,
    blocks: &NewBlocks,
    found: &[Discrepancy],
) -> Result<(), ImageError> {
    let g = place.geometry;
    let mut contents: BTreeMap<u64, Vec<u8>> =
        blocks.keys().map(|&index| (index, vec![0; g.cluster_bytes()])).collect();
    let own = blocks.values().map(|&(cluster, _)| (cluster, 1));
    for (cluster, count) in found.iter().map(|d| (d.cluster.0, d.references)).chain(own) {
        let slot = usize::try_from(cluster % per_block(place)).unwrap_or(usize::MAX);
        if let Some(bytes) = contents.get_mut(&(cluster / per_block(place))) {
            place.width.set(bytes, slot, count).map_err(format)?;
        }
    }
    for (index, &(_, at)) in blocks {
        repairer.draft.write(Stage::Fresh, at, contents.get(index).map_or(&[], Vec::as_slice))?;
        repairer.draft.write(Stage::Blocks, place.table.0 + index * 8, &at.to_be_bytes())?;
        let message = format!("refcount block {index} was missing: a new one is at {at:#x}");
        repairer.note("refcount-block", "refcount table", Some(place.table.0 + index * 8), None, message);
    }
    report(repairer, place, found);
    Ok(())
}

/// A new refcount table with new blocks, behind everything else.
fn rebuild(repairer: &mut Repairer<'_>, place: Place, census: &Census) -> Result<(), ImageError> {
    let g = place.geometry;
    let cluster = g.cluster_size();
    let start = g.host_cluster(HostOffset(repairer.draft.fresh(0, cluster)?)).0;
    let mut used: BTreeSet<u64> = BTreeSet::new();
    census.for_each(|c, _| {
        used.insert(c.0 / per_block(place));
    });
    let (mut blocks, mut table_clusters) = (used.clone(), 1);
    let total = loop {
        let total = table_clusters + blocks.len() as u64;
        let indexes = start / per_block(place)..=(start + total - 1) / per_block(place);
        let more: BTreeSet<u64> = blocks.iter().copied().chain(indexes).collect();
        let entries = more.last().map_or(1, |last| last + 1);
        let wanted = (entries * 8).div_ceil(cluster).max(table_clusters);
        if more.len() == blocks.len() && wanted == table_clusters {
            break total;
        }
        (blocks, table_clusters) = (more, wanted);
    };
    if table_clusters * cluster > MAX_TABLE {
        let what = format!(
            "a refcount table for a file of {} bytes would be larger than {} MiB",
            repairer.len()?,
            MAX_TABLE >> 20
        );
        return Err(ImageError::CannotRepair { what });
    }
    let at = repairer.draft.fresh(total, cluster)?;
    let mut table = vec![0; usize::try_from(table_clusters * cluster).unwrap_or(0)];
    let mut contents: HashMap<u64, (u64, Vec<u8>)> = HashMap::new();
    for (i, &index) in (0..).zip(&blocks) {
        let offset = at + (table_clusters + i) * cluster;
        let slot = usize::try_from(index).unwrap_or(usize::MAX) * 8;
        if let Some(entry) = table.get_mut(slot..slot + 8) {
            entry.copy_from_slice(&offset.to_be_bytes());
        }
        contents.insert(index, (offset, vec![0; g.cluster_bytes()]));
    }
    let mut outcome = Ok(());
    let mut count = |c: HostCluster, references: u64| {
        let slot = usize::try_from(c.0 % per_block(place)).unwrap_or(usize::MAX);
        if let Some((_, bytes)) = contents.get_mut(&(c.0 / per_block(place)))
            && let Err(error) = place.width.set(bytes, slot, references)
        {
            outcome = Err(format(error));
        }
    };
    census.for_each(&mut count);
    (start..start + total).for_each(|c| count(HostCluster(c), 1));
    outcome?;
    repairer.draft.write(Stage::Fresh, at, &table)?;
    for index in &blocks {
        if let Some((offset, bytes)) = contents.get(index) {
            repairer.draft.write(Stage::Fresh, *offset, bytes)?;
        }
    }
    let mut root = [0; 12];
    let (offset, number) = root.split_at_mut(8);
    offset.copy_from_slice(&at.to_be_bytes());
    number.copy_from_slice(&u32::try_from(table_clusters).unwrap_or(u32::MAX).to_be_bytes());
    repairer.draft.write(Stage::Refcounts, 48, &root)?;
    let message = format!(
        "the refcounts could not be used where they were: {} blocks and their table are made anew at {at:#x}, from the \
         pointers; the guest reads the same",
        blocks.len()
    );
    repairer.note("refcounts-rebuilt", "refcount table", Some(at), None, message);
    Ok(())
}

/// Makes the COPIED flags of the active state fit the counts.
pub(crate) fn copied_flags(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    flags(repairer)
}

fn flags(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let walked = walk(&image, repairer.workers, &mut |_| Ok(()))?;
    let findings = copied_findings(&image, &walked, repairer.workers)?;
    drop(image);
    for finding in findings {
        let Some(offset) = finding.offset else { continue };
        let entry = repairer.word(offset)?;
        let flipped = entry ^ 1 << 63;
        let (stage, message) = if flipped >> 63 == 0 {
            (
                Stage::Mend,
                "the COPIED flag is cleared: the next write copies, and leaves to others what they read",
            )
        } else {
            (Stage::Own, "the COPIED flag is set: nobody else reads this, a write may go there in place")
        };
        repairer.draft.write(stage, offset, &flipped.to_be_bytes())?;
        repairer.note("copied-flag", finding.structure, Some(offset), finding.guest, message.to_owned());
    }
    Ok(())
}

fn format(source: FormatError) -> ImageError {
    ImageError::Format { structure: "refcount block", offset: None, source }
}
