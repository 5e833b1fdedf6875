//! Copies of images: a chain of any kind into one new file.
//!
//! Reading, looking for zeros and compressing run in parallel, and so does writing; in between, one thread decides where
//! everything goes, in guest order. So equal inputs give equal files for any number of threads.

mod batch;
mod bitmaps;
pub(crate) mod extents;
mod job;
mod measure;
mod sharing;
mod space;
mod write_back;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use pleach_format::NewHeader;
use pleach_image::{Bulk, Chain, CreateOptions, ImageError, Piecework, Preallocation};
use pleach_store::{Disk, NewFile, Store};

use crate::scan::indexed;
use crate::{Error, ErrorKind, Result, Watch};
use batch::{Batch, Compressors, Fill, Look, Written};
use bitmaps::Bitmaps;
use extents::Extents;
use job::Job;
use sharing::Sharing;
use write_back::WriteBack;

pub use bitmaps::BrokenBitmaps;
pub use measure::{Needed, measure_empty, measure_source};

/// Zeros shorter than this are copied to raw files.
const RAW_GRAIN: u64 = 4096;

/// What the new file is.
#[derive(Clone, Debug)]
pub enum Target<'a> {
    /// The guest's bytes, and nothing else.
    Raw(Preallocation),
    /// A qcow2 image.
    Qcow2(NewImage<'a>),
}

/// A new qcow2 image.
#[derive(Clone, Debug)]
pub struct NewImage<'a> {
    /// What it is like; the size is the source's.
    pub options: CreateOptions,
    /// Its backing files, top first: what they hold is not copied.
    pub below: Option<&'a Chain>,
    /// Compress clusters, at this level if one is said.
    pub compress: Option<Option<u32>>,
    /// Take clusters over as they are that are compressed as this image compresses, even if others are not compressed.
    pub carry: bool,
    /// Copy the persistent bitmaps of the source's top image.
    pub bitmaps: Option<BrokenBitmaps>,
}

/// What was made.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Length of the new file in bytes.
    pub file_size: u64,
    /// Bytes of guest data written, compressed ones as they are.
    pub written: u64,
    /// Of these, bytes that the file system shares with the source.
    pub cloned: u64,
}

/// Writes what `source` reads as into the new file `out`, which has its name when it is whole and durable.
///
/// Memory: four batches a thread, a batch being 256 KiB, or, where clusters of either file are larger, two of one cluster for
/// half of the threads; each with its compressed form and what lies below it; one compressor a thread; one table of each kind.
///
/// # Errors
/// A file of that name; options that exclude each other; no space; damage in the source; [`ErrorKind::Interrupted`] if
/// `watch` says stop. Nothing is left then.
pub fn convert(
    disk: &dyn Disk,
    source: &Chain,
    out: &Path,
    target: &Target<'_>,
    watch: &Watch,
) -> Result<Converted> {
    watch.expect(source.size());
    let source = &indexed(source)?;
    match target {
        Target::Raw(preallocation) => to_raw(disk, source, out, *preallocation, watch),
        Target::Qcow2(image) => {
            let below = image.below.map(indexed).transpose()?;
            to_qcow2(disk, source, out, &NewImage { below: below.as_ref(), ..image.clone() }, watch)
        }
    }
}

