//! What becomes of the persistent bitmaps of files that become one.
//!
//! A bitmap says what has changed since some instant, as far as it was asked. Of a run of files, each over the next, it may
//! lie in several: each part says what was written while its file was the active one. So those of one name belong
//! together, and where a file above the lowest of them has none of that name, all that the file holds may have been
//! written since. A bitmap may say too much, never too little.

use std::collections::BTreeSet;
use std::path::Path;

use pleach_format::{BitmapRecord, BitmapsExtension, Header, HeaderChange, rewrite_backing, rewrite_bitmaps};
use pleach_image::{Bits, Image, ImageError, WantedBitmap, WriteOptions, Writer, escape};
use pleach_plan::Cover;
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// What becomes of bitmaps when files become one.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapPolicy {
    /// Those of one name become one that marks what any of them does, and what was written where there was none.
    #[default]
    Merge,
    /// Those of the uppermost file stay as they are; the others go.
    KeepTop,
    /// All of them go.
    Drop,
}

/// How the bitmaps of a file change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapChange {
    /// What comes to be, or becomes another.
    pub put: Vec<WantedBitmap>,
    /// Names of those that go.
    pub gone: Vec<Vec<u8>>,
}

/// A file of a run, as far as bitmaps are concerned.
pub(crate) struct Recorded<'a> {
    pub(crate) path: &'a Path,
    /// `None` for a raw file, which has no bitmaps.
    pub(crate) image: Option<&'a Image>,
    /// What it holds.
    pub(crate) cover: Cover,
}

/// The records of one file, in order.
type Records = Vec<BitmapRecord>;

impl Recorded<'_> {
    fn records(&self) -> Result<Records> {
        match self.image {
            None => Ok(Vec::new()),
            Some(image) => image.bitmaps().map_err(|e| Error::image(self.path, e)),
        }
    }

    /// The bits of a bitmap, and whether it records; `None` for one that nobody may trust, or only somebody else knows.
    fn bits(&self, records: &Records, name: &[u8]) -> Result<Option<(Bits, bool)>> {
        let found = records.iter().find(|r| r.name == name);
        let Some((image, record)) = self.image.zip(found) else { return Ok(None) };
        match image.bitmap_bits(record) {
            Ok(bits) => Ok(Some((bits, record.flags & BitmapRecord::AUTO != 0))),
            Err(ImageError::Refused { .. }) => Ok(None),
            Err(error) => Err(Error::image(self.path, error)),
        }
    }
}

