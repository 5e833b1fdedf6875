//! Saved plans: applied, they do what they say; where anything has changed since, they do nothing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;
use std::time::Duration;

use pleach_testkit::files::listing;
use pleach_testkit::layers::{Layer, qcow2};
use pleach_testkit::oracle::{check_clean, digest, qemu_io, text};
use pleach_testkit::{Format, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// A <- B <- C <- D.
fn chain(dir: &Path) {
    let image = |name: &str, backing: Option<&str>, at: u32| {
        let layer = Layer { size: 8 << 20, backing: backing.map(|b| (b, Format::Qcow2)), options: "" };
        qcow2(&dir.join(name), layer, &[format!("write -q -P {} {at}M 2M", at + 1)]);
    };
    image("a.qcow2", None, 0);
    image("b.qcow2", Some("a.qcow2"), 1);
    image("c.qcow2", Some("b.qcow2"), 2);
    image("d.qcow2", Some("c.qcow2"), 3);
}

#[test]
fn a_saved_plan_is_carried_out_as_it_is_or_not_at_all() {
    let verbs: &[&[&str]] = &[
        &["merge", "c.qcow2", "--into", "b.qcow2"],
        &["squash", ".", "b", "c"],
        &["rebase", "d.qcow2", "--onto", "a.qcow2"],
        &["delete", ".", "c"],
    ];
    for words in verbs {
        let work = WorkDir::new("apply");
        let dir = work.join("images");
        std::fs::create_dir(&dir).unwrap();
        chain(&dir);
        let before = digest(&dir.join("d.qcow2"), Format::Qcow2);
        let plan = work.join("plan.json");
        let place = |word: &&str| match *word {
            "." => text(&dir).to_owned(),
            word if word.ends_with(".qcow2") => text(&dir.join(word)).to_owned(),
            word => word.to_owned(),
        };
        let mut args: Vec<String> = words.iter().map(place).collect();
        args.extend(["--plan".to_owned(), text(&plan).to_owned(), "--json".to_owned()]);
        let files = listing(&dir);
        let planned = Tool::new(PLEACH).json(&args);
        assert_eq!(listing(&dir), files, "{words:?}");

        // Somebody writes to an image of the plan: the same length, other tables.
        let copy = std::fs::read(dir.join("c.qcow2")).unwrap();
        qemu_io(&dir.join("c.qcow2"), Format::Qcow2, &["write -q -z 2M 64k"]);
        let changed = listing(&dir);
        let refused = Tool::new(PLEACH).run(&["apply", text(&plan)]);
        assert_eq!(refused.code, Some(1), "{words:?}: {}", refused.text());
        assert!(refused.text().contains("c.qcow2"), "{words:?}: {}", refused.text());
        assert_eq!(listing(&dir), changed, "{words:?}");
        std::fs::write(dir.join("c.qcow2"), copy).unwrap();

        let done = Tool::new(PLEACH).json(&["apply", text(&plan), "--json"]);
        let bytes = |document: &Value| document["plan"]["bytes_written"].clone();
        assert_eq!(bytes(&done), bytes(&planned), "{words:?}");
        assert_eq!(digest(&dir.join("d.qcow2"), Format::Qcow2), before, "{words:?}");
        check_clean(&dir.join("d.qcow2"));
        assert_ne!(Tool::new(PLEACH).run(&["apply", text(&plan)]).code, Some(0), "{words:?}: twice");
    }
}

#[test]
fn plans_are_not_for_trees_with_a_catalog() {
    let work = WorkDir::new("apply-catalog");
    let dir = work.join("images");
    std::fs::create_dir(&dir).unwrap();
    chain(&dir);
    let plan = work.join("plan.json");
    let delete = ["delete", text(&dir), "c", "--plan"];
    Tool::new(PLEACH).succeed(&[&delete[..], &[text(&plan)]].concat());
    Tool::new(PLEACH).succeed(&["snapshot", text(&dir), "e"]);
    let files = listing(&dir);
    let again = work.join("again.json");
    for words in [&["apply", text(&plan)][..], &[&delete[..], &[text(&again)]].concat()] {
        let outcome = Tool::new(PLEACH).run(words);
        assert_eq!(outcome.code, Some(8), "{}", outcome.text());
        assert_eq!(listing(&dir), files, "{words:?}");
    }
    assert!(!again.exists());
}

#[test]
fn bandwidth_is_a_limit_and_what_is_no_plan_is_refused() {
    let work = WorkDir::new("bandwidth");
    chain(&work);
    let image = work.join("d.qcow2");
    let slow = ["rebase", text(&image), "--onto", "none", "-y", "--bandwidth", "6M"];
    let outcome = Tool::new(PLEACH).succeed(&slow);
    assert!(outcome.elapsed >= Duration::from_millis(450), "3 MiB in {:?}", outcome.elapsed);
    for words in ["{}", "{\"schema\": 1}", "no JSON"] {
        std::fs::write(work.join("plan"), words).unwrap();
        let outcome = Tool::new(PLEACH).run(&["apply", text(&work.join("plan"))]);
        assert_eq!(outcome.code, Some(1), "{words}: {}", outcome.text());
    }
}
