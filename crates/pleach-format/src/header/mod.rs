//! The header cluster: fixed header, extensions, backing file name (spec: header, header extensions).

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use zerocopy::FromBytes;

use crate::error::check_range;
use crate::{
    BitmapsExtension, EncryptionPointer, FormatError, Geometry, HostOffset, RefcountWidth, SnapshotRecord,
};

mod backing;
pub(crate) mod be;
mod bitmaps;
mod extension;
mod new;
mod raw;
mod rewrite;
pub mod root;

pub use backing::rewrite_backing;
pub use bitmaps::rewrite_bitmaps;
pub use extension::{Extension, ExtensionKind, FeatureName};
pub use new::NewHeader;
use raw::{MAGIC, V2_LENGTH, V3_MIN_LENGTH};
pub use raw::{RawHeader, RawHeaderV3};
pub use rewrite::HeaderChange;

/// Largest refcount table that QEMU opens.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Longest file name.
const MAX_NAME: u64 = 1023;

/// Format version.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// QEMU's `compat=0.10`: no feature words, no zero clusters, 16-bit refcounts.
    V2,
    /// QEMU's `compat=1.1`.
    V3,
}

impl Version {
    /// The number in the header.
    pub fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }
}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $number:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub u64);
        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self(1 << $number);)*
            /// Every bit known here.
            pub const KNOWN: Self = Self(0 $(| 1 << $number)*);
            /// Whether all bits of `other` are set.
            pub fn has(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }
    };
}

word!(
    /// Incompatible features: an image with an unknown one must not be opened.
    Incompatible {
        /// Refcounts may be too low and must be rebuilt before the first write.
        DIRTY = 0,
        /// Metadata is known to be bad; no writing except to repair.
        CORRUPT = 1,
        /// Guest data lives in another file.
        DATA_FILE = 2,
        /// The compression type field is present and not 0.
        COMPRESSION = 3,
        /// L2 entries are 128 bits wide.
        EXTENDED_L2 = 4,
    }
);
impl Incompatible {
    /// The file is being written and not yet whole. No standard feature: the highest bit, which every reader refuses,
    /// this one included.
    pub const IN_PROGRESS: Self = Self(1 << 63);
}

word!(
    /// Compatible features: unknown ones can be ignored, and are kept.
    Compatible {
        /// Refcount updates may be postponed under the dirty bit.
        LAZY_REFCOUNTS = 0,
    }
);
word!(
    /// Autoclear features: a writer clears every one that it does not know.
    Autoclear {
        /// The bitmaps extension is consistent with the guest data.
        BITMAPS = 0,
        /// The external data file is a faithful raw image.
        RAW_DATA_FILE = 1,
    }
);

/// How compressed clusters are compressed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, called `zlib`.
    Deflate,
    /// One zstd frame a cluster.
    Zstd,
}

impl CompressionType {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// The number in the header.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Deflate => 0,
            Self::Zstd => 1,
        }
    }
}

/// How guest data is encrypted.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Legacy AES-128-CBC.
    Aes,
    /// A LUKS1 header inside the image.
    Luks,
}

impl Encryption {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Luks => "luks",
        }
    }
}

/// The backing file as the header names it: raw bytes, nothing resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFile {
    /// File name, 1 to 1023 bytes.
    pub name: Vec<u8>,
    /// Format name from the extension; `None` if there is no extension.
    pub format: Option<Vec<u8>>,
}

impl BackingFile {
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        check_range("backing_file_size", self.name.len() as u64, 1, MAX_NAME)?;
        let format = self.format.as_ref().map_or(1, Vec::len);
        check_range("backing format length", format as u64, 1, 15)
    }
}

/// The external data file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// File name, 1 to 1023 bytes without NUL. QEMU looks for it from the working directory of the process.
    pub name: Vec<u8>,
    /// Whether the data file alone is a raw image of the disk (autoclear bit 1).
    pub raw: bool,
}

impl DataFile {
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        check_range("data file name length", self.name.len() as u64, 1, MAX_NAME)?;
        if self.name.contains(&0) {
            return Err(FormatError::Invalid {
                field: "data file name",
                value: self.name.len() as u64,
                rule: "a file name has no NUL byte",
            });
        }
        Ok(())
    }
}

/// A header that passed every check; holding one is the proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    version: Version,
    geometry: Geometry,
    refcount_width: RefcountWidth,
    stored_size: u64,
    l1_size: u32,
    l1_table_offset: HostOffset,
    refcount_table_offset: HostOffset,
    refcount_table_clusters: u32,
    nb_snapshots: u32,
    snapshots_offset: HostOffset,
    encryption: Option<Encryption>,
    incompatible: Incompatible,
    compatible: Compatible,
    autoclear: Autoclear,
    compression: CompressionType,
    header_length: usize,
    extensions: Vec<Extension>,
    extensions_end: usize,
    backing: Option<BackingFile>,
    backing_at: usize,
}

