//! Deleting the middle of three layers: scan, plan, copy, publish.
#![allow(missing_docs, reason = "criterion's macros")]

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pleach_benches::{build, work_dir};
use pleach_engine::family::Family;
use pleach_engine::survey::{Survey, Trust};
use pleach_engine::{DeleteRequest, Keep, Watch, execute, prepare};
use pleach_lineage::DeleteMode;
use pleach_store::RealDisk;

const BYTES: u64 = 64 << 20;

fn merge(c: &mut Criterion) {
    let master = work_dir();
    build(master.path(), BYTES);
    let mut group = c.benchmark_group("merge");
    // What is copied: half of the victim's data are hidden by the top's.
    group.throughput(Throughput::Bytes(BYTES / 2)).sample_size(10);
    for change in [false, true] {
        let name = if change { "delete the middle of three" } else { "plan it only" };
        group.bench_function(name, |b| {
            b.iter_batched(
                || {
                    let copy = work_dir();
                    for name in ["base.qcow2", "victim.qcow2", "top.qcow2"] {
                        std::fs::copy(master.path().join(name), copy.path().join(name)).expect("copied");
                    }
                    copy
                },
                |dir| {
                    let dirs = [dir.path().to_owned()];
                    let survey =
                        Survey::of_directories(&RealDisk, &dirs, &Trust::default()).expect("readable");
                    let family = Family::of(&survey, dir.path()).expect("a tree");
                    let (mode, keep) = (DeleteMode::Single, Keep::Child);
                    let request = DeleteRequest { name: "victim".into(), mode, keep, whole_tree: false };
                    let prepared = prepare(&RealDisk, &survey, &family, &request, change).expect("possible");
                    if change {
                        execute(&RealDisk, &survey, prepared, &Watch::new()).expect("done");
                    }
                    dir
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, merge);
criterion_main!(benches);
