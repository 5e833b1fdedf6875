//! What libvirt's records say, against what the images are: where they differ, and where libvirt would lose data.
//!
//! libvirt decides from its records what it may remove or rewrite, and looks at no image. So each record that is not
//! what the images are, and each image that it does not know of, is a danger that can be named.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::{in_use, overlay};
use crate::disk::{DiskMode, SourceKind};
use crate::domain::Domain;
use crate::facts::State;
use crate::forest::problems;
use crate::snapshot::Snapshot;

/// What is known of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageFacts {
    /// Its format, in libvirt's word.
    pub format: String,
    /// The path of its backing file, or the name it has for one that is not there.
    pub backing: Option<String>,
    /// Whether it names its backing file relative to its own directory.
    pub is_relative: bool,
    /// The names of its internal snapshots.
    pub snapshots: Vec<String>,
}

/// How bad it is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// libvirt would remove or rewrite what somebody still needs.
    Loss,
    /// The daemon would crash in the middle of an operation.
    Crash,
    /// A record is not what the images are.
    Mismatch,
    /// libvirt refuses an operation, and nothing happens.
    Refusal,
}

impl Severity {
    /// A word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Loss => "loses data",
            Self::Crash => "crashes",
            Self::Mismatch => "differs",
            Self::Refusal => "refuses",
        }
    }
}

/// One thing that was found. The order is that of severity, then of names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The snapshot that it is about, if it is about one.
    pub snapshot: Option<String>,
    /// A stable word for what it is.
    pub code: &'static str,
    /// The file that it is about.
    pub file: Option<String>,
    /// What happens, and why. Names in it are quoted and escaped.
    pub message: String,
}

/// Everything that is wrong, worst first. `domain` is the machine as it is defined now, `images` all images of the
/// directories in question, by the paths that the documents have for them.
pub fn verify(
    snapshots: &[Snapshot],
    domain: Option<&Domain>,
    images: &BTreeMap<String, ImageFacts>,
) -> Vec<Finding> {
    let scene = Scene::of(snapshots, domain, images);
    let mut found = Found(Vec::new());
    scene.forest(snapshots, &mut found);
    for snapshot in snapshots {
        let name = snapshot.name();
        scene.record(snapshot, domain, &mut found);
        for (disk, mode, file) in scene.states(name) {
            match mode {
                DiskMode::Internal => scene.internal(name, &disk, &file, &mut found),
                _ => scene.external(name, &disk, &file, &mut found),
            }
        }
        scene.branches(name, &mut found);
    }
    scene.current(domain.is_some(), &mut found);
    scene.untracked(&mut found);
    found.0.sort();
    found.0.dedup();
    found.0
}

struct Found(Vec<Finding>);

impl Found {
    fn add(
        &mut self,
        severity: Severity,
        code: &'static str,
        snapshot: Option<&str>,
        file: Option<&str>,
        message: String,
    ) {
        let (snapshot, file) = (snapshot.map(str::to_owned), file.map(str::to_owned));
        self.0.push(Finding { severity, snapshot, code, file, message });
    }
}

struct Scene<'a> {
    images: &'a BTreeMap<String, ImageFacts>,
    by_name: BTreeMap<&'a str, &'a Snapshot>,
    children: BTreeMap<&'a str, Vec<&'a str>>,
    current: Option<&'a str>,
    /// The current snapshot and what it stands on, nearest first.
    branch: Vec<&'a str>,
    /// The files that the machine writes to, by disk.
    active: BTreeMap<String, String>,
    /// Who is directly on an image, of all that there are.
    readers: BTreeMap<&'a str, Vec<&'a str>>,
    /// Which snapshots have which file frozen.
    frozen: BTreeMap<String, Vec<(&'a str, DiskMode)>>,
}

