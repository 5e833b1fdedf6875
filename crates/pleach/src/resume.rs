//! `pleach resume`

use std::process::ExitCode;

use pleach_engine::{Result, Watch, resume};
use pleach_store::RealDisk;
use serde_json::json;

use crate::args::ResumeArgs;
use crate::output;
use crate::target::Target;

pub(crate) fn run(args: &ResumeArgs) -> Result<ExitCode> {
    let target = Target::of(&args.target, &[])?;
    let done = resume(&RealDisk, &target.directories, &Watch::new())?;
    if args.json {
        let finished: Vec<_> = done
            .iter()
            .map(|d| json!({ "journal": d.journal.display().to_string(), "what": d.what }))
            .collect();
        output::document(&json!({ "schema": 1, "resumed": finished }));
    } else if done.is_empty() {
        output::print("nothing to resume\n");
    } else {
        for one in done {
            output::print(&format!("{}: {}\n", one.journal.display(), one.what));
        }
    }
    Ok(ExitCode::SUCCESS)
}
