//! A few clusters on their way: read, looked at, compressed, placed, written.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pleach_format::{CompressionType, FormatError, Geometry, GuestCluster, GuestOffset, Version};
use pleach_image::{Bulk, Chain, Compressor, Content, ImageError, Piecework};
use pleach_store::Store;

use super::sharing::Sharing;
use crate::buffer::Buffer;
use crate::is_zero;

/// Zeros of this length are left out of what is written: the file is new, and has a hole there.
const HOLE: usize = 4096;

/// What a new image needs to know to say what becomes of a cluster.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Look<'a> {
    pub(crate) source: &'a Chain,
    /// The new image's backing files.
    pub(crate) below: Option<&'a Chain>,
    pub(crate) geometry: Geometry,
    pub(crate) version: Version,
    /// Clusters that are compressed like this are taken over as they are.
    pub(crate) carry: Option<CompressionType>,
    /// Whole clusters that the file system can share are not read, and not looked at for zeros.
    pub(crate) sharing: Option<&'a Sharing>,
    /// What clusters are compressed with, if they are to be.
    pub(crate) compressors: Option<&'a Compressors>,
}

/// Compressors of one type and level, as many as there are at work at the same time: each may need some 20 MiB.
#[derive(Debug)]
pub(crate) struct Compressors {
    compression: CompressionType,
    level: Option<u32>,
    free: Mutex<Vec<Compressor>>,
}

impl Compressors {
    /// # Errors
    /// [`FormatError::OutOfRange`] for a level that the type does not have.
    pub(crate) fn new(compression: CompressionType, level: Option<u32>) -> Result<Self, FormatError> {
        let first = Compressor::new(compression, level)?;
        Ok(Self { compression, level, free: Mutex::new(vec![first]) })
    }

    /// Lets `work` have one.
    fn with<T>(&self, work: impl FnOnce(&mut Compressor) -> T) -> Result<T, ImageError> {
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let one = free().pop();
        let mut one =
            match one {
                Some(one) => one,
                None => Compressor::new(self.compression, self.level).map_err(|source| {
                    ImageError::Format { structure: "compression level", offset: None, source }
                })?,
            };
        let done = work(&mut one);
        free().push(one);
        Ok(done)
    }
}

impl Look<'_> {
    /// Whether a few bytes of most clusters say what becomes of them.
    fn is_short(&self) -> bool {
        self.below.is_none() && !self.geometry.extended_l2()
    }
}

/// Bytes of a batch that go to one place.
#[derive(Clone, Debug)]
struct Write {
    offset: u64,
    from: Origin,
    len: usize,
}

/// Where the bytes are that are written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// From here on in the batch's bytes.
    Plain(usize),
    /// From here on in its compressed bytes.
    Packed(usize),
    /// In the file of a layer of the source, which shares them.
    Shared { layer: usize, host: u64 },
}

impl Origin {
    fn after(self, len: usize) -> Self {
        match self {
            Self::Plain(at) => Self::Plain(at + len),
            Self::Packed(at) => Self::Packed(at + len),
            Self::Shared { layer, host } => Self::Shared { layer, host: host + len as u64 },
        }
    }
}

/// Bytes that a batch has put out.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Written {
    /// All of them, compressed ones as they are.
    pub(crate) bytes: u64,
    /// Of these, those that the file system shares.
    pub(crate) cloned: u64,
}

/// Some clusters, in guest order, and the buffers for them, which are used again.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Guest ranges, whole clusters.
    ranges: Vec<Range<u64>>,
    bytes: Buffer,
    below: Buffer,
    packed: Vec<u8>,
    /// Clusters of `bytes` that came compressed: where each starts, and where in `packed` it is.
    carried: Vec<(usize, Range<usize>)>,
    /// Guest cluster, what becomes of it, and where its bytes are.
    clusters: Vec<(GuestCluster, Content, Origin)>,
    writes: Vec<Write>,
}

