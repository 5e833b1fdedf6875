//! Walking all pointers of one image: what refers to which host cluster, and which pointers are wrong.
//!
//! Every L2 table is read once, however many L1 entries lead to it, and its references count that many times: the work
//! follows the tables that the file holds, not what its fields claim.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pleach_alloc::{AllocError, Census, Place, RefcountTable};
use pleach_format::{
    BitmapCluster, BitmapRecord, BitmapTableEntry, ExtendedL2Entry, ExtensionKind, FormatError, Geometry,
    HostCluster, HostOffset, Incompatible, L1Entry, L2Entry, Mapping, Version,
};

use crate::image::{check_inside, read_l1};
use crate::spans::spans;
use crate::workers::{collect, tables_a_piece};
use crate::{Image, ImageError, Workers};

/// Something wrong in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A name for programs.
    pub code: &'static str,
    /// The structure that it is in.
    pub structure: &'static str,
    /// Host offset of the entry or structure, where there is one.
    pub offset: Option<u64>,
    /// Guest offset and length of what it concerns, where that is guest data.
    pub guest: Option<(u64, u64)>,
    /// What is wrong, and what the guest will see.
    pub message: String,
    /// How many pointers it concerns: a shared table is met once for each that leads to it.
    pub times: u64,
}

/// What becomes of a finding: to go on, or to stop.
pub(crate) type Sink<'a> = dyn FnMut(Finding) -> Result<(), ImageError> + 'a;

/// One L2 table, as met from the L1 tables.
#[derive(Clone, Debug)]
pub(crate) struct TableUse {
    /// L1 entries that lead to it, of all states.
    pub(crate) references: u64,
    /// Guest offset of its first entry: the active state's if that uses it.
    pub(crate) guest: u64,
    /// L1 slots of the active state that lead to it.
    pub(crate) active: Vec<usize>,
}

/// The result of a walk.
#[derive(Debug)]
pub(crate) struct Walked {
    pub(crate) census: Census,
    pub(crate) tables: BTreeMap<u64, TableUse>,
    pub(crate) counts: RefcountTable,
}

/// Walks the image. Pointers that break the format or lead out of the file go to `sink`, and are not followed.
///
/// # Errors
/// What `sink` says; a file that cannot be read.
pub(crate) fn walk(image: &Image, workers: &dyn Workers, sink: &mut Sink<'_>) -> Result<Walked, ImageError> {
    let header = image.header();
    let place = Place::of(header);
    let counts = refcounts(image, place, sink)?;
    let mut census = Census::new();
    census.add(HostCluster(0), 1);
    census.add_refcount_structures(&counts);
    let mut walk = Walk { image, place, census, tables: BTreeMap::new() };
    walk.census.add_bytes(&place, header.l1_table_offset(), u64::from(header.l1_size()) * 8, 1);
    walk.l1(image.l1(), header.l1_table_offset(), 0, true, 1, sink)?;
    walk.snapshots(sink)?;
    walk.l2_tables(workers, sink)?;
    walk.bitmaps(sink)?;
    walk.encryption(sink)?;
    walk.extensions(sink)?;
    Ok(Walked { census: walk.census, tables: walk.tables, counts })
}

fn refcounts(image: &Image, place: Place, sink: &mut Sink<'_>) -> Result<RefcountTable, ImageError> {
    let mut stopped = None;
    let table = RefcountTable::load_with(&**image.store(), place, |index, error| {
        let offset = place.table.0 + index * 8;
        let found = Finding {
            code: "refcount-block-pointer",
            structure: "refcount table",
            offset: Some(offset),
            guest: None,
            message: format!("refcount table entry {index}: {error}; its clusters have no counts"),
            times: 1,
        };
        if let Err(stop) = sink(found) {
            stopped.get_or_insert(stop);
        }
    });
    if let Some(error) = stopped {
        return Err(error);
    }
    match table {
        Err(error @ AllocError::Outside { .. }) => {
            sink(Finding {
                code: "refcount-table",
                structure: "refcount table",
                offset: Some(place.table.0),
                guest: None,
                message: format!(
                    "{error}; no cluster has a count, and the next write may overwrite any of them"
                ),
                times: 1,
            })?;
            Ok(RefcountTable::empty(&**image.store(), place)?)
        }
        table => Ok(table?),
    }
}

