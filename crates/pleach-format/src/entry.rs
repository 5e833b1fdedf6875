//! L1, L2 and refcount table entries (spec: L1/L2 tables, refcount table; standard, compressed and extended).

use core::ops::Range;

use smallvec::SmallVec;

use crate::{FormatError, Geometry, GuestOffset, HostOffset, Version};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// An L1 entry as stored, in host byte order.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    const RESERVED: u64 = 0x7f00_0000_0000_01ff;

    /// The entry that leads to an L2 table of refcount 1 at `offset`.
    pub fn owned(offset: HostOffset) -> Self {
        Self(offset.0 | COPIED)
    }

    /// Whether the entry claims that its L2 table has refcount exactly 1. Only meaningful in the active L1 table.
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the COPIED flag set or cleared.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }

    /// Where the L2 table is; `None` if the whole range is unallocated.
    ///
    /// # Errors
    /// Reserved bits set, or an offset that is not cluster-aligned.
    pub fn l2_table(self, geometry: Geometry) -> Result<Option<HostOffset>, FormatError> {
        if self.0 & Self::RESERVED != 0 {
            return Err(FormatError::Reserved { field: "L1 entry", value: self.0, reserved: Self::RESERVED });
        }
        let offset = self.0 & OFFSET_MASK;
        if !geometry.is_aligned(offset) {
            return Err(unaligned("L1 entry", offset, geometry));
        }
        Ok((offset != 0).then_some(HostOffset(offset)))
    }
}

/// What an L2 entry says about its guest cluster.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Nothing: the backing file answers, or zeros where there is none.
    Unallocated,
    /// Reads as zeros; no host cluster.
    Zero,
    /// Reads as zeros; a host cluster is owned (preallocated).
    ZeroAllocated(HostOffset),
    /// Data at this host offset.
    Data(HostOffset),
    /// Compressed data.
    Compressed(CompressedExtent),
}

/// Where the compressed bytes of one guest cluster may be.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct CompressedExtent {
    /// First byte; any alignment.
    pub offset: HostOffset,
    /// Upper bound of the compressed length: up to the end of the last sector counted. The file may end before.
    pub bytes: u64,
}

/// A standard 64-bit L2 entry as stored (or the first half of an extended one), in host byte order.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct L2Entry(pub u64);

impl L2Entry {
    const RESERVED: u64 = 0x3f00_0000_0000_01fe;

    /// The entry of a zero cluster without a host cluster (version 3).
    pub const ZERO: Self = Self(ZERO);

    /// The entry of a data cluster of refcount 1 at `offset`.
    pub fn owned(offset: HostOffset) -> Self {
        Self(offset.0 | COPIED)
    }

    /// The entry of a compressed cluster whose `length` bytes start at `offset`; `None` if it cannot be written: no bytes,
    /// more sectors than the field counts (two clusters and more), or a place beyond what the descriptor (2^49 with 2 MiB
    /// clusters) or the format (2^56) reaches.
    pub fn compressed(geometry: Geometry, offset: HostOffset, length: u64) -> Option<Self> {
        let last = offset.0.checked_add(length.checked_sub(1)?)?;
        let bits = geometry.compressed_offset_bits();
        if offset.0 >> bits != 0 || last >> 56 != 0 {
            return None;
        }
        let sectors = last / 512 - offset.0 / 512;
        (sectors >> (geometry.cluster_bits() - 8) == 0)
            .then_some(Self(COMPRESSED | sectors << bits | offset.0))
    }

