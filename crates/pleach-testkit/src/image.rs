//! Images made byte by byte from the format's specification, so that one of the bytes can be wrong.
//!
//! ```
//! use pleach_testkit::image::{ImageBuilder, Shape};
//!
//! let mut image = ImageBuilder::new(Shape::default());
//! image.data(0);
//! image.compressed(5);
//! let mut built = image.finish();
//! assert_eq!(built.bytes.be(0, 4), 0x5146_49fb);
//! // One fault: the second cluster size that no reader may accept.
//! built.bytes.put_be(20, 4, 22);
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::Digest;

/// Bit 63 of table entries: the target's count is 1.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries.
pub const COMPRESSED: u64 = 1 << 62;
/// Header extension: format of the backing file.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: where the bitmap directory is.
pub const BITMAPS: u32 = 0x2385_2875;
/// Header extension: where the encryption header is.
pub const ENCRYPTION: u32 = 0x0537_be77;
/// Header extension: name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Bytes at offsets and holes between them: a file before it is written.
#[derive(Clone, Debug, Default)]
pub struct Bytes {
    /// In the order of writing: later ones win.
    parts: Vec<(u64, Vec<u8>)>,
    len: u64,
}

impl Bytes {
    /// Overwrites, and makes the file longer if need be.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.len = self.len.max(at + bytes.len() as u64);
        self.parts.push((at, bytes.to_vec()));
    }

    /// Overwrites a big-endian number of `width` bytes, 1 to 8.
    pub fn put_be(&mut self, at: u64, width: usize, value: u64) {
        let bytes = value.to_be_bytes();
        self.put(at, bytes.get(8 - width..).expect("at most 8 bytes"));
    }

    /// The bytes from `at` on, zeros past the end.
    #[must_use]
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for (start, bytes) in &self.parts {
            let from = at.max(*start);
            let to = (at + len as u64).min(start + bytes.len() as u64).min(self.len);
            if from < to {
                let index = |value: u64| usize::try_from(value).expect("inside a part");
                let source = bytes.get(index(from - start)..index(to - start)).expect("inside the part");
                out.get_mut(index(from - at)..index(to - at))
                    .expect("inside the range")
                    .copy_from_slice(source);
            }
        }
        out
    }

    /// A big-endian number of `width` bytes.
    #[must_use]
    pub fn be(&self, at: u64, width: usize) -> u64 {
        self.get(at, width).iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// Length of the file.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts the file or extends it by a hole.
    pub fn set_len(&mut self, len: u64) {
        self.parts.retain(|(at, _)| *at < len);
        for (at, bytes) in &mut self.parts {
            bytes.truncate(usize::try_from(len - *at).unwrap_or(usize::MAX));
        }
        self.len = len;
    }

    /// Writes the file, holes as holes.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, path: &Path) {
        let mut file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        file.set_len(self.len).expect("a file system that takes sparse files");
        for (at, bytes) in &self.parts {
            file.write_all_at(bytes, *at).expect("writing a test image");
        }
        file.flush().expect("writing a test image");
    }
}

/// What kind of image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the bits a refcount; 4 in version 2.
    pub refcount_order: u32,
    /// 128-bit L2 entries.
    pub extended_l2: bool,
    /// Compressed clusters are zstd frames instead of deflate streams.
    pub zstd: bool,
    /// Virtual size in bytes.
    pub size: u64,
}

impl Default for Shape {
    /// Version 3, clusters of 4 KiB, a disk that needs two L2 tables.
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 12,
            refcount_order: 4,
            extended_l2: false,
            zstd: false,
            size: (2 << 20) + (64 << 10),
        }
    }
}

/// An image in the making: clusters are allocated as they are asked for, one after the other.
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    shape: Shape,
    bytes: Bytes,
    next: u64,
    counts: BTreeMap<u64, u64>,
    tables: BTreeMap<u64, u64>,
    entries: BTreeMap<u64, [u64; 2]>,
    packed: u64,
    /// Bytes of the disk whose content is known.
    disk: u64,
    content: BTreeMap<u64, u8>,
    snapshots: Vec<(u64, u32, Vec<u8>)>,
    bitmaps: Vec<(Vec<u8>, u32, u8)>,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Option<Vec<u8>>,
    /// Incompatible feature bits, besides those that follow from the shape.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits, besides those that follow from bitmaps.
    pub autoclear: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub encryption: u32,
}

