//! A catalog held against its images: what they say is believed, what only it knows is kept.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

use pleach_image::escape;
use pleach_lineage::{Kind, NodeRecord, Record, Storage, order};
use pleach_store::Disk;

use crate::Result;
use crate::catalog::Catalog;
use crate::naming::{Names, first_free, name_of_bytes, snapshot_options};
use crate::survey::{Backing, FileFormat, Survey, SurveyFile};
use crate::tree::{Inside, Missing};

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Reconciled {
    /// What is now in the record and was not before, a line each.
    pub(crate) differences: Vec<String>,
    /// What the record names and is not there.
    pub(crate) missing: Vec<Missing>,
    /// The snapshots of the files that the record names, as far as they were looked at.
    pub(crate) inside: HashMap<usize, Inside>,
}

/// Lets the record of `catalog` say what the images say: ids and names of internal snapshots, snapshots and overlays that
/// it does not know, parents that backing files contradict, and an active image that was frozen by an overlay. What hangs
/// together with `seeds`, by disk, counts as if the record named it.
///
/// # Errors
/// What the system says.
pub(crate) fn reconcile(
    disk: &dyn Disk,
    survey: &Survey,
    catalog: &mut Catalog,
    seeds: &[(String, PathBuf)],
) -> Result<Reconciled> {
    let mut names = BTreeMap::new();
    for file in catalog.record.files() {
        names.insert(file.to_owned(), survey.find(disk, &catalog.path_of(file)));
    }
    let mut look = Look {
        disk,
        survey,
        catalog,
        names,
        owners: BTreeMap::new(),
        active: BTreeMap::new(),
        inside: HashMap::new(),
        forgotten: BTreeMap::new(),
        seeds,
        names_of: OnceCell::new(),
        taken: None,
        root: None,
        found: Reconciled::default(),
    };
    look.resolve();
    look.forget();
    look.adopt()?;
    look.thaw()?;
    look.correct_parents();
    look.remember_formats();
    Ok(look.found)
}

struct Look<'a> {
    disk: &'a dyn Disk,
    survey: &'a Survey,
    catalog: &'a mut Catalog,
    /// The record's file names, and the files that they lead to.
    names: BTreeMap<String, Option<usize>>,
    /// The node whose active state a file holds.
    owners: BTreeMap<usize, String>,
    /// The disk whose active image a file is.
    active: BTreeMap<usize, String>,
    /// The node of an internal snapshot, by file and index.
    inside: HashMap<(usize, usize), String>,
    /// States that are to be no nodes: by file and index of the snapshot; and the node on which the active state of
    /// such a file stands.
    forgotten: BTreeMap<(usize, Option<usize>), Option<String>>,
    seeds: &'a [(String, PathBuf)],
    /// What states are called that have no name yet, once one is needed.
    names_of: OnceCell<Names>,
    /// The names of nodes, once a new one is needed.
    taken: Option<HashSet<String>>,
    /// In a new catalog, the node of the first disk's root image: the root images of the other disks are its too.
    root: Option<String>,
    found: Reconciled,
}

impl<'a> Look<'a> {
    fn record(&mut self) -> &mut Record {
        &mut self.catalog.record
    }

