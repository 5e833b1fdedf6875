//! Carrying out a deletion: copies in parallel, then one switch an image, then the names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pleach_alloc::{Allocator, Place};
use pleach_format::{BackingFile, Geometry, GuestCluster, HostCluster, L2Entry};
use pleach_image::{
    Chain, Emptying, Image, ImageError, Packing, PartChange, Piece, PieceKind, StatesEditor, Switch,
    TableEditor, backing_path, clear_unknown_autoclear, publish, release, set_backing,
};
use pleach_lineage::Reach;
use pleach_plan::{How, Need, Say, Target};
use pleach_store::{Access, Disk, FileId, Store};
use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::carry::Carried;
use crate::delete::{
    DeletePlan, Direction, Forecast, Length, Merge, Naming, Prepared, Rebase, StateFill, Work, directories,
    freed_by, still_read,
};
use crate::journal::{Intent, Journal, JournalImage, NewBacking, NewName, directory_of};
use crate::open::OpenFiles;
use crate::rebase::Onto;
use crate::survey::{Survey, SurveyFile, Trust};
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
    /// Compressed clusters that are taken over: where the guest has them, and how many bytes they are there.
    packed: Vec<Step>,
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
    let mut staged = stage_all(survey, plan, open)?;
    for stage in &staged {
        verify_sources(survey, open, stage)?;
    }
    forecast(survey, plan, open, &mut staged)
}

/// How long the target's file is once its bitmaps are as they should be: they are stored after everything else.
fn with_bitmaps(stage: &mut Staged<'_>, image: &Image) -> Result<u64, ImageError> {
    let (g, change) = (image.geometry(), &stage.merge.bitmaps);
    let Some((allocator, switch)) = &mut stage.clusters else { return Ok(0) };
    allocator.free_abandoned_tables()?;
    switch.drops.iter().try_for_each(|&cluster| allocator.lower(cluster))?;
    allocator.reuse();
    allocator.search_from(HostCluster(0));
    let changes =
        |name: &[u8]| change.gone.iter().any(|n| n == name) || change.put.iter().any(|b| b.name == name);
    let kept = image.bitmaps()?.into_iter().filter(|record| !changes(&record.name));
    let mut directory: u64 = kept.map(|record| record.stored_bytes() as u64).sum();
    for bitmap in &change.put {
        bitmap.allocate(g, allocator)?;
        directory += bitmap.directory_bytes();
    }
    if directory > 0 {
        allocator.allocate_contiguous(g.clusters_for(directory).0)?;
    }
    Ok(allocator.end().0 * g.cluster_size())
}

/// What a plan reads, and how long files become. Nothing is read but tables.
///
/// # Errors
/// As [`rehearse`].
pub(crate) fn foresee(survey: &Survey, plan: &DeletePlan, open: &OpenFiles) -> Result<Forecast> {
    forecast(survey, plan, open, &mut stage_all(survey, plan, open)?)
}

fn forecast(
    survey: &Survey,
    plan: &DeletePlan,
    open: &OpenFiles,
    staged: &mut [Staged<'_>],
) -> Result<Forecast> {
    let mut reads: BTreeMap<usize, u64> = BTreeMap::new();
    let mut lengths = Vec::new();
    for stage in &mut *staged {
        let after = stage.new_len();
        let after = match open.layer(stage.merge.target).image() {
            Some(image) if !stage.merge.bitmaps.is_empty() => {
                let path = path_of(survey, stage.merge.target);
                after.max(with_bitmaps(stage, image).map_err(|e| Error::image(path, e))?)
            }
            _ => after,
        };
        lengths.push(Length { file: stage.merge.target, before: stage.old_len, after });
        if stage.steps.is_empty() && stage.packed.is_empty() {
            continue;
        }
        let files = chain_of(survey, stage.merge)?;
        let chain = open.chain(&files)?;
        for step in &stage.packed {
            let pieces = chain.pieces(step.guest, 1);
            let pieces = pieces.map_err(|e| Error::image(path_of(survey, stage.merge.reader), e))?;
            if let Some(PieceKind::Compressed { layer }) = pieces.first().map(|piece| piece.kind)
                && let Some(&file) = files.get(layer)
            {
                *reads.entry(file).or_default() += step.len;
            }
        }
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
    unlink_all(disk, survey, &[index])
}

/// Removes the names of files, each of which may be read by those before it and by nothing else: so says one last look
/// before the first of them goes. All are locked. Returns the bytes as [`unlink`] does.
fn unlink_all(disk: &dyn Disk, survey: &Survey, indexes: &[usize]) -> Result<u64> {
    let there = |file: &&SurveyFile| disk.stat(&file.path).is_ok_and(|stat| stat.id == file.stat.id);
    let files: Vec<&SurveyFile> = indexes.iter().filter_map(|&i| survey.files.get(i)).filter(there).collect();
    if files.is_empty() {
        return Ok(0);
    }
    let (look, mut known) = (LastLook::at(disk, &survey.directories)?, Vec::new());
    for file in &files {
        look.nobody_reads(file.stat.id, &known)?;
        known.push(file.stat.id);
    }
    let mut freed = 0;
    for file in files {
        freed += freed_by(file);
        disk.unlink(&file.path).map_err(|e| Error::io("remove", &file.path, e))?;
        let dir = directory_of(&file.path);
        disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))?;
    }
    Ok(freed)
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
    LastLook::at(disk, directories)?.nobody_reads(file, known)
}

