//! Planning a deletion: which files go, which are merged in which direction, and what everything is called afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use pleach_format::{BackingFile, RunKind, RunList, Version};
use pleach_image::{Chain, Emptying, Image, ImageError, check, escape};
use pleach_lineage::{DeleteMode, Reach};
use pleach_plan::{
    Content, Cover, Found, How, Need, Overlay, Say, Target, candidates, commit, pull, rewrite_whole, settle,
};
use pleach_store::{Disk, FileId, Role};

use crate::bitmaps::{BitmapChange, BitmapPolicy, Recorded};
use crate::execute::{foresee, rehearse, second_name};
use crate::family::{Family, State};
use crate::files::Files;
use crate::journal::{directory_of, pending, unfinished};
use crate::names::{absolute, renamed};
use crate::open::OpenFiles;
use crate::rebase::RebaseRequest;
use crate::scan::{snapshot_covers, zero_clusters};
use crate::survey::{Backing, FileFormat, Survey, SurveyFile, broken};
use crate::workers::Threads;
use crate::{Error, ErrorKind, Result};

/// Which file name survives when two files become one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// The child's: nobody who uses the child has to be told.
    #[default]
    Child,
    /// The parent's, taken over by its only child, or by the named one.
    Parent(Option<String>),
    /// Whichever file the data are copied into.
    Auto,
    /// Neither: the result gets a name that no file has. Only for runs.
    Named(PathBuf),
    /// Both: the data go into the lowermost file, and the uppermost stays on it, empty. Only for runs.
    Both,
}

/// What should be deleted, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteRequest {
    /// The node.
    pub name: String,
    /// Only the node, or its descendants.
    pub mode: DeleteMode,
    /// Which name survives.
    pub keep: Keep,
    /// Deleting a root with all its descendants is meant.
    pub whole_tree: bool,
}

/// Where the data of a merge go.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into the overlay: what it lacks of its backing file.
    Pull,
    /// Into the backing file: what the overlay has.
    Commit,
}

/// What is written into the target of a merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Clusters of a qcow2 image.
    Clusters {
        /// The target as it will be.
        shape: Target,
        /// What changes in it.
        needs: Vec<Need>,
        /// Of the clusters that are filled, those that are taken over compressed as they are, each with the number of its
        /// compressed bytes.
        carried: BTreeMap<u64, u64>,
    },
    /// Clusters of a qcow2 image with internal snapshots, which lack them as its active state does.
    States {
        /// log2 of the target's cluster size.
        cluster_bits: u32,
        /// What is filled, in cluster order.
        fills: Vec<StateFill>,
    },
    /// Ranges of a raw file, which gets `size` bytes.
    Raw {
        /// Size afterwards.
        size: u64,
        /// Guest ranges, and what is in them.
        pieces: Vec<(Range<u64>, Say)>,
    },
}

/// One guest cluster that several states of an image get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFill {
    /// Guest cluster index.
    pub cluster: u64,
    /// Guest byte behind which the states' disks end, or the end of the cluster: from there on zeros are stored.
    pub end: u64,
    /// Whether it holds data; else the states get zeros.
    pub data: bool,
    /// The states: 0 is the active one, i + 1 is internal snapshot i.
    pub states: Vec<usize>,
}

/// Two neighbouring files become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The file that is written, by index into the survey.
    pub target: usize,
    /// The file whose content the result has.
    pub reader: usize,
    /// Where the data go.
    pub direction: Direction,
    /// What is written.
    pub work: Work,
    /// How the target's header names its backing file afterwards; for a commit only if that changes.
    pub backing: Option<BackingFile>,
    /// Guest bytes written as data.
    pub bytes_written: u64,
    /// Of these, bytes that the file system can share instead of writing.
    pub bytes_cloned: u64,
    /// How the target's bitmaps change.
    pub bitmaps: BitmapChange,
}

/// A header that names another backing file afterwards; the content stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebase {
    /// The file, by index into the survey.
    pub file: usize,
    /// Its backing file afterwards.
    pub backing: Option<BackingFile>,
}

/// What happens to names once the data are in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Naming {
    /// Nothing: an image gets another backing file.
    Stay(RebaseRequest),
    /// The victim's file goes.
    Unlink,
    /// The victim's file, holding the merged data, takes the reader's name.
    TakeReadersName {
        /// The reader, by index into the survey.
        reader: usize,
    },
    /// The reader's file, holding the merged data, takes the victim's name.
    TakeVictimsName {
        /// The reader.
        reader: usize,
        /// Who reads the reader, and must name it anew.
        followers: Vec<Rebase>,
    },
    /// The victim's file, holding the merged data, keeps its name; the reader's file goes.
    KeepVictimsName {
        /// The reader.
        reader: usize,
        /// Who reads the reader, and must name it anew.
        followers: Vec<Rebase>,
    },
    /// The file that holds the merged data takes a name that no file has; the other one goes.
    TakeNewName {
        /// The reader.
        reader: usize,
        /// The file that holds the data: the reader or the victim.
        holder: usize,
        /// The name.
        name: PathBuf,
        /// Who reads the reader, and must name it anew.
        followers: Vec<Rebase>,
    },
    /// The victim's file, holding the merged data, keeps its name; the reader stays on it, and holds nothing.
    Empty {
        /// The reader.
        reader: usize,
        /// How the reader's header names the victim afterwards, if it does not already.
        backing: Option<BackingFile>,
        /// Bytes of host clusters that the reader gives up.
        given_up: u64,
    },
}

/// Everything that a deletion will do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeletePlan {
    /// The node.
    pub node: String,
    /// Files that go without any copying, leaves first; indexes into the survey.
    pub removes: Vec<usize>,
    /// The merge of a single node: its file, and what is done.
    pub single: Option<(usize, Vec<Merge>, Naming)>,
    /// Files between the victim and its only reader, top first, which go too.
    pub between: Vec<usize>,
    /// Nodes that stay and get another parent, and that parent.
    pub reparented: Vec<(String, Option<String>)>,
    /// Bytes on disk of the files that go.
    pub bytes_freed: u64,
    /// What becomes of bitmaps.
    pub bitmaps: BitmapPolicy,
    /// What carrying it out reads, and how long files become: known when it was rehearsed, or [`Prepared::foresee`] was
    /// called.
    pub forecast: Forecast,
}

