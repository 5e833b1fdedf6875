//! What becomes of one table entry that breaks the format or leads out of the file. Pure: no file is read.

use pleach_format::{ExtendedL2Entry, Geometry, L1Entry, L2Entry, Mapping, Version};

use crate::image::check_inside;

/// Facts about the image that decide what an entry may say.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Judge {
    pub(crate) geometry: Geometry,
    pub(crate) version: Version,
    pub(crate) file_len: u64,
    /// Guest data lie in another file.
    pub(crate) elsewhere: bool,
    /// There is a backing file, which shows through entries that say nothing.
    pub(crate) backing: bool,
}

/// What an entry will say.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Becomes {
    /// This.
    Entry(ExtendedL2Entry),
    /// It leads to a fresh cluster full of zeros: version 2 has no other way to hide a backing file.
    FreshZeros,
}

/// A decision about one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) becomes: Becomes,
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ZERO: u64 = 1;

impl Judge {
    /// What an L1 entry must become; `None` if it is right.
    pub(crate) fn l1(&self, entry: L1Entry) -> Option<(L1Entry, String)> {
        let g = self.geometry;
        let cleaned = L1Entry(entry.0 & (OFFSET | 1 << 63));
        let lost = |why: &dyn std::fmt::Display| {
            let see = if self.backing { "what the backing file holds" } else { "zeros" };
            Some((
                L1Entry::default(),
                format!(
                    "{why}; the entry is emptied: the guest, which could not read this range, now reads {see}"
                ),
            ))
        };
        match cleaned.l2_table(g) {
            Err(error) => return lost(&error),
            Ok(Some(at)) => {
                if let Err(error) = check_inside("L2 table", at.0, g.cluster_size(), self.file_len, g) {
                    return lost(&error);
                }
            }
            Ok(None) => {
                let why = "flags without a table are cleared; the range is empty, as it was";
                return (entry.0 != 0).then(|| (L1Entry::default(), why.to_owned()));
            }
        }
        (cleaned != entry).then(|| {
            (cleaned, "reserved bits are cleared; the guest reads through the table it leads to".to_owned())
        })
    }

    /// What an L2 entry must become; `None` if it is right.
    pub(crate) fn l2(&self, entry: ExtendedL2Entry) -> Option<Verdict> {
        if entry.descriptor.is_compressed() { self.compressed(entry) } else { self.standard(entry) }
    }

    fn compressed(&self, entry: ExtendedL2Entry) -> Option<Verdict> {
        let (g, raw) = (self.geometry, entry.descriptor);
        if self.elsewhere {
            return None;
        }
        let plain = raw.with_copied(false);
        let extent = match plain.decode(g, self.version) {
            Ok(Mapping::Compressed(extent)) => extent,
            Ok(_) => return None,
            Err(error) => return Some(self.lost(entry, &error)),
        };
        if extent.offset.0 >= self.file_len {
            return Some(self.lost(entry, &"the compressed data lie outside the file"));
        }
        let mut fixed = ExtendedL2Entry { descriptor: plain, subclusters: 0 };
        let (mut code, mut why) =
            ("l2-compressed-copied", "the COPIED flag of a compressed entry is cleared");
        if g.extended_l2() && entry.subclusters != 0 {
            (code, why) = ("l2-subclusters", "the subcluster bitmap of a compressed entry is cleared");
        }
        let end = extent.offset.0.saturating_add(extent.bytes);
        if end.saturating_sub(self.file_len) >= g.cluster_size() {
            let there = self.file_len - extent.offset.0;
            fixed.descriptor = L2Entry::compressed(g, extent.offset, there)?;
            (code, why) = ("l2-compressed-length", "the compressed length ends with the file now");
        }
        let same = fixed.descriptor == raw && (!g.extended_l2() || fixed.subclusters == entry.subclusters);
        let message = format!("{why}; the guest reads the same data");
        (!same).then_some(Verdict { becomes: Becomes::Entry(fixed), code, message })
    }

    fn standard(&self, entry: ExtendedL2Entry) -> Option<Verdict> {
        let (g, raw) = (self.geometry, entry.descriptor.0);
        let offset = raw & OFFSET;
        if !g.is_aligned(offset) {
            let why = format!("the host offset {offset:#x} is not a multiple of the cluster size");
            return Some(self.lost(entry, &why));
        }
        if offset != 0
            && !self.elsewhere
            && let Err(error) = check_inside("data cluster", offset, g.cluster_size(), self.file_len, g)
        {
            return Some(self.lost(entry, &error));
        }
        let mut fixed = ExtendedL2Entry { descriptor: L2Entry(raw & !RESERVED), ..entry };
        let mut code = "l2-reserved";
        let mut message = "reserved bits are cleared; the guest reads the data that it leads to".to_owned();
        if self.version == Version::V2 && raw & ZERO != 0 {
            code = "l2-zero-flag";
            if offset == 0 {
                return Some(self.lost(entry, &"a version 2 image has no zero clusters"));
            }
            fixed.descriptor = L2Entry(fixed.descriptor.0 & !ZERO);
            message = "the zero flag, which version 2 does not have, is cleared; the guest, which could not read this \
                       cluster, now reads the data that it leads to"
                .to_owned();
        }
        if g.extended_l2() && entry.decode(g).is_err() {
            fixed.subclusters = valid_bitmap(entry.subclusters, offset != 0 || self.elsewhere);
            if fixed.subclusters != entry.subclusters {
                code = "l2-subclusters";
                let rule = if offset != 0 || self.elsewhere {
                    "subclusters that were both data and zeros are data"
                } else {
                    "subclusters of data without a host cluster are zeros"
                };
                message = format!(
                    "the subcluster bitmap {:#x} becomes {:#x}: {rule}; the guest could not read this cluster before",
                    entry.subclusters, fixed.subclusters
                );
            }
        }
        (fixed != entry).then_some(Verdict { becomes: Becomes::Entry(fixed), code, message })
    }

