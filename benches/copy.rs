//! Copying by kind: an empty image takes all that its backing file has, which is plain data, stored zeros, clusters that are
//! compressed alike or otherwise, or blocks that the file system shares.
//!
//! `PLEACH_CLONE_DIR=DIR` names a directory on XFS or btrfs for the last kind, which is left out without it.
#![allow(missing_docs, reason = "criterion's macros")]

use std::path::{Path, PathBuf};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pleach_benches::{DISK, work_dir};
use pleach_engine::survey::{Survey, Trust};
use pleach_engine::{RebaseRequest, Watch, execute, open_writer_alone, prepare_rebase};
use pleach_format::BackingFile;
use pleach_image::{CreateOptions, create};
use pleach_store::RealDisk;

const BYTES: u64 = 64 << 20;
const CLUSTER: u64 = 64 << 10;

/// What the backing file holds.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Kind {
    Plain,
    Zeros,
    Compressed,
}

/// A backing file with [`BYTES`] of data of a kind, and an empty image over it whose clusters have `1 << cluster_bits`
/// bytes.
fn build(dir: &Path, kind: Kind, cluster_bits: u32) {
    let base = dir.join("base.qcow2");
    create(&RealDisk, &base, &CreateOptions { size: DISK, ..CreateOptions::default() }).expect("a new image");
    let writer = open_writer_alone(&RealDisk, &base).expect("it was just made");
    for at in (0..BYTES).step_by(usize::try_from(CLUSTER).expect("small")) {
        let byte = |i: u64| match kind {
            Kind::Zeros => 0,
            // A third of it has to be said, the rest goes on.
            _ if i % 96 < 32 => ((at + i * i) >> 7).to_be_bytes()[7] | 1,
            _ => 7,
        };
        let bytes: Vec<u8> = (0..CLUSTER).map(byte).collect();
        match kind {
            Kind::Compressed => writer.write_compressed(at, &bytes),
            Kind::Plain | Kind::Zeros => writer.write_at(at, &bytes),
        }
        .expect("there is room");
    }
    writer.close().expect("there is room");
    let backing = BackingFile { name: b"base.qcow2".to_vec(), format: Some(b"qcow2".to_vec()) };
    let options =
        CreateOptions { size: DISK, cluster_bits, backing: Some(backing), ..CreateOptions::default() };
    create(&RealDisk, &dir.join("empty"), &options).expect("a new image");
}

fn take_all(dir: &Path) {
    let survey = Survey::of_directories(&RealDisk, &[dir.to_owned()], &Trust::default()).expect("readable");
    let image = survey.find(&RealDisk, &dir.join("top.qcow2")).expect("it was just made");
    let request = RebaseRequest { image, onto: None, unchecked: false };
    let prepared = prepare_rebase(&RealDisk, &survey, &request, true).expect("possible");
    execute(&RealDisk, &survey, prepared, &Watch::new()).expect("done");
}

fn copy(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy");
    group.throughput(Throughput::Bytes(BYTES)).sample_size(10);
    let sharing = std::env::var_os("PLEACH_CLONE_DIR").map(PathBuf::from);
    let kinds = [
        ("plain", Kind::Plain, 16, None),
        ("zeros", Kind::Zeros, 16, None),
        ("compressed, taken over", Kind::Compressed, 16, None),
        ("compressed, other clusters", Kind::Compressed, 12, None),
        ("cloned", Kind::Plain, 16, sharing.as_deref()),
    ];
    for (name, kind, cluster_bits, place) in kinds {
        if name == "cloned" && place.is_none() {
            println!("copy/cloned: only with PLEACH_CLONE_DIR, a directory on XFS or btrfs");
            continue;
        }
        let dir = match place {
            Some(place) => tempfile::tempdir_in(place).expect("a directory that can be written"),
            None => work_dir(),
        };
        build(dir.path(), kind, cluster_bits);
        group.bench_function(name, |b| {
            b.iter_batched(
                || std::fs::copy(dir.path().join("empty"), dir.path().join("top.qcow2")).expect("room"),
                |_| take_all(dir.path()),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, copy);
criterion_main!(benches);