    /// Whether the entry claims that its data cluster has refcount exactly 1.
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the COPIED flag set or cleared.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }

    /// Whether the cluster is compressed. Decides the meaning of every other bit.
    pub fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// The data cluster of a standard entry that has at most COPIED beside an aligned place up to `last`. `None` says
    /// nothing about the entry: [`decode`](Self::decode) does.
    #[inline]
    pub fn plain_data(self, geometry: Geometry, last: HostOffset) -> Option<HostOffset> {
        let place = self.0 & !COPIED;
        (place != 0 && place <= last.0.min(OFFSET_MASK) && geometry.is_aligned(place))
            .then_some(HostOffset(place))
    }

    /// What a standard entry says; also the host part of an extended one, whose bitmap says the rest.
    ///
    /// # Errors
    /// Reserved bits, COPIED on a compressed entry, an unaligned offset, the zero flag in a version 2 image, or a
    /// compressed offset of 2^56 and above.
    pub fn decode(self, geometry: Geometry, version: Version) -> Result<Mapping, FormatError> {
        if self.is_compressed() {
            return self.extent(geometry).map(Mapping::Compressed);
        }
        if self.0 & Self::RESERVED != 0 {
            return Err(FormatError::Reserved { field: "L2 entry", value: self.0, reserved: Self::RESERVED });
        }
        let offset = HostOffset(self.0 & OFFSET_MASK);
        if !geometry.is_aligned(offset.0) {
            return Err(unaligned("L2 entry", offset.0, geometry));
        }
        let zero = self.0 & ZERO != 0 && !geometry.extended_l2();
        if zero && version == Version::V2 {
            return Err(FormatError::Invalid {
                field: "L2 entry",
                value: self.0,
                rule: "a version 2 image has no zero clusters",
            });
        }
        Ok(match (zero, offset.0) {
            (true, 0) => Mapping::Zero,
            (true, _) => Mapping::ZeroAllocated(offset),
            (false, 0) => Mapping::Unallocated,
            (false, _) => Mapping::Data(offset),
        })
    }

    /// What a standard entry says in an image with an external data file, where the cluster of `guest` lies at that very
    /// offset of the data file, and offset 0 is a place like any other if the COPIED flag is set.
    ///
    /// # Errors
    /// As [`decode`](Self::decode); a compressed entry, or an offset other than the cluster's own.
    pub fn decode_external(self, geometry: Geometry, guest: GuestOffset) -> Result<Mapping, FormatError> {
        let bad = |rule| Err(FormatError::Invalid { field: "L2 entry", value: self.0, rule });
        let own = "with an external data file, the host offset must equal the guest offset";
        match self.decode(geometry, Version::V3)? {
            Mapping::Compressed(_) => bad("with an external data file, there are no compressed clusters"),
            Mapping::Unallocated if self.copied() && guest.0 == 0 => Ok(Mapping::Data(HostOffset(0))),
            Mapping::Unallocated if self.copied() => bad(own),
            Mapping::Data(at) | Mapping::ZeroAllocated(at) if at.0 != guest.0 => bad(own),
            mapping => Ok(mapping),
        }
    }

    fn extent(self, geometry: Geometry) -> Result<CompressedExtent, FormatError> {
        if self.copied() {
            return Err(FormatError::Invalid {
                field: "L2 entry",
                value: self.0,
                rule: "a compressed entry never has the COPIED flag",
            });
        }
        let x = geometry.compressed_offset_bits();
        let offset = self.0 & ((1 << x) - 1);
        if offset >> 56 != 0 {
            return Err(FormatError::Invalid {
                field: "L2 entry",
                value: self.0,
                rule: "a compressed offset must be below 2^56",
            });
        }
        let sectors = ((self.0 >> x) & ((1 << (geometry.cluster_bits() - 8)) - 1)) + 1;
        Ok(CompressedExtent { offset: HostOffset(offset), bytes: sectors * 512 - offset % 512 })
    }
}

/// An extended 128-bit L2 entry (incompatible bit 4), in host byte order.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtendedL2Entry {
    /// Offset, COPIED and compressed flags, as in a standard entry; bit 0 is not used.
    pub descriptor: L2Entry,
    /// Bits 0..31: subcluster holds data; bits 32..63: subcluster reads as zeros.
    pub subclusters: u64,
}

/// Neighbouring subclusters of one cluster that say the same.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct SubRun {
    /// First subcluster, 0 to 31.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// What they say. A `Data` or `ZeroAllocated` offset is that of the first subcluster; `Compressed` covers all 32.
    pub mapping: Mapping,
}

impl ExtendedL2Entry {
    /// The entry of a cluster that reads as zeros, without a host cluster.
    pub const ZERO: Self = Self { descriptor: L2Entry(0), subclusters: 0xffff_ffff_0000_0000 };

    /// The entry of a cluster of refcount 1 at `offset`, all of it data.
    pub fn owned(offset: HostOffset) -> Self {
        Self { descriptor: L2Entry::owned(offset), subclusters: 0xffff_ffff }
    }

    /// The entry of a cluster of refcount 1 at `offset` that holds nothing yet: the backing file answers.
    pub fn preallocated(offset: HostOffset) -> Self {
        Self { descriptor: L2Entry::owned(offset), subclusters: 0 }
    }

    /// The same entry with `subclusters` holding data. Only meaningful with a host cluster.
    #[must_use]
    pub fn with_data(self, subclusters: Range<u32>) -> Self {
        let mask = mask(subclusters);
        Self { subclusters: self.subclusters & !(mask << 32) | mask, ..self }
    }

