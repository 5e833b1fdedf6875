//! What each cluster of a file is for.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use pleach_alloc::{Place, RefcountTable};
use pleach_format::{BitmapCluster, BitmapTableEntry, ExtensionKind, HostOffset, L1Entry, Mapping};

use super::zeroes::Zeroes;
use crate::census::MOST_L1_BYTES;
use crate::image::read_l1;
use crate::spans::spans;
use crate::workers::{collect, tables_a_piece};
use crate::{Image, ImageError, Workers};

/// What a cluster is for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Role {
    /// Nothing leads to it.
    Free,
    /// It stays where it is.
    Fixed,
    /// Guest data, as they are.
    Data,
    /// Compressed guest data.
    Packed,
    /// An L2 table.
    Table,
    /// A refcount block.
    Block,
    /// Bits of a bitmap.
    Bits,
    /// A part of something that is longer than a cluster, or that one pointer leads to.
    Root,
}

impl Role {
    /// Whether it is one cluster that may lie anywhere.
    pub(super) fn is_single(self) -> bool {
        matches!(self, Self::Data | Self::Table | Self::Block | Self::Bits)
    }
}

/// Something that lies in clusters that follow one another.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) what: RootKind,
    pub(super) first: u64,
    pub(super) clusters: u64,
}

/// Who leads to a root.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum RootKind {
    /// The header: the active L1 table.
    ActiveL1,
    /// The record of that number in the snapshot table: its L1 table.
    SnapshotL1(usize),
    /// The header: the snapshot table.
    Snapshots,
    /// The header: the refcount table.
    Refcounts,
    /// The header's extension: the bitmap directory.
    Directory,
    /// The record of that number in the directory: a bitmap's table.
    BitmapTable(usize),
}

/// Compressed data: where, and how many bytes they claim.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Where everything is in a file without leaks.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// By cluster.
    pub(super) roles: Vec<Role>,
    pub(super) roots: Vec<Root>,
    /// Compressed data that end behind as many clusters as are used for other things than guest data and refcount blocks, in
    /// order, each once, and how many references they have.
    pub(super) packed: Vec<(Extent, u64)>,
    /// The highest count of a cluster.
    pub(super) most_references: u64,
    /// Refcount blocks, by number.
    pub(super) blocks: Vec<Option<u64>>,
    /// Counts a block.
    pub(super) per_block: u64,
    /// Refcount table entries a cluster.
    pub(super) per_table_cluster: u64,
    pub(super) cluster: u64,
    /// Most clusters that the file may have.
    pub(super) most: u64,
}

/// Most clusters of a file, each of which is known by a byte in memory.
const MOST_CLUSTERS: u64 = 1 << 30;
/// Files of up to so many clusters may be nearly empty.
const SMALL: u64 = 1 << 26;
/// In longer ones not fewer than one cluster in so many can be used.
const SPARSE: u64 = 64;

/// The L2 tables of all states, in order, and how many L1 entries lead to each.
pub(super) fn all_tables(image: &Image) -> Result<Vec<(u64, u64)>, ImageError> {
    let mut all: BTreeMap<u64, u64> = BTreeMap::new();
    let mut add = |l1: &[L1Entry]| -> Result<(), ImageError> {
        for (at, times) in crate::recount::tables_of(image, l1)? {
            *all.entry(at).or_insert(0) += times;
        }
        Ok(())
    };
    add(image.l1())?;
    let mut bytes = 0;
    for snapshot in image.snapshots()? {
        bytes += u64::from(snapshot.l1_size) * 8;
        if bytes > MOST_L1_BYTES {
            let feature = "an image with more than 1 GiB of snapshot L1 tables";
            return Err(ImageError::Unsupported { feature });
        }
        let at = HostOffset(snapshot.l1_table_offset);
        add(&read_l1(&**image.store(), image.geometry(), at, snapshot.l1_size)?)?;
    }
    Ok(all.into_iter().collect())
}

