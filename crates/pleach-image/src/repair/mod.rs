//! Repairing one image: first a plan of every byte that will change, then the writes, in an order that leaves nothing
//! worse at any instant (`docs/crash-safety.md`).
//!
//! A plan is made on a draft of the image: the file with the changes over it. Each pass mends one kind of structure
//! there, in the order in which they lead to each other, and the last one is an ordinary check of the draft. So the
//! plan knows what will still be wrong, and `check` says the same after the repair.

mod bitmaps;
mod counts;
mod draft;
mod entry;
mod links;
mod pointers;
mod roots;
mod snapshots;
#[cfg(test)]
mod tests;
mod undo;

use std::collections::BTreeMap;
use std::sync::Arc;

use pleach_alloc::Write;
use pleach_format::{Autoclear, Incompatible, Version};
use pleach_store::Store;

use crate::image::read_head;
use crate::{CheckReport, Finding, Image, ImageError, Workers, check_with};
use draft::{Draft, Stage};

pub use undo::{UndoFile, undo};

/// What may be changed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum RepairMode {
    /// Counts that are too high are lowered, where nothing can lead to the cluster.
    Leaks,
    /// Everything that can be mended.
    All,
}

/// What a repair will do. Nothing has been written.
#[derive(Clone, Debug)]
pub struct RepairPlan {
    /// What is wrong now.
    pub before: CheckReport,
    /// What `check` will say afterwards.
    pub after: CheckReport,
    /// What is changed, each with what the guest will see; also what is left, and why.
    pub actions: Vec<Finding>,
    /// Errors that will be gone. Counts that rose with the repair of something else are not among them.
    pub errors_fixed: u64,
    /// Leaks that will be gone.
    pub leaks_fixed: u64,
    stages: Vec<Vec<Write>>,
    old_len: u64,
    witnesses: Vec<(u64, u64)>,
}

impl RepairPlan {
    /// Whether nothing would be written.
    pub fn is_empty(&self) -> bool {
        self.stages.iter().all(Vec::is_empty)
    }

    /// Bytes that will be written to the image.
    pub fn bytes_written(&self) -> u64 {
        self.stages.iter().flatten().map(|w| w.bytes.len() as u64).sum()
    }

    /// The undo file for this plan, to be made durable before [`execute`](Self::execute). `store` is the image.
    ///
    /// # Errors
    /// What the system says.
    pub fn undo_file(&self, store: &dyn Store) -> Result<UndoFile, ImageError> {
        UndoFile::of(store, self.old_len, &self.stages, &self.witnesses)
    }

    /// Writes what was planned.
    ///
    /// ```text
    /// written so far                                    a crash leaves
    /// 1  pointers that lead nowhere are gone            the damage, less of it
    /// 2  new clusters; raised counts                    the same, plus leaks
    /// 3  refcount table entries of new blocks           the same
    /// 4  refcount table pointer (header)                the same; all counts are at least right
    /// 5  entries; snapshot table; bitmaps               each old or new: both lead to durable, counted clusters
    /// 6  lowered counts                                 no errors but COPIED flags that are not set
    /// 7  COPIED flags set                               no errors
    /// 8  marks (header)                                 no errors
    /// ```
    ///
    /// # Errors
    /// What the system says. After a failed barrier nothing more is written.
    pub fn execute(&self, store: &dyn Store) -> Result<(), ImageError> {
        let ends = self.stages.iter().flatten().map(|w| w.offset.0 + w.bytes.len() as u64);
        let new_len = ends.max().unwrap_or(0);
        if new_len > self.old_len
            && let Err(error) = store.reserve(self.old_len..new_len)
        {
            // Nothing has been written: without space for all of it, nothing is.
            let _ = store.set_len(self.old_len);
            return Err(ImageError::io("find space for the repair")(error));
        }
        for stage in self.stages.iter().filter(|s| !s.is_empty()) {
            for write in stage {
                store.write_at(write.offset.0, &write.bytes).map_err(ImageError::io("write metadata"))?;
            }
            // Each stage stands on the ones before it: see above.
            store.barrier().map_err(ImageError::io("flush the image"))?;
        }
        Ok(())
    }
}

/// Repairs the image in `store` at once, without a way back; for those who open an image that is marked dirty.
///
/// # Errors
/// As [`plan_repair`] and [`RepairPlan::execute`].
pub fn repair(
    store: &Arc<dyn Store>,
    mode: RepairMode,
    workers: &dyn Workers,
) -> Result<RepairPlan, ImageError> {
    let plan = plan_repair(store, mode, workers)?;
    plan.execute(&**store)?;
    Ok(plan)
}

