//! Writing back while the copy goes on, so that the flush at its end finds little to do.

use std::sync::atomic::{AtomicU64, Ordering};

use pleach_store::Store;

/// Bytes after which the system is told to begin.
const STEP: u64 = 8 << 20;

/// Starts to write back what lies behind the part of a new file that has grown.
#[derive(Debug)]
pub(super) struct WriteBack<'a> {
    store: &'a dyn Store,
    /// Everything before this was started.
    started: AtomicU64,
}

impl<'a> WriteBack<'a> {
    pub(super) fn new(store: &'a dyn Store) -> Self {
        Self { store, started: AtomicU64::new(0) }
    }

    /// Something was written that ends at `end`. What others have not written yet is flushed at the end.
    pub(super) fn wrote(&self, end: u64) {
        let started = self.started.load(Ordering::Relaxed);
        if end >= started.saturating_add(STEP)
            && self.started.compare_exchange(started, end, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.store.start_writing_back(started..end);
        }
    }
}
