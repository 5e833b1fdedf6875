//! Random changes of an image, and one more that ends early, killed or without power or with a failing disk: every state of
//! the image reads as before that one or as after it, a write hurts none, and a repair leaves nothing wrong.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{Incompatible, RefcountWidth, Version};
use pleach_image::{
    Alone, Chain, CompactOptions, CreateOptions, Image, Layer, NewSnapshot, RepairMode, Steps, WriteOptions,
    Writer, check, compact, create, repair,
};
use pleach_store::{Access, Disk, Store};
use pleach_testkit::Rng;
use pleach_testkit::sim::{Contents, EIO, ENOSPC, Fault, SimDisk};

#[derive(Arbitrary, Debug)]
struct Input {
    cluster_bits: u8,
    order: u8,
    v2: bool,
    extended: bool,
    lazy: bool,
    sectors: u8,
    steps: Vec<Step>,
    last: Step,
    /// Which of the states that there may be afterwards.
    ending: u16,
    seed: u64,
    fails: Option<(u8, bool)>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write { at: u8, len: u8, byte: u8 },
    Zero { at: u8, len: u8, free: bool },
    Discard { at: u8, len: u8 },
    Compressed { cluster: u8, byte: u8 },
    Resize { sectors: u8 },
    Take,
    Apply { which: u8 },
    Delete { which: u8 },
    Rename { which: u8, len: u8 },
    Bitmap { add: bool },
    Compact { zeroes: bool },
}

const IMAGE: &str = "/d/image";
const MOST_STEPS: usize = 12;

struct Steady;

impl Steps for Steady {
    fn expect(&self, _: u64) {}

    fn advance(&self, _: u64) {}

    fn stop(&self) -> bool {
        false
    }
}

fn store(disk: &SimDisk) -> Arc<dyn Store> {
    disk.open(Path::new(IMAGE), Access::Write).unwrap()
}

/// Does it; what is refused changes nothing.
fn step(disk: &SimDisk, step: &Step) -> Result<(), String> {
    if let Step::Compact { zeroes } = *step {
        let done = compact(&store(disk), CompactOptions { zeroes }, &Alone, &Steady);
        return done.map(drop).map_err(|e| e.to_string());
    }
    let writer = Writer::open(store(disk), WriteOptions::default()).map_err(|e| e.to_string())?;
    let (size, cluster) = (writer.size(), writer.cluster_size());
    let range = |at: u8, len: u8| {
        let at = u64::from(at) * 512 % size;
        (at, ((u64::from(len) % 40 + 1) * 512).min(size - at))
    };
    let ids: Vec<Vec<u8>> = {
        let image = Image::open(store(disk)).map_err(|e| e.to_string())?;
        image.snapshots().map_err(|e| e.to_string())?.into_iter().map(|s| s.id).collect()
    };
    let id = |which: u8| ids.get(usize::from(which) % ids.len().max(1)).cloned().unwrap_or_default();
    let done = match *step {
        Step::Write { at, len, byte } => {
            let (at, len) = range(at, len);
            writer.write_at(at, &vec![byte; usize::try_from(len).unwrap()])
        }
        Step::Zero { at, len, free } => {
            let (at, len) = range(at, len);
            writer.write_zeroes(at, len, free)
        }
        Step::Discard { at, len } => {
            let (at, len) = range(at, len);
            writer.discard(at, len)
        }
        Step::Compressed { cluster: which, byte } => {
            let at = u64::from(which) * cluster % size / cluster * cluster;
            let len = cluster.min(size - at);
            let bytes = vec![byte; usize::try_from(len).unwrap()];
            writer.discard(at, len).and_then(|()| writer.write_compressed(at, &bytes))
        }
        Step::Resize { sectors } => writer.resize((u64::from(sectors) + 1) * 512),
        Step::Take => {
            writer.take_snapshot(&NewSnapshot { name: b"s".to_vec(), ..NewSnapshot::default() }).map(drop)
        }
        Step::Apply { which } => writer.apply_snapshot(&id(which)),
        Step::Delete { which } => writer.delete_snapshot(&id(which)),
        Step::Rename { which, len } => writer.rename_snapshot(&id(which), &vec![b'n'; usize::from(len)]),
        Step::Bitmap { add: true } => writer.add_bitmap(b"b", Some(512), true),
        Step::Bitmap { add: false } => writer.remove_bitmap(b"b"),
        Step::Compact { .. } => Ok(()),
    };
    done.and_then(|()| writer.close()).map_err(|e| e.to_string())
}

/// Sectors of one state.
type Content = Vec<[u8; 512]>;

/// Id, name, and what it reads as.
type State = (Vec<u8>, Vec<u8>, Content);

/// What the active state and then each snapshot reads as, with the snapshots' ids and names.
fn view(disk: &SimDisk) -> Vec<State> {
    let image = Image::open(store(disk)).expect("it opens");
    let snapshots = image.snapshots().expect("a snapshot table");
    let states = snapshots.into_iter().map(|s| {
        let state = image.at_snapshot(&s.id).expect("a snapshot");
        (s.id, s.name, content(state))
    });
    let mut all: Vec<_> = states.collect();
    all.insert(0, (Vec::new(), Vec::new(), content(image)));
    all
}

