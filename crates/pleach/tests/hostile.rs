//! Every verb on every hostile image: a documented exit code, in time, within the memory budget, nothing else read or
//! changed, no other bytes than were meant, and nothing made worse by a repair.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pleach_testkit::files::{changes, listing};
use pleach_testkit::hostile::{self, Case, Expect, IMAGE, OUTSIDE, Read, SONG, Verdict};
use pleach_testkit::tool::Running;
use pleach_testkit::{Digest, Format, Outcome, Tool, WorkDir, long_mode, oracle};

const TESTED: &str = env!("CARGO_BIN_EXE_pleach");
/// Nothing that an image says makes a verb work longer than this.
const CPU: Duration = Duration::from_secs(10);
/// Nor wait longer than this, on a machine that is busy with other things.
const DEADLINE: Duration = Duration::from_secs(60);
/// The budgets of memory: for looking at an image, and for all else.
const LOOKING: u64 = 64 << 20;
const WORKING: u64 = 256 << 20;
/// No output takes more blocks than this.
const OUTPUT: u64 = 16 << 20;
/// Outputs longer than this are judged by their blocks only.
const COMPARED: u64 = 4 << 20;
/// Of so many cases one goes through the verbs that read all and repair, unless all do.
const SAMPLE: usize = 12;
/// The documented exit codes that an image can lead to.
const CODES: [i32; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 8];

/// A command line: `IMAGE`, `DIR` and `OUT` stand for the image, its directory, and a file that is not there yet.
struct Verb {
    words: &'static [&'static str],
    budget: u64,
}

/// What only reads.
const READING: &[Verb] = &[
    Verb { words: &["info", "IMAGE", "--json"], budget: LOOKING },
    Verb { words: &["info", "--chain", "IMAGE"], budget: LOOKING },
    Verb { words: &["check", "IMAGE", "--json"], budget: WORKING },
    Verb { words: &["check", "--chain", "IMAGE"], budget: WORKING },
    Verb { words: &["tree", "DIR", "--sizes", "--json"], budget: WORKING },
];

/// What reads all there is.
const COPYING: &[Verb] = &[
    Verb { words: &["map", "IMAGE", "--json"], budget: WORKING },
    Verb { words: &["measure", "IMAGE"], budget: WORKING },
    Verb { words: &["compare", "IMAGE", "IMAGE"], budget: WORKING },
    TO_RAW,
    Verb { words: &["convert", "IMAGE", "OUT", "-O", "qcow2"], budget: WORKING },
];
/// The same, where a small image has much data: the output is bounded, and so is the work.
const BOUNDED: &[Verb] = &[
    Verb { words: &["map", "IMAGE", "--json"], budget: WORKING },
    Verb { words: &["measure", "IMAGE"], budget: WORKING },
    Verb { words: &["compare", "IMAGE", "IMAGE"], budget: WORKING },
    Verb { words: &["convert", "IMAGE", "OUT", "-O", "raw", "--max-output", "16M"], budget: WORKING },
    Verb { words: &["convert", "IMAGE", "OUT", "-O", "qcow2", "--max-output", "16M"], budget: WORKING },
];
const TO_RAW: Verb = Verb { words: &["convert", "IMAGE", "OUT", "-O", "raw"], budget: WORKING };
/// What changes the image, but not what a guest reads.
const CHANGING: &[Verb] = &[
    Verb { words: &["check", "--repair", "all", "IMAGE"], budget: WORKING },
    Verb { words: &["compact", "IMAGE", "--zeroes"], budget: WORKING },
];

#[test]
fn no_two_cases_have_one_name() {
    let mut names: Vec<String> = hostile::cases().into_iter().map(|c| c.name).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(count >= 300, "{count}");
}

#[test]
fn hostile_images_do_no_harm() {
    let chosen = std::env::var("PLEACH_CASE").unwrap_or_default();
    let cases: Vec<Case> = hostile::cases()
        .into_iter()
        .filter(|case| long_mode() || !case.slow || !chosen.is_empty())
        .filter(|case| case.name.contains(&chosen))
        .collect();
    let all = long_mode() || !chosen.is_empty();
    let (tool, _) = Tool::fastest(TESTED);
    let work = WorkDir::new("hostile");
    hostile::make_outside(&work);
    let outside = listing(&work.join(OUTSIDE));
    let (next, problems) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(index) else { break };
                    let found = Run::of(case, all || index % SAMPLE == 0, &work, &tool).problems;
                    problems.lock().unwrap().extend(found.into_iter().map(|p| format!("{}: {p}", case.name)));
                }
            });
        }
    });
    let mut problems = problems.into_inner().unwrap();
    problems.extend(changes(&outside, &listing(&work.join(OUTSIDE))));
    problems.sort();
    let report: String = problems.iter().map(|p| format!("{p}\n")).collect();
    assert!(problems.is_empty(), "{report}{} problems; PLEACH_CASE=NAME runs one case", problems.len());
}

