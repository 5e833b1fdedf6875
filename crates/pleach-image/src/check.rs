//! Consistency of one image: what `qemu-img check` counts, and why.

use pleach_alloc::{Discrepancy, RefcountTable};
use pleach_format::{HostCluster, HostOffset, L1Entry, L2Entry, Mapping};

use crate::walk::{Entries, Finding, TableUse, Walked, walk};
use crate::workers::{collect, tables_a_piece};
use crate::{Alone, Image, ImageError, Workers};

/// The outcome of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Inconsistencies that may cost data.
    pub errors: u64,
    /// Clusters that are counted too often: lost space, no harm.
    pub leaks: u64,
    /// Guest clusters that the active state has data or zeros allocated for.
    pub allocated_clusters: u64,
    /// Of these, compressed ones.
    pub compressed_clusters: u64,
    /// Of these, those that do not follow the one before them in the file; every compressed one.
    pub fragmented_clusters: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Host offset behind the last cluster that is in use or counted.
    pub image_end_offset: u64,
    /// What was found, in the order of the walk, leaks last.
    pub findings: Vec<Finding>,
    /// Further findings of the same kinds: they are counted, but not listed.
    pub more_findings: u64,
    /// Everything is listed: for who mends what is.
    pub(crate) every: bool,
}

/// Most findings that a check lists: a table of two MiB may be wrong in every entry.
const MOST_FINDINGS: usize = 10_000;

/// Checks an image without changing it.
///
/// Counts below the number of references, wrong COPIED flags of the active state, and pointers that break the format or
/// lead out of the file are errors; counts above it are leaks, unless the cluster lies behind the end of the file.
///
/// # Errors
/// A file that cannot be read, or a refcount table that cannot be loaded.
pub fn check(image: &Image) -> Result<CheckReport, ImageError> {
    check_with(image, &Alone)
}

/// As [`check`], with the tables read by `workers`.
///
/// # Errors
/// As [`check`].
pub fn check_with(image: &Image, workers: &dyn Workers) -> Result<CheckReport, ImageError> {
    let g = image.geometry();
    let mut report = CheckReport { total_clusters: g.clusters_for(image.size()).0, ..CheckReport::default() };
    let walked = walk(image, workers, &mut |finding| {
        report.errors += finding.times;
        report.list(finding);
        Ok(())
    })?;
    copied_flags(image, &walked, workers, &mut report)?;
    compare(image, &walked, &mut report);
    Ok(report)
}

/// Checks COPIED in the active tables, and gathers the figures of the active state.
fn copied_flags(
    image: &Image,
    walked: &Walked,
    workers: &dyn Workers,
    report: &mut CheckReport,
) -> Result<(), ImageError> {
    let active: Vec<_> = walked.tables.iter().filter(|(_, used)| !used.active.is_empty()).collect();
    let pieces: Vec<_> = active.chunks(tables_a_piece(image.geometry().cluster_bytes())).collect();
    // What is found waits in memory until it is joined: a few pieces at a time.
    for round in pieces.chunks(PIECES_A_ROUND) {
        let parts = collect(workers, round.len(), |i| {
            let mut part = CheckReport { every: report.every, ..CheckReport::default() };
            let tables = round.get(i).copied().unwrap_or_default();
            copied_flags_of(image, walked, tables, &mut part).map(|()| part)
        });
        parts.into_iter().try_for_each(|part| part.map(|part| report.join(part)))?;
    }
    Ok(())
}

const PIECES_A_ROUND: usize = 8;

/// The same for some of the tables.
fn copied_flags_of(
    image: &Image,
    walked: &Walked,
    tables: &[(&u64, &TableUse)],
    report: &mut CheckReport,
) -> Result<(), ImageError> {
    let g = image.geometry();
    let mut counts = Counts::new(&walked.counts);
    let mut entries = Entries::new(image);
    let data_file = image.header().incompatible().has(pleach_format::Incompatible::DATA_FILE);
    for &(&at, used) in tables {
        let count = counts.get(g.host_cluster(HostOffset(at)));
        for &slot in &used.active {
            let entry = image.l1().get(slot).copied().unwrap_or_default();
            if entry.copied() != (count == 1) {
                let place = image.header().l1_table_offset().0 + slot as u64 * 8;
                let guest = Some((slot as u64 * g.l1_span(), g.l1_span()));
                report.copied("L1 table", entry.0, place, guest, count, entry.copied());
            }
        }
        let mut expected = None;
        entries.for_each_span(at, |slot, n, raw, target| {
            let Ok(target) = target else { return Ok(()) };
            report.allocated_clusters += n as u64;
            if raw.is_compressed() {
                report.compressed_clusters += 1;
                report.fragmented_clusters += 1;
                return Ok(());
            }
            if expected.is_some_and(|e| e != target.offset) {
                report.fragmented_clusters += 1;
            }
            expected = Some(target.offset + n as u64 * g.cluster_size());
            let (first, mut done) = (g.host_cluster(HostOffset(target.offset)).0, 0);
            while done < n && !data_file {
                let (count, alike) = counts.alike(HostCluster(first + done as u64), n - done);
                let wrong = if raw.copied() == (count == 1) { 0..0 } else { done..done + alike };
                for i in wrong {
                    let place = at + ((slot + i) * g.l2_entry_bytes()) as u64;
                    let guest = Some((used.guest + (slot + i) as u64 * g.cluster_size(), g.cluster_size()));
                    let raw = raw.0 + i as u64 * g.cluster_size();
                    let copied = raw >> 63 != 0;
                    report.copied("L2 table", raw, place, guest, count, copied);
                }
                done += alike;
            }
            Ok(())
        })?;
        if data_file {
            external(image, at, used.guest, report)?;
        }
    }
    Ok(())
}

