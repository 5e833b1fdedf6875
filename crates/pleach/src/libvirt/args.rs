//! What was typed behind `pleach libvirt`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct LibvirtArgs {
    #[command(subcommand)]
    pub(crate) command: LibvirtCommand,
    /// Print one JSON document
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What is done with libvirt's documents.
#[derive(Debug, Subcommand)]
pub(crate) enum LibvirtCommand {
    /// Make a catalog of libvirt's snapshot documents
    Import(ImportArgs),
    /// Write a catalog's snapshots as documents that libvirt takes, with the script that gives them to it
    Export(ExportArgs),
    /// Compare documents with the images, and say where libvirt would lose data
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// The machine's definition (`virsh dumpxml --inactive`), which says what files it writes to
    #[arg(long, value_name = "FILE")]
    pub(crate) domain: Option<PathBuf>,
    /// The images are in this directory, whatever directory the documents say
    #[arg(long, value_name = "DIR")]
    pub(crate) images: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Documents, or directories of them such as /var/lib/libvirt/qemu/snapshot/NAME
    #[arg(required = true, value_name = "DIR|FILE")]
    pub(crate) documents: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// The tree's name; the machine's if left out
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Put the catalog into this directory, and not into that of the first disk
    #[arg(long, value_name = "DIR")]
    pub(crate) into: Option<PathBuf>,
    /// Print the catalog, and make none
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// A catalog, or the directory or an image that has one
    pub(crate) target: PathBuf,
    /// The directory to write, which must be new or empty
    pub(crate) out: PathBuf,
    /// The machine's definition, for snapshots that did not come from libvirt
    #[arg(long, value_name = "FILE")]
    pub(crate) domain: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Documents, or directories of them; or a catalog, as it would be exported
    #[arg(required = true, value_name = "DIR|FILE")]
    pub(crate) documents: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
}
