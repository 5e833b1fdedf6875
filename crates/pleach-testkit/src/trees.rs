//! Random trees of image files, made by stock qemu-img and qemu-io from one seed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::oracle::{Format, qemu_img_in, qemu_io, text};
use crate::rng::Rng;

const SECTOR: u64 = 512;
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Largest virtual disk of a tree.
const LARGEST: u64 = 16 * MIB;

/// Bytes of incompressible data that writes draw from.
const NOISE: usize = 96 * 1024;

/// Cluster sizes, the usual ones more often.
const CLUSTERS: &[u64] = &[
    512,
    512,
    KIB,
    2 * KIB,
    4 * KIB,
    4 * KIB,
    8 * KIB,
    16 * KIB,
    32 * KIB,
    64 * KIB,
    64 * KIB,
    64 * KIB,
    128 * KIB,
    256 * KIB,
    512 * KIB,
    MIB,
    2 * MIB,
];

/// One file of a tree.
#[derive(Clone, Debug)]
pub struct Node {
    /// The file's stem, which is the node's name.
    pub name: String,
    /// The file's name in the tree's directory.
    pub file: String,
    /// What the file is.
    pub format: Format,
    /// Index of the node whose file backs this one.
    pub parent: Option<usize>,
    /// Indexes of the nodes that this one backs.
    pub children: Vec<usize>,
    /// Bytes the guest sees.
    pub virtual_size: u64,
    /// Bytes a cluster; of no meaning for a raw file.
    pub cluster_size: u64,
    /// Whether the file is a version 2 image.
    pub version2: bool,
    /// Whether the stored backing name is an absolute path.
    pub absolute: bool,
    /// Whether it has extended L2 entries.
    pub subclusters: bool,
}

/// What a tree may have besides, and its form.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras {
    /// Extended L2 entries in some images.
    pub subclusters: bool,
    /// Internal snapshots in some images.
    pub snapshots: bool,
    /// Each file stands on the one before.
    pub chain: bool,
}

/// A directory with one or more trees in it.
#[derive(Clone, Debug)]
pub struct RandomTree {
    /// Where the files are.
    pub dir: PathBuf,
    /// Parents before their children.
    pub nodes: Vec<Node>,
}

impl RandomTree {
    /// Makes `dir` and fills it with `n_files` image files.
    ///
    /// Roots are raw or qcow2; versions, cluster sizes, refcount widths, disk sizes, ways of naming the backing
    /// file and contents (data, zeros, compressed, discarded, nothing) are drawn from `rng`. A raw file always
    /// backs another one. A parent is never written after its first child was made.
    ///
    /// # Panics
    /// If a tool fails, or `n_files` is 0.
    pub fn build(dir: &Path, rng: &mut Rng, n_files: usize) -> Self {
        Self::build_with(dir, rng, n_files, Extras::default())
    }

    /// As [`build`](Self::build), with extras.
    ///
    /// # Panics
    /// As [`build`](Self::build).
    pub fn build_with(dir: &Path, rng: &mut Rng, n_files: usize, extras: Extras) -> Self {
        assert!(n_files > 0, "a tree of no files was asked for");
        fs::create_dir_all(dir).expect("the tree's directory");
        let noise = tempfile::NamedTempFile::new_in(dir.parent().unwrap_or(dir)).expect("a file of noise");
        fs::write(noise.path(), rng.noise(NOISE)).expect("a file of noise");
        let mut tree = Self { dir: dir.to_path_buf(), nodes: Vec::new() };
        while tree.nodes.len() < n_files {
            let parent = match tree.nodes.len().checked_sub(1) {
                Some(newest) if extras.chain => Some(newest),
                _ => tree.choose_parent(rng),
            };
            let last = tree.nodes.len() + 1 == n_files;
            tree.grow(rng, parent, last, noise.path(), extras);
        }
        tree
    }

    /// The file of `node`.
    #[must_use]
    pub fn path(&self, node: &Node) -> PathBuf {
        self.dir.join(&node.file)
    }

