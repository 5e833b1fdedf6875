//! Offsets, indexes and counts as distinct types, and the one value that converts between them.

use crate::FormatError;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);
    };
}

unit!(
    /// Byte offset on the virtual disk, as the guest sees it.
    GuestOffset
);
unit!(
    /// Byte offset in an image file.
    HostOffset
);
unit!(
    /// Index of a cluster of the virtual disk.
    GuestCluster
);
unit!(
    /// Index of a cluster of an image file.
    HostCluster
);
unit!(
    /// A number of clusters.
    ClusterCount
);

/// Cluster size and L2 entry width, and therefore the only converter between bytes and clusters.
///
/// Invariant: `cluster_bits` is in `9..=21` (`14..=21` with extended L2), so no shift below overflows.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
}

impl Geometry {
    /// The smallest cluster size is 512 bytes.
    pub const MIN_CLUSTER_BITS: u32 = 9;
    /// QEMU's largest cluster size is 2 MiB.
    pub const MAX_CLUSTER_BITS: u32 = 21;

    /// A geometry of `1 << cluster_bits` bytes a cluster.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] outside `9..=21`, or below 14 with extended L2 entries.
    pub fn new(cluster_bits: u32, extended_l2: bool) -> Result<Self, FormatError> {
        let min = if extended_l2 { 14 } else { Self::MIN_CLUSTER_BITS };
        if (min..=Self::MAX_CLUSTER_BITS).contains(&cluster_bits) {
            Ok(Self { cluster_bits, extended_l2 })
        } else {
            Err(FormatError::OutOfRange {
                field: "cluster_bits",
                value: cluster_bits.into(),
                min: min.into(),
                max: Self::MAX_CLUSTER_BITS.into(),
            })
        }
    }

    /// log2 of the cluster size.
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Whether L2 entries are 128 bits wide and carry a subcluster bitmap.
    pub fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Bytes a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes a cluster, as a buffer length.
    pub fn cluster_bytes(self) -> usize {
        1 << self.cluster_bits
    }

    /// Bytes an L2 entry: 8, or 16 with extended L2.
    pub fn l2_entry_bytes(self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries an L2 table.
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_bytes() as u64
    }

    /// Guest bytes that one L1 entry answers for.
    pub fn l1_span(self) -> u64 {
        self.cluster_size() * self.l2_entries()
    }

    /// Most L1 entries of one state that QEMU opens: 32 MiB of table.
    pub const MAX_L1_ENTRIES: u32 = 4 << 20;

    /// The largest disk: a multiple of 512 bytes whose L1 table is not too long, and at most 2^63 - 512.
    pub fn max_disk(self) -> u64 {
        u64::from(Self::MAX_L1_ENTRIES).saturating_mul(self.l1_span()).min(i64::MAX as u64 & !511)
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn required_l1(self, size: u64) -> u64 {
        size.div_ceil(self.l1_span())
    }

    /// Bytes a subcluster: a 32nd of a cluster with extended L2, else the cluster.
    pub fn subcluster_size(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }

    /// Bits of a compressed descriptor that hold the byte offset (spec: `62 - (cluster_bits - 8)`).
    pub fn compressed_offset_bits(self) -> u32 {
        70 - self.cluster_bits
    }

    /// The cluster that contains `offset`.
    pub fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// The cluster that starts at `offset`, or `None` if `offset` is inside one.
    pub fn cluster_at(self, offset: HostOffset) -> Option<HostCluster> {
        self.is_aligned(offset.0).then(|| self.host_cluster(offset))
    }

    /// Where `cluster` starts in the file.
    pub fn host_offset(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// The cluster that contains `offset`.
    pub fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Where `cluster` starts on the virtual disk.
    pub fn guest_offset(self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// Clusters that `bytes` bytes fill, the last one perhaps in part.
    pub fn clusters_for(self, bytes: u64) -> ClusterCount {
        ClusterCount(bytes.div_ceil(self.cluster_size()))
    }

    /// The host clusters that `bytes` bytes from `offset` on touch, in order; none for no bytes.
    pub fn touched(self, offset: HostOffset, bytes: u64) -> impl Iterator<Item = HostCluster> + use<> {
        let first = self.host_cluster(offset).0;
        let end = offset.0.saturating_add(bytes).div_ceil(self.cluster_size());
        (first..if bytes == 0 { first } else { end }).map(HostCluster)
    }

    /// Whether `value` is a multiple of the cluster size.
    pub fn is_aligned(self, value: u64) -> bool {
        value & (self.cluster_size() - 1) == 0
    }

    /// L1 index of a guest cluster.
    pub fn l1_index(self, cluster: GuestCluster) -> u64 {
        cluster.0 / self.l2_entries()
    }

    /// Index within its L2 table of a guest cluster.
    pub fn l2_index(self, cluster: GuestCluster) -> usize {
        // An L2 table has at most 2^18 entries.
        usize::try_from(cluster.0 % self.l2_entries()).expect("an L2 index fits usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts() {
        let g = Geometry::new(16, false).unwrap();
        assert_eq!(g.l1_span(), 512 << 20);
        assert_eq!(g.required_l1(1 << 30), 2);
        assert_eq!(g.required_l1((1 << 30) + 1), 3);
        assert_eq!(g.compressed_offset_bits(), 54);
        assert_eq!(g.cluster_at(HostOffset(0x20001)), None);
        assert_eq!(g.cluster_at(HostOffset(0x20000)), Some(HostCluster(2)));
        for (offset, bytes, want) in [(0x1ffff, 2, 1..3), (0x10000, 0x10000, 1..2), (0x10000, 0, 1..1)] {
            assert!(g.touched(HostOffset(offset), bytes).eq(want.map(HostCluster)), "{offset:#x}");
        }
        let e = Geometry::new(16, true).unwrap();
        assert_eq!((e.l1_span(), e.subcluster_size()), (256 << 20, 2048));
        for (bits, extended) in [(8, false), (22, false), (13, true)] {
            assert!(Geometry::new(bits, extended).is_err(), "{bits} {extended}");
        }
    }
}
