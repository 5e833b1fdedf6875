//! Copies of one mixed disk, side by side with `qemu-img convert` on the same cores.
#![allow(missing_docs, reason = "criterion's macros")]

use std::path::Path;
use std::process::Command;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pleach_benches::{mixed_disk, work_dir};
use pleach_engine::convert::{NewImage, Target, convert};
use pleach_engine::survey::FileFormat;
use pleach_engine::{Source, SourceOptions, Watch};
use pleach_format::CompressionType;
use pleach_image::{CreateOptions, Preallocation};
use pleach_store::RealDisk;

const DISK: u64 = 256 << 20;

/// A bench, the source's name and format, the copy, and qemu-img's options for the same.
type Case = (&'static str, &'static str, FileFormat, Target<'static>, &'static [&'static str]);

fn qcow2(compress: bool, compression: CompressionType) -> Target<'static> {
    let options = CreateOptions { compression, ..CreateOptions::default() };
    Target::Qcow2(NewImage {
        options,
        below: None,
        compress: compress.then_some(None),
        carry: false,
        bitmaps: None,
    })
}

fn copies(c: &mut Criterion) {
    let dir = work_dir();
    let path = |name: &str| dir.path().join(name);
    mixed_disk(&path("disk.raw"), DISK);
    let options = SourceOptions { format: Some(FileFormat::Raw), ..SourceOptions::default() };
    let source = Source::open(&RealDisk, &path("disk.raw"), &options).expect("it was just made");
    let plain = qcow2(false, CompressionType::Deflate);
    convert(&RealDisk, &source.chain, &path("disk.qcow2"), &plain, &Watch::new()).expect("there is room");
    let cases: [Case; 4] = [
        ("raw to qcow2", "disk.raw", FileFormat::Raw, plain, &["-O", "qcow2"]),
        ("qcow2 to raw", "disk.qcow2", FileFormat::Qcow2, Target::Raw(Preallocation::Off), &["-O", "raw"]),
        (
            "compressed, zlib",
            "disk.raw",
            FileFormat::Raw,
            qcow2(true, CompressionType::Deflate),
            &["-O", "qcow2", "-c", "-W", "-m", "16"],
        ),
        (
            "compressed, zstd",
            "disk.raw",
            FileFormat::Raw,
            qcow2(true, CompressionType::Zstd),
            &["-O", "qcow2", "-c", "-W", "-m", "16", "-o", "compression_type=zstd"],
        ),
    ];
    let mut group = c.benchmark_group("convert");
    group.throughput(Throughput::Bytes(DISK)).sample_size(10);
    let out = path("out");
    for (name, from, format, target, qemu) in cases {
        let mut sizes = [0, 0];
        group.bench_function(format!("{name}/pleach"), |b| {
            b.iter_batched(
                || remove(&out, &mut sizes[0]),
                |()| ours(&path(from), format, &target, &out),
                BatchSize::PerIteration,
            );
        });
        group.bench_function(format!("{name}/qemu-img"), |b| {
            b.iter_batched(
                || remove(&out, &mut sizes[1]),
                |()| {
                    let mut command = Command::new("qemu-img");
                    command.arg("convert").args(["-f", format.name()]).args(qemu).arg(path(from)).arg(&out);
                    assert!(command.status().expect("qemu-img is installed").success());
                },
                BatchSize::PerIteration,
            );
        });
        remove(&out, &mut sizes[1]);
        println!("convert/{name}: {} bytes, qemu-img's {}", sizes[0], sizes[1]);
    }
    group.finish();
}

fn ours(from: &Path, format: FileFormat, target: &Target<'_>, out: &Path) {
    let options = SourceOptions { format: Some(format), ..SourceOptions::default() };
    let source = Source::open(&RealDisk, from, &options).expect("readable");
    convert(&RealDisk, &source.chain, out, target, &Watch::new()).expect("there is room");
}

/// Makes room for the next copy, and notes how long the last one was.
fn remove(out: &Path, size: &mut u64) {
    if let Ok(meta) = std::fs::metadata(out) {
        *size = meta.len();
        std::fs::remove_file(out).expect("it is there");
    }
}

criterion_group!(benches, copies);
criterion_main!(benches);