impl BitmapChange {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.put.is_empty() && self.gone.is_empty()
    }

    /// What the file `holder` of `run`, top first, gets when it holds what all of them do, for a disk of `size` bytes.
    ///
    /// # Errors
    /// A damaged bitmap; [`ErrorKind::Unsupported`] where the file cannot hold what it should.
    pub(crate) fn of(policy: BitmapPolicy, run: &[Recorded<'_>], holder: usize, size: u64) -> Result<Self> {
        let all: Vec<Records> = run.iter().map(Recorded::records).collect::<Result<_>>()?;
        let Some((file, own)) = run.get(holder).zip(all.get(holder)) else { return Ok(Self::default()) };
        let mut change = match policy {
            BitmapPolicy::Merge => Self::merged(run, &all, holder, size)?,
            BitmapPolicy::KeepTop if holder == 0 => Self::default(),
            BitmapPolicy::KeepTop => {
                let top = run.get(..1).unwrap_or(run);
                let put = Self::merged(top, &all, usize::MAX, size)?.put;
                let kept = |r: &&BitmapRecord| put.iter().all(|wanted| wanted.name != r.name);
                let gone = own.iter().filter(kept).map(|r| r.name.clone()).collect();
                Self { put, gone }
            }
            BitmapPolicy::Drop => {
                Self { put: Vec::new(), gone: own.iter().map(|r| r.name.clone()).collect() }
            }
        };
        let Some(image) = file.image else {
            change.gone.clear();
            // What the uppermost file has stays in it, or was refused before.
            let between = all.iter().skip(1).flatten().next();
            return match between.filter(|_| policy == BitmapPolicy::Merge) {
                Some(bitmap) => Err(no_room(file.path, bitmap, "a raw file has no place for")),
                None => Ok(Self::default()),
            };
        };
        if image.header().version() == pleach_format::Version::V2
            && let Some(record) = all.iter().flatten().find(|_| !change.put.is_empty())
        {
            return Err(no_room(file.path, record, "a version 2 image has no place for"));
        }
        Ok(change)
    }

    fn merged(run: &[Recorded<'_>], all: &[Records], holder: usize, size: u64) -> Result<Self> {
        let has = |records: &Records, name: &[u8]| records.iter().any(|r| r.name == name);
        let names: BTreeSet<&[u8]> =
            all.iter().take(run.len()).flatten().map(|r| r.name.as_slice()).collect();
        let mut put = Vec::new();
        for name in names {
            let parts =
                run.iter().zip(all).map(|(file, r)| file.bits(r, name)).collect::<Result<Vec<_>>>()?;
            let own = parts.get(holder).and_then(Option::as_ref);
            if own.is_none() && all.get(holder).is_some_and(|records| has(records, name)) {
                // It stays what it is: nobody trusts it.
                continue;
            }
            let Some((first, enabled)) = parts.iter().flatten().next() else { continue };
            let granularity = own.map_or(first, |(bits, _)| bits).granularity();
            let new = Bits::new(granularity.trailing_zeros(), size);
            let mut bits = new.map_err(|e| Error::image(run.first().map_or(Path::new(""), |f| f.path), e))?;
            let lowest = all.iter().take(run.len()).rposition(|records| has(records, name)).unwrap_or(0);
            for (file, part) in run.iter().zip(&parts).take(lowest + 1) {
                let mut mark = |start: u64, end: u64| {
                    if start < end.min(size) {
                        bits.mark(start, end.min(size) - start);
                    }
                };
                match part {
                    Some((part, _)) => {
                        part.ranges().iter().for_each(|range| mark(range.start, range.end));
                        mark(part.size(), size);
                    }
                    None => file.cover.says().for_each(|(range, _)| mark(range.start, range.end)),
                }
            }
            let wanted = WantedBitmap { name: name.to_vec(), enabled: *enabled, bits };
            if own.is_none_or(|(old, on)| *old != wanted.bits || *on != wanted.enabled) {
                put.push(wanted);
            }
        }
        Ok(Self { put, gone: Vec::new() })
    }

    /// Refuses a header in which there is no room for them, or not for the backing file's name besides.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub(crate) fn must_fit(
        &self,
        path: &Path,
        image: &Image,
        backing: Option<&pleach_format::BackingFile>,
    ) -> Result<()> {
        let head = image.head();
        if self.put.is_empty() || head.header.bitmaps().is_ok_and(|b| b.is_some()) {
            return Ok(());
        }
        let directory = image.geometry().cluster_size();
        let extension = BitmapsExtension { count: 1, directory_size: 32, directory_offset: directory };
        let fits = || {
            let change = rewrite_bitmaps(&head.bytes, &head.header, Some(&extension)).ok()?;
            let HeaderChange::Steps(steps) = change else { return None };
            let mut bytes = head.bytes.clone();
            for (at, step) in steps {
                let at = usize::try_from(at.0).ok()?;
                bytes.resize(bytes.len().max(at + step.len()), 0);
                bytes.get_mut(at..at + step.len())?.copy_from_slice(&step);
            }
            let header = Header::parse(&bytes).ok()?;
            rewrite_backing(&bytes, &header, backing).ok()
        };
        match fits() {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::Unsupported, "its header has no room for bitmaps")
                .at(path)
                .hint("let the bitmaps of the other files go: --bitmaps keep-top")),
        }
    }

    /// Changes the bitmaps of `image`, whose file nobody else writes.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn apply(&self, path: &Path, image: &Image) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let wrap = |e| Error::image(path, e);
        let store = std::sync::Arc::clone(image.store());
        let writer = Writer::open(std::sync::Arc::clone(&store), WriteOptions::default()).map_err(wrap)?;
        writer.put_bitmaps(&self.put, &self.gone).and_then(|()| writer.close()).map_err(wrap)?;
        let cluster = image.geometry().cluster_size();
        let len = store.len().map_err(|e| Error::io("find the length of", path, e))?;
        if !len.is_multiple_of(cluster) {
            let whole = len.next_multiple_of(cluster);
            store.set_len(whole).map_err(|e| Error::io("set the length of", path, e))?;
        }
        Ok(())
    }
}

fn no_room(path: &Path, record: &BitmapRecord, text: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{text} the bitmap \"{}\" of the files above", escape(&record.name)),
    )
    .at(path)
    .hint("remove the bitmap, or let all of them go: --bitmaps drop")
}
