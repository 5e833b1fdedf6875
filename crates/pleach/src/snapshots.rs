//! `pleach init`, `snapshot`, `revert`, `rename`, `note`, `current`, `show`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use pleach_engine::tree::Tree;
use pleach_engine::verbs::{
    RevertRequest, TakeKind, TakeRequest, Unsaved, make_current, note, rename, revert, take,
};
use pleach_engine::{Error, ErrorKind, Result};
use pleach_image::escape;
use pleach_lineage::{Kind, Storage};
use pleach_store::RealDisk;
use serde_json::json;

use crate::args::{CurrentArgs, InitArgs, NoteArgs, RenameArgs, RevertArgs, ShowArgs, SnapshotArgs};
use crate::job::{Said, carry_out, storage_object};
use crate::output;
use crate::target::{Target, directory};

/// Seconds since the Epoch.
pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|d| i64::try_from(d.as_secs()).ok())
        .unwrap_or(0)
}

pub(crate) fn init(args: &InitArgs) -> Result<ExitCode> {
    let first = args.disks.first().map(|(_, path)| directory(path)).unwrap_or_default();
    let mut tree =
        Tree::adopt(&RealDisk, &first, &args.name, &args.disks, &args.place.also, &args.place.trust())?;
    for difference in &tree.differences {
        output::note(difference);
    }
    tree.catalog.save(&RealDisk)?;
    let path = tree.catalog.path().display().to_string();
    if args.json {
        let disks: Vec<_> = tree
            .catalog
            .record
            .disks
            .iter()
            .map(|d| json!({ "name": d.name, "active": d.active.as_deref().map(|f| tree.catalog.shown(f)) }))
            .collect();
        output::document(&json!({
            "schema": 1,
            "tree": args.name,
            "catalog": path,
            "current": tree.catalog.record.current,
            "disks": disks,
            "guessed": tree.differences,
        }));
    } else {
        output::print(&format!("{}\n", output::path(tree.catalog.path())));
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn snapshot(args: &SnapshotArgs) -> Result<ExitCode> {
    let tree = Target::named(&args.on)?.tree_or_new(&args.on.place.trust())?;
    let kind = match (args.internal, args.external) {
        (true, _) => Some(TakeKind::Internal),
        (_, true) => Some(TakeKind::External),
        _ => None,
    };
    let request = TakeRequest {
        name: args.name.clone(),
        description: args.message.clone().unwrap_or_default(),
        created: now(),
        kind,
        kinds: args.kinds.iter().cloned().collect(),
        disks: args.disks.iter().cloned().collect(),
        files: files(&args.files)?,
    };
    let job = take(&RealDisk, tree, &request)?;
    let word = output::printable(&args.name);
    carry_out(tree, job, &args.act, false, &Said::Word(&word))
}

pub(crate) fn revert_to(args: &RevertArgs) -> Result<ExitCode> {
    let tree = Target::named(&args.on)?.tree_or_new(&args.on.place.trust())?;
    let mut request = RevertRequest {
        name: args.name.clone(),
        unsaved: match (&args.save_as, args.discard) {
            (Some(name), _) => Unsaved::SaveAs(name.clone()),
            (None, true) => Unsaved::Discard,
            (None, false) => Unsaved::Refuse,
        },
        created: now(),
        files: files(&args.files)?,
    };
    let mut planned = revert(&RealDisk, tree, &request);
    // On a terminal, losing the changes is what the plan asks about; so it is what a dry run shows.
    let asks = !args.act.yes || args.act.dry_run;
    if asks && matches!(&planned, Err(e) if e.kind == ErrorKind::NotConfirmed) {
        let reason = planned.err();
        request.unsaved = Unsaved::Discard;
        planned = revert(&RealDisk, tree, &request);
        if let Some(reason) = reason {
            output::note(&format!("{}, which are lost", reason.message));
        }
    }
    carry_out(tree, planned?, &args.act, true, &Said::Report)
}

/// The files that were given, by disk.
pub(crate) fn files(given: &[(String, PathBuf)]) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for (disk, path) in given {
        if files.insert(disk.clone(), path.clone()).is_some() {
            let text = format!("two files were given for disk \"{}\"", escape(disk.as_bytes()));
            return Err(Error::new(ErrorKind::Usage, text));
        }
    }
    Ok(files)
}

pub(crate) fn give_name(args: &RenameArgs) -> Result<ExitCode> {
    let tree = Target::named(&args.on)?.tree_or_new(&args.on.place.trust())?;
    let job = rename(&RealDisk, tree, &args.name, &args.new_name)?;
    carry_out(tree, job, &args.act, false, &Said::Report)
}

pub(crate) fn describe(args: &NoteArgs) -> Result<ExitCode> {
    let tree = Target::named(&args.on)?.tree_or_new(&args.on.place.trust())?;
    let Some(text) = &args.text else {
        let name = tree.resolve(&args.name)?;
        let description = tree.catalog.record.find(&name).map(|n| n.description.clone()).unwrap_or_default();
        if args.act.json {
            output::document(&json!({ "schema": 1, "name": name, "description": description }));
        } else if !description.is_empty() {
            output::print(&format!("{description}\n"));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let job = note(&RealDisk, tree, &args.name, text)?;
    carry_out(tree, job, &args.act, false, &Said::Report)
}

pub(crate) fn current(args: &CurrentArgs) -> Result<ExitCode> {
    let tree = Target::named(&args.on)?.tree_or_new(&args.on.place.trust())?;
    match &args.name {
        Some(name) => {
            let job = make_current(&RealDisk, tree, name)?;
            carry_out(tree, job, &args.act, false, &Said::Report)
        }
        None => {
            let current = tree.catalog.record.current.as_deref();
            if args.act.json {
                output::document(&json!({ "schema": 1, "current": current }));
                return Ok(ExitCode::SUCCESS);
            }
            let Some(current) = current else {
                return Err(Error::new(ErrorKind::NotFound, "the tree has no current snapshot"));
            };
            output::print(&format!("{}\n", escape(current.as_bytes())));
            Ok(ExitCode::SUCCESS)
        }
    }
}

pub(crate) fn show(args: &ShowArgs) -> Result<ExitCode> {
    let tree = Target::named(&args.on)?.tree_or_new(&args.on.place.trust())?;
    let record = &tree.catalog.record;
    if tree.resolve(&args.name).is_err() && tree.head_name().as_deref() == Some(&args.name) {
        let files: Vec<(String, Storage)> = record
            .disks
            .iter()
            .filter_map(|d| Some((d.name.clone(), Storage::External { file: d.active.clone()? })))
            .collect();
        return Ok(show_node(args, tree, "head", &args.name, record.current.as_deref(), &files, None));
    }
    let name = tree.resolve(&args.name)?;
    let node = record.find(&name).cloned();
    let node = node.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such node"))?;
    let kind = if node.kind == Kind::Head { "head" } else { "snapshot" };
    let children: Vec<String> =
        record.nodes.iter().filter(|n| n.parent.as_deref() == Some(&name)).map(|n| n.name.clone()).collect();
    let about = About {
        guessed: node.parent_guessed,
        current: record.current.as_deref() == Some(&name),
        created: node.created,
        description: node.description.clone(),
        state: node.state.clone(),
        children,
    };
    Ok(show_node(args, tree, kind, &name, node.parent.as_deref(), &node.storage, Some(about)))
}

/// What only snapshots have.
struct About {
    guessed: bool,
    current: bool,
    created: Option<i64>,
    description: String,
    state: Option<String>,
    children: Vec<String>,
}

fn show_node(
    args: &ShowArgs,
    tree: &Tree,
    kind: &str,
    name: &str,
    parent: Option<&str>,
    storage: &[(String, Storage)],
    about: Option<About>,
) -> ExitCode {
    if args.json {
        let mut node = json!({ "name": name, "kind": kind, "parent": parent, "storage": storage_object(Some(&tree.catalog), storage) });
        if let (Some(about), Some(node)) = (&about, node.as_object_mut()) {
            node.insert("parent_guessed".into(), json!(about.guessed));
            node.insert("current".into(), json!(about.current));
            node.insert("created".into(), json!(about.created));
            node.insert("description".into(), json!(about.description));
            node.insert("state".into(), json!(about.state));
            node.insert("children".into(), json!(about.children));
        }
        output::document(&json!({ "schema": 1, "node": node }));
        return ExitCode::SUCCESS;
    }
    let mut out = String::new();
    let mut line =
        |what: &str, text: &str| out.push_str(&format!("{what:<12} {}\n", escape(text.as_bytes())));
    line("name", name);
    line("kind", kind);
    line("parent", parent.unwrap_or("-"));
    if let Some(about) = &about {
        if about.guessed {
            line("", "(guessed)");
        }
        line("current", if about.current { "yes" } else { "no" });
        if let Some(created) = about.created {
            let time = jiff::Timestamp::from_second(created).map(|t| t.to_string());
            line("created", &time.unwrap_or_else(|_| created.to_string()));
        }
        if !about.description.is_empty() {
            line("description", &about.description);
        }
        if let Some(state) = &about.state {
            line("state", state);
        }
        if !about.children.is_empty() {
            line("children", &about.children.join(", "));
        }
    }
    for (disk, storage) in storage {
        let text = match storage {
            Storage::External { file } => format!("{} (external)", tree.catalog.shown(file)),
            Storage::Internal { file, snapshot, id } => {
                format!("snapshot \"{snapshot}\" (id {id}) in {}", tree.catalog.shown(file))
            }
        };
        out.push_str(&format!("{disk:<12} {}\n", output::printable(&text)));
    }
    output::print(&out);
    ExitCode::SUCCESS
}
