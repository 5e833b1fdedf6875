//! Between libvirt's documents and the catalog: a record of the whole tree, in which each node keeps its document.

use std::collections::{BTreeMap, BTreeSet};

use pleach_lineage::{DiskRecord, Kind, Lineage, NodeId, NodeRecord, Record, Storage};

use crate::align::name_problem;
use crate::disk::{Disk, DiskMode, DomainDisk, Source, SourceKind};
use crate::domain::DomainDocument;
use crate::error::DocumentError;
use crate::facts::{Facts, State};
use crate::forest::{ForestProblem, parents_first, storage};
use crate::snapshot::{DiskList, NewDisk, Snapshot};

/// The line of a node in the catalog that has its document.
pub const DOCUMENT_KEY: &str = "libvirt";
/// The item of the catalog that has the machine's definition.
pub const DOMAIN_KEY: &str = "libvirt-domain";

/// A record of libvirt's documents. Files are named by the paths in the documents.
///
/// A node is a snapshot, with the frozen files and internal snapshots that hold its state; its document is kept
/// word for word, with `<active>` put in if it was not there. The files that the machine writes to are those of
/// `domain`; without it those that the current snapshot says are in use. An overlay of a snapshot that nothing
/// stands on is the end of another branch if `exists` knows the file, and else one that libvirt has removed.
///
/// # Errors
/// What is wrong with the documents taken together.
pub fn import(
    tree: &str,
    snapshots: &[Snapshot],
    domain: Option<&DomainDocument>,
    exists: impl Fn(&str) -> bool,
) -> Result<Record, Vec<ForestProblem>> {
    let order = parents_first(snapshots)?;
    let ordered: Vec<&Snapshot> = order.iter().filter_map(|&place| snapshots.get(place)).collect();
    let mut record = Record::new(tree);
    let current = ordered.iter().find(|one| one.facts().current == Some(true));
    record.current = current.map(|one| one.name().to_owned());
    for snapshot in &ordered {
        let facts = snapshot.facts();
        let mut node = NodeRecord {
            parent: facts.parent.clone(),
            created: facts.created,
            description: facts.description.clone().unwrap_or_default(),
            state: facts.state.map(|state| state.word().into()),
            storage: storage(snapshot.name(), facts),
            ..NodeRecord::new(snapshot.name(), Kind::Snapshot)
        };
        let mut kept = (*snapshot).clone();
        if facts.current.is_none() && kept.set_current(Some(false)).is_err() {
            kept = (*snapshot).clone();
        }
        node.set_field(DOCUMENT_KEY, &[kept.text()]);
        record.nodes.push(node);
    }
    record.disks = disks(&ordered, domain, current.map(|one| one.facts()));
    add_heads(&mut record, &ordered, exists);
    let embedded = ordered.iter().filter_map(|one| one.facts().domain.as_ref());
    let all = domain.iter().map(|one| one.domain()).chain(embedded).flat_map(|domain| &domain.disks);
    let raw = all.filter(|disk| disk.format.as_deref() == Some("raw"));
    let named = record.files();
    let paths = raw.filter_map(|disk| disk.source.path.clone()).filter(|path| named.contains(path.as_str()));
    record.raw = paths.collect();
    if let Some(domain) = domain {
        record.set_field(DOMAIN_KEY, &[domain.text()]);
    }
    Ok(record)
}

/// The disks that any snapshot holds, and those that the machine writes to, in the machine's order.
fn disks(ordered: &[&Snapshot], domain: Option<&DomainDocument>, current: Option<&Facts>) -> Vec<DiskRecord> {
    let mut found: Vec<DiskRecord> = Vec::new();
    let is_file = |kind| matches!(kind, SourceKind::File | SourceKind::Block);
    for disk in domain.iter().flat_map(|domain| &domain.domain().disks) {
        let path = disk.source.path.clone().filter(|_| is_file(disk.source.kind));
        if let Some(path) = path.filter(|_| !disk.read_only) {
            found.push(DiskRecord::new(disk.target.clone(), Some(path)));
        }
    }
    for snapshot in ordered {
        for (name, _) in storage(snapshot.name(), snapshot.facts()) {
            if found.iter().all(|disk| disk.name != name) {
                let active = current.filter(|_| domain.is_none()).and_then(|facts| in_use(facts, &name));
                found.push(DiskRecord::new(name, active));
            }
        }
    }
    found
}

/// The file that the machine writes to, as its current snapshot says.
pub(crate) fn in_use(current: &Facts, disk: &str) -> Option<String> {
    match current.mode_of(disk) {
        DiskMode::External => overlay(current, disk),
        DiskMode::Internal => current.domain.as_ref()?.disk(disk)?.source.path.clone(),
        DiskMode::No | DiskMode::Manual => None,
    }
}

