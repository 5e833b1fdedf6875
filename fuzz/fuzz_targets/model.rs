//! Writes, zeros, discards, compressed writes, resizes and bitmaps on an image read as a map of sectors does; a disk that
//! fails at any operation leaves each sector as it was or became, and no errors.
#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{RefcountWidth, Version};
use pleach_fuzz::Memory;
use pleach_image::{Chain, CreateOptions, Image, Layer, WriteOptions, Writer, check, create_in};
use pleach_store::Store;

#[derive(Arbitrary, Debug)]
struct Input {
    cluster_bits: u8,
    order: u8,
    v2: bool,
    extended: bool,
    sectors: u8,
    steps: Vec<Step>,
    /// The writing operation that fails, and all after it.
    fails: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write { at: u8, len: u8, byte: u8 },
    Zero { at: u8, len: u8, free: bool },
    Discard { at: u8, len: u8 },
    Compressed { cluster: u8, byte: u8 },
    Resize { sectors: u8 },
    Bitmap { add: bool },
    Flush,
    Reopen,
}

/// Sectors that are not all zeros, by their one byte.
type Model = BTreeMap<u64, u8>;

fuzz_target!(|input: Input| {
    let options = CreateOptions {
        size: (u64::from(input.sectors) + 1) * 512,
        cluster_bits: if input.extended { 14 } else { 9 + u32::from(input.cluster_bits % 5) },
        version: if input.v2 && !input.extended { Version::V2 } else { Version::V3 },
        refcount_width: match input.v2 && !input.extended {
            true => RefcountWidth::DEFAULT,
            false => RefcountWidth::new(u32::from(input.order % 7)).unwrap(),
        },
        extended_l2: input.extended,
        ..CreateOptions::default()
    };
    let store = Memory::new(Vec::new());
    create_in(&*store, &options).unwrap();
    let (size, cluster) = (options.size, 1 << options.cluster_bits);
    let mut run = Run { store, model: Model::new(), since: Vec::new(), size, cluster };
    run.store.fail_after(input.fails.map(u32::from));
    let failed = run.all(&input.steps, input.fails.is_some());
    run.store.fail_after(None);
    run.judge(failed);
});

struct Run {
    store: Arc<Memory>,
    model: Model,
    /// What sectors were since the last flush: after a failure they may be any of that.
    since: Vec<(u64, u8)>,
    size: u64,
    cluster: u64,
}

impl Run {
    fn open(&self) -> Option<Writer> {
        Writer::open(Arc::clone(&self.store) as Arc<dyn Store>, WriteOptions::default()).ok()
    }

    /// True if the disk failed on the way.
    fn all(&mut self, steps: &[Step], may_fail: bool) -> bool {
        let Some(mut writer) = self.open() else { return may_fail };
        for step in steps.iter().take(40) {
            let done = match *step {
                Step::Write { at, len, byte } => {
                    let (at, len) = self.range(at, len);
                    let done = writer.write_at(at * 512, &vec![byte; usize::try_from(len * 512).unwrap()]);
                    self.put(at, len, byte);
                    done
                }
                Step::Zero { at, len, free } => {
                    let (at, len) = self.range(at, len);
                    let done = writer.write_zeroes(at * 512, len * 512, free);
                    self.put(at, len, 0);
                    done
                }
                Step::Discard { at, len } => {
                    let (at, len) = self.range(at, len);
                    let done = writer.discard(at * 512, len * 512);
                    let per = self.cluster / 512;
                    let last = if (at + len) * 512 == self.size { at + len } else { (at + len) / per * per };
                    let first = at.next_multiple_of(per);
                    self.put(first, last.saturating_sub(first), 0);
                    done
                }
                Step::Compressed { cluster, byte } => {
                    let at = u64::from(cluster) * self.cluster % self.size / self.cluster * self.cluster;
                    let len = self.cluster.min(self.size - at);
                    let bytes = vec![byte; usize::try_from(len).unwrap()];
                    let done = writer.discard(at, len).and_then(|()| writer.write_compressed(at, &bytes));
                    self.put(at / 512, len / 512, byte);
                    done
                }
                Step::Resize { sectors } => {
                    let size = (u64::from(sectors) + 1) * 512;
                    let done = writer.resize(size);
                    if done.is_ok() {
                        self.size = size;
                        self.model.retain(|&at, _| at * 512 < size);
                        self.since.clear();
                    } else {
                        // Either size may be there now.
                        self.size = size.min(self.size);
                    }
                    done
                }
                Step::Bitmap { add: true } => writer.add_bitmap(b"b", Some(512), true).or_else(refused),
                Step::Bitmap { add: false } => writer.remove_bitmap(b"b").or_else(refused),
                Step::Flush => writer.flush(),
                Step::Reopen => {
                    let done = writer.close();
                    match self.open() {
                        Some(again) => writer = again,
                        None => return true,
                    }
                    done
                }
            };
            if done.is_err() {
                assert!(may_fail, "{step:?}: {done:?}");
                return true;
            }
            if matches!(step, Step::Flush | Step::Reopen) {
                self.since.clear();
            }
            let mut sector = [0; 512];
            for at in 0..self.size / 512 {
                writer.read_at(at * 512, &mut sector).unwrap();
                assert_eq!(
                    sector,
                    [self.model.get(&at).copied().unwrap_or(0); 512],
                    "sector {at} after {step:?}"
                );
            }
        }
        let done = writer.close();
        assert!(done.is_ok() || may_fail, "{done:?}");
        done.is_err()
    }

    fn range(&self, at: u8, len: u8) -> (u64, u64) {
        let sectors = self.size / 512;
        let at = u64::from(at) % sectors;
        (at, (u64::from(len) % 40 + 1).min(sectors - at))
    }

    fn put(&mut self, at: u64, len: u64, byte: u8) {
        for sector in at..at + len {
            let was = self.model.insert(sector, byte).unwrap_or(0);
            self.since.push((sector, was));
        }
    }

    fn judge(&self, failed: bool) {
        let image = Image::open(Arc::clone(&self.store) as Arc<dyn Store>).unwrap();
        let report = check(&image).unwrap();
        assert_eq!(report.errors, 0, "{:?}", report.findings);
        assert!(failed || report.leaks == 0, "{:?}", report.findings);
        assert!(failed || image.size() == self.size);
        let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
        let mut sector = [0; 512];
        for at in 0..self.size / 512 {
            chain.read_at(at * 512, &mut sector).unwrap();
            let now = self.model.get(&at).copied().unwrap_or(0);
            let older = failed && self.since.contains(&(at, sector[0]));
            let whole = sector.iter().all(|&b| b == sector[0]);
            assert!(whole && (sector[0] == now || older), "sector {at} is {}, not {now}", sector[0]);
        }
    }
}

fn refused(error: pleach_image::ImageError) -> Result<(), pleach_image::ImageError> {
    use pleach_image::ImageError::{NoBitmap, Refused};
    if matches!(error, Refused { .. } | NoBitmap { .. }) { Ok(()) } else { Err(error) }
}
