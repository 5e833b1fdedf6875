//! What a power loss may leave of a repair, and the way back from each such state.

use std::collections::BTreeSet;
use std::sync::Arc;

use pleach_alloc::{Allocator, Place};
use pleach_format::{GuestCluster, HostCluster, L2Entry, RefcountWidth};
use pleach_store::{RealDisk, Store};

use super::{RepairMode, plan_repair, repair, undo};
use crate::medium::{Medium, power_losses};
use crate::{Alone, Chain, CreateOptions, Image, Layer, TableEditor, check, create, publish};

/// Guest clusters with data, of 512 bytes each.
const CLUSTERS: u64 = 100;

type Damage = fn(&mut Vec<u8>);

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn offset(value: u64) -> usize {
    usize::try_from(value & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// Where L2 entry `i` of the first table is.
fn l2(bytes: &[u8], i: usize) -> usize {
    offset(word(bytes, offset(word(bytes, 40)))) + i * 8
}

fn block(bytes: &[u8]) -> usize {
    offset(word(bytes, offset(word(bytes, 48))))
}

const DAMAGES: [(&str, Damage); 10] = [
    ("leaks", |b| {
        let at = block(b);
        b[at + 20..at + 60].fill(2);
    }),
    ("counts too low", |b| {
        let at = block(b);
        b[at + 8..at + 60].fill(0);
    }),
    ("no refcount table", |b| b[56..60].fill(0)),
    ("a refcount table elsewhere", |b| put(b, 48, 1 << 40)),
    ("a reserved bit in the refcount table", |b| {
        let at = offset(word(b, 48));
        b[at + 7] |= 1;
    }),
    ("entries that lead nowhere", |b| {
        let (one, two) = (l2(b, 3), l2(b, 5));
        put(b, one, 1 << 63 | 0x4000_0000);
        put(b, two, 1 << 63 | 0x4200 | 1 << 58);
    }),
    ("cross-linked clusters", |b| {
        let (from, to) = (l2(b, 7), l2(b, 9));
        let value = word(b, from);
        put(b, to, value);
    }),
    ("data in the L1 table", |b| {
        let at = l2(b, 11);
        let value = word(b, 40);
        put(b, at, 1 << 63 | value);
    }),
    ("two L1 entries with one table", |b| {
        let at = offset(word(b, 40));
        let value = word(b, at);
        put(b, at + 8, value);
    }),
    ("all of it", |b| {
        DAMAGES[..4].iter().chain(&DAMAGES[5..9]).for_each(|(_, damage)| damage(b));
        b[79] |= 3;
    }),
];

/// An image whose cluster `i` holds bytes `i + 1`.
fn sound() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 1 << 20,
        cluster_bits: 9,
        refcount_width: RefcountWidth::new(3).unwrap(),
        ..CreateOptions::default()
    };
    create(&RealDisk, &path, &options).unwrap();
    let medium = Medium::new(std::fs::read(&path).unwrap());
    let image = Image::open(Arc::clone(&medium) as Arc<dyn Store>).unwrap();
    let g = image.geometry();
    let mut allocator = Allocator::load(&*medium, Place::of(image.header())).unwrap();
    let mut editor = TableEditor::new(&image);
    for cluster in 0..CLUSTERS {
        let host: HostCluster = allocator.allocate().unwrap();
        medium.write_at(g.host_offset(host).0, &[u8::try_from(cluster + 1).unwrap(); 512]).unwrap();
        editor.set(&mut allocator, GuestCluster(cluster), L2Entry::owned(g.host_offset(host))).unwrap();
    }
    let switch = editor.finish(&mut allocator, None).unwrap();
    publish(&*medium, &mut allocator, &switch).unwrap();
    medium.bytes()
}

/// What can be read of each guest cluster; `None` where it cannot.
fn content(bytes: &[u8]) -> Vec<Option<[u8; 512]>> {
    let Ok(image) = Image::open(Medium::new(bytes.to_vec())) else { return Vec::new() };
    let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
    (0..256)
        .map(|cluster| {
            let mut data = [0; 512];
            chain.read_at(cluster * 512, &mut data).is_ok().then_some(data)
        })
        .collect()
}

fn keeps(before: &[Option<[u8; 512]>], after: &[Option<[u8; 512]>], what: &str) {
    for (i, (before, after)) in before.iter().zip(after).enumerate() {
        assert!(before.is_none() || before == after, "{what}: cluster {i} reads differently");
    }
}

/// The clusters that more pointers lead to than are counted, and whether the image is marked as damaged although nothing
/// but flags is wrong, or not marked although something is; `None` if it cannot be opened.
fn uncounted(bytes: &[u8]) -> Option<(BTreeSet<u64>, bool)> {
    let report = check(&Image::open(Medium::new(bytes.to_vec())).ok()?).ok()?;
    let low = report.findings.iter().filter(|f| f.code == "refcount-too-low").filter_map(|f| f.offset);
    let unmarked = bytes[79] & 3 == 0 && report.findings.iter().any(|f| f.code != "copied-flag");
    Some((low.collect(), unmarked))
}

