//! What nodes are called after their files and snapshots, the same with a catalog and without one; and which node a word
//! means.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;

use pleach_format::SnapshotRecord;
use pleach_image::{escape, is_printable};
use pleach_lineage::{Storage, order};
use pleach_store::FileId;

use crate::family::shown;
use crate::survey::Survey;
use crate::tree::free_name;
use crate::{Error, ErrorKind, Result};

/// Most names that an error lists.
const MOST_LISTED: usize = 20;

/// A name out of an image or a directory: itself, or escaped where it is no UTF-8.
pub fn name_of_bytes(bytes: &[u8]) -> String {
    str::from_utf8(bytes).map_or_else(|_| escape(bytes), str::to_owned)
}

/// Names for files and snapshots that have none yet.
#[derive(Debug, Default)]
pub(crate) struct Names {
    nodes: HashMap<usize, String>,
    /// By file, in the order of its table.
    snapshots: HashMap<usize, Vec<String>>,
    taken: HashSet<String>,
}

impl Names {
    /// Names for the files of each group, by index, and for the snapshots in them. No name is given twice; a group does not
    /// depend on later ones.
    ///
    /// Snapshots get theirs in order, those of backing files first: so what is added later renames nobody.
    pub(crate) fn of(survey: &Survey, base: &Path, groups: &[Vec<usize>]) -> Self {
        let mut names = Self::default();
        let reads = survey.reads();
        for group in groups {
            names.add_files(survey, base, group);
            let by_path: BTreeMap<&Path, FileId> =
                group.iter().filter_map(|&i| survey.files.get(i)).map(|f| (&*f.path, f.stat.id)).collect();
            let ids: HashSet<FileId> = by_path.values().copied().collect();
            for id in order::backing_first(by_path.into_values(), &reads) {
                if let Some(file) = survey.find_id(id).filter(|_| ids.contains(&id)) {
                    names.add_snapshots(survey, file);
                }
            }
        }
        names
    }

    /// A file goes by its stem where no other one of its group has that, else by its file name, else by its path.
    fn add_files(&mut self, survey: &Survey, base: &Path, group: &[usize]) {
        let paths = || group.iter().filter_map(|&i| Some((i, &*survey.files.get(i)?.path)));
        let uses = |part: fn(&Path) -> Option<&OsStr>| {
            let mut uses: HashMap<&OsStr, usize> = HashMap::new();
            for (_, path) in paths() {
                *uses.entry(part(path).unwrap_or_default()).or_default() += 1;
            }
            uses
        };
        let (stems, full) = (uses(Path::file_stem), uses(Path::file_name));
        for (file, path) in paths() {
            let stem = path.file_stem().filter(|stem| stems.get(stem) == Some(&1));
            let full = path.file_name().filter(|n| full.get(n) == Some(&1) && !stems.contains_key(n));
            let parts = stem.into_iter().chain(full);
            let mut options: Vec<String> = parts.map(|n| name_of_bytes(n.as_encoded_bytes())).collect();
            options.push(shown(path, base));
            let name = self.take(options);
            self.nodes.insert(file, name);
        }
    }

    /// A snapshot goes by its own name where that is free, else by `FILE@NAME`, if it is the only one of that name in its
    /// file, else by `FILE#ID`.
    fn add_snapshots(&mut self, survey: &Survey, file: usize) {
        let table = survey.files.get(file).map(|f| &f.snapshots[..]).unwrap_or_default();
        let mut uses: HashMap<&[u8], usize> = HashMap::new();
        for snapshot in table {
            *uses.entry(&snapshot.name).or_default() += 1;
        }
        let mut names = Vec::with_capacity(table.len());
        for snapshot in table {
            let only = uses.get(&*snapshot.name) == Some(&1);
            let options = snapshot_options(self.node(file), snapshot, only);
            names.push(self.take(options));
        }
        self.snapshots.insert(file, names);
    }

    /// The first of `options` that is free, from now on taken.
    fn take(&mut self, options: Vec<String>) -> String {
        let name = first_free(options, |name| self.taken.contains(name));
        self.taken.insert(name.clone());
        name
    }

    /// The name of a file's active state.
    pub(crate) fn node(&self, file: usize) -> &str {
        self.nodes.get(&file).map(String::as_str).unwrap_or_default()
    }

    /// The name of a snapshot, by its place in the file's table.
    pub(crate) fn snapshot(&self, file: usize, at: usize) -> &str {
        self.snapshots.get(&file).and_then(|names| names.get(at)).map(String::as_str).unwrap_or_default()
    }
}

/// What a snapshot may be called, in the file that goes by `owner`; `only` if no other one there has its name.
pub(crate) fn snapshot_options(owner: &str, snapshot: &SnapshotRecord, only: bool) -> Vec<String> {
    let (plain, id) = (name_of_bytes(&snapshot.name), name_of_bytes(&snapshot.id));
    let mut options = Vec::new();
    if !plain.is_empty() {
        options.extend(only.then(|| format!("{owner}@{plain}")));
        options.insert(0, plain);
    }
    options.push(format!("{owner}#{id}"));
    options
}

