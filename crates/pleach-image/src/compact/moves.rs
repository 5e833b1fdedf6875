//! Moving clusters of a file that is read by others at every instant: a copy first, then the pointers, then the old place goes.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pleach_alloc::{Census, Change, Place, RefcountTable};
use pleach_format::{
    BitmapCluster, BitmapTableEntry, BitmapsExtension, HostCluster, HostOffset, Mapping, RefcountTableEntry,
    root,
};
use pleach_store::Store;

use super::Steps;
use super::layout::{Extent, Role, Root, RootKind, all_tables};
use super::plan::{Plan, SINGLE};
use crate::check::Counts;
use crate::publish::{barrier, read_sector, set_snapshots, write_sector};
use crate::recount::{Effect, change_counts, drop_blocks};
use crate::spans::spans;
use crate::workers::{collect, tables_a_piece};
use crate::{Image, ImageError, Workers, set_bitmaps};

/// Most clusters, or compressed extents, that are moved between two passes over the L2 tables.
const BATCH: usize = 1 << 16;
/// Moves that one worker copies before it asks for more.
const COPIES: usize = 64;
/// Bytes that are copied in one go.
const BUFFER: u64 = 1 << 20;

/// Where an entry leads, whatever its flags.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// Makes of an L2 table what it shall be.
type Redo<'a> = dyn Fn(&[u8], &mut [u8]) -> Result<(), ImageError> + Sync + 'a;

pub(super) struct Mover<'a> {
    pub(super) store: &'a Arc<dyn Store>,
    pub(super) workers: &'a dyn Workers,
    pub(super) steps: &'a dyn Steps,
}

/// What a move is worth: it was done, or somebody wants to stop before it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Yes,
    Stopped,
}

