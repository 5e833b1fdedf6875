//! `pleach check`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::survey::{FileFormat, Survey};
use pleach_engine::tree::Tree;
use pleach_engine::{Error, ErrorKind, Repair, Result, Threads, undo_repair};
use pleach_format::Incompatible;
use pleach_image::{CheckReport, Finding, Image, RepairMode, check_with};
use pleach_store::{Access, Disk, FileKind, RealDisk, Role};
use serde_json::{Value, json};

use crate::args::CheckArgs;
use crate::output;
use crate::target::{Target, directory};

/// Exit code if nothing worse than leaks was found.
const LEAKS: u8 = 3;
/// Exit code if errors were found.
const ERRORS: u8 = 4;

pub(crate) fn run(args: &CheckArgs) -> Result<ExitCode> {
    let mut documents = Vec::new();
    let mut worst = 0;
    let images = images(args)?;
    let mut failed = None;
    if let Some(file) = &args.undo {
        return take_back(&images, file, args.json);
    }
    for path in &images {
        let checked = match one(path, args) {
            Ok(checked) => checked,
            Err(error) if images.len() == 1 => return Err(error),
            // The others are worth checking all the same.
            Err(error) => {
                failed.get_or_insert(output::exit_code(error.kind));
                worst = worst.max(if error.kind == ErrorKind::Corrupt { ERRORS } else { 0 });
                if args.json {
                    documents.push(without_figures(path, &error));
                } else {
                    output::report(&error);
                }
                continue;
            }
        };
        worst = worst.max(match (checked.report.errors, checked.report.leaks) {
            (0, 0) => 0,
            (0, _) => LEAKS,
            _ => ERRORS,
        });
        if args.json {
            documents.push(document(path, &checked));
        } else {
            output::print(&text(path, &checked));
        }
    }
    let trees = trees(args)?;
    if args.json {
        let mut document = json!({ "schema": 1, "images": documents });
        if let (false, Some(document)) = (trees.is_empty(), document.as_object_mut()) {
            let of = |tree: &&Tree| {
                let catalog = tree.catalog.path().display().to_string();
                json!({ "tree": tree.name(), "catalog": catalog, "differences": tree.differences })
            };
            document.insert("trees".to_owned(), trees.iter().map(of).collect());
        }
        output::document(&document);
    } else {
        trees.iter().for_each(|tree| output::print(&tree_text(tree)));
    }
    if trees.iter().any(|tree| !tree.differences.is_empty()) {
        failed.get_or_insert(1);
    }
    // What was found counts for more than what could not be looked at.
    Ok(ExitCode::from(if worst == 0 { failed.unwrap_or(0) } else { worst }))
}

/// The trees whose catalogs are held against their images: those of the directories and catalogs that were named.
fn trees(args: &CheckArgs) -> Result<Vec<&'static Tree>> {
    let mut all = Vec::new();
    for path in &args.images {
        let target = Target::of(path, &[])?;
        if target.image.is_none() {
            all.extend(target.trees(&args.trust.trust())?);
        }
    }
    Ok(all)
}

fn tree_text(tree: &Tree) -> String {
    let mut out = format!("{}:\n", output::path(tree.catalog.path()));
    if tree.differences.is_empty() {
        out.push_str("  the catalog and the images agree\n");
    }
    for difference in &tree.differences {
        out.push_str(&format!("  {difference}\n"));
    }
    out
}

/// The images that are meant: files as they are named, the qcow2 images of directories, and chains if asked for.
fn images(args: &CheckArgs) -> Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = Vec::new();
    for path in &args.images {
        let stat = RealDisk.stat(path).map_err(|e| Error::io("find", path, e))?;
        if stat.kind == FileKind::Directory {
            let survey = Survey::of_links(&RealDisk, std::slice::from_ref(path), &args.trust.trust())?;
            let found = survey.files.iter().filter(|f| f.format == FileFormat::Qcow2).map(|f| f.path.clone());
            let mut found: Vec<PathBuf> = found.chain(survey.broken.iter().map(|b| b.path.clone())).collect();
            found.sort();
            all.extend(found);
            continue;
        }
        if path.extension().is_some_and(|e| e == "tree") {
            let tree = Tree::load(&RealDisk, path, &[], &args.trust.trust())?;
            let files = tree.catalog.record.files();
            let found = files.iter().filter_map(|f| tree.survey.find(&RealDisk, &tree.catalog.path_of(f)));
            let found = found.filter_map(|i| tree.survey.files.get(i));
            all.extend(found.filter(|f| f.format == FileFormat::Qcow2).map(|f| f.path.clone()));
            continue;
        }
        all.push(path.clone());
        if args.chain {
            let survey = Survey::of_links(&RealDisk, &[directory(path)], &args.trust.trust())?;
            let top = survey.find(&RealDisk, path);
            for index in top.map(|t| survey.chain(t)).transpose()?.unwrap_or_default().into_iter().skip(1) {
                let file = survey.files.get(index).filter(|f| f.format == FileFormat::Qcow2);
                all.extend(file.map(|f| f.path.clone()));
            }
        }
    }
    Ok(all)
}

