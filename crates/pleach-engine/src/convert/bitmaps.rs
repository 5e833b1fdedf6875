//! Persistent bitmaps of the source, in the copy.

use std::path::Path;
use std::sync::Arc;

use pleach_format::{BitmapRecord, Version};
use pleach_image::{Chain, Image, WriteOptions, Writer, escape};
use pleach_store::Store;

use super::NewImage;
use crate::{Error, ErrorKind, Result};

/// What becomes of bitmaps that were not written back, and so do not know every write.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum BrokenBitmaps {
    /// Nothing is copied.
    Refuse,
    /// They are left out.
    Skip,
}

/// The bitmaps that are to be copied, and the image that has them.
pub(super) struct Bitmaps<'a> {
    image: &'a Image,
    records: Vec<BitmapRecord>,
}

impl<'a> Bitmaps<'a> {
    /// Those of the top of `source`, if they are asked for.
    ///
    /// # Errors
    /// A source or a copy that cannot have any; one that nobody may use.
    pub(super) fn of(source: &'a Chain, new: &NewImage<'_>) -> Result<Option<Self>> {
        let Some(broken) = new.bitmaps else { return Ok(None) };
        if new.options.version == Version::V2 {
            return Err(Error::new(ErrorKind::Usage, "version 2 images have no bitmaps")
                .hint("leave out --compat v2, or --bitmaps"));
        }
        let at = |error: Error| source.paths().iter().take(1).fold(error, |error, path| error.at(path));
        let Some(image) = source.layers().first().and_then(|l| l.image()) else {
            return Err(at(Error::new(ErrorKind::Unsupported, "bitmaps of a raw image are not supported")));
        };
        if image.snapshot().is_some() {
            let text = "the bitmaps are those of the active state, and a snapshot is copied";
            return Err(at(Error::new(ErrorKind::Usage, text)));
        }
        let mut records =
            image.bitmaps().map_err(|e| at(Error::new(ErrorKind::Corrupt, e.to_string()).caused(e)))?;
        let in_use = |r: &BitmapRecord| r.flags & BitmapRecord::IN_USE != 0;
        if let (Some(record), BrokenBitmaps::Refuse) = (records.iter().find(|r| in_use(r)), broken) {
            let text = format!(
                "bitmap \"{}\" was not written back: it does not know every write",
                escape(&record.name)
            );
            return Err(at(Error::new(ErrorKind::Failed, text))
                .hint("--skip-broken-bitmaps leaves it out; pleach bitmap remove removes it"));
        }
        records.retain(|r| !in_use(r));
        Ok(Some(Self { image, records }))
    }

    /// Adds them to the copy in `store`, which is whole.
    ///
    /// # Errors
    /// Bits that cannot be read; what the system says.
    pub(super) fn copy(&self, store: &Arc<dyn Store>, out: &Path) -> Result<()> {
        if self.records.is_empty() {
            return Ok(());
        }
        let wrap = |e| Error::image(out, e);
        let writer = Writer::open(Arc::clone(store), WriteOptions::default()).map_err(wrap)?;
        for record in &self.records {
            let bits = self.image.bitmap_bits(record).map_err(wrap)?;
            writer
                .add_bitmap(&record.name, Some(bits.granularity()), record.flags & BitmapRecord::AUTO != 0)
                .and_then(|()| writer.merge_bitmap(&record.name, &bits))
                .map_err(wrap)?;
        }
        writer.close().map_err(wrap)
    }
}
