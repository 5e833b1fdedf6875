//! The snapshot table (spec: snapshots).

use alloc::vec::Vec;

use crate::FormatError;
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
    /// Bytes of the entry in the table, without the padding that aligns the next one.
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
    /// [`FormatError::Truncated`] if the entries need more bytes, [`FormatError::OutOfRange`] for oversized extra data.
    pub fn parse_table(bytes: &[u8], count: u32) -> Result<Vec<Self>, FormatError> {
        let mut records = Vec::new();
        let mut at = 0usize;
        for _ in 0..count {
            let (record, len) = Self::parse(bytes, at)?;
            records.push(record);
            at += len.next_multiple_of(8);
        }
        Ok(records)
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

#[cfg(test)]
mod tests {
    use super::*;

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