/// Where things are in a finished image.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Bytes a cluster.
    pub cluster: u64,
    /// The active L1 table.
    pub l1: u64,
    /// L2 tables by L1 index.
    pub l2: BTreeMap<u64, u64>,
    /// Bytes an L2 entry.
    pub entry: u64,
    /// The refcount table.
    pub table: u64,
    /// Refcount blocks in order.
    pub blocks: Vec<u64>,
    /// The snapshot table, and each entry in it.
    pub snapshots: Vec<u64>,
    /// L1 tables of the snapshots.
    pub snapshot_l1: Vec<u64>,
    /// The bitmap directory, and each entry in it.
    pub directory: Vec<u64>,
    /// Tables of the bitmaps.
    pub bitmap_tables: Vec<u64>,
    /// Type fields of the header extensions, by type, the end marker as 0.
    pub extensions: BTreeMap<u32, u64>,
    /// The backing file name.
    pub backing: u64,
    /// Host clusters of guest data, by guest cluster.
    pub data: BTreeMap<u64, u64>,
}

/// A finished image: sound, until bytes of it are changed.
#[derive(Clone, Debug)]
pub struct Built {
    /// The file.
    pub bytes: Bytes,
    /// Where its structures are.
    pub at: Places,
    /// What a guest reads.
    pub digest: Digest,
}

impl Built {
    /// Where the L2 entry of a guest cluster is.
    #[must_use]
    pub fn entry_of(&self, guest: u64) -> u64 {
        let entries = self.at.cluster / self.at.entry;
        let table = self.at.l2.get(&(guest / entries)).expect("a guest cluster with an L2 table");
        table + guest % entries * self.at.entry
    }

    /// Overwrites the stored count of a host cluster, for counts of 16 bits.
    pub fn put_count(&mut self, cluster: u64, value: u64) {
        let per_block = self.at.cluster / 2;
        let block = usize::try_from(cluster / per_block).ok().and_then(|i| self.at.blocks.get(i));
        let at = block.expect("a counted cluster") + cluster % per_block * 2;
        self.bytes.put_be(at, 2, value);
    }
}

