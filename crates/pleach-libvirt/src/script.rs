//! The commands that hand a tree of records to libvirt.

use crate::forest::{ForestProblem, parents_first};
use crate::snapshot::Snapshot;

/// A shell script that gives records to libvirt: parents before their children, and the current one last marked
/// as current. `files` are the names of the records' files, in the order of `snapshots`, relative to the script.
///
/// The script takes the domain's name as its argument, `domain` if it has none, and stops at the first record
/// that libvirt refuses.
///
/// # Errors
/// As [`parents_first`].
pub fn redefine_script(
    domain: &str,
    snapshots: &[Snapshot],
    files: &[String],
) -> Result<String, Vec<ForestProblem>> {
    let mut script = String::from(
        "#!/bin/sh\n# Gives the snapshots in this directory to libvirt. The images must be in their places.\n\
         set -eu\ncd \"$(dirname \"$0\")\"\n",
    );
    script.push_str(&format!("if [ $# -gt 0 ]; then domain=$1; else domain={}; fi\n", quoted(domain)));
    for place in parents_first(snapshots)? {
        let (Some(snapshot), Some(file)) = (snapshots.get(place), files.get(place)) else { continue };
        let current = if snapshot.facts().current == Some(true) { " --current" } else { "" };
        // A file name may start with a dash.
        let file = quoted(&format!("./{file}"));
        script.push_str(&format!(
            "virsh snapshot-create --domain \"$domain\" --xmlfile {file} --redefine{current}\n"
        ));
    }
    Ok(script)
}

/// A word for the shell, whatever is in it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
