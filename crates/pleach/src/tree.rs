//! `pleach tree`

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use pleach_engine::family::{Family, ONLY_DISK, State};
use pleach_engine::survey::{Survey, SurveyFile};
use pleach_engine::{Error, Result, Sizes, sizes};
use pleach_lineage::text::{Style, rows};
use pleach_lineage::{Kind, Lineage, NodeId, Storage};
use pleach_store::{Access, Disk, RealDisk, Role};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value, json};

use crate::args::TreeArgs;
use crate::target::{Target, problems};
use crate::{output, size};

pub(crate) fn run(args: &TreeArgs) -> Result<ExitCode> {
    let target = Target::of(&args.target, &args.also)?;
    let survey = target.survey(&args.trust.trust())?;
    let family = target.family(&survey)?;
    let shown = shown(&target, &survey, &family);
    let role = if args.force_share { Role::Look } else { Role::Read };
    for file in &survey.files {
        let node = survey.find_id(file.stat.id).and_then(|index| family.node_of_file(index));
        if node.is_some_and(|id| shown.contains(&id)) {
            lock(file, role)?;
        }
    }
    let mut wrong = problems(&survey);
    wrong.extend(survey.broken.iter().map(|b| Error::new(b.error.kind, b.error.full()).at(&b.path)));
    wrong.extend(survey.unreadable.iter().map(|e| {
        let error = Error::new(e.kind, e.full());
        e.path.iter().fold(error, |error, path| error.at(path))
    }));
    if target.image.is_some() {
        // Only what concerns the tree that was asked for.
        let files: BTreeSet<&Path> = survey
            .files
            .iter()
            .filter(|f| {
                survey
                    .find_id(f.stat.id)
                    .and_then(|i| family.node_of_file(i))
                    .is_some_and(|id| shown.contains(&id))
            })
            .map(|f| f.path.as_path())
            .collect();
        wrong.retain(|e| e.path.as_deref().is_none_or(|path| files.contains(path)));
    }
    let measured = if args.sizes || args.json {
        match sizes(&RealDisk, &survey, &family, &shown, role) {
            Ok(measured) => measured,
            // The hierarchy is worth showing even where a figure cannot be had.
            Err(error) if !args.sizes => {
                wrong.push(error);
                BTreeMap::new()
            }
            Err(error) => return Err(error),
        }
    } else {
        BTreeMap::new()
    };
    if args.json {
        let document = document(&target, &survey, &family, &shown, &wrong);
        output::stream(&Tree { document, family: &family, shown: &shown, measured: &measured });
    } else {
        output::print(&text(args, &family, &shown, &measured));
        wrong.iter().for_each(output::report);
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Refuses a file that somebody writes to, unless that was asked for: what would be shown may be half-way.
fn lock(file: &SurveyFile, role: Role) -> Result<()> {
    let path = &file.path;
    let store = RealDisk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
    store.lock(role).map_err(|e| Error::locked(path, e).hint("-U looks at it all the same"))
}

/// The nodes to show: all of a directory, or the tree that an image belongs to.
fn shown(target: &Target, survey: &Survey, family: &Family) -> BTreeSet<NodeId> {
    let image = target.image.as_ref().and_then(|path| survey.find(&RealDisk, path));
    match image.and_then(|index| family.node_of_file(index)) {
        Some(node) => family.tree_of(node),
        None => family.lineage.ids().collect(),
    }
}

fn text(
    args: &TreeArgs,
    family: &Family,
    shown: &BTreeSet<NodeId>,
    measured: &BTreeMap<NodeId, Sizes>,
) -> String {
    let style = if args.ascii { Style::Ascii } else { Style::Unicode };
    let lines: Vec<(String, NodeId)> = rows(&family.lineage, style)
        .into_iter()
        .filter(|row| shown.contains(&row.id))
        .map(|row| (format!("{}{}", row.prefix, label(&family.lineage, row.id)), row.id))
        .collect();
    let mut out = String::new();
    if !args.sizes {
        for (line, _) in &lines {
            out.push_str(line.trim_end());
            out.push('\n');
        }
        return out;
    }
    let width = lines.iter().map(|(l, _)| l.chars().count()).max().unwrap_or(0).max(4);
    let pad = |text: &str| format!("{text}{}", " ".repeat(width.saturating_sub(text.chars().count())));
    out.push_str(&format!(
        "{}  {:>12}  {:>16}  {:>18}\n",
        pad("node"),
        "on disk",
        "freed if deleted",
        "written if deleted"
    ));
    for (line, id) in &lines {
        let figures = measured.get(id);
        let show = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |v| size::show(v, args.bytes));
        let (disk, freed) = (figures.map(|f| f.on_disk), figures.map(|f| f.freed_if_deleted));
        let written = figures.map(|f| f.written_if_deleted);
        out.push_str(&format!(
            "{}  {:>12}  {:>16}  {:>18}\n",
            pad(line),
            show(disk),
            show(freed),
            show(written)
        ));
    }
    out
}

/// Name, what it is, and where.
fn label(lineage: &Lineage, id: NodeId) -> String {
    let Some(node) = lineage.get(id) else { return String::new() };
    let mut notes = Vec::new();
    match node.storage_of(ONLY_DISK) {
        Some(Storage::External { file }) => notes.push(file.clone()),
        Some(Storage::Internal { file, id, .. }) => notes.push(format!("internal #{id} in {file}")),
        None => {}
    }
    if node.kind == Kind::Head {
        notes.push("head".to_owned());
    }
    if lineage.current() == Some(id) {
        notes.push("current".to_owned());
    }
    if node.parent_guessed {
        notes.push("parent guessed from creation order".to_owned());
    }
    format!("{}  ({})", node.name, notes.join(", "))
}

/// What `tree --json` prints. Of the nodes only one at a time is turned into JSON: an image may have very many snapshots.
struct Tree<'a> {
    /// All but the nodes, whose list is empty here.
    document: Value,
    family: &'a Family,
    shown: &'a BTreeSet<NodeId>,
    measured: &'a BTreeMap<NodeId, Sizes>,
}

