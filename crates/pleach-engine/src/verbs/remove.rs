//! Deleting nodes, with their content on every disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use pleach_lineage::{DeleteMode, NodeRecord, Reach, Storage};
use pleach_store::{Disk, FileId};

use super::revert::Unsaved;
use super::{Act, Draft, Job};
use crate::delete::{Decided, DeletePlan, Keep, Naming, plan_single, refuse_unknown_readers, still_read};
use crate::execute::rehearse;
use crate::rebase::{Onto, RebaseRequest, plan_rebase};
use crate::reconcile::quoted;
use crate::steps::Step;
use crate::survey::Backing;
use crate::tree::Tree;
use crate::{Error, ErrorKind, Result};

/// What should be deleted, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoveRequest {
    /// The node.
    pub name: String,
    /// Only the node, or its descendants. [`DeleteMode::Metadata`] is [`super::forget`].
    pub mode: DeleteMode,
    /// Which file name survives where two files become one; a named one is a node or a file.
    pub keep: Keep,
    /// Deleting a root with all its descendants is meant.
    pub whole_tree: bool,
    /// The new active images, by disk, where current is among what goes.
    pub files: BTreeMap<String, PathBuf>,
    /// When, in seconds since the Epoch.
    pub created: i64,
}

/// Plans a deletion.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::NotConfirmed`] for a whole tree that was not said to be meant;
/// [`ErrorKind::Refused`] if something that stays reads what should go; everything that keeps a merge from being right.
pub fn remove(disk: &dyn Disk, tree: &Tree, request: &RemoveRequest) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = match tree.resolve(&request.name) {
        Err(error) if tree.head_name().as_deref() == Some(&request.name) => {
            let text =
                format!("{} is the active head: the machine would have no disk", quoted(&request.name));
            return Err(Error::new(ErrorKind::Refused, text)
                .hint("to lose its changes: pleach revert TARGET NAME --discard")
                .caused(error));
        }
        other => other?,
    };
    draft.check_disks(request.files.keys())?;
    match request.mode {
        DeleteMode::Single => single(&mut draft, &name, &request.keep)?,
        DeleteMode::Metadata => {}
        DeleteMode::Children | DeleteMode::ChildrenOnly => branch(&mut draft, &name, request)?,
    }
    draft.finish(format!("delete {}", quoted(&name)))
}

/// Plans to make one node of the run from `first` to `last`, which has the content and the name of `last`: all others of
/// the run are deleted.
///
/// # Errors
/// [`ErrorKind::Usage`] for a run of one node, or names that are no run; [`ErrorKind::Unsupported`] where several nodes
/// would go that have files of their own; as [`remove`].
pub fn squash(disk: &dyn Disk, tree: &Tree, first: &str, last: &str) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let record = &tree.catalog.record;
    let first = tree.resolve(first)?;
    let last = tree.resolve(last)?;
    let mut run = vec![last.clone()];
    while run.last() != Some(&first) {
        let at = run.last().and_then(|name| record.find(name));
        let Some(below) = at.and_then(|node| node.parent.clone()) else {
            let text = format!("{} does not stand on {}", quoted(&last), quoted(&first));
            return Err(Error::new(ErrorKind::Usage, text).hint("name the lower end of the run first"));
        };
        run.push(below);
    }
    run.reverse();
    run.pop();
    if run.is_empty() {
        let text = format!("a run of one snapshot, {}: there is nothing to squash", quoted(&last));
        return Err(Error::new(ErrorKind::Usage, text));
    }
    let inside = |name: &String| {
        let storage = record.find(name).map(|n| &n.storage[..]).unwrap_or_default();
        storage.iter().all(|(_, s)| matches!(s, Storage::Internal { .. }))
    };
    if run.len() > 1 && !run.iter().all(inside) {
        let names: Vec<String> = run.iter().map(|n| quoted(n)).collect();
        let text = "squashing several snapshots of a catalog that have files of their own is not supported";
        return Err(Error::new(ErrorKind::Unsupported, text).hint(format!(
            "delete the others of the run one by one: pleach delete TARGET {}",
            names.join(", then ")
        )));
    }
    for name in &run {
        single(&mut draft, name, &Keep::Child)?;
    }
    // A node may have been given a parent that went after it, or have gone itself.
    let parents: BTreeMap<String, Option<String>> =
        std::mem::take(&mut draft.reparented).into_iter().collect();
    draft.reparented = parents.into_iter().filter(|(name, _)| draft.record.find(name).is_some()).collect();
    draft.finish(format!("squash {} to {}", quoted(&first), quoted(&last)))
}

