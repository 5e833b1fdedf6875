//! Verbs that change one image where it lies, or make a new one, on a disk in memory: whatever a kill, a loss of power or a
//! failing disk leaves, the image is as it was or as it will be, in all its states; a write to it hurts none of them; doing
//! it again, a repair, and a repair that is taken back end well, also where they are ended early themselves.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::{Path, PathBuf};

use pleach_engine::convert::{BrokenBitmaps, NewImage, Target, convert};
use pleach_engine::internal::Internal;
use pleach_engine::survey::{FileFormat, Trust};
use pleach_engine::{
    Repair, Source, SourceOptions, Watch, compact, open_writer, open_writer_alone, undo_repair,
};
use pleach_format::{BackingFile, Incompatible, RefcountWidth, Version};
use pleach_image::{
    CompactOptions, CreateOptions, Image, NewSnapshot, Preallocation, RepairMode, Writer, check, create,
};
use pleach_store::{Access, Disk};
use pleach_testkit::oracle::{self, Format, text};
use pleach_testkit::sim::{Effort, SimDisk, Subject, crash_rounds, endings};
use pleach_testkit::{OnFailure, Rng};

const DIR: &str = "/d";

type Done = std::result::Result<(), String>;

/// What is done.
struct Operation {
    name: &'static str,
    act: fn(&SimDisk) -> Done,
    /// What the image must be like.
    needs: Needs,
}

/// What an image must be like for an operation.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Needs {
    /// It may be like anything.
    Any,
    /// It has bitmaps; so it has no snapshots, which could not be applied.
    Bitmaps,
    /// It has snapshots, and so refcounts of more than one bit, and no bitmaps.
    Snapshots,
    /// As [`Any`](Self::Any); it has counts that are too high.
    Leaks,
    /// It has counts and flags that are wrong.
    Damage,
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn trusting() -> SourceOptions {
    let trust = Trust { everything: true, ..Trust::default() };
    SourceOptions { format: Some(FileFormat::Qcow2), trust, ..SourceOptions::default() }
}

fn resize(disk: &SimDisk, size: impl FnOnce(u64) -> u64) -> Done {
    let writer = open_writer(disk, &path("image"), &trusting()).map_err(|e| e.full())?;
    writer.resize(size(writer.size())).and_then(|()| writer.close()).map_err(|e| e.to_string())
}

fn inside(disk: &SimDisk, act: impl FnOnce(&Internal) -> pleach_engine::Result<()>) -> Done {
    let image = Internal::open(disk, &path("image")).map_err(|e| e.full())?;
    act(&image).and_then(|()| image.close()).map_err(|e| e.full())
}

fn bitmap(disk: &SimDisk, act: impl FnOnce(&Writer) -> Result<(), pleach_image::ImageError>) -> Done {
    let writer = open_writer_alone(disk, &path("image")).map_err(|e| e.full())?;
    act(&writer).and_then(|()| writer.close()).map_err(|e| e.to_string())
}

fn compacted(disk: &SimDisk, zeroes: bool) -> Done {
    compact(disk, &path("image"), CompactOptions { zeroes }, &Watch::new()).map(drop).map_err(|e| e.full())
}

fn repair(disk: &SimDisk, mode: RepairMode) -> Done {
    let repair = Repair::plan(disk, &path("image"), mode, false).map_err(|e| e.full())?;
    repair.run(disk, "now").map(drop).map_err(|e| e.full())
}

fn new_image(options: CreateOptions, compress: bool, bitmaps: bool) -> Target<'static> {
    Target::Qcow2(NewImage {
        options,
        below: None,
        compress: compress.then_some(None),
        carry: false,
        bitmaps: bitmaps.then_some(BrokenBitmaps::Skip),
    })
}

fn copy(disk: &SimDisk, target: &Target<'_>) -> Done {
    let source = Source::open(disk, &path("image"), &trusting()).map_err(|e| e.full())?;
    convert(disk, &source.chain, &path("new"), target, &Watch::new()).map(drop).map_err(|e| e.full())
}

