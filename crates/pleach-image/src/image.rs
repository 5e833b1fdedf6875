//! One qcow2 file, opened.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pleach_format::{
    CompressedExtent, ExtendedL2Entry, FormatError, Geometry, GuestOffset, Header, HostCluster, HostOffset,
    Incompatible, L1Entry, L2Entry, LuksHeader, Mapping, RunList, SnapshotRecord,
};
use pleach_store::{Store, Window};
use smallvec::SmallVec;

use crate::ImageError;
use crate::codec::{self, Taken};

/// Enough for nearly every header with its extensions and names.
const HEAD: usize = 4096;
/// Bytes of L2 tables kept for random reads.
const CACHE_BYTES: usize = 16 << 20;

/// The start of a file and the header in it.
#[derive(Clone, Debug)]
pub struct Head {
    /// The checked header.
    pub header: Header,
    /// The bytes it was read from: all that the header uses, and at least its first sector.
    pub bytes: Vec<u8>,
}

/// Reads and checks the header of `store`.
///
/// # Errors
/// What the system says, or what is wrong with the header.
pub fn read_head(store: &dyn Store) -> Result<Head, ImageError> {
    let file_length = store.len().map_err(ImageError::io("find the file's length"))?;
    let mut len = HEAD;
    loop {
        // A header is not read beyond the file: what is missing must be an error, not zeros.
        let have = usize::try_from(file_length).unwrap_or(usize::MAX).min(len);
        let mut bytes = vec![0; have];
        store.read_at(0, &mut bytes).map_err(ImageError::io("read the header"))?;
        match Header::parse(&bytes) {
            Ok(header) => {
                bytes.resize(bytes.len().max(512), 0);
                return Ok(Head { header, bytes });
            }
            // Extensions and names end inside the first cluster, at most 2 MiB.
            Err(FormatError::Truncated { needed, .. }) if needed > have as u64 && have == len => {
                len = usize::try_from(needed).unwrap_or(usize::MAX).next_multiple_of(HEAD);
            }
            Err(source) => return Err(ImageError::Format { structure: "header", offset: None, source }),
        }
    }
}

/// An open qcow2 image: header, active L1 table, and L2 tables as they are asked for.
///
/// Reads are `&self` and may run in parallel. The image is not told of changes made to its file, nor of a file that got
/// longer: open it again.
#[derive(Debug)]
pub struct Image {
    store: Arc<dyn Store>,
    data: Option<Arc<dyn Store>>,
    head: Head,
    l1: Vec<L1Entry>,
    /// Virtual size in bytes: the header's, or an internal snapshot's.
    size: u64,
    /// The internal snapshot that is read in place of the active state.
    snapshot: Option<SnapshotRecord>,
    file_len: AtomicU64,
    window: OnceLock<Window>,
    cache: Mutex<HashMap<u64, Arc<[u8]>>>,
}