/// What all images of some directories read.
struct LastLook {
    now: Survey,
}

impl LastLook {
    fn at(disk: &dyn Disk, directories: &[PathBuf]) -> Result<Self> {
        let trust = Trust { everything: true, ..Trust::default() };
        Ok(Self { now: Survey::of_directories(disk, directories, &trust)? })
    }

    fn nobody_reads(&self, file: FileId, known: &[FileId]) -> Result<()> {
        let now = &self.now;
        let Some(entry) = now.find_id(file).and_then(|i| now.files.get(i)) else { return Ok(()) };
        let readers = now.files.iter().map(|f| f.stat.id).chain(now.broken.iter().map(|b| b.id));
        let others = readers.filter(|id| !known.contains(id) && *id != file);
        let needed_by: Vec<FileId> = Reach::of(others, &now.reads())
            .needed_by(&file)
            .into_iter()
            .filter(|id| !known.contains(id))
            .collect();
        if needed_by.is_empty() { Ok(()) } else { Err(still_read(now, entry, &needed_by)) }
    }
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
        bitmaps: plan.bitmaps,
        directories,
    })
}

fn stage_all<'a>(survey: &Survey, plan: &'a DeletePlan, open: &OpenFiles) -> Result<Vec<Staged<'a>>> {
    let stage = |merge: &'a Merge| {
        let path = path_of(survey, merge.target);
        match &merge.work {
            Work::Raw { size, pieces } => stage_raw(merge, *size, pieces, open, path),
            Work::Clusters { shape, needs, carried } => image_of(open, merge, path).and_then(|image| {
                stage_clusters(merge, (*shape, needs, carried), image).map_err(|e| Error::image(path, e))
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
    let clusters = Some((allocator, editor.finish()));
    Ok(Staged { merge, steps, packed: Vec::new(), zeros, clusters, reserve, old_len })
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
        packed: Vec::new(),
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
    (shape, needs, carried): (Target, &[Need], &Carried),
    image: &Image,
) -> Result<Staged<'a>, ImageError> {
    let g = image.geometry();
    let store = &**image.store();
    let old_len = image.file_len();
    let mut allocator = Allocator::load(store, Place::of(image.header()))?;
    let mut editor = TableEditor::new(image);
    editor.extend_to(shape.size);
    let (mut steps, mut packed, mut packing) = (Vec::new(), Vec::new(), Packing::default());
    for part in parts(shape, g, needs) {
        let Part { cluster, change, patched, data } = part;
        if let Some(&len) = carried.get(&cluster.0) {
            let at = packing.place(&mut allocator, g, len)?;
            let entry = L2Entry::compressed(g, at, len).ok_or_else(|| ImageError::Refused {
                what: format!(
                    "the file is too long for compressed clusters: {:#x} is out of their reach",
                    at.0
                ),
            })?;
            editor.set(&mut allocator, cluster, entry)?;
            packed.push(Step { guest: g.guest_offset(cluster).0, len, host: at.0 });
            continue;
        }
        let patched = patched.then(|| editor.place(&mut allocator, cluster)).transpose()?;
        let place = match change == PartChange::default() {
            true => patched,
            false => editor.change(&mut allocator, cluster, change)?,
        };
        let (guest, Some(host)) = (g.guest_offset(cluster).0, place) else { continue };
        for range in data {
            let at = host.0 + (range.start - guest);
            push(&mut steps, Step { guest: range.start, len: range.end - range.start, host: at });
        }
    }
    let size = (shape.size != image.size()).then_some(shape.size);
    let switch = editor.finish(&mut allocator, size)?;
    let end = allocator.end().0 * g.cluster_size();
    // Space behind the end in one go; free clusters before it where the data go.
    let places = steps.iter().chain(&packed).map(|s| s.host..s.host + s.len);
    let mut reserve: Vec<_> = places.filter(|r| r.end <= old_len).collect();
    reserve.push(old_len..end.max(old_len));
    let steps = steps.into_iter().flat_map(cut).collect();
    let clusters = Some((allocator, switch));
    Ok(Staged { merge, steps, packed, zeros: Vec::new(), clusters, reserve, old_len })
}

/// All that happens to one cluster of a file.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) cluster: GuestCluster,
    /// What its entry says differently.
    pub(crate) change: PartChange,
    /// Whether some of its data are overwritten where they are.
    patched: bool,
    /// Guest ranges that are written, in order.
    data: Vec<std::ops::Range<u64>>,
}

