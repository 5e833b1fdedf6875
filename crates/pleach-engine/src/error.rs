//! One error for everything that runs: what went wrong, with which file, and what to do next.

use std::io;
use std::path::{Path, PathBuf};

use pleach_alloc::AllocError;
use pleach_format::FormatError;
use pleach_image::{ImageError, NameError};
use pleach_lineage::LineageError;
use pleach_store::{LockError, NewFileError};

/// What sort of failure it is; callers turn it into an exit code.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operation failed.
    Failed,
    /// The request makes no sense as it was put.
    Usage,
    /// An image is damaged.
    Corrupt,
    /// An image is in use by another process.
    InUse,
    /// Something that stays depends on what should go.
    Refused,
    /// No such node, image or snapshot.
    NotFound,
    /// A feature that is not supported.
    Unsupported,
    /// Somebody must confirm first.
    NotConfirmed,
    /// Stopped on request; the state is consistent.
    Interrupted,
}

/// A failure.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What sort.
    pub kind: ErrorKind,
    /// What, which field, which value.
    pub message: String,
    /// The file that it is about.
    pub path: Option<PathBuf>,
    /// Host offset in that file.
    pub offset: Option<u64>,
    /// What to do next.
    pub hint: Option<String>,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure of a kind, with nothing but a message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), path: None, offset: None, hint: None, source: None }
    }

    /// The same failure, about `path`.
    #[must_use]
    pub fn at(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// The same failure, with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The message with all its causes.
    pub fn full(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        text
    }

    pub(crate) fn caused(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// A failure of the system while doing `what` with `path`.
    pub fn io(what: &str, path: &Path, source: io::Error) -> Self {
        let kind =
            if source.kind() == io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Failed };
        let hint = match source.kind() {
            io::ErrorKind::StorageFull => Some("free some space on that file system and try again"),
            io::ErrorKind::PermissionDenied => Some("check the permissions of the file and of its directory"),
            io::ErrorKind::ReadOnlyFilesystem => Some("the file system is mounted read-only"),
            _ => None,
        };
        let mut error = Self::new(kind, format!("cannot {what}")).at(path).caused(source);
        error.hint = hint.map(str::to_owned);
        error
    }

    /// What an image error means for the image at `path`.
    pub fn image(path: &Path, source: ImageError) -> Self {
        if let ImageError::InLayer { path, source } = source {
            return Self::image(&path, *source);
        }
        if let ImageError::Io { what, source } = source {
            return Self::io(what, path, source);
        }
        if let ImageError::NewFile { path, source } = source {
            return Self::new_file(&path, source);
        }
        let kind = match &source {
            ImageError::Unsupported { .. } | ImageError::DataFile { .. } => ErrorKind::Unsupported,
            ImageError::NoSnapshot { .. } | ImageError::NoBitmap { .. } => ErrorKind::NotFound,
            ImageError::NoDataFile | ImageError::AmbiguousSnapshot { .. } => ErrorKind::Usage,
            ImageError::Format {
                source: FormatError::UnknownFeature { .. } | FormatError::HeaderFull { .. },
                ..
            } => ErrorKind::Unsupported,
            // A count that does not fit its width: nothing is damaged, the image is just made for fewer references.
            ImageError::Alloc(AllocError::Format(FormatError::OutOfRange { field: "refcount", .. })) => {
                ErrorKind::Unsupported
            }
            ImageError::NeedsRepair { .. }
            | ImageError::Changed { .. }
            | ImageError::Undo { .. }
            | ImageError::Refused { .. }
            | ImageError::BeyondEnd { .. }
            | ImageError::Failed => ErrorKind::Failed,
            _ => ErrorKind::Corrupt,
        };
        let offset = source.offset();
        let mut error = Self::new(kind, source.to_string()).at(path);
        error.offset = offset;
        if matches!(source, ImageError::DataFile { .. }) {
            error = error.hint("if it may be opened, name it: --allow-data-file PATH");
        }
        // The message is the image error's own; what caused that comes next.
        if let ImageError::Format { source, .. } = source {
            error = error.caused(source);
        }
        error
    }

    /// Why the new file `path` is not there.
    pub(crate) fn new_file(path: &Path, source: NewFileError) -> Self {
        let text = source.to_string();
        let kind = match &source {
            NewFileError::NoName => ErrorKind::Usage,
            NewFileError::InUse { .. } => ErrorKind::InUse,
            _ => ErrorKind::Failed,
        };
        let error = Self::new(kind, text).at(path);
        match source {
            NewFileError::Io { what, source } => Self::io(what, path, source),
            NewFileError::Exists => {
                error.hint("nothing is overwritten; remove the file first, or choose another name")
            }
            NewFileError::InTheWay { .. } => error.hint("look at that file, and remove or rename it"),
            NewFileError::InUse { .. } => error.hint("wait until that has ended"),
            _ => error,
        }
    }

    /// Following the backing file of `path` leads back to `back`.
    pub(crate) fn looping(path: &Path, back: &Path) -> Self {
        let text = format!("the backing files form a loop: back at \"{}\"", back.display());
        Self::new(ErrorKind::Failed, text)
            .at(path)
            .hint("give one of them its right backing file (qemu-img rebase -u)")
    }

    /// What a refused lock on the image at `path` means.
    pub fn locked(path: &Path, source: LockError) -> Self {
        match source {
            LockError::InUse { .. } => Self::new(ErrorKind::InUse, format!("the image is {source}"))
                .at(path)
                .hint("stop the virtual machine or tool that uses it, then try again"),
            other => Self::new(ErrorKind::Failed, "cannot lock the image").at(path).caused(other),
        }
    }
}

impl From<NameError> for Error {
    fn from(source: NameError) -> Self {
        Self::new(ErrorKind::Unsupported, source.to_string())
    }
}

impl From<LineageError> for Error {
    fn from(source: LineageError) -> Self {
        Self::new(ErrorKind::Failed, source.to_string())
    }
}
