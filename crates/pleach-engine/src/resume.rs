//! Finishing what was interrupted. The images say how far it got; the journal says what was meant.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_image::{Image, backing_path, read_head};
use pleach_store::{Access, Disk, FileId, Role, Store};

use crate::bitmaps::BitmapPolicy;
use crate::delete::{Decided, DeletePlan, Keep, Prepared, plan_single};
use crate::execute::{drop_first_name, go_on, nobody_reads, second_name, switch_backing};
use crate::journal::{
    Contents, Intent, Journal, JournalImage, NewBacking, STEPS, clear_unbegun, directory_of, pending,
};
use crate::leaks::{cover_counted, give_back};
use crate::merge::{Run, plan_run};
use crate::names::renamed;
use crate::rebase::{Onto, RebaseRequest, plan_rebase};
use crate::steps;
use crate::survey::{FileFormat, Survey, Trust};
use crate::watch::Watch;
use crate::{Error, ErrorKind, Result};

/// What became of one interrupted operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Its journal.
    pub journal: PathBuf,
    /// What was done about it, for people.
    pub what: String,
}

/// Finishes every interrupted operation whose journal lies in one of `directories`.
///
/// May be interrupted itself, at any instant, and run again.
///
/// # Errors
/// What keeps an operation from being finished; its journal stays.
pub fn resume(disk: &dyn Disk, directories: &[PathBuf], watch: &Watch) -> Result<Vec<Resumed>> {
    let mut done = Vec::new();
    for dir in directories {
        let of_trees = |path: &PathBuf| path.extension().is_some_and(|e| e == STEPS);
        let (trees, single): (Vec<PathBuf>, Vec<PathBuf>) =
            pending(disk, dir)?.into_iter().partition(of_trees);
        for path in single {
            let (mut journal, contents) = Journal::reopen(disk, &path)?;
            let what = finish(disk, &mut journal, &contents, watch)?;
            journal.end()?;
            done.push(Resumed { journal: path, what });
        }
        // What such an operation consists of may have had a journal of its own.
        for path in trees {
            let what = steps::resume(disk, &path, watch)?;
            done.push(Resumed { journal: path, what: format!("finished: {what}") });
        }
        clear_unbegun(disk, dir)?;
    }
    Ok(done)
}

/// Takes back every interrupted operation whose journal lies in one of `directories`, as long as nothing that stays was
/// changed by it: what it had copied is given back.
///
/// # Errors
/// [`ErrorKind::Refused`] for an operation that has gone too far; [`resume`] finishes it. Its journal stays.
pub fn undo(disk: &dyn Disk, directories: &[PathBuf]) -> Result<Vec<Resumed>> {
    let mut done = Vec::new();
    for dir in directories {
        let journals = pending(disk, dir)?;
        let of_trees = |path: &PathBuf| path.extension().is_some_and(|e| e == STEPS);
        let in_tree = journals.iter().any(of_trees);
        for path in journals {
            let what = if of_trees(&path) {
                steps::undo(disk, &path)?
            } else if in_tree {
                let text = "the operation is a part of another one, which has begun to change images";
                return Err(Error::new(ErrorKind::Refused, text)
                    .at(path)
                    .hint(format!("finish it: pleach resume {}", dir.display())));
            } else {
                let (journal, contents) = Journal::reopen(disk, &path)?;
                let what = take_back(disk, &contents)?;
                journal.end()?;
                what
            };
            done.push(Resumed { journal: path, what: format!("taken back: {what}") });
        }
        clear_unbegun(disk, dir)?;
    }
    Ok(done)
}

