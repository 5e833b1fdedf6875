//! Fresh images written from front to back: where everything goes, decided by what comes, never by when.
//!
//! ```text
//! header | refcount table | its first blocks | L1 table | data and L2 tables as they come | room for the other tables
//! ```
//!
//! Further refcount blocks lie each in the first cluster of the range that it counts. The file is as long as it would be
//! with all tables of a disk that is full: that is what [`measure`] says, and a writer finds its next clusters there.
//! The room is a hole.

use pleach_format::{
    ExtendedL2Entry, FormatError, Geometry, GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry,
    NewHeader, RefcountWidth, Version,
};

use crate::ImageError;

/// Bytes of a table that are kept before they are written.
const PAGE: u64 = 64 << 10;
/// QEMU reads refcount tables up to this length.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// No room is kept for more tables than this: nobody wants a file of terabytes for an empty disk.
const MAX_ROOM: u64 = 64 << 30;

/// Bytes to be written at an offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piecework {
    /// Where in the file.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// What becomes of one guest cluster. Of a cluster that nothing is said about, the backing file says what it is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// It reads as zeros and takes no space. Version 2 cannot say that.
    Zero,
    /// With extended L2 entries: these subclusters read as zeros, the backing file answers for the rest; no space is taken.
    ZeroSubclusters(u32),
    /// A host cluster of its own.
    Plain,
    /// With extended L2 entries: a host cluster of its own, of which these subclusters hold data, and those are zeros; the
    /// backing file answers for the rest.
    Subclusters {
        /// Bit n: subcluster n holds data.
        data: u32,
        /// Bit n: subcluster n reads as zeros.
        zero: u32,
    },
    /// So many compressed bytes, fewer than a cluster.
    Packed(usize),
}

/// The sizes of a new image of a given kind, in bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Everything but guest data, if all of the disk is allocated.
    pub metadata: u64,
    /// The disk, in whole clusters.
    pub disk: u64,
}

/// How large the new image that `header` describes can get. These are the figures of `qemu-img measure`.
///
/// # Errors
/// A geometry that the format does not have.
pub fn measure(header: &NewHeader) -> Result<Measure, ImageError> {
    let g = header.geometry().map_err(ImageError::format("option", None))?;
    let plan = Front::of(g, header.refcount_width, header.size);
    Ok(Measure { metadata: plan.metadata(g), disk: g.clusters_for(header.size).0 * g.cluster_size() })
}

/// How many clusters each kind of table takes.
#[derive(Copy, Clone, Debug)]
struct Front {
    /// The refcount table, for a disk that is full.
    table: u64,
    /// Refcount blocks for a disk that is full.
    all_blocks: u64,
    /// Refcount blocks for everything up to the L1 table.
    blocks: u64,
    l1: u64,
    all_l2: u64,
}

impl Front {
    fn of(g: Geometry, width: RefcountWidth, size: u64) -> Self {
        let (cluster, per_block) = (g.cluster_size(), width.per_block(g));
        let (l2, data) = (g.required_l1(size), g.clusters_for(size).0);
        let l1 = (l2 * 8).div_ceil(cluster);
        let counted = 1 + l1 + l2 + data;
        let (mut table, mut all_blocks) = (0, 0);
        loop {
            let blocks: u64 = (counted + table + all_blocks).div_ceil(per_block);
            let clusters = blocks.div_ceil(cluster / 8);
            if (blocks, clusters) == (all_blocks, table) {
                break;
            }
            (all_blocks, table) = (blocks, clusters);
        }
        let mut blocks: u64 = 1;
        while blocks * per_block < 1 + table + blocks + l1 {
            blocks += 1;
        }
        Self { table, all_blocks, blocks, l1, all_l2: l2 }
    }

    fn metadata(&self, g: Geometry) -> u64 {
        (1 + self.table + self.all_blocks + self.l1 + self.all_l2) * g.cluster_size()
    }

    /// The first cluster behind the L1 table.
    fn end(&self) -> u64 {
        1 + self.table + self.blocks + self.l1
    }
}

