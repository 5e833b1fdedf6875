//! An image over its backing files, read as the guest would.

use std::path::PathBuf;
use std::sync::Arc;

use pleach_format::{CompressionType, Mapping};
use pleach_store::Store;

use crate::{Image, ImageError};

/// A raw file as a layer.
#[derive(Debug)]
pub struct RawImage {
    store: Arc<dyn Store>,
    size: u64,
}

impl RawImage {
    /// The raw image in `store`; its size is the file's length, rounded up to 512 with zeros, as QEMU does.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, ImageError> {
        let len = store.len().map_err(ImageError::io("find the file's length"))?;
        Ok(Self { store, size: len.next_multiple_of(512) })
    }

    /// The file.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// One file of a chain.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "layers are few and live behind Arc")]
pub enum Layer {
    /// A qcow2 image.
    Qcow2(Image),
    /// A raw file; only ever the last layer.
    Raw(RawImage),
}

impl Layer {
    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.size(),
            Self::Raw(raw) => raw.size,
        }
    }

    /// The file.
    pub fn store(&self) -> &Arc<dyn Store> {
        match self {
            Self::Qcow2(image) => image.store(),
            Self::Raw(raw) => &raw.store,
        }
    }

    /// The file that its guest data is read from: the image itself, or its external data file.
    pub fn data_store(&self) -> &Arc<dyn Store> {
        match self {
            Self::Qcow2(image) => image.data_store(),
            Self::Raw(raw) => &raw.store,
        }
    }

    /// The qcow2 image, if it is one.
    pub fn image(&self) -> Option<&Image> {
        match self {
            Self::Qcow2(image) => Some(image),
            Self::Raw(_) => None,
        }
    }
}

/// Where a stretch of guest bytes comes from.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Plain bytes in the data file ([`Layer::data_store`]) of layer number `layer`, from `host`.
    Data {
        /// Index into [`Chain::layers`].
        layer: usize,
        /// Byte offset in that layer's file.
        host: u64,
    },
    /// A compressed cluster, or a part of one, of layer number `layer`.
    Compressed {
        /// Index into [`Chain::layers`].
        layer: usize,
    },
    /// Zeros.
    Zero,
}

/// A stretch of guest bytes from one place.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First guest byte.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it comes from.
    pub kind: PieceKind,
}

/// An image over its backing files, top first.
#[derive(Clone, Debug)]
pub struct Chain {
    layers: Vec<Arc<Layer>>,
    paths: Vec<PathBuf>,
    /// Where every guest byte comes from, in order, if that was found out beforehand.
    index: Option<Arc<[Piece]>>,
}

impl Chain {
    /// The chain of `layers`, top first. Each layer hides what lies below it, also behind its own end.
    pub fn new(layers: Vec<Arc<Layer>>) -> Self {
        Self { layers, paths: Vec::new(), index: None }
    }

    /// The same, with the layers' paths: errors then say which layer they are about.
    pub fn with_paths(layers: Vec<(PathBuf, Arc<Layer>)>) -> Self {
        let (paths, layers) = layers.into_iter().unzip();
        Self { layers, paths, index: None }
    }

    /// The same, with what [`pieces`](Self::pieces) would say about the whole disk: in guest order, without gaps. Reading
    /// then costs the same whatever the depth. The tables that it was made from must not change as long as this lives.
    #[must_use]
    pub fn with_index(self, pieces: Vec<Piece>) -> Self {
        Self { index: Some(pieces.into()), ..self }
    }

    /// Says which layer an error is about, unless that was said already.
    fn in_layer(&self, depth: usize) -> impl Fn(ImageError) -> ImageError {
        let path = self.paths.get(depth).cloned();
        move |error| match (error, path.clone()) {
            (error @ ImageError::InLayer { .. }, _) | (error, None) => error,
            (error, Some(path)) => ImageError::InLayer { path, source: Box::new(error) },
        }
    }

