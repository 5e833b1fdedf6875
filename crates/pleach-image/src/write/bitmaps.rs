//! Persistent bitmaps: kept right by every write, and changed on request (spec: bitmaps, dirty tracking bitmap).
//!
//! A bitmap that records is marked in use before the first change, so that nobody trusts it after a crash. All
//! changes of the directory are made in a new one, which the header's extension is switched to.

use std::ops::Range;

use pleach_alloc::{Allocator, Write};
use pleach_format::{
    BitmapCluster, BitmapRecord, BitmapTableEntry, BitmapsExtension, Geometry, HostCluster, HostOffset,
    Version,
};
use pleach_store::Store;

use super::{State, Writer};
use crate::publish::{bitmaps_fit, set_bitmaps};
use crate::{Image, ImageError, Switch, clear_unknown_autoclear, escape, publish};

/// Most bytes of one bitmap that QEMU loads.
const MAX_BYTES: u64 = 512 << 20;

/// The bits of one bitmap: bit n stands for guest bytes `n << granularity_bits` and on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    granularity_bits: u32,
    size: u64,
    bytes: Vec<u8>,
}

impl Bits {
    /// All clear, for a disk of `size` bytes.
    ///
    /// # Errors
    /// [`ImageError::Refused`] if the bitmap would take more than 512 MiB.
    pub fn new(granularity_bits: u32, size: u64) -> Result<Self, ImageError> {
        let bytes = bytes_for(granularity_bits, size);
        if bytes > MAX_BYTES {
            let what = format!(
                "a bitmap of granularity {} takes {bytes} bytes for this disk, more than {MAX_BYTES}; use a larger \
                 granularity",
                1u64 << granularity_bits
            );
            return Err(ImageError::Refused { what });
        }
        Ok(Self { granularity_bits, size, bytes: vec![0; usize::try_from(bytes).unwrap_or(0)] })
    }

    /// Guest bytes a bit.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Sets the bits of `len` guest bytes from `offset`; `len` is not 0.
    pub fn mark(&mut self, offset: u64, len: u64) {
        let (first, last) = (offset >> self.granularity_bits, (offset + len - 1) >> self.granularity_bits);
        let at = |bit: u64| usize::try_from(bit / 8).unwrap_or(usize::MAX);
        let (low, high) = (0xffu8 << (first % 8), 0xffu8 >> (7 - last % 8));
        let middle = (at(first) + 1).min(at(last))..at(last);
        if let Some(inner) = self.bytes.get_mut(middle) {
            inner.fill(0xff);
        }
        if at(first) == at(last) {
            self.set(at(first), low & high);
        } else {
            self.set(at(first), low);
            self.set(at(last), high);
        }
    }

    fn set(&mut self, at: usize, mask: u8) {
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte |= mask;
        }
    }

    /// Virtual size of the disk that they are for.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The guest ranges whose bits are set, in order, neighbours joined.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut out: Vec<Range<u64>> = Vec::new();
        for (at, _) in self.bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| self.bytes.get(at).is_some_and(|b| b >> bit & 1 != 0)) {
                let start = (at as u64 * 8 + bit) << self.granularity_bits;
                let end = (start + self.granularity()).min(self.size);
                match out.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => out.push(start..end),
                }
            }
        }
        out
    }

    /// The same bits for a disk of `size` bytes: cut, or with clear bits behind.
    fn resized(&self, size: u64) -> Result<Self, ImageError> {
        let mut new = Self::new(self.granularity_bits, size)?;
        for (to, from) in new.bytes.iter_mut().zip(&self.bytes) {
            *to = *from;
        }
        new.clear_tail();
        Ok(new)
    }

    /// Bits behind the disk's end are clear.
    fn clear_tail(&mut self) {
        let bits = self.size.div_ceil(self.granularity());
        if !bits.is_multiple_of(8)
            && let Some(last) = self.bytes.last_mut()
        {
            *last &= 0xff >> (8 - bits % 8);
        }
    }
}

