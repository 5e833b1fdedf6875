//! New, empty images.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use pleach_format::{
    BackingFile, CompressionType, DataFile, FormatError, Geometry, HostOffset, L1Entry, L2Entry, NewHeader,
    RefcountWidth, Version,
};
use pleach_store::{Disk, NewFile, Store};

use crate::ImageError;

/// What a new image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512.
    pub size: u64,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Format version.
    pub version: Version,
    /// Width of the refcounts.
    pub refcount_width: RefcountWidth,
    /// Backing file as it will be named in the header, with its format.
    pub backing: Option<BackingFile>,
    /// How compressed clusters will be compressed.
    pub compression: CompressionType,
    /// 128-bit L2 entries with subclusters.
    pub extended_l2: bool,
    /// Writers may postpone refcount updates under the dirty bit.
    pub lazy_refcounts: bool,
    /// The file for the guest data, if it is not the image.
    pub data_file: Option<NewDataFile>,
    /// What is there before anything is written.
    pub preallocation: Preallocation,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_bits: 16,
            version: Version::V3,
            refcount_width: RefcountWidth::DEFAULT,
            backing: None,
            compression: CompressionType::Deflate,
            extended_l2: false,
            lazy_refcounts: false,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }
}

/// An external data file that is created with the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDataFile {
    /// Where it is created; it must not be there yet.
    pub path: PathBuf,
    /// How the header names it. The data file of a raw one is a raw image of the disk, and all metadata is preallocated.
    pub named: DataFile,
}

/// How much of a new image is there before anything is written.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every cluster has its place; the data is a hole.
    Metadata,
    /// The same, with space reserved for the data.
    Falloc,
    /// The same, with zeros written.
    Full,
}

/// Lays out a new image in `store`, which is empty, and makes it durable. The caller gives it its name; [`create`] does
/// that for files, and also makes data files.
///
/// # Errors
/// Options that the format does not have, or what the system says.
pub fn create_in(store: &dyn Store, options: &CreateOptions) -> Result<(), ImageError> {
    let io = ImageError::io("write the new image");
    Layout::of(options)?.write(store).and_then(|()| store.barrier()).map_err(io)
}

/// Creates the image `path` and its data file, neither of which may be there yet. They appear under their names when they
/// are whole and durable, the data file first.
///
/// # Errors
/// Options that the format does not have, or what the system says (`AlreadyExists` included). Neither file is left then.
pub fn create(disk: &dyn Disk, path: &Path, options: &CreateOptions) -> Result<(), ImageError> {
    let layout = Layout::of(options)?;
    let data = options.data_file.as_ref().map(|d| d.path.as_path());
    if data.is_some_and(|data| is_same_name(disk, path, data)) {
        return Err(refused(FormatError::Excluded {
            one: "the image's name",
            other: "the same name for its data",
        }));
    }
    let new = |path: &Path| {
        let file = NewFile::create(disk, path);
        file.map_err(|source| ImageError::NewFile { path: path.to_owned(), source })
    };
    let fill = |file: &NewFile<'_>, write: &dyn Fn(&dyn Store) -> io::Result<()>| {
        write(&**file.store()).map_err(ImageError::io("write the new image"))?;
        file.store().barrier().map_err(ImageError::io("flush the new image"))
    };
    let data = data.map(new).transpose()?;
    if let Some(data) = &data {
        fill(data, &|store| layout.write_data_file(store))?;
    }
    let image = new(path)?;
    fill(&image, &|store| layout.write(store))?;
    let published = match data {
        // The image must not get its name before the file that it names.
        Some(data) => NewFile::publish_both(data, image),
        None => image.publish(),
    };
    published.map_err(|source| ImageError::NewFile { path: path.to_owned(), source })
}

/// Whether two names that nothing may have yet are the same.
fn is_same_name(disk: &dyn Disk, a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        disk.stat(dir).ok().map(|stat| (stat.id, path.file_name().map(OsString::from)))
    };
    place(a).is_some_and(|a| Some(a) == place(b))
}

fn refused(source: FormatError) -> ImageError {
    ImageError::Format { structure: "option", offset: None, source }
}