    /// Mostly the newest node (chains), else any (branches), seldom none (a further root).
    fn choose_parent(&self, rng: &mut Rng) -> Option<usize> {
        let newest = self.nodes.len().checked_sub(1)?;
        let lonely =
            self.nodes.last().is_some_and(|node| node.format == Format::Raw && node.children.is_empty());
        match rng.below(100) {
            _ if lonely => Some(newest),
            0..5 => None,
            5..50 => Some(newest),
            _ => Some(rng.index(self.nodes.len())),
        }
    }

    fn grow(&mut self, rng: &mut Rng, parent: Option<usize>, last: bool, noise: &Path, extras: Extras) {
        let index = self.nodes.len();
        let format = if parent.is_none() && !last && rng.chance(35) { Format::Raw } else { Format::Qcow2 };
        let stem = *rng.pick(&["n", "n", "n", "n", "Node ", "nœud-", "n.v"]);
        let extension = match format {
            Format::Raw => *rng.pick(&[".raw", ".img"]),
            Format::Qcow2 => *rng.pick(&[".qcow2", ".qcow2", ".qcow2", ".qcow2", ".img", ".overlay"]),
        };
        let name = format!("{stem}{index:02}");
        let cluster_size = *rng.pick(CLUSTERS);
        let parent_size = parent.and_then(|parent| self.nodes.get(parent)).map(|parent| parent.virtual_size);
        let mut node = Node {
            file: format!("{name}{extension}"),
            name,
            format,
            parent,
            children: Vec::new(),
            virtual_size: choose_size(rng, parent_size, cluster_size),
            cluster_size,
            version2: rng.chance(20),
            absolute: rng.chance(25),
            subclusters: false,
        };
        node.subclusters =
            extras.subclusters && !node.version2 && node.cluster_size >= 16 * KIB && rng.chance(25);
        match format {
            Format::Raw => self.make_raw(rng, &node, noise),
            Format::Qcow2 => self.make_qcow2(rng, &node, noise, extras),
        }
        if let Some(parent) = parent.and_then(|parent| self.nodes.get_mut(parent)) {
            parent.children.push(index);
        }
        self.nodes.push(node);
    }

    fn make_raw(&self, rng: &mut Rng, node: &Node, noise: &Path) {
        qemu_img_in(&self.dir, &["create", "-q", "-f", "raw", &node.file, &node.virtual_size.to_string()]);
        qemu_io(&self.path(node), Format::Raw, &commands(rng, node, Compressed::Never, noise));
    }

    fn make_qcow2(&self, rng: &mut Rng, node: &Node, noise: &Path, extras: Extras) {
        let mut options = vec![format!("cluster_size={}", node.cluster_size)];
        let mut refcount_bits = 16;
        if node.version2 {
            options.push("compat=v2".to_owned());
        } else {
            refcount_bits = *rng.pick(&[1, 2, 4, 8, 16, 16, 16, 32, 64]);
            options.push(format!("refcount_bits={refcount_bits}"));
            if node.subclusters {
                options.push("extended_l2=on".to_owned());
            }
            options.push(format!("lazy_refcounts={}", rng.pick(&["off", "off", "off", "on"])));
        }
        let plain = options.join(",");
        let preallocated = node.parent.is_none() && rng.chance(15);
        if preallocated {
            options.push("preallocation=metadata".to_owned());
        }
        let backing = self.backing(rng, node);
        let options = options.join(",");
        let size = node.virtual_size.to_string();
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((name, format)) = &backing {
            create.extend(["-b", name, "-F", format.name()]);
        }
        create.extend([node.file.as_str(), size.as_str()]);
        qemu_img_in(&self.dir, &create);
        let compressed = if preallocated { Compressed::Never } else { Compressed::Some };
        qemu_io(&self.path(node), Format::Qcow2, &commands(rng, node, compressed, noise));
        if rng.chance(10) {
            self.compress(node, backing.as_ref(), &plain);
        }
        if extras.snapshots && refcount_bits >= 16 && rng.chance(20) {
            for name in ["s1", "s2"].into_iter().take(1 + rng.index(2)) {
                qemu_img_in(&self.dir, &["snapshot", "-c", name, &node.file]);
                qemu_io(&self.path(node), Format::Qcow2, &commands(rng, node, Compressed::Never, noise));
            }
        }
    }