/// A bitmap as it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedBitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// Whether it records writes.
    pub enabled: bool,
    /// What is marked, for a disk of the image's size.
    pub bits: Bits,
}

impl WantedBitmap {
    /// Takes the clusters that [`Writer::put_bitmaps`] will take for the bits, in the same order.
    ///
    /// # Errors
    /// An image that cannot grow.
    pub fn allocate(&self, g: Geometry, allocator: &mut Allocator) -> Result<(), ImageError> {
        let mut entries = 0;
        for chunk in self.bits.bytes.chunks(g.cluster_bytes()) {
            entries += 1;
            if chunk.iter().any(|&b| b != 0) {
                allocator.allocate()?;
            }
        }
        allocator.allocate_contiguous(g.clusters_for(entries * 8).0)?;
        Ok(())
    }

    /// Bytes of the bitmap's entry in the directory.
    pub fn directory_bytes(&self) -> u64 {
        (24 + self.name.len() as u64).next_multiple_of(8)
    }
}

fn bytes_for(granularity_bits: u32, size: u64) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// A bitmap that records what is written.
#[derive(Debug)]
struct Live {
    name: Vec<u8>,
    /// `None` if this bitmap cannot be kept right: it stays marked in use.
    bits: Option<Bits>,
    /// Where its flags are in the directory, and what they were.
    flags: (HostOffset, u32),
}

/// The bitmaps that record.
#[derive(Debug, Default)]
pub(super) struct LiveBitmaps(Vec<Live>);

impl LiveBitmaps {
    /// The consistent bitmaps of `image` that record; all consistent ones if `all`.
    pub(super) fn open(image: &Image, all: bool) -> Result<Self, ImageError> {
        let mut live = Vec::new();
        let bad = ImageError::format("header", None);
        let Some(extension) = image.header().bitmaps().map_err(bad)? else { return Ok(Self(live)) };
        let mut at = extension.directory_offset;
        for record in image.bitmaps()? {
            let flags = (HostOffset(at + 12), record.flags);
            at += record.stored_bytes() as u64;
            let records = record.flags & BitmapRecord::AUTO != 0;
            if record.flags & BitmapRecord::IN_USE == 0 && (records || all) {
                let bits = understood(&record).then(|| image.bitmap_bits(&record)).transpose()?;
                live.push(Live { name: record.name, bits, flags });
            }
        }
        Ok(Self(live))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Says on disk that what is there is not to be trusted any more. Each flag lies in one sector.
    pub(super) fn mark_in_use(&self, store: &dyn Store) -> Result<(), ImageError> {
        for Live { flags: (at, flags), .. } in &self.0 {
            let bytes = (flags | BitmapRecord::IN_USE).to_be_bytes();
            store.write_at(at.0, &bytes).map_err(ImageError::io("mark a bitmap in use"))?;
        }
        if self.is_empty() {
            return Ok(());
        }
        // Nobody may trust the bitmap once guest data differ from what it says.
        store.barrier().map_err(ImageError::io("flush the image"))
    }

    /// Records a change of `len` guest bytes from `offset`.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        for bits in self.0.iter_mut().filter_map(|live| live.bits.as_mut()) {
            bits.mark(offset, len);
        }
    }

    fn resize(&mut self, size: u64) -> Result<(), ImageError> {
        for bits in self.0.iter_mut().filter_map(|live| live.bits.as_mut()) {
            *bits = bits.resized(size)?;
        }
        Ok(())
    }
}

/// A dirty tracking bitmap without anything that only somebody else understands.
fn understood(record: &BitmapRecord) -> bool {
    record.kind == BitmapRecord::DIRTY_TRACKING
        && record.extra.is_empty()
        && (9..=31).contains(&record.granularity_bits)
}

