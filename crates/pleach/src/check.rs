//! `pleach check`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::survey::{FileFormat, Survey};
use pleach_engine::{Error, ErrorKind, Result};
use pleach_format::Incompatible;
use pleach_image::{CheckReport, Image, check};
use pleach_store::{Access, Disk, FileKind, RealDisk, Role};
use serde_json::{Value, json};

use crate::args::CheckArgs;
use crate::output;
use crate::target::directory;

/// Exit code if nothing worse than leaks was found.
const LEAKS: u8 = 3;
/// Exit code if errors were found.
const ERRORS: u8 = 4;

pub(crate) fn run(args: &CheckArgs) -> Result<ExitCode> {
    let mut documents = Vec::new();
    let mut worst = 0;
    let images = images(args)?;
    let mut failed = false;
    for path in &images {
        let (dirty, report) = match one(path, args) {
            Ok(checked) => checked,
            Err(error) if images.len() == 1 => return Err(error),
            // The others are worth checking all the same.
            Err(error) => {
                failed = true;
                if args.json {
                    documents.push(
                        json!({ "filename": path.display().to_string(), "error": output::object(&error) }),
                    );
                } else {
                    output::report(&error);
                }
                continue;
            }
        };
        worst = worst.max(match (report.errors, report.leaks) {
            (0, 0) => 0,
            (0, _) => LEAKS,
            _ => ERRORS,
        });
        if args.json {
            documents.push(document(path, dirty, &report));
        } else {
            output::print(&text(path, dirty, &report));
        }
    }
    if args.json {
        output::document(&json!({ "schema": 1, "images": documents }));
    }
    Ok(ExitCode::from(if failed && worst == 0 { 1 } else { worst }))
}

/// The images that are meant: files as they are named, the qcow2 images of directories, and chains if asked for.
fn images(args: &CheckArgs) -> Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = Vec::new();
    for path in &args.images {
        let stat = RealDisk.stat(path).map_err(|e| Error::io("find", path, e))?;
        if stat.kind == FileKind::Directory {
            let survey = Survey::of_directories(&RealDisk, std::slice::from_ref(path), &args.trust.trust())?;
            let found = survey.files.iter().filter(|f| f.format == FileFormat::Qcow2).map(|f| f.path.clone());
            let mut found: Vec<PathBuf> = found.chain(survey.broken.iter().map(|b| b.path.clone())).collect();
            found.sort();
            all.extend(found);
            continue;
        }
        all.push(path.clone());
        if args.chain {
            let survey = Survey::of_directories(&RealDisk, &[directory(path)], &args.trust.trust())?;
            let top = survey.find(&RealDisk, path);
            for index in top.map(|t| survey.chain(t)).transpose()?.unwrap_or_default().into_iter().skip(1) {
                let file = survey.files.get(index).filter(|f| f.format == FileFormat::Qcow2);
                all.extend(file.map(|f| f.path.clone()));
            }
        }
    }
    Ok(all)
}

fn one(path: &Path, args: &CheckArgs) -> Result<(bool, CheckReport)> {
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
    let report = check(&image).map_err(|e| Error::image(path, e))?;
    Ok((image.header().incompatible().has(Incompatible::DIRTY), report))
}

fn document(path: &Path, dirty: bool, report: &CheckReport) -> Value {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|f| {
            json!({
                "code": f.code, "structure": f.structure, "offset": f.offset,
                "guest_start": f.guest.map(|g| g.0), "guest_length": f.guest.map(|g| g.1), "message": f.message,
            })
        })
        .collect();
    json!({
        "filename": path.display().to_string(),
        "dirty": dirty,
        "errors": report.errors,
        "leaks": report.leaks,
        "errors_fixed": 0,
        "leaks_fixed": 0,
        "allocated_clusters": report.allocated_clusters,
        "compressed_clusters": report.compressed_clusters,
        "fragmented_clusters": report.fragmented_clusters,
        "total_clusters": report.total_clusters,
        "image_end_offset": report.image_end_offset,
        "findings": findings,
    })
}

fn text(path: &Path, dirty: bool, report: &CheckReport) -> String {
    let mut out = format!("{}:\n", path.display());
    for finding in &report.findings {
        let offset = finding.offset.map_or_else(String::new, |o| format!(" at {o:#x}"));
        let guest =
            finding.guest.map_or_else(String::new, |(start, len)| format!(" (guest {start:#x} +{len:#x})"));
        out.push_str(&format!(
            "  {}: {}{offset}{guest}: {}\n",
            finding.code, finding.structure, finding.message
        ));
    }
    if dirty {
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
