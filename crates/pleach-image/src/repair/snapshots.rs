//! The snapshot table: every entry that can be read is kept.

use pleach_format::{Geometry, Header, SnapshotRecord, Version};

use super::Repairer;
use super::draft::Stage;
use crate::image::{check_inside, read_head};
use crate::{ImageError, escape};

/// Most bytes of an L1 table that QEMU opens.
const MAX_L1_BYTES: u64 = 32 << 20;
/// The bytes of an entry before its extra data.
const FIXED: usize = 40;

/// A snapshot that stays, and where its table entry is.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) at: u64,
    pub(crate) name: String,
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
    /// Entries of the L1 table that its disk and its VM state need.
    pub(crate) needed: u64,
}

/// Makes the snapshot table readable, and returns the snapshots that it then has.
pub(crate) fn mend(repairer: &mut Repairer<'_>) -> Result<Vec<Kept>, ImageError> {
    let header = read_head(repairer.store())?.header;
    let count = header.nb_snapshots();
    if count == 0 {
        return Ok(Vec::new());
    }
    let at = header.snapshots_offset().0;
    let len = repairer.draft.old_len();
    let region = len.saturating_sub(at).min(SnapshotRecord::MAX_TABLE);
    let mut bytes = vec![0; usize::try_from(region).unwrap_or(0)];
    repairer.read(at, &mut bytes)?;
    let mut kept: Vec<(Vec<u8>, Kept)> = Vec::new();
    let (mut place, mut rewrite) = (0usize, repairer.surplus_snapshots);
    for index in 0..count {
        let Some(entry) = Entry::read(&bytes, place) else {
            let rest = count - index;
            repairer.note(
                "snapshot-table",
                "snapshot table",
                Some(at + place as u64),
                None,
                format!(
                    "entry {index} goes on behind the end of the table, so {rest} snapshots cannot be found; they are \
                     dropped from the table, and what only they used becomes free"
                ),
            );
            rewrite = true;
            break;
        };
        let host = at + place as u64;
        place += entry.stored.next_multiple_of(8);
        match entry.judge(&header, len) {
            Err(why) => {
                repairer.note(
                    "snapshot-dropped",
                    "snapshot table",
                    Some(host),
                    None,
                    format!(
                        "snapshot \"{}\" cannot be read: {why}; it is dropped, and what only it used becomes free",
                        entry.name()
                    ),
                );
                rewrite = true;
            }
            Ok(state) => {
                let (raw, changes) = entry.rewritten(&header, state.l1_size);
                for change in &changes {
                    let message = format!("snapshot \"{}\": {change}", entry.name());
                    repairer.note("snapshot-entry", "snapshot table", Some(host), None, message);
                }
                rewrite |= !changes.is_empty();
                kept.push((raw, Kept { at: host, ..state }));
            }
        }
    }
    if rewrite {
        put(repairer, header.geometry(), &mut kept)?;
    }
    Ok(kept.into_iter().map(|(_, kept)| kept).collect())
}

/// Writes the entries that stay as a new table.
fn put(repairer: &mut Repairer<'_>, g: Geometry, kept: &mut [(Vec<u8>, Kept)]) -> Result<(), ImageError> {
    let mut table = Vec::new();
    for (raw, state) in kept.iter_mut() {
        table.resize(table.len().next_multiple_of(8), 0);
        state.at = table.len() as u64;
        table.extend_from_slice(raw);
    }
    let mut root = [0; 12];
    if !table.is_empty() {
        let clusters = g.clusters_for(table.len() as u64).0;
        let at = repairer.draft.fresh(clusters, g.cluster_size())?;
        kept.iter_mut().for_each(|(_, state)| state.at += at);
        table.resize(table.len().next_multiple_of(g.cluster_bytes()), 0);
        repairer.draft.write(Stage::Fresh, at, &table)?;
        root = root_of(u32::try_from(kept.len()).unwrap_or(u32::MAX), at);
    }
    repairer.draft.write(Stage::Mend, 60, &root)
}

/// Bytes 60..72 of the header.
pub(crate) fn root_of(count: u32, at: u64) -> [u8; 12] {
    let mut root = [0; 12];
    let (number, offset) = root.split_at_mut(4);
    number.copy_from_slice(&count.to_be_bytes());
    offset.copy_from_slice(&at.to_be_bytes());
    root
}

/// An entry as stored, however long its extra data are.
struct Entry<'a> {
    fixed: &'a [u8],
    extra: &'a [u8],
    strings: &'a [u8],
    id_len: usize,
    stored: usize,
}

