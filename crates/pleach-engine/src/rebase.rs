//! Planning a rebase: an image gets another backing file and reads the same.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use pleach_format::BackingFile;
use pleach_plan::{Cover, Overlay, Target, clusters, rebase, settle_against};
use pleach_store::{Disk, Role};

use crate::bitmaps::BitmapChange;
use crate::delete::{
    DeletePlan, Direction, Merge, Naming, Prepared, StateFill, Work, bytes_of, fills_of, refuse_journals,
    refuse_other_names, refuse_parts, role, shape_of,
};
use crate::execute::rehearse;
use crate::files::Files;
use crate::names::renamed;
use crate::open::OpenFiles;
use crate::scan::{compare_ranges, snapshot_covers};
use crate::survey::{FileFormat, Survey};
use crate::{Error, ErrorKind, Result};

/// Which image gets which backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebaseRequest {
    /// The image, by index into the survey.
    pub image: usize,
    /// What it is to stand on; `None` for nothing.
    pub onto: Option<Onto>,
    /// Only the header changes, and nothing is looked at: the caller knows that the content stays.
    pub unchecked: bool,
}

/// A backing file to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Onto {
    /// Where it is.
    pub path: PathBuf,
    /// Whether the header calls it by an absolute name.
    pub absolute: bool,
    /// The same file by index into the survey; may be unknown only if nothing is checked.
    pub file: Option<usize>,
    /// How it is to be read.
    pub format: FileFormat,
}

/// Plans a rebase. With `change` the image is locked for changing, else only for reading.
///
/// # Errors
/// What keeps the rebase from being right, each by its name: see [`ErrorKind`].
pub fn prepare_rebase(
    disk: &dyn Disk,
    survey: &Survey,
    request: &RebaseRequest,
    change: bool,
) -> Result<Prepared> {
    refuse_journals(disk, survey)?;
    let mut prepared = plan_rebase(disk, survey, request, change)?;
    if !change {
        prepared.plan.forecast = rehearse(survey, &prepared.plan, &prepared.open)?;
    }
    Ok(prepared)
}

/// As [`prepare_rebase`], whatever was interrupted before.
pub(crate) fn plan_rebase(
    disk: &dyn Disk,
    survey: &Survey,
    request: &RebaseRequest,
    change: bool,
) -> Result<Prepared> {
    let image = request.image;
    let file = survey.files.get(image).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file"))?;
    if file.format == FileFormat::Raw {
        return Err(Error::new(ErrorKind::Failed, "a raw file cannot stand on another one").at(&file.path));
    }
    refuse_other_names(survey, [&image])?;
    let (old, new) = match (&request.onto, request.unchecked) {
        (_, true) => (Vec::new(), Vec::new()),
        (None, false) => (survey.chain(image)?.split_off(1), Vec::new()),
        (Some(onto), false) => {
            let base =
                onto.file.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file").at(&onto.path))?;
            (survey.chain(image)?.split_off(1), new_chain(survey, base, onto)?)
        }
    };
    if new.contains(&image) {
        let text = format!("stands on \"{}\", which would then stand on itself", file.path.display());
        let path = request.onto.as_ref().map(|o| o.path.clone()).unwrap_or_default();
        return Err(Error::new(ErrorKind::Usage, text).at(path));
    }
    let mut roles: BTreeMap<usize, Role> = old.iter().chain(&new).map(|&i| (i, Role::Read)).collect();
    roles.insert(image, role(change));
    let open = OpenFiles::open(disk, survey, &roles)?;
    let files = Files { disk, survey, open: &open };
    let backing = request.onto.as_ref().map(|onto| name_of(files, image, onto)).transpose()?;
    files.must_fit(image, backing.as_ref())?;
    let merge = match request.unchecked {
        true => {
            let opened = files.image(image)?;
            opened.check_writable().map_err(|e| Error::image(&file.path, e))?;
            let shape = shape_of(opened, opened.size());
            filling(
                image,
                backing,
                Work::Clusters { shape, needs: Vec::new(), carried: BTreeMap::new() },
                0,
                0,
            )
        }
        false => fill(files, image, &old, &new, backing)?,
    };
    let plan = DeletePlan {
        node: file.path.file_stem().map(|s| pleach_image::escape(s.as_encoded_bytes())).unwrap_or_default(),
        single: Some((image, vec![merge], Naming::Stay(request.clone()))),
        ..DeletePlan::default()
    };
    Ok(Prepared { plan, open })
}