struct Walk<'a> {
    image: &'a Image,
    place: Place,
    census: Census,
    tables: BTreeMap<u64, TableUse>,
}

impl Walk<'_> {
    fn geometry(&self) -> Geometry {
        self.place.geometry
    }

    /// Meets the L2 tables that an L1 table leads to, or a part of one that starts with slot `first`.
    fn l1(
        &mut self,
        l1: &[L1Entry],
        at: HostOffset,
        first: usize,
        active: bool,
        times: u64,
        sink: &mut Sink<'_>,
    ) -> Result<(), ImageError> {
        let g = self.geometry();
        for (index, &entry) in l1.iter().enumerate() {
            if entry == L1Entry::default() {
                continue;
            }
            let slot = first + index;
            let guest = slot as u64 * g.l1_span();
            let bad = |code, message: String| Finding {
                code,
                structure: "L1 table",
                offset: Some(at.0 + index as u64 * 8),
                guest: Some((guest, g.l1_span())),
                message,
                times,
            };
            let raw = entry.0;
            let offset = match entry.l2_table(g) {
                Ok(None) if raw == 0 => continue,
                Ok(None) => {
                    sink(bad(
                        "l1-empty",
                        format!(
                            "L1 entry {slot} is {raw:#x}: it has flags, but leads nowhere; this range is empty"
                        ),
                    ))?;
                    continue;
                }
                Ok(Some(offset)) => offset,
                Err(FormatError::Reserved { reserved, .. }) => {
                    sink(bad(
                        "l1-reserved",
                        format!("L1 entry {slot} is {raw:#x}: reserved bits {reserved:#x} are set"),
                    ))?;
                    match L1Entry(raw & !reserved).l2_table(g) {
                        Ok(Some(offset)) => offset,
                        _ => continue,
                    }
                }
                Err(error) => {
                    sink(bad(
                        "l1-pointer",
                        format!("L1 entry {slot}: {error}; the guest cannot read this range"),
                    ))?;
                    continue;
                }
            };
            if let Err(error) = check_inside("L2 table", offset.0, g.cluster_size(), self.image.file_len(), g)
            {
                sink(bad(
                    "l1-pointer",
                    format!("L1 entry {slot}: {error}; the guest cannot read this range"),
                ))?;
                continue;
            }
            let table =
                self.tables.entry(offset.0).or_insert(TableUse { references: 0, guest, active: Vec::new() });
            table.references += times;
            if active {
                if table.active.is_empty() {
                    table.guest = guest;
                }
                table.active.push(slot);
            }
        }
        Ok(())
    }

    fn snapshots(&mut self, sink: &mut Sink<'_>) -> Result<(), ImageError> {
        let header = self.image.header();
        let at = header.snapshots_offset().0;
        let bad = |code, message: String| Finding {
            code,
            structure: "snapshot table",
            offset: Some(at),
            guest: None,
            message,
            times: 1,
        };
        if header.nb_snapshots() == 0 && !self.geometry().is_aligned(at) {
            sink(bad(
                "snapshot-root",
                format!(
                    "the header has no snapshots, but their table at {at:#x}: QEMU does not open such an image"
                ),
            ))?;
        }
        let snapshots = match self.image.snapshots() {
            Ok(snapshots) => snapshots,
            Err(error @ ImageError::Io { .. }) => return Err(error),
            Err(error) => {
                sink(bad("snapshot-table", format!("{error}; no snapshot can be read")))?;
                Vec::new()
            }
        };
        let last = snapshots.len().saturating_sub(1);
        let mut bytes = 0u64;
        let mut tables: BTreeMap<(HostOffset, u32), u64> = BTreeMap::new();
        for (i, snapshot) in snapshots.iter().enumerate() {
            let stored = snapshot.stored_bytes as u64;
            bytes += if i == last { stored } else { stored.next_multiple_of(8) };
            let offset = HostOffset(snapshot.l1_table_offset);
            let name = crate::escape(&snapshot.name);
            if header.version() == Version::V3 && snapshot.disk_size.is_none() {
                sink(bad(
                    "snapshot-incomplete",
                    format!("snapshot table entry {i} (\"{name}\") lacks its disk size"),
                ))?;
            }
            if !self.geometry().is_aligned(offset.0) {
                sink(bad(
                    "snapshot-l1",
                    format!("L1 table of snapshot \"{name}\" is at {:#x}: not aligned", offset.0),
                ))?;
                continue;
            }
            *tables.entry((offset, snapshot.l1_size)).or_insert(0) += 1;
        }
        let (g, file) = (self.geometry(), self.image.file_len());
        let mut stretches = Vec::new();
        for ((offset, entries), times) in tables {
            let bytes = u64::from(entries) * 8;
            match check_inside("L1 table", offset.0, bytes, file, g) {
                Ok(()) => stretches.push(Stretch { start: offset.0, end: offset.0 + bytes, times }),
                Err(error) => {
                    let found =
                        bad("snapshot-l1", format!("{error}; the snapshots that use it cannot be read"));
                    sink(Finding { times, ..found })?;
                }
            }
        }
        // Snapshots may share an L1 table, or parts of one, in a hostile image: each part is read once.
        for part in apart(&whole_clusters(&stretches, g)) {
            self.census.add_bytes(&self.place, HostOffset(part.start), part.end - part.start, part.times);
        }
        for part in apart(&stretches) {
            for at in (part.start..part.end).step_by(PIECE) {
                let entries = u32::try_from((part.end - at).min(PIECE as u64) / 8).unwrap_or(0);
                let l1 = read_l1(&**self.image.store(), g, HostOffset(at), entries)?;
                let first = usize::try_from((at - part.table) / 8).unwrap_or(0);
                self.l1(&l1, HostOffset(at), first, false, part.times, sink)?;
            }
        }
        if !snapshots.is_empty() {
            self.census.add_bytes(&self.place, header.snapshots_offset(), bytes, 1);
        }
        Ok(())
    }

    /// Reads each L2 table once: a piece of them at a time, several pieces at once. A piece in which anything is wrong has no
    /// effect, and is read again afterwards, for `sink`.
    fn l2_tables(&mut self, workers: &dyn Workers, sink: &mut Sink<'_>) -> Result<(), ImageError> {
        let tables: Vec<_> = self.tables.iter().collect();
        let pieces: Vec<_> = tables.chunks(tables_a_piece(self.geometry().cluster_bytes())).collect();
        let piece = |i: usize| pieces.get(i).copied().unwrap_or_default();
        let (image, place) = (self.image, self.place);
        let census = Mutex::new(std::mem::take(&mut self.census));
        let count = |met: Vec<Met>| {
            let mut census = census.lock().unwrap_or_else(PoisonError::into_inner);
            for Met { bytes, times } in met {
                census.add_bytes(&place, HostOffset(bytes.start), bytes.end - bytes.start, times);
            }
        };
        let whole = collect(workers, pieces.len(), |i| {
            let met = meet(image, piece(i), &mut |_| Err(ImageError::Failed));
            met.is_ok_and(|met| {
                count(met);
                true
            })
        });
        for (i, whole) in whole.into_iter().enumerate() {
            if !whole {
                count(meet(image, piece(i), sink)?);
            }
        }
        self.census = census.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(())
    }

    fn bitmaps(&mut self, sink: &mut Sink<'_>) -> Result<(), ImageError> {
        let g = self.geometry();
        let file = self.image.file_len();
        let bad = |code, offset, message: String| Finding {
            code,
            structure: "bitmaps",
            offset,
            guest: None,
            message,
            times: 1,
        };
        let (extension, bitmaps) = match (self.image.header().bitmaps(), self.image.bitmaps()) {
            (_, Err(error @ ImageError::Io { .. })) => return Err(error),
            (Ok(None), _) => return Ok(()),
            (Ok(Some(extension)), Ok(bitmaps)) => (extension, bitmaps),
            (Err(error), _) => return sink(bad("bitmap-extension", None, error.to_string())),
            (_, Err(error)) => {
                return sink(bad(
                    "bitmap-directory",
                    error.offset(),
                    format!("{error}; no bitmap can be used"),
                ));
            }
        };
        self.census.add_bytes(
            &self.place,
            HostOffset(extension.directory_offset),
            extension.directory_size,
            1,
        );
        let mut stretches = Vec::new();
        for bitmap in bitmaps {
            let (at, bytes) = (bitmap.table_offset, u64::from(bitmap.table_size) * 8);
            let name = crate::escape(&bitmap.name);
            if let Err(fault) = bitmap.check(g, self.image.header().size()) {
                sink(bad("bitmap-entry", Some(at), format!("bitmap \"{name}\": {fault}")))?;
            }
            if !g.is_aligned(at) || u64::from(bitmap.table_size) * g.cluster_size() > BitmapRecord::MAX_BYTES
            {
                continue;
            }
            match check_inside("bitmap table", at, bytes, file, g) {
                Ok(()) => stretches.push(Stretch { start: at, end: at + bytes, times: 1 }),
                Err(error) => sink(bad("bitmap-table", Some(at), format!("bitmap \"{name}\": {error}")))?,
            }
        }
        for part in apart(&whole_clusters(&stretches, g)) {
            self.census.add_bytes(&self.place, HostOffset(part.start), part.end - part.start, part.times);
        }
        for part in apart(&stretches) {
            for at in (part.start..part.end).step_by(PIECE) {
                let len = usize::try_from((part.end - at).min(PIECE as u64)).unwrap_or(0);
                self.bitmap_table(at, len, part.times, sink)?;
            }
        }
        Ok(())
    }

    /// Meets the clusters of bits that a part of a bitmap table leads to.
    fn bitmap_table(
        &mut self,
        at: u64,
        len: usize,
        times: u64,
        sink: &mut Sink<'_>,
    ) -> Result<(), ImageError> {
        let g = self.geometry();
        let mut table = vec![0; len];
        self.image.store().read_at(at, &mut table).map_err(ImageError::io("read a bitmap table"))?;
        for (i, entry) in table.as_chunks::<8>().0.iter().enumerate() {
            match bitmap_entry_fault(u64::from_be_bytes(*entry), g, self.image.file_len()) {
                Ok(None) => {}
                Ok(Some(data)) => {
                    self.census.add_bytes(&self.place, HostOffset(data), g.cluster_size(), times);
                }
                Err(message) => sink(Finding {
                    code: "bitmap-data",
                    structure: "bitmaps",
                    offset: Some(at + i as u64 * 8),
                    guest: None,
                    message,
                    times,
                })?,
            }
        }
        Ok(())
    }

    /// Header extensions for which QEMU does not open the image, although they say nothing that is used.
    fn extensions(&self, sink: &mut Sink<'_>) -> Result<(), ImageError> {
        let header = self.image.header();
        let mut bad = |kind, code, message: String| {
            let offset = header.extension(kind).map(|e| e.at as u64);
            sink(Finding { code, structure: "header extension", offset, guest: None, message, times: 1 })
        };
        let bytes = |kind| header.extension(kind).map_or(0, |e| e.data.len());
        let format = bytes(ExtensionKind::BackingFormat);
        if format >= BACKING_FORMAT {
            let most = BACKING_FORMAT - 1;
            let message =
                format!("the name of the backing format has {format} bytes, must have at most {most}");
            bad(ExtensionKind::BackingFormat, "backing-format", message)?;
        }
        // With consistent bitmaps this is told with them.
        let unused = header.bitmaps().is_ok_and(|b| b.is_none());
        let bitmaps = bytes(ExtensionKind::Bitmaps);
        if unused && header.extension(ExtensionKind::Bitmaps).is_some() && bitmaps != BITMAPS_EXTENSION {
            let message = format!("the bitmaps extension has {bitmaps} bytes, must have {BITMAPS_EXTENSION}");
            bad(ExtensionKind::Bitmaps, "bitmap-extension", message)?;
        }
        Ok(())
    }

    fn encryption(&mut self, sink: &mut Sink<'_>) -> Result<(), ImageError> {
        let Some(luks) = self.image.header().extension(ExtensionKind::EncryptionHeader) else {
            return Ok(());
        };
        let Some(([offset, length], _)) = luks.data.as_chunks::<8>().0.split_first_chunk::<2>() else {
            return Ok(());
        };
        let (offset, length) = (u64::from_be_bytes(*offset), u64::from_be_bytes(*length));
        match check_inside("encryption header", offset, length, self.image.file_len(), self.geometry()) {
            Ok(()) => {
                self.census.add_bytes(&self.place, HostOffset(offset), length, 1);
                Ok(())
            }
            Err(error) => sink(Finding {
                code: "encryption-header",
                structure: "encryption header",
                offset: Some(offset),
                guest: None,
                message: error.to_string(),
                times: 1,
            }),
        }
    }
}

