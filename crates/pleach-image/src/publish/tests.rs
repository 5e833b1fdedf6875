//! What a power loss may leave of a publication. Each barrier of [`publish`](super::publish) that is taken out makes
//! this fail.

use std::sync::Arc;

use pleach_alloc::{Allocator, Place};
use pleach_format::{GuestCluster, HostCluster, L2Entry, RefcountWidth};
use pleach_store::{RealDisk, Store};

use super::{Switch, publish, release};
use crate::medium::{Medium, power_losses};
use crate::{Chain, CreateOptions, Image, Layer, TableEditor, check, create};

/// Clusters of 512 bytes: enough for a second refcount block.
const CLUSTERS: u64 = 400;

#[test]
fn a_power_loss_leaves_the_old_content_or_the_new_and_no_errors() {
    // Name, log2 of the refcount bits, what the clusters hold before, clusters counted before, virtual size after.
    let cases = [
        ("a new L1 table", 4, 0, 0, 2 << 20),
        ("data replaced in tables that stay", 4, 5, 0, 1 << 20),
        // 64 counts a block, 64 blocks a table: the table ends with cluster 4095.
        ("a new refcount table", 6, 0, 4090, 1 << 20),
    ];
    for (name, order, old, counted, size) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 1 << 20,
            cluster_bits: 9,
            refcount_width: RefcountWidth::new(order).unwrap(),
            ..CreateOptions::default()
        };
        create(&RealDisk, &path, &options).unwrap();
        let medium = Medium::new(std::fs::read(&path).unwrap());
        count_up_to(&medium, counted);
        if old != 0 {
            fill(&medium, old, 1 << 20);
        }
        let start = medium.bytes();

        let medium = Medium::new(start.clone());
        fill(&medium, 7, size);
        let (mut states, mut before, mut after) = (0, 0, 0);
        power_losses(&start, &medium.log(), &mut |bytes, what| {
            states += 1;
            let changed = judge(bytes, old, &format!("{name}: {what}"));
            *(if changed { &mut after } else { &mut before }) += 1;
        });
        assert!(judge(medium.bytes(), old, name), "{name}: the end is the new state");
        assert!(states > 100 && before > 0 && after > 0, "{name}: {states}, {before} old, {after} new");
    }
}

/// Counts every cluster below `end` once, used or not.
fn count_up_to(medium: &Arc<Medium>, end: u64) {
    let image = Image::open(Arc::clone(medium) as Arc<dyn Store>).unwrap();
    let mut allocator = Allocator::load(&**medium, Place::of(image.header())).unwrap();
    for cluster in (0..end).map(HostCluster) {
        if allocator.count(cluster) == 0 {
            allocator.set_count(cluster, 1).unwrap();
        }
    }
    publish(&**medium, &mut allocator, &Switch::default()).unwrap();
}

/// Gives every cluster new data in a new place, and publishes that.
fn fill(medium: &Arc<Medium>, byte: u8, size: u64) {
    let image = Image::open(Arc::clone(medium) as Arc<dyn Store>).unwrap();
    let g = image.geometry();
    let mut allocator = Allocator::load(&**medium, Place::of(image.header())).unwrap();
    let mut editor = TableEditor::new(&image);
    editor.extend_to(size);
    for cluster in (0..CLUSTERS).map(GuestCluster) {
        let host = g.host_offset(allocator.allocate().unwrap());
        medium.write_at(host.0, &[byte; 512]).unwrap();
        editor.set(&mut allocator, cluster, L2Entry::owned(host)).unwrap();
    }
    let switch = editor.finish(&mut allocator, Some(size)).unwrap();
    publish(&**medium, &mut allocator, &switch).unwrap();
    release(&**medium, &mut allocator, &switch.drops).unwrap();
}

/// No errors, and every cluster reads as before or as after; true if any of them is new.
fn judge(bytes: Vec<u8>, old: u8, what: &str) -> bool {
    let image = Image::open(Medium::new(bytes)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let report = check(&image).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(report.errors, 0, "{what}: {:?}", report.findings.first());
    let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
    let mut changed = false;
    for cluster in 0..CLUSTERS {
        let mut data = [1; 512];
        chain.read_at(cluster * 512, &mut data).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(data == [old; 512] || data == [7; 512], "{what}: cluster {cluster} is neither old nor new");
        changed |= data == [7; 512];
    }
    changed
}