/// Entries of an image with an external data file: always COPIED, and nothing compressed.
fn external(image: &Image, at: u64, base: u64, report: &mut CheckReport) -> Result<(), ImageError> {
    let g = image.geometry();
    let table = image.l2_table(L1Entry(at))?.unwrap_or_default();
    let mut expected = None;
    image.for_each_entry(&table, |slot, entry| {
        let raw: L2Entry = entry.descriptor;
        let allocated = match raw.decode(g, image.header().version()) {
            Ok(Mapping::Data(at) | Mapping::ZeroAllocated(at)) => Some(at.0),
            // Offset 0 is a place in the data file.
            Ok(Mapping::Unallocated) if raw.copied() => Some(0),
            _ => None,
        };
        if let Some(host) = allocated {
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(expected.is_some_and(|e| e != host));
            expected = Some(host + g.cluster_size());
            if !raw.copied() {
                let place = at + slot as u64 * g.l2_entry_bytes() as u64;
                let guest = Some((base + slot as u64 * g.cluster_size(), g.cluster_size()));
                report.copied("L2 table", raw.0, place, guest, 1, false);
            }
        }
        Ok(())
    })
}

/// The COPIED flags that do not fit the stored counts.
pub(crate) fn copied_findings(
    image: &Image,
    walked: &Walked,
    workers: &dyn Workers,
) -> Result<Vec<Finding>, ImageError> {
    let mut report = CheckReport { every: true, ..CheckReport::default() };
    copied_flags(image, walked, workers, &mut report)?;
    Ok(report.findings)
}

fn compare(image: &Image, walked: &Walked, report: &mut CheckReport) {
    let g = image.geometry();
    let clusters = image.file_len().div_ceil(g.cluster_size());
    let found = walked.census.compare(&walked.counts, clusters, MOST_FINDINGS);
    report.image_end_offset = found.end * g.cluster_size();
    report.errors += found.too_low;
    report.leaks += found.leaks;
    report.more_findings += found.too_low + found.leaks - found.listed.len() as u64;
    for Discrepancy { cluster, stored, references } in found.listed {
        let leak = stored > references;
        let message = if leak {
            format!("cluster {} is counted {stored} times, {references} pointers lead there", cluster.0)
        } else {
            format!(
                "cluster {} is counted {stored} times, but {references} pointers lead there: a write may overwrite what \
                 the others read",
                cluster.0
            )
        };
        report.list(Finding {
            code: if leak { "leak" } else { "refcount-too-low" },
            structure: "refcount block",
            offset: Some(g.host_offset(cluster).0),
            guest: None,
            message,
            times: 1,
        });
    }
}

impl CheckReport {
    /// Adds what was found of other tables.
    fn join(&mut self, part: Self) {
        self.errors += part.errors;
        self.allocated_clusters += part.allocated_clusters;
        self.compressed_clusters += part.compressed_clusters;
        self.fragmented_clusters += part.fragmented_clusters;
        self.more_findings += part.more_findings;
        part.findings.into_iter().for_each(|finding| self.list(finding));
    }

    fn list(&mut self, finding: Finding) {
        if self.every || self.findings.len() < MOST_FINDINGS {
            self.findings.push(finding);
        } else {
            self.more_findings += 1;
        }
    }

    fn copied(
        &mut self,
        structure: &'static str,
        entry: u64,
        offset: u64,
        guest: Option<(u64, u64)>,
        count: u64,
        copied: bool,
    ) {
        let effect = if copied {
            "the next write there changes what other states read"
        } else {
            "the next write there copies needlessly"
        };
        self.errors += 1;
        self.list(Finding {
            code: "copied-flag",
            structure,
            offset: Some(offset),
            guest,
            message: format!("entry {entry:#x}: the COPIED flag does not fit the refcount {count}; {effect}"),
            times: 1,
        });
    }
}

/// Stored counts, one block at a time.
pub(crate) struct Counts<'a> {
    table: &'a RefcountTable,
    block: Option<(u64, Vec<u8>)>,
}

impl<'a> Counts<'a> {
    pub(crate) fn new(table: &'a RefcountTable) -> Self {
        Self { table, block: None }
    }

    pub(crate) fn get(&mut self, cluster: HostCluster) -> u64 {
        let place = self.table.place();
        let per_block = place.width.per_block(place.geometry);
        let index = cluster.0 / per_block;
        if self.block.as_ref().is_none_or(|(i, _)| *i != index) {
            let bytes = self.table.read_block(index).map(|(_, bytes)| bytes).unwrap_or_default();
            self.block = Some((index, bytes));
        }
        let slot = usize::try_from(cluster.0 % per_block).unwrap_or(usize::MAX);
        self.block.as_ref().map_or(0, |(_, bytes)| place.width.get(bytes, slot))
    }

    /// The count of `cluster`, and how many clusters from there on have the same, at least 1 and at most `most`.
    pub(crate) fn alike(&mut self, cluster: HostCluster, most: usize) -> (u64, usize) {
        let count = self.get(cluster);
        let place = self.table.place();
        let slot = cluster.0 % place.width.per_block(place.geometry);
        let bytes = self.block.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        (count, place.width.alike(bytes, usize::try_from(slot).unwrap_or(usize::MAX), most).max(1))
    }
}
