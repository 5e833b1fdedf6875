//! Hostile images: one fault each, over everything that an image can lie about.
//!
//! Cases are made by code, byte by byte, so that a row of a table says what is wrong with each. [`cases`] is all of
//! them; [`Case::make`] lays one out in a directory of its own, the image always being called [`IMAGE`]. What lies in
//! the directory [`OUTSIDE`] beside it is nobody's business: images name it, and no tool may read it.

mod backing;
mod bitmaps;
mod bombs;
mod compressed;
mod data_file;
mod encryption;
mod extensions;
mod file;
mod found;
mod header;
mod l1;
mod l2;
mod refcounts;
mod snapshots;

use std::fs;
use std::path::Path;

use crate::Digest;
use crate::image::{Built, ImageBuilder, Shape};

/// Name of the image of every case.
pub const IMAGE: &str = "image.qcow2";
/// Name of the directory beside the cases that images name although it is not theirs.
pub const OUTSIDE: &str = "outside";
/// Name of the file in it that must not be read.
pub const CANARY: &str = "canary.raw";
/// What that file is full of.
pub const SONG: &[u8] = b"canary: whoever reads this has been led outside. ";

/// One hostile image.
pub struct Case {
    /// Class and fault, `l2-unaligned`.
    pub name: String,
    /// What a careful tool does with it.
    pub expect: Expect,
    /// Takes seconds, or much space: only in long mode.
    pub slow: bool,
    /// Stock QEMU does not come back from it, or needs too much.
    pub hangs_qemu: bool,
    /// What it claims is all there: whoever copies it must say how much may be put out.
    pub amplifies: bool,
    make: Box<Make>,
}

/// Lays a case out in a directory; what a guest should read, where that is known.
type Make = dyn Fn(&Path) -> Option<Digest> + Send + Sync;

/// What a careful tool does with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expect {
    /// `info` says something about it; `None`: either.
    pub opens: Option<bool>,
    /// What `check` says.
    pub check: Verdict,
    /// What reading all of it gives.
    pub read: Read,
}

/// What a check says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All is well.
    Clean,
    /// Lost space, and nothing else.
    Leaks,
    /// Corruption, or a refusal: anything but "well" and "leaks only".
    Bad,
    /// It is not for this case to say.
    Any,
}

/// What reading all of a disk gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// The content that was meant.
    Right,
    /// That, or a failure that says why; never other bytes.
    RightOrRefused,
    /// A failure.
    Refused,
    /// It is not for this case to say.
    Any,
}

/// Nothing is wrong, though it may look so.
pub(crate) const SOUND: Expect = Expect { opens: Some(true), check: Verdict::Clean, read: Read::Right };
/// Space is lost.
pub(crate) const LEAKS: Expect = Expect { opens: Some(true), check: Verdict::Leaks, read: Read::Right };
/// The metadata is wrong in a way that reading may not notice, but must not be led astray by.
pub(crate) const DAMAGED: Expect =
    Expect { opens: Some(true), check: Verdict::Bad, read: Read::RightOrRefused };
/// As [`DAMAGED`], and it may be refused altogether.
pub(crate) const BAD: Expect = Expect { opens: None, check: Verdict::Bad, read: Read::RightOrRefused };
/// A pointer on the way to guest data leads nowhere: zeros in its place would be a lie.
pub(crate) const UNREADABLE: Expect = Expect { opens: Some(true), check: Verdict::Bad, read: Read::Refused };
/// The image is well, but where its data are must not or cannot be followed.
pub(crate) const UNREAD: Expect = Expect { opens: Some(true), check: Verdict::Any, read: Read::Refused };
/// No verb takes it.
pub(crate) const REFUSED: Expect = Expect { opens: Some(false), check: Verdict::Bad, read: Read::Refused };
/// Only the common rules hold: no crash, no hang, no canary, no change.
pub(crate) const ANY: Expect = Expect { opens: None, check: Verdict::Any, read: Read::Any };
/// As [`ANY`], and `info` takes it.
pub(crate) const OPENS: Expect = Expect { opens: Some(true), check: Verdict::Any, read: Read::Any };

/// All cases, in a fixed order, no two of one name.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for class in [
        header::cases,
        bombs::cases,
        extensions::cases,
        l1::cases,
        l2::cases,
        compressed::cases,
        refcounts::cases,
        snapshots::cases,
        bitmaps::cases,
        data_file::cases,
        encryption::cases,
        backing::cases,
        file::cases,
        found::cases,
    ] {
        cases.extend(class());
    }
    cases
}

impl Case {
    /// Lays the case out in `dir`, which is empty and has a sibling [`OUTSIDE`]; what a guest should read, where that is
    /// known.
    pub fn make(&self, dir: &Path) -> Option<Digest> {
        (self.make)(dir)
    }

    fn files(name: String, expect: Expect, make: impl Fn(&Path) + Send + Sync + 'static) -> Self {
        let make = move |dir: &Path| {
            make(dir);
            None
        };
        Self { name, expect, slow: false, hangs_qemu: false, amplifies: false, make: Box::new(make) }
    }

    fn built(name: String, expect: Expect, build: impl Fn() -> Built + Send + Sync + 'static) -> Self {
        let make = move |dir: &Path| {
            let built = build();
            built.bytes.write(&dir.join(IMAGE));
            Some(built.digest)
        };
        Self { name, expect, slow: false, hangs_qemu: false, amplifies: false, make: Box::new(make) }
    }

    fn slow(self) -> Self {
        Self { slow: true, hangs_qemu: true, ..self }
    }

    fn amplifies(self) -> Self {
        Self { hangs_qemu: true, amplifies: true, ..self }
    }

    fn hangs_qemu(self) -> Self {
        Self { hangs_qemu: true, ..self }
    }
}

/// Makes the directory [`OUTSIDE`] in `work`.
///
/// # Panics
/// If it cannot be made.
pub fn make_outside(work: &Path) {
    let dir = work.join(OUTSIDE);
    fs::create_dir(&dir).expect("an empty work directory");
    let song: Vec<u8> = SONG.iter().copied().cycle().take(64 << 10).collect();
    fs::write(dir.join(CANARY), song).expect("a canary");
}

/// An edit of a sound image.
type Edit = fn(&mut Built);

/// A table of faults in images that `base` makes.
fn edits(class: &str, base: fn() -> Built, rows: &'static [(&'static str, Expect, Edit)]) -> Vec<Case> {
    let case = |(name, expect, edit): &(&str, Expect, Edit)| {
        let edit = *edit;
        Case::built(format!("{class}-{name}"), *expect, move || {
            let mut built = base();
            edit(&mut built);
            built
        })
    };
    rows.iter().map(case).collect()
}

/// The image that most faults are put into.
fn plain() -> Built {
    ImageBuilder::rich(Shape::default()).finish()
}

/// A fault in a number of a sound image: the name's end, where, how many bytes, the value, what to expect.
type Number = (&'static str, u64, usize, u64, Expect);

fn numbers(class: &str, base: fn() -> Built, place: fn(&Built) -> u64, rows: &[Number]) -> Vec<Case> {
    let case = |&(name, at, width, value, expect): &Number| {
        Case::built(format!("{class}-{name}"), expect, move || {
            let mut built = base();
            let start = place(&built);
            built.bytes.put_be(start + at, width, value);
            built
        })
    };
    rows.iter().map(case).collect()
}
