//! What each node takes, what deleting it would give back, and what that would write.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use pleach_format::{RunKind, RunList};
use pleach_image::{Chain, Layer, check};
use pleach_lineage::NodeId;
use pleach_plan::{Content, Cover, Need, Summary, Target, candidates, pull, settle};
use pleach_store::{Disk, Role};
use rayon::prelude::*;

use crate::carry::{bytes_written, carried};
use crate::delete::{
    bytes_of, can_merge_down, committed, data_extents, freed_by, parts_of, pulled_fills, shape_of,
};
use crate::family::{Family, State};
use crate::open::open_one;
use crate::scan::{layer_runs, snapshot_covers, zero_clusters};
use crate::survey::{Backing, FileFormat, Survey, SurveyFile};
use crate::{Error, Result};

/// The figures of one node, in bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// What it takes on disk: an external node's file; an internal one's clusters, shared ones included.
    pub on_disk: u64,
    /// What of that no other node reads: clusters that only this node reads, and those that none does.
    pub freed_if_deleted: u64,
    /// Guest data that deleting the node, with default options, writes into other files.
    pub written_if_deleted: u64,
}

impl Sizes {
    /// The figures of two disks of one node.
    fn and(self, other: Self) -> Self {
        Self {
            on_disk: self.on_disk + other.on_disk,
            freed_if_deleted: self.freed_if_deleted + other.freed_if_deleted,
            written_if_deleted: self.written_if_deleted + other.written_if_deleted,
        }
    }
}

/// What is known of one file after one look at all its tables.
struct Scanned {
    runs: RunList,
    cover: Cover,
    shape: Option<Target>,
    /// See [`parts_of`].
    parts: u32,
    no_bitmaps: bool,
    writable: bool,
    cluster: u64,
    allocated: Vec<Range<u64>>,
    /// Host clusters of each internal snapshot, sorted, each once.
    snapshots: Vec<Arc<[u64]>>,
    /// How many states, the active one included, have each of these clusters.
    owners: HashMap<u64, u32>,
    states: Vec<Cover>,
}

/// The figures of `shown`, which are whole trees. The files are locked for `role` while they are looked at: [`Role::Look`] takes them even
/// from under a writer.
///
/// # Errors
/// Damage in an image's tables; a file that cannot be opened or locked.
pub fn sizes(
    disk: &dyn Disk,
    survey: &Survey,
    family: &Family,
    shown: &BTreeSet<NodeId>,
    role: Role,
) -> Result<BTreeMap<NodeId, Sizes>> {
    let wanted: BTreeSet<usize> = shown
        .iter()
        .flat_map(|&id| family.states(id))
        .map(|state| match state {
            State::File(i) | State::Snapshot(i, _) => *i,
        })
        .collect();
    let nodes: Vec<usize> = wanted.into_iter().collect();
    let scanned: BTreeMap<usize, Scanned> = nodes
        .par_iter()
        .map(|&i| {
            let file =
                survey.files.get(i).ok_or_else(|| Error::new(crate::ErrorKind::NotFound, "no such file"))?;
            Ok((i, scan(disk, file, role)?))
        })
        .collect::<Result<_>>()?;
    let below = contents(survey, family, &scanned);
    let measured: Vec<(NodeId, Sizes)> = family
        .lineage
        .ids()
        .filter(|id| shown.contains(id))
        .collect::<Vec<_>>()
        .par_iter()
        .map(|&id| {
            let mut all: Option<Sizes> = None;
            for state in family.states(id) {
                let one = match *state {
                    State::File(i) => Some(of_file(disk, survey, &scanned, &below, i)?),
                    State::Snapshot(i, k) => scanned.get(&i).map(|s| of_snapshot(s, k)),
                };
                all = match (all, one) {
                    (Some(all), Some(one)) => Some(all.and(one)),
                    (all, one) => all.or(one),
                };
            }
            Ok(all.map(|all| (id, all)))
        })
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    Ok(measured.into_iter().collect())
}