fn overlay(disk: &SimDisk) -> Done {
    let backing = Some(BackingFile { name: b"image".to_vec(), format: Some(b"qcow2".to_vec()) });
    let size = Image::open(disk.open(&path("image"), Access::Read).map_err(|e| e.to_string())?)
        .map_err(|e| e.to_string())?
        .size();
    let options = CreateOptions { size, cluster_bits: 9, backing, ..CreateOptions::default() };
    create(disk, &path("new"), &options).map_err(|e| e.to_string())
}

const SMALL: fn() -> CreateOptions = || CreateOptions { cluster_bits: 10, ..CreateOptions::default() };

const OPERATIONS: &[Operation] = &[
    Operation { name: "grow", act: |d| resize(d, |size| size * 3 + 512), needs: Needs::Any },
    Operation { name: "shrink", act: |d| resize(d, |size| size / 1024 * 512), needs: Needs::Any },
    Operation {
        name: "take a snapshot",
        act: |d| {
            inside(d, |i| i.take(&NewSnapshot { name: b"new".to_vec(), ..NewSnapshot::default() }).map(drop))
        },
        needs: Needs::Snapshots,
    },
    Operation { name: "apply a snapshot", act: |d| inside(d, |i| i.apply(b"1")), needs: Needs::Snapshots },
    Operation { name: "delete a snapshot", act: |d| inside(d, |i| i.delete(b"1")), needs: Needs::Snapshots },
    Operation {
        name: "rename a snapshot",
        act: |d| inside(d, |i| i.rename(b"1", &[b'n'; 300])),
        needs: Needs::Snapshots,
    },
    Operation { name: "compact", act: |d| compacted(d, false), needs: Needs::Any },
    Operation { name: "compact with snapshots", act: |d| compacted(d, true), needs: Needs::Snapshots },
    Operation { name: "compact with bitmaps", act: |d| compacted(d, true), needs: Needs::Bitmaps },
    Operation {
        name: "add a bitmap",
        act: |d| bitmap(d, |w| w.add_bitmap(b"new", Some(512), true)),
        needs: Needs::Bitmaps,
    },
    Operation {
        name: "remove a bitmap",
        act: |d| bitmap(d, |w| w.remove_bitmap(b"one")),
        needs: Needs::Bitmaps,
    },
    Operation {
        name: "clear a bitmap",
        act: |d| bitmap(d, |w| w.clear_bitmap(b"one")),
        needs: Needs::Bitmaps,
    },
    Operation {
        name: "disable a bitmap",
        act: |d| bitmap(d, |w| w.enable_bitmap(b"one", false)),
        needs: Needs::Bitmaps,
    },
    Operation {
        name: "merge bitmaps",
        act: |d| bitmap(d, |w| w.bitmap(b"two").and_then(|bits| w.merge_bitmap(b"one", &bits))),
        needs: Needs::Bitmaps,
    },
    Operation { name: "grow with bitmaps", act: |d| resize(d, |size| size * 2), needs: Needs::Bitmaps },
    Operation { name: "repair leaks", act: |d| repair(d, RepairMode::Leaks), needs: Needs::Leaks },
    Operation { name: "repair all", act: |d| repair(d, RepairMode::All), needs: Needs::Damage },
    Operation { name: "create", act: overlay, needs: Needs::Any },
    Operation { name: "flatten", act: |d| copy(d, &new_image(SMALL(), false, false)), needs: Needs::Any },
    Operation { name: "convert -c", act: |d| copy(d, &new_image(SMALL(), true, false)), needs: Needs::Any },
    Operation {
        name: "convert with bitmaps",
        act: |d| copy(d, &new_image(SMALL(), false, true)),
        needs: Needs::Bitmaps,
    },
    Operation {
        name: "convert -O raw",
        act: |d| copy(d, &Target::Raw(Preallocation::Off)),
        needs: Needs::Any,
    },
];

