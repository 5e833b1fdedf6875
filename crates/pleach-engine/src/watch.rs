//! How an operation tells of its progress, and is told to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Progress in bytes, shared by all workers.
#[derive(Debug, Default)]
pub struct Watch {
    done: AtomicU64,
    total: AtomicU64,
    stop: AtomicBool,
    /// Bytes that may be put out.
    most: Option<u64>,
}

impl Watch {
    /// Nothing done, nothing to do.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, of an operation that fails rather than put out more than this many bytes: a small image can claim any
    /// amount of data. A copy keeps to it.
    #[must_use]
    pub fn with_most_output(self, bytes: Option<u64>) -> Self {
        Self { most: bytes, ..self }
    }

    /// Bytes that may be put out; `None`: as many as fit.
    pub(crate) fn most_output(&self) -> Option<u64> {
        self.most
    }

    /// More work is known.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Work is done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes done, bytes in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Asks the operation to stop after the step it is in.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it should stop.
    pub fn should_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
