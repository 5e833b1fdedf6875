//! The only writer of root pointers: staged changes reach the file in the order that keeps every instant readable.

use pleach_alloc::{Allocator, Write};
use pleach_format::{
    Autoclear, BackingFile, BitmapsExtension, FormatError, HeaderChange, HostCluster, HostOffset,
    Incompatible, Version, rewrite_backing, rewrite_bitmaps, root,
};
use pleach_store::Store;

use crate::{Head, ImageError, read_head};

/// Size and L1 table as the header will name them.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct NewRoot {
    /// Virtual size in bytes.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Where the L1 table is.
    pub l1_table_offset: HostOffset,
}

/// A prepared change of one image. Nothing in it has been written; the data that its entries lead to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switch {
    /// Tables in clusters that nothing leads to yet.
    pub new_tables: Vec<Write>,
    /// Entries in tables that are in use.
    pub entries: Vec<Write>,
    /// Size and L1 table, if they change.
    pub root: Option<NewRoot>,
    /// References that are gone once the switch is durable, one element each.
    pub drops: Vec<HostCluster>,
}

impl Switch {
    /// Whether nothing would be written.
    pub fn is_empty(&self) -> bool {
        self.new_tables.is_empty() && self.entries.is_empty() && self.root.is_none()
    }
}

/// Everything that the new pointers lead to must be durable before they are written.
///
/// ```text
/// written so far                         a crash leaves
/// 1  raised counts, new blocks, tables   the old state, plus leaks
/// 2  refcount table entries              the old state, plus leaks
/// 3  refcount table pointer (header)     the old state, plus leaks
/// 4  L2 and L1 entries                   each entry old or new: both lead to durable, counted clusters
/// 5  size and L1 pointer (header)        the old root or the new one, whole, plus leaks
/// ```
/// The references that were dropped are lowered by [`release`], once the caller does not need the old state any more.
/// Entries change one at a time: the caller sees to it that any mixture of old and new ones reads right (because they
/// read the same, or because an overlay hides the difference).
///
/// # Errors
/// What the system says. After a failed barrier nothing more is written.
pub fn publish(store: &dyn Store, allocator: &mut Allocator, switch: &Switch) -> Result<(), ImageError> {
    let counts = allocator.take_writes();
    write_all(store, &counts.counts)?;
    write_all(store, &switch.new_tables)?;
    // New blocks must be durable before the table leads to them; guest data that was copied, new tables and the file's
    // length must be durable before anything leads there.
    barrier(store)?;
    if !counts.table.is_empty() {
        write_all(store, &counts.table)?;
        // A pointer must not become durable before the count of what it points to can be found.
        barrier(store)?;
    }
    if let Some(moved) = counts.moved {
        let mut sector = read_sector(store)?;
        root::set_refcount_table(&mut sector, moved.offset.0, moved.clusters);
        write_sector(store, &sector)?;
        // As above: counts of new clusters are only found through the new table.
        barrier(store)?;
    }
    if !switch.entries.is_empty() {
        write_all(store, &switch.entries)?;
        // The new root leads to these entries.
        barrier(store)?;
    }
    if let Some(new) = switch.root {
        let mut sector = read_sector(store)?;
        root::set_size_and_l1(&mut sector, new.size, new.l1_size, new.l1_table_offset.0);
        write_sector(store, &sector)?;
        // A cluster must not become free while a durable pointer still leads to it.
        barrier(store)?;
    }
    Ok(())
}

/// Lowers the counts of what a published switch dropped. A crash before or within leaves leaks.
///
/// # Errors
/// What the system says, or a count that is already 0.
pub fn release(
    store: &dyn Store,
    allocator: &mut Allocator,
    drops: &[HostCluster],
) -> Result<(), ImageError> {
    allocator.free_abandoned_tables()?;
    for &cluster in drops {
        allocator.lower(cluster)?;
    }
    let writes = allocator.take_writes();
    if writes.counts.is_empty() {
        return Ok(());
    }
    write_all(store, &writes.counts)?;
    barrier(store)
}

/// Clears the autoclear bits that nobody here knows, as a writer must before its first change; true if there were any.
///
/// # Errors
/// What the system says, or a damaged header.
pub fn clear_unknown_autoclear(store: &dyn Store) -> Result<bool, ImageError> {
    let head = read_head(store)?;
    let (known, word) = (Autoclear::KNOWN.0, head.header.autoclear().0);
    if head.header.version() == Version::V2 || word & !known == 0 {
        return Ok(false);
    }
    let mut sector = read_sector(store)?;
    root::set_autoclear(&mut sector, word & known);
    write_sector(store, &sector)?;
    // Readers that know the bit must not find it set together with what we are going to change.
    barrier(store)?;
    Ok(true)
}

