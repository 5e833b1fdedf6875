//! `pleach libvirt export`

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pleach_engine::catalog::Catalog;
use pleach_engine::survey::Trust;
use pleach_engine::{Error, ErrorKind, Result};
use pleach_libvirt::{Export, ExportError, Snapshot, file_name, redefine_script};
use pleach_lineage::Record;
use serde_json::json;

use super::args::ExportArgs;
use super::images::Images;
use super::{DOMAIN_DIRECTORY, SCRIPT, contradictory, read};
use crate::output;
use crate::target::{Target, directory};

pub(crate) fn run(args: &ExportArgs, json: bool) -> Result<ExitCode> {
    let catalog = catalog_of(&args.target)?;
    let export = documents(&catalog, args.domain.as_deref())?;
    for line in &export.left_out {
        output::warn(&Error::new(ErrorKind::Unsupported, line.clone()));
    }
    let machine = machine(&export, &catalog.record);
    let names: Vec<String> = export.snapshots.iter().filter_map(|one| file_name(one.name())).collect();
    let script = redefine_script(&machine, &export.snapshots, &names).map_err(|e| contradictory(&e))?;
    write(&args.out, &export, &names, &machine, &script)?;
    if json {
        output::document(&json!({
            "schema": 1,
            "tree": catalog.record.tree,
            "directory": args.out.display().to_string(),
            "current": catalog.record.current,
            "documents": names,
            "script": SCRIPT,
            "left_out": export.left_out,
        }));
    } else {
        let out = args.out.display();
        output::print(&format!(
            "wrote {} snapshots of {machine:?} to {out}\n  {out}/{SCRIPT} gives them to libvirt\n",
            names.len()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The documents of a catalog.
pub(crate) fn documents(catalog: &Catalog, domain: Option<&Path>) -> Result<Export> {
    let domain = domain.map(read::domain_document).transpose()?;
    let mut record = catalog.record.clone();
    for file in record.files() {
        if catalog.path_of(file).to_str().is_none() {
            let text = "is not UTF-8, and libvirt's documents can name no such file";
            return Err(Error::new(ErrorKind::Unsupported, text).at(catalog.path_of(file)));
        }
    }
    record.rename_files(|file| catalog.path_of(file).to_str().map(str::to_owned));
    let images = Images::around(record.files().into_iter())?;
    pleach_libvirt::export(&record, domain.as_ref(), |path| images.format(path)).map_err(|error| {
        let hint = match &error {
            ExportError::NoDomain { .. } => "say --domain FILE, with what virsh dumpxml --inactive prints",
            ExportError::Name { .. } => "rename it: pleach rename",
            _ => "",
        };
        let kind = match &error {
            ExportError::Record(_) => ErrorKind::Corrupt,
            ExportError::NoDomain { .. } => ErrorKind::Usage,
            _ => ErrorKind::Unsupported,
        };
        let failure = Error::new(kind, error.to_string()).at(catalog.path());
        if hint.is_empty() { failure } else { failure.hint(hint) }
    })
}

/// The catalog that a target means, as the images bear it out; one that would be made where there is none.
pub(crate) fn catalog_of(target: &Path) -> Result<Catalog> {
    Ok(Target::of(target, &[])?.tree_or_new(&Trust::default())?.catalog.clone())
}

fn machine(export: &Export, record: &Record) -> String {
    let given = export.domain.iter().filter_map(|one| one.domain().name.clone());
    let embedded = export.snapshots.iter().filter_map(|one| one.facts().domain.as_ref()?.name.clone());
    given.chain(embedded).next().unwrap_or_else(|| record.tree.clone())
}

/// Writes everything beside the directory, and gives it its name when it is whole.
fn write(out: &Path, export: &Export, names: &[String], machine: &str, script: &str) -> Result<()> {
    let is_taken = match out.read_dir() {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.symlink_metadata().is_ok(),
    };
    if is_taken {
        let text = "is there already, and is not an empty directory";
        return Err(Error::new(ErrorKind::Failed, text).at(out).hint("name a new directory"));
    }
    let io = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |e| Error::io(what, &path, e)
    };
    let beside = tempfile::Builder::new()
        .prefix(".pleach-export-")
        .tempdir_in(directory(out))
        .map_err(io("make a directory in", &directory(out)))?;
    let put = |name: &Path, text: &str| {
        let path: PathBuf = beside.path().join(name);
        fs::write(&path, text).map_err(io("write", &path))
    };
    for (snapshot, name) in export.snapshots.iter().zip(names) {
        put(Path::new(name), Snapshot::text(snapshot))?;
    }
    put(Path::new(SCRIPT), script)?;
    if let Some(domain) = &export.domain {
        let inside = beside.path().join(DOMAIN_DIRECTORY);
        fs::create_dir(&inside).map_err(io("make the directory", &inside))?;
        let name = file_name(machine).unwrap_or_else(|| "domain.xml".into());
        put(&Path::new(DOMAIN_DIRECTORY).join(name), domain.text())?;
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(beside.path(), mode).map_err(io("open to others", beside.path()))?;
    fs::rename(beside.path(), out).map_err(io("write", out))?;
    // It has another name now, and nothing is left to remove.
    let _ = beside.keep();
    Ok(())
}
