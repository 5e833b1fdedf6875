//! Random operations, against a model too simple to be wrong.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::{DeleteMode, Kind, Lineage, LineageError, Node, NodeId};

/// Knuth's 64-bit linear congruential generator: the same dice on every machine.
pub(crate) struct Lcg(u64);

impl Lcg {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number in `0..limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit.max(1)
    }
}

/// Names and the names of their parents, in the order of insertion.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    nodes: Vec<(String, Option<String>)>,
    current: Option<String>,
}

impl Model {
    fn parent(&self, name: &str) -> Option<String> {
        self.nodes.iter().find(|(node, _)| node == name).and_then(|(_, parent)| parent.clone())
    }

    fn children(&self, parent: Option<&str>) -> Vec<String> {
        let on_it = self.nodes.iter().filter(|(_, on)| on.as_deref() == parent);
        on_it.map(|(name, _)| name.clone()).collect()
    }

    fn ancestors(&self, name: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut at = self.parent(name);
        while let Some(name) = at {
            at = self.parent(&name);
            found.push(name);
        }
        found
    }

    fn depth_first(&self, parent: Option<&str>, depth: usize, into: &mut Vec<(usize, String)>) {
        for child in self.children(parent) {
            into.push((depth, child.clone()));
            self.depth_first(Some(&child), depth + 1, into);
        }
    }

    fn descendants(&self, name: &str) -> Vec<String> {
        let mut found = Vec::new();
        self.depth_first(Some(name), 0, &mut found);
        found.into_iter().map(|(_, name)| name).collect()
    }

    fn set_parent(&mut self, name: &str, parent: Option<String>) {
        self.nodes.iter_mut().filter(|(node, _)| node == name).for_each(|(_, on)| *on = parent.clone());
    }

    fn rename(&mut self, from: &str, to: &str) {
        let all = self.nodes.iter_mut().flat_map(|(name, parent)| [Some(name), parent.as_mut()]);
        for name in all.flatten().chain(self.current.as_mut()).filter(|name| *name == from) {
            *name = to.to_string();
        }
    }

    fn delete(&mut self, name: &str, mode: DeleteMode) {
        let parent = self.parent(name);
        let (gone, heir) = match mode {
            DeleteMode::Single | DeleteMode::Metadata => (alloc::vec![name.to_string()], parent.clone()),
            DeleteMode::Children => {
                let mut gone = self.descendants(name);
                gone.push(name.to_string());
                (gone, parent.clone())
            }
            DeleteMode::ChildrenOnly => (self.descendants(name), Some(name.to_string())),
        };
        if matches!(mode, DeleteMode::Single | DeleteMode::Metadata) {
            for child in self.children(Some(name)) {
                self.set_parent(&child, parent.clone());
            }
        }
        if self.current.as_ref().is_some_and(|current| gone.contains(current)) {
            self.current = heir;
        }
        self.nodes.retain(|(node, _)| !gone.contains(node));
    }
}

fn assert_same(tree: &Lineage, model: &Model) {
    let name = |id: NodeId| tree[id].name.clone();
    let names = |ids: &[NodeId]| ids.iter().map(|&id| name(id)).collect::<Vec<_>>();

    assert_eq!(tree.len(), model.nodes.len());
    assert_eq!(tree.is_empty(), model.nodes.is_empty());
    let nodes: Vec<_> = tree.ids().map(|id| (name(id), tree.parent(id).map(name))).collect();
    assert_eq!(nodes, model.nodes);
    assert_eq!(tree.current().map(name), model.current);
    assert_eq!(names(&tree.roots().collect::<Vec<_>>()), model.children(None));
    let mut walk = Vec::new();
    model.depth_first(None, 0, &mut walk);
    assert_eq!(tree.depth_first().map(|(depth, id)| (depth, name(id))).collect::<Vec<_>>(), walk);
    for id in tree.ids() {
        let of = name(id);
        assert_eq!(tree.find(&of), Some(id));
        assert_eq!(names(tree.children(id)), model.children(Some(&of)), "children of {of}");
        assert_eq!(names(&tree.ancestors(id).collect::<Vec<_>>()), model.ancestors(&of), "ancestors of {of}");
        assert_eq!(names(&tree.descendants(id)), model.descendants(&of), "descendants of {of}");
    }
}

const MODES: [DeleteMode; 4] =
    [DeleteMode::Single, DeleteMode::Metadata, DeleteMode::Children, DeleteMode::ChildrenOnly];

/// One random operation on both; what the tree refuses must be what the model would not do either.
fn step(dice: &mut Lcg, tree: &mut Lineage, model: &mut Model, ever: &mut Vec<NodeId>) {
    // Any id that was ever given out, removed ones too, so that refusals are met.
    let any = |dice: &mut Lcg| ever.get(dice.below(ever.len())).copied();
    let live: Vec<NodeId> = tree.ids().collect();
    let one = |dice: &mut Lcg| live.get(dice.below(live.len())).copied();
    let before = tree.clone();
    let fresh = format!("n{}", dice.below(60));
    let taken = tree.find(&fresh).is_some();

    match dice.below(12) {
        0..=5 => {
            let parent = match dice.below(10) {
                0 => None,
                1 => any(dice),
                2..=5 => live.last().copied(),
                _ => one(dice),
            };
            let gone = parent.is_some_and(|parent| tree.get(parent).is_none());
            match tree.insert(Node { parent, ..Node::new(fresh.clone(), Kind::Snapshot) }) {
                Ok(id) => {
                    assert!(!taken && !gone && !ever.contains(&id));
                    model.nodes.push((fresh, parent.map(|parent| tree[parent].name.clone())));
                    ever.push(id);
                }
                Err(LineageError::DuplicateName { name }) => assert!(taken && name == fresh),
                Err(LineageError::NoSuchParent { .. }) => assert!(gone && !taken),
                Err(other) => panic!("{other}"),
            }
        }
        6 => {
            let Some(id) = any(dice) else { return };
            // Whole branches go rarely, or trees would stay small.
            let mode = MODES[if dice.below(4) == 0 { dice.below(4) } else { dice.below(2) }];
            let plan = tree.plan_delete(id, mode);
            assert_eq!(*tree, before, "planning changes nothing");
            let done = tree.delete(id, mode);
            assert_eq!(done, plan);
            let Ok(done) = done else { return assert!(before.get(id).is_none()) };
            model.delete(&before[id].name, mode);
            for (place, &gone) in done.removed.iter().enumerate() {
                assert!(tree.get(gone).is_none() && tree.children(gone).is_empty());
                let parent = before.parent(gone);
                assert!(
                    !done.removed[..place].iter().any(|&earlier| Some(earlier) == parent),
                    "leaves first"
                );
            }
            for &(moved, parent) in &done.reparented {
                assert_eq!(tree.parent(moved), parent);
            }
        }
        7 | 8 => {
            let (Some(id), parent) = (any(dice), any(dice)) else { return };
            let parent = parent.filter(|_| dice.below(5) > 0);
            match tree.reparent(id, parent) {
                Ok(()) => model.set_parent(&tree[id].name, parent.map(|parent| tree[parent].name.clone())),
                Err(LineageError::NoSuchNode { .. }) => assert!(before.get(id).is_none()),
                Err(LineageError::NoSuchParent { .. }) => assert!(before.get(parent.unwrap()).is_none()),
                Err(LineageError::OwnParent { .. }) => assert_eq!(parent, Some(id)),
                Err(LineageError::Cycle { .. }) => assert!(before.descendants(id).contains(&parent.unwrap())),
                Err(other) => panic!("{other}"),
            }
        }
        9 => {
            let Some(id) = any(dice) else { return };
            match tree.rename(id, fresh.clone()) {
                Ok(()) => model.rename(&before[id].name, &fresh),
                Err(LineageError::NoSuchNode { .. }) => assert!(before.get(id).is_none()),
                Err(LineageError::DuplicateName { .. }) => assert!(taken && before.find(&fresh) != Some(id)),
                Err(other) => panic!("{other}"),
            }
        }
        10 => {
            let id = any(dice).filter(|_| dice.below(6) > 0);
            if tree.set_current(id).is_ok() {
                model.current = id.map(|id| tree[id].name.clone());
            } else {
                assert!(before.get(id.unwrap()).is_none());
            }
        }
        _ => {
            let (Some(id), parent) = (one(dice), one(dice)) else { return };
            let node = Node { parent, ..Node::new(fresh.clone(), Kind::Head) };
            if let Ok(old) = tree.redefine(id, node) {
                assert_eq!((old, tree[id].kind), (before[id].clone(), Kind::Head));
                // The new parent under its old name, then the name: the parent is another node.
                model.set_parent(&before[id].name, parent.map(|parent| before[parent].name.clone()));
                model.rename(&before[id].name, &fresh);
            } else {
                let below = before.descendants(id).contains(&parent.unwrap());
                assert!(below || parent == Some(id) || (taken && before.find(&fresh) != Some(id)));
            }
        }
    }
}

#[test]
fn random_operations_keep_the_forest_a_forest() {
    let mut largest = 0;
    for seed in 0..10 {
        let mut dice = Lcg::new(seed);
        let (mut tree, mut model, mut ever) = (Lineage::new(), Model::default(), Vec::new());
        for _ in 0..1000 {
            let before = tree.clone();
            let old = model.clone();
            step(&mut dice, &mut tree, &mut model, &mut ever);
            if model == old {
                // Refused, or said again: only `kind` and `parent_guessed` are beyond the model.
                assert_eq!((tree.len(), tree.current()), (before.len(), before.current()));
            }
            assert_same(&tree, &model);
            largest = largest.max(tree.len());
        }
    }
    assert!(largest > 30, "the trees were too small to tell: {largest}");
}

#[test]
fn refusals_say_what_and_why_and_change_nothing() {
    let mut tree = Lineage::new();
    let a = tree.insert(Node::new("A", Kind::Snapshot)).unwrap();
    let b = tree.insert(Node { parent: Some(a), ..Node::new("B\n", Kind::Snapshot) }).unwrap();
    let gone = tree.insert(Node::new("x", Kind::Head)).unwrap();
    tree.delete(gone, DeleteMode::Single).unwrap();
    let before = tree.clone();

    type Attempt = fn(&mut Lineage, NodeId, NodeId, NodeId) -> Result<(), LineageError>;
    let cases: &[(&str, Attempt, &str)] = &[
        (
            "a name twice",
            |tree, _, _, _| tree.insert(Node::new("A", Kind::Head)).map(drop),
            r#"there already is a node named "A"; choose another name, or rename that one first"#,
        ),
        (
            "a parent that went",
            |tree, _, _, gone| {
                tree.insert(Node { parent: Some(gone), ..Node::new("C", Kind::Head) }).map(drop)
            },
            r#"the parent of "C", node #2, is not in this tree; insert parents before their children"#,
        ),
        ("onto itself", |tree, _, b, _| tree.reparent(b, Some(b)), r#""B\n" cannot be its own parent"#),
        (
            "onto its child",
            |tree, a, b, _| tree.reparent(a, Some(b)),
            r#""A" cannot stand on "B\n", which already stands on "A"; give "B\n" another parent first"#,
        ),
        (
            "redefined onto its child",
            |tree, a, b, _| {
                tree.redefine(a, Node { parent: Some(b), ..Node::new("new", Kind::Head) }).map(drop)
            },
            r#""A" cannot stand on "B\n", which already stands on "A"; give "B\n" another parent first"#,
        ),
        (
            "renamed to a taken name",
            |tree, _, b, _| tree.rename(b, "A"),
            r#"there already is a node named "A"; choose another name, or rename that one first"#,
        ),
        (
            "back to a node that went",
            |tree, _, _, gone| tree.revert(gone),
            "node #2 is not in this tree; it was removed, or its id comes from another tree",
        ),
    ];
    for (case, attempt, want) in cases {
        assert_eq!(attempt(&mut tree, a, b, gone).unwrap_err().to_string(), *want, "{case}");
        assert_eq!(tree, before, "{case}");
    }
}

#[test]
fn what_is_said_of_a_node_can_be_said_anew() {
    let mut tree = Lineage::new();
    let a = tree.insert(Node::new("A", Kind::Snapshot)).unwrap();
    let guess = Node { parent: Some(a), parent_guessed: true, ..Node::new("B", Kind::Head) };
    let b = tree.insert(guess).unwrap();
    let c = tree.insert(Node { parent: Some(b), ..Node::new("C", Kind::Head) }).unwrap();
    tree.revert(b).unwrap();

    tree.reparent(b, Some(a)).unwrap();
    assert!(!tree[b].parent_guessed);
    let note = Node { description: "before the upgrade".into(), ..Node::new("B2", Kind::Snapshot) };
    let old = tree.redefine(b, note).unwrap();
    assert_eq!((old.name.as_str(), old.kind), ("B", Kind::Head));
    assert_eq!((tree.find("B"), tree.find("B2"), tree.parent(b)), (None, Some(b), None));
    assert_eq!((tree.children(b), tree.current()), (&[c][..], Some(b)));
    tree.rename(b, "B2").unwrap();
    assert_eq!(tree.find("B2"), Some(b));
}

#[test]
fn a_hundred_thousand_nodes() {
    const N: usize = 100_000;
    for chain in [true, false] {
        let mut tree = Lineage::new();
        let mut parent = None;
        for n in 0..N {
            let id = tree.insert(Node { parent, ..Node::new(format!("n{n}"), Kind::Snapshot) }).unwrap();
            parent = if chain { Some(id) } else { parent.or(Some(id)) };
        }
        let (root, last) = (tree.find("n0").unwrap(), tree.find(&format!("n{}", N - 1)).unwrap());
        tree.revert(last).unwrap();
        assert_eq!(tree.depth_first().count(), N);
        assert_eq!(tree.descendants(root).len(), N - 1);
        assert_eq!(tree.ancestors(last).count(), if chain { N - 1 } else { 1 });
        let first = tree.children(root)[0];
        tree.delete(root, DeleteMode::Single).unwrap();
        assert_eq!(tree.roots().count(), if chain { 1 } else { N - 1 });
        tree.delete(first, DeleteMode::Children).unwrap();
        assert_eq!((tree.len(), tree.current()), if chain { (0, None) } else { (N - 2, Some(last)) });
    }
}
