//! `pleach compact`

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::{Result, Watch, compact, plan_compact};
use pleach_image::{CompactOptions, Compaction};
use pleach_store::RealDisk;
use serde_json::{Value, json};

use crate::act::start_jobs;
use crate::args::CompactArgs;
use crate::progress::Progress;
use crate::{output, size};

pub(crate) fn run(args: &CompactArgs) -> Result<ExitCode> {
    start_jobs(args.jobs)?;
    let options = CompactOptions { zeroes: args.zeroes };
    let done = if args.dry_run {
        plan_compact(&RealDisk, &args.image, options)?
    } else {
        let watch = Arc::new(Watch::new());
        let progress = Progress::start(args.progress.show, &watch);
        let done = compact(&RealDisk, &args.image, options, &watch);
        drop(progress);
        done?
    };
    if args.json {
        output::document(&json!({ "schema": 1, "plan": document(&args.image, &done) }));
    } else {
        output::print(&text(&args.image, &done, args.bytes, args.dry_run));
    }
    Ok(ExitCode::SUCCESS)
}

fn document(path: &Path, done: &Compaction) -> Value {
    json!({
        "filename": path.display().to_string(),
        "size_before": done.before,
        "size_after": done.after,
        "leaked_clusters": done.leaked,
        "copied_flags_wrong": done.flags,
        "zeroed_clusters": done.zeroed,
        "bytes_read": done.moved, "bytes_written": done.moved, "bytes_cloned": 0,
        "bytes_freed": done.before.saturating_sub(done.after),
        "copies": [], "renames": [], "unlinks": [], "rebases": [], "dependents": [],
        "refused": null,
    })
}

fn text(path: &Path, done: &Compaction, exact: bool, planned: bool) -> String {
    let show = |bytes| size::show(bytes, exact);
    let moved = if planned { "to be moved" } else { "moved" };
    let mut out = format!("{}: {} -> {}", output::path(path), show(done.before), show(done.after));
    out.push_str(&format!("; {} {moved}", show(done.moved)));
    for (clusters, what) in [(done.leaked, "leaked"), (done.zeroed, "of zeros")] {
        if clusters > 0 {
            out.push_str(&format!("; {clusters} clusters {what} {}", if planned { "go" } else { "gone" }));
        }
    }
    if done.flags {
        out.push_str(if planned { "; COPIED flags are set right" } else { "; COPIED flags set right" });
    }
    out.push('\n');
    out
}
