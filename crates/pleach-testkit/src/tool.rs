//! Runs a command line tool to its end, or to a deadline: a hang is a failure with a name.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Nothing that a test starts may take longer than this.
const DEADLINE: Duration = Duration::from_secs(120);

/// A program under test.
#[derive(Clone, Debug)]
pub struct Tool(PathBuf);

/// What a finished run left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub command: String,
    /// The exit code; `None` if a signal ended the process.
    pub code: Option<i32>,
    /// Everything on stdout.
    pub stdout: String,
    /// Everything on stderr.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
    /// The most memory that was resident at any moment but the last half millisecond, in bytes.
    pub peak: u64,
    /// Processor time until then, to a hundredth of a second: what a busy machine does not make longer.
    pub cpu: Duration,
}

impl Tool {
    /// The program at `path`, usually `env!("CARGO_BIN_EXE_pleach")`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The optimised build of the program at `tested`, if it is as new; else that one. Whether it is optimised.
    #[must_use]
    pub fn fastest(tested: &str) -> (Self, bool) {
        let tested = PathBuf::from(tested);
        let name = tested.file_name().unwrap_or_default();
        let release = tested.parent().unwrap_or(Path::new(".")).with_file_name("release").join(name);
        let built = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        let optimised = release == tested || built(&release) >= built(&tested);
        (Self(if optimised { release } else { tested }), optimised)
    }

    /// Where the program is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Starts the program without a terminal: stdin is empty, stdout and stderr are pipes.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn spawn<S: AsRef<OsStr>>(&self, args: &[S]) -> Running {
        let mut command = Command::new(&self.0);
        command.args(args).env("NO_COLOR", "1").env_remove("RUST_BACKTRACE");
        Running::start(command)
    }

    /// Runs the program to its end.
    ///
    /// # Panics
    /// If it cannot be started or is still running after two minutes.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Outcome {
        self.spawn(args).finish(DEADLINE)
    }

    /// Runs the program, which must succeed.
    ///
    /// # Panics
    /// As [`Tool::run`], and on any exit code but 0.
    pub fn succeed<S: AsRef<OsStr>>(&self, args: &[S]) -> Outcome {
        let outcome = self.run(args);
        assert_eq!(outcome.code, Some(0), "{outcome}");
        outcome
    }

    /// Runs the program, which must succeed and print one JSON document of schema 1.
    ///
    /// # Panics
    /// As [`Tool::succeed`], and if stdout is not such a document.
    pub fn json<S: AsRef<OsStr>>(&self, args: &[S]) -> Value {
        let outcome = self.succeed(args);
        let document = outcome.json();
        assert_eq!(document.get("schema"), Some(&Value::from(1)), "schema: {outcome}");
        document
    }
}

impl Outcome {
    /// Stdout as one JSON document.
    ///
    /// # Panics
    /// If it is not.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("stdout is not JSON: {error}: {self}"))
    }

    /// Stdout and stderr, for looking for words.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "\n$ {}\nexit code: {:?}, after {:?}", self.command, self.code, self.elapsed)?;
        write!(out, "\nstdout: {}\nstderr: {}", self.stdout.trim_end(), self.stderr.trim_end())
    }
}

/// A started program. Killed if dropped before its end.
pub struct Running {
    child: Child,
    command: String,
    started: Instant,
    peak: u64,
    cpu: Duration,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Running {
    /// Starts `command` with an empty stdin and with pipes for stdout and stderr.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let shown = words(&command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Self { child, command: shown, started, peak: 0, cpu: Duration::ZERO, stdout, stderr }
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process has ended.
    ///
    /// # Panics
    /// If the operating system cannot say.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().expect("the child was started here").is_some()
    }

    /// Ends the process with SIGKILL, `delay` after its start, unless it has ended by then.
    #[must_use]
    pub fn kill_after(mut self, delay: Duration) -> Outcome {
        while self.started.elapsed() < delay && !self.ended() {
            let left = delay.saturating_sub(self.started.elapsed());
            std::thread::sleep(left.min(Duration::from_millis(1)));
        }
        // Fails only if the process has ended, which is as good.
        let _ = self.child.kill();
        self.finish(DEADLINE)
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If the process is still running after `deadline`; it is killed first.
    #[must_use]
    pub fn finish(self, deadline: Duration) -> Outcome {
        let (outcome, in_time) = self.finish_or_kill(deadline);
        assert!(in_time, "still running after {deadline:?}: {outcome}");
        outcome
    }

    /// Waits for the end, and kills what is still running after `deadline`; whether it ended in time.
    ///
    /// # Panics
    /// If the operating system cannot say.
    #[must_use]
    pub fn finish_or_kill(mut self, deadline: Duration) -> (Outcome, bool) {
        let status = self.wait(deadline);
        let elapsed = self.started.elapsed();
        let outcome = Outcome {
            command: self.command.clone(),
            code: status.and_then(|status| status.code()),
            stdout: text(self.stdout.take()),
            stderr: text(self.stderr.take()),
            elapsed,
            peak: self.peak,
            cpu: self.cpu,
        };
        (outcome, status.is_some())
    }

    /// The status, or `None` after killing what did not end in time.
    fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait().expect("the child was started here") {
                return Some(status);
            }
            if self.started.elapsed() > deadline {
                let _ = self.child.kill();
                self.child.wait().expect("a killed child ends");
                return None;
            }
            self.peak = peak(self.child.id()).unwrap_or(self.peak);
            self.cpu = cpu(self.child.id()).unwrap_or(self.cpu);
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The most memory that a running process has had, in bytes; `None` once it has ended.
fn peak(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes << 10)
}

/// The processor time that a process has had; `None` once it is gone.
fn cpu(process: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Fields are counted from behind the name, which may have spaces: the state is the first.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks: Vec<u64> = rest.split_whitespace().skip(11).take(2).filter_map(|t| t.parse().ok()).collect();
    Some(Duration::from_millis(ticks.iter().sum::<u64>() * 10))
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("reading a pipe");
        bytes
    })
}

fn text(pipe: Option<JoinHandle<Vec<u8>>>) -> String {
    let bytes = pipe.map(|pipe| pipe.join().expect("the reader does not panic")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The command line as a person would type it.
fn words(command: &Command) -> String {
    let all = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = all.map(|word| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_alphanumeric() || "/._-=:,".contains(c);
        if word.chars().all(plain) && !word.is_empty() { word.into_owned() } else { format!("'{word}'") }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Tool;

    #[test]
    fn code_stdout_and_stderr_are_told_apart() {
        let outcome = Tool::new("/bin/sh").run(&["-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!(
            (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()),
            (Some(7), "out\n", "err\n")
        );
    }

    #[test]
    fn a_killed_process_has_no_code() {
        let outcome = Tool::new("/bin/sleep").spawn(&["30"]).kill_after(Duration::from_millis(5));
        assert_eq!(outcome.code, None);
        assert!(outcome.elapsed < Duration::from_secs(20), "{outcome}");
    }

    #[test]
    #[should_panic(expected = "still running")]
    fn a_hang_is_a_failure() {
        let _ = Tool::new("/bin/sleep").spawn(&["30"]).finish(Duration::from_millis(5));
    }
}
