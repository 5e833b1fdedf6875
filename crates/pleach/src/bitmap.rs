//! `pleach bitmap`

use std::path::Path;
use std::process::ExitCode;

use pleach_engine::{Error, ErrorKind, Result, open_writer_alone};
use pleach_format::BitmapRecord;
use pleach_image::{Bits, Image, ImageError, Writer, escape};
use pleach_store::{Access, Disk, RealDisk, Role};
use serde_json::{Value, json};

use crate::args::{BitmapArgs, BitmapCommand};
use crate::{output, size};

pub(crate) fn run(args: &BitmapArgs) -> Result<ExitCode> {
    match &args.command {
        BitmapCommand::List { image, force_share } => list(image, *force_share, args)?,
        BitmapCommand::Add { image, name, granularity, disabled } => {
            change(image, name, |w, name| w.add_bitmap(name, *granularity, !disabled))?;
        }
        BitmapCommand::Remove(named) => change(&named.image, &named.name, Writer::remove_bitmap)?,
        BitmapCommand::Enable(named) => {
            change(&named.image, &named.name, |w, name| w.enable_bitmap(name, true))?
        }
        BitmapCommand::Disable(named) => {
            change(&named.image, &named.name, |w, name| w.enable_bitmap(name, false))?;
        }
        BitmapCommand::Clear(named) => change(&named.image, &named.name, Writer::clear_bitmap)?,
        BitmapCommand::Merge { image, name, from, source_file } => {
            let bits = match source_file {
                Some(path) => Some(read(path, from)?),
                None => None,
            };
            change(image, name, |writer, name| {
                let bits = bits.map_or_else(|| writer.bitmap(from.as_bytes()), Ok)?;
                writer.merge_bitmap(name, &bits)
            })?;
        }
    }
    if args.json && !matches!(args.command, BitmapCommand::List { .. }) {
        list(args.command.image(), false, args)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the image, changes one of its bitmaps, and closes it.
fn change(
    path: &Path,
    name: &str,
    act: impl FnOnce(&Writer, &[u8]) -> std::result::Result<(), ImageError>,
) -> Result<()> {
    let writer = open_writer_alone(&RealDisk, path)?;
    let done = act(&writer, name.as_bytes()).and_then(|()| writer.close());
    done.map_err(|e| Error::image(path, e))
}

/// The image at `path`, locked for looking or reading.
fn open(path: &Path, share: bool) -> Result<Image> {
    let store = RealDisk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
    let role = if share { Role::Look } else { Role::Read };
    store.lock(role).map_err(|e| Error::locked(path, e).hint("-U looks at it all the same"))?;
    Image::open(store).map_err(|e| Error::image(path, e))
}

/// The bits of a bitmap of another image.
fn read(path: &Path, name: &str) -> Result<Bits> {
    let image = open(path, false)?;
    let records = image.bitmaps().map_err(|e| Error::image(path, e))?;
    let Some(record) = records.iter().find(|r| r.name == name.as_bytes()) else {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no bitmap \"{name}\"")).at(path));
    };
    image.bitmap_bits(record).map_err(|e| Error::image(path, e))
}

fn list(path: &Path, share: bool, args: &BitmapArgs) -> Result<()> {
    let image = open(path, share)?;
    let records = image.bitmaps().map_err(|e| Error::image(path, e))?;
    if args.json {
        let bitmaps: Vec<Value> = records.iter().map(|r| document(&image, r)).collect();
        output::document(&json!({ "schema": 1, "filename": path.display().to_string(), "bitmaps": bitmaps }));
        return Ok(());
    }
    for record in &records {
        let dirty = dirty_bytes(&image, record)
            .map_or_else(|| "unknown".to_owned(), |bytes| size::show(bytes, args.bytes));
        let flags = flags(record);
        let flags = if flags.is_empty() { "disabled".to_owned() } else { flags.join(", ") };
        output::print(&format!(
            "{}: granularity {}, {flags}, dirty: {dirty}\n",
            escape(&record.name),
            size::show(granularity(record), args.bytes)
        ));
    }
    Ok(())
}

fn document(image: &Image, record: &BitmapRecord) -> Value {
    json!({
        "name": escape(&record.name),
        "granularity": granularity(record),
        "flags": flags(record),
        "dirty_bytes": dirty_bytes(image, record),
    })
}

fn granularity(record: &BitmapRecord) -> u64 {
    1u64.checked_shl(record.granularity_bits.into()).unwrap_or(0)
}

fn flags(record: &BitmapRecord) -> Vec<&'static str> {
    let known = [(BitmapRecord::IN_USE, "in-use"), (BitmapRecord::AUTO, "auto")];
    known.iter().filter(|(bit, _)| record.flags & bit != 0).map(|(_, name)| *name).collect()
}

/// Guest bytes whose bits are set; `None` for a bitmap that cannot be read.
fn dirty_bytes(image: &Image, record: &BitmapRecord) -> Option<u64> {
    let bits = image.bitmap_bits(record).ok()?;
    Some(bits.ranges().iter().map(|r| r.end - r.start).sum())
}
