//! Repairing an image where it lies, with the way back beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_format::Incompatible;
use pleach_image::{RepairMode, RepairPlan, plan_repair, read_head, undo};
use pleach_store::{Access, Disk, Role, Store};

use crate::{Error, ErrorKind, Result, Threads};

/// A planned repair of a locked image.
#[derive(Debug)]
pub struct Repair {
    path: PathBuf,
    store: Arc<dyn Store>,
    plan: RepairPlan,
}

impl Repair {
    /// Locks the image at `path`, for writing unless it is only to be planned, and plans its repair.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`]; [`ErrorKind::Corrupt`] for damage that cannot be repaired; what the system says.
    pub fn plan(disk: &dyn Disk, path: &Path, mode: RepairMode, only_plan: bool) -> Result<Self> {
        let (access, role) =
            if only_plan { (Access::Read, Role::Read) } else { (Access::Write, Role::Write) };
        let store = open(disk, path, access, role)?;
        let plan = plan_repair(&store, mode, &Threads).map_err(|e| Error::image(path, e))?;
        Ok(Self { path: path.to_owned(), store, plan })
    }

    /// What will be done.
    pub fn what(&self) -> &RepairPlan {
        &self.plan
    }

    /// Whether the image is marked dirty now.
    pub fn dirty(&self) -> bool {
        read_head(&*self.store).is_ok_and(|head| head.header.incompatible().has(Incompatible::DIRTY))
    }

    /// Writes the undo file, makes it and its name durable, and repairs the image. Returns the undo file's path, or
    /// `None` if there was nothing to write. `stamp` becomes the end of its name: `IMG.undo-STAMP`.
    ///
    /// # Errors
    /// What the system says. Before the undo file is durable nothing has been changed; after that it leads back.
    pub fn run(&self, disk: &dyn Disk, stamp: &str) -> Result<Option<PathBuf>> {
        if self.plan.is_empty() {
            return Ok(None);
        }
        let path = &self.path;
        let (at, file) = self.undo_file(disk, stamp)?;
        let written = self
            .plan
            .undo_file(&*self.store)
            .and_then(|bytes| bytes.write(&*file))
            .map_err(|e| Error::image(&at, e))
            .and_then(|()| {
                let dir = directory(path);
                disk.sync_dir(dir).map_err(|e| Error::io("flush the directory", dir, e))
            });
        if let Err(error) = written {
            // Half an undo file is of no use to anybody; nothing has been changed.
            let _ = disk.unlink(&at);
            return Err(error);
        }
        self.plan.execute(&*self.store).map_err(|e| {
            Error::image(path, e).hint(format!(
                "what was changed so far can be taken back: pleach check --undo {} {}",
                at.display(),
                path.display()
            ))
        })?;
        Ok(Some(at))
    }

    fn undo_file(&self, disk: &dyn Disk, stamp: &str) -> Result<(PathBuf, Arc<dyn Store>)> {
        for number in 1..1000 {
            let mut name = self.path.as_os_str().to_owned();
            name.push(format!(".undo-{stamp}"));
            if number > 1 {
                name.push(format!("-{number}"));
            }
            let at = PathBuf::from(name);
            match disk.create_private(&at) {
                Ok(file) => return Ok((at, file)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io("create the undo file", &at, e)),
            }
        }
        Err(Error::new(ErrorKind::Failed, "there are too many undo files of this moment").at(&self.path))
    }
}

/// Takes back the repair of the image at `path` that left the undo file at `file`, which stays.
///
/// # Errors
/// [`ErrorKind::InUse`]; an undo file that does not fit the image; what the system says.
pub fn undo_repair(disk: &dyn Disk, path: &Path, file: &Path) -> Result<()> {
    let undo_file = disk.open(file, Access::Read).map_err(|e| Error::io("open the undo file", file, e))?;
    let store = open(disk, path, Access::Write, Role::Write)?;
    undo(&*store, &*undo_file).map_err(|e| Error::image(path, e))
}

fn open(disk: &dyn Disk, path: &Path, access: Access, role: Role) -> Result<Arc<dyn Store>> {
    let store = disk.open(path, access).map_err(|e| Error::io("open the image", path, e))?;
    store.lock(role).map_err(|e| Error::locked(path, e))?;
    let mut magic = [0; 4];
    store.read_at(0, &mut magic).map_err(|e| Error::io("read the image", path, e))?;
    if magic != *b"QFI\xfb" {
        return Err(
            Error::new(ErrorKind::Unsupported, "is not a qcow2 image; there is nothing to repair").at(path)
        );
    }
    Ok(store)
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
