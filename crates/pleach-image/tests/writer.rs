//! Random operations through [`Writer`], against an array of bytes and against qemu-io on a twin image.
//!
//! The images are made by qemu-img, of every kind there is. After each few operations the image is closed: stock QEMU
//! must find no error and read what the model says, of the active state and of each snapshot, and can go on writing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_image::{Chain, Image, Layer, NewSnapshot, RawImage, WriteOptions, Writer};
use pleach_store::{Access, Disk, RealDisk};
use pleach_testkit::files::WorkDir;
use pleach_testkit::oracle::{self, Format, text};
use pleach_testkit::rng::Rng;
use pleach_testkit::{chosen_seed, long_mode};

/// One kind of image: options for `qemu-img create`, and what lies below.
struct Kind {
    name: &'static str,
    options: &'static str,
    /// Size of the backing file.
    backing: Option<u64>,
    data_file: bool,
    snapshots: bool,
    bitmaps: bool,
    compressed: bool,
}

const PLAIN: Kind = Kind {
    name: "plain",
    options: "cluster_size=4k",
    backing: None,
    data_file: false,
    snapshots: true,
    bitmaps: true,
    compressed: true,
};

const KINDS: &[Kind] = &[
    PLAIN,
    Kind { name: "64k", options: "cluster_size=64k", ..PLAIN },
    Kind { name: "512", options: "cluster_size=512", ..PLAIN },
    Kind { name: "over", backing: Some(1 << 20), ..PLAIN },
    Kind { name: "over-short", backing: Some(300 << 10), ..PLAIN },
    Kind { name: "v2", options: "cluster_size=4k,compat=0.10", bitmaps: false, snapshots: false, ..PLAIN },
    Kind { name: "v2-snapshots", options: "cluster_size=1k,compat=0.10", bitmaps: false, ..PLAIN },
    Kind {
        name: "v2-over",
        options: "cluster_size=2k,compat=0.10",
        bitmaps: false,
        snapshots: false,
        backing: Some(700 << 10),
        ..PLAIN
    },
    Kind { name: "subclusters", options: "cluster_size=16k,extended_l2=on", ..PLAIN },
    Kind {
        name: "subclusters-over",
        options: "cluster_size=32k,extended_l2=on",
        backing: Some(1 << 20),
        ..PLAIN
    },
    Kind { name: "zstd", options: "cluster_size=8k,compression_type=zstd", ..PLAIN },
    Kind { name: "1-bit", options: "cluster_size=4k,refcount_bits=1", snapshots: false, ..PLAIN },
    Kind { name: "2-bit", options: "cluster_size=4k,refcount_bits=2", snapshots: false, ..PLAIN },
    Kind { name: "64-bit", options: "cluster_size=512,refcount_bits=64", ..PLAIN },
    Kind { name: "lazy", options: "cluster_size=4k,lazy_refcounts=on", ..PLAIN },
    Kind { name: "preallocated", options: "cluster_size=4k,preallocation=metadata", ..PLAIN },
    Kind { name: "data-file", data_file: true, snapshots: false, compressed: false, ..PLAIN },
    Kind {
        name: "data-file-raw",
        options: "cluster_size=4k,data_file_raw=on",
        data_file: true,
        snapshots: false,
        compressed: false,
        ..PLAIN
    },
    Kind {
        name: "data-file-subclusters",
        options: "cluster_size=16k,extended_l2=on",
        data_file: true,
        snapshots: false,
        compressed: false,
        ..PLAIN
    },
];

#[test]
fn random_operations_equal_the_model_and_qemu_io() {
    if !oracle::available() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let (seeds, rounds) = if long_mode() { (4, 30) } else { (1, 8) };
    let first = chosen_seed().unwrap_or(1);
    let jobs: Vec<(u64, &Kind)> =
        (first..first + seeds).flat_map(|seed| KINDS.iter().map(move |kind| (seed, kind))).collect();
    oracle::in_parallel(&jobs, |(seed, kind)| Twins::new(kind, *seed).run(rounds));
}

/// The image under test, its twin for qemu-io, and what both should read as.
struct Twins<'a> {
    kind: &'a Kind,
    seed: u64,
    rng: Rng,
    scratch: WorkDir,
    base: Vec<u8>,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    cluster: u64,
    /// What the twin has not been told yet.
    pending: Vec<String>,
    /// Bitmaps that record, and the model of what they hold, by granule of 64 KiB.
    dirty: Option<Vec<bool>>,
}

const GRANULE: usize = 64 << 10;

