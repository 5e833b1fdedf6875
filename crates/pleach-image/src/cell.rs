//! One guest cluster's entry, of either width, as what a write has to know about it.

use pleach_format::{
    CompressedExtent, ExtendedL2Entry, FormatError, Geometry, HostOffset, L2Entry, Mapping, Version,
};

/// What decides how entries are read and written.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) geometry: Geometry,
    pub(crate) version: Version,
    /// Guest data are in another file, at their guest offsets.
    pub(crate) external: bool,
}

/// A guest cluster: where its data are, and which of its subclusters are data or zeros. A standard cluster has one
/// subcluster, so both masks are 0 or 1.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// The host cluster for plain data, whether or not any subcluster has data.
    pub(crate) host: Option<HostOffset>,
    /// Compressed data: then there is no host cluster, and the masks are 0.
    pub(crate) packed: Option<CompressedExtent>,
    /// Subclusters that hold data in the host cluster.
    pub(crate) data: u32,
    /// Subclusters that read as zeros.
    pub(crate) zero: u32,
}

impl Shape {
    /// The mask of all subclusters.
    pub(crate) fn all(self) -> u32 {
        if self.geometry.extended_l2() { u32::MAX } else { 1 }
    }

    /// The subclusters that `len` bytes from byte `from` of a cluster touch. `len` is not 0.
    pub(crate) fn touched(self, from: u64, len: u64) -> u32 {
        let size = self.geometry.subcluster_size();
        (from / size..=(from + len - 1) / size).fold(0, |mask, i| mask | 1 << i)
    }

    /// What `entry`, that of the guest cluster at `guest`, says.
    ///
    /// # Errors
    /// An entry that breaks the format.
    pub(crate) fn decode(self, entry: ExtendedL2Entry, guest: u64) -> Result<Cell, FormatError> {
        let mapping = entry.descriptor.decode(self.geometry, self.version)?;
        // In a data file, offset 0 is a place; the COPIED flag tells it from nothing.
        let here = self.external && entry.descriptor.copied();
        let (host, flagged) = match mapping {
            Mapping::Compressed(_) if self.external || entry.subclusters != 0 => {
                return Err(FormatError::Invalid {
                    field: "L2 entry",
                    value: entry.descriptor.0,
                    rule: "a compressed cluster has no subclusters and is never in a data file",
                });
            }
            Mapping::Compressed(extent) => return Ok(Cell { packed: Some(extent), ..Cell::default() }),
            Mapping::Data(at) => (Some(at), false),
            Mapping::ZeroAllocated(at) => (Some(at), true),
            Mapping::Zero => (here.then_some(HostOffset(0)), true),
            Mapping::Unallocated => (here.then_some(HostOffset(0)), false),
        };
        if self.external && host.is_some_and(|at| at.0 != guest) {
            return Err(FormatError::Invalid {
                field: "L2 entry",
                value: entry.descriptor.0,
                rule: "data in a data file are at their guest offset",
            });
        }
        if !self.geometry.extended_l2() {
            let data = u32::from(host.is_some() && !flagged);
            return Ok(Cell { host, packed: None, data, zero: u32::from(flagged) });
        }
        let [data, zero] = [entry.subclusters & 0xffff_ffff, entry.subclusters >> 32]
            .map(|mask| u32::try_from(mask).expect("half of 64 bits"));
        if data & zero != 0 || (data != 0 && host.is_none()) {
            return Err(FormatError::Invalid {
                field: "subcluster bitmap",
                value: entry.subclusters,
                rule: "a subcluster is either data, in a host cluster, or zero",
            });
        }
        Ok(Cell { host, packed: None, data, zero })
    }

    /// The entry of a cluster whose host cluster, if it has one, is its own. Not for compressed clusters.
    pub(crate) fn encode(self, cell: Cell) -> ExtendedL2Entry {
        let mut descriptor = cell.host.map_or(L2Entry::default(), L2Entry::owned);
        if self.geometry.extended_l2() {
            let subclusters = u64::from(cell.data) | u64::from(cell.zero) << 32;
            return ExtendedL2Entry { descriptor, subclusters };
        }
        if cell.zero != 0 {
            descriptor.0 |= L2Entry::ZERO.0;
        }
        ExtendedL2Entry { descriptor, subclusters: 0 }
    }
}

impl Cell {
    /// Nothing is said here: what lies below is read.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Everything reads as zeros, without a host cluster.
    pub(crate) fn zeros(shape: Shape) -> Self {
        Self { zero: shape.all(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_as_they_were() {
        let shape = |extended, external| Shape {
            geometry: Geometry::new(16, extended).unwrap(),
            version: Version::V3,
            external,
        };
        let copied = 1 << 63;
        let cases = [
            (false, false, 0, 0, 0),
            (false, false, 1, 0, 0),
            (false, false, copied | 0x50000, 0, 0),
            (false, false, copied | 0x50001, 0, 0),
            (true, false, copied | 0x50000, 0x20_0000_0009, 0),
            (true, false, 0, 0xffff_ffff_0000_0000, 0),
            (false, true, copied, 0, 0),
            (false, true, copied | 0x50000, 0, 0x50000),
            (true, true, copied, 5, 0),
        ];
        for (extended, external, descriptor, subclusters, guest) in cases {
            let shape = shape(extended, external);
            let entry = ExtendedL2Entry { descriptor: L2Entry(descriptor), subclusters };
            let cell = shape.decode(entry, guest).unwrap();
            assert_eq!(shape.encode(cell), entry, "{descriptor:#x} {subclusters:#x}");
        }
        // t13: data of an external file that are not where they belong.
        for (descriptor, guest) in [(copied, 0x10000), (copied | 0x20000, 0x10000)] {
            let entry = ExtendedL2Entry { descriptor: L2Entry(descriptor), subclusters: 0 };
            assert!(shape(false, true).decode(entry, guest).is_err(), "{descriptor:#x}");
        }
    }
}