/// One case on its way through all verbs.
struct Run<'a> {
    expect: Expect,
    dir: PathBuf,
    work: &'a Path,
    tool: &'a Tool,
    name: &'a str,
    problems: Vec<String>,
}

impl<'a> Run<'a> {
    fn of(case: &'a Case, with_data: bool, work: &'a Path, tool: &'a Tool) -> Self {
        let dir = work.join(&case.name);
        fs::create_dir(&dir).unwrap();
        let meant = case.make(&dir);
        let mut run = Self { expect: case.expect, dir, work, tool, name: &case.name, problems: Vec::new() };
        let before = listing(&run.dir);
        for verb in READING {
            let outcome = run.verb(verb);
            run.judge(verb, &outcome);
        }
        let mut read = None;
        let copying = if case.amplifies { BOUNDED } else { COPYING };
        for verb in copying.iter().filter(|_| with_data) {
            let outcome = run.verb(verb);
            run.judge_read(verb, &outcome, meant);
            if verb.words.contains(&"--max-output") && outcome.code != Some(1) {
                run.problem(format!("{}: more was put out than allowed", verb.words.join(" ")));
            }
            // The raw copy comes first: a disk that was too long to read stays so in a small image.
            let copy = run.take_output(verb, &outcome, meant, case.hangs_qemu || read.is_none());
            if read.is_some() && copy.is_some() && read != copy {
                run.problem("two copies differ");
            }
            read = read.or(copy);
        }
        let changed = changes(&before, &listing(&run.dir));
        if !changed.is_empty() {
            run.problem(format!("reading changed it: {changed:?}"));
        }
        if with_data && run.dir.join(IMAGE).is_file() {
            for verb in CHANGING {
                run.change(verb, read, !case.hangs_qemu);
            }
        }
        if std::env::var_os("PLEACH_KEEP").is_none() {
            fs::remove_dir_all(&run.dir).unwrap();
        }
        run
    }

    fn problem(&mut self, what: impl Into<String>) {
        self.problems.push(what.into());
    }

    /// Runs a verb, and holds it to the rules that are the same for all.
    fn verb(&mut self, verb: &Verb) -> Outcome {
        let out = self.output();
        let words = verb.words.iter().map(|word| match *word {
            "IMAGE" => self.dir.join(IMAGE),
            "DIR" => self.dir.clone(),
            "OUT" => out.clone(),
            other => PathBuf::from(other),
        });
        let mut command = Command::new(self.tool.path());
        command.args(words).env("NO_COLOR", "1").env_remove("RUST_BACKTRACE");
        let (outcome, in_time) = Running::start(command).finish_or_kill(DEADLINE);
        let shown = format!("{} ({:?}, {} MiB)", verb.words.join(" "), outcome.cpu, outcome.peak >> 20);
        if outcome.cpu > Duration::from_millis(500) && std::env::var_os("PLEACH_TIMES").is_some() {
            eprintln!("{}: {shown}", self.name);
        }
        let says = outcome.text();
        if !in_time {
            self.problem(format!("{shown}: still running after {DEADLINE:?}"));
        } else if outcome.cpu > CPU {
            self.problem(format!("{shown}: worked for {:?}", outcome.cpu));
        } else if !outcome.code.is_some_and(|code| CODES.contains(&code)) {
            self.problem(format!("{shown}: exit code {:?}: {}", outcome.code, outcome.stderr.trim()));
        }
        if says.contains("panicked") || says.contains("overflow") {
            self.problem(format!("{shown}: panicked: {}", outcome.stderr.trim()));
        }
        if outcome.code != Some(0) && outcome.code.is_some() && says.trim().is_empty() {
            self.problem(format!("{shown}: exit code {:?} without a word", outcome.code));
        }
        if outcome.peak > verb.budget {
            self.problem(format!("{shown}: more than {} MiB", verb.budget >> 20));
        }
        let song = String::from_utf8_lossy(SONG);
        if says.contains(song.trim()) {
            self.problem(format!("{shown}: printed the canary"));
        }
        if says.chars().any(|c| c.is_control() && c != '\n') {
            self.problem(format!("{shown}: printed control characters"));
        }
        outcome
    }

