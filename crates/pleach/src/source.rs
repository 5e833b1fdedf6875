//! Images that are read, opened as the command line says.

use std::path::Path;

use pleach_engine::survey::FileFormat;
use pleach_engine::{Result, Source, SourceOptions};
use pleach_store::RealDisk;

use crate::args::{PairArgs, ReadArgs};
use crate::output;

/// Opens an image, or the internal snapshot of it with this id or name; says so if nothing but a guess makes it raw.
pub(crate) fn open(
    path: &Path,
    format: Option<FileFormat>,
    snapshot: Option<&str>,
    read: &ReadArgs,
) -> Result<Source> {
    let options = SourceOptions {
        format,
        snapshot: snapshot.map(str::to_owned),
        trust: read.trust(),
        share: read.force_share,
    };
    let source = Source::open(&RealDisk, path, &options)?;
    if source.guessed_raw {
        output::warn_guessed_raw(path);
    }
    Ok(source)
}

/// Opens both images.
pub(crate) fn pair(args: &PairArgs) -> Result<[Source; 2]> {
    let first = open(&args.first, args.first_format, args.first_snapshot.as_deref(), &args.read)?;
    let second = open(&args.second, args.second_format, args.second_snapshot.as_deref(), &args.read)?;
    Ok([first, second])
}
