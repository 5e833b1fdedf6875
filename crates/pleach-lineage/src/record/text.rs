//! The record as text, and back.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use smallvec::SmallVec;

use super::words::{put, words};
use super::{DiskRecord, FIRST, NodeRecord, Record, RecordError, VERSION};
use crate::{Kind, Storage};

/// The names of the files that a catalog calls raw, even if it is damaged elsewhere: to take one for raw is safe.
pub fn raw_files(bytes: &[u8]) -> Vec<String> {
    let lines = bytes.split(|&b| b == b'\n').filter(|line| line.starts_with(b"raw "));
    let all = lines.filter_map(|line| words(str::from_utf8(line).ok()?).ok());
    all.filter(|words| words.len() == 2).filter_map(|mut words| Some(words.pop()?.into_owned())).collect()
}

impl Record {
    /// The text. Equal records give equal bytes.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        let mut line = |start: &str, words: &[&str]| {
            out.push_str(start);
            for word in words {
                out.push(' ');
                put(&mut out, word);
            }
            out.push('\n');
        };
        line(FIRST, &[VERSION]);
        line("tree", &[&self.tree]);
        if let Some(current) = &self.current {
            line("current", &[current]);
        }
        for disk in &self.disks {
            line("disk", &[&disk.name]);
            if let Some(active) = &disk.active {
                line("  active", &[active]);
            }
            disk.other.iter().for_each(|other| line(&("  ".to_owned() + other), &[]));
        }
        if !self.raw.is_empty() {
            let named = self.files();
            self.raw.iter().filter(|f| named.contains(f.as_str())).for_each(|file| line("raw", &[file]));
        }
        for node in &self.nodes {
            line(if node.kind == Kind::Head { "head" } else { "snapshot" }, &[&node.name]);
            match (&node.parent, node.parent_guessed) {
                (Some(parent), true) => line("  parent", &[parent, "guessed"]),
                (Some(parent), false) => line("  parent", &[parent]),
                (None, _) => {}
            }
            if let Some(created) = node.created {
                line("  created", &[&alloc::format!("{created}")]);
            }
            if !node.description.is_empty() {
                line("  description", &[&node.description]);
            }
            if let Some(state) = &node.state {
                line("  state", &[state]);
            }
            node.storage.iter().for_each(|(disk, storage)| stored(&mut line, disk, storage));
            node.other.iter().for_each(|other| line(&("  ".to_owned() + other), &[]));
        }
        if !self.forgotten.is_empty() {
            line("forgotten", &[]);
            self.forgotten.iter().for_each(|(disk, storage)| stored(&mut line, disk, storage));
        }
        self.other.iter().for_each(|other| line(other, &[]));
        let crc = crc32fast::hash(out.as_bytes());
        let _ = writeln!(out, "crc32 {crc:08x}");
        out
    }

    /// Reads the text back.
    ///
    /// # Errors
    /// What is wrong with it, the first thing first; never panics, whatever `bytes` holds.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let text = str::from_utf8(bytes).map_err(|e| RecordError::NotText { at: e.valid_up_to() })?;
        let first = text.lines().next().unwrap_or_default();
        match first.split_once(' ') {
            Some((FIRST, VERSION)) => {}
            Some((FIRST, found)) => return Err(RecordError::Version { found: found.to_owned() }),
            _ => return Err(RecordError::NotACatalog),
        }
        let body = text.strip_suffix('\n').unwrap_or(text);
        let start = body.rfind('\n').map_or(0, |at| at + 1);
        let (body, last) = (text.get(..start).unwrap_or_default(), body.get(start..).unwrap_or_default());
        let computed = crc32fast::hash(body.as_bytes());
        if !text.ends_with('\n')
            || last.strip_prefix("crc32 ") != Some(alloc::format!("{computed:08x}").as_str())
        {
            return Err(RecordError::Checksum { stored: last.to_owned(), computed });
        }
        let mut record = Self::default();
        let mut at = Item::Other;
        for (number, line) in body.split_terminator('\n').enumerate().skip(1) {
            let wrong = |what| RecordError::Line { line: number + 1, what };
            match line.strip_prefix("  ") {
                Some(inner) => record.inner(inner, at).map_err(wrong)?,
                None => at = record.item(line).map_err(wrong)?,
            }
        }
        record.check()?;
        Ok(record)
    }

    /// A line in the first column.
    fn item(&mut self, line: &str) -> Result<Item, &'static str> {
        let words = words(line)?;
        let one = || match words.as_slice() {
            [_, word] => Ok(word.clone().into_owned()),
            _ => Err("must have one word behind the first"),
        };
        Ok(match words.first().map_or("", |key| &**key) {
            "tree" => {
                self.tree = one()?;
                Item::Tree
            }
            "current" => {
                self.current = Some(one()?);
                Item::Tree
            }
            "disk" => {
                self.disks.push(DiskRecord::new(one()?, None));
                Item::Disk
            }
            "snapshot" => {
                self.nodes.push(NodeRecord::new(one()?, Kind::Snapshot));
                Item::Node
            }
            "head" => {
                self.nodes.push(NodeRecord::new(one()?, Kind::Head));
                Item::Node
            }
            "raw" if words.len() == 2 => {
                self.raw.insert(one()?);
                Item::Tree
            }
            "forgotten" if words.len() == 1 => Item::Forgotten,
            _ => {
                self.other.push(line.to_owned());
                Item::Other
            }
        })
    }

    /// An indented line, without its indentation.
    fn inner(&mut self, line: &str, at: Item) -> Result<(), &'static str> {
        match at {
            Item::Tree => return Err("nothing can belong to the line before"),
            Item::Other => self.other.push("  ".to_owned() + line),
            Item::Forgotten => {
                let words = words(line)?;
                let words: SmallVec<[&str; 6]> = words.iter().map(|word| &**word).collect();
                self.forgotten.push(storage(&words).ok_or("only storage can be forgotten")?);
            }
            Item::Disk => {
                let Some(disk) = self.disks.last_mut() else { return Ok(()) };
                match words(line)?.as_slice() {
                    [key, active] if key == "active" => disk.active = Some(active.clone().into_owned()),
                    _ => disk.other.push(line.to_owned()),
                }
            }
            Item::Node => {
                if let Some(node) = self.nodes.last_mut() {
                    node.line(line)?;
                }
            }
        }
        Ok(())
    }
}