impl Header {
    /// Reads and checks the header at the start of `bytes`, which is the start of the file: 4 KiB are enough for
    /// nearly every image. What lies behind extensions and backing file name is ignored.
    ///
    /// # Errors
    /// The first [`FormatError`] in specification order; [`FormatError::Truncated`] says how many bytes to come back
    /// with. Never panics, whatever `bytes` holds.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| truncated(V2_LENGTH, bytes))?;
        if raw.magic != MAGIC {
            return Err(FormatError::BadMagic { found: raw.magic });
        }
        let version = match raw.version.get() {
            2 => Version::V2,
            3 => Version::V3,
            found => return Err(FormatError::BadVersion { found }),
        };
        let v3 = Words::parse(bytes, version, raw.cluster_bits.get())?;
        let geometry = Geometry::new(raw.cluster_bits.get(), v3.incompatible.has(Incompatible::EXTENDED_L2))?;
        let cluster = geometry.cluster_bytes();
        let backing_at = match raw.backing_file_offset.get() {
            0 => None,
            at => Some(usize::try_from(at).ok().filter(|&at| at < cluster && at >= v3.header_length).ok_or(
                FormatError::OutOfRange {
                    field: "backing_file_offset",
                    value: at,
                    min: v3.header_length as u64,
                    max: geometry.cluster_size() - 1,
                },
            )?),
        };
        let (extensions, extensions_end) =
            extension::parse(bytes, v3.header_length, backing_at.unwrap_or(cluster))?;
        v3.refuse_unknown(&extensions)?;
        let backing = match backing_at {
            None => None,
            Some(at) => Some(backing_file(bytes, at, raw.backing_file_size.get(), geometry, &extensions)?),
        };
        let header = Self {
            version,
            geometry,
            refcount_width: v3.refcount_width,
            stored_size: raw.size.get(),
            l1_size: raw.l1_size.get(),
            l1_table_offset: HostOffset(raw.l1_table_offset.get()),
            refcount_table_offset: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: HostOffset(raw.snapshots_offset.get()),
            encryption: match raw.crypt_method.get() {
                0 => None,
                1 => Some(Encryption::Aes),
                2 => Some(Encryption::Luks),
                other => {
                    return Err(FormatError::OutOfRange {
                        field: "crypt_method",
                        value: other.into(),
                        min: 0,
                        max: 2,
                    });
                }
            },
            incompatible: v3.incompatible,
            compatible: v3.compatible,
            autoclear: v3.autoclear,
            compression: v3.compression,
            header_length: v3.header_length,
            extensions,
            extensions_end,
            backing,
            backing_at: backing_at.unwrap_or(0),
        };
        header.check_tables()?;
        Ok(header)
    }

    fn check_tables(&self) -> Result<(), FormatError> {
        let g = self.geometry;
        let aligned = |field, offset: HostOffset| match g.is_aligned(offset.0) {
            true => Ok(()),
            false => Err(FormatError::Unaligned { field, value: offset.0, alignment: g.cluster_size() }),
        };
        let table_max = MAX_REFCOUNT_TABLE / g.cluster_size();
        check_range("refcount_table_clusters", self.refcount_table_clusters.into(), 1, table_max)?;
        aligned("refcount_table_offset", self.refcount_table_offset)?;
        check_range("refcount_table_offset", self.refcount_table_offset.0, g.cluster_size(), MAX_OFFSET)?;
        check_range("nb_snapshots", self.nb_snapshots.into(), 0, SnapshotRecord::MAX_COUNT.into())?;
        if self.nb_snapshots > 0 {
            aligned("snapshots_offset", self.snapshots_offset)?;
            check_range("snapshots_offset", self.snapshots_offset.0, g.cluster_size(), MAX_OFFSET)?;
        }
        check_range("size", self.stored_size, 0, i64::MAX as u64)?;
        let required = g.required_l1(self.size());
        check_range("l1_size", self.l1_size.into(), required, Geometry::MAX_L1_ENTRIES.into())?;
        aligned("l1_table_offset", self.l1_table_offset)?;
        if self.l1_size > 0 {
            check_range("l1_table_offset", self.l1_table_offset.0, g.cluster_size(), MAX_OFFSET)?;
        }
        Ok(())
    }

    /// Format version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Cluster size and L2 entry width.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Width of the refcounts.
    pub fn refcount_width(&self) -> RefcountWidth {
        self.refcount_width
    }

    /// Virtual size in bytes: the stored size rounded down to 512, as QEMU does.
    pub fn size(&self) -> u64 {
        self.stored_size & !511
    }

    /// Entries of the active L1 table.
    pub fn l1_size(&self) -> u32 {
        self.l1_size
    }

    /// Where the active L1 table is.
    pub fn l1_table_offset(&self) -> HostOffset {
        self.l1_table_offset
    }

    /// Where the refcount table is.
    pub fn refcount_table_offset(&self) -> HostOffset {
        self.refcount_table_offset
    }

    /// Clusters of the refcount table.
    pub fn refcount_table_clusters(&self) -> u32 {
        self.refcount_table_clusters
    }

    /// Number of internal snapshots.
    pub fn nb_snapshots(&self) -> u32 {
        self.nb_snapshots
    }

    /// Where the snapshot table is; meaningless without snapshots.
    pub fn snapshots_offset(&self) -> HostOffset {
        self.snapshots_offset
    }

    /// How guest data is encrypted, if it is.
    pub fn encryption(&self) -> Option<Encryption> {
        self.encryption
    }

    /// Incompatible features; all of them known.
    pub fn incompatible(&self) -> Incompatible {
        self.incompatible
    }

    /// Compatible features; unknown ones are kept.
    pub fn compatible(&self) -> Compatible {
        self.compatible
    }

    /// Autoclear features, unknown ones included.
    pub fn autoclear(&self) -> Autoclear {
        self.autoclear
    }

    /// How compressed clusters are compressed.
    pub fn compression(&self) -> CompressionType {
        self.compression
    }

    /// Bytes of the fixed header, where the extensions start.
    pub fn header_length(&self) -> usize {
        self.header_length
    }

    /// The header extensions in file order.
    pub fn extensions(&self) -> &[Extension] {
        &self.extensions
    }

    /// The extension of one kind.
    pub fn extension(&self, kind: ExtensionKind) -> Option<&Extension> {
        self.extensions.iter().find(|e| e.kind == kind)
    }

    /// Offset behind the end marker of the extensions.
    pub fn extensions_end(&self) -> usize {
        self.extensions_end
    }

    /// Whether the extensions end with a marker; else the area's end ends them.
    pub fn has_end_marker(&self) -> bool {
        let last = self.extensions.last().map_or(self.header_length, |e| e.at + e.stored_bytes());
        last + 8 <= self.extensions_end
    }

    /// The backing file, if the header names one.
    pub fn backing(&self) -> Option<&BackingFile> {
        self.backing.as_ref()
    }

    /// Where the backing file name is; empty without one.
    pub fn backing_name_range(&self) -> Range<usize> {
        let len = self.backing.as_ref().map_or(0, |b| b.name.len());
        self.backing_at..self.backing_at + len
    }

    /// Bytes of the header cluster that mean something: header, extensions, name.
    pub fn used_bytes(&self) -> usize {
        self.header_length.max(self.extensions_end).max(self.backing_name_range().end)
    }

    /// The name of the external data file, if the header gives one.
    pub fn data_file(&self) -> Option<&[u8]> {
        self.extension(ExtensionKind::DataFile).map(|e| e.data.as_slice())
    }

    /// The bitmaps extension, if its data are consistent (autoclear bit 0).
    ///
    /// # Errors
    /// As [`BitmapsExtension::parse`], or a directory that is not cluster-aligned.
    pub fn bitmaps(&self) -> Result<Option<BitmapsExtension>, FormatError> {
        match self.extension(ExtensionKind::Bitmaps) {
            Some(e) if self.autoclear.has(Autoclear::BITMAPS) => {
                let extension = BitmapsExtension::parse(&e.data)?;
                extension.check(self.geometry)?;
                Ok(Some(extension))
            }
            _ => Ok(None),
        }
    }

    /// Where the LUKS header is; `None` unless the image is encrypted with LUKS.
    ///
    /// # Errors
    /// [`FormatError::Missing`] if an image encrypted with LUKS does not say; as [`EncryptionPointer::parse`].
    pub fn encryption_header(&self) -> Result<Option<EncryptionPointer>, FormatError> {
        if self.encryption != Some(Encryption::Luks) {
            return Ok(None);
        }
        match self.extension(ExtensionKind::EncryptionHeader) {
            Some(e) => EncryptionPointer::parse(&e.data, self.geometry).map(Some),
            None => Err(FormatError::Missing { structure: "full disk encryption header pointer" }),
        }
    }
}

