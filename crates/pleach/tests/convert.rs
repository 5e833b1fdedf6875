//! `pleach convert`: whatever the source and the target, the copy reads as the source does, stock QEMU finds nothing wrong
//! with it and goes on writing; and a run that does not end leaves nothing under the final name.
//!
//! `PLEACH_LONG=1` tries more; `PLEACH_SEED=…` draws other images, `PLEACH_KEEP=1` keeps the files.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pleach_format::RunKind;
use pleach_image::Image;
use pleach_store::{Access, Disk, RealDisk};
use pleach_testkit::files::patch;
use pleach_testkit::layers::{Layer, qcow2, raw};
use pleach_testkit::mount::TinyFs;
use pleach_testkit::oracle::{self, Format, check_clean, digest, hash_file, qemu_img, qemu_io, text};
use pleach_testkit::{OnFailure, RandomTree, Rng, Tool, WorkDir, chosen_seed, long_mode};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const MIB: u64 = 1 << 20;

/// Kinds of copies: a name, the options, the format, and whether it may have compressed clusters.
const TARGETS: &[(&str, &[&str])] = &[
    ("raw", &["-O", "raw"]),
    ("default", &["-O", "qcow2"]),
    ("zlib", &["-O", "qcow2", "-c"]),
    ("zstd", &["-O", "qcow2", "-c", "--compression", "zstd"]),
    ("512", &["-O", "qcow2", "--cluster-size", "512"]),
    ("512 zlib", &["-O", "qcow2", "--cluster-size", "512", "-c"]),
    ("2M", &["-O", "qcow2", "--cluster-size", "2M"]),
    ("4k zstd", &["-O", "qcow2", "--cluster-size", "4k", "-c", "--compression", "zstd", "--level", "1"]),
    ("v2", &["-O", "qcow2", "--compat", "v2"]),
    ("v2 zlib 1k", &["-O", "qcow2", "--compat", "v2", "-c", "--cluster-size", "1k"]),
    ("1 bit", &["-O", "qcow2", "--refcount-bits", "1", "--cluster-size", "4k"]),
    ("1 bit zlib", &["-O", "qcow2", "--refcount-bits", "1", "-c"]),
    ("2 bits zlib", &["-O", "qcow2", "--refcount-bits", "2", "-c", "--cluster-size", "8k"]),
    ("64 bits", &["-O", "qcow2", "--refcount-bits", "64", "--cluster-size", "512"]),
    ("64 bits zlib", &["-O", "qcow2", "--refcount-bits", "64", "--cluster-size", "512", "-c"]),
    ("extended", &["-O", "qcow2", "--extended-l2"]),
    ("extended zlib 16k", &["-O", "qcow2", "--extended-l2", "-c", "--cluster-size", "16k"]),
    ("metadata", &["-O", "qcow2", "--preallocation", "metadata", "--cluster-size", "4k"]),
    ("falloc", &["-O", "qcow2", "--preallocation", "falloc", "--lazy-refcounts"]),
    ("full extended", &["-O", "qcow2", "--preallocation", "full", "--extended-l2"]),
];

fn format_of(options: &[&str]) -> Format {
    if options.contains(&"raw") { Format::Raw } else { Format::Qcow2 }
}

fn convert(source: &Path, out: &Path, options: &[&str]) {
    let args = [&["convert", text(source), text(out)], options].concat();
    Tool::new(PLEACH).succeed(&args);
}

/// The copy reads as `want` does, is consistent, and stock QEMU can go on writing to it.
fn judge(name: &str, out: &Path, format: Format, want: &oracle::Digest) {
    assert_eq!(digest(out, format), *want, "{name}");
    if format == Format::Raw {
        return;
    }
    check_clean(out);
    let size = oracle::info(out)["virtual-size"].as_u64().unwrap();
    if size >= MIB {
        let far = (size / 2) & !511;
        let commands = [
            "write -q -P 17 1k 70k".to_owned(),
            format!("write -q -P 18 {far} 3k"),
            format!("discard -q {} 128k", far & !65535),
        ];
        qemu_io(out, format, &commands);
        check_clean(out);
    }
}

