//! Taking a snapshot of all disks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use pleach_lineage::{Kind, NodeRecord, Storage};
use pleach_store::Disk;

use super::{Draft, Job, is_raw};
use crate::reconcile::quoted;
use crate::tree::Tree;
use crate::{Error, ErrorKind, Result};

/// Where the state of a disk is kept.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum TakeKind {
    /// The active image is frozen, and a new one over it becomes active.
    External,
    /// A snapshot inside the active image.
    Internal,
}

/// A snapshot to be taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakeRequest {
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// When, in seconds since the Epoch.
    pub created: i64,
    /// How every disk is kept. `None`: internal where the active image holds internal snapshots, else external.
    pub kind: Option<TakeKind>,
    /// How single disks are kept, by name.
    pub kinds: BTreeMap<String, TakeKind>,
    /// Only these disks take part; none named: all.
    pub disks: BTreeSet<String>,
    /// The new active images, by disk; a bare name is beside the one that is active now.
    pub files: BTreeMap<String, PathBuf>,
}

/// Plans a snapshot.
///
/// # Errors
/// A name that is taken, or that no node may have; a disk without an active image; files that are there already; images
/// that are in use or cannot hold internal snapshots.
pub fn take(disk: &dyn Disk, tree: &Tree, request: &TakeRequest) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = &request.name;
    draft.check_new_name(name)?;
    let named = request.kinds.keys().chain(&request.disks).chain(request.files.keys());
    draft.check_disks(named)?;
    let takes_part = |disk: &str| request.disks.is_empty() || request.disks.contains(disk);
    if let Some(idle) = request.files.keys().chain(request.kinds.keys()).find(|d| !takes_part(d)) {
        let text = format!("disk {} takes no part in the snapshot", quoted(idle));
        return Err(Error::new(ErrorKind::Usage, text));
    }
    let disks: Vec<String> = draft.record.disks.iter().map(|d| d.name.clone()).collect();
    let mut storage = Vec::new();
    for disk in disks.iter().filter(|d| takes_part(d)) {
        let active = draft.active(disk)?;
        let entry = draft.entry(active)?;
        let default = match request.files.contains_key(disk) || is_raw(entry) || entry.snapshots.is_empty() {
            true => TakeKind::External,
            false => TakeKind::Internal,
        };
        let kind = request.kinds.get(disk).copied().or(request.kind).unwrap_or(default);
        draft.lock(active)?;
        match kind {
            TakeKind::Internal => {
                if request.files.contains_key(disk) {
                    let text = format!("a file was given for disk {}, which needs none", quoted(disk));
                    return Err(Error::new(ErrorKind::Usage, text)
                        .hint("an internal snapshot lies in the active image"));
                }
                storage.push((disk.clone(), draft.take_inside(active, name, request.created)?));
            }
            TakeKind::External => {
                let path = draft.choose_file(&request.files, disk, active, name)?;
                let new = draft.overlay(&path, active)?;
                draft.carry_bitmaps(&draft.real(&path)?, active)?;
                let old = draft.record.disks.iter_mut().find(|d| d.name == *disk);
                let file = old.and_then(|d| d.active.replace(new)).unwrap_or_default();
                storage.push((disk.clone(), Storage::External { file }));
            }
        }
    }
    if storage.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "the tree has no disk of which a snapshot could be taken"));
    }
    let parent = draft.record.current.replace(name.clone());
    draft.record.nodes.push(NodeRecord {
        parent,
        created: Some(request.created),
        description: request.description.clone(),
        state: Some("shutoff".to_owned()),
        storage,
        ..NodeRecord::new(name.clone(), Kind::Snapshot)
    });
    draft.finish(format!("snapshot {}", quoted(name)))
}