/// Bytes of the file that something refers to so many times. Where they are many clusters, they are whole ones.
struct Met {
    bytes: Range<u64>,
    times: u64,
}

/// What some L2 tables refer to, themselves included.
fn meet(image: &Image, tables: &[(&u64, &TableUse)], sink: &mut Sink<'_>) -> Result<Vec<Met>, ImageError> {
    let g = image.geometry();
    let mut entries = Entries::new(image);
    let mut all = Vec::new();
    for &(&at, used) in tables {
        let times = used.references;
        all.push(Met { bytes: at..at + g.cluster_size(), times });
        // Clusters that follow one another are counted together: `run` is where they start and end. What starts
        // where a cluster does, and right behind the others, has no cluster in common with them.
        let mut run = 0..0;
        entries.for_each_span(at, |slot, _, entry, target| {
            let guest = used.guest + slot as u64 * g.cluster_size();
            let bad = |(code, message): (&'static str, String)| Finding {
                code,
                structure: "L2 table",
                offset: Some(at + slot as u64 * g.l2_entry_bytes() as u64),
                guest: Some((guest, g.cluster_size())),
                message: format!("L2 entry {:#x}: {message}", entry.0),
                times,
            };
            match target {
                Ok(Target { offset, len, complaint }) => {
                    if offset == run.end && g.is_aligned(offset) {
                        run.end += len;
                    } else {
                        let bytes = std::mem::replace(&mut run, offset..offset.saturating_add(len));
                        all.push(Met { bytes, times });
                    }
                    complaint.map_or(Ok(()), |complaint| sink(bad(complaint)))
                }
                Err(complaint) => sink(bad(complaint)),
            }
        })?;
        all.push(Met { bytes: run, times });
    }
    Ok(all)
}

