//! `pleach resize`

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::catalog::kept_in;
use pleach_engine::survey::{FileFormat, Survey};
use pleach_engine::{Error, ErrorKind, Result, SourceOptions, open_writer};
use pleach_image::ImageError;
use pleach_lineage::Reads;
use pleach_store::{Access, Disk, FileId, RealDisk, Role, Store};
use serde_json::{Value, json};

use crate::act::start_jobs;
use crate::args::ResizeArgs;
use crate::target::directory;
use crate::{confirm, create, output, size};

pub(crate) fn run(args: &ResizeArgs) -> Result<ExitCode> {
    start_jobs(args.jobs)?;
    let mut image = Resizable::open(args)?;
    let (from, to) = (image.size(), wanted(&args.size, image.size())?);
    image.check_preallocation(args, to)?;
    refuse_frozen(&args.image)?;
    let dependents = dependents(args)?;
    let plan = Plan { path: &args.image, from, to, dependents: &dependents, exact: args.bytes };
    if to < from {
        if !args.shrink {
            let text = format!(
                "the disk has {}, the new size is {}: everything behind that would be lost",
                size::show(from, args.bytes),
                size::show(to, args.bytes)
            );
            return Err(Error::new(ErrorKind::Usage, text)
                .at(&args.image)
                .hint("if that is meant, say --shrink"));
        }
        if !dependents.is_empty() {
            let text = format!("other images read what would be cut off: {}", dependents.join(", "));
            return Err(Error::new(ErrorKind::Refused, text)
                .at(&args.image)
                .hint("delete them first, or give them another backing file"));
        }
    }
    image.check(&args.image, to)?;
    if args.dry_run {
        plan.show(args.json, "plan");
        return Ok(ExitCode::SUCCESS);
    }
    if to < from && !args.yes {
        confirm::confirm(&plan.text())?;
    }
    image.resize(args, to)?;
    plan.show(args.json, "resized");
    Ok(ExitCode::SUCCESS)
}

/// A snapshot that a catalog names must read as it does, its size included.
fn refuse_frozen(image: &Path) -> Result<()> {
    let id = RealDisk.stat(image).map_err(|e| Error::io("find", image, e))?.id;
    let kept = kept_in(&RealDisk, &directory(image), id)?;
    match kept.iter().find(|kept| kept.frozen) {
        None => Ok(()),
        Some(kept) => {
            let text = format!("it is the snapshot {} of \"{}\"", kept.what, kept.catalog.display());
            Err(Error::new(ErrorKind::Refused, text).at(image).hint("resize the active image of the tree"))
        }
    }
}

/// An open image of either format.
enum Resizable {
    Qcow2(Option<Box<pleach_image::Writer>>, u64),
    Raw(Arc<dyn Store>, u64),
}

impl Resizable {
    fn open(args: &ResizeArgs) -> Result<Self> {
        let path = &args.image;
        if args.format == Some(FileFormat::Raw) {
            let store =
                RealDisk.open(path, Access::Write).map_err(|e| Error::io("open the image", path, e))?;
            store.lock(Role::Write).map_err(|e| Error::locked(path, e))?;
            let len = store.len().map_err(|e| Error::io("find the length of", path, e))?;
            return Ok(Self::Raw(store, len));
        }
        let options = SourceOptions { trust: args.read.trust(), ..SourceOptions::default() };
        let writer = open_writer(&RealDisk, path, &options).map_err(|e| match e.kind {
            ErrorKind::Unsupported => e.hint("a raw image must be called one: -f raw"),
            _ => e,
        })?;
        let size = writer.size();
        Ok(Self::Qcow2(Some(Box::new(writer)), size))
    }

    fn size(&self) -> u64 {
        match self {
            Self::Qcow2(_, size) | Self::Raw(_, size) => *size,
        }
    }

    /// Refuses a kind of preallocation that this image does not get.
    fn check_preallocation(&self, args: &ResizeArgs, to: u64) -> Result<()> {
        let kind = args.preallocation.as_str();
        if kind == "off" {
            return Ok(());
        }
        if to < self.size() {
            let text = "preallocation is for a disk that becomes longer";
            return Err(Error::new(ErrorKind::Usage, text).at(&args.image));
        }
        match self {
            Self::Raw(..) if kind == "metadata" => {
                let text = "a raw image has no metadata: its preallocation is off, falloc or full";
                Err(Error::new(ErrorKind::Usage, text).at(&args.image))
            }
            Self::Raw(..) => Ok(()),
            Self::Qcow2(..) => {
                let text = format!("resize with --preallocation {kind} of a qcow2 image is not supported");
                Err(Error::new(ErrorKind::Unsupported, text).at(&args.image))
            }
        }
    }

