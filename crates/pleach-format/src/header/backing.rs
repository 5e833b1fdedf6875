//! Changing the backing file name so that a crash leaves the old name or the new one.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::{BackingFile, Extension, ExtensionKind, Header, root};
use crate::{FormatError, HostOffset};

/// How to write another backing file name (or none) into an existing header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingChange {
    /// First `prepare` (bytes that no reader looks at yet), a flush, then the first sector in one write.
    Atomic {
        /// Where the new name goes, if it does not fit the first sector.
        prepare: Option<(HostOffset, Vec<u8>)>,
        /// The header's new first 512 bytes.
        sector: Box<[u8; 512]>,
    },
    /// No order of writes is safe on its own: old and new overlap outside the first sector. The bytes are the new
    /// start of the file; they must be recorded elsewhere before they are written.
    Whole {
        /// The new bytes from offset 0.
        bytes: Vec<u8>,
    },
}

const SECTOR: usize = 512;

/// Plans the change of `header`'s backing file to `new`. `bytes` is the start of the file that `header` was read from:
/// at least 512 bytes, and as many as the header's extensions and name take.
///
/// # Errors
/// [`FormatError::HeaderFull`] if the name does not fit the header cluster, [`FormatError::OutOfRange`] for a name
/// longer than 1023 bytes, [`FormatError::Truncated`] if `bytes` is too short.
pub fn rewrite_backing(
    bytes: &[u8],
    header: &Header,
    new: Option<&BackingFile>,
) -> Result<BackingChange, FormatError> {
    let needed = header.used_bytes().max(SECTOR);
    let old = bytes.get(..needed).ok_or(FormatError::Truncated {
        structure: "header cluster",
        needed: needed as u64,
        have: bytes.len() as u64,
    })?;
    if let Some(new) = new {
        new.check()?;
    }
    let mut sector = [0; SECTOR];
    sector.copy_from_slice(old.get(..SECTOR).expect("at least a sector"));

    if let Some(change) = in_place(&sector, header, new) {
        return Ok(change);
    }
    let relaid = lay_out(old, header, new)?;
    if relaid.len() <= SECTOR {
        // Everything that counts is in the first sector; what lies behind is not looked at.
        sector.fill(0);
        sector.get_mut(..relaid.len()).expect("checked").copy_from_slice(&relaid);
        return Ok(BackingChange::Atomic { prepare: None, sector: Box::new(sector) });
    }
    if new.is_none() && header.has_end_marker() {
        // The format's name may stay behind: without a backing file nobody asks for it.
        root::set_backing(&mut sector, 0, 0);
        return Ok(BackingChange::Atomic { prepare: None, sector: Box::new(sector) });
    }
    let mut whole = relaid;
    whole.resize(whole.len().max(old.len()), 0);
    Ok(BackingChange::Whole { bytes: whole })
}

/// Keeps all extensions where they are; only the format's name (same stored length), the file name and the pointer to
/// it change. `None` if that does not work.
fn in_place(sector: &[u8; SECTOR], header: &Header, new: Option<&BackingFile>) -> Option<BackingChange> {
    let new = new?;
    let mut sector = *sector;
    let format = new.format.as_deref()?;
    let extension = header.extension(ExtensionKind::BackingFormat)?;
    if extension.data != format {
        let replaced = Extension { data: format.to_vec(), ..extension.clone() };
        if replaced.stored_bytes() != extension.stored_bytes() {
            return None;
        }
        let mut encoded = Vec::new();
        replaced.encode(&mut encoded);
        sector.get_mut(extension.at..extension.at + encoded.len())?.copy_from_slice(&encoded);
    }
    let (cluster, len) = (header.geometry().cluster_bytes(), new.name.len());
    let gap = header.extensions_end();
    let old_name = if header.backing().is_some() { header.backing_name_range() } else { gap..gap };
    let behind = old_name.end.next_multiple_of(8);
    let (at, prepare) = if gap + len <= SECTOR {
        sector.get_mut(gap..)?.fill(0);
        sector.get_mut(gap..gap + len)?.copy_from_slice(&new.name);
        (gap, None)
    } else if gap + len <= old_name.start {
        (gap, Some(gap))
    } else if behind + len <= cluster && (header.has_end_marker() || gap + 8 <= SECTOR) {
        if !header.has_end_marker() {
            // The name was what ended the extensions; now the new one is further on.
            sector.get_mut(gap..gap + 8)?.fill(0);
        }
        (behind, Some(behind))
    } else {
        return None;
    };
    if let Some(at) = prepare {
        // The part of the prepared name that lies in the first sector must survive the sector's write.
        for (byte, name) in sector.iter_mut().skip(at).zip(&new.name) {
            *byte = *name;
        }
    }
    root::set_backing(&mut sector, at as u64, u32::try_from(len).ok()?);
    let prepare = prepare.map(|at| (HostOffset(at as u64), new.name.clone()));
    Some(BackingChange::Atomic { prepare, sector: Box::new(sector) })
}

/// The header area built anew: fixed header verbatim, the extensions in their order with the format replaced, the end
/// marker, the name.
fn lay_out(old: &[u8], header: &Header, new: Option<&BackingFile>) -> Result<Vec<u8>, FormatError> {
    let mut out = old.get(..header.header_length()).expect("the header is part of what it uses").to_vec();
    let mut format = new.and_then(|n| n.format.clone()).map(|data| Extension {
        kind: ExtensionKind::BackingFormat,
        data,
        at: 0,
    });
    if header.extension(ExtensionKind::BackingFormat).is_none()
        && let Some(format) = format.take()
    {
        format.encode(&mut out);
    }
    for extension in header.extensions() {
        match extension.kind {
            ExtensionKind::BackingFormat => {
                if let Some(format) = format.take() {
                    format.encode(&mut out);
                }
            }
            _ => extension.encode(&mut out),
        }
    }
    out.extend([0; 8]);
    let at = out.len();
    out.extend(new.map(|n| n.name.as_slice()).unwrap_or_default());
    let available = header.geometry().cluster_bytes();
    if out.len() > available {
        return Err(FormatError::HeaderFull { needed: out.len() as u64, available: available as u64 });
    }
    let mut sector = [0; SECTOR];
    let head = out.len().min(SECTOR);
    let copied = out.get(..head).expect("within");
    sector.get_mut(..head).expect("within").copy_from_slice(copied);
    let (offset, length) = new.map_or((0, 0), |n| (at as u64, u32::try_from(n.name.len()).unwrap_or(0)));
    root::set_backing(&mut sector, offset, length);
    out.get_mut(..head).expect("within").copy_from_slice(sector.get(..head).expect("within"));
    Ok(out)
}
