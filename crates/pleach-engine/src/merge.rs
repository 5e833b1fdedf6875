//! Planning a merge: a run of files, each the backing file of the one above, becomes one file with the content of the top.

use std::collections::{BTreeMap, BTreeSet};

use pleach_image::escape;
use pleach_store::{Disk, FileId, Role};

use crate::bitmaps::BitmapPolicy;
use crate::catalog::kept_in;
use crate::delete::{
    Decided, DeletePlan, Keep, Naming, Planner, Prepared, refuse_journals, refuse_other_names,
    refuse_unknown_readers, role, stays_inside, still_read,
};
use crate::execute::rehearse;
use crate::files::Files;
use crate::open::OpenFiles;
use crate::survey::Survey;
use crate::{Error, ErrorKind, Result};

/// A run of files, by index into the survey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The uppermost, whose content stays.
    pub(crate) top: usize,
    /// The lowermost.
    pub(crate) base: usize,
    /// Those between them, top first.
    pub(crate) between: Vec<usize>,
}

impl Run {
    /// The run from `top` down to `base`.
    fn of(survey: &Survey, top: usize, base: usize) -> Result<Self> {
        let chain = survey.chain(top)?;
        let path = |i: usize| survey.files.get(i).map(|f| f.path.display().to_string()).unwrap_or_default();
        match chain.iter().position(|&i| i == base) {
            None | Some(0) => {
                let text = format!("\"{}\" does not stand on it", path(top));
                let file = survey.files.get(base).map(|f| f.path.clone()).unwrap_or_default();
                Err(Error::new(ErrorKind::Usage, text).at(file).hint("name a file below it in its chain"))
            }
            Some(depth) => Ok(Self { top, base, between: chain.get(1..depth).unwrap_or(&[]).to_vec() }),
        }
    }

    /// All but the top, which go or change, top first.
    fn lower(&self) -> impl Iterator<Item = usize> {
        self.between.iter().copied().chain([self.base])
    }
}

/// Plans to make one file out of the run from `top` down to `base`: called as `top` is with [`Keep::Child`], as `base` is
/// with [`Keep::Parent`], as it is said with [`Keep::Named`]. With [`Keep::Both`] everything that the files above `base` hold goes into that, and
/// `top` stays on it and reads as before, but holds nothing. With `change` the files are locked for changing, else only for reading.
///
/// # Errors
/// What keeps the merge from being right, each by its name: see [`ErrorKind`].
pub fn prepare_merge(
    disk: &dyn Disk,
    survey: &Survey,
    (top, base): (usize, usize),
    keep: &Keep,
    change: bool,
) -> Result<Prepared> {
    prepare_run(disk, survey, (top, base), keep, BitmapPolicy::default(), change)
}

/// As [`prepare_merge`], with a word about bitmaps.
///
/// # Errors
/// As [`prepare_merge`].
pub fn prepare_run(
    disk: &dyn Disk,
    survey: &Survey,
    (top, base): (usize, usize),
    keep: &Keep,
    bitmaps: BitmapPolicy,
    change: bool,
) -> Result<Prepared> {
    refuse_journals(disk, survey)?;
    let run = Run::of(survey, top, base)?;
    refuse_catalogued(disk, survey, &run)?;
    let decided = Decided { bitmaps, ..Decided::default() };
    let mut prepared = plan_run(disk, survey, &run, keep, &decided, change)?;
    if !change {
        prepared.plan.forecast = rehearse(survey, &prepared.plan, &prepared.open)?;
    }
    prepared.plan.bytes_freed = prepared.plan.frees(survey);
    Ok(prepared)
}

