//! The header exactly as stored (spec: header).

use core::mem::{offset_of, size_of};

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes 0..72, shared by versions 2 and 3, exactly as stored. Nothing here has been checked.
#[derive(Copy, Clone, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the field names are the specification's")]
pub struct RawHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
}

/// Bytes 72..112 of a version 3 header, exactly as stored.
///
/// `compression_type` counts only where `header_length` covers it.
#[derive(Copy, Clone, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the field names are the specification's")]
pub struct RawHeaderV3 {
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
    pub compression_type: u8,
    pub padding: [u8; 7],
}

pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header length of version 2, and where its extensions start.
pub(crate) const V2_LENGTH: usize = 72;
/// Shortest version 3 header.
pub(crate) const V3_MIN_LENGTH: usize = 104;
/// Version 3 header length that current writers use.
pub(crate) const V3_LENGTH: usize = 112;

const _: () = assert!(size_of::<RawHeader>() == V2_LENGTH);
const _: () = assert!(offset_of!(RawHeader, l1_table_offset) == 40);
const _: () = assert!(offset_of!(RawHeader, snapshots_offset) == 64);
const _: () = assert!(size_of::<RawHeaderV3>() == V3_LENGTH - V2_LENGTH);
const _: () = assert!(offset_of!(RawHeaderV3, compression_type) == 104 - V2_LENGTH);
