//! The threads that read and change tables, for crates that have none.

use pleach_image::Workers;
use rayon::prelude::*;

/// The threads of this process, or of the pool that the caller is in.
#[derive(Copy, Clone, Debug, Default)]
pub struct Threads;

impl Workers for Threads {
    fn each(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..pieces).into_par_iter().for_each(work);
    }
}