/// In a data file, offset 0 is a place too: for judging the bitmap alone, `entry` with another one in its stead.
fn in_some_file(entry: ExtendedL2Entry, elsewhere: bool, g: Geometry) -> ExtendedL2Entry {
    match elsewhere && entry.descriptor.copied() {
        true => ExtendedL2Entry { descriptor: L2Entry::owned(HostOffset(g.cluster_size())), ..entry },
        false => entry,
    }
}

/// Where an entry of a bitmap table leads to, or what is wrong with it.
pub(crate) fn bitmap_entry_fault(entry: u64, g: Geometry, file: u64) -> Result<Option<u64>, String> {
    match BitmapTableEntry(entry).decode(g).map_err(|error| error.to_string())? {
        BitmapCluster::Zeros | BitmapCluster::Ones => Ok(None),
        BitmapCluster::Data(data) => {
            check_inside("bitmap data", data.0, g.cluster_size(), file, g)
                .map_err(|error| error.to_string())?;
            Ok(Some(data.0))
        }
    }
}

/// QEMU keeps the name of the backing format in so many bytes, the last of which is 0.
const BACKING_FORMAT: usize = 16;
/// Bytes of the bitmaps extension.
pub(crate) const BITMAPS_EXTENSION: usize = 24;
/// Bytes of a table that are read in one go.
const PIECE: usize = 1 << 20;

