//! An image opened for reading and writing: guest bytes in and out, resizing, bitmaps.

mod bitmaps;
mod ops;
mod resize;
mod snapshots;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pleach_alloc::{Allocator, Census, Change, Place};
use pleach_format::{Autoclear, GuestCluster, HostCluster, HostOffset, Incompatible, Mapping};
use pleach_store::Store;

use self::bitmaps::LiveBitmaps;
pub use self::bitmaps::{Bits, WantedBitmap};
pub use self::snapshots::NewSnapshot;
use crate::cell::{Cell, Shape};
use crate::codec::Compressor;
use crate::image::Table;
use crate::packing::Packing;
use crate::recount::{Effect, change_counts};
use crate::{
    Alone, Chain, Image, ImageError, RepairMode, TableEditor, Workers, clear_unknown_autoclear, leaked_with,
    publish, release, repair,
};

/// L2 tables kept in memory before they are published on their own account.
const MOST_HELD: usize = 32 << 20;

/// What lies around an image that is opened for writing.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// The backing files, nearest first; read only.
    pub backing: Option<Chain>,
    /// The external data file, if the image has one.
    pub data_file: Option<Arc<dyn Store>>,
    /// How hard compressed writes try: 1 (fast) to 9 (small) for zlib, 1 to 19 for zstd. `None`: the codec's default.
    pub level: Option<u32>,
    /// Who reads and changes all tables, where that is to be done. `None`: the caller's thread.
    pub workers: Option<Arc<dyn Workers>>,
}

/// A qcow2 image opened for reading and writing.
///
/// Reads may run in parallel; writes come one at a time. What was written is durable after [`flush`](Self::flush), and
/// until then a crash leaves for each guest sector what it was or what it became. Counts are always on disk before
/// pointers, so a crash never leaves anything worse than leaks, lazy refcounts or not.
///
/// Call [`close`](Self::close) at the end: dropping does the same, but cannot say what went wrong.
#[derive(Debug)]
pub struct Writer {
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    store: Arc<dyn Store>,
    data: Option<Arc<dyn Store>>,
    backing: Chain,
    image: Arc<Image>,
    shape: Shape,
    /// The data file is a faithful raw image and must stay one.
    raw: bool,
    level: Option<u32>,
    workers: Arc<dyn Workers>,
    /// For compressed writes, once there was one. The mutex is there to let readers share this.
    compressor: Option<Mutex<Compressor>>,
    editor: TableEditor<Arc<Image>>,
    allocator: Allocator,
    /// Where the next compressed cluster may start.
    packing: Packing,
    /// Entries changed since the last publication.
    changed: bool,
    /// Autoclear bits are cleared and bitmaps marked: the image may change.
    begun: bool,
    bitmaps: LiveBitmaps,
    failed: bool,
    closed: bool,
}

impl Writer {
    /// Opens the image in `store`, which the caller has locked for writing. Everything that it refers to is counted
    /// first, so that nothing in use can be overwritten: an image that needs repair is refused, but one that is only marked
    /// dirty is repaired (spec: dirty bit). Without its data file,
    /// or encrypted, an image opens all the same: its bitmaps can be changed, its guest data not.
    ///
    /// # Errors
    /// As [`Image::check_writable`]; [`ImageError::Refcount`] and [`ImageError::Damaged`] for images that need repair;
    /// a data file that is missing, or given but not used.
    pub fn open(store: Arc<dyn Store>, options: WriteOptions) -> Result<Self, ImageError> {
        let workers = options.workers.unwrap_or_else(|| Arc::new(Alone));
        let mut image = Image::open(Arc::clone(&store))?;
        let marks = image.header().incompatible();
        if marks.has(Incompatible::DIRTY) && !marks.has(Incompatible::CORRUPT) {
            repair(&store, RepairMode::All, &*workers)?;
            image = Image::open(Arc::clone(&store))?;
        }
        let external = image.header().incompatible().has(Incompatible::DATA_FILE);
        let image = match options.data_file.clone() {
            Some(data) => image.with_data_file(data)?,
            None => image,
        };
        image.check_writable()?;
        leaked_with(&image, &*workers)?;
        let header = image.header();
        let shape = Shape { geometry: image.geometry(), version: header.version(), external };
        let raw = header.autoclear().has(Autoclear::RAW_DATA_FILE);
        let allocator = Allocator::load(&*store, Place::of(header))?;
        let image = Arc::new(image);
        let state = State {
            editor: TableEditor::new(Arc::clone(&image)),
            data: options.data_file,
            backing: options.backing.unwrap_or_else(|| Chain::new(Vec::new())),
            level: options.level,
            workers,
            compressor: None,
            packing: Packing::default(),
            changed: false,
            begun: false,
            bitmaps: LiveBitmaps::default(),
            failed: false,
            closed: false,
            store,
            image,
            shape,
            raw,
            allocator,
        };
        Ok(Self { state: RwLock::new(state) })
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.read().image.size()
    }