const MAX_OFFSET: u64 = (1 << 56) - 1;

/// The part of the header that version 2 does not have, with version 2's fixed values.
struct Words {
    incompatible: Incompatible,
    compatible: Compatible,
    autoclear: Autoclear,
    refcount_width: RefcountWidth,
    header_length: usize,
    compression: CompressionType,
}

impl Words {
    fn parse(bytes: &[u8], version: Version, cluster_bits: u32) -> Result<Self, FormatError> {
        if version == Version::V2 {
            return Ok(Self {
                incompatible: Incompatible::default(),
                compatible: Compatible::default(),
                autoclear: Autoclear::default(),
                refcount_width: RefcountWidth::DEFAULT,
                header_length: V2_LENGTH,
                compression: CompressionType::Deflate,
            });
        }
        let mut stored = [0; size_of::<RawHeaderV3>()];
        let fixed = bytes.get(V2_LENGTH..V3_MIN_LENGTH).ok_or(truncated(V3_MIN_LENGTH, bytes))?;
        let have = bytes.get(V2_LENGTH..).unwrap_or(fixed);
        for (to, from) in stored.iter_mut().zip(have) {
            *to = *from;
        }
        let (raw, _) = RawHeaderV3::read_from_prefix(&stored).map_err(|_| truncated(V3_MIN_LENGTH, bytes))?;
        let length = raw.header_length.get();
        let cluster = Geometry::new(cluster_bits, false)?.cluster_size();
        check_range("header_length", length.into(), V3_MIN_LENGTH as u64, cluster)?;
        if !length.is_multiple_of(8) {
            return Err(FormatError::Unaligned {
                field: "header_length",
                value: length.into(),
                alignment: 8,
            });
        }
        let incompatible = Incompatible(raw.incompatible_features.get());
        let kind = if length > 104 { raw.compression_type } else { 0 };
        if incompatible.has(Incompatible::COMPRESSION) != (kind != 0) {
            return Err(FormatError::Invalid {
                field: "compression_type",
                value: kind.into(),
                rule: "incompatible feature bit 3 must be set exactly if the type is not 0",
            });
        }
        Ok(Self {
            incompatible,
            compatible: Compatible(raw.compatible_features.get()),
            autoclear: Autoclear(raw.autoclear_features.get()),
            refcount_width: RefcountWidth::new(raw.refcount_order.get())?,
            header_length: length as usize,
            compression: match kind {
                0 => CompressionType::Deflate,
                1 => CompressionType::Zstd,
                other => {
                    let value = other.into();
                    return Err(FormatError::OutOfRange { field: "compression_type", value, min: 0, max: 1 });
                }
            },
        })
    }

