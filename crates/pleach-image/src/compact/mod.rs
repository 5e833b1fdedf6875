//! Giving space back where a file lies: what nothing leads to goes, what lies behind moves down into free clusters, the rest
//! of the file is cut. Snapshots, bitmaps and compressed clusters stay what they are.

mod layout;
mod moves;
mod plan;
#[cfg(test)]
mod tests;
mod zeroes;

use std::sync::Arc;

use pleach_alloc::{Allocator, Census, Discrepancy, Place};
use pleach_format::Incompatible;
use pleach_store::Store;

use self::layout::Layout;
use self::moves::{Done, Mover};
use self::plan::Plan;
use self::zeroes::Zeroes;
use crate::publish::barrier;
use crate::recount::{copied_fits, fit_copied};
use crate::repair::as_repaired;
use crate::{Image, ImageError, RepairMode, Workers, clear_unknown_autoclear, leaked_with, repair};

/// What a compaction does besides.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct CompactOptions {
    /// Guest data that are zeros, in whole clusters, become entries that say so.
    pub zeroes: bool,
}

/// What a compaction does, or did.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Length of the file before, in bytes.
    pub before: u64,
    /// Length of the file afterwards, in bytes.
    pub after: u64,
    /// Clusters that were counted too often.
    pub leaked: u64,
    /// Whether COPIED flags did not fit the counts: they are set right.
    pub flags: bool,
    /// Clusters that entries can do without: of zeros, if they are looked for, and of entries that say zeros anyway.
    pub zeroed: u64,
    /// Bytes that are copied to other places in the file.
    pub moved: u64,
}

/// Whoever is told how far a compaction is, and may stop it.
pub trait Steps: Sync {
    /// So many bytes will be moved.
    fn expect(&self, bytes: u64);
    /// So many bytes more were moved.
    fn advance(&self, bytes: u64);
    /// Whether to stop: the image is whole then, and compacting it again goes on.
    fn stop(&self) -> bool;
}

/// What compacting `image` would do; one that is marked dirty is taken as its repair would leave it. Reads tables only,
/// unless zeros are looked for.
///
/// # Errors
/// As [`leaked_with`]; [`ImageError::NeedsRepair`]; [`ImageError::Refused`] for a cluster with two uses;
/// [`ImageError::Unsupported`] for encryption.
pub fn plan_compact(
    image: &Image,
    options: CompactOptions,
    workers: &dyn Workers,
) -> Result<Compaction, ImageError> {
    let before = image.file_len();
    let repaired =
        left_dirty(image).then(|| as_repaired(image.store(), RepairMode::All, workers)).transpose()?;
    let image = repaired.as_ref().unwrap_or(image);
    image.check_writable()?;
    let leaks = leaked_with(image, workers)?;
    let flags = !copied_fits(image, workers)?;
    let zeroes = Zeroes::find(image, options.zeroes, workers)?;
    let plans = Plan::all(Layout::of(image, &zeroes, workers)?, image.file_len());
    Ok(Compaction { before, ..summary(image, &leaks, flags, &zeroes, &plans) })
}

fn summary(image: &Image, leaks: &[Discrepancy], flags: bool, zeroes: &Zeroes, plans: &[Plan]) -> Compaction {
    let size = image.geometry().cluster_size();
    Compaction {
        before: image.file_len(),
        after: plans.iter().fold(image.file_len(), |len, plan| plan.length(size, len)),
        leaked: leaks.len() as u64,
        flags,
        zeroed: zeroes.count(),
        moved: plans.iter().map(|plan| plan.copied(size) * size).sum(),
    }
}

/// Whether somebody stopped writing half-way, which is mended before anything else.
fn left_dirty(image: &Image) -> bool {
    let marks = image.header().incompatible();
    marks.has(Incompatible::DIRTY) && !marks.has(Incompatible::CORRUPT)
}

/// Compacts the image in `store`, which the caller has locked for writing; one that is marked dirty is repaired first. At
/// every instant other tools read all its states as they are; a crash leaves nothing worse than leaks. `None` if it was
/// stopped.
///
/// # Errors
/// As [`plan_compact`]; what the system says.
pub fn compact(
    store: &Arc<dyn Store>,
    options: CompactOptions,
    workers: &dyn Workers,
    steps: &dyn Steps,
) -> Result<Option<Compaction>, ImageError> {
    let mut image = Image::open(Arc::clone(store))?;
    let before = image.file_len();
    if left_dirty(&image) {
        repair(store, RepairMode::All, workers)?;
        image = Image::open(Arc::clone(store))?;
    }
    image.check_writable()?;
    let leaks = leaked_with(&image, workers)?;
    let flags = !copied_fits(&image, workers)?;
    let zeroes = Zeroes::find(&image, options.zeroes, workers)?;
    let plans = Plan::all(Layout::of(&image, &zeroes, workers)?, image.file_len());
    let done = Compaction { before, ..summary(&image, &leaks, flags, &zeroes, &plans) };
    clear_unknown_autoclear(&**store)?;
    steps.expect(done.moved);
    let mover = Mover { store, workers, steps };
    give_back(&mover, &image, &leaks)?;
    if zeroes.count() > 0 {
        let gone = zeroes.write(&image, workers)?;
        barrier(&**store)?;
        mover.lower(&gone)?;
    }
    // Lowered counts ask for flags, too.
    if (flags || !leaks.is_empty() || zeroes.count() > 0) && fit_copied(&image, workers)? {
        barrier(&**store)?;
    }
    drop((leaks, zeroes, image));
    for (i, plan) in plans.into_iter().enumerate() {
        // What is foreseen of later plans is how far they get; where things really are, only the file says.
        let plan =
            if i == 0 { plan } else { Plan::of(&Layout::of(&mover.image()?, &Zeroes::default(), workers)?) };
        if mover.run(&plan)? == Done::Stopped {
            return Ok(None);
        }
    }
    Ok(Some(done))
}

/// Lowers counts to the number of references.
fn give_back(mover: &Mover<'_>, image: &Image, leaks: &[Discrepancy]) -> Result<(), ImageError> {
    if leaks.is_empty() {
        return Ok(());
    }
    let store = &**mover.store;
    let mut allocator = Allocator::load(store, Place::of(image.header()))?;
    let mut census = Census::new();
    for leak in leaks {
        match u32::try_from(leak.stored - leak.references) {
            Ok(by) => census.add(leak.cluster, by.into()),
            // More than a census holds: one too many is left for it.
            Err(_) => {
                allocator.set_count(leak.cluster, leak.references + 1)?;
                census.add(leak.cluster, 1);
            }
        }
    }
    for write in allocator.take_writes().counts {
        store.write_at(write.offset.0, &write.bytes).map_err(ImageError::io("write refcounts"))?;
    }
    mover.lower(&census)
}