impl Image {
    /// The bits of a bitmap, which is consistent.
    ///
    /// # Errors
    /// A table that does not fit the disk's size, lies outside the file, or breaks the format; [`ImageError::Refused`]
    /// for a bitmap that is inconsistent or of an unknown kind.
    pub fn bitmap_bits(&self, record: &BitmapRecord) -> Result<Bits, ImageError> {
        let name = escape(&record.name);
        if record.flags & BitmapRecord::IN_USE != 0 {
            let what =
                format!("the bitmap \"{name}\" is inconsistent: it was not written back by its last user");
            return Err(ImageError::Refused { what });
        }
        if !understood(record) {
            let what = format!(
                "the bitmap \"{name}\" is of an unknown kind, or has a granularity or extra data that are"
            );
            return Err(ImageError::Refused { what });
        }
        let cluster = self.geometry().cluster_size();
        let mut bits = Bits::new(record.granularity_bits.into(), self.size())?;
        let have = u64::from(record.table_size);
        if have < (bits.bytes.len() as u64).div_ceil(cluster) {
            let what = format!("the table of the bitmap \"{name}\" has {have} entries, too few for the disk");
            return Err(ImageError::Damaged { what, offset: Some(record.table_offset) });
        }
        let step = self.geometry().cluster_bytes();
        let entries = self.bitmap_table(record)?;
        for (chunk, entry) in bits.bytes.chunks_mut(step).zip(entries) {
            match entry {
                BitmapCluster::Zeros => {}
                BitmapCluster::Ones => chunk.fill(0xff),
                BitmapCluster::Data(at) => {
                    crate::image::check_inside(
                        "bitmap data",
                        at.0,
                        cluster,
                        self.file_len(),
                        self.geometry(),
                    )?;
                    self.store().read_at(at.0, chunk).map_err(ImageError::io("read a bitmap"))?;
                }
            }
        }
        bits.clear_tail();
        Ok(bits)
    }

    /// The entries of a bitmap's table.
    fn bitmap_table(&self, record: &BitmapRecord) -> Result<Vec<BitmapCluster>, ImageError> {
        let g = self.geometry();
        let len = u64::from(record.table_size) * 8;
        crate::image::check_inside("bitmap table", record.table_offset, len, self.file_len(), g)?;
        let mut table = vec![0; usize::try_from(len).unwrap_or(0)];
        self.store()
            .read_at(record.table_offset, &mut table)
            .map_err(ImageError::io("read a bitmap table"))?;
        let words = table.as_chunks::<8>().0.iter();
        words
            .map(|word| BitmapTableEntry(u64::from_be_bytes(*word)).decode(g))
            .collect::<Result<_, _>>()
            .map_err(ImageError::format("bitmap table", Some(record.table_offset)))
    }

    /// The host clusters that a bitmap takes: its table and its data.
    fn bitmap_clusters(&self, record: &BitmapRecord) -> Result<Vec<HostCluster>, ImageError> {
        let g = self.geometry();
        let table = HostOffset(record.table_offset);
        let mut out: Vec<HostCluster> = g.touched(table, u64::from(record.table_size) * 8).collect();
        for entry in self.bitmap_table(record)? {
            if let BitmapCluster::Data(at) = entry {
                out.push(g.host_cluster(at));
            }
        }
        Ok(out)
    }
}

