//! Carrying out a deletion: copies in parallel, then one switch an image, then the names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pleach_alloc::{Allocator, Place};
use pleach_format::{BackingFile, GuestCluster, HostOffset, L2Entry, Mapping};
use pleach_image::{
    Chain, Emptying, Image, ImageError, PieceKind, StatesEditor, Switch, TableEditor, backing_path,
    clear_unknown_autoclear, publish, release, set_backing,
};
use pleach_lineage::Reach;
use pleach_plan::{How, Need, Say, Target};
use pleach_store::{Access, Disk, FileId, Store};
use rayon::prelude::*;

use crate::delete::{
    DeletePlan, Direction, Forecast, Length, Merge, Naming, Prepared, Rebase, StateFill, Work, directories,
    freed_by, still_read,
};
use crate::journal::{Intent, Journal, JournalImage, NewBacking, NewName, directory_of};
use crate::open::OpenFiles;
use crate::rebase::Onto;
use crate::survey::{Survey, Trust};
use crate::watch::Watch;
use crate::workers::Threads;
use crate::{Error, ErrorKind, Result};

/// Largest piece that one worker copies at a time.
const STEP: u64 = 8 << 20;

/// What a finished deletion has done.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Guest bytes written as data.
    pub bytes_written: u64,
    /// Of these, bytes that the file system shared.
    pub bytes_cloned: u64,
    /// Bytes on disk of the files that went.
    pub bytes_freed: u64,
}

/// Guest bytes to be brought to a place in the target's file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Step {
    guest: u64,
    len: u64,
    host: u64,
}

/// One merge with its targets fixed, nothing written.
struct Staged<'a> {
    merge: &'a Merge,
    steps: Vec<Step>,
    zeros: Vec<Step>,
    clusters: Option<(Allocator, Switch)>,
    reserve: Vec<std::ops::Range<u64>>,
    old_len: u64,
}

/// Carries out a plan. When this returns `Ok` all is durable; when it fails after the journal was begun, the journal is
/// left for [`crate::resume`], and every node that stays reads as before.
///
/// # Errors
/// What keeps it from going on. Before anything was changed: an interrupted operation, a full disk, a directory that
/// cannot be written.
pub fn execute(disk: &dyn Disk, survey: &Survey, prepared: Prepared, watch: &Watch) -> Result<Outcome> {
    let Prepared { plan, open } = prepared;
    let intent = intent_of(disk, survey, &plan)?;
    let staged = stage_all(survey, &plan, &open)?;
    if staged.is_empty() && single_name(&plan) {
        // One name goes and nothing else happens: there is no middle to be interrupted in.
        return remove(disk, survey, &plan);
    }
    let first = plan.single.as_ref().map(|s| s.0).or(plan.removes.last().copied());
    let named_after = first.and_then(|i| survey.files.get(i)).map(|f| f.path.clone()).unwrap_or_default();
    let mut journal = Journal::begin(disk, &named_after, &intent)?;
    let mut outcome = Outcome::default();
    let begun = try_second_name(disk, survey, &plan)
        .and_then(|()| reserve_all(survey, &open, &staged))
        .and_then(|()| copy_fresh(survey, &open, &staged, watch, &mut outcome));
    if let Err(error) = begun {
        // No table has changed yet: cut the files to their old lengths, and nothing has happened.
        shorten(&open, &staged);
        // A journal that cannot be removed is met by the next operation; the reason that counts is this one.
        let _ = journal.end();
        return Err(error);
    }
    let result = run(disk, survey, &plan, &open, staged, &mut journal, watch, outcome);
    match result {
        Ok(outcome) => {
            journal.end()?;
            Ok(outcome)
        }
        Err(error) => {
            let images = directory_of(&named_after);
            let hint = format!("nothing is lost; finish with: pleach resume {}", images.display());
            let hint = error.hint.as_ref().map_or(hint.clone(), |h| format!("{h}; {hint}"));
            Err(error.hint(hint))
        }
    }
}

/// Does all of a plan that changes nothing: fixes the targets, and reads what is compressed. Returns what comes of it.
///
/// # Errors
/// What would keep [`execute`] from going on.
pub(crate) fn rehearse(survey: &Survey, plan: &DeletePlan, open: &OpenFiles) -> Result<Forecast> {
    let staged = stage_all(survey, plan, open)?;
    for stage in &staged {
        verify_sources(survey, open, stage)?;
    }
    forecast(survey, plan, open, &staged)
}

/// What a plan reads, and how long files become. Nothing is read but tables.
///
/// # Errors
/// As [`rehearse`].
pub(crate) fn foresee(survey: &Survey, plan: &DeletePlan, open: &OpenFiles) -> Result<Forecast> {
    forecast(survey, plan, open, &stage_all(survey, plan, open)?)
}

