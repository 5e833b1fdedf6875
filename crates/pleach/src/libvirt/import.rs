//! `pleach libvirt import`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::catalog::Catalog;
use pleach_engine::{Error, ErrorKind, Result};
use pleach_lineage::{Kind, Record, Storage};
use pleach_store::{Disk, RealDisk};
use serde_json::json;

use super::args::{ImportArgs, SourceArgs};
use super::contradictory;
use super::images::Images;
use super::read::Documents;
use crate::output;
use crate::target::directory;

pub(crate) fn run(args: &ImportArgs, json: bool) -> Result<ExitCode> {
    let documents = read(&args.documents, &args.source)?;
    let name = match (&args.name, documents.machine()) {
        (Some(name), _) => name.as_str(),
        (None, Some(name)) => name,
        (None, None) => {
            let text = "no document has the machine's name";
            return Err(Error::new(ErrorKind::Usage, text).hint("say --name NAME"));
        }
    };
    let exists = |path: &str| RealDisk.stat(Path::new(path)).is_ok();
    let record = pleach_libvirt::import(name, &documents.snapshots, documents.domain.as_ref(), exists)
        .map_err(|problems| contradictory(&problems))?;
    let home = home(&record, args)?;
    let mut catalog = Catalog::new(&RealDisk, &home, Record::new(name))?;
    catalog.record = record;
    let missing = settle(&mut catalog)?;
    for file in &missing {
        let error = Error::new(ErrorKind::Failed, "is named by a document, and is not there").at(file);
        output::warn(&error.hint("if the images lie elsewhere, say --images DIR"));
    }
    if args.dry_run && !json {
        output::print(&catalog.record.encode());
        return Ok(ExitCode::SUCCESS);
    }
    if !args.dry_run {
        catalog.save(&RealDisk)?;
    }
    show(&catalog, &missing, json);
    Ok(ExitCode::SUCCESS)
}

/// Reads the documents, and lets them name images where they are.
pub(crate) fn read(paths: &[PathBuf], source: &SourceArgs) -> Result<Documents> {
    let mut documents = Documents::read(paths, source.domain.as_deref())?;
    let Some(images) = &source.images else { return Ok(documents) };
    let images = RealDisk.canonical(images).map_err(|e| Error::io("find the directory", images, e))?;
    let moved = |path: &str| {
        let name = Path::new(path).file_name()?;
        images.join(name).to_str().map(str::to_owned)
    };
    for snapshot in &mut documents.snapshots {
        snapshot.rename_files(moved).map_err(|e| super::refused(&e))?;
    }
    if let Some(domain) = &mut documents.domain {
        domain.rename_files(moved).map_err(|e| super::refused(&e))?;
    }
    Ok(documents)
}

/// The directory of the first disk's image.
fn home(record: &Record, args: &ImportArgs) -> Result<PathBuf> {
    if let Some(into) = &args.into {
        return Ok(into.clone());
    }
    let active = record.disks.iter().find_map(|disk| disk.active.as_deref());
    let first = active.or_else(|| record.files().into_iter().next());
    let Some(first) = first else {
        let text = "no document names a file, so that there is no directory to put the catalog into";
        return Err(Error::new(ErrorKind::Usage, text).hint("say --into DIR"));
    };
    let home = directory(Path::new(first));
    RealDisk.stat(&home).map_err(|e| {
        Error::io("find the directory of the images,", &home, e)
            .hint("if they lie elsewhere, say --images DIR; to put the catalog elsewhere, --into DIR")
    })?;
    Ok(home)
}

/// Names files as catalogs do, and fills in the ids of internal snapshots; which files are not there.
fn settle(catalog: &mut Catalog) -> Result<Vec<String>> {
    let files: Vec<String> = catalog.record.files().into_iter().map(str::to_owned).collect();
    let images = Images::around(files.iter().map(String::as_str))?;
    for node in &mut catalog.record.nodes {
        for (_, storage) in &mut node.storage {
            if let Storage::Internal { file, snapshot, id } = storage {
                *id = images.snapshot_id(file, snapshot).unwrap_or_default();
            }
        }
    }
    let mut names = std::collections::BTreeMap::new();
    for file in &files {
        // A directory that is not there has no other name.
        let name = catalog.name_of(&RealDisk, Path::new(file));
        names.insert(file.clone(), name.unwrap_or_else(|_| file.replace('%', "%25")));
    }
    catalog.record.rename_files(|file| names.get(file).cloned());
    Ok(files.into_iter().filter(|file| !images.has(file)).collect())
}

fn show(catalog: &Catalog, missing: &[String], json: bool) {
    let record = &catalog.record;
    let names: Vec<&str> = record
        .nodes
        .iter()
        .filter(|node| node.kind == Kind::Snapshot)
        .map(|node| node.name.as_str())
        .collect();
    if json {
        return output::document(&json!({
            "schema": 1,
            "tree": record.tree,
            "catalog": catalog.path().display().to_string(),
            "current": record.current,
            "snapshots": names,
            "missing": missing,
        }));
    }
    let current = match &record.current {
        Some(current) => format!("current is {current:?}"),
        None => "none is current".into(),
    };
    output::print(&format!(
        "imported {} snapshots of {:?}; {current}\n  catalog  {}\n",
        names.len(),
        record.tree,
        catalog.path().display(),
    ));
}