impl Writer {
    /// Adds a bitmap with all bits clear; `enabled` ones record writes from now on. `granularity`: guest bytes a bit,
    /// a power of two from 512 to 2 GiB; `None`: the cluster size, but from 4 KiB to 64 KiB.
    ///
    /// # Errors
    /// [`ImageError::Refused`] for a name that is taken, empty or longer than 1023 bytes, a granularity out of range, or a
    /// version 2 image.
    pub fn add_bitmap(&self, name: &[u8], granularity: Option<u64>, enabled: bool) -> Result<(), ImageError> {
        self.edit_bitmaps(|state, records| {
            let refuse = |what: String| Err(ImageError::Refused { what });
            if state.shape.version == Version::V2 {
                return refuse("a version 2 image cannot hold bitmaps".to_owned());
            }
            if state.image.size() == 0 {
                return refuse("a disk of 0 bytes cannot have bitmaps".to_owned());
            }
            if records.iter().any(|r| r.name == name) {
                return refuse(format!("there is a bitmap \"{}\" already", escape(name)));
            }
            if name.is_empty() || name.len() > 1023 {
                return refuse(format!("the bitmap's name has {} bytes, must have 1 to 1023", name.len()));
            }
            let granularity =
                granularity.unwrap_or(state.shape.geometry.cluster_size().clamp(4 << 10, 64 << 10));
            if !granularity.is_power_of_two() || !(512..=2 << 30).contains(&granularity) {
                return refuse(format!(
                    "the granularity is {granularity}, must be a power of two from 512 to 2147483648"
                ));
            }
            if records.is_empty() && !bitmaps_fit(&*state.store)? {
                return Err(no_room());
            }
            let bits = Bits::new(granularity.trailing_zeros(), state.image.size())?;
            let (table_offset, table_size) = state.store_bits(&bits)?;
            records.push(BitmapRecord {
                table_offset,
                table_size,
                flags: if enabled { BitmapRecord::AUTO } else { 0 },
                kind: BitmapRecord::DIRTY_TRACKING,
                granularity_bits: u8::try_from(bits.granularity_bits).unwrap_or(31),
                extra: Vec::new(),
                name: name.to_vec(),
            });
            Ok(())
        })
    }

    /// Removes a bitmap, also an inconsistent one.
    ///
    /// # Errors
    /// [`ImageError::NoBitmap`].
    pub fn remove_bitmap(&self, name: &[u8]) -> Result<(), ImageError> {
        self.edit_bitmaps(|_, records| {
            find(records, name)?;
            records.retain(|r| r.name != name);
            Ok(())
        })
    }

