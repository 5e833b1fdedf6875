//! What is written is read back, and nothing else is read.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::{DiskRecord, NodeRecord, Record, RecordError};
use crate::model::Lcg;
use crate::{Kind, Storage};

/// The text with its checksum.
fn sealed(body: &str) -> String {
    format!("{body}crc32 {:08x}\n", crc32fast::hash(body.as_bytes()))
}

fn sample() -> Record {
    let external = |file: &str| Storage::External { file: file.to_owned() };
    let (file, id) = ("E.qcow2".to_owned(), "1".to_owned());
    Record {
        current: Some("nach dem\n\u{1b} \"Update\"".to_owned()),
        disks: alloc::vec![DiskRecord::new("vda", Some("E.qcow2".to_owned())), DiskRecord::new("vdb", None)],
        nodes: alloc::vec![
            NodeRecord {
                created: Some(-1),
                description: "frisch\\".to_owned(),
                state: Some("shutoff".to_owned()),
                storage: alloc::vec![("vda".to_owned(), external("A B.qcow2"))],
                ..NodeRecord::new("", Kind::Snapshot)
            },
            NodeRecord {
                parent: Some(String::new()),
                parent_guessed: true,
                storage: alloc::vec![
                    ("vda".to_owned(), Storage::Internal { file, snapshot: "s 1".to_owned(), id }),
                    ("vdb".to_owned(), external("/x/%ff")),
                ],
                ..NodeRecord::new("nach dem\n\u{1b} \"Update\"", Kind::Head)
            },
        ],
        raw: ["A B.qcow2".to_owned()].into(),
        forgotten: alloc::vec![("vda".to_owned(), external("old.qcow2"))],
        ..Record::new("vm1")
    }
}

#[test]
fn what_is_written_is_read_back() {
    let record = sample();
    let text = record.encode();
    assert_eq!(Record::parse(text.as_bytes()).as_ref(), Ok(&record), "{text}");
    assert!(text.contains("current \"nach dem\\n\\u{1b} \\\"Update\\\"\"\n"), "{text}");
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
}

#[test]
fn what_is_unknown_stays() {
    let text = sealed(
        "pleach-tree 1\ntree t\ndisk vda\n  active a\n  weight \"1 kg\"\nsnapshot s\n  parent a b c\n  xml \"<a/>\"\n\
         colour red\n  deep  green\n",
    );
    let mut record = Record::parse(text.as_bytes()).unwrap();
    assert_eq!(record.encode(), text);
    let node = record.find_mut("s").unwrap();
    assert_eq!(node.field("xml"), Some(alloc::vec!["<a/>".to_owned()]));
    node.set_field("xml", &["b", ""]);
    assert_eq!(node.other, ["parent a b c", "xml b \"\""]);
    node.set_field("xml", &[]);
    assert_eq!((node.field("xml"), node.other.len()), (None, 1));
}

