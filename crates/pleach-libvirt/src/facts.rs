//! What a snapshot's document says, as values.

use std::ops::Range;

use crate::disk::{self, Disk, DiskMode};
use crate::domain::{self, Domain};
use crate::error::{DocumentError, Problem};
use crate::xml::{ElementId, Xml};

/// What the machine was doing when a snapshot was taken.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// It was running.
    Running,
    /// It waited for a resource; libvirt takes no such snapshot.
    Blocked,
    /// It was paused.
    Paused,
    /// It was going down.
    Shutdown,
    /// It was off.
    Shutoff,
    /// It had crashed.
    Crashed,
    /// It was suspended by its guest; libvirt takes no such snapshot.
    PmSuspended,
    /// It was running, and only its disks were kept.
    DiskSnapshot,
}

impl State {
    const ALL: [Self; 8] = [
        Self::Running,
        Self::Blocked,
        Self::Paused,
        Self::Shutdown,
        Self::Shutoff,
        Self::Crashed,
        Self::PmSuspended,
        Self::DiskSnapshot,
    ];

    /// libvirt's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::Shutdown => "shutdown",
            Self::Shutoff => "shutoff",
            Self::Crashed => "crashed",
            Self::PmSuspended => "pmsuspended",
            Self::DiskSnapshot => "disk-snapshot",
        }
    }

    /// The state of that word; `None` for any other word, `nostate` included.
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.word() == word)
    }

    /// Whether memory can be part of a snapshot in this state.
    pub fn has_memory(self) -> bool {
        !matches!(self, Self::Shutoff | Self::DiskSnapshot)
    }
}

/// Where the machine's memory is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Nowhere.
    No,
    /// In a disk's image, with an internal snapshot.
    Internal,
    /// In a file of its own.
    External {
        /// Its absolute path.
        file: String,
    },
    /// To be decided when the snapshot is taken.
    Undecided,
}

/// What a snapshot's document says. What is not listed here is in the document all the same, and stays.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Facts {
    /// Unique among the snapshots of one machine; `None` in a request that leaves it to libvirt. May hold any
    /// character that XML can carry: never use it as a file name, and never print it, unchecked.
    pub name: Option<String>,
    /// Free text.
    pub description: Option<String>,
    /// What the machine was doing; `None` in a request.
    pub state: Option<State>,
    /// Seconds since 1970-01-01 00:00 UTC; `None` in a request.
    pub created: Option<i64>,
    /// The name of the snapshot that this one stands on; `None` for a root, and in a request.
    pub parent: Option<String>,
    /// The machine's memory.
    pub memory: Memory,
    /// The disks that are listed; `None` where there is no list.
    pub disks: Option<Vec<Disk>>,
    /// The overlays in use, where this snapshot was reverted to and has children.
    pub revert_disks: Option<Vec<Disk>>,
    /// The machine as it was; its disks' sources are the frozen files, which have this snapshot's state.
    pub domain: Option<Domain>,
    /// The machine as its next start would have been.
    pub inactive_domain: Option<Domain>,
    /// Where the opaque data for restoring memory are, in bytes.
    pub cookie: Option<Range<usize>>,
    /// Whether this is the current snapshot; `None` where the document does not say, as those do not that
    /// libvirt prints.
    pub current: Option<bool>,
}

impl Facts {
    /// Whether the snapshot is external as a whole: its memory, or any disk of it, is.
    pub fn is_external(&self) -> bool {
        let disks = self.disks.iter().flatten();
        matches!(self.memory, Memory::External { .. })
            || disks.into_iter().any(|disk| disk.mode == Some(DiskMode::External))
    }

    /// What the snapshot does with a disk of its domain, where its list leaves that open too.
    pub fn mode_of(&self, target: &str) -> DiskMode {
        let listed = self.disks.iter().flatten().find(|disk| disk.name == target).and_then(|disk| disk.mode);
        let domain = self.domain.as_ref().and_then(|domain| domain.disk(target));
        listed.or_else(|| Some(domain?.mode_or(self.default_mode()))).unwrap_or(DiskMode::No)
    }

    /// What happens to disks that say nothing, by the rule for redefining.
    pub(crate) fn default_mode(&self) -> DiskMode {
        if self.state == Some(State::DiskSnapshot) || self.is_external() {
            DiskMode::External
        } else {
            DiskMode::Internal
        }
    }
}

/// Which parts of a document count.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A request to take a snapshot.
    Request,
    /// The record of one that was taken.
    Record,
}