impl Draft<'_> {
    /// Takes nodes out of the record as `mode` says, and gives the others their parents. Returns those that went.
    pub(super) fn delete_nodes(&mut self, name: &str, mode: DeleteMode) -> Result<Vec<NodeRecord>> {
        let wrap = |e: pleach_lineage::RecordError| Error::new(ErrorKind::Corrupt, e.to_string());
        let (mut lineage, _) = self.record.lineage().map_err(wrap)?;
        let id = lineage.find(name).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such node"))?;
        let names: Vec<String> =
            (lineage.ids().filter_map(|id| lineage.get(id)).map(|n| n.name.clone())).collect();
        let named = |id: pleach_lineage::NodeId| names.get(id.index()).cloned().unwrap_or_default();
        let done = lineage.delete(id, mode)?;
        let gone: BTreeSet<String> = done.removed.iter().map(|&id| named(id)).collect();
        let moved: BTreeMap<String, (Option<String>, bool)> = done
            .reparented
            .iter()
            .map(|&(id, parent)| {
                let guessed = lineage.get(id).is_some_and(|n| n.parent_guessed);
                (named(id), (parent.map(named), guessed))
            })
            .collect();
        let (removed, kept) =
            std::mem::take(&mut self.record.nodes).into_iter().partition(|n| gone.contains(&n.name));
        self.record.nodes = kept;
        for node in &mut self.record.nodes {
            if let Some((parent, guessed)) = moved.get(&node.name) {
                (node.parent, node.parent_guessed) = (parent.clone(), *guessed);
            }
        }
        self.record.current = done.current.map(named);
        self.reparented.extend(moved.into_iter().map(|(name, (parent, _))| (name, parent)));
        Ok(removed)
    }

    /// Deletes a snapshot inside an image, before or after the catalog is written.
    fn drop_inner(&mut self, file: usize, at: usize, late: bool) -> Result<()> {
        let inner = self.inner(file, at)?;
        self.lock(file)?;
        self.acts.push(Act::Drop { file: self.entry(file)?.path.clone(), snapshot: inner.shown() });
        let step = Step::Drop { inner };
        if late {
            self.after.push(step)
        } else {
            self.steps.push(step)
        }
        Ok(())
    }
}

/// One node goes; what stands on it gets its content.
fn single(draft: &mut Draft<'_>, name: &str, keep: &Keep) -> Result<()> {
    let node = draft.record.find(name).cloned();
    let node = node.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such node"))?;
    let states: BTreeMap<usize, Vec<(String, Option<usize>)>> = node
        .storage
        .iter()
        .filter_map(|(_, s)| draft.tree.place(draft.disk, s))
        .map(|p| {
            let inside = draft.states_in(p.file).into_iter().map(|(n, _, at)| (n.to_owned(), at)).collect();
            (p.file, inside)
        })
        .collect();
    draft.delete_nodes(name, DeleteMode::Single)?;
    for (_, storage) in &node.storage {
        // What is not there any more needs no deleting.
        let Some(place) = draft.tree.place(draft.disk, storage) else { continue };
        let entry = draft.entry(place.file)?;
        let others = states.get(&place.file).into_iter().flatten();
        if let Some((twin, _)) = others.into_iter().find(|(n, at)| n != name && *at == place.snapshot) {
            draft.warnings.push(format!(
                "what {} was in {} stays: {} is the same",
                quoted(name),
                quoted(storage.file()),
                quoted(twin)
            ));
            if place.snapshot.is_none() {
                stand_on_twin(draft, &node, place.file, twin)?;
            }
            continue;
        }
        match place.snapshot {
            Some(at) => {
                let others = states.get(&place.file).into_iter().flatten().any(|(n, _)| n != name);
                let is_active = |d: &pleach_lineage::DiskRecord| {
                    d.active.as_deref().and_then(|a| draft.tree.file(draft.disk, a)) == Some(place.file)
                };
                let used = others
                    || entry.snapshots.len() > 1
                    || !draft.readers(place.file)?.is_empty()
                    || draft.record.disks.iter().any(is_active);
                if used { draft.drop_inner(place.file, at, false)? } else { draft.remove_file(place.file)? }
            }
            None if entry.snapshots.is_empty() => merge(draft, place.file, keep)?,
            None => pull_away(draft, place.file)?,
        }
    }
    Ok(())
}