/// An image over a backing file, of a random kind, with a past.
fn build(rng: &mut Rng, needs: Needs) -> SimDisk {
    let disk = SimDisk::new(Path::new(DIR));
    let base = CreateOptions { size: (8 + rng.below(40)) * 512, cluster_bits: 9, ..CreateOptions::default() };
    create(&disk, &path("base"), &base).unwrap();
    scribble(&open_writer(&disk, &path("base"), &trusting()).unwrap(), rng);
    let v2 = rng.chance(20) && needs == Needs::Any;
    let extended = !v2 && rng.chance(10);
    let narrow = if matches!(needs, Needs::Snapshots | Needs::Leaks | Needs::Damage) { 2 } else { 0 };
    let width = if v2 { 4 } else { narrow + u32::try_from(rng.below(7 - u64::from(narrow))).unwrap() };
    let backing =
        rng.chance(50).then(|| BackingFile { name: b"base".to_vec(), format: Some(b"qcow2".to_vec()) });
    let options = CreateOptions {
        size: (8 + rng.below(60)) * 512,
        cluster_bits: if extended { 14 } else { 9 + u32::try_from(rng.below(4)).unwrap() },
        version: if v2 { Version::V2 } else { Version::V3 },
        refcount_width: RefcountWidth::new(width).unwrap(),
        extended_l2: extended,
        lazy_refcounts: !v2 && rng.chance(20),
        backing: backing.filter(|_| !v2),
        ..CreateOptions::default()
    };
    create(&disk, &path("image"), &options).unwrap();
    let open = || open_writer(&disk, &path("image"), &trusting()).unwrap();
    scribble(&open(), rng);
    if needs == Needs::Snapshots {
        for name in ["s1", "s2"] {
            inside(&disk, |i| i.take(&NewSnapshot { name: name.into(), ..NewSnapshot::default() }).map(drop))
                .unwrap();
            if rng.chance(40) {
                resize(&disk, |size| size + 1024).unwrap();
            }
            scribble(&open(), rng);
        }
    }
    if needs == Needs::Bitmaps {
        for (name, enabled) in [("one", true), ("two", true), ("three", false)] {
            bitmap(&disk, |w| w.add_bitmap(name.as_bytes(), Some(512), enabled)).unwrap();
            scribble(&open(), rng);
        }
    }
    if matches!(needs, Needs::Leaks | Needs::Damage) {
        damage(&disk, rng, needs == Needs::Damage);
    }
    disk
}

fn scribble(writer: &Writer, rng: &mut Rng) {
    let (size, cluster) = (writer.size(), writer.cluster_size());
    for _ in 0..rng.between(1, 5) {
        let at = rng.below(size / 512) * 512;
        let len = (rng.between(1, 8) * 512).min(size - at);
        let byte = u8::try_from(rng.between(1, 255)).unwrap();
        match rng.below(7) {
            0 => writer.write_zeroes(at, len, true).unwrap(),
            1 => writer.discard(at, len).unwrap(),
            2 => writer.write_at(at, &vec![0; usize::try_from(len).unwrap()]).unwrap(),
            3 => {
                let at = at / cluster * cluster;
                let len = cluster.min(size - at);
                writer.discard(at, len).unwrap();
                writer.write_compressed(at, &vec![byte; usize::try_from(len).unwrap()]).unwrap();
            }
            _ => writer.write_at(at, &vec![byte; usize::try_from(len).unwrap()]).unwrap(),
        }
    }
    writer.flush().unwrap();
}

/// Counts that are too high; with `more` also some that are too low, and COPIED flags that do not fit.
fn damage(disk: &SimDisk, rng: &mut Rng, more: bool) {
    let store = disk.open(&path("image"), Access::Write).unwrap();
    let word = |at: u64| {
        let mut word = [0; 8];
        store.read_at(at, &mut word).unwrap();
        u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00
    };
    let image = Image::open(disk.open(&path("image"), Access::Read).unwrap()).unwrap();
    let (cluster, width) = (image.geometry().cluster_size(), image.header().refcount_width());
    let (block, clusters) = (word(word(48)), store.len().unwrap() / cluster);
    let mut counts = vec![0; image.geometry().cluster_bytes()];
    store.read_at(block, &mut counts).unwrap();
    let slots = usize::try_from(clusters.min(width.per_block(image.geometry()))).unwrap();
    for _ in 0..rng.between(1, 4) {
        let slot = rng.index(slots);
        let count = if more && rng.chance(50) { 0 } else { width.get(&counts, slot) + 1 };
        width.set(&mut counts, slot, count.min(width.max())).unwrap();
    }
    store.write_at(block, &counts).unwrap();
    if more {
        let l1 = image.l1_table_offset().0;
        let mut byte = [0];
        store.read_at(l1, &mut byte).unwrap();
        store.write_at(l1, &[byte[0] ^ 0x80]).unwrap();
    }
}