/// Bytes written at once.
const CHUNK: u64 = 1 << 20;

/// Where everything in a new image is, in this order: header, refcount table, refcount blocks, L1 table, L2 tables, data.
/// Numbers of clusters, unless they say something else.
#[derive(Debug)]
struct Layout {
    geometry: Geometry,
    width: RefcountWidth,
    preallocation: Preallocation,
    /// Bytes of the virtual disk.
    size: u64,
    header: Vec<u8>,
    refcount_table: u64,
    blocks: u64,
    l1_bytes: u64,
    l1: u64,
    /// L2 tables; 0 without preallocation.
    l2: u64,
    /// Guest data in the image; 0 without preallocation, and with a data file.
    data: u64,
    external: bool,
}

impl Layout {
    fn of(options: &CreateOptions) -> Result<Self, ImageError> {
        let preallocation = match &options.data_file {
            Some(data) if data.named.raw && options.preallocation == Preallocation::Off => {
                Preallocation::Metadata
            }
            _ => options.preallocation,
        };
        let preallocated = preallocation != Preallocation::Off;
        // What a raw data file implies is refused for the file's own reason.
        if options.preallocation != Preallocation::Off && options.backing.is_some() && !options.extended_l2 {
            let other = "a backing file without extended L2 entries";
            return Err(refused(FormatError::Excluded { one: "preallocation", other }));
        }
        let geometry = Geometry::new(options.cluster_bits, options.extended_l2).map_err(refused)?;
        let size = options.size.checked_next_multiple_of(512).filter(|&s| s <= geometry.max_disk());
        let size = size.ok_or_else(|| out_of_range("virtual size", options.size, geometry.max_disk()))?;
        let external = options.data_file.is_some();
        let l1_bytes = geometry.required_l1(size) * 8;
        let mut layout = Self {
            geometry,
            width: options.refcount_width,
            preallocation,
            size,
            header: Vec::new(),
            refcount_table: 1,
            blocks: 1,
            l1_bytes,
            l1: geometry.clusters_for(l1_bytes).0,
            l2: if preallocated { geometry.required_l1(size) } else { 0 },
            data: if preallocated && !external { geometry.clusters_for(size).0 } else { 0 },
            external,
        };
        layout.count();
        layout.header = layout.header_of(options)?;
        // What an L2 entry can lead to, in the image or in the data file.
        let reach =
            if external && preallocated { size } else { 0 }.max(layout.used() * geometry.cluster_size());
        if reach > MAX_OFFSET {
            return Err(out_of_range("size with preallocation", reach, MAX_OFFSET));
        }
        Ok(layout)
    }

    /// Makes the refcount blocks count all clusters, themselves and their table included.
    fn count(&mut self) {
        let per_block = self.width.per_block(self.geometry);
        loop {
            let blocks = self.used().div_ceil(per_block).max(self.blocks);
            let table = (blocks * 8).div_ceil(self.geometry.cluster_size()).max(self.refcount_table);
            if (blocks, table) == (self.blocks, self.refcount_table) {
                return;
            }
            (self.blocks, self.refcount_table) = (blocks, table);
        }
    }

    fn header_of(&self, options: &CreateOptions) -> Result<Vec<u8>, ImageError> {
        let header = NewHeader {
            version: options.version,
            cluster_bits: options.cluster_bits,
            size: self.size,
            refcount_width: options.refcount_width,
            refcount_table_offset: self.geometry.cluster_size(),
            refcount_table_clusters: u32::try_from(self.refcount_table).unwrap_or(u32::MAX),
            l1_table_offset: self.offset(self.l1_start()),
            backing: options.backing.clone(),
            compression: options.compression,
            extended_l2: options.extended_l2,
            lazy_refcounts: options.lazy_refcounts,
            data_file: options.data_file.as_ref().map(|d| d.named.clone()),
            in_progress: false,
        };
        header.encode().map_err(refused)
    }

    fn l1_start(&self) -> u64 {
        1 + self.refcount_table + self.blocks
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2
    }

    fn used(&self) -> u64 {
        self.data_start() + self.data
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster * self.geometry.cluster_size()
    }

