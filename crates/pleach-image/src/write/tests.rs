//! What a power loss, a kill or a failing disk may leave of a session: each sector old or new, the disk's size old or new,
//! snapshots untouched, bitmaps that know of every change or say that they do not, and no errors.

use std::sync::Arc;

use pleach_format::{BitmapRecord, Incompatible};
use pleach_store::Store;
use pleach_testkit::WorkDir;
use pleach_testkit::oracle::{self, Format, qemu_img, qemu_io, text};

use super::{NewSnapshot, WriteOptions, Writer};
use crate::medium::{Medium, Op, power_losses};
use crate::{Alone, Chain, Image, ImageError, Layer, RepairMode, check, repair};

type Act = fn(&Writer) -> Result<(), ImageError>;

struct Case {
    name: &'static str,
    options: &'static str,
    size: &'static str,
    /// What qemu-io writes first.
    before: &'static [&'static str],
    /// Then a snapshot `s` is taken.
    snapshot: bool,
    /// What qemu-io writes after that.
    after: &'static [&'static str],
    bitmap: bool,
    act: Act,
}

const CASE: Case = Case {
    name: "",
    options: "cluster_size=512",
    size: "96k",
    before: &["write -q -P 1 0 40k"],
    snapshot: false,
    after: &[],
    bitmap: false,
    act: |_| Ok(()),
};

fn mixed(writer: &Writer) -> Result<(), ImageError> {
    writer.write_at(1000, &[9; 5000])?;
    writer.write_zeroes(8 << 10, 4 << 10, false)?;
    writer.flush()?;
    writer.write_at(50 << 10, &[8; 3000])?;
    writer.discard(20 << 10, 8 << 10)?;
    writer.write_at(13 << 10, &[7; 700])?;
    // The discarded clusters are free after this flush, and are handed out again.
    writer.flush()?;
    writer.write_at(60 << 10, &[6; 9000])
}

const AFTER: &[&str] = &["write -q -P 2 10k 7k", "write -q -P 3 80k 9k", "write -q -z 30k 4k"];

fn take(writer: &Writer) -> Result<(), ImageError> {
    writer.take_snapshot(&NewSnapshot { name: b"new".to_vec(), ..NewSnapshot::default() }).map(drop)
}

fn cases() -> Vec<Case> {
    vec![
        Case { name: "writes", act: mixed, ..CASE },
        Case { name: "writes beside a snapshot", snapshot: true, act: mixed, ..CASE },
        Case { name: "writes under a bitmap", options: "cluster_size=4k", bitmap: true, act: mixed, ..CASE },
        Case {
            name: "subclusters",
            options: "cluster_size=16k,extended_l2=on",
            snapshot: true,
            act: mixed,
            ..CASE
        },
        Case { name: "version 2", options: "cluster_size=512,compat=0.10", act: mixed, ..CASE },
        Case {
            name: "compressed",
            before: &["write -q -P 1 0 8k"],
            act: |w| {
                for cluster in 20..60 {
                    w.write_compressed(cluster * 512, &[5; 512])?;
                }
                w.flush()?;
                w.write_at(2 << 10, &[6; 600])
            },
            ..CASE
        },
        Case { name: "grow", act: |w| w.resize(4 << 20), ..CASE },
        Case { name: "grow with a bitmap", bitmap: true, act: |w| w.resize(4 << 20), ..CASE },
        Case { name: "shrink", snapshot: true, act: |w| w.resize(5 << 9), ..CASE },
        Case { name: "shrink alone", bitmap: true, act: |w| w.resize(5 << 9), ..CASE },
        Case { name: "shrink in a cluster", options: "cluster_size=4k", act: |w| w.resize(5 << 9), ..CASE },
        Case { name: "take a snapshot", act: take, ..CASE },
        Case { name: "take another one", snapshot: true, after: AFTER, act: take, ..CASE },
        Case { name: "take one of version 2", options: "cluster_size=512,compat=0.10", act: take, ..CASE },
        Case {
            name: "delete a snapshot",
            snapshot: true,
            after: AFTER,
            act: |w| w.delete_snapshot(b"s"),
            ..CASE
        },
        Case { name: "go back", snapshot: true, after: AFTER, act: |w| w.apply_snapshot(b"s"), ..CASE },
        Case {
            name: "go back among subclusters",
            options: "cluster_size=16k,extended_l2=on",
            snapshot: true,
            after: AFTER,
            act: |w| w.apply_snapshot(b"s"),
            ..CASE
        },
        Case {
            name: "rename a snapshot",
            snapshot: true,
            act: |w| w.rename_snapshot(b"s", b"a longer name"),
            ..CASE
        },
        Case { name: "add a bitmap", act: |w| w.add_bitmap(b"new", Some(512), true), ..CASE },
        Case {
            name: "bitmaps in large clusters",
            options: "cluster_size=64k",
            bitmap: true,
            act: |w| {
                w.write_at(0, &[9; 512])?;
                w.add_bitmap(b"new", Some(512), true)?;
                w.merge_bitmap(b"new", &w.bitmap(b"b")?)?;
                w.remove_bitmap(b"b")
            },
            ..CASE
        },
    ]
}

