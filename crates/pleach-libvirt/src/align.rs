//! Whether a record is complete enough for libvirt to take it back: the rules of `snapshot-create --redefine`.

use crate::disk::DiskMode;
use crate::error::{DocumentError, Problem};
use crate::facts::State;
use crate::snapshot::Snapshot;
use crate::xml::Xml;

/// The longest name, in bytes, whose file libvirt can write.
pub const MOST_NAME_BYTES: usize = 247;

/// Why libvirt could not keep a snapshot of that name, if it could not: the name is that of a file too.
pub fn name_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.contains('/') {
        Some("it has a '/', and libvirt uses it as a file name")
    } else if name.starts_with('.') {
        Some("it starts with a '.', and libvirt uses it as a file name")
    } else if name.len() > MOST_NAME_BYTES {
        Some("it has more than 247 bytes, and libvirt uses it as a file name")
    } else if name.chars().any(|c| !crate::xml::is_char(c)) {
        Some("it has a character that XML cannot carry")
    } else {
        None
    }
}

impl Snapshot {
    /// Checks what libvirt checks of a record that it is given to redefine, as far as the record alone can say:
    /// the name, the state, a full domain, and the lists of disks against the disks of that domain.
    ///
    /// # Errors
    /// What libvirt would refuse it for.
    pub fn check_redefine(&self) -> Result<(), DocumentError> {
        let facts = self.facts();
        let fail = |problem| Err(DocumentError::at(self.text().as_bytes(), 0, problem));
        if let Some(why) = name_problem(self.name()) {
            return fail(Problem::Value {
                what: "<name>".into(),
                value: self.name().into(),
                allowed: why.into(),
            });
        }
        if let Some(state @ (State::PmSuspended | State::Blocked)) = facts.state {
            let allowed = "libvirt redefines no snapshot in that state".into();
            return fail(Problem::Value { what: "<state>".into(), value: state.word().into(), allowed });
        }
        if facts.parent.as_deref() == Some(self.name()) {
            let allowed = "a snapshot cannot be its own parent".into();
            return fail(Problem::Value { what: "<parent>".into(), value: self.name().into(), allowed });
        }
        if facts.domain.is_none() {
            return fail(Problem::Missing {
                what: "a full <domain type=…> of the <domainsnapshot>, without which libvirt cannot revert to it,".into(),
            });
        }
        if let Some(why) = self.unaligned() {
            return fail(Problem::Disks { why });
        }
        Ok(())
    }

    /// Why the list of disks does not fit the domain's disks.
    fn unaligned(&self) -> Option<String> {
        let facts = self.facts();
        let domain = facts.domain.as_ref()?;
        let uniform = facts.default_mode() == DiskMode::Internal;
        let entries = facts.disks.as_deref().unwrap_or_default();
        if entries.len() > domain.disks.len() {
            return Some("too many disk snapshot requests for domain".into());
        }
        let mut seen = Vec::new();
        for entry in entries {
            let is_it = |target: &str, path: Option<&str>| {
                entry.name == target || (entry.name.starts_with('/') && path == Some(entry.name.as_str()))
            };
            let mut fits =
                domain.disks.iter().filter(|disk| is_it(&disk.target, disk.source.path.as_deref()));
            let (Some(disk), None) = (fits.next(), fits.next()) else {
                return Some(format!("no disk named {:?} in the snapshot's domain", entry.name));
            };
            if seen.contains(&disk.target.as_str()) {
                return Some(format!("disk {:?} is listed twice", disk.target));
            }
            seen.push(&disk.target);
            let may_be_left_out = disk.snapshot == Some(DiskMode::No);
            let wrong = match entry.mode {
                None | Some(DiskMode::Internal) => false,
                Some(DiskMode::No) => !may_be_left_out,
                Some(_) => true,
            };
            // A drive without a medium, and one that the guest cannot write to, take no part anyway.
            let has_state = disk.source.path.is_some() && !disk.read_only;
            if uniform && wrong && has_state {
                return Some(format!("disk {:?} must use snapshot mode 'internal'", disk.target));
            }
        }
        None
    }
}

/// The name of the file that libvirt would keep a snapshot's record in.
pub fn file_name(name: &str) -> Option<String> {
    name_problem(name).is_none().then(|| format!("{name}.xml"))
}

/// Whether bytes are a document that this crate can read as XML at all, and what its root is.
pub fn root_name(bytes: &[u8]) -> Result<String, DocumentError> {
    let xml = Xml::parse(bytes)?;
    Ok(xml.name(xml.root()).to_owned())
}
