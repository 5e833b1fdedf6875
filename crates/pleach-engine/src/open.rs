//! Opening the files of a survey, each once, locked for what it will be used for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use pleach_format::RunList;
use pleach_image::{Chain, Image, Layer, RawImage};
use pleach_plan::Overlay;
use pleach_store::{Access, Disk, Role};
use rayon::prelude::*;

use crate::scan::{fold, layer_runs, pieces_of};
use crate::survey::{FileFormat, Survey, SurveyFile};
use crate::{Error, ErrorKind, Result};

/// Open files, by index into [`Survey::files`].
///
/// Locks belong to the open file: every file is opened once, for the strongest role that it will have.
#[derive(Debug)]
pub struct OpenFiles {
    layers: BTreeMap<usize, OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    layer: Arc<Layer>,
    /// What it said when it was first asked.
    runs: OnceLock<RunList>,
}

impl OpenFiles {
    /// Opens and locks files in a fixed order, and makes sure that they still are what the survey saw.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if another process excludes the role; a file that changed since the survey.
    pub fn open(disk: &dyn Disk, survey: &Survey, roles: &BTreeMap<usize, Role>) -> Result<Self> {
        let mut layers = BTreeMap::new();
        for (&index, &role) in roles {
            let Some(file) = survey.files.get(index) else { continue };
            let layer = Arc::new(open_one(disk, file, role)?);
            layers.insert(index, OpenFile { path: file.path.clone(), layer, runs: OnceLock::new() });
        }
        Ok(Self { layers })
    }

    /// One open file.
    ///
    /// # Panics
    /// If the file was not among those opened, which is a defect of the caller.
    pub fn layer(&self, index: usize) -> &Arc<Layer> {
        &self.entry(index).layer
    }

    /// Every file, with its path.
    pub(crate) fn all(&self) -> Vec<(&Path, &Layer)> {
        self.layers.values().map(|file| (file.path.as_path(), &*file.layer)).collect()
    }

    fn entry(&self, index: usize) -> &OpenFile {
        self.layers.get(&index).expect("opened with the others")
    }

    /// What a file says about its whole disk; read once.
    ///
    /// # Errors
    /// As [`layer_runs`].
    pub fn runs(&self, index: usize) -> Result<&RunList> {
        let entry = self.entry(index);
        if let Some(runs) = entry.runs.get() {
            return Ok(runs);
        }
        let runs = layer_runs(&entry.path, &entry.layer)?;
        Ok(entry.runs.get_or_init(|| runs))
    }

    /// Files over each other, top first, folded; each is called by its index. `None` of none.
    ///
    /// # Errors
    /// As [`runs`](Self::runs).
    pub fn overlay(&self, indexes: &[usize]) -> Result<Option<Overlay>> {
        self.folded(indexes, |index, _| index)
    }

    fn folded(&self, indexes: &[usize], name: fn(usize, usize) -> usize) -> Result<Option<Overlay>> {
        let layers: Vec<Overlay> = indexes
            .par_iter()
            .enumerate()
            .map(|(depth, &i)| Ok(Overlay::of_runs(name(i, depth), self.layer(i).size(), self.runs(i)?)))
            .collect::<Result<_>>()?;
        Ok(fold(layers))
    }

    /// The chain of files `indexes`, top first, as they are now; with an index.
    ///
    /// # Errors
    /// As [`runs`](Self::runs).
    pub fn chain(&self, indexes: &[usize]) -> Result<Chain> {
        let layer = |&i: &usize| (self.entry(i).path.clone(), Arc::clone(self.layer(i)));
        let chain = Chain::with_paths(indexes.iter().map(layer).collect());
        Ok(match self.folded(indexes, |_, depth| depth)? {
            Some(overlay) => chain.with_index(pieces_of(&overlay)),
            None => chain,
        })
    }
}

/// Opens one file of a survey.
///
/// # Errors
/// As [`OpenFiles::open`].
pub fn open_one(disk: &dyn Disk, file: &SurveyFile, role: Role) -> Result<Layer> {
    let access = if role == Role::Write { Access::Write } else { Access::Read };
    let path = &file.path;
    let store = disk.open(path, access).map_err(|e| Error::io("open the image", path, e))?;
    store.lock(role).map_err(|e| Error::locked(path, e))?;
    let stat = store.stat().map_err(|e| Error::io("look at the image", path, e))?;
    if stat.id != file.stat.id {
        return Err(changed(path, "another file has its name now"));
    }
    match file.format {
        FileFormat::Raw => RawImage::open(store).map(Layer::Raw).map_err(|e| Error::image(path, e)),
        FileFormat::Qcow2 => {
            let image = Image::open(store).map_err(|e| Error::image(path, e))?;
            if file.header.as_ref() != Some(image.header()) {
                return Err(changed(path, "its header is another"));
            }
            Ok(Layer::Qcow2(image))
        }
    }
}

fn changed(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Failed, format!("the image was changed by somebody else meanwhile: {what}"))
        .at(path)
        .hint("try again")
}