/// A table that is filled from front to back, of which only the page that is being filled is kept.
#[derive(Debug)]
struct Table {
    offset: u64,
    page: u64,
    bytes: Vec<u8>,
}

impl Table {
    fn new(offset: u64) -> Self {
        Self { offset, page: 0, bytes: Vec::new() }
    }

    /// Sets entry number `index`; the indexes rise.
    fn set(&mut self, index: u64, entry: u64, done: &mut Vec<Piecework>) {
        let (page, at) = (index * 8 / PAGE, index * 8 % PAGE);
        if page != self.page {
            self.flush(done);
            self.page = page;
        }
        let at = usize::try_from(at).expect("less than a page");
        self.bytes.resize(at, 0);
        self.bytes.extend(entry.to_be_bytes());
    }

    fn flush(&mut self, done: &mut Vec<Piecework>) {
        let bytes = std::mem::take(&mut self.bytes);
        if !bytes.is_empty() {
            done.push(Piecework { offset: self.offset + self.page * PAGE, bytes });
        }
    }
}

/// The L2 table that is being filled.
#[derive(Debug)]
struct OpenL2 {
    slot: u64,
    offset: u64,
    bytes: Vec<u8>,
}

/// The refcount block that is being filled: that of the range with the last cluster in use.
#[derive(Debug)]
struct OpenBlock {
    index: u64,
    offset: u64,
    bytes: Vec<u8>,
}

/// Fixes the place of everything in a new image, as its guest clusters come in order.
///
/// Pure: equal calls give equal places and equal tables. Memory: one L2 table, one refcount block, and a page of each of
/// the other tables.
#[derive(Debug)]
pub struct Bulk {
    header: NewHeader,
    geometry: Geometry,
    front: Front,
    l1: Table,
    table: Table,
    l2: Option<OpenL2>,
    block: OpenBlock,
    /// The next host cluster that nobody uses.
    next: u64,
    /// One past the last compressed byte in a cluster with room for more; 0 if there is none.
    tail: u64,
    /// Host clusters that guest data has in this file, or in the data file.
    data: u64,
    packed: bool,
    done: Vec<Piecework>,
}

impl Bulk {
    /// A new image as `header` says; where its tables are is decided here.
    ///
    /// # Errors
    /// A header that the format does not have.
    pub fn new(header: NewHeader) -> Result<Self, ImageError> {
        let bad = ImageError::format("option", None);
        let geometry = header.geometry().map_err(bad)?;
        let front = Front::of(geometry, header.refcount_width, header.size);
        let cluster = geometry.cluster_size();
        let table = front.table.min(MAX_REFCOUNT_TABLE / cluster);
        let front = Front { table, ..front };
        let l1_table_offset = (1 + front.table + front.blocks) * cluster;
        let header = NewHeader {
            refcount_table_offset: cluster,
            refcount_table_clusters: u32::try_from(front.table).unwrap_or(u32::MAX),
            l1_table_offset,
            ..header
        };
        header.encode().map_err(ImageError::format("option", None))?;
        let mut bulk = Self {
            geometry,
            front,
            l1: Table::new(l1_table_offset),
            table: Table::new(cluster),
            l2: None,
            block: OpenBlock { index: 0, offset: 0, bytes: Vec::new() },
            next: 0,
            tail: 0,
            data: 0,
            packed: false,
            done: Vec::new(),
            header,
        };
        bulk.count_front()?;
        Ok(bulk)
    }

    /// The clusters up to the end of the L1 table.
    fn count_front(&mut self) -> Result<(), ImageError> {
        for index in 0..self.front.blocks {
            let cluster = 1 + self.front.table + index;
            self.open_block(index, cluster)?;
            let first = index * self.per_block();
            for cluster in first..self.front.end().min(first + self.per_block()) {
                self.count(cluster)?;
            }
        }
        self.next = self.front.end();
        Ok(())
    }