/// What carrying out a plan reads, and how long files become.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// Guest bytes of data that are read to be copied, for each file that has any; by index into the survey.
    pub reads: Vec<(usize, u64)>,
    /// The files that are written and stay.
    pub lengths: Vec<Length>,
}

/// How long a file becomes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Length {
    /// The file, by index into the survey.
    pub file: usize,
    /// Its length in bytes as it is.
    pub before: u64,
    /// Its length in bytes when all is done.
    pub after: u64,
}

impl DeletePlan {
    /// Guest bytes of data that are read to be copied.
    pub fn bytes_read(&self) -> u64 {
        self.forecast.reads.iter().map(|(_, bytes)| bytes).sum()
    }

    /// What the file is called when all is done.
    pub fn name_after<'a>(&'a self, survey: &'a Survey, file: usize) -> Option<&'a Path> {
        let path = survey.files.get(file).map(|f| f.path.as_path());
        let renamed = self.renames(survey).into_iter().find(|(from, _)| Some(*from) == path);
        renamed.map(|(_, to)| to).or(path)
    }

    /// Guest bytes that are written, in all merges.
    pub fn bytes_written(&self) -> u64 {
        self.merges().iter().map(|m| m.bytes_written).sum()
    }

    /// Of these, bytes that the file system can share.
    pub fn bytes_cloned(&self) -> u64 {
        self.merges().iter().map(|m| m.bytes_cloned).sum()
    }

    /// The merges, in the order in which they are carried out.
    pub fn merges(&self) -> &[Merge] {
        self.single.as_ref().map_or(&[], |(_, merges, _)| merges)
    }

    /// Names that change hands: from, to.
    pub fn renames<'a>(&'a self, survey: &'a Survey) -> Vec<(&'a Path, &'a Path)> {
        let Some((victim, _, naming)) = &self.single else { return Vec::new() };
        let path = |i: &usize| survey.files.get(*i).map(|f| f.path.as_path());
        let pair = match naming {
            Naming::TakeReadersName { reader } => (path(victim), path(reader)),
            Naming::TakeVictimsName { reader, .. } => (path(reader), path(victim)),
            Naming::TakeNewName { holder, name, .. } => (path(holder), Some(name.as_path())),
            _ => return Vec::new(),
        };
        pair.0.zip(pair.1).into_iter().collect()
    }

    /// Bytes on disk that are given back: of all files that do not hold the merged data afterwards.
    pub(crate) fn frees(&self, survey: &Survey) -> u64 {
        let one = self.single.as_ref().and_then(|(victim, _, naming)| match naming {
            Naming::Stay(_) | Naming::Empty { .. } => None,
            Naming::Unlink | Naming::TakeVictimsName { .. } => Some(victim),
            Naming::TakeReadersName { reader } | Naming::KeepVictimsName { reader, .. } => Some(reader),
            Naming::TakeNewName { reader, holder, .. } => {
                Some(if holder == victim { reader } else { victim })
            }
        });
        let given_up = match &self.single {
            Some((_, _, Naming::Empty { given_up, .. })) => *given_up,
            _ => 0,
        };
        let files = self.removes.iter().chain(&self.between).chain(one);
        files.filter_map(|&i| survey.files.get(i)).map(freed_by).sum::<u64>() + given_up
    }

    /// Names that are removed; those that change hands are in [`renames`](Self::renames).
    pub fn unlinks<'a>(&self, survey: &'a Survey) -> Vec<&'a Path> {
        let path = |i: &usize| survey.files.get(*i).map(|f| f.path.as_path());
        let mut gone: Vec<&Path> = self.removes.iter().filter_map(path).collect();
        if let Some((victim, _, naming)) = &self.single {
            gone.extend(self.between.iter().filter_map(path));
            gone.extend(match naming {
                Naming::Unlink => path(victim),
                Naming::KeepVictimsName { reader, .. } => path(reader),
                Naming::TakeNewName { reader, holder, .. } => {
                    path(if holder == victim { reader } else { victim })
                }
                Naming::Stay(_)
                | Naming::TakeReadersName { .. }
                | Naming::TakeVictimsName { .. }
                | Naming::Empty { .. } => None,
            });
        }
        gone
    }

    /// Headers that name another backing file afterwards.
    pub fn rebases(&self) -> Vec<Rebase> {
        let Some((_, merges, naming)) = &self.single else { return Vec::new() };
        let renamed = merges.iter().filter(|m| m.direction == Direction::Pull || m.backing.is_some());
        let mut all: Vec<Rebase> =
            renamed.map(|m| Rebase { file: m.target, backing: m.backing.clone() }).collect();
        match naming {
            Naming::TakeVictimsName { followers, .. }
            | Naming::KeepVictimsName { followers, .. }
            | Naming::TakeNewName { followers, .. } => all.extend(followers.clone()),
            Naming::Empty { reader, backing: Some(backing), .. } => {
                all.push(Rebase { file: *reader, backing: Some(backing.clone()) });
            }
            _ => {}
        }
        all
    }
}

/// What an interrupted deletion had decided already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Decided {
    /// The reader that is merged by copying into the victim's file.
    pub(crate) committed: Option<FileId>,
    /// The reader that takes the victim's name.
    pub(crate) renamed: Option<FileId>,
    /// Files that may name the victim's file because they were told so already.
    pub(crate) followers: BTreeSet<FileId>,
    /// Nothing is left to choose.
    pub(crate) fixed: bool,
    /// What becomes of bitmaps.
    pub(crate) bitmaps: BitmapPolicy,
}

/// A plan, and the open and locked files that it was made from.
#[derive(Debug)]
pub struct Prepared {
    /// The plan.
    pub plan: DeletePlan,
    /// The files.
    pub open: OpenFiles,
}

impl Prepared {
    /// Finds out what carrying out the plan reads, and how long files become, if that is not known yet.
    ///
    /// # Errors
    /// What would keep the plan from being carried out.
    pub fn foresee(&mut self, survey: &Survey) -> Result<()> {
        if self.plan.forecast == Forecast::default() {
            self.plan.forecast = foresee(survey, &self.plan, &self.open)?;
        }
        Ok(())
    }
}

