//! `pleach completions` and `pleach man`: the command line as shells and readers of manuals need it.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use clap_complete::Shell;
use pleach_engine::{Error, Result};

use crate::{args, output};

pub(crate) fn completions(shell: Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "pleach", &mut script);
    output::print(&String::from_utf8_lossy(&script));
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn manual(directory: &Path) -> Result<ExitCode> {
    fs::create_dir_all(directory).map_err(|e| Error::io("make the directory", directory, e))?;
    clap_mangen::generate_to(args::command(), directory)
        .map_err(|e| Error::io("write the manual into", directory, e))?;
    Ok(ExitCode::SUCCESS)
}
