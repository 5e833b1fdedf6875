//! Any bytes as a journal, of one operation or of steps: `resume` and `undo` never panic, no image is touched that the journal
//! does not know, and every node that it does not name reads as before.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_engine::survey::{FileFormat, Trust};
use pleach_engine::tree::Tree;
use pleach_engine::verbs::{TakeKind, TakeRequest, take};
use pleach_engine::{Source, SourceOptions, Watch, open_writer, resume, undo};
use pleach_format::BackingFile;
use pleach_image::{CreateOptions, create};
use pleach_store::{Access, Disk};
use pleach_testkit::sim::{Contents, SimDisk};
use serde_json::{Value, json};

const DIR: &str = "/d";
/// P <- N <- D <- E, F on D; and a tree of one disk with snapshots of both kinds: a <- a.e1.
const CHAIN: [(&str, Option<&str>); 5] =
    [("P", None), ("N", Some("P")), ("D", Some("N")), ("E", Some("D")), ("F", Some("D"))];

#[derive(Arbitrary, Debug)]
struct Input {
    what: What,
    /// Bytes of the journal that are changed.
    flips: Vec<(u16, u8)>,
    /// How many bytes of it are there, in 256 parts.
    cut: u8,
    undo: bool,
}

#[derive(Arbitrary, Debug)]
enum What {
    /// As it is, after the magic number.
    Raw(Vec<u8>),
    RawSteps(Vec<u8>),
    Records {
        intent: Meant,
        headers: Vec<Header>,
    },
    Steps {
        done: u8,
        steps: Vec<Step>,
    },
}

/// A file by its place among all; perhaps with a wrong inode number.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct File {
    index: u8,
    wrong: bool,
}

#[derive(Arbitrary, Debug)]
enum Meant {
    Remove(Vec<File>),
    Merge {
        victim: File,
        dependents: Vec<File>,
        between: Vec<File>,
        /// Which of the dependents; likewise the next one.
        committed: Option<u8>,
        renamed: Option<u8>,
        followers: Vec<File>,
        named: bool,
        emptied: bool,
    },
    Rebase {
        image: File,
        onto: Option<File>,
    },
}

/// A header that is to be written anew: edits of the one that is there, to be old and to be new.
#[derive(Arbitrary, Debug)]
struct Header {
    file: File,
    len: u16,
    old: Vec<(u16, u8)>,
    new: Vec<(u16, u8)>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Overlay { on: File, name: u8 },
    Copy { from: File, id: u8, name: u8 },
    Take { image: File, id: u8 },
    Apply { image: File, id: u8 },
    Drop { image: File, id: u8 },
    Relabel { image: File, id: u8 },
    Merge { victim: File, dependents: Vec<File>, heir: Option<File> },
    Rebase { image: File, onto: Option<File> },
    Remove { image: File },
    Save { text: Vec<u8> },
    Forget,
}

struct Start {
    contents: Contents,
    /// Path and inode number of each image.
    files: Vec<(PathBuf, u64)>,
}

fn trusting() -> SourceOptions {
    let trust = Trust { everything: true, ..Trust::default() };
    SourceOptions { format: Some(FileFormat::Qcow2), trust, ..SourceOptions::default() }
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn start() -> &'static Start {
    static START: OnceLock<Start> = OnceLock::new();
    START.get_or_init(|| {
        let disk = SimDisk::new(Path::new(DIR));
        let fill = |name: &str, byte: u8| {
            let writer = open_writer(&disk, &path(name), &trusting()).unwrap();
            for at in 0..4 {
                writer.write_at((at * 3 + u64::from(byte % 5)) * 512, &[byte; 512]).unwrap();
            }
            writer.close().unwrap();
        };
        for (i, (name, backing)) in (1u8..).zip(CHAIN) {
            let backing = backing.map(|b| BackingFile { name: b.into(), format: Some(b"qcow2".to_vec()) });
            let options =
                CreateOptions { size: 32 * 512, cluster_bits: 9, backing, ..CreateOptions::default() };
            create(&disk, &path(name), &options).unwrap();
            fill(name, i);
        }
        create(
            &disk,
            &path("a"),
            &CreateOptions { size: 32 * 512, cluster_bits: 9, ..CreateOptions::default() },
        )
        .unwrap();
        fill("a", 7);
        let disks = [("vda".to_owned(), path("a"))];
        let mut tree = Tree::adopt(&disk, Path::new(DIR), "vm", &disks, &[], &Trust::default()).unwrap();
        for (byte, kind) in [(8, TakeKind::Internal), (9, TakeKind::External)] {
            let name = format!("s{byte}");
            let request = TakeRequest { name, created: 1, kind: Some(kind), ..TakeRequest::default() };
            take(&disk, &tree, &request).unwrap().run(&disk, &Watch::new()).unwrap();
            tree = Tree::load(&disk, &path(".pleach/vm.tree"), &[], &Trust::default()).unwrap();
            let active = tree.catalog.record.disks[0].active.clone().unwrap();
            fill(&active, byte);
        }
        let contents = disk.contents();
        let images = contents.names().filter(|(_, bytes)| bytes.starts_with(b"QFI"));
        let files = images.map(|(p, _)| (p.to_owned(), disk.stat(p).unwrap().id.inode)).collect();
        Start { contents: disk.contents(), files }
    })
}

