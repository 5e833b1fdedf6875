//! Backing files: names that lead outside, names that are no paths, and chains that do not end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::{ANY, CANARY, Case, Expect, IMAGE, OPENS, OUTSIDE, Read, UNREAD, Verdict};
use crate::image::{ImageBuilder, Shape};

/// The name of the canary from the root on.
pub(super) fn absolute(dir: &Path) -> Vec<u8> {
    let outside = dir.parent().expect("cases lie in a directory").join(OUTSIDE).join(CANARY);
    outside.to_str().expect("test paths are UTF-8").as_bytes().to_vec()
}

/// Makes a pipe that nobody writes to; its name.
pub(super) fn fifo(dir: &Path, name: &str) -> Vec<u8> {
    let status = Command::new("mkfifo").arg(dir.join(name)).status().expect("mkfifo is everywhere");
    assert!(status.success(), "mkfifo: {status}");
    name.as_bytes().to_vec()
}

/// Lays out what the name leads to, and gives the name.
type Make = fn(&Path) -> Vec<u8>;

/// As [`UNREAD`], or `info` refuses the name itself.
const NAMED: Expect = Expect { opens: None, ..UNREAD };
const READ: Expect = Expect { opens: Some(true), check: Verdict::Clean, read: Read::Any };

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, format, expect, make) in NAMES {
        let (format, make) = (*format, *make);
        let case = Case::files(format!("backing-{name}"), *expect, move |dir| {
            let base = make(dir);
            over(&base, format, &dir.join(IMAGE));
        });
        cases.push(if name.contains("loop") || name.contains("fifo") { case.hangs_qemu() } else { case });
    }
    cases.push(
        Case::files("backing-loop-of-two".to_owned(), UNREAD, |dir| {
            over(b"other.qcow2", "qcow2", &dir.join(IMAGE));
            over(IMAGE.as_bytes(), "qcow2", &dir.join("other.qcow2"));
        })
        .hangs_qemu(),
    );
    cases.push(
        Case::files("backing-loop-of-three".to_owned(), UNREAD, |dir| {
            over(b"1.qcow2", "qcow2", &dir.join(IMAGE));
            over(b"2.qcow2", "qcow2", &dir.join("1.qcow2"));
            over(IMAGE.as_bytes(), "qcow2", &dir.join("2.qcow2"));
        })
        .hangs_qemu(),
    );
    cases.push(
        Case::files("backing-loop-below".to_owned(), UNREAD, |dir| {
            over(b"1.qcow2", "qcow2", &dir.join(IMAGE));
            over(b"2.qcow2", "qcow2", &dir.join("1.qcow2"));
            over(b"1.qcow2", "qcow2", &dir.join("2.qcow2"));
        })
        .hangs_qemu(),
    );
    cases.push(
        Case::files("backing-loop-through-a-hard-link".to_owned(), UNREAD, |dir| {
            over(b"link.qcow2", "qcow2", &dir.join(IMAGE));
            fs::hard_link(dir.join(IMAGE), dir.join("link.qcow2")).expect("a link");
        })
        .hangs_qemu(),
    );
    cases.push(Case::files("backing-deep-chain".to_owned(), OPENS, |dir| {
        for depth in 1..200 {
            let name = if depth == 1 { IMAGE.to_owned() } else { format!("{depth:03}.qcow2") };
            over(format!("{:03}.qcow2", depth + 1).as_bytes(), "qcow2", &dir.join(name));
        }
        ImageBuilder::rich(Shape::default()).finish().bytes.write(&dir.join("200.qcow2"));
    }));
    cases.push(Case::files("backing-outside-in-the-middle".to_owned(), UNREAD, |dir| {
        over(b"middle.qcow2", "qcow2", &dir.join(IMAGE));
        over(&absolute(dir), "raw", &dir.join("middle.qcow2"));
    }));
    cases.push(Case::files("backing-probed-raw".to_owned(), UNREAD, |dir| {
        // A guest wrote a header into its raw disk; nothing says that the disk is raw.
        over(&absolute(dir), "raw", &dir.join("disk.raw"));
        over(b"disk.raw", "", &dir.join(IMAGE));
    }));
    cases.push(Case::files("backing-raw-that-looks-like-an-image".to_owned(), READ, |dir| {
        over(&absolute(dir), "raw", &dir.join("disk.raw"));
        over(b"disk.raw", "raw", &dir.join(IMAGE));
    }));
    cases.push(Case::files("backing-raw-over-raw-that-looks-like-an-image".to_owned(), READ, |dir| {
        over(&absolute(dir), "raw", &dir.join("disk.raw"));
        over(b"disk.raw", "raw", &dir.join("middle.qcow2"));
        over(b"middle.qcow2", "qcow2", &dir.join(IMAGE));
    }));
    for (name, edit) in DAMAGED_BASES {
        let edit = *edit;
        cases.push(Case::files(format!("backing-file-{name}"), UNREAD, move |dir| {
            let mut base = ImageBuilder::rich(Shape::default()).finish();
            edit(&mut base);
            base.bytes.write(&dir.join("base.qcow2"));
            over(b"base.qcow2", "qcow2", &dir.join(IMAGE));
        }));
    }
    cases
}