    /// The layers' paths, top first; empty if they were not said.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The layers, top first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Virtual size in bytes: the top layer's.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, |l| l.size())
    }

    /// Fills `buf` with the guest bytes from `offset`; past the virtual size there are zeros.
    ///
    /// # Errors
    /// What the system says, or damage in the tables that are met.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let Some(index) = &self.index else { return self.read_from(0, offset, buf) };
        let mut rest = buf;
        for piece in within(index, offset, rest.len() as u64) {
            let (part, behind) =
                std::mem::take(&mut rest).split_at_mut(usize::try_from(piece.len).unwrap_or(0));
            rest = behind;
            match piece.kind {
                PieceKind::Zero => part.fill(0),
                PieceKind::Compressed { layer } => self.read_from(layer, piece.guest, part)?,
                PieceKind::Data { layer, host } => {
                    let Some(owner) = self.layers.get(layer) else { continue };
                    let read = owner.data_store().read_at(host, part);
                    read.map_err(ImageError::io("read guest data")).map_err(self.in_layer(layer))?;
                }
            }
        }
        Ok(())
    }

    /// Reads a stretch that [`pieces`](Self::pieces) gave, of the length of `out`, if it is one compressed cluster of that length and type: the
    /// number of its compressed bytes, which are then behind the end of `packed`. `None`, with nothing read, if it is not,
    /// or if it does not tell where it ends.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at): compressed bytes that do not decompress to the cluster are not given.
    pub fn read_packed(
        &self,
        piece: &Piece,
        compression: CompressionType,
        packed: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<Option<usize>, ImageError> {
        let PieceKind::Compressed { layer } = piece.kind else { return Ok(None) };
        let image = self.layers.get(layer).and_then(|l| l.image());
        let alike = image.filter(|image| {
            let cluster = image.geometry().cluster_size();
            image.header().compression() == compression && piece.len == cluster && out.len() as u64 == cluster
        });
        let Some(image) = alike else { return Ok(None) };
        image.read_packed(piece.guest, packed, out).map_err(self.in_layer(layer))
    }

    /// Fills `packed` with the compressed bytes of the cluster at `guest`, as many as [`read_packed`](Self::read_packed) said
    /// that there are. They are not looked at again.
    ///
    /// # Errors
    /// [`ImageError::Changed`] if no compressed cluster is there; damage in the tables that are met; what the system says.
    pub fn read_packed_bytes(&self, guest: u64, packed: &mut [u8]) -> Result<(), ImageError> {
        let gone = || ImageError::Changed { what: "a compressed cluster is gone" };
        let piece = self.pieces(guest, 1)?.first().copied();
        let Some(PieceKind::Compressed { layer }) = piece.map(|p| p.kind) else { return Err(gone()) };
        let image = self.layers.get(layer).and_then(|l| l.image()).ok_or_else(gone)?;
        image.read_packed_bytes(guest, packed).map_err(self.in_layer(layer))
    }

    fn read_from(&self, depth: usize, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        self.read_layer(depth, offset, buf).map_err(self.in_layer(depth))
    }

    fn read_layer(&self, depth: usize, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let Some(layer) = self.layers.get(depth) else {
            buf.fill(0);
            return Ok(());
        };
        let inside = layer.size().saturating_sub(offset).min(buf.len() as u64);
        let (buf, behind) = buf.split_at_mut(usize::try_from(inside).unwrap_or(0));
        behind.fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        let image = match &**layer {
            Layer::Raw(raw) => {
                return raw.store.read_at(offset, buf).map_err(ImageError::io("read the raw file"));
            }
            Layer::Qcow2(image) => image,
        };
        let mut rest = buf;
        image.pieces(offset, inside, &mut |guest, len, mapping| {
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(usize::try_from(len).unwrap_or(0));
            rest = behind;
            match mapping {
                Mapping::Unallocated => self.read_from(depth + 1, guest, part),
                mapping => image.read_piece(guest, mapping, part),
            }
        })
    }

    /// Where the guest bytes `offset .. offset + len` come from, in order, all of them covered.
    ///
    /// # Errors
    /// Damage in the tables that are met.
    pub fn pieces(&self, offset: u64, len: u64) -> Result<Vec<Piece>, ImageError> {
        if let Some(index) = &self.index {
            return Ok(within(index, offset, len).collect());
        }
        let mut out = Vec::new();
        self.pieces_from(0, offset, len, &mut out)?;
        Ok(out)
    }

    fn pieces_from(
        &self,
        depth: usize,
        offset: u64,
        len: u64,
        out: &mut Vec<Piece>,
    ) -> Result<(), ImageError> {
        self.pieces_of(depth, offset, len, out).map_err(self.in_layer(depth))
    }

    fn pieces_of(&self, depth: usize, offset: u64, len: u64, out: &mut Vec<Piece>) -> Result<(), ImageError> {
        let zero = |guest, len| Piece { guest, len, kind: PieceKind::Zero };
        let Some(layer) = self.layers.get(depth) else {
            push(out, zero(offset, len));
            return Ok(());
        };
        let inside = layer.size().saturating_sub(offset).min(len);
        match &**layer {
            Layer::Raw(_) => {
                let kind = PieceKind::Data { layer: depth, host: offset };
                push(out, Piece { guest: offset, len: inside, kind });
            }
            Layer::Qcow2(image) => image.pieces(offset, inside, &mut |guest, len, mapping| {
                let kind = match mapping {
                    Mapping::Unallocated => return self.pieces_from(depth + 1, guest, len, out),
                    Mapping::Zero | Mapping::ZeroAllocated(_) => PieceKind::Zero,
                    Mapping::Data(host) => PieceKind::Data { layer: depth, host: host.0 },
                    Mapping::Compressed(_) => PieceKind::Compressed { layer: depth },
                };
                push(out, Piece { guest, len, kind });
                Ok(())
            })?,
        }
        push(out, zero(offset + inside, len - inside));
        Ok(())
    }
}

/// The pieces of `offset .. offset + len`, cut to it; behind the end of the index there are zeros.
fn within(index: &[Piece], offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let end = offset + len;
    let known = index.last().map_or(0, |p| p.guest + p.len).clamp(offset, end);
    let first = index.partition_point(|p| p.guest + p.len <= offset);
    let found = index.get(first..).unwrap_or(&[]).iter().take_while(move |p| p.guest < end).map(move |p| {
        let guest = p.guest.max(offset);
        let kind = match p.kind {
            PieceKind::Data { layer, host } => PieceKind::Data { layer, host: host + (guest - p.guest) },
            other => other,
        };
        Piece { guest, len: (p.guest + p.len).min(end) - guest, kind }
    });
    let behind = Piece { guest: known, len: end - known, kind: PieceKind::Zero };
    found.chain((known < end).then_some(behind))
}

fn push(out: &mut Vec<Piece>, piece: Piece) {
    if piece.len == 0 {
        return;
    }
    if let Some(last) = out.last_mut() {
        let joins = match (last.kind, piece.kind) {
            (PieceKind::Zero, PieceKind::Zero) => true,
            (PieceKind::Data { layer: a, host: x }, PieceKind::Data { layer: b, host: y }) => {
                a == b && x + last.len == y
            }
            _ => false,
        };
        if joins {
            last.len += piece.len;
            return;
        }
    }
    out.push(piece);
}