    /// The same entry with `subclusters` reading as zeros.
    #[must_use]
    pub fn with_zeros(self, subclusters: Range<u32>) -> Self {
        let mask = mask(subclusters);
        Self { subclusters: self.subclusters & !mask | mask << 32, ..self }
    }

    /// The same entry with `subclusters` saying nothing: the backing file answers.
    #[must_use]
    pub fn with_unallocated(self, subclusters: Range<u32>) -> Self {
        let mask = mask(subclusters);
        Self { subclusters: self.subclusters & !(mask | mask << 32), ..self }
    }

    /// The 16 bytes as stored.
    pub fn to_bytes(self) -> [u8; 16] {
        (u128::from(self.descriptor.0) << 64 | u128::from(self.subclusters)).to_be_bytes()
    }

    /// The entry's subclusters as runs, in order, all 32 covered.
    ///
    /// # Errors
    /// As [`L2Entry::decode`]; and a subcluster that is both data and zero, data without a host cluster, or a
    /// compressed entry with a bitmap: each makes the whole entry invalid.
    pub fn decode(self, geometry: Geometry) -> Result<SmallVec<[SubRun; 4]>, FormatError> {
        self.split(geometry, self.descriptor.decode(geometry, Version::V3)?)
    }

    /// The same in an image with an external data file, for the cluster of `guest`.
    ///
    /// # Errors
    /// As [`decode`](Self::decode) and [`L2Entry::decode_external`].
    pub fn decode_external(
        self,
        geometry: Geometry,
        guest: GuestOffset,
    ) -> Result<SmallVec<[SubRun; 4]>, FormatError> {
        self.split(geometry, self.descriptor.decode_external(geometry, guest)?)
    }

    /// The subclusters of a cluster whose descriptor says `mapping`.
    fn split(self, geometry: Geometry, mapping: Mapping) -> Result<SmallVec<[SubRun; 4]>, FormatError> {
        let bad = |rule| FormatError::Invalid { field: "subcluster bitmap", value: self.subclusters, rule };
        let mut runs: SmallVec<[SubRun; 4]> = SmallVec::new();
        let offset = match mapping {
            Mapping::Compressed(_) if self.subclusters != 0 => {
                return Err(bad("a compressed cluster has no subclusters"));
            }
            Mapping::Compressed(_) => {
                runs.push(SubRun { first: 0, count: 32, mapping });
                return Ok(runs);
            }
            Mapping::Data(offset) => Some(offset),
            _ => None,
        };
        for first in 0..32 {
            let data = self.subclusters >> first & 1 != 0;
            let zero = self.subclusters >> (32 + first) & 1 != 0;
            let here = offset.map(|o| HostOffset(o.0 + u64::from(first) * geometry.subcluster_size()));
            let mapping = match (data, zero, here) {
                (true, true, _) => return Err(bad("a subcluster is either data or zero")),
                (true, false, None) => return Err(bad("a data subcluster needs a host cluster")),
                (true, false, Some(at)) => Mapping::Data(at),
                (false, true, Some(at)) => Mapping::ZeroAllocated(at),
                (false, true, None) => Mapping::Zero,
                (false, false, _) => Mapping::Unallocated,
            };
            match runs.last_mut() {
                Some(last) if same_kind(last.mapping, mapping) => last.count += 1,
                _ => runs.push(SubRun { first, count: 1, mapping }),
            }
        }
        Ok(runs)
    }
}

/// A refcount table entry as stored, in host byte order.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// Where the refcount block is; `None` if all its counts are 0.
    ///
    /// # Errors
    /// Reserved bits set, or an offset that is not cluster-aligned.
    pub fn block(self, geometry: Geometry) -> Result<Option<HostOffset>, FormatError> {
        if self.0 & 0x1ff != 0 {
            return Err(FormatError::Reserved {
                field: "refcount table entry",
                value: self.0,
                reserved: 0x1ff,
            });
        }
        if !geometry.is_aligned(self.0) {
            return Err(unaligned("refcount table entry", self.0, geometry));
        }
        Ok((self.0 != 0).then_some(HostOffset(self.0)))
    }
}

/// Bits `subclusters` of the lower half of a subcluster bitmap; what lies beyond the 32 subclusters is ignored.
fn mask(subclusters: Range<u32>) -> u64 {
    let below = |end: u32| (1u64 << end.min(32)) - 1;
    below(subclusters.end) & !below(subclusters.start)
}

fn same_kind(a: Mapping, b: Mapping) -> bool {
    core::mem::discriminant(&a) == core::mem::discriminant(&b)
}

