//! `pleach apply`, and the plans that it carries out: files made by `--plan`.
//!
//! A saved plan is the command that made it, where it was given, what the images looked like then, and the plan. Applying it
//! plans anew; if images and plan are the same, the same happens that was planned, and if not, nothing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::{Error, ErrorKind, Fingerprint, Prepared, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::{ApplyArgs, parse_words};
use crate::delete::View;

/// A saved plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    schema: u32,
    /// Working directory of the command.
    directory: PathBuf,
    /// Its words.
    command: Vec<String>,
    /// The files that it was made from.
    files: Vec<Fingerprint>,
    /// What would be done, as `--dry-run --json` shows it.
    plan: Value,
}

/// The words of this process, but for those that say that a plan is to be saved.
fn words() -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut all = std::env::args_os().skip(1);
    while let Some(word) = all.next() {
        let word = word.into_string().map_err(|word| {
            let text = format!("a plan with a name that is no UTF-8 cannot be saved: {}", word.display());
            Error::new(ErrorKind::Unsupported, text)
        })?;
        match word.as_str() {
            "--plan" => drop(all.next()),
            "-n" | "--dry-run" => {}
            word if word.starts_with("--plan=") => {}
            _ => words.push(word),
        }
    }
    Ok(words)
}

/// Saves a plan in the new file `file`.
pub(crate) fn save(file: &Path, view: &View<'_>, prepared: &Prepared) -> Result<()> {
    let directory =
        std::env::current_dir().map_err(|e| Error::io("find the working directory", Path::new("."), e))?;
    let saved = Saved {
        schema: 1,
        directory,
        command: words()?,
        files: prepared.open.fingerprints()?,
        plan: view.object(&prepared.plan, None),
    };
    let io = |e| Error::io("save the plan in", file, e);
    let mut out = std::fs::File::create_new(file).map_err(io)?;
    let text = serde_json::to_vec_pretty(&saved).map_err(|e| io(e.into()))?;
    out.write_all(&text).and_then(|()| out.write_all(b"\n")).and_then(|()| out.sync_all()).map_err(io)
}

impl Saved {
    /// Refuses to go on if this is not what was saved.
    pub(crate) fn must_be(&self, view: &View<'_>, prepared: &Prepared) -> Result<()> {
        let now = prepared.open.fingerprints()?;
        let changed = now.iter().find(|f| !self.files.contains(f)).or_else(|| {
            let gone = |f: &&Fingerprint| !now.contains(f);
            self.files.iter().find(gone)
        });
        let error = |text: &str| Error::new(ErrorKind::Failed, text).hint("make a new plan");
        if let Some(file) = changed {
            return Err(error("the image is not as it was when the plan was made").at(&file.path));
        }
        // Blocks on disk may be given and taken without any change of content.
        let act = |plan: &Value| {
            let mut plan = plan.clone();
            plan.as_object_mut().and_then(|plan| plan.remove("bytes_freed"));
            plan
        };
        if act(&view.object(&prepared.plan, None)) != act(&self.plan) {
            return Err(error("what would be done is not what was planned"));
        }
        Ok(())
    }
}

pub(crate) fn run(args: &ApplyArgs) -> Result<ExitCode> {
    let io = |e| Error::io("read the plan", &args.file, e);
    let bytes = std::fs::read(&args.file).map_err(io)?;
    let no_plan = || Error::new(ErrorKind::Failed, "is not a plan that was saved with --plan").at(&args.file);
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|_| no_plan())?;
    if saved.schema != 1 {
        return Err(Error::new(ErrorKind::Unsupported, "was saved by another version").at(&args.file));
    }
    let mut command = parse_words(&saved.command).ok_or_else(no_plan)?;
    let run = command.plan().ok_or_else(no_plan)?;
    let act = &mut run.act;
    act.yes = true;
    act.json = args.json;
    act.pace.progress.show = args.pace.progress.show;
    act.pace.bandwidth = args.pace.bandwidth.or(act.pace.bandwidth);
    act.pace.jobs = args.pace.jobs.or(act.pace.jobs);
    let directory = saved.directory.clone();
    run.expected = Some(saved);
    std::env::set_current_dir(&directory)
        .map_err(|e| Error::io("enter the directory of the plan", &directory, e))?;
    crate::run(command).1
}
