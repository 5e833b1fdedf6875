//! What is easily read wrongly in a qcow2 image: each trap made with stock tools and patched bytes, and judged by what
//! stock QEMU reads, or refused on purpose.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pleach_engine::survey::Trust;
use pleach_engine::{Source, SourceOptions};
use pleach_store::RealDisk;
use pleach_testkit::WorkDir;
use pleach_testkit::files::patch;
use pleach_testkit::oracle::{Format, qemu_img_in, qemu_io, text};

const K: u64 = 1024;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What reading must give.
enum Want {
    /// The bytes that stock QEMU reads.
    Qemu,
    /// These bytes, and not QEMU's.
    Bytes(Vec<u8>),
    /// These bytes, and QEMU's are the same.
    Both(Vec<u8>),
    /// An error with these words. QEMU fails too.
    Neither(&'static str),
    /// An error with these words, although QEMU reads something.
    Refused(&'static str),
}

/// One reading of an image.
struct Case {
    what: &'static str,
    image: PathBuf,
    snapshot: Option<&'static str>,
    data_files: Vec<PathBuf>,
    want: Want,
}

impl Case {
    fn new(what: &'static str, image: &Path, want: Want) -> Self {
        Self { what, image: image.to_owned(), snapshot: None, data_files: Vec::new(), want }
    }

    fn snapshot(self, name: &'static str) -> Self {
        Self { snapshot: Some(name), ..self }
    }

    fn data_file(mut self, path: &Path) -> Self {
        self.data_files.push(path.to_owned());
        self
    }

    fn ours(&self) -> Result<Vec<u8>, String> {
        let trust = Trust { data_files: self.data_files.clone(), ..Trust::default() };
        let snapshot = self.snapshot.map(str::to_owned);
        let options = SourceOptions { snapshot, trust, ..SourceOptions::default() };
        let read = || {
            let source = Source::open(&RealDisk, &self.image, &options)?;
            source.check_readable()?;
            let mut bytes = vec![0xee; usize::try_from(source.chain.size()).unwrap()];
            let mut at = 0;
            // Pieces that no cluster boundary divides.
            for part in bytes.chunks_mut(37_000) {
                source.chain.read_at(at, part).map_err(|e| pleach_engine::Error::image(&self.image, e))?;
                at += part.len() as u64;
            }
            Ok(bytes)
        };
        read().map_err(|e: pleach_engine::Error| e.full())
    }

    /// As `qemu-img convert` reads it, from the directory of the first data file that was named, or of the image.
    fn qemu(&self, scratch: &Path) -> Result<Vec<u8>, String> {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
        if let Some(snapshot) = self.snapshot {
            convert.args(["-l", snapshot]);
        }
        let home = self.data_files.first().unwrap_or(&self.image).parent().unwrap();
        let output = convert.current_dir(home).arg(&self.image).arg(scratch).output().unwrap();
        if output.status.success() {
            Ok(fs::read(scratch).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    fn judge(&self, trap: &str) {
        let name = format!("{trap}: {}", self.what);
        let scratch = self.image.with_extension("scratch");
        let (ours, qemu) = (self.ours(), self.qemu(&scratch));
        let same = |want: &[u8]| {
            let ours = ours.as_ref().unwrap_or_else(|e| panic!("{name}: refused: {e}"));
            let first = ours.iter().zip(want).position(|(a, b)| a != b);
            assert_eq!((ours.len(), first), (want.len(), None), "{name}: length, first difference");
        };
        let refused = |words: &str| {
            let error = ours.as_ref().err().unwrap_or_else(|| panic!("{name}: was read"));
            assert!(error.contains(words), "{name}: {error:?} does not say {words:?}");
        };
        match &self.want {
            Want::Qemu => same(&qemu.unwrap_or_else(|e| panic!("{name}: {e}"))),
            Want::Both(bytes) => {
                same(bytes);
                assert!(qemu.is_ok_and(|q| q == *bytes), "{name}: QEMU reads something else");
            }
            Want::Bytes(bytes) => {
                same(bytes);
                assert!(qemu.is_ok_and(|q| q != *bytes), "{name}: QEMU reads the same");
            }
            Want::Neither(words) => {
                refused(words);
                assert!(qemu.is_err(), "{name}: QEMU reads it");
            }
            Want::Refused(words) => {
                refused(words);
                assert!(qemu.is_ok(), "{name}: QEMU does not read it either");
            }
        }
    }
}

/// A new image in `dir`, written to by qemu-io.
fn image(dir: &Path, name: &str, options: &str, size: &str, commands: &[&str]) -> PathBuf {
    let path = dir.join(name);
    let options = if options.is_empty() { "compat=1.1" } else { options };
    qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-o", options, name, size]);
    qemu_io(&path, Format::Qcow2, commands);
    path
}

fn word(path: &Path, at: u64) -> u64 {
    let bytes = fs::read(path).unwrap();
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where the first L2 table of the active state is.
fn l2(path: &Path) -> u64 {
    word(path, word(path, 40)) & 0x00ff_ffff_ffff_fe00
}

fn put(path: &Path, at: u64, value: u64) {
    patch(path, at, &value.to_be_bytes());
}

/// A copy of an image, to be patched.
fn copy(path: &Path, name: &str) -> PathBuf {
    let to = path.with_file_name(name);
    fs::copy(path, &to).unwrap();
    to
}

fn filled(parts: &[(u8, u64)]) -> Vec<u8> {
    parts.iter().flat_map(|&(byte, len)| vec![byte; usize::try_from(len).unwrap()]).collect()
}

type Trap = (&'static str, fn(&Path) -> Vec<Case>);

const TRAPS: &[Trap] = &[
    ("t01 compressed entries may be odd", t01),
    ("t02 a snapshot has its own size", t02),
    ("t03 shrinking leaves what the last cluster held", t03),
    ("t05 a compressed length is an upper bound", t05),
    ("t08 a short layer hides what is below it", t08),
    ("t09 zero clusters over a longer backing file", t09),
    ("t10 version 2 headers end at 72", t10),
    ("t11 version 2 has no zero clusters", t11),
    ("t13 a data file's offset 0 is a place", t13),
    ("t14 data file names are relative to the working directory", t14),
    ("t15 pointers behind the end of the file", t15),
    ("t16 odd sizes", t16),
    ("t17 files end inside a cluster", t17),
    ("t20 what follows a compressed cluster", t20),
    ("t22 encrypted images", t22),
    ("t23 subclusters", t23),
    ("t29 dirty is not unreadable", t29),
    ("t32 zero clusters own host clusters", t32),
    ("t38 loops", t38),
    ("t39 names of snapshots", t39),
    ("t42 unknown versions are not raw", t42),
];

#[test]
fn every_trap_is_read_as_qemu_reads_it_or_refused() {
    for (name, make) in TRAPS {
        let work = WorkDir::new("trap");
        for case in make(&work) {
            case.judge(name);
        }
    }
}

fn t01(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "256k", &["write -c -P 1 0 64k", "write -c -P 2 64k 64k"]);
    assert_eq!(word(&path, l2(&path) + 8) & 1, 1, "the second cluster lies at an odd offset");
    vec![Case::new(
        "two packed clusters",
        &path,
        Want::Both(filled(&[(1, 64 * K), (2, 64 * K), (0, 128 * K)])),
    )]
}

fn t02(dir: &Path) -> Vec<Case> {
    let grown = image(dir, "grown.qcow2", "", "128k", &["write -P 1 0 128k"]);
    qemu_img_in(dir, &["snapshot", "-c", "s", "grown.qcow2"]);
    qemu_img_in(dir, &["resize", "-q", "grown.qcow2", "256k"]);
    let shrunk = image(dir, "shrunk.qcow2", "", "256k", &["write -P 1 0 256k"]);
    qemu_img_in(dir, &["snapshot", "-c", "s", "shrunk.qcow2"]);
    qemu_img_in(dir, &["resize", "-q", "--shrink", "shrunk.qcow2", "64k"]);
    vec![
        Case::new("the disk grew", &grown, Want::Bytes(filled(&[(1, 128 * K)]))).snapshot("s"),
        Case::new("the disk shrank", &shrunk, Want::Bytes(filled(&[(1, 256 * K)]))).snapshot("s"),
        Case::new("the active state", &shrunk, Want::Qemu),
    ]
}

fn t03(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "128k", &["write -P 7 0 128k"]);
    qemu_img_in(dir, &["resize", "-q", "--shrink", "a.qcow2", "4k"]);
    qemu_img_in(dir, &["resize", "-q", "a.qcow2", "64k"]);
    vec![Case::new("shrunk and grown", &path, Want::Both(filled(&[(7, 64 * K)])))]
}

fn t05(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "256k", &[]);
    let noise: Vec<u8> = (0..64 * K).map(|i| ((i * i * 7) >> 5).to_be_bytes()[7] & 0x1f).collect();
    fs::write(dir.join("noise"), noise.repeat(2)).unwrap();
    qemu_img_in(dir, &["convert", "-c", "-f", "raw", "-O", "qcow2", "noise", "a.qcow2"]);
    let at = l2(&path) + 8;
    let entry = word(&path, at);
    let (inflated, reduced) = (copy(&path, "inflated.qcow2"), copy(&path, "reduced.qcow2"));
    put(&inflated, at, entry | 0xff << 54);
    put(&reduced, at, entry & !(0xff << 54));
    vec![
        Case::new("as written", &path, Want::Qemu),
        Case::new("more sectors than the file has", &inflated, Want::Qemu),
        Case::new("fewer sectors than needed", &reduced, Want::Neither("damaged")),
    ]
}

fn t08(dir: &Path) -> Vec<Case> {
    image(dir, "base.qcow2", "", "512k", &["write -P 5 0 512k"]);
    image(dir, "mid.qcow2", "backing_file=base.qcow2,backing_fmt=qcow2", "128k", &[]);
    let top = image(dir, "top.qcow2", "backing_file=mid.qcow2,backing_fmt=qcow2", "512k", &[]);
    vec![Case::new("5s, then nothing", &top, Want::Both(filled(&[(5, 128 * K), (0, 384 * K)])))]
}

fn t09(dir: &Path) -> Vec<Case> {
    image(dir, "base.qcow2", "", "128k", &["write -P 5 0 128k"]);
    let top = image(dir, "top.qcow2", "backing_file=base.qcow2,backing_fmt=qcow2", "64k", &[]);
    qemu_img_in(dir, &["resize", "-q", "top.qcow2", "128k"]);
    vec![Case::new("grown", &top, Want::Both(filled(&[(5, 64 * K), (0, 64 * K)])))]
}

fn t10(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "compat=0.10", "128k", &["write -P 3 0 64k"]);
    // An extension of an unknown kind, whose number and length would be features in version 3.
    patch(&path, 72, &[0, 0, 0, 0x20, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    vec![Case::new("an extension at 72", &path, Want::Qemu)]
}

fn t11(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "compat=0.10", "128k", &["write -P 3 0 64k"]);
    put(&path, l2(&path), word(&path, l2(&path)) | 1);
    vec![Case::new("a zero flag", &path, Want::Neither("version 2 image has no zero clusters"))]
}

fn t13(dir: &Path) -> Vec<Case> {
    let options = "data_file=d.raw";
    let writes = ["write -P 1 0 64k", "write -P 2 128k 64k", "write -z 192k 64k"];
    let path = dir.join("a.qcow2");
    qemu_img_in(dir, &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "320k"]);
    let mut io = Command::new("qemu-io");
    io.current_dir(dir).args(["-f", "qcow2"]);
    assert!(io.args(writes.iter().flat_map(|w| ["-c", w])).arg("a.qcow2").output().unwrap().status.success());
    let data = dir.join("d.raw");
    let table = l2(&path);
    assert_eq!(word(&path, table), COPIED, "guest cluster 0 is host offset 0");
    let own = filled(&[(1, 64 * K), (0, 64 * K), (2, 64 * K), (0, 128 * K)]);
    let [moved, to_start, unmarked, packed] =
        ["moved", "to-start", "unmarked", "packed"].map(|name| copy(&path, &format!("{name}.qcow2")));
    put(&moved, table + 16, COPIED | 64 << 10);
    put(&to_start, table + 16, COPIED);
    put(&unmarked, table, 0);
    put(&packed, table + 16, COMPRESSED | 1 << 54);
    let short = dir.join("short");
    fs::create_dir(&short).unwrap();
    fs::copy(&path, short.join("a.qcow2")).unwrap();
    fs::write(short.join("d.raw"), filled(&[(1, 64 * K), (0, 64 * K), (2, 10 * K)])).unwrap();
    let rest = filled(&[(1, 64 * K), (0, 64 * K), (2, 10 * K), (0, 182 * K)]);
    vec![
        Case::new("offset 0", &path, Want::Both(own)).data_file(&data),
        Case::new("another place than its own", &moved, Want::Neither("must equal the guest"))
            .data_file(&data),
        Case::new("offset 0 for another cluster", &to_start, Want::Neither("must equal the guest"))
            .data_file(&data),
        Case::new("offset 0 without COPIED", &unmarked, Want::Qemu).data_file(&data),
        Case::new("compressed", &packed, Want::Neither("no compressed clusters")).data_file(&data),
        Case::new("a short data file", &short.join("a.qcow2"), Want::Both(rest))
            .data_file(&short.join("d.raw")),
    ]
}

fn t14(dir: &Path) -> Vec<Case> {
    let sub = dir.join("sub");
    fs::create_dir(&sub).unwrap();
    qemu_img_in(&sub, &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "a.qcow2", "128k"]);
    let (path, data, other) = (sub.join("a.qcow2"), sub.join("d.raw"), dir.join("other.raw"));
    fs::write(&data, vec![7; 128 << 10]).unwrap();
    put(&path, word(&path, 40), COPIED | 0x60000);
    put(&path, 0x60000, COPIED);
    fs::write(&other, vec![9; 128 << 10]).unwrap();
    let want = || Want::Both(filled(&[(7, 64 * K), (0, 64 * K)]));
    vec![
        Case::new("named on the command line", &path, want()).data_file(&data),
        Case::new("not named", &path, Want::Refused("external data file \"d.raw\"")),
        Case::new("another file is named", &path, Want::Neither("external data file")).data_file(&other),
    ]
}

fn t15(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "128k", &["write -P 3 0 64k"]);
    let behind = copy(&path, "behind.qcow2");
    put(&behind, l2(&path), COPIED | 256 << 20);
    let table = copy(&path, "table.qcow2");
    put(&table, word(&path, 40), COPIED | 256 << 20);
    vec![
        Case::new("data", &behind, Want::Refused("outside the file")),
        Case::new("an L2 table", &table, Want::Refused("outside the file")),
    ]
}

fn t16(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "1M", &["write -P 3 960k 64k"]);
    put(&path, 24, (1 << 20) + 100);
    fs::write(dir.join("base.raw"), vec![6; 1000]).unwrap();
    let top = image(dir, "top.qcow2", "backing_file=base.raw,backing_fmt=raw", "4k", &[]);
    vec![
        Case::new("1 MiB and 100 bytes", &path, Want::Both(filled(&[(0, 960 * K), (3, 64 * K)]))),
        Case::new("a raw base of 1000 bytes", &top, Want::Both(filled(&[(6, 1000), (0, 3096)]))),
    ]
}

