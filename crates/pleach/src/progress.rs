//! Progress of a long operation, on stderr; and Ctrl-C.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pleach_engine::Watch;

/// How progress is shown.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// A bar, if stderr is a terminal.
    Bar,
    /// JSON lines.
    Json,
    /// Not at all.
    Nothing,
}

impl Show {
    pub(crate) fn of(text: &str) -> Self {
        match text {
            "json" => Self::Json,
            "none" => Self::Nothing,
            _ => Self::Bar,
        }
    }
}

/// Shows the progress of a watch until it is dropped.
pub(crate) struct Progress {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts showing `watch`, and lets Ctrl-C stop it.
    pub(crate) fn start(show: Show, watch: &Arc<Watch>) -> Self {
        let stop = Arc::clone(watch);
        // A second handler in one process is the only failure there is; the first one does as well.
        let _ = ctrlc::set_handler(move || stop.request_stop());
        let done = Arc::new(AtomicBool::new(false));
        let wanted = show == Show::Json || (show == Show::Bar && std::io::stderr().is_terminal());
        let thread = wanted.then(|| {
            let (watch, done) = (Arc::clone(watch), Arc::clone(&done));
            std::thread::spawn(move || follow(show, &watch, &done))
        });
        Self { done, thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only prints; if it panicked there is nothing to add.
            let _ = thread.join();
        }
    }
}

fn follow(show: Show, watch: &Watch, done: &AtomicBool) {
    let started = Instant::now();
    let line = || {
        let (bytes, total) = watch.progress();
        let eta = eta(started.elapsed(), bytes, total);
        eprintln!(
            "{}",
            serde_json::json!({ "progress": { "bytes": bytes, "total": total, "eta_seconds": eta } })
        );
    };
    let mut bar: Option<ProgressBar> = None;
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        let (now, total) = watch.progress();
        if show == Show::Json {
            line();
            for _ in 0..4 {
                if !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        } else if started.elapsed() > Duration::from_millis(500) && total > 0 {
            let bar = bar.get_or_insert_with(|| {
                let style =
                    ProgressStyle::with_template("{bar:40} {binary_bytes}/{binary_total_bytes} {eta}");
                ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            });
            bar.set_length(total);
            bar.set_position(now);
        }
    }
    if show == Show::Json {
        // Where it has come to in the end, whether or not it was stopped.
        line();
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

/// Seconds that are left if it goes on as it went; `None` before anything was done.
fn eta(elapsed: Duration, done: u64, total: u64) -> Option<u64> {
    let left = u128::from(total.saturating_sub(done));
    let millis = elapsed.as_millis().saturating_mul(left).checked_div(u128::from(done))?;
    u64::try_from(millis.div_ceil(1000)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_takes_as_long_as_what_was_done() {
        let seconds = Duration::from_secs;
        assert_eq!(eta(seconds(3), 0, 100), None);
        assert_eq!(eta(seconds(3), 25, 100), Some(9));
        assert_eq!(eta(seconds(3), 100, 100), Some(0));
        assert_eq!(eta(seconds(3), 101, 100), Some(0));
        assert_eq!(eta(Duration::from_millis(1), 1, 2), Some(1));
    }
}