/// The first of `options` that is not taken, else the last one with a number.
pub(crate) fn first_free(options: Vec<String>, taken: impl Fn(&str) -> bool) -> String {
    let last = options.last().cloned().unwrap_or_default();
    let free = options.into_iter().find(|name| !taken(name));
    free.or_else(|| free_name(&last, taken)).unwrap_or(last)
}

/// A node, and the files that its states are in.
pub(crate) struct Candidate<'a> {
    pub(crate) name: &'a str,
    pub(crate) states: Vec<(Cow<'a, Path>, &'a Storage)>,
}

impl Candidate<'_> {
    /// Whether `word` means the node although it is not its name.
    fn is_meant(&self, word: &str) -> bool {
        printed(self.name).iter().flatten().any(|form| form == word)
            || self.states.iter().any(|(path, storage)| match storage {
                Storage::External { .. } => is_file(path, word),
                Storage::Internal { snapshot, id, .. } => is_inside(path, snapshot, id, word),
            })
    }
}

/// The name of the node that `word` means: its own name; else that name as it is printed, the file name of an external
/// node, a snapshot's own name, `FILE@NAME` or `FILE#ID`.
///
/// # Errors
/// [`ErrorKind::NotFound`], with the names that there are; [`ErrorKind::Usage`] for a word that may mean several nodes.
pub(crate) fn meant<'a>(word: &str, nodes: impl Iterator<Item = Candidate<'a>>) -> Result<&'a str> {
    let (mut known, mut by_id) = (Vec::new(), None);
    let (mut exact, mut others) = (None, Vec::new());
    for node in nodes {
        if node.name == word {
            exact = Some(node.name);
        } else if node.is_meant(word) {
            others.push((node.name, node.states.iter().any(|(_, storage)| is_either(storage, word))));
        }
        for (path, storage) in &node.states {
            if let Storage::Internal { id, .. } = storage
                && id == word
            {
                by_id.get_or_insert_with(|| format!("{}#{id}", shown(path, directory(path))));
            }
        }
        if known.len() < MOST_LISTED {
            known.push(node.name);
        }
    }
    let names = |names: &[&str]| names.iter().map(|n| escape(n.as_bytes())).collect::<Vec<_>>().join(", ");
    if let Some(exact) = exact {
        // What is typed for a name that is no UTF-8 may be another one's name.
        let Some((other, _)) = others.iter().find(|(_, either)| *either) else { return Ok(exact) };
        others = vec![(exact, false), (other, true)];
    }
    match others.as_slice() {
        [(one, _)] => Ok(one),
        [] => {
            let error = Error::new(
                ErrorKind::NotFound,
                format!("there is no node named \"{}\"", escape(word.as_bytes())),
            );
            Err(error.hint(match by_id {
                Some(name) => format!("an internal snapshot is named by its id as {name}"),
                None if known.is_empty() => "the tree has no snapshots yet".to_owned(),
                None => format!("the nodes are: {}", names(&known)),
            }))
        }
        several => {
            let several: Vec<&str> = several.iter().take(MOST_LISTED).map(|(name, _)| *name).collect();
            let text = format!("\"{}\" may mean several nodes", escape(word.as_bytes()));
            Err(Error::new(ErrorKind::Usage, text)
                .hint(format!("say which: {}; or FILE#ID for an internal snapshot", names(&several))))
        }
    }
}

/// The directory of a path that has one.
fn directory(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// A name as it is printed, with its backslashes doubled and without; nothing for one that is printed as it is.
fn printed(name: &str) -> [Option<String>; 2] {
    if name.chars().all(|c| c != '\\' && is_printable(c)) {
        return [None, None];
    }
    let plain = |name: &str| {
        let show = |c: char| if is_printable(c) { c.to_string() } else { c.escape_default().to_string() };
        name.chars().map(show).collect::<String>()
    };
    [Some(plain(name)), Some(plain(&escape(name.as_bytes())))]
}

/// Whether `word` is a file's path, name or stem.
fn is_file(path: &Path, word: &str) -> bool {
    let is = |part: &OsStr| {
        let bytes = part.as_encoded_bytes();
        bytes == word.as_bytes() || word.contains('\\') && escape(bytes) == word
    };
    is(path.as_os_str()) || [path.file_name(), path.file_stem()].into_iter().flatten().any(is)
}

/// Whether `word` is the name of the snapshot in the file at `path` whose escaped name and id are given, with the file's
/// before it or not, or is the file's name with the id.
pub(crate) fn is_inside(path: &Path, snapshot: &str, id: &str, word: &str) -> bool {
    let is = |name: &str, word: &str| name == word || name == escape(word.as_bytes());
    if is(snapshot, word) {
        return true;
    }
    let signs = word.char_indices().filter(|(_, c)| matches!(c, '@' | '#'));
    signs.into_iter().any(|(at, sign)| {
        let (file, rest) = word.split_at(at);
        let rest = rest.get(1..).unwrap_or_default();
        is(if sign == '#' { id } else { snapshot }, rest) && is_file(path, file)
    })
}

/// Whether `word` is the name of a snapshot, or how it is escaped, and may be either.
fn is_either(storage: &Storage, word: &str) -> bool {
    let is = |name: &str| name == word || name == escape(word.as_bytes());
    word.contains("\\x") && matches!(storage, Storage::Internal { snapshot, .. } if is(snapshot))
}
