//! Nodes whose snapshots have odd names, the same name, or none: every verb knows what `tree` prints.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pleach_testkit::oracle::{check_clean, qemu_img_in};
use pleach_testkit::tool::Running;
use pleach_testkit::{Outcome, WorkDir};
use serde_json::Value;

const SECONDS: Duration = Duration::from_secs(60);

fn run<S: AsRef<OsStr>>(dir: &Path, args: &[S]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pleach"));
    command.current_dir(dir).args(args);
    Running::start(command).finish(SECONDS)
}

fn done<S: AsRef<OsStr>>(dir: &Path, args: &[S]) -> Outcome {
    let outcome = run(dir, args);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    outcome
}

fn fails(dir: &Path, args: &[&str], code: i32, says: &str) {
    let outcome = run(dir, args);
    assert_eq!(outcome.code, Some(code), "{outcome}");
    assert!(outcome.stderr.contains(says), "{says}: {outcome}");
}

/// An image with a snapshot of each name, taken by QEMU.
fn image(dir: &Path, file: &str, names: &[&[u8]]) {
    qemu_img_in(dir, &["create", "-q", "-f", "qcow2", file, "1M"]);
    for name in names {
        let mut command = Command::new("qemu-img");
        command.current_dir(dir).args(["snapshot", "-c"]).arg(OsStr::from_bytes(name)).arg(file);
        assert_eq!(Running::start(command).finish(SECONDS).code, Some(0));
    }
}

/// Names and ids of the snapshots in a file, as `info` shows them.
fn inside(dir: &Path, file: &str) -> Vec<(String, String)> {
    let info: Value = serde_json::from_str(&done(dir, &["info", file, "--json"]).stdout).unwrap();
    let all = info["images"][0]["snapshots"].as_array().unwrap().clone();
    let text = |s: &Value| s.as_str().unwrap().to_owned();
    all.iter().map(|s| (text(&s["name"]), text(&s["id"]))).collect()
}

/// The names that `tree` has for the nodes of `target`, and those that it prints, without the head.
fn tree(dir: &Path, target: &str) -> (Vec<String>, Vec<String>) {
    let document: Value = serde_json::from_str(&done(dir, &["tree", target, "--json"]).stdout).unwrap();
    let nodes = document["nodes"].as_array().unwrap().iter().filter(|n| n["kind"] == "snapshot");
    let names = nodes.map(|n| n["name"].as_str().unwrap().to_owned()).collect();
    let text = done(dir, &["tree", target]).stdout;
    let lines = text.lines().filter(|line| line.contains("internal"));
    let name = |line: &str| {
        line.trim_start_matches([' ', '│', '├', '└', '─']).split("  (").next().map(str::to_owned)
    };
    (names, lines.filter_map(name).collect())
}

#[test]
fn odd_names_are_real_ones_and_may_be_typed_as_they_are_printed() {
    let odd: [&[u8]; 6] = [b"C:\\base", b"a\tb", b"x\ny", b"\x1b[31m", b"\xffz", "grün".as_bytes()];
    for catalog in [false, true] {
        for printed in [false, true] {
            let work = WorkDir::new("odd-names");
            image(&work, "x.qcow2", &odd);
            if catalog {
                done(&work, &["init", "vm", "--disk", "vda=x.qcow2"]);
            }
            let (names, shown) = tree(&work, "x.qcow2");
            let real: Vec<String> =
                odd.iter().map(|b| str::from_utf8(b).map_or("\\xffz".to_owned(), str::to_owned)).collect();
            assert_eq!(names, real);
            for (name, shown) in odd.iter().zip(&shown) {
                let word = if printed { OsStr::new(shown) } else { OsStr::from_bytes(name) };
                let of_node = |verb: &str, more: &[&str]| {
                    let words = [verb, "x.qcow2"].into_iter().map(OsStr::new).chain([word]);
                    done(&work, &words.chain(more.iter().map(OsStr::new)).collect::<Vec<_>>());
                };
                of_node("show", &[]);
                of_node("revert", &["--discard", "-y"]);
                of_node("rename", &["new"]);
                assert!(inside(&work, "x.qcow2").iter().any(|(name, _)| name == "new"));
                done(&work, &["delete", "x.qcow2", "new", "-y"]);
                let _ = (!catalog).then(|| fs::remove_dir_all(work.join(".pleach")));
            }
            assert_eq!(inside(&work, "x.qcow2"), []);
            check_clean(&work.join("x.qcow2"));
        }
    }
}