impl<'a> Twins<'a> {
    fn new(kind: &'a Kind, seed: u64) -> Self {
        let mut rng =
            Rng::new(seed ^ kind.name.bytes().fold(0u64, |a, b| a.wrapping_mul(31).wrapping_add(b.into())));
        let scratch = WorkDir::new("writer");
        let mut base = vec![0; 0];
        if let Some(size) = kind.backing {
            base = vec![0; size as usize];
            for _ in 0..6 {
                let at = rng.below(size - 5000) as usize;
                let len = rng.between(1, 5000) as usize;
                let noise = rng.noise(len);
                base[at..at + len].copy_from_slice(&noise);
            }
            std::fs::write(scratch.join("base.raw"), &base).unwrap();
        }
        let size = rng.between(500, 1700) * 512;
        let mut twins = Self {
            kind,
            seed,
            rng,
            scratch,
            model: vec![0; size as usize],
            base,
            snapshots: Vec::new(),
            cluster: 0,
            pending: Vec::new(),
            dirty: None,
        };
        for name in ["ours", "twin"] {
            let mut options = kind.options.to_owned();
            if kind.data_file {
                let data = twins.path(&format!("{name}.data"));
                options += &format!(",data_file={}", text(&data));
            }
            let image = twins.path(name);
            let base_path = twins.path("base.raw");
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
            if kind.backing.is_some() {
                args.extend(["-b", text(&base_path), "-F", "raw"]);
            }
            let size = size.to_string();
            args.extend([text(&image), &size]);
            oracle::qemu_img(&args);
        }
        let n = twins.base.len().min(twins.model.len());
        twins.model[..n].copy_from_slice(&twins.base[..n]);
        twins.cluster = oracle::info(&twins.path("ours"))["cluster-size"].as_u64().unwrap();
        twins
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    fn what(&self) -> String {
        format!("kind {}, PLEACH_SEED={}", self.kind.name, self.seed)
    }

    fn open(&self) -> Writer {
        let open = |name: &str, access| RealDisk.open(&self.path(name), access).unwrap();
        let store = open("ours", Access::Write);
        let data_file = self.kind.data_file.then(|| open("ours.data", Access::Write));
        let backing = self.kind.backing.map(|_| {
            let raw = RawImage::open(open("base.raw", Access::Read)).unwrap();
            Chain::new(vec![Arc::new(Layer::Raw(raw))])
        });
        Writer::open(store, WriteOptions { backing, data_file, ..WriteOptions::default() })
            .unwrap_or_else(|e| panic!("{}: {e}", self.what()))
    }

    fn run(mut self, rounds: usize) {
        for _ in 0..rounds {
            let writer = self.open();
            for _ in 0..self.rng.between(1, 12) {
                self.step(&writer);
            }
            let mut read = vec![0xaa; self.model.len()];
            writer.read_at(0, &mut read).unwrap();
            self.same(&read, "read through the writer");
            writer.close().unwrap_or_else(|e| panic!("{}: {e}", self.what()));
            self.judge();
            self.between();
        }
    }

    fn step(&mut self, writer: &Writer) {
        let size = self.model.len() as u64;
        let what = self.what();
        let (at, len) = self.range(size);
        let range = at as usize..(at + len) as usize;
        let fail = |e| panic!("{what}: {at}+{len}: {e}");
        match self.rng.below(10) {
            0..=3 => {
                let byte = self.rng.between(1, 255) as u8;
                let bytes = vec![byte; len as usize];
                writer.write_at(at, &bytes).unwrap_or_else(fail);
                self.model[range].copy_from_slice(&bytes);
                self.pending.push(format!("write -q -P {byte} {at} {len}"));
                self.mark(at, len);
            }
            4 | 5 => {
                let free = self.rng.chance(50);
                writer.write_zeroes(at, len, free).unwrap_or_else(fail);
                self.model[range].fill(0);
                let unmap = if free { "-u " } else { "" };
                self.pending.push(format!("write -q -z {unmap}{at} {len}"));
                self.mark(at, len);
            }
            6 => {
                writer.discard(at, len).unwrap_or_else(fail);
                self.discarded(at, len);
                self.pending.push(format!("discard -q {at} {len}"));
                self.mark(at, len);
            }
            7 if self.kind.compressed => {
                let at = at / self.cluster * self.cluster;
                let len = self.cluster.min(size - at);
                let noise = self.rng.noise(64);
                let bytes: Vec<u8> = noise.iter().copied().cycle().take(len as usize).collect();
                writer.discard(at, len).unwrap_or_else(fail);
                self.discarded(at, len);
                self.mark(at, len);
                match writer.write_compressed(at, &bytes) {
                    Ok(()) => self.model[at as usize..(at + len) as usize].copy_from_slice(&bytes),
                    // A discard in a version 2 image over a backing file does nothing.
                    Err(e) => assert!(e.to_string().contains("discard it first"), "{what}: {e}"),
                }
                let path = self.path("pattern");
                std::fs::write(&path, &self.model[at as usize..(at + len) as usize]).unwrap();
                self.pending.push(format!("discard -q {at} {len}"));
                self.twin();
                oracle::qemu_io(
                    &self.path("twin"),
                    Format::Qcow2,
                    &[format!("write -q -s {} {at} {len}", text(&path))],
                );
            }
            8 => writer.flush().unwrap_or_else(fail),
            9 if self.rng.chance(40) => self.resize(writer),
            _ => {
                let mut read = vec![0; len as usize];
                writer.read_at(at, &mut read).unwrap_or_else(fail);
                assert!(read == self.model[range], "{what}: {at}+{len} read back");
            }
        }
    }

    /// Small ones at odd places, and large ones.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let unit = if self.rng.chance(50) { 512 } else { self.cluster.min(size / 4) };
        let at = self.rng.below(size / unit) * unit;
        let most = (size - at).min(if self.rng.chance(30) { size / 2 } else { 3 * self.cluster });
        (at, (self.rng.between(1, (most / unit).max(1)) * unit).min(size - at))
    }

