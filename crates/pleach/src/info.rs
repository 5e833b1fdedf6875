//! `pleach info`

use std::path::Path;
use std::process::ExitCode;

use pleach_engine::survey::{FileFormat, Survey};
use pleach_engine::{Error, Result};
use pleach_format::{
    Autoclear, BitmapRecord, Compatible, Header, Incompatible, LuksHeader, SnapshotRecord, Version,
};
use pleach_image::{Image, ImageError, escape};
use pleach_store::{Access, Disk, FileKind, RealDisk, Role};
use serde::ser::{Error as _, Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_json::{Value, json};

use crate::args::InfoArgs;
use crate::target::directory;
use crate::{output, size};

pub(crate) fn run(args: &InfoArgs) -> Result<ExitCode> {
    let mut images = Vec::new();
    for path in &args.images {
        let stat = RealDisk.stat(path).map_err(|e| Error::io("find", path, e))?;
        if stat.kind == FileKind::Directory {
            let survey = Survey::of_links(&RealDisk, std::slice::from_ref(path), &args.trust.trust())?;
            let mut found: Vec<&Path> = survey.files.iter().map(|f| f.path.as_path()).collect();
            found.sort();
            for image in found {
                images.push(describe(image, None, args)?);
            }
            continue;
        }
        let format = args.format.as_deref();
        images.push(describe(path, format, args)?);
        if args.chain {
            chain(path, args, &mut images)?;
        }
    }
    // What cannot be read to its end leaves no half of an output.
    let mut out = output::Spool::new();
    if args.json {
        out.add_json(&Document { images })?;
    } else {
        for (n, image) in images.iter().enumerate() {
            out.add(format_args!("{}", if n > 0 { "\n" } else { "" }))?;
            text(image, args.bytes, &mut out)?;
        }
    }
    out.print()?;
    Ok(ExitCode::SUCCESS)
}

/// Adds what the image at `path` stands on.
fn chain(path: &Path, args: &InfoArgs, images: &mut Vec<Described>) -> Result<()> {
    let survey = Survey::of_links(&RealDisk, &[directory(path)], &args.trust.trust())?;
    let Some(top) = survey.find(&RealDisk, path) else { return Ok(()) };
    for index in survey.chain(top)?.into_iter().skip(1) {
        if let Some(file) = survey.files.get(index) {
            images.push(describe(&file.path, Some(file.format.name()), args)?);
        }
    }
    Ok(())
}

fn describe(path: &Path, format: Option<&str>, args: &InfoArgs) -> Result<Described> {
    let store = RealDisk.open(path, Access::Read).map_err(|e| Error::io("open the image", path, e))?;
    let role = if args.force_share { Role::Look } else { Role::Read };
    store.lock(role).map_err(|e| Error::locked(path, e).hint("-U looks at it all the same"))?;
    let stat = store.stat().map_err(|e| Error::io("look at the image", path, e))?;
    let mut magic = [0; 4];
    store.read_at(0, &mut magic).map_err(|e| Error::io("read the image", path, e))?;
    let raw = match format {
        Some("raw") => true,
        Some(_) => false,
        None if magic == *b"QFI\xfb" => false,
        None => {
            output::warn_guessed_raw(path);
            true
        }
    };
    if raw {
        return Ok(Described::from(json!({
            "filename": path.display().to_string(), "format": "raw", "version": null,
            "virtual_size": stat.len.next_multiple_of(512), "actual_size": stat.allocated, "cluster_size": null,
            "refcount_bits": null, "backing_file": null, "backing_format": null, "full_backing_file": null,
            "data_file": null, "compression": null, "encryption": null, "luks": null, "features": features(None),
            "dirty": false, "corrupt": false, "snapshots": [], "bitmaps": [],
        })));
    }
    let image = Image::open(store).map_err(|e| Error::image(path, e))?;
    qcow2(path, image, stat.allocated)
}

fn qcow2(path: &Path, image: Image, allocated: u64) -> Result<Described> {
    let header = image.header();
    let wrap = |e| Error::image(path, e);
    // What is wrong with the lists is told here.
    image.each_snapshot().and_then(|mut all| all.try_for_each(|s| s.map(drop))).map_err(wrap)?;
    image.each_bitmap().and_then(|mut all| all.try_for_each(|b| b.map(drop))).map_err(wrap)?;
    let backing = header.backing();
    let full = backing.map(|b| match pleach_image::backing_path(path, &b.name) {
        Ok(full) => full.display().to_string(),
        Err(_) => escape(&b.name),
    });
    let value = json!({
        "filename": path.display().to_string(),
        "format": FileFormat::Qcow2.name(),
        "version": header.version().number(),
        "virtual_size": header.size(),
        "actual_size": allocated,
        "cluster_size": header.geometry().cluster_size(),
        "refcount_bits": header.refcount_width().bits(),
        "backing_file": backing.map(|b| escape(&b.name)),
        "backing_format": backing.and_then(|b| b.format.as_ref()).map(|f| escape(f)),
        "full_backing_file": full,
        "data_file": header.data_file().map(escape),
        "compression": header.compression().name(),
        "encryption": header.encryption().map(pleach_format::Encryption::name),
        "luks": image.luks_header().map_err(wrap)?.map(|luks| self::luks(&luks)),
        "features": features(Some(header)),
        "dirty": header.incompatible().has(Incompatible::DIRTY),
        "corrupt": header.incompatible().has(Incompatible::CORRUPT),
        "snapshots": [],
        "bitmaps": [],
    });
    Ok(Described { value, image: Some(image) })
}

/// What is known of one image. Of the lists only one entry at a time is in memory: a hostile image has many.
struct Described {
    /// All but the lists, which are empty here.
    value: Value,
    /// What has the lists; `None` for a raw image.
    image: Option<Image>,
}

impl From<Value> for Described {
    fn from(value: Value) -> Self {
        Self { value, image: None }
    }
}

impl Described {
    fn snapshots(&self) -> Result<impl Iterator<Item = Result<SnapshotRecord, ImageError>>, ImageError> {
        Ok(self.image.as_ref().map(Image::each_snapshot).transpose()?.into_iter().flatten())
    }

    fn bitmaps(&self) -> Result<impl Iterator<Item = Result<BitmapRecord, ImageError>>, ImageError> {
        Ok(self.image.as_ref().map(Image::each_bitmap).transpose()?.into_iter().flatten())
    }

    fn snapshot(&self, s: &SnapshotRecord) -> Value {
        let size =
            s.disk_size.map_or_else(|| self.value.get("virtual_size").cloned(), |size| Some(size.into()));
        json!({
            "id": escape(&s.id), "name": escape(&s.name), "date": date(s.date_seconds, s.date_nanoseconds),
            "vm_state_size": s.vm_state_size, "virtual_size": size, "icount": s.icount,
        })
    }
}

fn bitmap(b: &BitmapRecord) -> Value {
    json!({
        "name": escape(&b.name),
        "granularity": 1u64.checked_shl(b.granularity_bits.into()),
        "flags": flags(b),
    })
}

fn flags(b: &BitmapRecord) -> Vec<&'static str> {
    let names = [(BitmapRecord::IN_USE, "in-use"), (BitmapRecord::AUTO, "auto")];
    names.iter().filter(|(bit, _)| b.flags & bit != 0).map(|f| f.1).collect()
}

