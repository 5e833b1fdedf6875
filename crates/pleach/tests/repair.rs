//! `pleach check --repair`: damaged copies of the golden images. `qemu-img check` judges what comes out, `qemu-img
//! convert` reads every state before and after, and the undo file brings every byte back.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pleach_testkit::oracle::text;
use pleach_testkit::{Rng, Tool, WorkDir};
use serde_json::Value;

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

/// Findings of ours that `qemu-img check` does not make; docs/testing.md says why.
const ON_PURPOSE: [&str; 4] = ["l2-pointer", "snapshot-table", "snapshot-l1", "bitmap-entry"];

fn golden(work: &WorkDir) -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden");
    // Backing files are named by the images.
    pleach_testkit::files::copy_dir(&golden, &work.join("golden"));
    let entries = fs::read_dir(work.join("golden")).unwrap().map(|e| e.unwrap().path());
    let mut images: Vec<_> = entries
        .filter(|p| p.extension().is_some_and(|e| e == "qcow2") && !text(p).contains("data-file"))
        .collect();
    images.sort();
    images
}

/// Exit code and what it said; `None` where qemu-img gives up.
fn qemu_check(path: &Path) -> Option<(i32, String)> {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "-f", "qcow2", text(path)])
        .output()
        .unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).ok()?;
    if json.get("check-errors").and_then(Value::as_u64).unwrap_or(0) > 0 {
        return None;
    }
    Some((output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Id and date of a snapshot.
type SnapshotId = (String, u64);

/// The internal snapshots, as qemu-img lists them; `None` if it cannot open the image.
fn snapshots(path: &Path) -> Option<Vec<SnapshotId>> {
    let output =
        Command::new("qemu-img").args(["info", "--output=json", "-f", "qcow2", text(path)]).output().unwrap();
    let info: Value = serde_json::from_slice(&output.stdout).ok()?;
    let list = info.get("snapshots").and_then(Value::as_array).cloned().unwrap_or_default();
    Some(
        list.iter()
            .map(|s| (s["id"].as_str().unwrap().to_owned(), s["date-sec"].as_u64().unwrap()))
            .collect(),
    )
}

/// What a state reads, zeros where it cannot be read; `None` if it cannot be opened.
fn content(path: &Path, snapshot: Option<&str>) -> Option<Vec<u8>> {
    let out = path.with_extension("content");
    let _ = fs::remove_file(&out);
    let mut command = Command::new("qemu-img");
    command.args(["convert", "--salvage", "-q", "-f", "qcow2", "-O", "raw"]);
    let choice = snapshot.map(|id| format!("snapshot.id={id}"));
    if let Some(choice) = &choice {
        command.args(["-l", choice]);
    }
    let output = command.args([text(path), text(&out)]).output().unwrap();
    let bytes = output.status.success().then(|| fs::read(&out).unwrap());
    let _ = fs::remove_file(&out);
    bytes
}

/// Whether stock QEMU reads these 512 bytes of the active state.
fn readable(path: &Path, offset: usize) -> bool {
    let read = format!("read {offset} 512");
    let output =
        Command::new("qemu-io").args(["-r", "-f", "qcow2", "-c", &read, text(path)]).output().unwrap();
    output.status.success()
        && !String::from_utf8_lossy(&output.stderr).contains("failed")
        && !String::from_utf8_lossy(&output.stdout).contains("failed")
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |w| u64::from_be_bytes(w.try_into().unwrap()))
}

fn offset(value: u64) -> usize {
    usize::try_from(value & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// Where the structures of a whole image are: a name and a range for each.
fn structures(bytes: &[u8]) -> Vec<(&'static str, usize, usize)> {
    let cluster = 1usize << bytes[23];
    let mut found = vec![("refcount root", 48, 12)];
    let l1 = |at: usize, entries: usize, found: &mut Vec<_>, name: [&'static str; 2]| {
        found.push((name[0], at, entries * 8));
        for i in 0..entries {
            let table = offset(word(bytes, at + i * 8));
            if table != 0 {
                found.push((name[1], table, cluster));
            }
        }
    };
    let (l1_at, l1_size) =
        (offset(word(bytes, 40)), usize::try_from(word(bytes, 36) >> 32).unwrap() & 0xffff_ffff);
    l1(l1_at, l1_size.min(64), &mut found, ["L1", "L2"]);
    let table = offset(word(bytes, 48));
    found.push(("refcount table", table, 64.min(cluster)));
    for i in 0..8 {
        let block = offset(word(bytes, table + i * 8));
        if block != 0 {
            found.push(("refcount block", block, 64.min(cluster)));
        }
    }
    let count = usize::try_from(word(bytes, 60) >> 32).unwrap();
    if count > 0 {
        found.push(("snapshot root", 60, 12));
        let mut at = offset(word(bytes, 64));
        for _ in 0..count {
            let (id, name) = (word(bytes, at + 8) >> 16 & 0xffff, word(bytes, at + 8) & 0xffff);
            let extra = word(bytes, at + 32) & 0xffff_ffff;
            let len = 40 + usize::try_from(id + name + extra).unwrap();
            found.push(("snapshot entry", at, len));
            let entries = usize::try_from(word(bytes, at + 8) >> 32).unwrap();
            l1(offset(word(bytes, at)), entries.min(64), &mut found, ["snapshot L1", "snapshot L2"]);
            at += len.next_multiple_of(8);
        }
    }
    let mut at = if bytes[7] == 2 { 72 } else { usize::try_from(word(bytes, 96) & 0xffff_ffff).unwrap() };
    while word(bytes, at) >> 32 != 0 {
        let (kind, len) = (word(bytes, at) >> 32, usize::try_from(word(bytes, at) & 0xffff_ffff).unwrap());
        if kind == 0x2385_2875 {
            found.push(("bitmaps extension", at + 8, 24));
            let (size, dir) = (word(bytes, at + 16), usize::try_from(word(bytes, at + 24)).unwrap());
            found.push(("bitmap directory", dir, usize::try_from(size).unwrap()));
            found.push(("bitmap table", usize::try_from(word(bytes, dir)).unwrap(), 8));
        }
        at += 8 + len.next_multiple_of(8);
    }
    found.retain(|s| s.2 > 0);
    found
}

/// Damages one to three places, and says which.
fn damage(rng: &mut Rng, bytes: &mut [u8]) -> String {
    let whole = bytes.to_vec();
    let all = structures(&whole);
    let mut kinds: Vec<&str> = all.iter().map(|s| s.0).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut what = Vec::new();
    for _ in 0..=rng.below(3) {
        let kind = *rng.pick(&kinds);
        let of_kind: Vec<_> = all.iter().filter(|s| s.0 == kind).collect();
        let &&(name, at, len) = rng.pick(&of_kind);
        // Where there is something, mostly.
        let used: Vec<usize> = (0..len).filter(|&i| whole.get(at + i).is_some_and(|&b| b != 0)).collect();
        let place = at + if used.is_empty() || rng.below(4) == 0 { rng.index(len) } else { *rng.pick(&used) };
        let Some(byte) = bytes.get_mut(place) else { continue };
        let old = *byte;
        *byte = match rng.below(4) {
            0 => rng.bits() as u8,
            1 => 0,
            _ => old ^ 1 << rng.below(8),
        };
        what.push(format!("{name} {place:#x}: {old:#04x} -> {:#04x}", *byte));
    }
    what.join(", ")
}

/// What the damaged image was like, and what came of it.
#[derive(Debug, Default)]
struct Tally {
    repaired: u32,
    unharmed: u32,
    refused: u32,
    read: u32,
}

fn one(path: &Path, what: &str, tally: &mut Tally) {
    let damaged = fs::read(path).unwrap();
    let tool = Tool::new(PLEACH);
    let theirs = qemu_check(path);
    let ours = tool.run(&["check", text(path), "--json"]);
    let code = ours.code.unwrap();
    assert!([0, 3, 4, 8].contains(&code), "{what}: {ours}");
    if let Some((theirs, _)) = &theirs
        && code != 8
    {
        let same = code == if *theirs == 2 { 4 } else { *theirs };
        let codes = ours.json()["images"][0]["findings"].as_array().cloned().unwrap_or_default();
        let on_purpose = codes.iter().any(|f| ON_PURPOSE.contains(&f["code"].as_str().unwrap()));
        assert!(
            same || (code == 4 && (on_purpose || codes.is_empty())),
            "{what}: qemu-img says {theirs}; {ours}"
        );
    }
    let states = snapshots(path);
    let before = content(path, None);
    let of_states: Vec<_> = states.iter().flatten().map(|s| (s.clone(), content(path, Some(&s.0)))).collect();

    leaks_only(path, &damaged, what, theirs.as_ref().map(|t| t.0), before.as_deref(), &of_states);
    let repair = tool.run(&["check", "--repair", "all", "--json", text(path)]);
    let json = repair.json();
    let report = json.get("images").map(|i| i[0].clone());
    let Some(report) = report.filter(|_| repair.code != Some(8)) else {
        // Refused by name, and untouched.
        assert!([4, 8].contains(&repair.code.unwrap()), "{what}: {repair}");
        assert!(fs::read(path).unwrap() == damaged, "{what}: a refusal changes nothing: {repair}");
        println!("refused: {what}: {}", json["error"]["message"]);
        tally.refused += 1;
        return;
    };
    assert_eq!(repair.code, Some(0), "{what}: {repair}");
    let after = qemu_check(path);
    assert_eq!(after.as_ref().map(|a| a.0), Some(0), "{what}: {after:?}\n{repair}");
    let repaired = fs::read(path).unwrap();

    if let Some(before) = before {
        let after = content(path, None).unwrap_or_else(|| panic!("{what}: cannot be read\n{repair}"));
        assert_eq!(before.len(), after.len(), "{what}");
        tally.read += 1;
        let differs: Vec<usize> =
            (0..before.len()).step_by(512).filter(|&i| before[i..i + 512] != after[i..i + 512]).collect();
        if !differs.is_empty() {
            fs::write(path, &damaged).unwrap();
            for &at in differs.iter().step_by(differs.len().div_ceil(8)) {
                assert!(!readable(path, at), "{what}: {at:#x} could be read and reads differently\n{repair}");
            }
            fs::write(path, &repaired).unwrap();
        }
    }
    let left = snapshots(path).unwrap();
    for (state, before) in of_states {
        let Some(before) = before.filter(|_| left.contains(&state)) else { continue };
        let after =
            content(path, Some(&state.0)).unwrap_or_else(|| panic!("{what}: snapshot {state:?}\n{repair}"));
        let differs = (0..before.len().min(after.len()))
            .step_by(512)
            .find(|&i| before[i..i + 512] != after[i..i + 512] && before[i..i + 512].iter().any(|&b| b != 0));
        assert_eq!(differs, None, "{what}: snapshot {state:?} reads differently\n{repair}");
    }

    let again = tool.run(&["check", "--repair", "all", "--json", text(path)]);
    assert_eq!(
        again.json()["images"][0]["undo_file"],
        Value::Null,
        "{what}: a second repair does something: {again}"
    );
    assert!(fs::read(path).unwrap() == repaired, "{what}: a second repair changes nothing");

    let Some(undo) = report["undo_file"].as_str() else {
        assert!(repaired == damaged, "{what}: no undo file, no change");
        tally.unharmed += 1;
        return;
    };
    let back = tool.run(&["check", "--undo", undo, text(path)]);
    assert_eq!(back.code, Some(0), "{what}: {back}");
    assert!(fs::read(path).unwrap() == damaged, "{what}: undo brings every byte back");
    fs::remove_file(undo).unwrap();
    tally.repaired += 1;
}

/// The safe repair: nothing reads differently, errors do not become more, leaks alone are gone.
fn leaks_only(
    path: &Path,
    damaged: &[u8],
    what: &str,
    theirs: Option<i32>,
    before: Option<&[u8]>,
    of_states: &[(SnapshotId, Option<Vec<u8>>)],
) {
    let tool = Tool::new(PLEACH);
    let repair = tool.run(&["check", "--repair", "leaks", "--json", text(path)]);
    let undo = repair.json()["images"][0]["undo_file"].as_str().map(str::to_owned);
    let Some(undo) = undo else {
        assert!(fs::read(path).unwrap() == damaged, "{what}: no undo file, no change: {repair}");
        return;
    };
    assert!(content(path, None).as_deref() == before, "{what}: reads differently\n{repair}");
    for (state, before) in of_states {
        assert!(content(path, Some(&state.0)) == *before, "{what}: {state:?} reads differently\n{repair}");
    }
    if theirs == Some(3) {
        assert_eq!(qemu_check(path).map(|c| c.0), Some(0), "{what}: leaks are left\n{repair}");
    }
    let back = tool.run(&["check", "--undo", &undo, text(path)]);
    assert_eq!(back.code, Some(0), "{what}: {back}");
    assert!(fs::read(path).unwrap() == damaged, "{what}: undo brings every byte back");
    fs::remove_file(undo).unwrap();
}

#[test]
fn damaged_images_are_repaired_and_every_readable_byte_stays() {
    let work = WorkDir::new("repair");
    let all = golden(&work);
    let seeds = match std::env::var("PLEACH_SEED") {
        Ok(seed) => {
            let seed = u64::from_str_radix(seed.trim_start_matches("0x"), 16).unwrap();
            seed..seed + 1
        }
        Err(_) if std::env::var_os("PLEACH_LONG").is_some() => 0..1500,
        Err(_) => 0..150,
    };
    let mut failures = Vec::new();
    let few = seeds.end - seeds.start < 150;
    let mut tally = Tally::default();
    for seed in seeds {
        let rng = &mut Rng::new(seed);
        let path: &PathBuf = rng.pick(&all);
        let whole = fs::read(path).unwrap();
        let mut bytes = whole.clone();
        let what = format!("{} with {}", path.file_name().unwrap().display(), damage(rng, &mut bytes));
        fs::write(path, &bytes).unwrap();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one(path, &what, &mut tally)));
        failures.extend(outcome.is_err().then(|| format!("PLEACH_SEED={seed:#x}: {what}")));
        fs::write(path, &whole).unwrap();
    }
    println!("{tally:?}");
    assert!(failures.is_empty(), "{} failed: {failures:#?}", failures.len());
    assert!(
        few || (tally.repaired > 100 && tally.read > 100 && tally.refused < tally.repaired / 10),
        "{tally:?}"
    );
}