fn t17(dir: &Path) -> Vec<Case> {
    let fresh = image(dir, "a.qcow2", "", "1M", &[]);
    assert_ne!(fresh.metadata().unwrap().len() % (64 * K), 0);
    let cut = image(dir, "cut.qcow2", "", "128k", &["write -P 3 0 64k"]);
    let len = cut.metadata().unwrap().len();
    fs::File::options().write(true).open(&cut).unwrap().set_len(len - 60 * K).unwrap();
    vec![Case::new("just made", &fresh, Want::Qemu), Case::new("data end early", &cut, Want::Qemu)]
}

/// A deflate stream of `len` stored bytes.
fn stored(byte: u8, len: u16) -> Vec<u8> {
    let (n, not) = (len.to_be_bytes(), (!len).to_be_bytes());
    [vec![1, n[1], n[0], not[1], not[0]], vec![byte; len.into()]].concat()
}

/// A zstd frame of one raw block of 256 to 1000 bytes.
fn frame(byte: u8, len: u16) -> Vec<u8> {
    let (size, block) = ((len - 256).to_be_bytes(), (u32::from(len) << 3 | 1).to_be_bytes());
    let head = [0x28, 0xb5, 0x2f, 0xfd, 0x60, size[1], size[0], block[3], block[2], block[1]];
    [head.to_vec(), vec![byte; len.into()]].concat()
}

