//! Disks, as a snapshot lists them and as a domain has them.

use crate::error::{DocumentError, Problem};
use crate::xml::{ElementId, Xml};

/// What a snapshot does with a disk.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DiskMode {
    /// The disk takes no part.
    No,
    /// The state is inside the qcow2 file, under the snapshot's name.
    Internal,
    /// The file is frozen, and a new one on top takes what is written later.
    External,
    /// Somebody else keeps the state.
    Manual,
}

impl DiskMode {
    /// libvirt's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Internal => "internal",
            Self::External => "external",
            Self::Manual => "manual",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Self::No, Self::Internal, Self::External, Self::Manual].into_iter().find(|mode| mode.word() == word)
    }
}

/// What kind of thing a disk's data are in.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum SourceKind {
    /// A file.
    File,
    /// A block device of the host.
    Block,
    /// Something reached over a network.
    Network,
    /// What only domains can have, and snapshots do not: a directory, a volume, a PCI device.
    Other,
}

/// Where a disk's data are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    /// What kind of thing.
    pub kind: SourceKind,
    /// The path of a file or block device; the protocol, a colon and the name of something on a network. `None`
    /// where libvirt is to choose, and for an empty drive.
    pub path: Option<String>,
}

/// One entry of a snapshot's list of disks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Disk {
    /// The name of the disk in the domain (`vda`), or the path of its source.
    pub name: String,
    /// What the snapshot does with it; `None` where that is left to libvirt.
    pub mode: Option<DiskMode>,
    /// The file that takes what is written **after** the snapshot; not the one with its state, which is the
    /// source of the disk in the snapshot's [`domain`](crate::Facts::domain).
    pub overlay: Source,
    /// The format of that file, if it is given.
    pub format: Option<String>,
    /// Whether an external deletion was cut short here.
    pub delete_in_progress: bool,
}

/// A disk of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DomainDisk {
    /// Its name (`vda`).
    pub target: String,
    /// `disk`, `cdrom`, `floppy` or `lun`.
    pub device: String,
    /// Where its data are. In a snapshot's domain that is the frozen file, which has the snapshot's state.
    pub source: Source,
    /// The format, if it is given.
    pub format: Option<String>,
    /// What snapshots do with it unless they say otherwise.
    pub snapshot: Option<DiskMode>,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// The backing files that are listed, the nearest first; empty where there is no list, which means nothing.
    pub backing: Vec<Source>,
}

impl DomainDisk {
    /// What a snapshot does with this disk if neither it nor the domain says anything else.
    pub fn mode_or(&self, default: DiskMode) -> DiskMode {
        if self.source.path.is_none() {
            return DiskMode::No;
        }
        self.snapshot.unwrap_or(if self.read_only { DiskMode::No } else { default })
    }
}

/// Formats that libvirt knows; a snapshot may name any of them.
const FORMATS: &[&str] = &[
    "raw", "dir", "bochs", "cloop", "dmg", "iso", "vpc", "vdi", "fat", "vhd", "ploop", "cow", "qcow",
    "qcow2", "qed", "vmdk",
];