fn take_back(disk: &dyn Disk, contents: &Contents) -> Result<String> {
    mend_headers(disk, contents)?;
    let too_late = |path: &Path, what: &str| {
        Err(Error::new(ErrorKind::Refused, format!("cannot be taken back: {what}"))
            .at(path)
            .hint("finish the operation: pleach resume"))
    };
    match &contents.intent {
        None => Ok("nothing had begun".to_owned()),
        Some(Intent::Remove { files, .. }) => match files.iter().find(|f| here(disk, f).is_none()) {
            Some(gone) => too_late(&gone.path, "the file is gone already"),
            None => Ok("nothing was removed".to_owned()),
        },
        Some(Intent::Rebase { image, onto, unchecked, directories }) => {
            let rebase = RebaseIntent { image, onto: onto.as_ref(), unchecked: *unchecked, directories };
            if here(disk, image).is_none() {
                return Err(not_the_same(&image.path));
            }
            if rebase.is_switched(disk)? {
                return too_late(&image.path, "the image has its new backing file");
            }
            give_back_leaks_of(disk, &image.path)?;
            Ok(format!("\"{}\" stands on what it stood on", image.path.display()))
        }
        Some(Intent::Merge { victim, dependents, between, committed, renamed, name, .. }) => {
            if committed.is_some() {
                return too_late(&victim.path, "the file may hold merged data already");
            }
            if let (Some(name), Some(merged)) = (name, dependents.first())
                && disk.stat(&name.path).is_ok_and(|s| merged.is(&s))
            {
                return too_late(&name.path, "the merged file has its new name");
            }
            for image in between.iter().chain([victim]) {
                if here(disk, image).is_none() {
                    return too_late(&image.path, "the file is gone already");
                }
            }
            let below = between.first().unwrap_or(victim);
            for image in dependents {
                if here(disk, image).is_none() {
                    return Err(not_the_same(&image.path));
                }
                if !names(disk, &image.path, below)? {
                    return too_late(&image.path, "the image does not stand on it any more");
                }
            }
            let second = second_name(name.as_ref().map_or(&victim.path, |name| &name.path));
            let tried = renamed.as_ref().or(dependents.first().filter(|_| name.is_some()));
            if tried.is_some_and(|image| disk.stat(&second).is_ok_and(|s| image.is(&s))) {
                remove(disk, &second)?;
            }
            dependents.iter().try_for_each(|image| give_back_leaks_of(disk, &image.path))?;
            Ok(format!("\"{}\" is what it was", victim.path.display()))
        }
    }
}

/// Whether the header of the image at `path` names `backing`.
fn names(disk: &dyn Disk, path: &Path, backing: &JournalImage) -> Result<bool> {
    let store = disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
    let head = read_head(&*store).map_err(|e| Error::image(path, e))?;
    let named = head.header.backing().and_then(|b| backing_path(path, &b.name).ok());
    Ok(named.and_then(|p| disk.stat(&p).ok()).is_some_and(|s| backing.is(&s)))
}

fn finish(disk: &dyn Disk, journal: &mut Journal<'_>, contents: &Contents, watch: &Watch) -> Result<String> {
    mend_headers(disk, contents)?;
    match &contents.intent {
        None => Ok("nothing had begun".to_owned()),
        Some(Intent::Remove { files, directories }) => {
            let left: Vec<&JournalImage> = files.iter().filter(|f| here(disk, f).is_some()).collect();
            if let Some(other) = files.iter().find(|f| disk.stat(&f.path).is_ok_and(|s| !f.is(&s))) {
                return Err(not_the_same(&other.path));
            }
            // All at once, and held: nobody may use any of them.
            let _locks = left.iter().map(|f| open(disk, &f.path)).collect::<Result<Vec<_>>>()?;
            for file in &left {
                if let Some(id) = here(disk, file) {
                    nobody_reads(disk, directories, id, &[])?;
                    remove(disk, &file.path)?;
                }
            }
            Ok(format!("removed the last {} of {} files", left.len(), files.len()))
        }
        Some(Intent::Merge {
            victim,
            dependents,
            between,
            committed,
            renamed,
            followers,
            name,
            emptied,
            bitmaps,
            directories,
        }) => {
            let merge = MergeIntent {
                victim,
                dependents,
                between,
                committed: committed.as_ref(),
                renamed: renamed.as_ref(),
                followers,
                name: name.as_ref().map(|name| name.path.as_path()),
                emptied: *emptied,
                bitmaps: *bitmaps,
                directories,
            };
            merge.finish(disk, journal, watch)?;
            merge.remove_between(disk)?;
            Ok(match (dependents.as_slice(), between.as_slice()) {
                ([reader], _) if *emptied => {
                    format!("committed \"{}\" to \"{}\"", reader.path.display(), victim.path.display())
                }
                ([reader], [_, ..]) => {
                    format!("merged \"{}\" into \"{}\"", reader.path.display(), victim.path.display())
                }
                _ => format!("deleted \"{}\"", victim.path.display()),
            })
        }
        Some(Intent::Rebase { image, onto, unchecked, directories }) => {
            let rebase = RebaseIntent { image, onto: onto.as_ref(), unchecked: *unchecked, directories };
            rebase.finish(disk, journal, watch)?;
            Ok(match onto {
                Some(onto) => {
                    format!("rebased \"{}\" onto \"{}\"", image.path.display(), onto.path.display())
                }
                None => format!("\"{}\" stands alone", image.path.display()),
            })
        }
    }
}