fn t20(dir: &Path) -> Vec<Case> {
    let zlib_header = [vec![0x78, 0x9c], stored(9, 512)].concat();
    let garbage = [stored(9, 512), vec![0xaa; 100]].concat();
    let skippable = [vec![0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4], frame(9, 512)].concat();
    let payloads: [(&str, &str, Vec<u8>, Want); 11] = [
        ("deflate, exact", "zlib", stored(9, 512), Want::Qemu),
        ("deflate, longer than a cluster", "zlib", stored(9, 600), Want::Qemu),
        ("deflate, shorter", "zlib", stored(9, 500), Want::Neither("damaged")),
        ("deflate, then garbage", "zlib", garbage, Want::Qemu),
        ("a zlib header", "zlib", zlib_header, Want::Neither("damaged")),
        ("zstd, exact", "zstd", frame(9, 512), Want::Qemu),
        ("zstd, longer than a cluster", "zstd", frame(9, 600), Want::Neither("damaged")),
        ("zstd, shorter", "zstd", frame(9, 500), Want::Neither("damaged")),
        ("zstd, two frames", "zstd", [frame(8, 256), frame(9, 256)].concat(), Want::Qemu),
        ("zstd, a skippable frame first", "zstd", skippable, Want::Qemu),
        ("zstd, then garbage", "zstd", [frame(9, 512), vec![0xaa; 100]].concat(), Want::Qemu),
    ];
    let made = payloads.into_iter().enumerate().map(|(i, (what, kind, payload, want))| {
        let options = format!("cluster_size=512,compression_type={kind}");
        let path = image(dir, &format!("{i}.qcow2"), &options, "4k", &["write -P 1 0 1k"]);
        // The payload in two clusters of its own at the end, which nobody else uses.
        let at = path.metadata().unwrap().len().next_multiple_of(512);
        let mut padded = payload;
        padded.resize(1024, 0);
        patch(&path, at, &padded);
        put(&path, l2(&path), COMPRESSED | 1 << 61 | at);
        Case::new(what, &path, want)
    });
    made.collect()
}