fn scan(disk: &dyn Disk, file: &SurveyFile, role: Role) -> Result<Scanned> {
    let layer = open_one(disk, file, role)?;
    let path = &file.path;
    let runs = layer_runs(path, &layer)?;
    let len = layer.store().len().map_err(|e| Error::io("find the length of", path, e))?;
    let image = layer.image();
    let snapshots = match image {
        Some(image) if !file.snapshots.is_empty() => {
            image.snapshot_clusters().map_err(|e| Error::image(path, e))?
        }
        _ => Vec::new(),
    };
    let cluster = image.map_or(4096, |i| i.geometry().cluster_size());
    Ok(Scanned {
        owners: owners(&snapshots, &runs, cluster),
        snapshots,
        cover: Cover::of_runs(layer.size(), &runs),
        runs,
        shape: image.map(|i| shape_of(i, i.size())),
        parts: image.map_or(0, parts_of),
        no_bitmaps: image.is_none_or(|i| i.each_bitmap().is_ok_and(|mut b| b.next().is_none())),
        writable: image.is_none_or(|i| i.check_mergeable().is_ok()),
        cluster,
        allocated: layer.store().data_ranges(0..len).map_err(|e| Error::io("find the data of", path, e))?,
        states: match image {
            Some(image) if !file.snapshots.is_empty() => snapshot_covers(path, image)?,
            _ => Vec::new(),
        },
    })
}

/// How many states have each host cluster of the internal snapshots.
fn owners(snapshots: &[Arc<[u64]>], active: &RunList, cluster: u64) -> HashMap<u64, u32> {
    let mut owners: HashMap<u64, u32> = HashMap::new();
    let mut times: HashMap<*const u64, (&Arc<[u64]>, u32)> = HashMap::new();
    for state in snapshots {
        times.entry(state.as_ptr()).or_insert((state, 0)).1 += 1;
    }
    for (state, times) in times.into_values() {
        for &c in state.iter() {
            *owners.entry(c).or_insert(0) += times;
        }
    }
    for (host, _) in data_extents(active) {
        for c in host.start / cluster..host.end.div_ceil(cluster) {
            owners.entry(c).and_modify(|count| *count += 1);
        }
    }
    owners
}

/// The content below each file, computed once along the tree.
fn contents(
    survey: &Survey,
    family: &Family,
    scanned: &BTreeMap<usize, Scanned>,
) -> BTreeMap<usize, Arc<Content>> {
    let mut whole: BTreeMap<usize, Arc<Content>> = BTreeMap::new();
    let mut below = BTreeMap::new();
    let states = family.lineage.depth_first().flat_map(|(_, id)| family.states(id));
    for state in states {
        let State::File(i) = *state else { continue };
        let under = match survey.files.get(i).map(|f| &f.backing) {
            Some(Backing::File(b)) => whole.get(b).cloned().unwrap_or_default(),
            _ => Arc::default(),
        };
        if let Some(s) = scanned.get(&i) {
            whole.insert(i, Arc::new(under.under(&s.cover)));
        }
        below.insert(i, under);
    }
    below
}

fn of_file(
    disk: &dyn Disk,
    survey: &Survey,
    scanned: &BTreeMap<usize, Scanned>,
    below: &BTreeMap<usize, Arc<Content>>,
    index: usize,
) -> Result<Sizes> {
    let (Some(file), Some(own)) = (survey.files.get(index), scanned.get(&index)) else {
        return Err(Error::new(crate::ErrorKind::NotFound, "no such file"));
    };
    let readers: Vec<&Scanned> = file.dependents.iter().filter_map(|d| scanned.get(d)).collect();
    let shared = shared_ranges(own, &readers);
    let on_disk = file.stat.allocated;
    let freed_if_deleted = freed_by(file).saturating_sub(allocated_within(&own.allocated, &shared));
    let content = below.get(&index).cloned().unwrap_or_default();
    let written_if_deleted = written(disk, survey, scanned, &content, index)?;
    Ok(Sizes { on_disk, freed_if_deleted, written_if_deleted })
}

