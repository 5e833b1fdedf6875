//! The tree of one machine: its catalog, held against its images. Where they differ, the images are believed.
//!
//! A [`Tree`] is found by [`Tree::load`], or made from images that no catalog describes by [`Tree::adopt`]. Its record is
//! then what verbs plan with; it differs from the file on disk by what [`Tree::differences`] says, until it is saved.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use pleach_format::SnapshotRecord;
use pleach_image::escape;
use pleach_lineage::{DiskRecord, Kind, Lineage, Node, NodeId, Record, Storage};
use pleach_store::{Disk, FileId};

use crate::catalog::Catalog;
use crate::family::{Family, State};
use crate::journal::directory_of;
use crate::naming::{Candidate, first_free, meant, name_of_bytes};
use crate::reconcile::{Reconciled, quoted};
use crate::survey::{Survey, Trust};
use crate::{Error, ErrorKind, Result};

/// A catalog and the images that it is about.
#[derive(Debug)]
pub struct Tree {
    /// What is known, after the images were looked at. Nothing of it is on disk before it is saved.
    pub catalog: Catalog,
    /// The images.
    pub survey: Survey,
    /// Where the catalog's file says something else than the images, or nothing: for people, a line each.
    pub differences: Vec<String>,
    /// Files and snapshots that the catalog names and that are not there.
    pub missing: Vec<Missing>,
    /// Active files that the catalog's file names.
    recorded: BTreeSet<String>,
    /// The record's file names, and the files that they lead to.
    files: HashMap<String, Option<usize>>,
    /// Internal snapshots of those files, by id and name as records have them: their places in the tables.
    inside: HashMap<usize, Inside>,
}

/// The snapshots inside one file. There may be very many.
#[derive(Debug, Default)]
pub(crate) struct Inside {
    /// Places in the snapshot table, by id and name; made when it is needed.
    order: OnceLock<Vec<usize>>,
    unique: OnceLock<Unique>,
    /// The place that was found last: often the next one is wanted next.
    last: AtomicUsize,
}

/// Places of names, and of ids, in a snapshot table; `None` for those that several have.
#[derive(Debug, Default)]
struct Unique {
    by_name: HashMap<String, Option<usize>>,
    by_id: HashMap<String, Option<usize>>,
}

/// As [`escape`], without a copy of what is plain.
fn escaped(bytes: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(bytes) {
        Ok(text) if text.bytes().all(|b| b.is_ascii_graphic() && b != b'\\' || b == b' ') => {
            Cow::Borrowed(text)
        }
        _ => Cow::Owned(escape(bytes)),
    }
}

/// Orders by id, shorter ones first as numbers are, and by name.
fn compare(snapshot: &SnapshotRecord, id: &str, name: &str) -> Ordering {
    let own = escaped(&snapshot.id);
    own.len().cmp(&id.len()).then_with(|| (*own).cmp(id)).then_with(|| (*escaped(&snapshot.name)).cmp(name))
}

impl Inside {
    fn order(&self, table: &[SnapshotRecord]) -> &[usize] {
        self.order.get_or_init(|| {
            let mut order: Vec<usize> = (0..table.len()).collect();
            order.sort_by(|&a, &b| match (table.get(a), table.get(b)) {
                (Some(a), Some(b)) => compare(a, &escaped(&b.id), &escaped(&b.name)),
                _ => Ordering::Equal,
            });
            order
        })
    }

    fn unique(&self, table: &[SnapshotRecord]) -> &Unique {
        self.unique.get_or_init(|| {
            let mut all = Unique::default();
            for (at, snapshot) in table.iter().enumerate() {
                let (id, name) = (escape(&snapshot.id), escape(&snapshot.name));
                all.by_name.entry(name).and_modify(|one| *one = None).or_insert(Some(at));
                all.by_id.entry(id).and_modify(|one| *one = None).or_insert(Some(at));
            }
            all
        })
    }

    /// The one of `table` with that id and that name.
    pub(crate) fn find(&self, id: &str, name: &str, table: &[SnapshotRecord]) -> Option<usize> {
        let is = |at: usize| table.get(at).is_some_and(|s| compare(s, id, name).is_eq());
        let next = self.last.load(Relaxed).wrapping_add(1);
        // A second one of the same id and name is not meant.
        let first = |at: usize| at == 0 || !is(at.wrapping_sub(1));
        let found = if is(next) && first(next) {
            next
        } else {
            let order = self.order(table);
            let at = order.partition_point(|&at| table.get(at).is_some_and(|s| compare(s, id, name).is_lt()));
            order.get(at).copied().filter(|&at| is(at))?
        };
        self.last.store(found, Relaxed);
        Some(found)
    }