fn t22(dir: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    for (format, name) in
        [("luks", "LUKS encryption is not supported"), ("aes", "AES encryption is not supported")]
    {
        let file = format!("{format}.qcow2");
        let iterations = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
        let options = format!("encrypt.format={format},encrypt.key-secret=key{iterations}");
        let key = "secret,id=key,data=secret";
        qemu_img_in(dir, &["create", "-q", "--object", key, "-f", "qcow2", "-o", &options, &file, "128k"]);
        cases.push(Case::new(format, &dir.join(file), Want::Neither(name)));
    }
    cases
}

fn t23(dir: &Path) -> Vec<Case> {
    image(dir, "base.qcow2", "", "256k", &["write -P 5 0 256k"]);
    let over = "extended_l2=on,backing_file=base.qcow2,backing_fmt=qcow2";
    let writes = ["write -P 1 0 2k", "write -P 2 6k 2k", "write -z 10k 2k", "write -c -P 3 64k 64k"];
    let top = image(dir, "top.qcow2", over, "256k", &writes);
    let table = l2(&top);
    assert_eq!(word(&top, table + 8), 0x20_0000_0009);
    let patched = |name: &str, at: u64, value: u64| {
        let path = copy(&top, name);
        put(&path, at, value);
        path
    };
    let bit0 = patched("bit0.qcow2", table, word(&top, table) | 1);
    let both = patched("both.qcow2", table + 8, 0x20_0000_0009 | 1 << 32);
    let nowhere = patched("nowhere.qcow2", table, 0);
    let packed = patched("packed.qcow2", table + 24, 1);
    let preallocated = image(
        dir,
        "preallocated.qcow2",
        &format!("preallocation=metadata,{over}"),
        "256k",
        &["write -P 1 70k 2k"],
    );
    vec![
        Case::new("data, zeros, compressed, over a base", &top, Want::Qemu),
        Case::new("bit 0 means nothing", &bit0, Want::Qemu),
        Case::new("data and zero", &both, Want::Neither("either data or zero")),
        Case::new("data without a host cluster", &nowhere, Want::Neither("needs a host cluster")),
        Case::new("preallocated: the base shows", &preallocated, Want::Qemu),
        Case::new("compressed with a bitmap", &packed, Want::Refused("no subclusters")),
    ]
}