/// What stood on `node`, by an image over `file`, stands on its twin now, whose state is in the same file.
fn stand_on_twin(draft: &mut Draft<'_>, node: &NodeRecord, file: usize, twin: &str) -> Result<()> {
    let over: BTreeSet<usize> = draft.entry(file)?.dependents.iter().copied().collect();
    let has_one = |storage: &Storage| {
        let place = draft.tree.place(draft.disk, storage);
        place.is_some_and(|p| p.snapshot.is_none() && over.contains(&p.file))
    };
    let before = &draft.tree.catalog.record;
    let moved: Vec<String> = draft
        .record
        .nodes
        .iter()
        .filter(|n| before.find(&n.name).is_some_and(|old| old.parent.as_ref() == Some(&node.name)))
        .filter(|n| n.name != twin && n.storage.iter().any(|(_, s)| has_one(s)))
        .map(|n| n.name.clone())
        .collect();
    let mut above = BTreeSet::from([twin.to_owned()]);
    let mut at = draft.record.find(twin).and_then(|n| n.parent.clone());
    while let Some(name) = at.filter(|name| above.insert(name.clone())) {
        at = draft.record.find(&name).and_then(|n| n.parent.clone());
    }
    for name in moved.into_iter().filter(|name| !above.contains(name)) {
        if let Some(child) = draft.record.find_mut(&name) {
            child.parent = Some(twin.to_owned());
        }
        draft.reparented.retain(|(other, _)| *other != name);
        draft.reparented.push((name, Some(twin.to_owned())));
    }
    let is_over = |d: &pleach_lineage::DiskRecord| {
        let active = d.active.as_deref().and_then(|a| draft.tree.file(draft.disk, a));
        active.is_some_and(|active| over.contains(&active))
    };
    if before.current.as_ref() == Some(&node.name) && draft.record.disks.iter().any(is_over) {
        draft.record.current = Some(twin.to_owned());
    }
    Ok(())
}

/// The file of a node goes, merged with what stands on it.
fn merge(draft: &mut Draft<'_>, file: usize, keep: &Keep) -> Result<()> {
    let survey = &draft.tree.survey;
    let entry = draft.entry(file)?;
    draft.warn_of_links(file)?;
    let keep = match keep {
        Keep::Parent(Some(heir)) => Keep::Parent(Some(heir_file(draft, file, heir)?)),
        other => other.clone(),
    };
    let (open, merges, naming) = plan_single(draft.disk, survey, file, &keep, &Decided::default(), false)?;
    let mut plan = DeletePlan { single: Some((file, merges, naming)), ..DeletePlan::default() };
    plan.forecast = rehearse(survey, &plan, &open)?;
    drop(open);
    plan.bytes_freed = plan.frees(survey);
    let path = |i: usize| survey.files.get(i).map(|f| f.path.clone());
    draft.dependents.extend(entry.dependents.iter().filter_map(|&d| path(d)));
    let victim = draft.image(file)?;
    let dependents = entry.dependents.iter().map(|&d| draft.image(d)).collect::<Result<Vec<_>>>()?;
    let naming = plan.single.as_ref().map(|(_, _, naming)| naming.clone());
    let heir = match naming {
        Some(Naming::TakeVictimsName { reader, .. } | Naming::KeepVictimsName { reader, .. }) => {
            let old = draft.tree.catalog.name_of(draft.disk, &draft.entry(reader)?.path)?;
            let new = draft.tree.catalog.name_of(draft.disk, &entry.path)?;
            draft.record.rename_files(|file| (file == old).then(|| new.clone()));
            Some(draft.image(reader)?)
        }
        _ => None,
    };
    draft.lock(file)?;
    for &reader in &entry.dependents {
        draft.lock(reader)?;
    }
    draft.merges.push(plan);
    draft.steps.push(Step::Merge { victim, dependents, heir });
    Ok(())
}

