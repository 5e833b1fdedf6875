//! A header for a new image.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use super::raw::{MAGIC, RawHeader, RawHeaderV3, V2_LENGTH, V3_LENGTH};
use super::{BackingFile, Extension, ExtensionKind, Version, extension};
use crate::{FormatError, Geometry, RefcountWidth};

/// Everything a new image's header says. Equal values give equal bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewHeader {
    /// Version 2 or 3.
    pub version: Version,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Width of the refcounts.
    pub refcount_width: RefcountWidth,
    /// Host offset of the L1 table, which has just the entries that `size` needs.
    pub l1_table_offset: u64,
    /// Host offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Backing file, with its format.
    pub backing: Option<BackingFile>,
}

impl Default for NewHeader {
    /// Version 3, 64 KiB clusters, 16-bit refcounts; tables where QEMU puts them: refcount table in cluster 1, its
    /// first block in cluster 2, the L1 table from cluster 3.
    fn default() -> Self {
        Self {
            version: Version::V3,
            cluster_bits: 16,
            size: 0,
            refcount_width: RefcountWidth::DEFAULT,
            l1_table_offset: 3 << 16,
            refcount_table_offset: 1 << 16,
            refcount_table_clusters: 1,
            backing: None,
        }
    }
}

impl NewHeader {
    /// The header's bytes: fixed part, extensions, end marker, backing file name.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] for a geometry, size or width that the version does not have, or a name too long;
    /// [`FormatError::HeaderFull`] if the name does not fit the header cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let geometry = Geometry::new(self.cluster_bits, false)?;
        if self.version == Version::V2 && self.refcount_width != RefcountWidth::DEFAULT {
            return Err(FormatError::OutOfRange {
                field: "refcount_order",
                value: self.refcount_width.order().into(),
                min: 4,
                max: 4,
            });
        }
        let l1_entries = geometry.required_l1(self.size);
        let l1_size = u32::try_from(l1_entries).ok().filter(|&n| n <= super::MAX_L1_ENTRIES).ok_or(
            FormatError::OutOfRange {
                field: "size",
                value: self.size,
                min: 0,
                max: u64::from(super::MAX_L1_ENTRIES) * geometry.l1_span(),
            },
        )?;
        let mut out = self.fixed(l1_size);
        let head = out.len();
        let mut append = |kind, data| Extension { kind, data, at: 0 }.encode(&mut out);
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.clone()) {
            append(ExtensionKind::BackingFormat, format);
        }
        // As QEMU does: there is no room for the table in the smallest clusters.
        if self.version == Version::V3 && geometry.cluster_size() > 4096 {
            append(ExtensionKind::FeatureNames, extension::feature_table());
        }
        out.extend([0; 8]);
        debug_assert!(out.len() > head);
        if let Some(backing) = &self.backing {
            backing.check()?;
            let at = out.len() as u64;
            let mut sector_head = [0; 512];
            let len = out.len().min(512);
            sector_head.get_mut(..len).expect("len").copy_from_slice(out.get(..len).expect("len"));
            super::root::set_backing(&mut sector_head, at, u32::try_from(backing.name.len()).unwrap_or(0));
            out.get_mut(..len).expect("len").copy_from_slice(sector_head.get(..len).expect("len"));
            out.extend(&backing.name);
        }
        if out.len() > geometry.cluster_bytes() {
            return Err(FormatError::HeaderFull {
                needed: out.len() as u64,
                available: geometry.cluster_size(),
            });
        }
        Ok(out)
    }

    fn fixed(&self, l1_size: u32) -> Vec<u8> {
        let raw = RawHeader {
            magic: MAGIC,
            version: self.version.number().into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            l1_size: l1_size.into(),
            l1_table_offset: if l1_size == 0 { 0 } else { self.l1_table_offset }.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            ..RawHeader::default()
        };
        let mut out = raw.as_bytes().to_vec();
        debug_assert_eq!(out.len(), V2_LENGTH);
        if self.version == Version::V3 {
            let more = RawHeaderV3 {
                refcount_order: self.refcount_width.order().into(),
                header_length: u32::try_from(V3_LENGTH).expect("112").into(),
                ..RawHeaderV3::default()
            };
            out.extend(more.as_bytes());
        }
        out
    }
}
