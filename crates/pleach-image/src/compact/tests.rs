//! What a power loss or a wish to stop may leave of a compaction: every state as it was, nothing worse than leaks; and going
//! on from there ends where an undisturbed one does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pleach_store::Store;
use pleach_testkit::WorkDir;
use pleach_testkit::oracle::{self, Format, qemu_img, qemu_io, text};

use super::{CompactOptions, Compaction, Steps, compact, plan_compact};
use crate::medium::{Medium, power_losses};
use crate::{Alone, Chain, Image, Layer, check};

/// Stops after so many looks.
struct After(AtomicUsize);

impl Steps for After {
    fn expect(&self, _: u64) {}

    fn advance(&self, _: u64) {}

    fn stop(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }
}

fn never() -> After {
    After(AtomicUsize::new(usize::MAX))
}

const ZEROES: CompactOptions = CompactOptions { zeroes: true };
const PLAIN: CompactOptions = CompactOptions { zeroes: false };

/// Images of a past in which much was written and dropped again.
fn images() -> Vec<(String, Vec<u8>)> {
    if !oracle::available() {
        return Vec::new();
    }
    let work = WorkDir::new("compact");
    let kinds = [
        ("cluster_size=512", "3M"),
        ("cluster_size=512,refcount_bits=64", "500k"),
        ("cluster_size=1k,compat=0.10", "600k"),
        ("cluster_size=16k,extended_l2=on", "2M"),
        ("cluster_size=4k,refcount_bits=1", "600k"),
    ];
    let built = |(options, size): (&str, &str)| {
        let path = work.join("image");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
        let io = |commands: &[&str]| qemu_io(&path, Format::Qcow2, commands);
        io(&["write -q -P 1 0 200k", "write -q -z 50k 20k", "write -q -P 0 100k 16k"]);
        if !options.contains("refcount_bits=1") {
            qemu_img(&["snapshot", "-c", "one", text(&path)]);
            io(&["write -q -P 2 10k 30k", "write -q -P 3 150k 70k"]);
            qemu_img(&["snapshot", "-c", "two", text(&path)]);
        }
        io(&["discard -q 0 64k", "write -q -P 4 220k 60k", "discard -q 150k 40k"]);
        if !options.contains("compat") {
            qemu_img(&["bitmap", "--add", "-g", "512", text(&path), "b"]);
            qemu_img(&["bitmap", "--add", "-g", "512", text(&path), "another"]);
        }
        io(&[
            "write -q -P 5 30k 30k",
            "discard -q 220k 30k",
            "write -q -c -P 6 320k 16k",
            "write -q -c -P 7 336k 16k",
        ]);
        if !options.contains("refcount_bits=1") {
            qemu_img(&["snapshot", "-d", "one", text(&path)]);
        }
        (options.to_owned(), std::fs::read(&path).unwrap())
    };
    kinds.into_iter().map(built).collect()
}

fn open(bytes: &[u8]) -> (Arc<Medium>, Arc<dyn Store>) {
    let medium = Medium::new(bytes.to_vec());
    (Arc::clone(&medium), medium)
}

/// What all states read as, the active one last.
fn states(store: &Arc<dyn Store>, what: &str) -> Vec<Vec<u8>> {
    let image = Image::open(Arc::clone(store)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let snapshots = image.snapshots().unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut all: Vec<Image> = snapshots
        .iter()
        .map(|s| image.at_snapshot(&s.id).unwrap_or_else(|e| panic!("{what}: {e}")))
        .collect();
    all.push(image);
    let read = |image: Image| {
        let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
        let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
        chain.read_at(0, &mut bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
        bytes
    };
    all.into_iter().map(read).collect()
}

fn run(store: &Arc<dyn Store>, options: CompactOptions, what: &str) -> Compaction {
    let done = compact(store, options, &Alone, &never()).unwrap_or_else(|e| panic!("{what}: {e}"));
    done.expect("nobody stops it")
}

#[test]
fn the_file_becomes_as_long_as_was_said() {
    for (kind, bytes) in images() {
        for options in [PLAIN, ZEROES] {
            let what = format!("{kind}, {options:?}");
            let (_, store) = open(&bytes);
            let before = states(&store, &what);
            let image = Image::open(Arc::clone(&store)).unwrap();
            let said = plan_compact(&image, options, &Alone).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(run(&store, options, &what), said, "{what}");
            assert_eq!(store.len().unwrap(), said.after, "{what}");
            assert!(said.after < said.before && said.moved > 0, "{what}: {said:?}");
            assert_eq!(states(&store, &what), before, "{what}");
            let report = check(&Image::open(Arc::clone(&store)).unwrap()).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{what}: {:?}", report.findings);
            let again = run(&store, options, &what);
            assert!(again.after <= said.after && again.moved <= said.moved, "{what}: {again:?}");
        }
    }
}

#[test]
fn a_power_loss_leaves_every_state() {
    for (kind, bytes) in images() {
        let (medium, store) = open(&bytes);
        let before = states(&store, &kind);
        run(&store, ZEROES, &kind);
        let mut seen = 0;
        power_losses(&bytes, &medium.log(), &mut |bytes, when| {
            let what = format!("{kind}: {when}");
            seen += 1;
            let (_, store) = open(&bytes);
            assert_eq!(states(&store, &what), before, "{what}");
            let report = check(&Image::open(Arc::clone(&store)).unwrap()).unwrap();
            assert_eq!(report.errors, 0, "{what}: {:?}", report.findings);
            if seen % 40 == 0 {
                let end = run(&store, ZEROES, &what);
                assert_eq!(states(&store, &what), before, "{what}: gone on");
                assert_eq!(store.len().unwrap(), end.after, "{what}");
                let report = check(&Image::open(Arc::clone(&store)).unwrap()).unwrap();
                assert_eq!((report.errors, report.leaks), (0, 0), "{what}: {:?}", report.findings);
            }
        });
        assert!(seen > 50, "{kind}: {seen} states");
    }
}

#[test]
fn it_stops_when_asked_and_goes_on() {
    for (kind, bytes) in images() {
        for looks in 0..6 {
            let (_, store) = open(&bytes);
            let before = states(&store, &kind);
            let done = compact(&store, PLAIN, &Alone, &After(AtomicUsize::new(looks))).unwrap();
            assert_eq!(states(&store, &kind), before, "{kind}: {looks}");
            let report = check(&Image::open(Arc::clone(&store)).unwrap()).unwrap();
            assert_eq!(report.errors, 0, "{kind}: {looks}: {:?}", report.findings);
            let end = run(&store, PLAIN, &kind);
            assert!(done.is_none_or(|done| done.after >= end.after), "{kind}: {looks}");
            assert_eq!(states(&store, &kind), before, "{kind}: {looks}");
        }
    }
}
