//! `pleach create`

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use pleach_engine::{Error, ErrorKind, Result};
use pleach_format::{BackingFile, CompressionType, DataFile, FormatError, RefcountWidth, Version};
use pleach_image::{CreateOptions, Image, NewDataFile, Preallocation, RawImage, backing_path, create};
use pleach_store::{Access, Disk, RealDisk, Role};
use serde_json::json;

use crate::args::{CreateArgs, LayoutArgs};
use crate::target::directory;
use crate::{output, size};

pub(crate) fn run(args: &CreateArgs) -> Result<ExitCode> {
    let (backing, backing_size) = match &args.backing {
        None => (None, None),
        Some(name) => {
            let (backing, size) = look_at_backing(args, name)?;
            (Some(backing), Some(size))
        }
    };
    let bytes = match (&args.size, backing_size) {
        (Some(text), _) => {
            size::parse(text).ok_or_else(|| usage(format!("size \"{text}\" is not a size such as 10G")))?
        }
        (None, Some(size)) => size,
        (None, None) => {
            return Err(usage("a size is needed, since there is no backing file to take it from".into()));
        }
    };
    let options = CreateOptions { size: bytes, backing, ..options(&args.layout, &args.image)? };
    if RealDisk.stat(&args.image).is_ok() {
        return Err(Error::new(ErrorKind::Failed, "the file is there already")
            .at(&args.image)
            .hint("create never overwrites; remove the file first, or choose another name"));
    }
    if let Some(data) = &options.data_file {
        look_at_data_file(data, &args.image)?;
    }
    create(&RealDisk, &args.image, &options).map_err(|e| match e {
        pleach_image::ImageError::Format { source, .. } => refused(&source),
        other => Error::image(&args.image, other),
    })?;
    if args.json {
        output::document(&json!({
            "schema": 1,
            "created": { "filename": args.image.display().to_string(), "virtual_size": bytes.next_multiple_of(512) },
        }));
    }
    Ok(ExitCode::SUCCESS)
}

/// What the options of a new image say, without its size and backing file.
pub(crate) fn options(args: &LayoutArgs, image: &Path) -> Result<CreateOptions> {
    if args.nocow {
        return Err(Error::new(ErrorKind::Unsupported, "nocow is not supported")
            .hint("on btrfs, chattr +C on the directory lets every new file in it have that attribute"));
    }
    let smallest = if args.extended_l2 { 16 << 10 } else { 512 };
    let cluster = size::parse(&args.cluster_size)
        .filter(|c| c.is_power_of_two() && (smallest..=2 << 20).contains(c))
        .ok_or_else(|| {
            let (least, why) =
                if args.extended_l2 { ("16k", " with extended L2 entries") } else { ("512", "") };
            let given = &args.cluster_size;
            usage(format!("cluster size is \"{given}\", must be a power of two from {least} to 2M{why}"))
        })?;
    let bits = args.refcount_bits;
    let width = Some(bits).filter(|b| b.is_power_of_two()).and_then(|b| RefcountWidth::new(b.ilog2()).ok());
    let refcount_width =
        width.ok_or_else(|| usage(format!("refcount bits are {bits}, must be 1, 2, 4, 8, 16, 32 or 64")))?;
    let version = if matches!(args.compat.as_str(), "v2" | "0.10") { Version::V2 } else { Version::V3 };
    if version == Version::V2 && refcount_width != RefcountWidth::DEFAULT {
        return Err(usage(format!("refcount bits are {bits}, must be 16 with --compat v2")));
    }
    let data_file = match &args.data_file {
        None => None,
        Some(name) => {
            let bytes = name.as_os_str().as_bytes();
            let path = backing_path(image, bytes).map_err(|_| {
                usage(format!("data file name \"{}\" is not a plain path", pleach_image::escape(bytes)))
                    .hint("a file really named a:b is called ./a:b")
            })?;
            Some(NewDataFile { path, named: DataFile { name: bytes.to_vec(), raw: args.data_file_raw } })
        }
    };
    Ok(CreateOptions {
        cluster_bits: cluster.ilog2(),
        version,
        refcount_width,
        compression: match args.compression.as_str() {
            "zstd" => CompressionType::Zstd,
            _ => CompressionType::Deflate,
        },
        extended_l2: args.extended_l2,
        lazy_refcounts: args.lazy_refcounts,
        data_file,
        preallocation: match args.preallocation.as_str() {
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            _ => Preallocation::Off,
        },
        ..CreateOptions::default()
    })
}

/// Refuses a data file that is there already, and says how QEMU will find the new one.
pub(crate) fn look_at_data_file(data: &NewDataFile, image: &Path) -> Result<()> {
    if RealDisk.stat(&data.path).is_ok() {
        return Err(Error::new(ErrorKind::Failed, "the data file is there already")
            .at(&data.path)
            .hint("create never overwrites; remove the file first, or choose another name"));
    }
    let name = Path::new(OsStr::from_bytes(&data.named.name));
    let dir = directory(image);
    let here = |dir: &Path| RealDisk.stat(dir).ok().map(|stat| stat.id);
    if name.is_relative() && here(&dir) != here(Path::new(".")) {
        output::warn(
            &Error::new(ErrorKind::Failed, "QEMU looks for a relative data file from its working directory")
                .at(name)
                .hint(format!("run QEMU in {}, or give an absolute path", dir.display())),
        );
    }
    Ok(())
}

/// Options that no image has, or not together.
pub(crate) fn refused(source: &FormatError) -> Error {
    let error = usage(source.to_string());
    match source {
        FormatError::OutOfRange { field: "size" | "virtual size" | "refcount_table_clusters", .. } => {
            error.hint("larger clusters allow for larger images")
        }
        FormatError::NeedsV3 { .. } => error.hint("leave out --compat v2"),
        _ => error,
    }
}

fn usage(message: String) -> Error {
    Error::new(ErrorKind::Usage, message)
}

/// The backing file as it was named, with its format, and its size.
fn look_at_backing(args: &CreateArgs, name: &Path) -> Result<(BackingFile, u64)> {
    let bytes = name.as_os_str().as_bytes();
    let path = backing_path(&args.image, bytes).map_err(Error::from)?;
    let store = RealDisk.open(&path, Access::Read).map_err(|e| {
        let error = Error::io("open the backing file", &path, e);
        if RealDisk.stat(name).is_ok() {
            return error.hint("relative backing file names are relative to the new image's directory");
        }
        error
    })?;
    store.lock(Role::Look).map_err(|e| Error::new(ErrorKind::InUse, e.to_string()).at(&path))?;
    let mut magic = [0; 4];
    store.read_at(0, &mut magic).map_err(|e| Error::io("read the backing file", &path, e))?;
    let found = if magic == *b"QFI\xfb" { "qcow2" } else { "raw" };
    let format = args.backing_format.as_deref().unwrap_or(found);
    let size = match format {
        "qcow2" => Image::open(store).map_err(|e| Error::image(&path, e))?.size(),
        _ => RawImage::open(store).map_err(|e| Error::image(&path, e))?.size(),
    };
    Ok((BackingFile { name: bytes.to_vec(), format: Some(format.as_bytes().to_vec()) }, size))
}
