//! What was typed: verbs on whole trees.

use std::path::PathBuf;

use clap::Args;
use pleach_engine::verbs::TakeKind;

use super::{ActArgs, PlaceArgs, TargetArgs, node};

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The tree's name: its catalog is .pleach/NAME.tree beside the first disk
    pub(crate) name: String,
    /// A disk of the machine and its active image, such as vda=A.qcow2
    #[arg(long = "disk", required = true, value_name = "DISK=IMG", value_parser = disk_file)]
    pub(crate) disks: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The snapshot's name
    pub(crate) name: String,
    /// Keep every disk as a snapshot inside its active image
    #[arg(long, conflicts_with = "external")]
    pub(crate) internal: bool,
    /// Freeze every active image, and go on in a new one over it
    #[arg(long)]
    pub(crate) external: bool,
    /// How one disk is kept: DISK=internal or DISK=external
    #[arg(long = "kind", value_name = "DISK=KIND", value_parser = disk_kind)]
    pub(crate) kinds: Vec<(String, TakeKind)>,
    /// Only this disk takes part; may be said several times
    #[arg(long = "disk", value_name = "DISK")]
    pub(crate) disks: Vec<String>,
    /// What the snapshot is for
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// The new active image of a disk; a bare name lies beside the one that is active now
    #[arg(long = "file", value_name = "DISK=PATH", value_parser = disk_file)]
    pub(crate) files: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub(crate) act: ActArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RevertArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The node to go back to
    #[arg(value_parser = node())]
    pub(crate) name: String,
    /// Changes since the last snapshot are lost
    #[arg(long, conflicts_with = "save_as")]
    pub(crate) discard: bool,
    /// Changes since the last snapshot are kept as a snapshot of this name
    #[arg(long, value_name = "NAME")]
    pub(crate) save_as: Option<String>,
    /// The new active image of a disk; a bare name lies beside the one that is active now
    #[arg(long = "file", value_name = "DISK=PATH", value_parser = disk_file)]
    pub(crate) files: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub(crate) act: ActArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The node
    #[arg(value_parser = node())]
    pub(crate) name: String,
    /// Its new name; files keep theirs
    pub(crate) new_name: String,
    #[command(flatten)]
    pub(crate) act: ActArgs,
}

#[derive(Debug, Args)]
pub(crate) struct NoteArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The node
    #[arg(value_parser = node())]
    pub(crate) name: String,
    /// Its new description; without one, the present one is shown
    #[arg(allow_hyphen_values = true)]
    pub(crate) text: Option<String>,
    #[command(flatten)]
    pub(crate) act: ActArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CurrentArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The node that is to be current; without one, the current one is shown
    #[arg(value_parser = node())]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) act: ActArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The node
    #[arg(value_parser = node())]
    pub(crate) name: String,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ScanArgs {
    /// A directory of images
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// Make catalogs where there are none, and mend those that do not say what the images say
    #[arg(long)]
    pub(crate) write: bool,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

/// `DISK=PATH`.
pub(super) fn disk_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((disk, path)) if !disk.is_empty() && !path.is_empty() => Ok((disk.to_owned(), path.into())),
        _ => Err("must be a disk and a file, such as vda=A.qcow2".to_owned()),
    }
}

/// `DISK=internal` or `DISK=external`.
fn disk_kind(text: &str) -> Result<(String, TakeKind), String> {
    match text.split_once('=') {
        Some((disk, "internal")) if !disk.is_empty() => Ok((disk.to_owned(), TakeKind::Internal)),
        Some((disk, "external")) if !disk.is_empty() => Ok((disk.to_owned(), TakeKind::External)),
        _ => Err("must be a disk and internal or external, such as vda=internal".to_owned()),
    }
}