    /// Bytes a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.read().shape.geometry.cluster_size()
    }

    /// Fills `buf` with the guest bytes from `offset`; past the virtual size there are zeros.
    ///
    /// # Errors
    /// What the system says, or damage in the tables that are met.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        self.read().content(offset, buf)
    }

    /// Writes `bytes` at `offset` of the disk.
    ///
    /// # Errors
    /// [`ImageError::BeyondEnd`]; what the system says: some of the bytes may have been written then.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        self.change(offset, bytes.len() as u64, |state| state.write(offset, bytes))
    }

    /// Lets `len` bytes from `offset` read as zeros. Whole clusters cost no space; `free` gives back what they had.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, offset: u64, len: u64, free: bool) -> Result<(), ImageError> {
        self.change(offset, len, |state| state.zero(offset, len, free))
    }

    /// Says that the guest does not need `len` bytes from `offset` any more. Whole clusters read as zeros afterwards and
    /// give their space back; parts of clusters stay as they are, and so does all of a version 2 image over a backing
    /// file, which has no way to say it.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.change(offset, len, |state| state.discard(offset, len))
    }

    /// Writes one whole cluster, compressed if that makes it smaller. The last cluster of the disk may be shorter.
    ///
    /// # Errors
    /// [`ImageError::Refused`] for anything else than one whole cluster, and for a cluster that has data already
    /// (discard it first); [`ImageError::Unsupported`] with a data file.
    pub fn write_compressed(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        self.change(offset, bytes.len() as u64, |state| state.write_compressed(offset, bytes))
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// What the system says: open the image again then.
    pub fn flush(&self) -> Result<(), ImageError> {
        let mut state = self.write();
        state.guard(|state| {
            state.publish()?;
            state.barrier()
        })
    }

    /// Flushes, and writes the bitmaps back.
    ///
    /// # Errors
    /// What the system says.
    pub fn close(self) -> Result<(), ImageError> {
        self.write().close()
    }

    fn change(
        &self,
        offset: u64,
        length: u64,
        act: impl FnOnce(&mut State) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let mut state = self.write();
        let size = state.image.size();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(ImageError::BeyondEnd { offset, length, size });
        }
        if length == 0 {
            return Ok(());
        }
        state.image.check_readable()?;
        state.begin()?;
        state.bitmaps.mark(offset, length);
        act(&mut state)?;
        if state.editor.held_bytes() > MOST_HELD {
            state.guard(State::publish)?;
        }
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Whoever wants to know calls `close`.
        let _ = self.write().close();
    }
}

impl State {
    /// Fills `buf` with the guest bytes from `offset`, changes included.
    fn content(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        self.image.check_readable()?;
        let inside = self.image.size().saturating_sub(offset).min(buf.len() as u64);
        let (buf, behind) = buf.split_at_mut(usize::try_from(inside).unwrap_or(0));
        behind.fill(0);
        let table = |index| match self.editor.table(index) {
            Some(bytes) => Ok(Some(Table::Edited(bytes))),
            None => Ok(self.image.cached_table(index)?.map(Table::Shared)),
        };
        let mut rest = buf;
        self.image.pieces_in(&table, offset, inside, &mut |guest, len, mapping| {
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(usize::try_from(len).unwrap_or(0));
            rest = behind;
            match mapping {
                Mapping::Unallocated => self.backing.read_at(guest, part),
                mapping => self.image.read_piece(guest, mapping, part),
            }
        })
    }

