//! Any bytes as a compressed cluster are one cluster or an error; what is compressed here comes back, and is smaller.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{CompressionType, NewHeader};
use pleach_fuzz::Memory;
use pleach_image::{Chain, Compressor, Image, Layer};
use std::sync::Arc;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    zstd: bool,
    cluster_bits: u8,
    level: u8,
    sectors: u8,
    offset: u16,
    payload: &'a [u8],
}

fuzz_target!(|input: Input| {
    let bits = 9 + u32::from(input.cluster_bits % 8);
    let cluster = 1usize << bits;
    let compression = if input.zstd { CompressionType::Zstd } else { CompressionType::Deflate };

    // One guest cluster whose entry leads to the payload, anywhere in the file.
    let header = NewHeader {
        cluster_bits: bits,
        size: cluster as u64,
        compression,
        refcount_table_offset: cluster as u64,
        l1_table_offset: 2 * cluster as u64,
        ..NewHeader::default()
    };
    let Ok(mut bytes) = header.encode() else { return };
    bytes.resize(4 * cluster, 0);
    let table = 3 * cluster as u64 | 1 << 63;
    bytes[2 * cluster..2 * cluster + 8].copy_from_slice(&table.to_be_bytes());
    let at = 4 * cluster as u64 + u64::from(input.offset) % 1024;
    let sectors = u64::from(input.sectors) & ((1 << (bits - 8)) - 1);
    let entry = 1 << 62 | sectors << (70 - bits) | at;
    bytes[3 * cluster..3 * cluster + 8].copy_from_slice(&entry.to_be_bytes());
    bytes.resize(usize::try_from(at).unwrap(), 0);
    bytes.extend(input.payload);
    let Ok(image) = Image::open(Memory::new(bytes)) else { return };
    let chain = Chain::new(vec![Arc::new(Layer::Qcow2(image))]);
    let mut out = vec![0; cluster];
    let _ = chain.read_at(0, &mut out);

    let levels = Compressor::levels(compression);
    let level = levels.start() + u32::from(input.level) % (levels.end().min(&6) - levels.start() + 1);
    let Ok(mut compressor) = Compressor::new(compression, Some(level)) else { return };
    let mut whole = input.payload.to_vec();
    whole.resize(cluster, 0);
    if let Some(packed) = compressor.compress(&whole) {
        assert!(packed.len() < cluster);
        assert_eq!(compressor.compress(&whole), Some(packed), "equal clusters give equal bytes");
    }
});
