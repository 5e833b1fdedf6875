//! `pleach diff`

use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::{Result, Watch, diff};

use crate::args::PairArgs;
use crate::output::Spool;
use crate::progress::Progress;
use crate::source;

pub(crate) fn run(args: &PairArgs) -> Result<ExitCode> {
    let [first, second] = source::pair(args)?;
    // Nothing is printed before it is known that all of it can be.
    let mut out = Spool::new();
    if args.json {
        let (a, b) = (first.chain.size(), second.chain.size());
        out.add(format_args!("{{\n  \"schema\": 1,\n  \"virtual_sizes\": [{a}, {b}],\n  \"extents\": ["))?;
    } else {
        out.add(format_args!("{:<20}{:<20}Now\n", "Offset", "Length"))?;
    }
    let watch = Arc::new(Watch::new());
    let progress = Progress::start(args.progress.show, &watch);
    let mut separator = "\n";
    let found = diff([&first, &second], &watch, &mut |changed| {
        let (start, length, zero) = (changed.start, changed.length, changed.zero);
        if args.json {
            out.add(format_args!(
                "{separator}    {{\"start\": {start}, \"length\": {length}, \"zero\": {zero}}}"
            ))?;
            separator = ",\n";
            return Ok(());
        }
        out.add(format_args!("{start:<20}{length:<20}{}\n", if zero { "zeros" } else { "data" }))
    });
    drop(progress);
    found?;
    if args.json {
        out.add(format_args!("\n  ]\n}}\n"))?;
    }
    out.print()?;
    Ok(ExitCode::SUCCESS)
}
