//! Asking before anything is lost.

use std::io::{BufRead, IsTerminal, Write};

use pleach_engine::{Error, ErrorKind, Result};

/// Shows `plan` and asks whether to go on. Without a terminal nobody can say yes.
///
/// # Errors
/// [`ErrorKind::NotConfirmed`] if nobody did.
pub(crate) fn confirm(plan: &str) -> Result<()> {
    let refused = |why: &str| {
        Err(Error::new(ErrorKind::NotConfirmed, why)
            .hint("say --yes to do it without asking, or -n to see the plan"))
    };
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return refused("nothing was done: this needs to be confirmed");
    }
    let mut stderr = std::io::stderr();
    // If the question cannot be shown, it cannot be answered either.
    let _ = write!(stderr, "{plan}Go on? [y/N] ").and_then(|()| stderr.flush());
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    match (read, answer.trim()) {
        (Ok(_), "y" | "Y" | "yes") => Ok(()),
        _ => refused("nothing was done"),
    }
}
