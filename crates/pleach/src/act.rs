//! What the verbs that carry out a plan have in common: show it, ask, run it, tell what happened.

use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::{Error, ErrorKind, Prepared, Result, Watch, execute};
use pleach_store::RealDisk;
use serde_json::json;

use crate::apply;
use crate::args::RunArgs;
use crate::confirm::confirm;
use crate::delete::View;
use crate::output;
use crate::progress::Progress;

/// Lets this many threads do the work.
pub(crate) fn start_jobs(jobs: Option<usize>) -> Result<()> {
    let Some(jobs) = jobs else { return Ok(()) };
    rayon::ThreadPoolBuilder::new()
        .num_threads(jobs)
        .build_global()
        .map_err(|e| Error::new(ErrorKind::Failed, format!("cannot start {jobs} threads: {e}")))
}

/// Shows a plan, or asks and carries it out, as `args` say.
pub(crate) fn carry_out(view: &View<'_>, mut prepared: Prepared, args: &RunArgs) -> Result<ExitCode> {
    if !args.act.yes || args.act.json {
        prepared.foresee(view.survey)?;
    }
    if let Some(file) = &args.plan {
        apply::save(file, view, &prepared)?;
    }
    for warning in view.warnings(&prepared.plan) {
        output::warn(&Error::new(ErrorKind::Failed, warning));
    }
    if !args.changes() {
        if args.act.json {
            output::document(&json!({ "schema": 1, "plan": view.object(&prepared.plan, None) }));
        } else {
            output::print(&view.text(&prepared.plan));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(saved) = &args.expected {
        saved.must_be(view, &prepared)?;
    }
    if !args.act.yes {
        confirm(&view.text(&prepared.plan))?;
    }
    let plan = prepared.plan.clone();
    let watch = Arc::new(Watch::limited(args.act.pace.bandwidth));
    let progress = Progress::start(args.act.pace.progress.show, &watch);
    let outcome = execute(&RealDisk, view.survey, prepared, &watch);
    drop(progress);
    let outcome = outcome?;
    if args.act.json {
        output::document(&json!({ "schema": 1, "plan": view.object(&plan, Some(outcome)) }));
    } else {
        output::print(&view.done(&plan, outcome));
    }
    Ok(ExitCode::SUCCESS)
}