/// The overlay in use, by the snapshot's lists.
pub(crate) fn overlay(facts: &Facts, disk: &str) -> Option<String> {
    let list = facts.revert_disks.as_ref().or(facts.disks.as_ref())?;
    list.iter().find(|one| one.name == disk)?.overlay.path.clone()
}

/// Overlays of snapshots that nothing stands on: the ends of other branches.
fn add_heads(record: &mut Record, ordered: &[&Snapshot], exists: impl Fn(&str) -> bool) {
    let known: BTreeSet<String> = record.files().into_iter().map(str::to_owned).collect();
    let parents: BTreeSet<&str> = ordered.iter().filter_map(|one| one.facts().parent.as_deref()).collect();
    let mut taken: BTreeSet<String> = record.nodes.iter().map(|node| node.name.clone()).collect();
    for snapshot in ordered {
        let facts = snapshot.facts();
        if parents.contains(snapshot.name()) || record.current.as_deref() == Some(snapshot.name()) {
            continue;
        }
        let ends: Vec<(String, Storage)> = facts
            .disks
            .iter()
            .flatten()
            .filter(|disk| disk.overlay.kind != SourceKind::Network)
            .filter_map(|disk| Some((disk.name.clone(), disk.overlay.path.clone()?)))
            .filter(|(name, file)| !known.contains(file) && exists(file) && record.disk(name).is_some())
            .map(|(name, file)| (name, Storage::External { file }))
            .collect();
        let Some((_, first)) = ends.first() else { continue };
        let stem = stem_of(first.file());
        let names = std::iter::once(stem.to_owned()).chain((2..).map(|n| format!("{stem}-{n}")));
        let Some(name) = names.into_iter().find(|name| !taken.contains(name)) else { continue };
        taken.insert(name.clone());
        record.nodes.push(NodeRecord {
            parent: Some(snapshot.name().into()),
            storage: ends,
            ..NodeRecord::new(name, Kind::Head)
        });
    }
}

/// The name of a file without its directory and what follows the first dot.
fn stem_of(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

/// Documents for libvirt, and what they leave out.
#[derive(Clone, Debug)]
pub struct Export {
    /// A record a snapshot, in the order of the catalog.
    pub snapshots: Vec<Snapshot>,
    /// The machine's definition, with the files that it writes to.
    pub domain: Option<DomainDocument>,
    /// What libvirt has no place for, a line each.
    pub left_out: Vec<String>,
}

/// Why a record cannot be given to libvirt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// There is nothing to make a snapshot's `<domain>` of.
    #[error(
        "nothing says what machine {name:?} is a snapshot of, and libvirt reverts to none without a <domain>"
    )]
    NoDomain {
        /// The snapshot.
        name: String,
    },
    /// A snapshot's name that libvirt refuses.
    #[error("libvirt cannot keep a snapshot named {name:?}: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A snapshot that libvirt would refuse, or whose document cannot be read or changed.
    #[error("libvirt would not take the snapshot {name:?}: {source}")]
    Document {
        /// The snapshot.
        name: String,
        /// Why.
        source: DocumentError,
    },
    /// The machine's definition cannot be read or changed.
    #[error("the machine's definition: {0}")]
    Domain(DocumentError),
    /// The record is not sound.
    #[error(transparent)]
    Record(#[from] pleach_lineage::RecordError),
}

/// Documents that libvirt accepts, for a record whose files are named by absolute paths.
///
/// A node that came from a document keeps it: only what differs from the record is changed in it. The others get
/// one, with the `<domain>` of `domain`, or of the definition in the record, or of the nearest node that has one.
/// Every list of disks names what libvirt may later remove without harm: the file of a dependent, or one that is
/// not there. `format_of` tells the format of a file that is there.
///
/// # Errors
/// The first thing that libvirt has no place for; see [`ExportError`].
pub fn export(
    record: &Record,
    domain: Option<&DomainDocument>,
    format_of: impl Fn(&str) -> Option<String>,
) -> Result<Export, ExportError> {
    let (lineage, _) = record.lineage()?;
    let stored = match domain {
        Some(domain) => Some(domain.clone()),
        None => record
            .field(DOMAIN_KEY)
            .and_then(|words| words.into_iter().next())
            .map(|text| DomainDocument::parse(text.as_bytes()))
            .transpose()
            .map_err(ExportError::Domain)?,
    };
    let mut work = Work {
        record,
        lineage,
        domain: stored,
        format_of: &format_of,
        documents: BTreeMap::new(),
        files: record.files(),
        nodes: record.nodes.iter().map(|node| (node.name.as_str(), node)).collect(),
    };
    let mut snapshots = Vec::new();
    for node in record.nodes.iter().filter(|node| node.kind == Kind::Snapshot) {
        if let Some(why) = name_problem(&node.name) {
            return Err(ExportError::Name { name: node.name.clone(), why });
        }
        if let Some(text) = node.field(DOCUMENT_KEY).and_then(|words| words.into_iter().next()) {
            let read = Snapshot::parse(text.as_bytes()).map_err(failed(&node.name))?;
            work.documents.insert(node.name.clone(), read);
        }
    }
    for node in record.nodes.iter().filter(|node| node.kind == Kind::Snapshot) {
        snapshots.push(work.document(node)?);
    }
    let left_out = work.left_out();
    let domain = work.domain.take().map(|domain| with_active(record, domain, &format_of)).transpose();
    Ok(Export { snapshots, domain: domain.map_err(ExportError::Domain)?, left_out })
}

