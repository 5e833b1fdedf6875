//! The snapshot table (spec: snapshots).

use alloc::vec::Vec;

use crate::FormatError;
use crate::Geometry;
use crate::error::check_range;
use crate::header::be;

/// One entry of the snapshot table, as stored; strings are raw bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Host offset of the snapshot's L1 table.
    pub l1_table_offset: u64,
    /// Entries of the snapshot's L1 table.
    pub l1_size: u32,
    /// Id: decimal digits by convention.
    pub id: Vec<u8>,
    /// Name; need not be unique, may be empty.
    pub name: Vec<u8>,
    /// Seconds since the Epoch.
    pub date_seconds: u32,
    /// Nanosecond part of the date.
    pub date_nanoseconds: u32,
    /// Guest running time in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of VM state; 0 if none.
    pub vm_state_size: u64,
    /// Virtual disk size at the time; `None` in entries too old to say.
    pub disk_size: Option<u64>,
    /// Instruction count; `None` if not recorded.
    pub icount: Option<u64>,
    /// Extra data behind the known fields, kept verbatim.
    pub unknown_extra: Vec<u8>,
    /// Bytes of the entry in the table that it was read from, without the padding that aligns the next one; says nothing
    /// about the bytes that [`encode_table`](Self::encode_table) gives.
    pub stored_bytes: usize,
}

impl SnapshotRecord {
    /// Largest extra data of one entry that QEMU opens.
    pub const MAX_EXTRA: u32 = 1024;
    /// Most snapshots an image may have.
    pub const MAX_COUNT: u32 = 65536;
    /// Largest snapshot table in bytes.
    pub const MAX_TABLE: u64 = 64 << 20;

    /// The `count` entries at the start of `bytes`; what follows them is ignored.
    ///
    /// # Errors
    /// [`FormatError::Truncated`] if the entries need more bytes, [`FormatError::OutOfRange`] for oversized extra data, too
    /// many entries, or a table of more than 64 MiB.
    pub fn parse_table(bytes: &[u8], count: u32) -> Result<Vec<Self>, FormatError> {
        check_range("nb_snapshots", count.into(), 0, Self::MAX_COUNT.into())?;
        let mut records = Vec::new();
        let mut at = 0usize;
        for _ in 0..count {
            let (record, len) = Self::parse(bytes, at)?;
            records.push(record);
            check_range("snapshot table size", (at + len) as u64, 0, Self::MAX_TABLE)?;
            at += len.next_multiple_of(8);
        }
        Ok(records)
    }

    /// The table's bytes: each entry with its disk size and instruction count (24 bytes of extra data) and what else it
    /// had, aligned to 8; no padding behind the last one. A VM state of 2^32 bytes and more has 0 in the 32-bit field.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] for too many entries, a field that does not fit, or a table of more than 64 MiB;
    /// [`FormatError::Missing`] if an entry does not know its disk size: it has the size that the disk has now.
    pub fn encode_table(records: &[Self]) -> Result<Vec<u8>, FormatError> {
        check_range("nb_snapshots", records.len() as u64, 0, Self::MAX_COUNT.into())?;
        let mut out = Vec::new();
        for record in records {
            out.resize(out.len().next_multiple_of(8), 0);
            record.encode(&mut out)?;
            check_range("snapshot table size", out.len() as u64, 0, Self::MAX_TABLE)?;
        }
        Ok(out)
    }