impl Batch {
    /// Takes the next ranges from the front of `waiting`, whole clusters, `limit` bytes at most.
    pub(crate) fn take(&mut self, waiting: &mut Vec<Range<u64>>, limit: u64) {
        self.ranges.clear();
        self.clusters.clear();
        self.writes.clear();
        let mut left = limit;
        while left > 0
            && let Some(range) = waiting.last_mut()
        {
            let end = range.end.min(range.start + left);
            left -= end - range.start;
            self.ranges.push(range.start..end);
            range.start = end;
            if range.is_empty() {
                waiting.pop();
            }
        }
    }

    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Reads the clusters.
    ///
    /// # Errors
    /// What reading says.
    pub(crate) fn read(&mut self, source: &Chain) -> Result<(), ImageError> {
        read(source, &self.ranges, &mut self.bytes)
    }

    /// Reads the clusters, says what becomes of each, and compresses those that are to be.
    ///
    /// # Errors
    /// What reading says.
    pub(crate) fn look(&mut self, look: &Look<'_>) -> Result<(), ImageError> {
        self.packed.clear();
        self.carried.clear();
        if let Some(sharing) = look.sharing {
            let (g, extended) = (look.geometry, look.geometry.extended_l2());
            let content =
                if extended { Content::Subclusters { data: u32::MAX, zero: 0 } } else { Content::Plain };
            let clusters = &mut self.clusters;
            self.ranges =
                share(look.source, sharing, g.cluster_size(), &self.ranges, |layer, host, range| {
                    for at in range.clone().step_by(g.cluster_bytes()) {
                        let from = Origin::Shared { layer, host: host + (at - range.start) };
                        clusters.push((g.guest_cluster(GuestOffset(at)), content, from));
                    }
                })?;
        }
        match look.carry {
            Some(compression) => {
                self.read_carrying(look.source, compression, look.geometry.cluster_bytes())?
            }
            None => self.read(look.source)?,
        }
        if let Some(below) = look.below {
            read(below, &self.ranges, &mut self.below)?;
        }
        let mut carried = self.carried.iter().peekable();
        let (size, mut at) = (look.geometry.cluster_bytes(), 0);
        for range in &self.ranges {
            for guest in range.clone().step_by(size) {
                let place = at..at + size;
                at += size;
                let packed = carried.next_if(|(start, _)| *start == place.start).map(|(_, packed)| packed);
                let cluster = self.bytes.bytes().get(place.clone()).unwrap_or(&[]);
                let below = look.below.map(|_| self.below.bytes().get(place.clone()).unwrap_or(&[]));
                let content = content(look, cluster, below);
                let index = look.geometry.guest_cluster(GuestOffset(guest));
                let Some(content) = content else { continue };
                let mut item = (index, content, Origin::Plain(place.start));
                if let (Content::Plain | Content::Subclusters { .. }, Some(packed)) = (content, packed) {
                    item = (index, Content::Packed(packed.len()), Origin::Packed(packed.start));
                } else if let (Content::Plain | Content::Subclusters { .. }, Some(compressors)) =
                    (content, look.compressors)
                {
                    let start = self.packed.len();
                    let len = compressors.with(|one| one.append(cluster, &mut self.packed))?;
                    if let Some(len) = len {
                        item = (index, Content::Packed(len), Origin::Packed(start));
                    }
                }
                self.clusters.push(item);
            }
        }
        if look.sharing.is_some() {
            self.clusters.sort_unstable_by_key(|(index, ..)| index.0);
        }
        Ok(())
    }

