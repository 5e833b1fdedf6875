//! A file in memory for tests: it remembers every write and barrier, and tells what a power loss may leave.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pleach_store::{FileId, FileKind, LockError, Role, Stat, Store, Window};

/// What was done to a file, in order.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// Another length.
    SetLen(u64),
    /// Everything before this is durable.
    Barrier,
}

/// A file in memory.
#[derive(Debug)]
pub(crate) struct Medium {
    bytes: Mutex<Vec<u8>>,
    /// Each operation with its place in the order of all, over all media.
    log: Mutex<Vec<(usize, Op)>>,
    /// Operations that still succeed; then one fails, and everything after it.
    left: Option<Mutex<usize>>,
}

impl Medium {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), log: Mutex::default(), left: None })
    }

    /// A file on which `n` operations succeed, and no more.
    pub(crate) fn failing(bytes: Vec<u8>, n: usize) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), log: Mutex::default(), left: Some(Mutex::new(n)) })
    }

    /// The bytes as a reader sees them now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// What was done so far.
    pub(crate) fn log(&self) -> Vec<Op> {
        self.stamped().into_iter().map(|(_, op)| op).collect()
    }

    /// What was done so far, each with a number that is higher for what came later, on whatever medium.
    pub(crate) fn stamped(&self) -> Vec<(usize, Op)> {
        self.log.lock().unwrap().clone()
    }

    fn record(&self, op: Op) -> io::Result<()> {
        if let Some(left) = &self.left {
            let mut left = left.lock().unwrap();
            *left = left.checked_sub(1).ok_or_else(|| io::Error::other("the disk fails"))?;
        }
        apply(&mut self.bytes.lock().unwrap(), &op);
        static NOW: AtomicUsize = AtomicUsize::new(0);
        self.log.lock().unwrap().push((NOW.fetch_add(1, Ordering::SeqCst), op));
        Ok(())
    }
}

/// Calls `judge` with every state that a power loss may leave of `log`, done to a file that held `start`: what was
/// durable, and of what was done since the last barrier nothing, everything, each prefix, each one alone, each one
/// missing. Of many operations only some are singled out.
pub(crate) fn power_losses(start: &[u8], log: &[Op], judge: &mut dyn FnMut(Vec<u8>, &str)) {
    let mut durable = start.to_vec();
    for (epoch, ops) in log.split(|op| matches!(op, Op::Barrier)).enumerate() {
        for subset in subsets(ops.len()) {
            let mut bytes = durable.clone();
            subset.iter().for_each(|&i| apply(&mut bytes, &ops[i]));
            judge(bytes, &format!("{subset:?} of the {} operations before barrier {epoch}", ops.len()));
        }
        ops.iter().for_each(|op| apply(&mut durable, op));
    }
}

fn subsets(n: usize) -> Vec<Vec<usize>> {
    let step = n.div_ceil(40).max(1);
    let mut all = vec![Vec::new(), (0..n).collect()];
    for i in (0..n).step_by(step).chain(n.checked_sub(1)) {
        all.push((0..i).collect());
        all.push(vec![i]);
        all.push((0..n).filter(|&k| k != i).collect());
    }
    all
}

fn apply(bytes: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, new) => {
            let at = usize::try_from(*offset).unwrap();
            bytes.resize(bytes.len().max(at + new.len()), 0);
            bytes[at..at + new.len()].copy_from_slice(new);
        }
        Op::SetLen(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
        Op::Barrier => {}
    }
}

impl Store for Medium {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let at = usize::try_from(offset).unwrap();
        for (i, byte) in buf.iter_mut().enumerate() {
            *byte = at.checked_add(i).and_then(|i| bytes.get(i)).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.record(Op::Write(offset, bytes.to_vec()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Op::SetLen(len))
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if range.end > self.len()? { self.set_len(range.end) } else { Ok(()) }
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.len()?);
        let len = usize::try_from(end.saturating_sub(range.start)).unwrap();
        self.write_at(range.start, &vec![0; len])
    }

    fn copy_from(&self, _: &dyn Store, _: u64, _: u64, _: u64) -> io::Result<bool> {
        Ok(false)
    }

    fn barrier(&self) -> io::Result<()> {
        self.record(Op::Barrier)
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
        let (id, len) = (FileId { device: 0, inode: 0 }, self.len()?);
        Ok(Stat { id, kind: FileKind::Regular, len, allocated: len, links: 1, owner: 0, born: None })
    }
}