/// The host ranges of a file's data that another node reads: a dependent that says nothing there, or an internal
/// snapshot of the same file. Whole clusters, in order, not overlapping.
fn shared_ranges(own: &Scanned, readers: &[&Scanned]) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    for (host, guest) in data_extents(&own.runs) {
        for reader in readers {
            for seen in reader.cover.transparent(guest.clone()) {
                if host.end - host.start == guest.end - guest.start {
                    let from = (host.start + (seen.start - guest.start)) & !(own.cluster - 1);
                    let to = (host.start + (seen.end - guest.start)).next_multiple_of(own.cluster);
                    ranges.push(from.max(host.start & !(own.cluster - 1))..to);
                } else {
                    // Compressed: the clusters that it lies in are read.
                    ranges.push(host.start & !(own.cluster - 1)..host.end.next_multiple_of(own.cluster));
                }
            }
        }
    }
    ranges.extend(own.owners.keys().map(|c| c * own.cluster..(c + 1) * own.cluster));
    ranges.sort_by_key(|r| r.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Bytes that both lists cover; both are in order.
fn allocated_within(allocated: &[Range<u64>], ranges: &[Range<u64>]) -> u64 {
    let mut sum = 0;
    let mut at = 0;
    for range in ranges {
        while allocated.get(at).is_some_and(|a| a.end <= range.start) {
            at += 1;
        }
        for a in allocated.get(at..).unwrap_or(&[]).iter().take_while(|a| a.start < range.end) {
            sum += a.end.min(range.end) - a.start.max(range.start);
        }
    }
    sum
}

/// What deleting a file's active state writes by default; the same choice as the planner of the deletion makes.
fn written(
    disk: &dyn Disk,
    survey: &Survey,
    scanned: &BTreeMap<usize, Scanned>,
    content: &Content,
    index: usize,
) -> Result<u64> {
    let (Some(file), Some(own)) = (survey.files.get(index), scanned.get(&index)) else { return Ok(0) };
    let mut sum = 0;
    for &dependent in &file.dependents {
        let Some(over) = scanned.get(&dependent) else { continue };
        let Some(shape) = over.shape else { continue };
        let pair = Pair {
            disk,
            survey,
            content,
            own: &own.cover,
            over: &over.cover,
            victim: index,
            reader: dependent,
            packed: survey
                .chain(dependent)
                .unwrap_or_default()
                .iter()
                .filter_map(|i| scanned.get(i))
                .flat_map(|s| s.runs.as_slice())
                .any(|run| matches!(run.kind, RunKind::Compressed(_))),
        };
        if !over.states.is_empty() {
            let covers: Vec<Cover> = std::iter::once(&over.cover).chain(&over.states).cloned().collect();
            let fills =
                pulled_fills(shape, &covers, &own.cover, content, |asked| pair.zero(shape, asked, false))?;
            sum += bytes_of(shape.cluster_bits, &fills);
            continue;
        }
        let pulled = pair.cost(dependent, shape, &pull(shape, &over.cover, &own.cover, content))?;
        let down = own.shape.filter(|_| {
            file.dependents.len() == 1
                && file.format == FileFormat::Qcow2
                && own.writable
                && own.no_bitmaps
                && over.no_bitmaps
                && survey.files.get(dependent).is_some_and(|r| can_merge_down(disk, file, r))
                && over.cover.size() >= own.cover.size()
        });
        sum += match down {
            None => pulled,
            Some(shape) => {
                let shape = Target { size: over.cover.size(), ..shape };
                let plain = Cover::of_plain_data(own.cover.size(), &own.runs);
                let needs = committed((shape, own.parts), &over.cover, &own.cover, &plain, content);
                let down = pair.cost(index, shape, &needs)?;
                if down < pulled && pair.victim_is_clean()? { down } else { pulled }
            }
        };
    }
    Ok(sum)
}

struct Pair<'a> {
    disk: &'a dyn Disk,
    survey: &'a Survey,
    content: &'a Content,
    own: &'a Cover,
    over: &'a Cover,
    victim: usize,
    reader: usize,
    /// Whether any of the files has compressed clusters, which could be taken over as they are.
    packed: bool,
}