    /// Whole clusters read as zeros, unless a version 2 image has a backing file.
    fn discarded(&mut self, at: u64, len: u64) {
        if self.kind.options.contains("compat=0.10") && self.kind.backing.is_some() {
            return;
        }
        let size = self.model.len() as u64;
        let first = at.next_multiple_of(self.cluster);
        let last = if at + len == size { size } else { (at + len) / self.cluster * self.cluster };
        if first < last {
            self.model[first as usize..last as usize].fill(0);
        }
    }

    fn mark(&mut self, at: u64, len: u64) {
        if let Some(dirty) = &mut self.dirty {
            let (first, last) = (at as usize / GRANULE, (at + len - 1) as usize / GRANULE);
            dirty[first..=last].fill(true);
        }
    }

    fn resize(&mut self, writer: &Writer) {
        let v2 = self.kind.options.contains("compat=0.10");
        if v2 && (!self.snapshots.is_empty() || self.kind.backing.is_some()) {
            return;
        }
        let old = self.model.len();
        let new = self.rng.between(200, 2200) as usize * 512;
        writer.resize(new as u64).unwrap_or_else(|e| panic!("{}: {e}", self.what()));
        self.model.resize(new, 0);
        if let Some(dirty) = &mut self.dirty {
            dirty.resize(new.div_ceil(GRANULE), false);
        }
        self.twin();
        // QEMU leaves old data behind a shrunk disk's end: zeros first, where they can be written.
        let mut commands = Vec::new();
        let end = old.next_multiple_of(self.cluster as usize);
        if new < old {
            commands.push(format!(
                "write -q -z {new} {}",
                old.min(new.next_multiple_of(self.cluster as usize)) - new
            ));
        } else if old < end && new > old {
            self.pending.push(format!("write -q -z {old} {}", end.min(new) - old));
        }
        if !commands.is_empty() && !commands[0].ends_with(" 0") {
            oracle::qemu_io(&self.path("twin"), Format::Qcow2, &commands);
        }
        oracle::qemu_img(&["resize", "-q", "--shrink", text(&self.path("twin")), &new.to_string()]);
    }

    /// Lets qemu-io do what was done here.
    fn twin(&mut self) {
        if !self.pending.is_empty() {
            // One open for all of them, with discards passed on.
            oracle::qemu_io(&self.path("twin"), Format::Qcow2, &std::mem::take(&mut self.pending));
        }
    }

    fn judge(&mut self) {
        self.twin();
        let (ours, what) = (self.path("ours"), self.what());
        let check = oracle::check(&ours, Format::Qcow2);
        assert!(check.is_clean(), "{what}: {}", check.text);
        let raw = self.path("raw");
        for name in ["twin", "ours"] {
            oracle::qemu_img(&["convert", "-O", "raw", text(&self.path(name)), text(&raw)]);
            self.same(&std::fs::read(&raw).unwrap(), name);
        }
        for (name, wanted) in &self.snapshots {
            // QEMU reads snapshots at the active disk's size.
            let store = RealDisk.open(&ours, Access::Read).unwrap();
            let image = Image::open(store).unwrap().at_snapshot(name.as_bytes()).unwrap();
            let layers = std::iter::once(Arc::new(Layer::Qcow2(image)));
            let base = self.kind.backing.map(|_| {
                let store = RealDisk.open(&self.path("base.raw"), Access::Read).unwrap();
                Arc::new(Layer::Raw(RawImage::open(store).unwrap()))
            });
            let mut read = vec![0; wanted.len()];
            Chain::new(layers.chain(base).collect()).read_at(0, &mut read).unwrap();
            assert!(read == *wanted, "{what}: snapshot {name}");
        }
        if self.kind.data_file && self.kind.options.contains("data_file_raw") {
            let mut data = std::fs::read(self.path("ours.data")).unwrap();
            data.resize(self.model.len(), 0);
            assert!(data == self.model, "{what}: the raw data file alone");
        }
        self.judge_bitmap(&ours);
    }