/// Reads a `<domainsnapshot>`.
pub(crate) fn facts(xml: &Xml, purpose: Purpose) -> Result<Facts, DocumentError> {
    let root = xml.root();
    if xml.name(root) != "domainsnapshot" {
        let found = xml.name(root).to_owned();
        return Err(xml.error(root, Problem::WrongRoot { found, wanted: "domainsnapshot" }));
    }
    let is_record = purpose == Purpose::Record;
    let missing =
        |what: &str| xml.error(root, Problem::Missing { what: format!("<{what}> of the <domainsnapshot>") });
    let text = |name: &str| {
        let id = xml.child(root, name)?;
        Some((id, xml.content(id)))
    };
    let full = |name: &str| text(name).map(|(_, text)| text).filter(|text| !text.is_empty());

    let mut facts = Facts {
        name: full("name"),
        description: full("description"),
        state: None,
        created: None,
        parent: None,
        memory: Memory::Undecided,
        disks: disks(xml, "disks", is_record)?,
        revert_disks: None,
        domain: None,
        inactive_domain: None,
        cookie: xml.child(root, "cookie").map(|id| xml.whole(id)),
        current: None,
    };
    if is_record {
        if facts.name.is_none() {
            return Err(missing("name"));
        }
        let (id, word) = text("state").ok_or_else(|| missing("state"))?;
        facts.state = Some(State::of(&word).ok_or_else(|| {
            let words: Vec<&str> = State::ALL.into_iter().map(State::word).collect();
            let allowed = format!("may be one of {}", words.join(" "));
            xml.error(id, Problem::Value { what: "<state>".into(), value: word, allowed })
        })?);
        let (id, number) = text("creationTime").ok_or_else(|| missing("creationTime"))?;
        facts.created = Some(decimal(&number).ok_or_else(|| {
            let allowed = "must be a whole number of seconds, without blanks".into();
            xml.error(id, Problem::Value { what: "<creationTime>".into(), value: number, allowed })
        })?);
        let parent = xml.child(root, "parent").and_then(|parent| xml.child(parent, "name"));
        facts.parent = parent.map(|name| xml.content(name)).filter(|name| !name.is_empty());
        facts.revert_disks = disks(xml, "revertDisks", true)?;
        // Without a type it is the form of old, which has a uuid and no domain.
        let typed = |name: &str| xml.child(root, name).filter(|&id| xml.attribute(id, "type").is_some());
        facts.domain = typed("domain").map(|id| domain::domain(xml, id)).transpose()?;
        let inactive = xml.child(root, "inactiveDomain");
        facts.inactive_domain = inactive.map(|id| domain::domain(xml, id)).transpose()?;
        if let Some((id, number)) = text("active") {
            let value = decimal(&number).ok_or_else(|| {
                let allowed = "must be 0, or 1 for the current snapshot".into();
                xml.error(id, Problem::Value { what: "<active>".into(), value: number, allowed })
            })?;
            facts.current = Some(value != 0);
        }
    }
    facts.memory = memory(xml, facts.state)?;
    Ok(facts)
}

fn disks(xml: &Xml, list: &str, keeps_progress: bool) -> Result<Option<Vec<Disk>>, DocumentError> {
    let lists: Vec<ElementId> = xml.named(xml.root(), list).collect();
    let entries = lists.iter().flat_map(|&list| xml.children(list));
    let disks = entries.map(|entry| disk::disk(xml, entry, keeps_progress)).collect::<Result<Vec<_>, _>>()?;
    Ok((!lists.is_empty()).then_some(disks))
}

/// The rules for memory, in libvirt's order; `state` is `None` in a request.
fn memory(xml: &Xml, state: Option<State>) -> Result<Memory, DocumentError> {
    let root = xml.root();
    let at = xml.child(root, "memory");
    let id = at.unwrap_or(root);
    let attribute = |name| at.and_then(|at| xml.attribute(at, name));
    let file = attribute("file");
    let fail = |why: String| Err(xml.error(id, Problem::Disks { why }));
    let memory = match (attribute("snapshot").as_deref(), file) {
        (Some("external") | None, Some(file)) => Memory::External { file },
        (Some("external"), None) => return fail("external memory snapshots require a filename".into()),
        (Some("no"), None) => Memory::No,
        (Some("internal"), None) => Memory::Internal,
        (None, None) => match state {
            None => Memory::Undecided,
            Some(state) if state.has_memory() => Memory::Internal,
            Some(_) => Memory::No,
        },
        (Some("no" | "internal"), Some(file)) => {
            return fail(format!("memory filename {file:?} requires external snapshot"));
        }
        (Some(mode), _) => {
            let (what, value) = ("snapshot of <memory>".into(), mode.into());
            let allowed = "may be no, internal or external".into();
            return Err(xml.error(id, Problem::Value { what, value, allowed }));
        }
    };
    let is_kept = matches!(memory, Memory::Internal | Memory::External { .. });
    if is_kept && state.is_some_and(|state| !state.has_memory()) {
        return fail("memory state cannot be saved with offline or disk-only snapshot".into());
    }
    if let Memory::External { file } = &memory
        && !file.starts_with('/')
    {
        return fail(format!("memory snapshot file path ({file:?}) must be absolute"));
    }
    Ok(memory)
}

/// A decimal number with an optional minus sign and nothing else.
fn decimal(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}
