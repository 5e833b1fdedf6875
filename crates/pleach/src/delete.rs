//! `pleach delete`

use std::path::Path;
use std::process::ExitCode;

use pleach_engine::family::{State, shown};
use pleach_engine::survey::Survey;
use pleach_engine::tree::Tree;
use pleach_engine::verbs::{RemoveRequest, forget, remove};
use pleach_engine::{DeletePlan, DeleteRequest, Direction, Naming, Outcome, Rebase, Result, Work, prepare};
use pleach_image::{WantedBitmap, escape};
use pleach_lineage::DeleteMode;
use pleach_store::RealDisk;
use serde_json::{Value, json};

use crate::act::{carry_out, start_jobs};
use crate::args::DeleteArgs;
use crate::output::printable;
use crate::snapshots::{files, now};
use crate::target::{Target, directory};
use crate::{job, size};

pub(crate) fn run(args: &DeleteArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::named(&args.on)?;
    if let Some((tree, name)) = tree_of(args, &target)? {
        return in_tree(args, tree, name);
    }
    let mut survey = target.survey(&args.on.place.trust())?;
    let mut family = target.family(&survey)?;
    let node = family.resolve(&survey, &args.name)?;
    // What stands on the node may lie beside it, wherever that is.
    if let Some(State::File(index)) = family.state(node)
        && let Some(home) = survey.files.get(index).map(|f| directory(&f.path))
    {
        survey.also_directory(&RealDisk, &home)?;
        family = target.family(&survey)?;
    }
    let request = DeleteRequest {
        name: args.name.clone(),
        mode: mode(args),
        keep: args.keep.clone(),
        whole_tree: args.yes_everything,
    };
    let prepared = prepare(&RealDisk, &survey, &family, &request, args.run.changes())?;
    let view = View { survey: &survey, base: &target.base, bytes: args.run.act.bytes, verb: Verb::Delete };
    carry_out(&view, prepared, &args.run)
}

/// The tree in which the node is to be deleted: that of a catalog, or of one that the deletion needs; and what the node is
/// called there. None where the images alone can say everything.
fn tree_of(args: &DeleteArgs, target: &Target) -> Result<Option<(&'static Tree, String)>> {
    let trust = args.on.place.trust();
    if let Some(tree) = target.tree(&trust)? {
        return Ok(Some((tree, args.name.clone())));
    }
    if args.metadata || args.children || args.children_only {
        // Nothing to forget without a catalog; and files go as a whole.
        return Ok(None);
    }
    let survey = target.survey(&trust)?;
    let family = target.family(&survey)?;
    let state = family.state(family.resolve(&survey, &args.name)?);
    let (file, snapshot) = match state {
        Some(State::File(index)) => (survey.files.get(index).filter(|f| !f.snapshots.is_empty()), None),
        Some(State::Snapshot(index, at)) => (survey.files.get(index), Some(at)),
        None => (None, None),
    };
    let Some(file) = file else { return Ok(None) };
    let tree = target.tree_around(&file.path, &trust)?;
    // In a directory of several trees, names may be longer.
    let meant = tree.resolve(&args.name).ok();
    let other =
        tree.node_at(&RealDisk, file.stat.id, snapshot).filter(|node| meant.as_deref() != Some(*node));
    Ok(Some((tree, other.unwrap_or(&args.name).to_owned())))
}

/// Deletes a node of a tree that has a catalog.
fn in_tree(args: &DeleteArgs, tree: &Tree, name: String) -> Result<ExitCode> {
    let act = args.run.in_tree()?;
    let planned = if args.metadata {
        forget(&RealDisk, tree, &name, mode(args))?
    } else {
        let request = RemoveRequest {
            name,
            mode: mode(args),
            keep: args.keep.clone(),
            whole_tree: args.yes_everything,
            files: files(&args.files)?,
            created: now(),
        };
        remove(&RealDisk, tree, &request)?
    };
    let planned = if tree.catalog.is_new() { planned.without_new_catalog() } else { planned };
    job::carry_out(tree, planned, act, true, &job::Said::Report)
}

/// Which nodes go.
fn mode(args: &DeleteArgs) -> DeleteMode {
    match (args.children, args.children_only, args.metadata) {
        (true, ..) => DeleteMode::Children,
        (_, true, _) => DeleteMode::ChildrenOnly,
        (_, _, true) => DeleteMode::Metadata,
        _ => DeleteMode::Single,
    }
}

/// Guest bytes that a bitmap marks.
fn marked(bitmap: &WantedBitmap) -> u64 {
    bitmap.bits.ranges().iter().map(|range| range.end - range.start).sum()
}

/// What a plan does, in a word.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Delete,
    Merge,
    Commit,
    Rebase,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Self::Delete => "delete",
            Self::Merge => "merge",
            Self::Commit => "commit",
            Self::Rebase => "rebase",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Delete => "deleted",
            Self::Merge => "merged",
            Self::Commit => "committed",
            Self::Rebase => "rebased",
        }
    }
}

