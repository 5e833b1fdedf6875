//! Stock qemu-img and qemu-io: what an image reads as, and whether it is consistent.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::files::scratch_root;

/// The formats that nodes come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Format {
    /// The guest's bytes and nothing else.
    Raw,
    /// Any version of qcow2.
    Qcow2,
}

impl Format {
    /// As `qemu-img -f` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// SHA-256 of everything a guest can read, from the first byte to the last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// What `hash` has been fed.
    pub(crate) fn of(hash: Sha256) -> Self {
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{self}")
    }
}

/// What `qemu-img check` found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// 0 clean, 2 corrupt, 3 leaks only, anything else: not checked.
    pub code: Option<i32>,
    /// Clusters that are wrong.
    pub corruptions: u64,
    /// Clusters that nobody uses.
    pub leaks: u64,
    /// The tool's own words, for messages.
    pub text: String,
}

impl Check {
    /// No corruption, no leak.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.code == Some(0) && self.corruptions == 0 && self.leaks == 0
    }

    /// Nothing worse than leaks.
    #[must_use]
    pub fn is_safe(&self) -> bool {
        self.corruptions == 0 && matches!(self.code, Some(0 | 3))
    }
}

/// Whether qemu-img and qemu-io are installed.
#[must_use]
pub fn available() -> bool {
    ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok())
}

/// A path as an argument.
///
/// # Panics
/// If it is not UTF-8; no test makes such a path.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths in tests are UTF-8")
}

/// Runs `qemu-img ARGS`, which must succeed; its stdout.
///
/// # Panics
/// If it fails, with what it said.
pub fn qemu_img(args: &[&str]) -> String {
    run(Command::new("qemu-img").args(args))
}

/// As [`qemu_img`], with `dir` as the working directory.
///
/// # Panics
/// If it fails, with what it said.
pub fn qemu_img_in(dir: &Path, args: &[&str]) -> String {
    run(Command::new("qemu-img").current_dir(dir).args(args))
}

/// Runs qemu-io commands on one image, in one process, with discards passed on. All must succeed.
///
/// # Panics
/// If one fails, with what it said.
pub fn qemu_io<S: AsRef<str>>(file: &Path, format: Format, commands: &[S]) {
    if commands.is_empty() {
        return;
    }
    let mut io = Command::new("qemu-io");
    io.args(["-d", "unmap", "-f", format.name()]);
    for command in commands {
        io.args(["-c", command.as_ref()]);
    }
    run(io.arg(file));
}

/// What the node at `path` reads as, the whole disk.
///
/// # Panics
/// If stock qemu-img cannot read it.
#[must_use]
pub fn digest(path: &Path, format: Format) -> Digest {
    try_digest(path, format).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`digest`].
///
/// # Errors
/// What qemu-img said when it could not read the node.
pub fn try_digest(path: &Path, format: Format) -> Result<Digest, String> {
    let whole_sectors = path.metadata().is_ok_and(|metadata| metadata.len() % 512 == 0);
    if format == Format::Raw && whole_sectors {
        return hash_file(path);
    }
    let raw =
        tempfile::NamedTempFile::new_in(scratch_root()).map_err(|error| format!("scratch file: {error}"))?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", format.name(), "-O", "raw"]).arg(path).arg(raw.path());
    output(&mut convert)?;
    hash_file(raw.path())
}

/// What an internal snapshot reads as, by its id; for images whose disk has had one size all the time.
///
/// # Errors
/// What qemu-img said when it could not read the snapshot.
pub fn try_snapshot_digest(path: &Path, id: &str) -> Result<Digest, String> {
    let raw =
        tempfile::NamedTempFile::new_in(scratch_root()).map_err(|error| format!("scratch file: {error}"))?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "qcow2", "-O", "raw", "-l", &format!("snapshot.id={id}")]);
    convert.arg(path).arg(raw.path());
    output(&mut convert)?;
    hash_file(raw.path())
}

/// What `qemu-img check` says of a qcow2 image; a raw file is always fine.
///
/// # Panics
/// If qemu-img cannot be started.
#[must_use]
pub fn check(path: &Path, format: Format) -> Check {
    if format == Format::Raw {
        return Check { code: Some(0), corruptions: 0, leaks: 0, text: String::new() };
    }
    let mut command = Command::new("qemu-img");
    command.args(["check", "--output=json", "-f", "qcow2"]).arg(path);
    let output = command.output().expect("qemu-img must be installed");
    let text = both(&output);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let count = |key| report.get(key).and_then(Value::as_u64).unwrap_or(0);
    Check { code: output.status.code(), corruptions: count("corruptions"), leaks: count("leaks"), text }
}

/// Checks a qcow2 image, which must have neither errors nor leaks.
///
/// # Panics
/// If it has.
pub fn check_clean(path: &Path) {
    let check = check(path, Format::Qcow2);
    assert!(check.is_clean(), "{}: {check:?}", path.display());
}

/// `qemu-img info --output=json`.
///
/// # Panics
/// If qemu-img cannot read the header.
#[must_use]
pub fn info(path: &Path) -> Value {
    try_info(path).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`info`].
///
/// # Errors
/// What qemu-img said when it could not read the header.
pub fn try_info(path: &Path) -> Result<Value, String> {
    let json = output(Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(path))?;
    serde_json::from_slice(&json.stdout).map_err(|error| format!("qemu-img info {}: {error}", path.display()))
}

/// How many bytes `qemu-img measure` says a qcow2 copy of the image at `path`, made with `options`, has at most.
///
/// # Panics
/// If it fails.
#[must_use]
pub fn required(path: &Path, options: &str) -> u64 {
    let command = ["measure", "--output=json", "-f", "qcow2", "-O", "qcow2", "-o", options, text(path)];
    let said: Value = serde_json::from_str(&qemu_img(&command)).expect("measure prints JSON");
    said.get("required").and_then(Value::as_u64).expect("measure says how many bytes")
}

/// Applies `work` to every item on both cores; results in the order of the items.
///
/// # Panics
/// If `work` does.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((index, item)) = claim(&next, items) {
                    let result = work(item);
                    results.lock().expect("no worker panics while holding it").push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().expect("all workers have ended");
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

fn claim<'a, T>(next: &AtomicUsize, items: &'a [T]) -> Option<(usize, &'a T)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    items.get(index).map(|item| (index, item))
}

/// SHA-256 of a file's bytes.
///
/// # Errors
/// If it cannot be read.
pub fn hash_file(path: &Path) -> Result<Digest, String> {
    let named = |error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(named)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let len = file.read(&mut buffer).map_err(named)?;
        match buffer.get(..len) {
            Some(bytes) if len > 0 => hash.update(bytes),
            _ => return Ok(Digest(hash.finalize().into())),
        }
    }
}

fn run(command: &mut Command) -> String {
    let output = output(command).unwrap_or_else(|error| panic!("{error}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs to the end; anything but exit code 0 is an error with the command and its words in it.
fn output(command: &mut Command) -> Result<Output, String> {
    let output =
        command.output().map_err(|error| format!("{command:?}: {error} (is qemu-utils installed?)"))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!("{command:?}: {}: {}", output.status, both(&output)))
}

fn both(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{stdout}{stderr}")
}