/// A part of the file that something refers to so many times.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Stretch {
    start: u64,
    end: u64,
    times: u64,
}

/// A part of the file in which all bytes are referred to equally often.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Part {
    start: u64,
    end: u64,
    times: u64,
    /// Where the first of the stretches that cover it starts.
    table: u64,
}

/// The parts of stretches that may overlap, in order, each once.
fn apart(stretches: &[Stretch]) -> Vec<Part> {
    let mut edges: Vec<(u64, bool, Stretch)> = Vec::new();
    for &stretch in stretches.iter().filter(|s| s.start < s.end) {
        edges.push((stretch.start, true, stretch));
        edges.push((stretch.end, false, stretch));
    }
    edges.sort_unstable_by_key(|(at, opens, _)| (*at, *opens));
    let mut open: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut parts, mut from, mut times) = (Vec::new(), 0, 0u64);
    for (at, opens, stretch) in edges {
        if let Some((&table, _)) = open.first_key_value()
            && from < at
        {
            parts.push(Part { start: from, end: at, times, table });
        }
        from = at;
        let known = open.entry(stretch.start).or_insert(0);
        if opens {
            *known += stretch.times;
            times = times.saturating_add(stretch.times);
        } else {
            *known -= stretch.times;
            times -= stretch.times;
            if *known == 0 {
                open.remove(&stretch.start);
            }
        }
    }
    parts
}