/// The image in `store` as [`repair`] would leave it. Nothing is written.
///
/// # Errors
/// As [`plan_repair`]; what [`Image::open`] says.
pub(crate) fn as_repaired(
    store: &Arc<dyn Store>,
    mode: RepairMode,
    workers: &dyn Workers,
) -> Result<Image, ImageError> {
    let plan = plan_repair(store, mode, workers)?;
    let draft = Draft::new(Arc::clone(store))?;
    for write in plan.stages.iter().flatten() {
        draft.pretend(write.offset.0, &write.bytes)?;
    }
    Image::open(Arc::new(draft))
}

/// Finds out what a repair would do. The tables are read by `workers`.
///
/// # Errors
/// A header that does not say where the tables are, a file that cannot be read, or
/// [`ImageError::CannotRepair`] for damage that nothing can be made of.
pub fn plan_repair(
    store: &Arc<dyn Store>,
    mode: RepairMode,
    workers: &dyn Workers,
) -> Result<RepairPlan, ImageError> {
    let plan = plan_with(store, mode, workers, false)?;
    if mode == RepairMode::Leaks && plan.after.errors > plan.before.errors {
        // Beside other damage, a count that falls to 1 may leave a COPIED flag that does not fit it.
        return plan_with(store, mode, workers, true);
    }
    Ok(plan)
}

/// With `unused_only`, leaks of clusters that are in use stay.
fn plan_with(
    store: &Arc<dyn Store>,
    mode: RepairMode,
    workers: &dyn Workers,
    unused_only: bool,
) -> Result<RepairPlan, ImageError> {
    let before = first_look(store, workers)?;
    let draft = Arc::new(Draft::new(Arc::clone(store))?);
    let mut repairer = Repairer {
        draft,
        workers,
        actions: Vec::new(),
        rebuild: false,
        surplus_snapshots: false,
        written_entries: Places::default(),
        copied: 0,
        untold: 0,
    };
    forget_unknown(&mut repairer)?;
    if before.errors > 0 || before.leaks > 0 {
        match mode {
            RepairMode::Leaks => counts::lower_leaks(&mut repairer, &before, unused_only)?,
            RepairMode::All => everything(&mut repairer)?,
        }
    }
    let after = match repairer.image() {
        Ok(image) => check_with(&image, workers)?,
        Err(_) => before.clone(),
    };
    if after.errors == 0 {
        marks(&mut repairer)?;
    }
    let witnesses = if repairer.draft.changed_bytes() > 0 { undo::witnesses(&repairer)? } else { Vec::new() };
    let Repairer { draft, mut actions, untold, .. } = repairer;
    if untold > 0 {
        let message = format!("{untold} more changes, of the kinds above");
        let (code, structure) = ("more", "tables");
        actions.push(Finding { code, structure, offset: None, guest: None, message, times: untold });
    }
    let old_len = draft.old_len();
    let draft = Arc::into_inner(draft).expect("no image is open on the draft any more");
    let stages = draft.into_stages();
    let errors_fixed = before.errors.saturating_sub(after.errors);
    let leaks_fixed = before.leaks.saturating_sub(after.leaks);
    Ok(RepairPlan { before, after, actions, errors_fixed, leaks_fixed, stages, old_len, witnesses })
}

/// What a check says; where it cannot even begin because of a field that a repair sets anew, that field.
fn first_look(store: &Arc<dyn Store>, workers: &dyn Workers) -> Result<CheckReport, ImageError> {
    let error = match Image::open(Arc::clone(store)).and_then(|image| check_with(&image, workers)) {
        Ok(report) => return Ok(report),
        Err(error) => error,
    };
    if !roots::can_mend(&error) {
        return Err(error);
    }
    let mut message = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        message = format!("{message}: {source}");
    }
    let finding =
        Finding { code: "header", structure: "header", offset: Some(0), guest: None, message, times: 1 };
    Ok(CheckReport { errors: 1, findings: vec![finding], ..CheckReport::default() })
}

/// Mends what can be mended, from the header down.
fn everything(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    roots::mend(repairer)?;
    links::keep_claims_clear(repairer)?;
    let kept = snapshots::mend(repairer)?;
    let mut roles = pointers::separate_tables(repairer, kept)?;
    // Guest data that lie in a table are copied before anything in that table is mended.
    links::separate_data(repairer, &roles, false)?;
    pointers::mend_l1(repairer)?;
    pointers::mend_l2(repairer)?;
    bitmaps::mend(repairer, &mut roles)?;
    links::separate_data(repairer, &roles, true)?;
    counts::settle(repairer)?;
    counts::copied_flags(repairer)
}

/// Clears the marks of an image in which nothing is wrong.
fn marks(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let header = read_head(repairer.store())?.header;
    let word = header.incompatible().0;
    let marks = [(Incompatible::DIRTY, "dirty"), (Incompatible::CORRUPT, "corrupt")];
    let set: Vec<&str> =
        marks.iter().filter(|(bit, _)| header.incompatible().has(*bit)).map(|m| m.1).collect();
    if set.is_empty() || header.version() == Version::V2 {
        return Ok(());
    }
    let cleared = word & !(Incompatible::DIRTY.0 | Incompatible::CORRUPT.0);
    repairer.draft.write(Stage::Marks, 72, &cleared.to_be_bytes())?;
    let message = format!("the image is not marked {} any more: nothing is wrong in it", set.join(" and "));
    repairer.note("mark", "header", Some(72), None, message);
    Ok(())
}