/// A plan for people and for programs.
pub(crate) struct View<'a> {
    pub(crate) survey: &'a Survey,
    pub(crate) base: &'a Path,
    pub(crate) bytes: bool,
    pub(crate) verb: Verb,
}

impl View<'_> {
    fn file(&self, index: usize) -> String {
        self.survey.files.get(index).map(|f| self.path(&f.path)).unwrap_or_default()
    }

    fn path(&self, path: &Path) -> String {
        shown(path, self.base)
    }

    fn size(&self, bytes: u64) -> String {
        size::show(bytes, self.bytes)
    }

    fn backing(&self, rebase: &Rebase) -> Option<String> {
        rebase.backing.as_ref().map(|b| escape(&b.name))
    }

    /// The plan as text, totals last.
    pub(crate) fn text(&self, plan: &DeletePlan) -> String {
        let mut out = format!("{} {}\n", self.verb.word(), printable(&plan.node));
        let mut line = |what: &str, text: String| out.push_str(&format!("  {what:<8} {text}\n"));
        self.lines(plan, &mut line);
        for reader in self.dependents(plan) {
            line("reads it", reader);
        }
        for (name, parent) in &plan.reparented {
            let name = printable(name);
            line(
                "parent",
                match parent {
                    Some(parent) => format!("of {name} is {}", printable(parent)),
                    None => format!("{name} becomes a root"),
                },
            );
        }
        line("total", self.totals(plan));
        out
    }

    /// Who stands on what is deleted, or on the image whose content stays.
    fn dependents(&self, plan: &DeletePlan) -> Vec<String> {
        let file = plan.single.as_ref().map(|(victim, merges, _)| match self.verb {
            Verb::Merge | Verb::Commit => merges.first().map_or(*victim, |merge| merge.reader),
            Verb::Delete | Verb::Rebase => *victim,
        });
        let file = file.and_then(|file| self.survey.files.get(file));
        file.map(|f| f.dependents.iter().map(|&d| self.file(d)).collect()).unwrap_or_default()
    }

    fn totals(&self, plan: &DeletePlan) -> String {
        let size = |bytes| self.size(bytes);
        let shared = match plan.bytes_cloned() {
            0 => String::new(),
            bytes => format!(" (of which {} shared)", size(bytes)),
        };
        format!(
            "{} read, {} written{shared}, {} freed",
            size(plan.bytes_read()),
            size(plan.bytes_written()),
            size(plan.bytes_freed)
        )
    }

    /// What files are called when all is done, and how long they are before and then.
    fn lengths(&self, plan: &DeletePlan, done: bool) -> Vec<(String, u64, u64)> {
        let mut all = Vec::new();
        for length in &plan.forecast.lengths {
            let Some(path) = plan.name_after(self.survey, length.file) else { continue };
            let now = std::fs::metadata(path).ok().filter(|_| done).map(|m| m.len());
            all.push((self.path(path), length.before, now.unwrap_or(length.after)));
        }
        all
    }

    /// What happens to files, a line each.
    pub(crate) fn lines(&self, plan: &DeletePlan, line: &mut impl FnMut(&str, String)) {
        for &(file, bytes) in &plan.forecast.reads {
            line("read", format!("{} of {}", self.size(bytes), self.file(file)));
        }
        for merge in plan.merges() {
            let (into, of) = (self.file(merge.target), self.size(merge.bytes_written));
            let victim = plan.single.as_ref().map(|s| self.file(s.0)).unwrap_or_default();
            line(
                "copy",
                match merge.direction {
                    Direction::Pull if self.verb == Verb::Rebase => {
                        format!("{of} into {into}: what its new backing file lacks")
                    }
                    Direction::Pull if self.verb == Verb::Merge => {
                        format!("{of} into {into}: what it lacks of the others")
                    }
                    Direction::Pull => format!("{of} into {into}: what it lacks of {victim}"),
                    Direction::Commit => format!("{of} into {into}: what {} has", self.file(merge.reader)),
                },
            );
        }
        for rebase in plan.rebases() {
            let file = self.file(rebase.file);
            line(
                "rebase",
                match self.backing(&rebase) {
                    Some(name) => format!("{file} onto {name}"),
                    None => format!("{file} onto nothing"),
                },
            );
        }
        for (from, to) in plan.renames(self.survey) {
            line("rename", format!("{} to {}", self.path(from), self.path(to)));
        }
        for merge in plan.merges() {
            let file = self.file(merge.target);
            for bitmap in &merge.bitmaps.put {
                let marked = self.size(marked(bitmap));
                line("bitmap", format!("\"{}\" of {file} marks {marked}", escape(&bitmap.name)));
            }
            for name in &merge.bitmaps.gone {
                line("bitmap", format!("\"{}\" of {file} goes", escape(name)));
            }
        }
        if let Some((_, _, Naming::Empty { reader, .. })) = &plan.single {
            line("empty", self.file(*reader));
        }
        for path in plan.unlinks(self.survey) {
            line("remove", self.path(path));
        }
        for (name, before, after) in self.lengths(plan, false) {
            let (before, after) = (self.size(before), self.size(after));
            line("length", format!("of {name} is {after}, was {before}"));
        }
    }

    /// What is lost although the names do not show it.
    pub(crate) fn warnings(&self, plan: &DeletePlan) -> Vec<String> {
        let linked = |path: &Path| {
            let file = self.survey.files.iter().find(|f| f.path == path).filter(|f| f.stat.links > 1)?;
            Some(format!(
                "{} has {} hard links: images that name another of them are not seen",
                self.path(path),
                file.stat.links
            ))
        };
        plan.unlinks(self.survey).into_iter().filter_map(linked).collect()
    }

    /// What was done, as text.
    pub(crate) fn done(&self, plan: &DeletePlan, outcome: Outcome) -> String {
        let (written, freed) = (self.size(outcome.bytes_written), self.size(outcome.bytes_freed));
        let shared = match outcome.bytes_cloned {
            0 => String::new(),
            bytes => format!(" (of which {} shared)", self.size(bytes)),
        };
        let mut out = format!("{} {}: {written} written{shared}", self.verb.done(), printable(&plan.node));
        out.push_str(&if self.verb == Verb::Rebase { "\n".to_owned() } else { format!(", {freed} freed\n") });
        for (from, to) in plan.renames(self.survey) {
            out.push_str(&format!("  {} is now called {}\n", self.path(from), self.path(to)));
        }
        out
    }

    /// The plan as JSON; with what happened in place of what was planned.
    pub(crate) fn object(&self, plan: &DeletePlan, outcome: Option<Outcome>) -> Value {
        let figures = outcome.unwrap_or(Outcome {
            bytes_written: plan.bytes_written(),
            bytes_cloned: plan.bytes_cloned(),
            bytes_freed: plan.bytes_freed,
        });
        let copies: Vec<Value> = plan
            .merges()
            .iter()
            .map(|m| {
                let clusters = match &m.work {
                    Work::Clusters { needs, .. } => {
                        Some(needs.iter().map(|n| n.clusters.end - n.clusters.start).sum::<u64>())
                    }
                    Work::States { fills, .. } => Some(fills.len() as u64),
                    Work::Raw { .. } => None,
                };
                json!({
                    "into": self.file(m.target),
                    "content_of": self.file(m.reader),
                    "direction": match m.direction { Direction::Pull => "pull", Direction::Commit => "commit" },
                    "bytes": m.bytes_written,
                    "clusters_changed": clusters,
                })
            })
            .collect();
        let reads: Vec<Value> = plan
            .forecast
            .reads
            .iter()
            .map(|&(file, bytes)| json!({ "file": self.file(file), "bytes": bytes }))
            .collect();
        let lengths: Vec<Value> = self
            .lengths(plan, outcome.is_some())
            .into_iter()
            .map(|(file, before, after)| json!({ "file": file, "before": before, "after": after }))
            .collect();
        let mut bitmaps: Vec<Value> = Vec::new();
        for merge in plan.merges() {
            let file = self.file(merge.target);
            let put = merge.bitmaps.put.iter().map(|b| (&b.name, Some(marked(b))));
            let gone = merge.bitmaps.gone.iter().map(|name| (name, None));
            bitmaps.extend(
                put.chain(gone).map(
                    |(name, marked)| json!({ "file": file, "name": escape(name), "dirty_bytes": marked }),
                ),
            );
        }
        let emptied: Vec<String> = match &plan.single {
            Some((_, _, Naming::Empty { reader, .. })) => vec![self.file(*reader)],
            _ => Vec::new(),
        };
        let renames: Vec<Value> = plan
            .renames(self.survey)
            .into_iter()
            .map(|(from, to)| json!({ "from": self.path(from), "to": self.path(to) }))
            .collect();
        let rebases: Vec<Value> = plan
            .rebases()
            .iter()
            .map(|r| json!({ "file": self.file(r.file), "backing_file": self.backing(r) }))
            .collect();
        let reparented: Vec<Value> =
            plan.reparented.iter().map(|(name, parent)| json!({ "name": name, "parent": parent })).collect();
        json!({
            "node": plan.node,
            "bytes_read": plan.bytes_read(),
            "bytes_written": figures.bytes_written,
            "bytes_cloned": figures.bytes_cloned,
            "bytes_freed": figures.bytes_freed,
            "reads": reads,
            "copies": copies,
            "renames": renames,
            "unlinks": plan.unlinks(self.survey).into_iter().map(|p| self.path(p)).collect::<Vec<_>>(),
            "rebases": rebases,
            "emptied": emptied,
            "bitmaps": bitmaps,
            "lengths": lengths,
            "dependents": self.dependents(plan),
            "reparented": reparented,
            "warnings": self.warnings(plan),
            "refused": null,
        })
    }
}