    /// The header for as long as the image is not whole: no tool opens it. Always version 3, which alone can say that.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn unfinished_header(&self) -> Result<Vec<u8>, ImageError> {
        // Without the names, which need not fit a longer header.
        let plain = NewHeader { backing: None, data_file: None, ..self.header.clone() };
        let header = NewHeader { version: Version::V3, in_progress: true, ..plain };
        header.encode().map_err(ImageError::format("option", None))
    }

    /// Cluster size and L2 entry width of the new image.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Fixes what becomes of a guest cluster, and where its bytes go: an offset in this file, or in the data file if the
    /// image has one. Clusters come in guest order, each at most once.
    ///
    /// # Errors
    /// [`ImageError::Unsupported`] for what the format cannot say; [`ImageError::Format`] if the file would get longer than
    /// its refcount table or its compressed descriptors reach.
    pub fn place(&mut self, cluster: GuestCluster, content: Content) -> Result<HostOffset, ImageError> {
        self.open_l2(self.geometry.l1_index(cluster))?;
        let offset = match content {
            Content::Zero if self.header.version == Version::V2 => {
                return Err(ImageError::Unsupported { feature: "a zero cluster in a version 2 image" });
            }
            Content::Zero | Content::ZeroSubclusters(_) => HostOffset(0),
            Content::Packed(_) if self.header.data_file.is_some() => {
                return Err(ImageError::Unsupported { feature: "a compressed cluster in a data file" });
            }
            Content::Packed(len) => self.pack(len as u64)?,
            Content::Plain | Content::Subclusters { .. } => {
                self.data += 1;
                if self.header.data_file.is_some() {
                    HostOffset(self.geometry.guest_offset(cluster).0)
                } else {
                    self.geometry.host_offset(HostCluster(self.allocate()?))
                }
            }
        };
        self.set_entry(cluster, content, offset)?;
        Ok(offset)
    }

    /// Tables that are complete, to be written where they say.
    pub fn take_done(&mut self) -> Vec<Piecework> {
        std::mem::take(&mut self.done)
    }

    /// One past the last byte in use so far.
    pub fn used(&self) -> u64 {
        self.next * self.geometry.cluster_size()
    }

    /// Bytes of guest data that have a cluster of their own so far.
    pub fn data_bytes(&self) -> u64 {
        self.data * self.geometry.cluster_size()
    }

    /// The last tables, to be written before [`Finished::header`].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn finish(mut self) -> Result<Finished, ImageError> {
        self.close_l2();
        self.close_block();
        self.l1.flush(&mut self.done);
        self.table.flush(&mut self.done);
        let header = self.header.encode().map_err(ImageError::format("option", None))?;
        let here = if self.header.data_file.is_some() { 0 } else { self.data_bytes() };
        let metadata = self.front.metadata(self.geometry);
        let room = if self.packed || metadata > MAX_ROOM { 0 } else { metadata + here };
        Ok(Finished { tables: self.done, header, len: room.max(self.next * self.geometry.cluster_size()) })
    }

    fn per_block(&self) -> u64 {
        self.header.refcount_width.per_block(self.geometry)
    }

    /// The next host cluster, counted once.
    fn allocate(&mut self) -> Result<u64, ImageError> {
        let index = self.next / self.per_block();
        if index > self.block.index {
            self.open_block(index, self.next)?;
            self.count(self.next)?;
            self.next += 1;
        }
        let cluster = self.next;
        if cluster >> (56 - self.geometry.cluster_bits()) != 0 {
            return Err(too_long("host cluster", cluster, (1 << (56 - self.geometry.cluster_bits())) - 1));
        }
        self.count(cluster)?;
        self.next += 1;
        Ok(cluster)
    }

    fn open_block(&mut self, index: u64, cluster: u64) -> Result<(), ImageError> {
        let entries = self.front.table * self.geometry.cluster_size() / 8;
        if index >= entries {
            return Err(too_long("refcount table entries", index + 1, entries));
        }
        self.close_block();
        let offset = cluster * self.geometry.cluster_size();
        self.table.set(index, offset, &mut self.done);
        self.block = OpenBlock { index, offset, bytes: vec![0; self.geometry.cluster_bytes()] };
        // The cluster with the tail is counted by a block that is gone.
        self.tail = 0;
        Ok(())
    }

    fn close_block(&mut self) {
        let bytes = std::mem::take(&mut self.block.bytes);
        if !bytes.is_empty() {
            self.done.push(Piecework { offset: self.block.offset, bytes });
        }
    }

    /// One reference more to a cluster that the open block counts.
    fn count(&mut self, cluster: u64) -> Result<(), ImageError> {
        let (width, slot) = (self.header.refcount_width, self.slot(cluster));
        let count = width.get(&self.block.bytes, slot) + 1;
        width.set(&mut self.block.bytes, slot, count).map_err(ImageError::format("refcount block", None))
    }

    fn slot(&self, cluster: u64) -> usize {
        usize::try_from(cluster - self.block.index * self.per_block()).expect("inside one block")
    }

    /// A place for compressed bytes: behind the last ones if their cluster may be shared once more, going on in the next
    /// cluster if that is free.
    fn pack(&mut self, len: u64) -> Result<HostOffset, ImageError> {
        self.packed = true;
        let cluster_size = self.geometry.cluster_size();
        let (shared, room) = (self.tail / cluster_size, self.tail.next_multiple_of(cluster_size) - self.tail);
        let joins = room > 0
            && self.header.refcount_width.get(&self.block.bytes, self.slot(shared))
                < self.header.refcount_width.max();
        let goes_on = self.next == shared + 1 && !self.next.is_multiple_of(self.per_block());
        let offset = if joins && (len <= room || goes_on) {
            self.count(shared)?;
            if len > room {
                self.allocate()?;
            }
            self.tail
        } else {
            self.allocate()? * cluster_size
        };
        self.tail = offset + len;
        Ok(HostOffset(offset))
    }

    fn open_l2(&mut self, slot: u64) -> Result<(), ImageError> {
        if self.l2.as_ref().is_some_and(|l2| l2.slot == slot) {
            return Ok(());
        }
        self.close_l2();
        let offset = self.allocate()? * self.geometry.cluster_size();
        self.l1.set(slot, L1Entry::owned(HostOffset(offset)).0, &mut self.done);
        self.l2 = Some(OpenL2 { slot, offset, bytes: vec![0; self.geometry.cluster_bytes()] });
        Ok(())
    }

    fn close_l2(&mut self) {
        if let Some(OpenL2 { offset, bytes, .. }) = self.l2.take() {
            self.done.push(Piecework { offset, bytes });
        }
    }

    fn set_entry(
        &mut self,
        cluster: GuestCluster,
        content: Content,
        at: HostOffset,
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let descriptor = match content {
            Content::Zero if g.extended_l2() => L2Entry::default(),
            Content::ZeroSubclusters(_) => L2Entry::default(),
            Content::Zero => L2Entry::ZERO,
            Content::Plain | Content::Subclusters { .. } => L2Entry::owned(at),
            Content::Packed(len) => L2Entry::compressed(g, at, len as u64).ok_or_else(|| {
                too_long("compressed offset", at.0, (1 << g.compressed_offset_bits().min(56)) - 1)
            })?,
        };
        let subclusters = match content {
            Content::Zero => ExtendedL2Entry::ZERO.subclusters,
            Content::ZeroSubclusters(zero) => u64::from(zero) << 32,
            Content::Plain => ExtendedL2Entry::owned(at).subclusters,
            Content::Subclusters { data, zero } => u64::from(zero) << 32 | u64::from(data),
            Content::Packed(_) => 0,
        };
        let l2 = self.l2.as_mut().expect("opened by the caller");
        let width = g.l2_entry_bytes();
        let from = g.l2_index(cluster) * width;
        let entry = ExtendedL2Entry { descriptor, subclusters }.to_bytes();
        let place = l2.bytes.get_mut(from..from + width).expect("an index inside the table");
        place.copy_from_slice(entry.get(..width).expect("8 or 16"));
        Ok(())
    }
}

