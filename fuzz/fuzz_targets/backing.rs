//! A new backing file for any header: a crash at any point leaves the old header or the new one, and nothing else changes.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_format::{
    BackingFile, ExtensionKind, Header, HeaderChange, NewHeader, RefcountWidth, Version, rewrite_backing,
};
use pleach_fuzz::written;

#[derive(Arbitrary, Debug)]
struct Input {
    version_2: bool,
    cluster_bits: u8,
    size: u64,
    old: Option<Name>,
    edits: Vec<(u16, u8)>,
    new: Option<Name>,
}

/// Only lengths matter to where things go.
#[derive(Arbitrary, Debug)]
struct Name {
    byte: u8,
    len: u16,
    format_len: Option<u8>,
}

impl Name {
    fn backing(&self) -> BackingFile {
        let fill = |len: usize| vec![self.byte.max(1); len];
        BackingFile {
            name: fill(usize::from(self.len % 1100)),
            format: self.format_len.map(|len| fill(usize::from(len % 20))),
        }
    }
}

fuzz_target!(|input: Input| {
    let Some(bytes) = image_start(&input) else { return };
    let Ok(old) = Header::parse(&bytes) else { return };
    let new = input.new.as_ref().map(Name::backing);
    match rewrite_backing(&bytes, &old, new.as_ref()) {
        Err(_) => {}
        Ok(HeaderChange::Whole { bytes: whole }) => {
            is_changed(&old, &written(&bytes, 0, &whole), new.as_ref())
        }
        Ok(HeaderChange::Steps(steps)) => {
            let mut now = bytes;
            for (i, (at, step)) in steps.iter().enumerate() {
                now = written(&now, usize::try_from(at.0).unwrap(), step);
                if i + 1 < steps.len() {
                    assert_eq!(
                        Header::parse(&now).as_ref(),
                        Ok(&old),
                        "steps before the last one change nothing"
                    );
                }
            }
            is_changed(&old, &now, new.as_ref());
        }
    }
});

/// The start of a new image, with a few bytes overwritten.
fn image_start(input: &Input) -> Option<Vec<u8>> {
    let cluster_bits = 9 + u32::from(input.cluster_bits % 13);
    let new = NewHeader {
        version: if input.version_2 { Version::V2 } else { Version::V3 },
        cluster_bits,
        size: input.size & !511,
        refcount_width: RefcountWidth::DEFAULT,
        refcount_table_offset: 1 << cluster_bits,
        l1_table_offset: 3 << cluster_bits,
        backing: input.old.as_ref().map(Name::backing),
        ..NewHeader::default()
    };
    let mut bytes = new.encode().ok()?;
    bytes.resize(4096, 0);
    for (at, byte) in &input.edits {
        bytes[usize::from(at % 4096)] = *byte;
    }
    Some(bytes)
}

/// `bytes` say what `old` said, but for the backing file.
fn is_changed(old: &Header, bytes: &[u8], new: Option<&BackingFile>) {
    let header = Header::parse(bytes).expect("the new header parses");
    assert_eq!(header.backing(), new);
    let root = |h: &Header| {
        (
            (h.version(), h.geometry(), h.size(), h.refcount_width(), h.encryption(), h.compression()),
            (h.l1_size(), h.l1_table_offset(), h.refcount_table_offset(), h.refcount_table_clusters()),
            (h.nb_snapshots(), h.snapshots_offset(), h.incompatible(), h.compatible(), h.autoclear()),
        )
    };
    assert_eq!(root(&header), root(old));
    let others = |h: &Header| -> Vec<(ExtensionKind, Vec<u8>)> {
        let kept = h.extensions().iter().filter(|e| e.kind != ExtensionKind::BackingFormat);
        kept.map(|e| (e.kind, e.data.clone())).collect()
    };
    assert_eq!(others(&header), others(old), "extensions are kept, in their order");
}