fn unaligned(field: &'static str, value: u64, geometry: Geometry) -> FormatError {
    FormatError::Unaligned { field, value, alignment: geometry.cluster_size() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_entries() {
        let g = Geometry::new(16, false).unwrap();
        let compressed =
            |offset, bytes| Mapping::Compressed(CompressedExtent { offset: HostOffset(offset), bytes });
        let cases = [
            ("empty", 0, Mapping::Unallocated),
            ("copied without offset", COPIED, Mapping::Unallocated),
            ("data", 0x8000_0000_0005_0000, Mapping::Data(HostOffset(0x50000))),
            ("shared data", 0x0005_0000, Mapping::Data(HostOffset(0x50000))),
            ("zero", 1, Mapping::Zero),
            ("preallocated zero", 0x8000_0000_0005_0001, Mapping::ZeroAllocated(HostOffset(0x50000))),
            // Captured from qemu-img: three packed clusters, the third at an odd offset.
            ("packed 0", 0x5180_0000_0005_0000, compressed(0x50000, 71 * 512)),
            ("packed 1", 0x5180_0000_0005_8cfc, compressed(0x58cfc, 71 * 512 - 0xfc)),
            ("packed 2", 0x5180_0000_0006_1927, compressed(0x61927, 71 * 512 - 0x127)),
        ];
        for (name, raw, want) in cases {
            assert_eq!(L2Entry(raw).decode(g, Version::V3), Ok(want), "{name}");
        }
        for (name, raw, version) in [
            ("reserved", 0x0100_0000_0005_0000, Version::V3),
            ("unaligned", 0x0005_0200, Version::V3),
            ("zero in v2", 1, Version::V2),
            ("copied compressed", 0xc000_0000_0005_0000, Version::V3),
        ] {
            assert!(L2Entry(raw).decode(g, version).is_err(), "{name}");
        }
    }

    #[test]
    fn extended_entries() {
        let g = Geometry::new(16, true).unwrap();
        // Captured from qemu-io: data in subclusters 0 and 3, zeros in 5.
        let entry =
            ExtendedL2Entry { descriptor: L2Entry(0x8000_0000_0005_0000), subclusters: 0x20_0000_0009 };
        let runs = entry.decode(g).unwrap();
        let want = [
            (0, 1, Mapping::Data(HostOffset(0x50000))),
            (1, 2, Mapping::Unallocated),
            (3, 1, Mapping::Data(HostOffset(0x50000 + 3 * 2048))),
            (4, 1, Mapping::Unallocated),
            (5, 1, Mapping::ZeroAllocated(HostOffset(0x50000 + 5 * 2048))),
            (6, 26, Mapping::Unallocated),
        ];
        assert_eq!(runs.len(), want.len());
        for (run, (first, count, mapping)) in runs.iter().zip(want) {
            assert_eq!(*run, SubRun { first, count, mapping });
        }
        for (name, descriptor, subclusters) in [
            ("both", 0x50000, 1 | 1 << 32),
            ("data, no cluster", 0, 1),
            ("compressed, bitmap", COMPRESSED, 1),
        ] {
            let entry = ExtendedL2Entry { descriptor: L2Entry(descriptor), subclusters };
            assert!(entry.decode(g).is_err(), "{name}");
        }
    }

    #[test]
    fn t05_compressed_descriptors_round_trip_in_every_geometry() {
        for bits in Geometry::MIN_CLUSTER_BITS..=Geometry::MAX_CLUSTER_BITS {
            let g = Geometry::new(bits, false).unwrap();
            let reach = 1u64 << g.compressed_offset_bits().min(56);
            let cluster = g.cluster_size();
            for offset in [0, 1, 511, 512, 0x5_0123, reach / 2 + 77, reach - 512, reach - 1] {
                for length in [1, 2, 511, 512, 513, cluster - 1, cluster] {
                    let name = std::format!("{bits} {offset:#x} {length}");
                    let entry = L2Entry::compressed(g, HostOffset(offset), length);
                    if (offset + length - 1) >> 56 != 0 {
                        assert_eq!(entry, None, "{name}");
                        continue;
                    }
                    let entry = entry.expect(&name);
                    assert!(entry.is_compressed() && !entry.copied());
                    let Ok(Mapping::Compressed(extent)) = entry.decode(g, Version::V2) else {
                        panic!("{name}: {entry:?}");
                    };
                    assert_eq!(extent.offset.0, offset, "{name}");
                    // All of the data, and nothing behind the sector that they end in.
                    assert!(extent.bytes >= length && extent.bytes - length < 512, "{name}: {extent:?}");
                }
            }
            let none = [(0, 0), (reach, 1), (u64::MAX, 1), (u64::MAX, u64::MAX), (0, 2 * cluster + 1)];
            for (offset, length) in none {
                assert_eq!(
                    L2Entry::compressed(g, HostOffset(offset), length),
                    None,
                    "{bits} {offset:#x} {length}"
                );
            }
            // The most that the field counts.
            assert!(L2Entry::compressed(g, HostOffset(0), 2 * cluster).is_some(), "{bits}");
            assert!(L2Entry::compressed(g, HostOffset(1), 2 * cluster).is_none(), "{bits}");
        }
        // Captured from qemu-img: the second of three packed clusters; its bytes end in the 71st sector.
        let g = Geometry::new(16, false).unwrap();
        assert_eq!(
            L2Entry::compressed(g, HostOffset(0x58cfc), 70 * 512),
            Some(L2Entry(0x5180_0000_0005_8cfc))
        );
    }

    #[test]
    fn t23_extended_entries_are_made_of_their_subclusters() {
        let g = Geometry::new(16, true).unwrap();
        let at = HostOffset(0x50000);
        let made = ExtendedL2Entry::preallocated(at).with_data(0..1).with_data(3..4).with_zeros(5..6);
        // Captured from qemu-io.
        assert_eq!(made.to_bytes(), 0x8000_0000_0005_0000_0000_0020_0000_0009u128.to_be_bytes());
        let cases = [
            ("all data", ExtendedL2Entry::owned(at), &[(32, Mapping::Data(at))][..]),
            ("preallocated", ExtendedL2Entry::preallocated(at), &[(32, Mapping::Unallocated)]),
            ("zero", ExtendedL2Entry::ZERO, &[(32, Mapping::Zero)]),
            ("nothing", ExtendedL2Entry::default(), &[(32, Mapping::Unallocated)]),
            (
                "zeros over data, data over zeros, then nothing",
                ExtendedL2Entry::owned(at).with_zeros(0..32).with_data(0..16).with_unallocated(8..99),
                &[(8, Mapping::Data(at)), (24, Mapping::Unallocated)],
            ),
            ("an empty range", ExtendedL2Entry::owned(at).with_zeros(7..7), &[(32, Mapping::Data(at))]),
        ];
        for (name, entry, want) in cases {
            let runs = entry.decode(g).expect(name);
            let found: std::vec::Vec<_> = runs.iter().map(|r| (r.count, r.mapping)).collect();
            assert_eq!(found, want, "{name}");
        }
    }

    #[test]
    fn entries_of_an_image_with_a_data_file() {
        let standard = Geometry::new(16, false).unwrap();
        let cases = [
            ("data at 0", 0, COPIED, Some(Mapping::Data(HostOffset(0)))),
            ("0 elsewhere", 0x10000, COPIED, None),
            ("not copied", 0, 0, Some(Mapping::Unallocated)),
            ("own place", 0x50000, COPIED | 0x50000, Some(Mapping::Data(HostOffset(0x50000)))),
            ("another place", 0x50000, COPIED | 0x60000, None),
            ("zeros at another place", 0x50000, COPIED | 0x60001, None),
            ("zero", 0x50000, ZERO, Some(Mapping::Zero)),
            ("zero at 0", 0, COPIED | ZERO, Some(Mapping::Zero)),
            ("compressed", 0x50000, COMPRESSED | 0x50000, None),
        ];
        for (name, guest, raw, want) in cases {
            assert_eq!(L2Entry(raw).decode_external(standard, GuestOffset(guest)).ok(), want, "{name}");
        }
        let extended = Geometry::new(16, true).unwrap();
        let entry = ExtendedL2Entry { descriptor: L2Entry(COPIED), subclusters: 1 };
        let runs = entry.decode_external(extended, GuestOffset(0)).unwrap();
        assert_eq!(runs.first().map(|r| r.mapping), Some(Mapping::Data(HostOffset(0))));
        assert!(entry.decode(extended).is_err(), "offset 0 is no place in the image itself");
    }

    #[test]
    fn pointers() {
        let g = Geometry::new(12, false).unwrap();
        assert_eq!(L1Entry(COPIED | 0x3000).l2_table(g), Ok(Some(HostOffset(0x3000))));
        assert_eq!(L1Entry(COPIED).l2_table(g), Ok(None));
        assert!(L1Entry(0x3200).l2_table(g).is_err());
        assert!(L1Entry(0x3001).l2_table(g).is_err());
        assert_eq!(RefcountTableEntry(0x2000).block(g), Ok(Some(HostOffset(0x2000))));
        assert!(RefcountTableEntry(0x2200).block(g).is_err());
        assert!(RefcountTableEntry(1).block(g).is_err());
    }
}
