//! The images that documents name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pleach_engine::Result;
use pleach_engine::survey::{Backing, FileFormat, Survey, Trust};
use pleach_libvirt::ImageFacts;
use pleach_store::{Disk, FileKind, RealDisk};

use crate::target::directory;

/// What the directories of some files hold.
pub(crate) struct Images {
    survey: Survey,
}

impl Images {
    /// Looks at all images in the directories of `files`; directories that are not there are passed over.
    pub(crate) fn around<'a>(files: impl Iterator<Item = &'a str>) -> Result<Self> {
        let directories: BTreeSet<PathBuf> = files.map(|file| directory(Path::new(file))).collect();
        let is_there =
            |path: &PathBuf| RealDisk.stat(path).is_ok_and(|stat| stat.kind == FileKind::Directory);
        let directories: Vec<PathBuf> = directories.into_iter().filter(is_there).collect();
        let trust = Trust::default();
        Ok(Self { survey: Survey::of_directories(&RealDisk, &directories, &trust)? })
    }

    /// Whether there is such a file.
    pub(crate) fn has(&self, path: &str) -> bool {
        RealDisk.stat(Path::new(path)).is_ok()
    }

    /// The format of a file that is there: what is no qcow2 image is raw.
    pub(crate) fn format(&self, path: &str) -> Option<String> {
        let path = Path::new(path);
        RealDisk.stat(path).ok()?;
        let file = self.survey.find(&RealDisk, path).and_then(|place| self.survey.files.get(place));
        Some(file.map_or(FileFormat::Raw, |file| file.format).name().to_owned())
    }

    /// The id of the one internal snapshot of that name.
    pub(crate) fn snapshot_id(&self, path: &str, name: &str) -> Option<String> {
        let place = self.survey.find(&RealDisk, Path::new(path))?;
        let mut all =
            self.survey.files.get(place)?.snapshots.iter().filter(|one| one.name == name.as_bytes());
        let (first, second) = (all.next()?, all.next());
        second.is_none().then(|| String::from_utf8_lossy(&first.id).into_owned())
    }

    /// Every image, by its path behind all links.
    pub(crate) fn facts(&self) -> Vec<(String, ImageFacts)> {
        let real =
            |path: &Path| RealDisk.canonical(path).unwrap_or_else(|_| path.to_owned()).display().to_string();
        let mut all = Vec::new();
        for file in &self.survey.files {
            let backing = match &file.backing {
                Backing::File(place) => self.survey.files.get(*place).map(|one| real(&one.path)),
                Backing::Broken { name, .. } => Some(name.clone()),
                Backing::None => None,
            };
            let named = file.header.as_ref().and_then(|header| header.backing()).map(|backing| &backing.name);
            all.push((
                real(&file.path),
                ImageFacts {
                    format: file.format.name().to_owned(),
                    backing,
                    is_relative: named.is_some_and(|name| !name.starts_with(b"/")),
                    snapshots: file
                        .snapshots
                        .iter()
                        .map(|one| String::from_utf8_lossy(&one.name).into_owned())
                        .collect(),
                },
            ));
        }
        all
    }
}
