//! `pleach libvirt`

mod args;
mod export;
mod images;
mod import;
mod read;
mod verify;

use std::process::ExitCode;

use pleach_engine::{Error, ErrorKind, Result};
use pleach_libvirt::{DocumentError, ForestProblem};

pub(crate) use args::LibvirtArgs;
use args::LibvirtCommand;

/// Where an exported directory has the machine's definition.
const DOMAIN_DIRECTORY: &str = "domain";
/// The file of an exported directory that gives it to libvirt.
const SCRIPT: &str = "redefine.sh";

pub(crate) fn run(args: &LibvirtArgs) -> Result<ExitCode> {
    match &args.command {
        LibvirtCommand::Import(command) => import::run(command, args.json),
        LibvirtCommand::Export(command) => export::run(command, args.json),
        LibvirtCommand::Verify(command) => verify::run(command, args.json),
    }
}

/// A document that cannot be read, or changed.
fn refused(error: &DocumentError) -> Error {
    let mut failure = Error::new(ErrorKind::Failed, error.to_string());
    failure.offset = u64::try_from(error.offset).ok();
    failure
}

/// Documents that contradict each other.
fn contradictory(problems: &[ForestProblem]) -> Error {
    let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
    Error::new(ErrorKind::Failed, all.join("; ")).hint(
        "give each snapshot one document and a parent that has one too, and say of one only that it is current",
    )
}
