//! Hand-made images for tests that know every cluster: created, filled and stacked by stock tools.

use std::path::{Path, PathBuf};

use crate::oracle::{Format, qemu_img_in, qemu_io};

/// How to create an image; the rest is qemu-img's default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layer<'a> {
    /// Bytes the guest sees.
    pub size: u64,
    /// Name of the backing file as stored, and its format.
    pub backing: Option<(&'a str, Format)>,
    /// Further `-o` options, `a=b,c=d`.
    pub options: &'a str,
}

/// Creates a qcow2 image at `path` and runs qemu-io commands on it.
///
/// # Panics
/// If a tool fails.
pub fn qcow2<S: AsRef<str>>(path: &Path, layer: Layer<'_>, commands: &[S]) {
    let (dir, name) = place(path);
    let size = layer.size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !layer.options.is_empty() {
        args.extend(["-o", layer.options]);
    }
    if let Some((backing, format)) = layer.backing {
        args.extend(["-b", backing, "-F", format.name()]);
    }
    args.extend([name.as_str(), size.as_str()]);
    qemu_img_in(&dir, &args);
    qemu_io(path, Format::Qcow2, commands);
}

/// Creates a raw image at `path` and runs qemu-io commands on it.
///
/// # Panics
/// If a tool fails.
pub fn raw<S: AsRef<str>>(path: &Path, size: u64, commands: &[S]) {
    let (dir, name) = place(path);
    qemu_img_in(&dir, &["create", "-q", "-f", "raw", &name, &size.to_string()]);
    qemu_io(path, Format::Raw, commands);
}

/// One qemu-io command that fills `count` clusters of `cluster` bytes from cluster `first` on.
#[must_use]
pub fn fill(pattern: u8, first: u64, count: u64, cluster: u64) -> String {
    format!("write -q -P {pattern} {} {}", first * cluster, count * cluster)
}

/// Directory and file name of `path`.
fn place(path: &Path) -> (PathBuf, String) {
    let dir = path.parent().expect("test images lie in a directory").to_path_buf();
    let name = path.file_name().expect("test images have a name").to_string_lossy().into_owned();
    (dir, name)
}