fn t29(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "lazy_refcounts=on", "128k", &["write -P 4 0 64k"]);
    put(&path, 72, 1);
    vec![Case::new("the dirty bit", &path, Want::Both(filled(&[(4, 64 * K), (0, 64 * K)])))]
}

fn t32(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "128k", &["write -P 4 0 128k", "write -z 0 64k"]);
    assert_eq!(word(&path, l2(&path)) & 1, 1);
    assert_ne!(word(&path, l2(&path)) & 0xffff_0000, 0, "the host cluster is kept");
    vec![Case::new("zeros over data", &path, Want::Both(filled(&[(0, 64 * K), (4, 64 * K)])))]
}

fn t38(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "128k", &[]);
    qemu_img_in(dir, &["rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "a.qcow2"]);
    let options = SourceOptions::default();
    let error = Source::open(&RealDisk, &path, &options).err().map(|e| e.full()).unwrap();
    assert!(error.contains("loop"), "{error}");
    // QEMU would not come back from here.
    Vec::new()
}

fn t39(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "64k", &[]);
    for (byte, name) in [("1", "same"), ("2", "same"), ("3", "1"), ("4", "")] {
        qemu_io(&path, Format::Qcow2, &[format!("write -P {byte} 0 64k")]);
        qemu_img_in(dir, &["snapshot", "-c", name, text(&path)]);
    }
    qemu_io(&path, Format::Qcow2, &["write -P 9 0 64k"]);
    let holds = |byte| Want::Both(filled(&[(byte, 64 * K)]));
    vec![
        Case::new("ids before names", &path, holds(1)).snapshot("1"),
        Case::new("an id", &path, holds(2)).snapshot("2"),
        Case::new("a name that two have", &path, Want::Refused("ids 1, 2")).snapshot("same"),
        Case::new("no such snapshot", &path, Want::Neither("no internal snapshot")).snapshot("5"),
    ]
}

fn t42(dir: &Path) -> Vec<Case> {
    let path = image(dir, "a.qcow2", "", "64k", &[]);
    patch(&path, 4, &[0, 0, 0, 9]);
    vec![Case::new("version 9", &path, Want::Neither("version"))]
}
