//! Running other programs from the root of the repository.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A task ends well or with a sentence that says why not.
pub(crate) type Result<T = ()> = std::result::Result<T, String>;

/// Makes the repository's root the current directory: every path in this program is relative to it.
pub(crate) fn enter_root() -> Result {
    // Cargo sets the variable when it runs us; the built-in value serves when the binary is run by hand.
    let here =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let root = here.parent().ok_or("xtask's manifest has no parent directory")?;
    env::set_current_dir(root).map_err(|why| format!("cannot enter {}: {why}", root.display()))
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The cargo of another toolchain, which only rustup's own `cargo` can find.
pub(crate) fn cargo_of(toolchain: &str) -> Command {
    let mut command = Command::new("cargo");
    command.arg(format!("+{toolchain}"));
    command
}

/// A program by name or by path.
pub(crate) fn program(name: &str) -> Command {
    Command::new(name)
}

/// Runs `command` with our own output, and nothing to read.
pub(crate) fn run(command: &mut Command) -> Result {
    let line = line_of(command);
    let status =
        command.stdin(Stdio::null()).status().map_err(|why| format!("cannot run `{line}`: {why}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed ({status})")) }
}

/// Runs `command` and returns what it wrote to its output; what it wrote to its error output goes to ours.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = line_of(command);
    let done = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|why| format!("cannot run `{line}`: {why}"))?;
    if !done.status.success() {
        return Err(format!("`{line}` failed ({})", done.status));
    }
    String::from_utf8(done.stdout).map_err(|_| format!("`{line}` did not write UTF-8"))
}

/// Whether `command` can be run and ends well; what it writes is dropped.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Whether a program of this name is installed; file system tools live in `sbin`, which users often lack in PATH.
pub(crate) fn is_installed(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/sbin", "/usr/sbin"].map(PathBuf::from))
        .any(|directory| directory.join(name).is_file())
}

/// The text of a file of the repository.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    std::fs::read_to_string(path).map_err(|why| format!("cannot read {}: {why}", path.display()))
}

fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}