impl Serialize for Tree<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let mut object = out.serialize_map(None)?;
        for (key, value) in self.document.as_object().into_iter().flatten() {
            match key.as_str() {
                "nodes" => object.serialize_entry(key, &Nodes(self))?,
                _ => object.serialize_entry(key, value)?,
            }
        }
        object.end()
    }
}

struct Nodes<'a>(&'a Tree<'a>);

impl Serialize for Nodes<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let Tree { family, shown, measured, .. } = self.0;
        let ids = family.lineage.depth_first().map(|(_, id)| id).filter(|id| shown.contains(id));
        out.collect_seq(ids.map(|id| node(&family.lineage, id, measured.get(&id))))
    }
}

fn document(
    target: &Target,
    survey: &Survey,
    family: &Family,
    shown: &BTreeSet<NodeId>,
    wrong: &[Error],
) -> Value {
    let heads: Vec<usize> = family
        .heads()
        .filter(|id| shown.contains(id))
        .filter_map(|id| match family.state(id) {
            Some(State::File(index)) => Some(index),
            _ => None,
        })
        .collect();
    let active = match heads.as_slice() {
        [one] => survey.files.get(*one),
        _ => None,
    };
    let name = std::path::absolute(target.image.as_ref().unwrap_or(&target.base)).ok();
    let name = name.as_ref().and_then(|n| if target.image.is_some() { n.file_stem() } else { n.file_name() });
    let current = family.lineage.current().filter(|id| shown.contains(id));
    let mut document = json!({
        "schema": 1,
        "tree": name.map(|n| n.to_string_lossy()),
        "catalog": null,
        "current": current.and_then(|id| family.lineage.get(id)).map(|n| n.name.as_str()),
        "disks": [{
            "name": ONLY_DISK,
            "active": active.map(|f| pleach_engine::family::shown(&f.path, &target.base)),
            "virtual_size": active.and_then(|f| f.header.as_ref()).map(pleach_format::Header::size),
        }],
        "nodes": [],
        "problems": wrong.iter().map(output::object).collect::<Vec<_>>(),
    });
    // What makes the exit code other than 0 is found where other verbs have it.
    if let (Some(first), Some(object)) = (wrong.first(), document.as_object_mut()) {
        object.insert("error".to_owned(), output::object(first));
    }
    document
}

fn node(lineage: &Lineage, id: NodeId, figures: Option<&Sizes>) -> Value {
    let Some(node) = lineage.get(id) else { return Value::Null };
    let parent = node.parent.and_then(|p| lineage.get(p)).map(|p| p.name.as_str());
    let storage: Map<String, Value> = node
        .storage
        .iter()
        .map(|(disk, storage)| {
            let value = match storage {
                Storage::External { file } => json!({ "kind": "external", "file": file }),
                Storage::Internal { file, snapshot, id } => {
                    json!({ "kind": "internal", "file": file, "snapshot": snapshot, "id": id })
                }
            };
            (disk.clone(), value)
        })
        .collect();
    let mut value = json!({
        "name": node.name,
        "kind": match node.kind { Kind::Snapshot => "snapshot", Kind::Head => "head" },
        "parent": parent,
        "parent_guessed": node.parent_guessed,
        "created": node.created,
        "description": node.description,
        "state": node.state,
        "storage": storage,
    });
    if let (Some(figures), Some(object)) = (figures, value.as_object_mut()) {
        object.insert(
            "sizes".to_owned(),
            json!({
                "on_disk": figures.on_disk,
                "freed_if_deleted": figures.freed_if_deleted,
                "written_if_deleted": figures.written_if_deleted,
            }),
        );
    }
    value
}