#[test]
fn a_power_loss_amid_a_repair_loses_nothing_and_leads_back_and_on() {
    let sound = sound();
    for (name, damage) in DAMAGES {
        let mut damaged = sound.clone();
        damage(&mut damaged);
        let before = content(&damaged);
        let medium = Medium::new(damaged.clone());
        let store = Arc::clone(&medium) as Arc<dyn Store>;
        let plan = plan_repair(&store, RepairMode::All, &Alone).unwrap();
        assert!(plan.before.errors + plan.before.leaks > 0, "{name}");
        assert_eq!(plan.after.errors + plan.after.leaks, 0, "{name}: {:?}", plan.after.findings);
        let undo_file = Medium::new(Vec::new());
        plan.undo_file(&*store).unwrap().write(&*undo_file).unwrap();
        plan.execute(&*store).unwrap();
        let report = check(&Image::open(Medium::new(medium.bytes())).unwrap()).unwrap();
        assert_eq!(report, plan.after, "{name}: what was planned is what is there");
        keeps(&before, &content(&medium.bytes()), name);

        power_losses(&damaged, &medium.log(), &mut |bytes, what| {
            let what = format!("{name}: {what}");
            keeps(&before, &content(&bytes), &what);
            if let (Some((first, unmarked)), Some((low, now))) = (uncounted(&damaged), uncounted(&bytes)) {
                assert!(
                    low.is_subset(&first),
                    "{what}: {low:x?} are counted too low, before only {first:x?}"
                );
                assert!(unmarked || !now, "{what}: the marks went too early");
            }
            let back = Medium::new(bytes.clone());
            undo(&*back, &*undo_file).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(back.bytes() == damaged, "{what}: undo brings every byte back");
            let on = Medium::new(bytes);
            let plan = repair(&(Arc::clone(&on) as Arc<dyn Store>), RepairMode::All, &Alone)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(plan.after.errors + plan.after.leaks, 0, "{what}");
            keeps(&before, &content(&on.bytes()), &what);
        });
    }
}

/// Counts must be right before an entry leads to what they count, and stay right until it does not.
#[test]
fn no_moment_of_a_repair_leaves_fewer_counts_than_pointers_that_it_made() {
    let sound = sound();
    let mut damaged = sound.clone();
    DAMAGES.iter().find(|d| d.0 == "cross-linked clusters").unwrap().1(&mut damaged);
    let first_errors = check(&Image::open(Medium::new(damaged.clone())).unwrap()).unwrap().errors;
    let medium = Medium::new(damaged.clone());
    repair(&(Arc::clone(&medium) as Arc<dyn Store>), RepairMode::All, &Alone).unwrap();
    power_losses(&damaged, &medium.log(), &mut |bytes, what| {
        let report = check(&Image::open(Medium::new(bytes)).unwrap()).unwrap();
        let low = report.findings.iter().filter(|f| f.code == "refcount-too-low").count();
        assert!(low <= 1 && report.errors <= first_errors, "{what}: {:?}", report.findings);
    });
}

#[test]
fn undo_refuses_an_image_that_was_written_to_since() {
    let sound = sound();
    let mut damaged = sound.clone();
    DAMAGES[6].1(&mut damaged);
    let medium = Medium::new(damaged);
    let store = Arc::clone(&medium) as Arc<dyn Store>;
    let plan = plan_repair(&store, RepairMode::All, &Alone).unwrap();
    let undo_file = Medium::new(Vec::new());
    plan.undo_file(&*store).unwrap().write(&*undo_file).unwrap();
    plan.execute(&*store).unwrap();
    let repaired = medium.bytes();
    // A count, an L2 entry that the repair did not touch, one that it did, the length.
    let places = [block(&repaired) + 200, l2(&repaired, 50) + 5, l2(&repaired, 9) + 5, repaired.len() + 4096];
    for at in places {
        let mut bytes = repaired.clone();
        bytes.resize(bytes.len().max(at + 1), 0);
        bytes[at] ^= 0x10;
        let image = Medium::new(bytes.clone());
        assert!(undo(&*image, &*undo_file).is_err(), "{at:#x}");
        assert!(image.bytes() == bytes, "{at:#x}: a refusal changes nothing");
    }
    for at in (0..undo_file.bytes().len()).step_by(7) {
        let mut bytes = undo_file.bytes();
        bytes[at] ^= 1;
        assert!(undo(&*medium, &*Medium::new(bytes)).is_err(), "undo file flipped at {at}");
    }
    undo(&*medium, &*undo_file).unwrap();
}

/// A find of fuzzing: new refcount blocks came to lie where a compressed entry reaches behind the end of the file.
#[test]
fn what_is_claimed_behind_the_end_stays_clear_of_new_clusters() {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/hostile/compressed-claim-behind-the-end.qcow2");
    let medium = Medium::new(std::fs::read(path).unwrap());
    let plan = repair(&(Arc::clone(&medium) as Arc<dyn Store>), RepairMode::All, &Alone).unwrap();
    assert!(plan.before.errors > 0 && plan.bytes_written() > 0);
    assert_eq!((plan.after.errors, plan.after.leaks), (0, 0), "{:?}", plan.after.findings);
    let report = check(&Image::open(Medium::new(medium.bytes())).unwrap()).unwrap();
    assert_eq!(report, plan.after);
    let again = plan_repair(&(medium as Arc<dyn Store>), RepairMode::All, &Alone).unwrap();
    assert!(again.is_empty(), "{:?}", again.actions);
}