impl File {
    fn get(self) -> &'static (PathBuf, u64) {
        let files = &start().files;
        &files[usize::from(self.index) % files.len()]
    }

    fn json(self) -> Value {
        let (path, inode) = self.get();
        let inode = if self.wrong { inode + 100 } else { *inode };
        json!({ "path": path, "inode": inode, "born": inode })
    }
}

fn all(files: &[File]) -> Vec<Value> {
    files.iter().take(4).map(|f| f.json()).collect()
}

impl Meant {
    /// The operation, and the files that it knows.
    fn json(&self) -> (Value, Vec<File>) {
        match self {
            Self::Remove(files) => {
                (json!({ "operation": "remove", "files": all(files), "directories": [DIR] }), files.clone())
            }
            Self::Merge { victim, dependents, between, committed, renamed, followers, named, emptied } => {
                let one = |which: Option<u8>| {
                    let n = dependents.len().min(4);
                    let which = which.filter(|_| n > 0).map(|w| usize::from(w) % n);
                    which.map(|w| dependents[w].json())
                };
                let intent = json!({
                    "operation": "merge", "victim": victim.json(), "dependents": all(dependents),
                    "between": all(between), "committed": one(*committed),
                    "renamed": one(*renamed), "followers": all(followers),
                    "name": named.then(|| json!({ "path": path("new") })), "emptied": emptied,
                    "directories": [DIR],
                });
                let more = [dependents, between, followers].into_iter().flatten();
                (intent, more.chain([victim]).copied().collect())
            }
            Self::Rebase { image, onto } => {
                let onto = onto.map(|onto| {
                    json!({ "path": onto.get().0, "file": onto.json(), "format": "qcow2", "absolute": false })
                });
                let intent = json!({
                    "operation": "rebase", "image": image.json(), "onto": onto, "unchecked": false,
                    "directories": [DIR],
                });
                (intent, vec![*image])
            }
        }
    }
}

impl Header {
    fn payload(&self) -> Vec<u8> {
        let (path, inode) = self.file.get();
        let now = start().contents.names().find(|(p, _)| p == path).map(|(_, b)| b.to_vec()).unwrap();
        let now = &now[..usize::from(self.len).min(1024).min(now.len())];
        let edited = |edits: &[(u16, u8)]| {
            let mut bytes = now.to_vec();
            for (at, byte) in edits.iter().take(4) {
                if let Some(place) = bytes.get_mut(usize::from(*at)) {
                    *place = *byte;
                }
            }
            bytes
        };
        let inode = inode + u64::from(self.file.wrong) * 100;
        [&inode.to_be_bytes()[..], &edited(&self.old), &edited(&self.new)].concat()
    }

    /// Whether what is there is some sectors of the one and some of the other.
    fn is_torn(&self) -> bool {
        let sector = |edits: &[(u16, u8)]| -> BTreeSet<u16> {
            edits.iter().take(4).filter(|(at, _)| *at < self.len).map(|(at, _)| at / 512).collect()
        };
        sector(&self.old).is_disjoint(&sector(&self.new))
    }
}

impl Step {
    fn json(&self) -> (Value, Vec<File>) {
        // No image has this size: none can be taken for the new one.
        let new = |name: u8, on: Option<File>| {
            let files = &start().files;
            let there = files.get(usize::from(name) % (2 * files.len())).map(|(p, _)| p.clone());
            json!({
                "path": there.unwrap_or_else(|| path("new")),
                "backing": on.map(|f| f.get().0.file_name().unwrap().to_str().unwrap().bytes().map(|b| format!("{b:02x}")).collect::<String>()),
                "format": "qcow2", "size": 77 * 512, "cluster_bits": 9,
            })
        };
        let inner = |file: &File, id: u8| {
            let (id, name) = if id % 3 == 0 { ("31", "7338") } else { ("32", "6e6577") };
            json!({ "image": file.json(), "id": id, "name": name })
        };
        match self {
            Self::Overlay { on, name } => (json!({ "do": "overlay", "new": new(*name, Some(*on)) }), vec![]),
            Self::Copy { from, id, name } => {
                (json!({ "do": "copy", "new": new(*name, None), "from": inner(from, *id) }), vec![])
            }
            Self::Take { image, id } => {
                (json!({ "do": "take", "inner": inner(image, *id), "date": 1 }), vec![*image])
            }
            Self::Apply { image, id } => (json!({ "do": "apply", "inner": inner(image, *id) }), vec![*image]),
            Self::Drop { image, id } => (json!({ "do": "drop", "inner": inner(image, *id) }), vec![*image]),
            Self::Relabel { image, id } => {
                (json!({ "do": "relabel", "inner": inner(image, *id), "to": "6f" }), vec![*image])
            }
            Self::Merge { victim, dependents, heir } => {
                let all = dependents.iter().take(3).map(|f| f.json()).collect::<Vec<_>>();
                let step = json!({ "do": "merge", "victim": victim.json(), "dependents": all, "heir": heir.map(File::json) });
                (step, dependents.iter().chain(heir).chain([victim]).copied().collect())
            }
            Self::Rebase { image, onto } => {
                let onto = onto.map(File::json);
                let step = json!({ "do": "rebase", "image": image.json(), "onto": onto, "absolute": false });
                (step, vec![*image])
            }
            Self::Remove { image } => (json!({ "do": "remove", "image": image.json() }), vec![*image]),
            Self::Save { text } => {
                let text = String::from_utf8_lossy(text);
                (json!({ "do": "save", "path": path(".pleach/vm.tree"), "text": text }), vec![])
            }
            Self::Forget => (json!({ "do": "forget", "path": path(".pleach/vm.tree") }), vec![]),
        }
    }
}