impl Image {
    /// Opens the image in `store` with its active L1 table.
    ///
    /// # Errors
    /// What is wrong with the header, or an L1 table outside the file.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, ImageError> {
        let head = read_head(&*store)?;
        let header = &head.header;
        let l1 = read_l1(&*store, header.geometry(), header.l1_table_offset(), header.l1_size())?;
        let file_len = store.len().map_err(ImageError::io("find the file's length"))?;
        let file_len = AtomicU64::new(file_len);
        let size = header.size();
        Ok(Self {
            store,
            data: None,
            head,
            l1,
            size,
            snapshot: None,
            file_len,
            window: OnceLock::new(),
            cache: Mutex::default(),
        })
    }

    /// The same image with its external data file, where all guest data is. A data file that is too short reads as
    /// zeros behind its end.
    ///
    /// # Errors
    /// [`ImageError::NoDataFile`] if the image has none.
    pub fn with_data_file(self, data: Arc<dyn Store>) -> Result<Self, ImageError> {
        if !self.external_data() {
            return Err(ImageError::NoDataFile);
        }
        Ok(Self { data: Some(data), ..self })
    }

    /// The state that an internal snapshot keeps, as an image of the size that its disk had; its backing file is the
    /// image's. `wanted` is an id or, if no snapshot has that id, a name.
    ///
    /// QEMU reads snapshots at the size of the active disk: it cuts off what the disk lost since, or adds zeros.
    ///
    /// # Errors
    /// [`ImageError::NoSnapshot`] and [`ImageError::AmbiguousSnapshot`]; a snapshot table or L1 table that breaks the
    /// format; [`ImageError::Unsupported`] for an image with an external data file, which has one state only.
    pub fn at_snapshot(&self, wanted: &[u8]) -> Result<Self, ImageError> {
        if self.external_data() {
            let feature = "reading an internal snapshot of an image with an external data file";
            return Err(ImageError::Unsupported { feature });
        }
        let snapshot = find_snapshot(self.snapshots()?, wanted)?;
        let (l1, size) = self.snapshot_l1(&snapshot)?;
        Ok(Self {
            store: Arc::clone(&self.store),
            data: None,
            head: self.head.clone(),
            l1,
            size,
            snapshot: Some(snapshot),
            file_len: AtomicU64::new(self.file_len()),
            window: OnceLock::new(),
            cache: Mutex::default(),
        })
    }

    /// The file that guest data is read from: the external data file, if that was given, or the image itself.
    pub fn data_store(&self) -> &Arc<dyn Store> {
        self.data.as_ref().unwrap_or(&self.store)
    }

    /// Whether guest data lies in an external data file.
    pub fn external_data(&self) -> bool {
        self.header().incompatible().has(Incompatible::DATA_FILE)
    }

    /// Where the L1 table of this state is.
    pub fn l1_table_offset(&self) -> HostOffset {
        let active = self.header().l1_table_offset();
        self.snapshot.as_ref().map_or(active, |s| HostOffset(s.l1_table_offset))
    }

    /// The internal snapshot that this is the state of, if it is not the active state.
    pub fn snapshot(&self) -> Option<&SnapshotRecord> {
        self.snapshot.as_ref()
    }

    /// The file.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.head.header
    }

    /// The header and the bytes it was read from.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Cluster size and L2 entry width.
    pub fn geometry(&self) -> Geometry {
        self.head.header.geometry()
    }

    /// Length of the file in bytes when it was opened, or as long as this crate made it since.
    pub fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Relaxed)
    }

    /// The file has at least `len` bytes now.
    pub(crate) fn grew_to(&self, len: u64) {
        self.file_len.fetch_max(len, Ordering::Relaxed);
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The L1 table: the active one, or that of the snapshot that is read.
    pub fn l1(&self) -> &[L1Entry] {
        &self.l1
    }

    /// Refuses what keeps guest data from being read.
    ///
    /// # Errors
    /// [`ImageError::DataFile`] if guest data is in a data file that was not given; [`ImageError::Unsupported`] for
    /// encryption.
    pub fn check_readable(&self) -> Result<(), ImageError> {
        if self.external_data() && self.data.is_none() {
            return Err(ImageError::DataFile { name: self.header().data_file().map(crate::escape) });
        }
        match self.header().encryption() {
            None => Ok(()),
            Some(pleach_format::Encryption::Aes) => {
                Err(ImageError::Unsupported { feature: "AES encryption" })
            }
            Some(pleach_format::Encryption::Luks) => {
                Err(ImageError::Unsupported { feature: "LUKS encryption" })
            }
        }
    }

    /// Refuses what keeps the image's tables from being written.
    ///
    /// # Errors
    /// An internal snapshot's state; an image that is marked dirty or corrupt.
    pub fn check_writable(&self) -> Result<(), ImageError> {
        if self.snapshot.is_some() {
            return Err(ImageError::Unsupported { feature: "writing to an internal snapshot" });
        }
        let incompatible = self.header().incompatible();
        for (bit, mark) in [(Incompatible::DIRTY, "dirty"), (Incompatible::CORRUPT, "corrupt")] {
            if incompatible.has(bit) {
                return Err(ImageError::NeedsRepair { mark });
            }
        }
        Ok(())
    }

    /// Refuses what keeps other images' data from being merged into this one.
    ///
    /// # Errors
    /// As [`check_writable`](Self::check_writable) and [`check_readable`](Self::check_readable); an external data file.
    pub fn check_mergeable(&self) -> Result<(), ImageError> {
        if self.external_data() {
            return Err(ImageError::Unsupported {
                feature: "merging into an image with an external data file",
            });
        }
        self.check_writable()
    }

    /// The L2 table that `entry` leads to, as stored; `None` if there is none.
    ///
    /// # Errors
    /// An entry that breaks the format, or a table outside the file.
    pub fn l2_table(&self, entry: L1Entry) -> Result<Option<Vec<u8>>, ImageError> {
        let mut table = Vec::new();
        self.read_l2_table(entry, &mut table)?;
        Ok((!table.is_empty()).then_some(table))
    }

    /// As [`l2_table`](Self::l2_table), into a buffer that can be used again; it is empty if there is no table.
    pub(crate) fn read_l2_table(&self, entry: L1Entry, table: &mut Vec<u8>) -> Result<(), ImageError> {
        let g = self.geometry();
        let Some(offset) = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))? else {
            table.clear();
            return Ok(());
        };
        let window = self.window()?;
        check_inside("L2 table", offset.0, g.cluster_size(), window.len(), g)?;
        table.resize(g.cluster_bytes(), 0);
        window.read_at(offset.0, table);
        Ok(())
    }

    /// Fills `table` with the L2 table at `at`, which lies in the file. By `pread`: pages of a map would count as this
    /// process's memory, and a walk reads each once.
    pub(crate) fn read_table(&self, at: HostOffset, table: &mut [u8]) -> Result<(), ImageError> {
        let g = self.geometry();
        check_inside("L2 table", at.0, g.cluster_size(), self.file_len(), g)?;
        self.store.read_at(at.0, table).map_err(ImageError::io("read an L2 table"))
    }

    /// What the active state says about the guest bytes that L1 entry number `index` answers for.
    ///
    /// # Errors
    /// As [`l2_table`](Self::l2_table); L2 entries that break the format or lead out of the file.
    pub fn runs(&self, index: usize) -> Result<RunList, ImageError> {
        self.runs_of(&self.l1, self.size(), index)
    }

    /// What the state with the L1 table `l1` and a disk of `size` bytes says about the guest bytes that L1 entry number
    /// `index` answers for.
    ///
    /// # Errors
    /// As [`runs`](Self::runs).
    pub fn runs_of(&self, l1: &[L1Entry], size: u64, index: usize) -> Result<RunList, ImageError> {
        let mut runs = RunList::new();
        let Some(table) = l1.get(index).map_or(Ok(None), |&entry| self.l2_table(entry))? else {
            return Ok(runs);
        };
        let g = self.geometry();
        let base = index as u64 * g.l1_span();
        self.for_each_entry(&table, |slot, entry| {
            let guest = base + slot as u64 * g.cluster_size();
            if guest < size {
                self.visit(entry, guest, &mut |guest, len, mapping| {
                    let len = len.min(size.saturating_sub(guest));
                    runs.push(GuestOffset(guest), len, mapping);
                })?;
            }
            Ok(())
        })?;
        Ok(runs)
    }

    /// Calls `each` with every mapping of an L2 table: the index of its entry, and the entry. Empty standard entries
    /// are skipped.
    pub(crate) fn for_each_entry(
        &self,
        table: &[u8],
        mut each: impl FnMut(usize, ExtendedL2Entry) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let mut visit = |slot, [descriptor, subclusters]: [u64; 2]| match descriptor | subclusters {
            0 => Ok(()),
            _ => each(slot, ExtendedL2Entry { descriptor: L2Entry(descriptor), subclusters }),
        };
        let words = table.as_chunks::<8>().0;
        if self.geometry().extended_l2() {
            let mut pairs = words.as_chunks::<2>().0.iter().enumerate();
            return pairs.try_for_each(|(slot, pair)| visit(slot, pair.map(u64::from_be_bytes)));
        }
        words.iter().enumerate().try_for_each(|(slot, word)| visit(slot, [u64::from_be_bytes(*word), 0]))
    }

    /// Calls `each` with the stretches of the cluster at `guest` and what `entry` says about them.
    fn visit(
        &self,
        entry: ExtendedL2Entry,
        guest: u64,
        each: &mut dyn FnMut(u64, u64, Mapping),
    ) -> Result<(), ImageError> {
        let g = self.geometry();
        let bad = ImageError::format("L2 entry", None);
        let at = GuestOffset(guest);
        if g.extended_l2() {
            let runs = if self.external_data() { entry.decode_external(g, at) } else { entry.decode(g) };
            for run in runs.map_err(bad)? {
                let len = u64::from(run.count) * g.subcluster_size();
                let len = if matches!(run.mapping, Mapping::Compressed(_)) { g.cluster_size() } else { len };
                self.check_mapping(run.mapping, guest)?;
                each(guest + u64::from(run.first) * g.subcluster_size(), len, run.mapping);
            }
        } else {
            let mapping = if self.external_data() {
                entry.descriptor.decode_external(g, at)
            } else {
                entry.descriptor.decode(g, self.header().version())
            };
            let mapping = mapping.map_err(bad)?;
            self.check_mapping(mapping, guest)?;
            each(guest, g.cluster_size(), mapping);
        }
        Ok(())
    }

    pub(crate) fn check_mapping(&self, mapping: Mapping, guest: u64) -> Result<(), ImageError> {
        let g = self.geometry();
        match mapping {
            // The data file may end anywhere: the rest of it is zeros.
            Mapping::Data(_) | Mapping::ZeroAllocated(_) if self.external_data() => Ok(()),
            Mapping::Data(offset) | Mapping::ZeroAllocated(offset) => {
                let start = offset.0 & !(g.cluster_size() - 1);
                check_inside("data cluster", start, g.cluster_size(), self.file_len(), g)
            }
            Mapping::Compressed(extent) if extent.offset.0 >= self.file_len() => {
                Err(ImageError::Compressed { guest, offset: extent.offset.0 })
            }
            _ => Ok(()),
        }
    }

    /// Calls `each` with the stretches of `len` guest bytes from `offset`, in order, all of them covered, neighbours
    /// of one kind joined where the file is contiguous. Both lie inside the virtual size.
    ///
    /// # Errors
    /// As [`check_readable`](Self::check_readable) and [`runs`](Self::runs), and what `each` says.
    pub(crate) fn pieces(
        &self,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(u64, u64, Mapping) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        self.check_readable()?;
        self.pieces_in(&|index| Ok(self.cached_table(index)?.map(Table::Shared)), offset, len, each)
    }

    /// As [`pieces`](Self::pieces), with `table` saying which L2 table counts for an L1 slot.
    pub(crate) fn pieces_in<'t>(
        &self,
        table: &dyn Fn(u64) -> Result<Option<Table<'t>>, ImageError>,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(u64, u64, Mapping) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let g = self.geometry();
        let mut open: Option<(u64, u64, Mapping)> = None;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let table = table(at / g.l1_span())?;
            let span_end = (at / g.l1_span() + 1) * g.l1_span();
            let Some(table) = table else {
                let stop = span_end.min(end);
                flush(&mut open, (at, stop - at, Mapping::Unallocated), each)?;
                at = stop;
                continue;
            };
            while at < span_end.min(end) {
                let cluster = at & !(g.cluster_size() - 1);
                let index = g.l2_index(g.guest_cluster(GuestOffset(cluster)));
                let empty = empty_entries(&table, g, index);
                if empty > 0 {
                    let stop = (cluster + empty * g.cluster_size()).min(end);
                    flush(&mut open, (at, stop - at, Mapping::Unallocated), each)?;
                    at = stop;
                    continue;
                }
                let entry = entry_at(&table, g, index);
                let mut found: SmallVec<[(u64, u64, Mapping); 4]> = SmallVec::new();
                self.visit(entry, cluster, &mut |start, n, mapping| found.push((start, n, mapping)))?;
                for (start, n, mapping) in found {
                    let (from, to) = (start.max(at), (start + n).min(end));
                    if from < to {
                        flush(&mut open, (from, to - from, shift(mapping, from - start)), each)?;
                    }
                }
                at = (cluster + g.cluster_size()).min(end);
            }
        }
        match open {
            Some((start, n, mapping)) => each(start, n, mapping),
            None => Ok(()),
        }
    }

    /// Fills `part` with the guest bytes from `guest`, all of which `mapping` (which is not `Unallocated`) answers for:
    /// a stretch handed out by [`pieces`](Self::pieces).
    pub(crate) fn read_piece(&self, guest: u64, mapping: Mapping, part: &mut [u8]) -> Result<(), ImageError> {
        match mapping {
            Mapping::Unallocated | Mapping::Zero | Mapping::ZeroAllocated(_) => {
                part.fill(0);
                Ok(())
            }
            Mapping::Data(host) => {
                self.data_store().read_at(host.0, part).map_err(ImageError::io("read guest data"))
            }
            Mapping::Compressed(extent) => {
                let g = self.geometry();
                let cluster = guest & !(g.cluster_size() - 1);
                if part.len() == g.cluster_bytes() {
                    return self.read_compressed(cluster, extent, part);
                }
                let mut whole = vec![0; g.cluster_bytes()];
                self.read_compressed(cluster, extent, &mut whole)?;
                let from = usize::try_from(guest - cluster).unwrap_or(0);
                part.copy_from_slice(whole.get(from..from + part.len()).expect("inside one cluster"));
                Ok(())
            }
        }
    }

    /// Reads and decompresses the cluster that starts at `guest`.
    pub(crate) fn read_compressed(
        &self,
        guest: u64,
        extent: CompressedExtent,
        out: &mut [u8],
    ) -> Result<(), ImageError> {
        self.unpack(guest, extent, &mut Vec::new(), out).map(drop)
    }

    /// The same, with the compressed bytes behind the end of `packed`.
    fn unpack(
        &self,
        guest: u64,
        extent: CompressedExtent,
        packed: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<Taken, ImageError> {
        let start = packed.len();
        packed.resize(start + usize::try_from(extent.bytes).unwrap_or(0), 0);
        let input = packed.get_mut(start..).unwrap_or_default();
        self.store.read_at(extent.offset.0, input).map_err(ImageError::io("read a compressed cluster"))?;
        let taken = codec::unpack(self.header().compression(), input, out);
        taken.ok_or(ImageError::Compressed { guest, offset: extent.offset.0 })
    }

    /// Reads the cluster that starts at `guest` and is compressed, and gives the number of compressed bytes, which are then
    /// behind the end of `packed`. `None`, with nothing there, if it is not compressed, or does not tell where it ends.
    pub(crate) fn read_packed(
        &self,
        guest: u64,
        packed: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<Option<usize>, ImageError> {
        let (start, mut len) = (packed.len(), None);
        self.pieces(guest, out.len() as u64, &mut |at, n, mapping| {
            if let Mapping::Compressed(extent) = mapping
                && n == out.len() as u64
                && let Taken::Exactly(bytes) = self.unpack(at, extent, packed, out)?
            {
                len = Some(bytes);
            }
            Ok(())
        })?;
        packed.truncate(start + len.unwrap_or(0));
        Ok(len)
    }

    /// Fills `packed` with the first compressed bytes of the cluster at `guest`.
    pub(crate) fn read_packed_bytes(&self, guest: u64, packed: &mut [u8]) -> Result<(), ImageError> {
        let mut found = None;
        self.pieces(guest, 1, &mut |_, _, mapping| {
            found = Some(mapping);
            Ok(())
        })?;
        match found {
            Some(Mapping::Compressed(extent)) if extent.bytes >= packed.len() as u64 => self
                .store
                .read_at(extent.offset.0, packed)
                .map_err(ImageError::io("read a compressed cluster")),
            _ => Err(ImageError::Changed { what: "a compressed cluster is gone" }),
        }
    }

    /// Bytes of a compressed extent that clusters are counted for: all that it claims, unless it claims a whole cluster
    /// and more behind the end of the file.
    pub(crate) fn counted_bytes(&self, extent: CompressedExtent) -> u64 {
        let cluster = self.geometry().cluster_size();
        if extent.offset.0.saturating_add(extent.bytes).saturating_sub(self.file_len()) < cluster {
            return extent.bytes;
        }
        self.file_len().next_multiple_of(cluster).saturating_sub(extent.offset.0).min(extent.bytes)
    }

    /// The host clusters that an entry which says `mapping` is counted for, each once. Guest data in another file are not
    /// counted.
    pub(crate) fn counted_clusters(&self, mapping: Mapping) -> impl Iterator<Item = HostCluster> + use<> {
        let (at, len) = match mapping {
            _ if self.external_data() => (HostOffset(0), 0),
            Mapping::Data(at) | Mapping::ZeroAllocated(at) => (at, self.geometry().cluster_size()),
            Mapping::Compressed(extent) => (extent.offset, self.counted_bytes(extent).max(1)),
            Mapping::Unallocated | Mapping::Zero => (HostOffset(0), 0),
        };
        self.geometry().touched(at, len)
    }

    pub(crate) fn cached_table(&self, index: u64) -> Result<Option<Arc<[u8]>>, ImageError> {
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = lock().get(&index) {
            return Ok(Some(Arc::clone(table)));
        }
        let g = self.geometry();
        let entry = usize::try_from(index).ok().and_then(|i| self.l1.get(i)).copied().unwrap_or_default();
        let Some(offset) = entry.l2_table(g).map_err(ImageError::format("L1 entry", None))? else {
            return Ok(None);
        };
        // By `pread`: random reads touch few tables, and pages of a map would count as this process's memory.
        check_inside("L2 table", offset.0, g.cluster_size(), self.file_len(), g)?;
        let mut table = vec![0; g.cluster_bytes()];
        self.store.read_at(offset.0, &mut table).map_err(ImageError::io("read an L2 table"))?;
        let table: Arc<[u8]> = table.into();
        let mut cache = lock();
        if cache.len() >= (CACHE_BYTES / self.geometry().cluster_bytes()).max(8) {
            cache.clear();
        }
        cache.insert(index, Arc::clone(&table));
        Ok(Some(table))
    }

    /// The file's metadata window, opened when first asked for.
    pub(crate) fn window(&self) -> Result<&Window, ImageError> {
        if let Some(window) = self.window.get() {
            return Ok(window);
        }
        let window = self.store.window().map_err(ImageError::io("map the file"))?;
        Ok(self.window.get_or_init(|| window))
    }

    /// The L1 table of an internal snapshot, and the size of its disk.
    ///
    /// # Errors
    /// A table outside the file, or one that is too short for the disk.
    pub fn snapshot_l1(&self, snapshot: &SnapshotRecord) -> Result<(Vec<L1Entry>, u64), ImageError> {
        let (g, size) = (self.geometry(), snapshot.disk_size.unwrap_or(self.header().size()) & !511);
        let at = HostOffset(snapshot.l1_table_offset);
        if snapshot.l1_size > Geometry::MAX_L1_ENTRIES {
            let (value, max) = (snapshot.l1_size.into(), Geometry::MAX_L1_ENTRIES.into());
            let source = FormatError::OutOfRange { field: "snapshot l1_size", value, min: 0, max };
            return Err(ImageError::Format { structure: "snapshot table entry", offset: None, source });
        }
        let l1 = read_l1(&*self.store, g, at, snapshot.l1_size)?;
        if (l1.len() as u64) < g.required_l1(size) {
            let (value, min) = (l1.len() as u64, g.required_l1(size));
            let source = FormatError::OutOfRange {
                field: "snapshot l1_size",
                value,
                min,
                max: Geometry::MAX_L1_ENTRIES.into(),
            };
            return Err(ImageError::Format { structure: "snapshot table entry", offset: None, source });
        }
        Ok((l1, size))
    }

    /// The header of the encryption, without what needs a key; `None` unless the image is encrypted with LUKS.
    ///
    /// # Errors
    /// A header that is missing, breaks the format or lies outside the file.
    pub fn luks_header(&self) -> Result<Option<LuksHeader>, ImageError> {
        let bad = ImageError::format("header", None);
        let Some(pointer) = self.header().encryption_header().map_err(bad)? else { return Ok(None) };
        let len = self.store.len().map_err(ImageError::io("find the file's length"))?;
        check_inside("LUKS header", pointer.offset.0, pointer.length, len, self.geometry())?;
        let mut bytes = [0; LuksHeader::BYTES];
        self.store.read_at(pointer.offset.0, &mut bytes).map_err(ImageError::io("read the LUKS header"))?;
        LuksHeader::parse(&bytes).map(Some).map_err(ImageError::format("LUKS header", Some(pointer.offset.0)))
    }
}

/// The snapshot with the id `wanted` or, if there is none, with that name.
pub(crate) fn find_snapshot(
    snapshots: Vec<SnapshotRecord>,
    wanted: &[u8],
) -> Result<SnapshotRecord, ImageError> {
    let by_id = snapshots.iter().any(|s| s.id == wanted);
    let mut found: Vec<SnapshotRecord> =
        snapshots.into_iter().filter(|s| if by_id { s.id == wanted } else { s.name == wanted }).collect();
    let name = crate::escape(wanted);
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (None, _) => Err(ImageError::NoSnapshot { name }),
        (Some(last), _) => {
            found.push(last);
            let ids = found.iter().map(|s| crate::escape(&s.id)).collect();
            Err(ImageError::AmbiguousSnapshot { name, ids })
        }
    }
}