/// Plans a deletion. With `change` the files are locked for changing, else only for reading.
///
/// # Errors
/// What keeps the deletion from being right, each by its name: see [`ErrorKind`].
pub fn prepare(
    disk: &dyn Disk,
    survey: &Survey,
    family: &Family,
    request: &DeleteRequest,
    change: bool,
) -> Result<Prepared> {
    refuse_journals(disk, survey)?;
    let node = family.resolve(survey, &request.name)?;
    let name = family.lineage.get(node).map(|n| n.name.clone()).unwrap_or_default();
    let deletion = family.lineage.plan_delete(node, request.mode)?;
    let named = |id| family.lineage.get(id).map(|n| n.name.clone()).unwrap_or_default();
    let reparented = deletion.reparented.iter().map(|&(id, parent)| (named(id), parent.map(named))).collect();
    let mut plan = DeletePlan { node: name.clone(), reparented, ..DeletePlan::default() };
    match request.mode {
        DeleteMode::Metadata => {
            return Err(Error::new(
                ErrorKind::NotFound,
                "these images have no catalog that could forget the node",
            )
            .hint("without --metadata the node's data are deleted too"));
        }
        DeleteMode::Single => {}
        DeleteMode::Children if family.lineage.parent(node).is_none() && !request.whole_tree => {
            return Err(Error::new(
                ErrorKind::NotConfirmed,
                format!("\"{name}\" is a root: deleting it with its descendants deletes the whole tree"),
            )
            .hint("say --yes-everything if that is meant"));
        }
        DeleteMode::Children | DeleteMode::ChildrenOnly => {
            plan.removes = files_of(survey, family, &deletion.removed)?;
            let roles = plan.removes.iter().map(|&i| (i, role(change))).collect();
            let open = OpenFiles::open(disk, survey, &roles)?;
            plan.bytes_freed = plan.frees(survey);
            return Ok(Prepared { plan, open });
        }
    }
    let victim = match family.state(node) {
        Some(State::File(index)) => index,
        _ => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("\"{name}\" is an internal snapshot; deleting those is not supported"),
            )
            .hint("qemu-img snapshot -d deletes an internal snapshot"));
        }
    };
    let (open, merges, naming) =
        plan_single(disk, survey, victim, &request.keep, &Decided::default(), change)?;
    plan.single = Some((victim, merges, naming));
    if !change {
        plan.forecast = rehearse(survey, &plan, &open)?;
    }
    plan.bytes_freed = plan.frees(survey);
    Ok(Prepared { plan, open })
}

/// Bytes on disk that removing a name of the file gives back: none while it has another one.
pub(crate) fn freed_by(file: &SurveyFile) -> u64 {
    if file.stat.links > 1 { 0 } else { file.stat.allocated }
}

/// Refuses to go on where an operation was interrupted.
pub(crate) fn refuse_journals(disk: &dyn Disk, survey: &Survey) -> Result<()> {
    for dir in &survey.directories {
        if let Some(journal) = pending(disk, dir)?.first() {
            return Err(unfinished(disk, journal));
        }
    }
    Ok(())
}

pub(crate) fn role(change: bool) -> Role {
    if change { Role::Write } else { Role::Read }
}

/// The files whose every state is among `nodes`, leaves first.
fn files_of(survey: &Survey, family: &Family, nodes: &[pleach_lineage::NodeId]) -> Result<Vec<usize>> {
    let mut files = Vec::new();
    let mut states: BTreeMap<usize, usize> = BTreeMap::new();
    for &node in nodes {
        match family.state(node) {
            Some(State::File(index)) => {
                files.push(index);
                *states.entry(index).or_default() += 1;
            }
            Some(State::Snapshot(index, _)) => *states.entry(index).or_default() += 1,
            None => {}
        }
    }
    for (index, gone) in states {
        let Some(file) = survey.files.get(index) else { continue };
        if gone != file.snapshots.len() + 1 {
            return Err(stays_inside(file));
        }
    }
    let gone: BTreeSet<FileId> =
        files.iter().filter_map(|&i| survey.files.get(i)).map(|f| f.stat.id).collect();
    let survivors = survey.files.iter().map(|f| f.stat.id).chain(survey.broken.iter().map(|b| b.id));
    let reach = Reach::of(survivors.filter(|id| !gone.contains(id)), &survey.reads());
    for &index in &files {
        let Some(file) = survey.files.get(index) else { continue };
        refuse_unknown_readers(survey, file, &gone)?;
        if reach.needs(&file.stat.id) {
            return Err(still_read(survey, file, &reach.needed_by(&file.stat.id)));
        }
    }
    Ok(files)
}

pub(crate) fn stays_inside(file: &SurveyFile) -> Error {
    let names: Vec<String> = file.snapshots.iter().map(|s| format!("\"{}\"", escape(&s.name))).collect();
    Error::new(
        ErrorKind::Refused,
        format!("the file holds internal snapshots, which would be lost or changed: {}", names.join(", ")),
    )
    .at(&file.path)
    .hint("delete the internal snapshots first (qemu-img snapshot -d)")
}

/// The error for a file that something that stays still reads.
pub(crate) fn still_read(survey: &Survey, file: &SurveyFile, readers: &[FileId]) -> Error {
    let path = |id: &FileId| {
        let found = survey.find_id(*id).and_then(|i| survey.files.get(i)).map(|f| &f.path);
        let broken = survey.broken.iter().find(|b| b.id == *id).map(|b| &b.path);
        found.or(broken).map(|p| format!("\"{}\"", p.display()))
    };
    let names: Vec<String> = readers.iter().filter_map(path).collect();
    Error::new(ErrorKind::Refused, format!("the file is still read by {}", names.join(", "))).at(&file.path)
}

