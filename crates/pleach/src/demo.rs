//! `pleach demo`: the tree of docs/lineage.md on real images, deleted from in every way, with proof.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use pleach_engine::family::Family;
use pleach_engine::survey::{Survey, Trust};
use pleach_engine::{
    DeleteRequest, Error, ErrorKind, Keep, OpenFiles, Result, Watch, execute, import, prepare,
};
use pleach_format::BackingFile;
use pleach_image::{Chain, CreateOptions, create};
use pleach_lineage::DeleteMode;
use pleach_store::{Access, Disk, RealDisk, Role};
use sha2::{Digest, Sha256};

use crate::args::{DemoArgs, TreeArgs};
use crate::delete::{Verb, View};
use crate::output;

const MIB: u64 = 1 << 20;
const DISK: u64 = 96 * MIB;
/// Node, and what it stands on.
const NODES: [(&str, Option<&str>); 5] =
    [("A", None), ("B", Some("A")), ("C", Some("A")), ("D", Some("B")), ("E", Some("C"))];

pub(crate) fn run(args: &DemoArgs) -> Result<ExitCode> {
    let (dir, temporary) = match &args.dir {
        Some(dir) => (dir.clone(), None),
        None => {
            let made = tempfile::tempdir()
                .map_err(|e| Error::io("make a directory in", &std::env::temp_dir(), e))?;
            (made.path().to_owned(), Some(made))
        }
    };
    fs::create_dir_all(&dir).map_err(|e| Error::io("make the directory", &dir, e))?;
    if fs::read_dir(&dir).map_err(|e| Error::io("read the directory", &dir, e))?.next().is_some() {
        return Err(Error::new(ErrorKind::Failed, "the directory is not empty")
            .at(&dir)
            .hint("name a new one"));
    }
    let tree = dir.join("tree");
    build(&dir, &tree)?;
    let before = digests(&tree)?;
    let kept = args.dir.is_some();
    output::print("A tree of five images, a file system with more files in each of them:\n\n");
    show(&tree)?;

    let mut good = true;
    let acts: [(&str, &str, Keep); 3] = [
        ("B goes, its child D keeps its name", "B", Keep::Child),
        ("B goes, its child D takes over B's name", "B", Keep::Parent(None)),
        ("A goes, the root with two children: B and C become roots", "A", Keep::Child),
    ];
    for (n, (title, node, keep)) in acts.into_iter().enumerate() {
        let copy = dir.join(format!("delete-{}", n + 1));
        copy_directory(&tree, &copy)?;
        output::print(&format!("\n{title}:\n\n"));
        good &= delete_and_compare(&copy, node, keep, &before)?;
    }
    output::print(if good {
        "\nEvery node that stayed reads as before.\n"
    } else {
        "\nNOT every node that stayed reads as before.\n"
    });
    if kept {
        output::print(&format!("The images are in {}.\n", dir.display()));
    }
    drop(temporary);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the five images: each holds what its node's file system has more than its parent's.
fn build(dir: &Path, tree: &Path) -> Result<()> {
    let io = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |e| Error::io(what, &path, e)
    };
    fs::create_dir(tree).map_err(io("make the directory", tree))?;
    let contents = dir.join("contents");
    fs::create_dir(&contents).map_err(io("make the directory", &contents))?;
    let real = FileSystem::find();
    output::print(match real {
        FileSystem::Ext4 { .. } => "Making an ext4 file system, and writing files to it at each node.\n",
        FileSystem::Blocks => {
            "mkfs.ext4 and debugfs are not there (Debian: e2fsprogs); the content is this program's own file instead.\n"
        }
    });
    for (node, parent) in NODES {
        let raw = contents.join(format!("{node}.raw"));
        match parent {
            None => real.make(&raw)?,
            Some(parent) => {
                let from = contents.join(format!("{parent}.raw"));
                fs::copy(&from, &raw).map_err(io("copy", &from))?;
            }
        }
        real.add(&contents, &raw, node)?;
        let path = tree.join(format!("{node}.qcow2"));
        let backing = parent.map(|p| BackingFile {
            name: format!("{p}.qcow2").into_bytes(),
            format: Some(b"qcow2".to_vec()),
        });
        create(&RealDisk, &path, &CreateOptions { size: DISK, backing, ..CreateOptions::default() })
            .map_err(|e| Error::image(&path, e))?;
        let chain = match parent {
            Some(parent) => chain_of(tree, parent)?.layers().to_vec(),
            None => Vec::new(),
        };
        let content = RealDisk.open(&raw, Access::Read).map_err(io("open", &raw))?;
        import::import(&RealDisk, &path, chain, &*content)?;
    }
    fs::remove_dir_all(&contents).map_err(io("remove the directory", &contents))
}

