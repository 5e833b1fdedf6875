//! Changing the backing file name so that a crash leaves the old name or the new one.

use alloc::vec::Vec;

use super::rewrite::{SECTOR, first_sector, lay_out, replace, switch, used};
use super::{BackingFile, Extension, ExtensionKind, Header, HeaderChange, root};
use crate::{FormatError, HostOffset};

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
) -> Result<HeaderChange, FormatError> {
    let old = used(bytes, header)?;
    if let Some(new) = new {
        new.check()?;
    }
    let mut sector = first_sector(old);
    if let Some(change) = in_place(&sector, header, new) {
        return Ok(change);
    }
    let relaid = lay_out(old, header, &extensions_with(header, new), new)?;
    if relaid.len() > SECTOR && new.is_none() && header.has_end_marker() {
        // The format's name may stay behind: without a backing file nobody asks for it.
        root::set_backing(&mut sector, 0, 0);
        return Ok(HeaderChange::Steps([switch(&sector)].into()));
    }
    Ok(replace(old, relaid))
}

/// The extensions in their order, the backing file's format replaced; a new one comes first.
fn extensions_with(header: &Header, new: Option<&BackingFile>) -> Vec<Extension> {
    let format = new.and_then(|n| n.format.clone()).map(|data| Extension {
        kind: ExtensionKind::BackingFormat,
        data,
        at: 0,
    });
    let place = header.extensions().iter().position(|e| e.kind == ExtensionKind::BackingFormat);
    let kept = header.extensions().iter().filter(|e| e.kind != ExtensionKind::BackingFormat);
    let mut extensions: Vec<Extension> = kept.cloned().collect();
    if let Some(format) = format {
        extensions.insert(place.unwrap_or(0), format);
    }
    extensions
}

/// Keeps all extensions where they are; only the format's name (same stored length), the file name and the pointer to
/// it change. `None` if that does not work.
fn in_place(sector: &[u8; SECTOR], header: &Header, new: Option<&BackingFile>) -> Option<HeaderChange> {
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
    let mut steps = Vec::new();
    steps.extend(prepare.map(|at| (HostOffset(at as u64), new.name.clone())));
    steps.push(switch(&sector));
    Some(HeaderChange::Steps(steps))
}