/// Plans the deletion of one file's active state, and opens what it needs.
pub(crate) fn plan_single(
    disk: &dyn Disk,
    survey: &Survey,
    victim: usize,
    keep: &Keep,
    decided: &Decided,
    change: bool,
) -> Result<(OpenFiles, Vec<Merge>, Naming)> {
    let file = survey.files.get(victim).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file"))?;
    if !file.snapshots.is_empty() {
        return Err(stays_inside(file));
    }
    refuse_unknown_readers(survey, file, &BTreeSet::new())?;
    let readers: Vec<usize> =
        file.dependents.iter().copied().filter(|&d| !has_id(survey, d, &decided.followers)).collect();
    // What cannot be followed below a leaf is not needed; a loop is no tree to delete anything from.
    let below = match survey.chain(victim) {
        Ok(mut chain) => chain.split_off(1),
        Err(_) if readers.is_empty() && !survey.loops(victim) => Vec::new(),
        Err(error) => return Err(error),
    };
    refuse_other_names(survey, below.iter().chain(&readers).chain([&victim]))?;
    let designated = designate(survey, &readers, keep, decided)?;
    // An interrupted deletion may have merged the reader that takes the name already.
    let merged = match (decided.renamed, decided.committed) {
        (Some(id), None) if designated.is_none() => survey.find_id(id),
        _ => None,
    };
    let followers: Vec<usize> = match (designated.or(merged), keep) {
        (Some(d), Keep::Parent(_) | Keep::Auto) => {
            survey.files.get(d).map(|f| f.dependents.clone()).unwrap_or_default()
        }
        _ => Vec::new(),
    };
    let mut roles: BTreeMap<usize, Role> = below.iter().map(|&i| (i, Role::Read)).collect();
    let changed = std::iter::once(victim).chain(readers.iter().copied()).chain(followers.iter().copied());
    roles.extend(changed.chain(merged).map(|i| (i, role(change))));
    let open = OpenFiles::open(disk, survey, &roles)?;
    if readers.is_empty() && merged.is_none() {
        return Ok((open, Vec::new(), Naming::Unlink));
    }

    let planner = Planner::new(Files { disk, survey, open: &open }, victim, &[], &below, decided.bitmaps)?;
    let mut merges = Vec::new();
    for &reader in readers.iter().filter(|&&r| Some(r) != designated) {
        merges.push(planner.pull(reader, None)?);
    }
    let naming = match (designated, merged) {
        (None, None) => Naming::Unlink,
        (None, Some(reader)) => planner.take_victims_name(reader, &followers)?,
        (Some(reader), _) => {
            let forced = decided.fixed.then(|| has_opt(survey, reader, decided.committed));
            let takes = if decided.fixed { Some(has_opt(survey, reader, decided.renamed)) } else { None };
            let (merge, naming) = planner.designated(reader, keep, forced, takes, &followers)?;
            merges.push(merge);
            naming
        }
    };
    Ok((open, merges, naming))
}

fn has_id(survey: &Survey, index: usize, ids: &BTreeSet<FileId>) -> bool {
    survey.files.get(index).is_some_and(|f| ids.contains(&f.stat.id))
}

fn has_opt(survey: &Survey, index: usize, id: Option<FileId>) -> bool {
    survey.files.get(index).map(|f| f.stat.id).is_some_and(|i| Some(i) == id)
}

/// Refuses files of which it depends on the name, under which they are opened, what they read.
pub(crate) fn refuse_other_names<'a>(
    survey: &Survey,
    files: impl IntoIterator<Item = &'a usize>,
) -> Result<()> {
    for file in files.into_iter().filter_map(|&i| survey.files.get(i)) {
        if let Some(name) = survey.other_names.iter().find(|n| n.reader == file.stat.id) {
            let text = format!("reads another backing file under its other name \"{}\"", name.path.display());
            return Err(Error::new(ErrorKind::Refused, text)
                .at(&file.path)
                .hint("remove that name, or give the image an absolute backing file name"));
        }
    }
    Ok(())
}

/// Images that name the victim but could not be followed, or cannot be read, may still need it.
pub(crate) fn refuse_unknown_readers(
    survey: &Survey,
    victim: &SurveyFile,
    going: &BTreeSet<FileId>,
) -> Result<()> {
    let id = victim.stat.id;
    if let Some(unreadable) = survey.unreadable.first() {
        let path = unreadable.path.clone().unwrap_or_default();
        let text =
            format!("\"{}\" {}; it may be an image that reads this one", path.display(), unreadable.full());
        return Err(Error::new(ErrorKind::Refused, text)
            .at(&victim.path)
            .hint("run as a user who may read every image in the directory"));
    }
    if let Some(name) = survey.other_names.iter().find(|n| n.read == id && !going.contains(&n.reader)) {
        let text = format!(
            "\"{}\" reads it under that name, where its backing file name leads here",
            name.path.display()
        );
        return Err(Error::new(ErrorKind::Refused, text)
            .at(&victim.path)
            .hint("remove that link, or give the image an absolute backing file name"));
    }
    for file in survey.files.iter().filter(|f| !going.contains(&f.stat.id)) {
        if let Backing::Broken { name, why, id: Some(read) } = &file.backing
            && *read == id
        {
            return Err(broken(&file.path, name, *why));
        }
        // A pseudo name is not followed, but it may well mean this file.
        if let Backing::Broken { name, id: None, .. } = &file.backing
            && victim.path.file_name().is_some_and(|n| name.contains(&escape(n.as_encoded_bytes())))
        {
            let text = format!("\"{}\" may read it under the name \"{name}\"", file.path.display());
            return Err(Error::new(ErrorKind::Refused, text).at(&victim.path));
        }
    }
    match survey.broken.iter().find(|b| b.reads == Some(id) && !going.contains(&b.id)) {
        Some(b) => {
            let kind = match b.error.kind {
                ErrorKind::Unsupported => ErrorKind::Unsupported,
                _ => ErrorKind::Refused,
            };
            let text =
                format!("stands on \"{}\" but cannot be read: {}", victim.path.display(), b.error.full());
            Err(Error::new(kind, text).at(&b.path).hint("repair or remove that file first"))
        }
        None => Ok(()),
    }
}

/// The reader that may become one file with the victim under either name.
fn designate(survey: &Survey, readers: &[usize], keep: &Keep, decided: &Decided) -> Result<Option<usize>> {
    if decided.fixed {
        let which = decided.committed.or(decided.renamed);
        return Ok(readers.iter().copied().find(|&r| which.is_some() && has_opt(survey, r, which)));
    }
    match (keep, readers) {
        (Keep::Named(_) | Keep::Both, _) => {
            Err(Error::new(ErrorKind::Usage, "only a merge can keep another name, or both"))
        }
        (_, []) => Ok(None),
        (Keep::Child | Keep::Auto | Keep::Parent(None), [only]) => Ok(Some(*only)),
        (Keep::Child | Keep::Auto, _) => Ok(None),
        (Keep::Parent(None), several) => {
            let names: Vec<String> = several.iter().filter_map(|&r| survey.files.get(r)).map(stem).collect();
            Err(Error::new(
                ErrorKind::Usage,
                "several images stand on it; only one of them can take its name",
            )
            .hint(format!("say which: --keep parent=NAME, with NAME one of {}", names.join(", "))))
        }
        (Keep::Parent(Some(name)), several) => {
            let is = |f: &SurveyFile| {
                stem(f) == *name
                    || f.path.file_name().is_some_and(|n| n == name.as_str())
                    || f.path == Path::new(name)
            };
            let found = several.iter().copied().find(|&r| survey.files.get(r).is_some_and(is));
            found.map(Some).ok_or_else(|| {
                let names: Vec<String> =
                    several.iter().filter_map(|&r| survey.files.get(r)).map(stem).collect();
                Error::new(ErrorKind::NotFound, format!("no image named \"{name}\" stands on it"))
                    .hint(format!("the images that do: {}", names.join(", ")))
            })
        }
    }
}

