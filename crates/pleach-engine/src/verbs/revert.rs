//! Going back to a node, on all of its disks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pleach_image::Image;
use pleach_lineage::{Kind, NodeRecord, Storage};
use pleach_store::{Access, Disk, Role};

use super::{Draft, Job, is_raw};
use crate::reconcile::quoted;
use crate::tree::Tree;
use crate::{Error, ErrorKind, Result};

/// What becomes of the changes since the last snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Unsaved {
    /// There must be none.
    #[default]
    Refuse,
    /// They are lost.
    Discard,
    /// They are kept as a snapshot of this name.
    SaveAs(String),
}

/// Where to go back to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RevertRequest {
    /// The node.
    pub name: String,
    /// What becomes of the changes since the last snapshot.
    pub unsaved: Unsaved,
    /// When, in seconds since the Epoch; for the snapshot that keeps the changes.
    pub created: i64,
    /// The new active images, by disk; a bare name is beside the one that is active now.
    pub files: BTreeMap<String, PathBuf>,
}

/// Plans going back.
///
/// A disk that the node does not have stays as it is. An external node gets a new active image over its file; an
/// internal one is applied in place, or copied into a new image where the active state of its file is still needed.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a node that is not there, or not whole; [`ErrorKind::NotConfirmed`] if there are changes
/// and nobody said what becomes of them; what is in use, read by others, or there already.
pub fn revert(disk: &dyn Disk, tree: &Tree, request: &RevertRequest) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = tree.resolve(&request.name)?;
    tree.must_be_whole(&name)?;
    draft.check_disks(request.files.keys())?;
    let node = draft.record.find(&name).cloned();
    let node = node.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such node"))?;
    if let Some(idle) = request.files.keys().find(|d| node.storage_of(d).is_none()) {
        let text = format!("{} has no state of disk {}", quoted(&name), quoted(idle));
        return Err(Error::new(ErrorKind::Usage, text));
    }
    let mut changed = Vec::new();
    for (of, _) in &node.storage {
        if draft.record.disk(of).is_some_and(|d| d.active.is_some()) {
            let active = draft.active(of)?;
            draft.lock(active)?;
            if has_changes(&draft, of, active)? {
                changed.push(of.clone());
            }
        }
    }
    match &request.unsaved {
        Unsaved::Refuse if !changed.is_empty() => {
            let disks: Vec<String> = changed.iter().map(|d| quoted(d)).collect();
            let text = format!("there are changes since the last snapshot on disk {}", disks.join(", "));
            return Err(Error::new(ErrorKind::NotConfirmed, text)
                .hint("say --discard to lose them, or --save-as NAME to keep them as a snapshot"));
        }
        Unsaved::SaveAs(save) => draft.check_new_name(save)?,
        _ => {}
    }
    if node.kind == Kind::Head {
        draft.drop_node(&name);
    }
    let mut saved = Vec::new();
    for (of, storage) in &node.storage {
        let keep =
            draft.move_head(&request.files, &node, of, storage, &request.unsaved, request.created, &[])?;
        saved.extend(keep.map(|storage| (of.clone(), storage)));
    }
    let before = draft.record.current.clone();
    draft.record.current = if node.kind == Kind::Head { node.parent.clone() } else { Some(name.clone()) };
    if let Unsaved::SaveAs(save) = &request.unsaved {
        draft.record.nodes.push(NodeRecord {
            parent: before,
            created: Some(request.created),
            state: Some("shutoff".to_owned()),
            storage: saved,
            ..NodeRecord::new(save.clone(), Kind::Snapshot)
        });
    }
    draft.finish(format!("revert to {}", quoted(&name)))
}

