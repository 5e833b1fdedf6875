//! Header extensions (spec: header extensions) and the feature name table.

use alloc::string::String;
use alloc::vec::Vec;

use super::be;
use crate::FormatError;

/// What an extension is, by its type number.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ExtensionKind {
    /// Name of the backing file's format.
    BackingFormat,
    /// Names of feature bits.
    FeatureNames,
    /// Pointer to the bitmap directory.
    Bitmaps,
    /// Pointer to the encryption header.
    EncryptionHeader,
    /// Name of the external data file.
    DataFile,
    /// Anything else; kept verbatim.
    Unknown(u32),
}

impl ExtensionKind {
    /// The kind of type number `number`, which is not 0.
    pub fn from_number(number: u32) -> Self {
        match number {
            0xe279_2aca => Self::BackingFormat,
            0x6803_f857 => Self::FeatureNames,
            0x2385_2875 => Self::Bitmaps,
            0x0537_be77 => Self::EncryptionHeader,
            0x4441_5441 => Self::DataFile,
            other => Self::Unknown(other),
        }
    }

    /// The type number.
    pub fn number(self) -> u32 {
        match self {
            Self::BackingFormat => 0xe279_2aca,
            Self::FeatureNames => 0x6803_f857,
            Self::Bitmaps => 0x2385_2875,
            Self::EncryptionHeader => 0x0537_be77,
            Self::DataFile => 0x4441_5441,
            Self::Unknown(other) => other,
        }
    }
}

/// A header extension: its kind, its data without padding, and where it starts in the header cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub kind: ExtensionKind,
    /// Its data, without padding.
    pub data: Vec<u8>,
    /// Offset of its type field in the file.
    pub at: usize,
}

impl Extension {
    /// Bytes that the extension takes in the header: type, length, data, padding to 8.
    pub fn stored_bytes(&self) -> usize {
        8 + self.data.len().next_multiple_of(8)
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.kind.number().to_be_bytes());
        out.extend(u32::try_from(self.data.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(&self.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Most extensions a header may have; none in use has more than a handful.
const MAX_EXTENSIONS: usize = 256;

/// The extensions in `bytes[start..bound]`, and the offset behind the end marker (or behind the last extension, where
/// the area ends without one). `bytes` may be shorter than `bound` as long as the end marker is inside.
pub(super) fn parse(
    bytes: &[u8],
    start: usize,
    bound: usize,
) -> Result<(Vec<Extension>, usize), FormatError> {
    let mut extensions: Vec<Extension> = Vec::new();
    let mut at = start;
    while at.saturating_add(8) <= bound {
        let head = bytes.get(at..at + 8).ok_or(truncated(at + 8, bytes))?;
        let (number, len) = (be::u32(head, 0), be::u32(head, 4) as usize);
        if number == 0 {
            return Ok((extensions, at + 8));
        }
        if len > bound - at - 8 {
            return Err(FormatError::OutOfRange {
                field: "header extension length",
                value: len as u64,
                min: 0,
                max: (bound - at - 8) as u64,
            });
        }
        let data = bytes.get(at + 8..at + 8 + len).ok_or(truncated(at + 8 + len, bytes))?.to_vec();
        let kind = ExtensionKind::from_number(number);
        let known = !matches!(kind, ExtensionKind::Unknown(_));
        if known && extensions.iter().any(|e| e.kind == kind) {
            return Err(FormatError::Invalid {
                field: "header extension type",
                value: number.into(),
                rule: "each known extension occurs at most once",
            });
        }
        if extensions.len() == MAX_EXTENSIONS {
            return Err(FormatError::OutOfRange {
                field: "number of header extensions",
                value: MAX_EXTENSIONS as u64 + 1,
                min: 0,
                max: MAX_EXTENSIONS as u64,
            });
        }
        extensions.push(Extension { kind, data, at });
        at = (at + 8 + len).next_multiple_of(8);
    }
    Ok((extensions, at.min(bound)))
}

fn truncated(needed: usize, bytes: &[u8]) -> FormatError {
    FormatError::Truncated { structure: "header extensions", needed: needed as u64, have: bytes.len() as u64 }
}

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Bit number, 0 to 63.
    pub bit: u8,
    /// The name, escaped so that it can be printed.
    pub name: String,
}

impl FeatureName {
    /// The entries of a feature name table; a last, incomplete one is ignored.
    pub fn parse_table(data: &[u8]) -> Vec<Self> {
        let entries = data.chunks_exact(48);
        entries
            .map(|entry| {
                let name = entry.get(2..).unwrap_or(&[]);
                let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
                let name = name.get(..end).unwrap_or(&[]);
                Self {
                    kind: be::u8(entry, 0),
                    bit: be::u8(entry, 1),
                    name: alloc::format!("{}", name.escape_ascii()),
                }
            })
            .collect()
    }
}

/// The table that QEMU writes into version 3 images.
pub(super) fn feature_table() -> Vec<u8> {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::new();
    for (kind, bit, name) in names {
        let end = out.len() + 48;
        out.extend([kind, bit]);
        out.extend(name.as_bytes());
        out.resize(end, 0);
    }
    out
}
