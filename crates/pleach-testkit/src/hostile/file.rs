//! The file itself: what is no file, files that end too early, files that never end, files of two formats.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::backing::fifo;
use super::{BAD, Case, Expect, IMAGE, LEAKS, OPENS, REFUSED, Read, SOUND, UNREADABLE, Verdict, plain};
use crate::image::{Built, ImageBuilder, Shape};

/// Nothing that could be an image.
const NO_FILE: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::Refused };
/// Not an image of this format: whether it may be read as raw is not for this case to say.
const FOREIGN: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::Any };

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::files("file-fifo".to_owned(), NO_FILE, |dir| {
            fifo(dir, IMAGE);
        })
        .hangs_qemu(),
        Case::files("file-symlink-to-fifo".to_owned(), NO_FILE, |dir| {
            fifo(dir, "fifo");
            symlink("fifo", dir.join(IMAGE)).expect("a link");
        })
        .hangs_qemu(),
        Case::files("file-socket".to_owned(), NO_FILE, |dir| {
            drop(UnixListener::bind(dir.join(IMAGE)).expect("a socket"));
        }),
        Case::files("file-character-device".to_owned(), NO_FILE, |dir| {
            symlink("/dev/zero", dir.join(IMAGE)).expect("a link");
        })
        .hangs_qemu(),
        Case::files("file-directory".to_owned(), Expect { check: Verdict::Any, ..NO_FILE }, |dir| {
            fs::create_dir(dir.join(IMAGE)).expect("a directory");
        }),
        Case::files("file-dangling-symlink".to_owned(), REFUSED, |dir| {
            symlink("nowhere", dir.join(IMAGE)).expect("a link");
        }),
        Case::files("file-symlink-loop".to_owned(), REFUSED, |dir| {
            symlink(IMAGE, dir.join(IMAGE)).expect("a link");
        }),
        Case::files("file-empty".to_owned(), FOREIGN, |dir| fs::write(dir.join(IMAGE), b"").expect("a file")),
        Case::files("file-only-magic".to_owned(), REFUSED, |dir| {
            fs::write(dir.join(IMAGE), b"QFI\xfb").expect("a file");
        }),
    ];
    for len in [1, 3, 8, 71, 72, 100, 103] {
        let expect = if len < 4 { FOREIGN } else { REFUSED };
        cases.push(cut(&format!("in-the-header-{len}"), expect, move |_| len));
    }
    cases.push(cut("behind-the-header", BAD_CUT, |_| 112));
    cases.push(cut("before-the-l1-table", BAD_CUT, |b| b.at.l1));
    cases.push(cut("in-the-l1-table", BAD, |b| b.at.l1 + 8));
    cases.push(cut("before-the-refcount-table", BAD, |b| b.at.table));
    cases.push(cut("before-the-refcount-block", BAD, first_block));
    cases.push(cut("in-the-refcount-block", BAD, |b| first_block(b) + 8));
    cases.push(cut("before-the-second-l2-table", BAD_CUT, |b| b.at.l2.get(&1).copied().unwrap_or(0)));
    cases
        .push(cut("before-the-compressed-clusters", BAD_CUT, |b| b.bytes.be(b.entry_of(5), 8) & 0x0fff_f000));
    cases.push(cut("before-the-guest-data", BAD_CUT, |b| b.at.data.get(&1).copied().unwrap_or(0)));
    cases.push(cut("in-the-guest-data", BAD_CUT, |b| b.at.data.get(&1).copied().unwrap_or(0) + 700));
    cases.push(cut_of(last_is_data, "last-cluster-gone", UNREADABLE, |b| b.bytes.len() - 4096));
    cases.push(cut_of(last_is_data, "in-the-last-cluster", OPENS, |b| b.bytes.len() - 1000));
    cases.push(longer("junk-behind-it", SOUND, |b| b.bytes.put(b.bytes.len(), &[0xff; 5000])));
    cases.push(longer("sparse-tail-1t", SOUND, |b| b.bytes.set_len(1 << 40)));
    cases.push(longer("sparse-tail-8t", SOUND, |b| b.bytes.set_len(8 << 40)));
    cases.push(longer("counted-sparse-tail", LEAKS, |b| {
        b.put_count(b.bytes.len() / 4096, 1);
        b.bytes.set_len(1 << 40);
    }));
    // Other formats' marks in clusters that nobody uses.
    cases.push(longer("iso-polyglot", SOUND, |b| {
        b.bytes.set_len(b.bytes.len().max(1 << 20));
        b.bytes.put(0x80000 + 1, b"CD001\x01");
    }));
    cases.push(longer("gpt-polyglot", SOUND, |b| b.bytes.put(512, b"EFI PART\0\0\x01\0")));
    cases.push(longer("vmdk-polyglot", SOUND, |b| {
        b.bytes.put(1024, b"# Disk DescriptorFile\nRW 63 FLAT \"/etc/passwd\" 0\n")
    }));
    cases.push(Case::files("file-vmdk-descriptor".to_owned(), FOREIGN, |dir| {
        let text = b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 128 FLAT \"../outside/canary.raw\" 0\n";
        fs::write(dir.join(IMAGE), text).expect("a file");
    }));
    cases.push(Case::files("file-qcow-version-1".to_owned(), REFUSED, |dir| {
        let header = [b"QFI\xfb".as_slice(), &[0, 0, 0, 1], &[0; 400]].concat();
        fs::write(dir.join(IMAGE), header).expect("a file");
    }));
    cases
}

/// Data or the way to them are gone: nothing may stand in for them.
const BAD_CUT: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::Refused };

fn first_block(built: &Built) -> u64 {
    built.at.blocks.first().copied().unwrap_or(0)
}

/// An image whose last cluster is guest data: what lies behind it moves to the front.
fn last_is_data() -> Built {
    let mut built = ImageBuilder::rich(Shape::default()).finish();
    let end = built.bytes.len();
    let (at, old) = (built.entry_of(0), built.at.data.get(&0).copied().unwrap_or(0));
    let data = built.bytes.get(old, 4096);
    built.bytes.put(end, &data);
    built.bytes.put_be(at, 8, end | crate::image::COPIED);
    built.put_count(end / 4096, 1);
    built.put_count(old / 4096, 0);
    built
}

fn cut(name: &str, expect: Expect, at: impl Fn(&Built) -> u64 + Send + Sync + 'static) -> Case {
    cut_of(plain, name, expect, at)
}

fn cut_of(
    base: fn() -> Built,
    name: &str,
    expect: Expect,
    at: impl Fn(&Built) -> u64 + Send + Sync + 'static,
) -> Case {
    Case::built(format!("file-cut-{name}"), expect, move || {
        let mut built = base();
        let len = at(&built);
        built.bytes.set_len(len);
        built
    })
}

fn longer(name: &str, expect: Expect, change: fn(&mut Built)) -> Case {
    Case::built(format!("file-{name}"), expect, move || {
        let mut built = plain();
        change(&mut built);
        built
    })
}
