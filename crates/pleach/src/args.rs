//! What was typed.

mod trees;

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use pleach_engine::naming::name_of_bytes;
use pleach_engine::survey::{FileFormat, Trust};
use pleach_engine::{BitmapPolicy, Error, ErrorKind};

use crate::progress::Show;

pub(crate) use self::trees::{
    CurrentArgs, InitArgs, NoteArgs, RenameArgs, RevertArgs, ScanArgs, ShowArgs, SnapshotArgs,
};

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
    /// Make the catalog of a machine's tree, with all of its disks
    Init(InitArgs),
    /// Take a snapshot of every disk of a tree, all or none
    Snapshot(SnapshotArgs),
    /// Go back to a node
    Revert(RevertArgs),
    /// Give a node another name
    Rename(RenameArgs),
    /// Describe a node, or show its description
    Note(NoteArgs),
    /// Say which snapshot is current, or show it
    Current(CurrentArgs),
    /// Show all about a node
    Show(ShowArgs),
    /// Find out which images belong to which tree; make or mend catalogs
    Scan(ScanArgs),
    /// Show what images are, and what they stand on
    Info(InfoArgs),
    /// Check images for inconsistencies, and repair them if asked to
    Check(CheckArgs),
    /// Show where every byte of an image's disk comes from
    Map(MapArgs),
    /// Find out whether two images read the same
    Compare(CompareArgs),
    /// Show where image B reads differently than image A
    Diff(PairArgs),
    /// Create a new, empty image
    Create(CreateArgs),
    /// Make an image's disk longer or shorter
    Resize(ResizeArgs),
    /// Give space back in place: free clusters go, and what lies behind them moves down
    Compact(CompactArgs),
    /// List and change the persistent bitmaps of an image
    Bitmap(BitmapArgs),
    /// Copy an image into a new file of either format, with or without compression
    Convert(ConvertArgs),
    /// Make a copy of an image that stands alone
    Flatten(FlattenArgs),
    /// Show how large a copy of an image, or a new image, would be
    Measure(MeasureArgs),
    /// Delete a node; the content of every node that stays is unchanged
    Delete(DeleteArgs),
    /// Make one image out of a run of them, with the content of the uppermost
    Merge(MergeArgs),
    /// Bring what an image holds into an image below it; it stays on that one, empty
    Commit(CommitArgs),
    /// Make one snapshot out of a run of them: the last one stays
    Squash(SquashArgs),
    /// Give an image another backing file, or none; its content stays the same
    Rebase(RebaseArgs),
    /// Carry out a plan that was saved with --plan, if nothing has changed since
    Apply(ApplyArgs),
    /// Finish interrupted operations
    Resume(ResumeArgs),
    /// Take back interrupted operations that have not changed anything yet
    Undo(ResumeArgs),
    /// Build a tree of real images, delete nodes from it every way, and prove that nothing else changed
    Demo(DemoArgs),
    /// Read and write libvirt's snapshot documents, and compare them with the images
    Libvirt(crate::libvirt::LibvirtArgs),
    /// Print what a shell needs to complete the command line
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual, a page a verb
    Man {
        /// The directory; made if it is not there
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

/// A name of a node or snapshot that is there. What is no UTF-8 is escaped, as pleach prints it.
pub(crate) fn node() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().map(|name| name_of_bytes(name.as_encoded_bytes()))
}

/// What images may make us open.
#[derive(Clone, Debug, Args)]
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

/// Where images are looked for, and what they may make us open.
#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Look for images, and for what stands on them, in this directory too
    #[arg(long, value_name = "DIR")]
    pub(crate) also: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

impl PlaceArgs {
    pub(crate) fn trust(&self) -> Trust {
        self.trust.trust()
    }
}