impl Mover<'_> {
    /// Carries out `plan`.
    pub(super) fn run(&self, plan: &Plan) -> Result<Done, ImageError> {
        self.add_blocks(&plan.new_blocks)?;
        for role in SINGLE {
            let moves = plan.aside.iter().filter(|(r, ..)| *r == role).map(|&(_, from, to)| (from, to));
            if self.singles(role, moves)? == Done::Stopped {
                return Ok(Done::Stopped);
            }
        }
        for &(root, to) in &plan.roots {
            self.root(root, to)?;
        }
        for batch in plan.packed.chunks(BATCH) {
            if self.steps.stop() {
                return Ok(Done::Stopped);
            }
            self.packed(batch)?;
        }
        for role in SINGLE {
            if self.singles(role, plan.singles.of(role))? == Done::Stopped {
                return Ok(Done::Stopped);
            }
        }
        self.trim(plan)?;
        Ok(Done::Yes)
    }

    pub(super) fn image(&self) -> Result<Image, ImageError> {
        Image::open(Arc::clone(self.store))
    }

    /// Lowers counts to which nothing durable leads any more, and gives what is free then back.
    pub(super) fn lower(&self, census: &Census) -> Result<(), ImageError> {
        let image = self.image()?;
        let place = Place::of(image.header());
        let freed = change_counts(&**self.store, place, census, Change::Lower, Effect::Write, self.workers)?;
        barrier(&**self.store)?;
        let size = image.geometry().cluster_size();
        freed.into_iter().try_for_each(|clusters| self.punch(clusters, size))
    }

    fn punch(&self, clusters: Range<u64>, size: u64) -> Result<(), ImageError> {
        let len = self.store.len().map_err(ImageError::io("find the file's length"))?;
        let bytes = clusters.start * size..(clusters.end * size).min(len);
        if bytes.is_empty() {
            return Ok(());
        }
        self.store.discard(bytes).map_err(ImageError::io("give space back"))
    }

    fn raise(&self, census: &Census) -> Result<(), ImageError> {
        let place = Place::of(self.image()?.header());
        change_counts(&**self.store, place, census, Change::Raise, Effect::Write, self.workers).map(drop)
    }

    /// Refcount blocks for stretches of the file in which nothing was used. Each is counted, by itself or by another block,
    /// before the table leads to it.
    fn add_blocks(&self, blocks: &[(u64, u64)]) -> Result<(), ImageError> {
        for &(index, cluster) in blocks {
            let image = self.image()?;
            let (g, place) = (image.geometry(), Place::of(image.header()));
            let at = g.host_offset(HostCluster(cluster)).0;
            let mut block = vec![0; g.cluster_bytes()];
            let per_block = place.width.per_block(g);
            if cluster / per_block == index {
                let slot = usize::try_from(cluster % per_block).unwrap_or(usize::MAX);
                let bad = ImageError::format("refcount block", Some(at));
                place.width.set(&mut block, slot, 1).map_err(bad)?;
            } else {
                let mut census = Census::new();
                census.add(HostCluster(cluster), 1);
                self.raise(&census)?;
            }
            self.store.write_at(at, &block).map_err(ImageError::io("write refcounts"))?;
            barrier(&**self.store)?;
            self.pointer(place.table.0 + index * 8, at)?;
        }
        Ok(())
    }

    fn singles(&self, role: Role, moves: impl Iterator<Item = (u64, u64)>) -> Result<Done, ImageError> {
        let mut moves = moves.peekable();
        while moves.peek().is_some() {
            if self.steps.stop() {
                return Ok(Done::Stopped);
            }
            let mut batch: Vec<(u64, u64)> = moves.by_ref().take(BATCH).collect();
            batch.sort_unstable();
            self.batch(role, &batch)?;
        }
        Ok(Done::Yes)
    }

    /// ```text
    /// written so far                      a crash leaves
    /// 1  counts of the new places, copies the old state, plus leaks
    /// 2  pointers to the copies           each old or new: both lead to the same bytes, counted alike
    /// 3  counts of the old places         the new state
    /// ```
    fn batch(&self, role: Role, moves: &[(u64, u64)]) -> Result<(), ImageError> {
        let image = self.image()?;
        let table = RefcountTable::load(&**self.store, Place::of(image.header()))?;
        let (mut stored, mut up, mut down) = (Counts::new(&table), Census::new(), Census::new());
        for &(from, to) in moves {
            let count = stored.get(HostCluster(from));
            up.add(HostCluster(to), count);
            down.add(HostCluster(from), count);
        }
        self.raise(&up)?;
        let size = image.geometry().cluster_size();
        self.copy(&joined(moves, size))?;
        barrier(&**self.store)?;
        let to = |at: u64| {
            let found = moves.binary_search_by_key(&(at / size), |(from, _)| *from).ok()?;
            moves.get(found).map(|(_, to)| to * size)
        };
        match role {
            Role::Data => self.point_data(&image, moves, &to)?,
            Role::Table => self.point_tables(&image, &to)?,
            Role::Bits => self.point_bits(&image, &to)?,
            _ => {
                let place = Place::of(image.header());
                let entries = u64::from(place.table_clusters) * size / 8;
                self.point_words(place.table.0, entries, &|raw| {
                    let at = RefcountTableEntry(raw).block(place.geometry).ok()??;
                    Some(raw - at.0 + to(at.0)?)
                })?;
            }
        }
        barrier(&**self.store)?;
        self.lower(&down)
    }

    /// Copies bytes within the file; what is a hole stays one.
    fn copy(&self, moves: &[(u64, u64, u64)]) -> Result<(), ImageError> {
        let pieces: Vec<_> = moves.chunks(COPIES).collect();
        let done = collect(self.workers, pieces.len(), |i| -> Result<(), ImageError> {
            let mut buffer = Vec::new();
            for &(from, to, len) in pieces.get(i).copied().unwrap_or_default() {
                let find = ImageError::io("find the file's data");
                let mut at = from;
                for data in self.store.data_ranges(from..from + len).map_err(find)? {
                    let data = data.start.max(from)..data.end.min(from + len);
                    self.clear(to + (at - from)..to + (data.start - from))?;
                    at = data.start;
                    while at < data.end {
                        let n = (data.end - at).min(BUFFER);
                        buffer.resize(usize::try_from(n).unwrap_or(0), 0);
                        self.store.read_at(at, &mut buffer).map_err(ImageError::io("read what is moved"))?;
                        let io = ImageError::io("write what is moved");
                        self.store.write_at(to + (at - from), &buffer).map_err(io)?;
                        at += n;
                    }
                }
                self.clear(to + (at - from)..to + len)?;
                self.steps.advance(len);
            }
            Ok(())
        });
        done.into_iter().collect()
    }

    fn clear(&self, range: Range<u64>) -> Result<(), ImageError> {
        if range.is_empty() {
            return Ok(());
        }
        let len = self.store.len().map_err(ImageError::io("find the file's length"))?;
        if len < range.end {
            self.store.set_len(range.end).map_err(ImageError::io("extend the file"))?;
        }
        self.store.discard(range).map_err(ImageError::io("clear what is moved to"))
    }

    /// Lets the L2 entries of all states lead to the new places.
    fn point_data(
        &self,
        image: &Image,
        moves: &[(u64, u64)],
        to: &(dyn Fn(u64) -> Option<u64> + Sync),
    ) -> Result<(), ImageError> {
        let (g, version) = (image.geometry(), image.header().version());
        let bounds = moves.first().zip(moves.last()).map_or(0..0, |(first, last)| first.0..last.0 + 1);
        self.each_table(image, &|old, new| {
            spans(old, g, |span| {
                let raw = span.entry.descriptor;
                let Ok(Mapping::Data(at) | Mapping::ZeroAllocated(at)) = raw.decode(g, version) else {
                    return Ok(());
                };
                let first = g.host_cluster(at).0;
                for cluster in first.max(bounds.start)..(first + span.len as u64).min(bounds.end) {
                    let i = cluster - first;
                    if let Some(place) = to(g.host_offset(HostCluster(cluster)).0) {
                        let slot = span.slot + usize::try_from(i).unwrap_or(usize::MAX);
                        put(new, slot * g.l2_entry_bytes(), raw.0 - at.0 + place);
                    }
                }
                Ok(())
            })
        })
    }

    /// Lets the L2 entries of all states lead to the new places of compressed data.
    fn point_packed(&self, image: &Image, moves: &[(Extent, u64)]) -> Result<(), ImageError> {
        let (g, version) = (image.geometry(), image.header().version());
        self.each_table(image, &|old, new| {
            spans(old, g, |span| {
                let raw = span.entry.descriptor;
                let Ok(Mapping::Compressed(packed)) = raw.decode(g, version) else { return Ok(()) };
                let extent = Extent { offset: packed.offset.0, bytes: image.counted_bytes(packed).max(1) };
                if let Some(to) = place_of(moves, extent) {
                    put(new, span.slot * g.l2_entry_bytes(), raw.0 - extent.offset + to);
                }
                Ok(())
            })
        })
    }

    /// Calls `change` with each L2 table as it is and as it shall be, and writes what differs.
    fn each_table(&self, image: &Image, change: &Redo<'_>) -> Result<(), ImageError> {
        let g = image.geometry();
        let tables = all_tables(image)?;
        let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
        let done = collect(self.workers, pieces.len(), |i| -> Result<(), ImageError> {
            let (mut old, mut new) = (vec![0; g.cluster_bytes()], Vec::new());
            for &(at, _) in pieces.get(i).copied().unwrap_or_default() {
                image.read_table(HostOffset(at), &mut old)?;
                new.clone_from(&old);
                change(&old, &mut new)?;
                self.write_changed(at, &old, &new)?;
            }
            Ok(())
        });
        done.into_iter().collect()
    }

    /// Writes the words of `new` from the first that differs to the last.
    fn write_changed(&self, at: u64, old: &[u8], new: &[u8]) -> Result<(), ImageError> {
        let differs = |(a, b): (&[u8; 8], &[u8; 8])| a != b;
        let pairs = || old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
        let Some((first, last)) = pairs().position(differs).zip(pairs().rposition(differs)) else {
            return Ok(());
        };
        let part = new.get(first * 8..(last + 1) * 8).unwrap_or_default();
        self.store.write_at(at + first as u64 * 8, part).map_err(ImageError::io("write pointers"))
    }

    /// Replaces words of a table in the file.
    fn point_words(
        &self,
        at: u64,
        words: u64,
        change: &dyn Fn(u64) -> Option<u64>,
    ) -> Result<(), ImageError> {
        let mut old = vec![0; usize::try_from(words * 8).unwrap_or(0)];
        self.store.read_at(at, &mut old).map_err(ImageError::io("read pointers"))?;
        let mut new = old.clone();
        for word in new.as_chunks_mut::<8>().0 {
            if let Some(changed) = change(u64::from_be_bytes(*word)) {
                *word = changed.to_be_bytes();
            }
        }
        self.write_changed(at, &old, &new)
    }

    fn point_tables(&self, image: &Image, to: &dyn Fn(u64) -> Option<u64>) -> Result<(), ImageError> {
        let change = |raw: u64| {
            let at = raw & PLACE;
            Some(raw - at + to(at).filter(|_| at != 0)?)
        };
        let header = image.header();
        self.point_words(header.l1_table_offset().0, header.l1_size().into(), &change)?;
        for snapshot in image.snapshots()? {
            self.point_words(snapshot.l1_table_offset, snapshot.l1_size.into(), &change)?;
        }
        Ok(())
    }

    fn point_bits(&self, image: &Image, to: &dyn Fn(u64) -> Option<u64>) -> Result<(), ImageError> {
        let g = image.geometry();
        for bitmap in image.bitmaps()? {
            self.point_words(bitmap.table_offset, bitmap.table_size.into(), &|raw| {
                let Ok(BitmapCluster::Data(at)) = BitmapTableEntry(raw).decode(g) else { return None };
                Some(raw - at.0 + to(at.0)?)
            })?;
        }
        Ok(())
    }

    fn packed(&self, moves: &[(Extent, u64)]) -> Result<(), ImageError> {
        let image = self.image()?;
        let (g, version, place) = (image.geometry(), image.header().version(), Place::of(image.header()));
        let tables = all_tables(&image)?;
        let pieces: Vec<_> = tables.chunks(tables_a_piece(g.cluster_bytes())).collect();
        let counted = Mutex::new((Census::new(), Census::new()));
        let done = collect(self.workers, pieces.len(), |i| -> Result<(), ImageError> {
            let (mut bytes, mut met) = (vec![0; g.cluster_bytes()], Vec::new());
            for &(at, times) in pieces.get(i).copied().unwrap_or_default() {
                image.read_table(HostOffset(at), &mut bytes)?;
                spans(&bytes, g, |span| {
                    let mapping = span.entry.descriptor.decode(g, version);
                    if let Ok(Mapping::Compressed(packed)) = mapping {
                        let bytes = image.counted_bytes(packed).max(1);
                        let extent = Extent { offset: packed.offset.0, bytes };
                        met.extend(place_of(moves, extent).map(|to| (extent, to, times)));
                    }
                    Ok(())
                })?;
            }
            let (up, down) = &mut *counted.lock().unwrap_or_else(PoisonError::into_inner);
            for (extent, to, times) in met {
                up.add_bytes(&place, HostOffset(to), extent.bytes, times);
                down.add_bytes(&place, HostOffset(extent.offset), extent.bytes, times);
            }
            Ok(())
        });
        done.into_iter().collect::<Result<(), _>>()?;
        let (up, down) = counted.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.raise(&up)?;
        let mut buffer = Vec::new();
        for &(extent, to) in moves {
            buffer.resize(usize::try_from(extent.bytes).unwrap_or(0), 0);
            let io = ImageError::io("read what is moved");
            self.store.read_at(extent.offset, &mut buffer).map_err(io)?;
            self.store.write_at(to, &buffer).map_err(ImageError::io("write what is moved"))?;
            self.steps.advance(extent.bytes);
        }
        barrier(&**self.store)?;
        self.point_packed(&image, moves)?;
        barrier(&**self.store)?;
        self.lower(&down)
    }

    /// As [`batch`](Self::batch), for what one pointer leads to.
    fn root(&self, root: Root, to: u64) -> Result<(), ImageError> {
        let image = self.image()?;
        let (g, header) = (image.geometry(), image.header());
        let (mut up, mut down) = (Census::new(), Census::new());
        up.add_run(HostCluster(to), root.clusters, 1);
        down.add_run(HostCluster(root.first), root.clusters, 1);
        self.raise(&up)?;
        let size = g.cluster_size();
        let new = to * size;
        self.copy(&[(root.first * size, new, root.clusters * size)])?;
        barrier(&**self.store)?;
        match root.what {
            RootKind::ActiveL1 => self.sector(|sector| {
                root::set_size_and_l1(sector, header.size(), header.l1_size(), new);
            })?,
            RootKind::Refcounts => self.sector(|sector| {
                root::set_refcount_table(sector, new, header.refcount_table_clusters());
            })?,
            RootKind::Snapshots => set_snapshots(&**self.store, header.nb_snapshots(), HostOffset(new))?,
            RootKind::SnapshotL1(number) => {
                let before = image.snapshots()?;
                let before = before.iter().take(number);
                let at = before.fold(0, |at: usize, s| (at + s.stored_bytes).next_multiple_of(8));
                self.pointer(header.snapshots_offset().0 + at as u64, new)?;
            }
            RootKind::Directory | RootKind::BitmapTable(_) => {
                let bad = ImageError::format("bitmaps extension", None);
                let Some(extension) = header.bitmaps().map_err(bad)? else { return Ok(()) };
                if let RootKind::BitmapTable(number) = root.what {
                    let bitmaps = image.bitmaps()?;
                    let at: usize = bitmaps.iter().take(number).map(|b| b.stored_bytes()).sum();
                    self.pointer(extension.directory_offset + at as u64, new)?;
                } else {
                    let moved = BitmapsExtension { directory_offset: new, ..extension };
                    set_bitmaps(&**self.store, Some(&moved), |_, _| {
                        Err(ImageError::Unsupported { feature: "moving bitmaps of so full a header" })
                    })?;
                }
            }
        }
        self.lower(&down)
    }

    /// Writes one pointer, within a sector.
    fn pointer(&self, at: u64, to: u64) -> Result<(), ImageError> {
        self.store.write_at(at, &to.to_be_bytes()).map_err(ImageError::io("write a pointer"))?;
        barrier(&**self.store)
    }

    fn sector(&self, change: impl FnOnce(&mut [u8; 512])) -> Result<(), ImageError> {
        let mut sector = read_sector(&**self.store)?;
        change(&mut sector);
        write_sector(&**self.store, &sector)?;
        barrier(&**self.store)
    }

    /// Drops the refcount blocks and the part of the refcount table that count nothing any more, cuts the file, and gives the
    /// space of free clusters back.
    ///
    /// ```text
    /// written so far                          a crash leaves
    /// 1  no pointers to blocks behind the end clusters behind the end that nothing leads to, uncounted
    /// 2  a shorter table (header)             the same
    /// 3  counts of both; a shorter file       the new state, plus leaks; the new state
    /// ```
    fn trim(&self, plan: &Plan) -> Result<(), ImageError> {
        let image = self.image()?;
        let (g, place) = (image.geometry(), Place::of(image.header()));
        let (size, per_block) = (g.cluster_size(), place.width.per_block(g));
        let mut left = drop_blocks(&**self.store, place, plan.blocks)?;
        let counted = |cluster: u64| cluster / per_block < plan.blocks;
        let table_clusters = u32::try_from(plan.table_clusters).unwrap_or(u32::MAX);
        if table_clusters < place.table_clusters {
            self.sector(|sector| root::set_refcount_table(sector, place.table.0, table_clusters))?;
            let first = g.host_cluster(place.table).0;
            let tail = first + u64::from(table_clusters)..first + u64::from(place.table_clusters);
            tail.filter(|c| counted(*c)).for_each(|c| left.add(HostCluster(c), 1));
        }
        self.lower(&left)?;
        let (len, end) =
            (self.store.len().map_err(ImageError::io("find the file's length"))?, plan.end * size);
        if len != plan.length(size, len) {
            self.store.set_len(end).map_err(ImageError::io("cut the file"))?;
            barrier(&**self.store)?;
        }
        let table = RefcountTable::load(&**self.store, Place::of(self.image()?.header()))?;
        let mut free = 0;
        let mut holes = Vec::new();
        table.for_each_used(|cluster, _| {
            if cluster.0 > free {
                holes.push(free..cluster.0);
            }
            free = cluster.0 + 1;
        });
        holes.into_iter().try_for_each(|hole| self.punch(hole, size))
    }
}

/// Moves as byte offsets and lengths, those that follow one another joined.
fn joined(moves: &[(u64, u64)], size: u64) -> Vec<(u64, u64, u64)> {
    let mut all: Vec<(u64, u64, u64)> = Vec::new();
    for &(from, to) in moves {
        let (from, to) = (from * size, to * size);
        match all.last_mut() {
            Some((f, t, len)) if *f + *len == from && *t + *len == to && *len < BUFFER => *len += size,
            _ => all.push((from, to, size)),
        }
    }
    all
}

fn place_of(moves: &[(Extent, u64)], extent: Extent) -> Option<u64> {
    let found = moves.binary_search_by_key(&extent, |(extent, _)| *extent).ok()?;
    moves.get(found).map(|(_, to)| *to)
}

fn put(table: &mut [u8], at: usize, word: u64) {
    if let Some(field) = table.get_mut(at..at + 8) {
        field.copy_from_slice(&word.to_be_bytes());
    }
}
