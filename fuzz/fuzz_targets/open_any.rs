//! A whole hostile image: opening, checking and reading it ends soon, in an answer or an error, and never in a panic.
#![no_main]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use pleach_image::{Chain, Image, Layer, check, leaked};
use pleach_store::{FileId, FileKind, LockError, Role, Stat, Store, Window};

/// Reading all of a disk is bounded by what it claims: larger ones are only sampled.
const READ: u64 = 4 << 20;

fuzz_target!(|bytes: &[u8]| {
    let store = Arc::new(Memory(Mutex::new(bytes.to_vec())));
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

/// A file in memory.
#[derive(Debug)]
struct Memory(Mutex<Vec<u8>>);

impl Store for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        panic!("nothing here writes")
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("nothing here writes")
    }

    fn reserve(&self, _: Range<u64>) -> io::Result<()> {
        panic!("nothing here writes")
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        panic!("nothing here writes")
    }

    fn copy_from(&self, _: &dyn Store, _: u64, _: u64, _: u64) -> io::Result<bool> {
        panic!("nothing here writes")
    }

    fn barrier(&self) -> io::Result<()> {
        Ok(())
    }

    fn window(&self) -> io::Result<Window> {
        Window::owned(self)
    }

    fn lock(&self, _: Role) -> Result<(), LockError> {
        Ok(())
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        Ok(vec![range])
    }

    fn stat(&self) -> io::Result<Stat> {
        let len = self.len()?;
        let id = FileId { device: 0, inode: 0 };
        Ok(Stat { id, kind: FileKind::Regular, len, allocated: len, links: 1, owner: 0, born: None })
    }
}
