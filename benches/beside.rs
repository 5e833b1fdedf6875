//! Running both tools beside each other: processes, their time by the clock and of all processors.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// How long something took, in seconds.
#[derive(Copy, Clone, Debug)]
pub struct Took {
    /// By the clock.
    pub clock: f64,
    /// Of all processors, in user mode and in the kernel. The kernel counts hundredths: never 0 here.
    pub cpu: f64,
}

impl Took {
    /// How many times longer than `other`: by the clock, and of all processors.
    pub fn over(self, other: Self) -> (f64, f64) {
        (self.clock / other.clock, self.cpu / other.cpu)
    }
}

impl std::fmt::Display for Took {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2})", self.clock, self.cpu)
    }
}

/// Runs a program to its end.
///
/// # Panics
/// If it cannot be run, or fails.
pub fn run(command: &mut Command) -> Took {
    let (start, before) = (Instant::now(), children());
    let done = command.output().expect("the program is there");
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    Took { clock: start.elapsed().as_secs_f64(), cpu: (children() - before).max(0.01) }
}

/// Runs `qemu-img` in `dir`.
///
/// # Panics
/// As [`run`].
pub fn qemu_img(dir: &Path, args: &[&str]) -> Took {
    run(Command::new("qemu-img").current_dir(dir).args(args))
}

/// Seconds that all processors spent on children that have ended.
pub fn children() -> f64 {
    processor(13)
}

/// Seconds that all processors spent on this process.
pub fn own() -> f64 {
    processor(11)
}

/// The sum of a time in user mode and the one in the kernel, by the number of the first.
fn processor(field: usize) -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("this is Linux");
    let (_, fields) = stat.rsplit_once(") ").expect("the name ends somewhere");
    let ticks: f64 =
        fields.split(' ').skip(field).take(2).map(|field| field.parse::<f64>().expect("a number")).sum();
    ticks / 100.0
}

/// A path as text.
///
/// # Panics
/// If it is no UTF-8, which no path of a bench is.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("made from text")
}