/// Whether the active image of a disk says something that current does not.
fn has_changes(draft: &Draft<'_>, disk: &str, active: usize) -> Result<bool> {
    let entry = draft.entry(active)?;
    if is_raw(entry) {
        return Ok(true);
    }
    let wrap = |e| Error::image(&entry.path, e);
    let store = draft
        .disk
        .open(&entry.path, Access::Read)
        .map_err(|e| Error::io("open the image", &entry.path, e))?;
    store.lock(Role::Read).map_err(|e| Error::locked(&entry.path, e))?;
    let image = Image::open(store).map_err(wrap)?;
    let targets = |l1: &[pleach_format::L1Entry]| -> Vec<u64> {
        let mut all: Vec<u64> = l1.iter().map(|e| e.with_copied(false).0).collect();
        while all.last() == Some(&0) {
            all.pop();
        }
        all
    };
    let now = targets(image.l1());
    let current = draft.record.current.as_ref().and_then(|c| draft.record.find(c));
    let place = current.and_then(|c| c.storage_of(disk)).and_then(|s| draft.tree.place(draft.disk, s));
    match place {
        Some(place) if place.file == active => {
            let Some(record) = place.snapshot.and_then(|at| entry.snapshots.get(at)) else { return Ok(true) };
            let (l1, size) = image.snapshot_l1(record).map_err(wrap)?;
            Ok(size != image.size() || targets(&l1) != now)
        }
        // An overlay that says nothing reads as what it stands on, if it is as long.
        Some(place) => {
            let below = draft.entry(place.file)?;
            let size = below.header.as_ref().map_or(below.stat.len.next_multiple_of(512), |h| h.size());
            let over = entry.backing == crate::survey::Backing::File(place.file);
            Ok(!over || place.snapshot.is_some() || size != image.size() || !now.is_empty())
        }
        None => Ok(true),
    }
}

