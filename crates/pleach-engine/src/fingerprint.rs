//! What a plan was made from, in a few bytes: whether anything has changed since then.

use std::path::PathBuf;

use pleach_image::{Image, ImageError, Layer};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::open::OpenFiles;
use crate::{Error, Result};

/// One file as it was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Where it is.
    pub path: PathBuf,
    /// Its inode number.
    pub inode: u64,
    /// Its length in bytes.
    pub length: u64,
    /// CRC-32 of its first sector.
    pub sector0: u32,
    /// CRC-32 of the L1 table and all L2 tables of the active state, in guest order; 0 of a raw file.
    pub tables: u32,
}

impl OpenFiles {
    /// What all of them look like, in the order of their indexes.
    ///
    /// # Errors
    /// What the system says; a damaged L1 table.
    pub fn fingerprints(&self) -> Result<Vec<Fingerprint>> {
        self.all().into_par_iter().map(|(path, layer)| fingerprint(path, layer)).collect()
    }
}

fn fingerprint(path: &std::path::Path, layer: &Layer) -> Result<Fingerprint> {
    let io = |e| Error::io("read", path, e);
    let store = layer.store();
    let mut sector = [0; 512];
    store.read_at(0, &mut sector).map_err(io)?;
    Ok(Fingerprint {
        path: path.to_owned(),
        inode: store.stat().map_err(io)?.id.inode,
        length: store.len().map_err(io)?,
        sector0: crc32fast::hash(&sector),
        tables: layer.image().map_or(Ok(0), tables).map_err(|e| Error::image(path, e))?,
    })
}

fn tables(image: &Image) -> Result<u32, ImageError> {
    let mut crc = crc32fast::Hasher::new();
    for entry in image.l1() {
        crc.update(&entry.0.to_be_bytes());
        if let Some(table) = image.l2_table(*entry)? {
            crc.update(&table);
        }
    }
    Ok(crc.finalize())
}