fn forecast(survey: &Survey, plan: &DeletePlan, open: &OpenFiles, staged: &[Staged<'_>]) -> Result<Forecast> {
    let mut reads: BTreeMap<usize, u64> = BTreeMap::new();
    let mut lengths = Vec::new();
    for stage in staged {
        lengths.push(Length { file: stage.merge.target, before: stage.old_len, after: stage.new_len() });
        if stage.steps.is_empty() {
            continue;
        }
        let files = chain_of(survey, stage.merge)?;
        let chain = open.chain(&files)?;
        for step in &stage.steps {
            let pieces = chain.pieces(step.guest, step.len);
            for piece in pieces.map_err(|e| Error::image(path_of(survey, stage.merge.reader), e))? {
                if let PieceKind::Data { layer, .. } | PieceKind::Compressed { layer } = piece.kind
                    && let Some(&file) = files.get(layer)
                {
                    *reads.entry(file).or_default() += piece.len;
                }
            }
        }
    }
    if let Some((_, _, Naming::Empty { reader, .. })) = &plan.single
        && let Some(image) = open.layer(*reader).image()
    {
        let emptying =
            Emptying::of(image, &Threads).map_err(|e| Error::image(path_of(survey, *reader), e))?;
        lengths.push(Length { file: *reader, before: image.file_len(), after: emptying.file_len() });
    }
    Ok(Forecast { reads: reads.into_iter().collect(), lengths })
}

/// Sees whether the file system has hard links, before anything depends on it.
fn try_second_name(disk: &dyn Disk, survey: &Survey, plan: &DeletePlan) -> Result<()> {
    let (file, name) = match &plan.single {
        Some((victim, _, Naming::TakeVictimsName { reader, followers })) if !followers.is_empty() => {
            (*reader, path_of(survey, *victim))
        }
        Some((_, _, Naming::TakeNewName { holder, name, .. })) => (*holder, name.as_path()),
        _ => return Ok(()),
    };
    let (path, second) = (path_of(survey, file), second_name(name));
    drop_second_name(disk, survey, file, &second)?;
    link(disk, path, &second)?;
    disk.unlink(&second).map_err(|e| Error::io("remove", &second, e))
}

pub(crate) fn link(disk: &dyn Disk, path: &Path, second: &Path) -> Result<()> {
    disk.link(path, second).map_err(|e| {
        Error::io("give a second name to", path, e)
            .hint("if this file system has no hard links, keep the name of the uppermost image instead")
    })
}

/// Removes a second name that an interrupted operation left; anybody else's file is in the way.
fn drop_second_name(disk: &dyn Disk, survey: &Survey, reader: usize, second: &Path) -> Result<()> {
    match (disk.stat(second), survey.files.get(reader)) {
        (Ok(stat), Some(file)) if stat.id == file.stat.id => {
            disk.unlink(second).map_err(|e| Error::io("remove", second, e))
        }
        (Ok(_), _) => {
            Err(Error::new(ErrorKind::Refused, "is in the way: the name is needed for an instant").at(second))
        }
        (Err(_), _) => Ok(()),
    }
}

fn single_name(plan: &DeletePlan) -> bool {
    match &plan.single {
        Some((_, _, naming)) => *naming == Naming::Unlink && plan.between.is_empty(),
        None => plan.removes.len() == 1,
    }
}

/// Carries out what is left of a plan whose journal is there already.
///
/// # Errors
/// As [`execute`].
pub(crate) fn go_on(
    disk: &dyn Disk,
    survey: &Survey,
    prepared: &Prepared,
    journal: &mut Journal<'_>,
    watch: &Watch,
) -> Result<Outcome> {
    let (plan, open) = (&prepared.plan, &prepared.open);
    let staged = stage_all(survey, plan, open)?;
    let mut outcome = Outcome::default();
    reserve_all(survey, open, &staged)?;
    copy_fresh(survey, open, &staged, watch, &mut outcome)?;
    run(disk, survey, plan, open, staged, journal, watch, outcome)
}

#[expect(clippy::too_many_arguments, reason = "the parts of one operation, each used")]
fn run(
    disk: &dyn Disk,
    survey: &Survey,
    plan: &DeletePlan,
    open: &OpenFiles,
    staged: Vec<Staged<'_>>,
    journal: &mut Journal<'_>,
    watch: &Watch,
    mut outcome: Outcome,
) -> Result<Outcome> {
    for stage in staged {
        if stage.clusters.is_some() {
            let path = path_of(survey, stage.merge.target);
            let store = open.layer(stage.merge.target).store();
            clear_unknown_autoclear(&**store).map_err(|e| Error::image(path, e))?;
        }
        if stage.in_place() {
            copy_stage(survey, open, &stage, watch, &mut outcome)?;
        }
        merge(survey, open, stage, journal)?;
    }
    if watch.should_stop() {
        return Err(stopped());
    }
    let finished = match &plan.single {
        Some((victim, _, naming)) => rename_all(disk, survey, plan, open, *victim, naming, journal)?,
        None => remove(disk, survey, plan)?,
    };
    Ok(Outcome { bytes_freed: finished.bytes_freed, ..outcome })
}

fn stopped() -> Error {
    Error::new(ErrorKind::Interrupted, "interrupted")
}

/// Removes files that need no copying, leaves first, so that what is left can be read at every instant.
fn remove(disk: &dyn Disk, survey: &Survey, plan: &DeletePlan) -> Result<Outcome> {
    let single = plan.single.as_ref().map(|(victim, _, _)| *victim);
    let mut outcome = Outcome::default();
    for index in plan.removes.iter().copied().chain(single) {
        outcome.bytes_freed += unlink(disk, survey, index)?;
    }
    Ok(outcome)
}

/// Removes the name of one file, after a last look whether anything reads it. Returns the bytes that it took on disk
/// when it was found.
fn unlink(disk: &dyn Disk, survey: &Survey, index: usize) -> Result<u64> {
    let Some(file) = survey.files.get(index) else { return Ok(0) };
    if !disk.stat(&file.path).is_ok_and(|stat| stat.id == file.stat.id) {
        return Ok(0);
    }
    nobody_reads(disk, &survey.directories, file.stat.id, &[])?;
    disk.unlink(&file.path).map_err(|e| Error::io("remove", &file.path, e))?;
    let dir = directory_of(&file.path);
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))?;
    Ok(freed_by(file))
}

