//! Writes what comes on standard input into a new qcow2 image: `write_from_stream IMAGE < DISK`

use std::io::Read;
use std::path::PathBuf;

use pleach_engine::{SourceOptions, open_writer};
use pleach_image::{CreateOptions, create};
use pleach_store::RealDisk;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: write_from_stream IMAGE < DISK")?);
    create(&RealDisk, &path, &CreateOptions { size: 512, ..CreateOptions::default() })?;
    let image = open_writer(&RealDisk, &path, &SourceOptions::default())?;

    let (mut input, mut at) = (std::io::stdin().lock(), 0);
    loop {
        let mut piece = Vec::new();
        let read = (&mut input).take(1 << 20).read_to_end(&mut piece)? as u64;
        if read == 0 {
            break;
        }
        // The disk grows with the stream; what is missing to a whole sector reads as zeros.
        image.resize((at + read).next_multiple_of(512))?;
        image.write_at(at, &piece)?;
        at += read;
    }
    image.close()?;
    Ok(())
}
