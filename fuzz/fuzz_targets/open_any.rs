//! A whole hostile image: opening, checking and reading it ends soon, in an answer or an error, and never in a panic.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use pleach_fuzz::Memory;
use pleach_image::{Chain, Image, Layer, check, leaked};

/// Reading all of a disk is bounded by what it claims: larger ones are only sampled.
const READ: u64 = 4 << 20;

fuzz_target!(|bytes: &[u8]| {
    let store = Memory::new(bytes.to_vec());
    // Nothing here writes.
    store.fail_after(Some(0));
    let Ok(image) = Image::open(store) else { return };
    let report = check(&image);
    let leaks = leaked(&image);
    if let (Ok(report), Ok(leaks)) = (&report, &leaks)
        && report.errors == 0
    {
        assert!(report.leaks <= leaks.len() as u64, "a check and a writer agree on what is lost");
    }
    let _ = (image.snapshots(), image.bitmaps(), image.snapshot_clusters());
    for slot in (0..image.l1().len()).take(64) {
        let _ = image.runs(slot);
    }
    if image.check_readable().is_err() {
        return;
    }
    let size = image.size();
    let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
    let mut buf = vec![0; 1 << 16];
    for at in (0..size.min(READ)).step_by(buf.len()).chain([size.saturating_sub(100), size]) {
        let _ = chain.read_at(at, &mut buf);
    }
    let _ = chain.pieces(0, size.min(READ));
});