impl<'a> Scene<'a> {
    fn of(
        snapshots: &'a [Snapshot],
        domain: Option<&Domain>,
        images: &'a BTreeMap<String, ImageFacts>,
    ) -> Self {
        let by_name: BTreeMap<&str, &Snapshot> = snapshots.iter().map(|one| (one.name(), one)).collect();
        let mut children: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (&name, snapshot) in &by_name {
            if let Some(parent) = snapshot.facts().parent.as_deref() {
                children.entry(parent).or_default().push(name);
            }
        }
        let current = snapshots.iter().find(|one| one.facts().current == Some(true)).map(Snapshot::name);
        let mut readers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (path, facts) in images {
            if let Some(backing) = &facts.backing {
                readers.entry(backing).or_default().push(path);
            }
        }
        let active = match domain {
            Some(domain) => domain
                .disks
                .iter()
                .filter_map(|disk| Some((disk.target.clone(), disk.source.path.clone()?)))
                .collect(),
            None => BTreeMap::new(),
        };
        let mut scene = Self {
            images,
            by_name,
            children,
            current,
            branch: Vec::new(),
            active,
            readers,
            frozen: BTreeMap::new(),
        };
        scene.branch =
            current.into_iter().chain(current.into_iter().flat_map(|name| scene.ancestors(name))).collect();
        if domain.is_none()
            && let Some(current) = current
        {
            let disks: Vec<String> = scene.states(current).into_iter().map(|(disk, ..)| disk).collect();
            for disk in disks {
                let file = scene.by_name.get(current).and_then(|one| in_use(one.facts(), &disk));
                scene.active.extend(file.map(|file| (disk, file)));
            }
        }
        let names: Vec<&str> = scene.by_name.keys().copied().collect();
        for name in names {
            for (_, mode, file) in scene.states(name) {
                scene.frozen.entry(file).or_default().push((name, mode));
            }
        }
        scene
    }

    /// Disk, mode and file of each disk whose state a snapshot has.
    fn states(&self, name: &str) -> Vec<(String, DiskMode, String)> {
        let Some(snapshot) = self.by_name.get(name) else { return Vec::new() };
        let facts = snapshot.facts();
        let disks = facts.domain.iter().flat_map(|domain| &domain.disks);
        let states = disks.filter_map(|disk| {
            let is_local = matches!(disk.source.kind, SourceKind::File | SourceKind::Block);
            let file = disk.source.path.clone().filter(|_| is_local)?;
            let mode = facts.mode_of(&disk.target);
            matches!(mode, DiskMode::Internal | DiskMode::External).then(|| (disk.target.clone(), mode, file))
        });
        states.collect()
    }

    fn state(&self, name: &str, disk: &str) -> Option<(DiskMode, String)> {
        self.states(name).into_iter().find(|(one, ..)| one == disk).map(|(_, mode, file)| (mode, file))
    }