    /// Length of the file: to the end of the L1 table, or of the data. A hole ends with the last subcluster that the disk
    /// needs, as qemu-img makes it; space that is taken, with the cluster.
    fn end(&self) -> u64 {
        let last = match self.preallocation {
            Preallocation::Off | Preallocation::Metadata => self.geometry.subcluster_size(),
            Preallocation::Falloc | Preallocation::Full => self.geometry.cluster_size(),
        };
        match (self.l2, self.data) {
            (0, _) => self.offset(self.l1_start()) + self.l1_bytes,
            (_, 0) => self.offset(self.data_start()),
            _ => self.offset(self.data_start()) + self.size.next_multiple_of(last),
        }
    }

    /// The header comes last: before, no tool takes the file for an image.
    fn write(&self, store: &dyn Store) -> io::Result<()> {
        let end = self.end();
        store.set_len(end)?;
        if self.l2 > 0 {
            // A full disk is noticed here, before anything is written.
            store.reserve(0..self.offset(self.data_start()))?;
            self.reserve(store, self.offset(self.data_start())..end)?;
        }
        let first_block = 1 + self.refcount_table;
        stream(store, self.offset(1), self.blocks * 8, |at, chunk| {
            pointers(chunk, |i| self.offset(first_block + at / 8 + i));
        })?;
        let (unit, used) = (self.ones(), self.used());
        stream(store, self.offset(first_block), self.offset(self.blocks), |at, chunk| {
            self.counts(unit, (at * 8) >> self.width.order(), used, chunk);
        })?;
        stream(store, self.offset(self.l1_start()), self.l2 * 8, |at, chunk| {
            pointers(chunk, |i| L1Entry::owned(HostOffset(self.offset(self.l2_start() + at / 8 + i))).0);
        })?;
        stream(store, self.offset(self.l2_start()), self.offset(self.l2), |at, chunk| {
            self.l2_entries(at, chunk)
        })?;
        self.zeros(store, self.offset(self.data_start())..end)?;
        // The header must not become durable before what it leads to.
        store.barrier()?;
        store.write_at(0, &self.header)
    }

    fn write_data_file(&self, store: &dyn Store) -> io::Result<()> {
        store.set_len(self.size)?;
        self.reserve(store, 0..self.size)?;
        self.zeros(store, 0..self.size)
    }

    fn reserve(&self, store: &dyn Store, data: std::ops::Range<u64>) -> io::Result<()> {
        match self.preallocation {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc | Preallocation::Full => store.reserve(data),
        }
    }

    fn zeros(&self, store: &dyn Store, data: std::ops::Range<u64>) -> io::Result<()> {
        match self.preallocation {
            Preallocation::Full => stream(store, data.start, data.end - data.start, |_, chunk| chunk.fill(0)),
            _ => Ok(()),
        }
    }

    /// Eight bytes of a refcount block in which every count is 1.
    fn ones(&self) -> [u8; 8] {
        let mut unit = [0; 8];
        for slot in 0..64 >> self.width.order() {
            self.width.set(&mut unit, slot, 1).expect("one unit has as many counts");
        }
        unit
    }

    /// Fills `chunk` of the refcount blocks, whose first count is that of cluster `first`: 1 for the clusters below `used`.
    fn counts(&self, unit: [u8; 8], first: u64, used: u64, chunk: &mut [u8]) {
        let per_unit = 64u64 >> self.width.order();
        for (i, bytes) in chunk.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let counted = used.saturating_sub(first + i as u64 * per_unit).min(per_unit);
            *bytes = if counted == per_unit { unit } else { [0; 8] };
            if counted < per_unit {
                for slot in 0..usize::try_from(counted).unwrap_or(0) {
                    self.width.set(bytes, slot, 1).expect("fewer than one unit");
                }
            }
        }
    }

    /// Fills `chunk` of the L2 tables, at `at` bytes behind the start of the first one. With extended entries the clusters
    /// hold nothing yet: their subcluster bitmaps are 0.
    fn l2_entries(&self, at: u64, chunk: &mut [u8]) {
        let (step, clusters) = (self.geometry.l2_entry_bytes(), self.geometry.clusters_for(self.size).0);
        let data = if self.external { 0 } else { self.data_start() };
        for (i, entry) in chunk.chunks_exact_mut(step).enumerate() {
            let guest = at / step as u64 + i as u64;
            entry.fill(0);
            if let Some((descriptor, _)) = entry.split_first_chunk_mut::<8>()
                && guest < clusters
            {
                *descriptor = L2Entry::owned(HostOffset(self.offset(data + guest))).0.to_be_bytes();
            }
        }
    }
}