/// Puts back what a repair changed.
fn take_back(images: &[PathBuf], file: &Path, json: bool) -> Result<ExitCode> {
    let [path] = images else {
        return Err(Error::new(ErrorKind::Usage, "--undo wants exactly one image"));
    };
    undo_repair(&RealDisk, path, file)?;
    if json {
        let (path, file) = (path.display().to_string(), file.display().to_string());
        output::document(&json!({ "schema": 1, "images": [{ "filename": path, "undone": file }] }));
    } else {
        output::print(&format!("{}: as it was before the repair\n", output::path(path)));
    }
    Ok(ExitCode::SUCCESS)
}

/// An image, and what is wrong in it now: after the repair, if there was one.
struct Checked {
    dirty: bool,
    report: CheckReport,
    repaired: Option<Repaired>,
}

/// What a repair did, or would do.
struct Repaired {
    found: Vec<Finding>,
    actions: Vec<Finding>,
    errors_fixed: u64,
    leaks_fixed: u64,
    bytes_written: u64,
    undo_file: Option<PathBuf>,
    planned: bool,
}

fn repair(path: &Path, mode: RepairMode, only_plan: bool) -> Result<Checked> {
    let repair = Repair::plan(&RealDisk, path, mode, only_plan)?;
    let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let undo_file = if only_plan { None } else { repair.run(&RealDisk, &stamp)? };
    let plan = repair.what();
    let report = if only_plan { plan.before.clone() } else { plan.after.clone() };
    let repaired = Repaired {
        found: plan.before.findings.clone(),
        actions: plan.actions.clone(),
        errors_fixed: plan.errors_fixed,
        leaks_fixed: plan.leaks_fixed,
        bytes_written: plan.bytes_written(),
        undo_file,
        planned: only_plan,
    };
    Ok(Checked { dirty: repair.dirty(), report, repaired: Some(repaired) })
}

fn one(path: &Path, args: &CheckArgs) -> Result<Checked> {
    if let Some(what) = &args.repair {
        let mode = if what == "leaks" { RepairMode::Leaks } else { RepairMode::All };
        return repair(path, mode, args.dry_run);
    }
    let store = RealDisk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
    let role = if args.force_share { Role::Look } else { Role::Read };
    store.lock(role).map_err(|e| Error::locked(path, e).hint("-U looks at it all the same"))?;
    let mut magic = [0; 4];
    store.read_at(0, &mut magic).map_err(|e| Error::io("read the image", path, e))?;
    if magic != *b"QFI\xfb" {
        return Err(
            Error::new(ErrorKind::Unsupported, "is not a qcow2 image; there is nothing to check").at(path)
        );
    }
    let image = Image::open(store).map_err(|e| Error::image(path, e))?;
    let report = check_with(&image, &Threads).map_err(|e| Error::image(path, e))?;
    Ok(Checked { dirty: image.header().incompatible().has(Incompatible::DIRTY), report, repaired: None })
}

fn finding(f: &Finding) -> Value {
    json!({
        "code": f.code, "structure": f.structure, "offset": f.offset,
        "guest_start": f.guest.map(|g| g.0), "guest_length": f.guest.map(|g| g.1), "message": f.message,
    })
}