    /// What the entry of `cluster` says.
    fn cell(&mut self, cluster: GuestCluster) -> Result<Cell, ImageError> {
        let entry = self.editor.entry(cluster)?;
        let guest = self.shape.geometry.guest_offset(cluster).0;
        self.shape.decode(entry, guest).map_err(ImageError::format("L2 entry", None))
    }

    fn set_cell(&mut self, cluster: GuestCluster, cell: Cell) -> Result<(), ImageError> {
        self.changed = true;
        self.editor.set_entry(&mut self.allocator, cluster, self.shape.encode(cell))
    }

    /// Whether the host cluster of `cell` is written by nobody else.
    fn in_place(&mut self, cell: Cell) -> bool {
        let geometry = self.shape.geometry;
        match cell.host {
            Some(at) => self.shape.external || self.allocator.count(geometry.host_cluster(at)) == 1,
            None => false,
        }
    }

    /// Room for up to `most` guest clusters from `cluster` on: where, and for how many. In the image's own file it is
    /// newly allocated.
    fn place(&mut self, cluster: GuestCluster, most: u64) -> Result<(HostOffset, u64), ImageError> {
        let geometry = self.shape.geometry;
        if self.shape.external {
            return Ok((HostOffset(geometry.guest_offset(cluster).0), most));
        }
        let (first, n) = self.allocator.allocate_run(most)?;
        Ok((geometry.host_offset(first), n))
    }

    /// Takes back what [`place`](Self::place) gave: nothing leads there.
    fn give_back(&mut self, at: HostOffset, clusters: u64) {
        if !self.shape.external {
            let first = self.shape.geometry.host_cluster(at).0;
            for cluster in first..first + clusters {
                // It was counted just before.
                let _ = self.allocator.lower(HostCluster(cluster));
            }
        }
    }

    /// Writes guest data into the file that holds them.
    fn put(&self, at: HostOffset, bytes: &[u8]) -> Result<(), ImageError> {
        let io = ImageError::io("write guest data");
        match &self.data {
            Some(data) => data.write_at(at.0, bytes).map_err(io),
            None => {
                self.store.write_at(at.0, bytes).map_err(io)?;
                self.image.grew_to(at.0 + bytes.len() as u64);
                Ok(())
            }
        }
    }

    /// What must happen once before the first change: unknown autoclear bits go, bitmaps that record are marked.
    fn begin(&mut self) -> Result<(), ImageError> {
        if self.failed {
            return Err(ImageError::Failed);
        }
        if self.begun {
            return Ok(());
        }
        self.guard(|state| {
            clear_unknown_autoclear(&*state.store)?;
            state.bitmaps = LiveBitmaps::open(&state.image, false)?;
            state.bitmaps.mark_in_use(&*state.store)?;
            state.begun = true;
            Ok(())
        })
    }

    /// Runs something after whose failure the file's state is not known.
    fn guard(&mut self, act: impl FnOnce(&mut Self) -> Result<(), ImageError>) -> Result<(), ImageError> {
        if self.failed {
            return Err(ImageError::Failed);
        }
        let done = act(self);
        self.failed = done.is_err();
        done
    }

    fn barrier(&self) -> Result<(), ImageError> {
        if let Some(data) = &self.data {
            data.barrier().map_err(ImageError::io("flush the data file"))?;
        }
        self.store.barrier().map_err(ImageError::io("flush the image"))
    }

    /// Writes the changed entries, in the order of [`publish`].
    fn publish(&mut self) -> Result<(), ImageError> {
        if self.changed { self.publish_with(None) } else { Ok(()) }
    }