/// A catalog would go on to name a state that is gone, or find another content under its name.
fn refuse_catalogued(disk: &dyn Disk, survey: &Survey, run: &Run) -> Result<()> {
    for index in [run.top].into_iter().chain(run.lower()) {
        let Some(file) = survey.files.get(index) else { continue };
        for dir in &survey.directories {
            if let Some(kept) = kept_in(disk, dir, file.stat.id)?.first() {
                let text = format!("the catalog \"{}\" keeps {} in it", kept.catalog.display(), kept.what);
                return Err(Error::new(ErrorKind::Refused, text).at(&file.path).hint(
                    "`pleach delete` merges a node into those that stand on it, and tells the catalog",
                ));
            }
        }
    }
    Ok(())
}

/// Plans a merge, or what is left of one that was decided on.
pub(crate) fn plan_run(
    disk: &dyn Disk,
    survey: &Survey,
    run: &Run,
    keep: &Keep,
    decided: &Decided,
    change: bool,
) -> Result<Prepared> {
    refuse_readers(survey, run, decided)?;
    // An interrupted merge may have let the top stand on what lies below the base already.
    let chain = survey.chain(run.top)?;
    let pulled = !chain.contains(&run.base);
    let below = if pulled { Vec::new() } else { survey.chain(run.base)?.split_off(1) };
    refuse_other_names(survey, below.iter().chain(&run.between).chain([&run.base, &run.top]))?;
    let followers: Vec<usize> = match keep {
        Keep::Parent(_) | Keep::Auto | Keep::Named(_) => {
            survey.files.get(run.top).map(|f| f.dependents.clone()).unwrap_or_default()
        }
        // Who stands on the top goes on to do so.
        Keep::Child | Keep::Both => Vec::new(),
    };
    let mut roles: BTreeMap<usize, Role> = below.iter().map(|&i| (i, Role::Read)).collect();
    roles.extend(run.lower().chain([run.top]).chain(followers.iter().copied()).map(|i| (i, role(change))));
    let open = OpenFiles::open(disk, survey, &roles)?;
    let files = Files { disk, survey, open: &open };
    let planner = Planner::new(files, run.base, &run.between, &below, decided.bitmaps)?;
    let (merges, naming) = if pulled {
        let naming = match (decided.renamed, keep) {
            (Some(_), _) => planner.take_victims_name(run.top, &followers)?,
            (None, Keep::Named(name)) => planner.take_new_name(run.top, run.top, name, &followers)?,
            (None, _) => Naming::Unlink,
        };
        (Vec::new(), naming)
    } else {
        let is_top = |id: Option<FileId>| id.is_some() && id == Some(files.file(run.top).stat.id);
        let committed = decided.fixed.then(|| is_top(decided.committed));
        let renamed = decided.fixed.then(|| is_top(decided.renamed));
        let (merge, naming) = planner.designated(run.top, keep, committed, renamed, &followers)?;
        (vec![merge], naming)
    };
    let node = files.file(run.top).path.file_stem().map(|s| escape(s.as_encoded_bytes()));
    let plan = DeletePlan {
        node: node.unwrap_or_default(),
        single: Some((run.base, merges, naming)),
        between: run.between.clone(),
        bitmaps: decided.bitmaps,
        ..DeletePlan::default()
    };
    Ok(Prepared { plan, open })
}

/// Refuses a run of which something is read, or may be, by anything else than the file above it.
fn refuse_readers(survey: &Survey, run: &Run, decided: &Decided) -> Result<()> {
    let id = |i: usize| survey.files.get(i).map(|f| f.stat.id);
    let going: BTreeSet<FileId> = run.lower().filter_map(id).collect();
    let mut above = run.top;
    for index in run.lower() {
        let Some(file) = survey.files.get(index) else { continue };
        if !file.snapshots.is_empty() {
            return Err(stays_inside(file));
        }
        refuse_unknown_readers(survey, file, &going)?;
        let others = file.dependents.iter().filter(|&&d| d != above).filter_map(|&d| id(d));
        let others: Vec<FileId> = others.filter(|id| !decided.followers.contains(id)).collect();
        if !others.is_empty() {
            return Err(still_read(survey, file, &others)
                .hint("delete merges a file into everything that stands on it"));
        }
        above = index;
    }
    Ok(())
}
