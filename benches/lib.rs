//! Inputs for the benches: images with known data, built by the project's own writer.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use pleach_engine::survey::{Survey, Trust};
use pleach_engine::{OpenFiles, import};
use pleach_format::BackingFile;
use pleach_image::{CreateOptions, Layer, create};
use pleach_store::{Disk, RealDisk, Role, Store};
use std::sync::Arc;

/// Bytes of every disk here.
pub const DISK: u64 = 256 << 20;

/// A directory in memory where there is one, so that the benches measure the engine and not a disk.
///
/// # Panics
/// If no directory can be made.
pub fn work_dir() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a temporary directory can be made")
}

/// Builds `base <- victim <- top` in `dir`: every layer writes `bytes` of its own, half of them where the layer below
/// has data too.
///
/// # Panics
/// If the images cannot be written.
pub fn build(dir: &Path, bytes: u64) {
    let mut below: Option<&str> = None;
    for (n, name) in ["base", "victim", "top"].into_iter().enumerate() {
        let path = dir.join(format!("{name}.qcow2"));
        let backing = below.map(|b| BackingFile {
            name: format!("{b}.qcow2").into_bytes(),
            format: Some(b"qcow2".to_vec()),
        });
        let options = CreateOptions { size: DISK, backing, ..CreateOptions::default() };
        create(&RealDisk, &path, &options).expect("a new image can be created");
        let chain = below.map(|b| layers(dir, b)).unwrap_or_default();
        let content = content(dir, &chain, n as u64 * bytes / 2, bytes, n);
        import::import(&RealDisk, &path, chain, &*content).expect("the content can be written");
        below = Some(name);
    }
    std::fs::remove_file(content_path(dir)).expect("it was just made");
}

fn content_path(dir: &Path) -> PathBuf {
    dir.join("content")
}

/// What the layers read, with `bytes` of pattern `n` from `at`.
fn content(dir: &Path, layers: &[Arc<Layer>], at: u64, bytes: u64, n: usize) -> Arc<dyn Store> {
    let path = content_path(dir);
    // The file of the layer before is not there for the first one.
    let _ = std::fs::remove_file(&path);
    let store = RealDisk.create_new(&path).expect("a file can be created");
    let chain = pleach_image::Chain::new(layers.to_vec());
    let mut buf = vec![0; 1 << 20];
    for start in (0..DISK).step_by(buf.len()) {
        chain.read_at(start, &mut buf).expect("the layers can be read");
        for (i, byte) in buf.iter_mut().enumerate() {
            if (at..at + bytes).contains(&(start + i as u64)) {
                *byte = u8::try_from((i / 4096 + n * 50) % 200 + 1).expect("below 256");
            }
        }
        store.write_at(start, &buf).expect("the file can be written");
    }
    store
}

fn layers(dir: &Path, name: &str) -> Vec<Arc<Layer>> {
    let survey = Survey::of_directories(&RealDisk, &[dir.to_owned()], &Trust::default()).expect("readable");
    let top = survey.find(&RealDisk, &dir.join(format!("{name}.qcow2"))).expect("it was just made");
    let files = survey.chain(top).expect("a sound chain");
    let roles = files.iter().map(|&i| (i, Role::Read)).collect();
    OpenFiles::open(&RealDisk, &survey, &roles)
        .expect("nobody else uses them")
        .chain(&files)
        .layers()
        .to_vec()
}