/// The clusters that each stretch touches.
fn whole_clusters(stretches: &[Stretch], g: Geometry) -> Vec<Stretch> {
    let cluster = g.cluster_size();
    let whole =
        |s: &Stretch| Stretch { start: s.start & !(cluster - 1), end: s.end.next_multiple_of(cluster), ..*s };
    stretches.iter().filter(|s| s.start < s.end).map(whole).collect()
}

/// What one L2 entry refers to in the file, and what is wrong with it although it can be followed.
pub(crate) struct Target {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    complaint: Option<Complaint>,
}

/// A code for programs, and what is wrong.
type Complaint = (&'static str, String);

/// Reads the entries of one L2 table after the other, into one buffer.
pub(crate) struct Entries<'a> {
    image: &'a Image,
    /// Guest data are in another file.
    elsewhere: bool,
    /// The last place for a cluster, for entries that can be judged by it alone; 0 if none can.
    last: HostOffset,
    table: Vec<u8>,
}

impl<'a> Entries<'a> {
    pub(crate) fn new(image: &'a Image) -> Self {
        let g = image.geometry();
        let elsewhere = image.header().incompatible().has(Incompatible::DATA_FILE);
        let last = match elsewhere || g.extended_l2() {
            true => 0,
            false => image.file_len().next_multiple_of(g.cluster_size()).saturating_sub(g.cluster_size()),
        };
        Self { image, elsewhere, last: HostOffset(last), table: Vec::new() }
    }

