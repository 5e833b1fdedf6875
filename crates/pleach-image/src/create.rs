//! New, empty images.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use pleach_format::{BackingFile, FormatError, Geometry, NewHeader, RefcountWidth, Version};
use pleach_store::{Disk, Store};

use crate::ImageError;

/// What a new image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512.
    pub size: u64,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Format version.
    pub version: Version,
    /// Width of the refcounts.
    pub refcount_width: RefcountWidth,
    /// Backing file as it will be named in the header, with its format.
    pub backing: Option<BackingFile>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_bits: 16,
            version: Version::V3,
            refcount_width: RefcountWidth::DEFAULT,
            backing: None,
        }
    }
}

/// Creates the image `path`, which must not be there yet. It appears under its name when it is whole and durable.
///
/// # Errors
/// Options that the format does not have, or what the system says (`AlreadyExists` included).
pub fn create(disk: &dyn Disk, path: &Path, options: &CreateOptions) -> Result<(), ImageError> {
    let layout = Layout::of(options)?;
    let partial = partial_name(path);
    let made = write_new(disk, &partial, &layout)
        .and_then(|()| disk.link(&partial, path).map_err(ImageError::io("give the new image its name")));
    // Whether or not the image has its name now, the other one goes.
    let removed = disk.unlink(&partial).map_err(ImageError::io("remove the partial file"));
    made.and(removed)?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk.sync_dir(dir).map_err(ImageError::io("flush the directory"))
}

/// `.NAME.partial` beside `path`.
fn partial_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".partial");
    path.with_file_name(name)
}

fn write_new(disk: &dyn Disk, path: &Path, layout: &Layout) -> Result<(), ImageError> {
    let io = |what| ImageError::io(what);
    if disk.stat(path).is_ok() {
        disk.unlink(path).map_err(io("remove an old partial file"))?;
    }
    let store = disk.create_new(path).map_err(io("create the file"))?;
    layout.write(&*store).map_err(io("write the new image"))?;
    store.barrier().map_err(io("flush the new image"))
}

/// Where everything in a new image is: header, refcount table, refcount blocks, L1 table.
#[derive(Debug)]
struct Layout {
    geometry: Geometry,
    width: RefcountWidth,
    header: Vec<u8>,
    table_clusters: u64,
    blocks: u64,
    l1_bytes: u64,
    used: u64,
}

impl Layout {
    fn of(options: &CreateOptions) -> Result<Self, ImageError> {
        let bad = |source| ImageError::Format { structure: "option", offset: None, source };
        let geometry = Geometry::new(options.cluster_bits, false).map_err(bad)?;
        let size = options.size.checked_next_multiple_of(512).filter(|&s| i64::try_from(s).is_ok()).ok_or(
            bad(FormatError::OutOfRange { field: "size", value: options.size, min: 0, max: i64::MAX as u64 }),
        )?;
        let (cluster, per_block) = (geometry.cluster_size(), options.refcount_width.per_block(geometry));
        let l1_bytes = geometry.required_l1(size) * 8;
        let l1_clusters = l1_bytes.div_ceil(cluster);
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let used = 1 + table_clusters + blocks + l1_clusters;
            let (want_blocks, want_table) = (used.div_ceil(per_block), blocks.div_ceil(cluster / 8));
            if want_blocks <= blocks && want_table <= table_clusters {
                break;
            }
            (blocks, table_clusters) = (want_blocks.max(blocks), want_table.max(table_clusters));
        }
        let header = NewHeader {
            version: options.version,
            cluster_bits: options.cluster_bits,
            size,
            refcount_width: options.refcount_width,
            refcount_table_offset: cluster,
            refcount_table_clusters: u32::try_from(table_clusters).unwrap_or(u32::MAX),
            l1_table_offset: (1 + table_clusters + blocks) * cluster,
            backing: options.backing.clone(),
            ..NewHeader::default()
        };
        let header = header.encode().map_err(bad)?;
        let used = 1 + table_clusters + blocks + l1_clusters;
        Ok(Self { geometry, width: options.refcount_width, header, table_clusters, blocks, l1_bytes, used })
    }

    fn write(&self, store: &dyn Store) -> std::io::Result<()> {
        let cluster = self.geometry.cluster_size();
        let per_block = self.width.per_block(self.geometry);
        let first_block = 1 + self.table_clusters;
        store.write_at(0, &self.header)?;
        let table: Vec<u8> =
            (0..self.blocks).flat_map(|i| ((first_block + i) * cluster).to_be_bytes()).collect();
        store.write_at(cluster, &table)?;
        for i in 0..self.blocks {
            let mut block = vec![0; self.geometry.cluster_bytes()];
            let counted = self.used.saturating_sub(i * per_block).min(per_block);
            for slot in 0..usize::try_from(counted).unwrap_or(0) {
                self.width.set(&mut block, slot, 1).map_err(std::io::Error::other)?;
            }
            store.write_at((first_block + i) * cluster, &block)?;
        }
        store.set_len((first_block + self.blocks) * cluster + self.l1_bytes)
    }
}

#[cfg(test)]
mod tests {
    use pleach_store::{Access, RealDisk};

    use super::*;
    use crate::{Image, leaked};

    #[test]
    fn every_geometry_is_counted_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut n = 0;
        for version in [Version::V2, Version::V3] {
            for cluster_bits in [9, 10, 12, 16, 21] {
                for order in 0..=6 {
                    for size in [0, 1, 1 << 20, 3 << 30] {
                        if version == Version::V2 && order != 4 {
                            continue;
                        }
                        n += 1;
                        let path = dir.path().join(format!("{n}"));
                        let refcount_width = RefcountWidth::new(order).unwrap();
                        let options =
                            CreateOptions { size, cluster_bits, version, refcount_width, backing: None };
                        create(&RealDisk, &path, &options).unwrap();
                        let image = Image::open(RealDisk.open(&path, Access::Read).unwrap()).unwrap();
                        assert_eq!(image.size(), size.next_multiple_of(512));
                        assert_eq!(leaked(&image).unwrap(), [], "{options:?}");
                    }
                }
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), n, "no partial file is left");
        let again = create(&RealDisk, &dir.path().join("1"), &CreateOptions::default());
        assert!(matches!(again, Err(ImageError::Io { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), n);
    }
}