    /// Writes the image anew by `qemu-img convert -c`, on the same backing file.
    fn compress(&self, node: &Node, backing: Option<&(String, Format)>, options: &str) {
        let mut convert = vec!["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options];
        if let Some((name, format)) = backing {
            convert.extend(["-B", name, "-F", format.name()]);
        }
        convert.extend([node.file.as_str(), "compressed"]);
        qemu_img_in(&self.dir, &convert);
        fs::rename(self.dir.join("compressed"), self.path(node))
            .expect("both names are in the tree's directory");
    }

    /// The parent's name as this node stores it, and the parent's format.
    fn backing(&self, rng: &mut Rng, node: &Node) -> Option<(String, Format)> {
        let parent = self.nodes.get(node.parent?)?;
        let here = self.dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let name = match rng.below(10) {
            _ if node.absolute => text(&self.path(parent)).to_owned(),
            0 => format!("./{}", parent.file),
            1 => format!("../{here}/{}", parent.file),
            _ => parent.file.clone(),
        };
        Some((name, parent.format))
    }
}

/// The parent's size, or shorter, or longer; a multiple of 512, often not of the cluster.
fn choose_size(rng: &mut Rng, parent: Option<u64>, cluster: u64) -> u64 {
    let usual = if cluster >= 512 * KIB { LARGEST } else { 4 * MIB };
    let Some(parent) = parent else {
        return rng.between(256 * KIB / SECTOR, usual / SECTOR) * SECTOR;
    };
    let size = match rng.below(10) {
        0..5 => parent,
        5..7 => rng.between(parent / 3, parent),
        _ => rng.between(parent, (parent * 2).max(usual / 2)),
    };
    let unit = if rng.chance(30) { cluster } else { SECTOR };
    (size / unit * unit).clamp(64 * KIB, LARGEST)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compressed {
    Never,
    Some,
}

/// qemu-io commands that give a node its content: compressed clusters first, which want fresh ground.
fn commands(rng: &mut Rng, node: &Node, compressed: Compressed, noise: &Path) -> Vec<String> {
    let mut all = Vec::new();
    if compressed == Compressed::Some && rng.chance(60) {
        all.extend(compressed_writes(rng, node, noise));
    }
    let plain = rng.between(0, 18);
    all.extend((0..plain).map(|_| plain_write(rng, node, noise)));
    all
}

/// Whole clusters, each once: a compressed write over an allocated cluster is an error.
fn compressed_writes(rng: &mut Rng, node: &Node, noise: &Path) -> Vec<String> {
    let clusters = node.virtual_size.div_ceil(node.cluster_size);
    let wanted: BTreeSet<u64> = (0..rng.between(1, 12)).map(|_| rng.below(clusters)).collect();
    let write = |cluster: u64| {
        let start = cluster * node.cluster_size;
        let len = node.cluster_size.min(node.virtual_size - start);
        let source = source(rng, noise);
        format!("write -q -c {source} {start} {len}")
    };
    wanted.into_iter().map(write).collect()
}

fn plain_write(rng: &mut Rng, node: &Node, noise: &Path) -> String {
    let (start, len) = span(rng, node);
    match rng.below(100) {
        0..55 => format!("write -q {} {start} {len}", source(rng, noise)),
        55..65 => format!("write -q -P 0 {start} {len}"),
        65..75 => format!("write -q -z {start} {len}"),
        75..85 => format!("write -q -z -u {start} {len}"),
        _ => format!("discard -q {start} {len}"),
    }
}

/// One byte over and over, or noise that does not compress.
fn source(rng: &mut Rng, noise: &Path) -> String {
    if rng.chance(30) { format!("-s {}", text(noise)) } else { format!("-P {}", rng.between(1, 255)) }
}

/// A range of the disk: a few bytes, a few sectors, whole clusters, or a good part of the disk.
fn span(rng: &mut Rng, node: &Node) -> (u64, u64) {
    let size = node.virtual_size;
    let (unit, longest) = match rng.below(10) {
        0..2 => (1, 2 * KIB),
        2..5 => (SECTOR, 64 * KIB),
        5..8 => (node.cluster_size.min(size), 4 * node.cluster_size),
        _ => (4 * KIB, size / 3),
    };
    let start = rng.below(size.div_ceil(unit)) * unit;
    let len = rng.between(1, (longest.min(MIB) / unit).max(1)) * unit;
    // A length that reaches the end of the disk, once in a while, whatever the unit.
    let len = if rng.chance(8) { size } else { len };
    (start, len.min(size - start).min(3 * MIB))
}

#[cfg(test)]
mod tests {
    use super::{Node, RandomTree};
    use crate::files::{WorkDir, contents};
    use crate::oracle::{self, Format, in_parallel};
    use crate::rng::{OnFailure, Rng};

    type Trait = fn(&Node, Option<&Node>) -> bool;

    /// Twenty trees that qemu-img finds nothing wrong with, and that together have everything promised.
    #[test]
    fn random_trees_are_clean_and_varied() {
        let work = WorkDir::new("trees");
        let mut nodes = Vec::new();
        for seed in 0..20 {
            let _seed = OnFailure::print_seed(seed, "random tree");
            let mut rng = Rng::new(seed);
            let n_files = if seed == 0 { 40 } else { usize::try_from(rng.between(2, 16)).unwrap() };
            let tree = RandomTree::build(&work.join(seed.to_string()), &mut rng, n_files);
            assert_eq!(tree.nodes.len(), n_files);
            for check in in_parallel(&tree.nodes, |node| oracle::check(&tree.path(node), node.format)) {
                assert!(check.is_clean(), "{check:?}");
            }
            for (index, node) in tree.nodes.iter().enumerate() {
                let info = oracle::info(&tree.path(node));
                assert_eq!(info["virtual-size"], node.virtual_size);
                if let Some(parent) = node.parent.map(|parent| &tree.nodes[parent]) {
                    assert!(parent.children.contains(&index));
                    assert_eq!(info["backing-filename-format"], parent.format.name());
                    let stored = info["backing-filename"].as_str().unwrap();
                    assert!(
                        stored.ends_with(&parent.file) && stored.starts_with('/') == node.absolute,
                        "{stored}"
                    );
                }
                assert!(node.format == Format::Qcow2 || !node.children.is_empty());
            }
            let parent_of = |index: Option<usize>| index.map(|index| tree.nodes[index].clone());
            nodes.extend(tree.nodes.iter().map(|node| (node.clone(), parent_of(node.parent))));
        }
        let wanted: &[(&str, Trait)] = &[
            ("raw root", |node, _| node.format == Format::Raw),
            ("overlay of raw", |_, parent| parent.is_some_and(|parent| parent.format == Format::Raw)),
            ("version 2", |node, _| node.version2),
            ("512-byte clusters", |node, _| node.cluster_size == 512),
            ("2 MiB clusters", |node, _| node.cluster_size == 2 << 20),
            ("several children", |node, _| node.children.len() > 2),
            ("shorter", |node, parent| parent.is_some_and(|parent| parent.virtual_size > node.virtual_size)),
            ("longer", |node, parent| parent.is_some_and(|parent| parent.virtual_size < node.virtual_size)),
            ("size inside a cluster", |node, _| node.virtual_size % node.cluster_size != 0),
        ];
        for (what, holds) in wanted {
            assert!(nodes.iter().any(|(node, parent)| holds(node, parent.as_ref())), "no node: {what}");
        }
    }

    #[test]
    fn one_seed_gives_one_tree() {
        let work = WorkDir::new("seed");
        let digests = |name: &str| {
            let tree = RandomTree::build(&work.join("same"), &mut Rng::new(99), 6);
            let found: Vec<_> = tree.nodes.iter().map(|n| oracle::digest(&tree.path(n), n.format)).collect();
            std::fs::rename(&tree.dir, work.join(name)).unwrap();
            found
        };
        assert_eq!(digests("first"), digests("second"));
        assert_eq!(contents(&work.join("first")), contents(&work.join("second")));
    }
}