    /// Refuses, before anything is shown or asked, what cannot be done.
    fn check(&self, path: &Path, to: u64) -> Result<()> {
        match self {
            Self::Qcow2(Some(writer), _) => writer.check_resize(to).map_err(|e| match e {
                ImageError::Format { structure: "option", source, .. } => create::refused(&source).at(path),
                other => Error::image(path, other),
            }),
            _ => Ok(()),
        }
    }

    fn resize(&mut self, args: &ResizeArgs, to: u64) -> Result<()> {
        let path = &args.image;
        match self {
            Self::Qcow2(writer, _) => {
                let Some(writer) = writer.take() else { return Ok(()) };
                let done = writer.resize(to).and_then(|()| writer.close());
                done.map_err(|e| Error::image(path, e))
            }
            Self::Raw(store, from) => lengthen(&**store, *from, to, &args.preallocation)
                .and_then(|()| store.barrier())
                .map_err(|e| Error::io("change the length of", path, e)),
        }
    }
}

/// Gives a raw image of `from` bytes its new length; one that becomes longer gets what `preallocation` says.
fn lengthen(store: &dyn Store, from: u64, to: u64, preallocation: &str) -> std::io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    if to > from && preallocation != "off" {
        // A full disk is noticed here, and the image is as it was.
        store.reserve(from..to).inspect_err(|_| drop(store.set_len(from)))?;
    }
    store.set_len(to)?;
    let mut at = from;
    while preallocation == "full" && at < to {
        let part = usize::try_from(to - at).unwrap_or(usize::MAX).min(ZEROS.len());
        store.write_at(at, ZEROS.get(..part).unwrap_or(&ZEROS))?;
        at += part as u64;
    }
    Ok(())
}

/// The size that is meant: absolute, or relative to the present one.
fn wanted(text: &str, now: u64) -> Result<u64> {
    let usage = |what: String| Error::new(ErrorKind::Usage, what);
    let parse = |text: &str| {
        size::parse(text)
            .ok_or_else(|| usage(format!("size \"{text}\" is not a size such as 10G, +1G or -512M")))
    };
    let size = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => now.checked_add(parse(more)?),
        (_, Some(less)) => now.checked_sub(parse(less)?),
        _ => Some(parse(text)?),
    };
    let size = size.filter(|&s| s > 0).ok_or_else(|| {
        usage(format!("a disk of {now} bytes cannot become {text}: its size must be from 512 bytes to 8 EiB"))
    })?;
    if !size.is_multiple_of(512) {
        return Err(usage(format!("the new size is {size} bytes, must be a multiple of 512")));
    }
    Ok(size)
}

/// Images in the same directory that read this one.
fn dependents(args: &ResizeArgs) -> Result<Vec<String>> {
    let id = RealDisk.stat(&args.image).map_err(|e| Error::io("find", &args.image, e))?.id;
    let survey = Survey::of_directories(&RealDisk, &[directory(&args.image)], &args.read.trust())?;
    let readers: Vec<FileId> =
        survey.reads().into_iter().filter(|r: &Reads<FileId>| r.read == id).map(|r| r.reader).collect();
    let files = survey.files.iter().filter(|f| readers.contains(&f.stat.id));
    Ok(files.map(|f| f.path.display().to_string()).collect())
}

struct Plan<'a> {
    path: &'a Path,
    from: u64,
    to: u64,
    dependents: &'a [String],
    exact: bool,
}

impl Plan<'_> {
    fn show(&self, json: bool, key: &str) {
        if json {
            output::document(&json!({ "schema": 1, key: self.document() }));
        } else {
            output::print(&self.text());
        }
    }

    fn document(&self) -> Value {
        json!({
            "filename": self.path.display().to_string(),
            "from": self.from,
            "to": self.to,
            "lost": self.from.saturating_sub(self.to),
            "bytes_read": 0, "bytes_written": 0, "bytes_cloned": 0,
            "copies": [], "renames": [], "unlinks": [], "rebases": [],
            "dependents": self.dependents,
            "refused": null,
        })
    }

    fn text(&self) -> String {
        let show = |bytes| size::show(bytes, self.exact);
        let lost = match self.from.checked_sub(self.to).filter(|&lost| lost > 0) {
            Some(lost) => format!("; the last {} of the disk are lost", show(lost)),
            None => String::new(),
        };
        format!("{}: {} -> {}{lost}\n", output::path(self.path), show(self.from), show(self.to))
    }
}
