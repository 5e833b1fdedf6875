//! Runs: what one layer says about stretches of the virtual disk, equal neighbours joined.

use alloc::vec::Vec;

use crate::{CompressedExtent, GuestOffset, HostOffset, Mapping};

/// What a layer says about a stretch of guest bytes. Where it says nothing there is no run.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Data, contiguous from this host offset in the layer's file, or in its external data file.
    Data(HostOffset),
    /// Compressed data: one cluster, not contiguous with anything.
    Compressed(CompressedExtent),
    /// Reads as zeros, whether or not host clusters are owned.
    Zero,
}

/// A stretch of guest bytes of one kind.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// First guest byte.
    pub guest: GuestOffset,
    /// Length in bytes, not 0.
    pub len: u64,
    /// What the layer says.
    pub kind: RunKind,
}

impl Run {
    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.guest.0 + self.len
    }
}

/// Runs in guest order, never overlapping, joined where one continues the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunList {
    runs: Vec<Run>,
}

impl RunList {
    /// No runs: a layer that says nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what `mapping` says about `len` bytes at `guest`. Calls come in guest order.
    pub fn push(&mut self, guest: GuestOffset, len: u64, mapping: Mapping) {
        let kind = match mapping {
            Mapping::Unallocated => return,
            Mapping::Zero | Mapping::ZeroAllocated(_) => RunKind::Zero,
            Mapping::Data(offset) => RunKind::Data(offset),
            Mapping::Compressed(extent) => RunKind::Compressed(extent),
        };
        self.push_run(Run { guest, len, kind });
    }

    /// Adds a run behind the last one.
    pub fn push_run(&mut self, run: Run) {
        if run.len == 0 {
            return;
        }
        if let Some(last) = self.runs.last_mut() {
            debug_assert!(last.end() <= run.guest.0, "runs come in guest order");
            let continues = last.end() == run.guest.0
                && match (last.kind, run.kind) {
                    (RunKind::Data(a), RunKind::Data(b)) => a.0 + last.len == b.0,
                    (RunKind::Zero, RunKind::Zero) => true,
                    _ => false,
                };
            if continues {
                last.len += run.len;
                return;
            }
        }
        self.runs.push(run);
    }

    /// Appends a list whose runs all lie behind this one's.
    pub fn append(&mut self, other: Self) {
        for run in other.runs {
            self.push_run(run);
        }
    }

    /// The runs.
    pub fn as_slice(&self) -> &[Run] {
        &self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_neighbours() {
        let mut list = RunList::new();
        let data = |at| Mapping::Data(HostOffset(at));
        for (guest, mapping) in [
            (0, data(0x1000)),
            (512, data(0x1200)),
            (1024, data(0x4000)),
            (1536, Mapping::Zero),
            (2048, Mapping::ZeroAllocated(HostOffset(0x6000))),
            (2560, Mapping::Unallocated),
            (3072, Mapping::Zero),
        ] {
            list.push(GuestOffset(guest), 512, mapping);
        }
        let got: Vec<_> = list.as_slice().iter().map(|r| (r.guest.0, r.len)).collect();
        assert_eq!(got, [(0, 1024), (1024, 512), (1536, 1024), (3072, 512)]);
    }
}
