//! Fields of the header that keep the tables from being found, and that can be set anew without them.

use pleach_format::{FormatError, SnapshotRecord};

use super::Repairer;
use super::draft::Stage;
use super::snapshots::root_of;
use crate::ImageError;
use crate::image::{check_inside, read_head};

/// Whether [`mend`] takes care of what `error` says.
pub(crate) fn can_mend(error: &ImageError) -> bool {
    field(error).is_some_and(|f| {
        ["refcount_table_clusters", "refcount_table_offset", "nb_snapshots", "snapshots_offset"].contains(&f)
    })
}

fn field(error: &ImageError) -> Option<&'static str> {
    match error {
        ImageError::Format {
            structure: "header",
            source: FormatError::OutOfRange { field, .. } | FormatError::Unaligned { field, .. },
            ..
        } => Some(field),
        _ => None,
    }
}

/// Lets the header parse, if only these fields keep it from that.
pub(crate) fn mend(repairer: &mut Repairer<'_>) -> Result<(), ImageError> {
    let header = loop {
        let error = match read_head(repairer.store()) {
            Ok(head) => break head.header,
            Err(error) => error,
        };
        match field(&error) {
            Some("refcount_table_clusters" | "refcount_table_offset") if !repairer.rebuild => {
                let mut bits = [0; 4];
                repairer.read(20, &mut bits)?;
                // The header was parsed up to its tables: the cluster size is right.
                empty_table(repairer, 1 << u32::from_be_bytes(bits))?;
            }
            Some("nb_snapshots") => {
                repairer.surplus_snapshots = true;
                repairer.draft.pretend(60, &SnapshotRecord::MAX_COUNT.to_be_bytes())?;
            }
            Some("snapshots_offset") => {
                repairer.draft.write(Stage::Mend, 60, &root_of(0, 0))?;
                let message = format!(
                    "{}; no snapshot can be found, all are dropped, and what only they used becomes free",
                    explain(&error)
                );
                repairer.note("snapshot-table", "header", Some(64), None, message);
            }
            _ => return Err(error),
        }
    };
    let g = header.geometry();
    let len = repairer.draft.old_len();
    let bytes = u64::from(header.refcount_table_clusters()) * g.cluster_size();
    if !repairer.rebuild
        && check_inside("refcount table", header.refcount_table_offset().0, bytes, len, g).is_err()
    {
        empty_table(repairer, g.cluster_size())?;
    }
    let (count, at) = (header.nb_snapshots(), header.snapshots_offset().0);
    if count == 0 && !g.is_aligned(at) {
        repairer.draft.write(Stage::Mend, 64, &[0; 8])?;
        let message =
            format!("there are no snapshots, so their table is not at {at:#x}: the field is cleared");
        repairer.note("snapshot-root", "header", Some(64), None, message);
    }
    if count > 0 && check_inside("snapshot table", at, 40, len, g).is_err() {
        repairer.draft.write(Stage::Mend, 60, &root_of(0, 0))?;
        let message = format!(
            "the snapshot table at {at:#x} is not in the file; no snapshot can be found, all are dropped, and what only \
             they used becomes free"
        );
        repairer.note("snapshot-table", "header", Some(64), None, message);
    }
    Ok(())
}

/// An empty refcount table to go on with; a whole one takes its place later.
fn empty_table(repairer: &mut Repairer<'_>, cluster_size: u64) -> Result<(), ImageError> {
    let at = repairer.draft.fresh(1, cluster_size)?;
    let mut root = [0; 12];
    let (offset, clusters) = root.split_at_mut(8);
    offset.copy_from_slice(&at.to_be_bytes());
    clusters.copy_from_slice(&1u32.to_be_bytes());
    repairer.rebuild = true;
    repairer.draft.pretend(48, &root)
}

fn explain(error: &ImageError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
