//! The image as it will be: what a repair changes lies over the file, and is kept in the order in which it will be
//! written. Nothing reaches the file.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pleach_alloc::Write;
use pleach_format::HostOffset;
use pleach_store::{LockError, Role, Sector, Stat, Store, Window, patch};

use crate::ImageError;

/// Most bytes that may lie over the file.
const MAX_CHANGES: usize = 96 << 20;

/// Writes that follow one another are joined up to about this length.
const MAX_JOINED: usize = 64 << 10;

/// When something is written. Between two stages there is a barrier; `docs/crash-safety.md` argues the order.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Autoclear bits that nobody here knows go.
    First,
    /// Pointers that lead nowhere are taken out.
    Drop,
    /// What goes into clusters that nothing leads to, and raised counts.
    Fresh,
    /// Entries of the refcount table that lead to new blocks.
    Blocks,
    /// The header's pointer to a new refcount table.
    Refcounts,
    /// The bitmaps are declared inconsistent while their directory changes.
    BitmapsOff,
    /// Entries that become valid, lead elsewhere, or lose COPIED; the snapshot table; the bitmaps extension.
    Mend,
    /// The bitmaps are consistent again.
    BitmapsOn,
    /// Lowered counts.
    Lower,
    /// COPIED flags of clusters that now have one owner.
    Own,
    /// The marks `dirty` and `corrupt` go.
    Marks,
}

#[derive(Debug)]
struct State {
    sectors: Arc<BTreeMap<u64, Sector>>,
    len: u64,
    /// Fresh clusters start here or later.
    fresh_from: u64,
    stages: BTreeMap<Stage, Vec<Write>>,
}

/// A file with changes over it.
#[derive(Debug)]
pub(crate) struct Draft {
    below: Arc<dyn Store>,
    below_len: u64,
    state: Mutex<State>,
}

impl Draft {
    pub(crate) fn new(below: Arc<dyn Store>) -> Result<Self, ImageError> {
        let below_len = below.len().map_err(ImageError::io("find the file's length"))?;
        let state = State { sectors: Arc::default(), len: below_len, fresh_from: 0, stages: BTreeMap::new() };
        Ok(Self { below, below_len, state: Mutex::new(state) })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Length of the file as it is.
    pub(crate) fn old_len(&self) -> u64 {
        self.below_len
    }

    /// Bytes that lie over the file.
    pub(crate) fn changed_bytes(&self) -> usize {
        self.state().sectors.len() * 512
    }

    /// Keeps fresh clusters out of everything before `end`, which may lie behind the end of the file.
    pub(crate) fn keep_clear(&self, end: u64) {
        let mut state = self.state();
        state.fresh_from = state.fresh_from.max(end);
    }

    /// What was at `offset` before the repair; what the repair put there, if that lies behind the end of the file.
    pub(crate) fn read_original(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset < self.below_len { self.below.read_at(offset, buf) } else { self.read_at(offset, buf) }
    }

    /// `clusters` clusters behind everything that the file has or will have, and behind what is kept clear; returns where
    /// they start.
    pub(crate) fn fresh(&self, clusters: u64, cluster_size: u64) -> Result<u64, ImageError> {
        let mut state = self.state();
        let start = state.len.max(state.fresh_from).checked_next_multiple_of(cluster_size);
        let end = start.zip(clusters.checked_mul(cluster_size)).and_then(|(s, n)| s.checked_add(n));
        match (start, end.filter(|&e| e < 1 << 56)) {
            (Some(start), Some(end)) => {
                state.len = end;
                Ok(start)
            }
            _ => Err(ImageError::CannotRepair { what: "the file is too long to be made longer".to_owned() }),
        }
    }

    /// Lets `bytes` be at `offset` from `stage` on.
    pub(crate) fn write(&self, stage: Stage, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        self.pretend(offset, bytes)?;
        // What is new has nothing to be mended before it is written.
        let stage = if offset >= self.below_len { stage.max(Stage::Fresh) } else { stage };
        let mut state = self.state();
        let writes = state.stages.entry(stage).or_default();
        match writes.last_mut() {
            // A table of which every entry changes is one write.
            Some(last)
                if last.offset.0 + last.bytes.len() as u64 == offset && last.bytes.len() < MAX_JOINED =>
            {
                last.bytes.extend_from_slice(bytes);
            }
            _ => writes.push(Write { offset: HostOffset(offset), bytes: bytes.to_vec() }),
        }
        Ok(())
    }

    /// Lets readers of the draft see `bytes` at `offset`, which will not be written.
    pub(crate) fn pretend(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (number, skip) = (at / 512, usize::try_from(at % 512).unwrap_or(0));
            let (now, later) = rest.split_at(rest.len().min(512 - skip));
            let mut sector: Sector = [0; 512];
            self.read_at(number * 512, &mut sector).map_err(ImageError::io("read the image"))?;
            if let Some(place) = sector.get_mut(skip..skip + now.len()) {
                place.copy_from_slice(now);
            }
            Arc::make_mut(&mut self.state().sectors).insert(number, sector);
            (at, rest) = (at + now.len() as u64, later);
        }
        let mut state = self.state();
        state.len = state.len.max(offset.saturating_add(bytes.len() as u64));
        if state.sectors.len() * 512 > MAX_CHANGES {
            let what = format!("more than {} MiB would have to change", MAX_CHANGES >> 20);
            return Err(ImageError::CannotRepair { what });
        }
        Ok(())
    }

    /// Everything to be written: stage by stage, in order. Nothing, if only unknown bits would be cleared.
    pub(crate) fn into_stages(self) -> Vec<Vec<Write>> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if state.stages.keys().all(|&stage| stage == Stage::First) {
            return Vec::new();
        }
        state.stages.into_values().collect()
    }
}

fn never() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "a draft is only read")
}

impl Store for Draft {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.below.read_at(offset, buf)?;
        patch(&self.state().sectors, offset, buf);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(never())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(never())
    }

    fn reserve(&self, _: Range<u64>) -> io::Result<()> {
        Err(never())
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        Err(never())
    }

    fn copy_from(&self, _: &dyn Store, _: u64, _: u64, _: u64) -> io::Result<bool> {
        Ok(false)
    }

    fn barrier(&self) -> io::Result<()> {
        Ok(())
    }

    fn window(&self) -> io::Result<Window> {
        let below = self.below.window()?;
        let state = self.state();
        Ok(Window::patched(below, Arc::clone(&state.sectors), state.len))
    }

    fn lock(&self, role: Role) -> Result<(), LockError> {
        self.below.lock(role)
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        Ok(vec![range])
    }

    fn stat(&self) -> io::Result<Stat> {
        self.below.stat()
    }
}