    fn output(&self) -> PathBuf {
        self.work.join(format!("{}.out", self.name))
    }

    /// Holds whether all data could be read against what the case expects.
    fn judge_read(&mut self, verb: &Verb, outcome: &Outcome, meant: Option<Digest>) {
        let wrong = match self.expect.read {
            Read::Right => outcome.code != Some(0) && meant.is_some(),
            Read::Refused => outcome.code == Some(0) && matches!(verb.words[0], "compare" | "convert"),
            Read::RightOrRefused | Read::Any => false,
        };
        if wrong {
            let shown = verb.words.join(" ");
            let (code, expected) = (outcome.code, self.expect.read);
            self.problem(format!(
                "{shown}: exit code {code:?}, expected {expected:?}: {}",
                outcome.stderr.trim()
            ));
        }
    }

    /// Judges and removes what a verb put out; its digest as a disk, if it is short enough to read.
    fn take_output(
        &mut self,
        verb: &Verb,
        outcome: &Outcome,
        meant: Option<Digest>,
        only_blocks: bool,
    ) -> Option<Digest> {
        let out = self.output();
        let shown = verb.words.join(" ");
        let Ok(metadata) = fs::symlink_metadata(&out) else { return None };
        if outcome.code != Some(0) {
            self.problem(format!("{shown}: failed, and left an output"));
        }
        let blocks = metadata.blocks() * 512;
        if blocks > OUTPUT {
            self.problem(format!("{shown}: put out {} MiB", blocks >> 20));
        }
        let raw = verb.words.contains(&"raw");
        let mut read = None;
        if blocks <= OUTPUT && metadata.len() <= COMPARED {
            if contains(&fs::read(&out).unwrap(), &SONG[..SONG.len() - 1]) {
                self.problem(format!("{shown}: copied the canary"));
            }
            let format = if raw { Format::Raw } else { Format::Qcow2 };
            if raw || !only_blocks {
                match oracle::try_digest(&out, format) {
                    Ok(digest) => read = Some(digest),
                    Err(error) => self.problem(format!("{shown}: {error}")),
                }
            }
            if !raw && !oracle::check(&out, format).is_clean() {
                self.problem(format!("{shown}: {:?}", oracle::check(&out, format)));
            }
        }
        let judged = !matches!(self.expect.read, Read::Any);
        if judged && read.is_some() && meant.is_some() && read != meant {
            self.problem(format!("{shown}: other bytes than were meant"));
        }
        fs::remove_file(&out).unwrap();
        read
    }

    /// Changes the image, after everything that only reads: `read` is what a guest read before.
    fn change(&mut self, verb: &Verb, read: Option<Digest>, with_qemu: bool) {
        let image = self.dir.join(IMAGE);
        let check = || with_qemu.then(|| oracle::check(&image, Format::Qcow2));
        let before = check();
        self.verb(verb);
        if let (Some(before), Some(after)) = (before, check())
            && matches!(before.code, Some(0 | 2 | 3))
            && (after.corruptions > before.corruptions || !matches!(after.code, Some(0 | 2 | 3)))
        {
            self.problem(format!("{} made it worse: {before:?} -> {after:?}", verb.words.join(" ")));
        }
        if read.is_some() {
            let outcome = self.verb(&TO_RAW);
            let after = self.take_output(&TO_RAW, &outcome, None, true);
            if after != read {
                let shown = verb.words.join(" ");
                self.problem(format!("{shown} changed what is read: {}", outcome.text().trim()));
            }
        }
    }

    /// Holds what a reading verb said against what the case expects.
    fn judge(&mut self, verb: &Verb, outcome: &Outcome) {
        let Some(code) = outcome.code else { return };
        let wrong = match verb.words {
            ["info", "IMAGE", ..] => self.expect.opens.is_some_and(|opens| opens != (code == 0)),
            ["check", "IMAGE", ..] => match self.expect.check {
                Verdict::Clean => code != 0,
                Verdict::Leaks => code != 3,
                Verdict::Bad => matches!(code, 0 | 3),
                Verdict::Any => false,
            },
            _ => false,
        };
        if wrong {
            let what = format!(
                "{}: exit code {code}, expected {:?}: {}",
                verb.words.join(" "),
                self.expect,
                outcome.text().trim().chars().take(300).collect::<String>()
            );
            self.problem(what);
        }
    }
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}
