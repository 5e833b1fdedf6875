//! The command line: argv in, text or JSON out, one exit code.
#![forbid(unsafe_code)]

mod act;
mod apply;
mod args;
mod bitmap;
mod check;
mod compact;
mod compare;
mod confirm;
mod convert;
mod create;
mod delete;
mod demo;
mod describe;
mod diff;
mod info;
mod job;
mod libvirt;
mod map;
mod merge;
mod output;
mod progress;
mod rebase;
mod resize;
mod resume;
mod scan;
mod size;
mod snapshots;
mod source;
mod target;
mod tree;

use std::process::ExitCode;

use args::{Command, Failure};
use pleach_engine::Result;

fn main() -> ExitCode {
    let command = match args::parse() {
        Ok(command) => command,
        Err(Failure::Help(text)) => {
            output::print(&text);
            return output::finish(ExitCode::SUCCESS);
        }
        Err(Failure::Usage { text, json }) => return output::usage(&text, json),
    };
    let (json, result) = run(command);
    output::finish(result.unwrap_or_else(|error| output::failure(&error, json)))
}

/// Whether JSON is wanted, and what became of a command.
fn run(command: Command) -> (bool, Result<ExitCode>) {
    match command {
        Command::Tree(args) => (args.json, tree::run(&args)),
        Command::Init(args) => (args.json, snapshots::init(&args)),
        Command::Snapshot(args) => (args.act.json, snapshots::snapshot(&args)),
        Command::Revert(args) => (args.act.json, snapshots::revert_to(&args)),
        Command::Rename(args) => (args.act.json, snapshots::give_name(&args)),
        Command::Note(args) => (args.act.json, snapshots::describe(&args)),
        Command::Current(args) => (args.act.json, snapshots::current(&args)),
        Command::Show(args) => (args.json, snapshots::show(&args)),
        Command::Scan(args) => (args.json, scan::run(&args)),
        Command::Info(args) => (args.json, info::run(&args)),
        Command::Check(args) => (args.json, check::run(&args)),
        Command::Map(args) => (args.json, map::run(&args)),
        Command::Compare(args) => (args.pair.json, compare::run(&args)),
        Command::Diff(args) => (args.json, diff::run(&args)),
        Command::Create(args) => (args.json, create::run(&args)),
        Command::Resize(args) => (args.json, resize::run(&args)),
        Command::Compact(args) => (args.json, compact::run(&args)),
        Command::Bitmap(args) => (args.json, bitmap::run(&args)),
        Command::Convert(args) => (args.copy.json, convert::run(&args)),
        Command::Flatten(args) => (args.convert.copy.json, convert::flatten(&args)),
        Command::Measure(args) => (args.copy.json, convert::measure(&args)),
        Command::Delete(args) => (args.run.act.json, delete::run(&args)),
        Command::Merge(args) => (args.run.act.json, merge::run(&args)),
        Command::Commit(args) => (args.run.act.json, merge::commit(&args)),
        Command::Squash(args) => (args.run.act.json, merge::squash(&args)),
        Command::Rebase(args) => (args.run.act.json, rebase::run(&args)),
        Command::Resume(args) => (args.json, resume::run(&args)),
        Command::Undo(args) => (args.json, resume::take_back(&args)),
        Command::Demo(args) => (false, demo::run(&args)),
        Command::Apply(args) => (args.json, apply::run(&args)),
        Command::Libvirt(args) => (args.json, libvirt::run(&args)),
        Command::Completions { shell } => (false, describe::completions(shell)),
        Command::Man { directory } => (false, describe::manual(&directory)),
    }
}
