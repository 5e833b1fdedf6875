//! Random pasts of one image: snapshots taken, applied, deleted and renamed, writes, discards, other sizes, compactions. After
//! each step stock QEMU finds nothing wrong, and every state reads as its model.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

use std::path::PathBuf;
use std::sync::Arc;

use pleach_image::{
    Alone, Chain, CompactOptions, Image, Layer, NewSnapshot, Steps, WriteOptions, Writer, compact,
    plan_compact,
};
use pleach_store::{Access, Disk, RealDisk, Store};
use pleach_testkit::files::WorkDir;
use pleach_testkit::oracle::{self, Format, text};
use pleach_testkit::rng::Rng;
use pleach_testkit::{OnFailure, chosen_seed, long_mode};

/// Options for `qemu-img create`, and how large the disk may be in 512 bytes.
const KINDS: &[(&str, u64)] = &[
    ("cluster_size=512,refcount_bits=1", 1200),
    ("cluster_size=512,refcount_bits=64", 1200),
    ("cluster_size=1k,refcount_bits=2", 2400),
    ("cluster_size=1k,compat=0.10", 2400),
    ("cluster_size=2k,refcount_bits=4", 2400),
    ("cluster_size=4k,refcount_bits=8", 2400),
    ("cluster_size=8k,compression_type=zstd", 4800),
    ("cluster_size=16k,extended_l2=on,refcount_bits=32", 4800),
    ("cluster_size=64k", 9600),
    ("cluster_size=256k,refcount_bits=32", 9600),
    ("cluster_size=1M,preallocation=metadata", 9600),
    ("cluster_size=2M,extended_l2=on", 19200),
];

#[test]
fn every_state_keeps_its_content() {
    if !oracle::available() {
        return;
    }
    let steps = if long_mode() { 170 } else { 20 };
    let seed = chosen_seed().unwrap_or(0x415);
    oracle::in_parallel(KINDS, |(options, sectors)| {
        let _seed = OnFailure::print_seed(seed, "histories");
        let mut past = Past::new(options, *sectors, seed);
        (0..steps).for_each(|step| past.step(step));
    });
}

/// Nobody stops it.
struct Steady;

impl Steps for Steady {
    fn expect(&self, _: u64) {}

    fn advance(&self, _: u64) {}

    fn stop(&self) -> bool {
        false
    }
}

struct Past<'a> {
    options: &'a str,
    sectors: u64,
    rng: Rng,
    work: WorkDir,
    cluster: u64,
    active: Vec<u8>,
    /// Id, name and content of each snapshot.
    snapshots: Vec<(Vec<u8>, String, Vec<u8>)>,
    what: String,
}

