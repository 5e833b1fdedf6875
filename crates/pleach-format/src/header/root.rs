//! The root pointers: fields of the first sector that one write can switch (spec: header).
//!
//! Each function changes the given copy of the header's first sector; writing that copy back is the switch.

/// Sets virtual size, L1 length and L1 place: bytes 24..32 and 36..48.
pub fn set_size_and_l1(sector: &mut [u8; 512], size: u64, l1_size: u32, l1_table_offset: u64) {
    put(sector, 24, &size.to_be_bytes());
    put(sector, 36, &l1_size.to_be_bytes());
    put(sector, 40, &l1_table_offset.to_be_bytes());
}

/// Sets place and length of the refcount table: bytes 48..60.
pub fn set_refcount_table(sector: &mut [u8; 512], offset: u64, clusters: u32) {
    put(sector, 48, &offset.to_be_bytes());
    put(sector, 56, &clusters.to_be_bytes());
}

/// Sets the backing file name's place and length, 0 and 0 for none: bytes 8..20.
pub fn set_backing(sector: &mut [u8; 512], offset: u64, length: u32) {
    put(sector, 8, &offset.to_be_bytes());
    put(sector, 16, &length.to_be_bytes());
}

/// Sets number of internal snapshots and place of their table: bytes 60..72.
pub fn set_snapshots(sector: &mut [u8; 512], count: u32, offset: u64) {
    put(sector, 60, &count.to_be_bytes());
    put(sector, 64, &offset.to_be_bytes());
}

/// Sets the incompatible feature word of a version 3 header: bytes 72..80.
pub fn set_incompatible(sector: &mut [u8; 512], word: u64) {
    put(sector, 72, &word.to_be_bytes());
}

/// Sets the compatible feature word of a version 3 header: bytes 80..88.
pub fn set_compatible(sector: &mut [u8; 512], word: u64) {
    put(sector, 80, &word.to_be_bytes());
}

/// Sets the autoclear feature word of a version 3 header: bytes 88..96.
pub fn set_autoclear(sector: &mut [u8; 512], word: u64) {
    put(sector, 88, &word.to_be_bytes());
}

fn put(sector: &mut [u8; 512], at: usize, bytes: &[u8]) {
    sector.get_mut(at..at + bytes.len()).expect("root fields lie in the first sector").copy_from_slice(bytes);
}