    fn refuse_unknown(&self, extensions: &[Extension]) -> Result<(), FormatError> {
        let unknown = self.incompatible.0 & !Incompatible::KNOWN.0;
        if unknown == 0 {
            return Ok(());
        }
        let bit = unknown.trailing_zeros();
        let names = extensions
            .iter()
            .find(|e| e.kind == ExtensionKind::FeatureNames)
            .map(|e| FeatureName::parse_table(&e.data))
            .unwrap_or_default();
        let name = names.into_iter().find(|n| n.kind == 0 && u32::from(n.bit) == bit).map(|n| n.name);
        let unnamed = if unknown == Incompatible::IN_PROGRESS.0 {
            "an image that was never finished"
        } else {
            "unnamed"
        };
        Err(FormatError::UnknownFeature { bit, name: name.unwrap_or_else(|| String::from(unnamed)) })
    }
}

fn backing_file(
    bytes: &[u8],
    at: usize,
    len: u32,
    geometry: Geometry,
    extensions: &[Extension],
) -> Result<BackingFile, FormatError> {
    let room = geometry.cluster_size() - at as u64;
    check_range("backing_file_size", len.into(), 1, MAX_NAME.min(room))?;
    let end = at + len as usize;
    let name = bytes.get(at..end).ok_or(truncated(end, bytes))?.to_vec();
    if name.contains(&0) {
        return Err(FormatError::Invalid {
            field: "backing file name",
            value: at as u64,
            rule: "a file name has no NUL byte",
        });
    }
    let format = extensions.iter().find(|e| e.kind == ExtensionKind::BackingFormat).map(|e| e.data.clone());
    Ok(BackingFile { name, format })
}

fn truncated(needed: usize, bytes: &[u8]) -> FormatError {
    FormatError::Truncated { structure: "header", needed: needed as u64, have: bytes.len() as u64 }
}

#[cfg(test)]
mod tests;