    /// The entry's data cannot be found: zeros take their place, so that nothing older shows through.
    pub(crate) fn lost(&self, entry: ExtendedL2Entry, why: &dyn std::fmt::Display) -> Verdict {
        let raw = entry.descriptor;
        let becomes = if self.geometry.extended_l2() {
            let claimed = entry.subclusters | entry.subclusters >> 32;
            let zeros = if raw.is_compressed() { u64::MAX } else { claimed };
            Becomes::Entry(ExtendedL2Entry { descriptor: L2Entry::default(), subclusters: zeros << 32 })
        } else if self.version == Version::V3 {
            Becomes::Entry(ExtendedL2Entry { descriptor: L2Entry::ZERO, subclusters: 0 })
        } else if self.backing {
            Becomes::FreshZeros
        } else {
            Becomes::Entry(ExtendedL2Entry::default())
        };
        let message =
            format!("{why}; its data cannot be found, and the guest reads zeros in their place from now on");
        Verdict { becomes, code: "l2-pointer", message }
    }
}

/// Each subcluster either data or zeros; data only where there is a host cluster.
fn valid_bitmap(bitmap: u64, host: bool) -> u64 {
    let (data, zero) = (bitmap & u64::from(u32::MAX), bitmap >> 32);
    if host { data | (zero & !data) << 32 } else { (data | zero) << 32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(extended: bool, version: Version, backing: bool) -> Judge {
        let geometry = Geometry::new(16, extended).unwrap();
        Judge { geometry, version, file_len: 0x10_0000, elsewhere: false, backing }
    }

    fn entry(descriptor: u64, subclusters: u64) -> ExtendedL2Entry {
        ExtendedL2Entry { descriptor: L2Entry(descriptor), subclusters }
    }

    #[test]
    fn each_kind_of_damage_has_its_outcome() {
        const COPIED: u64 = 1 << 63;
        let (v3, v2, ext) = (
            judge(false, Version::V3, true),
            judge(false, Version::V2, true),
            judge(true, Version::V3, true),
        );
        let is = |d, s| Some(Becomes::Entry(entry(d, s)));
        let cases = [
            ("right", v3, entry(COPIED | 0x5_0000, 0), None),
            ("zero", v3, entry(1, 0), None),
            ("reserved", v3, entry(COPIED | 0x0100_0000_0005_0002, 0), is(COPIED | 0x5_0000, 0)),
            ("unaligned", v3, entry(COPIED | 0x5_0200, 0), is(1, 0)),
            ("unaligned zero", v3, entry(0x5_0201, 0), is(1, 0)),
            ("out of the file", v3, entry(0x20_0000, 0), is(1, 0)),
            ("out of the file, version 2", v2, entry(0x20_0000, 0), Some(Becomes::FreshZeros)),
            ("the same without backing", judge(false, Version::V2, false), entry(0x20_0000, 0), is(0, 0)),
            ("zero flag, version 2", v2, entry(COPIED | 0x5_0001, 0), is(COPIED | 0x5_0000, 0)),
            ("only a zero flag, version 2", v2, entry(1, 0), Some(Becomes::FreshZeros)),
            ("compressed", v3, entry(0x4000_0000_0005_0000, 0), None),
            ("compressed, COPIED", v3, entry(0xc000_0000_0005_0000, 0), is(0x4000_0000_0005_0000, 0)),
            ("compressed, out of the file", v3, entry(0x4000_0000_0010_0000, 0), is(1, 0)),
            // 256 sectors from the last 0x1000 bytes of the file: 8 sectors are there.
            ("compressed, too long", v3, entry(0x7fc0_0000_000f_f000, 0), is(0x41c0_0000_000f_f000, 0)),
            (
                "data and zeros",
                ext,
                entry(COPIED | 0x5_0000, 3 | 6 << 32),
                is(COPIED | 0x5_0000, 3 | 4 << 32),
            ),
            ("no host cluster", ext, entry(0, 3 | 4 << 32), is(0, 7 << 32)),
            ("subclusters out of the file", ext, entry(0x20_0000, 1 | 4 << 32), is(0, 5 << 32)),
            ("compressed subclusters", ext, entry(0x4000_0000_0005_0000, 1), is(0x4000_0000_0005_0000, 0)),
        ];
        for (name, judge, entry, want) in cases {
            let got = judge.l2(entry).map(|v| v.becomes);
            assert_eq!(got, want, "{name}");
            if let Some(Becomes::Entry(fixed)) = got {
                assert_eq!(judge.l2(fixed), None, "{name}: what it becomes is right");
            }
        }
    }

    #[test]
    fn l1_entries() {
        let judge = judge(false, Version::V3, false);
        for (name, raw, want) in [
            ("right", 0x8000_0000_0005_0000, None),
            ("empty", 0, None),
            ("flags alone", 1 << 63, Some(0)),
            ("reserved", 0x8100_0000_0005_0001, Some(0x8000_0000_0005_0000)),
            ("unaligned", 0x5_0200, Some(0)),
            ("out of the file", 0x8000_0000_0020_0000, Some(0)),
        ] {
            assert_eq!(judge.l1(L1Entry(raw)).map(|f| f.0.0), want, "{name}");
        }
    }
}