    /// The same, with another virtual size.
    fn publish_with(&mut self, size: Option<u64>) -> Result<(), ImageError> {
        if let Some(data) = &self.data {
            // Data must be durable before an entry leads to them.
            data.barrier().map_err(ImageError::io("flush the data file"))?;
        }
        let len = self.store.len().map_err(ImageError::io("find the file's length"))?;
        if len % 512 != 0 {
            // The last compressed cluster is read by sectors.
            let whole = len.next_multiple_of(512);
            self.store.set_len(whole).map_err(ImageError::io("extend the file"))?;
        }
        let fresh = TableEditor::new(Arc::clone(&self.image));
        let editor = std::mem::replace(&mut self.editor, fresh);
        let switch = editor.finish(&mut self.allocator, size)?;
        publish(&*self.store, &mut self.allocator, &switch)?;
        self.changed = false;
        self.release(&switch.drops)?;
        self.reopen()
    }

    /// Gives back clusters that nothing durable leads to any more, and their space.
    fn release(&mut self, drops: &[HostCluster]) -> Result<(), ImageError> {
        release(&*self.store, &mut self.allocator, drops)?;
        if !drops.is_empty() {
            // The cluster that is being filled with compressed data may be among them.
            self.packing = Packing::default();
        }
        let freed = self.allocator.reuse();
        for run in freed.chunk_by(|a, b| a.0 + 1 == b.0) {
            let Some((first, last)) = run.first().zip(run.last()) else { continue };
            self.punch(first.0..last.0 + 1)?;
        }
        Ok(())
    }

    /// Gives the space of free clusters back.
    fn punch(&self, clusters: Range<u64>) -> Result<(), ImageError> {
        let size = self.shape.geometry.cluster_size();
        let range = clusters.start * size..clusters.end * size;
        self.store.discard(range).map_err(ImageError::io("give space back"))
    }

    /// Writes one more count for every reference of `census`, which [`may_raise`](Self::may_raise) allowed. Durable after the
    /// next barrier, and before anything else that is written.
    fn raise_all(&mut self, census: &Census) -> Result<(), ImageError> {
        self.change_all(census, Change::Raise, Effect::Write)?;
        self.reload()
    }

    /// Writes one count less for every reference of `census`, to which nothing durable leads any more, and gives the space of
    /// what becomes free back.
    fn lower_all(&mut self, census: &Census) -> Result<(), ImageError> {
        // What an abandoned refcount table took goes first: it is known to the allocator only.
        self.release(&[])?;
        let freed = self.change_all(census, Change::Lower, Effect::Write)?;
        self.barrier()?;
        self.reload()?;
        if let Some(first) = freed.first() {
            let from = self.allocator.cursor().0.min(first.start);
            self.allocator.search_from(HostCluster(from));
            self.packing = Packing::default();
        }
        freed.into_iter().try_for_each(|clusters| self.punch(clusters))
    }

    /// Refuses what [`raise_all`](Self::raise_all) could not write.
    fn may_raise(&self, census: &Census) -> Result<(), ImageError> {
        self.change_all(census, Change::Raise, Effect::Try).map(drop)
    }

    fn change_all(
        &self,
        census: &Census,
        change: Change,
        effect: Effect,
    ) -> Result<Vec<Range<u64>>, ImageError> {
        let place = Place::of(self.image.header());
        change_counts(&*self.store, place, census, change, effect, &*self.workers)
    }

    /// Takes the counts as they are in the file; where to look for free clusters stays.
    fn reload(&mut self) -> Result<(), ImageError> {
        let from = self.allocator.cursor();
        self.allocator = Allocator::load(&*self.store, Place::of(self.image.header()))?;
        self.allocator.search_from(from);
        Ok(())
    }

    fn reopen(&mut self) -> Result<(), ImageError> {
        let image = Image::open(Arc::clone(&self.store))?;
        self.image = Arc::new(match &self.data {
            Some(data) => image.with_data_file(Arc::clone(data))?,
            None => image,
        });
        self.editor = TableEditor::new(Arc::clone(&self.image));
        Ok(())
    }

    fn close(&mut self) -> Result<(), ImageError> {
        if self.closed || self.failed {
            return Ok(());
        }
        self.closed = true;
        self.guard(|state| {
            state.publish()?;
            state.write_bitmaps_back()?;
            state.barrier()
        })
    }
}

#[cfg(test)]
mod tests;