/// A writer clears the autoclear bits that it does not know, before anything else: where nothing else is written, the
/// draft drops this too.
fn forget_unknown(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let Ok(head) = read_head(repairer.store()) else { return Ok(()) };
    let (known, word) = (Autoclear::KNOWN.0, head.header.autoclear().0);
    if head.header.version() == Version::V3 && word & !known != 0 {
        repairer.draft.write(Stage::First, 88, &(word & known).to_be_bytes())?;
    }
    Ok(())
}

/// Offsets of entries of 8 bytes: those that follow one another are kept as one range.
#[derive(Debug, Default)]
struct Places(BTreeMap<u64, u64>);

impl Places {
    fn insert(&mut self, place: u64) {
        match self.0.range_mut(..=place).next_back() {
            Some((_, end)) if *end >= place => *end = (*end).max(place + 8),
            _ => {
                self.0.insert(place, place + 8);
            }
        }
    }

    fn contains(&self, place: u64) -> bool {
        self.0.range(..=place).next_back().is_some_and(|(_, &end)| place < end)
    }
}

/// A repair that is being planned.
#[derive(Debug)]
pub(crate) struct Repairer<'a> {
    draft: Arc<Draft>,
    workers: &'a dyn Workers,
    actions: Vec<Finding>,
    /// The refcount structures must be made anew.
    rebuild: bool,
    /// There are more snapshots than may be.
    surplus_snapshots: bool,
    /// Places of entries that lead to clusters of this repair.
    written_entries: Places,
    /// Bytes that were copied to separate what was shared.
    copied: u64,
    /// Changes that were not told one by one.
    untold: u64,
}

/// Most changes that are told one by one.
const MAX_TOLD: usize = 20_000;
/// Most bytes that are copied to separate clusters that should not be shared.
const MAX_COPIED: u64 = 48 << 20;

impl Repairer<'_> {
    fn store(&self) -> &dyn Store {
        &*self.draft
    }

    /// The image as it will be, opened now.
    fn image(&self) -> Result<Image, ImageError> {
        Image::open(Arc::clone(&self.draft) as Arc<dyn Store>)
    }

    fn len(&self) -> Result<u64, ImageError> {
        self.draft.len().map_err(ImageError::io("find the file's length"))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        self.draft.read_at(offset, buf).map_err(ImageError::io("read the image"))
    }

    fn word(&self, offset: u64) -> Result<u64, ImageError> {
        let mut word = [0; 8];
        self.read(offset, &mut word)?;
        Ok(u64::from_be_bytes(word))
    }

    fn note(
        &mut self,
        code: &'static str,
        structure: &'static str,
        offset: Option<u64>,
        guest: Option<(u64, u64)>,
        message: String,
    ) {
        if self.actions.len() >= MAX_TOLD {
            self.untold += 1;
            return;
        }
        self.actions.push(Finding { code, structure, offset, guest, message, times: 1 });
    }

    /// Whether `bytes` more may be copied.
    fn can_copy(&self, bytes: u64) -> bool {
        self.copied.saturating_add(bytes) <= MAX_COPIED
    }

    /// A copy of the `len` bytes that were at `offset` before the repair in fresh clusters; returns where it is. Where a
    /// table is also data, the guest reads what the table was.
    fn copy(&mut self, offset: u64, len: u64, cluster_size: u64) -> Result<u64, ImageError> {
        let mut bytes = vec![0; usize::try_from(len.next_multiple_of(cluster_size)).unwrap_or(0)];
        let wanted = usize::try_from(len).unwrap_or(0).min(bytes.len());
        let part = bytes.get_mut(..wanted).unwrap_or(&mut []);
        self.draft.read_original(offset, part).map_err(ImageError::io("read the image"))?;
        self.place(&bytes, cluster_size)
    }

    /// `bytes`, whole clusters, in fresh clusters; returns where they are.
    fn place(&mut self, bytes: &[u8], cluster_size: u64) -> Result<u64, ImageError> {
        if !self.can_copy(bytes.len() as u64) {
            let what =
                format!("more than {} MiB are used twice and would have to be copied", MAX_COPIED >> 20);
            return Err(ImageError::CannotRepair { what });
        }
        self.copied += bytes.len() as u64;
        let at = self.draft.fresh(bytes.len() as u64 / cluster_size, cluster_size)?;
        self.draft.write(Stage::Fresh, at, bytes)?;
        Ok(at)
    }
}
