//! Any image: a repair never panics, leaves no more errors than there were, what it says will be left is what is left,
//! and a second one finds nothing to do.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use pleach_fuzz::Memory;
use pleach_image::{Alone, Image, RepairMode, check, repair};
use pleach_store::Store;

fuzz_target!(|bytes: &[u8]| {
    for mode in [RepairMode::Leaks, RepairMode::All] {
        let store: Arc<dyn Store> = Memory::new(bytes.to_vec());
        let before = Image::open(Arc::clone(&store)).and_then(|image| check(&image));
        let Ok(plan) = repair(&store, mode, &Alone) else { continue };
        let Ok(after) = Image::open(Arc::clone(&store)).and_then(|image| check(&image)) else { continue };
        assert_eq!((after.errors, after.leaks), (plan.after.errors, plan.after.leaks));
        if let Ok(before) = before {
            assert!(after.errors <= before.errors, "{} -> {}", before.errors, after.errors);
        }
        if mode == RepairMode::All {
            let again = repair(&store, mode, &Alone).expect("once more");
            assert!(again.is_empty(), "a second repair finds nothing to do: {:?}", again.actions);
        }
    }
});