fn stem(file: &SurveyFile) -> String {
    escape(file.path.file_stem().unwrap_or_default().as_encoded_bytes())
}

/// What all merges around one victim have in common.
pub(crate) struct Planner<'a> {
    files: Files<'a>,
    victim: usize,
    /// What lies between the victim and its only reader, top first: these files go too.
    between: &'a [usize],
    below: &'a [usize],
    /// What the victim says.
    cover: Cover,
    /// What of that can be overwritten where it is.
    plain: Cover,
    /// What the victim says with those between on top of it.
    under: Cover,
    content: Content,
    bitmaps: BitmapPolicy,
}

impl<'a> Planner<'a> {
    pub(crate) fn new(
        files: Files<'a>,
        victim: usize,
        between: &'a [usize],
        below: &'a [usize],
        bitmaps: BitmapPolicy,
    ) -> Result<Self> {
        let open = files.open;
        let (size, runs) = (open.layer(victim).size(), open.runs(victim)?);
        let (cover, plain) = (Cover::of_runs(size, runs), Cover::of_plain_data(size, runs));
        let under = match open.overlay(between)? {
            Some(upper) => upper.over(&Overlay::of_runs(victim, size, runs)).cover(),
            None => cover.clone(),
        };
        let content = match open.overlay(below)? {
            Some(chain) => Content::none().under(&chain.cover()),
            None => Content::none(),
        };
        Ok(Self { files, victim, between, below, cover, plain, under, content, bitmaps })
    }