    /// The same; else the one of `table` that has another id or name since, and is the same by the date `created`. QEMU gives
    /// ids again, so that one with only the id, or only the name, is another snapshot. Another name needs a date without a
    /// fraction of a second, as snapshots taken here have: those of QEMU, which renames none, have one.
    pub(crate) fn find_like(
        &self,
        (id, name): (&str, &str),
        created: Option<i64>,
        table: &[SnapshotRecord],
    ) -> Option<usize> {
        let dated = |at: &usize| table.get(*at).filter(|s| created == Some(s.date_seconds.into()));
        let unique = self.unique(table);
        let by_name = unique.by_name.get(name).copied().flatten();
        // A record that knows no id goes by the name.
        let by_name = by_name.filter(|at| id.is_empty() || dated(at).is_some());
        let by_id = || unique.by_id.get(id).copied().flatten();
        let renamed = || by_id().filter(|at| dated(at).is_some_and(|s| s.date_nanoseconds == 0));
        self.find(id, name, table).or(by_name).or_else(renamed)
    }
}

/// A state that a catalog names and that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The node; `None` for the active head.
    pub node: Option<String>,
    /// The disk.
    pub disk: String,
    /// What is not there.
    pub what: String,
}

/// The state of one disk in a node, found in the images.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The file, by index into the survey.
    pub(crate) file: usize,
    /// The internal snapshot, by index into its table; `None` for the active state.
    pub(crate) snapshot: Option<usize>,
}

impl Tree {
    /// Reads the catalog at `path`, and looks at all images in its directory, in those of its files, and in `also`.
    ///
    /// # Errors
    /// As [`Catalog::load`]; a directory that cannot be read.
    pub fn load(disk: &dyn Disk, path: &Path, also: &[PathBuf], trust: &Trust) -> Result<Self> {
        let catalog = Catalog::load(disk, path)?;
        let recorded = catalog.record.disks.iter().filter_map(|d| d.active.clone()).collect();
        Self::of(disk, catalog, recorded, &[], also, trust)
    }

