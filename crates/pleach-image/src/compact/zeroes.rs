//! Clusters that entries can do without: of zeros, or read by nobody. Which they are, and entries that say so instead.

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

/// Host clusters, a bit each, by the number of 64 of them.
#[derive(Debug, Default)]
struct Clusters(BTreeMap<u64, u64>);

impl Clusters {
    fn insert(&mut self, cluster: u64) {
        *self.0.entry(cluster / WORD).or_insert(0) |= 1 << (cluster % WORD);
    }

    fn has(&self, cluster: u64) -> bool {
        self.0.get(&(cluster / WORD)).is_some_and(|word| word >> (cluster % WORD) & 1 != 0)
    }
}

/// Host clusters that entries can do without.
#[derive(Debug, Default)]
pub(super) struct Zeroes {
    /// Their bytes are zeros: all entries that lead to them go. Found only if they are looked for.
    data: Clusters,
    /// Some entries that lead to them read nothing of them: these entries go, others may stay.
    idle: Clusters,
}

impl Zeroes {
    /// Reads the tables of all states of `image`, and all guest data if `data` says so.
    ///
    /// # Errors
    /// What the system says; a damaged table.
    pub(super) fn find(image: &Image, data: bool, workers: &dyn Workers) -> Result<Self, ImageError> {
        let g = image.geometry();
        if image.external_data() || zero_entry(image).is_none() {
            return Ok(Self::default());
        }
        let tables = all_tables(image)?;
        let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
        let found = Mutex::new(Self::default());
        let done = collect(workers, pieces.len(), |i| -> Result<(), ImageError> {
            let mut bytes = vec![0; g.cluster_bytes()];
            let mut buffer = vec![0; g.cluster_bytes()];
            let (mut zeros, mut idle) = (Vec::new(), Vec::new());
            for &(at, _) in pieces.get(i).copied().unwrap_or_default() {
                image.read_table(HostOffset(at), &mut bytes)?;
                spans(&bytes, g, |span| {
                    match target(image, &span)? {
                        Target::Idle(clusters) => idle.extend(clusters),
                        Target::Data(clusters) if data => {
                            find_zeros(image, clusters, &mut buffer, &mut zeros)?;
                        }
                        Target::Data(_) | Target::Nothing => {}
                    }
                    Ok(())
                })?;
            }
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            for cluster in zeros {
                found.data.insert(cluster);
            }
            for cluster in idle {
                found.idle.insert(cluster);
            }
            Ok(())
        });
        done.into_iter().collect::<Result<(), _>>()?;
        Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many clusters.
    pub(super) fn count(&self) -> u64 {
        let ones = |(word, bits): (&u64, &u64)| {
            u64::from((bits & !self.data.0.get(word).copied().unwrap_or(0)).count_ones())
        };
        let idle: u64 = self.idle.0.iter().map(ones).sum();
        idle + self.data.0.values().map(|bits| u64::from(bits.count_ones())).sum::<u64>()
    }

    /// The runs of clusters that a span goes on to lead to.
    ///
    /// # Errors
    /// A damaged table.
    pub(super) fn kept(&self, image: &Image, span: &Span) -> Result<Vec<Range<u64>>, ImageError> {
        Ok(match target(image, span)? {
            Target::Data(clusters) => self.others(clusters),
            Target::Idle(_) | Target::Nothing => Vec::new(),
        })
    }

    /// The runs of clusters among those of data that stay.
    fn others(&self, clusters: Range<u64>) -> Vec<Range<u64>> {
        if self.data.0.is_empty() {
            return vec![clusters];
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in clusters.filter(|&c| !self.data.has(c)) {
            match runs.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                _ => runs.push(cluster..cluster + 1),
            }
        }
        runs
    }

    /// Lets every entry that reads nothing but zeros of its cluster lead nowhere. Returns the references that are gone; nothing
    /// is flushed.
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
                    match target(image, &span)? {
                        Target::Idle(clusters) => changed.extend((span.slot..).zip(clusters)),
                        Target::Data(clusters) => {
                            let all = (span.slot..).zip(clusters);
                            changed.extend(all.filter(|(_, cluster)| self.data.has(*cluster)));
                        }
                        Target::Nothing => {}
                    }
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

/// Host clusters that a span leads to.
enum Target {
    /// None that is known here.
    Nothing,
    /// Bytes of them are read.
    Data(Range<u64>),
    /// No byte of them is read: what they are there for is zeros, or lies below.
    Idle(Range<u64>),
}

fn target(image: &Image, span: &Span) -> Result<Target, ImageError> {
    let g = image.geometry();
    let mapping = span.entry.descriptor.decode(g, image.header().version());
    let clusters = |at| {
        let first = g.host_cluster(at).0;
        first..first + span.len as u64
    };
    Ok(match mapping.map_err(ImageError::format("L2 entry", None))? {
        // The lower half says which subclusters lie there.
        Mapping::Data(at) if g.extended_l2() && span.entry.subclusters.trailing_zeros() >= 32 => {
            Target::Idle(clusters(at))
        }
        Mapping::Data(at) => Target::Data(clusters(at)),
        Mapping::ZeroAllocated(at) => Target::Idle(clusters(at)),
        _ => Target::Nothing,
    })
}

/// Adds those of `clusters` whose bytes are zeros to `zeros`. `buffer` has room for one.
fn find_zeros(
    image: &Image,
    clusters: Range<u64>,
    buffer: &mut [u8],
    zeros: &mut Vec<u64>,
) -> Result<(), ImageError> {
    let size = image.geometry().cluster_size();
    let find = ImageError::io("find the file's data");
    let bytes = clusters.start * size..clusters.end * size;
    let mut written = image.store().data_ranges(bytes).map_err(find)?.into_iter().peekable();
    // Nearly every cluster with data shows it at its start.
    let (head, tail) = buffer.split_at_mut(512);
    let read =
        |at, part: &mut [u8]| image.store().read_at(at, part).map_err(ImageError::io("read guest data"));
    for cluster in clusters {
        let at = cluster * size;
        while written.next_if(|data| data.end <= at).is_some() {}
        // What was never written is a hole.
        let hole = written.peek().is_none_or(|data| data.start >= at + size);
        let zero = hole || {
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
