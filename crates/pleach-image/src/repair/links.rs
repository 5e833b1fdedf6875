//! Guest data in clusters of their own: a host cluster that two places use becomes two.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use pleach_format::{
    Encryption, ExtendedL2Entry, Geometry, HostCluster, HostOffset, L2Entry, Mapping, Version,
};

use super::Repairer;
use super::draft::Stage;
use super::entry::{Becomes, Judge};
use super::pointers::{Roles, judge};
use crate::check::Counts;
use crate::walk::{Entries, walk};
use crate::{Image, ImageError, codec};

/// The clusters that `len` bytes from `offset` touch.
pub(crate) fn clusters(g: Geometry, offset: u64, len: u64) -> RangeInclusive<u64> {
    let last = offset.saturating_add(len.max(1) - 1);
    g.host_cluster(HostOffset(offset)).0..=g.host_cluster(HostOffset(last)).0
}

/// Keeps new clusters behind all that is counted: a compressed entry may claim a part of the cluster behind the end of
/// the file, which is then not free.
pub(crate) fn keep_claims_clear(repairer: &Repairer<'_>) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let end = walk(&image, repairer.workers, &mut |_| Ok(()))?.census.end();
    repairer.draft.keep_clear(image.geometry().host_offset(HostCluster(end)).0);
    Ok(())
}

/// Copies guest data out of clusters that are also a table, that another guest cluster uses although nothing counts it,
/// or that more entries lead to than can be counted. States share what is at the same place of the disk: that stays.
///
/// `counted`: also the latter two, which can only be told once every entry is right.
pub(crate) fn separate_data(
    repairer: &mut Repairer<'_>,
    roles: &Roles,
    counted: bool,
) -> Result<(), ImageError> {
    let image = repairer.image()?;
    let (g, most) = (image.geometry(), image.header().refcount_width().max());
    let judge = judge(repairer, &image);
    // Its sectors are encrypted for the place that they are in: a copy elsewhere would read differently.
    let fixed_places = image.header().encryption() == Some(Encryption::Luks);
    if judge.elsewhere {
        return Ok(());
    }
    let walked = walk(&image, repairer.workers, &mut |_| Ok(()))?;
    let mut stored = Counts::new(&walked.counts);
    let mut entries = Entries::new(&image);
    let mut owners: HashMap<u64, (u64, u64)> = HashMap::new();
    for (&at, used) in &walked.tables {
        entries.for_each(at, |slot, raw, target| {
            let Ok(target) = target else { return Ok(()) };
            let guest = used.guest + slot as u64 * g.cluster_size();
            let (mut why, mut doubted) = (None, Vec::new());
            for cluster in clusters(g, target.offset, target.len) {
                let references = walked.census.count(HostCluster(cluster));
                if let Some(role) = roles.get(cluster) {
                    why = Some(format!("is also {role}"));
                    break;
                }
                let doubtful = counted
                    && references > 1
                    && (repairer.rebuild
                        || references > most
                        || stored.get(HostCluster(cluster)) < references);
                if !doubtful {
                    continue;
                }
                doubted.push(cluster);
                match owners.get(&cluster) {
                    Some((_, seen)) if seen.saturating_add(used.references) > most => {
                        why = Some("is used more often than can be counted".to_owned());
                    }
                    // What is too much to copy stays shared, and counted: a write copies it then.
                    Some((owner, _))
                        if *owner != guest
                            && !raw.is_compressed()
                            && !fixed_places
                            && repairer.can_copy(g.cluster_size()) =>
                    {
                        why = Some(format!("is also that of guest offset {owner:#x}"));
                    }
                    _ => {}
                }
            }
            let Some(why) = why else {
                for cluster in doubted {
                    owners.entry(cluster).or_insert((guest, 0)).1 += used.references;
                }
                return Ok(());
            };
            if fixed_places {
                let what = format!(
                    "the encrypted cluster at {:#x} {why}, and cannot be copied without the key",
                    target.offset
                );
                return Err(ImageError::CannotRepair { what });
            }
            let place = at + slot as u64 * g.l2_entry_bytes() as u64;
            let (bytes, outcome) = moved(repairer, &image, &judge, raw, target.offset)?;
            repairer.written_entries.insert(place);
            repairer.draft.write(Stage::Mend, place, &bytes)?;
            let message = format!("the cluster at {:#x} {why}: {outcome}", target.offset);
            repairer.note("cross-link", "L2 table", Some(place), Some((guest, g.cluster_size())), message);
            Ok(())
        })?;
    }
    Ok(())
}

/// The bytes of an entry that no longer uses the clusters of `raw`, and what the guest will see.
fn moved(
    repairer: &mut Repairer<'_>,
    image: &Image,
    judge: &Judge,
    raw: L2Entry,
    offset: u64,
) -> Result<(Vec<u8>, String), ImageError> {
    let g = image.geometry();
    let owned = |at| L2Entry::owned(HostOffset(at)).0.to_be_bytes().to_vec();
    if !raw.is_compressed() {
        if raw.0 & 1 != 0 && !g.extended_l2() && image.header().version() == Version::V3 {
            let bytes = L2Entry::ZERO.0.to_be_bytes().to_vec();
            return Ok((
                bytes,
                "it held zeros and gives its cluster up; the guest reads the same".to_owned(),
            ));
        }
        let at = repairer.copy(offset, g.cluster_size(), g.cluster_size())?;
        return Ok((owned(at), format!("it gets a copy of its own at {at:#x}; the guest reads the same")));
    }
    if let Some(data) = unpacked(repairer, image, judge, raw) {
        let at = repairer.place(&data, g.cluster_size())?;
        let mut bytes = owned(at);
        if g.extended_l2() {
            bytes.extend(u64::from(u32::MAX).to_be_bytes());
        }
        return Ok((bytes, format!("it is decompressed to {at:#x}; the guest reads the same")));
    }
    let entry = ExtendedL2Entry { descriptor: raw, subclusters: 0 };
    let verdict = judge.lost(entry, &"its compressed data are damaged");
    let bytes = match verdict.becomes {
        Becomes::Entry(new) => new.to_bytes().get(..g.l2_entry_bytes()).unwrap_or(&[]).to_vec(),
        Becomes::FreshZeros => owned(repairer.place(&vec![0; g.cluster_bytes()], g.cluster_size())?),
    };
    Ok((bytes, verdict.message))
}

fn unpacked(repairer: &Repairer<'_>, image: &Image, judge: &Judge, raw: L2Entry) -> Option<Vec<u8>> {
    let Ok(Mapping::Compressed(extent)) = raw.decode(judge.geometry, judge.version) else { return None };
    let mut packed = vec![0; usize::try_from(extent.bytes).ok()?];
    repairer.draft.read_original(extent.offset.0, &mut packed).ok()?;
    let mut data = vec![0; judge.geometry.cluster_bytes()];
    codec::unpack(image.header().compression(), &packed, &mut data).map(|_| data)
}
