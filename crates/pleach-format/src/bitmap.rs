//! The bitmaps header extension and the bitmap directory (spec: bitmaps).

use alloc::vec::Vec;

use crate::FormatError;
use crate::header::be;

/// The bitmaps header extension: where the directory is. Valid only while autoclear bit 0 is set.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Host offset of the directory.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    /// Most bitmaps that QEMU opens.
    pub const MAX_COUNT: u64 = 65535;
    /// Largest directory that QEMU opens.
    pub const MAX_DIRECTORY: u64 = 1024 * 65535;

    /// Reads the data of a bitmaps extension.
    ///
    /// # Errors
    /// A length other than 24 bytes, a nonzero reserved field, or a count or size out of range.
    pub fn parse(data: &[u8]) -> Result<Self, FormatError> {
        if data.len() != 24 {
            return Err(FormatError::Invalid {
                field: "bitmaps extension length",
                value: data.len() as u64,
                rule: "must be 24",
            });
        }
        if be::u32(data, 4) != 0 {
            return Err(FormatError::Reserved {
                field: "bitmaps extension",
                value: be::u32(data, 4).into(),
                reserved: u32::MAX.into(),
            });
        }
        let range = |field, value, min, max| {
            if (min..=max).contains(&value) {
                Ok(value)
            } else {
                Err(FormatError::OutOfRange { field, value, min, max })
            }
        };
        let count = be::u32(data, 0);
        range("nb_bitmaps", count.into(), 1, Self::MAX_COUNT)?;
        let directory_size = range("bitmap_directory_size", be::u64(data, 8), 1, Self::MAX_DIRECTORY)?;
        Ok(Self { count, directory_size, directory_offset: be::u64(data, 16) })
    }
}

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapRecord {
    /// Host offset of the bitmap table.
    pub table_offset: u64,
    /// Entries of the bitmap table.
    pub table_size: u32,
    /// Bit 0 in_use, bit 1 auto, bit 2 extra_data_compatible.
    pub flags: u32,
    /// 1: dirty tracking bitmap.
    pub kind: u8,
    /// log2 of the guest bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Extra data, kept verbatim.
    pub extra: Vec<u8>,
    /// Name, raw bytes, unique in the image.
    pub name: Vec<u8>,
}

impl BitmapRecord {
    /// The bitmap was not written back: its on-disk copy is stale.
    pub const IN_USE: u32 = 1;
    /// The bitmap records writes.
    pub const AUTO: u32 = 2;

    /// Reads a whole directory of `count` entries that must fill `bytes` exactly.
    ///
    /// # Errors
    /// Entries that end behind the directory, or do not fill it.
    pub fn parse_directory(bytes: &[u8], count: u32) -> Result<Vec<Self>, FormatError> {
        let mut records = Vec::new();
        let mut at = 0usize;
        for _ in 0..count {
            let take = |from: usize, len: usize| {
                let start = at.saturating_add(from);
                bytes.get(start..start.saturating_add(len)).ok_or(FormatError::Truncated {
                    structure: "bitmap directory",
                    needed: start.saturating_add(len) as u64,
                    have: bytes.len() as u64,
                })
            };
            let fixed = take(0, 24)?;
            let name_len = usize::from(be::u16(fixed, 18));
            let extra_len = be::u32(fixed, 20) as usize;
            let extra = take(24, extra_len)?.to_vec();
            let name = take(24usize.saturating_add(extra_len), name_len)?.to_vec();
            records.push(Self {
                table_offset: be::u64(fixed, 0),
                table_size: be::u32(fixed, 8),
                flags: be::u32(fixed, 12),
                kind: be::u8(fixed, 16),
                granularity_bits: be::u8(fixed, 17),
                extra,
                name,
            });
            at = at.saturating_add((24 + extra_len + name_len).next_multiple_of(8));
        }
        if at != bytes.len() {
            return Err(FormatError::Invalid {
                field: "bitmap_directory_size",
                value: bytes.len() as u64,
                rule: "the entries must fill the directory exactly",
            });
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_a_directory() {
        let mut bytes = Vec::new();
        bytes.extend(0x70000u64.to_be_bytes());
        bytes.extend(1u32.to_be_bytes());
        bytes.extend(2u32.to_be_bytes());
        bytes.extend([1, 16, 0, 3, 0, 0, 0, 0]);
        bytes.extend(*b"b0x");
        bytes.resize(32, 0);
        let records = BitmapRecord::parse_directory(&bytes, 1).unwrap();
        assert_eq!((records[0].name.as_slice(), records[0].granularity_bits), (b"b0x".as_slice(), 16));
        assert_eq!(records[0].flags, BitmapRecord::AUTO);
        assert!(BitmapRecord::parse_directory(&bytes, 2).is_err());
        bytes.resize(40, 0);
        assert!(BitmapRecord::parse_directory(&bytes, 1).is_err());
    }

    #[test]
    fn extension_limits() {
        let mut data = [0u8; 24];
        data[3] = 1;
        data[15] = 32;
        data[21] = 7;
        let ext = BitmapsExtension::parse(&data).unwrap();
        assert_eq!((ext.count, ext.directory_size, ext.directory_offset), (1, 32, 0x70000));
        assert!(BitmapsExtension::parse(&data[..23]).is_err());
        data[3] = 0;
        assert!(BitmapsExtension::parse(&data).is_err());
    }
}