/// An L2 table as stored, from a cache or from somebody's hands.
pub(crate) enum Table<'t> {
    /// From the cache.
    Shared(Arc<[u8]>),
    /// Changed, and not written yet.
    Edited(&'t [u8]),
}

impl std::ops::Deref for Table<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Edited(bytes) => bytes,
        }
    }
}

/// Reads an L1 table: the active one or a snapshot's.
pub(crate) fn read_l1(
    store: &dyn Store,
    geometry: Geometry,
    offset: HostOffset,
    entries: u32,
) -> Result<Vec<L1Entry>, ImageError> {
    if entries == 0 {
        return Ok(Vec::new());
    }
    let (bytes, file) =
        (u64::from(entries) * 8, store.len().map_err(ImageError::io("find the file's length"))?);
    check_inside("L1 table", offset.0, bytes, file, geometry)?;
    if offset.0 + bytes > file {
        // Every writer writes the whole table: what is missing was cut off, and is not empty.
        return Err(ImageError::Outside {
            structure: "L1 table",
            offset: offset.0,
            length: bytes,
            file_length: file,
        });
    }
    // In pieces: the table alone may have 32 MiB.
    let mut l1 = Vec::with_capacity(usize::try_from(entries).unwrap_or(0));
    let mut piece = vec![0; 64 << 10];
    for at in (0..bytes).step_by(64 << 10) {
        let len = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(piece.len());
        let (part, _) = piece.split_at_mut(len);
        store.read_at(offset.0 + at, part).map_err(ImageError::io("read the L1 table"))?;
        l1.extend(part.as_chunks::<8>().0.iter().map(|e| L1Entry(u64::from_be_bytes(*e))));
    }
    Ok(l1)
}

