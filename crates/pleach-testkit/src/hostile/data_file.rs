//! External data files: a name in an image must not make anybody read or write another file.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::backing::{absolute, fifo};
use super::{CANARY, Case, Expect, IMAGE, OPENS, OUTSIDE, Read, UNREAD, Verdict};
use crate::image::{COPIED, DATA_FILE, ImageBuilder, Shape};

pub(super) fn cases() -> Vec<Case> {
    let rows: [(&str, Expect, Make); 17] = [
        ("absolute", UNREAD, |dir| absolute(dir)),
        ("parent", UNREAD, |_| format!("../{OUTSIDE}/{CANARY}").into_bytes()),
        ("symlink", UNREAD, |dir| {
            symlink(dir.join("..").join(OUTSIDE).join(CANARY), dir.join("link")).expect("a link");
            b"link".to_vec()
        }),
        ("symlinked-directory", UNREAD, |dir| {
            symlink(dir.join("..").join(OUTSIDE), dir.join("sub")).expect("a link");
            format!("sub/{CANARY}").into_bytes()
        }),
        ("json", UNREAD, |dir| {
            let name = String::from_utf8_lossy(&absolute(dir)).into_owned();
            format!(r#"json:{{"driver":"file","filename":"{name}"}}"#).into_bytes()
        }),
        ("file-protocol", UNREAD, |dir| [b"file:".to_vec(), absolute(dir)].concat()),
        ("nbd", UNREAD, |_| b"nbd://127.0.0.1:1/x".to_vec()),
        ("null-co", UNREAD, |_| b"null-co://".to_vec()),
        ("device", UNREAD, |_| b"/dev/zero".to_vec()),
        ("proc", UNREAD, |_| b"/proc/self/environ".to_vec()),
        ("stdin", UNREAD, |_| b"/dev/stdin".to_vec()),
        ("fifo", UNREAD, |dir| fifo(dir, "fifo")),
        ("directory", UNREAD, |dir| {
            fs::create_dir(dir.join("sub")).expect("a directory");
            b"sub".to_vec()
        }),
        ("itself", UNREAD, |_| IMAGE.as_bytes().to_vec()),
        ("missing", UNREAD, |_| b"nowhere.raw".to_vec()),
        ("empty", UNREAD, |_| Vec::new()),
        ("nul", UNREAD, |_| b"a\0b".to_vec()),
    ];
    let mut cases: Vec<Case> = rows
        .into_iter()
        .map(|(name, expect, make)| {
            Case::files(format!("data-file-{name}"), expect, move |dir| {
                let data = make(dir);
                image(&data).finish().bytes.write(&dir.join(IMAGE));
            })
        })
        .collect();
    cases.push(Case::files("data-file-inside".to_owned(), OPENS, |dir| {
        fs::write(dir.join("data.raw"), vec![7; 1 << 20]).expect("a data file");
        image(b"data.raw").finish().bytes.write(&dir.join(IMAGE));
    }));
    cases.push(Case::files("data-file-compressed-cluster".to_owned(), BAD, |dir| {
        fs::write(dir.join("data.raw"), vec![7; 1 << 20]).expect("a data file");
        let mut image = image(b"data.raw");
        image.compressed(9);
        image.finish().bytes.write(&dir.join(IMAGE));
    }));
    cases.push(Case::files("data-file-not-the-identity".to_owned(), BAD_READ, |dir| {
        fs::write(dir.join("data.raw"), vec![7; 1 << 20]).expect("a data file");
        let mut built = image(b"data.raw").finish();
        let at = built.entry_of(3);
        built.bytes.put_be(at, 8, 0x5000 | COPIED);
        built.bytes.write(&dir.join(IMAGE));
    }));
    cases.push(Case::files("data-file-and-backing-file".to_owned(), OPENS, |dir| {
        fs::write(dir.join("data.raw"), vec![7; 1 << 20]).expect("a data file");
        fs::write(dir.join("base.raw"), vec![8; 1 << 20]).expect("a base");
        let mut image = image(b"data.raw");
        image.autoclear = 2;
        image.backing("base.raw", "raw");
        image.finish().bytes.write(&dir.join(IMAGE));
    }));
    cases.push(Case::files("data-file-named-in-a-backing-file".to_owned(), UNREAD, |dir| {
        image(&absolute(dir)).finish().bytes.write(&dir.join("base.qcow2"));
        let mut top = ImageBuilder::new(Shape::default());
        top.backing("base.qcow2", "qcow2");
        top.finish().bytes.write(&dir.join(IMAGE));
    }));
    cases
}

/// Lays out what the name leads to, and gives the name.
type Make = fn(&Path) -> Vec<u8>;

const BAD: Expect = Expect { opens: Some(true), check: Verdict::Any, read: Read::Any };
const BAD_READ: Expect = Expect { read: Read::Refused, ..BAD };

/// The first four guest clusters are in the data file, where the format says that they must be.
fn image(name: &[u8]) -> ImageBuilder {
    let mut image = ImageBuilder::new(Shape::default());
    image.incompatible = 4;
    image.extension(DATA_FILE, name);
    for guest in 0..4 {
        image.external(guest);
    }
    image
}
