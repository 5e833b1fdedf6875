//! `pleach convert`, `pleach flatten` and `pleach measure`

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::convert::{
    BrokenBitmaps, Converted, NewImage, Target, convert, measure_empty, measure_source, rehearse,
};
use pleach_engine::survey::FileFormat;
use pleach_engine::{Error, ErrorKind, Result, Source, SourceOptions, Watch};
use pleach_format::BackingFile;
use pleach_image::{CreateOptions, Preallocation, backing_path};
use pleach_store::{Disk, RealDisk};
use serde_json::json;

use crate::act::start_jobs;
use crate::args::{ConvertArgs, CopyArgs, FlattenArgs, MeasureArgs};
use crate::progress::Progress;
use crate::{create, output, size, source};

pub(crate) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let (made, to) = copy(args, Flatten::No)?;
    if args.copy.json {
        output::document(&json!({
            "schema": 1,
            "converted": {
                "filename": args.out.display().to_string(), "format": to.name(), "virtual_size": made.virtual_size,
                "file_size": made.file_size, "bytes_written": made.written, "bytes_cloned": made.cloned,
            },
        }));
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a copy is that of an image that is to stand alone, which stays as it is otherwise.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Flatten {
    No,
    Yes,
    /// Only what it would be.
    Foretell,
}

/// Makes the copy, or only finds out what it would be; and its format.
fn copy(args: &ConvertArgs, flatten: Flatten) -> Result<(Converted, FileFormat)> {
    let dry_run = flatten == Flatten::Foretell;
    start_jobs(args.copy.jobs.or_else(copy_threads))?;
    if args.bitmaps && dry_run {
        let text = "foretelling a copy with its bitmaps is not supported";
        return Err(Error::new(ErrorKind::Unsupported, text).at(&args.source));
    }
    if RealDisk.stat(&args.out).is_ok() {
        return Err(Error::new(ErrorKind::Failed, "the file is there already")
            .at(&args.out)
            .hint("nothing is overwritten; remove the file first, or choose another name"));
    }
    let source = open(&args.source, &args.copy)?;
    let to = args.copy.to.unwrap_or_else(|| format_of_name(&args.out));
    let backing =
        args.copy.backing.as_deref().map(|name| open_backing(&args.copy, &args.out, name)).transpose()?;
    let compress = args.compress.then_some(args.level);
    let mut target = target(&args.copy, to, &args.out, compress, backing.as_ref())?;
    if let Target::Qcow2(new) = &mut target {
        new.carry = flatten != Flatten::No;
    }
    match &mut target {
        Target::Qcow2(new) if args.bitmaps => {
            let skip = args.skip_broken_bitmaps;
            new.bitmaps = Some(if skip { BrokenBitmaps::Skip } else { BrokenBitmaps::Refuse });
        }
        Target::Raw(_) if args.bitmaps => {
            return Err(usage("--bitmaps is for qcow2 images, and the copy is raw".to_owned()));
        }
        _ => {}
    }
    if let Target::Qcow2(NewImage { options: CreateOptions { data_file: Some(data), .. }, .. }) = &target {
        create::look_at_data_file(data, &args.out)?;
    }
    let watch = Arc::new(Watch::limited(args.bandwidth).with_most_output(args.max_output));
    let progress = Progress::start(args.progress.show, &watch);
    let made = match dry_run {
        true => rehearse(&RealDisk, &source.chain, &args.out, &target, &watch),
        false => convert(&RealDisk, &source.chain, &args.out, &target, &watch),
    };
    drop(progress);
    Ok((made?, to))
}

pub(crate) fn flatten(args: &FlattenArgs) -> Result<ExitCode> {
    let convert = &args.convert;
    if convert.copy.backing.is_some() {
        return Err(usage("a copy that stands alone has no backing file; convert makes others".to_owned()));
    }
    let (made, to) = copy(convert, if args.dry_run { Flatten::Foretell } else { Flatten::Yes })?;
    if !convert.copy.json {
        let what = if args.dry_run { "would be written" } else { "written" };
        let (written, length) =
            (size::show(made.written, args.bytes), size::show(made.file_size, args.bytes));
        output::print(&format!("{}: {written} {what}, {length} long\n", output::path(&convert.out)));
        return Ok(ExitCode::SUCCESS);
    }
    output::document(&json!({
        "schema": 1,
        "plan": {
            "bytes_read": made.written, "bytes_written": made.written, "bytes_cloned": made.cloned, "bytes_freed": 0,
            "copies": [{
                "into": convert.out.display().to_string(), "content_of": convert.source.display().to_string(),
                "bytes": made.written,
            }],
            "renames": [], "unlinks": [], "rebases": [], "dependents": [], "refused": null,
            "format": to.name(), "virtual_size": made.virtual_size, "file_size": made.file_size,
        },
    }));
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn measure(args: &MeasureArgs) -> Result<ExitCode> {
    start_jobs(args.copy.jobs)?;
    let to = args.copy.to.unwrap_or(FileFormat::Qcow2);
    // A backing file name is relative to the copy's directory: there is no copy, so to the working directory.
    let nowhere = Path::new("copy");
    let backing =
        args.copy.backing.as_deref().map(|name| open_backing(&args.copy, nowhere, name)).transpose()?;
    let target = target(&args.copy, to, nowhere, None, backing.as_ref())?;
    let needed = match (&args.source, args.size) {
        (Some(path), _) => measure_source(&open(path, &args.copy)?.chain, &target)?,
        (None, Some(bytes)) => {
            let whole = bytes.checked_next_multiple_of(512).filter(|&b| i64::try_from(b).is_ok());
            measure_empty(whole.ok_or_else(|| usage(format!("size {bytes} is too large")))?, &target)?
        }
        (None, None) => return Err(usage("an image or --size is needed".to_owned())),
    };
    if args.copy.json {
        output::document(&json!({
            "schema": 1,
            "required": needed.required,
            "fully_allocated": needed.fully_allocated,
            "bitmaps": needed.bitmaps,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for (label, bytes) in [
        ("required size", Some(needed.required)),
        ("fully allocated size", Some(needed.fully_allocated)),
        ("bitmaps size", needed.bitmaps),
    ] {
        if let Some(bytes) = bytes {
            text.push_str(&format!("{label}: {}\n", size::show(bytes, args.bytes)));
        }
    }
    output::print(&text);
    Ok(ExitCode::SUCCESS)
}

fn usage(message: String) -> Error {
    Error::new(ErrorKind::Usage, message)
}

/// As many threads as there are processors, and at least eight: those that wait for the kernel leave theirs to others.
fn copy_threads() -> Option<usize> {
    std::thread::available_parallelism().ok().map(|n| n.get().max(8))
}

/// The source, which can be read to its end.
fn open(path: &Path, args: &CopyArgs) -> Result<Source> {
    let source = source::open(path, args.format, args.snapshot.as_deref(), &args.read)?;
    source.check_readable()?;
    Ok(source)
}

/// The backing file of a copy, and how its header names it.
struct Below {
    source: Source,
    named: BackingFile,
}

fn open_backing(args: &CopyArgs, out: &Path, name: &Path) -> Result<Below> {
    let bytes = name.as_os_str().as_bytes();
    let path = backing_path(out, bytes).map_err(Error::from)?;
    let options =
        SourceOptions { format: args.backing_format, trust: args.read.trust(), ..SourceOptions::default() };
    let source = Source::open(&RealDisk, &path, &options).map_err(|error| {
        if error.kind == ErrorKind::NotFound && RealDisk.stat(name).is_ok() {
            return error.hint("relative backing file names are relative to the copy's directory");
        }
        error
    })?;
    source.check_readable()?;
    let raw = args.backing_format == Some(FileFormat::Raw) || source.guessed_raw;
    let format = if raw { FileFormat::Raw } else { FileFormat::Qcow2 };
    let named = BackingFile { name: bytes.to_vec(), format: Some(format.name().as_bytes().to_vec()) };
    Ok(Below { source, named })
}

/// Raw for names that say so.
fn format_of_name(path: &Path) -> FileFormat {
    let raw = path.extension().is_some_and(|e| e == "raw" || e == "img");
    if raw { FileFormat::Raw } else { FileFormat::Qcow2 }
}

/// What the copy, which will be at `out`, is to be.
fn target<'a>(
    args: &CopyArgs,
    to: FileFormat,
    out: &Path,
    compress: Option<Option<u32>>,
    below: Option<&'a Below>,
) -> Result<Target<'a>> {
    let mut options = create::options(&args.layout, out)?;
    if to == FileFormat::Raw {
        let preallocation = std::mem::take(&mut options.preallocation);
        let only_qcow2 = [
            ("-c", compress.is_some()),
            ("-b", below.is_some()),
            ("--preallocation metadata", preallocation == Preallocation::Metadata),
            ("an option such as --cluster-size", options != CreateOptions::default()),
        ];
        if let Some((option, _)) = only_qcow2.iter().find(|(_, given)| *given) {
            return Err(usage(format!("{option} is for qcow2 images, and the copy is raw")));
        }
        return Ok(Target::Raw(preallocation));
    }
    options.backing = below.map(|b| b.named.clone());
    Ok(Target::Qcow2(NewImage {
        options,
        below: below.map(|b| &b.source.chain),
        compress,
        carry: false,
        bitmaps: None,
    }))
}