/// What [`convert`] would make, found out without writing anything.
///
/// # Errors
/// As [`convert`], as far as nothing has to be written to find out.
pub fn rehearse(
    disk: &dyn Disk,
    source: &Chain,
    out: &Path,
    target: &Target<'_>,
    watch: &Watch,
) -> Result<Converted> {
    watch.expect(source.size());
    let (source, size) = (&indexed(source)?, source.size());
    let cloned = AtomicU64::new(0);
    let count = |written: Written| {
        cloned.fetch_add(written.cloned, Ordering::Relaxed);
        written.bytes
    };
    let image = match target {
        Target::Raw(preallocation) => {
            let sharing = Sharing::of(disk, source, out);
            let sharing = sharing.as_ref().filter(|s| !takes_space(*preallocation) && s.fits(RAW_GRAIN));
            let job = Job::new(Extents::new(vec![source], size), RAW_GRAIN, out, watch);
            let written = job.run(
                Batch::default,
                |_| Ok(()),
                |batch| batch.place_raw(source, size, sharing).map_err(|e| Error::image(out, e)),
                |batch| {
                    batch.read(source)?;
                    batch.write(source, None).map(count)
                },
            )?;
            let cloned = cloned.into_inner();
            return Ok(Converted { virtual_size: size, file_size: size, written, cloned });
        }
        Target::Qcow2(image) => image,
    };
    image.check()?;
    let below = image.below.map(indexed).transpose()?;
    let image = &NewImage { below: below.as_ref(), ..image.clone() };
    let mut bulk = image.bulk(size)?;
    let (sharing, compressors) = (image.sharing(disk, source, out), image.compressors()?);
    let look = Look { sharing: sharing.as_ref(), ..image.look(source, &bulk, compressors.as_ref()) };
    let mut fill = image.fills().then(|| Fill::new(bulk.geometry()));
    let wrap = |e: ImageError| Error::image(out, e);
    let job = Job::new(image.extents(source), bulk.geometry().cluster_size(), out, watch);
    let written = job.run(
        Batch::default,
        |batch| batch.look(&look),
        |batch| {
            let placed = batch.place(&mut bulk, fill.as_mut(), &mut |_| Ok(()));
            placed.and_then(|()| space::most(bulk.used(), watch)).map_err(wrap)
        },
        |batch| batch.write(source, None).map(count),
    )?;
    if let Some(fill) = &mut fill {
        let end = bulk.geometry().clusters_for(size).0;
        fill.up_to(end, &mut bulk, &mut |_| Ok(())).map_err(wrap)?;
    }
    let file_size = bulk.finish().map_err(wrap)?.len;
    let cloned = cloned.into_inner();
    Ok(Converted { virtual_size: size, file_size, written, cloned })
}

fn to_raw(
    disk: &dyn Disk,
    source: &Chain,
    out: &Path,
    preallocation: Preallocation,
    watch: &Watch,
) -> Result<Converted> {
    let size = source.size();
    space::check(disk, source, out, size, takes_space(preallocation))?;
    let partial = new_file(disk, out)?;
    let store = &**partial.store();
    let io = |what: &'static str| move |e| Error::io(what, out, e);
    store.set_len(size).map_err(io("make the file as long as the disk"))?;
    preallocate(store, size, preallocation).map_err(io("reserve the space of the file"))?;
    let sharing = Sharing::of(disk, source, out);
    let sharing = sharing.as_ref().filter(|s| !takes_space(preallocation) && s.fits(RAW_GRAIN));
    let job = Job::new(Extents::new(vec![source], size), RAW_GRAIN, out, watch);
    let (back, put_out, cloned) = (WriteBack::new(store), AtomicU64::new(0), AtomicU64::new(0));
    let written = job.run(
        Batch::default,
        |_| Ok(()),
        |batch| batch.place_raw(source, size, sharing).map_err(|e| Error::image(out, e)),
        |batch| {
            batch.read(source)?;
            let written = batch.write(source, Some(store))?;
            back.wrote(batch.end());
            cloned.fetch_add(written.cloned, Ordering::Relaxed);
            space::most(put_out.fetch_add(written.bytes, Ordering::Relaxed) + written.bytes, watch)?;
            watch.hold_back(written.bytes - written.cloned);
            Ok(written.bytes)
        },
    )?;
    store.barrier().map_err(io("flush the file"))?;
    partial.publish().map_err(|e| Error::new_file(out, e))?;
    let cloned = cloned.into_inner();
    Ok(Converted { virtual_size: size, file_size: size, written, cloned })
}