/// Reads an entry of `disks` or `revertDisks`.
pub(crate) fn disk(xml: &Xml, id: ElementId, keeps_progress: bool) -> Result<Disk, DocumentError> {
    let fail = |id, problem| Err(xml.error(id, problem));
    let Some(name) = xml.attribute(id, "name").filter(|name| !name.is_empty()) else {
        return fail(id, Problem::Missing { what: "the attribute name of a <disk>".into() });
    };
    let value = |what: &str, value: String, allowed: &str| Problem::Value {
        what: format!("{what} of the disk {name:?}"),
        value,
        allowed: allowed.into(),
    };
    let mode = xml.attribute(id, "snapshot");
    let mut mode = match mode {
        None => None,
        Some(word) => match DiskMode::of(&word) {
            Some(mode) => Some(mode),
            None => return fail(id, value("snapshot", word, "may be no, internal, external or manual")),
        },
    };
    let kind = match xml.attribute(id, "type").as_deref() {
        None | Some("file") => SourceKind::File,
        Some("block") => SourceKind::Block,
        Some("network") => SourceKind::Network,
        Some(other) => return fail(id, value("type", other.into(), "may be file, block or network")),
    };
    let source = xml.child(id, "source");
    let path = source.and_then(|source| path_of(xml, source, kind));
    if let (Some(path), Some(source)) = (&path, source)
        && kind != SourceKind::Network
        && !path.starts_with('/')
    {
        return fail(source, value("source", path.clone(), "must be an absolute path"));
    }
    let driver = xml.child(id, "driver");
    let format = driver.and_then(|driver| xml.attribute(driver, "type"));
    if let (Some(driver), Some(format)) = (driver, &format)
        && !FORMATS.contains(&format.as_str())
    {
        let allowed = format!("may be one of {}", FORMATS.join(" "));
        return fail(driver, value("driver type", format.clone(), &allowed));
    }
    if mode.is_none() && (path.is_some() || format.is_some()) {
        mode = Some(DiskMode::External);
    }
    if let (Some(path), Some(found), Some(source)) = (&path, mode, source)
        && found != DiskMode::External
    {
        let why = format!(
            "file {path:?} for disk {name:?} requires use of external snapshot mode, not {}",
            found.word()
        );
        return fail(source, Problem::Disks { why });
    }
    let delete_in_progress = keeps_progress && xml.child(id, "snapshotDeleteInProgress").is_some();
    Ok(Disk { name, mode, overlay: Source { kind, path }, format, delete_in_progress })
}

/// Reads a disk of a domain.
pub(crate) fn domain_disk(xml: &Xml, id: ElementId) -> Result<DomainDisk, DocumentError> {
    let target = xml.child(id, "target").and_then(|target| xml.attribute(target, "dev"));
    let Some(target) = target.filter(|target| !target.is_empty()) else {
        return Err(xml.error(id, Problem::Missing { what: "<target dev=…> of a disk of the domain".into() }));
    };
    let snapshot = match xml.attribute(id, "snapshot") {
        None => None,
        Some(word) => match DiskMode::of(&word) {
            Some(mode) => Some(mode),
            None => {
                let what = format!("snapshot of the domain's disk {target:?}");
                let allowed = "may be no, internal, external or manual".into();
                return Err(xml.error(id, Problem::Value { what, value: word, allowed }));
            }
        },
    };
    let mut backing = Vec::new();
    let mut at = xml.child(id, "backingStore");
    while let Some(store) = at {
        // An empty one ends the list.
        if let Some(source) = source_of(xml, store).filter(|source| source.path.is_some()) {
            backing.push(source);
        }
        at = xml.child(store, "backingStore");
    }
    Ok(DomainDisk {
        device: xml.attribute(id, "device").unwrap_or_else(|| "disk".into()),
        source: source_of(xml, id).unwrap_or(Source { kind: kind_of(xml, id), path: None }),
        format: xml.child(id, "driver").and_then(|driver| xml.attribute(driver, "type")),
        snapshot,
        read_only: xml.child(id, "readonly").is_some(),
        backing,
        target,
    })
}

fn kind_of(xml: &Xml, id: ElementId) -> SourceKind {
    match xml.attribute(id, "type").as_deref() {
        None | Some("file") => SourceKind::File,
        Some("block") => SourceKind::Block,
        Some("network") => SourceKind::Network,
        Some(_) => SourceKind::Other,
    }
}

fn source_of(xml: &Xml, id: ElementId) -> Option<Source> {
    let kind = kind_of(xml, id);
    Some(Source { kind, path: path_of(xml, xml.child(id, "source")?, kind) })
}

/// The attribute of `<source>` that has the path.
pub(crate) fn path_attribute(kind: SourceKind) -> Option<&'static str> {
    match kind {
        SourceKind::File => Some("file"),
        SourceKind::Block => Some("dev"),
        SourceKind::Network | SourceKind::Other => None,
    }
}

fn path_of(xml: &Xml, source: ElementId, kind: SourceKind) -> Option<String> {
    let path = match kind {
        SourceKind::Network => {
            let protocol = xml.attribute(source, "protocol")?;
            Some(format!("{protocol}:{}", xml.attribute(source, "name").unwrap_or_default()))
        }
        SourceKind::Other => {
            ["file", "dev", "dir", "volume", "name"].iter().find_map(|name| xml.attribute(source, name))
        }
        kind => xml.attribute(source, path_attribute(kind)?),
    };
    path.filter(|path| !path.is_empty())
}