/// Looks again at every image for readers of `file` other than those in `known`.
///
/// # Errors
/// [`ErrorKind::Refused`] if there is one: an overlay that was made meanwhile.
pub(crate) fn nobody_reads(
    disk: &dyn Disk,
    directories: &[PathBuf],
    file: FileId,
    known: &[FileId],
) -> Result<()> {
    let trust = Trust { everything: true, ..Trust::default() };
    let now = Survey::of_directories(disk, directories, &trust)?;
    let Some(entry) = now.find_id(file).and_then(|i| now.files.get(i)) else { return Ok(()) };
    let readers = now.files.iter().map(|f| f.stat.id).chain(now.broken.iter().map(|b| b.id));
    let others = readers.filter(|id| !known.contains(id) && *id != file);
    let needed_by: Vec<FileId> = Reach::of(others, &now.reads())
        .needed_by(&file)
        .into_iter()
        .filter(|id| !known.contains(id))
        .collect();
    if needed_by.is_empty() { Ok(()) } else { Err(still_read(&now, entry, &needed_by)) }
}

impl Staged<'_> {
    /// Length of the target's file when all is done.
    fn new_len(&self) -> u64 {
        match &self.merge.work {
            Work::Raw { size, .. } => *size,
            _ => self.reserve.iter().map(|range| range.end).fold(self.old_len, u64::max),
        }
    }

    /// Whether data are written over what the target already has; else only into clusters that nothing leads to.
    fn in_place(&self) -> bool {
        match &self.merge.work {
            Work::Raw { .. } => true,
            Work::Clusters { needs, .. } => needs.iter().any(|n| n.how == How::Patch),
            Work::States { .. } => false,
        }
    }
}

