//! `pleach scan`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use pleach_engine::family::{Family, ONLY_DISK, State, shown};
use pleach_engine::survey::{Backing, Survey};
use pleach_engine::tree::Tree;
use pleach_engine::{Error, ErrorKind, Result, pending};
use pleach_image::escape;
use pleach_lineage::{Kind, NodeId};
use pleach_store::RealDisk;
use serde_json::{Value, json};

use crate::args::ScanArgs;
use crate::output;
use crate::target::{Target, free_tree, problems};

/// One tree that was found.
struct Found {
    name: String,
    /// `None` where there is none, and none was made.
    catalog: Option<PathBuf>,
    files: Vec<String>,
    /// Where the catalog and the images differ, and what was guessed.
    notes: Vec<String>,
    written: bool,
}

pub(crate) fn run(args: &ScanArgs) -> Result<ExitCode> {
    let target = Target::of(&args.directory, &args.place.also)?;
    if target.image.is_some() {
        return Err(Error::new(ErrorKind::Usage, "is not a directory").at(&args.directory));
    }
    let trust = args.place.trust();
    for dir in target.directories.iter().filter(|_| args.write) {
        if let Some(journal) = pending(&RealDisk, dir)?.into_iter().next() {
            let text = "an operation on these images was interrupted: what they say may be half-way";
            let hint = format!("finish it first: pleach resume {}", dir.display());
            return Err(Error::new(ErrorKind::Failed, text).at(journal).hint(hint));
        }
    }
    let mut found = Vec::new();
    let mut claimed = BTreeSet::new();
    let mut wrong = Vec::new();
    let mut trees = Vec::new();
    for path in &target.catalogs {
        match Tree::load(&RealDisk, path, &args.place.also, &trust) {
            Ok(tree) => trees.push(tree),
            // Nobody knows which images it names: none may get a second catalog.
            Err(error) if args.write => return Err(error),
            Err(error) => wrong.push(error),
        }
    }
    for tree in trees {
        let files = tree.catalog.record.files();
        let ids = files.iter().filter_map(|f| tree.survey.find(&RealDisk, &tree.catalog.path_of(f)));
        claimed.extend(ids.filter_map(|i| tree.survey.files.get(i)).map(|f| f.stat.id));
        found.push(with_catalog(tree, args.write)?);
    }
    let survey = Survey::of_directories(&RealDisk, &target.directories, &trust)?;
    let family = Family::of(&survey, &target.base)?;
    for root in family.lineage.roots() {
        let nodes = family.tree_of(root);
        let files: BTreeSet<usize> = nodes.iter().flat_map(|&id| family.states(id)).map(file_of).collect();
        if !files.iter().filter_map(|&i| survey.files.get(i)).any(|f| claimed.contains(&f.stat.id)) {
            found.push(without_catalog(args, &target, &survey, &family, &nodes, &files)?);
        }
    }
    wrong.extend(problems(&survey));
    wrong.extend(survey.broken.iter().map(|b| Error::new(b.error.kind, b.error.full()).at(&b.path)));
    let orphans: Vec<String> = survey
        .files
        .iter()
        .filter(|f| matches!(f.backing, Backing::Broken { .. }))
        .map(|f| shown(&f.path, &target.base))
        .collect();
    if args.json {
        let trees: Vec<Value> = found
            .iter()
            .map(|t| {
                json!({
                    "tree": t.name,
                    "catalog": t.catalog.as_ref().map(|p| p.display().to_string()),
                    "files": t.files,
                    "differences": t.notes,
                    "written": t.written,
                })
            })
            .collect();
        let mut document = json!({
            "schema": 1,
            "directory": target.base.display().to_string(),
            "trees": trees,
            "orphans": orphans,
            "problems": wrong.iter().map(output::object).collect::<Vec<_>>(),
        });
        if let (Some(first), Some(object)) = (wrong.first(), document.as_object_mut()) {
            object.insert("error".to_owned(), output::object(first));
        }
        output::document(&document);
    } else {
        output::print(&found.iter().map(text).collect::<String>());
        for orphan in &orphans {
            output::print(&format!("orphan {orphan}\n"));
        }
        wrong.iter().for_each(output::report);
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(found: &Found) -> String {
    let catalog = match (&found.catalog, found.written) {
        (Some(path), true) => format!("catalog {}, written", output::path(path)),
        (Some(path), false) => format!("catalog {}", output::path(path)),
        (None, _) => "no catalog".to_owned(),
    };
    let mut out = format!("{}  ({catalog})\n", escape(found.name.as_bytes()));
    for file in &found.files {
        out.push_str(&format!("  {}\n", output::printable(file)));
    }
    for note in &found.notes {
        out.push_str(&format!("  note: {note}\n"));
    }
    out
}

fn with_catalog(mut tree: Tree, write: bool) -> Result<Found> {
    let mut notes = tree.differences.clone();
    let mut written = false;
    if write && !notes.is_empty() {
        notes.extend(tree.mend()?);
        tree.catalog.save(&RealDisk)?;
        written = true;
    }
    Ok(of_tree(&tree, notes, written))
}

fn of_tree(tree: &Tree, notes: Vec<String>, written: bool) -> Found {
    Found {
        name: tree.name().to_owned(),
        catalog: Some(tree.catalog.path().to_owned()).filter(|_| written || !tree.catalog.is_new()),
        files: tree.catalog.record.files().into_iter().map(|file| tree.catalog.shown(file)).collect(),
        notes,
        written,
    }
}

/// Images that hang together and that no catalog names.
fn without_catalog(
    args: &ScanArgs,
    target: &Target,
    survey: &Survey,
    family: &Family,
    nodes: &BTreeSet<NodeId>,
    files: &BTreeSet<usize>,
) -> Result<Found> {
    let path = |index: usize| survey.files.get(index).map(|f| f.path.clone()).unwrap_or_default();
    let first = files.iter().map(|&i| path(i)).min().unwrap_or_default();
    let root = nodes.first().and_then(|&id| family.state(id)).map_or(first, |state| path(file_of(&state)));
    let stem = root.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let shown_files = files.iter().map(|&i| shown(&path(i), &target.base)).collect();
    let mut found =
        Found { name: stem.clone(), catalog: None, files: shown_files, notes: Vec::new(), written: false };
    if !args.write {
        return Ok(found);
    }
    let heads: Vec<PathBuf> = nodes
        .iter()
        .filter(|&&id| family.lineage.get(id).is_some_and(|n| n.kind == Kind::Head))
        .filter_map(|&id| family.state(id))
        .map(|state| path(file_of(&state)))
        .collect();
    let Some(active) = heads.iter().max_by_key(|path| changed(path)) else {
        found.notes.push("no catalog is made: nothing could be the active image".to_owned());
        return Ok(found);
    };
    let name = free_tree(&target.base, &stem);
    let disks = [(ONLY_DISK.to_owned(), active.clone())];
    let trust = args.place.trust();
    let mut tree = Tree::adopt(&RealDisk, &target.base, &name, &disks, &args.place.also, &trust)?;
    let mut notes = tree.differences.clone();
    if heads.len() > 1 {
        let guess = shown(active, &target.base);
        notes.push(format!(
            "guessed: {guess} is the active image, as the one of {} heads written last",
            heads.len()
        ));
    }
    let guessed = tree.catalog.record.nodes.iter().filter(|n| n.parent_guessed).count();
    if guessed > 0 {
        notes.push(format!("guessed: the parents of {guessed} nodes, from the order of the snapshots"));
    }
    tree.catalog.save(&RealDisk)?;
    Ok(of_tree(&tree, notes, true))
}

fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn file_of(state: &State) -> usize {
    match *state {
        State::File(index) | State::Snapshot(index, _) => index,
    }
}