/// The files from `base` down.
fn new_chain(survey: &Survey, base: usize, onto: &Onto) -> Result<Vec<usize>> {
    let known = survey.files.get(base).map(|f| f.format);
    if known != Some(onto.format) {
        let text = format!("is {} to the images that stand on it", known.map_or("", FileFormat::name));
        return Err(Error::new(ErrorKind::Refused, text)
            .at(&onto.path)
            .hint(format!("one file cannot be {} too", onto.format.name())));
    }
    survey.chain(base)
}

/// How the header of the image will name what it is to stand on.
fn name_of(files: Files<'_>, image: usize, onto: &Onto) -> Result<BackingFile> {
    let absolute = BackingFile { name: b"/".to_vec(), format: None };
    let style = onto.absolute.then_some(&absolute);
    renamed(files.disk, &files.file(image).path, style, &onto.path, onto.format)
}

/// The image takes what `new` lacks of `old`, the chains below it.
fn fill(
    files: Files<'_>,
    image: usize,
    old: &[usize],
    new: &[usize],
    backing: Option<BackingFile>,
) -> Result<Merge> {
    let opened = files.writable(image)?;
    let (path, shape) = (&files.file(image).path, shape_of(opened, opened.size()));
    let nothing = || Overlay::of_runs(0, 0, &pleach_format::RunList::new());
    let overlay = |chain: &[usize]| Ok::<_, Error>(files.open.overlay(chain)?.unwrap_or_else(nothing));
    let (was, will) = (overlay(old)?, overlay(new)?);
    let (from, to) = (files.open.chain(old)?, files.open.chain(new)?);
    let lacking = |shape: Target, own: &Cover| rebase(shape, own, &was, &will);
    let own = Cover::of_runs(opened.size(), files.open.runs(image)?);
    if !files.file(image).snapshots.is_empty() {
        refuse_parts(path, opened)?;
        let mut covers = vec![own];
        covers.extend(snapshot_covers(path, opened)?);
        let look = |asked: &[Range<u64>]| compare_ranges(path, &from, &to, asked);
        let fills: Vec<StateFill> = fills_of(shape, &covers, &lacking, |_| true, look)?;
        let written = bytes_of(shape.cluster_bits, &fills);
        let work = Work::States { cluster_bits: shape.cluster_bits, fills };
        return Ok(filling(image, backing, work, written, 0));
    }
    let needs = lacking(shape, &own);
    let range = |c: u64| c << shape.cluster_bits..((c + 1) << shape.cluster_bits).min(shape.size);
    let ranges: Vec<Range<u64>> = clusters(&needs).map(range).collect();
    let needs = settle_against(&needs, compare_ranges(path, &from, &to, &ranges)?);
    let chain: Vec<usize> = std::iter::once(image).chain(old.iter().copied()).collect();
    let chain = files.open.chain(&chain)?;
    let cloned = files.clonable(image, &chain, shape, &needs)?;
    let (work, written) = files.clusters(image, &chain, shape, needs)?;
    Ok(filling(image, backing, work, written, cloned))
}

fn filling(
    image: usize,
    backing: Option<BackingFile>,
    work: Work,
    bytes_written: u64,
    bytes_cloned: u64,
) -> Merge {
    Merge {
        target: image,
        reader: image,
        direction: Direction::Pull,
        work,
        backing,
        bytes_written,
        bytes_cloned,
        bitmaps: BitmapChange::default(),
    }
}