fn content(image: Image) -> Content {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    Chain::new(vec![Arc::new(Layer::Qcow2(image))]).read_at(0, &mut bytes).expect("it reads");
    bytes.as_chunks::<512>().0.to_vec()
}

fuzz_target!(|input: Input| {
    let v2 = input.v2 && !input.extended;
    let options = CreateOptions {
        size: (u64::from(input.sectors) + 1) * 512,
        cluster_bits: if input.extended { 14 } else { 9 + u32::from(input.cluster_bits % 4) },
        version: if v2 { Version::V2 } else { Version::V3 },
        refcount_width: RefcountWidth::new(if v2 { 4 } else { u32::from(input.order % 7) }).unwrap(),
        extended_l2: input.extended,
        lazy_refcounts: input.lazy && !v2,
        ..CreateOptions::default()
    };
    let disk = SimDisk::new(Path::new("/d"));
    create(&disk, Path::new(IMAGE), &options).unwrap();
    for one in input.steps.iter().take(MOST_STEPS) {
        let _ = step(&disk, one);
    }
    let start = disk.contents();
    let before = view(&disk);
    disk.record();
    let done = step(&disk, &input.last);
    let after = view(&disk);
    let report = check(&Image::open(store(&disk)).unwrap()).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{done:?}: {:?}", report.findings);
    // Where data are compressed, what was there is discarded first.
    let between = matches!(input.last, Step::Compressed { .. });
    if let Some((n, once)) = input.fails {
        let failing = SimDisk::of(start);
        let after_n = usize::from(n) % (disk.changes() + 1);
        failing.fail(Some(Fault { after: after_n, once, errno: if once { ENOSPC } else { EIO } }));
        let _ = step(&failing, &input.last);
        return judge(failing.contents(), [&before, &after], between, "a change fails");
    }
    let mut states: Vec<(Contents, String)> = Vec::new();
    let mut keep = |state: Contents, when: &str| states.push((state, when.to_owned()));
    disk.kills(&mut keep);
    disk.power_losses(&mut Rng::new(input.seed), 3, &mut keep);
    let (state, when) = states.swap_remove(usize::from(input.ending) % states.len());
    judge(state, [&before, &after], between, &when);
});

fn judge(state: Contents, [before, after]: [&[State]; 2], zeros: bool, when: &str) {
    let disk = SimDisk::of(state);
    let legal = |found: &[State], when: &str| {
        let shape = |v: &[State]| -> Vec<_> {
            v.iter().map(|(id, name, content)| (id.clone(), name.clone(), content.len())).collect()
        };
        assert!(shape(found) == shape(before) || shape(found) == shape(after), "{when}: other states");
        for (i, (id, name, content)) in found.iter().enumerate() {
            let old = before.iter().find(|b| b.0 == *id && b.2.len() == content.len());
            let new = after.iter().find(|a| a.0 == *id && a.2.len() == content.len());
            for (at, sector) in content.iter().enumerate() {
                // A snapshot never changes; the active state does so by sectors.
                let is = |other: Option<&State>| other.is_some_and(|o| o.2[at] == *sector);
                let zeros = zeros && i == 0 && *sector == [0; 512];
                assert!(
                    is(old) || is(new) || zeros,
                    "{when}: state {i}, {name:?}, sector {at} is {:?}",
                    sector[0]
                );
            }
        }
    };
    let found = view(&disk);
    legal(&found, when);
    let image = Image::open(store(&disk)).unwrap();
    let dirty = image.header().incompatible().has(Incompatible::DIRTY);
    let report = check(&image).unwrap();
    // Version 2 has no mark for counts that are too high, or flags that forbid what is allowed.
    let excused = dirty || image.header().version() == Version::V2;
    assert!(report.errors == 0 || excused, "{when}: {:?}", report.findings);
    let mild = image.header().version() == Version::V2 && report.errors > 0;
    drop(image);
    // Somebody who knows of nothing writes.
    let written = SimDisk::of(disk.contents());
    let writer = Writer::open(store(&written), WriteOptions::default()).expect("it can be written");
    writer.write_at(0, &[0xee; 512]).and_then(|()| writer.close()).expect("it is written");
    let mut wanted = found.clone();
    wanted[0].2[0] = [0xee; 512];
    assert!(view(&written) == wanted, "{when}: a write hurts another state");
    let report = check(&Image::open(store(&written)).unwrap()).unwrap();
    assert!(report.errors == 0 || mild, "{when}; then a write: {:?}", report.findings);
    // And a repair.
    repair(&store(&disk), RepairMode::All, &Alone).expect("it can be repaired");
    assert!(view(&disk) == found, "{when}: a repair changes a state");
    let report = check(&Image::open(store(&disk)).unwrap()).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{when}; then a repair: {:?}", report.findings);
}