#[test]
fn golden_images_convert_to_what_their_digests_say() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden");
    let work = WorkDir::new("convert-golden");
    let mut names: Vec<PathBuf> = fs::read_dir(&golden).unwrap().map(|e| e.unwrap().path()).collect();
    names.retain(|p| p.extension().is_some_and(|e| e == "sha256"));
    names.sort();
    assert!(names.len() > 30);
    let mut states = 0;
    for (n, sums) in names.iter().enumerate() {
        let image = sums.with_extension("qcow2");
        for line in fs::read_to_string(sums).unwrap().lines() {
            let (sum, name) = line.split_once("  ").unwrap();
            let (options, out) = (TARGETS[(n + states) % TARGETS.len()].1, work.join("copy"));
            let data = image.with_extension("raw");
            let mut all = options.to_vec();
            if let Some((_, snapshot)) = name.split_once('@') {
                all.extend(["--snapshot", snapshot]);
            }
            if data.is_file() {
                all.extend(["--allow-data-file", text(&data)]);
            }
            convert(&image, &out, &all);
            assert_eq!(digest(&out, format_of(options)).to_string(), sum, "{name} {options:?}");
            if format_of(options) == Format::Qcow2 {
                check_clean(&out);
            }
            fs::remove_file(&out).unwrap();
            states += 1;
        }
    }
    assert!(states > names.len(), "snapshots were among them");
}

#[test]
fn random_chains_convert_to_every_kind() {
    let seed = chosen_seed().unwrap_or(0xc0_4e47);
    let _seed = OnFailure::print_seed(seed, "random chains");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("convert-random");
    for round in 0..if long_mode() { 40 } else { 3 } {
        let tree = RandomTree::build(&work.join(format!("tree{round}")), &mut rng, 5);
        for node in &tree.nodes {
            let source = tree.path(node);
            let want = digest(&source, node.format);
            for _ in 0..if long_mode() { TARGETS.len() } else { 4 } {
                let (name, options) = *rng.pick(TARGETS);
                let out = work.join("copy");
                let from = [options, &["-f", node.format.name()]].concat();
                convert(&source, &out, &from);
                judge(&format!("{} to {name}", node.name), &out, format_of(options), &want);
                fs::remove_file(&out).unwrap();
            }
        }
    }
}

#[test]
fn the_same_bytes_for_any_number_of_threads_and_no_partial_file_is_left() {
    let work = WorkDir::new("convert-jobs");
    let source = mixed(&work, 6);
    for (n, (name, options)) in TARGETS.iter().enumerate().filter(|(_, t)| t.0 != "raw") {
        let mut all: Vec<oracle::Digest> = Vec::new();
        for jobs in ["1", "2", "5"] {
            let out = work.join(format!("{n}-{jobs}"));
            convert(&source, &out, &[*options, &["-f", "raw", "--jobs", jobs]].concat());
            all.push(hash_file(&out).unwrap());
            fs::remove_file(out).unwrap();
        }
        assert!(all.windows(2).all(|w| w[0] == w[1]), "{name}: {all:?}");
    }
    assert_eq!(fs::read_dir(&*work).unwrap().count(), 1, "only the source is there");
}

/// A raw disk of `mib` MiB with data of every kind: text, noise, zeros, holes, short runs.
fn mixed(work: &Path, mib: u64) -> PathBuf {
    let path = work.join("mixed.raw");
    let mut rng = Rng::new(11);
    let mut bytes = vec![0u8; usize::try_from(mib * MIB).unwrap()];
    let mut at = 0;
    while at < bytes.len() {
        let len = usize::try_from(rng.between(1, 200_000)).unwrap().min(bytes.len() - at);
        let part = &mut bytes[at..at + len];
        match rng.below(4) {
            0 => {
                let noise = rng.noise(len);
                part.copy_from_slice(&noise);
            }
            1 => part
                .iter_mut()
                .enumerate()
                .for_each(|(i, b)| *b = b"some text, again and again "[i * i / 7 % 27]),
            2 => part.fill(u8::try_from(rng.below(256)).unwrap()),
            _ => {}
        }
        at += len;
    }
    fs::write(&path, bytes).unwrap();
    path
}

