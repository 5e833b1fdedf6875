//! Counts of every width, set in any order, are read as a list of numbers would be, and the allocator's are what it says.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_alloc::{Allocator, Place, RefcountTable};
use pleach_format::{Geometry, HostCluster, HostOffset, RefcountWidth};
use pleach_fuzz::Memory;
use pleach_store::Store;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    order: u8,
    sets: Vec<(u16, u64)>,
    steps: Vec<u8>,
    /// Any bytes as a table and its blocks.
    file: &'a [u8],
}

fuzz_target!(|input: Input| {
    let geometry = Geometry::new(9, false).unwrap();
    let width = RefcountWidth::new(u32::from(input.order % 7)).unwrap();
    let slots = usize::try_from(width.per_block(geometry)).unwrap();
    let (mut block, mut model) = (vec![0; 512], vec![0; slots]);
    for (at, value) in input.sets {
        let at = usize::from(at);
        let fits = at < slots && value <= width.max();
        assert_eq!(width.set(&mut block, at, value).is_ok(), fits);
        if fits {
            model[at] = value;
        }
    }
    for (at, value) in model.iter().enumerate() {
        assert_eq!(width.get(&block, at), *value);
    }

    let place = Place { geometry, width, table: HostOffset(0), table_clusters: 1 };
    let store = Memory::new(input.file.to_vec());
    if let Ok(table) = RefcountTable::load(&*store, place) {
        table.for_each_used(|_, count| assert!(count > 0 && count <= width.max()));
    }
    let Ok(mut allocator) = Allocator::load(&*store, place) else { return };
    for step in input.steps.iter().take(64) {
        let cluster = HostCluster(u64::from(*step));
        match step % 4 {
            0 => {
                if let Ok(new) = allocator.allocate() {
                    assert_eq!(allocator.count(new), 1);
                }
            }
            1 => {
                if let Ok((first, n)) = allocator.allocate_run(u64::from(*step) + 1) {
                    assert!((first.0..first.0 + n).all(|c| allocator.count(HostCluster(c)) == 1));
                }
            }
            2 => {
                let before = allocator.count(cluster);
                assert_eq!(allocator.lower(cluster).is_ok(), before > 0);
                assert_eq!(allocator.count(cluster), before.saturating_sub(1));
            }
            _ => drop(allocator.allocate_contiguous(u64::from(*step % 7) + 1)),
        }
    }
    for write in allocator.take_writes().counts {
        store.write_at(write.offset.0, &write.bytes).ok();
    }
});