/// What the images hold.
enum FileSystem {
    /// A file system made by mkfs.ext4; files are added by debugfs. Neither needs root.
    Ext4 { mkfs: PathBuf, debugfs: PathBuf },
    /// Pieces of this program's own file.
    Blocks,
}

impl FileSystem {
    fn find() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let find = |name: &str| {
            let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
            dirs.map(|d: PathBuf| d.join(name)).find(|p| p.is_file())
        };
        match (find("mkfs.ext4"), find("debugfs")) {
            (Some(mkfs), Some(debugfs)) => Self::Ext4 { mkfs, debugfs },
            _ => Self::Blocks,
        }
    }

    fn make(&self, raw: &Path) -> Result<()> {
        let file = fs::File::create(raw).map_err(|e| Error::io("create", raw, e))?;
        file.set_len(DISK).map_err(|e| Error::io("set the length of", raw, e))?;
        match self {
            Self::Ext4 { mkfs, .. } => {
                run_tool(Command::new(mkfs).args(["-q", "-F", "-E", "lazy_itable_init=0"]).arg(raw))
            }
            Self::Blocks => Ok(()),
        }
    }

    /// Adds what a node has more than its parent.
    fn add(&self, dir: &Path, raw: &Path, node: &str) -> Result<()> {
        let own = std::env::current_exe()
            .and_then(fs::read)
            .map_err(|e| Error::io("read", Path::new("this program"), e))?;
        let index = node.bytes().next().map_or(0, |b| usize::from(b - b'A'));
        let part = own.len() / 8;
        let bytes = own.get(index * part..(index + 3) * part).unwrap_or(&own);
        match self {
            Self::Ext4 { debugfs, .. } => {
                let file = dir.join(format!("file-of-{node}"));
                fs::write(&file, bytes).map_err(|e| Error::io("write", &file, e))?;
                let request = format!("write {} file-of-{node}", file.display());
                run_tool(Command::new(debugfs).args(["-w", "-R", &request]).arg(raw))
            }
            Self::Blocks => {
                use std::os::unix::fs::FileExt;
                let file =
                    fs::File::options().write(true).open(raw).map_err(|e| Error::io("open", raw, e))?;
                file.write_all_at(bytes, index as u64 * 7 * MIB).map_err(|e| Error::io("write", raw, e))
            }
        }
    }
}

