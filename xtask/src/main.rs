//! The project's tasks, as one table: `cargo xtask <task>`. CI runs `cargo xtask ci` and nothing else.
#![forbid(unsafe_code)]

mod check;
mod fuzz;
mod json;
mod msrv;
mod run;
mod setup;
mod source;
mod tidy;

use std::process::ExitCode;

use run::{Result, cargo};

/// Name, what it does, how.
type Task = (&'static str, &'static str, fn(&[String]) -> Result);

const TASKS: &[Task] = &[
    ("setup", "install what the tests need (as root), or say what to install", setup::setup),
    ("ci", "everything a change must pass", check::ci),
    ("test", "test [--long] [cargo test args]: all tests; --long: 500 random operations, not 50", test),
    ("tidy", "the rules that no compiler knows: crate edges, unsafe, leftovers, manifests", tidy::tidy),
    ("msrv", "nothing needs a newer Rust than Cargo.toml promises", msrv::msrv),
    ("fuzz", "fuzz [target|all] [seconds=60] [libFuzzer args]; alone: lists the targets", fuzz::fuzz),
    (
        "crash",
        "crash [states=1000000]: so many states that kills, power losses and failing disks leave of all verbs, in memory",
        crash,
    ),
    (
        "bench",
        "bench [--compare [REVISION]] [criterion args]: all benches, or those named; against a revision's, HEAD's by default",
        bench,
    ),
    (
        "testdata",
        "testdata [--check]: make the images of testdata with qemu-img, or compare with them",
        testdata,
    ),
    ("docs", "the API documentation, warnings denied", docs),
];

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let Some((_, _, task)) = TASKS.iter().find(|(known, ..)| *known == name) else {
        print_tasks(&name);
        return ExitCode::from(2);
    };
    match run::enter_root().and_then(|()| task(&rest)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask {name}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn print_tasks(unknown: &str) {
    if !unknown.is_empty() {
        eprintln!("there is no task named {unknown:?}\n");
    }
    eprintln!("cargo xtask <task>\n");
    for (name, about, _) in TASKS {
        eprintln!("  {name:<9} {about}");
    }
}

fn test(args: &[String]) -> Result {
    setup::setup(&[])?;
    // The end-to-end tests run the release binary, as users do.
    run::run(cargo().args(["build", "--release", "--package", "pleach"]))?;
    let (long, rest): (Vec<&String>, Vec<&String>) = args.iter().partition(|arg| *arg == "--long");
    let mut test = cargo();
    test.args(["test", "--workspace", "--exclude", "pleach-benches"]).args(rest);
    if !long.is_empty() {
        test.env("PLEACH_LONG", "1");
    }
    run::run(&mut test)
}

fn crash(args: &[String]) -> Result {
    const TESTS: [&str; 3] = ["crash", "crash_trees", "crash_images"];
    let states: usize = match args.first() {
        Some(n) => n.parse().map_err(|_| format!("{n:?} is not a number of states"))?,
        None => 1_000_000,
    };
    let mut test = cargo();
    test.args(["test", "--release", "--package", "pleach-engine"]);
    for name in TESTS {
        test.args(["--test", name]);
    }
    test.args(["--", "--nocapture"]);
    run::run(test.env("PLEACH_CRASH_STATES", states.div_ceil(TESTS.len()).to_string()))
}

fn bench(args: &[String]) -> Result {
    if args.iter().any(|arg| arg == "chain") {
        // It runs the command line, as users do.
        run::run(cargo().args(["build", "--release", "--package", "pleach"]))?;
    }
    let Some(at) = args.iter().position(|arg| arg == "--compare") else {
        return run::run(cargo().args(["bench", "--package", "pleach-benches", "--"]).args(args));
    };
    let (mut rest, mut revision) = (args.to_vec(), "HEAD".to_owned());
    rest.remove(at);
    if let Some(next) = rest.get(at).filter(|next| is_revision(next)) {
        revision.clone_from(next);
        rest.remove(at);
    }
    compare(&revision, &rest)
}

fn is_revision(word: &str) -> bool {
    let commit = format!("{word}^{{commit}}");
    run::succeeds(run::program("git").args(["rev-parse", "--quiet", "--verify", &commit]))
}

/// The benches of a revision, then of what is here, which criterion compares.
fn compare(revision: &str, args: &[String]) -> Result {
    let here = std::env::current_dir().map_err(|why| format!("where are we? {why}"))?;
    let (target, other) = (here.join("target"), here.join("target/compare"));
    let tree = || {
        let mut git = run::program("git");
        git.args(["worktree"]);
        git
    };
    // What an earlier run may have left; it is no error if there is nothing.
    let _ = run::succeeds(tree().args(["remove", "--force"]).arg(&other));
    run::run(tree().args(["add", "--force", "--detach"]).arg(&other).arg(revision))?;
    let bench = |dir: &std::path::Path, baseline: &str| {
        let mut bench = cargo();
        bench.current_dir(dir).args(["bench", "--package", "pleach-benches", "--", baseline, "compare"]);
        // Both build what they have in common once, and know each other's figures.
        bench.env("CARGO_TARGET_DIR", &target).env("CRITERION_HOME", target.join("criterion"));
        run::run(bench.args(args))
    };
    let done = bench(&other, "--save-baseline").and_then(|()| bench(&here, "--baseline-lenient"));
    run::run(tree().args(["remove", "--force"]).arg(&other))?;
    done
}

fn testdata(args: &[String]) -> Result {
    setup::setup(&[])?;
    run::run(run::program("testdata/make.sh").args(args))
}

fn docs(_: &[String]) -> Result {
    run::run(cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}
