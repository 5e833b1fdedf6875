//! Persistent bitmaps: one that is damaged is removed, the others stay.

use pleach_format::{Autoclear, BitmapRecord, ExtensionKind, Header, Version};

use super::Repairer;
use super::draft::Stage;
use super::pointers::Roles;
use crate::image::{Head, check_inside, read_head};
use crate::walk::{BITMAPS_EXTENSION, bitmap_entry_fault};
use crate::{ImageError, escape};

/// Makes every bitmap that the image lists readable.
pub(crate) fn mend(repairer: &mut Repairer<'_>, roles: &mut Roles) -> Result<(), ImageError> {
    let head = read_head(repairer.store())?;
    let header = &head.header;
    let Some(stored) = header.extension(ExtensionKind::Bitmaps) else { return Ok(()) };
    if !header.autoclear().has(Autoclear::BITMAPS) {
        // What nobody believes anyway; but QEMU does not open an image whose extension has another length.
        return match stored.data.len() == BITMAPS_EXTENSION {
            true => Ok(()),
            false => drop_all(repairer, &head, "their extension has a wrong length"),
        };
    }
    let g = header.geometry();
    let extension = match header.bitmaps() {
        Ok(Some(extension)) => extension,
        Ok(None) => return Ok(()),
        Err(error) => return drop_all(repairer, &head, &error.to_string()),
    };
    let (at, size) = (extension.directory_offset, extension.directory_size);
    if !g.is_aligned(at) || at == 0 {
        return drop_all(repairer, &head, &format!("their directory cannot be at {at:#x}"));
    }
    if let Err(error) = check_inside("bitmap directory", at, size, repairer.draft.old_len(), g) {
        return drop_all(repairer, &head, &error.to_string());
    }
    if let Err(other) = roles.take(g, at, size, "the bitmap directory") {
        return drop_all(repairer, &head, &format!("their directory at {at:#x} is where {other} is"));
    }
    let mut directory = vec![0; usize::try_from(size).unwrap_or(0)];
    repairer.read(at, &mut directory)?;
    let (mut kept, mut place, mut count, mut broken) = (Vec::new(), 0, 0u32, false);
    for index in 0..extension.count {
        let Some(len) = entry_len(&directory, place) else {
            let rest = extension.count - index;
            let message = format!("entry {index} does not end in the directory: {rest} bitmaps are removed");
            repairer.note("bitmap-directory", "bitmaps", Some(at + place as u64), None, message);
            broken = true;
            break;
        };
        let raw = directory.get(place..place + len).unwrap_or(&[]);
        match fault(repairer, header, roles, raw)? {
            None => {
                kept.extend_from_slice(raw);
                count += 1;
            }
            Some((name, why)) => {
                let message = format!(
                    "bitmap \"{name}\" is removed: {why}; the next backup that would have used it must be a full one"
                );
                repairer.note("bitmap", "bitmaps", Some(at + place as u64), None, message);
                broken = true;
            }
        }
        place += len;
    }
    if !broken && place == directory.len() {
        return Ok(());
    }
    if count == 0 {
        return drop_all(repairer, &head, "none of them can be used");
    }
    put(repairer, &head, &kept, count)
}

/// Bytes of the entry at `at`, with its padding, if all of it is there.
fn entry_len(directory: &[u8], at: usize) -> Option<usize> {
    let fixed = directory.get(at..at.checked_add(24)?)?;
    let name = fixed.get(18..20).map(|b| {
        usize::from(b.first().copied().unwrap_or(0)) << 8 | usize::from(b.last().copied().unwrap_or(0))
    })?;
    let extra = fixed.get(20..24).and_then(|b| b.first_chunk::<4>()).map(|b| u32::from_be_bytes(*b))?;
    let len = usize::try_from(extra).ok()?.checked_add(24 + name)?.checked_next_multiple_of(8)?;
    directory.get(at..at.checked_add(len)?).map(|raw| raw.len())
}

/// The bitmap's name, and what is wrong with it.
fn fault(
    repairer: &Repairer<'_>,
    header: &Header,
    roles: &mut Roles,
    raw: &[u8],
) -> Result<Option<(String, String)>, ImageError> {
    let g = header.geometry();
    let Ok(records) = BitmapRecord::parse_directory(raw, 1) else {
        return Ok(Some((String::new(), "its entry cannot be read".to_owned())));
    };
    let Some(record) = records.first() else { return Ok(None) };
    let name = escape(&record.name);
    if let Err(why) = record.check(g, header.size()) {
        return Ok(Some((name, why.to_string())));
    }
    let (at, bytes) = (record.table_offset, u64::from(record.table_size) * 8);
    let len = repairer.draft.old_len();
    if let Err(error) = check_inside("bitmap table", at, bytes, len, g) {
        return Ok(Some((name, error.to_string())));
    }
    if let Err(other) = roles.take(g, at, bytes, "a bitmap table") {
        return Ok(Some((name, format!("its table is where {other} is"))));
    }
    let mut table = vec![0; usize::try_from(bytes).unwrap_or(0)];
    repairer.read(at, &mut table)?;
    for entry in table.as_chunks::<8>().0 {
        match bitmap_entry_fault(u64::from_be_bytes(*entry), g, len) {
            Err(why) => return Ok(Some((name, why))),
            Ok(Some(data)) => {
                if let Err(other) = roles.take(g, data, g.cluster_size(), "a bitmap") {
                    return Ok(Some((name, format!("a part of it is where {other} is"))));
                }
            }
            Ok(None) => {}
        }
    }
    Ok(None)
}

/// A shorter directory in a new place.
fn put(repairer: &mut Repairer<'_>, head: &Head, kept: &[u8], count: u32) -> Result<(), ImageError> {
    let g = head.header.geometry();
    let mut bytes = kept.to_vec();
    bytes.resize(bytes.len().next_multiple_of(g.cluster_bytes()), 0);
    let at = repairer.place(&bytes, g.cluster_size())?;
    let word = head.header.autoclear().0;
    let Some(extension) = head.header.extension(ExtensionKind::Bitmaps) else { return Ok(()) };
    // The three fields may lie in two sectors: nobody may believe them meanwhile.
    repairer.draft.write(Stage::BitmapsOff, 88, &(word & !Autoclear::BITMAPS.0).to_be_bytes())?;
    let fields = [u64::from(count) << 32, kept.len() as u64, at].map(u64::to_be_bytes).concat();
    repairer.draft.write(Stage::Mend, extension.at as u64 + 8, &fields)?;
    repairer.draft.write(Stage::BitmapsOn, 88, &word.to_be_bytes())
}

/// The image has no bitmaps any more.
fn drop_all(repairer: &mut Repairer<'_>, head: &Head, why: &str) -> Result<(), ImageError> {
    let header = &head.header;
    let Some(extension) = header.extension(ExtensionKind::Bitmaps) else { return Ok(()) };
    let word = header.autoclear().0 & !Autoclear::BITMAPS.0;
    if header.version() == Version::V3 {
        repairer.draft.write(Stage::BitmapsOff, 88, &word.to_be_bytes())?;
    }
    let gap = extension.stored_bytes();
    let behind = head.bytes.get(extension.at + gap..header.extensions_end()).unwrap_or(&[]);
    let mut rest = behind.to_vec();
    rest.resize(behind.len() + gap, 0);
    repairer.draft.write(Stage::Mend, extension.at as u64, &rest)?;
    let message = format!("all bitmaps are removed: {why}; the next backup must be a full one");
    repairer.note("bitmap-directory", "bitmaps", Some(extension.at as u64), None, message);
    Ok(())
}