    /// Lets a bitmap record writes, or stop recording them.
    ///
    /// # Errors
    /// [`ImageError::NoBitmap`]; [`ImageError::Refused`] if it is inconsistent.
    pub fn enable_bitmap(&self, name: &[u8], enabled: bool) -> Result<(), ImageError> {
        self.edit_bitmaps(|state, records| {
            let record = find(records, name)?;
            // Says whether it is consistent, and understood.
            state.image.bitmap_bits(record)?;
            record.flags = if enabled { BitmapRecord::AUTO } else { 0 };
            Ok(())
        })
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// As [`enable_bitmap`](Self::enable_bitmap).
    pub fn clear_bitmap(&self, name: &[u8]) -> Result<(), ImageError> {
        self.edit_bitmaps(|state, records| {
            let record = find(records, name)?;
            let bits = state.image.bitmap_bits(record)?;
            let empty = Bits::new(bits.granularity_bits, bits.size)?;
            (record.table_offset, record.table_size) = state.store_bits(&empty)?;
            Ok(())
        })
    }

    /// Sets in a bitmap every bit for a guest byte that `source` has a bit for.
    ///
    /// # Errors
    /// As [`enable_bitmap`](Self::enable_bitmap); [`ImageError::Refused`] for a source of another size.
    pub fn merge_bitmap(&self, name: &[u8], source: &Bits) -> Result<(), ImageError> {
        self.edit_bitmaps(|state, records| {
            let record = find(records, name)?;
            let mut bits = state.image.bitmap_bits(record)?;
            if source.size != bits.size {
                let what = format!(
                    "the source bitmap is for a disk of {} bytes, this disk has {}",
                    source.size, bits.size
                );
                return Err(ImageError::Refused { what });
            }
            for range in source.ranges() {
                bits.mark(range.start, range.end - range.start);
            }
            (record.table_offset, record.table_size) = state.store_bits(&bits)?;
            Ok(())
        })
    }

    /// Makes bitmaps what `wanted` says, adding those that are not there, and removes those named in `gone`: all of it at
    /// once.
    ///
    /// # Errors
    /// [`ImageError::Refused`] for a version 2 image, bits of another size, or a header without room.
    pub fn put_bitmaps(&self, wanted: &[WantedBitmap], gone: &[Vec<u8>]) -> Result<(), ImageError> {
        self.edit_bitmaps(|state, records| {
            if state.shape.version == Version::V2 && !wanted.is_empty() {
                let what = "a version 2 image cannot hold bitmaps".to_owned();
                return Err(ImageError::Refused { what });
            }
            records.retain(|r| !gone.contains(&r.name));
            for bitmap in wanted {
                if bitmap.bits.size != state.image.size() {
                    let what = format!(
                        "the bitmap \"{}\" is for a disk of {} bytes, this disk has {}",
                        escape(&bitmap.name),
                        bitmap.bits.size,
                        state.image.size()
                    );
                    return Err(ImageError::Refused { what });
                }
                let (table_offset, table_size) = state.store_bits(&bitmap.bits)?;
                records.retain(|r| r.name != bitmap.name);
                records.push(BitmapRecord {
                    table_offset,
                    table_size,
                    flags: if bitmap.enabled { BitmapRecord::AUTO } else { 0 },
                    kind: BitmapRecord::DIRTY_TRACKING,
                    granularity_bits: u8::try_from(bitmap.bits.granularity_bits).unwrap_or(31),
                    extra: Vec::new(),
                    name: bitmap.name.clone(),
                });
            }
            Ok(())
        })
    }

    /// The bits of a bitmap as they are now, writes of this session included.
    ///
    /// # Errors
    /// As [`enable_bitmap`](Self::enable_bitmap).
    pub fn bitmap(&self, name: &[u8]) -> Result<Bits, ImageError> {
        let state = self.read();
        if let Some(bits) = state.bitmaps.0.iter().find(|l| l.name == name).and_then(|l| l.bits.clone()) {
            return Ok(bits);
        }
        state.image.bitmap_bits(find(&mut state.image.bitmaps()?, name)?)
    }

    /// Changes the directory of a state that is at rest on disk.
    fn edit_bitmaps(
        &self,
        edit: impl FnOnce(&mut State, &mut Vec<BitmapRecord>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let mut state = self.write();
        state.settle()?;
        let mut records = state.image.bitmaps()?;
        edit(&mut state, &mut records)?;
        state.guard(|state| {
            clear_unknown_autoclear(&*state.store)?;
            state.switch_directory(&records)
        })
    }
}

fn no_room() -> ImageError {
    let what =
        "the header cluster has no room to add a bitmap safely; give the image a shorter backing file name";
    ImageError::Refused { what: what.to_owned() }
}

fn find<'a>(records: &'a mut [BitmapRecord], name: &[u8]) -> Result<&'a mut BitmapRecord, ImageError> {
    records.iter_mut().find(|r| r.name == name).ok_or_else(|| ImageError::NoBitmap { name: escape(name) })
}

impl State {
    /// Publishes what was written so far, and lets the bitmaps be trusted: nothing is under way any more.
    pub(super) fn settle(&mut self) -> Result<(), ImageError> {
        self.guard(|state| match state.begun {
            true => {
                state.publish()?;
                state.write_bitmaps_back()
            }
            false => Ok(()),
        })
    }

    /// Writes the bitmaps that recorded, and lets them be trusted again. The next change marks them anew.
    pub(super) fn write_bitmaps_back(&mut self) -> Result<(), ImageError> {
        self.begun = false;
        let live = std::mem::take(&mut self.bitmaps);
        if live.is_empty() {
            return Ok(());
        }
        let mut records = self.image.bitmaps()?;
        for Live { name, bits, flags } in live.0 {
            let Some(bits) = bits else { continue };
            let record = find(&mut records, &name)?;
            (record.table_offset, record.table_size) = self.store_bits(&bits)?;
            record.flags = flags.1;
        }
        self.switch_directory(&records)
    }

    /// Marks every consistent bitmap in use, and keeps its bits: the size is about to change.
    pub(super) fn suspend_bitmaps(&mut self) -> Result<LiveBitmaps, ImageError> {
        let live = LiveBitmaps::open(&self.image, true)?;
        live.mark_in_use(&*self.store)?;
        Ok(live)
    }

