//! Changing guest bytes: write, zero, discard, compressed write (spec: L2 entries, subclusters, compressed clusters).
//!
//! Data go into clusters that nothing leads to, or in place where a cluster has one owner; entries change in memory and
//! are published later, all at once. So no order is kept here.

use std::sync::{Mutex, PoisonError};

use pleach_format::{ExtendedL2Entry, GuestCluster, GuestOffset, HostOffset, L2Entry, Version};

use super::State;
use crate::ImageError;
use crate::cell::Cell;
use crate::codec::Compressor;

impl State {
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let done = self.write_some(at, rest)?;
            at += done as u64;
            rest = rest.get(done..).unwrap_or_default();
        }
        Ok(())
    }

    /// Writes the first of `bytes`: as many clusters in a row as can be handled alike. Returns how many bytes.
    fn write_some(&mut self, at: u64, bytes: &[u8]) -> Result<usize, ImageError> {
        let g = self.shape.geometry;
        let cluster = g.guest_cluster(GuestOffset(at));
        let inside = at % g.cluster_size();
        let part = bytes.get(..self.length_in_cluster(at, bytes.len())).unwrap_or_default();
        let cell = self.cell(cluster)?;
        if self.in_place(cell) {
            let touched = self.shape.touched(inside, part.len() as u64);
            return if cell.data & touched == touched {
                self.overwrite(at, bytes, cell)
            } else {
                self.fill(cluster, inside, part, cell).map(|()| part.len())
            };
        }
        if self.is_whole(at, part.len() as u64) {
            return self.write_new(cluster, bytes);
        }
        self.copy_on_write(cluster, inside, part, cell).map(|()| part.len())
    }

    /// How many of `len` bytes from `at` lie in its cluster.
    fn length_in_cluster(&self, at: u64, len: usize) -> usize {
        let size = self.shape.geometry.cluster_size();
        usize::try_from(size - at % size).map_or(len, |room| room.min(len))
    }

    /// Whether `len` bytes from `at`, which lie in one cluster, are all of it that is on the disk.
    fn is_whole(&self, at: u64, len: u64) -> bool {
        let g = self.shape.geometry;
        g.is_aligned(at) && (len == g.cluster_size() || at + len == self.image.size())
    }

    /// Writes in place as far as the host goes on with data of one owner.
    fn overwrite(&mut self, at: u64, bytes: &[u8], first: Cell) -> Result<usize, ImageError> {
        let g = self.shape.geometry;
        let inside = at % g.cluster_size();
        let Some(host) = first.host else { return Ok(0) };
        let mut len = self.length_in_cluster(at, bytes.len());
        while len < bytes.len() {
            let next = self.cell(g.guest_cluster(GuestOffset(at + len as u64)))?;
            let expected = HostOffset(host.0 + inside + len as u64);
            let all = next.data == self.shape.all() && next.host == Some(expected);
            if !all || !self.in_place(next) {
                break;
            }
            len += self.length_in_cluster(at + len as u64, bytes.len() - len);
        }
        self.put(HostOffset(host.0 + inside), bytes.get(..len).unwrap_or_default())?;
        Ok(len)
    }

    /// Writes into a host cluster of its own some of whose subclusters have no data yet: what the write leaves of these
    /// is filled with what was read there before.
    fn fill(
        &mut self,
        cluster: GuestCluster,
        inside: u64,
        part: &[u8],
        cell: Cell,
    ) -> Result<(), ImageError> {
        let touched = self.shape.touched(inside, part.len() as u64);
        let fresh = touched & !cell.data;
        let Some(host) = cell.host else { return Ok(()) };
        for (from, bytes) in self.merged(cluster, inside, part, touched, fresh)? {
            self.put(HostOffset(host.0 + from), &bytes)?;
        }
        self.set_cell(cluster, Cell { data: cell.data | touched, zero: cell.zero & !touched, ..cell })
    }

    /// Writes part of a cluster into a new host cluster, together with the data that it has.
    fn copy_on_write(
        &mut self,
        cluster: GuestCluster,
        inside: u64,
        part: &[u8],
        cell: Cell,
    ) -> Result<(), ImageError> {
        let had = if cell.packed.is_some() { self.shape.all() } else { cell.data };
        let data = had | self.shape.touched(inside, part.len() as u64);
        let pieces = self.merged(cluster, inside, part, data, data)?;
        let (host, _) = self.place(cluster, 1)?;
        for (from, bytes) in pieces {
            if let Err(error) = self.put(HostOffset(host.0 + from), &bytes) {
                self.give_back(host, 1);
                return Err(error);
            }
        }
        self.set_cell(cluster, Cell { host: Some(host), packed: None, data, zero: cell.zero & !data })
    }

    /// The bytes to be written for the subclusters `mask` of a cluster: `part` from byte `inside` on and, in the
    /// subclusters `whole`, around it what is read there now. Offsets within the cluster, in order.
    fn merged(
        &self,
        cluster: GuestCluster,
        inside: u64,
        part: &[u8],
        mask: u32,
        whole: u32,
    ) -> Result<Vec<(u64, Vec<u8>)>, ImageError> {
        let g = self.shape.geometry;
        let (guest, size) = (g.guest_offset(cluster).0, g.subcluster_size());
        let end = inside + part.len() as u64;
        let mut out: Vec<(u64, Vec<u8>)> = Vec::new();
        for i in (0..g.cluster_size() / size).filter(|i| mask >> i & 1 != 0) {
            let (from, to) = match whole >> i & 1 {
                0 => ((i * size).max(inside), ((i + 1) * size).min(end)),
                _ => (i * size, (i + 1) * size),
            };
            let mut bytes = vec![0; usize::try_from(to - from).unwrap_or(0)];
            if from < inside || to > end {
                self.content(guest + from, &mut bytes)?;
            }
            let (first, last) = (from.max(inside), to.min(end));
            if first < last {
                let range = |base: u64| {
                    let at = |x: u64| usize::try_from(x - base).unwrap_or(usize::MAX);
                    at(first)..at(last)
                };
                let new = part.get(range(inside)).unwrap_or_default();
                bytes.get_mut(range(from)).expect("within the subcluster").copy_from_slice(new);
            }
            match out.last_mut() {
                Some((start, joined)) if *start + joined.len() as u64 == from => joined.extend(bytes),
                _ => out.push((from, bytes)),
            }
        }
        Ok(out)
    }

    /// Writes whole clusters, from the first byte of `cluster` on, to new places: as many in a row as need one and find
    /// room together. Returns how many bytes.
    fn write_new(&mut self, cluster: GuestCluster, bytes: &[u8]) -> Result<usize, ImageError> {
        let g = self.shape.geometry;
        let start = g.guest_offset(cluster).0;
        let mut most = 1;
        loop {
            let at = start + most * g.cluster_size();
            let from = usize::try_from(at - start).unwrap_or(usize::MAX);
            let Some(rest) = bytes.get(from..).filter(|rest| !rest.is_empty()) else { break };
            let len = self.length_in_cluster(at, rest.len());
            let next = self.cell(GuestCluster(cluster.0 + most))?;
            if !self.is_whole(at, len as u64) || self.in_place(next) {
                break;
            }
            most += 1;
        }
        let (host, n) = self.place(cluster, most)?;
        let room = usize::try_from(n * g.cluster_size()).unwrap_or(usize::MAX);
        let len = room.min(bytes.len());
        let now = bytes.get(..len).unwrap_or_default();
        // What lies behind the disk's end in its last cluster must not be what the file happened to hold there.
        let tail = vec![0; (room - len) % g.cluster_bytes()];
        let put = self.put(host, now).and_then(|()| match tail.is_empty() {
            true => Ok(()),
            false => self.put(HostOffset(host.0 + len as u64), &tail),
        });
        if let Err(error) = put {
            self.give_back(host, n);
            return Err(error);
        }
        for i in 0..n {
            let at = HostOffset(host.0 + i * g.cluster_size());
            let cell = Cell { host: Some(at), packed: None, data: self.shape.all(), zero: 0 };
            self.set_cell(GuestCluster(cluster.0 + i), cell)?;
        }
        Ok(len)
    }

    pub(super) fn zero(&mut self, offset: u64, len: u64, free: bool) -> Result<(), ImageError> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = self.step(at, end);
            if self.is_whole(at, n) {
                self.zero_cluster(at, n, free)?;
            } else {
                self.zero_part(at, n)?;
            }
            at += n;
        }
        Ok(())
    }

    /// How far from `at` the cluster goes, at most to `end`.
    fn step(&self, at: u64, end: u64) -> u64 {
        let size = self.shape.geometry.cluster_size();
        (size - at % size).min(end - at)
    }

    fn has_backing(&self) -> bool {
        !self.backing.layers().is_empty()
    }

    fn zero_cluster(&mut self, at: u64, len: u64, free: bool) -> Result<(), ImageError> {
        let cluster = self.shape.geometry.guest_cluster(GuestOffset(at));
        let cell = self.cell(cluster)?;
        if self.shape.version == Version::V2 {
            // No zero flag: nothing at all reads as zeros where nothing lies below.
            return match (self.has_backing(), cell.is_empty()) {
                (true, _) => self.write_zero_bytes(at, len),
                (false, true) => Ok(()),
                (false, false) => self.set_cell(cluster, Cell::default()),
            };
        }
        if self.raw {
            self.zero_data_file(at, len)?;
        }
        let keep = cell.host.is_some() && (self.raw || !free && self.in_place(cell));
        let host = cell.host.filter(|_| keep);
        let new = Cell { host, ..Cell::zeros(self.shape) };
        if new == cell { Ok(()) } else { self.set_cell(cluster, new) }
    }

    /// Zeros part of a cluster: by subclusters where these are whole, else as data.
    fn zero_part(&mut self, at: u64, len: u64) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let cluster = g.guest_cluster(GuestOffset(at));
        let cell = self.cell(cluster)?;
        let size = g.subcluster_size();
        let (from, to) = (at.next_multiple_of(size), (at + len) / size * size);
        if !g.extended_l2() || cell.packed.is_some() || from >= to {
            return self.zero_bytes(at, len);
        }
        if self.raw {
            self.zero_data_file(from, to - from)?;
        }
        if at < from {
            self.zero_bytes(at, from - at)?;
        }
        if to < at + len {
            self.zero_bytes(to, at + len - to)?;
        }
        let cell = self.cell(cluster)?;
        let mask = self.shape.touched(from % g.cluster_size(), to - from);
        // The host cluster may be another state's too: then it stays as it is, and this one reads zeros.
        let new = Cell { data: cell.data & !mask, zero: cell.zero | mask, ..cell };
        if new == cell || !self.in_place(cell) && cell.host.is_some() {
            return if new == cell { Ok(()) } else { self.zero_bytes(from, to - from) };
        }
        self.set_cell(cluster, new)
    }

    /// Zeros as data, unless zeros are read there already.
    fn zero_bytes(&mut self, at: u64, len: u64) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let cell = self.cell(g.guest_cluster(GuestOffset(at)))?;
        let touched = self.shape.touched(at % g.cluster_size(), len);
        let nothing = touched & (cell.data | cell.zero) == 0 && cell.packed.is_none();
        if cell.zero & touched == touched || nothing && !self.has_backing() {
            return Ok(());
        }
        self.write_zero_bytes(at, len)
    }

    fn write_zero_bytes(&mut self, at: u64, len: u64) -> Result<(), ImageError> {
        let zeros = vec![0; usize::try_from(len).unwrap_or(0)];
        self.write(at, &zeros)
    }

    /// A raw data file must read as the disk does.
    fn zero_data_file(&self, at: u64, len: u64) -> Result<(), ImageError> {
        match &self.data {
            Some(data) => data.discard(at..at + len).map_err(ImageError::io("zero the data file")),
            None => Ok(()),
        }
    }

    pub(super) fn discard(&mut self, offset: u64, len: u64) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        let v2 = self.shape.version == Version::V2;
        if v2 && self.has_backing() {
            return Ok(());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = self.step(at, end);
            let cluster = g.guest_cluster(GuestOffset(at));
            let cell = self.cell(cluster)?;
            if self.is_whole(at, n) && (!cell.is_empty() || self.has_backing()) {
                if self.shape.external {
                    self.zero_data_file(at, n)?;
                }
                let host = cell.host.filter(|_| self.raw);
                let zeros = Cell { host, ..Cell::zeros(self.shape) };
                let new = if v2 { Cell::default() } else { zeros };
                if new != cell {
                    self.set_cell(cluster, new)?;
                }
            }
            at += n;
        }
        Ok(())
    }

    pub(super) fn write_compressed(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let g = self.shape.geometry;
        if self.shape.external {
            return Err(ImageError::Unsupported { feature: "compressed data in an external data file" });
        }
        if !self.is_whole(offset, bytes.len() as u64) {
            let what = format!("a compressed write is one whole cluster ({} bytes)", g.cluster_size());
            return Err(ImageError::Refused { what });
        }
        let cluster = g.guest_cluster(GuestOffset(offset));
        let cell = self.cell(cluster)?;
        if cell.host.is_some() || cell.packed.is_some() {
            let what = format!(
                "the cluster at {offset:#x} has data already, which a compressed write cannot overwrite: discard it first"
            );
            return Err(ImageError::Refused { what });
        }
        let mut whole = bytes.to_vec();
        whole.resize(g.cluster_bytes(), 0);
        let compressor = match self.compressor.take() {
            Some(compressor) => compressor,
            None => {
                let compression = self.image.header().compression();
                let made = Compressor::new(compression, self.level);
                Mutex::new(made.map_err(ImageError::format("option", None))?)
            }
        };
        let compressor = self.compressor.insert(compressor);
        let packed = compressor.get_mut().unwrap_or_else(PoisonError::into_inner).compress(&whole);
        let Some(packed) = packed else { return self.write(offset, bytes) };
        let at = self.packing.place(&mut self.allocator, g, packed.len() as u64)?;
        let entry = L2Entry::compressed(g, at, packed.len() as u64).ok_or(ImageError::Refused {
            what: format!("the file is too long for compressed clusters: {:#x} is out of their reach", at.0),
        })?;
        self.put(at, &packed)?;
        self.changed = true;
        let entry = ExtendedL2Entry { descriptor: entry, subclusters: 0 };
        self.editor.set_entry(&mut self.allocator, cluster, entry)
    }
}
