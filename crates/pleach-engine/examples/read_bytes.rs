//! Writes guest bytes of an image, with all that it stands on, to stdout: `read_bytes IMAGE [OFFSET [LENGTH]]`.
//!
//! The options say what the image may make us open: by default backing files in its own directory, and no data file. Every
//! file is locked as long as it is read, so that a running virtual machine is noticed.
#![forbid(unsafe_code)]

use std::io::Write;

use pleach_engine::{Source, SourceOptions};
use pleach_store::RealDisk;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let image = args.next().ok_or("usage: read_bytes IMAGE [OFFSET [LENGTH]]")?;
    let source = Source::open(&RealDisk, image.as_ref(), &SourceOptions::default())?;
    source.check_readable()?;
    let offset: u64 = args.next().map_or(Ok(0), |text| text.parse())?;
    let length: u64 = args.next().map_or(Ok(u64::MAX), |text| text.parse())?;
    let (mut at, end) = (offset, offset.saturating_add(length).min(source.chain.size()));
    let mut buffer = vec![0; 2 << 20];
    while at < end {
        let part =
            buffer.get_mut(..usize::try_from(end - at)?.min(2 << 20)).ok_or("the buffer has that length")?;
        source.chain.read_at(at, part)?;
        std::io::stdout().write_all(part)?;
        at += part.len() as u64;
    }
    Ok(())
}
