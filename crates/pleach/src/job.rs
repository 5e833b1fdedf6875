//! Jobs on whole trees: shown, confirmed, run and reported, whatever the verb.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::catalog::Catalog;
use pleach_engine::family::shown;
use pleach_engine::tree::Tree;
use pleach_engine::verbs::{Act, Job};
use pleach_engine::{DeletePlan, Error, ErrorKind, Naming, Outcome, Result, Watch};
use pleach_image::escape;
use pleach_lineage::{Record, Storage};
use pleach_store::RealDisk;
use serde_json::{Map, Value, json};

use crate::act::start_jobs;
use crate::args::ActArgs;
use crate::confirm::confirm;
use crate::delete::{Verb, View};
use crate::progress::Progress;
use crate::{output, size};

/// A job, and what it is about.
pub(crate) struct JobView<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) job: &'a Job,
    pub(crate) bytes: bool,
    /// Bytes that are copied out of internal snapshots, where the plan is shown.
    pub(crate) copied: u64,
}

/// What is said when all is done.
pub(crate) enum Said<'a> {
    /// The plan in one line, and where the machine's disks are if that has changed.
    Report,
    /// This on stdout; where the disks are goes to stderr.
    Word(&'a str),
}

/// Shows what would be done, or does it. With `ask` it must be confirmed.
pub(crate) fn carry_out(
    tree: &Tree,
    mut job: Job,
    args: &ActArgs,
    ask: bool,
    said: &Said<'_>,
) -> Result<ExitCode> {
    start_jobs(args.pace.jobs)?;
    let shows = args.dry_run || ask && !args.yes;
    let copied = if shows { job.bytes_copied(&RealDisk)? } else { 0 };
    let view = JobView { tree, job: &job, bytes: args.bytes, copied };
    for difference in &tree.differences {
        output::note(difference);
    }
    for warning in &job.warnings {
        output::warn(&Error::new(ErrorKind::Failed, warning.clone()));
    }
    if args.dry_run {
        if args.json {
            output::document(&json!({ "schema": 1, "plan": view.object(None) }));
        } else {
            output::print(&view.text());
        }
        return Ok(ExitCode::SUCCESS);
    }
    if ask && !args.yes && !job.is_empty() {
        confirm(&view.text())?;
    }
    let mut report = view.object(None);
    let text = view.what();
    let removed = job.bytes_removed;
    let figures = !job.merges.is_empty() || removed > 0;
    let watch = Arc::new(Watch::limited(args.pace.bandwidth));
    let progress = Progress::start(args.pace.progress.show, &watch);
    let after = std::mem::take(&mut job.record);
    let outcome = job.run(&RealDisk, &watch);
    drop(progress);
    let outcome = outcome?;
    if args.json {
        put_figures(&mut report, outcome);
        output::document(&json!({
            "schema": 1,
            "tree": after.tree,
            "catalog": shown(&tree.catalog.real_path(), tree.catalog.base()),
            "current": after.current,
            "disks": disks(&tree.catalog, &after),
            "plan": report,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let moved = moved_disks(&tree.catalog, &after);
    match said {
        Said::Report => {
            let mut line = text;
            if figures {
                let (written, freed) = (
                    size::show(outcome.bytes_written, args.bytes),
                    size::show(outcome.bytes_freed, args.bytes),
                );
                line.push_str(&format!(": {written} written, {freed} freed"));
            }
            output::print(&format!("{line}\n{moved}"));
        }
        Said::Word(word) => {
            output::print(&format!("{word}\n"));
            eprint!("{}", output::lines(&moved));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A line for each disk that has another active image.
fn moved_disks(catalog: &Catalog, after: &Record) -> String {
    let mut out = String::new();
    for disk in &after.disks {
        let old = catalog.record.disk(&disk.name).and_then(|d| d.active.as_deref());
        if old == disk.active.as_deref() {
            continue;
        }
        let (name, file) = (escape(disk.name.as_bytes()), disk.active.as_deref().map(|f| catalog.shown(f)));
        match file {
            Some(file) => out.push_str(&format!("  the active image of {name} is now {file}\n")),
            None => out.push_str(&format!("  {name} has no active image any more\n")),
        }
    }
    out
}

fn disks(catalog: &Catalog, record: &Record) -> Vec<Value> {
    let active = |file: &Option<String>| file.as_deref().map(|file| catalog.shown(file));
    record.disks.iter().map(|d| json!({ "name": d.name, "active": active(&d.active) })).collect()
}

/// What really happened, in place of what was planned.
fn put_figures(plan: &mut Value, outcome: Outcome) {
    if let Some(plan) = plan.as_object_mut() {
        let planned = |key: &str| plan.get(key).and_then(Value::as_u64).unwrap_or(0);
        // What is copied out of internal snapshots is read too.
        let copied = outcome.bytes_written.saturating_sub(planned("bytes_written"));
        let read = planned("bytes_read") + copied;
        plan.insert("bytes_read".into(), json!(read));
        plan.insert("bytes_written".into(), json!(outcome.bytes_written));
        plan.insert("bytes_cloned".into(), json!(outcome.bytes_cloned));
        plan.insert("bytes_freed".into(), json!(outcome.bytes_freed));
    }
}

/// A node's state of each disk.
pub(crate) fn storage_object<'a>(
    catalog: Option<&Catalog>,
    storage: impl IntoIterator<Item = &'a (String, Storage)>,
) -> Map<String, Value> {
    let value = |storage: &Storage| {
        let file = catalog.map_or_else(|| storage.file().to_owned(), |c| c.shown(storage.file()));
        match storage {
            Storage::External { .. } => json!({ "kind": "external", "file": file }),
            Storage::Internal { snapshot, id, .. } => {
                json!({ "kind": "internal", "file": file, "snapshot": snapshot, "id": id })
            }
        }
    };
    storage.into_iter().map(|(disk, storage)| (disk.clone(), value(storage))).collect()
}

impl JobView<'_> {
    fn path(&self, path: &Path) -> String {
        shown(path, self.tree.catalog.base())
    }

    fn view(&self, plan: &DeletePlan) -> View<'_> {
        let verb = match plan.single {
            Some((_, _, Naming::Stay(_))) => Verb::Rebase,
            _ => Verb::Delete,
        };
        View { survey: &self.tree.survey, base: self.tree.catalog.base(), bytes: self.bytes, verb }
    }

    fn what(&self) -> String {
        self.job.what.clone()
    }

    /// The plan for people, totals last.
    fn text(&self) -> String {
        let mut out = format!("{}\n", self.what());
        if self.job.is_empty() {
            out.push_str("  nothing to do\n");
            return out;
        }
        let mut line = |what: &str, text: String| out.push_str(&format!("  {what:<8} {text}\n"));
        for act in &self.job.acts {
            match act {
                Act::Overlay { file, backing } => {
                    line("create", format!("{} over {backing}", self.path(file)))
                }
                Act::Bitmap { file, name } => {
                    line("record", format!("in bitmap \"{name}\" of {} what is written", self.path(file)));
                }
                Act::Copy { file, from, snapshot } => {
                    line(
                        "copy",
                        format!("snapshot \"{snapshot}\" of {} into {}", self.path(from), self.path(file)),
                    );
                }
                Act::Take { file, snapshot } => {
                    line("keep", format!("{} as snapshot \"{snapshot}\" in it", self.path(file)));
                }
                Act::Apply { file, snapshot } => line(
                    "rewrite",
                    format!("{} is as in snapshot \"{snapshot}\"; what it is now is lost", self.path(file)),
                ),
                Act::Drop { file, snapshot } => {
                    line("drop", format!("snapshot \"{snapshot}\" in {}", self.path(file)));
                }
                Act::Relabel { file, from, to } => {
                    line("rename", format!("snapshot \"{from}\" in {} to \"{to}\"", self.path(file)));
                }
                Act::Remove { file } => line("remove", self.path(file)),
            }
        }
        for merge in &self.job.merges {
            self.view(merge).lines(merge, &mut line);
        }
        for reader in &self.job.dependents {
            line("reads it", self.path(reader));
        }
        for (name, parent) in &self.job.reparented {
            let name = escape(name.as_bytes());
            line(
                "parent",
                match parent {
                    Some(parent) => format!("of {name} is {}", escape(parent.as_bytes())),
                    None => format!("{name} becomes a root"),
                },
            );
        }
        if self.job.record.current != self.tree.catalog.record.current {
            let current = self.job.record.current.as_deref().map(|c| escape(c.as_bytes()));
            line("current", format!("is {}", current.as_deref().unwrap_or("none")));
        }
        let (written, freed) = self.totals();
        line(
            "total",
            format!("{} written, {} freed", size::show(written, self.bytes), size::show(freed, self.bytes)),
        );
        out
    }

    fn totals(&self) -> (u64, u64) {
        let merges = &self.job.merges;
        let written = merges.iter().map(DeletePlan::bytes_written).sum::<u64>() + self.copied;
        let freed = merges.iter().map(|m| m.bytes_freed).sum::<u64>() + self.job.bytes_removed;
        (written, freed)
    }

    /// The plan as JSON.
    fn object(&self, outcome: Option<Outcome>) -> Value {
        let (written, freed) = self.totals();
        let cloned: u64 = self.job.merges.iter().map(DeletePlan::bytes_cloned).sum();
        let mut lists: Map<String, Value> = Map::new();
        for key in ["reads", "copies", "renames", "unlinks", "rebases", "dependents", "lengths"] {
            let of = |merge: &DeletePlan| {
                self.view(merge).object(merge, None).get(key).and_then(|v| v.as_array().cloned())
            };
            let all: Vec<Value> = self.job.merges.iter().filter_map(of).flatten().collect();
            lists.insert(key.to_owned(), Value::Array(all));
        }
        let mut push = |key: &str, value: Value| {
            if let Some(list) = lists.entry(key).or_insert_with(|| json!([])).as_array_mut() {
                list.push(value);
            }
        };
        for act in &self.job.acts {
            match act {
                Act::Overlay { file, backing } => {
                    push(
                        "creates",
                        json!({ "file": self.path(file), "backing_file": backing, "snapshot": null }),
                    );
                }
                Act::Bitmap { file, name } => {
                    push("bitmaps", json!({ "file": self.path(file), "bitmap": name }));
                }
                Act::Copy { file, from, snapshot } => push(
                    "creates",
                    json!({ "file": self.path(file), "content_of": self.path(from), "snapshot": snapshot }),
                ),
                Act::Take { file, snapshot } => {
                    push("snapshots", json!({ "do": "take", "file": self.path(file), "snapshot": snapshot }));
                }
                Act::Apply { file, snapshot } => {
                    push(
                        "snapshots",
                        json!({ "do": "apply", "file": self.path(file), "snapshot": snapshot }),
                    );
                }
                Act::Drop { file, snapshot } => {
                    push(
                        "snapshots",
                        json!({ "do": "delete", "file": self.path(file), "snapshot": snapshot }),
                    );
                }
                Act::Relabel { file, from, to } => push(
                    "snapshots",
                    json!({ "do": "rename", "file": self.path(file), "snapshot": from, "to": to }),
                ),
                Act::Remove { file } => push("unlinks", json!(self.path(file))),
            }
        }
        let reparented: Vec<Value> =
            self.job.reparented.iter().map(|(n, p)| json!({ "name": n, "parent": p })).collect();
        let mut plan = json!({
            "operation": self.job.what,
            "bytes_read": self.job.merges.iter().map(DeletePlan::bytes_read).sum::<u64>() + self.copied,
            "bytes_written": written,
            "bytes_cloned": cloned,
            "bytes_freed": freed,
            "reparented": reparented,
            "current": self.job.record.current,
            "warnings": self.job.warnings,
            "refused": null,
        });
        if let Some(plan) = plan.as_object_mut() {
            plan.extend(lists);
            for key in ["creates", "bitmaps", "snapshots"] {
                plan.entry(key).or_insert_with(|| json!([]));
            }
        }
        if let Some(outcome) = outcome {
            put_figures(&mut plan, outcome);
        }
        plan
    }
}
