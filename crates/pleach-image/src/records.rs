//! The snapshot table and the bitmap directory, read an entry at a time: either may have 64 MiB.

use pleach_format::{BitmapRecord, FormatError, Header, SnapshotRecord};
use pleach_store::Store;

use crate::image::check_inside;
use crate::{Image, ImageError};

/// Bytes that are read in one go, unless an entry is longer.
const PIECE: u64 = 256 << 10;

impl Image {
    /// The internal snapshots of an image whose header is known, as [`each_snapshot`](Self::each_snapshot) gives them.
    ///
    /// # Errors
    /// As [`snapshots`](Self::snapshots).
    pub fn each_snapshot_of<'a>(
        store: &'a dyn Store,
        header: &Header,
    ) -> Result<impl Iterator<Item = Result<SnapshotRecord, ImageError>> + use<'a>, ImageError> {
        snapshots(store, header)
    }

    /// The internal snapshots, in table order.
    ///
    /// # Errors
    /// A table that breaks the format or lies outside the file.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRecord>, ImageError> {
        self.each_snapshot()?.collect()
    }

    /// The internal snapshots, in table order, in memory one at a time. Nothing follows an error.
    ///
    /// # Errors
    /// As [`snapshots`](Self::snapshots).
    pub fn each_snapshot(
        &self,
    ) -> Result<impl Iterator<Item = Result<SnapshotRecord, ImageError>>, ImageError> {
        snapshots(&**self.store(), self.header())
    }

    /// The persistent bitmaps; none if the extension is not consistent (autoclear bit 0).
    ///
    /// # Errors
    /// A directory that breaks the format or lies outside the file.
    pub fn bitmaps(&self) -> Result<Vec<BitmapRecord>, ImageError> {
        self.each_bitmap()?.collect()
    }

    /// The persistent bitmaps, in order, in memory one at a time. Nothing follows an error.
    ///
    /// # Errors
    /// As [`bitmaps`](Self::bitmaps).
    pub fn each_bitmap(&self) -> Result<impl Iterator<Item = Result<BitmapRecord, ImageError>>, ImageError> {
        let bad = |source| ImageError::Format { structure: "bitmaps extension", offset: None, source };
        let extension = self.header().bitmaps().map_err(bad)?;
        let (count, offset, limit) =
            extension.map_or((0, 0, 0), |e| (e.count, e.directory_offset, e.directory_size));
        if count > 0 {
            let len = self.store().len().map_err(ImageError::io("find the file's length"))?;
            check_inside("bitmap directory", offset, limit, len, self.geometry())?;
        }
        Ok(List {
            store: &**self.store(),
            structure: "bitmap directory",
            offset,
            limit,
            parse: BitmapRecord::parse_entry,
            check: |list, _| match list.at == list.limit || list.left > 0 {
                true => Ok(()),
                false => {
                    let rule = "the entries must fill the directory exactly";
                    Err(FormatError::Invalid { field: "bitmap_directory_size", value: list.limit, rule })
                }
            },
            left: count,
            at: 0,
            skip: 0,
            buffer: Vec::new(),
        })
    }
}

fn snapshots<'a>(store: &'a dyn Store, header: &Header) -> Result<List<'a, SnapshotRecord>, ImageError> {
    let (count, offset) = (header.nb_snapshots(), header.snapshots_offset().0);
    let mut limit = 0;
    if count > 0 {
        let file = store.len().map_err(ImageError::io("find the file's length"))?;
        check_inside("snapshot table", offset, 40 * u64::from(count), file, header.geometry())?;
        // The table's length is not stored: it may go on to the end of the file.
        limit = file - offset.min(file);
    }
    Ok(List {
        store,
        structure: "snapshot table",
        offset,
        limit,
        parse: SnapshotRecord::parse_entry,
        check: |list, record| {
            let stored = record.stored_bytes as u64;
            let (value, max) = (list.at - stored.next_multiple_of(8) + stored, SnapshotRecord::MAX_TABLE);
            match value > max {
                true => Err(FormatError::OutOfRange { field: "snapshot table size", value, min: 0, max }),
                false => Ok(()),
            }
        },
        left: count,
        at: 0,
        skip: 0,
        buffer: Vec::new(),
    })
}

/// Makes an entry of bytes that start with it, and gives its length.
type Parse<T> = fn(&[u8]) -> Result<(T, usize), FormatError>;

/// Entries that follow one another, each aligned to 8 bytes.
struct List<'a, T> {
    store: &'a dyn Store,
    structure: &'static str,
    /// Where the list starts, and most bytes that it may have.
    offset: u64,
    limit: u64,
    parse: Parse<T>,
    /// Judges what an entry makes of the list, which has gone on behind it.
    check: fn(&Self, &T) -> Result<(), FormatError>,
    /// Entries to come.
    left: u32,
    /// Where the next entry starts, from the list's start, and in the buffer.
    at: u64,
    skip: usize,
    buffer: Vec<u8>,
}

impl<T> Iterator for List<'_, T> {
    type Item = Result<T, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let record = self.entry();
        if record.is_err() {
            self.left = 0;
        }
        Some(record)
    }
}

impl<T> List<'_, T> {
    fn entry(&mut self) -> Result<T, ImageError> {
        loop {
            match (self.parse)(self.buffer.get(self.skip..).unwrap_or(&[])) {
                Ok((record, len)) => {
                    let len = len.next_multiple_of(8);
                    self.skip += len;
                    self.at += len as u64;
                    return (self.check)(self, &record).map(|()| record).map_err(|source| self.bad(source));
                }
                Err(FormatError::Truncated { needed, .. }) if self.read(needed)? => {}
                Err(FormatError::Truncated { structure, needed, .. }) => {
                    let (needed, have) = (self.at.saturating_add(needed), self.limit);
                    return Err(self.bad(FormatError::Truncated { structure, needed, have }));
                }
                Err(source) => return Err(self.bad(source)),
            }
        }
    }

    fn bad(&self, source: FormatError) -> ImageError {
        ImageError::Format { structure: self.structure, offset: Some(self.offset), source }
    }

    /// Reads on, so that there are `needed` bytes; false if there are not as many.
    fn read(&mut self, needed: u64) -> Result<bool, ImageError> {
        let left = self.limit.saturating_sub(self.at);
        if needed > left {
            return Ok(false);
        }
        self.buffer.drain(..self.skip.min(self.buffer.len()));
        self.skip = 0;
        let have = self.buffer.len();
        self.buffer.resize(usize::try_from(needed.max(PIECE).min(left)).unwrap_or(usize::MAX), 0);
        let part = self.buffer.get_mut(have..).unwrap_or_default();
        self.store
            .read_at(self.offset + self.at + have as u64, part)
            .map_err(ImageError::io("read a list of snapshots or bitmaps"))?;
        Ok(true)
    }
}