#[test]
fn a_power_loss_leaves_old_or_new() {
    for (case, start) in built() {
        let medium = Medium::new(start.clone());
        session(&medium, case.act).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let judge = Judge::new(&case, &start, &medium.bytes());
        let mut states = 0;
        power_losses(&start, &medium.log(), &mut |bytes, what| {
            states += 1;
            judge.state(bytes, what);
        });
        assert!(states > 10, "{}: {states} states", case.name);
    }
}

#[test]
fn a_disk_that_fails_at_any_operation_leaves_old_or_new() {
    for (case, start) in built() {
        let whole = Medium::new(start.clone());
        session(&whole, case.act).unwrap();
        let judge = Judge::new(&case, &start, &whole.bytes());
        let operations = whole.log().len();
        for n in (0..operations).step_by(operations.div_ceil(60)) {
            let medium = Medium::failing(start.clone(), n);
            let failed = session(&medium, case.act);
            assert!(failed.is_err(), "{}: operation {n} of {operations} fails unnoticed", case.name);
            judge.state(medium.bytes(), &format!("operation {n} failed"));
        }
    }
}

/// What was flushed, or closed, is on the medium.
#[test]
fn a_flush_is_durable() {
    for (case, start) in built() {
        let medium = Medium::new(start);
        let writer = Writer::open(Arc::clone(&medium) as Arc<dyn Store>, WriteOptions::default()).unwrap();
        let flushed = |what: &str| {
            let last = medium.log().pop();
            assert!(matches!(last, None | Some(Op::Barrier)), "{}: {what}: {last:?}", case.name);
        };
        // In place, where nothing but data changes, and in new clusters.
        for at in [0, 90 << 10] {
            writer.write_at(at, &[9; 512]).unwrap();
            writer.flush().unwrap();
            flushed("flush");
        }
        writer.write_at(0, &[8; 512]).unwrap();
        writer.close().unwrap();
        flushed("close");
    }
}

/// No entry of the image is written before the data in the data file that it leads to are durable.
#[test]
fn a_data_file_is_flushed_before_its_image() {
    if !oracle::available() {
        return;
    }
    let work = WorkDir::new("write");
    let (path, data) = (work.join("image"), work.join("data"));
    let options = format!("cluster_size=4k,data_file={}", text(&data));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "96k"]);
    let [image, data] = [path, data].map(|path| Medium::new(std::fs::read(path).unwrap()));
    let options =
        WriteOptions { data_file: Some(Arc::clone(&data) as Arc<dyn Store>), ..WriteOptions::default() };
    let writer = Writer::open(Arc::clone(&image) as Arc<dyn Store>, options).unwrap();
    mixed(&writer).unwrap();
    writer.close().unwrap();
    let (image, data) = (image.stamped(), data.stamped());
    for (now, _) in image.iter().filter(|(_, op)| matches!(op, Op::Write(..))) {
        let before = data.iter().rev().find(|(then, _)| then < now);
        assert!(matches!(before, None | Some((_, Op::Barrier))), "{before:?}");
    }
    assert!(matches!(data.last(), Some((_, Op::Barrier))) && data.len() > 3);
}

/// The cases with their images, which stock QEMU made.
fn built() -> Vec<(Case, Vec<u8>)> {
    if !oracle::available() {
        return Vec::new();
    }
    let work = WorkDir::new("write");
    let built = |case: Case| {
        let path = work.join("image");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", case.options, text(&path), case.size]);
        qemu_io(&path, Format::Qcow2, case.before);
        if case.snapshot {
            qemu_img(&["snapshot", "-c", "s", text(&path)]);
        }
        qemu_io(&path, Format::Qcow2, case.after);
        if case.bitmap {
            qemu_img(&["bitmap", "--add", "-g", "512", text(&path), "b"]);
        }
        let bytes = std::fs::read(&path).unwrap();
        (case, bytes)
    };
    cases().into_iter().map(built).collect()
}

