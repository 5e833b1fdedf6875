//! A domain's definition: its disks are read, the rest is kept as it is.

use std::ops::Range;

use crate::disk::{self, DomainDisk};
use crate::error::{DocumentError, Problem};
use crate::xml::{ElementId, Xml};

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
    /// Reads a `<domain>` document, as `virsh dumpxml --inactive` prints it.
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
        domain(&xml, root)
    }

    /// The disk of that name.
    pub fn disk(&self, target: &str) -> Option<&DomainDisk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
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
