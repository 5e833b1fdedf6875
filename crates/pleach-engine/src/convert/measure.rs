//! How large a copy would be.

use std::path::Path;

use pleach_format::{BitmapRecord, Version};
use pleach_image::{Chain, Image, ImageError, Layer, Preallocation};

use super::Target;
use super::batch::{Batch, Fill};
use super::job::Job;
use crate::scan::indexed;
use crate::{Error, Result, Watch};

/// Sizes of a copy in bytes. The file and its data file together, where there is one.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Needed {
    /// What [`convert`](super::convert) makes of it, if it does not compress: the length of the file.
    pub required: u64,
    /// What it can grow to.
    pub fully_allocated: u64,
    /// What copies of the source's bitmaps would take besides; `None` if the copy cannot have any.
    pub bitmaps: Option<u64>,
}

/// The sizes of a new, empty image with a disk of `size` bytes.
///
/// # Errors
/// Options that exclude each other, or that the format does not have.
pub fn measure_empty(size: u64, target: &Target<'_>) -> Result<Needed> {
    measure(None, size, target)
}

/// The sizes of a copy of `source`. It is read as far as needed to know which clusters are zeros.
///
/// # Errors
/// As [`convert`](super::convert).
pub fn measure_source(source: &Chain, target: &Target<'_>) -> Result<Needed> {
    measure(Some(&indexed(source)?), source.size(), target)
}

fn measure(source: Option<&Chain>, size: u64, target: &Target<'_>) -> Result<Needed> {
    let image = match target {
        Target::Raw(_) => return Ok(Needed { required: size, fully_allocated: size, bitmaps: None }),
        Target::Qcow2(image) => image,
    };
    image.check()?;
    let out = Path::new("the new image");
    let wrap = |e: ImageError| Error::image(out, e);
    let mut bulk = image.bulk(size)?;
    let fully_allocated = image.largest(size)?;
    let mut fill = image.fills().then(|| Fill::new(bulk.geometry()));
    if let Some(source) = source.filter(|_| image.options.preallocation == Preallocation::Off) {
        let (look, watch) = (image.look(source, &bulk, None), Watch::new());
        let job = Job::new(image.extents(source), bulk.geometry().cluster_size(), out, &watch);
        job.run(
            Batch::default,
            |batch| batch.survey(&look),
            |batch| batch.place(&mut bulk, fill.as_mut(), &mut |_| Ok(())).map_err(wrap),
            |_| Ok(0),
        )?;
    }
    if let Some(fill) = &mut fill {
        let end = bulk.geometry().clusters_for(size).0;
        fill.up_to(end, &mut bulk, &mut |_| Ok(())).map_err(wrap)?;
    }
    let data = if image.options.data_file.is_some() { bulk.data_bytes() } else { 0 };
    let required = bulk.finish().map_err(wrap)?.len + data;
    let bitmaps = match source.and_then(|s| s.layers().first()).map(|l| &**l) {
        Some(Layer::Qcow2(top)) if image.options.version == Version::V3 => {
            Some(bitmaps(top, size, 1 << image.options.cluster_bits).map_err(wrap)?)
        }
        _ => None,
    };
    Ok(Needed { required, fully_allocated, bitmaps })
}

/// What the bitmaps of `image` take in an image of `size` bytes with clusters of `cluster` bytes: their bits, a table each,
/// and the directory. Bitmaps that nobody can use are not copied.
fn bitmaps(image: &Image, size: u64, cluster: u64) -> Result<u64, ImageError> {
    let (mut total, mut directory) = (0, 0);
    for bitmap in image.bitmaps()?.iter().filter(|b| b.flags & BitmapRecord::IN_USE == 0) {
        let bits = size.div_ceil(1 << bitmap.granularity_bits.min(63));
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        total += (clusters + (clusters * 8).div_ceil(cluster)) * cluster;
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(total + directory.next_multiple_of(cluster))
}