    fn file(&self, index: usize) -> &'a SurveyFile {
        self.files.file(index)
    }

    /// What lies under the reader, top first.
    fn lower(&self) -> Vec<usize> {
        self.between.iter().copied().chain([self.victim]).chain(self.below.iter().copied()).collect()
    }

    fn chain(&self, reader: usize) -> Result<Chain> {
        let indexes: Vec<usize> = [reader].into_iter().chain(self.lower()).collect();
        self.files.open.chain(&indexes)
    }

    fn settled(&self, reader: usize, chain: &Chain, shape: Target, needs: &[Need]) -> Result<Vec<Need>> {
        let asked: Vec<u64> = candidates(needs).collect();
        let zero = zero_clusters(&self.file(reader).path, chain, shape.cluster_bits, &asked)?;
        Ok(settle(needs, zero))
    }

    /// `reader` takes what it lacks. `name`: the other name that it will get afterwards.
    fn pull(&self, reader: usize, name: Option<&Path>) -> Result<Merge> {
        let image = self.files.writable(reader)?;
        let path = &self.file(reader).path;
        let own = Cover::of_runs(image.size(), self.files.open.runs(reader)?);
        let shape = shape_of(image, image.size());
        let backing = self.victims_backing_for(reader, name)?;
        self.files.must_fit(reader, backing.as_ref())?;
        let bitmaps = self.bitmaps_of(reader, reader, image.size())?;
        bitmaps.must_fit(path, image, backing.as_ref())?;
        let merge = |work, bytes_written, bytes_cloned| Merge {
            target: reader,
            reader,
            direction: Direction::Pull,
            work,
            backing,
            bytes_written,
            bytes_cloned,
            bitmaps,
        };
        if !self.file(reader).snapshots.is_empty() {
            refuse_parts(path, image)?;
            let mut covers = vec![own];
            covers.extend(snapshot_covers(path, image)?);
            let fills = pulled_fills(shape, &covers, &self.under, &self.content, |asked| {
                zero_clusters(path, &self.files.open.chain(&self.lower())?, shape.cluster_bits, asked)
            })?;
            let bytes_written = bytes_of(shape.cluster_bits, &fills);
            return Ok(merge(Work::States { cluster_bits: shape.cluster_bits, fills }, bytes_written, 0));
        }
        let chain = self.chain(reader)?;
        let needs = self.settled(reader, &chain, shape, &pull(shape, &own, &self.under, &self.content))?;
        let cloned = self.files.clonable(reader, &chain, shape, &needs)?;
        let (work, bytes_written) = self.files.clusters(reader, &chain, shape, needs)?;
        Ok(merge(work, bytes_written, cloned))
    }

    /// How the bitmaps of `holder`, the reader or the victim, change when it holds what all of them do.
    fn bitmaps_of(&self, reader: usize, holder: usize, size: u64) -> Result<BitmapChange> {
        let run: Vec<usize> =
            [reader].into_iter().chain(self.between.iter().copied()).chain([self.victim]).collect();
        let file = |&i: &usize| {
            let layer = self.files.open.layer(i);
            let cover = Cover::of_runs(layer.size(), self.files.open.runs(i)?);
            Ok(Recorded { path: &self.file(i).path, image: layer.image(), cover })
        };
        let files = run.iter().map(file).collect::<Result<Vec<_>>>()?;
        let at = run.iter().position(|&i| i == holder).unwrap_or(0);
        BitmapChange::of(self.bitmaps, &files, at, size)
    }

    /// The only reader, or the one that takes the victim's name: the cheaper way, and the names.
    pub(crate) fn designated(
        &self,
        reader: usize,
        keep: &Keep,
        committed: Option<bool>,
        renamed: Option<bool>,
        followers: &[usize],
    ) -> Result<(Merge, Naming)> {
        let raw = self.file(self.victim).format == FileFormat::Raw;
        if *keep == Keep::Both {
            return self.emptied(reader);
        }
        let parent = renamed.unwrap_or(matches!(keep, Keep::Parent(_)));
        let name = match keep {
            Keep::Named(name) => Some(name.as_path()),
            _ => parent.then_some(self.file(self.victim).path.as_path()),
        };
        // A raw file stays raw under its name: only the name of the overlay can stand for a qcow2 image.
        let forced = committed.or(raw.then_some(parent));
        if forced == Some(true) {
            self.refuse_loss(reader)?;
        }
        let merge = match forced {
            Some(true) => self.commit(reader)?,
            Some(false) => self.pull(reader, name)?,
            None => {
                let pulled = self.pull(reader, name)?;
                match self.can_commit(reader) {
                    true => {
                        let down = self.commit(reader)?;
                        if down.bytes_written < pulled.bytes_written { down } else { pulled }
                    }
                    false => pulled,
                }
            }
        };
        let takes_parent = match (keep, renamed) {
            (_, Some(renamed)) => renamed,
            (Keep::Auto, None) => merge.direction == Direction::Commit,
            (Keep::Child | Keep::Named(_) | Keep::Both, None) => false,
            (Keep::Parent(_), None) => true,
        };
        let format = if merge.direction == Direction::Commit {
            self.file(self.victim).format
        } else {
            FileFormat::Qcow2
        };
        let mut merge = merge;
        if merge.direction == Direction::Commit && !takes_parent {
            merge.backing = match keep {
                Keep::Named(name) => self.moved(name)?,
                _ => self.restyled(reader)?,
            };
            if merge.backing.is_some() {
                self.files.must_fit(self.victim, merge.backing.as_ref())?;
            }
        }
        if let Keep::Named(name) = keep {
            let holder = if merge.direction == Direction::Commit { self.victim } else { reader };
            return Ok((merge, self.take_new_name(reader, holder, name, followers)?));
        }
        let followers_of = followers;
        let victims_name = &self.file(self.victim).path;
        let followers =
            || followers.iter().map(|&f| self.follow(f, victims_name, format)).collect::<Result<Vec<_>>>();
        let naming = match (merge.direction, takes_parent) {
            (Direction::Pull, false) => Naming::Unlink,
            (Direction::Pull, true) => self.take_victims_name(reader, followers_of)?,
            (Direction::Commit, false) => Naming::TakeReadersName { reader },
            (Direction::Commit, true) => Naming::KeepVictimsName { reader, followers: followers()? },
        };
        Ok((merge, naming))
    }

    /// The reader's file, holding the merged data, takes the victim's name.
    pub(crate) fn take_victims_name(&self, reader: usize, followers: &[usize]) -> Result<Naming> {
        let (victim, over) = (self.file(self.victim), self.file(reader));
        if victim.stat.id.device != over.stat.id.device {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the file lies on another file system than the name it should get",
            )
            .at(&over.path)
            .hint("delete with --keep child"));
        }
        if !may_set_mode(self.files.disk, over) {
            let text =
                "belongs to another user, so it cannot get the mode of the file whose name it should get";
            return Err(Error::new(ErrorKind::Unsupported, text)
                .at(&over.path)
                .hint("delete with --keep child"));
        }
        let second = second_name(&victim.path);
        if self.files.disk.stat(&second).is_ok_and(|s| s.id != over.stat.id) {
            return Err(
                Error::new(ErrorKind::Refused, "is in the way: the name is needed for an instant").at(second)
            );
        }
        let follow = |&f: &usize| self.follow(f, &victim.path, FileFormat::Qcow2);
        let followers = followers.iter().map(follow).collect::<Result<Vec<_>>>()?;
        Ok(Naming::TakeVictimsName { reader, followers })
    }

    /// `holder`, the reader's file or the victim's, holds the merged data and takes a name that no file has.
    pub(crate) fn take_new_name(
        &self,
        reader: usize,
        holder: usize,
        name: &Path,
        followers: &[usize],
    ) -> Result<Naming> {
        let (disk, file) = (self.files.disk, self.file(holder));
        let dir = directory_of(name);
        let home = disk.stat(&dir).map_err(|e| Error::io("find the directory", &dir, e))?;
        if home.id.device != file.stat.id.device {
            let text =
                format!("lies on another file system than \"{}\", which should get it", file.path.display());
            return Err(Error::new(ErrorKind::Unsupported, text).at(name));
        }
        if disk.stat(name).is_ok_and(|s| s.id != file.stat.id) {
            return Err(Error::new(ErrorKind::Failed, "is there already")
                .at(name)
                .hint("choose a name that no file has, or remove that file"));
        }
        let follow = |&f: &usize| self.follow(f, name, FileFormat::Qcow2);
        let followers = followers.iter().map(follow).collect::<Result<Vec<_>>>()?;
        Ok(Naming::TakeNewName { reader, holder, name: name.to_owned(), followers })
    }

    /// All that the reader says goes into the victim's file, and the reader stays on it, empty.
    fn emptied(&self, reader: usize) -> Result<(Merge, Naming)> {
        let (victim, over) = (self.file(self.victim), self.file(reader));
        let refuse = |kind, text: &str, file: &SurveyFile| Err(Error::new(kind, text).at(&file.path));
        if !over.snapshots.is_empty() {
            return Err(stays_inside(over));
        }
        if victim.stat.links > 1 {
            let text = "the file has other names (hard links), under which its content would change too";
            return refuse(ErrorKind::Refused, text, victim);
        }
        let (from, into) = (self.files.writable(reader)?, self.files.open.layer(self.victim));
        if from.size() < into.size() {
            let text = "is longer than the image above, whose end it would get";
            return refuse(ErrorKind::Unsupported, text, victim)
                .map_err(|e| e.hint("pleach merge makes one image of both, without the rest"));
        }
        if let Some(into) = into.image() {
            self.files.writable(self.victim)?;
            let bitmaps = into.bitmaps().map_err(|e| Error::image(&victim.path, e))?;
            if let Some(bitmap) = bitmaps.first().filter(|_| from.size() != into.size()) {
                let text = format!("its bitmap \"{}\" is for a shorter disk", escape(&bitmap.name));
                return refuse(ErrorKind::Refused, &text, victim)
                    .map_err(|e| e.hint("remove the bitmap first: pleach bitmap remove"));
            }
        }
        let mut merge = self.commit(reader)?;
        merge.bitmaps = self.bitmaps_of(reader, self.victim, from.size())?;
        if let Some(into) = into.image() {
            merge.bitmaps.must_fit(&victim.path, into, into.header().backing())?;
        }
        let backing = match self.between {
            [] => None,
            _ => {
                let old = over.header.as_ref().and_then(|h| h.backing());
                Some(renamed(self.files.disk, &over.path, old, &victim.path, victim.format)?)
            }
        };
        if backing.is_some() {
            self.files.must_fit(reader, backing.as_ref())?;
        }
        let given_up = Emptying::of(from, &Threads).map_err(|e| Error::image(&over.path, e))?.bytes();
        Ok((merge, Naming::Empty { reader, backing, given_up }))
    }

    /// Refuses to let a raw file take the place of an image that holds more than guest data, or that has another name.
    fn refuse_loss(&self, reader: usize) -> Result<()> {
        let file = self.file(reader);
        if !file.snapshots.is_empty() {
            return Err(stays_inside(file));
        }
        let mut bitmaps = Vec::new();
        for &image in [reader].iter().chain(self.between).filter(|_| self.bitmaps != BitmapPolicy::Drop) {
            let path = &self.file(image).path;
            bitmaps.extend(self.files.image(image)?.bitmaps().map_err(|e| Error::image(path, e))?);
        }
        if let Some(bitmap) = bitmaps.first() {
            let text = format!("a raw file has no place for its bitmap \"{}\"", escape(&bitmap.name));
            return Err(Error::new(ErrorKind::Refused, text).at(&file.path).hint("delete with --keep child"));
        }
        if file.stat.links > 1 || self.file(self.victim).stat.links > 1 {
            let path = if file.stat.links > 1 { &file.path } else { &self.file(self.victim).path };
            return Err(Error::new(
                ErrorKind::Refused,
                "the file has other names (hard links), which would change too",
            )
            .at(path)
            .hint("delete with --keep child"));
        }
        Ok(())
    }

    /// Whether the victim's file can take the reader's content and stand in for it.
    fn can_commit(&self, reader: usize) -> bool {
        let (victim, over) = (self.file(self.victim), self.file(reader));
        let (Ok(into), Ok(from)) = (self.files.image(self.victim), self.files.image(reader)) else {
            return false;
        };
        let no_bitmaps = |image: &Image| image.bitmaps().is_ok_and(|b| b.is_empty());
        let between = || self.between.iter().all(|&i| self.files.image(i).is_ok_and(no_bitmaps));
        can_merge_down(self.files.disk, victim, over)
            && from.size() >= into.size()
            && no_bitmaps(into)
            && no_bitmaps(from)
            && between()
            && into.check_mergeable().is_ok()
            // What is wrong with the victim's file must not go on under the reader's name.
            && check(into).is_ok_and(|report| report.errors == 0 && report.leaks == 0)
    }

    fn commit(&self, reader: usize) -> Result<Merge> {
        let open = self.files.open;
        let mut upper: Vec<usize> = vec![reader];
        upper.extend(self.between);
        let size = open.layer(reader).size();
        let upper = open.overlay(&upper)?.map_or_else(|| Cover::new(size, []), |upper| upper.cover());
        let merge = |work, bytes_written, bytes_cloned| Merge {
            target: self.victim,
            reader,
            direction: Direction::Commit,
            work,
            backing: None,
            bytes_written,
            bytes_cloned,
            bitmaps: BitmapChange::default(),
        };
        if self.file(self.victim).format == FileFormat::Raw {
            let pieces: Vec<_> = upper.says().collect();
            let written = pieces.iter().filter(|p| p.1 == Say::Data).map(|(r, _)| r.end - r.start).sum();
            return Ok(merge(Work::Raw { size, pieces }, written, 0));
        }
        let target = self.files.writable(self.victim)?;
        let shape = shape_of(target, size);
        let chain = self.chain(reader)?;
        let needs = committed((shape, parts_of(target)), &upper, &self.cover, &self.plain, &self.content);
        let needs = self.settled(reader, &chain, shape, &needs)?;
        let cloned = self.files.clonable(self.victim, &chain, shape, &needs)?;
        let (work, bytes_written) = self.files.clusters(self.victim, &chain, shape, needs)?;
        Ok(merge(work, bytes_written, cloned))
    }

    /// The victim's backing file as the header of `reader` will name it: absolute or relative as its old name was.
    /// `name` is the other name that the reader's file will get.
    fn victims_backing_for(&self, reader: usize, name: Option<&Path>) -> Result<Option<BackingFile>> {
        let Some(&base) = self.below.first() else { return Ok(None) };
        let (base, reader) = (self.file(base), self.file(reader));
        let old = reader.header.as_ref().and_then(|h| h.backing());
        let mut backing = renamed(self.files.disk, &reader.path, old, &base.path, base.format)?;
        if name.is_some_and(|name| self.home(&reader.path) != self.home(name)) {
            // Right in both places: the file is in one now, and in the other in the end.
            backing.name = absolute(self.files.disk, &directory_of(&reader.path), &backing.name)?;
        }
        Ok(Some(backing))
    }

    /// The victim's backing file, if its header has to name it in another way when the file is called as `reader` is:
    /// absolute or relative as the reader's name for its backing file was.
    fn restyled(&self, reader: usize) -> Result<Option<BackingFile>> {
        let name_of =
            |f: &SurveyFile| f.header.as_ref().and_then(|h| h.backing()).map(|b| b.name.starts_with(b"/"));
        let same = name_of(self.file(self.victim)) == name_of(self.file(reader));
        if same { Ok(None) } else { self.victims_backing_for(reader, None) }
    }

    /// The victim's backing file, if its header has to name it in another way when the file is called `name`.
    fn moved(&self, name: &Path) -> Result<Option<BackingFile>> {
        let victim = self.file(self.victim);
        match victim.header.as_ref().and_then(|h| h.backing()) {
            Some(old) if self.home(&victim.path) != self.home(name) => {
                let name = absolute(self.files.disk, &directory_of(&victim.path), &old.name)?;
                Ok(Some(BackingFile { name, format: old.format.clone() }))
            }
            _ => Ok(None),
        }
    }

    /// The directory that a name is in.
    fn home(&self, name: &Path) -> Option<PathBuf> {
        self.files.disk.canonical(&directory_of(name)).ok()
    }

    /// `follower` names the file `path` instead of the reader's.
    fn follow(&self, follower: usize, path: &Path, format: FileFormat) -> Result<Rebase> {
        let file = self.file(follower);
        let old = file.header.as_ref().and_then(|h| h.backing());
        let backing = renamed(self.files.disk, &file.path, old, path, format)?;
        self.files.must_fit(follower, Some(&backing))?;
        Ok(Rebase { file: follower, backing: Some(backing) })
    }
}