    fn entry(&self, file: usize) -> Option<&'a SurveyFile> {
        self.survey.files.get(file)
    }

    fn note(&mut self, text: String) {
        self.found.differences.push(text);
    }

    fn lost(&mut self, node: Option<&str>, disk: &str, what: String) {
        let lost = Missing { node: node.map(str::to_owned), disk: disk.to_owned(), what };
        let of = node.map_or_else(|| "the active head".to_owned(), quoted);
        self.found.differences.push(format!("{} of {of} is missing", lost.what));
        self.found.missing.push(lost);
    }

    /// Finds every state that the record names.
    fn resolve(&mut self) {
        let mut nodes = std::mem::take(&mut self.record().nodes);
        let survey = self.survey;
        let table = |file: usize| survey.files.get(file).map(|f| &f.snapshots[..]).unwrap_or_default();
        // What each node names by id and name, in order; that is no other node's under another name.
        let mut found: Vec<Option<(usize, usize)>> = Vec::new();
        for storage in nodes.iter().flat_map(|n| &n.storage).map(|(_, s)| s) {
            if let Storage::Internal { snapshot, id, .. } = storage
                && let Some(file) = self.names.get(storage.file()).copied().flatten()
            {
                let known = self.found.inside.entry(file).or_default();
                found.push(known.find(id, snapshot, table(file)).map(|at| (file, at)));
            }
        }
        let all_found = found.iter().all(Option::is_some);
        let taken: HashSet<_> = found.iter().flatten().filter(|_| !all_found).copied().collect();
        let mut found = found.into_iter();
        for node in &mut nodes {
            for (disk, storage) in &mut node.storage {
                let file = self.names.get(storage.file()).copied().flatten();
                match (file, storage) {
                    (None, storage) => {
                        let what = format!("the file \"{}\"", escape(storage.file().as_bytes()));
                        self.lost(Some(&node.name), disk, what);
                    }
                    (Some(file), Storage::External { .. }) => {
                        // Of several nodes with one state, the current one counts.
                        let is_current = self.catalog.record.current.as_ref() == Some(&node.name);
                        let owner = self.owners.entry(file).or_insert_with(|| node.name.clone());
                        if is_current {
                            owner.clone_from(&node.name);
                        }
                    }
                    (Some(file), Storage::Internal { snapshot, id, file: shown }) => {
                        let exact = found.next().flatten().map(|(_, at)| at);
                        let known = self.found.inside.entry(file).or_default();
                        let at = exact.or_else(|| {
                            let like = known.find_like((id, snapshot), node.created, table(file));
                            like.filter(|&at| !taken.contains(&(file, at)))
                        });
                        let Some(at) = at else {
                            let what = format!("snapshot \"{snapshot}\" in \"{}\"", escape(shown.as_bytes()));
                            self.lost(Some(&node.name), disk, what);
                            continue;
                        };
                        if exact.is_none()
                            && let Some(record) = table(file).get(at)
                        {
                            let (name, other) = (escape(&record.name), escape(&record.id));
                            self.found.differences.push(format!(
                                "the snapshot of {} in \"{}\" is \"{name}\" (id {other}), not \"{snapshot}\" (id {id})",
                                quoted(&node.name),
                                escape(shown.as_bytes())
                            ));
                            (*snapshot, *id) = (name, other);
                        }
                        self.inside.insert((file, at), node.name.clone());
                    }
                }
            }
        }
        self.record().nodes = nodes;
        for at in self.catalog.record.disks.clone() {
            let Some(active) = at.active else { continue };
            match self.names.get(&active).copied().flatten() {
                Some(file) => {
                    self.active.insert(file, at.name);
                }
                None => {
                    let what = format!("the file \"{}\"", escape(active.as_bytes()));
                    self.lost(None, &at.name, what);
                }
            }
        }
    }

    /// Finds the states that the catalog was told to forget; those that are not there are forgotten for good.
    fn forget(&mut self) {
        let mut forgotten = std::mem::take(&mut self.record().forgotten);
        forgotten.retain(|(_, storage)| {
            let Some(file) = self.names.get(storage.file()).copied().flatten() else { return false };
            let at = match storage {
                Storage::External { .. } => None,
                Storage::Internal { snapshot, id, .. } => {
                    let table = self.survey.files.get(file).map(|f| &f.snapshots[..]).unwrap_or_default();
                    let same = |s: &pleach_format::SnapshotRecord| {
                        escape(&s.id) == *id && escape(&s.name) == *snapshot
                    };
                    let Some(at) = table.iter().position(same) else { return false };
                    Some(at)
                }
            };
            self.forgotten.insert((file, at), None);
            true
        });
        self.record().forgotten = forgotten;
    }

    /// The node that the backing file of `file` is, or stands on where that is to be no node.
    fn below(&self, file: usize) -> Option<String> {
        match self.entry(file)?.backing {
            Backing::File(b) => match self.forgotten.get(&(b, None)) {
                Some(stands_on) => stands_on.clone(),
                None => self.owners.get(&b).cloned(),
            },
            _ => None,
        }
    }

    /// The disk of every file that hangs together with those of the record.
    fn reachable(&self) -> BTreeMap<usize, String> {
        let mut disks: BTreeMap<usize, String> = self.active.clone();
        for node in &self.catalog.record.nodes {
            for (disk, storage) in &node.storage {
                if let Some(file) = self.names.get(storage.file()).copied().flatten() {
                    disks.entry(file).or_insert_with(|| disk.clone());
                }
            }
        }
        for (disk, path) in self.seeds {
            if let Some(file) = self.survey.find(self.disk, path) {
                disks.insert(file, disk.clone());
            }
        }
        let mut left: Vec<usize> = disks.keys().copied().collect();
        while let Some(file) = left.pop() {
            let Some((entry, disk)) = self.entry(file).zip(disks.get(&file).cloned()) else { continue };
            let below = match entry.backing {
                Backing::File(b) => Some(b),
                _ => None,
            };
            for next in entry.dependents.iter().copied().chain(below) {
                if let std::collections::btree_map::Entry::Vacant(slot) = disks.entry(next) {
                    slot.insert(disk.clone());
                    left.push(next);
                }
            }
        }
        disks
    }

    /// Takes in snapshots and images that the record does not know.
    fn adopt(&mut self) -> Result<()> {
        let disks = self.reachable();
        let by_path: BTreeMap<_, usize> =
            disks.keys().filter_map(|&i| Some((self.entry(i)?.path.as_path(), i))).collect();
        let ids: Vec<_> = by_path.values().filter_map(|&i| Some(self.entry(i)?.stat.id)).collect();
        for id in order::backing_first(ids, &self.survey.reads()) {
            let Some(file) = self.survey.find_id(id) else { continue };
            if let Some(disk) = disks.get(&file) {
                self.adopt_file(file, disk)?;
            }
        }
        Ok(())
    }

    fn adopt_file(&mut self, file: usize, disk: &str) -> Result<()> {
        let Some(entry) = self.entry(file) else { return Ok(()) };
        let shown = self.catalog.name_of(self.disk, &entry.path)?;
        let below = self.below(file);
        let known = (0..entry.snapshots.len()).any(|at| {
            self.inside.contains_key(&(file, at)) || self.forgotten.contains_key(&(file, Some(at)))
        });
        // The parent of the first snapshot that is new, and that snapshot; what stood there stands on the last one then.
        let mut moved: Option<Option<String>> = None;
        let mut last = below;
        let mut guessed = false;
        for (at, snapshot) in entry.snapshots.iter().enumerate() {
            if let Some(name) = self.inside.get(&(file, at)) {
                last = Some(name.clone());
                moved = None;
                continue;
            }
            if self.forgotten.contains_key(&(file, Some(at))) {
                continue;
            }
            moved.get_or_insert_with(|| last.clone());
            let (plain, id) = (escape(&snapshot.name), escape(&snapshot.id));
            let storage = Storage::Internal { file: shown.clone(), snapshot: plain.clone(), id };
            let parent = last.clone();
            let name = match self.joins(&name_of_bytes(&snapshot.name), disk) {
                Some(name) => {
                    if let Some(node) = self.record().find_mut(&name) {
                        node.storage.push((disk.to_owned(), storage));
                    }
                    name
                }
                None => {
                    let name = self.new_name(file, Some(at));
                    self.record().nodes.push(NodeRecord {
                        parent,
                        parent_guessed: guessed,
                        created: Some(snapshot.date_seconds.into()),
                        storage: vec![(disk.to_owned(), storage)],
                        ..NodeRecord::new(name.clone(), Kind::Snapshot)
                    });
                    name
                }
            };
            self.note(format!(
                "the snapshot \"{plain}\" in \"{}\" was not known: it is now {}",
                escape(shown.as_bytes()),
                quoted(&name)
            ));
            self.inside.insert((file, at), name.clone());
            last = Some(name);
            guessed = true;
        }
        if let Some(first) = moved {
            self.stand_on_new(file, first.as_deref(), last.as_deref());
        }
        // The active state of a file of which only snapshots are known is nobody's, unless somebody reads it. So is a raw
        // file that nothing is backed by.
        if let Some(stands_on) = self.forgotten.get_mut(&(file, None)) {
            *stands_on = last;
            return Ok(());
        }
        let read = !entry.dependents.is_empty();
        if self.has_state(file) || !read && (known || entry.format == FileFormat::Raw) {
            return Ok(());
        }
        let kind = if entry.dependents.is_empty() { Kind::Head } else { Kind::Snapshot };
        self.add_node(file, disk, kind, last, guessed)?;
        Ok(())
    }

    /// Whether the active state of a file is a node's, or a disk's.
    fn has_state(&self, file: usize) -> bool {
        self.owners.contains_key(&file) || self.active.contains_key(&file)
    }

    /// Makes a node of a file's active state.
    fn add_node(
        &mut self,
        file: usize,
        disk: &str,
        kind: Kind,
        parent: Option<String>,
        parent_guessed: bool,
    ) -> Result<String> {
        let path = self.entry(file).map(|f| f.path.clone()).unwrap_or_default();
        let shown = self.catalog.name_of(self.disk, &path)?;
        let is_root = self.catalog.is_new() && kind == Kind::Snapshot && parent.is_none();
        let root = self.root.clone().filter(|_| is_root);
        if let Some(node) = root.and_then(|root| self.record().find_mut(&root))
            && node.storage_of(disk).is_none()
        {
            let name = node.name.clone();
            node.storage.push((disk.to_owned(), Storage::External { file: shown.clone() }));
            self.note(format!(
                "the image \"{}\" was not known: it is now the state of disk {disk} in {}",
                escape(shown.as_bytes()),
                quoted(&name)
            ));
            self.names.insert(shown, Some(file));
            self.owners.insert(file, name.clone());
            return Ok(name);
        }
        let name = self.new_name(file, None);
        self.note(format!(
            "the image \"{}\" was not known: it is now {}",
            escape(shown.as_bytes()),
            quoted(&name)
        ));
        self.names.insert(shown.clone(), Some(file));
        self.owners.insert(file, name.clone());
        let storage = vec![(disk.to_owned(), Storage::External { file: shown })];
        let node = NodeRecord { parent, parent_guessed, storage, ..NodeRecord::new(name.clone(), kind) };
        self.record().nodes.push(node);
        if is_root {
            self.root.get_or_insert_with(|| name.clone());
        }
        Ok(name)
    }

    /// A snapshot of the same name on another disk, to which a new one on `disk` belongs.
    fn joins(&mut self, name: &str, disk: &str) -> Option<String> {
        let node = self.taken().contains(name).then(|| self.catalog.record.find(name)).flatten()?;
        let elsewhere = node.storage.iter().any(|(_, s)| matches!(s, Storage::Internal { .. }));
        (elsewhere && node.storage_of(disk).is_none()).then(|| node.name.clone())
    }

    /// A free name for a new node: the one that it has without a catalog, if no other node has got that.
    fn new_name(&mut self, file: usize, snapshot: Option<usize>) -> String {
        let names = self.names_of.get_or_init(|| {
            let group = self.reachable().into_keys().collect();
            Names::of(self.survey, self.catalog.base(), &[group])
        });
        let mut options = match snapshot {
            None => vec![names.node(file).to_owned()],
            Some(at) => vec![names.snapshot(file, at).to_owned()],
        };
        let entry = self.survey.files.get(file);
        let full = entry.map(|f| name_of_bytes(f.path.file_name().unwrap_or_default().as_encoded_bytes()));
        match snapshot.and_then(|at| entry?.snapshots.get(at)) {
            Some(snapshot) => options.extend(snapshot_options(names.node(file), snapshot, true)),
            None => options.extend(full),
        }
        let taken = self.taken();
        let name = first_free(options, |name| taken.contains(name));
        taken.insert(name.clone());
        name
    }

    /// The names that a new node cannot have.
    fn taken(&mut self) -> &mut HashSet<String> {
        let nodes = &self.catalog.record.nodes;
        self.taken.get_or_insert_with(|| nodes.iter().map(|node| node.name.clone()).collect())
    }

    /// The active state of `file` stood on `first`, between which and it there are new snapshots, up to `last`.
    fn stand_on_new(&mut self, file: usize, first: Option<&str>, last: Option<&str>) {
        let last = last.map(str::to_owned);
        if let Some(owner) = self.owners.get(&file).cloned() {
            if let Some(node) = self.record().find_mut(&owner)
                && node.parent.as_deref() == first
            {
                (node.parent, node.parent_guessed) = (last, true);
            }
        } else if self.active.contains_key(&file) {
            let record = self.record();
            if record.current.as_deref() == first || record.current.is_none() {
                record.current = last;
            }
        }
    }

    /// An active image that something stands on is no head any more: the only end of what stands on it is.
    fn thaw(&mut self) -> Result<()> {
        for (file, disk) in self.active.clone() {
            let Some(entry) = self.entry(file).filter(|f| !f.dependents.is_empty()) else { continue };
            let current = self.record().current.clone();
            let frozen = self.add_node(file, &disk, Kind::Snapshot, current, false)?;
            let mut ends = BTreeSet::new();
            let mut left = entry.dependents.clone();
            let mut seen = BTreeSet::from([file]);
            while let Some(at) = left.pop() {
                let Some(entry) = self.entry(at).filter(|_| seen.insert(at)) else { continue };
                // What stands on the file directly was taken in when the file was nobody's.
                if let Some(owner) = self.owners.get(&at).cloned()
                    && entry.backing == Backing::File(file)
                    && let Some(node) = self.record().find_mut(&owner)
                    && node.parent.is_none()
                {
                    node.parent = Some(frozen.clone());
                }
                if entry.dependents.is_empty() {
                    ends.insert(at);
                }
                left.extend(&entry.dependents);
            }
            let only = ends.first().copied().filter(|_| ends.len() == 1);
            let end = only.and_then(|at| self.owners.get(&at).cloned().map(|name| (at, name)));
            let active = match end {
                Some((at, name)) => {
                    let node = self.record().find(&name).cloned();
                    self.record().nodes.retain(|n| n.name != name);
                    self.owners.remove(&at);
                    self.active.insert(at, disk.clone());
                    self.record().current = node.as_ref().and_then(|n| n.parent.clone());
                    self.note(format!("{} is the active image of disk {disk} now", quoted(&name)));
                    node.and_then(|n| n.storage_of(&disk).map(|s| s.file().to_owned()))
                }
                None => {
                    self.record().current = Some(frozen);
                    self.note(format!(
                        "disk {disk} has no active image: several images stand on the one it had"
                    ));
                    None
                }
            };
            self.active.remove(&file);
            if let Some(record) = self.record().disks.iter_mut().find(|d| d.name == disk) {
                record.active = active;
            }
        }
        Ok(())
    }

    /// The record says which of its files are raw; those that are not there stay what they were.
    fn remember_formats(&mut self) {
        let record = &self.catalog.record;
        let raw = record.files().into_iter().filter(|&file| {
            match self.names.get(file).copied().flatten().and_then(|at| self.entry(at)) {
                Some(found) => found.format == FileFormat::Raw,
                None => record.raw.contains(file),
            }
        });
        let raw = raw.map(str::to_owned).collect();
        self.record().raw = raw;
    }

    /// A node stands on the node whose file backs its own. Of several disks, those that take no part in a snapshot go on
    /// elsewhere when that becomes current: then the catalog knows better.
    fn correct_parents(&mut self) {
        let one_disk = self.catalog.record.disks.len() == 1;
        let many = !one_disk && !self.catalog.is_new();
        if many && self.catalog.record.current.is_some() {
            return;
        }
        // What the images of each node stand on.
        let mut suggested: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (&file, name) in self.owners.iter().filter(|_| !many) {
            if let Some(on) = self.below(file) {
                suggested.entry(name.clone()).or_default().push(on);
            }
        }
        let current = &self.catalog.record.current;
        let mut heads: Vec<String> = self
            .active
            .keys()
            .filter_map(|&file| self.below(file))
            .filter(|on| current.as_ref() != Some(on))
            .collect();
        // None may be current; unless all agree, that is so.
        if many && (heads.len() < self.active.len() || heads.windows(2).any(|two| two.first() != two.last()))
        {
            heads.clear();
        }
        // The parent that is known stays if the image of any disk bears it out.
        for node in &self.catalog.record.nodes {
            if suggested.is_empty() {
                break;
            }
            let fits = |on: &Vec<String>| node.parent.as_ref().is_some_and(|parent| on.contains(parent));
            if suggested.get(&node.name).is_some_and(fits) {
                suggested.remove(&node.name);
            }
        }
        if suggested.is_empty() && heads.is_empty() {
            return;
        }
        let mut parents: HashMap<String, Option<String>> =
            self.catalog.record.nodes.iter().map(|n| (n.name.clone(), n.parent.clone())).collect();
        let above = |parents: &HashMap<String, Option<String>>, from: Option<&str>, wanted: &str| {
            let mut at = from;
            for _ in 0..=parents.len() {
                match at {
                    Some(name) if name == wanted => return true,
                    Some(name) => at = parents.get(name).and_then(Option::as_deref),
                    None => break,
                }
            }
            false
        };
        for (name, all) in suggested {
            let parent = parents.get(&name).cloned().flatten();
            if all.iter().any(|on| above(&parents, parent.as_deref(), on)) {
                continue;
            }
            let Some(on) = all.into_iter().next() else { continue };
            if on == name || above(&parents, Some(&on), &name) {
                self.note(format!(
                    "{} should stand on {}, which stands on it: the catalog is kept",
                    quoted(&name),
                    quoted(&on)
                ));
                continue;
            }
            self.note(format!("{} stands on {}, as its backing file says", quoted(&name), quoted(&on)));
            parents.insert(name.clone(), Some(on.clone()));
            if let Some(node) = self.record().find_mut(&name) {
                (node.parent, node.parent_guessed) = (Some(on), false);
            }
        }
        for on in heads {
            let current = self.record().current.clone();
            if above(&parents, current.as_deref(), &on) {
                continue;
            }
            if one_disk || current.is_none() {
                self.note(format!("{} is current, as the active image's backing file says", quoted(&on)));
                self.record().current = Some(on);
            }
        }
    }
}

/// A node's name for people.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", escape(name.as_bytes()))
}
