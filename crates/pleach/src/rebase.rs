//! `pleach rebase`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::survey::{FileFormat, Survey};
use pleach_engine::{Error, ErrorKind, Onto, RebaseRequest, Result, prepare_rebase};
use pleach_store::{Disk, RealDisk};

use crate::act::{carry_out, start_jobs};
use crate::args::RebaseArgs;
use crate::delete::{Verb, View};
use crate::output;
use crate::target::{Target, directory};

pub(crate) fn run(args: &RebaseArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::of(&args.image, &[])?;
    let Some(path) = &target.image else {
        return Err(Error::new(ErrorKind::Usage, "is a directory, not an image").at(&args.image));
    };
    let base = if args.onto == Path::new("none") { None } else { Some(find(path, &args.onto)?) };
    let mut survey = target.survey(&args.trust.trust())?;
    let image = survey
        .find(&RealDisk, path)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "no such image").at(path))?;
    let onto = match &base {
        None => None,
        Some(base) => Some(onto(args, &mut survey, image, base)?),
    };
    let request = RebaseRequest { image, onto, unchecked: args.unchecked };
    let prepared = prepare_rebase(&RealDisk, &survey, &request, args.run.changes())?;
    let view = View { survey: &survey, base: &target.base, bytes: args.run.act.bytes, verb: Verb::Rebase };
    carry_out(&view, prepared, &args.run)
}

/// The file that `name` means: from the image's directory, as in its header, or from here.
fn find(image: &Path, name: &Path) -> Result<PathBuf> {
    let beside = directory(image).join(name);
    match (RealDisk.stat(&beside), RealDisk.stat(name)) {
        (Ok(one), Ok(other)) if one.id != other.id => {
            let text = format!("may mean \"{}\" or, from here, \"{}\"", beside.display(), name.display());
            Err(Error::new(ErrorKind::Usage, text).at(name).hint("give an absolute path"))
        }
        (Err(_), Ok(_)) => Ok(name.to_owned()),
        _ => Ok(beside),
    }
}

/// The backing file to be, found or added.
fn onto(args: &RebaseArgs, survey: &mut Survey, image: usize, base: &Path) -> Result<Onto> {
    let old = survey.files.get(image).and_then(|f| f.header.as_ref()).and_then(|h| h.backing());
    let absolute = old.map_or(args.onto.is_absolute(), |old| old.name.starts_with(b"/"));
    let onto = |file, format| Onto { path: base.to_owned(), absolute, file, format };
    if args.unchecked && RealDisk.stat(base).is_err() {
        let format = args.backing_format.ok_or_else(|| {
            Error::new(ErrorKind::Usage, "is not there, so its format cannot be found out")
                .at(base)
                .hint("say it: -F qcow2 or -F raw")
        })?;
        return Ok(onto(None, format));
    }
    survey.also_directory(&RealDisk, &directory(base))?;
    let file = survey.also_file(&RealDisk, base, args.backing_format)?;
    let format = survey.files.get(file).map_or(FileFormat::Raw, |f| f.format);
    if format == FileFormat::Raw && args.backing_format.is_none() {
        let read = survey.files.get(file).is_some_and(|f| !f.dependents.is_empty());
        if !read {
            let text = "is not a qcow2 image; taken to be raw";
            output::warn(&Error::new(ErrorKind::Failed, text).at(base).hint("say -F raw"));
        }
    }
    Ok(onto(Some(file), format))
}
