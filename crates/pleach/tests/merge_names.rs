//! `merge --name` and `commit`: which file holds the data, which one stays, and who has to be told.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;

use pleach_testkit::files::{changes, image_names, listing, unfinished};
use pleach_testkit::layers::{Layer, fill, qcow2, raw};
use pleach_testkit::oracle::{check_clean, digest, info, qemu_img, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");
const DISK: u64 = 4 << 20;

/// P <- B <- M <- T <- E, and F on T. T holds `in_top` clusters, B `in_base`. P is raw or an image.
fn tree(dir: &Path, in_top: u64, in_base: u64, lowest: Format) {
    let image = |name: &str, backing: Option<(&str, Format)>, fills: &[String]| {
        qcow2(&dir.join(name), Layer { size: DISK, backing, options: "cluster_size=65536" }, fills);
    };
    let over = |name| Some((name, Format::Qcow2));
    match lowest {
        Format::Raw => raw(&dir.join("p.img"), DISK, &[fill(1, 0, 60, 65536)]),
        Format::Qcow2 => image("p.img", None, &[fill(1, 0, 60, 65536)]),
    }
    image("b.qcow2", Some(("p.img", lowest)), &[fill(2, 2, in_base, 65536)]);
    image("m.qcow2", over("b.qcow2"), &[fill(3, 10, 2, 65536), "write -q -z 0 64k".to_owned()]);
    image("t.qcow2", over("m.qcow2"), &[fill(4, 20, in_top, 65536)]);
    image("e.qcow2", over("t.qcow2"), &[fill(5, 30, 1, 65536)]);
    image("f.qcow2", over("t.qcow2"), &[fill(6, 31, 1, 65536)]);
}

fn backing(path: &Path) -> String {
    info(path)["backing-filename"].as_str().unwrap_or("none").to_owned()
}

fn planned_and_done(words: &[&str], dir: &Path) -> Value {
    let before = listing(dir);
    let planned = Tool::new(PLEACH).json(&[words, &["-n", "--json"]].concat());
    assert_eq!(changes(&before, &listing(dir)), Vec::<String>::new(), "{words:?}: a dry run");
    let done = Tool::new(PLEACH).json(&[words, &["-y", "--json"]].concat());
    assert_eq!(planned, done, "{words:?}");
    assert_eq!(unfinished(dir), Vec::<String>::new(), "{words:?}");
    planned["plan"].clone()
}

#[test]
fn the_result_of_a_merge_gets_a_new_name_whichever_file_holds_it() {
    for (in_top, in_base, holder, other, elsewhere) in [
        (1, 20, "b.qcow2", "t.qcow2", false),
        (20, 1, "t.qcow2", "b.qcow2", false),
        (1, 20, "b.qcow2", "t.qcow2", true),
        (20, 1, "t.qcow2", "b.qcow2", true),
    ] {
        let work = WorkDir::new("new-name");
        std::fs::create_dir(work.join("x")).unwrap();
        std::fs::create_dir(work.join("y")).unwrap();
        let dir = work.join("x");
        tree(&dir, in_top, in_base, Format::Qcow2);
        let read = |path: &Path| digest(path, Format::Qcow2);
        let before = ["t.qcow2", "e.qcow2", "f.qcow2"].map(|name| read(&dir.join(name)));
        let new = work.join(if elsewhere { "y/n.qcow2" } else { "x/n.qcow2" });
        let name = if elsewhere { text(&new) } else { "n.qcow2" };
        let (top, base) = (dir.join("t.qcow2"), dir.join("b.qcow2"));
        let plan = planned_and_done(&["merge", text(&top), "--into", text(&base), "--name", name], &dir);
        let label = format!("{holder} to {name}: {plan}");
        assert!(plan["renames"][0]["from"].as_str().unwrap().ends_with(holder), "{label}");
        assert!(plan["renames"][0]["to"].as_str().unwrap().ends_with("n.qcow2"), "{label}");
        let mut gone: Vec<&str> =
            plan["unlinks"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        gone.sort_unstable();
        let mut wanted = ["m.qcow2", other];
        wanted.sort_unstable();
        assert_eq!(gone, wanted, "{label}");
        let left: &[&str] = match elsewhere {
            true => &["e.qcow2", "f.qcow2", "p.img"],
            false => &["e.qcow2", "f.qcow2", "n.qcow2", "p.img"],
        };
        assert_eq!(image_names(&dir), left, "{label}");
        let after = [&new, &dir.join("e.qcow2"), &dir.join("f.qcow2")].map(|path| read(path));
        assert_eq!(after, before, "{label}");
        [&new, &dir.join("e.qcow2"), &dir.join("f.qcow2")].iter().for_each(|path| check_clean(path));
        let follows = if elsewhere { "../y/n.qcow2" } else { "n.qcow2" };
        assert_eq!(backing(&dir.join("e.qcow2")), follows, "{label}");
        assert_eq!(Path::new(&backing(&new)).file_name().unwrap(), "p.img", "{label}");
    }
}

#[test]
fn a_name_of_the_run_is_that_file_and_one_that_is_taken_is_refused() {
    let work = WorkDir::new("taken-name");
    tree(&work, 1, 20, Format::Raw);
    let (top, base) = (work.join("t.qcow2"), work.join("b.qcow2"));
    let before = listing(&work);
    for taken in ["e.qcow2", "p.img", "m.qcow2"] {
        let outcome =
            Tool::new(PLEACH).run(&["merge", text(&top), "--into", text(&base), "-y", "--name", taken]);
        assert_eq!(outcome.code, Some(1), "{}", outcome.text());
        assert!(outcome.text().contains("is there already"), "{}", outcome.text());
        assert_eq!(changes(&before, &listing(&work)), Vec::<String>::new(), "{taken}");
    }
    let content = digest(&top, Format::Qcow2);
    // What stands on a raw file becomes an image under every name but its own.
    let raw_base = work.join("p.img");
    planned_and_done(&["merge", text(&top), "--into", text(&raw_base), "--name", "b2.qcow2"], &work);
    assert_eq!(image_names(&work), ["b2.qcow2", "e.qcow2", "f.qcow2"]);
    assert_eq!(digest(&work.join("b2.qcow2"), Format::Qcow2), content);
    assert_eq!(backing(&work.join("f.qcow2")), "b2.qcow2");
}

#[test]
fn a_commit_leaves_the_image_empty_and_reading_the_same() {
    for (into, lowest) in
        [(None, Format::Qcow2), (Some("b.qcow2"), Format::Qcow2), (Some("p.img"), Format::Raw)]
    {
        let work = WorkDir::new("commit");
        tree(&work, 20, 8, lowest);
        let read = |name: &str, format| digest(&work.join(name), format);
        let before = ["t.qcow2", "e.qcow2", "f.qcow2"].map(|name| read(name, Format::Qcow2));
        let top = work.join("t.qcow2");
        let words: Vec<&str> = ["commit", text(&top)]
            .into_iter()
            .chain(into.into_iter().flat_map(|base| ["--into", base]))
            .collect();
        let plan = planned_and_done(&words, &work);
        assert_eq!(plan["emptied"][0], "t.qcow2", "{plan}");
        assert_eq!(plan["copies"][0]["direction"], "commit", "{plan}");
        let left: &[&str] = match into {
            None => &["b.qcow2", "e.qcow2", "f.qcow2", "m.qcow2", "p.img", "t.qcow2"],
            Some("b.qcow2") => &["b.qcow2", "e.qcow2", "f.qcow2", "p.img", "t.qcow2"],
            Some(_) => &["e.qcow2", "f.qcow2", "p.img", "t.qcow2"],
        };
        assert_eq!(image_names(&work), left, "{plan}");
        assert_eq!(["t.qcow2", "e.qcow2", "f.qcow2"].map(|name| read(name, Format::Qcow2)), before, "{plan}");
        let base = into.unwrap_or("m.qcow2");
        let format = if base == "p.img" { lowest } else { Format::Qcow2 };
        assert_eq!(read(base, format), before[0], "{plan}");
        assert_eq!(backing(&top), base, "{plan}");
        for name in left.iter().filter(|name| **name != "p.img") {
            check_clean(&work.join(name));
        }
        // Nothing of its own is left in it, and no space is taken for it.
        let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", text(&top)])).unwrap();
        let own = |extent: &Value| extent["depth"] == 0 && extent["data"] == true;
        assert!(!map.as_array().unwrap().iter().any(own), "{map}");
        assert!(top.metadata().unwrap().len() <= 4 * 65536, "{}", top.metadata().unwrap().len());
    }
}

#[test]
fn a_commit_that_something_else_would_see_is_refused() {
    let work = WorkDir::new("commit-refused");
    tree(&work, 4, 8, Format::Qcow2);
    let image = |name: &str, size, backing| {
        qcow2(
            &work.join(name),
            Layer { size, backing: Some((backing, Format::Qcow2)), options: "" },
            &[""; 0],
        );
    };
    image("other.qcow2", DISK, "b.qcow2");
    image("short.qcow2", DISK / 2, "e.qcow2");
    image("inside.qcow2", DISK, "f.qcow2");
    qemu_img(&["snapshot", "-c", "s", text(&work.join("inside.qcow2"))]);
    let before = listing(&work);
    let cases = [
        (&["t.qcow2", "--into", "b.qcow2"][..], 6, "other.qcow2"),
        (&["e.qcow2"], 6, "f.qcow2"),
        (&["short.qcow2"], 8, "longer"),
        (&["inside.qcow2"], 6, "snapshots"),
        (&["p.img"], 2, "stands alone"),
        (&["b.qcow2", "--into", "t.qcow2"], 2, "does not stand on it"),
    ];
    for (words, code, says) in cases {
        let image = work.join(words[0]);
        for how in ["-n", "-y"] {
            let outcome = Tool::new(PLEACH).run(&[&["commit", text(&image)], &words[1..], &[how]].concat());
            assert_eq!(outcome.code, Some(code), "{words:?}: {}", outcome.text());
            assert!(outcome.text().contains(says), "{words:?}: {}", outcome.text());
        }
        assert_eq!(changes(&before, &listing(&work)), Vec::<String>::new(), "{words:?}");
    }
}
