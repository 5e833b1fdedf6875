//! Small and read-only file systems, where the tests may mount them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files::WorkDir;

/// A tmpfs of a fixed size; unmounted when dropped.
pub struct TinyFs {
    // Read by `Drop` through `path`; the directory must outlive the mount.
    _place: WorkDir,
    path: PathBuf,
}

impl TinyFs {
    /// Mounts a tmpfs of `bytes`, or says why not (no root, no mount in this container) and gives `None`.
    ///
    /// # Panics
    /// If the mount point cannot be made.
    #[must_use]
    pub fn mount(bytes: u64) -> Option<Self> {
        let place = WorkDir::new("mount");
        let path = place.join("fs");
        std::fs::create_dir(&path).expect("a mount point");
        let options = format!("size={bytes},mode=0755");
        let done = mount(&["-t", "tmpfs", "-o", &options, "tmpfs"], &path);
        done.then_some(Self { _place: place, path })
    }

    /// The root of the file system.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it read-only; false if that did not work.
    #[must_use]
    pub fn make_read_only(&self) -> bool {
        mount(&["-o", "remount,ro"], &self.path)
    }

    /// Writes a file named `ballast` until no more than `left` bytes are free.
    ///
    /// # Panics
    /// If `df` cannot say how much is free, or the file cannot be written.
    pub fn fill_up_to(&self, left: u64) {
        let df = Command::new("df")
            .args(["--output=avail", "-B1"])
            .arg(&self.path)
            .output()
            .expect("df is everywhere");
        let text = String::from_utf8_lossy(&df.stdout).into_owned();
        let free: u64 =
            text.lines().last().and_then(|line| line.trim().parse().ok()).expect("df prints a number");
        let ballast = usize::try_from(free.saturating_sub(left)).expect("test file systems are small");
        std::fs::write(self.path.join("ballast"), vec![0x55; ballast])
            .expect("there is room for the ballast");
    }
}

impl Drop for TinyFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// An XFS whose files can share blocks, in a file; unmounted when dropped.
pub struct Xfs {
    // Read by `Drop` through `path`; the directory must outlive the mount.
    _place: WorkDir,
    path: PathBuf,
}

impl Xfs {
    /// Mounts a new XFS of `bytes`, which is at least 300 MiB, or says why not (no root, no mkfs.xfs) and gives `None`.
    ///
    /// # Panics
    /// If the file or the mount point cannot be made.
    #[must_use]
    pub fn mount(bytes: u64) -> Option<Self> {
        let place = WorkDir::new("xfs");
        let (file, path) = (place.join("blocks"), place.join("fs"));
        let blocks = std::fs::File::create(&file).expect("a file of blocks");
        blocks.set_len(bytes).expect("a sparse file");
        std::fs::create_dir(&path).expect("a mount point");
        match Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&file).output() {
            Ok(made) if made.status.success() => {}
            other => {
                println!("no XFS can be made here: {other:?}");
                return None;
            }
        }
        let file = file.to_string_lossy().into_owned();
        mount(&["-t", "xfs", "-o", "loop", &file], &path).then_some(Self { _place: place, path })
    }

    /// The root of the file system.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn mount(args: &[&str], path: &Path) -> bool {
    match Command::new("mount").args(args).arg(path).output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            println!("mount is not possible here: {}", String::from_utf8_lossy(&output.stderr).trim());
            false
        }
        Err(error) => {
            println!("mount is not possible here: {error}");
            false
        }
    }
}
