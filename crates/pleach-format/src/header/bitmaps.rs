//! Changing the bitmaps extension so that a crash leaves a readable header.

use alloc::vec::Vec;

use super::rewrite::{SECTOR, first_sector, lay_out, replace, switch, used};
use super::{Autoclear, Extension, ExtensionKind, Header, HeaderChange, Version, root};
use crate::{BitmapsExtension, FormatError, HostOffset};

/// Plans to put `new` into `header`'s bitmaps extension and to set autoclear bit 0, or, for `None`, to clear the bit and
/// to remove the extension. `bytes` is the start of the file that `header` was read from: at least 512 bytes, and as many
/// as the header's extensions and name take.
///
/// After each step [`Header::bitmaps`] gives the old extension or the new one; or none, where the old one was not
/// consistent to begin with, is being removed, or does not lie in one sector. Everything else in the header stays as it
/// is, byte for byte. An extension that is not the last one, in a header of more than one sector, is not taken out: the
/// cleared bit makes every reader ignore it, and the next `new` goes into its place.
///
/// # Errors
/// [`FormatError::NeedsV3`] for a version 2 image, a directory or count out of range or not aligned, [`FormatError::HeaderFull`] if there
/// is no room in the header cluster, [`FormatError::Truncated`] if `bytes` is too short.
pub fn rewrite_bitmaps(
    bytes: &[u8],
    header: &Header,
    new: Option<&BitmapsExtension>,
) -> Result<HeaderChange, FormatError> {
    if header.version() == Version::V2 {
        return Err(FormatError::NeedsV3 { feature: "a persistent bitmap" });
    }
    if let Some(new) = new {
        new.check(header.geometry())?;
    }
    let old = used(bytes, header)?;
    let data = new.map(BitmapsExtension::encode).transpose()?;
    let kept = header.extensions().iter().filter(|e| e.kind != ExtensionKind::Bitmaps);
    let mut wanted: Vec<Extension> = kept.cloned().collect();
    if let Some(data) = data {
        let before = header.extensions().iter().position(|e| e.kind == ExtensionKind::Bitmaps);
        let extension = Extension { kind: ExtensionKind::Bitmaps, data: data.to_vec(), at: 0 };
        wanted.insert(before.unwrap_or(wanted.len()).min(wanted.len()), extension);
    }
    let draft = Draft { header, bytes: old.to_vec(), steps: Vec::new() };
    let existing = header.extension(ExtensionKind::Bitmaps);
    match (existing, data) {
        (None, None) => return Ok(draft.valid(false).done()),
        (Some(e), Some(data)) if e.data.len() == data.len() => return Ok(draft.in_place(e.at + 8, &data)),
        _ => {}
    }
    let relaid = lay_out(old, header, &wanted, header.backing());
    let fits_sector = relaid.as_ref().is_ok_and(|bytes| bytes.len() <= SECTOR);
    match (existing, data) {
        (Some(extension), None) if !fits_sector => Ok(draft.remove(extension)),
        (None, Some(data)) if !fits_sector => match draft.append(&data) {
            Some(change) => Ok(change),
            None => Ok(replace(old, with_bit(relaid?, header, true))),
        },
        _ => Ok(replace(old, with_bit(relaid?, header, new.is_some()))),
    }
}

/// A header area while steps change it.
struct Draft<'a> {
    header: &'a Header,
    bytes: Vec<u8>,
    steps: Vec<(HostOffset, Vec<u8>)>,
}

impl Draft<'_> {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes.get_mut(at..end).expect("resized").copy_from_slice(bytes);
    }

    /// Writes `bytes` at `at` as a step of its own.
    fn step(mut self, at: usize, bytes: &[u8]) -> Self {
        self.put(at, bytes);
        self.steps.push((HostOffset(at as u64), bytes.to_vec()));
        self
    }

    /// Writes the first sector as it is now, the bit set or cleared, if that says anything new.
    fn valid(mut self, valid: bool) -> Self {
        self.bytes = with_bit(self.bytes, self.header, valid);
        let sector = first_sector(&self.bytes);
        if self.header.autoclear().has(Autoclear::BITMAPS) != valid || !self.steps.is_empty() {
            self.steps.push(switch(&sector));
        }
        self
    }

    fn done(self) -> HeaderChange {
        HeaderChange::Steps(self.steps)
    }

    /// Writes the existing extension's data at `at`.
    fn in_place(mut self, at: usize, data: &[u8]) -> HeaderChange {
        let was_valid = self.header.autoclear().has(Autoclear::BITMAPS);
        let end = at + data.len();
        if self.bytes.get(at..end) == Some(data) {
            return self.valid(true).done();
        }
        if end <= SECTOR {
            self.put(at, data);
            let sector = first_sector(&with_bit(self.bytes, self.header, true));
            return HeaderChange::Steps([switch(&sector)].into());
        }
        if was_valid && at / SECTOR == (end - 1) / SECTOR {
            return self.step(at, data).done();
        }
        // Nobody looks at the data while the bit is clear.
        let cleared = if was_valid { self.valid(false) } else { self };
        cleared.step(at, data).valid(true).done()
    }

    fn remove(self, extension: &Extension) -> HeaderChange {
        let is_last = self.header.extensions().last() == Some(extension);
        let cleared = self.valid(false);
        // An end marker in place of the last extension's type and length.
        if is_last { cleared.step(extension.at, &[0; 8]).done() } else { cleared.done() }
    }

    /// Adds the extension where the end marker is, moving the name of the backing file out of the way. `None` if there is
    /// no room for that.
    fn append(mut self, data: &[u8]) -> Option<HeaderChange> {
        let header = self.header;
        let last = header.extensions().last();
        let at = last.map_or(header.header_length(), |e| e.at + e.stored_bytes());
        let cluster = header.geometry().cluster_bytes();
        // Type, length, data, and the end marker behind them.
        let end = at + 8 + data.len() + 8;
        let name = header.backing_name_range();
        if end > cluster {
            return None;
        }
        if header.backing().is_some() && name.start < end {
            let to = end.max(name.end).next_multiple_of(8);
            let moved = self.bytes.get(name.clone())?.to_vec();
            if to + moved.len() > cluster || !header.has_end_marker() && at + 8 > SECTOR {
                return None;
            }
            self = self.step(to, &moved);
            if !header.has_end_marker() {
                // The name was what ended the extensions; it may be read as one as soon as the pointer has moved.
                self.put(at, &[0; 8]);
            }
            let mut sector = first_sector(&self.bytes);
            root::set_backing(&mut sector, to as u64, u32::try_from(moved.len()).ok()?);
            self = self.step(0, &sector);
        }
        let mut body = data.to_vec();
        body.extend([0; 8]);
        let head = (u64::from(ExtensionKind::Bitmaps.number()) << 32 | data.len() as u64).to_be_bytes();
        self = self.step(at + 8, &body);
        if at + head.len() <= SECTOR {
            self.put(at, &head);
            return Some(self.valid(true).done());
        }
        Some(self.step(at, &head).valid(true).done())
    }
}

/// `bytes` of a header area with autoclear bit 0 set or cleared.
fn with_bit(mut bytes: Vec<u8>, header: &Header, set: bool) -> Vec<u8> {
    let others = header.autoclear().0 & !Autoclear::BITMAPS.0;
    let mut sector = first_sector(&bytes);
    root::set_autoclear(&mut sector, if set { others | Autoclear::BITMAPS.0 } else { others });
    for (to, from) in bytes.iter_mut().zip(sector) {
        *to = from;
    }
    bytes
}