fn run_tool(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_owned();
    let failed =
        |why: String| Error::new(ErrorKind::Failed, format!("{} failed: {why}", Path::new(&name).display()));
    let output = command.stdin(Stdio::null()).output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn survey_of(dir: &Path) -> Result<(Survey, Family)> {
    let survey = Survey::of_directories(&RealDisk, &[dir.to_owned()], &Trust::default())?;
    let family = Family::of(&survey, dir)?;
    Ok((survey, family))
}

/// The chain of a node, opened for reading.
fn chain_of(dir: &Path, node: &str) -> Result<Chain> {
    let (survey, family) = survey_of(dir)?;
    let id = family.resolve(&survey, node)?;
    let index = match family.state(id) {
        Some(pleach_engine::family::State::File(index)) => index,
        _ => return Err(Error::new(ErrorKind::NotFound, format!("\"{node}\" is no file"))),
    };
    let files = survey.chain(index)?;
    let roles = files.iter().map(|&i| (i, Role::Read)).collect();
    OpenFiles::open(&RealDisk, &survey, &roles)?.chain(&files)
}

/// SHA-256 of what each node reads, by node.
fn digests(dir: &Path) -> Result<BTreeMap<String, String>> {
    let (_, family) = survey_of(dir)?;
    let names: Vec<String> =
        family.lineage.ids().filter_map(|id| family.lineage.get(id)).map(|n| n.name.clone()).collect();
    names.into_iter().map(|name| Ok((name.clone(), digest(dir, &name)?))).collect()
}

fn digest(dir: &Path, node: &str) -> Result<String> {
    let chain = chain_of(dir, node)?;
    let mut hash = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < chain.size() {
        let len = usize::try_from(chain.size() - at).unwrap_or(usize::MAX).min(buf.len());
        let part = buf.get_mut(..len).unwrap_or(&mut []);
        chain.read_at(at, part).map_err(|e| Error::image(dir, e))?;
        hash.update(&*part);
        at += len as u64;
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).map_err(|e| Error::io("make the directory", to, e))?;
    for path in RealDisk.list(from).map_err(|e| Error::io("read the directory", from, e))? {
        let target = to.join(path.file_name().unwrap_or_default());
        fs::copy(&path, &target).map_err(|e| Error::io("copy", &path, e))?;
    }
    Ok(())
}

fn show(dir: &Path) -> Result<()> {
    crate::tree::run(&TreeArgs::with_sizes(dir)).map(drop)
}

/// Deletes a node, shows what that did, and compares every survivor with what it was before.
fn delete_and_compare(dir: &Path, node: &str, keep: Keep, before: &BTreeMap<String, String>) -> Result<bool> {
    let (survey, family) = survey_of(dir)?;
    // Who is who afterwards: with the parent's name kept, its only child lives on under that.
    let heir = match keep {
        Keep::Parent(_) => family
            .lineage
            .find(node)
            .and_then(|id| family.lineage.children(id).first())
            .and_then(|&id| family.lineage.get(id))
            .map(|n| n.name.clone()),
        _ => None,
    };
    let request = DeleteRequest { name: node.to_owned(), mode: DeleteMode::Single, keep, whole_tree: false };
    let prepared = prepare(&RealDisk, &survey, &family, &request, true)?;
    let view = View { survey: &survey, base: dir, bytes: false, verb: Verb::Delete };
    output::print(&view.text(&prepared.plan));
    execute(&RealDisk, &survey, prepared, &Arc::new(Watch::new()))?;
    output::print("\n");
    show(dir)?;
    output::print("\nSHA-256 of what each node reads:\n");
    let mut good = true;
    for (name, old) in before.iter().filter(|(name, _)| *name != node) {
        let now = if heir.as_ref() == Some(name) { node } else { name.as_str() };
        let new = digest(dir, now)?;
        let same = new == *old;
        good &= same;
        let named = if now == name { String::new() } else { format!(", now in {now}.qcow2") };
        let verdict = if same { "the same" } else { "DIFFERENT" };
        output::print(&format!("{name}  before {old}\n   after  {new}  {verdict}{named}\n"));
    }
    good &= agrees_with_qemu(dir)?;
    Ok(good)
}

/// Lets qemu-img check the images, where it is installed.
fn agrees_with_qemu(dir: &Path) -> Result<bool> {
    let mut clean = 0;
    for path in RealDisk.list(dir).map_err(|e| Error::io("read the directory", dir, e))? {
        let check = Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(&path)
            .stdin(Stdio::null())
            .output();
        match check {
            Err(_) => return Ok(true),
            Ok(output) if output.status.success() => clean += 1,
            Ok(output) => {
                output::print(&format!(
                    "qemu-img check {}: {}\n",
                    path.display(),
                    String::from_utf8_lossy(&output.stdout).trim()
                ));
                return Ok(false);
            }
        }
    }
    output::print(&format!("qemu-img check: {clean} images, no errors, no leaks\n"));
    Ok(true)
}
