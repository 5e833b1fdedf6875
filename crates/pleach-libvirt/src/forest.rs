//! The records of one machine as a tree, and what is wrong with them as a whole.

use std::collections::{BTreeMap, BTreeSet};

use pleach_lineage::{Kind, Lineage, Node, Storage};

use crate::align::name_problem;
use crate::disk::{DiskMode, SourceKind};
use crate::facts::Facts;
use crate::snapshot::Snapshot;

/// What is wrong with the records of one machine taken together. libvirt drops or distorts such records when it
/// starts, and mentions it in its log at most.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForestProblem {
    /// Two records of one name; libvirt keeps whichever it meets first.
    #[error("two snapshots are named {name:?}; libvirt keeps whichever it reads first")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A name that libvirt refuses, or cannot write a file for.
    #[error("the snapshot name {name:?} is not allowed: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A parent without a record: libvirt makes the snapshot a root, and forgets which one is current.
    #[error(
        "the parent {parent:?} of {name:?} is not among the snapshots; libvirt would forget which one is current"
    )]
    DanglingParent {
        /// The snapshot.
        name: String,
        /// The parent it names.
        parent: String,
    },
    /// Snapshots that stand on each other: libvirt makes one a root, and forgets which one is current.
    #[error(
        "the snapshots {names:?} stand on each other in a circle; libvirt would forget which one is current"
    )]
    Cycle {
        /// Their names, each followed by its parent.
        names: Vec<String>,
    },
    /// Several current ones; libvirt takes the last one it reads.
    #[error("the snapshots {names:?} all claim to be current; libvirt takes whichever it reads last")]
    SeveralCurrent {
        /// Their names.
        names: Vec<String>,
    },
}

/// Everything that is wrong with the records taken together, in a fixed order.
pub fn problems(snapshots: &[Snapshot]) -> Vec<ForestProblem> {
    let mut found = Vec::new();
    let mut parents: BTreeMap<&str, Option<&str>> = BTreeMap::new();
    for snapshot in snapshots {
        let name = snapshot.name();
        if let Some(why) = name_problem(name) {
            found.push(ForestProblem::Name { name: name.into(), why });
        }
        if parents.insert(name, snapshot.facts().parent.as_deref()).is_some() {
            found.push(ForestProblem::DuplicateName { name: name.into() });
        }
    }
    for (&name, &parent) in &parents {
        if let Some(parent) = parent.filter(|parent| !parents.contains_key(parent)) {
            found.push(ForestProblem::DanglingParent { name: name.into(), parent: parent.into() });
        }
    }
    let mut done: BTreeSet<&str> = BTreeSet::new();
    for &start in parents.keys() {
        let mut path: Vec<&str> = Vec::new();
        let mut on_path: BTreeSet<&str> = BTreeSet::new();
        let mut at = Some(start);
        while let Some(name) = at.filter(|name| !done.contains(name)) {
            if !on_path.insert(name) {
                let circle = path.iter().skip_while(|one| **one != name).map(|one| (*one).into());
                found.push(ForestProblem::Cycle { names: circle.collect() });
                break;
            }
            path.push(name);
            at = parents.get(name).copied().flatten();
        }
        done.extend(path);
    }
    let current: Vec<String> = snapshots
        .iter()
        .filter(|one| one.facts().current == Some(true))
        .map(|one| one.name().into())
        .collect();
    if current.len() > 1 {
        found.push(ForestProblem::SeveralCurrent { names: current });
    }
    found
}

/// The places of the records in `snapshots`, parents before their children: the order in which libvirt takes
/// them. Those of one parent are in the order of their creation times, then of their names.
///
/// # Errors
/// All that [`problems`] finds, names apart.
pub fn parents_first(snapshots: &[Snapshot]) -> Result<Vec<usize>, Vec<ForestProblem>> {
    let mut wrong = problems(snapshots);
    wrong.retain(|problem| !matches!(problem, ForestProblem::Name { .. }));
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let mut children: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
    for (place, snapshot) in snapshots.iter().enumerate() {
        children.entry(snapshot.facts().parent.as_deref()).or_default().push(place);
    }
    let age = |&place: &usize| snapshots.get(place).map(|one| (one.facts().created, one.name()));
    for siblings in children.values_mut() {
        siblings.sort_by_key(|place| std::cmp::Reverse(age(place)));
    }
    let mut order = Vec::with_capacity(snapshots.len());
    let mut left = children.remove(&None).unwrap_or_default();
    while let Some(place) = left.pop() {
        order.push(place);
        let name = snapshots.get(place).map(Snapshot::name);
        left.extend(children.remove(&name).unwrap_or_default());
    }
    Ok(order)
}

/// The records as a tree: a node a snapshot, parents first, with the frozen files and internal snapshots that
/// hold its state, and the current one.
///
/// The ids of internal snapshots are empty: documents do not have them.
///
/// # Errors
/// As [`parents_first`].
pub fn lineage(snapshots: &[Snapshot]) -> Result<Lineage, Vec<ForestProblem>> {
    let mut tree = Lineage::new();
    let mut current = None;
    for place in parents_first(snapshots)? {
        let Some(snapshot) = snapshots.get(place) else { continue };
        let facts = snapshot.facts();
        let parent = facts.parent.as_deref().and_then(|parent| tree.find(parent));
        let node = Node { parent, ..node(snapshot.name(), facts) };
        let id = tree.insert(node).expect("names are unique, and parents came before");
        if facts.current == Some(true) {
            current = Some(id);
        }
    }
    tree.set_current(current).expect("the node was just inserted");
    Ok(tree)
}

fn node(name: &str, facts: &Facts) -> Node {
    Node {
        storage: storage(name, facts).into_iter().collect(),
        created: facts.created,
        description: facts.description.clone().unwrap_or_default(),
        state: facts.state.map(|state| state.word().into()),
        ..Node::new(name, Kind::Snapshot)
    }
}

/// Where a snapshot's state of each disk is, in the order of the disks; disks that take no part, and
/// those that are neither files nor block devices, are absent.
pub fn storage(name: &str, facts: &Facts) -> Vec<(String, Storage)> {
    let mut storage = Vec::new();
    for disk in facts.domain.iter().flat_map(|domain| &domain.disks) {
        if !matches!(disk.source.kind, SourceKind::File | SourceKind::Block) {
            continue;
        }
        let Some(file) = disk.source.path.clone() else { continue };
        let kept = match facts.mode_of(&disk.target) {
            DiskMode::No | DiskMode::Manual => continue,
            DiskMode::External => Storage::External { file },
            DiskMode::Internal => Storage::Internal { file, snapshot: name.into(), id: String::new() },
        };
        storage.push((disk.target.clone(), kept));
    }
    storage
}
