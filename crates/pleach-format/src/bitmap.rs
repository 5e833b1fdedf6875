//! The bitmaps header extension, the bitmap directory and bitmap tables (spec: bitmaps).

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use crate::error::{check_place, check_range};
use crate::header::be;
use crate::{FormatError, Geometry, HostOffset};

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
        let extension = Self {
            count: be::u32(data, 0),
            directory_size: be::u64(data, 8),
            directory_offset: be::u64(data, 16),
        };
        extension.check_sizes()?;
        Ok(extension)
    }

    /// The extension's data.
    ///
    /// # Errors
    /// A count or size out of range.
    pub fn encode(&self) -> Result<[u8; 24], FormatError> {
        self.check_sizes()?;
        let head = (u128::from(self.count) << 96 | u128::from(self.directory_size)).to_be_bytes();
        let mut out = [0; 24];
        for (to, from) in out.iter_mut().zip(head.into_iter().chain(self.directory_offset.to_be_bytes())) {
            *to = from;
        }
        Ok(out)
    }

    /// Refuses a directory that does not start a cluster, or starts the first.
    pub(crate) fn check(&self, geometry: Geometry) -> Result<(), FormatError> {
        check_place("bitmap_directory_offset", self.directory_offset, geometry)
    }

    fn check_sizes(&self) -> Result<(), FormatError> {
        check_range("nb_bitmaps", self.count.into(), 1, Self::MAX_COUNT)?;
        check_range("bitmap_directory_size", self.directory_size, 1, Self::MAX_DIRECTORY)
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
    /// The only type of bitmap.
    pub const DIRTY_TRACKING: u8 = 1;
    /// Longest name that QEMU opens.
    pub const MAX_NAME: u64 = 1023;
    /// Most entries of a bitmap table that QEMU opens.
    pub const MAX_TABLE: u64 = 0x800_0000;
    /// Most bytes of one bitmap, whole clusters counted, that QEMU opens.
    pub const MAX_BYTES: u64 = 512 << 20;

    /// Bytes of a bitmap that has one bit for each `1 << granularity_bits` guest bytes of a disk of `size` bytes.
    pub fn data_bytes(granularity_bits: u8, size: u64) -> u64 {
        let bits = match 1u64.checked_shl(granularity_bits.into()) {
            Some(granularity) => size.div_ceil(granularity),
            None => u64::from(size > 0),
        };
        bits.div_ceil(8)
    }

    /// Refuses what QEMU refuses of a bitmap of a disk of `size` bytes, and with it the whole image: extra data, other
    /// types, flags without a meaning, a name, table or granularity out of range, a table too short for the disk.
    ///
    /// # Errors
    /// Which field, its value, and what is allowed.
    pub fn check(&self, geometry: Geometry, size: u64) -> Result<(), FormatError> {
        self.check_entry()?;
        let reserved = !(Self::IN_USE | Self::AUTO);
        if self.flags & reserved != 0 {
            let (value, reserved) = (self.flags.into(), reserved.into());
            return Err(FormatError::Reserved { field: "bitmap flags", value, reserved });
        }
        check_range(
            "bitmap type",
            self.kind.into(),
            Self::DIRTY_TRACKING.into(),
            Self::DIRTY_TRACKING.into(),
        )?;
        check_range("bitmap granularity_bits", self.granularity_bits.into(), 9, 31)?;
        check_range("bitmap extra_data_size", self.extra.len() as u64, 0, 0)?;
        check_place("bitmap_table_offset", self.table_offset, geometry)?;
        let most = Self::MAX_TABLE.min(Self::MAX_BYTES / geometry.cluster_size());
        check_range("bitmap_table_size", self.table_size.into(), 1, most)?;
        let needed = match self.flags & Self::IN_USE {
            // A stale bitmap may be one of a smaller disk.
            0 => geometry.clusters_for(Self::data_bytes(self.granularity_bits, size)).0,
            _ => 1,
        };
        check_range("bitmap_table_size", self.table_size.into(), needed, needed.max(most))
    }

    /// Bytes of the entry in the directory, its padding included.
    pub fn stored_bytes(&self) -> usize {
        (24 + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// The directory's bytes, the last entry padded as well.
    ///
    /// # Errors
    /// No entry or too many, a name that is empty, too long or there twice, or a directory too large.
    pub fn encode_directory(records: &[Self]) -> Result<Vec<u8>, FormatError> {
        check_range("nb_bitmaps", records.len() as u64, 1, BitmapsExtension::MAX_COUNT)?;
        let mut names = BTreeSet::new();
        let mut out = Vec::new();
        for (i, record) in records.iter().enumerate() {
            record.check_entry()?;
            if !names.insert(&record.name) {
                return Err(FormatError::Invalid {
                    field: "bitmap name",
                    value: i as u64,
                    rule: "each entry of the directory has a name of its own",
                });
            }
            let [name_high, name_low] = u16::try_from(record.name.len()).expect("checked").to_be_bytes();
            let extra = u32::try_from(record.extra.len()).expect("checked");
            out.extend(record.table_offset.to_be_bytes());
            out.extend(record.table_size.to_be_bytes());
            out.extend(record.flags.to_be_bytes());
            out.extend([record.kind, record.granularity_bits, name_high, name_low]);
            out.extend(extra.to_be_bytes());
            out.extend(&record.extra);
            out.extend(&record.name);
            out.resize(out.len().next_multiple_of(8), 0);
            check_range("bitmap_directory_size", out.len() as u64, 1, BitmapsExtension::MAX_DIRECTORY)?;
        }
        Ok(out)
    }

    /// What an entry must keep to, whatever the image.
    fn check_entry(&self) -> Result<(), FormatError> {
        check_range("bitmap name length", self.name.len() as u64, 1, Self::MAX_NAME)?;
        check_range("bitmap extra_data_size", self.extra.len() as u64, 0, BitmapsExtension::MAX_DIRECTORY)
    }

    /// Reads a whole directory of `count` entries that must fill `bytes` exactly.
    ///
    /// # Errors
    /// Entries that end behind the directory, or do not fill it.
    pub fn parse_directory(bytes: &[u8], count: u32) -> Result<Vec<Self>, FormatError> {
        let mut records = Vec::new();
        let mut at = 0usize;
        for _ in 0..count {
            let (record, len) = Self::parse(bytes, at)?;
            records.push(record);
            at = at.saturating_add(len.next_multiple_of(8));
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

    /// The directory entry that `bytes` start with, and its length; the next one follows at a multiple of 8.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], with the bytes that are needed, counted from its start.
    pub fn parse_entry(bytes: &[u8]) -> Result<(Self, usize), FormatError> {
        Self::parse(bytes, 0)
    }

    fn parse(bytes: &[u8], at: usize) -> Result<(Self, usize), FormatError> {
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
        let record = Self {
            table_offset: be::u64(fixed, 0),
            table_size: be::u32(fixed, 8),
            flags: be::u32(fixed, 12),
            kind: be::u8(fixed, 16),
            granularity_bits: be::u8(fixed, 17),
            extra,
            name,
        };
        Ok((record, 24 + extra_len + name_len))
    }
}

/// What one entry of a bitmap table says about its cluster of bits.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are 0.
    Zeros,
    /// All bits are 1.
    Ones,
    /// The bits are in this cluster, the first one in bit 0 of the first byte.
    Data(HostOffset),
}

/// An entry of a bitmap table as stored, in host byte order.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapTableEntry(pub u64);

impl BitmapTableEntry {
    const RESERVED: u64 = 0xff00_0000_0000_01fe;

    /// The entry that says `cluster`.
    pub fn new(cluster: BitmapCluster) -> Self {
        match cluster {
            BitmapCluster::Zeros => Self(0),
            BitmapCluster::Ones => Self(1),
            BitmapCluster::Data(offset) => Self(offset.0),
        }
    }

    /// What the entry says.
    ///
    /// # Errors
    /// Reserved bits, bit 0 together with an offset, or an offset that is not cluster-aligned.
    pub fn decode(self, geometry: Geometry) -> Result<BitmapCluster, FormatError> {
        let offset = self.0 & !1;
        let reserved = if offset & !Self::RESERVED == 0 { Self::RESERVED } else { Self::RESERVED | 1 };
        if self.0 & reserved != 0 {
            return Err(FormatError::Reserved { field: "bitmap table entry", value: self.0, reserved });
        }
        match (offset, self.0 & 1) {
            (0, 0) => Ok(BitmapCluster::Zeros),
            (0, _) => Ok(BitmapCluster::Ones),
            _ => {
                check_place("bitmap table entry", offset, geometry)?;
                Ok(BitmapCluster::Data(HostOffset(offset)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &[u8]) -> BitmapRecord {
        BitmapRecord {
            table_offset: 0x70000,
            table_size: 1,
            flags: BitmapRecord::AUTO,
            kind: BitmapRecord::DIRTY_TRACKING,
            granularity_bits: 16,
            extra: Vec::new(),
            name: name.to_vec(),
        }
    }

    #[test]
    fn a_directory_is_read_as_it_was_written() {
        let mut records = Vec::new();
        for len in [1, 7, 8, 9, 1023] {
            for extra in [0, 1, 8] {
                let name = std::format!("{extra}{}", "n".repeat(len - 1));
                let extra = std::vec![0xee; extra];
                records.push(BitmapRecord { extra, ..record(name.as_bytes()) });
                let bytes = BitmapRecord::encode_directory(&records).unwrap();
                assert_eq!(bytes.len(), records.iter().map(BitmapRecord::stored_bytes).sum::<usize>());
                let count = u32::try_from(records.len()).unwrap();
                assert_eq!(BitmapRecord::parse_directory(&bytes, count).unwrap(), records);
                assert_eq!(BitmapRecord::encode_directory(&records.clone()).unwrap(), bytes);
            }
        }
        for (name, records) in [
            ("none", Vec::new()),
            ("no name", [record(b"")].into()),
            ("long name", [record(&[b'n'; 1024])].into()),
            ("the same name twice", [record(b"a"), record(b"b"), record(b"a")].into()),
        ] {
            assert!(BitmapRecord::encode_directory(&records).is_err(), "{name}");
        }
    }

    #[test]
    fn t34_what_makes_qemu_refuse_the_image_is_refused_by_field() {
        let g = Geometry::new(16, false).unwrap();
        // 64 KiB granularity, 64 KiB clusters: one table entry answers for 32 GiB.
        record(b"fine").check(g, 32 << 30).unwrap();
        type Edit = fn(&mut BitmapRecord);
        let cases: &[(&str, Edit)] = &[
            ("bitmap flags is 0x6", |r| r.flags |= 4),
            ("bitmap type is 0", |r| r.kind = 0),
            ("granularity_bits is 8, must be in 9..=31", |r| r.granularity_bits = 8),
            ("granularity_bits is 32", |r| r.granularity_bits = 32),
            ("extra_data_size is 1, must be in 0..=0", |r| r.extra = std::vec![0]),
            ("name length is 0", |r| r.name.clear()),
            ("bitmap_table_offset is 0x70200", |r| r.table_offset += 512),
            ("bitmap_table_offset is 0,", |r| r.table_offset = 0),
            ("bitmap_table_size is 0, must be in 1..=8192", |r| r.table_size = 0),
            ("bitmap_table_size is 8193", |r| r.table_size = 8193),
            ("bitmap_table_size is 1, must be in 2..", |r| r.granularity_bits = 15),
        ];
        for (want, edit) in cases {
            let mut bad = record(b"x");
            edit(&mut bad);
            let error = std::format!("{}", bad.check(g, 32 << 30).expect_err(want));
            assert!(error.contains(want), "{want}: {error}");
        }
        // More than a bitmap can have: 512 MiB at 512 bytes a bit answer for 2 TiB.
        let fine_grained = BitmapRecord { granularity_bits: 9, table_size: 8192, ..record(b"x") };
        fine_grained.check(g, 2 << 40).unwrap();
        assert!(fine_grained.check(g, (2 << 40) + 512).is_err());
        let stale = BitmapRecord { flags: BitmapRecord::IN_USE, granularity_bits: 15, ..record(b"x") };
        stale.check(g, 32 << 30).unwrap();
        assert_eq!(BitmapRecord::data_bytes(9, 0), 0);
        assert_eq!(BitmapRecord::data_bytes(9, 1), 1);
        assert_eq!(BitmapRecord::data_bytes(9, 4097), 2);
        assert_eq!(BitmapRecord::data_bytes(64, u64::MAX), 1);
    }

    #[test]
    fn table_entries() {
        let g = Geometry::new(12, false).unwrap();
        for cluster in [BitmapCluster::Zeros, BitmapCluster::Ones, BitmapCluster::Data(HostOffset(0x7000))] {
            assert_eq!(BitmapTableEntry::new(cluster).decode(g), Ok(cluster));
        }
        for raw in [2, 0x100, 1 << 56, 1 << 63, 0x7001, 0x7200, 0x7000 | 1 << 60] {
            assert!(BitmapTableEntry(raw).decode(g).is_err(), "{raw:#x}");
        }
    }

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
        assert_eq!(ext.encode().unwrap(), data);
        let aligned = Geometry::new(16, false).unwrap();
        ext.check(aligned).unwrap();
        assert!(ext.check(Geometry::new(17, false).unwrap()).is_err());
        for (count, size) in [(0, 32), (65536, 32), (1, 0), (1, BitmapsExtension::MAX_DIRECTORY + 1)] {
            let bad = BitmapsExtension { count, directory_size: size, ..ext };
            assert!(bad.encode().is_err(), "{count} {size}");
        }
        data[3] = 0;
        assert!(BitmapsExtension::parse(&data).is_err());
    }
}
