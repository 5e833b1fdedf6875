//! Results on stdout, messages on stderr, and the exit code of each kind of failure.

use std::borrow::Cow;
use std::error::Error as _;
use std::fmt;
use std::io::{BufWriter, Seek, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

use pleach_engine::{Error, ErrorKind, Result};
use pleach_image::{escape, is_printable};
use serde::Serialize;
use serde_json::{Value, json};
use tempfile::SpooledTempFile;

/// Output up to this length is kept in memory.
const SPOOL_BYTES: usize = 16 << 20;

/// What kept output from being written, the first time.
static LOST: OnceLock<std::io::Error> = OnceLock::new();

/// Remembers that output was lost. A reader that has gone away is no failure of ours.
fn written(result: std::io::Result<()>) {
    if let Err(error) = result
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        // The first one says why.
        let _ = LOST.set(error);
    }
}

/// The exit code of the process, for a command that ended with `code`: lost output is no success.
pub(crate) fn finish(code: ExitCode) -> ExitCode {
    let Some(error) = LOST.get() else { return code };
    report(&Error::new(ErrorKind::Failed, format!("cannot write to stdout: {error}")));
    if code == ExitCode::SUCCESS { ExitCode::from(exit_code(ErrorKind::Failed)) } else { code }
}

/// Writes lines to stdout, whatever names they hold.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    written(out.write_all(lines(text).as_bytes()).and_then(|()| out.flush()));
}

/// A line on stderr.
pub(crate) fn note(text: &str) {
    eprintln!("note: {}", printable(text));
}

/// Lines in which everything is printable.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    let stays = |c: char| matches!(c, '\n' | '\t') || is_printable(c);
    if text.chars().all(stays) {
        return Cow::Borrowed(text);
    }
    let show = |c: char| if stays(c) { c.to_string() } else { c.escape_default().to_string() };
    Cow::Owned(text.chars().map(show).collect())
}

/// Writes one JSON document to stdout.
pub(crate) fn document(value: &Value) {
    stream(value);
}

/// Text too long for memory, kept aside until it is known that all of it can be printed.
#[derive(Debug)]
pub(crate) struct Spool(SpooledTempFile);

impl Spool {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self(SpooledTempFile::new(SPOOL_BYTES))
    }

    /// Adds a JSON document.
    pub(crate) fn add_json(&mut self, value: &impl Serialize) -> Result<()> {
        let mut out = BufWriter::new(&mut self.0);
        serde_json::to_writer_pretty(&mut out, value)
            .map_err(Into::into)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush())
            .map_err(Self::failed)
    }

    /// Adds to the text.
    pub(crate) fn add(&mut self, text: fmt::Arguments<'_>) -> Result<()> {
        self.0.write_fmt(text).map_err(Self::failed)
    }

    /// Writes all of it to stdout.
    pub(crate) fn print(mut self) -> Result<()> {
        self.0.rewind().map_err(Self::failed)?;
        let mut out = std::io::stdout().lock();
        written(std::io::copy(&mut self.0, &mut out).and_then(|_| out.flush()));
        Ok(())
    }

    fn failed(error: std::io::Error) -> Error {
        Error::io("keep the output", &std::env::temp_dir(), error)
    }
}

/// Writes one JSON document to stdout while it is being made.
pub(crate) fn stream(value: &impl Serialize) {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let all = serde_json::to_writer_pretty(&mut out, value).map_err(std::io::Error::from);
    written(all.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()));
}

/// A message on stderr.
pub(crate) fn warn(error: &Error) {
    eprint!("{}", text("warning", error));
}

/// A message on stderr about a file whose format nobody said.
pub(crate) fn warn_guessed_raw(path: &Path) {
    let text = "is not a qcow2 image; taken to be raw";
    warn(&Error::new(ErrorKind::Failed, text).at(path).hint("say -f raw"));
}

/// A failure on stderr that does not end the command.
pub(crate) fn report(error: &Error) {
    eprint!("{}", text(&format!("error[{}]", code(error.kind).1), error));
}

/// The exit code and the JSON code of a kind of failure.
fn code(kind: ErrorKind) -> (u8, &'static str) {
    match kind {
        ErrorKind::Usage => (2, "usage"),
        ErrorKind::Corrupt => (4, "corrupt"),
        ErrorKind::InUse => (5, "in-use"),
        ErrorKind::Refused => (6, "refused"),
        ErrorKind::NotFound => (7, "not-found"),
        ErrorKind::Unsupported => (8, "unsupported"),
        ErrorKind::NotConfirmed => (9, "not-confirmed"),
        ErrorKind::Interrupted => (130, "interrupted"),
        _ => (1, "failed"),
    }
}

/// The exit code of a kind of failure.
pub(crate) fn exit_code(kind: ErrorKind) -> u8 {
    code(kind).0
}

/// Reports a failure and gives its exit code.
pub(crate) fn failure(error: &Error, json: bool) -> ExitCode {
    let (exit, _) = code(error.kind);
    if json {
        document(&json!({ "error": object(error) }));
    } else {
        report(error);
    }
    ExitCode::from(exit)
}

/// Reports words that make no sense.
pub(crate) fn usage(message: &str, json: bool) -> ExitCode {
    if json {
        let message = message.trim().trim_start_matches("error: ");
        document(&json!({ "error": {
            "code": "usage", "message": message, "path": null, "offset": null, "hint": "see pleach --help"
        }}));
    } else {
        eprint!("{message}");
    }
    ExitCode::from(2)
}

/// A failure as JSON.
pub(crate) fn object(error: &Error) -> Value {
    json!({
        "code": code(error.kind).1,
        "message": error.full(),
        "path": error.path.as_ref().map(|p| p.display().to_string()),
        "offset": error.offset,
        "hint": error.hint,
    })
}

/// A path in one printable line.
pub(crate) fn path(path: &Path) -> String {
    printable(&escape(path.as_os_str().as_encoded_bytes()))
}

/// A name in one printable line.
pub(crate) fn printable(name: &str) -> String {
    let show = |c: char| if is_printable(c) { c.to_string() } else { c.escape_default().to_string() };
    name.chars().map(show).collect()
}

fn causes(error: &Error) -> Vec<String> {
    std::iter::successors(error.source(), |&e| e.source()).map(ToString::to_string).collect()
}

fn text(label: &str, error: &Error) -> String {
    let mut text = format!("{label}: ");
    if let Some(path) = &error.path {
        text.push_str(&format!("{}: ", self::path(path)));
    }
    text.push_str(&printable(&error.message));
    for cause in causes(error) {
        text.push_str(&format!("\n  caused by: {}", printable(&cause)));
    }
    if let Some(hint) = &error.hint {
        text.push_str(&format!("\n  hint: {}", printable(hint)));
    }
    text.push('\n');
    text
}