/// The path of the file that should take over the name of `file`, given as a node or a file.
fn heir_file(draft: &Draft<'_>, file: usize, heir: &str) -> Result<String> {
    let dependents = &draft.entry(file)?.dependents;
    for &reader in dependents {
        let path = &draft.entry(reader)?.path;
        let nodes = draft.states_in(reader);
        let is_node = nodes.iter().any(|(node, _, at)| at.is_none() && *node == heir);
        let named = |part: Option<&std::ffi::OsStr>| part.is_some_and(|p| p == heir);
        if is_node || named(path.file_stem()) || named(path.file_name()) || path == std::path::Path::new(heir)
        {
            return path.to_str().map(str::to_owned).ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, "a file whose name is no UTF-8 cannot be chosen").at(path)
            });
        }
    }
    let text = format!("no image of {} stands on the node", quoted(heir));
    Err(Error::new(ErrorKind::NotFound, text))
}

/// The active state of a file goes whose snapshots stay: what stands on it gets its content, and then stands on what is
/// below it.
fn pull_away(draft: &mut Draft<'_>, file: usize) -> Result<()> {
    let survey = &draft.tree.survey;
    let entry = draft.entry(file)?;
    if entry.dependents.is_empty() {
        return draft.drop_state(file, &[]);
    }
    refuse_unknown_readers(survey, entry, &BTreeSet::new())?;
    let below = match entry.backing {
        Backing::File(below) => Some(below),
        Backing::None => None,
        Backing::Broken { .. } => return survey.chain(file).map(drop),
    };
    for &reader in &entry.dependents {
        let over = draft.entry(reader)?;
        let named = over.header.as_ref().and_then(|h| h.backing());
        let absolute = named.is_some_and(|b| b.name.starts_with(b"/"));
        let onto = match below {
            None => None,
            Some(below) => {
                let base = draft.entry(below)?;
                Some(Onto { path: base.path.clone(), absolute, file: Some(below), format: base.format })
            }
        };
        let request = RebaseRequest { image: reader, onto, unchecked: false };
        let mut prepared = plan_rebase(draft.disk, survey, &request, false)?;
        prepared.plan.forecast = rehearse(survey, &prepared.plan, &prepared.open)?;
        draft.merges.push(prepared.plan);
        draft.dependents.push(over.path.clone());
        draft.lock(reader)?;
        let onto = below.map(|below| draft.image(below)).transpose()?;
        draft.steps.push(Step::Rebase { image: draft.image(reader)?, onto, absolute });
    }
    let last = entry.snapshots.len().saturating_sub(1);
    match draft.check_can_apply(file) {
        Ok(()) => draft.apply(file, last, true),
        // Bitmaps cannot follow: the state stays, though it is no node.
        Err(error) if error.kind == ErrorKind::Refused => Ok(()),
        Err(error) => Err(error),
    }
}

/// Nodes go with everything that stands on them, or only that.
fn branch(draft: &mut Draft<'_>, name: &str, request: &RemoveRequest) -> Result<()> {
    let whole =
        request.mode == DeleteMode::Children && draft.record.find(name).is_some_and(|n| n.parent.is_none());
    if whole && !request.whole_tree {
        let text =
            format!("{} is a root: deleting it with its descendants deletes the whole tree", quoted(name));
        return Err(Error::new(ErrorKind::NotConfirmed, text).hint("say --yes-everything if that is meant"));
    }
    let before = draft.record.current.clone();
    let gone = draft.delete_nodes(name, request.mode)?;
    let going: Vec<String> = gone.iter().map(|n| n.name.clone()).collect();
    let after = draft.record.current.clone();
    if before != after {
        match after.as_ref().and_then(|c| draft.record.find(c)).cloned() {
            Some(current) => {
                for of in draft.record.disks.clone() {
                    if of.active.is_none() {
                        continue;
                    }
                    // A disk that the node does not have goes on as it is, unless what it stands on goes.
                    let storage = match current.storage_of(&of.name) {
                        Some(storage) => Some(storage.clone()),
                        None => below_going(draft, &of.name, &going)?,
                    };
                    if let Some(storage) = storage {
                        let (files, created) = (&request.files, request.created);
                        let discard = Unsaved::Discard;
                        draft.move_head(files, &current, &of.name, &storage, &discard, created, &going)?;
                    }
                }
            }
            None => {
                for of in draft.record.disks.clone() {
                    if of.active.is_some() {
                        let active = draft.active(&of.name)?;
                        draft.lock(active)?;
                        draft.drop_state(active, &going)?;
                    }
                }
                draft.record.disks.iter_mut().for_each(|d| d.active = None);
            }
        }
    }
    drop_states(draft, &gone, &going)
}

