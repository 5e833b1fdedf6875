//! `pleach merge` and `pleach squash`

use std::path::Path;
use std::process::ExitCode;

use pleach_engine::family::State;
use pleach_engine::survey::Survey;
use pleach_engine::{Error, ErrorKind, Keep, Result, prepare_merge};
use pleach_store::RealDisk;

use crate::act::{carry_out, start_jobs};
use crate::args::{MergeArgs, RunArgs, SquashArgs};
use crate::delete::{Verb, View};
use crate::job;
use crate::target::{Target, directory};

pub(crate) fn run(args: &MergeArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::of(&args.top, &args.place.also)?;
    let mut survey = target.survey(&args.place.trust())?;
    let find = |survey: &Survey, path: &Path| {
        let missing = || Error::new(ErrorKind::NotFound, "is no image that was found").at(path);
        survey.find(&RealDisk, path).ok_or_else(missing)
    };
    let top = find(&survey, target.image.as_deref().unwrap_or(&args.top))?;
    // The lowermost image may be named from the uppermost's directory, as in a header.
    let beside = directory(&args.top).join(&args.into);
    let base = find(&survey, &args.into).or_else(|error| find(&survey, &beside).map_err(|_| error))?;
    merge(&target, &mut survey, (top, base), &args.keep, &args.run)
}

pub(crate) fn squash(args: &SquashArgs) -> Result<ExitCode> {
    start_jobs(args.run.act.pace.jobs)?;
    let target = Target::named(&args.on)?;
    let trust = args.on.place.trust();
    if let Some(tree) = target.tree(&trust)? {
        let act = args.run.in_tree()?;
        let job = pleach_engine::verbs::squash(&RealDisk, &tree, &args.first, &args.last)?;
        return job::carry_out(&tree, job, act, true, &job::Said::Report);
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
    merge(&target, &mut survey, run, &Keep::Child, &args.run)
}

fn merge(
    target: &Target,
    survey: &mut Survey,
    run: (usize, usize),
    keep: &Keep,
    how: &RunArgs,
) -> Result<ExitCode> {
    // What stands on a file of the run may lie beside it, wherever that is.
    for index in survey.chain(run.0)? {
        if let Some(home) = survey.files.get(index).map(|f| directory(&f.path)) {
            survey.also_directory(&RealDisk, &home)?;
        }
    }
    let prepared = prepare_merge(&RealDisk, survey, run, keep, how.changes())?;
    let view = View { survey, base: &target.base, bytes: how.act.bytes, verb: Verb::Merge };
    carry_out(&view, prepared, how)
}
