//! `pleach merge`, `pleach commit` and `pleach squash`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::family::State;
use pleach_engine::survey::Survey;
use pleach_engine::{BitmapPolicy, Error, ErrorKind, Keep, Result, prepare_run};
use pleach_store::RealDisk;

use crate::act::{carry_out, start_jobs};
use crate::args::{CommitArgs, MergeArgs, RunArgs, SquashArgs};
use crate::delete::{Verb, View};
use crate::job;
use crate::target::{Target, directory};

pub(crate) fn run(args: &MergeArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::of(&args.top, &args.place.also)?;
    let mut survey = target.survey(&args.place.trust())?;
    let top = find(&survey, target.image.as_deref().unwrap_or(&args.top))?;
    let base = below(&survey, &args.top, &args.into)?;
    let keep = match &args.name {
        Some(name) => named(&survey, (top, base), name),
        None => args.keep.clone(),
    };
    merge(&target, &mut survey, (top, base), &keep, args.bitmaps.policy, Verb::Merge, &args.run)
}

pub(crate) fn commit(args: &CommitArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::of(&args.image, &args.place.also)?;
    let mut survey = target.survey(&args.place.trust())?;
    let top = find(&survey, target.image.as_deref().unwrap_or(&args.image))?;
    let base = match &args.into {
        Some(base) => below(&survey, &args.image, base)?,
        None => survey.chain(top)?.get(1).copied().ok_or_else(|| {
            let text = "stands alone: there is no image below it that could get what it holds";
            Error::new(ErrorKind::Usage, text).at(&args.image)
        })?,
    };
    merge(&target, &mut survey, (top, base), &Keep::Both, args.bitmaps.policy, Verb::Commit, &args.run)
}

fn find(survey: &Survey, path: &Path) -> Result<usize> {
    let missing = || Error::new(ErrorKind::NotFound, "is no image that was found").at(path);
    survey.find(&RealDisk, path).ok_or_else(missing)
}

/// The image `base` below `top`: it may be named from the directory of `top`, as in a header, or from here.
fn below(survey: &Survey, top: &Path, base: &Path) -> Result<usize> {
    let beside = directory(top).join(base);
    find(survey, base).or_else(|error| find(survey, &beside).map_err(|_| error))
}

/// What a merge keeps whose result is to be called `name`: a bare name lies beside the lowermost image.
fn named(survey: &Survey, (top, base): (usize, usize), name: &Path) -> Keep {
    let bare = name.components().count() == 1 && name.file_name().is_some();
    let path: PathBuf = match survey.files.get(base).filter(|_| bare) {
        Some(base) => directory(&base.path).join(name),
        None => name.to_owned(),
    };
    match survey.find(&RealDisk, &path) {
        Some(file) if file == top => Keep::Child,
        Some(file) if file == base => Keep::Parent(None),
        _ => Keep::Named(path),
    }
}

pub(crate) fn squash(args: &SquashArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::named(&args.on)?;
    let trust = args.on.place.trust();
    if let Some(tree) = target.tree(&trust)? {
        let act = args.run.in_tree()?;
        let job = pleach_engine::verbs::squash(&RealDisk, tree, &args.first, &args.last)?;
        return job::carry_out(tree, job, act, true, &job::Said::Report);
    }
    let mut survey = target.survey(&trust)?;
    let family = target.family(&survey)?;
    let file = |name: &str| match family.state(family.resolve(&survey, name)?) {
        Some(State::File(index)) => Ok(index),
        _ => {
            let text = format!("\"{name}\" is an internal snapshot; squashing those is not supported");
            Err(Error::new(ErrorKind::Unsupported, text).hint("delete all of the run but the last one"))
        }
    };
    let run = (file(&args.last)?, file(&args.first)?);
    if run.0 == run.1 {
        let text = format!("a run of one snapshot, \"{}\": there is nothing to squash", args.last);
        return Err(Error::new(ErrorKind::Usage, text));
    }
    merge(&target, &mut survey, run, &Keep::Child, BitmapPolicy::Merge, Verb::Merge, &args.run)
}

fn merge(
    target: &Target,
    survey: &mut Survey,
    run: (usize, usize),
    keep: &Keep,
    bitmaps: BitmapPolicy,
    verb: Verb,
    how: &RunArgs,
) -> Result<ExitCode> {
    // What stands on a file of the run may lie beside it, wherever that is.
    for index in survey.chain(run.0)? {
        if let Some(home) = survey.files.get(index).map(|f| directory(&f.path)) {
            survey.also_directory(&RealDisk, &home)?;
        }
    }
    let prepared = prepare_run(&RealDisk, survey, run, keep, bitmaps, how.changes())?;
    let view = View { survey, base: &target.base, bytes: how.act.bytes, verb };
    carry_out(&view, prepared, how)
}
