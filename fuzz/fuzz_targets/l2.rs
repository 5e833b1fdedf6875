//! Any L2 entry, standard or extended, in any geometry: what is read covers the cluster once, in bounds, and nothing invalid
//! is read.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{ExtendedL2Entry, Geometry, GuestOffset, L1Entry, L2Entry, Mapping, Version};

#[derive(Arbitrary, Debug)]
struct Input {
    cluster_bits: u8,
    extended: bool,
    v2: bool,
    descriptor: u64,
    subclusters: u64,
    guest: u32,
}

fuzz_target!(|input: Input| {
    let Ok(geometry) = Geometry::new(9 + u32::from(input.cluster_bits % 13), input.extended) else { return };
    let version = if input.v2 { Version::V2 } else { Version::V3 };
    let guest = GuestOffset(u64::from(input.guest) << geometry.cluster_bits());
    let raw = L2Entry(input.descriptor);
    let aligned = |at: u64| geometry.is_aligned(at) && at < 1 << 56;

    for mapping in [raw.decode(geometry, version), raw.decode_external(geometry, guest)].into_iter().flatten()
    {
        match mapping {
            Mapping::Data(at) | Mapping::ZeroAllocated(at) => assert!(aligned(at.0)),
            Mapping::Compressed(extent) => {
                assert!(
                    extent.offset.0 < 1 << 56 && (1..=2 * geometry.cluster_size()).contains(&extent.bytes)
                );
            }
            Mapping::Zero | Mapping::Unallocated => {}
        }
    }
    if let Ok(Some(at)) = L1Entry(input.descriptor).l2_table(geometry) {
        assert!(aligned(at.0) && at.0 != 0);
    }
    let entry = ExtendedL2Entry { descriptor: raw, subclusters: input.subclusters };
    if !input.extended {
        return;
    }
    for runs in [entry.decode(geometry), entry.decode_external(geometry, guest)].into_iter().flatten() {
        let mut next = 0;
        for run in &runs {
            assert!(run.first == next && run.count > 0);
            next += run.count;
            for i in run.first..next {
                let [data, zero] = [input.subclusters >> i & 1, input.subclusters >> (32 + i) & 1];
                match run.mapping {
                    Mapping::Data(_) => assert_eq!((data, zero), (1, 0)),
                    Mapping::Zero | Mapping::ZeroAllocated(_) => assert_eq!((data, zero), (0, 1)),
                    Mapping::Unallocated | Mapping::Compressed(_) => assert_eq!((data, zero), (0, 0)),
                }
            }
        }
        assert_eq!(next, 32);
    }
});