/// Largest host offset that an entry holds.
const MAX_OFFSET: u64 = 1 << 56;

fn out_of_range(field: &'static str, value: u64, max: u64) -> ImageError {
    refused(FormatError::OutOfRange { field, value, min: 0, max })
}

/// Writes `len` bytes at `start`, which `fill` gives a chunk at a time: the chunk's place behind `start`, and its bytes as
/// the chunk before left them.
fn stream(store: &dyn Store, start: u64, len: u64, fill: impl Fn(u64, &mut [u8])) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(len.min(CHUNK)).unwrap_or(0)];
    let mut at = 0;
    while at < len {
        let chunk = buffer.get_mut(..usize::try_from((len - at).min(CHUNK)).unwrap_or(0)).unwrap_or_default();
        fill(at, chunk);
        store.write_at(start + at, chunk)?;
        at += chunk.len() as u64;
    }
    Ok(())
}

/// Fills `chunk` with one word for each index in it.
fn pointers(chunk: &mut [u8], word: impl Fn(u64) -> u64) {
    for (i, bytes) in chunk.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *bytes = word(i as u64).to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use pleach_store::{Access, NewFileError, RealDisk};

    use super::*;
    use crate::check;
    use crate::medium::{Medium, power_losses};
    use crate::{Image, leaked};

    /// Whatever a crash leaves: a file that is no image, or the image, whole.
    #[test]
    fn a_new_image_is_whole_as_soon_as_it_opens() {
        let cases = [
            CreateOptions { size: 1 << 20, cluster_bits: 9, ..CreateOptions::default() },
            CreateOptions {
                size: 1 << 20,
                cluster_bits: 12,
                preallocation: Preallocation::Metadata,
                ..CreateOptions::default()
            },
        ];
        for options in cases {
            let medium = Medium::new(Vec::new());
            create_in(&*medium, &options).unwrap();
            let (whole, mut opened) = (medium.bytes(), 0);
            power_losses(&[], &medium.log(), &mut |bytes, what| {
                let same = bytes == whole;
                if let Ok(image) = Image::open(Medium::new(bytes)) {
                    opened += 1;
                    assert!(same && check(&image).unwrap().errors == 0, "{options:?}: {what}");
                }
            });
            assert!(opened > 0);
        }
    }

    #[test]
    fn every_geometry_is_counted_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut n = 0;
        for version in [Version::V2, Version::V3] {
            for cluster_bits in [9, 10, 12, 16, 21] {
                for order in 0..=6 {
                    let off = [0, 1, 1 << 20, 3 << 30].map(|size| (size, Preallocation::Off));
                    let metadata = [0, 1, 513, 3 << 20].map(|size| (size, Preallocation::Metadata));
                    for (size, preallocation) in off.into_iter().chain(metadata) {
                        if version == Version::V2 && order != 4 {
                            continue;
                        }
                        n += 1;
                        let path = dir.path().join(format!("{n}"));
                        let refcount_width = RefcountWidth::new(order).unwrap();
                        let options = CreateOptions {
                            size,
                            cluster_bits,
                            version,
                            refcount_width,
                            preallocation,
                            ..CreateOptions::default()
                        };
                        create(&RealDisk, &path, &options).unwrap();
                        let image = Image::open(RealDisk.open(&path, Access::Read).unwrap()).unwrap();
                        assert_eq!(image.size(), size.next_multiple_of(512));
                        assert_eq!(leaked(&image).unwrap(), [], "{options:?}");
                    }
                }
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), n, "no partial file is left");
        let again = create(&RealDisk, &dir.path().join("1"), &CreateOptions::default());
        assert!(matches!(again, Err(ImageError::NewFile { source: NewFileError::Exists, .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), n);
    }
}