/// One state: its name if it is a snapshot, and what it reads as.
type State = (String, Vec<u8>);

/// A bitmap: name, whether it is enabled, and its dirty ranges; nothing if it says itself that it does not know.
type Bitmap = (Vec<u8>, Option<(bool, Vec<std::ops::Range<u64>>)>);

/// Everything that an image holds: the active state first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct View {
    states: Vec<State>,
    bitmaps: Vec<Bitmap>,
}

fn read(disk: &SimDisk, name: &str, format: FileFormat, snapshot: Option<&[u8]>) -> Result<Vec<u8>, String> {
    let snapshot = snapshot.map(|id| String::from_utf8(id.to_vec()).unwrap());
    let options = SourceOptions { snapshot, format: Some(format), ..trusting() };
    let source = Source::open(disk, &path(name), &options).map_err(|e| e.full())?;
    let mut bytes = vec![0; usize::try_from(source.chain.size()).unwrap()];
    source.chain.read_at(0, &mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

fn image(disk: &SimDisk, name: &str) -> Result<Image, String> {
    let store = disk.open(&path(name), Access::Read).map_err(|e| e.to_string())?;
    Image::open(store).map_err(|e| e.to_string())
}

fn view(disk: &SimDisk) -> Result<View, String> {
    let mut states = vec![(String::new(), read(disk, "image", FileFormat::Qcow2, None)?)];
    let image = image(disk, "image")?;
    for snapshot in image.snapshots().map_err(|e| e.to_string())? {
        let name = String::from_utf8_lossy(&snapshot.name).into_owned();
        states.push((name, read(disk, "image", FileFormat::Qcow2, Some(&snapshot.id))?));
    }
    let mut bitmaps = Vec::new();
    for record in image.bitmaps().map_err(|e| e.to_string())? {
        let known = record.flags & pleach_format::BitmapRecord::IN_USE == 0;
        let enabled = record.flags & pleach_format::BitmapRecord::AUTO != 0;
        let bits = image.bitmap_bits(&record).map_err(|e| e.to_string());
        bitmaps.push((record.name.clone(), if known { Some((enabled, bits?.ranges())) } else { None }));
    }
    Ok(View { states, bitmaps })
}

impl View {
    /// Whether this is `other`, but for bitmaps that say themselves that they do not know.
    fn is(&self, other: &Self) -> bool {
        let alike = |(a, b): (&Bitmap, &Bitmap)| a.0 == b.0 && (a.1.is_none() || a.1 == b.1);
        self.states == other.states
            && self.bitmaps.len() == other.bitmaps.len()
            && self.bitmaps.iter().zip(&other.bitmaps).all(alike)
    }
}

struct Case<'a> {
    operation: &'a Operation,
    before: View,
    after: View,
    /// Errors that there are before.
    errors: u64,
    original: Vec<u8>,
    base: Vec<u8>,
    /// What the new file reads as, if one is made.
    new: Option<Vec<u8>>,
}

fn bytes_of(disk: &SimDisk, name: &str) -> Vec<u8> {
    let contents = disk.contents();
    contents.names().find(|(p, _)| *p == path(name)).map(|(_, bytes)| bytes.to_vec()).unwrap_or_default()
}

/// What a new file reads as; `None` if there is none.
fn new_file(disk: &SimDisk) -> Option<Result<Vec<u8>, String>> {
    disk.stat(&path("new")).ok()?;
    let qcow2 = bytes_of(disk, "new").starts_with(b"QFI");
    Some(read(disk, "new", if qcow2 { FileFormat::Qcow2 } else { FileFormat::Raw }, None))
}

impl Case<'_> {
    /// The image is as before or as after, and so is every other file; returns which.
    fn content(&self, disk: &SimDisk, when: &str) -> View {
        let found = view(disk).unwrap_or_else(|e| panic!("{when}: {e}"));
        assert!(
            found.is(&self.before) || found.is(&self.after),
            "{when}: neither before nor after: {}",
            differences(&found, [&self.before, &self.after])
        );
        assert!(bytes_of(disk, "base") == self.base, "{when}: the backing file has changed");
        if let Some(new) = new_file(disk) {
            assert!(
                Some(&new) == self.new.clone().map(Ok).as_ref(),
                "{when}: the new file reads differently"
            );
        }
        if self.new.is_some() {
            assert!(bytes_of(disk, "image") == self.original, "{when}: the source has changed");
        }
        found
    }

    /// Somebody who knows of nothing writes to the image.
    fn write_somewhere(&self, disk: &SimDisk, before: &View, when: &str) {
        let name = if new_file(disk).is_some() && self.operation.name == "create" { "new" } else { "image" };
        let when = format!("{when}; then a write to {name}");
        let open = || open_writer(disk, &path(name), &trusting());
        let writer = open().unwrap_or_else(|e| panic!("{when}: {}", e.full()));
        let at = writer.size() / 1024 * 512;
        let done = writer.write_at(at, &[0xee; 512]).and_then(|()| writer.close());
        done.unwrap_or_else(|e| panic!("{when}: {e}"));
        let mut wanted = before.states.clone();
        if name == "image" {
            let at = usize::try_from(at).unwrap();
            wanted[0].1[at..at + 512].fill(0xee);
        }
        let found = view(disk).unwrap_or_else(|e| panic!("{when}: {e}"));
        assert!(found.states == wanted, "{when}: a state has changed");
        let report = check(&image(disk, name).unwrap()).unwrap();
        assert_eq!(report.errors, 0, "{when}: {:?}", report.findings);
    }
}