/// Everything that can be done before anything changes: copies into clusters that nothing leads to; and for what will be
/// written in place, a look whether its sources can be read.
fn copy_fresh(
    survey: &Survey,
    open: &OpenFiles,
    staged: &[Staged<'_>],
    watch: &Watch,
    outcome: &mut Outcome,
) -> Result<()> {
    staged.iter().for_each(|s| watch.expect(s.merge.bytes_written));
    for stage in staged {
        if stage.in_place() {
            verify_sources(survey, open, stage)?;
        } else {
            copy_stage(survey, open, stage, watch, outcome)?;
        }
    }
    Ok(())
}

/// Decompresses every compressed cluster that a stage reads.
fn verify_sources(survey: &Survey, open: &OpenFiles, stage: &Staged<'_>) -> Result<()> {
    if stage.steps.is_empty() {
        return Ok(());
    }
    let chain = open.chain(&chain_of(survey, stage.merge)?)?;
    let wrap = |e| Error::image(path_of(survey, stage.merge.reader), e);
    stage.steps.par_iter().try_for_each_init(Vec::new, |buf: &mut Vec<u8>, step| {
        for piece in chain.pieces(step.guest, step.len).map_err(wrap)? {
            if matches!(piece.kind, PieceKind::Compressed { .. }) {
                buf.resize(usize::try_from(piece.len).unwrap_or(0), 0);
                chain.read_at(piece.guest, buf).map_err(wrap)?;
            }
        }
        Ok(())
    })
}

fn intent_of(disk: &dyn Disk, survey: &Survey, plan: &DeletePlan) -> Result<Intent> {
    let image = |index: usize| -> Result<JournalImage> {
        let file = survey.files.get(index).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file"))?;
        let dir = directory_of(&file.path);
        let real = disk.canonical(&dir).map_err(|e| Error::io("find the directory", &dir, e))?;
        let path = real.join(file.path.file_name().unwrap_or_default());
        Ok(JournalImage { path, inode: file.stat.id.inode, born: file.stat.born })
    };
    let images = |indexes: &mut dyn Iterator<Item = usize>| indexes.map(image).collect::<Result<Vec<_>>>();
    let directories = directories(disk, survey);
    let Some((victim, merges, naming)) = &plan.single else {
        return Ok(Intent::Remove { files: images(&mut plan.removes.iter().copied())?, directories });
    };
    if let Naming::Stay(request) = naming {
        let new = |onto: &Onto| -> Result<NewBacking> {
            let dir = directory_of(&onto.path);
            let real = disk.canonical(&dir).map_err(|e| Error::io("find the directory", &dir, e))?;
            Ok(NewBacking {
                path: real.join(onto.path.file_name().unwrap_or_default()),
                file: onto.file.map(image).transpose()?,
                format: onto.format.name().to_owned(),
                absolute: onto.absolute,
            })
        };
        return Ok(Intent::Rebase {
            image: image(*victim)?,
            onto: request.onto.as_ref().map(new).transpose()?,
            unchecked: request.unchecked,
            directories,
        });
    }
    let committed =
        merges.iter().find(|m| m.direction == Direction::Commit).map(|m| image(m.reader)).transpose()?;
    let told = |followers: &[Rebase]| images(&mut followers.iter().map(|f| f.file));
    let (renamed, followers) = match naming {
        Naming::TakeVictimsName { reader, followers } | Naming::KeepVictimsName { reader, followers } => {
            (Some(image(*reader)?), told(followers)?)
        }
        Naming::TakeNewName { followers, .. } => (None, told(followers)?),
        _ => (None, Vec::new()),
    };
    let name = match naming {
        Naming::TakeNewName { name, .. } => {
            let dir = directory_of(name);
            let real = disk.canonical(&dir).map_err(|e| Error::io("find the directory", &dir, e))?;
            Some(NewName { path: real.join(name.file_name().unwrap_or_default()) })
        }
        _ => None,
    };
    Ok(Intent::Merge {
        victim: image(*victim)?,
        dependents: images(&mut merges.iter().map(|m| m.reader))?,
        between: images(&mut plan.between.iter().copied())?,
        committed,
        renamed,
        followers,
        name,
        emptied: matches!(naming, Naming::Empty { .. }),
        directories,
    })
}

fn stage_all<'a>(survey: &Survey, plan: &'a DeletePlan, open: &OpenFiles) -> Result<Vec<Staged<'a>>> {
    let stage = |merge: &'a Merge| {
        let path = path_of(survey, merge.target);
        match &merge.work {
            Work::Raw { size, pieces } => stage_raw(merge, *size, pieces, open, path),
            Work::Clusters { shape, needs } => image_of(open, merge, path).and_then(|image| {
                stage_clusters(merge, *shape, needs, image).map_err(|e| Error::image(path, e))
            }),
            Work::States { cluster_bits, fills } => image_of(open, merge, path).and_then(|image| {
                stage_states(merge, *cluster_bits, fills, image).map_err(|e| Error::image(path, e))
            }),
        }
    };
    plan.merges().iter().map(stage).collect()
}

fn image_of<'o>(open: &'o OpenFiles, merge: &Merge, path: &Path) -> Result<&'o Image> {
    open.layer(merge.target)
        .image()
        .ok_or_else(|| Error::new(ErrorKind::Failed, "not a qcow2 image").at(path))
}

/// Gives each cluster to all states that lack it.
fn stage_states<'a>(
    merge: &'a Merge,
    cluster_bits: u32,
    fills: &[StateFill],
    image: &Image,
) -> Result<Staged<'a>, ImageError> {
    let g = image.geometry();
    let mut allocator = Allocator::load(&**image.store(), Place::of(image.header()))?;
    let mut editor = StatesEditor::new(image)?;
    let (mut steps, mut zeros) = (Vec::new(), Vec::new());
    for fill in fills {
        let cluster = GuestCluster(fill.cluster);
        if !fill.data {
            editor.fill(&mut allocator, cluster, &fill.states, None)?;
            continue;
        }
        let (guest, host) = (fill.cluster << cluster_bits, g.host_offset(allocator.allocate()?));
        editor.fill(&mut allocator, cluster, &fill.states, Some(host))?;
        let len = fill.end - guest;
        push(&mut steps, Step { guest, len, host: host.0 });
        if len < g.cluster_size() {
            zeros.push(Step { guest: fill.end, len: g.cluster_size() - len, host: host.0 + len });
        }
    }
    let end = allocator.end().0 * g.cluster_size();
    let old_len = image.file_len();
    let mut reserve: Vec<_> =
        steps.iter().map(|s| s.host..s.host + s.len).filter(|r| r.end <= old_len).collect();
    reserve.push(old_len..end.max(old_len));
    let steps = steps.into_iter().flat_map(cut).collect();
    Ok(Staged { merge, steps, zeros, clusters: Some((allocator, editor.finish())), reserve, old_len })
}

