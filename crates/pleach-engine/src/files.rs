//! The open files of an operation: which of them may be written, and what their headers have room for.

use pleach_format::{BackingFile, rewrite_backing};
use pleach_image::{Chain, Image, leaked_with};
use pleach_plan::{Need, Target};
use pleach_store::Disk;

use crate::carry::{bytes_written, carried};
use crate::delete::Work;
use crate::open::OpenFiles;
use crate::survey::{Survey, SurveyFile};
use crate::{Error, ErrorKind, Result, Threads};

/// Files by index into the survey.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Files<'a> {
    pub(crate) disk: &'a dyn Disk,
    pub(crate) survey: &'a Survey,
    pub(crate) open: &'a OpenFiles,
}

impl<'a> Files<'a> {
    pub(crate) fn file(&self, index: usize) -> &'a SurveyFile {
        self.survey.files.get(index).expect("indexes come from the survey")
    }

    /// The qcow2 image that stands on another file.
    ///
    /// # Errors
    /// A raw file.
    pub(crate) fn image(&self, index: usize) -> Result<&'a Image> {
        let path = &self.file(index).path;
        self.open
            .layer(index)
            .image()
            .ok_or_else(|| Error::new(ErrorKind::Failed, "a raw file cannot stand on another one").at(path))
    }

    /// A target that may be written: not marked as damaged, no count too low.
    ///
    /// # Errors
    /// What keeps it from being written.
    pub(crate) fn writable(&self, index: usize) -> Result<&'a Image> {
        let image = self.image(index)?;
        image
            .check_mergeable()
            .and_then(|()| leaked_with(image, &Threads).map(drop))
            .map_err(|e| Error::image(&self.file(index).path, e))?;
        Ok(image)
    }

    /// Refuses a backing file name for which there is no room in the header of `file`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub(crate) fn must_fit(&self, file: usize, backing: Option<&BackingFile>) -> Result<()> {
        let (path, head) = (&self.file(file).path, self.image(file)?.head());
        rewrite_backing(&head.bytes, &head.header, backing).map(drop).map_err(|e| {
            Error::new(ErrorKind::Unsupported, "its header has no room for its new backing file's name")
                .at(path)
                .hint("move the images closer together, or use a shorter path")
                .caused(e)
        })
    }

    /// How many bytes of `needs`, which `target` takes from `chain`, its file system will share instead of writing.
    ///
    /// # Errors
    /// Damage in the tables that are met.
    pub(crate) fn clonable(
        &self,
        target: usize,
        chain: &Chain,
        shape: Target,
        needs: &[Need],
    ) -> Result<u64> {
        crate::execute::clonable(self.image(target)?, chain, shape, needs)
            .map_err(|e| Error::image(&self.file(target).path, e))
    }
    /// The work of letting `target` take settled `needs` from `chain`, and the guest bytes that it writes as data.
    ///
    /// # Errors
    /// Damage in the tables or compressed clusters that are met.
    pub(crate) fn clusters(
        &self,
        target: usize,
        chain: &Chain,
        shape: Target,
        needs: Vec<Need>,
    ) -> Result<(Work, u64)> {
        let image = self.image(target)?;
        let carried =
            carried(image, chain, shape, &needs).map_err(|e| Error::image(&self.file(target).path, e))?;
        let written = bytes_written(image, shape, &needs, &carried);
        Ok((Work::Clusters { shape, needs, carried }, written))
    }
}
