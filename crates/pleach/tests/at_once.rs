//! Several pleach at once: one works, and the others say that it does.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::process::Command;
use std::time::Duration;

use pleach_testkit::oracle::{check_clean, qemu_img_in};
use pleach_testkit::tool::Running;
use pleach_testkit::{Tool, WorkDir};
use serde_json::Value;

#[test]
fn one_works_and_the_others_are_told() {
    let work = WorkDir::new("at-once");
    for image in ["x.qcow2", "y.qcow2"] {
        qemu_img_in(&work, &["create", "-q", "-f", "qcow2", image, "64M"]);
    }
    let tool = Tool::new(env!("CARGO_BIN_EXE_pleach"));
    tool.succeed(&["init", "vm", "--disk", &format!("vda={}", work.join("x.qcow2").display())]);
    for (round, image) in ["x.qcow2", "x.qcow2", "y.qcow2", "x.qcow2"].into_iter().enumerate() {
        let start = |n: usize| {
            let mut command = Command::new(tool.path());
            command.current_dir(&*work).args(["snapshot", image, &format!("s{round}-{n}")]);
            command.arg(if round == 1 { "--external" } else { "--internal" });
            Running::start(command)
        };
        let all: Vec<_> = (0..4).map(start).collect();
        let all: Vec<_> = all.into_iter().map(|one| one.finish(Duration::from_secs(60))).collect();
        assert!(all.iter().any(|one| one.code == Some(0)), "{all:?}");
        for one in &all {
            assert!(matches!(one.code, Some(0 | 5)), "{one}");
        }
        let tree: Value = tool.json(&["tree", work.join(image).to_str().unwrap(), "--json"]);
        for (n, one) in all.iter().enumerate() {
            let name = format!("s{round}-{n}");
            let there = tree["nodes"].as_array().unwrap().iter().any(|node| node["name"] == *name);
            assert_eq!(there, one.code == Some(0), "{one}\n{tree}");
        }
        assert_eq!(tree["differences"], serde_json::json!([]), "{tree}");
    }
    check_clean(&work.join("y.qcow2"));
}