fn stage_raw<'a>(
    merge: &'a Merge,
    size: u64,
    pieces: &[(std::ops::Range<u64>, Say)],
    open: &OpenFiles,
    path: &Path,
) -> Result<Staged<'a>> {
    let mut staged = Staged {
        merge,
        steps: Vec::new(),
        zeros: Vec::new(),
        clusters: None,
        reserve: Vec::new(),
        old_len: open
            .layer(merge.target)
            .store()
            .len()
            .map_err(|e| Error::io("find the length of", path, e))?,
    };
    for (range, say) in pieces {
        let step = Step { guest: range.start, len: range.end - range.start, host: range.start };
        match say {
            Say::Data => {
                staged.steps.extend(cut(step));
                staged.reserve.push(range.clone());
            }
            Say::Zero => staged.zeros.push(step),
        }
    }
    staged.reserve.retain(|r| r.end <= size);
    Ok(staged)
}

/// Gives every cluster that is filled a host cluster, and changes the tables in memory.
fn stage_clusters<'a>(
    merge: &'a Merge,
    shape: Target,
    needs: &[Need],
    image: &Image,
) -> Result<Staged<'a>, ImageError> {
    let g = image.geometry();
    let store = &**image.store();
    let old_len = image.file_len();
    let mut allocator = Allocator::load(store, Place::of(image.header()))?;
    let mut editor = TableEditor::new(image);
    editor.extend_to(shape.size);
    let mut steps: Vec<Step> = Vec::new();
    for need in needs {
        for cluster in need.clusters.clone().map(GuestCluster) {
            let guest = g.guest_offset(cluster).0;
            match need.how {
                How::Skip => {}
                How::Zero => editor.set(&mut allocator, cluster, L2Entry::ZERO)?,
                How::Unmap => editor.set(&mut allocator, cluster, L2Entry::default())?,
                How::Fill => {
                    let host = g.host_offset(allocator.allocate()?);
                    editor.set(&mut allocator, cluster, L2Entry::owned(host))?;
                    push(&mut steps, Step { guest, len: g.cluster_size(), host: host.0 });
                }
                How::Patch => {
                    let host = own_cluster(image, &mut allocator, editor.mapping(cluster)?)?;
                    for piece in &need.pieces {
                        let at = host.0 + (piece.start - guest);
                        push(&mut steps, Step { guest: piece.start, len: piece.end - piece.start, host: at });
                    }
                }
            }
        }
    }
    let size = (shape.size != image.size()).then_some(shape.size);
    let switch = editor.finish(&mut allocator, size)?;
    let end = allocator.end().0 * g.cluster_size();
    // Space behind the end in one go; free clusters before it where the data go.
    let mut reserve: Vec<_> =
        steps.iter().map(|s| s.host..s.host + s.len).filter(|r| r.end <= old_len).collect();
    reserve.push(old_len..end.max(old_len));
    let steps = steps.into_iter().flat_map(cut).collect();
    Ok(Staged { merge, steps, zeros: Vec::new(), clusters: Some((allocator, switch)), reserve, old_len })
}

/// The host cluster of a mapping that may be overwritten where it is: its stored count is 1.
fn own_cluster(image: &Image, allocator: &mut Allocator, mapping: Mapping) -> Result<HostOffset, ImageError> {
    let Mapping::Data(host) = mapping else {
        return Err(ImageError::Changed { what: "a data cluster is gone" });
    };
    let cluster = image.geometry().host_cluster(host);
    match allocator.count(cluster) {
        1 => Ok(host),
        stored => Err(ImageError::Refcount { cluster: cluster.0, stored, references: 1 }),
    }
}

fn push(steps: &mut Vec<Step>, step: Step) {
    match steps.last_mut() {
        Some(last) if last.guest + last.len == step.guest && last.host + last.len == step.host => {
            last.len += step.len;
        }
        _ => steps.push(step),
    }
}

/// A step in pieces that one worker copies at a time.
fn cut(step: Step) -> impl Iterator<Item = Step> {
    (0..step.len.div_ceil(STEP)).map(move |i| {
        let done = i * STEP;
        Step { guest: step.guest + done, len: (step.len - done).min(STEP), host: step.host + done }
    })
}

