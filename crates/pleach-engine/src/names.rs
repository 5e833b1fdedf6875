//! Naming one file from another's directory.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use pleach_format::BackingFile;
use pleach_store::Disk;

use crate::journal::directory_of;
use crate::survey::FileFormat;
use crate::{Error, Result};

/// The name that means, from directory `to`, what `name` means from directory `from`. Absolute names stay as they are,
/// relative ones stay relative.
///
/// # Errors
/// A directory that cannot be found.
pub(crate) fn express(disk: &dyn Disk, name: &[u8], from: &Path, to: &Path) -> Result<Vec<u8>> {
    if name.starts_with(b"/") {
        return Ok(name.to_vec());
    }
    let real = |dir: &Path| disk.canonical(dir).map_err(|e| Error::io("find the directory", dir, e));
    let (from, to) = (real(from)?, real(to)?);
    if from == to {
        return Ok(name.to_vec());
    }
    let target = from.join(OsStr::from_bytes(name));
    let target = match (target.parent(), target.file_name()) {
        (Some(dir), Some(file)) => real(dir)?.join(file),
        _ => target,
    };
    Ok(relative(&target, &to).as_os_str().as_bytes().to_vec())
}

/// The absolute path that `name` means from directory `from`.
///
/// # Errors
/// A directory that cannot be found.
pub(crate) fn absolute(disk: &dyn Disk, from: &Path, name: &[u8]) -> Result<Vec<u8>> {
    let dir = disk.canonical(from).map_err(|e| Error::io("find the directory", from, e))?;
    Ok(dir.join(OsStr::from_bytes(name)).as_os_str().as_bytes().to_vec())
}

/// The backing file of the image at `image`, which named `old`, when it is to be the file at `file`: absolute or relative
/// as the old name was.
///
/// # Errors
/// A directory that cannot be found.
pub(crate) fn renamed(
    disk: &dyn Disk,
    image: &Path,
    old: Option<&BackingFile>,
    file: &Path,
    format: FileFormat,
) -> Result<BackingFile> {
    let (here, there) = (directory_of(image), directory_of(file));
    let base = file.file_name().unwrap_or_default().as_encoded_bytes();
    let name = match old {
        Some(old) if old.name.starts_with(b"/") => absolute(disk, &there, base)?,
        _ => express(disk, base, &there, &here)?,
    };
    Ok(BackingFile { name, format: Some(format.name().as_bytes().to_vec()) })
}

/// The way from directory `to` to `target`; both absolute and without links or `..`.
fn relative(target: &Path, to: &Path) -> PathBuf {
    let common = target.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = to.components().skip(common).map(|_| Component::ParentDir);
    up.chain(target.components().skip(common)).collect()
}

#[cfg(test)]
mod tests {
    use pleach_store::RealDisk;

    use super::*;

    #[test]
    fn names_stay_relative_or_absolute() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("x/b"));
        std::fs::create_dir_all(&a).unwrap();
        std::fs::create_dir_all(&b).unwrap();
        let express = |name: &str, from: &Path, to: &Path| {
            String::from_utf8(express(&RealDisk, name.as_bytes(), from, to).unwrap()).unwrap()
        };
        assert_eq!(express("base.raw", &a, &a), "base.raw");
        assert_eq!(express("./base.raw", &a, &a), "./base.raw");
        assert_eq!(express("base.raw", &a, &b), "../../a/base.raw");
        assert_eq!(express("../x/b/base.raw", &a, &b), "base.raw");
        assert_eq!(express("/abs/base.raw", &a, &b), "/abs/base.raw");
    }
}