#[test]
fn odd_names_of_our_own_outlive_the_catalog() {
    let work = WorkDir::new("own-names");
    image(&work, "x.qcow2", &[]);
    for name in ["C:\\base", "a\tb"] {
        done(&work, &["snapshot", "x.qcow2", name, "--internal"]);
    }
    fs::remove_dir_all(work.join(".pleach")).unwrap();
    done(&work, &["rename", "x.qcow2", "C:\\base", "D:\\base"]);
    fs::remove_dir_all(work.join(".pleach")).unwrap();
    done(&work, &["delete", "x.qcow2", "D:\\base", "-y"]);
    // The real name counts before what another one looks like.
    done(&work, &["snapshot", "x.qcow2", "a\\tb", "--internal"]);
    done(&work, &["delete", "x.qcow2", "a\\tb", "-y"]);
    assert_eq!(tree(&work, "x.qcow2").0, ["a\tb"]);
    // What is typed may be bytes, or a name that looks like them.
    image(&work, "y.qcow2", &[b"\xffz", b"\\xffz"]);
    fails(&work, &["delete", "y.qcow2", "\\xffz", "-y"], 2, "several nodes");
    done(&work, &["delete", "y.qcow2", "y#1", "-y"]);
    assert_eq!(tree(&work, "y.qcow2").0, ["\\xffz"]);
}

#[test]
fn every_verb_takes_the_names_that_tree_prints() {
    let names: [&[u8]; 6] = [b"dup", b"dup", b"dup", b"2", b"", b"x"];
    let wanted = ["dup", "x#2", "x#3", "2", "x#5", "x@x"];
    let work = WorkDir::new("same-names");
    image(&work, "x.qcow2", &names);
    // A copy beside it changes nothing.
    for copy in ["copy.qcow2", "y.qcow2"] {
        fs::copy(work.join("x.qcow2"), work.join(copy)).unwrap();
        assert_eq!(tree(&work, "x.qcow2").0, wanted);
    }
    for (name, id) in wanted.iter().zip(1..) {
        for verb in [&["show"][..], &["note"], &["revert", "--discard", "-n"], &["delete", "-n"]] {
            let outcome = done(&work, &[&[verb[0], "x.qcow2", name], &verb[1..]].concat());
            assert!(verb[0] != "show" || outcome.stdout.contains(&format!("(id {id})")), "{outcome}");
        }
    }
    done(&work, &["init", "vm", "--disk", "vda=x.qcow2"]);
    assert_eq!(tree(&work, "x.qcow2").0, wanted);
    fs::remove_dir_all(work.join(".pleach")).unwrap();
    // All of a directory, where names are longer.
    let (all, _) = tree(&work, ".");
    assert!(all.contains(&"y#1".to_owned()), "{all:?}");
    done(&work, &["delete", ".", "y#1", "-y"]);
    done(&work, &["delete", "y.qcow2", "y@x", "-y"]);
    assert_eq!(inside(&work, "y.qcow2").len(), 4);
    for name in ["x#3", "dup", "x@x", "x#5"] {
        done(&work, &["delete", "x.qcow2", name, "-y"]);
    }
    assert_eq!(inside(&work, "x.qcow2"), [("dup".into(), "2".into()), ("2".into(), "4".into())]);
    assert_eq!(inside(&work, "copy.qcow2").len(), 6);
    check_clean(&work.join("x.qcow2"));
}
