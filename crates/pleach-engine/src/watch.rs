//! How an operation tells of its progress, and is told to stop.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Progress in bytes, shared by all workers.
#[derive(Debug, Default)]
pub struct Watch {
    done: AtomicU64,
    total: AtomicU64,
    stop: AtomicBool,
    /// Bytes that may be put out.
    most: Option<u64>,
    /// Bytes a second, if there is a limit.
    limit: Option<u64>,
    /// Bytes that count against the limit, since the first of them.
    written: AtomicU64,
    started: OnceLock<Instant>,
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

    /// As [`new`](Self::new); work is held back so that no more than `limit` bytes a second are written.
    pub fn limited(limit: Option<u64>) -> Self {
        Self { limit: limit.filter(|limit| *limit > 0), ..Self::default() }
    }

    /// More work is known.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Work is done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes were written; returns when more may be.
    pub(crate) fn hold_back(&self, bytes: u64) {
        let Some(limit) = self.limit else { return };
        let started = *self.started.get_or_init(Instant::now);
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let due = started + Duration::from_millis(written.saturating_mul(1000) / limit);
        while !self.should_stop() {
            let early = due.saturating_duration_since(Instant::now());
            if early.is_zero() {
                return;
            }
            std::thread::sleep(early.min(Duration::from_millis(100)));
        }
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