/// Whether this user may give the file the mode that another file had under the name that it takes.
fn may_set_mode(disk: &dyn Disk, file: &SurveyFile) -> bool {
    disk.user() == 0 || disk.user() == file.stat.owner
}

/// Whether the victim's file may be changed in place and take the reader's name: no other name leads to it, and its own
/// backing file name means the same in the reader's directory.
pub(crate) fn can_merge_down(disk: &dyn Disk, victim: &SurveyFile, reader: &SurveyFile) -> bool {
    let directory = |f: &SurveyFile| disk.canonical(&directory_of(&f.path)).ok();
    let links = victim.stat.links == 1 && reader.stat.links == 1;
    links
        && may_set_mode(disk, victim)
        && reader.snapshots.is_empty()
        && directory(victim) == directory(reader)
}

/// What every state of an image gets when what it stands on changes: `covers` are its states, active first, `lacking` says
/// what a state needs. `look` tells what is at those clusters, each up to the longest disk's end, whose needs are `asked`.
pub(crate) fn fills_of(
    shape: Target,
    covers: &[Cover],
    lacking: &dyn Fn(Target, &Cover) -> Vec<Need>,
    asked: fn(&Need) -> bool,
    look: impl FnOnce(&[Range<u64>]) -> Result<Vec<Found>>,
) -> Result<Vec<StateFill>> {
    // States that share a table get the same cluster, so there is one decision for all: the one of the longest disk.
    let mut wanted: BTreeMap<u64, (Need, StateFill)> = BTreeMap::new();
    for (state, cover) in covers.iter().enumerate() {
        let shape = Target { size: cover.size(), ..shape };
        for need in lacking(shape, cover) {
            for cluster in need.clusters.clone() {
                let end = ((cluster + 1) << shape.cluster_bits).min(shape.size);
                let fill = StateFill { cluster, end, data: false, states: Vec::new() };
                let (decided, fill) = wanted.entry(cluster).or_insert_with(|| (need.clone(), fill));
                if need.how == How::Fill {
                    *decided = need.clone();
                }
                fill.end = fill.end.max(end);
                fill.states.push(state);
            }
        }
    }
    let open = wanted.values().filter(|(need, _)| asked(need)).map(|(_, fill)| fill);
    let ranges: Vec<Range<u64>> = open.map(|f| f.cluster << shape.cluster_bits..f.end).collect();
    let mut found = look(&ranges)?.into_iter();
    let mut decide = |(need, fill): (Need, StateFill)| {
        let how = match asked(&need).then(|| found.next()).flatten() {
            Some(Found::Same) => How::Skip,
            Some(Found::Zero) => need.if_zero,
            Some(Found::Data) | None => need.how,
        };
        (how != How::Skip).then_some(StateFill { data: how == How::Fill, ..fill })
    };
    Ok(wanted.into_values().filter_map(&mut decide).collect())
}

