//! What TARGET means: which directories are searched, and which image was pointed at.

use std::path::{Path, PathBuf};

use pleach_engine::catalog::Catalog;
use pleach_engine::family::{Family, ONLY_DISK, State, shown};
use pleach_engine::survey::{Backing, Survey, Trust, broken};
use pleach_engine::tree::Tree;
use pleach_engine::{Error, ErrorKind, Result};
use pleach_lineage::{NodeId, Reads, order};
use pleach_store::{Disk, FileKind, RealDisk};

use crate::args::TargetArgs;

/// A directory of images, one image in it, or a catalog.
pub(crate) struct Target {
    /// Where images are looked for.
    pub(crate) directories: Vec<PathBuf>,
    /// The directory that file names are shown relative to.
    pub(crate) base: PathBuf,
    /// The image that was pointed at, if it was one.
    pub(crate) image: Option<PathBuf>,
    /// The catalogs that may be meant: the one that was pointed at, or those of the directory.
    pub(crate) catalogs: Vec<PathBuf>,
    /// Further directories that are searched.
    also: Vec<PathBuf>,
}

impl Target {
    /// Finds out what was named on the command line.
    pub(crate) fn named(args: &TargetArgs) -> Result<Self> {
        Self::of(&args.target, &args.place.also)
    }

    /// Finds out what `path` is.
    pub(crate) fn of(path: &Path, also: &[PathBuf]) -> Result<Self> {
        let stat = RealDisk.stat(path).map_err(|e| Error::io("find", path, e))?;
        let (base, image) = match stat.kind {
            FileKind::Directory => (path.to_owned(), None),
            FileKind::Regular if path.extension().is_some_and(|e| e == "tree") => {
                let base = directory(&std::path::absolute(directory(path)).unwrap_or_default());
                let directories = std::iter::once(base.clone()).chain(also.iter().cloned()).collect();
                let catalogs = vec![path.to_owned()];
                return Ok(Self { directories, base, image: None, catalogs, also: also.to_vec() });
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
        let catalogs = Catalog::list(&RealDisk, &base)?;
        Ok(Self { directories, base, image, catalogs, also: also.to_vec() })
    }

    /// The trees that are meant: those of the catalogs, or the one that the image belongs to. None where nothing has a
    /// catalog. They stay until the process ends: a large tree takes longer to take apart than to read.
    pub(crate) fn trees(&self, trust: &Trust) -> Result<&'static [Tree]> {
        let load = |path: &PathBuf| Tree::load(&RealDisk, path, &self.also, trust);
        let mut trees = self.catalogs.iter().map(load).collect::<Result<Vec<_>>>()?;
        if let Some(image) = &self.image {
            trees.retain(|tree| tree.has_file(&RealDisk, image));
        }
        Ok(trees.leak())
    }

    /// The one tree that is meant, if anything has a catalog.
    pub(crate) fn tree(&self, trust: &Trust) -> Result<Option<&'static Tree>> {
        let trees = self.trees(trust)?;
        if trees.len() > 1 {
            let names: Vec<String> = trees.iter().map(|t| shown(t.catalog.path(), Path::new(""))).collect();
            return Err(Error::new(ErrorKind::Usage, "several trees may be meant")
                .hint(format!("point at one of {}", names.join(", "))));
        }
        Ok(trees.first())
    }

    /// The one tree that is meant; if nothing has a catalog, the one that would get it, with the only head that there is
    /// as its active image.
    pub(crate) fn tree_or_new(&self, trust: &Trust) -> Result<&'static Tree> {
        if let Some(tree) = self.tree(trust)? {
            return Ok(tree);
        }
        let active = self.only_head(trust)?;
        let stem = active.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = free_tree(&self.base, &stem);
        if Catalog::list(&RealDisk, &self.base)? != self.catalogs {
            return Err(Error::new(
                ErrorKind::InUse,
                "somebody else has made or removed a catalog meanwhile",
            )
            .at(&self.base)
            .hint("try again"));
        }
        let disks = [(ONLY_DISK.to_owned(), active)];
        Ok(Box::leak(Box::new(Tree::adopt(&RealDisk, &self.base, &name, &disks, &self.also, trust)?)))
    }

    /// The tree that would get a catalog for the sake of `image`; it has an active image if there is only one head.
    pub(crate) fn tree_around(&self, image: &Path, trust: &Trust) -> Result<&'static Tree> {
        match self.tree_or_new(trust) {
            Err(error) if error.kind == ErrorKind::Usage => {
                let stem = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let seed = (ONLY_DISK.to_owned(), image.to_owned());
                let name = free_tree(&self.base, &stem);
                let tree = Tree::adopt_branches(&RealDisk, &self.base, &name, seed, &self.also, trust)?;
                Ok(Box::leak(Box::new(tree)))
            }
            tree => tree,
        }
    }

    /// The image that a machine would write to: the one that was pointed at, or the only head.
    fn only_head(&self, trust: &Trust) -> Result<PathBuf> {
        if let Some(image) = &self.image
            && self.survey_all(trust)?.find(&RealDisk, image).is_none()
        {
            // Nothing stands on it, and it is no qcow2 image: the user says that it is one.
            return Ok(image.clone());
        }
        let survey = self.survey(trust)?;
        let family = self.family(&survey)?;
        let node = self
            .image
            .as_ref()
            .and_then(|path| survey.find(&RealDisk, path))
            .and_then(|index| family.node_of_file(index));
        let inside = node.map(|node| family.tree_of(node));
        let heads: Vec<NodeId> =
            family.heads().filter(|id| inside.as_ref().is_none_or(|all| all.contains(id))).collect();
        if let Some(node) = node.filter(|node| heads.contains(node)) {
            return Ok(self.path_of_node(&survey, &family, node));
        }
        match heads.as_slice() {
            [] => Err(Error::new(ErrorKind::NotFound, "there is no image that a machine could write to")
                .at(&self.base)),
            [one] => Ok(self.path_of_node(&survey, &family, *one)),
            several => {
                let names: Vec<String> = several
                    .iter()
                    .map(|&id| shown(&self.path_of_node(&survey, &family, id), &self.base))
                    .collect();
                Err(Error::new(ErrorKind::Usage, "several images may be the one that the machine writes to")
                    .hint(format!("point at one of {}", names.join(", "))))
            }
        }
    }

    fn survey_all(&self, trust: &Trust) -> Result<Survey> {
        Survey::of_directories(&RealDisk, &self.directories, trust)
    }

    fn path_of_node(&self, survey: &Survey, family: &Family, node: NodeId) -> PathBuf {
        let index = match family.state(node) {
            Some(State::File(index) | State::Snapshot(index, _)) => index,
            None => usize::MAX,
        };
        survey.files.get(index).map(|f| f.path.clone()).unwrap_or_default()
    }

    /// Looks at all images there.
    pub(crate) fn survey(&self, trust: &Trust) -> Result<Survey> {
        let survey = self.survey_all(trust)?;
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
        let image = self.image.as_ref().and_then(|path| survey.find(&RealDisk, path));
        Family::around(survey, &self.base, image)
    }
}

/// A name for a tree that no catalog has.
pub(crate) fn free_tree(base: &Path, stem: &str) -> String {
    let usable = Catalog::place(base, stem).is_ok();
    let stem = if usable { stem } else { "tree" };
    let taken = |name: &str| Catalog::place(base, name).is_ok_and(|path| RealDisk.stat(&path).is_ok());
    let numbered = (2..10_000).map(|n| format!("{stem}-{n}"));
    std::iter::once(stem.to_owned()).chain(numbered).find(|name| !taken(name)).unwrap_or(stem.to_owned())
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
