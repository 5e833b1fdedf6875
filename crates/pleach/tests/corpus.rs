//! The stored corpus, `testdata/golden` and `testdata/matrix`: what QEMU said of each image is what we say, without QEMU.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pleach_engine::{Extent, Source, SourceOptions, map, survey::Trust};
use pleach_format::{BitmapRecord, Compatible, Incompatible, Version};
use pleach_image::{Image, check};
use pleach_store::{Access, Disk, RealDisk};
use pleach_testkit::WorkDir;
use pleach_testkit::oracle::hash_file;
use serde_json::{Value, json};

/// Every image of the corpus: its path without the end.
fn images() -> Vec<PathBuf> {
    let sets = ["golden", "matrix"]
        .map(|set| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(set));
    let mut images: Vec<PathBuf> = sets
        .iter()
        .flat_map(|set| fs::read_dir(set).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "qcow2"))
        .map(|path| path.with_extension(""))
        .collect();
    images.sort();
    assert!(images.len() > 200, "{}", images.len());
    images
}

fn stored(image: &Path, end: &str) -> Value {
    serde_json::from_slice(&fs::read(image.with_extension(end)).unwrap()).unwrap()
}

fn open(image: &Path) -> Image {
    Image::open(RealDisk.open(&image.with_extension("qcow2"), Access::Read).unwrap()).unwrap()
}

fn source(image: &Path, snapshot: Option<String>) -> Source {
    let trust = Trust { data_files: vec![image.with_extension("raw")], ..Trust::default() };
    let options = SourceOptions { snapshot, trust, ..SourceOptions::default() };
    Source::open(&RealDisk, &image.with_extension("qcow2"), &options).unwrap()
}

#[test]
fn checks_find_what_they_found() {
    for image in images() {
        let (report, said) = (check(&open(&image)).unwrap(), stored(&image, "check.json"));
        let figure = |key: &str| said.get(key).and_then(Value::as_u64).unwrap_or(0);
        let ours = [
            ("corruptions", report.errors),
            ("leaks", report.leaks),
            ("allocated-clusters", report.allocated_clusters),
            ("compressed-clusters", report.compressed_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("total-clusters", report.total_clusters),
            ("image-end-offset", report.image_end_offset),
        ];
        for (key, value) in ours {
            assert_eq!(value, figure(key), "{}: {key}", image.display());
        }
    }
}

#[test]
fn maps_are_the_same() {
    let work = WorkDir::new("corpus-map");
    for set in images().iter().map(|i| i.parent().unwrap()).collect::<BTreeSet<_>>() {
        let copy = work.join(set.file_name().unwrap());
        fs::create_dir(&copy).unwrap();
        for file in fs::read_dir(set).unwrap().map(|e| e.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "qcow2" || e == "raw") {
                fs::write(copy.join(file.file_name().unwrap()), fs::read(&file).unwrap()).unwrap();
            }
        }
    }
    for image in images() {
        // Holes of a file count, and a checkout may have made some: there are none in this copy.
        let set = work.join(image.parent().unwrap().file_name().unwrap());
        let place = set.join(image.file_name().unwrap());
        let (source, mut ours) = (source(&place, None), Vec::new());
        map(&source.chain, 0..source.chain.size(), &mut |e: Extent| {
            let mut value = json!({
                "start": e.start, "length": e.length, "depth": e.depth, "present": e.present, "zero": e.zero,
                "data": e.data, "compressed": e.compressed,
            });
            if let Some(offset) = e.offset {
                value["offset"] = offset.into();
            }
            ours.push(value);
            Ok(())
        })
        .unwrap();
        assert_eq!(Value::Array(ours), stored(&image, "map.json"), "{}", image.display());
    }
}

#[test]
fn every_state_reads_as_its_digest_says() {
    let (work, mut states) = (WorkDir::new("corpus"), 0);
    let scratch = work.join("content");
    for image in images() {
        for line in fs::read_to_string(image.with_extension("sha256")).unwrap().lines() {
            let (digest, state) = line.split_once("  ").unwrap();
            let source = source(&image, state.split_once('@').map(|(_, s)| s.to_owned()));
            let mut bytes = vec![0xee; usize::try_from(source.chain.size()).unwrap()];
            source
                .chain
                .read_at(0, &mut bytes)
                .unwrap_or_else(|e| panic!("{}: {state}: {e}", image.display()));
            fs::write(&scratch, &bytes).unwrap();
            assert_eq!(hash_file(&scratch).unwrap().to_string(), digest, "{}: {state}", image.display());
            states += 1;
        }
    }
    assert!(states > 200, "{states}");
}

#[test]
fn headers_say_the_same() {
    for path in images() {
        let (image, said) = (open(&path), stored(&path, "info.json"));
        let (header, data) = (image.header(), &said["format-specific"]["data"]);
        let v3 = header.version() == Version::V3;
        let flag = |set: bool| if v3 { Value::from(set) } else { Value::Null };
        let snapshots: Vec<Value> = image
            .snapshots()
            .unwrap()
            .iter()
            .map(|s| {
                json!([String::from_utf8_lossy(&s.id), String::from_utf8_lossy(&s.name), s.vm_state_size])
            })
            .collect();
        let their_snapshots = said["snapshots"].as_array().into_iter().flatten();
        let bitmaps: Vec<Value> = image.bitmaps().unwrap().iter().map(bitmap).collect();
        let same = [
            ("virtual-size", json!(header.size()), said["virtual-size"].clone()),
            ("cluster-size", json!(header.geometry().cluster_size()), said["cluster-size"].clone()),
            ("compat", json!(if v3 { "1.1" } else { "0.10" }), data["compat"].clone()),
            ("refcount-bits", json!(header.refcount_width().bits()), data["refcount-bits"].clone()),
            ("compression", json!(header.compression().name()), data["compression-type"].clone()),
            (
                "lazy",
                flag(header.compatible().has(Compatible::LAZY_REFCOUNTS)),
                data["lazy-refcounts"].clone(),
            ),
            ("extended-l2", flag(header.geometry().extended_l2()), data["extended-l2"].clone()),
            ("dirty", json!(header.incompatible().has(Incompatible::DIRTY)), said["dirty-flag"].clone()),
            ("data file", json!(header.data_file().map(String::from_utf8_lossy)), data["data-file"].clone()),
            (
                "backing file",
                json!(header.backing().map(|b| String::from_utf8_lossy(&b.name).into_owned())),
                said["backing-filename"].clone(),
            ),
            (
                "snapshots",
                snapshots.into(),
                their_snapshots.map(|s| json!([s["id"], s["name"], s["vm-state-size"]])).collect(),
            ),
            ("bitmaps", bitmaps.into(), data.get("bitmaps").cloned().unwrap_or_else(|| json!([]))),
        ];
        for (what, ours, theirs) in same {
            assert_eq!(ours, theirs, "{}: {what}", path.display());
        }
    }
}

fn bitmap(b: &BitmapRecord) -> Value {
    let flags: Vec<&str> = [(BitmapRecord::IN_USE, "in-use"), (BitmapRecord::AUTO, "auto")]
        .iter()
        .filter(|(bit, _)| b.flags & bit != 0)
        .map(|f| f.1)
        .collect();
    json!({ "flags": flags, "name": String::from_utf8_lossy(&b.name), "granularity": 1u64 << b.granularity_bits })
}