    /// Writes bitmaps back, for a disk of `size` bytes.
    pub(super) fn resume_bitmaps(&mut self, mut live: LiveBitmaps, size: u64) -> Result<(), ImageError> {
        live.resize(size)?;
        self.bitmaps = live;
        self.write_bitmaps_back()
    }

    /// Writes bits and their table to new clusters: where the table is, and how many entries it has.
    fn store_bits(&mut self, bits: &Bits) -> Result<(u64, u32), ImageError> {
        let g = self.shape.geometry;
        let mut table = Vec::new();
        for chunk in bits.bytes.chunks(g.cluster_bytes()) {
            let entry = if chunk.iter().all(|&b| b == 0) {
                BitmapCluster::Zeros
            } else {
                let at = g.host_offset(self.allocator.allocate()?);
                let mut whole = chunk.to_vec();
                whole.resize(g.cluster_bytes(), 0);
                self.store.write_at(at.0, &whole).map_err(ImageError::io("write a bitmap"))?;
                BitmapCluster::Data(at)
            };
            table.extend(BitmapTableEntry::new(entry).0.to_be_bytes());
        }
        let entries = u32::try_from(table.len() / 8).unwrap_or(u32::MAX);
        let at = self.allocator.allocate_contiguous(g.clusters_for(table.len() as u64).0)?;
        let at = g.host_offset(at).0;
        self.store.write_at(at, &table).map_err(ImageError::io("write a bitmap table"))?;
        Ok((at, entries))
    }

    /// Lets the header name a new directory with `records`, and gives back what only the old one led to.
    ///
    /// ```text
    /// written so far                             a crash leaves
    /// 1  counts of new tables and directory      the old bitmaps, plus leaks
    /// 2  the header's extension                  the old bitmaps or the new ones (or none, see `rewrite_bitmaps`)
    /// 3  lowered counts                          the new bitmaps, plus leaks
    /// ```
    fn switch_directory(&mut self, records: &[BitmapRecord]) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let old = self.image.bitmaps()?;
        let mut drops = Vec::new();
        for record in &old {
            if !records.iter().any(|r| r.table_offset == record.table_offset) {
                drops.extend(self.image.bitmap_clusters(record)?);
            }
        }
        let bad = ImageError::format("header", None);
        if let Some(extension) = self.image.header().bitmaps().map_err(bad)? {
            drops.extend(g.touched(HostOffset(extension.directory_offset), extension.directory_size));
        }
        let mut switch = Switch::default();
        let bad = ImageError::format("bitmap directory", None);
        let extension = if records.is_empty() {
            None
        } else {
            let bytes = BitmapRecord::encode_directory(records).map_err(bad)?;
            let size = bytes.len() as u64;
            let at = g.host_offset(self.allocator.allocate_contiguous(g.clusters_for(size).0)?);
            switch.new_tables.push(Write { offset: at, bytes });
            let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
            Some(BitmapsExtension { count, directory_size: size, directory_offset: at.0 })
        };
        publish(&*self.store, &mut self.allocator, &switch)?;
        set_bitmaps(&*self.store, extension.as_ref(), |_, _| Err(no_room()))?;
        self.release(&drops)?;
        self.reopen()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_marked_and_listed() {
        let size = 10 << 20;
        for granularity_bits in [9, 12, 16] {
            for (offset, len) in
                [(0, 1), (0, size), (4095, 2), (65536, 65536), (size - 1, 1), (1 << 20, 3 << 20)]
            {
                let mut bits = Bits::new(granularity_bits, size).unwrap();
                bits.mark(offset, len);
                let g = bits.granularity();
                let want = offset / g * g..((offset + len).div_ceil(g) * g).min(size);
                assert_eq!(bits.ranges(), [want], "{granularity_bits} {offset} {len}");
            }
        }
        let mut bits = Bits::new(16, size).unwrap();
        bits.mark(0, size);
        let cut = bits.resized(5 << 16).unwrap();
        assert_eq!(cut.ranges(), vec![Range { start: 0, end: 5 << 16 }]);
        assert_eq!(cut.resized(size).unwrap().ranges(), cut.ranges());
    }
}
