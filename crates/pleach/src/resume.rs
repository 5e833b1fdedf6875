//! `pleach resume`, `pleach undo`

use std::process::ExitCode;

use pleach_engine::{Result, Resumed, Watch, resume, undo};
use pleach_store::RealDisk;
use serde_json::{Value, json};

use crate::args::ResumeArgs;
use crate::output;
use crate::target::Target;

pub(crate) fn run(args: &ResumeArgs) -> Result<ExitCode> {
    let target = Target::of(&args.target, &[])?;
    let done = resume(&RealDisk, &target.directories, &Watch::new())?;
    if args.json {
        output::document(&json!({ "schema": 1, "resumed": list(&done) }));
    } else {
        report(&done, "nothing to resume\n");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn take_back(args: &ResumeArgs) -> Result<ExitCode> {
    let target = Target::of(&args.target, &[])?;
    let done = undo(&RealDisk, &target.directories)?;
    if args.json {
        output::document(&json!({ "schema": 1, "undone": list(&done) }));
    } else {
        report(&done, "nothing to undo\n");
    }
    Ok(ExitCode::SUCCESS)
}

fn list(done: &[Resumed]) -> Vec<Value> {
    done.iter().map(|d| json!({ "journal": d.journal.display().to_string(), "what": d.what })).collect()
}

fn report(done: &[Resumed], nothing: &str) {
    if done.is_empty() {
        output::print(nothing);
    }
    for one in done {
        output::print(&format!("{}: {}\n", output::path(&one.journal), output::printable(&one.what)));
    }
}