fn to_qcow2(
    disk: &dyn Disk,
    source: &Chain,
    out: &Path,
    image: &NewImage<'_>,
    watch: &Watch,
) -> Result<Converted> {
    image.check()?;
    let bitmaps = Bitmaps::of(source, image)?;
    // Also says that there is no such directory.
    let budget = space::free(disk, out)?;
    let (size, mut bulk) = (source.size(), image.bulk(source.size())?);
    let unfinished = bulk.unfinished_header().map_err(option)?;
    let most = image.largest(size)?;
    if image.compress.is_none() {
        space::check(disk, source, out, most, takes_space(image.options.preallocation))?;
    }

    let partial = new_file(disk, out)?;
    let data_partial = image.options.data_file.as_ref().map(|d| new_file(disk, &d.path)).transpose()?;
    let store = &**partial.store();
    let io = |what: &'static str| move |e| Error::io(what, out, e);
    let wrap = |e: ImageError| Error::image(out, e);
    let (data_store, all) = match &data_partial {
        Some(data) => (&**data.store(), size),
        None => (store, most),
    };
    if data_partial.is_some() {
        data_store.set_len(size).map_err(io("make the data file as long as the disk"))?;
    }
    preallocate(data_store, all, image.options.preallocation).map_err(io("reserve the space of the file"))?;
    store.write_at(0, &unfinished).map_err(io("write the header"))?;

    let mut tables = |pieces: Vec<Piecework>| {
        pieces
            .iter()
            .try_for_each(|piece| store.write_at(piece.offset, &piece.bytes))
            .map_err(|source| ImageError::Io { what: "write a table", source })
    };
    let (sharing, compressors) = (image.sharing(disk, source, out), image.compressors()?);
    let look = Look { sharing: sharing.as_ref(), ..image.look(source, &bulk, compressors.as_ref()) };
    let mut fill = image.fills().then(|| Fill::new(bulk.geometry()));
    let job = Job::new(image.extents(source), bulk.geometry().cluster_size(), out, watch);
    let (back, cloned) = (WriteBack::new(data_store), AtomicU64::new(0));
    let written = job.run(
        Batch::default,
        |batch| batch.look(&look),
        |batch| {
            batch.place(&mut bulk, fill.as_mut(), &mut tables).map_err(wrap)?;
            let apart = if data_partial.is_some() { bulk.data_bytes() } else { 0 };
            space::most(bulk.used() + apart, watch).map_err(wrap)?;
            match budget {
                Some(free) if bulk.used() > free => Err(space::none(out, bulk.used(), free)),
                _ => Ok(()),
            }
        },
        |batch| {
            let written = batch.write(source, Some(data_store))?;
            back.wrote(batch.end());
            cloned.fetch_add(written.cloned, Ordering::Relaxed);
            watch.hold_back(written.bytes - written.cloned);
            Ok(written.bytes)
        },
    )?;
    if let Some(fill) = &mut fill {
        let end = bulk.geometry().clusters_for(size).0;
        fill.up_to(end, &mut bulk, &mut tables).map_err(wrap)?;
    }
    let finished = bulk.finish().map_err(wrap)?;
    tables(finished.tables).map_err(wrap)?;
    store.set_len(finished.len).map_err(io("set the length of the file"))?;
    // Everything that the header leads to must be durable before any tool may open the file.
    data_store.barrier().map_err(io("flush the guest data"))?;
    store.barrier().map_err(io("flush the file"))?;
    let mut head = finished.header;
    head.resize(head.len().max(unfinished.len()), 0);
    store.write_at(0, &head).map_err(io("write the header"))?;
    // The image must be whole before it has its name, and its data file must be there before.
    store.barrier().map_err(io("flush the header"))?;
    let mut file_size = finished.len;
    if let Some(bitmaps) = bitmaps {
        bitmaps.copy(partial.store(), out)?;
        file_size = store.len().map_err(io("find the length of the file"))?;
    }
    let published = match data_partial {
        Some(data) => NewFile::publish_both(data, partial),
        None => partial.publish(),
    };
    published.map_err(|e| Error::new_file(out, e))?;
    Ok(Converted { virtual_size: size, file_size, written, cloned: cloned.into_inner() })
}

fn new_file<'a>(disk: &'a dyn Disk, path: &Path) -> Result<NewFile<'a>> {
    NewFile::create(disk, path).map_err(|e| Error::new_file(path, e))
}

impl<'a> NewImage<'a> {
    /// Refuses options that exclude each other.
    fn check(&self) -> Result<()> {
        let both = |one: &str, other: &str| {
            Err(Error::new(ErrorKind::Usage, format!("{one} and {other} exclude each other")))
        };
        self.compressors()?;
        if self.compress.is_some() && self.options.preallocation != Preallocation::Off {
            return both("compression", "preallocation");
        }
        if self.compress.is_some() && self.options.data_file.is_some() {
            return both("compression", "an external data file");
        }
        if self.options.backing.is_some()
            && self.options.preallocation != Preallocation::Off
            && !self.options.extended_l2
        {
            return Err(Error::new(
                ErrorKind::Usage,
                "a backing file and preallocation go together with extended L2 entries only",
            ));
        }
        Ok(())
    }

