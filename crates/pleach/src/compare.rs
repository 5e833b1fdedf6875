//! `pleach compare`

use std::process::ExitCode;
use std::sync::Arc;

use pleach_engine::{Comparison, Difference, ErrorKind, Result, Watch, compare};
use serde_json::json;

use crate::args::CompareArgs;
use crate::output;
use crate::progress::Progress;
use crate::source;

/// Exit code if the images read differently; failures never have it.
const DIFFERENT: u8 = 1;
/// Exit code of failures that have no other.
const FAILED: u8 = 2;

pub(crate) fn run(args: &CompareArgs) -> Result<ExitCode> {
    match images(args) {
        Ok(comparison) => {
            if args.pair.json {
                output::document(&document(&comparison));
            } else {
                output::print(&text(&comparison));
            }
            let code = if comparison.difference.is_some() { DIFFERENT } else { 0 };
            Ok(ExitCode::from(code))
        }
        // 1 says that the images differ, and nothing else.
        Err(error) if error.kind == ErrorKind::Failed => {
            output::failure(&error, args.pair.json);
            Ok(ExitCode::from(FAILED))
        }
        Err(error) => Err(error),
    }
}

fn images(args: &CompareArgs) -> Result<Comparison> {
    let [first, second] = source::pair(&args.pair)?;
    let watch = Arc::new(Watch::new());
    let progress = Progress::start(args.pair.progress.show, &watch);
    let comparison = compare([&first, &second], args.strict, &watch);
    drop(progress);
    comparison
}

fn document(comparison: &Comparison) -> serde_json::Value {
    let (kind, offset) = match comparison.difference {
        None => (None, None),
        Some(Difference::Size) => (Some("size"), None),
        Some(Difference::Status(at)) => (Some("status"), Some(at)),
        Some(Difference::Content(at)) => (Some("content"), Some(at)),
    };
    json!({
        "schema": 1,
        "identical": kind.is_none(),
        "difference": kind,
        "offset": offset,
        "virtual_sizes": comparison.sizes,
        "sizes_differ": comparison.sizes[0] != comparison.sizes[1],
    })
}

/// In qemu-img's words.
fn text(comparison: &Comparison) -> String {
    let verdict = match comparison.difference {
        None => "Images are identical.\n".to_owned(),
        Some(Difference::Size) => return "Strict mode: Image size mismatch!\n".to_owned(),
        Some(Difference::Status(at)) => format!("Strict mode: Offset {at} block status mismatch!\n"),
        Some(Difference::Content(at)) => format!("Content mismatch at offset {at}!\n"),
    };
    let [a, b] = comparison.sizes;
    // Said where the shorter one ends, so not if a difference was found before that.
    let ended = !matches!(comparison.difference, Some(Difference::Content(at)) if at < a.min(b));
    let warning = if a != b && ended { "Warning: Image size mismatch!\n" } else { "" };
    format!("{warning}{verdict}")
}
