//! What can be wrong with bytes: which field, which value, what was allowed.

use alloc::string::String;

use crate::Geometry;

/// A structure that breaks the format, or uses a part of it that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The first four bytes are not the qcow2 magic.
    #[error("magic is {found:02x?}, a qcow2 image starts with 51 46 49 fb")]
    BadMagic {
        /// The four bytes found.
        found: [u8; 4],
    },
    /// Version is neither 2 nor 3.
    #[error("version is {found}, must be 2 or 3")]
    BadVersion {
        /// The version found.
        found: u32,
    },
    /// More bytes are needed to read the structure.
    #[error("{structure} needs {needed} bytes, only {have} are there")]
    Truncated {
        /// Which structure.
        structure: &'static str,
        /// Bytes that would be needed.
        needed: u64,
        /// Bytes given.
        have: u64,
    },
    /// A numeric field lies outside what the format (or QEMU, where it is stricter) allows.
    #[error("{field} is {value}, must be in {min}..={max}")]
    OutOfRange {
        /// Spec name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed.
        max: u64,
    },
    /// An offset that must be a multiple of something is not.
    #[error("{field} is {value:#x}, must be a multiple of {alignment}")]
    Unaligned {
        /// Spec name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Bytes it must be a multiple of.
        alignment: u64,
    },
    /// Reserved bits are set.
    #[error("{field} is {value:#x}, reserved bits {reserved:#x} must be zero")]
    Reserved {
        /// Spec name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Mask of the reserved bits.
        reserved: u64,
    },
    /// A value that breaks a rule which is not a plain range.
    #[error("{field} is {value:#x}: {rule}")]
    Invalid {
        /// Spec name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The rule.
        rule: &'static str,
    },
    /// An incompatible feature bit that nobody here knows.
    #[error("incompatible feature bit {bit} ({name}) is not known")]
    UnknownFeature {
        /// Bit number, 0 to 63.
        bit: u32,
        /// Its name from the image's feature name table, escaped, or `unnamed`.
        name: String,
    },
    /// Something that the image's features call for is not there.
    #[error("the {structure} is missing")]
    Missing {
        /// What.
        structure: &'static str,
    },
    /// A feature that version 2 cannot express.
    #[error("{feature} needs format version 3 (compat 1.1)")]
    NeedsV3 {
        /// What was asked for.
        feature: &'static str,
    },
    /// Two features that no image has together.
    #[error("{one} and {other} exclude each other")]
    Excluded {
        /// One of them.
        one: &'static str,
        /// The other.
        other: &'static str,
    },
    /// The header cluster has no room for what should be written into it.
    #[error(
        "the header needs {needed} bytes, a cluster has {available}: use a shorter file name or larger clusters"
    )]
    HeaderFull {
        /// Bytes needed.
        needed: u64,
        /// Bytes in the first cluster.
        available: u64,
    },
}

pub(crate) fn check_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), FormatError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(FormatError::OutOfRange { field, value, min, max })
    }
}

/// The host offset of something that starts a cluster, and not the first one.
pub(crate) fn check_place(field: &'static str, offset: u64, geometry: Geometry) -> Result<(), FormatError> {
    if !geometry.is_aligned(offset) {
        return Err(FormatError::Unaligned { field, value: offset, alignment: geometry.cluster_size() });
    }
    check_range(field, offset, geometry.cluster_size(), (1 << 56) - 1)
}
