//! `pleach tree`

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::family::{self, Family, ONLY_DISK, State};
use pleach_engine::survey::{Survey, SurveyFile};
use pleach_engine::tree::Tree;
use pleach_engine::{Error, ErrorKind, Result, Sizes, pending, sizes, unfinished};
use pleach_lineage::text::{Style, rows};
use pleach_lineage::{Kind, Lineage, Node, NodeId, Storage};
use pleach_store::{Access, Disk, RealDisk, Role};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};

use crate::args::TreeArgs;
use crate::job::storage_object;
use crate::output::printable;
use crate::target::{Target, problems};
use crate::{output, size};

/// What is shown: the hierarchy of some images, and what is known of it as a whole.
struct Picture<'a> {
    survey: &'a Survey,
    family: &'a Family,
    shown: BTreeSet<NodeId>,
    /// The directory that file names are relative to.
    base: PathBuf,
    name: Option<String>,
    catalog: Option<&'a Tree>,
    /// The node that the machine writes to, where a catalog says so.
    head: Option<String>,
    measured: BTreeMap<NodeId, Sizes>,
    wrong: Vec<Error>,
}

pub(crate) fn run(args: &TreeArgs) -> Result<ExitCode> {
    let target = Target::of(&args.target, &args.place.also)?;
    let trust = args.place.trust();
    let trees = if args.all { &[] } else { target.trees(&trust)? };
    if !trees.is_empty() {
        return run_trees(args, trees);
    }
    let survey = target.survey(&trust)?;
    let family = target.family(&survey)?;
    let shown = shown(&target, &survey, &family);
    let name = std::path::absolute(target.image.as_ref().unwrap_or(&target.base)).ok();
    let name = name.as_ref().and_then(|n| if target.image.is_some() { n.file_stem() } else { n.file_name() });
    let name = name.map(|n| n.to_string_lossy().into_owned());
    let mut picture = Picture {
        survey: &survey,
        family: &family,
        shown,
        base: target.base.clone(),
        name,
        catalog: None,
        head: None,
        measured: BTreeMap::new(),
        wrong: Vec::new(),
    };
    picture.look(args, target.image.is_some())?;
    finish(args, &[picture])
}

/// Trees that have catalogs.
fn run_trees(args: &TreeArgs, trees: &[Tree]) -> Result<ExitCode> {
    let families = trees.iter().map(|tree| tree.family(&RealDisk)).collect::<Result<Vec<_>>>()?;
    let mut pictures = Vec::new();
    // They stay, as the trees do.
    for (tree, family) in trees.iter().zip(&*families.leak()) {
        let mut picture = Picture {
            survey: &tree.survey,
            family,
            shown: family.lineage.ids().collect(),
            base: tree.catalog.base().to_owned(),
            name: Some(tree.name().to_owned()),
            catalog: Some(tree),
            head: tree.head_name(),
            measured: BTreeMap::new(),
            wrong: Vec::new(),
        };
        for journal in pending(&RealDisk, &picture.base)? {
            let error = unfinished(&RealDisk, &journal);
            if error.kind == ErrorKind::InUse {
                output::warn(&error);
                continue;
            }
            let text = "an operation on these images was interrupted: what is shown may be half-way";
            let hint = format!("finish it: pleach resume {}", picture.base.display());
            output::warn(&Error::new(ErrorKind::Failed, text).at(journal).hint(hint));
        }
        picture.look(args, true)?;
        for missing in &tree.missing {
            let of = missing
                .node
                .as_deref()
                .map_or("the active head".to_owned(), |n| format!("\"{}\"", printable(n)));
            let text = format!("{} of {of} is missing", missing.what);
            let hint = "put it back, or let the catalog forget it: pleach delete --metadata, or scan --write";
            picture.wrong.push(Error::new(ErrorKind::NotFound, text).at(tree.catalog.path()).hint(hint));
        }
        pictures.push(picture);
    }
    finish(args, &pictures)
}

/// Prints what was looked at.
fn finish(args: &TreeArgs, pictures: &[Picture<'_>]) -> Result<ExitCode> {
    if args.json {
        match pictures {
            [one] => output::stream(one),
            several => output::stream(&Several { schema: 1, trees: several }),
        }
    } else {
        for (n, picture) in pictures.iter().enumerate() {
            if pictures.len() > 1 {
                let name = picture.name.as_deref().map(printable).unwrap_or_default();
                output::print(&format!("{}{name}:\n", if n > 0 { "\n" } else { "" }));
            }
            output::print(&if args.dot { picture.dot() } else { picture.text(args)? });
            for difference in picture.catalog.iter().flat_map(|tree| &tree.differences) {
                output::note(difference);
            }
            picture.wrong.iter().for_each(output::report);
        }
    }
    let fine = pictures.iter().all(|p| p.wrong.is_empty());
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Trees as one document.
#[derive(serde::Serialize)]
struct Several<'a> {
    schema: u32,
    trees: &'a [Picture<'a>],
}

