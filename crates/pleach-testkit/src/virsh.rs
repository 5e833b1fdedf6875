//! libvirt's in-memory driver, which keeps the snapshots of machines that have no disks; spoken to by stock `virsh`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Parents by name, and the current one.
pub type Tree = (BTreeMap<String, Option<String>>, Option<String>);

/// Whether there is a `virsh`; if not, says that a test is skipped.
#[must_use]
pub fn available() -> bool {
    let found = Command::new("virsh").arg("--version").output().is_ok_and(|done| done.status.success());
    if !found {
        println!("skipped: there is no virsh (Debian: libvirt-clients)");
    }
    found
}

/// Commands for one machine of the driver. Its state is that of the one process, so they run in one.
#[derive(Debug)]
pub struct Session<'a> {
    dir: &'a Path,
    commands: String,
}

impl<'a> Session<'a> {
    /// A machine with this definition (`<domain type='test'>`), which is not running; a file in `dir` says so to libvirt.
    ///
    /// # Panics
    /// If that cannot be written.
    #[must_use]
    pub fn new(dir: &'a Path, domain: &str) -> Self {
        let off = domain.replace(
            "</domain>",
            "<test:runstate xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>5</test:runstate></domain>",
        );
        fs::write(dir.join("node.xml"), format!("<node>{off}</node>")).expect("the node is written");
        Self { dir, commands: String::new() }
    }

    /// Adds a command.
    pub fn add(&mut self, command: &str) {
        self.commands.push_str(command);
        self.commands.push_str("; ");
    }

    /// Asks for the tree of the machine `vm`, as it is behind the last command.
    pub fn ask(&mut self) {
        self.add("snapshot-list vm --parent; echo '|'; snapshot-current vm --name; echo '#'");
    }

    /// Runs the commands in the directory `from`; what each left on stdout up to a `#`, and stderr.
    ///
    /// # Panics
    /// If virsh cannot be started.
    #[must_use]
    pub fn run(self, from: &Path) -> (Vec<String>, String) {
        let uri = format!("test://{}", self.dir.join("node.xml").display());
        let mut virsh = Command::new("virsh");
        virsh.args(["-q", "-c", &uri, &self.commands]).env("LC_ALL", "C.UTF-8").current_dir(from);
        let done = virsh.output().expect("virsh is there");
        let text = |bytes| String::from_utf8(bytes).expect("virsh prints UTF-8");
        let answers =
            text(done.stdout).trim_end().trim_end_matches('#').split('#').map(str::to_owned).collect();
        (answers, text(done.stderr))
    }
}

/// The answer to one [`Session::ask`].
///
/// # Panics
/// If it is none.
#[must_use]
pub fn tree(answer: &str) -> Tree {
    let (list, current) = answer.split_once('|').unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let parents = list.lines().filter_map(|line| {
        // Name, time, state, parent; three blanks apart.
        let mut fields = line.split("   ").map(str::trim).filter(|one| !one.is_empty());
        let name = fields.next()?;
        Some((name.to_owned(), fields.nth(2).map(str::to_owned)))
    });
    (parents.collect(), Some(current.trim().to_owned()).filter(|name| !name.is_empty()))
}