    /// Compressors for all workers, if clusters are to be compressed.
    fn compressors(&self) -> Result<Option<Compressors>> {
        let new = |level| Compressors::new(self.options.compression, level);
        self.compress.map(new).transpose().map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))
    }

    /// The header for a disk of `size` bytes; where its tables are is decided later.
    fn header(&self, size: u64) -> NewHeader {
        let options = self.options.clone();
        NewHeader {
            version: options.version,
            cluster_bits: options.cluster_bits,
            size,
            refcount_width: options.refcount_width,
            backing: options.backing,
            compression: options.compression,
            extended_l2: options.extended_l2,
            lazy_refcounts: options.lazy_refcounts,
            data_file: options.data_file.map(|d| d.named),
            ..NewHeader::default()
        }
    }

    /// The layout of this image, for a disk of `size` bytes.
    fn bulk(&self, size: u64) -> Result<Bulk> {
        Bulk::new(self.header(size)).map_err(option)
    }

    /// Bytes of the image and its data file when the disk is full.
    fn largest(&self, size: u64) -> Result<u64> {
        pleach_image::measure(&self.header(size)).map(|m| m.metadata + m.disk).map_err(option)
    }

    fn look<'b>(&'b self, source: &'b Chain, bulk: &Bulk, compressors: Option<&'b Compressors>) -> Look<'b> {
        // Who asks for a level wants it everywhere; in a data file, and where all has a place, nothing is compressed.
        let plain = self.options.data_file.is_some() || self.options.preallocation != Preallocation::Off;
        let carry = self.compress.map_or(self.carry && !plain, |level| level.is_none());
        let carry = carry.then_some(self.options.compression);
        let (geometry, version) = (bulk.geometry(), self.options.version);
        Look { source, below: self.below, geometry, version, carry, compressors, sharing: None }
    }

    /// What of `source` this image, at `out`, shares with it: nothing that has to be looked at first.
    fn sharing(&self, disk: &dyn Disk, source: &Chain, out: &Path) -> Option<Sharing> {
        let apart = self.options.data_file.is_some() || self.options.preallocation != Preallocation::Off;
        let looked_at = self.compress.is_some() || self.below.is_some();
        let sharing = Sharing::of(disk, source, out).filter(|_| !apart && !looked_at);
        sharing.filter(|sharing| sharing.fits(1 << self.options.cluster_bits))
    }

    /// Where the new image may have to say something.
    fn extents<'b>(&'b self, source: &'b Chain) -> Extents<'b> {
        Extents::new([Some(source), self.below].into_iter().flatten().collect(), source.size())
    }

    /// Whether clusters without data have a place too.
    fn fills(&self) -> bool {
        self.options.preallocation != Preallocation::Off
            || self.options.data_file.as_ref().is_some_and(|d| d.named.raw)
    }
}

/// Whether all of the disk takes space.
fn takes_space(preallocation: Preallocation) -> bool {
    matches!(preallocation, Preallocation::Falloc | Preallocation::Full)
}

/// What an option that the format does not have means.
fn option(error: ImageError) -> Error {
    match error {
        ImageError::Format { source, .. } => Error::new(ErrorKind::Usage, source.to_string()),
        other => Error::new(ErrorKind::Usage, other.to_string()),
    }
}

/// Makes sure that the first `len` bytes of a new file have their space.
fn preallocate(store: &dyn Store, len: u64, preallocation: Preallocation) -> std::io::Result<()> {
    if takes_space(preallocation) {
        store.reserve(0..len)?;
    }
    if preallocation == Preallocation::Full {
        let zeros = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let part = usize::try_from(len - at).unwrap_or(usize::MAX).min(zeros.len());
            store.write_at(at, zeros.get(..part).unwrap_or(&zeros))?;
            at += part as u64;
        }
    }
    Ok(())
}