impl Layout {
    /// The layout of an image that was counted and found whole, as it will be once entries do without what is in `zeroes`.
    ///
    /// # Errors
    /// [`ImageError::Refused`] if a cluster has two uses: such an image can be read, but not moved.
    pub(super) fn of(image: &Image, zeroes: &Zeroes, workers: &dyn Workers) -> Result<Self, ImageError> {
        let (g, header, version) = (image.geometry(), image.header(), image.header().version());
        let (place, store) = (Place::of(header), image.store());
        let tables = all_tables(image)?;
        let used = (tables.len() as u64).saturating_mul(g.l2_entries());
        let mut layout = Self {
            roles: Vec::new(),
            roots: Vec::new(),
            packed: Vec::new(),
            most_references: place.width.max(),
            blocks: Vec::new(),
            per_block: place.width.per_block(g),
            per_table_cluster: g.cluster_size() / 8,
            cluster: g.cluster_size(),
            most: used.saturating_mul(SPARSE).clamp(SMALL, MOST_CLUSTERS),
        };
        layout.mark(0, 1, Role::Fixed)?;
        let table = RefcountTable::load(&**store, place)?;
        layout.root(
            RootKind::Refcounts,
            place.table.0,
            u64::from(place.table_clusters) * g.cluster_size(),
        )?;
        for block in table.blocks() {
            layout.blocks.push(block.map(|at| g.host_cluster(at).0));
            if let Some(at) = block {
                layout.mark(g.host_cluster(*at).0, 1, Role::Block)?;
            }
        }
        layout.root(RootKind::ActiveL1, header.l1_table_offset().0, u64::from(header.l1_size()) * 8)?;
        let snapshots = image.snapshots()?;
        let mut bytes = 0usize;
        for (i, snapshot) in snapshots.iter().enumerate() {
            let l1_bytes = u64::from(snapshot.l1_size) * 8;
            layout.root(RootKind::SnapshotL1(i), snapshot.l1_table_offset, l1_bytes)?;
            bytes = bytes.next_multiple_of(8) + snapshot.stored_bytes;
        }
        layout.root(RootKind::Snapshots, header.snapshots_offset().0, bytes as u64)?;
        layout.bitmaps(image)?;
        if header.extension(ExtensionKind::EncryptionHeader).is_some() || header.encryption().is_some() {
            return Err(ImageError::Unsupported { feature: "moving clusters of an encrypted image" });
        }
        for &(at, _) in &tables {
            layout.mark(g.host_cluster(HostOffset(at)).0, 1, Role::Table)?;
        }
        // What ends below this many clusters never moves. Refcount blocks do not count: fewer of them may be left.
        let stays = layout.used() - table.blocks().iter().flatten().count() as u64;
        let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
        let shared = Mutex::new(layout);
        let done = collect(workers, pieces.len(), |i| -> Result<(), ImageError> {
            let mut bytes = vec![0; g.cluster_bytes()];
            let mut met: Vec<(u64, u64, Role)> = Vec::new();
            let mut packed = Vec::new();
            for &(at, times) in pieces.get(i).copied().unwrap_or_default() {
                image.read_table(HostOffset(at), &mut bytes)?;
                spans(&bytes, g, |span| {
                    let mapping = span.entry.descriptor.decode(g, version);
                    match mapping.map_err(ImageError::format("L2 entry", None))? {
                        _ if image.external_data() => {}
                        Mapping::Data(_) | Mapping::ZeroAllocated(_) => {
                            let kept = zeroes.kept(image, &span)?;
                            met.extend(
                                kept.into_iter().map(|run| (run.start, run.end - run.start, Role::Data)),
                            );
                        }
                        Mapping::Compressed(extent) => {
                            let extent =
                                Extent { offset: extent.offset.0, bytes: image.counted_bytes(extent).max(1) };
                            let first = extent.offset / g.cluster_size();
                            met.push((first, extent.end().div_ceil(g.cluster_size()) - first, Role::Packed));
                            if extent.end() > stays * g.cluster_size() {
                                packed.push((extent, times));
                            }
                        }
                        Mapping::Unallocated | Mapping::Zero => {}
                    }
                    Ok(())
                })?;
            }
            let mut layout = shared.lock().unwrap_or_else(PoisonError::into_inner);
            for (first, n, role) in met {
                layout.mark(first, n, role)?;
            }
            layout.packed.extend(packed);
            Ok(())
        });
        done.into_iter().collect::<Result<(), _>>()?;
        let mut layout = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
        layout.packed.sort_unstable();
        layout.packed.dedup_by(|(extent, times), (kept, sum)| {
            let same = extent == kept;
            *sum += if same { *times } else { 0 };
            same
        });
        Ok(layout)
    }