#[test]
fn a_child_may_come_before_its_parent() {
    let text = sealed("pleach-tree 1\ntree t\nsnapshot c\n  parent b\nsnapshot b\n  parent a\nsnapshot a\n");
    let (tree, ids) = Record::parse(text.as_bytes()).unwrap().lineage().unwrap();
    let names: Vec<&str> = tree.depth_first().map(|(_, id)| tree[id].name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(ids.iter().map(|&id| tree[id].name.as_str()).collect::<Vec<_>>(), ["c", "b", "a"]);
}

#[test]
fn what_is_refused() {
    let cases: &[(&str, &str, &str)] = &[
        ("nothing", "", "no catalog"),
        ("another file", "QFI\u{fb}\n", "no catalog"),
        ("a later one", "pleach-tree 2\n", "format \"2\""),
        ("a twin", "pleach-tree 1\nsnapshot a\nsnapshot a\n", "already is a node named \"a\""),
        ("a lost parent", "pleach-tree 1\nsnapshot a\n  parent b\n", "\"a\" names the parent \"b\""),
        ("a loop", "pleach-tree 1\nsnapshot a\n  parent b\nsnapshot b\n  parent a\n", "stands on itself"),
        ("its own parent", "pleach-tree 1\nsnapshot a\n  parent a\n", "stands on itself"),
        ("a lost current", "pleach-tree 1\ncurrent a\n", "\"current\" names the node \"a\""),
        ("a lost disk", "pleach-tree 1\nsnapshot a\n  external b c\n", "\"a\" names the disk \"b\""),
        ("twin disks", "pleach-tree 1\ndisk a\ndisk a\n", "two disks named \"a\""),
        ("a disk twice", "pleach-tree 1\ndisk a\nsnapshot s\n  external a b\n  external a c\n", "two disks"),
        ("no time", "pleach-tree 1\nsnapshot a\n  created now\n", "line 3: the time"),
        ("two names", "pleach-tree 1\nsnapshot a b\n", "line 2: must have one word"),
        ("an open quote", "pleach-tree 1\nsnapshot \"a\n", "line 2: a quote that does not end"),
        ("an escape", "pleach-tree 1\nsnapshot \"\\q\"\n", "line 2: an unknown escape"),
        ("a surrogate", "pleach-tree 1\nsnapshot \"\\u{d800}\"\n", "line 2: an escape that is no"),
        ("a quote within", "pleach-tree 1\nsnapshot a\"b\n", "line 2: a quote inside"),
        ("words that touch", "pleach-tree 1\nsnapshot \"a\"b\n", "line 2: a blank is missing"),
        ("below the tree", "pleach-tree 1\ntree a\n  b\n", "line 3: nothing can belong"),
    ];
    for (case, body, want) in cases {
        let error = Record::parse(sealed(body).as_bytes()).expect_err(case).to_string();
        assert!(error.contains(want), "{case}: {error}");
    }
    assert_eq!(Record::parse(b"\xff"), Err(RecordError::NotText { at: 0 }));
}

#[test]
fn what_is_raw_is_known_as_long_as_it_is_named() {
    let mut record = sample();
    record.rename_files(|file| (file == "A B.qcow2").then(|| "C\nraw x".to_owned()));
    assert_eq!(record.raw, ["C\nraw x".to_owned()].into());
    let text = record.encode();
    assert_eq!(super::raw_files(text.as_bytes()), ["C\nraw x"]);
    assert_eq!(super::raw_files(&text.as_bytes()[..text.len() - 20]), ["C\nraw x"]);
    record.nodes[0].storage.clear();
    assert_eq!(Record::parse(record.encode().as_bytes()).unwrap().raw, [].into());
    // What another version means by it is kept.
    let text = sealed("pleach-tree 1\ntree vm\nraw a b\n");
    assert_eq!(Record::parse(text.as_bytes()).unwrap().encode(), text);
}

#[test]
fn every_changed_byte_is_noticed() {
    let text = sample().encode();
    for at in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at] ^= 1;
        assert!(Record::parse(&bytes).is_err(), "byte {at}");
        assert!(Record::parse(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn any_names_come_back() {
    let dice = &mut Lcg::new(3);
    let alphabet: Vec<char> = "aZ9 \"\\\n\t\r\u{0}\u{85}\u{202e}{}äλ%".chars().collect();
    for _ in 0..300 {
        let mut word =
            || (0..dice.below(8)).map(|_| alphabet[dice.below(alphabet.len())]).collect::<String>();
        let disk = word();
        let mut node = NodeRecord {
            description: word(),
            state: Some(word()),
            storage: alloc::vec![(
                disk.clone(),
                Storage::Internal { file: word(), snapshot: word(), id: word() }
            )],
            ..NodeRecord::new(word(), Kind::Snapshot)
        };
        let value = word();
        node.set_field("key", &[&value]);
        assert_eq!(node.field("key"), Some(alloc::vec![value]));
        let record = Record {
            current: Some(node.name.clone()),
            disks: alloc::vec![DiskRecord::new(disk, Some(word()))],
            nodes: alloc::vec![node],
            ..Record::new(word())
        };
        let text = record.encode();
        assert_eq!(Record::parse(text.as_bytes()), Ok(record), "{text}");
    }
}

#[test]
fn a_hundred_thousand_nodes_deep() {
    let mut record = Record::new("deep");
    for n in 0..100_000_u32 {
        let parent = n.checked_sub(1).map(|p| format!("{p}"));
        record.nodes.push(NodeRecord { parent, ..NodeRecord::new(format!("{n}"), Kind::Snapshot) });
    }
    record.nodes.reverse();
    let back = Record::parse(record.encode().as_bytes()).unwrap();
    assert_eq!(back.lineage().unwrap().0.len(), 100_000);
}