fn document(path: &Path, checked: &Checked) -> Value {
    let Checked { dirty, report, repaired } = checked;
    let found = repaired.as_ref().map_or(&report.findings, |r| &r.found);
    let done = repaired.as_ref().filter(|r| !r.planned);
    let mut document = json!({
        "filename": path.display().to_string(),
        "dirty": dirty,
        "errors": report.errors,
        "leaks": report.leaks,
        "errors_fixed": done.map_or(0, |r| r.errors_fixed),
        "leaks_fixed": done.map_or(0, |r| r.leaks_fixed),
        "allocated_clusters": report.allocated_clusters,
        "compressed_clusters": report.compressed_clusters,
        "fragmented_clusters": report.fragmented_clusters,
        "total_clusters": report.total_clusters,
        "image_end_offset": report.image_end_offset,
        "findings": found.iter().map(finding).collect::<Vec<_>>(),
        "more_findings": report.more_findings,
    });
    if let (Some(repaired), Some(object)) = (repaired, document.as_object_mut()) {
        let actions: Vec<Value> = repaired.actions.iter().map(finding).collect();
        if repaired.planned {
            let plan = json!({
                "errors_fixed": repaired.errors_fixed, "leaks_fixed": repaired.leaks_fixed,
                "bytes_written": repaired.bytes_written, "repairs": actions,
            });
            object.insert("plan".to_owned(), plan);
        } else {
            object.insert("repairs".to_owned(), actions.into());
            let undo_file = repaired.undo_file.as_ref().map(|p| p.display().to_string());
            object.insert("undo_file".to_owned(), undo_file.into());
        }
    }
    document
}

/// An image that could not be looked at: it has no figures.
fn without_figures(path: &Path, error: &Error) -> Value {
    json!({
        "filename": path.display().to_string(), "dirty": null, "errors": null, "leaks": null, "errors_fixed": 0,
        "leaks_fixed": 0, "allocated_clusters": null, "compressed_clusters": null, "fragmented_clusters": null,
        "total_clusters": null, "image_end_offset": null, "findings": [], "more_findings": 0,
        "error": output::object(error),
    })
}

fn lines(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let offset = finding.offset.map_or_else(String::new, |o| format!(" at {o:#x}"));
        let guest =
            finding.guest.map_or_else(String::new, |(start, len)| format!(" (guest {start:#x} +{len:#x})"));
        out.push_str(&format!(
            "  {}: {}{offset}{guest}: {}\n",
            finding.code, finding.structure, finding.message
        ));
    }
    out
}

fn text(path: &Path, checked: &Checked) -> String {
    let Checked { dirty, report, repaired } = checked;
    let mut out = format!("{}:\n", output::path(path));
    if let Some(repaired) = repaired {
        out.push_str(&lines(&repaired.found));
        out.push_str(&match (repaired.actions.is_empty(), repaired.planned) {
            (true, _) => "  nothing to repair\n".to_owned(),
            (_, true) => format!("repair of {} would do this:\n", output::path(path)),
            (_, false) => format!("repair of {}:\n", output::path(path)),
        });
        out.push_str(&lines(&repaired.actions));
        if let Some(undo) = &repaired.undo_file {
            out.push_str(&format!(
                "  to take this back, before anybody writes: pleach check --undo {} {}\n",
                output::path(undo),
                output::path(path)
            ));
        }
        let state = if repaired.planned { "now" } else { "afterwards" };
        out.push_str(&format!("{state}:\n"));
    }
    if repaired.as_ref().is_none_or(|r| !r.planned) {
        out.push_str(&lines(&report.findings));
        if report.more_findings > 0 {
            out.push_str(&format!("  and {} more of these kinds\n", report.more_findings));
        }
    }
    if *dirty {
        out.push_str("  the image is marked dirty: its counts are rebuilt at the next writable open\n");
    }
    out.push_str(&match (report.errors, report.leaks) {
        (0, 0) => "  no errors were found\n".to_owned(),
        (0, leaks) => format!("  {leaks} leaked clusters: space is wasted, no data are harmed\n"),
        (errors, leaks) => {
            format!("  {errors} errors, {leaks} leaked clusters: data may be lost, or be overwritten by the next write\n")
        }
    });
    let (all, of) = (report.allocated_clusters, report.total_clusters);
    out.push_str(&format!(
        "  {all} of {of} clusters allocated, {} fragmented, {} compressed; image ends at {:#x}\n",
        report.fragmented_clusters, report.compressed_clusters, report.image_end_offset
    ));
    out
}