    /// Reads the clusters of `size` bytes, and keeps the compressed bytes of those that are compressed like this.
    fn read_carrying(
        &mut self,
        source: &Chain,
        compression: CompressionType,
        size: usize,
    ) -> Result<(), ImageError> {
        let len = self.ranges.iter().map(|r| r.end - r.start).sum::<u64>();
        let bytes = self.bytes.fresh(usize::try_from(len).unwrap_or(0));
        let mut base = 0;
        for range in &self.ranges {
            let pieces = source.pieces(range.start, range.end - range.start)?;
            let place = |from: u64, to: u64| {
                let at = |guest: u64| base + usize::try_from(guest - range.start).unwrap_or(0);
                at(from)..at(to)
            };
            // What is not carried over is read in stretches as long as they are.
            let mut from = range.start;
            for piece in pieces.iter().filter(|p| p.len == size as u64) {
                let here = place(piece.guest, piece.guest + piece.len);
                let Some(part) = bytes.get_mut(here.clone()) else { continue };
                let start = self.packed.len();
                if let Some(len) = source.read_packed(piece, compression, &mut self.packed, part)? {
                    self.carried.push((here.start, start..start + len));
                    let before = bytes.get_mut(place(from, piece.guest)).unwrap_or_default();
                    source.read_at(from, before)?;
                    from = piece.guest + piece.len;
                }
            }
            source.read_at(from, bytes.get_mut(place(from, range.end)).unwrap_or_default())?;
            base += usize::try_from(range.end - range.start).unwrap_or(0);
        }
        Ok(())
    }

    /// Says what becomes of each cluster, reading no more than that needs: nothing can be written then.
    ///
    /// # Errors
    /// What reading says.
    pub(crate) fn survey(&mut self, look: &Look<'_>) -> Result<(), ImageError> {
        if !look.is_short() {
            return self.look(look);
        }
        let size = look.geometry.cluster_bytes();
        // Nearly every cluster with data shows it at its start.
        let (head, tail) = self.bytes.fresh(size).split_at_mut(size.min(HOLE));
        for (n, guest) in self.ranges.iter().flat_map(|r| r.clone().step_by(size)).enumerate() {
            look.source.read_at(guest, head)?;
            let mut zero = is_zero(head);
            if zero {
                look.source.read_at(guest + head.len() as u64, tail)?;
                zero = is_zero(tail);
            }
            if !zero {
                let index = look.geometry.guest_cluster(GuestOffset(guest));
                self.clusters.push((index, Content::Plain, Origin::Plain(n * size)));
            }
        }
        Ok(())
    }

    /// Fixes where everything goes; with `fill`, clusters before that were left out get a place too. Tables that are
    /// complete go to `tables`.
    ///
    /// # Errors
    /// As [`Bulk::place`], and what `tables` says.
    pub(crate) fn place(
        &mut self,
        bulk: &mut Bulk,
        mut fill: Option<&mut Fill>,
        tables: &mut Sink<'_>,
    ) -> Result<(), ImageError> {
        let cluster_bytes = bulk.geometry().cluster_bytes();
        let subcluster = cluster_bytes / 32;
        for (cluster, content, from) in &self.clusters {
            let mut content = *content;
            if let Some(fill) = &mut fill {
                fill.up_to(cluster.0, bulk, tables)?;
                fill.next = cluster.0 + 1;
                content = match content {
                    Content::Zero if bulk.geometry().extended_l2() => {
                        Content::Subclusters { data: 0, zero: u32::MAX }
                    }
                    Content::ZeroSubclusters(zero) => Content::Subclusters { data: 0, zero },
                    other => other,
                };
            }
            let offset = bulk.place(*cluster, content)?.0;
            match content {
                Content::Zero | Content::ZeroSubclusters(_) => {}
                Content::Packed(len) => self.writes.push(Write { offset, from: *from, len }),
                Content::Plain | Content::Subclusters { data: u32::MAX, .. } => {
                    self.writes.push(Write { offset, from: *from, len: cluster_bytes });
                }
                Content::Subclusters { data, .. } => {
                    for n in (0..32).filter(|n| data >> n & 1 != 0) {
                        self.writes.push(Write {
                            offset: offset + (n * subcluster) as u64,
                            from: from.after(n * subcluster),
                            len: subcluster,
                        });
                    }
                }
            }
        }
        self.join_writes();
        tables(bulk.take_done())
    }

