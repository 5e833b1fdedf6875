//! Inputs for the benches: images with known data, built by the project's own writer.
#![forbid(unsafe_code)]

pub mod beside;

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

/// Writes a raw disk of `size` bytes as they are met: two thirds files of `/usr` (programs, libraries, texts, compressed
/// archives), a twelfth noise, a twelfth zeros that are stored, the rest a hole.
///
/// # Panics
/// If it cannot be written.
pub fn mixed_disk(path: &Path, size: u64) {
    let store = RealDisk.create_new(path).expect("a new file");
    store.set_len(size).expect("room");
    let mut at = 0;
    let mut waiting = vec![PathBuf::from("/usr/share"), PathBuf::from("/usr/lib"), PathBuf::from("/usr/bin")];
    while let Some(next) = waiting.pop().filter(|_| at < size / 3 * 2) {
        let Ok(meta) = std::fs::symlink_metadata(&next) else { continue };
        if meta.is_dir() {
            let entries = std::fs::read_dir(&next).into_iter().flatten().flatten();
            let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
            paths.sort();
            waiting.extend(paths);
        } else if meta.is_file()
            && let Ok(mut bytes) = std::fs::read(&next)
        {
            bytes.truncate(4 << 20);
            store.write_at(at, &bytes).expect("room");
            at += (bytes.len() as u64).next_multiple_of(4096);
        }
    }
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32).to_be_bytes()[7]
    })
    .take(usize::try_from(size / 12).expect("small"))
    .collect();
    let at = at.next_multiple_of(1 << 20);
    store.write_at(at, &noise).expect("room");
    store.write_at(at + noise.len() as u64, &vec![0; noise.len()]).expect("room");
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
        .expect("the images are sound")
        .layers()
        .to_vec()
}