    fn judge_bitmap(&self, ours: &Path) {
        let Some(dirty) = &self.dirty else { return };
        let what = self.what();
        let store = RealDisk.open(ours, Access::Read).unwrap();
        let image = Image::open(store).unwrap();
        let record = image.bitmaps().unwrap().remove(0);
        let bits = image.bitmap_bits(&record).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut found = vec![false; dirty.len()];
        for range in bits.ranges() {
            found[range.start as usize / GRANULE..(range.end as usize).div_ceil(GRANULE)].fill(true);
        }
        assert!(found == *dirty, "{what}: bitmap {found:?}, wanted {dirty:?}");
        let info = oracle::info(ours);
        let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
        assert_eq!(flags.to_string(), "[\"auto\"]", "{what}");
    }

    fn same(&self, read: &[u8], whose: &str) {
        assert_eq!(read.len(), self.model.len(), "{}: {whose}: size", self.what());
        if let Some(at) = read.iter().zip(&self.model).position(|(a, b)| a != b) {
            panic!("{}: {whose}: byte {at:#x} is {:#x}, not {:#x}", self.what(), read[at], self.model[at]);
        }
    }

    /// What others do to a closed image: snapshots, bitmaps, writes by qemu-io.
    fn between(&mut self) {
        let ours = self.path("ours");
        match self.rng.below(6) {
            0 if self.kind.snapshots && self.snapshots.len() < 5 => {
                let name = format!("s{}", self.rng.bits());
                if self.rng.chance(50) {
                    qemu_snapshot(&ours, "-c", &name);
                } else {
                    let new = NewSnapshot { name: name.clone().into_bytes(), ..NewSnapshot::default() };
                    self.ours(|writer| writer.take_snapshot(&new).map(drop));
                }
                self.snapshots.push((name, self.model.clone()));
            }
            1 if !self.snapshots.is_empty() => {
                let index = self.rng.index(self.snapshots.len());
                match self.rng.below(4) {
                    0 => qemu_snapshot(&ours, "-d", &self.snapshots.remove(index).0),
                    1 => {
                        let (name, _) = self.snapshots.remove(index);
                        self.ours(|writer| writer.delete_snapshot(name.as_bytes()));
                    }
                    2 => {
                        let name = format!("s{}", self.rng.bits());
                        let old = std::mem::replace(&mut self.snapshots[index].0, name.clone());
                        self.ours(|writer| writer.rename_snapshot(old.as_bytes(), name.as_bytes()));
                    }
                    _ => self.go_back(index),
                }
            }
            2 if self.kind.bitmaps && self.dirty.is_none() => {
                oracle::qemu_img(&["bitmap", "--add", "-g", "65536", text(&ours), "b"]);
                self.dirty = Some(vec![false; self.model.len().div_ceil(GRANULE)]);
            }
            3 if self.dirty.is_some() => {
                oracle::qemu_img(&["bitmap", "--remove", text(&ours), "b"]);
                self.dirty = None;
            }
            _ => {
                let size = self.model.len() as u64;
                let (at, len) = self.range(size);
                let byte = self.rng.between(1, 255) as u8;
                let command = [format!("write -q -P {byte} {at} {len}")];
                oracle::qemu_io(&ours, Format::Qcow2, &command);
                self.pending.extend(command);
                self.model[at as usize..(at + len) as usize].fill(byte);
                self.mark(at, len);
            }
        }
    }

    /// Does something to the closed image through a writer of its own.
    fn ours(&self, act: impl FnOnce(&Writer) -> Result<(), pleach_image::ImageError>) {
        let writer = self.open();
        act(&writer).and_then(|()| writer.close()).unwrap_or_else(|e| panic!("{}: {e}", self.what()));
    }

    /// Applies a snapshot, and lets the twin read as it does.
    fn go_back(&mut self, index: usize) {
        let (name, content) = self.snapshots[index].clone();
        let v2 = self.kind.options.contains("compat=0.10");
        if self.dirty.is_some() || v2 && content.len() != self.model.len() {
            return;
        }
        self.ours(|writer| writer.apply_snapshot(name.as_bytes()));
        self.twin();
        self.model = content;
        let (twin, pattern) = (self.path("twin"), self.path("pattern"));
        std::fs::write(&pattern, &self.model).unwrap();
        let size = self.model.len();
        oracle::qemu_img(&["resize", "-q", "--shrink", text(&twin), &size.to_string()]);
        oracle::qemu_io(&twin, Format::Qcow2, &[format!("write -q -s {} 0 {size}", text(&pattern))]);
    }
}

fn qemu_snapshot(image: &Path, action: &str, name: &str) {
    oracle::qemu_img(&["snapshot", "-q", action, name, text(image)]);
}