    /// Calls `each` with the entries of the L2 table at `at` that refer to something or are wrong: slot, descriptor,
    /// target or complaint.
    ///
    /// # Errors
    /// What `each` says; a table outside the file.
    pub(crate) fn for_each(
        &mut self,
        at: u64,
        mut each: impl FnMut(usize, L2Entry, Result<Target, Complaint>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let cluster = self.image.geometry().cluster_size();
        self.for_each_span(at, |slot, n, raw, target| match target {
            Ok(target) if n > 1 => (0..n).try_for_each(|i| {
                let by = i as u64 * cluster;
                let target = Target { offset: target.offset + by, len: cluster, complaint: None };
                each(slot + i, L2Entry(raw.0 + by), Ok(target))
            }),
            target => each(slot, raw, target),
        })
    }

    /// As [`for_each`](Self::for_each), but plain data clusters that follow one another, in the table and in the file, come
    /// together: their number, the first one's descriptor, and a target that covers all of them.
    ///
    /// # Errors
    /// As [`for_each`](Self::for_each).
    pub(crate) fn for_each_span(
        &mut self,
        at: u64,
        mut each: impl FnMut(usize, usize, L2Entry, Result<Target, Complaint>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let g = self.image.geometry();
        let mut table = std::mem::take(&mut self.table);
        table.resize(g.cluster_bytes(), 0);
        self.image.read_table(HostOffset(at), &mut table)?;
        spans(&table, g, |span| {
            let (raw, more) = (span.entry.descriptor, (span.len as u64 - 1) * g.cluster_size());
            if let Some(data) = raw.plain_data(g, self.last)
                && data.0 + more <= self.last.0
            {
                let target = Target { offset: data.0, len: more + g.cluster_size(), complaint: None };
                return each(span.slot, span.len, raw, Ok(target));
            }
            (0..span.len).try_for_each(|i| {
                let entry = span.entry(g, i);
                let judged = self.judge(entry);
                judged.map_or(Ok(()), |target| each(span.slot + i, 1, entry.descriptor, target))
            })
        })?;
        self.table = table;
        Ok(())
    }

    /// What any entry refers to, or what is wrong with it; `None` if neither.
    fn judge(&self, entry: ExtendedL2Entry) -> Option<Result<Target, Complaint>> {
        let (image, elsewhere) = (self.image, self.elsewhere);
        let g = image.geometry();
        let raw = entry.descriptor;
        let mut complaint = None;
        let mut mapping = raw.decode(g, image.header().version());
        if let Err(FormatError::Reserved { reserved, .. }) = mapping {
            complaint = Some(("l2-reserved", format!("reserved bits {reserved:#x} are set")));
            mapping = L2Entry(raw.0 & !reserved).decode(g, image.header().version());
        }
        if raw.is_compressed() && raw.copied() {
            complaint = Some(("l2-compressed-copied", "a compressed entry has the COPIED flag".to_owned()));
            mapping = raw.with_copied(false).decode(g, image.header().version());
        }
        if complaint.is_none()
            && g.extended_l2()
            && let Err(error) = in_some_file(entry, elsewhere, g).decode(g)
        {
            complaint = Some(("l2-subclusters", format!("{error}; the guest cannot read this cluster")));
        }
        let lost = |error: &dyn std::fmt::Display| {
            Err(("l2-pointer", format!("{error}; the guest cannot read this cluster")))
        };
        let target = match mapping {
            Ok(Mapping::Data(_) | Mapping::ZeroAllocated(_)) if elsewhere => None,
            Ok(Mapping::Data(at) | Mapping::ZeroAllocated(at)) => {
                Some(match check_inside("data cluster", at.0, g.cluster_size(), image.file_len(), g) {
                    Ok(()) => Ok(Target { offset: at.0, len: g.cluster_size(), complaint: None }),
                    Err(error) => lost(&error),
                })
            }
            Ok(Mapping::Compressed(extent)) => {
                let len = image.counted_bytes(extent);
                Some(if extent.offset.0 >= image.file_len() {
                    lost(&"the compressed data lie outside the file")
                } else {
                    // A claim may end anywhere in the last cluster; one that goes on behind it is wrong, though the
                    // data may be whole.
                    let end = extent.offset.0.saturating_add(extent.bytes);
                    if end.saturating_sub(image.file_len()) >= g.cluster_size() {
                        let text =
                            format!("{} compressed bytes reach behind the end of the file", extent.bytes);
                        complaint.get_or_insert(("l2-compressed-length", text));
                    }
                    Ok(Target { offset: extent.offset.0, len, complaint: None })
                })
            }
            Ok(Mapping::Zero | Mapping::Unallocated) => None,
            Err(error) => Some(lost(&error)),
        };
        match (target, complaint) {
            (Some(Ok(target)), complaint) => Some(Ok(Target { complaint, ..target })),
            (Some(Err(lost)), _) => Some(Err(lost)),
            (None, Some(complaint)) => Some(Err(complaint)),
            (None, None) => None,
        }
    }
}