/// The clusters of the needs of a file whose clusters, or subclusters, are as `shape` says, in order.
pub(crate) fn parts(shape: Target, g: Geometry, needs: &[Need]) -> impl Iterator<Item = Part> {
    let bits = g.cluster_bits() - shape.cluster_bits;
    let mut units =
        needs.iter().flat_map(|need| need.clusters.clone().map(move |unit| (unit, need))).peekable();
    std::iter::from_fn(move || {
        let cluster = units.peek()?.0 >> bits;
        let (mut change, mut patched, mut data) = (PartChange::default(), false, Vec::new());
        while let Some((unit, need)) = units.next_if(|(unit, _)| unit >> bits == cluster) {
            let bit = 1 << (unit - (cluster << bits));
            match need.how {
                How::Skip => {}
                How::Zero => change.zero |= bit,
                How::Unmap => change.nothing |= bit,
                How::Fill => {
                    change.data |= bit;
                    data.push(unit << shape.cluster_bits..(unit + 1) << shape.cluster_bits);
                }
                How::Patch => {
                    patched = true;
                    data.extend(need.pieces.iter().cloned());
                }
            }
        }
        Some(Part { cluster: GuestCluster(cluster), change, patched, data })
    })
}

fn push(steps: &mut Vec<Step>, step: Step) {
    match steps.last_mut() {
        Some(last) if last.guest + last.len == step.guest && last.host + last.len == step.host => {
            last.len += step.len;
        }
        _ => steps.push(step),
    }
}