    /// Makes a tree of images that no catalog describes: the machine's disks are `disks`, by name and active image.
    /// Everything that hangs together with them by backing files becomes part of it. Nothing is written.
    ///
    /// # Errors
    /// As [`Catalog::new`]; an image that is not there or is used for two disks.
    pub fn adopt(
        disk: &dyn Disk,
        images: &Path,
        name: &str,
        disks: &[(String, PathBuf)],
        also: &[PathBuf],
        trust: &Trust,
    ) -> Result<Self> {
        let mut catalog = Catalog::new(disk, images, Record::new(name))?;
        let mut seen: Vec<FileId> = Vec::new();
        for (name, path) in disks {
            let stat = disk.stat(path).map_err(|e| Error::io("find the image", path, e))?;
            if seen.contains(&stat.id) {
                return Err(Error::new(ErrorKind::Usage, "the image is named for two disks").at(path));
            }
            seen.push(stat.id);
            let path = if disk.is_symlink(path) {
                disk.canonical(path).map_err(|e| Error::io("find the image", path, e))?
            } else {
                path.clone()
            };
            let file = catalog.name_of(disk, &path)?;
            catalog.record.disks.push(DiskRecord::new(name.clone(), Some(file)));
        }
        catalog.record.check().map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))?;
        let mut tree = Self::of(disk, catalog, BTreeSet::new(), &[], also, trust)?;
        if let Some(missing) = tree.missing.first() {
            let text = format!("{} is no image that can be read", missing.what);
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        // Here they were asked for by name.
        tree.recorded = tree.catalog.record.disks.iter().filter_map(|d| d.active.clone()).collect();
        Ok(tree)
    }

    /// As [`adopt`](Self::adopt) with everything that hangs together with an image, for a disk of which nobody knows which
    /// image is active: `seed` is the disk and the image.
    ///
    /// # Errors
    /// As [`adopt`](Self::adopt).
    pub fn adopt_branches(
        disk: &dyn Disk,
        images: &Path,
        tree: &str,
        seed: (String, PathBuf),
        also: &[PathBuf],
        trust: &Trust,
    ) -> Result<Self> {
        let mut catalog = Catalog::new(disk, images, Record::new(tree))?;
        catalog.record.disks.push(DiskRecord::new(seed.0.clone(), None));
        Self::of(disk, catalog, BTreeSet::new(), &[seed], also, trust)
    }

    fn of(
        disk: &dyn Disk,
        mut catalog: Catalog,
        recorded: BTreeSet<String>,
        seeds: &[(String, PathBuf)],
        also: &[PathBuf],
        trust: &Trust,
    ) -> Result<Self> {
        let mut directories = vec![catalog.base().to_owned()];
        let files = catalog.record.files().into_iter().map(|f| directory_of(&catalog.path_of(f)));
        let also = also.iter().map(|dir| disk.canonical(dir).unwrap_or_else(|_| dir.clone()));
        for dir in files.chain(also).collect::<Vec<_>>() {
            if !directories.contains(&dir) && disk.stat(&dir).is_ok() {
                directories.push(dir);
            }
        }
        let mut survey = Survey::of_directories(disk, &directories, trust)?;
        let named: Vec<PathBuf> = catalog.record.files().into_iter().map(|f| catalog.path_of(f)).collect();
        survey.also_raw(disk, &named);
        let Reconciled { differences, missing, mut inside } =
            crate::reconcile::reconcile(disk, &survey, &mut catalog, seeds)?;
        let names = catalog.record.files().into_iter();
        let files: HashMap<String, Option<usize>> =
            names.map(|name| (name.to_owned(), survey.find(disk, &catalog.path_of(name)))).collect();
        for &file in files.values().flatten() {
            inside.entry(file).or_default();
        }
        Ok(Self { catalog, survey, differences, missing, recorded, files, inside })
    }

    /// What the tree is called.
    pub fn name(&self) -> &str {
        &self.catalog.record.tree
    }

    /// The file that a record's file name leads to, by index into the survey.
    pub(crate) fn file(&self, disk: &dyn Disk, name: &str) -> Option<usize> {
        let known = self.files.get(name).copied();
        known.unwrap_or_else(|| self.survey.find(disk, &self.catalog.path_of(name)))
    }

    /// Where a state is; `None` if it is not there.
    pub(crate) fn place(&self, disk: &dyn Disk, storage: &Storage) -> Option<Place> {
        let file = self.file(disk, storage.file())?;
        match storage {
            Storage::External { .. } => Some(Place { file, snapshot: None }),
            Storage::Internal { snapshot, id, .. } => {
                let table = &self.survey.files.get(file)?.snapshots;
                let at = self.inside.get(&file)?.find(id, snapshot, table)?;
                Some(Place { file, snapshot: Some(at) })
            }
        }
    }

    /// Whether the catalog's file names `file` as a disk's active image: if not, it is not ours to throw away.
    pub(crate) fn is_recorded(&self, file: &str) -> bool {
        self.recorded.contains(file)
    }

    /// The name under which the active heads are shown: the first active file's stem, its file name where another file has
    /// that stem, or the next name that is free.
    pub fn head_name(&self) -> Option<String> {
        let record = &self.catalog.record;
        let active = record.disks.iter().find_map(|d| d.active.as_deref())?;
        let path = self.catalog.path_of(active);
        let others = record.files().into_iter().filter(|&file| file != active);
        let shared =
            others.map(|file| self.catalog.path_of(file)).any(|other| other.file_stem() == path.file_stem());
        let parts = [path.file_stem().filter(|_| !shared), path.file_name()];
        let parts = parts.into_iter().flatten().map(|part| name_of_bytes(part.as_encoded_bytes()));
        let taken: BTreeSet<&str> = record.nodes.iter().map(|n| n.name.as_str()).collect();
        Some(first_free(parts.collect(), |name| taken.contains(name)))
    }

    /// The hierarchy: the record's nodes, and one for the active heads, which stands on current.
    ///
    /// # Errors
    /// None in practice: the record is sound.
    pub fn lineage(&self) -> Result<(Lineage, Option<NodeId>)> {
        let record = &self.catalog.record;
        let wrap = |e: pleach_lineage::RecordError| Error::new(ErrorKind::Corrupt, e.to_string());
        let (mut lineage, _) = record.lineage().map_err(wrap)?;
        let Some(name) = self.head_name() else { return Ok((lineage, None)) };
        let storage = record
            .disks
            .iter()
            .filter_map(|d| Some((d.name.clone(), Storage::External { file: d.active.clone()? })))
            .collect();
        let node = Node { parent: lineage.current(), storage, ..Node::new(name, Kind::Head) };
        let head = lineage.insert(node)?;
        Ok((lineage, Some(head)))
    }

    /// The same, with the place of every state in the survey.
    ///
    /// # Errors
    /// As [`lineage`](Self::lineage).
    pub fn family(&self, disk: &dyn Disk) -> Result<Family> {
        let (lineage, _) = self.lineage()?;
        let mut states = BTreeMap::new();
        for id in lineage.ids() {
            let storage = lineage.get(id).map(|n| &n.storage[..]).unwrap_or_default();
            let places = storage.iter().filter_map(|(_, storage)| self.place(disk, storage));
            let found: Vec<State> = places
                .map(|p| p.snapshot.map_or(State::File(p.file), |at| State::Snapshot(p.file, at)))
                .collect();
            states.insert(id, found);
        }
        Ok(Family::of_states(lineage, states))
    }

    /// Whether the file at `path` is one of the tree's.
    pub fn has_file(&self, disk: &dyn Disk, path: &Path) -> bool {
        let Ok(stat) = disk.stat(path) else { return false };
        let files = self.catalog.record.files();
        files.into_iter().any(|f| disk.stat(&self.catalog.path_of(f)).is_ok_and(|s| s.id == stat.id))
    }

    /// The name of the node that `name` means; see [`crate::naming`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with the names that there are; [`ErrorKind::Usage`] if it may mean several.
    pub fn resolve(&self, name: &str) -> Result<String> {
        let record = &self.catalog.record;
        if !name.contains("\\x") && record.find(name).is_some() {
            return Ok(name.to_owned());
        }
        let place = |(_, storage): &'_ (String, Storage)| Cow::Owned(self.catalog.path_of(storage.file()));
        let candidates = record.nodes.iter().map(|node| {
            let states = node.storage.iter().map(|state| (place(state), &state.1)).collect();
            Candidate { name: &node.name, states }
        });
        meant(name, candidates).map(str::to_owned)
    }

    /// The node whose state is the active one of a file, or the snapshot of it at that place in the table.
    pub fn node_at(&self, disk: &dyn Disk, file: FileId, snapshot: Option<usize>) -> Option<&str> {
        let place = Place { file: self.survey.find_id(file)?, snapshot };
        let is = |(_, storage): &(String, Storage)| self.place(disk, storage) == Some(place);
        self.catalog.record.nodes.iter().find(|n| n.storage.iter().any(is)).map(|n| n.name.as_str())
    }

    /// Lets the record forget what is not there, and takes the only end of a branch for an active image that is gone. Says
    /// what was done, a line each; nothing is written.
    ///
    /// # Errors
    /// None in practice: the record is sound.
    pub fn mend(&mut self) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let wrap = |e: pleach_lineage::RecordError| Error::new(ErrorKind::Corrupt, e.to_string());
        for missing in std::mem::take(&mut self.missing) {
            let record = &mut self.catalog.record;
            let Some(name) = &missing.node else {
                let ends: Vec<String> = record
                    .nodes
                    .iter()
                    .filter(|n| n.kind == Kind::Head && n.storage_of(&missing.disk).is_some())
                    .map(|n| n.name.clone())
                    .collect();
                let end = match ends.as_slice() {
                    [only] => {
                        record.nodes.iter().position(|n| n.name == *only).map(|at| record.nodes.remove(at))
                    }
                    _ => None,
                };
                if let Some(end) = &end {
                    record.current.clone_from(&end.parent);
                    notes.push(format!("{} is taken for the active image", quoted(&end.name)));
                }
                let file =
                    end.as_ref().and_then(|n| n.storage_of(&missing.disk)).map(|s| s.file().to_owned());
                if let Some(disk) = record.disks.iter_mut().find(|d| d.name == missing.disk) {
                    disk.active = file;
                }
                continue;
            };
            let Some(node) = record.find_mut(name) else { continue };
            node.storage.retain(|(disk, _)| *disk != missing.disk);
            if !node.storage.is_empty() {
                notes.push(format!("{} has no state of disk {} any more", quoted(name), missing.disk));
                continue;
            }
            let (mut lineage, ids) = record.lineage().map_err(wrap)?;
            let Some(id) = lineage.find(name) else { continue };
            lineage.delete(id, pleach_lineage::DeleteMode::Single)?;
            let named = |id: Option<NodeId>| id.and_then(|id| lineage.get(id)).map(|n| n.name.clone());
            for (node, &at) in record.nodes.iter_mut().zip(&ids) {
                node.parent = named(lineage.parent(at));
            }
            record.current = named(lineage.current());
            record.nodes.retain(|n| n.name != *name);
            notes.push(format!("{} is forgotten: nothing of it is there", quoted(name)));
        }
        Ok(notes)
    }

    /// Refuses to work with a node of which something is missing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], naming what is missing.
    pub(crate) fn must_be_whole(&self, node: &str) -> Result<()> {
        match self.missing.iter().find(|m| m.node.as_deref() == Some(node)) {
            None => Ok(()),
            Some(missing) => {
                let text = format!(
                    "\"{}\" is not whole: {} of disk {} is missing",
                    escape(node.as_bytes()),
                    missing.what,
                    escape(missing.disk.as_bytes())
                );
                Err(Error::new(ErrorKind::NotFound, text).hint(
                    "put it back, or let the catalog forget it: pleach delete --metadata, or pleach scan --write",
                ))
            }
        }
    }
}

/// `base`, or `base-2` and so on: the first that is not taken.
pub(crate) fn free_name(base: &str, taken: impl Fn(&str) -> bool) -> Option<String> {
    let numbered = (2..u32::MAX).map(|n| format!("{base}-{n}"));
    std::iter::once(base.to_owned()).chain(numbered).find(|name| !taken(name))
}
