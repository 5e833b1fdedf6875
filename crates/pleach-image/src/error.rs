//! What can go wrong with an image.

use std::io;
use std::path::PathBuf;

use pleach_alloc::AllocError;
use pleach_format::FormatError;
use pleach_store::NewFileError;

/// An image that cannot be read or changed, and why. The caller knows the file's name and adds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The system failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A structure breaks the format.
    #[error("bad {structure}{}", at(.offset))]
    Format {
        /// Which structure.
        structure: &'static str,
        /// Where it is, if known.
        offset: Option<u64>,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A pointer leads out of the file.
    #[error("{structure} at {offset:#x} (+{length}) lies outside the file, which has {file_length} bytes")]
    Outside {
        /// What the pointer leads to.
        structure: &'static str,
        /// Where.
        offset: u64,
        /// How long it would be.
        length: u64,
        /// Length of the file.
        file_length: u64,
    },
    /// The image uses something that is not handled.
    #[error("{feature} is not supported")]
    Unsupported {
        /// QEMU's name of the feature.
        feature: &'static str,
    },
    /// Guest data is in an external data file that was not given.
    #[error("guest data is in {}, which was not opened", data_file(.name))]
    DataFile {
        /// The name in the header, escaped, if there is one.
        name: Option<String>,
    },
    /// A data file was given for an image that has its data in itself.
    #[error("a data file was given, but the image has no external data file")]
    NoDataFile,
    /// No internal snapshot has that id or name.
    #[error("no internal snapshot has the id or the name \"{name}\"")]
    NoSnapshot {
        /// What was asked for, escaped.
        name: String,
    },
    /// More than one internal snapshot is meant.
    #[error("{} internal snapshots are called \"{name}\", with the ids {}; give an id that only one has", .ids.len(), .ids.join(", "))]
    AmbiguousSnapshot {
        /// What was asked for, escaped.
        name: String,
        /// The ids of those that are meant, escaped.
        ids: Vec<String>,
    },
    /// A compressed cluster does not decompress to one cluster.
    #[error("the compressed cluster for guest offset {guest:#x} at {offset:#x} is damaged")]
    Compressed {
        /// Guest offset of the cluster.
        guest: u64,
        /// Where its data start.
        offset: u64,
    },
    /// The image says of itself that it needs repair before it may be written.
    #[error("the image is marked {mark}; repair it first (pleach check --repair all)")]
    NeedsRepair {
        /// `dirty` or `corrupt`.
        mark: &'static str,
    },
    /// Something refers to a cluster more often than its refcount says.
    #[error(
        "the refcount of cluster {cluster} is {stored}, but {references} pointers lead there; repair the image first \
         (pleach check --repair all)"
    )]
    Refcount {
        /// Host cluster index.
        cluster: u64,
        /// Count as stored.
        stored: u64,
        /// Pointers found.
        references: u64,
    },
    /// A pointer breaks the format or leads out of the file.
    #[error("the image is damaged: {what}; repair it first (pleach check --repair all)")]
    Damaged {
        /// What is wrong.
        what: String,
        /// Where, if known.
        offset: Option<u64>,
    },
    /// Something that a repair cannot mend.
    #[error("this cannot be repaired: {what}")]
    CannotRepair {
        /// What it is.
        what: String,
    },
    /// An undo file that is damaged, or that belongs to another image.
    #[error("the undo file cannot be used: {what}")]
    Undo {
        /// What is wrong.
        what: String,
    },
    /// The file is no longer what was looked at before.
    #[error("the image was changed by somebody else meanwhile: {what}")]
    Changed {
        /// What differs.
        what: &'static str,
    },
    /// A range that is not on the disk.
    #[error("{length} bytes at {offset} are not on the disk, which has {size}")]
    BeyondEnd {
        /// First guest byte.
        offset: u64,
        /// How many.
        length: u64,
        /// Virtual size.
        size: u64,
    },
    /// The image has no bitmap of that name.
    #[error("there is no bitmap \"{name}\"")]
    NoBitmap {
        /// What was asked for, escaped.
        name: String,
    },
    /// Something that this image cannot do, or that would lose something.
    #[error("{what}")]
    Refused {
        /// What, why, and what to do instead.
        what: String,
    },
    /// A write failed before, so nobody knows what the file holds: open the image again.
    #[error("an earlier write to the image failed; open it again")]
    Failed,
    /// A new file could not be made, or not be given its name.
    #[error("cannot make \"{}\"", .path.display())]
    NewFile {
        /// Its name.
        path: PathBuf,
        /// Why.
        source: NewFileError,
    },
    /// Another layer of the chain is the one that cannot be read.
    #[error("{}: {source}", .path.display())]
    InLayer {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ImageError>,
    },
    /// Refcounts could not be read or changed.
    #[error(transparent)]
    Alloc(#[from] AllocError),
}

fn at(offset: &Option<u64>) -> String {
    offset.map_or_else(String::new, |o| format!(" at {o:#x}"))
}

fn data_file(name: &Option<String>) -> String {
    name.as_ref()
        .map_or_else(|| "an external data file".to_owned(), |n| format!("the external data file \"{n}\""))
}

impl ImageError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    pub(crate) fn format(structure: &'static str, offset: Option<u64>) -> impl FnOnce(FormatError) -> Self {
        move |source| Self::Format { structure, offset, source }
    }

    /// The host offset that the error is about, where there is one.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Format { offset, .. } | Self::Damaged { offset, .. } => *offset,
            Self::Outside { offset, .. } | Self::Compressed { offset, .. } => Some(*offset),
            _ => None,
        }
    }
}
