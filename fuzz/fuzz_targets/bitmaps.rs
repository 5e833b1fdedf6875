//! Other bitmaps for any header: after each step the header is readable, its bitmaps are the old, the new, or none, and
//! nothing else changes.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{
    BackingFile, BitmapsExtension, ExtensionKind, Header, HeaderChange, NewHeader, rewrite_bitmaps,
};
use pleach_fuzz::written;

#[derive(Arbitrary, Debug)]
struct Input {
    cluster_bits: u8,
    name: Option<u16>,
    old: Option<u8>,
    edits: Vec<(u16, u8)>,
    new: Option<u8>,
}

fn extension(n: u8) -> BitmapsExtension {
    BitmapsExtension { count: 1, directory_size: 32, directory_offset: (u64::from(n) + 1) << 21 }
}

fuzz_target!(|input: Input| {
    let Some(bytes) = image_start(&input) else { return };
    let Ok(old) = Header::parse(&bytes) else { return };
    let Ok(was) = old.bitmaps() else { return };
    let new = input.new.map(extension);
    let Ok(change) = rewrite_bitmaps(&bytes, &old, new.as_ref()) else { return };
    let mut now = bytes;
    match change {
        HeaderChange::Whole { bytes } => now = written(&now, 0, &bytes),
        HeaderChange::Steps(steps) => {
            for (at, step) in steps {
                now = written(&now, usize::try_from(at.0).unwrap(), &step);
                let found = is_kept(&old, &now);
                assert!(found == was || found == new || found.is_none(), "{found:?}");
            }
        }
    }
    assert_eq!(is_kept(&old, &now), new);
});

/// The start of a new image, with a few bytes overwritten.
fn image_start(input: &Input) -> Option<Vec<u8>> {
    let cluster_bits = 9 + u32::from(input.cluster_bits % 13);
    let name = input.name.map(|len| BackingFile {
        name: (0..len % 1100).map(|i| b'a' + (i % 23) as u8).collect(),
        format: Some(b"raw".to_vec()),
    });
    let new = NewHeader {
        cluster_bits,
        size: 1 << 20,
        refcount_table_offset: 1 << cluster_bits,
        l1_table_offset: 3 << cluster_bits,
        backing: name,
        ..NewHeader::default()
    };
    let mut bytes = new.encode().ok()?;
    bytes.resize(4096.min(1 << cluster_bits), 0);
    if let Some(old) = input.old {
        let header = Header::parse(&bytes).ok()?;
        match rewrite_bitmaps(&bytes, &header, Some(&extension(old))).ok()? {
            HeaderChange::Whole { bytes: whole } => bytes = written(&bytes, 0, &whole),
            HeaderChange::Steps(steps) => {
                for (at, step) in steps {
                    bytes = written(&bytes, usize::try_from(at.0).unwrap(), &step);
                }
            }
        }
    }
    let len = bytes.len();
    for (at, byte) in &input.edits {
        bytes[usize::from(*at) % len] = *byte;
    }
    Some(bytes)
}

/// `bytes` say what `old` said, but for the bitmaps, which are returned.
fn is_kept(old: &Header, bytes: &[u8]) -> Option<BitmapsExtension> {
    let header = Header::parse(bytes).expect("the header is readable");
    let root = |h: &Header| {
        (
            (h.version(), h.geometry(), h.size(), h.refcount_width(), h.encryption(), h.compression()),
            (h.l1_size(), h.l1_table_offset(), h.refcount_table_offset(), h.refcount_table_clusters()),
            (h.nb_snapshots(), h.snapshots_offset(), h.incompatible(), h.compatible(), h.autoclear().0 & !1),
        )
    };
    assert_eq!(root(&header), root(old));
    assert_eq!(header.backing(), old.backing());
    let others = |h: &Header| -> Vec<(ExtensionKind, Vec<u8>)> {
        let kept = h.extensions().iter().filter(|e| e.kind != ExtensionKind::Bitmaps);
        kept.map(|e| (e.kind, e.data.clone())).collect()
    };
    assert_eq!(others(&header), others(old), "extensions are kept, in their order");
    header.bitmaps().expect("written by us")
}