impl Pair<'_> {
    /// Bytes that `target`, one of the two, would have to take.
    fn cost(&self, target: usize, shape: Target, needs: &[Need]) -> Result<u64> {
        let asked: Vec<u64> = candidates(needs).collect();
        let zero = self.zero(shape, &asked, true)?;
        let needs = settle(needs, zero);
        if !self.packed {
            return Ok(Summary::of(shape, &needs).bytes_written);
        }
        let chain = Chain::new(self.layers(true, usize::MAX)?);
        let layer = chain.layers().get(usize::from(target == self.victim));
        let Some(image) = layer.and_then(|l| l.image()) else { return Ok(0) };
        let path = self.survey.files.get(target).map(|f| f.path.clone()).unwrap_or_default();
        let carried = carried(image, &chain, shape, &needs).map_err(|e| Error::image(&path, e))?;
        Ok(bytes_written(image, shape, &needs, &carried))
    }

    /// The reader, if asked for, and the first files that it stands on, opened.
    fn layers(&self, with_reader: bool, depth: usize) -> Result<Vec<Arc<Layer>>> {
        let mut files: Vec<usize> = with_reader.then_some(self.reader).into_iter().collect();
        files.extend(self.survey.chain(self.victim)?.into_iter().take(depth));
        let opened = files.iter().filter_map(|&i| self.survey.files.get(i));
        opened.map(|f| open_one(self.disk, f, Role::Look).map(Arc::new)).collect()
    }

    /// Whether nothing at all is wrong with the victim's file, so that it may be merged into.
    fn victim_is_clean(&self) -> Result<bool> {
        let Some(file) = self.survey.files.get(self.victim) else { return Ok(false) };
        let layer = open_one(self.disk, file, Role::Look)?;
        let report = layer.image().map(check);
        Ok(report.is_some_and(|r| r.is_ok_and(|r| r.errors == 0 && r.leaks == 0)))
    }

    /// Which of some clusters read as zeros, in the reader or only in what it stands on.
    fn zero(&self, shape: Target, asked: &[u64], in_reader: bool) -> Result<Vec<bool>> {
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = |c: u64| c << shape.cluster_bits..(c + 1) << shape.cluster_bits;
        // The layers below matter only where they show through both.
        let shows = |c: u64| {
            let gaps = self.own.transparent(bytes(c));
            let gaps = gaps
                .into_iter()
                .flat_map(|gap| if in_reader { self.over.transparent(gap) } else { vec![gap] });
            gaps.into_iter().any(|gap| self.content.touches(&gap))
        };
        let deep = asked.iter().any(|&c| shows(c));
        let layers = self.layers(in_reader, if deep { usize::MAX } else { 1 })?;
        let path = self.survey.files.get(self.victim).map(|f| f.path.clone()).unwrap_or_default();
        zero_clusters(&path, &Chain::new(layers), shape.cluster_bits, asked)
    }
}

/// An internal snapshot: its clusters; of them, those that neither the active state nor another snapshot uses.
fn of_snapshot(file: &Scanned, index: usize) -> Sizes {
    let own: &[u64] = file.snapshots.get(index).map_or(&[], |clusters| clusters);
    let exclusive = own.iter().filter(|c| file.owners.get(c) == Some(&1)).count() as u64;
    Sizes {
        on_disk: own.len() as u64 * file.cluster,
        freed_if_deleted: exclusive * file.cluster,
        written_if_deleted: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intersections() {
        let allocated = [0..10, 20..30, 40..50];
        assert_eq!(allocated_within(&allocated, &[5..25, 45..100]), 5 + 5 + 5);
        assert_eq!(allocated_within(&allocated, &[0..2, 4..6, 29..41]), 2 + 2 + 1 + 1);
        assert_eq!(allocated_within(&[], &[0..10, 20..30]), 0);
    }
}