/// As `qemu-img convert --bitmaps`: the same names, granularities, states and bits.
#[test]
fn bitmaps_are_copied_with_their_bits() {
    let work = WorkDir::new("convert-bitmaps");
    let (image, copy, theirs) = (work.join("i.qcow2"), work.join("c.qcow2"), work.join("t.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(&image), "8M"]);
    for (name, options) in [("fine", &["-g", "512"][..]), ("coarse", &["-g", "1M"]), ("off", &["--disable"])]
    {
        qemu_img(&[&["bitmap", "--add"], options, &[text(&image), name]].concat());
    }
    let writes = ["write -q -P 1 0 3k", "write -q -P 2 5M 70k", "write -q -z 7M 64k"].map(str::to_owned);
    qemu_io(&image, Format::Qcow2, &writes);
    qemu_img(&["bitmap", "--disable", text(&image), "coarse"]);
    qemu_img(&["convert", "-q", "-O", "qcow2", "--bitmaps", text(&image), text(&theirs)]);
    let bits = |path: &Path| {
        let image = Image::open(RealDisk.open(path, Access::Read).unwrap()).unwrap();
        let records = image.bitmaps().unwrap();
        let all = records.iter().map(|r| {
            let ranges = image.bitmap_bits(r).unwrap().ranges();
            (String::from_utf8(r.name.clone()).unwrap(), r.flags, r.granularity_bits, ranges)
        });
        let mut all: Vec<_> = all.collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    assert!(bits(&image).iter().filter(|b| !b.3.is_empty()).count() == 2);
    for options in [&["--bitmaps"][..], &["--bitmaps", "-c", "--cluster-size", "512"]] {
        convert(&image, &copy, options);
        assert_eq!(bits(&copy), bits(&theirs), "{options:?}");
        assert_eq!(bits(&copy), bits(&image), "{options:?}");
        judge("bitmaps", &copy, Format::Qcow2, &digest(&image, Format::Qcow2));
        fs::remove_file(&copy).unwrap();
    }
    // One that was not written back: its directory entry says that it is in use.
    let bytes = fs::read(&image).unwrap();
    let at = bytes.windows(4).rposition(|w| w == b"fine").unwrap();
    patch(&image, u64::try_from(at - 24 + 15).unwrap(), &[3]);
    let refused = Tool::new(PLEACH).run(&["convert", text(&image), text(&copy), "--bitmaps"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("fine") && !copy.exists(), "{refused}");
    convert(&image, &copy, &["--bitmaps", "--skip-broken-bitmaps"]);
    assert_eq!(bits(&copy).iter().map(|b| b.0.as_str()).collect::<Vec<_>>(), ["coarse", "off"]);
    check_clean(&copy);
}

/// The compressed bytes of each compressed cluster, in guest order; the last sector of each may be another's.
fn packed(path: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    let image = Image::open(RealDisk.open(path, Access::Read).unwrap()).unwrap();
    let runs = (0..image.l1().len()).flat_map(|n| image.runs(n).unwrap().as_slice().to_vec());
    let extents = runs.filter_map(|run| match run.kind {
        RunKind::Compressed(extent) => Some(extent),
        _ => None,
    });
    extents
        .map(|e| {
            let start = usize::try_from(e.offset.0).unwrap();
            let end = (start + usize::try_from(e.bytes).unwrap()).min(bytes.len());
            bytes[start..end].to_vec()
        })
        .collect()
}

#[test]
fn compressed_clusters_are_carried_over_as_they_are() {
    let work = WorkDir::new("convert-carry");
    let source = mixed(&work, 6);
    let image = work.join("image.qcow2");
    for (type_of, cluster) in [("zlib", "64k"), ("zstd", "4k")] {
        let layout = format!("compression_type={type_of},cluster_size={cluster}");
        qemu_img(&[
            "convert",
            "-q",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &layout,
            text(&source),
            text(&image),
        ]);
        let writes = ["write -q -P 7 300k 5k", "write -q -z 1M 128k", "discard -q 2M 64k"].map(str::to_owned);
        qemu_io(&image, Format::Qcow2, &writes);
        let want = digest(&image, Format::Qcow2);
        let theirs = packed(&image);
        assert!(theirs.len() > 20, "{}", theirs.len());
        // What nobody else compresses like this: found again only if it was not compressed anew.
        let same = |out: &Path| {
            let ours = packed(out);
            theirs
                .iter()
                .filter(|a| {
                    ours.iter().any(|b| {
                        b.starts_with(&a[..a.len().min(b.len()).saturating_sub(512).max(16).min(a.len())])
                    })
                })
                .count()
        };
        let layout = ["-c", "--compression", type_of, "--cluster-size", cluster];
        let others = if cluster == "64k" { "32k" } else { "64k" };
        for (name, options, carried) in [
            ("alike", layout.to_vec(), true),
            ("a level", [&layout[..], &["--level", "1"]].concat(), false),
            ("other clusters", ["-c", "--compression", type_of, "--cluster-size", others].to_vec(), false),
        ] {
            let out = work.join("copy.qcow2");
            convert(&image, &out, &options);
            let found = same(&out);
            assert_eq!(found == theirs.len(), carried, "{type_of}, {name}: {found} of {}", theirs.len());
            judge(name, &out, Format::Qcow2, &want);
            fs::remove_file(&out).unwrap();
        }
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn over_a_backing_file_only_what_differs_is_copied() {
    let work = WorkDir::new("convert-backing");
    let k = 1024;
    let stripes = |pattern: u8, step: u64| -> Vec<String> {
        (0..6).map(|n| format!("write -q -P {pattern} {}k {}k", n * step * 37, 20 + n)).collect()
    };
    qcow2(&work.join("base.qcow2"), Layer { size: 6 * MIB, ..Layer::default() }, &stripes(3, 13));
    raw(&work.join("base.raw"), 3 * MIB, &stripes(3, 13));
    let over = Layer { size: 5 * MIB, backing: Some(("base.qcow2", Format::Qcow2)), options: "" };
    let changes =
        [stripes(7, 5), vec!["write -q -z 300k 700k".into(), "write -q -P 0 2M 64k".into()]].concat();
    qcow2(&work.join("top.qcow2"), over, &changes);
    let want = digest(&work.join("top.qcow2"), Format::Qcow2);
    for base in ["base.qcow2", "base.raw"] {
        for options in [
            &[][..],
            &["-c"],
            &["--compat", "v2"],
            &["--extended-l2"],
            &["--cluster-size", "512"],
            &["--extended-l2", "--preallocation", "metadata"],
        ] {
            let out = work.join("copy.qcow2");
            convert(&work.join("top.qcow2"), &out, &[&["-b", base], options].concat());
            judge(&format!("over {base} {options:?}"), &out, Format::Qcow2, &want);
            assert_eq!(oracle::info(&out)["backing-filename"].as_str(), Some(base));
            fs::remove_file(&out).unwrap();
        }
    }
    // What the base holds is not copied again.
    let out = work.join("same.qcow2");
    convert(&work.join("base.qcow2"), &out, &["-b", "base.qcow2"]);
    assert!(fs::metadata(&out).unwrap().len() <= 400 * k);
    assert_eq!(digest(&out, Format::Qcow2), digest(&work.join("base.qcow2"), Format::Qcow2));
}

#[test]
fn guest_data_goes_to_the_data_file() {
    let work = WorkDir::new("convert-data-file");
    let source = mixed(&work, 6);
    let want = hash_file(&source).unwrap();
    for options in [&[][..], &["--data-file-raw"], &["--extended-l2"], &["--preallocation", "falloc"]] {
        let (out, data) = (work.join("copy.qcow2"), work.join("copy.data"));
        convert(
            &source,
            &out,
            &[&["-f", "raw", "-O", "qcow2", "--data-file", text(&data)], options].concat(),
        );
        judge(&format!("{options:?}"), &out, Format::Qcow2, &want);
        fs::remove_file(&out).unwrap();
        fs::remove_file(&data).unwrap();
        convert(
            &source,
            &out,
            &[&["-f", "raw", "-O", "qcow2", "--data-file", text(&data)], options].concat(),
        );
        if options.contains(&"--data-file-raw") {
            assert_eq!(hash_file(&data).unwrap(), want);
        }
        fs::remove_file(&out).unwrap();
        // A data file that is there is not overwritten.
        let args = ["convert", "-f", "raw", text(&source), text(&out), "--data-file", text(&data)];
        assert_eq!(Tool::new(PLEACH).run(&args).code, Some(1));
        fs::remove_file(&data).unwrap();
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_name_and_leaves_nothing() {
    let work = WorkDir::new("convert-refused");
    let source = work.join("a.raw");
    raw(&source, MIB, &["write -q -P 1 0 1M"]);
    fs::write(work.join("there"), b"precious").unwrap();
    qcow2(&work.join("q.qcow2"), Layer { size: MIB, ..Layer::default() }, &["write -q -P 2 0 64k"]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        text(&work.join("luks.qcow2")),
        "1M",
    ]);
    let before = fs::read_dir(&*work).unwrap().count();
    let cases: &[(&str, &str, &[&str], i32, &str)] = &[
        ("a name that is taken", "a.raw", &["there", "-f", "raw"], 1, "there already"),
        ("no source", "missing", &["out"], 7, "cannot open"),
        ("encrypted", "luks.qcow2", &["out"], 8, "LUKS"),
        ("bitmaps of a raw image", "a.raw", &["out", "-f", "raw", "--bitmaps"], 8, "bitmaps"),
        ("bitmaps, raw", "q.qcow2", &["out", "-O", "raw", "--bitmaps"], 2, "--bitmaps"),
        ("bitmaps, version 2", "q.qcow2", &["out", "--compat", "v2", "--bitmaps"], 2, "version 2"),
        ("no copy on write", "q.qcow2", &["out", "--nocow"], 8, "nocow"),
        ("no snapshot", "q.qcow2", &["out", "--snapshot", "x"], 7, "\"x\""),
        ("raw, compressed", "q.qcow2", &["out", "-O", "raw", "-c"], 2, "-c"),
        ("raw, clusters", "q.qcow2", &["out", "-O", "raw", "--cluster-size", "4k"], 2, "--cluster-size"),
        ("both", "q.qcow2", &["out", "-c", "--preallocation", "full"], 2, "preallocation"),
        ("data file, compressed", "q.qcow2", &["out", "-c", "--data-file", "d"], 2, "data file"),
        ("level", "q.qcow2", &["out", "-c", "--level", "10"], 2, "level"),
        ("level of nothing", "q.qcow2", &["out", "--level", "3"], 2, "--compress"),
        ("clusters", "q.qcow2", &["out", "--cluster-size", "3k"], 2, "power of two"),
        ("large clusters", "q.qcow2", &["out", "--cluster-size", "4M"], 2, "cluster"),
        ("v2 widths", "q.qcow2", &["out", "--compat", "v2", "--refcount-bits", "8"], 2, "refcount"),
        ("v2 zstd", "q.qcow2", &["out", "--compat", "v2", "--compression", "zstd"], 2, "version 3"),
        (
            "preallocated overlay",
            "q.qcow2",
            &["out", "-b", "q.qcow2", "--preallocation", "full"],
            2,
            "extended",
        ),
        (
            "backing, raw data",
            "q.qcow2",
            &["out", "-b", "q.qcow2", "--data-file", "d", "--data-file-raw"],
            2,
            "backing",
        ),
        ("no directory", "q.qcow2", &["no/out"], 7, "/no: cannot look"),
    ];
    for (name, from, rest, code, words) in cases {
        let mut args = vec!["convert".to_owned(), text(&work.join(from)).to_owned()];
        args.extend(rest.iter().enumerate().map(|(i, a)| match i {
            0 => text(&work.join(a)).to_owned(),
            _ => (*a).to_owned(),
        }));
        let outcome = Tool::new(PLEACH).run(&args);
        assert_eq!(outcome.code, Some(*code), "{name}: {outcome}");
        assert!(outcome.text().contains(words), "{name}: {outcome}");
        assert_eq!(fs::read_dir(&*work).unwrap().count(), before, "{name}: nothing is left");
        assert!(!Path::new("d").exists(), "{name}");
    }
    assert_eq!(fs::read(work.join("there")).unwrap(), b"precious");
}

#[test]
fn a_killed_run_leaves_no_file_of_that_name_and_no_partial_one_that_opens() {
    let seed = chosen_seed().unwrap_or(5);
    let _seed = OnFailure::print_seed(seed, "kills");
    let mut rng = Rng::new(seed);
    let work = WorkDir::new("convert-kill");
    let source = mixed(&work, 20);
    let (out, partial) = (work.join("out.qcow2"), work.join(".out.qcow2.partial"));
    let want = hash_file(&source).unwrap();
    let (mut killed, mut whole) = (0, 0);
    for options in [&["-c"][..], &[], &["--compat", "v2"]] {
        let args = [&["convert", "-f", "raw", "-O", "qcow2", text(&source), text(&out)], options].concat();
        let started = Instant::now();
        Tool::new(PLEACH).succeed(&args);
        let once = started.elapsed();
        fs::remove_file(&out).unwrap();
        for _ in 0..if long_mode() { 60 } else { 5 } {
            let delay = Duration::from_micros(rng.below(u64::try_from(once.as_micros()).unwrap() + 1));
            let outcome = Tool::new(PLEACH).spawn(&args).kill_after(delay);
            if out.exists() {
                // The kill came after the end, or between the two names.
                assert_eq!(digest(&out, Format::Qcow2), want);
                check_clean(&out);
                fs::remove_file(&out).unwrap();
                whole += 1;
                continue;
            }
            assert_eq!(outcome.code, None);
            killed += 1;
            if partial.exists() && fs::metadata(&partial).unwrap().len() > 0 {
                let refused = Command::new("qemu-img").args(["info", text(&partial)]).output().unwrap();
                let opened = refused.status.success();
                // Only a whole image that lacks its name opens.
                assert!(!opened || digest(&partial, Format::Qcow2) == want, "{delay:?}");
            }
        }
        Tool::new(PLEACH).succeed(&args);
        assert!(!partial.exists());
        judge("after kills", &out, Format::Qcow2, &want);
        fs::remove_file(&out).unwrap();
    }
    assert!(killed > 3, "{killed} killed, {whole} whole");
}

#[test]
fn an_interrupted_run_removes_what_it_made() {
    let work = WorkDir::new("convert-interrupt");
    let source = mixed(&work, 32);
    let out = work.join("out");
    let args = ["convert", "-f", "raw", "-c", "-O", "qcow2", text(&source), text(&out)];
    let partial = work.join(".out.partial");
    let mut child = Command::new(PLEACH).args(args).stderr(std::process::Stdio::null()).spawn().unwrap();
    while !partial.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let code = child.wait().unwrap().code();
    let names = fs::read_dir(&*work).unwrap().count();
    // On a fast machine it may have ended before.
    assert!(
        matches!((code, names, killed.success()), (Some(130), 1, true) | (Some(0), 2, _)),
        "{code:?} {names}"
    );
}

#[test]
fn a_full_file_system_is_a_clean_error() {
    let Some(tiny) = TinyFs::mount(8 * MIB) else { return };
    let work = WorkDir::new("convert-full");
    let source = mixed(&work, 24);
    let noise = work.join("noise.raw");
    fs::write(&noise, Rng::new(1).noise(usize::try_from(16 * MIB).unwrap())).unwrap();
    let packed = work.join("packed.qcow2");
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", text(&source), text(&packed)]);
    let out = tiny.path().join("out");
    for (from, format) in [(&source, "raw"), (&noise, "raw"), (&packed, "qcow2")] {
        for options in [
            &["-O", "raw"][..],
            &["-O", "qcow2"],
            &["-O", "qcow2", "-c"],
            &["-O", "qcow2", "--preallocation", "full"],
        ] {
            let args = [&["convert", "-f", format, text(from), text(&out)], options].concat();
            let outcome = Tool::new(PLEACH).run(&args);
            if outcome.code != Some(0) {
                assert_eq!(outcome.code, Some(1), "{outcome}");
                assert!(outcome.text().contains("space") || outcome.text().contains("free"), "{outcome}");
                assert_eq!(fs::read_dir(tiny.path()).unwrap().count(), 0, "{outcome}");
            } else {
                assert!(options.contains(&"-c"), "{outcome}");
                fs::remove_file(&out).unwrap();
            }
        }
    }
    // What has room because it is zeros, is copied.
    let zeros = work.join("zeros.raw");
    let mut bytes = vec![0; usize::try_from(20 * MIB).unwrap()];
    bytes[5_000_000] = 1;
    fs::write(&zeros, bytes).unwrap();
    convert(&zeros, &out, &["-f", "raw", "-O", "qcow2"]);
    assert_eq!(digest(&out, Format::Qcow2), hash_file(&zeros).unwrap());
}

#[test]
fn an_empty_exabyte_takes_no_time_and_no_space() {
    let work = WorkDir::new("convert-huge");
    let (source, out) = (work.join("huge.qcow2"), work.join("out.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", text(&source), "1E"]);
    let started = Instant::now();
    for options in [&["--cluster-size", "2M"][..], &["--cluster-size", "2M", "-c"]] {
        convert(&source, &out, &[&["-O", "qcow2"], options].concat());
        let length = fs::metadata(&out).unwrap().len();
        assert!(length < 64 * MIB, "{length}");
        check_clean(&out);
        fs::remove_file(&out).unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// Deflate with compressed clusters that share no host cluster: with 1-bit counts nothing else is possible.
#[test]
fn t25_one_bit_refcounts_share_no_host_cluster() {
    let work = WorkDir::new("t25");
    let source = mixed(&work, 4);
    let sizes: Vec<u64> = ["1", "2", "16"]
        .iter()
        .map(|bits| {
            let out = work.join("out.qcow2");
            convert(&source, &out, &["-f", "raw", "-c", "--refcount-bits", bits]);
            judge(bits, &out, Format::Qcow2, &hash_file(&source).unwrap());
            let size = fs::metadata(&out).unwrap().len();
            fs::remove_file(&out).unwrap();
            size
        })
        .collect();
    assert!(sizes[0] > sizes[1] && sizes[1] >= sizes[2], "{sizes:?}");
}