struct MergeIntent<'a> {
    victim: &'a JournalImage,
    dependents: &'a [JournalImage],
    between: &'a [JournalImage],
    committed: Option<&'a JournalImage>,
    renamed: Option<&'a JournalImage>,
    followers: &'a [JournalImage],
    /// The new name that the merged file gets.
    name: Option<&'a Path>,
    /// The reader stays, empty.
    emptied: bool,
    bitmaps: BitmapPolicy,
    directories: &'a [PathBuf],
}

impl MergeIntent<'_> {
    fn finish(&self, disk: &dyn Disk, journal: &mut Journal<'_>, watch: &Watch) -> Result<()> {
        if let (Some(reader), None) = (self.renamed, self.committed)
            && disk.stat(&self.victim.path).is_ok_and(|s| reader.is(&s))
        {
            return self.finish_taking_the_name(disk, reader, journal);
        }
        let leftover = second_name(self.name.unwrap_or(&self.victim.path));
        if let Some(holder) = self.renamed.or(self.name.and(self.holder()))
            && disk.stat(&leftover).is_ok_and(|s| holder.is(&s))
        {
            remove(disk, &leftover)?;
        }
        if let (Some(name), Some(holder)) = (self.name, self.holder())
            && disk.stat(name).is_ok_and(|s| holder.is(&s))
        {
            return self.finish_giving_the_name(disk, name, journal);
        }
        if !self.emptied && self.names_are_done(disk) {
            return Ok(());
        }
        let Some(victim_id) = here(disk, self.victim) else {
            return Err(not_the_same(&self.victim.path));
        };
        self.give_back_leaks(disk)?;
        let trust = Trust { everything: true, ..Trust::default() };
        let survey = Survey::of_directories(disk, self.directories, &trust)?;
        let victim = survey
            .find_id(victim_id)
            .ok_or_else(|| Error::new(ErrorKind::Failed, "the image cannot be read").at(&self.victim.path))?;
        // An emptied reader may stand on the victim already: those between are read by nobody then.
        let told = self.followers.iter().chain(self.between.iter().filter(|_| self.emptied));
        let decided = Decided {
            committed: self.committed.and_then(|i| here(disk, i)),
            renamed: self.renamed.and_then(|i| here(disk, i)),
            followers: told.filter_map(|i| here(disk, i)).collect::<BTreeSet<_>>(),
            fixed: true,
            bitmaps: self.bitmaps,
        };
        let keep = match (self.name, self.renamed) {
            _ if self.emptied => Keep::Both,
            (Some(name), _) => Keep::Named(name.to_owned()),
            (None, Some(_)) => Keep::Parent(None),
            (None, None) => Keep::Child,
        };
        let top = self.dependents.first().and_then(|d| here(disk, d)).and_then(|id| survey.find_id(id));
        let of_run = self.emptied || self.name.is_some();
        let prepared = match (self.between, top) {
            ([], _) if !of_run => {
                let (open, merges, naming) = plan_single(disk, &survey, victim, &keep, &decided, true)?;
                let single = Some((victim, merges, naming));
                Prepared { plan: DeletePlan { single, ..DeletePlan::default() }, open }
            }
            (_, None) => {
                let path = self.dependents.first().map(|d| d.path.clone()).unwrap_or_default();
                return Err(not_the_same(&path));
            }
            (between, Some(top)) => {
                let left = between.iter().filter_map(|i| here(disk, i)).filter_map(|id| survey.find_id(id));
                let stands_on = survey.chain(top)?;
                let between = left.filter(|i| !self.emptied || stands_on.contains(i)).collect();
                let run = Run { top, base: victim, between };
                plan_run(disk, &survey, &run, &keep, &decided, true)?
            }
        };
        go_on(disk, &survey, &prepared, journal, watch).map(drop)
    }

    /// The file that holds the merged data.
    fn holder(&self) -> Option<&JournalImage> {
        if self.committed.is_some() { Some(self.victim) } else { self.dependents.first() }
    }

    /// The merged file has its new name; its first one, the followers and the other files are left.
    fn finish_giving_the_name(&self, disk: &dyn Disk, name: &Path, journal: &mut Journal<'_>) -> Result<()> {
        let Some(reader) = self.dependents.first() else { return Ok(()) };
        self.tell_followers(disk, reader, name, journal)?;
        let committed = self.committed.is_some();
        if !committed && here(disk, reader).is_some() {
            drop_first_name(disk, self.directories, &reader.path)?;
        }
        if let Some(id) = here(disk, reader).filter(|_| committed) {
            let _lock = open(disk, &reader.path)?;
            nobody_reads(disk, self.directories, id, &[])?;
            remove(disk, &reader.path)?;
        }
        self.remove_between(disk)?;
        match here(disk, self.victim) {
            Some(_) if committed => drop_first_name(disk, self.directories, &self.victim.path),
            Some(id) => {
                let _lock = open(disk, &self.victim.path)?;
                nobody_reads(disk, self.directories, id, &[])?;
                remove(disk, &self.victim.path)
            }
            None => Ok(()),
        }
    }

    /// Files between victim and reader that are left, once nobody reads them.
    fn remove_between(&self, disk: &dyn Disk) -> Result<()> {
        for image in self.between {
            if let Some(id) = here(disk, image) {
                let _lock = open(disk, &image.path)?;
                nobody_reads(disk, self.directories, id, &[])?;
                remove(disk, &image.path)?;
            }
        }
        Ok(())
    }

    /// Whether nothing is left but the journal.
    fn names_are_done(&self, disk: &dyn Disk) -> bool {
        let gone = here(disk, self.victim).is_none();
        match (self.committed, self.renamed) {
            (Some(reader), None) => gone && disk.stat(&reader.path).is_ok_and(|s| self.victim.is(&s)),
            (Some(reader), Some(_)) => !gone && disk.stat(&reader.path).is_err(),
            // A name that is not there proves something only where the other images are.
            (None, _) => {
                disk.stat(&self.victim.path).is_err()
                    && self.dependents.iter().all(|d| here(disk, d).is_some())
            }
        }
    }

    /// The reader's file has the victim's name; its followers and its first name are left.
    fn finish_taking_the_name(
        &self,
        disk: &dyn Disk,
        reader: &JournalImage,
        journal: &mut Journal<'_>,
    ) -> Result<()> {
        self.tell_followers(disk, reader, &self.victim.path, journal)?;
        if here(disk, reader).is_some() {
            drop_first_name(disk, self.directories, &reader.path)?;
        }
        Ok(())
    }

    /// The followers that name the reader's file name `path` from here on.
    fn tell_followers(
        &self,
        disk: &dyn Disk,
        reader: &JournalImage,
        path: &Path,
        journal: &mut Journal<'_>,
    ) -> Result<()> {
        for follower in self.followers {
            let store = open(disk, &follower.path)?;
            let head = read_head(&*store).map_err(|e| Error::image(&follower.path, e))?;
            let old = head.header.backing();
            let named = old.and_then(|b| backing_path(&follower.path, &b.name).ok());
            if named.is_some_and(|p| p.file_name() == reader.path.file_name()) {
                let new = renamed(disk, &follower.path, old, path, FileFormat::Qcow2)?;
                switch_backing(&*store, &follower.path, Some(&new), journal)?;
            }
        }
        Ok(())
    }

    /// Clusters that were counted but not yet used, in every file that was written.
    fn give_back_leaks(&self, disk: &dyn Disk) -> Result<()> {
        let victim = self.committed.map(|_| self.victim);
        for image in self.dependents.iter().chain(victim) {
            if here(disk, image).is_none() {
                continue;
            }
            give_back_leaks_of(disk, &image.path)?;
        }
        Ok(())
    }
}

