//! The way of all batches of one disk, through as many hands as there are threads.
//!
//! No hand waits for the others unless all batches are on their way: batches that were looked at before their turn lie
//! aside until they can be placed. Places are given out in guest order, so they do not depend on who came first.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use pleach_image::ImageError;

use super::batch::Batch;
use super::extents::Extents;
use crate::{Error, ErrorKind, Result, Watch};

/// Guest bytes a batch, where clusters are not larger: half of a small second-level cache, so that what was read is still
/// there when it is written.
pub(super) const BATCH: u64 = 256 << 10;
/// Batches a thread. Where clusters are larger there are half as many, and half of the threads: a compressor for clusters
/// of 2 MiB may need 30 MiB.
pub(super) const BATCHES: usize = 4;

/// What is to be gone through, and in which steps.
pub(super) struct Job<'a> {
    extents: Extents<'a>,
    /// Clusters of the new file, or what counts as one.
    grain: u64,
    batch: u64,
    out: &'a Path,
    watch: &'a Watch,
    waiting: Vec<Range<u64>>,
    shown: u64,
}

impl<'a> Job<'a> {
    pub(super) fn new(extents: Extents<'a>, grain: u64, out: &'a Path, watch: &'a Watch) -> Self {
        let batch = BATCH.max(grain).max(extents.largest_cluster());
        Self { extents, grain, batch, out, watch, waiting: Vec::new(), shown: 0 }
    }

    /// Takes all batches through `look` and `write`, many at a time, and in between through `place`, in guest order.
    /// Gives the sum of what `write` says.
    pub(super) fn run(
        self,
        new: impl Fn() -> Batch,
        look: impl Fn(&mut Batch) -> Result<(), ImageError> + Sync,
        place: impl FnMut(&mut Batch) -> Result<()> + Send,
        write: impl Fn(&mut Batch) -> Result<u64, ImageError> + Sync,
    ) -> Result<u64> {
        let out = self.out;
        let threads = rayon::current_num_threads();
        let (hands, batches) =
            if self.batch > BATCH { (threads.div_ceil(2), BATCHES / 2) } else { (threads, BATCHES) };
        let line = Mutex::new(Line {
            job: self,
            place,
            free: (0..batches * hands).map(|_| new()).collect(),
            taken: 0,
            turn: 0,
            looked: BTreeMap::new(),
            placed: Vec::new(),
            at_end: false,
            over: None,
            written: 0,
        });
        let moved = Condvar::new();
        let wrap = |e| Error::image(out, e);
        rayon::broadcast(|thread| {
            if thread.index() >= hands {
                return;
            }
            let _alarm = Alarm { line: &line, moved: &moved };
            while let Some(step) = next_step(&line, &moved) {
                match step {
                    Step::Look(turn, mut batch) => {
                        let outcome = look(&mut batch).map_err(wrap);
                        lock(&line).place(turn, outcome.map(|()| batch));
                    }
                    Step::Write(mut batch) => {
                        let outcome = write(&mut batch).map_err(wrap);
                        lock(&line).free(batch, outcome);
                    }
                }
                moved.notify_all();
            }
        });
        let line = line.into_inner().unwrap_or_else(PoisonError::into_inner);
        line.over.unwrap_or(Ok(line.written))
    }

    /// Fills `batch` with the next ranges; with nothing at the end.
    fn take(&mut self, batch: &mut Batch) -> Result<()> {
        if self.watch.should_stop() {
            return Err(Error::new(ErrorKind::Interrupted, "stopped; nothing was made").at(self.out));
        }
        if self.waiting.is_empty() {
            let next = self.extents.next(self.grain).map_err(|e| Error::image(self.out, e))?;
            self.waiting = next.unwrap_or_default();
            self.waiting.reverse();
        }
        let done = self.extents.at().saturating_sub(self.waiting.iter().map(|r| r.end - r.start).sum());
        self.watch.advance(done.saturating_sub(self.shown));
        self.shown = self.shown.max(done);
        batch.take(&mut self.waiting, self.batch);
        Ok(())
    }
}

/// Where every batch is. Those in nobody's list are in somebody's hands.
struct Line<'a, P> {
    job: Job<'a>,
    place: P,
    /// The one that was used last, which the cache may still know, is the next.
    free: Vec<Batch>,
    /// Batches that somebody took to look at.
    taken: u64,
    /// The number of the batch that is to be placed next.
    turn: u64,
    looked: BTreeMap<u64, Result<Batch>>,
    placed: Vec<Batch>,
    at_end: bool,
    /// Why nothing more is to be done.
    over: Option<Result<u64>>,
    written: u64,
}

enum Step {
    Look(u64, Batch),
    Write(Batch),
}

impl<P: FnMut(&mut Batch) -> Result<()>> Line<'_, P> {
    /// What can be done now.
    fn step(&mut self) -> Option<Step> {
        if let Some(batch) = self.placed.pop() {
            return Some(Step::Write(batch));
        }
        if self.at_end {
            return None;
        }
        let mut batch = self.free.pop()?;
        match self.job.take(&mut batch) {
            Ok(()) if batch.is_empty() => self.at_end = true,
            Ok(()) => {
                self.taken += 1;
                return Some(Step::Look(self.taken - 1, batch));
            }
            Err(error) => self.fail(error),
        }
        None
    }

    /// Whether nobody will have anything to do any more.
    fn is_over(&self) -> bool {
        self.over.is_some() || self.at_end && self.turn == self.taken && self.placed.is_empty()
    }

    /// Gives places to a batch, or notes why it has none, and to those behind it that are waiting.
    fn place(&mut self, number: u64, batch: Result<Batch>) {
        self.looked.insert(number, batch);
        while self.over.is_none()
            && let Some(batch) = self.looked.remove(&self.turn)
        {
            let placed = batch.and_then(|mut batch| (self.place)(&mut batch).map(|()| batch));
            match placed {
                Ok(batch) => self.placed.push(batch),
                Err(error) => self.fail(error),
            }
            self.turn += 1;
        }
    }

    fn free(&mut self, batch: Batch, written: Result<u64>) {
        match written {
            Ok(bytes) => self.written += bytes,
            Err(error) => self.fail(error),
        }
        self.free.push(batch);
    }

    /// The first error is the one that is told.
    fn fail(&mut self, error: Error) {
        self.over.get_or_insert(Err(error));
    }
}

/// The next thing to do, as soon as there is one; `None` if there will be none.
fn next_step<P: FnMut(&mut Batch) -> Result<()>>(line: &Mutex<Line<'_, P>>, moved: &Condvar) -> Option<Step> {
    let mut guard = lock(line);
    loop {
        if guard.is_over() {
            return None;
        }
        if let Some(step) = guard.step() {
            return Some(step);
        }
        if guard.is_over() {
            moved.notify_all();
            return None;
        }
        guard = moved.wait(guard).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock<T>(line: &Mutex<T>) -> MutexGuard<'_, T> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends everybody home if one of them panics, for nobody would wait for anything else.
struct Alarm<'l, 'a, P> {
    line: &'l Mutex<Line<'a, P>>,
    moved: &'l Condvar,
}

impl<P> Drop for Alarm<'_, '_, P> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut line = lock(self.line);
            let written = line.written;
            line.over.get_or_insert(Ok(written));
            self.moved.notify_all();
        }
    }
}
