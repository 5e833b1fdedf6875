//! Planning alone, on layers of many small runs; and zero detection.
#![allow(missing_docs, reason = "criterion's macros")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pleach_engine::is_zero;
use pleach_plan::{Content, Cover, Say, Target, commit, pull};

const CLUSTER: u64 = 65536;
const RUNS: u64 = 100_000;

/// A layer with one cluster of data in every `every`, from `first`.
fn layer(first: u64, every: u64) -> Cover {
    let size = RUNS * 8 * CLUSTER;
    let says = (0..RUNS).map(|i| ((first + i * every) * CLUSTER, CLUSTER, Say::Data));
    Cover::new(size, says)
}

fn plan(c: &mut Criterion) {
    let (top, victim, base) = (layer(1, 3), layer(0, 2), Content::none().under(&layer(2, 4)));
    let target = Target { cluster_bits: 16, size: top.size(), zero_flag: true };
    let mut group = c.benchmark_group("plan");
    group.throughput(Throughput::Elements(RUNS));
    group.bench_function("pull, 100,000 runs a layer", |b| b.iter(|| pull(target, &top, &victim, &base)));
    group.bench_function("commit, 100,000 runs a layer", |b| {
        b.iter(|| commit(target, &top, &victim, &victim, &base));
    });
    group.bench_function("stack a layer on a chain", |b| b.iter(|| base.under(&victim)));
    group.finish();
}

fn zero(c: &mut Criterion) {
    let zeros = vec![0u8; 65536];
    let mut group = c.benchmark_group("zero");
    group.throughput(Throughput::Bytes(65536));
    group.bench_function("is_zero", |b| b.iter(|| is_zero(black_box(&zeros))));
    group.bench_function("byte by byte", |b| b.iter(|| black_box(&zeros).iter().all(|&x| x == 0)));
    group.finish();
}

criterion_group!(benches, plan, zero);
criterion_main!(benches);