/// What `info --json` prints.
struct Document {
    images: Vec<Described>,
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let mut document = out.serialize_map(Some(2))?;
        document.serialize_entry("images", &self.images)?;
        document.serialize_entry("schema", &1)?;
        document.end()
    }
}

impl Serialize for Described {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let mut object = out.serialize_map(None)?;
        for (key, value) in self.value.as_object().into_iter().flatten() {
            match key.as_str() {
                "snapshots" => {
                    object.serialize_entry(key, &List(|| self.snapshots(), |s| self.snapshot(&s)))?
                }
                "bitmaps" => object.serialize_entry(key, &List(|| self.bitmaps(), |b| bitmap(&b)))?,
                _ => object.serialize_entry(key, value)?,
            }
        }
        object.end()
    }
}

/// A list whose entries are read and turned into JSON one after the other.
struct List<F, G>(F, G);

impl<T, I, F, G> Serialize for List<F, G>
where
    I: Iterator<Item = Result<T, ImageError>>,
    F: Fn() -> Result<I, ImageError>,
    G: Fn(T) -> Value,
{
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        let mut list = out.serialize_seq(None)?;
        for entry in self.0().map_err(S::Error::custom)? {
            list.serialize_element(&self.1(entry.map_err(S::Error::custom)?))?;
        }
        list.end()
    }
}

fn luks(header: &LuksHeader) -> Value {
    let slots: Vec<Value> = header
        .slots
        .iter()
        .map(|slot| {
            json!({
                "active": slot.active, "key_offset": slot.key_offset, "iterations": slot.iterations,
                "stripes": slot.stripes,
            })
        })
        .collect();
    json!({
        "cipher": header.cipher, "mode": header.mode, "hash": header.hash, "key_bytes": header.key_bytes,
        "payload_offset": header.payload_offset, "iterations": header.iterations, "uuid": header.uuid, "slots": slots,
    })
}

