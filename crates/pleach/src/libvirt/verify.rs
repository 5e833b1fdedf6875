//! `pleach libvirt verify`

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use pleach_engine::{Error, ErrorKind, Result};
use pleach_libvirt::{Domain, DomainDocument, Finding, Severity, Snapshot, storage, verify};
use pleach_store::{Disk, RealDisk};
use serde_json::json;

use super::args::VerifyArgs;
use super::images::Images;
use super::{export, import, refused};
use crate::output;

pub(crate) fn run(args: &VerifyArgs, json: bool) -> Result<ExitCode> {
    let (mut snapshots, mut domain) = read(args)?;
    // Files are compared by their names behind all links.
    for snapshot in &mut snapshots {
        snapshot.rename_files(real).map_err(|e| refused(&e))?;
    }
    if let Some(domain) = &mut domain {
        domain.rename_files(real).map_err(|e| refused(&e))?;
    }
    let files = files(&snapshots, domain.as_ref());
    let images = Images::around(files.iter().map(String::as_str))?;
    let mut facts: BTreeMap<_, _> = images.facts().into_iter().collect();
    for file in files {
        if !facts.contains_key(&file)
            && let Some(format) = images.format(&file)
        {
            facts.insert(file, pleach_libvirt::ImageFacts { format, ..Default::default() });
        }
    }
    let found = verify(&snapshots, domain.as_ref().map(DomainDocument::domain), &facts);
    show(&snapshots, domain.as_ref(), &found, json);
    let is_bad = found.iter().any(|one| one.severity != Severity::Refusal);
    Ok(ExitCode::from(if is_bad { output::exit_code(ErrorKind::Corrupt) } else { 0 }))
}

/// Documents that were named, or those that a catalog would be exported as.
fn read(args: &VerifyArgs) -> Result<(Vec<Snapshot>, Option<DomainDocument>)> {
    if let [target] = args.documents.as_slice()
        && target.extension().is_some_and(|ending| ending == "tree")
    {
        if args.source.images.is_some() {
            let text = "--images is for documents; a catalog names the images where they are";
            return Err(Error::new(ErrorKind::Usage, text));
        }
        let export = export::documents(&export::catalog_of(target)?, args.source.domain.as_deref())?;
        return Ok((export.snapshots, export.domain));
    }
    let documents = import::read(&args.documents, &args.source)?;
    Ok((documents.snapshots, documents.domain))
}

/// The path behind all links; `None` where there is no such file.
fn real(path: &str) -> Option<String> {
    RealDisk.canonical(Path::new(path)).ok()?.to_str().map(str::to_owned)
}

/// Every file that holds a state, or that the machine writes to, or that a snapshot says is in use.
fn files(snapshots: &[Snapshot], domain: Option<&DomainDocument>) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for snapshot in snapshots {
        let facts = snapshot.facts();
        files.extend(storage(snapshot.name(), facts).into_iter().map(|(_, kept)| kept.file().to_owned()));
        let listed = facts.disks.iter().chain(&facts.revert_disks).flatten();
        files
            .extend(listed.filter_map(|disk| disk.overlay.path.clone()).filter(|path| path.starts_with('/')));
    }
    let disks = domain.map(DomainDocument::domain).map(|domain: &Domain| domain.disks.as_slice());
    let active = disks.unwrap_or_default().iter().filter_map(|disk| disk.source.path.clone());
    files.extend(active.filter(|path| path.starts_with('/')));
    files
}

fn show(snapshots: &[Snapshot], domain: Option<&DomainDocument>, found: &[Finding], json: bool) {
    if json {
        let findings: Vec<_> = found
            .iter()
            .map(|one| {
                json!({
                    "severity": one.severity.word(),
                    "code": one.code,
                    "snapshot": one.snapshot,
                    "file": one.file,
                    "message": one.message,
                })
            })
            .collect();
        return output::document(&json!({ "schema": 1, "snapshots": snapshots.len(), "findings": findings }));
    }
    if domain.is_none() {
        let text = "without the machine's definition, what it writes to is taken from its current snapshot";
        output::warn(&Error::new(ErrorKind::Failed, text).hint("say --domain FILE"));
    }
    let mut text = String::new();
    for one in found {
        let about = one.snapshot.as_ref().map(|name| format!("{name:?} ")).unwrap_or_default();
        text.push_str(&format!("{:<10}  {about}{}  [{}]\n", one.severity.word(), one.message, one.code));
    }
    let count = |severity| found.iter().filter(|one| one.severity == severity).count();
    text.push_str(&format!(
        "snapshots: {}; ways to lose data: {}; crashes: {}; differences: {}; refusals: {}\n",
        snapshots.len(),
        count(Severity::Loss),
        count(Severity::Crash),
        count(Severity::Mismatch),
        count(Severity::Refusal),
    ));
    output::print(&text);
}