/// What `tree --json` prints. Of the nodes only one at a time is turned into JSON: an image may have very many snapshots.
impl Serialize for Picture<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let mut object = out.serialize_map(None)?;
        for (key, value) in self.document().as_object().into_iter().flatten() {
            match key.as_str() {
                "nodes" => object.serialize_entry(key, &Nodes(self))?,
                _ => object.serialize_entry(key, value)?,
            }
        }
        object.end()
    }
}

struct Nodes<'a>(&'a Picture<'a>);

impl Serialize for Nodes<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let Picture { family, shown, measured, catalog, .. } = self.0;
        let ids = family.lineage.depth_first().map(|(_, id)| id).filter(|id| shown.contains(id));
        out.collect_seq(ids.map(|id| node(&family.lineage, id, measured.get(&id), *catalog)))
    }
}

impl Picture<'_> {
    /// The files whose states are shown.
    fn files(&self) -> BTreeSet<usize> {
        let states = self.shown.iter().flat_map(|&id| self.family.states(id));
        states
            .map(|state| match *state {
                State::File(index) | State::Snapshot(index, _) => index,
            })
            .collect()
    }

    /// Locks and measures what is shown, collects what is wrong, and then leaves out what was not asked for. With `only`
    /// what is wrong with other images does not count.
    fn look(&mut self, args: &TreeArgs, only: bool) -> Result<()> {
        let role = if args.force_share { Role::Look } else { Role::Read };
        let files = self.files();
        for file in files.iter().filter_map(|&i| self.survey.files.get(i)) {
            lock(file, role)?;
        }
        let survey = self.survey;
        let mut wrong = problems(survey);
        wrong.extend(survey.broken.iter().map(|b| Error::new(b.error.kind, b.error.full()).at(&b.path)));
        wrong.extend(survey.unreadable.iter().map(|e| {
            let error = Error::new(e.kind, e.full());
            e.path.iter().fold(error, |error, path| error.at(path))
        }));
        if only {
            // Only what concerns the tree that was asked for.
            let paths: BTreeSet<&Path> =
                files.iter().filter_map(|&i| survey.files.get(i)).map(|f| f.path.as_path()).collect();
            wrong.retain(|e| e.path.as_deref().is_none_or(|path| paths.contains(path)));
        }
        self.wrong = wrong;
        if args.sizes || args.json {
            match sizes(&RealDisk, survey, self.family, &self.shown, role) {
                Ok(measured) => self.measured = measured,
                // The hierarchy is worth showing even where a figure cannot be had.
                Err(error) if !args.sizes => self.wrong.push(error),
                Err(error) => return Err(error),
            }
        }
        self.filter(args)
    }

    fn filter(&mut self, args: &TreeArgs) -> Result<()> {
        let lineage = &self.family.lineage;
        if let Some(name) = &args.from {
            let by_name = lineage.find(name);
            let node = match self.catalog {
                Some(tree) if by_name.is_none() => lineage.find(&tree.resolve(name)?),
                None if by_name.is_none() => Some(self.family.resolve(self.survey, name)?),
                _ => by_name,
            };
            let node = node.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("there is no node named \"{}\"", printable(name)))
            })?;
            let below: BTreeSet<NodeId> = std::iter::once(node).chain(lineage.descendants(node)).collect();
            self.shown.retain(|id| below.contains(id));
        }
        if args.leaves {
            self.shown.retain(|&id| lineage.children(id).is_empty());
        }
        if args.roots {
            self.shown.retain(|&id| lineage.parent(id).is_none());
        }
        Ok(())
    }

    /// What is shown, as a hierarchy of its own.
    fn part(&self) -> Result<Cow<'_, Lineage>> {
        let whole = &self.family.lineage;
        if self.shown.len() == whole.len() {
            return Ok(Cow::Borrowed(whole));
        }
        let mut part = Lineage::new();
        for (_, id) in whole.depth_first().filter(|(_, id)| self.shown.contains(id)) {
            let Some(node) = whole.get(id) else { continue };
            let parent = node.parent.and_then(|p| whole.get(p)).and_then(|p| part.find(&p.name));
            let new = part.insert(Node { parent, ..node.clone() })?;
            if whole.current() == Some(id) {
                part.set_current(Some(new))?;
            }
        }
        Ok(Cow::Owned(part))
    }

    fn text(&self, args: &TreeArgs) -> Result<String> {
        let style = if args.ascii { Style::Ascii } else { Style::Unicode };
        let part = self.part()?;
        let lines: Vec<(String, Option<&Sizes>)> = rows(&part, style)
            .into_iter()
            .map(|row| {
                let id = match &part {
                    Cow::Borrowed(_) => Some(row.id),
                    Cow::Owned(part) => part.get(row.id).and_then(|n| self.family.lineage.find(&n.name)),
                };
                let figures = id.and_then(|id| self.measured.get(&id));
                (format!("{}{}", row.prefix, self.label(&part, row.id)), figures)
            })
            .collect();
        let mut out = String::new();
        if !args.sizes {
            for (line, _) in &lines {
                out.push_str(line.trim_end());
                out.push('\n');
            }
            return Ok(out);
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
        for (line, figures) in &lines {
            let show =
                |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |v| size::show(v, args.bytes));
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
        Ok(out)
    }

    /// A file name of the hierarchy, for people.
    fn file(&self, name: &str) -> String {
        printable(&self.catalog.map_or_else(|| name.to_owned(), |tree| tree.catalog.shown(name)))
    }

    /// Name, what it is, and where.
    fn label(&self, lineage: &Lineage, id: NodeId) -> String {
        let Some(node) = lineage.get(id) else { return String::new() };
        let mut notes = Vec::new();
        let several = self.catalog.is_some_and(|tree| tree.catalog.record.disks.len() > 1);
        for (disk, storage) in &node.storage {
            let place = match storage {
                Storage::External { file } => self.file(file),
                Storage::Internal { file, id, .. } => {
                    format!("internal #{} in {}", printable(id), self.file(file))
                }
            };
            notes.push(if several { format!("{}: {place}", printable(disk)) } else { place });
        }
        if node.kind == Kind::Head {
            notes.push("head".to_owned());
        }
        if self.head.as_ref() == Some(&node.name) {
            notes.push("you are here".to_owned());
        }
        if lineage.current() == Some(id) {
            notes.push("current".to_owned());
        }
        if node.parent_guessed {
            notes.push("parent guessed from creation order".to_owned());
        }
        let name = printable(&node.name);
        if notes.is_empty() { name } else { format!("{name}  ({})", notes.join(", ")) }
    }

    /// The tree for Graphviz.
    fn dot(&self) -> String {
        let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let lineage = &self.family.lineage;
        let name = self.name.as_deref().map(printable).unwrap_or_default();
        let mut out = format!("digraph {} {{\n  node [shape=box];\n", quote(&name));
        for (_, id) in lineage.depth_first().filter(|(_, id)| self.shown.contains(id)) {
            let Some(node) = lineage.get(id) else { continue };
            let style = match (node.kind, lineage.current() == Some(id)) {
                (Kind::Head, _) => ", style=dashed",
                (_, true) => ", style=bold",
                _ => "",
            };
            out.push_str(&format!(
                "  {} [label={}{style}];\n",
                quote(&printable(&node.name)),
                quote(&self.label(lineage, id))
            ));
            if let Some(parent) = node.parent.filter(|p| self.shown.contains(p)).and_then(|p| lineage.get(p))
            {
                out.push_str(&format!(
                    "  {} -> {};\n",
                    quote(&printable(&parent.name)),
                    quote(&printable(&node.name))
                ));
            }
        }
        out.push_str("}\n");
        out
    }

    /// All that `--json` prints but the nodes, whose list is empty here.
    fn document(&self) -> Value {
        let lineage = &self.family.lineage;
        let current = lineage.current().filter(|id| self.catalog.is_some() || self.shown.contains(id));
        let mut document = json!({
            "schema": 1,
            "tree": self.name,
            "catalog": self.catalog.map(|tree| family::shown(&tree.catalog.real_path(), &self.base)),
            "current": current.and_then(|id| lineage.get(id)).map(|n| n.name.as_str()),
            "disks": self.disks(),
            "nodes": [],
            "problems": self.wrong.iter().map(output::object).collect::<Vec<_>>(),
        });
        if let (Some(tree), Some(object)) = (self.catalog, document.as_object_mut()) {
            object.insert("differences".to_owned(), json!(tree.differences));
        }
        // What makes the exit code other than 0 is found where other verbs have it.
        if let (Some(first), Some(object)) = (self.wrong.first(), document.as_object_mut()) {
            object.insert("error".to_owned(), output::object(first));
        }
        document
    }

    fn disks(&self) -> Vec<Value> {
        let size =
            |file: &SurveyFile| file.header.as_ref().map_or(file.stat.len, pleach_format::Header::size);
        if let Some(tree) = self.catalog {
            let found = |active: &Option<String>| {
                let path = tree.catalog.path_of(active.as_deref()?);
                tree.survey.find(&RealDisk, &path).and_then(|i| tree.survey.files.get(i))
            };
            let disks = tree.catalog.record.disks.iter();
            return disks
                .map(|d| {
                    json!({
                        "name": d.name,
                        "active": d.active.as_deref().map(|file| tree.catalog.shown(file)),
                        "virtual_size": found(&d.active).map(size),
                    })
                })
                .collect();
        }
        let heads: Vec<usize> = self
            .family
            .heads()
            .filter(|id| self.shown.contains(id))
            .filter_map(|id| match self.family.state(id) {
                Some(State::File(index)) => Some(index),
                _ => None,
            })
            .collect();
        let active = match heads.as_slice() {
            [one] => self.survey.files.get(*one),
            _ => None,
        };
        vec![json!({
            "name": ONLY_DISK,
            "active": active.map(|f| family::shown(&f.path, &self.base)),
            "virtual_size": active.map(size),
        })]
    }
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

fn node(lineage: &Lineage, id: NodeId, figures: Option<&Sizes>, tree: Option<&Tree>) -> Value {
    let Some(node) = lineage.get(id) else { return Value::Null };
    let parent = node.parent.and_then(|p| lineage.get(p)).map(|p| p.name.as_str());
    let storage = storage_object(tree.map(|tree| &tree.catalog), &node.storage);
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