fn differences(found: &View, legal: [&View; 2]) -> String {
    let names = |v: &View| v.states.iter().map(|s| (s.0.clone(), s.1.len())).collect::<Vec<_>>();
    let first = |other: &View| {
        let pairs = found.states.iter().zip(&other.states);
        pairs.map(|(a, b)| a.1.iter().zip(&b.1).position(|(a, b)| a != b)).collect::<Vec<_>>()
    };
    let of = |v: &View| format!("{:?} differing at {:?}, bitmaps {:?}", names(v), first(v), v.bitmaps);
    format!("{}; legal: {}; or {}", of(found), of(legal[0]), of(legal[1]))
}

impl Subject for Case<'_> {
    fn act(&self, disk: &SimDisk) -> Done {
        (self.operation.act)(disk)
    }

    fn ways(&self) -> &'static [&'static str] {
        match (self.operation.needs, &self.new) {
            (_, Some(_)) => &["again"],
            (Needs::Leaks | Needs::Damage, _) => &["repair", "undo"],
            _ if self.operation.name.contains("compact") => &["repair", "again"],
            _ => &["repair"],
        }
    }

    fn recover(&self, disk: &SimDisk, way: &str) -> Done {
        match way {
            // Nobody makes it again where it is there.
            "again" if self.new.is_some() && disk.stat(&path("new")).is_ok() => Ok(()),
            "again" => self.act(disk),
            "repair" => {
                let report = check(&image(disk, "image")?).map_err(|e| e.to_string())?;
                let marks = image(disk, "image")?.header().incompatible();
                if report.errors + report.leaks == 0 && !marks.has(Incompatible::DIRTY) {
                    return Ok(());
                }
                repair(disk, RepairMode::All)
            }
            _ => {
                let Ok(file) = disk.stat(&path("image.undo-now")).map(|_| path("image.undo-now")) else {
                    return Ok(());
                };
                match undo_repair(disk, &path("image"), &file) {
                    Err(e) if e.full().contains("os error") => Err(e.full()),
                    // Half an undo file is of no use, but then nothing has changed.
                    _ if bytes_of(disk, "image") == self.original => Ok(()),
                    done => Err(format!("not taken back: {:?}", done.map_err(|e| e.full()))),
                }
            }
        }
    }

    fn always(&self, disk: &SimDisk, when: &str) {
        let found = self.content(disk, when);
        let image = image(disk, "image").unwrap();
        let report = check(&image).unwrap();
        let dirty = image.header().incompatible().has(Incompatible::DIRTY);
        drop(image);
        assert!(report.errors <= self.errors || dirty, "{when}: {:?}", report.findings);
        if report.errors == 0 || dirty {
            self.write_somewhere(disk, &found, when);
        }
    }

    fn in_the_end(&self, disk: &SimDisk, way: &str, when: &str) {
        self.content(disk, when);
        if way == "undo" {
            return;
        }
        let report = check(&image(disk, "image").unwrap()).unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{when}: {:?}", report.findings);
        if self.new.is_some() {
            assert!(new_file(disk).is_some(), "{when}: nothing was made");
            if let Ok(new) = image(disk, "new") {
                let report = check(&new).unwrap();
                assert_eq!((report.errors, report.leaks), (0, 0), "{when}: new: {:?}", report.findings);
            }
        }
    }

    fn by_stock(&self, dir: &Path, when: &str) {
        let (file, raw) = (dir.join("image"), dir.join("raw"));
        let check = oracle::check(&file, Format::Qcow2);
        let dirty = oracle::info(&file)["dirty-flag"] == true;
        assert!(check.is_safe() || dirty || self.errors > 0, "{when}: {}", check.text);
        let active = |file: &Path, format: &str| {
            oracle::qemu_img(&["convert", "-f", format, "-O", "raw", text(file), text(&raw)]);
            std::fs::read(&raw).unwrap()
        };
        let found = active(&file, "qcow2");
        let legal = [&self.before, &self.after].map(|v| &v.states[0].1);
        assert!(legal.contains(&&found), "{when}: stock QEMU reads something else");
        let new = dir.join("new");
        if let Some(wanted) = self.new.as_ref().filter(|_| new.exists()) {
            let qcow2 = std::fs::read(&new).unwrap().starts_with(b"QFI");
            assert!(active(&new, if qcow2 { "qcow2" } else { "raw" }) == *wanted, "{when}: the new file");
        }
        if self.errors == 0 {
            oracle::qemu_io(&file, Format::Qcow2, &["write -q -P 0xee 0 512"]);
            let mut wanted = found;
            wanted[..512].fill(0xee);
            assert!(active(&file, "qcow2") == wanted, "{when}; then a write by stock QEMU");
            let check = oracle::check(&file, Format::Qcow2);
            assert!(check.is_safe(), "{when}; then a write by stock QEMU: {}", check.text);
        }
    }
}

/// One image, one operation, every state. Returns how many there were.
fn run(seed: u64, operation: &Operation, effort: Effort) -> usize {
    let _seed = OnFailure::print_seed(seed, format!("crash_images: {}", operation.name));
    let mut rng = Rng::new(seed);
    let start = build(&mut rng, operation.needs).contents();
    let disk = SimDisk::of(start.clone());
    let before = view(&disk).unwrap();
    let errors = check(&image(&disk, "image").unwrap()).unwrap().errors;
    let (original, base) = (bytes_of(&disk, "image"), bytes_of(&disk, "base"));
    (operation.act)(&disk).unwrap_or_else(|e| panic!("{}: {e}", operation.name));
    let (after, new) = (view(&disk).unwrap(), new_file(&disk).map(Result::unwrap));
    let case = Case { operation, before, after, errors, original, base, new };
    endings(&start, &case, effort, &mut rng)
}

#[test]
fn an_image_is_old_or_new() {
    crash_rounds(OPERATIONS, 5, run);
}
