//! Planning alone, on layers of many small runs; and zero detection.
#![allow(missing_docs, reason = "criterion's macros")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pleach_engine::is_zero;
use pleach_format::{GuestOffset, HostOffset, Mapping, RunList};
use pleach_plan::{Content, Cover, Overlay, Say, Target, commit, pull};

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

/// A chain as an index makes it out of what its files say: 299 layers of 20 clusters over one of 26,000 runs.
fn index(c: &mut Criterion) {
    const LAYERS: u64 = 300;
    let size = 65536 * CLUSTER;
    let runs = |layer: u64| {
        let mut runs = RunList::new();
        let (every, count) = if layer == 0 { (5, 13_107) } else { (3271, 20) };
        for i in 0..count {
            let guest = (i * every + layer * 7) % 65536;
            if runs.as_slice().last().is_none_or(|last| last.end() <= guest * CLUSTER) {
                // Host clusters lie apart, so that no run joins another.
                runs.push(GuestOffset(guest * CLUSTER), CLUSTER, Mapping::Data(HostOffset(i * 3 * CLUSTER)));
            }
        }
        runs
    };
    let layers: Vec<RunList> = (0..LAYERS).rev().map(runs).collect();
    let named = || layers.iter().enumerate().map(|(n, runs)| Overlay::of_runs(n, size, runs));
    let mut group = c.benchmark_group("index");
    group.throughput(Throughput::Elements(LAYERS));
    group.bench_function("fold 300 layers", |b| {
        b.iter(|| {
            // In pairs, as the engine's threads do.
            let mut parts: Vec<Overlay> = named().collect();
            while parts.len() > 1 {
                parts = parts
                    .chunks(2)
                    .map(|pair| match pair {
                        [upper, lower] => upper.over(lower),
                        rest => rest.iter().next().expect("no chunk is empty").clone(),
                    })
                    .collect();
            }
            parts
        });
    });
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

criterion_group!(benches, plan, index, zero);
criterion_main!(benches);