fn features(header: Option<&Header>) -> Value {
    let names = |word: u64, known: &[(u64, &str)]| -> Vec<String> {
        (0..64)
            .filter(|bit| word >> bit & 1 != 0)
            .map(|bit| {
                let name = known.iter().find(|(mask, _)| *mask == 1 << bit);
                name.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
            })
            .collect()
    };
    let v3 = header.filter(|h| h.version() == Version::V3);
    json!({
        "incompatible": names(v3.map_or(0, |h| h.incompatible().0), &[
            (Incompatible::DIRTY.0, "dirty"), (Incompatible::CORRUPT.0, "corrupt"),
            (Incompatible::DATA_FILE.0, "data-file"), (Incompatible::COMPRESSION.0, "compression-type"),
            (Incompatible::EXTENDED_L2.0, "extended-l2"),
        ]),
        "compatible": names(v3.map_or(0, |h| h.compatible().0), &[
            (Compatible::LAZY_REFCOUNTS.0, "lazy-refcounts"),
        ]),
        "autoclear": names(v3.map_or(0, |h| h.autoclear().0), &[
            (Autoclear::BITMAPS.0, "bitmaps"), (Autoclear::RAW_DATA_FILE.0, "data-file-raw"),
        ]),
    })
}

/// Cipher, mode and used key slots of a LUKS header in one line.
fn cipher(luks: &Value) -> Option<String> {
    let word = |key| luks.get(key).and_then(Value::as_str);
    let slots = luks.get("slots")?.as_array()?;
    let active = slots.iter().filter(|s| s.get("active") == Some(&Value::Bool(true))).count();
    let bits = luks.get("key_bytes").and_then(Value::as_u64)? * 8;
    Some(format!("{}-{}, a key of {bits} bits, {active} of 8 key slots used", word("cipher")?, word("mode")?))
}

fn date(seconds: u32, nanoseconds: u32) -> Option<String> {
    let nanoseconds = i32::try_from(nanoseconds).ok()?;
    jiff::Timestamp::new(seconds.into(), nanoseconds.min(999_999_999)).ok().map(|t| t.to_string())
}

/// The same as lines for people; what is absent has no line.
fn text(described: &Described, exact: bool, out: &mut output::Spool) -> Result<()> {
    let image = &described.value;
    let mut line = |key: &str, value: String| out.add(format_args!("{key}: {}\n", output::printable(&value)));
    let bytes = |key: &str| image.get(key).and_then(Value::as_u64).map(|v| size::show(v, exact));
    let plain = |key: &str| match image.get(key) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    let rows = [
        ("image", plain("filename")),
        ("format", plain("format")),
        ("format version", plain("version")),
        ("virtual size", bytes("virtual_size")),
        ("on disk", bytes("actual_size")),
        ("cluster size", bytes("cluster_size")),
        ("refcount bits", plain("refcount_bits")),
        ("backing file", plain("backing_file")),
        ("backing format", plain("backing_format")),
        ("data file", plain("data_file")),
        ("compression", plain("compression")),
        ("encryption", plain("encryption")),
        ("cipher", image.get("luks").and_then(cipher)),
    ];
    for (key, value) in rows {
        if let Some(value) = value {
            line(key, value)?;
        }
    }
    for (key, word) in image.get("features").and_then(Value::as_object).into_iter().flatten() {
        let names: Vec<&str> = word.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !names.is_empty() {
            line(&format!("{key} features"), names.join(", "))?;
        }
    }
    let path = image.get("filename").and_then(Value::as_str).unwrap_or_default();
    let wrap = |e| Error::image(Path::new(path), e);
    for s in described.snapshots().map_err(wrap)? {
        let s = s.map_err(wrap)?;
        let vm = s.vm_state_size;
        let state = if vm > 0 { format!(", VM state {}", size::show(vm, exact)) } else { String::new() };
        let date = date(s.date_seconds, s.date_nanoseconds).unwrap_or_else(|| "-".to_owned());
        line("snapshot", format!("#{} \"{}\", {date}{state}", escape(&s.id), escape(&s.name)))?;
    }
    for b in described.bitmaps().map_err(wrap)? {
        let b = b.map_err(wrap)?;
        let granularity = 1u64.checked_shl(b.granularity_bits.into()).unwrap_or(0);
        let what = format!("\"{}\", {} a bit", escape(&b.name), size::show(granularity, exact));
        let flags = flags(&b);
        line("bitmap", if flags.is_empty() { what } else { format!("{what}, {}", flags.join(", ")) })?;
    }
    Ok(())
}
