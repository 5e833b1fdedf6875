//! `pleach create`: what it makes, stock QEMU accepts, and says the same of it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;

use pleach_testkit::oracle::{self, qemu_img, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

#[test]
fn images_of_every_geometry_are_what_qemu_img_reads() {
    let work = WorkDir::new("create");
    for (cluster, bytes) in [("512", 512), ("4k", 4096), ("64k", 65536), ("2M", 2 << 20)] {
        for (compat, bits) in [("v2", 16), ("v3", 1), ("v3", 16), ("v3", 64)] {
            let path = work.join(format!("{cluster}-{compat}-{bits}.qcow2"));
            let bits = bits.to_string();
            let options = ["--cluster-size", cluster, "--compat", compat, "--refcount-bits", &bits];
            Tool::new(PLEACH).succeed(&[&["create", text(&path), "3G"][..], &options].concat());
            oracle::check_clean(&path);
            let info = oracle::info(&path);
            assert_eq!(info["virtual-size"], 3u64 << 30, "{info}");
            assert_eq!(info["cluster-size"], bytes, "{info}");
            let data = &info["format-specific"]["data"];
            assert_eq!(data["refcount-bits"].to_string(), bits, "{info}");
            assert_eq!(data["compat"], if compat == "v2" { "0.10" } else { "1.1" }, "{info}");
            qemu_io(
                &path,
                Format::Qcow2,
                &["write -q -P 7 1M 100k", "write -q -P 8 2G 4k", "read -q -P 7 1M 100k"],
            );
            oracle::check_clean(&path);
        }
    }
    let names = fs::read_dir(&*work).unwrap().count();
    assert_eq!(names, 16, "no partial file is left");
}

#[test]
fn overlays_name_their_backing_file_and_its_format() {
    let work = WorkDir::new("overlay");
    let base = work.join("base.raw");
    qemu_img(&["create", "-q", "-f", "raw", text(&base), "5M"]);
    qemu_io(&base, Format::Raw, &["write -q -P 3 0 1M"]);
    let over = work.join("over.qcow2");
    Tool::new(PLEACH).succeed(&["create", text(&over), "-b", "base.raw"]);
    let info = oracle::info(&over);
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&"base.raw".into(), &"raw".into())
    );
    assert_eq!(info["virtual-size"], 5 << 20);
    let top = work.join("top.qcow2");
    Tool::new(PLEACH).succeed(&["create", text(&top), "10M", "-b", text(&over), "-F", "qcow2"]);
    let info = oracle::info(&top);
    assert_eq!(info["backing-filename"], text(&over), "an absolute name stays absolute");
    assert_eq!(info["virtual-size"], 10 << 20);
    qemu_io(&top, Format::Qcow2, &["read -q -P 3 0 1M"]);
}

#[test]
fn nothing_is_overwritten_and_nonsense_is_refused() {
    let work = WorkDir::new("no-create");
    let there = work.join("there.qcow2");
    fs::write(&there, b"precious").unwrap();
    let new = work.join("new.qcow2");
    let cases: &[(&[&str], i32)] = &[
        (&["create", text(&there), "1G"], 1),
        (&["create", text(&new)], 2),
        (&["create", text(&new), "1X"], 2),
        (&["create", text(&new), "-1"], 2),
        (&["create", text(&new), "1G", "--cluster-size", "100"], 2),
        (&["create", text(&new), "1G", "--cluster-size", "4M"], 2),
        (&["create", text(&new), "1G", "--refcount-bits", "3"], 2),
        (&["create", text(&new), "1G", "--refcount-bits", "8", "--compat", "v2"], 2),
        (&["create", text(&new), "200G", "--cluster-size", "512"], 2),
        (&["create", text(&new), "1G", "-b", "nowhere.qcow2"], 7),
        (&["create", text(&new), "1G", "-b", "json:{}"], 8),
        (&["create", "/proc/no/such/place", "1G"], 7),
    ];
    for (args, code) in cases {
        let outcome = Tool::new(PLEACH).run(args);
        assert_eq!(outcome.code, Some(*code), "{outcome}");
        assert!(outcome.stderr.contains("error"), "{outcome}");
    }
    assert_eq!(fs::read(&there).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&*work).unwrap().count(), 1);
}
