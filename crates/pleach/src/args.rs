//! What was typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pleach_engine::survey::Trust;

/// Keeps trees of qcow2 disk images: shows, merges and deletes any node without losing a byte.
#[derive(Debug, Parser)]
#[command(name = "pleach", version, about, max_term_width = 100, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the hierarchy of a directory of images, or of the tree that an image belongs to
    Tree(TreeArgs),
    /// Show what images are, and what they stand on
    Info(InfoArgs),
    /// Check images for inconsistencies, and repair them if asked to
    Check(CheckArgs),
    /// Create a new, empty image
    Create(CreateArgs),
    /// Delete a node; the content of every node that stays is unchanged
    Delete(DeleteArgs),
    /// Finish interrupted operations
    Resume(ResumeArgs),
    /// Build a tree of real images, delete nodes from it every way, and prove that nothing else changed
    Demo(DemoArgs),
}

/// What images may make us open.
#[derive(Debug, Args)]
pub(crate) struct TrustArgs {
    /// Follow backing file names into this directory too
    #[arg(long = "allow-dir", value_name = "DIR")]
    allowed: Vec<PathBuf>,
    /// Follow backing file names to any local file
    #[arg(long)]
    trust: bool,
}

impl TrustArgs {
    pub(crate) fn trust(&self) -> Trust {
        Trust { allowed: self.allowed.clone(), everything: self.trust, ..Trust::default() }
    }
}

#[derive(Debug, Args)]
pub(crate) struct TreeArgs {
    /// An image, or a directory of images
    #[arg(default_value = ".")]
    pub(crate) target: PathBuf,
    /// Show what each node takes on disk, and what deleting it would free and write
    #[arg(long)]
    pub(crate) sizes: bool,
    /// Draw the tree with ASCII characters
    #[arg(long)]
    pub(crate) ascii: bool,
    /// Look even while somebody writes
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Look for images in this directory too
    #[arg(long, value_name = "DIR")]
    pub(crate) also: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
}

impl TreeArgs {
    /// The arguments of `pleach tree --sizes DIR`.
    pub(crate) fn with_sizes(dir: &std::path::Path) -> Self {
        let trust = TrustArgs { allowed: Vec::new(), trust: false };
        Self {
            target: dir.to_owned(),
            sizes: true,
            ascii: false,
            force_share: false,
            bytes: false,
            json: false,
            also: Vec::new(),
            trust,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Images, or directories of images
    #[arg(required = true, value_name = "IMG")]
    pub(crate) images: Vec<PathBuf>,
    /// Show the backing files too
    #[arg(long)]
    pub(crate) chain: bool,
    /// Take the images to have this format; only needed for raw ones
    #[arg(short, long, value_parser = ["qcow2", "raw"])]
    pub(crate) format: Option<String>,
    /// Look even while somebody writes
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Images, or directories of images
    #[arg(required = true, value_name = "IMG")]
    pub(crate) images: Vec<PathBuf>,
    /// Check the backing files too
    #[arg(long, conflicts_with_all = ["repair", "undo"])]
    pub(crate) chain: bool,
    /// Mend what is wrong, with an undo file beside the image: leaks only lowers counts that are too high
    #[arg(long, value_name = "WHAT", value_parser = ["leaks", "all"])]
    pub(crate) repair: Option<String>,
    /// With --repair: show what would be changed, and stop
    #[arg(short = 'n', long, requires = "repair")]
    pub(crate) dry_run: bool,
    /// Take a repair back: put the bytes in this undo file back into the image
    #[arg(long, value_name = "FILE", conflicts_with_all = ["repair", "force_share"])]
    pub(crate) undo: Option<PathBuf>,
    /// Look even while somebody writes: what is found may only be half-way
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub(crate) force_share: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The new image; it must not be there yet
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// Virtual size, such as 10G; may be left out with a backing file
    pub(crate) size: Option<String>,
    /// Backing file; relative names are relative to the new image's directory
    #[arg(short, long, value_name = "FILE")]
    pub(crate) backing: Option<PathBuf>,
    /// Format of the backing file; found out by looking if left out
    #[arg(short = 'F', long, value_parser = ["qcow2", "raw"], requires = "backing")]
    pub(crate) backing_format: Option<String>,
    /// Cluster size, 512 to 2M
    #[arg(long, default_value = "64k", value_name = "SIZE")]
    pub(crate) cluster_size: String,
    /// Bits a refcount: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, default_value_t = 16, value_name = "BITS")]
    pub(crate) refcount_bits: u32,
    /// Format version
    #[arg(long, default_value = "v3", value_parser = ["v3", "v2", "1.1", "0.10"])]
    pub(crate) compat: String,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// An image, or a directory of images
    pub(crate) target: PathBuf,
    /// The node
    pub(crate) name: String,
    /// Delete its descendants too
    #[arg(long, group = "mode")]
    pub(crate) children: bool,
    /// Delete its descendants, but not the node
    #[arg(long, group = "mode")]
    pub(crate) children_only: bool,
    /// Let only the catalog forget the node
    #[arg(long, group = "mode")]
    pub(crate) metadata: bool,
    /// Whose file name survives when two files become one: child, parent, parent=NAME (that child takes it over), or
    /// auto (the file into which the data are copied)
    #[arg(long, default_value = "child", value_name = "WHOSE", value_parser = keep)]
    pub(crate) keep: pleach_engine::Keep,
    /// Look for images that stand on these in this directory too
    #[arg(long, value_name = "DIR")]
    pub(crate) also: Vec<PathBuf>,
    /// Show what would be done, and stop
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Do it without asking
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// With --children: deleting a root, and so the whole tree, is meant
    #[arg(long)]
    pub(crate) yes_everything: bool,
    /// Threads that copy; one a processor if left out
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// How to show progress: a bar on a terminal, JSON lines on stderr, or not at all
    #[arg(long, default_value = "auto", value_parser = ["auto", "json", "none"])]
    pub(crate) progress: String,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// An image, or a directory of images
    #[arg(default_value = ".")]
    pub(crate) target: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Where to build the images: a new or empty directory, which is kept. Without it, a temporary one
    pub(crate) dir: Option<PathBuf>,
}

/// Why there is no command.
pub(crate) enum Failure {
    /// Help or the version was asked for.
    Help(String),
    /// The words make no sense.
    Usage { text: String, json: bool },
}

/// Reads the arguments of this process.
pub(crate) fn parse() -> Result<Command, Failure> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    Cli::try_parse().map(|cli| cli.command).map_err(|error| match error.kind() {
        DisplayHelp | DisplayVersion => Failure::Help(error.render().ansi().to_string()),
        _ => Failure::Usage {
            text: error.render().to_string(),
            json: std::env::args_os().any(|a| a == "--json"),
        },
    })
}

fn keep(text: &str) -> Result<pleach_engine::Keep, String> {
    use pleach_engine::Keep;
    match text {
        "child" => Ok(Keep::Child),
        "parent" => Ok(Keep::Parent(None)),
        "auto" => Ok(Keep::Auto),
        other => match other.strip_prefix("parent=") {
            Some(name) if !name.is_empty() => Ok(Keep::Parent(Some(name.to_owned()))),
            _ => Err("must be child, parent, parent=NAME or auto".to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