/// A step in pieces that one worker copies at a time, cut where the guest's offset is a multiple of their length.
fn cut(step: Step) -> impl Iterator<Item = Step> {
    let (mut at, end) = (step.guest, step.guest + step.len);
    std::iter::from_fn(move || {
        let next = (at + 1).next_multiple_of(STEP).min(end);
        let piece = Step { guest: at, len: next.checked_sub(at)?, host: step.host + (at - step.guest) };
        at = next;
        (piece.len > 0).then_some(piece)
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
    if !stage.steps.is_empty() || !stage.packed.is_empty() {
        let chain = open.chain(&chain_of(survey, stage.merge)?)?;
        copy_packed(&chain, target, &stage.packed, watch).map_err(|e| match e {
            Some(e) => Error::image(path, e),
            None => stopped(),
        })?;
        let align = match &stage.merge.work {
            Work::Clusters { .. } => open.layer(stage.merge.target).image().and_then(clones_at),
            Work::States { .. } | Work::Raw { .. } => None,
        };
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
    outcome.bytes_written += stage.steps.iter().chain(&stage.packed).chain(tails).map(|s| s.len).sum::<u64>();
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
            if let (false, Some(image)) =
                (staged.merge.bitmaps.is_empty(), open.layer(staged.merge.target).image())
            {
                // What is dropped is given back before another writer counts.
                release(target, &mut allocator, &switch.drops).map_err(wrap)?;
                staged.merge.bitmaps.apply(path, image)?;
                if staged.merge.direction == Direction::Pull || staged.merge.backing.is_some() {
                    switch_backing(target, path, staged.merge.backing.as_ref(), journal)?;
                }
                return Ok(());
            }
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
    // A compressed cluster is decompressed as often as it is read from.
    let clusters = chain.layers().iter().filter_map(|l| l.image()).map(|i| i.geometry().cluster_size());
    let block = clusters.max().map_or(BLOCK, |largest| largest.max(BLOCK));
    steps
        .par_iter()
        .map_init(Buffer::default, |buf, step| {
            if watch.should_stop() {
                return Err(None);
            }
            let cloned = match align {
                Some(align) => clone_step(chain, target, step, (align, block), buf)?,
                None => {
                    copy_bytes(chain, target, *step, block, buf)?;
                    0
                }
            };
            watch.advance(step.len);
            watch.hold_back(step.len - cloned);
            Ok(cloned)
        })
        .try_reduce(|| 0, |a, b| Ok(a + b))
}

/// Copies compressed clusters as they are. The error is as that of [`copy`].
fn copy_packed(
    chain: &Chain,
    target: &dyn Store,
    packed: &[Step],
    watch: &Watch,
) -> Result<(), Option<ImageError>> {
    packed.par_iter().try_for_each_init(Vec::new, |buf, step| {
        if watch.should_stop() {
            return Err(None);
        }
        buf.resize(usize::try_from(step.len).unwrap_or(0), 0);
        chain.read_packed_bytes(step.guest, buf)?;
        target
            .write_at(step.host, buf)
            .map_err(|source| ImageError::Io { what: "write guest data", source })?;
        watch.advance(step.len);
        watch.hold_back(step.len);
        Ok(())
    })
}

/// Bytes that are copied in one go, unless a cluster has more: what was read is still in the processor's cache when it is
/// written.
const BLOCK: u64 = 256 << 10;

fn copy_bytes(
    chain: &Chain,
    target: &dyn Store,
    step: Step,
    block: u64,
    buf: &mut Buffer,
) -> Result<(), ImageError> {
    for done in (0..step.len).step_by(usize::try_from(block).unwrap_or(usize::MAX)) {
        let bytes = buf.fresh(usize::try_from((step.len - done).min(block)).unwrap_or(0));
        chain.read_at(step.guest + done, bytes)?;
        target
            .write_at(step.host + done, bytes)
            .map_err(|source| ImageError::Io { what: "write guest data", source })?;
    }
    Ok(())
}

/// Copies a step by sharing what is aligned of the extents of plain data, and by copying the rest. Returns how many bytes
/// were shared.
fn clone_step(
    chain: &Chain,
    target: &dyn Store,
    step: &Step,
    (align, block): (u64, u64),
    buf: &mut Buffer,
) -> Result<u64, ImageError> {
    let mut cloned = 0;
    for piece in chain.pieces(step.guest, step.len)? {
        let (mut at, end) = (piece.guest, piece.guest + piece.len);
        let to = |guest: u64| step.host + (guest - step.guest);
        if let Some((layer, host, range)) = shareable(&piece, align)
            && let Some(source) = chain.layers().get(layer)
        {
            let io = |source| ImageError::Io { what: "share guest data", source };
            let len = range.end - range.start;
            if target.copy_from(&**source.data_store(), host, to(range.start), len).map_err(io)? {
                cloned += len;
                let head = Step { guest: at, len: range.start - at, host: to(at) };
                copy_bytes(chain, target, head, block, buf)?;
                at = range.end;
            }
        }
        copy_bytes(chain, target, Step { guest: at, len: end - at, host: to(at) }, block, buf)?;
    }
    Ok(cloned)
}

/// The part of a piece that can be shared in blocks of `align` bytes: its layer, where in that layer's file, and its guest
/// range. What lies in a target is as far into a block as it is for the guest.
fn shareable(piece: &Piece, align: u64) -> Option<(usize, u64, std::ops::Range<u64>)> {
    let PieceKind::Data { layer, host } = piece.kind else { return None };
    let (start, end) = (piece.guest.next_multiple_of(align), (piece.guest + piece.len) & !(align - 1));
    let from = host + (start - piece.guest);
    (start < end && from.is_multiple_of(align)).then_some((layer, from, start..end))
}

/// The blocks in which the file of an image shares space, if they are not larger than its clusters.
fn clones_at(image: &Image) -> Option<u64> {
    image.store().clones_at().filter(|&align| align <= image.geometry().cluster_size())
}

/// How many bytes of a plan the target's file system will share instead of writing.
///
/// # Errors
/// Damage in the tables that are met.
pub(crate) fn clonable(
    target: &Image,
    chain: &Chain,
    shape: Target,
    needs: &[Need],
) -> Result<u64, ImageError> {
    let Some(align) = clones_at(target) else { return Ok(0) };
    // What lies next to each other within a cluster is copied as one.
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for range in parts(shape, target.geometry(), needs).flat_map(|part| part.data) {
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }
    let mut sum = 0;
    for range in ranges {
        for piece in chain.pieces(range.start, range.end - range.start)? {
            sum += shareable(&piece, align).map_or(0, |(_, _, range)| range.end - range.start);
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
    let between = || unlink_all(disk, survey, &plan.between);
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
