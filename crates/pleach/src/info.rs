//! `pleach info`

use std::path::Path;
use std::process::ExitCode;

use pleach_engine::survey::{FileFormat, Survey};
use pleach_engine::{Error, Result};
use pleach_format::{Autoclear, BitmapRecord, Compatible, Header, Incompatible, LuksHeader, Version};
use pleach_image::{Image, escape};
use pleach_store::{Access, Disk, FileKind, RealDisk, Role};
use serde_json::{Value, json};

use crate::args::InfoArgs;
use crate::target::directory;
use crate::{output, size};

pub(crate) fn run(args: &InfoArgs) -> Result<ExitCode> {
    let mut images = Vec::new();
    for path in &args.images {
        let stat = RealDisk.stat(path).map_err(|e| Error::io("find", path, e))?;
        if stat.kind == FileKind::Directory {
            let survey = Survey::of_directories(&RealDisk, std::slice::from_ref(path), &args.trust.trust())?;
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
    if args.json {
        output::document(&json!({ "schema": 1, "images": images }));
    } else {
        let texts: Vec<String> = images.iter().map(|image| text(image, args.bytes)).collect();
        output::print(&texts.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds what the image at `path` stands on.
fn chain(path: &Path, args: &InfoArgs, images: &mut Vec<Value>) -> Result<()> {
    let survey = Survey::of_directories(&RealDisk, &[directory(path)], &args.trust.trust())?;
    let Some(top) = survey.find(&RealDisk, path) else { return Ok(()) };
    for index in survey.chain(top)?.into_iter().skip(1) {
        if let Some(file) = survey.files.get(index) {
            images.push(describe(&file.path, Some(file.format.name()), args)?);
        }
    }
    Ok(())
}

fn describe(path: &Path, format: Option<&str>, args: &InfoArgs) -> Result<Value> {
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
        return Ok(json!({
            "filename": path.display().to_string(), "format": "raw", "version": null,
            "virtual_size": stat.len.next_multiple_of(512), "actual_size": stat.allocated, "cluster_size": null,
            "refcount_bits": null, "backing_file": null, "backing_format": null, "full_backing_file": null,
            "data_file": null, "compression": null, "encryption": null, "luks": null, "features": features(None),
            "dirty": false, "corrupt": false, "snapshots": [], "bitmaps": [],
        }));
    }
    let image = Image::open(store).map_err(|e| Error::image(path, e))?;
    qcow2(path, &image, stat.allocated)
}

fn qcow2(path: &Path, image: &Image, allocated: u64) -> Result<Value> {
    let header = image.header();
    let wrap = |e| Error::image(path, e);
    let snapshots: Vec<Value> = image
        .snapshots()
        .map_err(wrap)?
        .iter()
        .map(|s| {
            json!({
                "id": escape(&s.id), "name": escape(&s.name), "date": date(s.date_seconds, s.date_nanoseconds),
                "vm_state_size": s.vm_state_size, "virtual_size": s.disk_size.unwrap_or(header.size()),
                "icount": s.icount,
            })
        })
        .collect();
    let bitmaps: Vec<Value> = image
        .bitmaps()
        .map_err(wrap)?
        .iter()
        .map(|b| {
            let flags = [(BitmapRecord::IN_USE, "in-use"), (BitmapRecord::AUTO, "auto")];
            let names: Vec<&str> = flags.iter().filter(|(bit, _)| b.flags & bit != 0).map(|f| f.1).collect();
            json!({
                "name": escape(&b.name),
                "granularity": 1u64.checked_shl(b.granularity_bits.into()),
                "flags": names,
            })
        })
        .collect();
    let backing = header.backing();
    let full = backing.map(|b| match pleach_image::backing_path(path, &b.name) {
        Ok(full) => full.display().to_string(),
        Err(_) => escape(&b.name),
    });
    Ok(json!({
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
        "snapshots": snapshots,
        "bitmaps": bitmaps,
    }))
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
fn text(image: &Value, exact: bool) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: String| out.push_str(&format!("{key}: {value}\n"));
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
            line(key, value);
        }
    }
    for (key, word) in image.get("features").and_then(Value::as_object).into_iter().flatten() {
        let names: Vec<&str> = word.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !names.is_empty() {
            line(&format!("{key} features"), names.join(", "));
        }
    }
    let list = |key: &str| image.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let field = |value: &Value, key: &str| match value.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => "-".to_owned(),
        Some(other) => other.to_string(),
    };
    for s in list("snapshots") {
        let vm = s.get("vm_state_size").and_then(Value::as_u64).unwrap_or(0);
        let state = if vm > 0 { format!(", VM state {}", size::show(vm, exact)) } else { String::new() };
        let what = format!("#{} \"{}\", {}{state}", field(&s, "id"), field(&s, "name"), field(&s, "date"));
        line("snapshot", what);
    }
    for b in list("bitmaps") {
        let granularity = b.get("granularity").and_then(Value::as_u64).unwrap_or(0);
        let flags: Vec<String> = b
            .get("flags")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|f| f.to_string().replace('"', ""))
            .collect();
        let what = format!("\"{}\", {} a bit", field(&b, "name"), size::show(granularity, exact));
        line("bitmap", if flags.is_empty() { what } else { format!("{what}, {}", flags.join(", ")) });
    }
    out
}
