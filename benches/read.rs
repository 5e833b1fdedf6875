//! A disk read from its start to its end, beside `qemu-io` on the same cores: plain, and compressed.
#![allow(missing_docs, reason = "criterion's macros")]

use std::path::Path;
use std::process::{Command, Stdio};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pleach_benches::{DISK, mixed_disk, work_dir};
use pleach_engine::{Source, SourceOptions};
use pleach_store::RealDisk;
use rayon::prelude::*;

/// Bytes of one read.
const STEP: u64 = 1 << 20;

fn reads(c: &mut Criterion) {
    let dir = work_dir();
    let path = |name: &str| dir.path().join(name);
    mixed_disk(&path("disk.raw"), DISK);
    let mut group = c.benchmark_group("read");
    group.throughput(Throughput::Bytes(DISK)).sample_size(10);
    for (name, layout) in [
        ("plain", &[][..]),
        ("compressed, zlib", &["-c"]),
        ("compressed, zstd", &["-c", "-o", "compression_type=zstd"]),
    ] {
        let image = path("image.qcow2");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2"]).args(layout).arg(path("disk.raw")).arg(&image);
        assert!(command.status().expect("qemu-img is installed").success());
        group.bench_function(format!("{name}/pleach"), |b| b.iter(|| ours(&image)));
        group.bench_function(format!("{name}/qemu-io"), |b| b.iter(|| theirs(&image)));
    }
    group.finish();
}

fn ours(image: &Path) {
    let source = Source::open(&RealDisk, image, &SourceOptions::default()).expect("it was just made");
    (0..DISK / STEP).into_par_iter().for_each_init(
        || vec![0; usize::try_from(STEP).expect("small")],
        |buf, n| source.chain.read_at(n * STEP, buf).expect("it is whole"),
    );
}

fn theirs(image: &Path) {
    let read = format!("read 0 {DISK}");
    let mut command = Command::new("qemu-io");
    command.args(["-r", "-f", "qcow2", "-c", &read]).arg(image).stdout(Stdio::null());
    assert!(command.status().expect("qemu-io is installed").success());
}

criterion_group!(benches, reads);
criterion_main!(benches);