impl Draft<'_> {
    /// Lets the active image of `disk` stand on `storage` of `node`. `going` are nodes that the same operation removes.
    /// Returns where the changes since the last snapshot are kept, if they are.
    #[expect(clippy::too_many_arguments, reason = "the parts of one decision, each used")]
    pub(super) fn move_head(
        &mut self,
        files: &BTreeMap<String, PathBuf>,
        node: &NodeRecord,
        disk: &str,
        storage: &Storage,
        unsaved: &Unsaved,
        created: i64,
        going: &[String],
    ) -> Result<Option<Storage>> {
        let place = self.place(&node.name, storage)?;
        let had = self.record.disk(disk).and_then(|d| d.active.clone());
        let old = match &had {
            Some(_) => Some(self.active(disk)?),
            None => None,
        };
        let beside = old.unwrap_or(place.file);
        let in_place = place.snapshot.filter(|_| self.is_free(place.file, old, going));
        let (active, kept) = match (place.snapshot, in_place) {
            // Another branch's end becomes the active one.
            (None, _) if node.kind == Kind::Head => {
                if files.contains_key(disk) {
                    let text = format!("{} is a head: it needs no new file", quoted(&node.name));
                    return Err(Error::new(ErrorKind::Usage, text));
                }
                (storage.file().to_owned(), self.leave(old, unsaved, created, going)?)
            }
            (None, _) => {
                let path = self.choose_file(files, disk, beside, &node.name)?;
                (self.overlay(&path, place.file)?, self.leave(old, unsaved, created, going)?)
            }
            (Some(at), None) => {
                let path = self.choose_file(files, disk, beside, &node.name)?;
                (self.copy(&path, place.file, at)?, self.leave(old, unsaved, created, going)?)
            }
            (Some(at), Some(_)) => {
                if files.contains_key(disk) {
                    let text = format!("a file was given for disk {}, which needs none", quoted(disk));
                    return Err(Error::new(ErrorKind::Usage, text).hint(
                        "the snapshot is applied in place: nothing else needs the active state of its image",
                    ));
                }
                self.check_can_apply(place.file)?;
                let kept = match unsaved {
                    Unsaved::SaveAs(save) if old == Some(place.file) => {
                        Some(self.take_inside(place.file, save, created)?)
                    }
                    _ if old == Some(place.file) => None,
                    _ => self.leave(old, unsaved, created, going)?,
                };
                self.apply(place.file, at, false)?;
                (storage.file().to_owned(), kept)
            }
        };
        if let Some(record) = self.record.disks.iter_mut().find(|d| d.name == disk) {
            record.active = Some(active);
        }
        Ok(kept)
    }

    /// Whether the active state of `file` is nobody's, or only the changes that `old`, the active image, holds.
    fn is_free(&self, file: usize, old: Option<usize>, going: &[String]) -> bool {
        let nodes = self.states_in(file);
        let owned = nodes.iter().any(|(node, _, at)| at.is_none() && !going.iter().any(|g| g == node));
        let other = |d: &pleach_lineage::DiskRecord| {
            d.active.as_deref().and_then(|a| self.tree.file(self.disk, a)) == Some(file)
        };
        let active = Some(file) != old && self.record.disks.iter().any(other);
        !owned && !active && self.readers(file).is_ok_and(|r| r.is_empty())
    }

    /// The active image `old` of a disk is not active any more: its changes are kept as a node's, or go.
    fn leave(
        &mut self,
        old: Option<usize>,
        unsaved: &Unsaved,
        created: i64,
        going: &[String],
    ) -> Result<Option<Storage>> {
        let Some(old) = old else { return Ok(None) };
        let entry = self.entry(old)?;
        let shown = self.tree.catalog.name_of(self.disk, &entry.path)?;
        if let Unsaved::SaveAs(_) = unsaved {
            return Ok(Some(Storage::External { file: shown }));
        }
        if !self.tree.is_recorded(&shown) {
            // The catalog did not know it: somebody else made it.
            let path = self.tree.catalog.path_of(&shown);
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let taken = |name: &str| self.record.find(name).is_some();
            let name = crate::tree::free_name(&stem, taken).unwrap_or(stem);
            let of = self.record.disks.iter().find(|d| d.active.as_deref() == Some(&shown));
            let of = of.map(|d| d.name.clone()).unwrap_or_default();
            self.warnings.push(format!("{} stays: the catalog did not know it", quoted(&shown)));
            self.record.nodes.push(NodeRecord {
                parent: self.record.current.clone(),
                created: Some(created),
                storage: vec![(of, Storage::External { file: shown })],
                ..NodeRecord::new(name, Kind::Head)
            });
            return Ok(None);
        }
        self.drop_state(old, going)?;
        Ok(None)
    }

    /// The active state of `file` is not needed any more: the file goes, or only that state where snapshots in it stay.
    pub(super) fn drop_state(&mut self, file: usize, going: &[String]) -> Result<()> {
        let ids: Vec<_> = self.files_going(going);
        self.nobody_reads(file, &ids)?;
        let entry = self.entry(file)?;
        let stays = |at: usize| {
            let before = self.states_of(&self.tree.catalog.record, file);
            let of = before.into_iter().find(|(_, _, inside)| *inside == Some(at));
            of.is_none_or(|(node, ..)| !going.iter().any(|g| g == node))
        };
        match (0..entry.snapshots.len()).rev().find(|&at| stays(at)) {
            None => self.remove_file(file),
            // The last snapshot takes its place, so that what only it had is given back. Bitmaps cannot follow: it stays.
            Some(at) => match self.check_can_apply(file) {
                Ok(()) => self.apply(file, at, true),
                Err(error) if error.kind == ErrorKind::Refused => Ok(()),
                Err(error) => Err(error),
            },
        }
    }

    /// The files whose active state belongs to nodes that go.
    pub(super) fn files_going(&self, going: &[String]) -> Vec<pleach_store::FileId> {
        let nodes = self.tree.catalog.record.nodes.iter().filter(|n| going.contains(&n.name));
        let storage = nodes.flat_map(|n| &n.storage).map(|(_, s)| s);
        let places = storage.filter_map(|s| self.tree.place(self.disk, s)).filter(|p| p.snapshot.is_none());
        places.filter_map(|p| Some(self.tree.survey.files.get(p.file)?.stat.id)).collect()
    }
}
