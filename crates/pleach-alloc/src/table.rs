//! The refcount table and the blocks it leads to, as stored.

use pleach_format::{
    FormatError, Geometry, Header, HostCluster, HostOffset, RefcountTableEntry, RefcountWidth,
};
use pleach_store::{Store, Window};

use crate::AllocError;

/// Where an image keeps its refcounts.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Cluster size.
    pub geometry: Geometry,
    /// Bits a count.
    pub width: RefcountWidth,
    /// Where the refcount table starts.
    pub table: HostOffset,
    /// How many clusters it has.
    pub table_clusters: u32,
}

impl Place {
    /// What `header` says.
    pub fn of(header: &Header) -> Self {
        Self {
            geometry: header.geometry(),
            width: header.refcount_width(),
            table: header.refcount_table_offset(),
            table_clusters: header.refcount_table_clusters(),
        }
    }
}

/// A loaded refcount table; the blocks are read from the map when asked for.
#[derive(Debug)]
pub struct RefcountTable {
    place: Place,
    entries: Vec<Option<HostOffset>>,
    window: Window,
}

impl RefcountTable {
    /// Reads the table of `store`. Entries behind the last block are dropped.
    ///
    /// # Errors
    /// A table or block outside the file, or an entry that breaks the format.
    pub fn load(store: &dyn Store, place: Place) -> Result<Self, AllocError> {
        let mut first = None;
        let table = Self::load_with(store, place, |_, error| {
            first.get_or_insert(error);
        })?;
        first.map_or(Ok(table), Err)
    }

    /// Reads the table of `store`. Entries that break the format or lead out of the file are handed to `bad` with their
    /// number; a pointer that can be made out all the same is followed, others are taken as empty.
    ///
    /// # Errors
    /// A table outside the file.
    pub fn load_with(
        store: &dyn Store,
        place: Place,
        mut bad: impl FnMut(u64, AllocError),
    ) -> Result<Self, AllocError> {
        let window = store.window()?;
        let (cluster, len) = (place.geometry.cluster_size(), window.len());
        let end = len.next_multiple_of(cluster);
        let bytes = u64::from(place.table_clusters) * cluster;
        if place.table.0.checked_add(bytes).is_none_or(|e| e > end) {
            return Err(AllocError::Outside { structure: "refcount table", offset: place.table.0, len });
        }
        let mut stored = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        window.read_at(place.table.0, &mut stored);
        let mut entries = Vec::new();
        for (index, entry) in (0..).zip(stored.as_chunks::<8>().0) {
            let raw = u64::from_be_bytes(*entry);
            let mut block = RefcountTableEntry(raw).block(place.geometry);
            if let Err(FormatError::Reserved { reserved, .. }) = block {
                bad(index, block.expect_err("just seen").into());
                block = RefcountTableEntry(raw & !reserved).block(place.geometry);
            }
            entries.push(match block {
                Ok(Some(offset)) if offset.0.checked_add(cluster).is_none_or(|e| e > end) => {
                    bad(index, AllocError::Outside { structure: "refcount block", offset: offset.0, len });
                    None
                }
                Ok(block) => block,
                Err(error) => {
                    bad(index, error.into());
                    None
                }
            });
        }
        Ok(Self { place, entries, window })
    }

    /// A table without blocks: every count is 0.
    ///
    /// # Errors
    /// What the system says.
    pub fn empty(store: &dyn Store, place: Place) -> Result<Self, AllocError> {
        Ok(Self { place, entries: Vec::new(), window: store.window()? })
    }

    /// Where the refcounts are kept.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The table's entries: where each block is, all that the table has room for.
    pub fn blocks(&self) -> &[Option<HostOffset>] {
        &self.entries
    }

    /// Reads block number `index`; `None` if all its counts are 0.
    pub fn read_block(&self, index: u64) -> Option<(HostOffset, Vec<u8>)> {
        let offset = usize::try_from(index).ok().and_then(|i| *self.entries.get(i)?)?;
        let mut bytes = vec![0; self.place.geometry.cluster_bytes()];
        self.window.read_at(offset.0, &mut bytes);
        Some((offset, bytes))
    }

    /// Calls `each` with every cluster whose stored count is not 0, in order.
    pub fn for_each_used(&self, mut each: impl FnMut(HostCluster, u64)) {
        let (width, per_block) = (self.place.width, self.place.width.per_block(self.place.geometry));
        for index in 0..self.entries.len() as u64 {
            let Some((_, block)) = self.read_block(index) else { continue };
            for i in 0..usize::try_from(per_block).unwrap_or(0) {
                let count = width.get(&block, i);
                if count != 0 {
                    each(HostCluster(index * per_block + i as u64), count);
                }
            }
        }
    }
}
