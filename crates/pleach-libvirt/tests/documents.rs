//! The documents of `testdata/libvirt/`: read and written byte for byte, or refused for the reason in their names.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use pleach_libvirt::{DomainDocument, Snapshot, lineage, root_name};

fn documents(part: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/libvirt").join(part);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 8, "{part} has too few documents");
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

#[test]
fn what_must_be_read_is_read() {
    let mut by_libvirt = Vec::new();
    for (name, bytes) in documents("read") {
        if root_name(&bytes).unwrap() == "domain" {
            let document = DomainDocument::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(document.text().as_bytes(), bytes, "{name}");
            continue;
        }
        let mut snapshot = Snapshot::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(snapshot.text().as_bytes(), bytes, "{name}");
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            snapshot.check_redefine().unwrap_or_else(|error| panic!("{name}: {error}"));
            by_libvirt.push(snapshot.clone());
        }
        // There and back again.
        let (parent, old) = (snapshot.facts().parent.clone(), snapshot.name().to_owned());
        snapshot.set_name("another").unwrap();
        snapshot.set_name(&old).unwrap();
        snapshot.set_parent(Some("elsewhere")).unwrap();
        snapshot.set_parent(parent.as_deref()).unwrap();
        snapshot.rename_files(|path| Some(format!("{path}.new"))).unwrap();
        snapshot.rename_files(|path| path.strip_suffix(".new").map(str::to_owned)).unwrap();
        let again = Snapshot::parse(snapshot.text().as_bytes()).unwrap();
        assert_eq!((again.name(), &again.facts().parent), (old.as_str(), &parent), "{name}");
        if !name.starts_with("reverted") && !name.starts_with("one-line") {
            assert_eq!(snapshot.text().as_bytes(), bytes, "{name}");
        }
    }
    let tree = lineage(&by_libvirt).unwrap();
    let picture: Vec<(usize, &str)> =
        tree.depth_first().map(|(depth, id)| (depth, tree[id].name.as_str())).collect();
    assert_eq!(
        picture,
        [(0, "clean"), (1, "branch b"), (1, "patched"), (2, "live"), (3, "paused"), (4, "full")]
    );
}

#[test]
fn what_must_be_refused_is_refused() {
    for (name, bytes) in documents("refused") {
        let error = Snapshot::parse(&bytes).map(|_| ()).expect_err(&name);
        assert_eq!(name.split('.').next(), Some(error.code()), "{name}: {error}");
    }
}