/// Makes sure of the space for everything before anything else changes.
fn reserve_all(survey: &Survey, open: &OpenFiles, staged: &[Staged<'_>]) -> Result<()> {
    for stage in staged {
        let store = open.layer(stage.merge.target).store();
        for range in &stage.reserve {
            if let Err(e) = store.reserve(range.clone()) {
                return Err(Error::io("reserve space in", path_of(survey, stage.merge.target), e));
            }
        }
    }
    Ok(())
}

/// Takes back what reserving and copying have added to the files.
fn shorten(open: &OpenFiles, staged: &[Staged<'_>]) {
    for stage in staged {
        let target = open.layer(stage.merge.target).store();
        if target.len().is_ok_and(|len| len > stage.old_len) {
            // Best effort: a longer file is harmless, its end is unused.
            let _ = target.set_len(stage.old_len);
        }
    }
}

fn path_of(survey: &Survey, index: usize) -> &Path {
    survey.files.get(index).map_or(Path::new(""), |f| &f.path)
}

/// The data of one merge, to where they belong.
fn copy_stage(
    survey: &Survey,
    open: &OpenFiles,
    stage: &Staged<'_>,
    watch: &Watch,
    outcome: &mut Outcome,
) -> Result<()> {
    let path = path_of(survey, stage.merge.target);
    let target = &**open.layer(stage.merge.target).store();
    if !stage.steps.is_empty() {
        let chain = open.chain(&chain_of(survey, stage.merge)?)?;
        let smallest = match &stage.merge.work {
            Work::Clusters { shape, .. } => 1 << shape.cluster_bits,
            Work::States { .. } | Work::Raw { .. } => 0,
        };
        let align = target.clones_at().filter(|&align| align <= smallest);
        outcome.bytes_cloned += copy(&chain, target, align, &stage.steps, watch).map_err(|e| match e {
            Some(e) => Error::image(path, e),
            None => stopped(),
        })?;
    }
    for zero in &stage.zeros {
        let range = zero.host..zero.host + zero.len;
        target.discard(range).map_err(|e| Error::io("write zeros to", path, e))?;
    }
    let tails = if stage.clusters.is_some() { stage.zeros.as_slice() } else { &[] };
    outcome.bytes_written += stage.steps.iter().chain(tails).map(|s| s.len).sum::<u64>();
    Ok(())
}

/// One merge whose data are written: barrier and tables, root; for a pull then the backing file, for a commit then the
/// lowered counts.
fn merge(survey: &Survey, open: &OpenFiles, staged: Staged<'_>, journal: &mut Journal<'_>) -> Result<()> {
    let path = path_of(survey, staged.merge.target);
    let target = &**open.layer(staged.merge.target).store();
    let wrap = |e| Error::image(path, e);
    match staged.clusters {
        Some((mut allocator, switch)) => {
            publish(target, &mut allocator, &switch).map_err(wrap)?;
            if staged.merge.direction == Direction::Pull || staged.merge.backing.is_some() {
                switch_backing(target, path, staged.merge.backing.as_ref(), journal)?;
            }
            release(target, &mut allocator, &switch.drops).map_err(wrap)
        }
        None => {
            let io = |what: &'static str| move |e| Error::io(what, path, e);
            if let Work::Raw { size, .. } = staged.merge.work {
                target.set_len(size).map_err(io("set the length of"))?;
            }
            target.barrier().map_err(io("flush"))
        }
    }
}

/// The files that the merge's result is read from, top first: reader, victim, and what lies below.
fn chain_of(survey: &Survey, merge: &Merge) -> Result<Vec<usize>> {
    let chain = survey.chain(merge.reader)?;
    // What the states of an image lack is read below it: they share what is copied.
    let from = usize::from(matches!(merge.work, Work::States { .. }));
    Ok(chain.get(from..).unwrap_or(&[]).to_vec())
}

/// Copies in parallel; the steps are disjoint, so their order is free. Returns how many bytes were shared.
///
/// The error is `None` if the watch said to stop.
fn copy(
    chain: &Chain,
    target: &dyn Store,
    align: Option<u64>,
    steps: &[Step],
    watch: &Watch,
) -> Result<u64, Option<ImageError>> {
    steps
        .par_iter()
        .map_init(Vec::new, |buf, step| {
            if watch.should_stop() {
                return Err(None);
            }
            let cloned = match align {
                Some(align) => clone_step(chain, target, step, align, buf)?,
                None => {
                    copy_bytes(chain, target, *step, buf)?;
                    0
                }
            };
            watch.advance(step.len);
            Ok(cloned)
        })
        .try_reduce(|| 0, |a, b| Ok(a + b))
}

fn copy_bytes(chain: &Chain, target: &dyn Store, step: Step, buf: &mut Vec<u8>) -> Result<(), ImageError> {
    let len = usize::try_from(step.len).unwrap_or(usize::MAX);
    if buf.len() < len {
        buf.resize(len, 0);
    }
    let bytes = buf.get_mut(..len).expect("just resized");
    chain.read_at(step.guest, bytes)?;
    target.write_at(step.host, bytes).map_err(|source| ImageError::Io { what: "write guest data", source })
}

/// Copies a step by sharing the extents of plain data where they are aligned, and by copying the rest.
fn clone_step(
    chain: &Chain,
    target: &dyn Store,
    step: &Step,
    align: u64,
    buf: &mut Vec<u8>,
) -> Result<u64, ImageError> {
    let mut cloned = 0;
    for piece in chain.pieces(step.guest, step.len)? {
        let to = step.host + (piece.guest - step.guest);
        let part = Step { guest: piece.guest, len: piece.len, host: to };
        if let Some((layer, host)) = shareable(piece.kind, piece.len, to, align)
            && let Some(source) = chain.layers().get(layer)
        {
            let io = |source| ImageError::Io { what: "share guest data", source };
            if target.copy_from(&**source.data_store(), host, to, piece.len).map_err(io)? {
                cloned += piece.len;
                continue;
            }
        }
        copy_bytes(chain, target, part, buf)?;
    }
    Ok(cloned)
}

fn shareable(kind: PieceKind, len: u64, to: u64, align: u64) -> Option<(usize, u64)> {
    match kind {
        PieceKind::Data { layer, host } if [host, to, len].iter().all(|v| v.is_multiple_of(align)) => {
            Some((layer, host))
        }
        _ => None,
    }
}

/// How many bytes of a plan the target's file system will share instead of writing.
///
/// # Errors
/// Damage in the tables that are met.
pub(crate) fn clonable(
    target: &dyn Store,
    chain: &Chain,
    shape: Target,
    needs: &[Need],
) -> Result<u64, ImageError> {
    let Some(align) = target.clones_at().filter(|&align| align <= 1 << shape.cluster_bits) else {
        return Ok(0);
    };
    let mut sum = 0;
    let mut add = |range: std::ops::Range<u64>| -> Result<(), ImageError> {
        for piece in chain.pieces(range.start, range.end - range.start)? {
            // Targets are whole clusters, or offsets that agree with the guest's within a cluster.
            if shareable(piece.kind, piece.len, piece.guest, align).is_some() {
                sum += piece.len;
            }
        }
        Ok(())
    };
    for need in needs {
        match need.how {
            How::Fill => {
                add(need.clusters.start << shape.cluster_bits..need.clusters.end << shape.cluster_bits)?;
            }
            How::Patch => need.pieces.iter().cloned().try_for_each(&mut add)?,
            How::Zero | How::Unmap | How::Skip => {}
        }
    }
    Ok(sum)
}

/// Puts another backing file into a header, with a record in the journal if one write cannot do it.
///
/// # Errors
/// What the system says, or a name that does not fit.
pub(crate) fn switch_backing(
    store: &dyn Store,
    path: &Path,
    backing: Option<&BackingFile>,
    journal: &mut Journal<'_>,
) -> Result<()> {
    let wrap = |e: Wrapped| match e {
        Wrapped::Image(e) => Error::image(path, e),
        Wrapped::Journal(e) => *e,
    };
    let inode = store.stat().map_err(|e| Error::io("look at", path, e))?.id.inode;
    set_backing(store, backing, |old, new| {
        journal.header(inode, old, new).map_err(|e| Wrapped::Journal(Box::new(e)))
    })
    .map_err(wrap)
}

enum Wrapped {
    Image(ImageError),
    Journal(Box<Error>),
}

impl From<ImageError> for Wrapped {
    fn from(e: ImageError) -> Self {
        Self::Image(e)
    }
}

/// The names, once all data are where they belong. At every instant each name that something reads leads to a file
/// with the right content.
///
/// ```text
/// TakeReadersName   rename victim over reader                           (one step)
/// TakeVictimsName   no followers: rename reader over victim             (one step)
///                   else: reader gets the victim's name as a second one; followers name it; its first name goes
/// KeepVictimsName   followers name the victim's file; the reader's file goes
/// TakeNewName       the file gets the new name as a second one; followers name it; its first name and the others go
/// Empty             the reader names the victim's file, and gives up what it holds
/// Unlink            the victim's file goes
/// ```
/// Files between the two go when nobody reads them any more, top first, each after its reader: before a victim that is
/// unlinked or replaced, after everything else.
fn rename_all(
    disk: &dyn Disk,
    survey: &Survey,
    plan: &DeletePlan,
    open: &OpenFiles,
    victim: usize,
    naming: &Naming,
    journal: &mut Journal<'_>,
) -> Result<Outcome> {
    let freed = |index: usize| survey.files.get(index).map_or(0, freed_by);
    let victim_path = path_of(survey, victim);
    let id = |index: usize| survey.files.get(index).map(|f| f.stat.id);
    let victim_id = id(victim).unwrap_or(FileId { device: 0, inode: 0 });
    let known = |reader: usize, followers: &[Rebase]| -> Vec<FileId> {
        let told = followers.iter().map(|f| f.file);
        [reader].into_iter().chain(told).chain(plan.between.iter().copied()).filter_map(id).collect()
    };
    let between = || plan.between.iter().map(|&i| unlink(disk, survey, i)).sum::<Result<u64>>();
    let bytes_freed = match naming {
        Naming::Stay(_) => 0,
        Naming::Unlink => between()? + unlink(disk, survey, victim)?,
        Naming::TakeReadersName { reader } => {
            nobody_reads(disk, &survey.directories, victim_id, &known(*reader, &[]))?;
            let bytes = freed(*reader);
            replace(disk, victim_path, path_of(survey, *reader))?;
            bytes + between()?
        }
        Naming::TakeVictimsName { reader, followers } => {
            let gone = between()?;
            nobody_reads(disk, &survey.directories, victim_id, &known(*reader, followers))?;
            let bytes = freed(victim);
            take_name(disk, survey, *reader, victim_path, followers, journal)?;
            gone + bytes
        }
        Naming::KeepVictimsName { reader, followers } => {
            let bytes = freed(*reader);
            rebase_followers(disk, survey, followers, journal)?;
            unlink(disk, survey, *reader)?;
            bytes + between()?
        }
        Naming::TakeNewName { reader, holder, name, followers } => {
            let path = path_of(survey, *holder);
            if *holder == victim {
                nobody_reads(disk, &survey.directories, victim_id, &known(*reader, followers))?;
                disk.copy_attributes(path_of(survey, *reader), path)
                    .map_err(|e| Error::io("set the mode of", path, e))?;
            }
            give_name(disk, path, name)?;
            rebase_followers(disk, survey, followers, journal)?;
            if *holder == victim {
                let gone = unlink(disk, survey, *reader)? + between()?;
                drop_first_name(disk, &survey.directories, path)?;
                gone
            } else {
                drop_first_name(disk, &survey.directories, path)?;
                between()? + unlink(disk, survey, victim)?
            }
        }
        Naming::Empty { reader, backing, .. } => {
            let path = path_of(survey, *reader);
            let store = &**open.layer(*reader).store();
            clear_unknown_autoclear(store).map_err(|e| Error::image(path, e))?;
            if backing.is_some() {
                switch_backing(store, path, backing.as_ref(), journal)?;
            }
            let image = open.layer(*reader).image();
            let image = image.ok_or_else(|| Error::new(ErrorKind::Failed, "not a qcow2 image").at(path))?;
            let emptying = Emptying::of(image, &Threads).map_err(|e| Error::image(path, e))?;
            emptying.run(&Threads).map_err(|e| Error::image(path, e))?;
            emptying.bytes() + between()?
        }
    };
    Ok(Outcome { bytes_freed, ..Outcome::default() })
}

/// The file at `path` gets a second name, which no other file has.
pub(crate) fn give_name(disk: &dyn Disk, path: &Path, name: &Path) -> Result<()> {
    link(disk, path, name)?;
    let dir = directory_of(name);
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))
}