    /// Everything goes where the guest sees it, up to `size`; what can be shared is, and the rest is to be read.
    ///
    /// # Errors
    /// Damage in the tables that are met.
    pub(crate) fn place_raw(
        &mut self,
        source: &Chain,
        size: u64,
        sharing: Option<&Sharing>,
    ) -> Result<(), ImageError> {
        if let Some(sharing) = sharing {
            let writes = &mut self.writes;
            self.ranges = share(source, sharing, super::RAW_GRAIN, &self.ranges, |layer, host, range| {
                let len = usize::try_from(range.end - range.start).unwrap_or(0);
                writes.push(Write { offset: range.start, from: Origin::Shared { layer, host }, len });
            })?;
        }
        let mut at = 0;
        for range in &self.ranges {
            let len = usize::try_from(range.end.min(size).saturating_sub(range.start)).unwrap_or(0);
            self.writes.push(Write { offset: range.start, from: Origin::Plain(at), len });
            at += usize::try_from(range.end - range.start).unwrap_or(0);
        }
        Ok(())
    }

    /// Bytes that are not part of a block of zeros.
    pub(crate) fn nonzero_bytes(&self) -> u64 {
        self.bytes.bytes().chunks(HOLE).filter(|block| !is_zero(block)).map(|block| block.len() as u64).sum()
    }

    fn join_writes(&mut self) {
        self.writes.dedup_by(|next, last| {
            let joins =
                last.from.after(last.len) == next.from && last.offset + last.len as u64 == next.offset;
            if joins {
                last.len += next.len;
            }
            joins
        });
    }

    /// Writes everything but zeros, which are there already; what `source` has is shared.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn write(&self, source: &Chain, store: Option<&dyn Store>) -> Result<Written, ImageError> {
        let mut written = Written::default();
        for write in &self.writes {
            written.bytes += match write.from {
                Origin::Shared { layer, host } => {
                    let len = write.len as u64;
                    let from = source.layers().get(layer).map(|l| l.data_store());
                    written.cloned += match (store, from) {
                        (Some(store), Some(from)) => share_or_copy(&**from, host, store, write.offset, len),
                        _ => Ok(len),
                    }
                    .map_err(|source| ImageError::Io { what: "write the new file", source })?;
                    len
                }
                _ => self
                    .write_bytes(write, store)
                    .map_err(|source| ImageError::Io { what: "write the new file", source })?,
            };
        }
        Ok(written)
    }

    /// One past the last byte that is written.
    pub(crate) fn end(&self) -> u64 {
        self.writes.iter().map(|w| w.offset + w.len as u64).max().unwrap_or(0)
    }

    fn write_bytes(&self, write: &Write, store: Option<&dyn Store>) -> std::io::Result<u64> {
        match write.from {
            Origin::Packed(at) => {
                let bytes = self.packed.get(at..at + write.len).unwrap_or(&[]);
                store.map_or(Ok(()), |store| store.write_at(write.offset, bytes))?;
                Ok(bytes.len() as u64)
            }
            Origin::Plain(at) => {
                let bytes = self.bytes.bytes().get(at..at + write.len).unwrap_or(&[]);
                write_sparse(store, write.offset, bytes)
            }
            Origin::Shared { .. } => Ok(0),
        }
    }
}

/// Takes out of `ranges` what can be shared in units of `unit` bytes: `each` gets its layer, where it is in that layer's file,
/// and its guest range. Gives what is left.
fn share(
    source: &Chain,
    sharing: &Sharing,
    unit: u64,
    ranges: &[Range<u64>],
    mut each: impl FnMut(usize, u64, Range<u64>),
) -> Result<Vec<Range<u64>>, ImageError> {
    let mut left = Vec::new();
    for range in ranges {
        let mut at = range.start;
        for piece in source.pieces(range.start, range.end - range.start)? {
            if let Some((layer, host, part)) = sharing.part(&piece, unit) {
                left.push(at..part.start);
                at = part.end;
                each(layer, host, part);
            }
        }
        left.push(at..range.end);
    }
    left.retain(|range| !range.is_empty());
    Ok(left)
}