    fn encode(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let Some(disk_size) = self.disk_size else {
            return Err(FormatError::Missing { structure: "disk size of a snapshot" });
        };
        check_range("snapshot l1_size", self.l1_size.into(), 0, Geometry::MAX_L1_ENTRIES.into())?;
        let length = |field, len: usize| {
            let max = u16::MAX;
            u16::try_from(len).map_err(|_| FormatError::OutOfRange {
                field,
                value: len as u64,
                min: 0,
                max: max.into(),
            })
        };
        let extra = KNOWN_EXTRA + self.unknown_extra.len();
        check_range("snapshot extra data size", extra as u64, KNOWN_EXTRA as u64, Self::MAX_EXTRA.into())?;
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(length("snapshot id length", self.id.len())?.to_be_bytes());
        out.extend(length("snapshot name length", self.name.len())?.to_be_bytes());
        out.extend(self.date_seconds.to_be_bytes());
        out.extend(self.date_nanoseconds.to_be_bytes());
        out.extend(self.vm_clock_nanoseconds.to_be_bytes());
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend(u32::try_from(extra).expect("at most 1024").to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(disk_size.to_be_bytes());
        out.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(&self.unknown_extra);
        out.extend(&self.id);
        out.extend(&self.name);
        Ok(())
    }

    /// The entry that `bytes` start with, and its length; the next one follows at a multiple of 8.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], with the bytes that are needed, counted from its start; [`FormatError::OutOfRange`] for
    /// oversized extra data.
    pub fn parse_entry(bytes: &[u8]) -> Result<(Self, usize), FormatError> {
        Self::parse(bytes, 0)
    }

    fn parse(bytes: &[u8], at: usize) -> Result<(Self, usize), FormatError> {
        let take = |from: usize, len: usize| {
            let start = at.saturating_add(from);
            bytes.get(start..start.saturating_add(len)).ok_or(FormatError::Truncated {
                structure: "snapshot table",
                needed: start.saturating_add(len) as u64,
                have: bytes.len() as u64,
            })
        };
        let fixed = take(0, 40)?;
        let (id_len, name_len) = (usize::from(be::u16(fixed, 12)), usize::from(be::u16(fixed, 14)));
        let extra_len = be::u32(fixed, 36);
        if extra_len > Self::MAX_EXTRA {
            return Err(FormatError::OutOfRange {
                field: "snapshot extra data size",
                value: extra_len.into(),
                min: 0,
                max: Self::MAX_EXTRA.into(),
            });
        }
        let extra_len = extra_len as usize;
        let extra = take(40, extra_len)?;
        let field = |from| (extra.len() >= from + 8).then(|| be::u64(extra, from));
        let record = Self {
            l1_table_offset: be::u64(fixed, 0),
            l1_size: be::u32(fixed, 8),
            id: take(40 + extra_len, id_len)?.to_vec(),
            name: take(40 + extra_len + id_len, name_len)?.to_vec(),
            date_seconds: be::u32(fixed, 16),
            date_nanoseconds: be::u32(fixed, 20),
            vm_clock_nanoseconds: be::u64(fixed, 24),
            vm_state_size: field(0).unwrap_or_else(|| be::u32(fixed, 32).into()),
            disk_size: field(8),
            icount: field(16).filter(|&count| count != u64::MAX),
            unknown_extra: extra.get(24..).unwrap_or(&[]).to_vec(),
            stored_bytes: 40 + extra_len + id_len + name_len,
        };
        Ok((record, 40 + extra_len + id_len + name_len))
    }
}

/// Bytes of extra data with a known meaning: VM state size, disk size, instruction count.
const KNOWN_EXTRA: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u32) -> SnapshotRecord {
        let (id, name) = (std::format!("{n}"), "n".repeat(n as usize % 19));
        let unknown_extra = std::vec![0xee; n as usize % 5 * 3];
        SnapshotRecord {
            l1_table_offset: u64::from(n) << 16,
            l1_size: n,
            date_seconds: 1_700_000_000 + n,
            date_nanoseconds: n * 1000,
            vm_clock_nanoseconds: u64::from(n) << 33,
            vm_state_size: [0, 7, u32::MAX.into(), 1 << 32, u64::MAX][n as usize % 5],
            disk_size: Some(u64::from(n) << 20),
            icount: (!n.is_multiple_of(3)).then_some(n.into()),
            stored_bytes: 40 + 24 + unknown_extra.len() + id.len() + name.len(),
            unknown_extra,
            id: id.into(),
            name: name.into(),
        }
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let mut records = Vec::new();
        for n in 0..100 {
            let bytes = SnapshotRecord::encode_table(&records).unwrap();
            assert_eq!(SnapshotRecord::parse_table(&bytes, n).unwrap(), records, "{n}");
            assert_eq!(
                SnapshotRecord::encode_table(&records.clone()).unwrap(),
                bytes,
                "equal values, equal bytes"
            );
            // Nothing behind the last entry.
            let last = records.last().map_or(0, |r: &SnapshotRecord| r.stored_bytes);
            let before: usize = records.iter().map(|r| r.stored_bytes.next_multiple_of(8)).sum();
            assert_eq!(bytes.len(), before - last.next_multiple_of(8) + last, "{n}");
            records.push(record(n));
        }
    }

    #[test]
    fn the_32_bit_vm_state_size_is_0_where_it_does_not_fit() {
        for (size, short) in [(0, 0), (u64::from(u32::MAX), u32::MAX), (1 << 32, 0)] {
            let table = SnapshotRecord::encode_table(&[SnapshotRecord { vm_state_size: size, ..record(1) }]);
            assert_eq!(be::u32(&table.unwrap(), 32), short, "{size}");
        }
    }

    #[test]
    fn what_an_entry_cannot_say_is_refused_by_field() {
        type Edit = fn(&mut SnapshotRecord);
        let cases: &[(&str, Edit)] = &[
            ("disk size of a snapshot is missing", |r| r.disk_size = None),
            ("extra data size is 1025, must be in 24..=1024", |r| r.unknown_extra = std::vec![0; 1001]),
            ("id length is 65536", |r| r.id = std::vec![b'1'; 65536]),
            ("name length is 65536, must be in 0..=65535", |r| r.name = std::vec![b'n'; 65536]),
            ("l1_size is 4194305", |r| r.l1_size = Geometry::MAX_L1_ENTRIES + 1),
        ];
        for (want, edit) in cases {
            let mut bad = record(1);
            edit(&mut bad);
            let error = std::format!("{}", SnapshotRecord::encode_table(&[bad]).expect_err(want));
            assert!(error.contains(want), "{want}: {error}");
        }
        let most = SnapshotRecord::MAX_COUNT as usize;
        let small = SnapshotRecord { name: Vec::new(), ..record(0) };
        assert!(SnapshotRecord::encode_table(&std::vec![small.clone(); most]).is_ok());
        assert!(SnapshotRecord::encode_table(&std::vec![small.clone(); most + 1]).is_err());
        let large = SnapshotRecord { name: std::vec![b'n'; 2000], ..small };
        let error = SnapshotRecord::encode_table(&std::vec![large; most]).unwrap_err();
        assert!(std::format!("{error}").contains("snapshot table size"), "{error}");
        assert!(SnapshotRecord::parse_table(&[], SnapshotRecord::MAX_COUNT + 1).is_err());
    }

    fn entry(id: &[u8], name: &[u8], extra: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(0x50000u64.to_be_bytes());
        out.extend(2u32.to_be_bytes());
        out.extend(u16::try_from(id.len()).unwrap().to_be_bytes());
        out.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        out.extend(1_700_000_000u32.to_be_bytes());
        out.extend([0; 12]);
        out.extend(7u32.to_be_bytes());
        out.extend(u32::try_from(extra.len()).unwrap().to_be_bytes());
        out.extend(extra);
        out.extend(id);
        out.extend(name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    #[test]
    fn parses_entries_with_and_without_extra_data() {
        let mut extra = Vec::new();
        extra.extend((5u64 << 32).to_be_bytes());
        extra.extend((1u64 << 20).to_be_bytes());
        extra.extend(u64::MAX.to_be_bytes());
        extra.extend(*b"more");
        let mut table = entry(b"1", b"old", b"");
        table.extend(entry(b"2", b"", &extra));
        let records = SnapshotRecord::parse_table(&table, 2).unwrap();
        assert_eq!((records[0].vm_state_size, records[0].disk_size), (7, None));
        assert_eq!(records[1].vm_state_size, 5 << 32);
        assert_eq!(records[1].disk_size, Some(1 << 20));
        assert_eq!(records[1].icount, None);
        assert_eq!(records[1].unknown_extra, b"more");
        assert_eq!(records[0].name, b"old");
        for len in 0..table.len() - 8 {
            assert!(SnapshotRecord::parse_table(&table[..len], 2).is_err(), "{len}");
        }
    }
}
