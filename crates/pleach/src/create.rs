//! `pleach create`

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use pleach_engine::{Error, ErrorKind, Result};
use pleach_format::{BackingFile, RefcountWidth, Version};
use pleach_image::{CreateOptions, Image, RawImage, backing_path, create};
use pleach_store::{Access, Disk, RealDisk, Role};
use serde_json::json;

use crate::args::CreateArgs;
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
    let cluster = size::parse(&args.cluster_size).filter(|c| c.is_power_of_two());
    let cluster =
        cluster.ok_or_else(|| usage(format!("cluster size \"{}\" is no power of two", args.cluster_size)))?;
    if !args.refcount_bits.is_power_of_two() {
        return Err(usage(format!(
            "refcount bits are {}, must be 1, 2, 4, 8, 16, 32 or 64",
            args.refcount_bits
        )));
    }
    let width = RefcountWidth::new(args.refcount_bits.ilog2()).map_err(|e| usage(e.to_string()))?;
    let version = if matches!(args.compat.as_str(), "v2" | "0.10") { Version::V2 } else { Version::V3 };
    if version == Version::V2 && width != RefcountWidth::DEFAULT {
        return Err(usage(format!("refcount bits are {}, must be 16 with --compat v2", args.refcount_bits)));
    }
    let options =
        CreateOptions { size: bytes, cluster_bits: cluster.ilog2(), version, refcount_width: width, backing };
    if RealDisk.stat(&args.image).is_ok() {
        return Err(Error::new(ErrorKind::Failed, "the file is there already")
            .at(&args.image)
            .hint("create never overwrites; remove the file first, or choose another name"));
    }
    create(&RealDisk, &args.image, &options).map_err(|e| match e {
        pleach_image::ImageError::Format { source, .. } => usage(source.to_string()),
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