/// What remains to be written of a new image.
#[derive(Debug)]
pub struct Finished {
    /// The last tables.
    pub tables: Vec<Piecework>,
    /// The header of the whole image, to be written when everything else is durable.
    pub header: Vec<u8>,
    /// Length of the file.
    pub len: u64,
}

fn too_long(field: &'static str, value: u64, max: u64) -> ImageError {
    ImageError::Format {
        structure: "place in the new image",
        offset: None,
        source: FormatError::OutOfRange { field, value, min: 0, max },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use pleach_format::CompressionType;
    use pleach_store::{FileStore, Store};

    use super::*;
    use crate::{Chain, Compressor, Image, Layer, check};

    fn rand(state: &mut u64, n: u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % n
    }

    /// Every width and many sizes, plain, compressed and mixed, dense and sparse: `check` finds nothing, and everything
    /// reads back.
    #[test]
    fn any_content_is_counted_right_and_reads_back() {
        let mut state = 3;
        for round in 0..60 {
            let extended_l2 = rand(&mut state, 4) == 0;
            let bits = if extended_l2 { 14 } else { 9 + u32::try_from(rand(&mut state, 4)).unwrap() };
            let cluster = 1u64 << bits;
            let width = RefcountWidth::new(u32::try_from(rand(&mut state, 7)).unwrap()).unwrap();
            let clusters = 1 + rand(&mut state, if extended_l2 { 300 } else { 3000 });
            let header = NewHeader {
                cluster_bits: bits,
                size: clusters * cluster,
                refcount_width: width,
                extended_l2,
                ..NewHeader::default()
            };
            let (dense, packs) = (1 + rand(&mut state, 5), rand(&mut state, 3));
            let store = Arc::new(FileStore::new(tempfile::tempfile().unwrap()));
            let mut bulk = Bulk::new(header.clone()).unwrap();
            let mut compressor = Compressor::new(CompressionType::Deflate, Some(1)).unwrap();
            let mut model = BTreeMap::new();
            let mut plain = 0;
            for index in 0..clusters {
                if rand(&mut state, dense) != 0 {
                    continue;
                }
                let byte = u8::try_from(1 + rand(&mut state, 200)).unwrap();
                let mut bytes = vec![byte; header.geometry().unwrap().cluster_bytes()];
                for at in 0..rand(&mut state, cluster / 2) {
                    bytes[usize::try_from(at).unwrap()] = u8::try_from(rand(&mut state, 256)).unwrap();
                }
                let packed = compressor.compress(&bytes).filter(|_| rand(&mut state, 3) < packs);
                let content = packed.as_ref().map_or(Content::Plain, |p| Content::Packed(p.len()));
                plain += u64::from(packed.is_none());
                let at = bulk.place(GuestCluster(index), content).unwrap();
                store.write_at(at.0, packed.as_ref().unwrap_or(&bytes)).unwrap();
                model.insert(index, bytes);
            }
            let finished = bulk.finish().unwrap();
            for piece in &finished.tables {
                store.write_at(piece.offset, &piece.bytes).unwrap();
            }
            store.write_at(0, &finished.header).unwrap();
            store.set_len(finished.len).unwrap();
            let sizes = measure(&header).unwrap();
            if packs == 0 {
                assert_eq!(finished.len, sizes.metadata + plain * cluster, "round {round}");
            } else {
                assert!(finished.len <= sizes.metadata + sizes.disk, "round {round}");
            }
            let image = Image::open(store).unwrap();
            let report = check(&image).unwrap();
            assert!(report.findings.is_empty(), "round {round}: {header:?} {:?}", report.findings);
            let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
            let zeros = vec![0; header.geometry().unwrap().cluster_bytes()];
            let mut read = zeros.clone();
            for index in 0..clusters {
                chain.read_at(index * cluster, &mut read).unwrap();
                assert!(read == *model.get(&index).unwrap_or(&zeros), "round {round} cluster {index}");
            }
        }
    }

    #[test]
    fn what_cannot_be_said_is_refused() {
        let v2 = NewHeader { version: Version::V2, size: 1 << 20, ..NewHeader::default() };
        let mut bulk = Bulk::new(v2).unwrap();
        assert!(matches!(
            bulk.place(GuestCluster(0), Content::Zero),
            Err(ImageError::Unsupported { feature: "a zero cluster in a version 2 image" })
        ));
    }
}