    fn bitmaps(&mut self, image: &Image) -> Result<(), ImageError> {
        let g = image.geometry();
        let bad = ImageError::format("bitmaps extension", None);
        let Some(extension) = image.header().bitmaps().map_err(bad)? else { return Ok(()) };
        self.root(RootKind::Directory, extension.directory_offset, extension.directory_size)?;
        for (i, bitmap) in image.bitmaps()?.iter().enumerate() {
            let bytes = u64::from(bitmap.table_size) * 8;
            self.root(RootKind::BitmapTable(i), bitmap.table_offset, bytes)?;
            for entry in bitmap_table(image, bitmap.table_offset, bytes)? {
                let bad = ImageError::format("bitmap table entry", Some(bitmap.table_offset));
                if let BitmapCluster::Data(at) = BitmapTableEntry(entry).decode(g).map_err(bad)? {
                    self.mark(g.host_cluster(at).0, 1, Role::Bits)?;
                }
            }
        }
        Ok(())
    }

    fn root(&mut self, what: RootKind, at: u64, bytes: u64) -> Result<(), ImageError> {
        if bytes == 0 {
            return Ok(());
        }
        let root = Root { what, first: at / self.cluster, clusters: bytes.div_ceil(self.cluster) };
        self.mark(root.first, root.clusters, Role::Root)?;
        self.roots.push(root);
        Ok(())
    }

    fn mark(&mut self, first: u64, n: u64, role: Role) -> Result<(), ImageError> {
        let index = |c: u64| usize::try_from(c).unwrap_or(usize::MAX);
        let end = first.saturating_add(n);
        if end > self.most {
            let feature =
                "compacting a file of more than 2^30 clusters, or of more than 2^26, nearly all of them free";
            return Err(ImageError::Unsupported { feature });
        }
        if self.roles.len() < index(end) {
            self.roles.resize(index(end), Role::Free);
        }
        let part = self.roles.get_mut(index(first)..index(end)).unwrap_or_default();
        let many = matches!(role, Role::Data | Role::Packed);
        let fits = |old: Role| old == Role::Free || many && old == role;
        match part.iter().position(|old| !fits(*old)) {
            Some(slot) => {
                let what = format!(
                    "cluster {} has two uses; pleach check --repair all separates them",
                    first + slot as u64
                );
                Err(ImageError::Refused { what })
            }
            None => {
                part.fill(role);
                Ok(())
            }
        }
    }

    /// How many clusters are used.
    pub(super) fn used(&self) -> u64 {
        self.roles.iter().filter(|role| **role != Role::Free).count() as u64
    }

    /// One past the last cluster that is used.
    pub(super) fn end(&self) -> u64 {
        self.roles.iter().rposition(|role| *role != Role::Free).map_or(0, |last| last as u64 + 1)
    }
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// The entries of a bitmap table.
pub(super) fn bitmap_table(image: &Image, at: u64, bytes: u64) -> Result<Vec<u64>, ImageError> {
    let mut table = vec![0; usize::try_from(bytes).unwrap_or(0)];
    image.store().read_at(at, &mut table).map_err(ImageError::io("read a bitmap table"))?;
    Ok(table.as_chunks::<8>().0.iter().map(|e| u64::from_be_bytes(*e)).collect())
}