fn record(kind: u8, number: u32, payload: &[u8]) -> Vec<u8> {
    let mut record = b"PLJ1".to_vec();
    record.extend([kind, 0, 0, 0]);
    record.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    record.extend(number.to_be_bytes());
    record.extend(payload);
    let crc = crc32fast::hash(&record);
    record.extend(crc.to_be_bytes());
    record
}

/// The journal's name and bytes, and the files that it rightly knows.
fn journal(what: &What) -> (&'static str, Vec<u8>, Vec<File>) {
    match what {
        What::Raw(bytes) => ("N.journal", [b"PLJ1", &bytes[..]].concat(), vec![]),
        What::RawSteps(bytes) => {
            let text = String::from_utf8_lossy(bytes);
            let crc = crc32fast::hash(text.as_bytes());
            ("vm.steps", format!("{text}\ncrc32 {crc:08x}\n").into_bytes(), vec![])
        }
        What::Records { intent, headers } => {
            let (intent, known) = intent.json();
            let mut bytes = record(1, 0, intent.to_string().as_bytes());
            for (number, header) in (1..).zip(headers.iter().take(4)) {
                bytes.extend(record(2, number, &header.payload()));
            }
            ("N.journal", bytes, known)
        }
        What::Steps { done, steps } => {
            let (all, known): (Vec<Value>, Vec<Vec<File>>) = steps.iter().take(5).map(Step::json).unzip();
            let done = usize::from(*done) % (all.len() + 1);
            let text = json!({
                "version": 1, "what": "x", "directories": [DIR], "done": done, "steps": all,
            })
            .to_string();
            let crc = crc32fast::hash(text.as_bytes());
            ("vm.steps", format!("{text}\ncrc32 {crc:08x}\n").into_bytes(), known.concat())
        }
    }
}

/// What the node in a file reads as.
fn read(disk: &SimDisk, path: &Path) -> Option<Vec<u8>> {
    let source = Source::open(disk, path, &trusting()).ok()?;
    let mut bytes = vec![0; usize::try_from(source.chain.size()).unwrap()];
    source.chain.read_at(0, &mut bytes).ok()?;
    Some(bytes)
}

fuzz_target!(|input: Input| {
    let (name, mut bytes, known) = journal(&input.what);
    for (at, byte) in &input.flips {
        if let Some(place) = bytes.get_mut(usize::from(*at)) {
            *place ^= byte;
        }
    }
    if input.cut < 128 {
        bytes.truncate(bytes.len() * usize::from(input.cut) / 128);
    }
    let start = start();
    let disk = SimDisk::of(start.contents.clone());
    let store = disk.create_new(&path(".pleach").join(name)).unwrap();
    store.write_at(0, &bytes).unwrap();
    let before: BTreeMap<PathBuf, Vec<u8>> =
        start.contents.names().map(|(p, b)| (p.to_owned(), b.to_vec())).collect();
    if input.undo {
        let _ = undo(&disk, &[DIR.into()]);
    }
    let _ = resume(&disk, &[DIR.into()], &Watch::new());

    let headers: &[Header] = if let What::Records { headers, .. } = &input.what { headers } else { &[] };
    if headers.iter().take(4).any(Header::is_torn) {
        // Whatever it says is meant to be there.
        return;
    }
    let known: BTreeSet<&Path> = known.iter().filter(|f| !f.wrong).map(|f| &*f.get().0).collect();
    let old = SimDisk::of(start.contents.clone());
    for (path, inode) in &start.files {
        if known.contains(&**path) {
            continue;
        }
        let now = disk.stat(path).unwrap_or_else(|_| panic!("{path:?} is gone"));
        assert_eq!(now.id.inode, *inode, "{path:?} is another file");
        // What stands on a file that is known may be told another name of it, and what it lacks.
        if known.is_empty() {
            let mut bytes = vec![0; usize::try_from(now.len).unwrap()];
            disk.open(path, Access::Read).unwrap().read_at(0, &mut bytes).unwrap();
            assert!(bytes == before[path], "{path:?} has changed");
        }
        assert_eq!(read(&disk, path), read(&old, path), "{path:?} reads differently");
    }
});
