//! Work in pieces, for whoever has threads: this crate starts none.

use std::fmt::Debug;
use std::sync::{Mutex, PoisonError};

/// Somebody who does pieces of work, several at once if they can.
pub trait Workers: Debug + Send + Sync {
    /// Calls `work` with each number below `pieces`, once, in any order.
    fn each(&self, pieces: usize, work: &(dyn Fn(usize) + Sync));
}

/// One piece after the other, on the caller's thread.
#[derive(Copy, Clone, Debug, Default)]
pub struct Alone;

impl Workers for Alone {
    fn each(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..pieces).for_each(work);
    }
}

/// What `work` makes of each number below `pieces`, in order.
pub(crate) fn collect<T: Send>(
    workers: &dyn Workers,
    pieces: usize,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let slots: Vec<Mutex<Option<T>>> = (0..pieces).map(|_| Mutex::new(None)).collect();
    workers.each(pieces, &|i| {
        let done = work(i);
        if let Some(slot) = slots.get(i) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        }
    });
    slots.into_iter().filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

/// Bytes of tables that make one piece of work.
const PIECE_BYTES: usize = 1 << 20;

/// How many tables of `bytes` bytes make one piece.
pub(crate) fn tables_a_piece(bytes: usize) -> usize {
    (PIECE_BYTES / bytes.max(1)).max(1)
}