/// Images that belong together.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// An image, a directory of images, or a catalog
    pub(crate) target: PathBuf,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TreeArgs {
    /// An image, a directory of images, or a catalog
    #[arg(default_value = ".")]
    pub(crate) target: PathBuf,
    /// Show what each node takes on disk, and what deleting it would free and write
    #[arg(long)]
    pub(crate) sizes: bool,
    /// Show every image of the directory, whatever catalogs say
    #[arg(long)]
    pub(crate) all: bool,
    /// Show only this node and what stands on it
    #[arg(long, value_name = "NODE", value_parser = node())]
    pub(crate) from: Option<String>,
    /// Show only nodes on which nothing stands
    #[arg(long)]
    pub(crate) leaves: bool,
    /// Show only nodes that stand on nothing
    #[arg(long)]
    pub(crate) roots: bool,
    /// Print the tree for Graphviz
    #[arg(long, conflicts_with_all = ["json", "sizes"])]
    pub(crate) dot: bool,
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
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
}

impl TreeArgs {
    /// The arguments of `pleach tree --sizes DIR`.
    pub(crate) fn with_sizes(dir: &std::path::Path) -> Self {
        let trust = TrustArgs { allowed: Vec::new(), trust: false };
        let place = PlaceArgs { also: Vec::new(), trust };
        Self {
            target: dir.to_owned(),
            sizes: true,
            all: false,
            from: None,
            leaves: false,
            roots: false,
            dot: false,
            ascii: false,
            force_share: false,
            bytes: false,
            json: false,
            place,
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

/// What the images that are opened may make us open.
#[derive(Debug, Args)]
pub(crate) struct OpenArgs {
    /// Follow backing file names into other directories too
    #[arg(long)]
    pub(crate) chain: bool,
    /// An external data file that may be opened, for the image that names it
    #[arg(long = "allow-data-file", value_name = "PATH")]
    data_files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

impl OpenArgs {
    pub(crate) fn trust(&self) -> Trust {
        Trust { chain: self.chain, data_files: self.data_files.clone(), ..self.trust.trust() }
    }
}

/// What a copy is like.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// Format of the new file; if left out, raw for a name that ends in .raw or .img, else qcow2
    #[arg(short = 'O', long = "to", value_parser = format, value_name = "FORMAT")]
    pub(crate) to: Option<FileFormat>,
    /// Format of the source; only needed for raw ones
    #[arg(short, long, value_parser = format)]
    pub(crate) format: Option<FileFormat>,
    /// Copy this internal snapshot, by id or name, instead of the active state
    #[arg(long, value_name = "SNAPSHOT", value_parser = node())]
    pub(crate) snapshot: Option<String>,
    /// Backing file of the copy: only what differs from it is copied; relative names are relative to the copy's directory
    #[arg(short, long, value_name = "FILE")]
    pub(crate) backing: Option<PathBuf>,
    /// Format of the backing file; found out by looking if left out
    #[arg(short = 'F', long, value_parser = format, requires = "backing")]
    pub(crate) backing_format: Option<FileFormat>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    /// Threads that read, compress and write; one a processor if left out
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The image to copy
    #[arg(value_name = "IN")]
    pub(crate) source: PathBuf,
    /// The new file; it must not be there yet
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// Compress the copy
    #[arg(short = 'c', long)]
    pub(crate) compress: bool,
    /// Level of compression: 1 to 9 for zlib, 1 to 19 for zstd
    #[arg(long, value_name = "N", requires = "compress")]
    pub(crate) level: Option<u32>,
    /// Fail, and leave nothing, rather than put out more than this: a small image can claim any amount of data
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_output: Option<u64>,
    /// Write no more than this many bytes a second, such as 50M
    #[arg(long, value_name = "RATE", value_parser = size)]
    pub(crate) bandwidth: Option<u64>,
    /// Copy the source's persistent bitmaps too
    #[arg(long)]
    pub(crate) bitmaps: bool,
    /// Leave out bitmaps that were not written back, instead of copying nothing
    #[arg(long, requires = "bitmaps")]
    pub(crate) skip_broken_bitmaps: bool,
    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
    #[command(flatten)]
    pub(crate) copy: CopyArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FlattenArgs {
    #[command(flatten)]
    pub(crate) convert: ConvertArgs,
    /// Show what would be written, and stop
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// For scripts; there is nothing to confirm
    #[arg(short, long)]
    yes: bool,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    /// The image to copy
    #[arg(value_name = "IMG", required_unless_present = "size", conflicts_with = "size")]
    pub(crate) source: Option<PathBuf>,
    /// Measure a new, empty image of this size instead
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) size: Option<u64>,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    #[command(flatten)]
    pub(crate) copy: CopyArgs,
}

/// The same for reading, and whether that waits for writers.
#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// Read even while somebody writes: what is read may be of no one moment
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    open: OpenArgs,
}

impl ReadArgs {
    pub(crate) fn trust(&self) -> Trust {
        self.open.trust()
    }
}

#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    /// The image
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// First byte to show, such as 1G
    #[arg(short, long, visible_alias = "start-offset", default_value = "0", value_name = "OFFSET", value_parser = size)]
    pub(crate) start: u64,
    /// How many bytes to show; up to the end if left out
    #[arg(short, long, visible_alias = "max-length", value_name = "LENGTH", value_parser = size)]
    pub(crate) length: Option<u64>,
    /// Show this internal snapshot, by id or name
    #[arg(long, value_name = "SNAPSHOT", value_parser = node())]
    pub(crate) snapshot: Option<String>,
    /// Take the image to have this format; only needed for raw ones
    #[arg(short, long, value_parser = format)]
    pub(crate) format: Option<FileFormat>,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

/// Two images that are read, and held against each other.
#[derive(Debug, Args)]
pub(crate) struct PairArgs {
    /// An image
    #[arg(value_name = "A")]
    pub(crate) first: PathBuf,
    /// The image that is compared with it
    #[arg(value_name = "B")]
    pub(crate) second: PathBuf,
    /// Take A to have this format; only needed for raw ones
    #[arg(short = 'f', long = "format", value_parser = format)]
    pub(crate) first_format: Option<FileFormat>,
    /// Take B to have this format
    #[arg(short = 'F', long, value_parser = format)]
    pub(crate) second_format: Option<FileFormat>,
    /// Read this internal snapshot of A, by id or name
    #[arg(long = "snapshot-a", value_name = "SNAPSHOT", value_parser = node())]
    pub(crate) first_snapshot: Option<String>,
    /// Read this internal snapshot of B
    #[arg(long = "snapshot-b", value_name = "SNAPSHOT", value_parser = node())]
    pub(crate) second_snapshot: Option<String>,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    pub(crate) pair: PairArgs,
    /// Sizes, and what is allocated, must be the same too
    #[arg(short, long)]
    pub(crate) strict: bool,
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
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a new qcow2 image is like, whatever is written into it.
#[derive(Debug, Args)]
pub(crate) struct LayoutArgs {
    /// Cluster size, 512 to 2M
    #[arg(long, default_value = "64k", value_name = "SIZE")]
    pub(crate) cluster_size: String,
    /// Bits a refcount: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, default_value_t = 16, value_name = "BITS")]
    pub(crate) refcount_bits: u32,
    /// Format version
    #[arg(long, default_value = "v3", value_parser = ["v3", "v2", "1.1", "0.10"])]
    pub(crate) compat: String,
    /// How compressed clusters are compressed; zlib is deflate
    #[arg(long, default_value = "zlib", value_parser = ["zlib", "zstd"])]
    pub(crate) compression: String,
    /// L2 entries that allocate 32nds of a cluster
    #[arg(long)]
    pub(crate) extended_l2: bool,
    /// Let writers postpone refcounts; after a crash they are rebuilt
    #[arg(long)]
    pub(crate) lazy_refcounts: bool,
    /// Put the guest's data into this file, which must not be there yet; relative names are relative to the new image's
    /// directory
    #[arg(long, value_name = "PATH")]
    pub(crate) data_file: Option<PathBuf>,
    /// Keep the data file a raw image of the disk
    #[arg(long, requires = "data_file")]
    pub(crate) data_file_raw: bool,
    /// What is there before anything is written: nothing, the tables, space for the data too, or zeros
    #[arg(long, default_value = "off", value_parser = ["off", "metadata", "falloc", "full"])]
    pub(crate) preallocation: String,
    /// Refused: what qemu-img's nocow does, `chattr +C` on the directory does for every new file
    #[arg(long)]
    pub(crate) nocow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompactArgs {
    /// The image
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// Let data that are zeros, in whole clusters, become entries that say so
    #[arg(long)]
    pub(crate) zeroes: bool,
    /// Show what would be done, and stop
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Taken for uniformity: nothing is lost, so nothing is asked
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// How many threads read tables and move data
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// The image
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// The new size, such as 10G, or by how much it changes: +1G, -512M
    #[arg(allow_hyphen_values = true)]
    pub(crate) size: String,
    /// The disk may become shorter: what is behind the new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,
    /// What is there of the new part: nothing, or, of a raw image, space or zeros that are written
    #[arg(long, default_value = "off", value_parser = ["off", "metadata", "falloc", "full"])]
    pub(crate) preallocation: String,
    /// Take the image to have this format; only needed for raw ones
    #[arg(short, long, value_parser = format)]
    pub(crate) format: Option<FileFormat>,
    /// Show what would be done, and stop
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Shrink without asking
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// How many threads read and change tables
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) read: OpenArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BitmapArgs {
    #[command(subcommand)]
    pub(crate) command: BitmapCommand,
    /// Print exact sizes
    #[arg(long, global = true)]
    pub(crate) bytes: bool,
    /// Print one JSON document: the bitmaps, as they are afterwards
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What is done with bitmaps.
#[derive(Debug, Subcommand)]
pub(crate) enum BitmapCommand {
    /// Show the bitmaps of an image
    List {
        /// The image
        #[arg(value_name = "IMG")]
        image: PathBuf,
        /// Look even while somebody writes
        #[arg(short = 'U', long)]
        force_share: bool,
    },
    /// Add a bitmap, all clear, that records what is written from now on
    Add {
        /// The image
        #[arg(value_name = "IMG")]
        image: PathBuf,
        /// Its name
        name: String,
        /// Guest bytes a bit, a power of two from 512 to 2G; the cluster size, 4k to 64k, if left out
        #[arg(short, long, value_name = "SIZE", value_parser = size)]
        granularity: Option<u64>,
        /// It does not record yet
        #[arg(long)]
        disabled: bool,
    },
    /// Remove a bitmap
    Remove(NamedBitmap),
    /// Let a bitmap record what is written
    Enable(NamedBitmap),
    /// Let a bitmap stop recording
    Disable(NamedBitmap),
    /// Clear all bits of a bitmap
    Clear(NamedBitmap),
    /// Set in a bitmap what is set in another one
    Merge {
        /// The image
        #[arg(value_name = "IMG")]
        image: PathBuf,
        /// The bitmap that changes
        #[arg(value_name = "TARGET")]
        name: String,
        /// The bitmap whose bits are added
        #[arg(long, value_name = "NAME")]
        from: String,
        /// The image that has it, if it is another one
        #[arg(short = 'b', long, value_name = "IMG2")]
        source_file: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NamedBitmap {
    /// The image
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// The bitmap
    pub(crate) name: String,
}

impl BitmapCommand {
    /// The image that is changed or listed.
    pub(crate) fn image(&self) -> &std::path::Path {
        match self {
            Self::List { image, .. } | Self::Add { image, .. } | Self::Merge { image, .. } => image,
            Self::Remove(named) | Self::Enable(named) | Self::Disable(named) | Self::Clear(named) => {
                &named.image
            }
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The node
    #[arg(value_parser = node())]
    pub(crate) name: String,
    /// Delete its descendants too
    #[arg(long, group = "mode")]
    pub(crate) children: bool,
    /// Delete its descendants, but not the node
    #[arg(long, group = "mode")]
    pub(crate) children_only: bool,
    /// Let only the catalog forget the node
    #[arg(long)]
    pub(crate) metadata: bool,
    /// Whose file name survives when two files become one: child, parent, parent=NAME (that child takes it over), or
    /// auto (the file into which the data are copied)
    #[arg(long, default_value = "child", value_name = "WHOSE", value_parser = keep)]
    pub(crate) keep: pleach_engine::Keep,
    /// With --children or --children-only, where current goes too: the new active image of a disk
    #[arg(long = "file", value_name = "DISK=PATH", value_parser = trees::disk_file)]
    pub(crate) files: Vec<(String, PathBuf)>,
    /// With --children: deleting a root, and so the whole tree, is meant
    #[arg(long)]
    pub(crate) yes_everything: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// How progress is shown.
#[derive(Debug, Args)]
pub(crate) struct ProgressArgs {
    /// How to show progress: a bar on a terminal, JSON lines on stderr, or not at all
    #[arg(long = "progress", value_name = "HOW", default_value = "auto", value_parser = shows())]
    pub(crate) show: Show,
}

/// How fast data are copied, and how that is shown.
#[derive(Debug, Args)]
pub(crate) struct PaceArgs {
    /// Write no more than this many bytes a second, such as 50M
    #[arg(long, value_name = "RATE", value_parser = size)]
    pub(crate) bandwidth: Option<u64>,
    /// Threads that copy; one a processor if left out
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

/// How a plan is shown and carried out.
#[derive(Debug, Args)]
pub(crate) struct ActArgs {
    /// Show what would be done, and stop
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Do it without asking
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) pace: PaceArgs,
    /// Print exact sizes
    #[arg(long)]
    pub(crate) bytes: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

/// The same of a plan that can be saved.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) act: ActArgs,
    /// Save the plan in this new file, and stop; "pleach apply FILE" carries it out
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: Option<PathBuf>,
    /// The plan that this must be.
    #[arg(skip)]
    pub(crate) expected: Option<crate::apply::Saved>,
}

impl RunArgs {
    /// Whether anything is to be changed.
    pub(crate) fn changes(&self) -> bool {
        !self.act.dry_run && self.plan.is_none()
    }

    /// How a plan for a tree with a catalog is carried out.
    ///
    /// # Errors
    /// Such plans are not saved, nor compared with one that was.
    pub(crate) fn in_tree(&self) -> pleach_engine::Result<&ActArgs> {
        if self.plan.is_none() && self.expected.is_none() {
            return Ok(&self.act);
        }
        let text = "plans for trees with a catalog can neither be saved nor applied";
        Err(Error::new(ErrorKind::Unsupported, text).hint("-n shows the plan"))
    }
}

impl Command {
    /// How the plan of this command is carried out, if it has one that can be saved.
    pub(crate) fn plan(&mut self) -> Option<&mut RunArgs> {
        match self {
            Self::Delete(args) => Some(&mut args.run),
            Self::Merge(args) => Some(&mut args.run),
            Self::Commit(args) => Some(&mut args.run),
            Self::Squash(args) => Some(&mut args.run),
            Self::Rebase(args) => Some(&mut args.run),
            _ => None,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// The saved plan
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// For scripts; a saved plan needs no further word
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    pub(crate) pace: PaceArgs,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The uppermost image of the run, whose content stays
    pub(crate) top: PathBuf,
    /// The lowermost image of the run
    #[arg(long, value_name = "BASE")]
    pub(crate) into: PathBuf,
    /// Whose file name survives: top, base, or auto (the file into which the data are copied)
    #[arg(long, default_value = "base", value_name = "WHOSE", value_parser = keep_of_run)]
    pub(crate) keep: pleach_engine::Keep,
    /// What the result is called instead: a name that no file has. A bare one lies beside BASE
    #[arg(long, value_name = "FILE")]
    pub(crate) name: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) bitmaps: BitmapsArgs,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What becomes of the bitmaps of files that become one.
#[derive(Debug, Args)]
pub(crate) struct BitmapsArgs {
    /// What becomes of persistent bitmaps: merge (those of one name become one, which misses no change), keep-top (only
    /// those of the uppermost image stay), or drop
    #[arg(long = "bitmaps", default_value = "merge", value_name = "HOW", value_parser = bitmap_policy())]
    pub(crate) policy: BitmapPolicy,
}

#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// The image, which reads the same afterwards
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// The image below it that gets what it holds, and what those between hold, which go; its backing file if left out
    #[arg(long, value_name = "BASE")]
    pub(crate) into: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) bitmaps: BitmapsArgs,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SquashArgs {
    #[command(flatten)]
    pub(crate) on: TargetArgs,
    /// The first snapshot of the run
    #[arg(value_parser = node())]
    pub(crate) first: String,
    /// The last one, which stands on it, directly or not, and whose content and name stay
    #[arg(value_parser = node())]
    pub(crate) last: String,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    /// The image
    #[arg(value_name = "IMG")]
    pub(crate) image: PathBuf,
    /// What it is to stand on: a file, named from the image's directory or from here; or "none"
    #[arg(long, value_name = "BASE")]
    pub(crate) onto: PathBuf,
    /// Change only the name in the header; you know that the content stays the same
    #[arg(long = "unsafe")]
    pub(crate) unchecked: bool,
    /// The format of BASE, if it is not what its first bytes say
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = format)]
    pub(crate) backing_format: Option<FileFormat>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
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

/// The whole command line, for those who describe it.
pub(crate) fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Reads the arguments of this process.
pub(crate) fn parse() -> Result<Command, Failure> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    Cli::try_parse().map(|cli| cli.command).map_err(|error| match error.kind() {
        DisplayHelp | DisplayVersion => {
            let text = error.render();
            let plain = !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some();
            Failure::Help(if plain { text.to_string() } else { text.ansi().to_string() })
        }
        _ => Failure::Usage {
            text: error.render().to_string(),
            json: std::env::args_os().any(|a| a == "--json"),
        },
    })
}

/// Reads the words of a saved plan.
pub(crate) fn parse_words(words: &[String]) -> Option<Command> {
    let program = std::iter::once("pleach");
    Cli::try_parse_from(program.chain(words.iter().map(String::as_str))).ok().map(|cli| cli.command)
}

fn format(text: &str) -> Result<FileFormat, String> {
    match text {
        "qcow2" => Ok(FileFormat::Qcow2),
        "raw" => Ok(FileFormat::Raw),
        _ => Err("must be qcow2 or raw".to_owned()),
    }
}

fn shows() -> impl TypedValueParser<Value = Show> {
    PossibleValuesParser::new(["auto", "json", "none"]).map(|text| Show::of(&text))
}

fn bitmap_policy() -> impl TypedValueParser<Value = BitmapPolicy> {
    PossibleValuesParser::new(["merge", "keep-top", "drop"]).map(|text| match text.as_str() {
        "keep-top" => BitmapPolicy::KeepTop,
        "drop" => BitmapPolicy::Drop,
        _ => BitmapPolicy::Merge,
    })
}

fn size(text: &str) -> Result<u64, String> {
    crate::size::parse(text).ok_or_else(|| "must be a size such as 10G".to_owned())
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

fn keep_of_run(text: &str) -> Result<pleach_engine::Keep, String> {
    use pleach_engine::Keep;
    match text {
        "top" => Ok(Keep::Child),
        "base" => Ok(Keep::Parent(None)),
        "auto" => Ok(Keep::Auto),
        _ => Err("must be top, base or auto".to_owned()),
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
