//! What only the catalog says: names, notes, what is current.

use pleach_image::escape;
use pleach_lineage::{DeleteMode, Storage};
use pleach_store::Disk;

use super::{Act, Draft, Job};
use crate::naming::is_inside;
use crate::reconcile::quoted;
use crate::steps::Step;
use crate::tree::Tree;
use crate::{Error, ErrorKind, Result};

/// Plans another name for a node. Snapshots inside images are renamed with it where the node was named after them; files
/// are not.
///
/// # Errors
/// A name that is taken, or that no node may have; [`ErrorKind::NotFound`].
pub fn rename(disk: &dyn Disk, tree: &Tree, name: &str, to: &str) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = tree.resolve(name)?;
    let what = format!("rename {} to {}", quoted(&name), quoted(to));
    if name == to {
        return draft.finish(what);
    }
    draft.check_new_name(to)?;
    let node = draft.record.find(&name).cloned();
    let node = node.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such node"))?;
    let mut storage = node.storage.clone();
    for (_, storage) in &mut storage {
        let Some(place) = tree.place(disk, storage) else { continue };
        if let Storage::Internal { file, snapshot, id } = storage
            && is_inside(&draft.entry(place.file)?.path, snapshot, id, &name)
            && let Some(at) = place.snapshot
        {
            let inner = draft.inner(place.file, at)?;
            draft.lock(place.file)?;
            draft.acts.push(Act::Relabel {
                file: draft.entry(place.file)?.path.clone(),
                from: snapshot.clone(),
                to: escape(to.as_bytes()),
            });
            draft.steps.push(Step::relabel(inner, to.as_bytes()));
            let (file, id) = (file.clone(), id.clone());
            *storage = Storage::Internal { file, snapshot: escape(to.as_bytes()), id };
        }
    }
    for other in &mut draft.record.nodes {
        if other.name == name {
            other.name = to.to_owned();
            other.storage.clone_from(&storage);
        }
        if other.parent.as_deref() == Some(&name) {
            other.parent = Some(to.to_owned());
        }
    }
    if draft.record.current.as_deref() == Some(&name) {
        draft.record.current = Some(to.to_owned());
    }
    draft.finish(what)
}

/// Plans another description of a node.
///
/// # Errors
/// [`ErrorKind::NotFound`].
pub fn note(disk: &dyn Disk, tree: &Tree, name: &str, text: &str) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = tree.resolve(name)?;
    if let Some(node) = draft.record.find_mut(&name) {
        text.clone_into(&mut node.description);
    }
    draft.finish(format!("describe {}", quoted(&name)))
}

/// Plans that a node is current: only the catalog says so, and the active images stay what they are.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::Refused`] if the active images stand on something else, as their backing files
/// say.
pub fn make_current(disk: &dyn Disk, tree: &Tree, name: &str) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = tree.resolve(name)?;
    let (lineage, _) = tree.lineage()?;
    let id = lineage.find(&name);
    for of in &tree.catalog.record.disks {
        let Some(active) = of.active.as_deref().and_then(|a| tree.file(disk, a)) else { continue };
        let Some(crate::survey::Backing::File(below)) =
            tree.survey.files.get(active).map(|f| f.backing.clone())
        else {
            continue;
        };
        let owners = draft.states_in(below);
        let Some((owner, ..)) = owners.iter().find(|(.., inside)| inside.is_none()) else { continue };
        let owner_id = lineage.find(owner);
        let stands =
            id == owner_id || id.is_some_and(|id| lineage.ancestors(id).any(|at| Some(at) == owner_id));
        if !stands {
            let text = format!(
                "the active image of disk {} stands on {}, so {} cannot be current",
                quoted(&of.name),
                quoted(owner),
                quoted(&name)
            );
            return Err(Error::new(ErrorKind::Refused, text)
                .hint(format!("to go back to it: pleach revert TARGET {}", quoted(&name))));
        }
    }
    draft.record.current = Some(name.clone());
    draft.finish(format!("make {} current", quoted(&name)))
}

/// Plans that the catalog forgets nodes, and no image changes.
///
/// # Errors
/// [`ErrorKind::NotFound`].
pub fn forget(disk: &dyn Disk, tree: &Tree, name: &str, mode: DeleteMode) -> Result<Job> {
    let mut draft = Draft::new(disk, tree)?;
    let name = tree.resolve(name)?;
    let gone = draft.delete_nodes(&name, mode)?;
    for node in gone {
        draft.record.forgotten.extend(node.storage);
    }
    draft.finish(format!("forget {}", quoted(&name)))
}
