//! The LUKS header of an encrypted image, as far as it can be read without a key (spec: encryption; LUKS1).

use alloc::string::String;
use alloc::vec::Vec;

use crate::error::{check_place, check_range};
use crate::header::be;
use crate::{FormatError, Geometry, HostOffset};

/// The header extension that says where the LUKS header is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct EncryptionPointer {
    /// Where it starts: a cluster.
    pub offset: HostOffset,
    /// Its length in bytes, key material included.
    pub length: u64,
}

impl EncryptionPointer {
    /// Reads the data of a full disk encryption header pointer.
    ///
    /// # Errors
    /// A length other than 16 bytes, an offset that is not that of a cluster, or an area too short for a LUKS header.
    pub fn parse(data: &[u8], geometry: Geometry) -> Result<Self, FormatError> {
        if data.len() != 16 {
            return Err(FormatError::Invalid {
                field: "encryption header extension length",
                value: data.len() as u64,
                rule: "must be 16",
            });
        }
        let pointer = Self { offset: HostOffset(be::u64(data, 0)), length: be::u64(data, 8) };
        check_place("encryption header offset", pointer.offset.0, geometry)?;
        check_range("encryption header length", pointer.length, LuksHeader::BYTES as u64, 1 << 56)?;
        Ok(pointer)
    }
}

/// A LUKS1 header; texts are escaped so that they can be printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    /// Cipher, such as `aes`.
    pub cipher: String,
    /// Mode with IV generator, such as `xts-plain64`.
    pub mode: String,
    /// Hash of the key derivation, such as `sha256`.
    pub hash: String,
    /// Where a LUKS volume's data would start, in bytes. Says nothing in a qcow2 image.
    pub payload_offset: u64,
    /// Bytes of the master key; with XTS two keys of the cipher.
    pub key_bytes: u32,
    /// Iterations for the master key's digest.
    pub iterations: u32,
    /// The volume's UUID.
    pub uuid: String,
    /// The eight key slots.
    pub slots: Vec<KeySlot>,
}

/// A key slot of a LUKS1 header.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether a passphrase can be tried on it.
    pub active: bool,
    /// Iterations of its key derivation.
    pub iterations: u32,
    /// Where its key material starts, in bytes from the LUKS header.
    pub key_offset: u64,
    /// Anti-forensic stripes.
    pub stripes: u32,
}

impl LuksHeader {
    /// Bytes of the header without key material.
    pub const BYTES: usize = 592;

    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], another magic or version, a key slot that is neither on nor off.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = bytes.get(..Self::BYTES).ok_or(FormatError::Truncated {
            structure: "LUKS header",
            needed: Self::BYTES as u64,
            have: bytes.len() as u64,
        })?;
        if !bytes.starts_with(b"LUKS\xba\xbe") {
            let value = be::u64(bytes, 0) >> 16;
            return Err(FormatError::Invalid { field: "LUKS magic", value, rule: "must be 0x4c554b53babe" });
        }
        check_range("LUKS version", be::u16(bytes, 6).into(), 1, 1)?;
        let slots = (0..8).map(|i| KeySlot::parse(bytes.get(208 + 48 * i..).unwrap_or(&[])));
        Ok(Self {
            cipher: text(bytes, 8, 32),
            mode: text(bytes, 40, 32),
            hash: text(bytes, 72, 32),
            payload_offset: u64::from(be::u32(bytes, 104)) * 512,
            key_bytes: be::u32(bytes, 108),
            iterations: be::u32(bytes, 164),
            uuid: text(bytes, 168, 40),
            slots: slots.collect::<Result<_, _>>()?,
        })
    }
}

impl KeySlot {
    fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let active = match be::u32(bytes, 0) {
            0x00ac_71f3 => true,
            0x0000_dead => false,
            other => {
                return Err(FormatError::Invalid {
                    field: "LUKS key slot state",
                    value: other.into(),
                    rule: "must be 0xac71f3 (on) or 0xdead (off)",
                });
            }
        };
        Ok(Self {
            active,
            iterations: be::u32(bytes, 4),
            key_offset: u64::from(be::u32(bytes, 40)) * 512,
            stripes: be::u32(bytes, 44),
        })
    }
}

/// A text that ends with a NUL or with its field.
fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let field = bytes.get(at..at + len).unwrap_or(&[]);
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    alloc::format!("{}", field.get(..end).unwrap_or(&[]).escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn luks() -> Vec<u8> {
        let mut bytes = std::vec![0; LuksHeader::BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"LUKS\xba\xbe\0\x01");
        put(8, b"aes");
        put(40, b"xts-plain64");
        put(72, &[b'h'; 32]);
        put(104, &4040u32.to_be_bytes());
        put(108, &64u32.to_be_bytes());
        put(168, b"0a1b\x1b[31m");
        for i in 0..8 {
            put(208 + 48 * i, &0xdead_u32.to_be_bytes());
        }
        put(208, &0x00ac_71f3_u32.to_be_bytes());
        put(208 + 40, &8u32.to_be_bytes());
        put(208 + 44, &4000u32.to_be_bytes());
        bytes
    }

    #[test]
    fn a_luks_header_is_read_without_a_key() {
        let header = LuksHeader::parse(&luks()).unwrap();
        assert_eq!((header.cipher.as_str(), header.mode.as_str()), ("aes", "xts-plain64"));
        assert_eq!(header.hash, "h".repeat(32), "a text may fill its field");
        assert_eq!((header.payload_offset, header.key_bytes), (2_068_480, 64));
        assert_eq!(header.uuid, "0a1b\\x1b[31m", "what is printed is escaped");
        assert_eq!(header.slots[0], KeySlot { active: true, iterations: 0, key_offset: 4096, stripes: 4000 });
        assert!(header.slots.len() == 8 && header.slots[1..].iter().all(|s| !s.active));
        for (at, what) in [(0, "magic"), (7, "version"), (211, "slot")] {
            let mut bytes = luks();
            bytes[at] ^= 0x40;
            let error = std::format!("{}", LuksHeader::parse(&bytes).unwrap_err());
            assert!(error.contains(what), "{error}");
        }
        for len in 0..LuksHeader::BYTES {
            assert!(LuksHeader::parse(&luks()[..len]).is_err());
        }
    }

    #[test]
    fn a_pointer_leads_to_a_cluster() {
        let g = Geometry::new(12, false).unwrap();
        let data = |offset: u64, length: u64| [offset.to_be_bytes(), length.to_be_bytes()].concat();
        let fine = EncryptionPointer::parse(&data(0x4000, 2_068_480), g).unwrap();
        assert_eq!(fine, EncryptionPointer { offset: HostOffset(0x4000), length: 2_068_480 });
        for (offset, length) in
            [(0, 4096), (0x4200, 4096), (1 << 56, 4096), (0x4000, 591), (0x4000, u64::MAX)]
        {
            assert!(EncryptionPointer::parse(&data(offset, length), g).is_err(), "{offset:#x} {length}");
        }
        assert!(EncryptionPointer::parse(&data(0x4000, 4096)[..15], g).is_err());
    }
}
