//! What the rewrites of an existing header share: the steps of a change, and the header area laid out anew.

use alloc::vec::Vec;

use super::{BackingFile, Extension, Header, root};
use crate::{FormatError, HostOffset};

/// How to write a change into an existing header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderChange {
    /// Writes in order, with a flush between each two. Each either lies in one 512-byte sector, or where no reader looks
    /// before the next one: so a crash leaves a readable header, the old one or the new one. No step: nothing changes.
    Steps(Vec<(HostOffset, Vec<u8>)>),
    /// No order of writes is safe on its own: old and new overlap outside the first sector. The bytes are the new
    /// start of the file; they must be recorded elsewhere before they are written.
    Whole {
        /// The new bytes from offset 0.
        bytes: Vec<u8>,
    },
}

pub(super) const SECTOR: usize = 512;

/// The bytes of the file that `header` uses, and at least the first sector.
///
/// # Errors
/// [`FormatError::Truncated`] if `bytes` does not hold them all.
pub(super) fn used<'a>(bytes: &'a [u8], header: &Header) -> Result<&'a [u8], FormatError> {
    let needed = header.used_bytes().max(SECTOR);
    bytes.get(..needed).ok_or(FormatError::Truncated {
        structure: "header cluster",
        needed: needed as u64,
        have: bytes.len() as u64,
    })
}

/// A copy of the first sector of `bytes`, the rest filled with zeros.
pub(super) fn first_sector(bytes: &[u8]) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    for (to, from) in sector.iter_mut().zip(bytes) {
        *to = *from;
    }
    sector
}

/// Writing the first sector, as a step.
pub(super) fn switch(sector: &[u8; SECTOR]) -> (HostOffset, Vec<u8>) {
    (HostOffset(0), sector.to_vec())
}

/// The header area built anew: fixed header verbatim, `extensions` in their order, the end marker, the name of `backing`.
///
/// # Errors
/// [`FormatError::HeaderFull`] if that does not fit the header cluster.
pub(super) fn lay_out(
    old: &[u8],
    header: &Header,
    extensions: &[Extension],
    backing: Option<&BackingFile>,
) -> Result<Vec<u8>, FormatError> {
    let mut out = old.get(..header.header_length()).expect("the header is part of what it uses").to_vec();
    for extension in extensions {
        extension.encode(&mut out);
    }
    out.extend([0; 8]);
    let at = out.len();
    out.extend(backing.map(|b| b.name.as_slice()).unwrap_or_default());
    let available = header.geometry().cluster_bytes();
    if out.len() > available {
        return Err(FormatError::HeaderFull { needed: out.len() as u64, available: available as u64 });
    }
    let (offset, length) = backing.map_or((0, 0), |b| (at as u64, u32::try_from(b.name.len()).unwrap_or(0)));
    let mut sector = first_sector(&out);
    root::set_backing(&mut sector, offset, length);
    for (to, from) in out.iter_mut().zip(sector) {
        *to = from;
    }
    Ok(out)
}

/// How to write `relaid` over `old`.
pub(super) fn replace(old: &[u8], relaid: Vec<u8>) -> HeaderChange {
    if relaid.len() <= SECTOR {
        // Everything that counts is in the first sector; what lies behind is not looked at.
        return HeaderChange::Steps([switch(&first_sector(&relaid))].into());
    }
    let mut bytes = relaid;
    bytes.resize(bytes.len().max(old.len()), 0);
    HeaderChange::Whole { bytes }
}