/// The first image below the active one of `disk` that stays, if the one that this stands on goes.
fn below_going(draft: &Draft<'_>, disk: &str, going: &[String]) -> Result<Option<Storage>> {
    let goes = draft.files_going(going);
    let chain = draft.tree.survey.chain(draft.active(disk)?)?;
    let mut first = true;
    for file in chain.into_iter().skip(1) {
        let entry = draft.entry(file)?;
        let stays =
            !goes.contains(&entry.stat.id) || draft.states_in(file).iter().any(|(.., at)| at.is_none());
        match (stays, first) {
            (true, true) => return Ok(None),
            (true, false) => {
                let file = draft.tree.catalog.name_of(draft.disk, &entry.path)?;
                return Ok(Some(Storage::External { file }));
            }
            (false, _) => first = false,
        }
    }
    Ok(None)
}

/// The states of `gone` go: whole files where nothing in them stays, else their snapshots or their active state.
fn drop_states(draft: &mut Draft<'_>, gone: &[NodeRecord], going: &[String]) -> Result<()> {
    let mut active: BTreeSet<usize> = BTreeSet::new();
    let mut inside: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for storage in gone.iter().flat_map(|n| &n.storage).map(|(_, s): &(String, Storage)| s) {
        let Some(place) = draft.tree.place(draft.disk, storage) else { continue };
        // Another node may have the same state.
        if draft.states_in(place.file).iter().any(|(_, _, at)| *at == place.snapshot) {
            continue;
        }
        match place.snapshot {
            Some(at) => {
                inside.entry(place.file).or_default().insert(at);
            }
            None => {
                active.insert(place.file);
            }
        }
    }
    let kept: BTreeSet<usize> =
        draft.record.disks.iter().filter_map(|d| draft.tree.file(draft.disk, d.active.as_deref()?)).collect();
    let mut whole: BTreeSet<usize> = BTreeSet::new();
    for &file in active.iter().chain(inside.keys()) {
        let entry = draft.entry(file)?;
        let all_inside = inside.get(&file).map_or(0, BTreeSet::len) == entry.snapshots.len();
        let stays = draft.states_in(file).iter().any(|(_, _, at)| at.is_none());
        if all_inside && !kept.contains(&file) && !stays {
            whole.insert(file);
        }
    }
    let ids: BTreeSet<FileId> = whole
        .iter()
        .chain(&active)
        .filter_map(|&i| Some(draft.tree.survey.files.get(i)?.stat.id))
        .chain(draft.removed.iter().copied())
        .collect();
    refuse_readers(draft, &whole, &active, &ids)?;
    // Leaves first: what is left at any time is whole chains.
    let mut order: Vec<usize> = whole.iter().copied().collect();
    order
        .sort_by_key(|&file| std::cmp::Reverse(draft.tree.survey.chain(file).map_or(0, |chain| chain.len())));
    for file in order {
        if !draft.removed.contains(&draft.entry(file)?.stat.id) {
            draft.remove_file(file)?;
        }
    }
    for (file, all) in inside {
        if !whole.contains(&file) {
            for at in all {
                draft.drop_inner(file, at, true)?;
            }
        }
    }
    for file in active {
        if !whole.contains(&file) && !kept.contains(&file) {
            draft.drop_state(file, going)?;
        }
    }
    Ok(())
}

/// Refuses to let go what something reads that stays.
fn refuse_readers(
    draft: &Draft<'_>,
    whole: &BTreeSet<usize>,
    active: &BTreeSet<usize>,
    ids: &BTreeSet<FileId>,
) -> Result<()> {
    let survey = &draft.tree.survey;
    let survivors = survey.files.iter().map(|f| f.stat.id).chain(survey.broken.iter().map(|b| b.id));
    let reach = Reach::of(survivors.filter(|id| !ids.contains(id)), &survey.reads());
    for &file in whole.iter().chain(active) {
        let entry = draft.entry(file)?;
        refuse_unknown_readers(survey, entry, ids)?;
        let readers = reach.needed_by(&entry.stat.id);
        if !readers.is_empty() {
            return Err(still_read(survey, entry, &readers));
        }
    }
    Ok(())
}
