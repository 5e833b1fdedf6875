//! Any bytes, with and without a right checksum: never a panic; what is read is sound, and written and read again is equal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pleach_lineage::{Record, RecordError};

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    // The same as the body of a catalog, so that it gets past the checksum.
    let mut body = bytes.to_vec();
    if let Some(place) = bytes.windows(7).rposition(|part| part == b"\ncrc32 ") {
        body.truncate(place + 1);
    }
    let line = format!("crc32 {:08x}\n", crc32fast::hash(&body));
    body.extend(line.as_bytes());
    read(&body);
});

fn read(bytes: &[u8]) {
    let record = match Record::parse(bytes) {
        Ok(record) => record,
        Err(error) => return assert!(!error.to_string().contains('\n'), "{error}"),
    };
    record.check().expect("what was read is sound");
    let (tree, ids) = record.lineage().expect("and a hierarchy");
    assert_eq!((tree.len(), ids.len()), (record.nodes.len(), record.nodes.len()));
    let text = record.encode();
    let again = Record::parse(text.as_bytes()).expect("what was written is read");
    assert_eq!(again, record);
    assert_eq!(again.encode(), text);
    // A byte of it lost is noticed.
    let cut = text.get(1..).unwrap_or_default();
    assert!(matches!(Record::parse(cut.as_bytes()), Err(RecordError::NotACatalog)));
}