/// What every state of an image gets when the file `victim` below it goes. `zero` tells which of some clusters of the
/// layers below read as zeros.
pub(crate) fn pulled_fills(
    shape: Target,
    covers: &[Cover],
    victim: &Cover,
    content: &Content,
    zero: impl FnOnce(&[u64]) -> Result<Vec<bool>>,
) -> Result<Vec<StateFill>> {
    let lacking = |shape, own: &Cover| pull(shape, own, victim, content);
    fills_of(
        shape,
        covers,
        &lacking,
        |need| need.how != need.if_zero,
        |asked| {
            let clusters: Vec<u64> = asked.iter().map(|r| r.start >> shape.cluster_bits).collect();
            let found = |zero| if zero { Found::Zero } else { Found::Data };
            Ok(zero(&clusters)?.into_iter().map(found).collect())
        },
    )
}

/// Guest bytes that fills write as data.
pub(crate) fn bytes_of(cluster_bits: u32, fills: &[StateFill]) -> u64 {
    (fills.iter().filter(|f| f.data).count() as u64) << cluster_bits
}

/// The image as a target of `size` bytes: with extended L2 entries, a subcluster is what changes as one.
pub(crate) fn shape_of(image: &Image, size: u64) -> Target {
    Target {
        cluster_bits: image.geometry().cluster_bits() - parts_of(image),
        size,
        zero_flag: image.header().version() == Version::V3,
    }
}

/// log2 of the parts of a cluster that change on their own.
pub(crate) fn parts_of(image: &Image) -> u32 {
    if image.geometry().extended_l2() { 5 } else { 0 }
}

/// Refuses to change all states of an image together if their clusters have parts.
pub(crate) fn refuse_parts(path: &Path, image: &Image) -> Result<()> {
    match parts_of(image) {
        0 => Ok(()),
        _ => {
            let feature = "merging into an image with extended L2 entries and internal snapshots";
            Err(Error::image(path, ImageError::Unsupported { feature }))
        }
    }
}

/// What changes in an image of `shape`, whose clusters have `1 << parts` parts, when it takes what `upper` has: see
/// [`commit`].
pub(crate) fn committed(
    (shape, parts): (Target, u32),
    upper: &Cover,
    own: &Cover,
    plain: &Cover,
    below: &Content,
) -> Vec<Need> {
    let needs = commit(shape, upper, own, plain, below);
    if parts == 0 { needs } else { rewrite_whole(shape, &needs, own, plain, below, parts) }
}

/// The host ranges of a layer's data, each with the guest range that it is for.
pub(crate) fn data_extents(runs: &RunList) -> impl Iterator<Item = (Range<u64>, Range<u64>)> {
    runs.as_slice().iter().filter_map(|run| match run.kind {
        RunKind::Data(host) => Some((host.0..host.0 + run.len, run.guest.0..run.end())),
        RunKind::Compressed(extent) => {
            Some((extent.offset.0..extent.offset.0 + extent.bytes, run.guest.0..run.end()))
        }
        RunKind::Zero => None,
    })
}

/// Every directory that must be searched before a file of `survey` may go: those searched already.
pub(crate) fn directories(disk: &dyn Disk, survey: &Survey) -> Vec<PathBuf> {
    survey.directories.iter().map(|d| disk.canonical(d).unwrap_or_else(|_| d.clone())).collect()
}
