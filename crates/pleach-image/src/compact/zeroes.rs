//! Guest data that are zeros: which they are, and entries that say so instead.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pleach_alloc::Census;
use pleach_format::{HostCluster, HostOffset, Mapping, Version};

use super::layout::all_tables;
use crate::spans::{Span, spans};
use crate::workers::{collect, tables_a_piece};
use crate::{Image, ImageError, Workers};

const WORD: u64 = 64;

/// Host clusters of data whose entries can say that they are zeros.
#[derive(Debug, Default)]
pub(super) struct Zeroes {
    /// A bit a cluster, by the number of 64 of them.
    words: BTreeMap<u64, u64>,
}

impl Zeroes {
    /// Reads all guest data of all states of `image`.
    ///
    /// # Errors
    /// What the system says; a damaged table.
    pub(super) fn find(image: &Image, workers: &dyn Workers) -> Result<Self, ImageError> {
        let g = image.geometry();
        if image.external_data() || zero_entry(image).is_none() {
            return Ok(Self::default());
        }
        let tables = all_tables(image)?;
        let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
        let found = Mutex::new(Self::default());
        let done = collect(workers, pieces.len(), |i| -> Result<(), ImageError> {
            let mut bytes = vec![0; g.cluster_bytes()];
            let mut data = vec![0; g.cluster_bytes()];
            let mut zeros = Vec::new();
            for &(at, _) in pieces.get(i).copied().unwrap_or_default() {
                image.read_table(HostOffset(at), &mut bytes)?;
                spans(&bytes, g, |span| {
                    let Some((first, reads_zeros)) = target(image, &span)? else { return Ok(()) };
                    let bytes = first * g.cluster_size()..(first + span.len as u64) * g.cluster_size();
                    let find = ImageError::io("find the file's data");
                    let mut written = image.store().data_ranges(bytes).map_err(find)?.into_iter().peekable();
                    for cluster in first..first + span.len as u64 {
                        let at = cluster * g.cluster_size();
                        while written.next_if(|data| data.end <= at).is_some() {}
                        // What was never written is a hole.
                        let hole = written.peek().is_none_or(|data| data.start >= at + g.cluster_size());
                        let read = |at, part: &mut [u8]| {
                            let io = ImageError::io("read guest data");
                            image.store().read_at(at, part).map_err(io)
                        };
                        // Nearly every cluster with data shows it at its start.
                        let (head, tail) = data.split_at_mut(512);
                        let zero = reads_zeros || hole || {
                            read(at, head)?;
                            is_zero(head) && {
                                read(at + 512, tail)?;
                                is_zero(tail)
                            }
                        };
                        if zero {
                            zeros.push(cluster);
                        }
                    }
                    Ok(())
                })?;
            }
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            for cluster in zeros {
                *found.words.entry(cluster / WORD).or_insert(0) |= 1 << (cluster % WORD);
            }
            Ok(())
        });
        done.into_iter().collect::<Result<(), _>>()?;
        Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn has(&self, cluster: u64) -> bool {
        self.words.get(&(cluster / WORD)).is_some_and(|word| word >> (cluster % WORD) & 1 != 0)
    }

    /// How many clusters.
    pub(super) fn count(&self) -> u64 {
        self.words.values().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The runs of clusters among `n` from `first` on that stay.
    pub(super) fn others(&self, first: u64, n: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in (first..first + n).filter(|&c| !self.has(c)) {
            match runs.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                _ => runs.push(cluster..cluster + 1),
            }
        }
        runs
    }

    /// Lets every entry that leads to one of the clusters say zeros. Returns the references that are gone; nothing is flushed.
    ///
    /// # Errors
    /// What the system says; a damaged table.
    pub(super) fn write(&self, image: &Image, workers: &dyn Workers) -> Result<Census, ImageError> {
        let g = image.geometry();
        let Some([descriptor, subclusters]) = zero_entry(image) else { return Ok(Census::new()) };
        let tables = all_tables(image)?;
        let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
        let gone = Mutex::new(Census::new());
        let done = collect(workers, pieces.len(), |i| -> Result<(), ImageError> {
            let mut bytes = vec![0; g.cluster_bytes()];
            for &(at, times) in pieces.get(i).copied().unwrap_or_default() {
                image.read_table(HostOffset(at), &mut bytes)?;
                let mut new = bytes.clone();
                let mut changed: Vec<(usize, u64)> = Vec::new();
                spans(&bytes, g, |span| {
                    let Some((first, _)) = target(image, &span)? else { return Ok(()) };
                    let clusters = (span.slot..).zip(first..first + span.len as u64);
                    changed.extend(clusters.filter(|(_, cluster)| self.has(*cluster)));
                    Ok(())
                })?;
                let width = g.l2_entry_bytes();
                for (slot, _) in &changed {
                    let Some(field) = new.get_mut(slot * width..(slot + 1) * width) else { continue };
                    let (first, second) = field.split_at_mut(8);
                    first.copy_from_slice(&descriptor.to_be_bytes());
                    if let Ok(old) = <[u8; 8]>::try_from(&*second) {
                        // What was data or zeros is zeros; what said nothing still does.
                        let old = u64::from_be_bytes(old);
                        let zeros = (old | old >> 32) << 32 & subclusters;
                        second.copy_from_slice(&zeros.to_be_bytes());
                    }
                }
                if let Some(((first, _), (last, _))) = changed.first().zip(changed.last()) {
                    let part = new.get(first * width..(last + 1) * width).unwrap_or_default();
                    let io = ImageError::io("write an L2 table");
                    image.store().write_at(at + (first * width) as u64, part).map_err(io)?;
                }
                let mut gone = gone.lock().unwrap_or_else(PoisonError::into_inner);
                for (_, cluster) in changed {
                    gone.add(HostCluster(cluster), times);
                }
            }
            Ok(())
        });
        done.into_iter().collect::<Result<(), _>>()?;
        Ok(gone.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The first cluster of data that a span leads to, and whether it reads as zeros anyway.
fn target(image: &Image, span: &Span) -> Result<Option<(u64, bool)>, ImageError> {
    let g = image.geometry();
    let mapping = span.entry.descriptor.decode(g, image.header().version());
    Ok(match mapping.map_err(ImageError::format("L2 entry", None))? {
        Mapping::Data(at) => Some((g.host_cluster(at).0, false)),
        Mapping::ZeroAllocated(at) => Some((g.host_cluster(at).0, true)),
        _ => None,
    })
}

/// The entry that says zeros, with all subclusters, and no place; `None` where there is none that says so.
fn zero_entry(image: &Image) -> Option<[u64; 2]> {
    match image.header().version() {
        Version::V3 if image.geometry().extended_l2() => Some([0, 0xffff_ffff_0000_0000]),
        Version::V3 => Some([1, 0]),
        // Nothing reads as zeros where nothing lies below.
        Version::V2 if image.header().backing().is_none() => Some([0, 0]),
        Version::V2 => None,
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |all, &byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}