const DAMAGED_BASES: &[(&str, super::Edit)] = &[
    ("empty", |b| b.bytes.set_len(0)),
    ("cut-in-the-header", |b| b.bytes.set_len(60)),
    ("cut-after-the-header", |b| b.bytes.set_len(4096)),
    ("encrypted", |b| b.bytes.put_be(32, 4, 1)),
    ("unknown-feature", |b| b.bytes.put_be(72, 8, 1 << 9)),
    ("with-a-bad-l1-table", |b| b.bytes.put_be(b.at.l1, 8, 1 << 40)),
];

const NAMES: &[(&str, &str, Expect, Make)] = &[
    ("absolute", "raw", UNREAD, |dir| absolute(dir)),
    ("absolute-without-format", "", UNREAD, |dir| absolute(dir)),
    ("absolute-as-qcow2", "qcow2", UNREAD, |dir| absolute(dir)),
    ("parent", "raw", UNREAD, |_| format!("../{OUTSIDE}/{CANARY}").into_bytes()),
    ("parent-with-detours", "raw", UNREAD, |_| format!("./.././/{OUTSIDE}/./{CANARY}").into_bytes()),
    ("symlink", "raw", UNREAD, |dir| {
        symlink(dir.join("..").join(OUTSIDE).join(CANARY), dir.join("link")).expect("a link");
        b"link".to_vec()
    }),
    ("symlink-chain", "raw", UNREAD, |dir| {
        symlink("second", dir.join("link")).expect("a link");
        symlink(format!("../{OUTSIDE}/{CANARY}"), dir.join("second")).expect("a link");
        b"link".to_vec()
    }),
    ("symlink-loop", "raw", UNREAD, |dir| {
        symlink("b", dir.join("a")).expect("a link");
        symlink("a", dir.join("b")).expect("a link");
        b"a".to_vec()
    }),
    ("symlinked-directory", "raw", UNREAD, |dir| {
        symlink(dir.join("..").join(OUTSIDE), dir.join("sub")).expect("a link");
        format!("sub/{CANARY}").into_bytes()
    }),
    ("dangling-symlink", "raw", UNREAD, |dir| {
        symlink("nowhere", dir.join("link")).expect("a link");
        b"link".to_vec()
    }),
    ("proc-root", "raw", UNREAD, |dir| [b"/proc/self/root".to_vec(), absolute(dir)].concat()),
    ("json", "raw", UNREAD, |dir| {
        let name = String::from_utf8_lossy(&absolute(dir)).into_owned();
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{name}"}}}}"#).into_bytes()
    }),
    ("json-without-format", "", UNREAD, |dir| {
        let name = String::from_utf8_lossy(&absolute(dir)).into_owned();
        format!(r#"json:{{"file.filename":"{name}"}}"#).into_bytes()
    }),
    ("file-protocol", "raw", UNREAD, |dir| [b"file:".to_vec(), absolute(dir)].concat()),
    ("file-url", "raw", UNREAD, |dir| [b"file://".to_vec(), absolute(dir)].concat()),
    ("fat", "raw", UNREAD, |_| format!("fat:../{OUTSIDE}").into_bytes()),
    ("nbd", "raw", UNREAD, |_| b"nbd://127.0.0.1:1/x".to_vec()),
    ("nbd-socket", "raw", UNREAD, |_| b"nbd+unix:///x?socket=/nowhere".to_vec()),
    ("https", "raw", UNREAD, |_| b"https://127.0.0.1:1/x".to_vec()),
    ("host-device", "raw", UNREAD, |_| b"host_device:/dev/zero".to_vec()),
    ("device", "raw", UNREAD, |_| b"/dev/zero".to_vec()),
    ("device-symlink", "raw", UNREAD, |dir| {
        symlink("/dev/zero", dir.join("link")).expect("a link");
        b"link".to_vec()
    }),
    ("stdin", "raw", UNREAD, |_| b"/dev/stdin".to_vec()),
    ("descriptor", "raw", UNREAD, |_| b"/dev/fd/0".to_vec()),
    ("proc", "raw", UNREAD, |_| b"/proc/self/environ".to_vec()),
    ("fifo", "raw", UNREAD, |dir| fifo(dir, "fifo")),
    ("fifo-as-qcow2", "qcow2", UNREAD, |dir| fifo(dir, "fifo")),
    ("directory", "raw", UNREAD, |dir| {
        fs::create_dir(dir.join("sub")).expect("a directory");
        b"sub".to_vec()
    }),
    ("dot", "raw", UNREAD, |_| b".".to_vec()),
    ("missing", "raw", UNREAD, |_| b"nowhere.raw".to_vec()),
    ("missing-directory", "raw", UNREAD, |_| b"nowhere/base.raw".to_vec()),
    ("itself-loop", "qcow2", UNREAD, |_| IMAGE.as_bytes().to_vec()),
    ("itself-by-detour-loop", "qcow2", UNREAD, |_| format!("././{IMAGE}").into_bytes()),
    ("itself-by-symlink-loop", "qcow2", UNREAD, |dir| {
        symlink(IMAGE, dir.join("link")).expect("a link");
        b"link".to_vec()
    }),
    ("itself-as-raw-loop", "raw", ANY, |_| IMAGE.as_bytes().to_vec()),
    ("without-format", "", UNREAD, |dir| raw(dir)),
    ("unknown-format", "vmdk", UNREAD, |dir| raw(dir)),
    ("format-in-capitals", "RAW", UNREAD, |dir| raw(dir)),
    ("raw-said-to-be-qcow2", "qcow2", UNREAD, |dir| raw(dir)),
    ("qcow2-said-to-be-qcow", "qcow", UNREAD, |dir| raw(dir)),
    ("escapes", "raw", NAMED, |_| b"\x1b[2J\x1b]0;owned\x07".to_vec()),
    ("newline", "raw", NAMED, |_| b"a\nerror: all is well".to_vec()),
    ("not-utf8", "raw", NAMED, |_| b"\xff\xfe.raw".to_vec()),
    ("option", "raw", NAMED, |_| b"--help".to_vec()),
    ("shell", "raw", NAMED, |_| b"$(touch owned);`touch owned`|touch owned".to_vec()),
    ("longest", "raw", NAMED, |_| vec![b'a'; 1023]),
    ("deepest", "raw", NAMED, |_| b"a/".repeat(511)),
];

fn raw(dir: &Path) -> Vec<u8> {
    fs::write(dir.join("base.raw"), vec![9; 65536]).expect("a base");
    b"base.raw".to_vec()
}

/// An overlay with little of its own over `base`.
fn over(base: &[u8], format: &str, path: &Path) {
    let mut image = ImageBuilder::new(Shape::default());
    image.data(20);
    image.backing(base, format);
    image.finish().bytes.write(path);
}