/// Clusters of one file that were counted but not yet used. A raw file has no counts.
fn give_back_leaks_of(disk: &dyn Disk, path: &Path) -> Result<()> {
    let store = open(disk, path)?;
    let mut magic = [0; 4];
    store.read_at(0, &mut magic).map_err(|e| Error::io("read", path, e))?;
    if magic == *b"QFI\xfb" {
        let wrap = |e| Error::image(path, e);
        let image = Image::open(Arc::clone(&store)).map_err(wrap)?;
        let image = match cover_counted(path, &image)? {
            // What is known of an open image is its length when it was opened.
            true => Image::open(store).map_err(wrap)?,
            false => image,
        };
        give_back(path, &image)?;
    }
    Ok(())
}

struct RebaseIntent<'a> {
    image: &'a JournalImage,
    onto: Option<&'a NewBacking>,
    unchecked: bool,
    directories: &'a [PathBuf],
}

impl RebaseIntent<'_> {
    fn finish(&self, disk: &dyn Disk, journal: &mut Journal<'_>, watch: &Watch) -> Result<()> {
        if here(disk, self.image).is_none() {
            return Err(not_the_same(&self.image.path));
        }
        give_back_leaks_of(disk, &self.image.path)?;
        if self.is_switched(disk)? {
            return Ok(());
        }
        let trust = Trust { everything: true, ..Trust::default() };
        let mut survey = Survey::of_directories(disk, self.directories, &trust)?;
        let onto = match self.onto {
            None => None,
            Some(new) => {
                let format =
                    if new.format == FileFormat::Raw.name() { FileFormat::Raw } else { FileFormat::Qcow2 };
                let file = match &new.file {
                    None => None,
                    Some(file) if here(disk, file).is_none() => return Err(not_the_same(&file.path)),
                    Some(file) => Some(survey.also_file(disk, &file.path, Some(format))?),
                };
                Some(Onto { path: new.path.clone(), absolute: new.absolute, file, format })
            }
        };
        let image = survey
            .find(disk, &self.image.path)
            .ok_or_else(|| Error::new(ErrorKind::Failed, "the image cannot be read").at(&self.image.path))?;
        let request = RebaseRequest { image, onto, unchecked: self.unchecked };
        let prepared = plan_rebase(disk, &survey, &request, true)?;
        go_on(disk, &survey, &prepared, journal, watch).map(drop)
    }

    /// Whether the header names what it is to name.
    fn is_switched(&self, disk: &dyn Disk) -> Result<bool> {
        let path = &self.image.path;
        let store = disk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
        let head = read_head(&*store).map_err(|e| Error::image(path, e))?;
        let (named, wanted) = match (head.header.backing(), self.onto) {
            (None, None) => return Ok(true),
            (Some(named), Some(wanted)) => (named, wanted),
            _ => return Ok(false),
        };
        let real = |p: &Path| {
            disk.canonical(&directory_of(p)).ok().map(|d| d.join(p.file_name().unwrap_or_default()))
        };
        let same = backing_path(path, &named.name).is_ok_and(|p| real(&p) == real(&wanted.path));
        Ok(same && named.format.as_deref() == Some(wanted.format.as_bytes()))
    }
}