/// Lets a new file share bytes of another one, or copies them if that is not possible. Returns how many were shared.
fn share_or_copy(from: &dyn Store, host: u64, to: &dyn Store, offset: u64, len: u64) -> std::io::Result<u64> {
    if to.copy_from(from, host, offset, len)? {
        return Ok(len);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    from.read_at(host, &mut bytes)?;
    to.write_at(offset, &bytes)?;
    Ok(0)
}

/// Where complete tables go.
pub(crate) type Sink<'a> = dyn FnMut(Vec<Piecework>) -> Result<(), ImageError> + 'a;

/// Gives every cluster of the disk a place, also those without data (preallocation).
#[derive(Debug)]
pub(crate) struct Fill {
    /// The next cluster without a place.
    pub(crate) next: u64,
    /// What becomes of a cluster without data.
    content: Content,
}

impl Fill {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let extended = Content::Subclusters { data: 0, zero: 0 };
        Self { next: 0, content: if geometry.extended_l2() { extended } else { Content::Plain } }
    }

    /// Gives places to the clusters before `end`.
    ///
    /// # Errors
    /// As [`Batch::place`].
    pub(crate) fn up_to(
        &mut self,
        end: u64,
        bulk: &mut Bulk,
        tables: &mut Sink<'_>,
    ) -> Result<(), ImageError> {
        for index in self.next..end {
            bulk.place(GuestCluster(index), self.content)?;
            // A cluster of pointers at most is kept in memory.
            if index.is_multiple_of(4096) {
                tables(bulk.take_done())?;
            }
        }
        self.next = self.next.max(end);
        Ok(())
    }
}

/// What becomes of a cluster with these bytes; `None` if it is not mentioned at all.
fn content(look: &Look<'_>, cluster: &[u8], below: Option<&[u8]>) -> Option<Content> {
    let says_zero = look.version == Version::V3;
    match below {
        Some(below) if cluster == below => None,
        None if is_zero(cluster) => None,
        Some(_) if says_zero && is_zero(cluster) => Some(Content::Zero),
        _ if look.geometry.extended_l2() => Some(subclusters(cluster, below)),
        _ => Some(Content::Plain),
    }
}

fn subclusters(cluster: &[u8], below: Option<&[u8]>) -> Content {
    let size = (cluster.len() / 32).max(1);
    let (mut data, mut zero) = (0, 0);
    for (n, part) in cluster.chunks(size).enumerate() {
        let bit = 1 << n;
        let below = below.and_then(|b| b.get(n * size..(n + 1) * size));
        match below {
            Some(below) if part == below => {}
            None if is_zero(part) => {}
            Some(_) if is_zero(part) => zero |= bit,
            _ => data |= bit,
        }
    }
    if data == 0 { Content::ZeroSubclusters(zero) } else { Content::Subclusters { data, zero } }
}

fn read(chain: &Chain, ranges: &[Range<u64>], bytes: &mut Buffer) -> Result<(), ImageError> {
    let len = ranges.iter().map(|r| r.end - r.start).sum::<u64>();
    let mut rest = bytes.fresh(usize::try_from(len).unwrap_or(0));
    for range in ranges {
        let (part, behind) = rest.split_at_mut(usize::try_from(range.end - range.start).unwrap_or(0));
        chain.read_at(range.start, part)?;
        rest = behind;
    }
    Ok(())
}

/// Writes what is not zeros, and gives the number of bytes.
fn write_sparse(store: Option<&dyn Store>, offset: u64, bytes: &[u8]) -> std::io::Result<u64> {
    let mut written = 0;
    let mut start = 0;
    let mut run = |range: Range<usize>| {
        written += range.len() as u64;
        let part = bytes.get(range.clone()).unwrap_or(&[]);
        match store {
            Some(store) if !part.is_empty() => store.write_at(offset + range.start as u64, part),
            _ => Ok(()),
        }
    };
    for (n, block) in bytes.chunks(HOLE).enumerate() {
        if is_zero(block) {
            run(start..n * HOLE)?;
            start = n * HOLE + block.len();
        }
    }
    run(start..bytes.len())?;
    Ok(written)
}