impl<'a> Past<'a> {
    fn new(options: &'a str, sectors: u64, seed: u64) -> Self {
        let mut rng =
            Rng::new(seed ^ options.bytes().fold(0u64, |a, b| a.wrapping_mul(31).wrapping_add(b.into())));
        let work = WorkDir::new("histories");
        let size = rng.between(sectors / 2, sectors) * 512;
        oracle::qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            text(&work.join("image")),
            &size.to_string(),
        ]);
        let cluster = oracle::info(&work.join("image"))["cluster-size"].as_u64().unwrap();
        let active = vec![0; size as usize];
        Self { options, sectors, rng, work, cluster, active, snapshots: Vec::new(), what: String::new() }
    }

    fn path(&self) -> PathBuf {
        self.work.join("image")
    }

    fn store(&self) -> Arc<dyn Store> {
        RealDisk.open(&self.path(), Access::Write).unwrap()
    }

    fn step(&mut self, number: usize) {
        let narrow = self.options.contains("refcount_bits=1") && !self.options.contains("refcount_bits=16");
        let v2 = self.options.contains("compat");
        let choice = self.rng.below(12);
        self.what = format!("{}: step {number}: {choice}", self.options);
        match choice {
            9 if !v2 => self.stock_zeros(),
            10 | 11 => self.compact(),
            _ => {
                let writer =
                    Writer::open(self.store(), WriteOptions::default()).unwrap_or_else(|e| self.fail(&e));
                match choice {
                    0 | 1 if narrow => self.refuse(&writer),
                    0 | 1 if self.snapshots.len() < 3 => self.take(&writer),
                    2 if !self.snapshots.is_empty() => {
                        let (id, _, content) = self.snapshots[self.rng.index(self.snapshots.len())].clone();
                        if !v2 || content.len() == self.active.len() {
                            writer.apply_snapshot(&id).unwrap_or_else(|e| self.fail(&e));
                            self.active = content;
                        }
                    }
                    3 if !self.snapshots.is_empty() => {
                        let (id, ..) = self.snapshots.remove(self.rng.index(self.snapshots.len()));
                        writer.delete_snapshot(&id).unwrap_or_else(|e| self.fail(&e));
                    }
                    4 if !self.snapshots.is_empty() => {
                        let index = self.rng.index(self.snapshots.len());
                        let name = format!("näme {}", self.rng.bits());
                        writer.rename_snapshot(&self.snapshots[index].0, name.as_bytes()).unwrap();
                        self.snapshots[index].1 = name;
                    }
                    5 if !v2 || self.snapshots.is_empty() => {
                        let size = self.rng.between(self.sectors / 4, self.sectors) * 512;
                        writer.resize(size).unwrap_or_else(|e| self.fail(&e));
                        self.active.resize(size as usize, 0);
                    }
                    _ => (0..6).for_each(|_| self.change(&writer)),
                }
                writer.close().unwrap_or_else(|e| self.fail(&e));
            }
        }
        self.judge();
    }

    fn fail(&self, why: &dyn std::fmt::Display) -> ! {
        panic!("{}: {why}", self.what)
    }

    fn take(&mut self, writer: &Writer) {
        // Names need not be unique.
        let name = format!("s{}", self.rng.below(3));
        let new = NewSnapshot { name: name.clone().into_bytes(), ..NewSnapshot::default() };
        match writer.take_snapshot(&new) {
            Ok(id) => self.snapshots.push((id, name, self.active.clone())),
            // Several compressed clusters in one host cluster may be as much as few bits can count.
            Err(e) => {
                assert!(["=2", "=4"].iter().any(|bits| self.options.ends_with(bits)), "{}: {e}", self.what)
            }
        }
    }

    fn refuse(&self, writer: &Writer) {
        let refused = writer.take_snapshot(&NewSnapshot::default());
        assert!(refused.is_err() || self.active.iter().all(|&b| b == 0), "{}", self.what);
        if let Ok(id) = refused {
            writer.delete_snapshot(&id).unwrap();
        }
    }

    fn change(&mut self, writer: &Writer) {
        let size = self.active.len() as u64;
        let at = self.rng.below(size / 512) * 512;
        let len = (self.rng.between(1, 4 * self.cluster / 512) * 512).min(size - at).min(1 << 20);
        let range = at as usize..(at + len) as usize;
        match self.rng.below(8) {
            0 | 1 => {
                writer.discard(at, len).unwrap_or_else(|e| self.fail(&e));
                let first = at.next_multiple_of(self.cluster);
                let last = if at + len == size { size } else { (at + len) / self.cluster * self.cluster };
                if first < last {
                    self.active[first as usize..last as usize].fill(0);
                }
            }
            2 => {
                let unmap = self.rng.chance(50);
                writer.write_zeroes(at, len, unmap).unwrap_or_else(|e| self.fail(&e));
                self.active[range].fill(0);
            }
            3 | 4 => {
                let at = at / self.cluster * self.cluster;
                let len = self.cluster.min(size - at);
                let unit = self.rng.between(20, 300) as usize;
                let noise = self.rng.noise(unit);
                let bytes: Vec<u8> = noise.iter().copied().cycle().take(len as usize).collect();
                writer.discard(at, len).unwrap_or_else(|e| self.fail(&e));
                writer.write_compressed(at, &bytes).unwrap_or_else(|e| self.fail(&e));
                self.active[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            }
            more => {
                let byte = if more == 5 { 0 } else { self.rng.between(1, 255) as u8 };
                writer.write_at(at, &vec![byte; len as usize]).unwrap_or_else(|e| self.fail(&e));
                self.active[range].fill(byte);
            }
        }
    }

    /// QEMU lets entries that it makes zeros keep their clusters, which snapshots may read.
    fn stock_zeros(&mut self) {
        let size = self.active.len() as u64;
        for _ in 0..3 {
            let at = self.rng.below(size / 512) * 512;
            let len = (self.rng.between(1, 6 * self.cluster / 512) * 512).min(size - at);
            let zero = format!("write -q -z {at} {len}");
            oracle::qemu_io(&self.path(), Format::Qcow2, &[&zero]);
            self.active[at as usize..(at + len) as usize].fill(0);
        }
    }

    fn compact(&mut self) {
        let options = CompactOptions { zeroes: self.rng.chance(50) };
        let image = Image::open(self.store()).unwrap();
        let said = plan_compact(&image, options, &Alone).unwrap_or_else(|e| self.fail(&e));
        let done =
            compact(&self.store(), options, &Alone, &Steady).unwrap_or_else(|e| self.fail(&e)).unwrap();
        assert_eq!(said, done, "{}", self.what);
        let len = std::fs::metadata(self.path()).unwrap().len();
        assert_eq!(len, said.after, "{}", self.what);
        assert!(len <= said.before, "{}: {said:?}", self.what);
        let image = Image::open(self.store()).unwrap();
        let again = plan_compact(&image, options, &Alone).unwrap_or_else(|e| self.fail(&e));
        let done = (again.after, again.leaked, again.flags, again.zeroed, again.moved);
        assert_eq!(done, (len, 0, false, 0, 0), "{}: something was left to do", self.what);
        if self.snapshots.is_empty() {
            // A copy has all of its tables; this one may lack some.
            let options = self.options.replace(",preallocation=metadata", "");
            let required = oracle::required(&self.path(), &options);
            assert!(len <= required, "{}: {len} bytes, a copy has {required}", self.what);
        }
    }

    fn judge(&self) {
        let check = oracle::check(&self.path(), Format::Qcow2);
        assert!(check.is_clean(), "{}: {}", self.what, check.text);
        let raw = self.work.join("raw");
        oracle::qemu_img(&["convert", "-O", "raw", text(&self.path()), text(&raw)]);
        self.same(&std::fs::read(&raw).unwrap(), &self.active, "the active state");
        let image = Image::open(self.store()).unwrap();
        let records = image.snapshots().unwrap();
        assert_eq!(records.len(), self.snapshots.len(), "{}", self.what);
        for (record, (id, name, content)) in records.iter().zip(&self.snapshots) {
            assert_eq!((&record.id, &*record.name), (id, name.as_bytes()), "{}", self.what);
            let state = image.at_snapshot(id).unwrap_or_else(|e| self.fail(&e));
            let mut read = vec![0; state.size() as usize];
            Chain::new(vec![Arc::new(Layer::Qcow2(state))])
                .read_at(0, &mut read)
                .unwrap_or_else(|e| self.fail(&e));
            self.same(&read, content, name);
            if content.len() == self.active.len() {
                // QEMU reads snapshots at the size of the active disk.
                let chosen = format!("snapshot.id={}", String::from_utf8_lossy(id));
                oracle::qemu_img(&["convert", "-O", "raw", "-l", &chosen, text(&self.path()), text(&raw)]);
                self.same(&std::fs::read(&raw).unwrap(), content, name);
            }
        }
    }

    fn same(&self, read: &[u8], wanted: &[u8], whose: &str) {
        assert_eq!(read.len(), wanted.len(), "{}: {whose}: size", self.what);
        let differs = read.iter().zip(wanted).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{}: {whose}: byte", self.what);
    }
}
