//! `pleach diff`

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::survey::FileFormat;
use pleach_engine::{Result, Source, SourceOptions, Watch, diff};
use pleach_store::RealDisk;

use crate::args::DiffArgs;
use crate::output::{self, Spool};
use crate::progress::{Progress, Show};

pub(crate) fn run(args: &DiffArgs) -> Result<ExitCode> {
    let open = |path: &Path, format: Option<FileFormat>, snapshot: &Option<String>| -> Result<Source> {
        let trust = args.read.trust();
        let options =
            SourceOptions { format, snapshot: snapshot.clone(), trust, share: args.read.force_share };
        let source = Source::open(&RealDisk, path, &options)?;
        if source.guessed_raw {
            output::warn_guessed_raw(path);
        }
        Ok(source)
    };
    let first = open(&args.first, args.first_format, &args.first_snapshot)?;
    let second = open(&args.second, args.second_format, &args.second_snapshot)?;
    // Nothing is printed before it is known that all of it can be.
    let mut out = Spool::new();
    if args.json {
        let (a, b) = (first.chain.size(), second.chain.size());
        out.add(format_args!("{{\n  \"schema\": 1,\n  \"virtual_sizes\": [{a}, {b}],\n  \"extents\": ["))?;
    } else {
        out.add(format_args!("{:<20}{:<20}Now\n", "Offset", "Length"))?;
    }
    let watch = Arc::new(Watch::new());
    let progress = Progress::start(Show::of(&args.progress), &watch);
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