fn open(disk: &dyn Disk, path: &Path) -> Result<std::sync::Arc<dyn Store>> {
    let store = disk.open(path, Access::Write).map_err(|e| Error::io("open the image", path, e))?;
    store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
    Ok(store)
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<()> {
    disk.unlink(path).map_err(|e| Error::io("remove", path, e))?;
    let dir = directory_of(path);
    disk.sync_dir(&dir).map_err(|e| Error::io("flush the directory", &dir, e))
}

fn not_the_same(path: &Path) -> Error {
    Error::new(
        ErrorKind::Failed,
        "the file is not the one that the interrupted operation began with; nothing was changed",
    )
    .at(path)
    .hint("if the images are as they should be, remove the journal")
}

/// The image's identity now, if it is where the journal says.
fn here(disk: &dyn Disk, image: &JournalImage) -> Option<FileId> {
    disk.stat(&image.path).ok().filter(|s| image.is(s)).map(|s| s.id)
}

/// Mends headers whose recorded write was torn: each sector is the old one or the new one, and together they are neither.
/// Anything else was written by somebody later, and stays.
fn mend_headers(disk: &dyn Disk, contents: &Contents) -> Result<()> {
    let images = contents.intent.as_ref().map(Intent::images).unwrap_or_default();
    for record in &contents.headers {
        let named = images.iter().find(|i| i.inode == record.inode && here(disk, i).is_some());
        let Some(path) = named.map(|i| &i.path) else { continue };
        let store = open(disk, path)?;
        let mut now = vec![0; record.new.len()];
        store.read_at(0, &mut now).map_err(|e| Error::io("read the header of", path, e))?;
        let sectors = now.chunks(512).zip(record.old.chunks(512)).zip(record.new.chunks(512));
        let torn = now != record.old
            && now != record.new
            && sectors.into_iter().all(|((now, old), new)| now == old || now == new);
        if torn {
            store.write_at(0, &record.new).map_err(|e| Error::io("write the header of", path, e))?;
            store.barrier().map_err(|e| Error::io("flush", path, e))?;
        }
    }
    Ok(())
}
