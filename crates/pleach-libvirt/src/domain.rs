//! A domain's definition: its disks are read, the rest is kept as it is.

use std::ops::Range;

use crate::disk::{self, DomainDisk};
use crate::edit::Splice;
use crate::error::{DocumentError, Problem};
use crate::xml::{ElementId, Xml, escaped_attribute};

/// What is read of a domain's definition, on its own or inside a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Domain {
    /// The machine's name.
    pub name: Option<String>,
    /// The machine's uuid, as it is spelt.
    pub uuid: Option<String>,
    /// Its disks, in the order in which libvirt lists them.
    pub disks: Vec<DomainDisk>,
    /// Its place in the document, in bytes.
    pub span: Range<usize>,
}

impl Domain {
    /// The disk of that name.
    pub fn disk(&self, target: &str) -> Option<&DomainDisk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

/// A `<domain>` document, as `virsh dumpxml --inactive` prints it, that can be changed as a
/// [`Snapshot`](crate::Snapshot) can.
#[derive(Clone, Debug)]
pub struct DomainDocument {
    xml: Xml,
    domain: Domain,
}

impl DomainDocument {
    /// Reads a document.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let xml = Xml::parse(bytes)?;
        let root = xml.root();
        if xml.name(root) != "domain" {
            let found = xml.name(root).to_owned();
            return Err(xml.error(root, Problem::WrongRoot { found, wanted: "domain" }));
        }
        let domain = domain(&xml, root)?;
        Ok(Self { xml, domain })
    }

    /// The document, byte for byte as it was read where nothing was changed.
    pub fn text(&self) -> &str {
        self.xml.text()
    }

    /// What it says.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// The element alone, without what stands around it.
    pub fn element(&self) -> &str {
        self.text().get(self.domain.span.clone()).unwrap_or_default()
    }

    /// Gives files other names, as [`Snapshot::rename_files`](crate::Snapshot::rename_files) does.
    ///
    /// # Errors
    /// [`Problem::Value`] if a path has a character that XML cannot carry.
    pub fn rename_files(&mut self, renamed: impl Fn(&str) -> Option<String>) -> Result<(), DocumentError> {
        let splices = renamed_sources(&self.xml, &sources_of(&self.xml, self.xml.root()), renamed)?;
        *self = Self::parse(self.xml.spliced(splices).as_bytes())?;
        Ok(())
    }

    /// Says where the data of a disk are, and in which format if that is known. A list of backing files of that
    /// disk goes if anything changes, and libvirt looks at the images instead.
    ///
    /// # Errors
    /// [`Problem::Missing`] if there is no such disk in a file or on a block device.
    pub fn set_source(
        &mut self,
        target: &str,
        path: &str,
        format: Option<&str>,
    ) -> Result<(), DocumentError> {
        let root = self.xml.root();
        let disk = disk_element(&self.xml, root, target).ok_or_else(|| {
            self.xml.error(root, Problem::Missing { what: format!("the disk {target:?} in the <domain>") })
        })?;
        let splices = moved(&self.xml, disk, target, path, format)?;
        *self = Self::parse(self.xml.spliced(splices).as_bytes())?;
        Ok(())
    }
}

/// The elements that say where the data of a domain's disks are, backing files included.
pub(crate) fn sources_of(xml: &Xml, domain: ElementId) -> Vec<ElementId> {
    let mut sources = Vec::new();
    for disk in disk_elements(xml, domain) {
        let stores = std::iter::successors(Some(disk), |&at| xml.child(at, "backingStore"));
        sources.extend(stores.filter_map(|holder| xml.child(holder, "source")));
    }
    sources
}

/// The changes that give files other names.
pub(crate) fn renamed_sources(
    xml: &Xml,
    sources: &[ElementId],
    renamed: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Splice>, DocumentError> {
    let mut splices = Vec::new();
    for &source in sources {
        for attribute in ["file", "dev"] {
            let Some(place) = xml.attribute_place(source, attribute) else { continue };
            let path = xml.attribute(source, attribute).unwrap_or_default();
            if let Some(new) = renamed(&path).filter(|new| *new != path) {
                let new = escaped_attribute("the path of a disk", &new);
                splices.push((place, new.map_err(|problem| xml.error(source, problem))?));
            }
        }
    }
    Ok(splices)
}

/// The element of the disk of that name.
pub(crate) fn disk_element(xml: &Xml, domain: ElementId, target: &str) -> Option<ElementId> {
    disk_elements(xml, domain).find(|&disk| {
        let at = xml.child(disk, "target");
        at.and_then(|at| xml.attribute(at, "dev")).as_deref() == Some(target)
    })
}

/// The changes that give a domain's disk another file, and its format.
pub(crate) fn moved(
    xml: &Xml,
    disk: ElementId,
    target: &str,
    path: &str,
    format: Option<&str>,
) -> Result<Vec<Splice>, DocumentError> {
    let read = disk::domain_disk(xml, disk)?;
    let source = xml.child(disk, "source");
    let place =
        disk::path_attribute(read.source.kind).and_then(|attribute| xml.attribute_place(source?, attribute));
    let Some(place) = place else {
        let what = format!("the file of the disk {target:?} in the domain");
        return Err(xml.error(disk, Problem::Missing { what }));
    };
    let new =
        |text| escaped_attribute("the path of a disk", text).map_err(|problem| xml.error(disk, problem));
    let mut splices = Vec::new();
    if read.source.path.as_deref() != Some(path) {
        splices.push((place, new(path)?));
    }
    if let Some(format) = format.filter(|format| read.format.as_deref() != Some(*format)) {
        let driver = xml.child(disk, "driver");
        splices.push(match driver.map(|driver| (driver, xml.attribute_place(driver, "type"))) {
            Some((_, Some(place))) => (place, new(format)?),
            Some((driver, None)) => {
                let at = xml.attribute_end(driver);
                (at..at, format!(" type='{}'", new(format)?))
            }
            None => {
                let at = xml.inner(disk).map_or(0, |inner| inner.start);
                (at..at, format!("<driver name='qemu' type='{}'/>", new(format)?))
            }
        });
    }
    if !splices.is_empty() {
        splices.extend(xml.named(disk, "backingStore").map(|list| xml.removal(list)));
    }
    Ok(splices)
}

/// The elements of a domain's disks.
pub(crate) fn disk_elements(xml: &Xml, domain: ElementId) -> impl Iterator<Item = ElementId> + '_ {
    xml.named(domain, "devices").flat_map(move |devices| xml.named(devices, "disk"))
}

/// Reads a domain's definition.
pub(crate) fn domain(xml: &Xml, id: ElementId) -> Result<Domain, DocumentError> {
    let text =
        |name: &str| xml.child(id, name).map(|child| xml.content(child)).filter(|text| !text.is_empty());
    let disks: Vec<DomainDisk> =
        disk_elements(xml, id).map(|disk| disk::domain_disk(xml, disk)).collect::<Result<_, _>>()?;
    let mut targets: Vec<&str> = disks.iter().map(|disk| disk.target.as_str()).collect();
    targets.sort_unstable();
    if let Some([twice, _]) = targets.windows(2).find(|pair| pair.first() == pair.last()) {
        return Err(xml.error(id, Problem::Disks { why: format!("the domain has two disks {twice:?}") }));
    }
    Ok(Domain { name: text("name"), uuid: text("uuid"), disks, span: xml.whole(id) })
}
