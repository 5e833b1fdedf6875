//! A snapshot's document, and changes to it that leave every other byte as it is.

use crate::disk::{self, Source, SourceKind};
use crate::domain::{disk_element, moved, renamed_sources, sources_of};
use crate::edit::Splice;
use crate::error::{DocumentError, Problem};
use crate::facts::{Facts, Purpose, State, facts};
use crate::xml::{ElementId, Xml, escaped, escaped_attribute};

/// A `<domainsnapshot>` that was read, and can be changed.
///
/// A change replaces the bytes of the value it changes, and no others: what this crate does not know, and how
/// the document is laid out, stays. A change that is refused has changed nothing.
#[derive(Clone, Debug)]
pub struct Snapshot {
    xml: Xml,
    purpose: Purpose,
    facts: Facts,
}

/// The elements of a snapshot, in the order in which libvirt writes them.
const ORDER: &[&str] = &[
    "name",
    "description",
    "state",
    "parent",
    "creationTime",
    "memory",
    "disks",
    "revertDisks",
    "domain",
    "inactiveDomain",
    "cookie",
    "active",
];

impl Snapshot {
    /// Reads the record of a snapshot that was taken: a file of libvirt's, or what `virsh snapshot-dumpxml`
    /// prints. Name, state and creation time must be there.
    ///
    /// # Errors
    /// The first thing that is wrong with it; see [`Problem`].
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        Self::read(bytes, Purpose::Record)
    }

    /// Reads a request to take a snapshot, as `virsh snapshot-create` takes it: everything may be left out, and
    /// what only libvirt can know (state, time, parent, domain) is not looked at.
    ///
    /// # Errors
    /// The first thing that is wrong with it; see [`Problem`].
    pub fn parse_request(bytes: &[u8]) -> Result<Self, DocumentError> {
        Self::read(bytes, Purpose::Request)
    }

    fn read(bytes: &[u8], purpose: Purpose) -> Result<Self, DocumentError> {
        let xml = Xml::parse(bytes)?;
        let facts = facts(&xml, purpose)?;
        Ok(Self { xml, purpose, facts })
    }

    /// The document, byte for byte as it was read where nothing was changed.
    pub fn text(&self) -> &str {
        self.xml.text()
    }

    /// What it says.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The name, which every record has; empty for a request without one.
    pub fn name(&self) -> &str {
        self.facts.name.as_deref().unwrap_or_default()
    }

    /// Gives the snapshot another name.
    ///
    /// # Errors
    /// [`Problem::Value`] if it is empty, or has a character that XML cannot carry.
    pub fn set_name(&mut self, name: &str) -> Result<(), DocumentError> {
        self.set_text("name", Some(name))
    }

    /// Gives the snapshot another description, or none.
    ///
    /// # Errors
    /// [`Problem::Value`] if it has a character that XML cannot carry.
    pub fn set_description(&mut self, description: Option<&str>) -> Result<(), DocumentError> {
        self.set_text("description", description.filter(|text| !text.is_empty()))
    }

    /// Changes what the machine was doing.
    ///
    /// # Errors
    /// [`Problem::Disks`] if memory is kept, which that state does not have.
    pub fn set_state(&mut self, state: State) -> Result<(), DocumentError> {
        self.set_text("state", Some(state.word()))
    }

    /// Changes when the snapshot was taken, in seconds since 1970-01-01 00:00 UTC.
    ///
    /// # Errors
    /// None for a record.
    pub fn set_created(&mut self, seconds: i64) -> Result<(), DocumentError> {
        self.set_text("creationTime", Some(&seconds.to_string()))
    }

    /// Makes this the current snapshot, or not; `None` leaves it open, as in documents that libvirt prints.
    ///
    /// # Errors
    /// None for a record.
    pub fn set_current(&mut self, current: Option<bool>) -> Result<(), DocumentError> {
        self.set_text("active", current.map(|current| if current { "1" } else { "0" }))
    }

    /// Lets the snapshot stand on another one, or on none.
    ///
    /// # Errors
    /// [`Problem::Value`] if the name has a character that XML cannot carry.
    pub fn set_parent(&mut self, parent: Option<&str>) -> Result<(), DocumentError> {
        let root = self.xml.root();
        let old = self.xml.child(root, "parent");
        let parent = parent.filter(|name| !name.is_empty());
        if self.purpose == Purpose::Record && parent == self.facts.parent.as_deref() {
            return Ok(());
        }
        let splice = match (old, parent) {
            (None, None) => return Ok(()),
            (Some(old), None) => self.xml.removal(old),
            (None, Some(name)) => {
                let unit = self.indent();
                let name = self.escaped("the name of the parent", name)?;
                self.insertion(
                    "parent",
                    &format!("<parent>\n{unit}{unit}<name>{name}</name>\n{unit}</parent>"),
                )
            }
            (Some(old), Some(name)) => match self.xml.child(old, "name") {
                Some(at) => self.content(at, &self.escaped("the name of the parent", name)?),
                None => {
                    let name = self.escaped("the name of the parent", name)?;
                    self.content(old, &format!("<name>{name}</name>"))
                }
            },
        };
        self.apply(vec![splice])
    }

    /// Replaces the list of disks, or that of overlays in use, or takes it out. Entries that are there already keep
    /// all that is in them but the path and the format.
    ///
    /// # Errors
    /// Those of [`Self::parse`] for what was put in.
    pub fn set_disks(&mut self, list: DiskList, disks: Option<&[NewDisk]>) -> Result<(), DocumentError> {
        let name = list.element();
        let old: Vec<ElementId> = self.xml.named(self.xml.root(), name).collect();
        let new = disks.map(|disks| self.written_disks(name, disks)).transpose()?;
        let mut old = old.into_iter();
        let mut splices = Vec::new();
        match (old.next(), new) {
            (None, None) => return Ok(()),
            (None, Some(new)) => splices.push(self.insertion(name, &new)),
            (Some(at), None) => splices.push(self.xml.removal(at)),
            (Some(at), Some(new)) => splices.push((self.xml.whole(at), new)),
        }
        splices.extend(old.map(|further| self.xml.removal(further)));
        self.apply(splices)
    }

    /// Puts a domain's definition in place of the snapshot's own, indented as it is. The bytes are those of a
    /// `<domain>` element that [`DomainDocument::parse`](crate::DomainDocument::parse) reads.
    ///
    /// # Errors
    /// Those of [`Self::parse`].
    pub fn set_domain(&mut self, element: &str) -> Result<(), DocumentError> {
        let splice = match self.xml.child(self.xml.root(), "domain") {
            Some(old) => (self.xml.whole(old), element.to_owned()),
            None => self.insertion("domain", element),
        };
        self.apply(vec![splice])
    }

    /// Gives files other names, wherever the snapshot names one: in its lists of disks and in its domains, backing
    /// files included. `renamed` is asked for every path of a file or block device, and answers with the new one.
    ///
    /// # Errors
    /// [`Problem::Value`] if a path is not absolute, or has a character that XML cannot carry.
    pub fn rename_files(&mut self, renamed: impl Fn(&str) -> Option<String>) -> Result<(), DocumentError> {
        let splices = renamed_sources(&self.xml, &self.sources(), renamed)?;
        self.apply(splices)
    }

    /// Says where the data of a disk are in this snapshot, and in which format if that is known: the source of
    /// that disk in its domain, the frozen file. A list of backing files of that disk goes if anything changes, and
    /// libvirt looks at the images instead.
    ///
    /// # Errors
    /// [`Problem::Missing`] if there is no domain, or no such disk of it in a file or on a block device.
    pub fn set_frozen(
        &mut self,
        target: &str,
        path: &str,
        format: Option<&str>,
    ) -> Result<(), DocumentError> {
        let root = self.xml.root();
        let mut splices = Vec::new();
        let mut found = false;
        for domain in ["domain", "inactiveDomain"].iter().filter_map(|name| self.xml.child(root, name)) {
            if let Some(disk) = disk_element(&self.xml, domain, target) {
                found = true;
                splices.extend(moved(&self.xml, disk, target, path, format)?);
            }
        }
        if !found {
            let what = format!("the disk {target:?} in the snapshot's <domain>");
            return Err(self.xml.error(root, Problem::Missing { what }));
        }
        self.apply(splices)
    }

    /// Takes out the lists of backing files of a disk; libvirt looks at the images instead.
    ///
    /// # Errors
    /// None.
    pub fn forget_backing(&mut self, target: &str) -> Result<(), DocumentError> {
        let root = self.xml.root();
        let domains = ["domain", "inactiveDomain"].iter().filter_map(|name| self.xml.child(root, name));
        let disks = domains.filter_map(|domain| disk_element(&self.xml, domain, target));
        let lists = disks.flat_map(|disk| self.xml.named(disk, "backingStore"));
        let splices = lists.map(|list| self.xml.removal(list)).collect();
        self.apply(splices)
    }

    /// All elements `<source>` that say where a disk's data are.
    fn sources(&self) -> Vec<ElementId> {
        let xml = &self.xml;
        let root = xml.root();
        let holders: Vec<ElementId> = ["disks", "revertDisks"]
            .iter()
            .flat_map(|list| xml.named(root, list))
            .flat_map(|list| xml.children(list))
            .collect();
        let mut sources: Vec<ElementId> =
            holders.iter().filter_map(|&holder| xml.child(holder, "source")).collect();
        if self.purpose == Purpose::Record {
            let domains = ["domain", "inactiveDomain"].iter().flat_map(|name| xml.named(root, name));
            sources.extend(domains.flat_map(|domain| sources_of(xml, domain)));
        }
        sources
    }

    /// A list of disks as text. Entries that are there already stay what they are, but for the path and the format.
    fn written_disks(&self, list: &str, disks: &[NewDisk]) -> Result<String, DocumentError> {
        let unit = self.indent();
        let mut text = format!("<{list}>\n");
        for disk in disks {
            let entry = match self.changed_entry(list, disk)? {
                Some(entry) => entry,
                None => self.new_entry(disk, &unit)?,
            };
            text.push_str(&format!("{unit}{unit}{entry}\n"));
        }
        text.push_str(&format!("{unit}</{list}>"));
        Ok(text)
    }

    /// The entry of that disk, with another path and format; `None` where there is none that could be changed so.
    fn changed_entry(&self, list: &str, disk: &NewDisk) -> Result<Option<String>, DocumentError> {
        let xml = &self.xml;
        let mut entries = xml.named(xml.root(), list).flat_map(|list| xml.children(list));
        let Some(old) = entries.find(|&entry| xml.attribute(entry, "name").as_deref() == Some(&disk.name))
        else {
            return Ok(None);
        };
        let read = disk::disk(xml, old, true)?;
        let is_same_kind = disk.overlay.as_ref().is_none_or(|(source, _)| source.kind == read.overlay.kind);
        if read.mode != Some(disk.mode) || !is_same_kind {
            return Ok(None);
        }
        let mut splices = Vec::new();
        if let Some((overlay, format)) = &disk.overlay
            && overlay.path != read.overlay.path
        {
            let source = xml.child(old, "source");
            let place =
                disk::path_attribute(overlay.kind).and_then(|name| xml.attribute_place(source?, name));
            let Some(place) = place else { return Ok(None) };
            splices.push((
                place,
                self.attribute("the path of a disk", overlay.path.as_deref().unwrap_or_default())?,
            ));
            let driver = xml.child(old, "driver").and_then(|driver| xml.attribute_place(driver, "type"));
            if let Some(place) = driver {
                splices.push((place, self.attribute("the format of a disk", format)?));
            }
        } else if disk.overlay.is_none() && read.overlay.path.is_some() {
            return Ok(None);
        }
        let whole = xml.whole(old);
        let tail = xml.text().len() - whole.end;
        let text = xml.spliced(splices);
        Ok(text.get(whole.start..text.len() - tail).map(str::to_owned))
    }

    fn new_entry(&self, disk: &NewDisk, unit: &str) -> Result<String, DocumentError> {
        let name = self.attribute("the name of a disk", &disk.name)?;
        let start = format!("<disk name='{name}' snapshot='{}'", disk.mode.word());
        let Some((overlay, format)) = &disk.overlay else { return Ok(start + "/>") };
        let (kind, attribute) = match overlay.kind {
            SourceKind::Block => ("block", "dev"),
            _ => ("file", "file"),
        };
        let path = self.attribute("the path of a disk", overlay.path.as_deref().unwrap_or_default())?;
        let format = self.attribute("the format of a disk", format)?;
        Ok(format!(
            "{start} type='{kind}'>\n{unit}{unit}{unit}<driver type='{format}'/>\n\
             {unit}{unit}{unit}<source {attribute}='{path}'/>\n{unit}{unit}</disk>"
        ))
    }

    fn attribute(&self, what: &str, value: &str) -> Result<String, DocumentError> {
        escaped_attribute(what, value).map_err(|problem| self.xml.error(self.xml.root(), problem))
    }

    fn set_text(&mut self, name: &str, value: Option<&str>) -> Result<(), DocumentError> {
        let old = self.xml.child(self.xml.root(), name);
        let what = format!("<{name}>");
        let splice = match (old, value) {
            (None, None) => return Ok(()),
            (Some(old), None) => self.xml.removal(old),
            (None, Some(value)) => {
                let value = self.escaped(&what, value)?;
                self.insertion(name, &format!("<{name}>{value}</{name}>"))
            }
            (Some(old), Some(value)) => {
                if self.xml.content(old) == value {
                    return Ok(());
                }
                self.content(old, &self.escaped(&what, value)?)
            }
        };
        self.apply(vec![splice])
    }

    fn escaped(&self, what: &str, value: &str) -> Result<String, DocumentError> {
        escaped(what, value).map_err(|problem| self.xml.error(self.xml.root(), problem))
    }

    /// New content for an element.
    fn content(&self, at: ElementId, content: &str) -> Splice {
        match self.xml.inner(at) {
            Some(inner) => (inner, content.to_owned()),
            None => {
                let name = self.xml.name(at);
                (self.xml.whole(at), format!("<{name}>{content}</{name}>"))
            }
        }
    }

    /// Puts a new element at its place in the order of elements, on a line of its own.
    fn insertion(&self, name: &str, element: &str) -> Splice {
        let root = self.xml.root();
        let unit = self.indent();
        let place = ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len());
        let earlier = ORDER.get(..place).unwrap_or_default();
        let before = self.xml.children(root).filter(|&child| earlier.contains(&self.xml.name(child))).last();
        let at = before.map(|before| self.xml.whole(before).end);
        match (at, self.xml.inner(root)) {
            (Some(at), _) => (at..at, format!("\n{unit}{element}")),
            (None, Some(inner)) => {
                let is_empty = inner.is_empty();
                let end = if is_empty { "\n" } else { "" };
                (inner.start..inner.start, format!("\n{unit}{element}{end}"))
            }
            (None, None) => {
                let whole = self.xml.whole(root);
                let tag = self.text().get(whole.clone()).unwrap_or_default();
                let tag = tag.strip_suffix("/>").unwrap_or(tag).trim_end();
                (whole, format!("{tag}>\n{unit}{element}\n</{}>", self.xml.name(root)))
            }
        }
    }

    /// What the elements of the document are indented by.
    fn indent(&self) -> String {
        let first = self.xml.children(self.xml.root()).next();
        let before = first.and_then(|first| self.text().get(..self.xml.whole(first).start));
        let line = before.and_then(|before| before.rsplit_once('\n')).map(|(_, line)| line);
        match line {
            Some(line) if line.chars().all(|c| c == ' ' || c == '\t') => line.to_owned(),
            _ => "  ".into(),
        }
    }

    fn apply(&mut self, splices: Vec<Splice>) -> Result<(), DocumentError> {
        *self = Self::read(self.xml.spliced(splices).as_bytes(), self.purpose)?;
        Ok(())
    }
}

/// One of the two lists of disks.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum DiskList {
    /// `<disks>`: what the snapshot does with each disk.
    Disks,
    /// `<revertDisks>`: the overlays in use, of a current snapshot that has children.
    RevertDisks,
}

impl DiskList {
    fn element(self) -> &'static str {
        match self {
            Self::Disks => "disks",
            Self::RevertDisks => "revertDisks",
        }
    }
}

/// An entry for a list of disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// The name of the disk in the domain.
    pub name: String,
    /// What the snapshot does with it.
    pub mode: crate::DiskMode,
    /// The file that takes what is written after the snapshot, and its format; of external disks only.
    pub overlay: Option<(Source, String)>,
}