impl<'a> Entry<'a> {
    fn read(table: &'a [u8], at: usize) -> Option<Self> {
        let fixed = table.get(at..at.checked_add(FIXED)?)?;
        let id_len = usize::from(u16::from_be_bytes(field(fixed, 12)));
        let name_len = usize::from(u16::from_be_bytes(field(fixed, 14)));
        let extra_len = usize::try_from(u32::from_be_bytes(field(fixed, 36))).ok()?;
        let strings_at = (at + FIXED).checked_add(extra_len)?;
        let end = strings_at.checked_add(id_len + name_len)?;
        Some(Self {
            fixed,
            extra: table.get(at + FIXED..strings_at)?,
            strings: table.get(strings_at..end)?,
            id_len,
            stored: end - at,
        })
    }

    fn name(&self) -> String {
        escape(self.strings.get(self.id_len..).unwrap_or(&[]))
    }

    fn extra_word(&self, at: usize) -> Option<u64> {
        self.extra.get(at..at + 8).map(|b| u64::from_be_bytes(field(b, 0)))
    }

    /// The snapshot with an L1 table that can be read, or why there is none.
    fn judge(&self, header: &Header, len: u64) -> Result<Kept, String> {
        let g = header.geometry();
        let l1_offset = u64::from_be_bytes(field(self.fixed, 0));
        let l1_size = u32::from_be_bytes(field(self.fixed, 8));
        if self.fixed.iter().all(|&b| b == 0) {
            return Err("the entry is empty".to_owned());
        }
        if !g.is_aligned(l1_offset) || (l1_offset == 0 && l1_size > 0) {
            return Err(format!("its L1 table cannot be at {l1_offset:#x}"));
        }
        let disk = self.extra_word(8).unwrap_or(header.size());
        let vm_state = self.extra_word(0).unwrap_or(u32::from_be_bytes(field(self.fixed, 32)).into());
        let needed = g.required_l1(disk).saturating_add(g.required_l1(vm_state));
        let fits = |entries: u64| {
            let bytes = entries.saturating_mul(8);
            let inside =
                entries == 0 || check_inside("L1 table", l1_offset, bytes, len, g).is_ok_and(|()| bytes > 0);
            inside && bytes <= MAX_L1_BYTES
        };
        let kept = |l1_size| Kept {
            at: 0,
            name: self.name(),
            l1_offset,
            l1_size,
            needed: needed.min(l1_size.into()),
        };
        if fits(l1_size.into()) {
            return Ok(kept(l1_size));
        }
        match u32::try_from(needed) {
            Ok(shorter) if needed < u64::from(l1_size) && fits(needed) => Ok(kept(shorter)),
            _ => Err(format!(
                "its L1 table of {l1_size} entries at {l1_offset:#x} is too long, or not in the file"
            )),
        }
    }

    /// The entry as it will be, and what is different.
    fn rewritten(&self, header: &Header, l1_size: u32) -> (Vec<u8>, Vec<String>) {
        let mut changes = Vec::new();
        let mut extra = self.extra.to_vec();
        let most = usize::try_from(SnapshotRecord::MAX_EXTRA).unwrap_or(usize::MAX);
        if extra.len() > most {
            changes.push(format!("{} bytes of extra data are cut to {most}", extra.len()));
            extra.truncate(most);
        }
        if header.version() == Version::V3 && extra.len() < 16 {
            let disk = header.size();
            changes.push(format!("it did not say how large its disk is; {disk} bytes, as the disk is now"));
            let vm_state = u32::from_be_bytes(field(self.fixed, 32));
            extra = [u64::from(vm_state).to_be_bytes(), disk.to_be_bytes()].concat();
        }
        let old_size = u32::from_be_bytes(field(self.fixed, 8));
        if l1_size != old_size {
            changes.push(format!(
                "its L1 table is cut from {old_size} to the {l1_size} entries that its disk needs; it reads the same"
            ));
        }
        let mut raw = self.fixed.to_vec();
        let parts = [(8, l1_size), (36, u32::try_from(extra.len()).unwrap_or(u32::MAX))];
        for (at, value) in parts {
            if let Some(place) = raw.get_mut(at..at + 4) {
                place.copy_from_slice(&value.to_be_bytes());
            }
        }
        raw.extend(extra);
        raw.extend(self.strings);
        (raw, changes)
    }
}

/// `N` bytes of `bytes` from `at`, which the caller knows to be there.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(bytes.get(at..).unwrap_or(&[])) {
        *to = *from;
    }
    out
}