fn session(medium: &Arc<Medium>, act: Act) -> Result<(), ImageError> {
    let writer = Writer::open(Arc::clone(medium) as Arc<dyn Store>, WriteOptions::default())?;
    act(&writer)?;
    writer.close()
}

struct Judge<'a> {
    case: &'a Case,
    old: Vec<u8>,
    new: Vec<u8>,
    /// What the snapshot of the case keeps.
    kept: Option<Vec<u8>>,
    /// How many snapshots there are before, and after.
    snapshots: [usize; 2],
}

impl<'a> Judge<'a> {
    fn new(case: &'a Case, start: &[u8], end: &[u8]) -> Self {
        let content = |bytes: &[u8]| content(Image::open(Medium::new(bytes.to_vec())).unwrap());
        let image = Image::open(Medium::new(start.to_vec())).unwrap();
        let kept = image.at_snapshot(b"s").ok().map(self::content);
        let count =
            |bytes: &[u8]| Image::open(Medium::new(bytes.to_vec())).unwrap().snapshots().unwrap().len();
        let snapshots = [count(start), count(end)];
        let judge = Self { case, old: content(start), new: content(end), kept, snapshots };
        judge.state(end.to_vec(), "the end");
        judge
    }

    fn state(&self, bytes: Vec<u8>, what: &str) {
        let what = format!("{}: {what}", self.case.name);
        let medium = Medium::new(bytes);
        let image =
            Image::open(Arc::clone(&medium) as Arc<dyn Store>).unwrap_or_else(|e| panic!("{what}: {e}"));
        // A dirty image has its counts rebuilt by whoever opens it next.
        let whole = match image.header().incompatible().has(Incompatible::DIRTY) {
            true => {
                let store: Arc<dyn Store> = Medium::new(medium.bytes());
                repair(&store, RepairMode::All, &Alone).unwrap_or_else(|e| panic!("{what}: {e}"));
                Image::open(store).unwrap_or_else(|e| panic!("{what}: {e}"))
            }
            false => Image::open(Arc::clone(&medium) as Arc<dyn Store>).unwrap(),
        };
        let report = check(&whole).unwrap_or_else(|e| panic!("{what}: {e}"));
        let v2 = self.case.options.contains("compat=0.10");
        let harmless = report.findings.iter().all(|f| f.code == "copied-flag" || f.code == "leak");
        assert!(report.errors == 0 || v2 && harmless, "{what}: {:?}", report.findings);
        for image in [&image, &whole] {
            assert!(self.snapshots.contains(&image.snapshots().unwrap().len()), "{what}: snapshots");
            for snapshot in image.snapshots().unwrap_or_else(|e| panic!("{what}: {e}")) {
                let now = content(image.at_snapshot(&snapshot.id).unwrap_or_else(|e| panic!("{what}: {e}")));
                let wanted = if snapshot.name == b"new" { &self.old } else { self.kept.as_ref().unwrap() };
                assert!(now == *wanted, "{what}: the snapshot {:?}", snapshot.id);
            }
        }
        assert!(content(whole) == content_of(&medium), "{what}: a repair changes nothing that is read");
        let size = usize::try_from(image.size()).unwrap();
        assert!([self.old.len(), self.new.len()].contains(&size), "{what}: the size is {size}");
        let bitmaps = image.bitmaps().unwrap_or_else(|e| panic!("{what}: {e}"));
        // A bitmap that was added later knows of less.
        let trusted = bitmaps.iter().filter(|b| b.name == b"b" && b.flags & BitmapRecord::IN_USE == 0);
        let known: Vec<_> = trusted
            .map(|b| image.bitmap_bits(b).unwrap_or_else(|e| panic!("{what}: {e}")).ranges())
            .collect();
        let now = content(image);
        for (at, sector) in (0..).step_by(512).zip(now.chunks(512)) {
            let same = |other: &[u8]| other.get(at..at + 512) == Some(sector);
            assert!(same(&self.old) || same(&self.new), "{what}: sector at {at:#x}");
            let changed = at < self.old.len().min(self.new.len()) && !same(&self.old);
            for ranges in &known {
                let said = ranges.iter().any(|r| r.contains(&(at as u64)));
                assert!(said || !changed, "{what}: a bitmap does not know of {at:#x}");
            }
        }
    }
}

fn content_of(medium: &Arc<Medium>) -> Vec<u8> {
    content(Image::open(Arc::clone(medium) as Arc<dyn Store>).unwrap())
}

fn content(image: Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    Chain::new(vec![Arc::new(Layer::Qcow2(image))]).read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_writer_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Writer>();
}