    /// Nearest first; each once, even in a circle.
    fn ancestors(&self, name: &str) -> Vec<&'a str> {
        let (mut found, mut seen): (Vec<&str>, BTreeSet<&str>) = (Vec::new(), BTreeSet::new());
        let mut at = self.by_name.get(name).and_then(|one| one.facts().parent.as_deref());
        while let Some(name) = at.filter(|name| seen.insert(name)) {
            let Some((&name, snapshot)) = self.by_name.get_key_value(name) else { break };
            found.push(name);
            at = snapshot.facts().parent.as_deref();
        }
        found
    }

    fn children(&self, name: &str) -> &[&'a str] {
        self.children.get(name).map_or(&[], Vec::as_slice)
    }

    fn descendants(&self, name: &str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut left = self.children(name).to_vec();
        while let Some(one) = left.pop() {
            if found.insert(one) {
                left.extend(self.children(one));
            }
        }
        found
    }

    /// The nearest snapshots above that have a state of the disk, with its file.
    fn next_states(&self, name: &str, disk: &str) -> Vec<(&'a str, String)> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        let mut left = self.children(name).to_vec();
        while let Some(one) = left.pop() {
            match self.state(one, disk) {
                _ if !seen.insert(one) => {}
                Some((_, file)) => found.push((one, file)),
                None => left.extend(self.children(one)),
            }
        }
        found
    }

    /// The backing files of an image, nearest first.
    fn chain(&self, file: &str) -> Vec<&'a str> {
        let (mut found, mut seen): (Vec<&str>, BTreeSet<&str>) = (Vec::new(), BTreeSet::new());
        let mut at = self.images.get(file).and_then(|one| one.backing.as_deref());
        while let Some(file) = at.filter(|file| seen.insert(file)) {
            found.push(file);
            at = self.images.get(file).and_then(|one| one.backing.as_deref());
        }
        found
    }

    fn readers(&self, file: &str) -> &[&'a str] {
        self.readers.get(file).map_or(&[], Vec::as_slice)
    }

    fn is_active(&self, file: &str) -> bool {
        self.active.values().any(|active| active == file)
    }

    /// What libvirt drops or distorts when its daemon starts.
    fn forest(&self, snapshots: &[Snapshot], found: &mut Found) {
        for problem in problems(snapshots) {
            found.add(Severity::Loss, "records-contradict", None, None, problem.to_string());
        }
        let external = snapshots.iter().any(|one| one.facts().is_external());
        if external && self.current.is_none() {
            let text = "no snapshot is current: libvirt crashes when it reverts to an external one, or deletes one that \
                        has children";
            found.add(Severity::Crash, "no-current", None, None, text.into());
        }
    }

    /// What is wrong with a record alone.
    fn record(&self, snapshot: &Snapshot, domain: Option<&Domain>, found: &mut Found) {
        let (name, facts) = (snapshot.name(), snapshot.facts());
        if facts.disks.is_none() {
            let text = "has no list of disks: libvirt crashes when it reverts to it or deletes it";
            found.add(Severity::Crash, "no-disk-list", Some(name), None, text.into());
        }
        let Some(embedded) = &facts.domain else {
            let text = "has no definition of the machine: libvirt does not revert to it, not even by force";
            return found.add(Severity::Refusal, "no-domain", Some(name), None, text.into());
        };
        if let (Some(one), Some(other)) = (&embedded.uuid, domain.and_then(|domain| domain.uuid.as_ref()))
            && one != other
        {
            let text = format!("is of the machine {one}, which is not {other}: libvirt takes no such record");
            found.add(Severity::Mismatch, "other-machine", Some(name), None, text);
        }
        let marked = facts.disks.iter().flatten().filter(|disk| disk.delete_in_progress);
        for disk in marked {
            let text =
                format!("a deletion was cut short at disk {:?}: libvirt deletes it no more", disk.name);
            found.add(Severity::Refusal, "cut-short", Some(name), None, text);
        }
        if !facts.is_external() {
            return;
        }
        for disk in &embedded.disks {
            if disk.source.path.is_none() {
                continue;
            }
            if disk.source.kind != SourceKind::File {
                let text = format!("disk {:?} is no plain file: libvirt does not revert to it", disk.target);
                found.add(Severity::Refusal, "not-a-file", Some(name), None, text);
            }
            if facts.mode_of(&disk.target) == DiskMode::No && !disk.read_only {
                let text = format!(
                    "does not hold disk {:?}: reverting to it leaves that disk as it is, and puts down that it was held",
                    disk.target
                );
                found.add(Severity::Loss, "disk-left-out", Some(name), disk.source.path.as_deref(), text);
            }
        }
    }

    /// The file of a state, whichever kind it is.
    fn file(&self, name: &str, disk: &str, file: &str, found: &mut Found) -> Option<&'a ImageFacts> {
        let Some(facts) = self.images.get(file) else {
            let text = format!("its state of disk {disk:?} is in {file:?}, which is not there");
            found.add(Severity::Mismatch, "file-missing", Some(name), Some(file), text);
            return None;
        };
        let domain = self.by_name.get(name).and_then(|one| one.facts().domain.as_ref());
        let format = domain.and_then(|domain| domain.disk(disk)).and_then(|disk| disk.format.as_deref());
        if let Some(format) = format.filter(|format| *format != facts.format) {
            let text = format!(
                "{file:?} is {}, and the record says {format}: the guest would see other bytes",
                facts.format
            );
            found.add(Severity::Mismatch, "wrong-format", Some(name), Some(file), text);
        }
        Some(facts)
    }

    fn internal(&self, name: &str, disk: &str, file: &str, found: &mut Found) {
        let Some(facts) = self.file(name, disk, file, found) else { return };
        if !facts.snapshots.iter().any(|one| one == name) {
            let elsewhere = self.states(name).into_iter().any(|(_, mode, file)| {
                let has =
                    self.images.get(&file).is_some_and(|one| one.snapshots.iter().any(|one| one == name));
                mode == DiskMode::Internal && has
            });
            let (severity, code, what) = if elsewhere {
                (Severity::Loss, "half-a-revert", "reverting to it changes the other disks, and then fails")
            } else {
                (Severity::Mismatch, "internal-missing", "libvirt cannot revert to it")
            };
            let text = format!("{file:?} has no internal snapshot of that name: {what}");
            found.add(severity, code, Some(name), Some(file), text);
        }
        let readers = self.readers(file);
        if !readers.is_empty() {
            let text =
                format!("reverting to it rewrites {file:?} in place, on which {} stand", quoted(readers));
            found.add(Severity::Loss, "revert-rewrites-backing-file", Some(name), Some(file), text);
        }
        if self.current == Some(name)
            && let Some(active) = self.active.get(disk).filter(|active| *active != file)
        {
            let text =
                format!("is current, and its state is in {file:?}, but disk {disk:?} writes to {active:?}");
            found.add(Severity::Mismatch, "wrong-active", Some(name), Some(active), text);
        }
    }

    fn external(&self, name: &str, disk: &str, file: &str, found: &mut Found) {
        self.file(name, disk, file, found);
        let mut above: Vec<(String, String)> = self
            .next_states(name, disk)
            .into_iter()
            .map(|(child, file)| (format!("the snapshot {child:?}"), file))
            .collect();
        if self.current == Some(name)
            && let Some(active) = self.active.get(disk)
        {
            above.push(("the machine".into(), active.clone()));
        }
        for (who, over) in above.iter().filter(|(_, over)| over != file) {
            let Some(facts) = self.images.get(over) else { continue };
            if facts.backing.as_deref() != Some(file) {
                let backing = facts.backing.as_deref().map_or("nothing".into(), |one| format!("{one:?}"));
                let text = format!("{who} should stand on {file:?} with {over:?}, which stands on {backing}");
                found.add(Severity::Mismatch, "wrong-backing", Some(name), Some(over), text);
            }
        }
        self.deletion(name, disk, file, found);
    }

    /// What deleting an external snapshot would do to others.
    fn deletion(&self, name: &str, disk: &str, file: &str, found: &mut Found) {
        let children = self.children(name);
        let is_current = self.current == Some(name);
        if children.is_empty() && !is_current {
            // libvirt removes the file of such a leaf, if the nearest state of the disk below it is external.
            let below = self.ancestors(name).into_iter().find_map(|one| self.state(one, disk));
            if !matches!(below, Some((DiskMode::External, _))) {
                return;
            }
            let mut users: Vec<String> = self.readers(file).iter().map(|one| format!("{one:?}")).collect();
            let holders = self.frozen.get(file).into_iter().flatten();
            users.extend(
                holders.filter(|(one, _)| *one != name).map(|(one, _)| format!("the snapshot {one:?}")),
            );
            let is_used =
                self.active.values().any(|active| active == file || self.chain(active).contains(&file));
            users.extend(is_used.then(|| "the machine".to_owned()));
            if !users.is_empty() {
                let text = format!("deleting it removes {file:?}, which is needed by {}", users.join(", "));
                found.add(Severity::Loss, "deletion-removes-needed-file", Some(name), Some(file), text);
            }
            return;
        }
        // The file on top is merged down, and removed.
        let over = match children {
            [] => self.active.get(disk).cloned(),
            [child] if self.branch.contains(&name) && !is_current => {
                self.state(child, disk).map(|(_, file)| file)
            }
            _ => None,
        };
        let Some(over) = over.filter(|over| over != file) else { return };
        let inside = self.images.get(&over).map(|facts| facts.snapshots.as_slice()).unwrap_or_default();
        if !inside.is_empty() {
            let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
            let text = format!(
                "deleting it merges {over:?} away, and with it the internal snapshots {} that are inside",
                quoted(&inside)
            );
            found.add(Severity::Loss, "merge-drops-internal-snapshots", Some(name), Some(&over), text);
        }
        let is_off =
            |one: &&str| self.by_name.get(*one).is_some_and(|one| one.facts().state == Some(State::Shutoff));
        let beside =
            self.descendants(name).into_iter().filter(|one| !self.branch.contains(one)).filter(is_off).any(
                |one| {
                    let file = self.state(one, disk).map(|(_, file)| file);
                    file.and_then(|file| self.images.get(&file))
                        .is_some_and(|facts| facts.backing.as_ref() == Some(&over))
                },
            );
        if beside {
            let text = format!(
                "deleting it crashes libvirt: snapshots of another branch stand on {over:?}, which is merged"
            );
            found.add(Severity::Crash, "branch-crash", Some(name), Some(&over), text);
        }
    }

    /// What libvirt does not do, and where it fails, because of the shape of the tree.
    fn branches(&self, name: &str, found: &mut Found) {
        let Some(snapshot) = self.by_name.get(name) else { return };
        let children = self.children(name);
        let is_external = snapshot.facts().is_external();
        let mut refuse = |code, text: &str| found.add(Severity::Refusal, code, Some(name), None, text.into());
        if is_external {
            match children {
                [_, _, ..] => refuse("several-children", "has several children: libvirt does not delete it"),
                [_] if self.current == Some(name) => {
                    refuse(
                        "current-with-children",
                        "is current and has children: libvirt does not delete it",
                    );
                }
                [_] if !self.branch.contains(&name) => {
                    refuse(
                        "other-branch",
                        "is inside a branch that is not the current one: libvirt does not delete it",
                    );
                }
                _ => {}
            }
            let on_internal = self.states(name).into_iter().any(|(disk, mode, _)| {
                let below = self.ancestors(name).into_iter().find_map(|one| self.state(one, &disk));
                mode == DiskMode::External && matches!(below, Some((DiskMode::Internal, _)))
            });
            if on_internal {
                refuse(
                    "external-on-internal",
                    "is external and stands on an internal one: libvirt does not delete it",
                );
            }
        }
        let below = self.descendants(name);
        let all_internal = !is_external
            && below.iter().all(|one| self.by_name.get(one).is_some_and(|one| !one.facts().is_external()));
        if all_internal && children.len() > 1 && children.iter().any(|child| !self.children(child).is_empty())
        {
            let text = "deleting what stands on it may crash libvirt: several branches do, and not all are single snapshots";
            found.add(Severity::Crash, "children-crash", Some(name), None, text.into());
        }
    }

    /// What the next revert would remove: the overlays that the current snapshot says are in use.
    fn current(&self, is_known: bool, found: &mut Found) {
        let Some((&name, snapshot)) = self.current.and_then(|name| self.by_name.get_key_value(name)) else {
            return;
        };
        for (disk, mode, _) in self.states(name) {
            let (Some(active), DiskMode::External) = (self.active.get(&disk), mode) else { continue };
            if !self.images.contains_key(active) {
                let text = format!("disk {disk:?} writes to {active:?}, which is not there");
                found.add(Severity::Mismatch, "file-missing", Some(name), Some(active), text);
            }
            if self.chain(active).len() > 200 {
                let text =
                    format!("{active:?} stands on more than 200 files: libvirt takes no further snapshot");
                found.add(Severity::Refusal, "too-deep", Some(name), Some(active), text);
            }
            let Some(named) = overlay(snapshot.facts(), &disk).filter(|named| is_known && named != active)
            else {
                continue;
            };
            let mut users: Vec<String> = self.readers(&named).iter().map(|one| format!("{one:?}")).collect();
            let holders = self.frozen.get(&named).into_iter().flatten();
            users.extend(holders.map(|(one, _)| format!("the snapshot {one:?}")));
            if users.is_empty() {
                let text = format!(
                    "says that disk {disk:?} writes to {named:?}, and it is {active:?}: libvirt would leave that behind"
                );
                found.add(Severity::Mismatch, "stale-overlay", Some(name), Some(&named), text);
            } else {
                let text = format!(
                    "says that disk {disk:?} writes to {named:?}, and it is {active:?}: the next revert removes the former, \
                     which is needed by {}",
                    users.join(", ")
                );
                found.add(Severity::Loss, "revert-removes-needed-file", Some(name), Some(&named), text);
            }
        }
    }

    /// Images on top of the tree that no record knows, and names that libvirt would change.
    fn untracked(&self, found: &mut Found) {
        let overlays: BTreeSet<String> = self
            .by_name
            .values()
            .flat_map(|one| one.facts().disks.iter().chain(&one.facts().revert_disks).flatten())
            .filter_map(|disk| disk.overlay.path.clone())
            .collect();
        for (path, facts) in self.images {
            let is_known = self.frozen.contains_key(path) || self.is_active(path) || overlays.contains(path);
            let Some(backing) = &facts.backing else { continue };
            let is_tracked = |file: &str| {
                self.frozen.contains_key(file) || self.is_active(file) || overlays.contains(file)
            };
            if !is_known && is_tracked(backing) {
                let text = format!(
                    "{path:?} stands on {backing:?}, and libvirt does not know of it: reverting and deleting may rewrite or \
                     remove what it reads"
                );
                found.add(Severity::Loss, "untracked-overlay", None, Some(path), text);
            }
            if is_known && facts.is_relative {
                let text = format!(
                    "{path:?} names its backing file relative to itself: libvirt makes the name absolute when it deletes"
                );
                found.add(Severity::Refusal, "relative-name", None, Some(path), text);
            }
        }
        for (file, holders) in &self.frozen {
            let external: Vec<&str> = holders
                .iter()
                .filter(|(_, mode)| *mode == DiskMode::External)
                .map(|(name, _)| *name)
                .collect();
            if external.len() > 1 {
                let text = format!(
                    "{file:?} is the file of several external snapshots, {}: deleting one can remove or \
                                    rewrite it",
                    quoted(&external)
                );
                found.add(Severity::Loss, "shared-file", None, Some(file), text);
            }
        }
    }
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{ImageFacts, verify};
    use crate::{DomainDocument, Snapshot};

    /// `name parent mode file[>overlay][*]`, `;` between them; `-` is no parent, `*` marks the current one. Files are
    /// of the disk `vda`; a second disk is `vdb`, in the file `X`, with the mode behind a `+`.
    fn records(text: &str) -> Vec<Snapshot> {
        text.split(';').map(|line| record(&line.split_whitespace().collect::<Vec<_>>())).collect()
    }

    fn record(words: &[&str]) -> Snapshot {
        let [name, parent, mode, place] = words else { panic!("{words:?}") };
        let (place, current) = place.strip_suffix('*').map_or((*place, 0), |place| (place, 1));
        let (file, overlay) = place.split_once('>').unwrap_or((place, ""));
        let (mode, second) = mode.split_once('+').unwrap_or((mode, ""));
        let parent =
            if *parent == "-" { String::new() } else { format!("<parent><name>{parent}</name></parent>") };
        let source = if overlay.is_empty() { String::new() } else { format!("<source file='/{overlay}'/>") };
        let list = match mode {
            "none" => String::new(),
            mode => {
                let more = if second.is_empty() {
                    String::new()
                } else {
                    format!("<disk name='vdb' snapshot='{second}'/>")
                };
                format!("<disks><disk name='vda' snapshot='{mode}'>{source}</disk>{more}</disks>")
            }
        };
        let domain = domain(file, !second.is_empty());
        let text = format!(
            "<domainsnapshot><name>{name}</name><state>shutoff</state>{parent}<creationTime>1</creationTime>{list}{domain}\
             <active>{current}</active></domainsnapshot>"
        );
        Snapshot::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn domain(file: &str, has_second: bool) -> String {
        let second = "<disk><driver type='qcow2'/><source file='/X'/><target dev='vdb'/></disk>";
        format!(
            "<domain type='x'><devices><disk><driver type='qcow2'/><source file='/{file}'/><target dev='vda'/></disk>{}\
             </devices></domain>",
            if has_second { second } else { "" }
        )
    }

    /// `B<A[s,t]`: B, on A, with the internal snapshots s and t; `~` before the backing file: a relative name.
    fn images(text: &str) -> BTreeMap<String, ImageFacts> {
        let image = |word: &str| {
            let (word, inside) = word.split_once('[').unwrap_or((word, ""));
            let (name, backing) = word.split_once('<').unwrap_or((word, ""));
            let plain = backing.trim_start_matches('~');
            let facts = ImageFacts {
                format: "qcow2".into(),
                backing: (!plain.is_empty()).then(|| format!("/{plain}")),
                is_relative: backing.starts_with('~'),
                snapshots: inside
                    .trim_end_matches(']')
                    .split(',')
                    .filter(|one| !one.is_empty())
                    .map(Into::into)
                    .collect(),
            };
            (format!("/{name}"), facts)
        };
        text.split_whitespace().map(image).collect()
    }

    #[test]
    fn dangers_have_names() {
        // A name, the records, the active file, the images; then what is found, refusals apart.
        let cases: &[(&str, &str, &str, &str, &[&str])] = &[
            ("a sound chain", "s - external A>B; t s external B>C*", "C", "A B<A C<B", &[]),
            ("sound and internal", "s - internal A; t s internal A*", "A", "A[s,t]", &[]),
            (
                "sound and reverted",
                "s - external A>B; t s external B>C*",
                "D",
                "A B<A D<B",
                &["stale-overlay t"],
            ),
            (
                "the current one moved by hand",
                "s - external A>B*; t s external B>C",
                "C",
                "A B<A C<B",
                // C stands on B, not on A, and its snapshot is taken for a leaf that nobody needs.
                &["deletion-removes-needed-file t", "revert-removes-needed-file s", "wrong-backing s"],
            ),
            (
                "reverted, and a later child deleted",
                "p - external A>B*; x p external B>C",
                "E",
                "A B<A E<A",
                &["revert-removes-needed-file p"],
            ),
            (
                "none is current",
                "s - external A>B; t s external B>C",
                "C",
                "A B<A C<B",
                &["deletion-removes-needed-file t", "no-current"],
            ),
            (
                "a second name for a snapshot",
                "s - external A>B; t s external B>C*; u s external B>C",
                "C",
                "A B<A C<B",
                &["deletion-removes-needed-file u", "shared-file"],
            ),
            (
                "an internal one below an overlay",
                "i - internal A; s i external A>B*",
                "B",
                "A[i] B<A",
                &["revert-rewrites-backing-file i"],
            ),
            (
                "an internal one in an overlay",
                "s - external A>B; i s internal B; t i external B>C*",
                "C",
                "A B<A[i] C<B",
                &["merge-drops-internal-snapshots s", "revert-rewrites-backing-file i"],
            ),
            ("an image on the side", "s - external A>B*", "B", "A B<A U<A", &["untracked-overlay"]),
            (
                "an image on top",
                "s - external A>B*",
                "U",
                "A B<A U<B",
                &["revert-removes-needed-file s", "wrong-backing s"],
            ),
            ("a disk left out", "s - external+no A>B*", "B", "A B<A X", &["disk-left-out s"]),
            ("half of an internal one", "s - internal+internal A*", "A", "A X[s]", &["half-a-revert s"]),
            ("no internal one", "s - internal A*", "A", "A", &["internal-missing s"]),
            ("no list of disks", "s - none A*", "A", "A[s]", &["no-disk-list s"]),
            ("no file", "s - external A>B*", "B", "B<A", &["file-missing s"]),
            ("other file", "s - external A>B; t s external B>C*", "C", "A B<Z C<B Z", &["wrong-backing s"]),
            (
                "a branch over a merged file",
                "s - external A>B; t s external B>C; u t external C>D; v t external E>F*",
                "F",
                "A B<A C<B E<B F<E",
                &["branch-crash s"],
            ),
            (
                "branches of internal ones",
                "s - internal A; t s internal A; u t internal A; v s internal A*",
                "A",
                "A[s,t,u,v]",
                &["children-crash s"],
            ),
            ("a parent that is gone", "s gone internal A*", "A", "A[s]", &["records-contradict"]),
        ];
        for (case, records_text, active, image_text, want) in cases {
            let snapshots = records(records_text);
            let machine =
                DomainDocument::parse(domain(active, records_text.contains('+')).as_bytes()).unwrap();
            let found = verify(&snapshots, Some(machine.domain()), &images(image_text));
            let serious = found.iter().filter(|one| one.severity != super::Severity::Refusal);
            let mut codes: Vec<String> = serious
                .map(|one| format!("{} {}", one.code, one.snapshot.as_deref().unwrap_or_default()))
                .collect();
            codes.iter_mut().for_each(|code| *code = code.trim().to_owned());
            codes.sort();
            codes.dedup();
            assert_eq!(codes, *want, "{case}: {found:#?}");
        }
    }

    #[test]
    fn refusals_have_names() {
        let cases: &[(&str, &str, &str)] = &[
            ("s - external A>B; t s external B>C; u s external D>E*", "E", "several-children s"),
            ("s - external A>B*; t s external B>C", "E", "current-with-children s"),
            (
                "s - external A>B; t s external B>C; u t external C>F; v s external D>E*",
                "E",
                "other-branch t",
            ),
            ("i - internal A; s i external A>B*", "B", "external-on-internal s"),
        ];
        for (text, active, want) in cases {
            let machine = DomainDocument::parse(domain(active, false).as_bytes()).unwrap();
            let found = verify(&records(text), Some(machine.domain()), &images("A B<A C<B D<A E<D F<~C"));
            let all: Vec<String> = found
                .iter()
                .map(|one| format!("{} {}", one.code, one.snapshot.as_deref().unwrap_or_default()))
                .collect();
            assert!(all.iter().any(|one| one == want), "{text}: {all:?}");
        }
        let found = verify(&records("s - external A>B*"), None, &images("A B<~A"));
        assert!(found.iter().all(|one| one.code == "relative-name"), "{found:?}");
        assert_eq!(found.len(), 1);
    }
}
