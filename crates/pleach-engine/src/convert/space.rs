//! Whether a copy fits before it is begun.

use std::path::Path;

use pleach_image::{Chain, ImageError};
use pleach_store::Disk;

use super::RAW_GRAIN;
use super::batch::Batch;
use super::extents::Extents;
use super::job::Job;
use crate::{Error, ErrorKind, Result, Watch};

/// Bytes that may still be written where `out` will be; `None` if nobody knows.
pub(super) fn free(disk: &dyn Disk, out: &Path) -> Result<Option<u64>> {
    let dir = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk.free_space(dir).map_err(|e| Error::io("look at the directory", dir, e))
}

/// Refuses a copy of `source` that cannot fit where `out` will be: of `most` bytes, or fewer if the source has holes or,
/// being raw, zeros. `all` says that the copy takes space for holes too.
pub(super) fn check(disk: &dyn Disk, source: &Chain, out: &Path, most: u64, all: bool) -> Result<()> {
    let Some(free) = free(disk, out)?.filter(|&free| free < most) else { return Ok(()) };
    if all {
        return Err(none(out, most, free));
    }
    let wrap = |e| Error::image(out, e);
    // Raw files may hold zeros, and no more than they take. A small image can claim any amount of data: one look too many.
    let claims = source.layers().iter().any(|l| l.image().is_some());
    let (mut extents, mut data) = (Extents::new(vec![source], source.size()), 0);
    while let Some(ranges) = extents.next(RAW_GRAIN).map_err(wrap)? {
        data += ranges.iter().map(|r| r.end - r.start).sum::<u64>();
        if claims && data > free {
            return Err(none(out, data, free));
        }
    }
    if data <= free {
        return Ok(());
    }
    let watch = Watch::new();
    let (mut counted, job) = (0, Job::new(Extents::new(vec![source], source.size()), RAW_GRAIN, out, &watch));
    job.run(
        Batch::default,
        |batch| batch.read(source),
        |batch| {
            counted += batch.nonzero_bytes();
            if counted > free { Err(none(out, counted, free)) } else { Ok(()) }
        },
        |_| Ok(0),
    )?;
    Ok(())
}

/// Refuses to go on once more is put out than was allowed.
pub(super) fn most(bytes: u64, watch: &Watch) -> Result<(), ImageError> {
    match watch.most_output() {
        Some(most) if bytes > most => {
            let what =
                format!("the copy needs {bytes} bytes and more, and {most} were allowed (--max-output)");
            Err(ImageError::Refused { what })
        }
        _ => Ok(()),
    }
}

/// The error for a file that does not fit.
pub(super) fn none(out: &Path, needed: u64, free: u64) -> Error {
    let text = format!("the new file needs {needed} bytes and more, and {free} are free there");
    Error::new(ErrorKind::Failed, text)
        .at(out)
        .hint("free some space on that file system, or choose another one")
}