/// A structure may end in the file's last, partial cluster, but not behind it.
pub(crate) fn check_inside(
    structure: &'static str,
    offset: u64,
    length: u64,
    file_length: u64,
    geometry: Geometry,
) -> Result<(), ImageError> {
    let end = file_length.next_multiple_of(geometry.cluster_size());
    match offset.checked_add(length) {
        Some(e) if e <= end && offset < file_length.max(1) => Ok(()),
        _ => Err(ImageError::Outside { structure, offset, length, file_length }),
    }
}

pub(crate) fn entry_at(table: &[u8], geometry: Geometry, index: usize) -> ExtendedL2Entry {
    let (words, _) = table.as_chunks::<8>();
    let step = geometry.l2_entry_bytes() / 8;
    let word = |i: usize| words.get(i).map_or(0, |w| u64::from_be_bytes(*w));
    let second = if step == 2 { word(index * 2 + 1) } else { 0 };
    ExtendedL2Entry { descriptor: L2Entry(word(index * step)), subclusters: second }
}

/// How many entries from `index` on are all zeros, and say nothing.
fn empty_entries(table: &[u8], geometry: Geometry, index: usize) -> u64 {
    let step = geometry.l2_entry_bytes();
    let rest = table.get(index * step..).unwrap_or(&[]);
    let words = rest.as_chunks::<8>().0;
    let zeros = words.iter().position(|word| *word != [0; 8]).unwrap_or(words.len());
    (zeros * 8 / step) as u64
}

/// The mapping of the bytes `by` further on.
fn shift(mapping: Mapping, by: u64) -> Mapping {
    match mapping {
        Mapping::Data(offset) => Mapping::Data(HostOffset(offset.0 + by)),
        Mapping::ZeroAllocated(offset) => Mapping::ZeroAllocated(HostOffset(offset.0 + by)),
        other => other,
    }
}

/// Joins `next` to the open stretch, or hands that on and opens a new one.
fn flush(
    open: &mut Option<(u64, u64, Mapping)>,
    next: (u64, u64, Mapping),
    each: &mut dyn FnMut(u64, u64, Mapping) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    if let Some((_, len, mapping)) = open {
        let joins = match (*mapping, next.2) {
            (Mapping::Data(a), Mapping::Data(b)) => a.0 + *len == b.0,
            (Mapping::Unallocated, Mapping::Unallocated) => true,
            (Mapping::Zero | Mapping::ZeroAllocated(_), Mapping::Zero | Mapping::ZeroAllocated(_)) => true,
            _ => false,
        };
        if joins {
            *len += next.1;
            return Ok(());
        }
    }
    match open.replace(next) {
        Some((start, len, mapping)) => each(start, len, mapping),
        None => Ok(()),
    }
}