/// Puts another backing file, or none, into the header. Everything that the image needs of the old one must be durable
/// in the image already.
///
/// ```text
/// written so far                    a crash leaves
/// 1  the new name, in unused bytes  the old name
/// 2  the first sector               the old name or the new one
/// ```
/// If the old and the new name cannot both be in the header cluster and the change does not fit its first sector, the
/// cluster's used bytes are handed to `record` first, as they are and as they will be, which must make them durable
/// elsewhere: a torn write is mended from there.
///
/// # Errors
/// What the system says, a damaged header, a name that does not fit; what `record` says.
pub fn set_backing<E: From<ImageError>>(
    store: &dyn Store,
    new: Option<&BackingFile>,
    record: impl FnOnce(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    change_header(store, |head| rewrite_backing(&head.bytes, &head.header, new), record)
}

/// Puts another bitmaps extension, or none, into the header, and sets or clears the autoclear bit that says that it is
/// consistent. What the new one leads to must be durable already; what the old one leads to is free afterwards.
///
/// After a crash the header has the old extension or the new one, or none that is consistent, as
/// [`rewrite_bitmaps`] says. Where moving the backing file's name in a small header cannot be done stepwise, `record` is
/// called as by [`set_backing`].
///
/// # Errors
/// As [`set_backing`].
pub fn set_bitmaps<E: From<ImageError>>(
    store: &dyn Store,
    new: Option<&BitmapsExtension>,
    record: impl FnOnce(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    change_header(store, |head| rewrite_bitmaps(&head.bytes, &head.header, new), record)
}

/// Whether a bitmaps extension, of which there is none yet, has room in the header and can be put there by steps. Nothing is
/// written.
///
/// # Errors
/// [`FormatError::HeaderFull`], as [`ImageError::Format`]; a damaged header; what the system says.
pub(crate) fn bitmaps_fit(store: &dyn Store) -> Result<bool, ImageError> {
    let head = read_head(store)?;
    let any = BitmapsExtension {
        count: 1,
        directory_size: 32,
        directory_offset: head.header.geometry().cluster_size(),
    };
    let change = rewrite_bitmaps(&head.bytes, &head.header, Some(&any));
    Ok(matches!(change.map_err(ImageError::format("header", None))?, HeaderChange::Steps(_)))
}

/// Carries out what `plan` says about the header.
fn change_header<E: From<ImageError>>(
    store: &dyn Store,
    plan: impl FnOnce(&Head) -> Result<HeaderChange, FormatError>,
    record: impl FnOnce(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let head = read_head(store)?;
    match plan(&head).map_err(ImageError::format("header", None)).map_err(E::from)? {
        HeaderChange::Steps(steps) => {
            for (at, bytes) in steps {
                write(store, at, &bytes)?;
                // Each step relies on those before it; what the old header stands for may go after the last one.
                barrier(store)?;
            }
        }
        HeaderChange::Whole { bytes } => {
            let mut old = vec![0; bytes.len()];
            store.read_at(0, &mut old).map_err(ImageError::io("read the header"))?;
            record(&old, &bytes)?;
            write(store, HostOffset(0), &bytes)?;
            barrier(store)?;
        }
    }
    Ok(())
}

/// Lets the header name another snapshot table, which is durable: one write of the first sector.
pub(crate) fn set_snapshots(store: &dyn Store, count: u32, table: HostOffset) -> Result<(), ImageError> {
    let mut sector = read_sector(store)?;
    root::set_snapshots(&mut sector, count, table.0);
    write_sector(store, &sector)?;
    // What only the old table leads to may become free afterwards.
    barrier(store)
}

/// Sets or clears a mark among the incompatible features of a version 3 image.
pub(crate) fn mark(store: &dyn Store, bit: Incompatible, set: bool) -> Result<(), ImageError> {
    let word = read_head(store)?.header.incompatible().0;
    let new = if set { word | bit.0 } else { word & !bit.0 };
    if new == word {
        return Ok(());
    }
    let mut sector = read_sector(store)?;
    root::set_incompatible(&mut sector, new);
    write_sector(store, &sector)?;
    // What the mark allows happens after it; what it excuses has ended before it is cleared.
    barrier(store)
}

fn write_all(store: &dyn Store, writes: &[Write]) -> Result<(), ImageError> {
    writes.iter().try_for_each(|w| write(store, w.offset, &w.bytes))
}

fn write(store: &dyn Store, offset: HostOffset, bytes: &[u8]) -> Result<(), ImageError> {
    store.write_at(offset.0, bytes).map_err(ImageError::io("write metadata"))
}

pub(crate) fn barrier(store: &dyn Store) -> Result<(), ImageError> {
    store.barrier().map_err(ImageError::io("flush the image"))
}

pub(crate) fn read_sector(store: &dyn Store) -> Result<[u8; 512], ImageError> {
    let mut sector = [0; 512];
    store.read_at(0, &mut sector).map_err(ImageError::io("read the header"))?;
    Ok(sector)
}

pub(crate) fn write_sector(store: &dyn Store, sector: &[u8; 512]) -> Result<(), ImageError> {
    store.write_at(0, sector).map_err(ImageError::io("write the header"))
}

#[cfg(test)]
mod tests;
