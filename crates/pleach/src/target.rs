//! What TARGET means: which directories are searched, and which image was pointed at.

use std::path::{Path, PathBuf};

use pleach_engine::family::Family;
use pleach_engine::survey::{Backing, Survey, Trust, broken};
use pleach_engine::{Error, ErrorKind, Result};
use pleach_lineage::{Reads, order};
use pleach_store::{Disk, FileKind, RealDisk};

/// A directory of images, or one image in it.
pub(crate) struct Target {
    /// Where images are looked for.
    pub(crate) directories: Vec<PathBuf>,
    /// The directory that file names are shown relative to.
    pub(crate) base: PathBuf,
    /// The image that was pointed at, if it was one.
    pub(crate) image: Option<PathBuf>,
}

impl Target {
    /// Finds out what `path` is.
    pub(crate) fn of(path: &Path, also: &[PathBuf]) -> Result<Self> {
        let stat = RealDisk.stat(path).map_err(|e| Error::io("find", path, e))?;
        let (base, image) = match stat.kind {
            FileKind::Directory => (path.to_owned(), None),
            FileKind::Regular if path.extension().is_some_and(|e| e == "tree") => {
                return Err(Error::new(ErrorKind::Unsupported, "catalogs are not supported").at(path));
            }
            // A link's image lives where the link leads.
            FileKind::Regular if RealDisk.is_symlink(path) => {
                let real = RealDisk.canonical(path).map_err(|e| Error::io("find", path, e))?;
                (directory(&real), Some(real))
            }
            FileKind::Regular => (directory(path), Some(path.to_owned())),
            _ => {
                return Err(
                    Error::new(ErrorKind::Failed, "is neither a directory nor a regular file").at(path)
                );
            }
        };
        let directories = std::iter::once(base.clone()).chain(also.iter().cloned()).collect();
        Ok(Self { directories, base, image })
    }

    /// Looks at all images there.
    pub(crate) fn survey(&self, trust: &Trust) -> Result<Survey> {
        let survey = Survey::of_directories(&RealDisk, &self.directories, trust)?;
        if let Some(image) = &self.image
            && survey.find(&RealDisk, image).is_none()
        {
            let found = survey.broken.into_iter().find(|b| b.path == *image).map(|b| b.error);
            return Err(found.unwrap_or_else(|| {
                Error::new(ErrorKind::NotFound, "is not a qcow2 image, and no image is backed by it")
                    .at(image)
            }));
        }
        Ok(survey)
    }

    /// The nodes of a survey.
    pub(crate) fn family(&self, survey: &Survey) -> Result<Family> {
        Family::of(survey, &self.base)
    }
}

/// The directory that a file lies in.
pub(crate) fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Everything that is wrong with the links between images.
pub(crate) fn problems(survey: &Survey) -> Vec<Error> {
    let mut found = Vec::new();
    for file in &survey.files {
        if let Backing::Broken { name, why, .. } = &file.backing {
            found.push(broken(&file.path, name, *why));
        }
    }
    let reads: Vec<Reads<usize>> = survey
        .files
        .iter()
        .enumerate()
        .filter_map(|(reader, f)| match f.backing {
            Backing::File(read) => Some(Reads { reader, read }),
            _ => None,
        })
        .collect();
    for cycle in order::cycles(&reads) {
        let paths: Vec<String> = cycle
            .iter()
            .filter_map(|&i| survey.files.get(i))
            .map(|f| format!("\"{}\"", f.path.display()))
            .collect();
        let error =
            Error::new(ErrorKind::Failed, format!("the backing files form a loop: {}", paths.join(", ")))
                .hint("give one of them its right backing file (qemu-img rebase -u)");
        found.push(match cycle.first().and_then(|&i| survey.files.get(i)) {
            Some(file) => error.at(&file.path),
            None => error,
        });
    }
    found
}