fn failed(name: &str) -> impl Fn(DocumentError) -> ExportError + '_ {
    |source| ExportError::Document { name: name.into(), source }
}

fn with_active(
    record: &Record,
    mut domain: DomainDocument,
    format_of: &dyn Fn(&str) -> Option<String>,
) -> Result<DomainDocument, DocumentError> {
    for disk in &record.disks {
        if let Some(active) = disk.active.as_deref()
            && domain.domain().disk(&disk.name).is_some_and(|one| one.source.path.as_deref() != Some(active))
        {
            domain.set_source(&disk.name, active, format_of(active).as_deref())?;
        }
    }
    Ok(domain)
}

/// What a list of disks says of one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    mode: DiskMode,
    overlay: Option<String>,
    kind: SourceKind,
}

struct Work<'a> {
    record: &'a Record,
    lineage: Lineage,
    domain: Option<DomainDocument>,
    format_of: &'a dyn Fn(&str) -> Option<String>,
    /// Documents as they came, by the node's name.
    documents: BTreeMap<String, Snapshot>,
    files: BTreeSet<&'a str>,
    nodes: BTreeMap<&'a str, &'a NodeRecord>,
}

impl Work<'_> {
    fn document(&self, node: &NodeRecord) -> Result<Snapshot, ExportError> {
        let mut document = match self.documents.get(&node.name) {
            Some(document) => document.clone(),
            None => self.new_document(node)?,
        };
        self.adjust(node, &mut document).map_err(failed(&node.name))?;
        document.check_redefine().map_err(failed(&node.name))?;
        Ok(document)
    }

    /// A document for a node that has none.
    fn new_document(&self, node: &NodeRecord) -> Result<Snapshot, ExportError> {
        let fail = failed(&node.name);
        let start = "<domainsnapshot>\n  <name>-</name>\n  <state>shutoff</state>\n  \
                     <creationTime>0</creationTime>\n  <memory snapshot='no'/>\n</domainsnapshot>\n";
        let mut document = Snapshot::parse(start.as_bytes()).map_err(&fail)?;
        let element =
            self.element_for(node).ok_or_else(|| ExportError::NoDomain { name: node.name.clone() })?;
        document.set_domain(element).map_err(&fail)?;
        Ok(document)
    }

    /// The definition of the machine for a node: what was given, else what the nearest other node has.
    fn element_for(&self, node: &NodeRecord) -> Option<&str> {
        if let Some(domain) = &self.domain {
            return Some(domain.element());
        }
        let id = self.lineage.find(&node.name)?;
        let below = self.lineage.descendants(id);
        let near = self.lineage.ancestors(id).chain(below).chain(self.lineage.ids());
        let documents = near.filter_map(|id| self.documents.get(&self.lineage.get(id)?.name));
        let mut spans = documents.filter_map(|one| {
            let span = one.facts().domain.as_ref()?.span.clone();
            one.text().get(span)
        });
        spans.next()
    }

    fn adjust(&self, node: &NodeRecord, document: &mut Snapshot) -> Result<(), DocumentError> {
        let facts = document.facts().clone();
        document.set_name(&node.name)?;
        document.set_description(Some(&node.description))?;
        document.set_parent(self.parent(node))?;
        if let Some(state) = node.state.as_deref().and_then(State::of)
            && facts.state != Some(state)
            // Memory that nobody has kept cannot be promised.
            && (self.documents.contains_key(&node.name) || !state.has_memory())
        {
            document.set_state(state)?;
        }
        if let Some(created) = node.created.filter(|created| Some(*created) != facts.created) {
            document.set_created(created)?;
        }
        document.set_current(Some(self.is_current(node)))?;
        for (disk, kept) in &node.storage {
            let domain = document.facts().domain.as_ref();
            let named =
                domain.and_then(|domain| domain.disk(disk)).and_then(|disk| disk.source.path.as_deref());
            if named != Some(kept.file()) {
                let format = (self.format_of)(kept.file());
                document.set_frozen(disk, kept.file(), format.as_deref())?;
            }
            self.check_backing(node, disk, document)?;
        }
        self.adjust_disks(node, document)
    }

    /// The nearest node below that libvirt can know.
    fn parent(&self, node: &NodeRecord) -> Option<&str> {
        let id = self.lineage.find(&node.name)?;
        let mut below = self.lineage.ancestors(id).filter_map(|id| self.lineage.get(id));
        below.find(|one| one.kind == Kind::Snapshot).map(|one| one.name.as_str())
    }

    fn is_current(&self, node: &NodeRecord) -> bool {
        self.record.current.as_deref() == Some(node.name.as_str())
    }

    /// Takes out a list of backing files that is not the one which the tree has.
    fn check_backing(
        &self,
        node: &NodeRecord,
        disk: &str,
        document: &mut Snapshot,
    ) -> Result<(), DocumentError> {
        let domain = document.facts().domain.as_ref();
        let listed =
            domain.and_then(|domain| domain.disk(disk)).map(|disk| disk.backing.clone()).unwrap_or_default();
        let Some(id) = self.lineage.find(&node.name).filter(|_| !listed.is_empty()) else { return Ok(()) };
        let own = node.storage_of(disk).map(Storage::file);
        let mut chain: Vec<&str> = Vec::new();
        for below in self.lineage.ancestors(id).filter_map(|id| self.lineage.get(id)) {
            let file = below.storage_of(disk).map(Storage::file);
            if let Some(file) = file.filter(|file| own != Some(file) && chain.last() != Some(file)) {
                chain.push(file);
            }
        }
        let listed = listed.iter().filter_map(|source| source.path.as_deref());
        // Files below the tree are nobody's business here.
        if !listed.take(chain.len()).eq(chain.iter().copied()) {
            document.forget_backing(disk)?;
        }
        Ok(())
    }

    /// The lists of disks as the tree has them, written only where a list says something else.
    fn adjust_disks(&self, node: &NodeRecord, document: &mut Snapshot) -> Result<(), DocumentError> {
        let facts = document.facts().clone();
        let disks: Vec<&DomainDisk> = facts.domain.iter().flat_map(|domain| &domain.disks).collect();
        let wanted: Vec<Entry> = disks.iter().map(|disk| self.entry(node, &facts, disk)).collect();
        let in_use: Vec<Entry> = disks
            .iter()
            .zip(&wanted)
            .map(|(disk, entry)| self.entry_in_use(node, &facts, disk, entry))
            .collect();
        let is_as_listed = |list: &Option<Vec<Disk>>, wanted: &[Entry]| {
            let said = |one: &Disk| (one.name.clone(), one.mode, one.overlay.path.clone());
            let listed = list.iter().flatten().map(said);
            list.is_some()
                && listed.eq(wanted.iter().map(|one| (one.name.clone(), Some(one.mode), one.overlay.clone())))
        };
        if !is_as_listed(&facts.disks, &wanted) {
            document.set_disks(DiskList::Disks, Some(&self.written(&wanted)))?;
        }
        let needs_both = in_use != wanted;
        if needs_both && !is_as_listed(&facts.revert_disks, &in_use) {
            document.set_disks(DiskList::RevertDisks, Some(&self.written(&in_use)))?;
        } else if !needs_both && facts.revert_disks.is_some() {
            document.set_disks(DiskList::RevertDisks, None)?;
        }
        Ok(())
    }

    /// What a node's list says of a disk.
    fn entry(&self, node: &NodeRecord, facts: &Facts, disk: &DomainDisk) -> Entry {
        let name = disk.target.clone();
        let old = facts.disks.iter().flatten().find(|one| one.name == name);
        let old_path = old.and_then(|old| old.overlay.path.clone());
        let (mode, overlay) = match node.storage_of(&name) {
            Some(Storage::Internal { .. }) => (DiskMode::Internal, None),
            Some(Storage::External { file }) => {
                let ends = self.dependents(node, &name);
                let fits = old_path.filter(|path| match ends.is_empty() {
                    true => !self.files.contains(path.as_str()),
                    false => ends.contains(path),
                });
                let first = || ends.first().cloned().unwrap_or_else(|| self.unused(file, &node.name));
                (DiskMode::External, Some(fits.unwrap_or_else(first)))
            }
            // A disk that the tree does not hold stays what the document says it is.
            None if self.record.disk(&name).is_none() => (facts.mode_of(&name), old_path),
            None => {
                let is_manual = old.is_some_and(|old| old.mode == Some(DiskMode::Manual));
                (if is_manual { DiskMode::Manual } else { DiskMode::No }, None)
            }
        };
        Entry { name, mode, overlay, kind: disk.source.kind }
    }

    /// The same, with the file that the machine writes to where the node is current.
    fn entry_in_use(&self, node: &NodeRecord, facts: &Facts, disk: &DomainDisk, entry: &Entry) -> Entry {
        let mut entry = entry.clone();
        if !self.is_current(node) {
            return entry;
        }
        let active = self.record.disk(&entry.name).and_then(|disk| disk.active.clone());
        let old = facts.revert_disks.iter().flatten().find(|one| one.name == entry.name);
        match (node.storage_of(&entry.name), old) {
            (Some(Storage::External { .. }), _) => entry.overlay = active.or(entry.overlay),
            // libvirt puts an overlay on disks that took no part, too.
            (None, Some(old)) => {
                entry.mode = old.mode.unwrap_or(facts.mode_of(&disk.target));
                entry.overlay = old.overlay.path.clone();
            }
            _ => {}
        }
        entry
    }

    fn written(&self, entries: &[Entry]) -> Vec<NewDisk> {
        let written = |entry: &Entry| {
            let overlay = entry.overlay.clone().map(|path| {
                let format = (self.format_of)(&path).unwrap_or_else(|| "qcow2".into());
                let is_block = entry.kind == SourceKind::Block && path.starts_with("/dev/");
                let kind = if is_block { SourceKind::Block } else { SourceKind::File };
                (Source { kind, path: Some(path) }, format)
            });
            NewDisk { name: entry.name.clone(), mode: entry.mode, overlay }
        };
        entries.iter().map(written).collect()
    }

    /// The files that stand on a node's own, in a fixed order: those of its children, then the one that the machine
    /// writes to, then the ends of other branches.
    fn dependents(&self, node: &NodeRecord, disk: &str) -> Vec<String> {
        let Some(id) = self.lineage.find(&node.name) else { return Vec::new() };
        let own = node.storage_of(disk).map(Storage::file);
        let (mut snapshots, mut heads) = (Vec::new(), Vec::new());
        let mut is_below_active = self.is_current(node);
        let mut left: Vec<NodeId> = self.lineage.children(id).iter().rev().copied().collect();
        while let Some(child) = left.pop() {
            let Some(one) = self.lineage.get(child) else { continue };
            match one.storage_of(disk) {
                // It took no part: what stands on it stands on the node.
                None => {
                    is_below_active |= self.record.current.as_deref() == Some(one.name.as_str());
                    left.extend(self.lineage.children(child).iter().rev());
                }
                Some(kept) if one.kind == Kind::Head => heads.push(kept.file().to_owned()),
                Some(kept) => snapshots.push(kept.file().to_owned()),
            }
        }
        let active = self.record.disk(disk).and_then(|disk| disk.active.clone()).filter(|_| is_below_active);
        snapshots.extend(active);
        snapshots.extend(heads);
        snapshots.retain(|file| Some(file.as_str()) != own);
        snapshots
    }

    /// A path for the overlay of a snapshot that nothing stands on: beside its file, of a name that is free.
    fn unused(&self, file: &str, name: &str) -> String {
        let directory = file.rsplit_once('/').map_or("", |(directory, _)| directory);
        let stem = stem_of(file);
        let mut paths = std::iter::once(format!("{directory}/{stem}.{name}"))
            .chain((2..).map(|n| format!("{directory}/{stem}.{name}-{n}")));
        let free = paths.find(|path| !self.files.contains(path.as_str()) && (self.format_of)(path).is_none());
        free.unwrap_or_default()
    }

    /// Ends of branches that are not the active one: libvirt knows of one, on a snapshot that nothing else stands on.
    fn left_out(&self) -> Vec<String> {
        let heads = self.record.nodes.iter().filter(|node| node.kind == Kind::Head);
        let unknown = heads.filter(|head| {
            let below = head.parent.as_deref().and_then(|parent| self.nodes.get(parent));
            !below.is_some_and(|below| {
                head.storage.iter().all(|(disk, kept)| {
                    self.dependents(below, disk).first().is_some_and(|file| file == kept.file())
                })
            })
        });
        unknown
            .map(|head| {
                format!("{:?} is the end of another branch, of which libvirt will not know", head.name)
            })
            .collect()
    }
}