impl ImageBuilder {
    /// An empty disk.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            bytes: Bytes::default(),
            next: 1,
            counts: BTreeMap::from([(0, 1)]),
            tables: BTreeMap::new(),
            entries: BTreeMap::new(),
            packed: 0,
            disk: shape.size,
            content: BTreeMap::new(),
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            extensions: Vec::new(),
            backing: None,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            encryption: 0,
        }
    }

    /// An image with something of everything that an L2 table can say, in both of its tables.
    #[must_use]
    pub fn rich(shape: Shape) -> Self {
        let mut image = Self::new(shape);
        for guest in 0..3 {
            image.data(guest);
        }
        if shape.version == 3 {
            image.zero(3);
            image.zero_allocated(4);
        }
        image.compressed(5);
        image.compressed(6);
        let entries = image.cluster() / image.entry_bytes();
        if shape.size > entries * image.cluster() {
            image.data(entries);
        }
        image
    }

    /// Bytes a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    fn entry_bytes(&self) -> u64 {
        if self.shape.extended_l2 { 16 } else { 8 }
    }

    /// Allocates `count` clusters in a row; where they start.
    pub fn allocate(&mut self, count: u64) -> u64 {
        let first = self.next;
        self.next += count;
        for cluster in first..self.next {
            *self.counts.entry(cluster).or_insert(0) += 1;
        }
        let end = self.next << self.shape.cluster_bits;
        if self.bytes.len() < end {
            self.bytes.set_len(end);
        }
        first << self.shape.cluster_bits
    }

    /// Overwrites bytes of the file that is being made.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes.put(at, bytes);
    }

    /// Puts an entry for a guest cluster into its L2 table, which is made if it is missing.
    pub fn entry(&mut self, guest: u64, descriptor: u64, subclusters: u64) {
        let index = guest / (self.cluster() / self.entry_bytes());
        if !self.tables.contains_key(&index) {
            let at = self.allocate(1);
            self.tables.insert(index, at);
        }
        self.entries.insert(guest, [descriptor, subclusters]);
    }

    /// Fills a guest cluster with a byte of its own; where it is in the file.
    pub fn data(&mut self, guest: u64) -> u64 {
        let at = self.allocate(1);
        let byte = self.expect(guest);
        self.bytes.put(at, &vec![byte; usize::try_from(self.cluster()).expect("a cluster")]);
        self.entry(guest, at, 0xffff_ffff);
        at
    }

    /// Says that a guest cluster is in the external data file, where it must be.
    pub fn external(&mut self, guest: u64) {
        self.entry(guest, COPIED | guest << self.shape.cluster_bits, 0xffff_ffff);
    }

    /// Makes a guest cluster read as zeros, without a host cluster.
    pub fn zero(&mut self, guest: u64) {
        let (flag, bitmap) = if self.shape.extended_l2 { (0, 0xffff_ffff << 32) } else { (1, 0) };
        self.entry(guest, flag, bitmap);
    }

    /// Makes a guest cluster read as zeros that keeps its host cluster, full of other bytes.
    pub fn zero_allocated(&mut self, guest: u64) {
        let at = self.allocate(1);
        self.bytes.put(at, &vec![0xee; usize::try_from(self.cluster()).expect("a cluster")]);
        let (flag, bitmap) = if self.shape.extended_l2 { (0, 0xffff_ffff << 32) } else { (1, 0) };
        self.entry(guest, at | flag, bitmap);
    }

    /// Compresses a guest cluster of one byte, packed behind the one before.
    pub fn compressed(&mut self, guest: u64) -> u64 {
        let byte = self.expect(guest);
        let plain = vec![byte; usize::try_from(self.cluster()).expect("a cluster")];
        let packed = if self.shape.zstd { zstd(&plain) } else { deflate(&plain) };
        self.pack(guest, &packed)
    }

    /// Says that a guest cluster reads as its own byte, however that is stored; the byte.
    pub fn expect(&mut self, guest: u64) -> u8 {
        self.content.insert(guest, pattern(guest));
        pattern(guest)
    }

    /// Packs compressed bytes behind those before, and points the guest cluster there; where they start.
    pub fn pack(&mut self, guest: u64, packed: &[u8]) -> u64 {
        let (cluster, len) = (self.cluster(), packed.len() as u64);
        if self.packed.is_multiple_of(cluster) || self.packed % cluster + len > cluster {
            self.packed = self.allocate(len.div_ceil(cluster).max(1));
        } else {
            // One more reference to the host cluster that is shared.
            *self.counts.entry(self.packed / cluster).or_insert(0) += 1;
        }
        let at = self.packed;
        self.bytes.put(at, packed);
        self.packed += len;
        self.entry(guest, self.descriptor(at, len), 0);
        at
    }

    /// The entry of a compressed cluster of `len` bytes at `at`.
    #[must_use]
    pub fn descriptor(&self, at: u64, len: u64) -> u64 {
        let sectors = ((at + len).div_ceil(512) - at / 512).max(1);
        COMPRESSED | (sectors - 1) << (70 - self.shape.cluster_bits) | at
    }

    /// Takes an internal snapshot of what is there. Nothing may be written afterwards: what is shared is not copied.
    pub fn snapshot(&mut self, name: &str) {
        let (entries, cluster) = (self.l1_entries(), self.cluster());
        let l1 = self.allocate((entries * 8).div_ceil(cluster).max(1));
        for (index, table) in &self.tables {
            self.bytes.put_be(l1 + index * 8, 8, *table);
            *self.counts.entry(table / cluster).or_insert(0) += 1;
        }
        let targets: Vec<(u64, u64)> = self.entries.values().filter_map(|e| self.target(e[0])).collect();
        for (first, last) in targets {
            for shared in first..=last {
                *self.counts.entry(shared).or_insert(0) += 1;
            }
        }
        let entries = u32::try_from(entries).expect("a small L1 table");
        self.snapshots.push((l1, entries, name.as_bytes().to_vec()));
    }

    /// Host clusters that an L2 entry refers to, the first and the last.
    fn target(&self, descriptor: u64) -> Option<(u64, u64)> {
        let bits = self.shape.cluster_bits;
        if self.incompatible & 4 != 0 {
            return None;
        }
        if descriptor & COMPRESSED != 0 {
            let at = descriptor & ((1 << (70 - bits)) - 1);
            let sectors = (descriptor & !COMPRESSED) >> (70 - bits);
            return Some((at >> bits, ((at / 512 + sectors) * 512 + 511) >> bits));
        }
        let at = descriptor & 0x00ff_ffff_ffff_fe00;
        (at != 0).then_some((at >> bits, at >> bits))
    }

    /// Adds a persistent bitmap without a set bit.
    pub fn bitmap(&mut self, name: &str, flags: u32, granularity_bits: u8) {
        self.bitmaps.push((name.as_bytes().to_vec(), flags, granularity_bits));
        self.autoclear |= 1;
    }

    /// Adds a header extension.
    pub fn extension(&mut self, kind: u32, data: &[u8]) {
        self.extensions.push((kind, data.to_vec()));
    }

    /// Names a backing file, with its format unless that is empty.
    pub fn backing(&mut self, name: impl AsRef<[u8]>, format: &str) {
        self.backing = Some(name.as_ref().to_vec());
        if !format.is_empty() {
            self.extension(BACKING_FORMAT, format.as_bytes());
        }
    }

    fn l1_entries(&self) -> u64 {
        self.shape.size.div_ceil(self.cluster() * (self.cluster() / self.entry_bytes()))
    }

    /// As [`finish`](Self::finish), for disks that are too large to say what a guest reads.
    #[must_use]
    pub fn finish_sparse(self) -> Built {
        Self { disk: 0, ..self }.finish()
    }

    /// Lays out what is left: tables, snapshots, bitmaps, refcounts, header.
    #[must_use]
    pub fn finish(mut self) -> Built {
        let cluster = self.cluster();
        let mut at = Places { cluster, entry: self.entry_bytes(), ..Places::default() };
        at.l1 = self.allocate((self.l1_entries() * 8).div_ceil(cluster).max(1));
        self.snapshot_table(&mut at);
        self.bitmap_directory(&mut at);
        self.l2_tables(&mut at);
        self.refcounts(&mut at);
        self.header(&mut at);
        let digest = self.digest();
        Built { bytes: self.bytes, at, digest }
    }

    fn copied(&self, offset: u64) -> u64 {
        if self.counts.get(&(offset >> self.shape.cluster_bits)) == Some(&1) { COPIED } else { 0 }
    }

    fn l2_tables(&mut self, at: &mut Places) {
        let per_table = self.cluster() / self.entry_bytes();
        for (index, table) in self.tables.clone() {
            let entry = table | self.copied(table);
            self.bytes.put_be(at.l1 + index * 8, 8, entry);
        }
        for (guest, [descriptor, subclusters]) in self.entries.clone() {
            let table = self.tables.get(&(guest / per_table)).copied().expect("made with the entry");
            let place = table + guest % per_table * self.entry_bytes();
            let plain = descriptor & COMPRESSED == 0;
            let host = self.target(descriptor).map(|(first, _)| first << self.shape.cluster_bits);
            let flag = host.filter(|_| plain).map_or(0, |host| self.copied(host));
            self.bytes.put_be(place, 8, descriptor | flag);
            if self.shape.extended_l2 {
                self.bytes.put_be(place + 8, 8, subclusters);
            }
            at.data.extend(host.filter(|_| plain).map(|host| (guest, host)));
        }
        at.l2.clone_from(&self.tables);
    }

    fn snapshot_table(&mut self, at: &mut Places) {
        if self.snapshots.is_empty() {
            return;
        }
        let (mut table, mut offsets) = (Vec::new(), Vec::new());
        for (number, (l1, entries, name)) in (1..).zip(&self.snapshots) {
            offsets.push(table.len() as u64);
            let id = format!("{number}");
            table.extend(l1.to_be_bytes());
            table.extend(entries.to_be_bytes());
            table.extend(u16::try_from(id.len()).expect("short").to_be_bytes());
            table.extend(u16::try_from(name.len()).expect("short").to_be_bytes());
            table.extend(1_700_000_000u32.to_be_bytes());
            table.extend([0; 16]);
            table.extend(24u32.to_be_bytes());
            table.extend(0u64.to_be_bytes());
            table.extend(self.shape.size.to_be_bytes());
            table.extend(u64::MAX.to_be_bytes());
            table.extend(id.as_bytes());
            table.extend(name);
            table.resize(table.len().next_multiple_of(8), 0);
            at.snapshot_l1.push(*l1);
        }
        let place = self.allocate((table.len() as u64).div_ceil(self.cluster()));
        self.bytes.put(place, &table);
        at.snapshots = offsets.iter().map(|offset| place + offset).collect();
    }

    fn bitmap_directory(&mut self, at: &mut Places) {
        if self.bitmaps.is_empty() {
            return;
        }
        let (mut directory, mut offsets) = (Vec::new(), Vec::new());
        for (name, flags, granularity) in self.bitmaps.clone() {
            offsets.push(directory.len() as u64);
            let bits = self.shape.size.div_ceil(1 << granularity);
            let entries = bits.div_ceil(8).div_ceil(self.cluster());
            let table = self.allocate((entries * 8).div_ceil(self.cluster()));
            // The first cluster of bits is there, and empty; the others are said to be all zeros.
            let data = self.allocate(1);
            self.bytes.put_be(table, 8, data);
            at.bitmap_tables.push(table);
            directory.extend(table.to_be_bytes());
            directory.extend(u32::try_from(entries).expect("few").to_be_bytes());
            directory.extend(flags.to_be_bytes());
            directory.extend([1, granularity]);
            directory.extend(u16::try_from(name.len()).expect("short").to_be_bytes());
            directory.extend(0u32.to_be_bytes());
            directory.extend(name);
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let place = self.allocate((directory.len() as u64).div_ceil(self.cluster()));
        self.bytes.put(place, &directory);
        at.directory = offsets.iter().map(|offset| place + offset).collect();
        let mut extension = Vec::new();
        extension.extend(u32::try_from(self.bitmaps.len()).expect("few").to_be_bytes());
        extension.extend([0; 4]);
        extension.extend((directory.len() as u64).to_be_bytes());
        extension.extend(place.to_be_bytes());
        self.extension(BITMAPS, &extension);
    }

    fn refcounts(&mut self, at: &mut Places) {
        let cluster = self.cluster();
        let order = if self.shape.version == 2 { 4 } else { self.shape.refcount_order };
        let per_block = (cluster * 8) >> order;
        at.table = self.allocate(1);
        while (at.blocks.len() as u64) * per_block < self.next {
            let block = self.allocate(1);
            self.bytes.put_be(at.table + at.blocks.len() as u64 * 8, 8, block);
            at.blocks.push(block);
        }
        for (&host, &count) in &self.counts {
            let block = usize::try_from(host / per_block).ok().and_then(|i| at.blocks.get(i));
            let (block, slot) = (block.expect("a block for every cluster"), host % per_block);
            if order >= 3 {
                let width = 1u64 << (order - 3);
                self.bytes.put_be(block + slot * width, usize::try_from(width).expect("at most 8"), count);
            } else {
                let per_byte = 8 >> order;
                let place = block + slot / per_byte;
                let byte = self.bytes.be(place, 1) | count << ((slot % per_byte) << order);
                self.bytes.put_be(place, 1, byte);
            }
        }
    }

    fn header(&mut self, at: &mut Places) {
        let shape = self.shape;
        let length: u64 = if shape.version == 2 { 72 } else { 112 };
        let mut area = Vec::new();
        for (kind, data) in &self.extensions {
            at.extensions.insert(*kind, length + area.len() as u64);
            area.extend(kind.to_be_bytes());
            area.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
            area.extend(data);
            area.resize(area.len().next_multiple_of(8), 0);
        }
        at.extensions.insert(0, length + area.len() as u64);
        area.extend([0; 8]);
        let name = self.backing.clone().unwrap_or_default();
        at.backing = length + area.len() as u64;
        area.extend(&name);
        let incompatible = self.incompatible | u64::from(shape.zstd) << 3 | u64::from(shape.extended_l2) << 4;
        let snapshots = self.snapshots.len() as u64;
        let fields: [(u64, usize, u64); 20] = [
            (0, 4, 0x5146_49fb),
            (4, 4, shape.version.into()),
            (8, 8, if self.backing.is_some() { at.backing } else { 0 }),
            (16, 4, name.len() as u64),
            (20, 4, shape.cluster_bits.into()),
            (24, 8, shape.size),
            (32, 4, self.encryption.into()),
            (36, 4, self.l1_entries()),
            (40, 8, at.l1),
            (48, 8, at.table),
            (56, 4, 1),
            (60, 4, snapshots),
            (64, 8, at.snapshots.first().copied().unwrap_or(0)),
            (72, 8, incompatible),
            (80, 8, self.compatible),
            (88, 8, self.autoclear),
            (96, 4, shape.refcount_order.into()),
            (100, 4, length),
            (104, 1, shape.zstd.into()),
            (105, 1, 0),
        ];
        for (offset, width, value) in fields.into_iter().filter(|(offset, ..)| *offset < length) {
            self.bytes.put_be(offset, width, value);
        }
        self.bytes.put(length, &area);
    }

    fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        let cluster = self.cluster();
        for guest in 0..self.disk.div_ceil(cluster) {
            let len = cluster.min(self.disk - guest * cluster);
            let byte = self.content.get(&guest).copied().unwrap_or(0);
            hash.update(vec![byte; usize::try_from(len).expect("a cluster")]);
        }
        Digest::of(hash)
    }
}

