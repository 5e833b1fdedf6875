//! A header for a new image.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use super::raw::{MAGIC, RawHeader, RawHeaderV3, V2_LENGTH, V3_LENGTH};
use super::{
    Autoclear, BackingFile, Compatible, CompressionType, DataFile, Extension, ExtensionKind, Incompatible,
    Version, extension,
};
use crate::error::check_range;
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
    /// How compressed clusters will be compressed.
    pub compression: CompressionType,
    /// 128-bit L2 entries with subclusters.
    pub extended_l2: bool,
    /// Writers may postpone refcount updates under the dirty bit.
    pub lazy_refcounts: bool,
    /// The file that holds the guest data, if it is not this one.
    pub data_file: Option<DataFile>,
    /// Sets [`Incompatible::IN_PROGRESS`], so that no tool opens a file that is not yet whole. Whoever finishes it clears
    /// the bit with [`root::set_incompatible`](super::root::set_incompatible) and [`NewHeader::incompatible`].
    pub in_progress: bool,
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
            compression: CompressionType::Deflate,
            extended_l2: false,
            lazy_refcounts: false,
            data_file: None,
            in_progress: false,
        }
    }
}

impl NewHeader {
    /// Cluster size and L2 entry width.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] for a cluster size that there is not, or not with extended L2 entries.
    pub fn geometry(&self) -> Result<Geometry, FormatError> {
        Geometry::new(self.cluster_bits, self.extended_l2)
    }

    /// The incompatible feature word of the finished image: without [`Incompatible::IN_PROGRESS`].
    pub fn incompatible(&self) -> Incompatible {
        let bits = [
            (self.data_file.is_some(), Incompatible::DATA_FILE),
            (self.compression != CompressionType::Deflate, Incompatible::COMPRESSION),
            (self.extended_l2, Incompatible::EXTENDED_L2),
        ];
        Incompatible(bits.iter().filter(|(set, _)| *set).fold(0, |word, (_, bit)| word | bit.0))
    }

    /// The header's bytes: fixed part, extensions, end marker, backing file name.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] for a geometry, size or width that the version does not have, or a name too long;
    /// [`FormatError::NeedsV3`] for a feature that version 2 does not have; [`FormatError::Excluded`] for a raw data
    /// file under a backing file; [`FormatError::Unaligned`] for a size that is no multiple of 512;
    /// [`FormatError::HeaderFull`] if the names do not fit the header cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let geometry = self.geometry()?;
        self.check_version()?;
        if let Some(data_file) = &self.data_file {
            data_file.check()?;
            if data_file.raw && self.backing.is_some() {
                return Err(FormatError::Excluded {
                    one: "a raw external data file",
                    other: "a backing file",
                });
            }
        }
        if !self.size.is_multiple_of(512) {
            return Err(FormatError::Unaligned { field: "size", value: self.size, alignment: 512 });
        }
        let table_max = super::MAX_REFCOUNT_TABLE / geometry.cluster_size();
        check_range("refcount_table_clusters", self.refcount_table_clusters.into(), 1, table_max)?;
        let l1_entries = geometry.required_l1(self.size);
        let l1_size = u32::try_from(l1_entries).ok().filter(|&n| n <= Geometry::MAX_L1_ENTRIES).ok_or(
            FormatError::OutOfRange { field: "size", value: self.size, min: 0, max: geometry.max_disk() },
        )?;
        let mut out = self.fixed(l1_size);
        let mut append = |kind, data| Extension { kind, data, at: 0 }.encode(&mut out);
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.clone()) {
            append(ExtensionKind::BackingFormat, format);
        }
        if let Some(data_file) = &self.data_file {
            append(ExtensionKind::DataFile, data_file.name.clone());
        }
        // As QEMU does: there is no room for the table in the smallest clusters.
        if self.version == Version::V3 && geometry.cluster_size() > 4096 {
            append(ExtensionKind::FeatureNames, extension::feature_table());
        }
        out.extend([0; 8]);
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

    /// Version 2 has one width of refcounts and no feature words.
    fn check_version(&self) -> Result<(), FormatError> {
        if self.version != Version::V2 {
            return Ok(());
        }
        if self.refcount_width != RefcountWidth::DEFAULT {
            return Err(FormatError::OutOfRange {
                field: "refcount_order",
                value: self.refcount_width.order().into(),
                min: 4,
                max: 4,
            });
        }
        let features = [
            (self.lazy_refcounts, "lazy refcounts"),
            (self.extended_l2, "extended L2 entries"),
            (self.compression != CompressionType::Deflate, "another compression than zlib"),
            (self.data_file.is_some(), "an external data file"),
            (self.in_progress, "the mark of an unfinished image"),
        ];
        match features.into_iter().find(|(set, _)| *set) {
            Some((_, feature)) => Err(FormatError::NeedsV3 { feature }),
            None => Ok(()),
        }
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
            let raw_data = self.data_file.as_ref().is_some_and(|d| d.raw);
            let unfinished = if self.in_progress { Incompatible::IN_PROGRESS.0 } else { 0 };
            let more = RawHeaderV3 {
                incompatible_features: (self.incompatible().0 | unfinished).into(),
                compatible_features: if self.lazy_refcounts { Compatible::LAZY_REFCOUNTS.0 } else { 0 }
                    .into(),
                autoclear_features: if raw_data { Autoclear::RAW_DATA_FILE.0 } else { 0 }.into(),
                refcount_order: self.refcount_width.order().into(),
                header_length: u32::try_from(V3_LENGTH).expect("112").into(),
                compression_type: self.compression.number(),
                ..RawHeaderV3::default()
            };
            out.extend(more.as_bytes());
        }
        out
    }
}