/// Writes where a state is.
fn stored(line: &mut impl FnMut(&str, &[&str]), disk: &str, storage: &Storage) {
    match storage {
        Storage::External { file } => line("  external", &[disk, file]),
        Storage::Internal { file, snapshot, id } => line("  internal", &[disk, file, snapshot, id]),
    }
}

/// Reads where a state is; `None` for other words.
fn storage(words: &[&str]) -> Option<(String, Storage)> {
    let (disk, storage) = match *words {
        ["external", disk, file] => (disk, Storage::External { file: file.to_owned() }),
        ["internal", disk, file, snapshot, id] => {
            let (file, snapshot, id) = (file.to_owned(), snapshot.to_owned(), id.to_owned());
            (disk, Storage::Internal { file, snapshot, id })
        }
        _ => return None,
    };
    Some((disk.to_owned(), storage))
}

/// What indented lines belong to.
#[derive(Copy, Clone)]
enum Item {
    Tree,
    Disk,
    Node,
    Forgotten,
    Other,
}

impl NodeRecord {
    fn line(&mut self, line: &str) -> Result<(), &'static str> {
        let words = words(line)?;
        let words: SmallVec<[&str; 6]> = words.iter().map(|word| &**word).collect();
        match *words {
            ["parent", parent] => self.parent = Some(parent.to_owned()),
            ["parent", parent, "guessed"] => {
                self.parent = Some(parent.to_owned());
                self.parent_guessed = true;
            }
            ["created", seconds] => {
                self.created = Some(seconds.parse().map_err(|_| "the time must be a number of seconds")?);
            }
            ["description", text] => self.description = text.to_owned(),
            ["state", state] => self.state = Some(state.to_owned()),
            _ => match storage(&words) {
                Some(found) => self.storage.push(found),
                None => self.other.push(line.to_owned()),
            },
        }
        Ok(())
    }
}