/// The byte that fills a guest cluster: never 0, and another one in the next.
fn pattern(guest: u64) -> u8 {
    u8::try_from(guest % 250 + 1).expect("below 251")
}

/// A raw deflate stream.
///
/// # Panics
/// If the library fails.
#[must_use]
pub fn deflate(plain: &[u8]) -> Vec<u8> {
    use flate2::{Compress, Compression, FlushCompress};
    let mut stream = Compress::new_with_window_bits(Compression::new(6), false, 12);
    let mut out = vec![0; plain.len() + 1000];
    stream.compress(plain, &mut out, FlushCompress::Finish).expect("deflate");
    out.truncate(usize::try_from(stream.total_out()).expect("fits"));
    out
}

/// One zstd frame.
///
/// # Panics
/// If the library fails.
#[must_use]
pub fn zstd(plain: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(plain.len())];
    let len = zstd_safe::compress(out.as_mut_slice(), plain, 3).expect("zstd");
    out.truncate(len);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, WorkDir, oracle};

    /// What the builder makes is sound, for stock QEMU, in every shape.
    #[test]
    fn stock_qemu_finds_the_images_sound_and_reads_what_was_meant() {
        if !oracle::available() {
            return;
        }
        let work = WorkDir::new("builder");
        let base = Shape::default();
        let mut shapes = vec![
            base,
            Shape { version: 2, ..base },
            Shape { cluster_bits: 16, size: 1 << 20, ..base },
            Shape { cluster_bits: 9, size: 64 << 10, ..base },
            Shape { cluster_bits: 14, extended_l2: true, size: 17 << 20, ..base },
            Shape { zstd: true, ..base },
        ];
        shapes.extend((1..=6).map(|refcount_order| Shape { refcount_order, ..base }));
        for shape in shapes {
            let mut image = ImageBuilder::rich(shape);
            image.extension(0x1234_5678, b"kept");
            if shape.version == 3 {
                image.bitmap("b0", 2, 16);
            }
            // Two packed clusters and two snapshots are six references to one host cluster.
            if shape.refcount_order > 2 {
                image.snapshot("first");
                image.snapshot("");
            }
            let path = work.join("image.qcow2");
            let built = image.finish();
            built.bytes.write(&path);
            let check = oracle::check(&path, Format::Qcow2);
            assert!(check.is_clean(), "{shape:?}: {}", check.text);
            assert_eq!(oracle::digest(&path, Format::Qcow2), built.digest, "{shape:?}");
        }
    }

    #[test]
    fn later_bytes_win_and_holes_are_zeros() {
        let mut bytes = Bytes::default();
        bytes.put(4, &[1, 2, 3, 4]);
        bytes.put_be(6, 2, 0x0a0b);
        assert_eq!((bytes.be(2, 8), bytes.len()), (0x0000_0102_0a0b_0000, 8));
        bytes.set_len(5);
        bytes.set_len(9);
        assert_eq!(bytes.get(3, 4), [0, 1, 0, 0]);
    }
}