/// `from` takes the name `to`, with the mode and owner that the file there had.
fn replace(disk: &dyn Disk, from: &Path, to: &Path) -> Result<()> {
    disk.copy_attributes(to, from).map_err(|e| Error::io("set the mode of", from, e))?;
    disk.rename(from, to).map_err(|e| Error::io("rename", from, e))?;
    for dir in [directory_of(to), directory_of(from)] {
        disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))?;
    }
    Ok(())
}

fn take_name(
    disk: &dyn Disk,
    survey: &Survey,
    reader: usize,
    name: &Path,
    followers: &[Rebase],
    journal: &mut Journal<'_>,
) -> Result<()> {
    let path = path_of(survey, reader);
    if followers.is_empty() {
        return replace(disk, path, name);
    }
    let second = &second_name(name);
    drop_second_name(disk, survey, reader, second)?;
    link(disk, path, second)?;
    replace(disk, second, name)?;
    rebase_followers(disk, survey, followers, journal)?;
    drop_first_name(disk, &survey.directories, path)
}

/// The name that a file has for an instant before it takes `name`.
pub(crate) fn second_name(name: &Path) -> PathBuf {
    let mut second = name.as_os_str().to_owned();
    second.push(".pleach-new");
    PathBuf::from(second)
}

/// Removes the first name of a file that has its second one already, after a last look whether any image still names it.
pub(crate) fn drop_first_name(disk: &dyn Disk, directories: &[PathBuf], path: &Path) -> Result<()> {
    let real =
        |p: &Path| disk.canonical(&directory_of(p)).ok().map(|d| d.join(p.file_name().unwrap_or_default()));
    let trust = Trust { everything: true, ..Trust::default() };
    let now = Survey::of_directories(disk, directories, &trust)?;
    for file in &now.files {
        let Some(backing) = file.header.as_ref().and_then(|h| h.backing()) else { continue };
        if backing_path(&file.path, &backing.name).is_ok_and(|p| real(&p) == real(path)) {
            let text = format!("the file is still read by \"{}\" under this name", file.path.display());
            return Err(Error::new(ErrorKind::Refused, text).at(path));
        }
    }
    disk.unlink(path).map_err(|e| Error::io("remove", path, e))?;
    let dir = directory_of(path);
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))
}

fn rebase_followers(
    disk: &dyn Disk,
    survey: &Survey,
    followers: &[Rebase],
    journal: &mut Journal<'_>,
) -> Result<()> {
    for follower in followers {
        let path = path_of(survey, follower.file);
        let store = disk.open(path, Access::Write).map_err(|e| Error::io("open the image", path, e))?;
        switch_backing(&*store, path, follower.backing.as_ref(), journal)?;
    }
    Ok(())
}
