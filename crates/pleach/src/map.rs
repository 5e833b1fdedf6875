//! `pleach map`

use std::process::ExitCode;

use pleach_engine::{Extent, Result, map};
use pleach_image::{Chain, escape};
use serde_json::Value;

use crate::args::MapArgs;
use crate::output::{Spool, printable};
use crate::source;

pub(crate) fn run(args: &MapArgs) -> Result<ExitCode> {
    let source = source::open(&args.image, args.format, args.snapshot.as_deref(), &args.read)?;
    let mut files = files(&source.chain);
    if args.json {
        files = files.into_iter().map(|file| Value::from(file).to_string()).collect();
    }
    let end = args.length.map_or(u64::MAX, |length| args.start.saturating_add(length));
    // Nothing is printed before it is known that all of it can be.
    let mut out = Spool::new();
    if args.json {
        out.add(format_args!("{{\n  \"schema\": 1,\n  \"extents\": ["))?;
    } else {
        out.add(format_args!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"))?;
    }
    let mut separator = "\n";
    map(&source.chain, args.start..end, &mut |extent| {
        if args.json {
            out.add(format_args!("{separator}    {}", document(&extent, &files)))?;
            separator = ",\n";
            return Ok(());
        }
        line(&extent, &files, &mut out)
    })?;
    if args.json {
        out.add(format_args!("\n  ]\n}}\n"))?;
    }
    out.print()?;
    Ok(ExitCode::SUCCESS)
}

/// The file that each layer's bytes are in.
fn files(chain: &Chain) -> Vec<String> {
    let layers = chain.layers().iter().zip(chain.paths());
    layers
        .map(|(layer, path)| {
            let external = layer.image().filter(|i| i.external_data()).and_then(|i| i.header().data_file());
            external.map_or_else(|| path.display().to_string(), escape)
        })
        .collect()
}

/// One extent as JSON; `files` are JSON strings.
fn document(extent: &Extent, files: &[String]) -> String {
    let file = (extent.present || extent.offset.is_some()).then(|| files.get(extent.depth)).flatten();
    let offset = extent.offset.map_or_else(|| "null".to_owned(), |at| at.to_string());
    format!(
        "{{\"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
         \"compressed\": {}, \"offset\": {offset}, \"filename\": {}}}",
        extent.start,
        extent.length,
        extent.depth,
        extent.present,
        extent.zero,
        extent.data,
        extent.compressed,
        file.map_or("null", String::as_str),
    )
}

/// What holds data, and where.
fn line(extent: &Extent, files: &[String], out: &mut Spool) -> Result<()> {
    if !extent.data || extent.zero {
        return Ok(());
    }
    let place = match (extent.offset, extent.compressed) {
        (Some(offset), _) => hex(offset),
        (None, true) => "compressed".to_owned(),
        (None, false) => "encrypted".to_owned(),
    };
    let file = files.get(extent.depth).map_or("", String::as_str);
    let (start, length) = (hex(extent.start), hex(extent.length));
    out.add(format_args!("{start:<16}{length:<16}{place:<16}{}\n", printable(file)))
}

/// As C's `%#x`.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}
