//! What each way of deleting a node does to the hierarchy.

use alloc::vec::Vec;

use crate::{Lineage, LineageError, NodeId};

/// Which nodes a deletion takes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeleteMode {
    /// The node alone: what stands on it comes to stand on its parent, and so does current if it was there.
    Single,
    /// The node and everything that stands on it; if current was among them, the node's parent is current.
    Children,
    /// Everything that stands on the node, which stays; if current was among them, the node is current.
    ChildrenOnly,
    /// As [`DeleteMode::Single`] in the hierarchy; that no file is touched is the caller's part.
    Metadata,
}

/// What a deletion takes, and who moves where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// The nodes that go, leaves first: each one comes before its parent.
    pub removed: Vec<NodeId>,
    /// The nodes that get another parent, with that parent (`None`: becomes a root), in the order of insertion.
    pub reparented: Vec<(NodeId, Option<NodeId>)>,
    /// What is current afterwards.
    pub current: Option<NodeId>,
}

impl Lineage {
    /// What [`Self::delete`] would do. Nothing changes.
    ///
    /// # Errors
    /// [`LineageError::NoSuchNode`].
    pub fn plan_delete(&self, id: NodeId, mode: DeleteMode) -> Result<Deletion, LineageError> {
        let parent = self.existing(id)?.parent;
        let mut reparented = Vec::new();
        let mut removed = Vec::new();
        // Walking up from current costs its depth; looking for it among `removed` would cost their number.
        let below = || self.current.is_some_and(|current| self.ancestors(current).any(|at| at == id));
        let at = self.current == Some(id);
        let current = match mode {
            DeleteMode::Single | DeleteMode::Metadata => {
                reparented.extend(self.children(id).iter().map(|&child| (child, parent)));
                removed.push(id);
                if at { parent } else { self.current }
            }
            DeleteMode::Children => {
                removed.push(id);
                removed.extend(self.descendants(id));
                if at || below() { parent } else { self.current }
            }
            DeleteMode::ChildrenOnly => {
                removed = self.descendants(id);
                if below() { Some(id) } else { self.current }
            }
        };
        // Parents came before their children.
        removed.reverse();
        Ok(Deletion { removed, reparented, current })
    }

    /// Deletes `id`, what stands on it, or both, and says what that was. The ids of removed nodes stay invalid.
    ///
    /// A node that moves to its parent's parent is known to stand there only if both links were known: otherwise
    /// its [`parent_guessed`](crate::Node::parent_guessed) is set.
    ///
    /// # Errors
    /// [`LineageError::NoSuchNode`].
    pub fn delete(&mut self, id: NodeId, mode: DeleteMode) -> Result<Deletion, LineageError> {
        let deletion = self.plan_delete(id, mode)?;
        let node = self.existing(id)?;
        let (parent, guessed) = (node.parent, node.parent_guessed);
        match mode {
            DeleteMode::Single | DeleteMode::Metadata | DeleteMode::Children => self.detach(id),
            DeleteMode::ChildrenOnly => self.slot_mut(id).children.clear(),
        }
        for &gone in &deletion.removed {
            self.take(gone);
        }
        for &(child, parent) in &deletion.reparented {
            let node = &mut self.slot_mut(child).node;
            node.parent = parent;
            node.parent_guessed |= guessed;
        }
        if !deletion.reparented.is_empty() {
            let siblings = self.siblings_mut(parent);
            siblings.extend(deletion.reparented.iter().map(|&(child, _)| child));
            // Two ascending runs: this sort merges them in linear time.
            siblings.sort();
        }
        self.current = deletion.current;
        Ok(deletion)
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::String;
    use alloc::vec::Vec;

    use super::DeleteMode::{self, Children, ChildrenOnly, Metadata, Single};
    use crate::{Kind, Lineage, LineageError, Node};

    /// `"A B<A"`: A, and B on A; `*` marks current, `?` a guessed parent.
    fn tree(text: &str) -> Lineage {
        let mut tree = Lineage::new();
        for word in text.split(' ') {
            let (name, parent) = word.split_once('<').unwrap_or((word, ""));
            let plain = name.trim_end_matches(['*', '?']);
            let node = Node {
                parent: tree.find(parent),
                parent_guessed: name.contains('?'),
                ..Node::new(plain, Kind::Snapshot)
            };
            let id = tree.insert(node).unwrap();
            if name.contains('*') {
                tree.revert(id).unwrap();
            }
        }
        tree
    }

    fn shown(tree: &Lineage) -> String {
        let words: Vec<String> = tree
            .ids()
            .map(|id| {
                let mut word = tree[id].name.clone();
                word.extend(tree[id].parent_guessed.then_some('?'));
                word.extend((tree.current() == Some(id)).then_some('*'));
                word.extend(tree.parent(id).map(|on| alloc::format!("<{}", tree[on].name)));
                word
            })
            .collect();
        words.join(" ")
    }

    #[test]
    fn every_mode_and_every_place_of_current() {
        // Name of the case, tree, node, mode; then the tree, the removed in order, the moved.
        type Case =
            (&'static str, &'static str, &'static str, DeleteMode, &'static str, &'static str, &'static str);
        let cases: &[Case] = &[
            ("root", "A B<A C<A D<B E*<C", "A", Single, "B C D<B E*<C", "A", "B C"),
            ("current root", "A* B<A", "A", Single, "B", "A", "B"),
            ("middle, current", "A B*<A D<B", "B", Single, "A* D<A", "B", "D"),
            ("middle, not current", "A B<A D*<B", "B", Single, "A D*<A", "B", "D"),
            ("leaf", "A B*<A", "B", Single, "A*", "B", ""),
            ("the only node", "A*", "A", Single, "", "A", ""),
            ("no current", "A B<A", "B", Single, "A", "B", ""),
            ("metadata", "A B*<A D<B", "B", Metadata, "A* D<A", "B", "D"),
            ("moved to its age's place", "A B<A C<A D<B", "B", Single, "A C<A D<A", "B", "D"),
            ("guessed above", "A B?<A C<B", "B", Single, "A C?<A", "B", "C"),
            ("guessed below", "A B<A C?<B", "B", Single, "A C?<A", "B", "C"),
            ("branch, current far below", "A B<A C<B D*<C E<A", "B", Children, "A* E<A", "D C B", ""),
            ("branch, current at its root", "A B*<A C<B", "B", Children, "A*", "C B", ""),
            ("branch, current elsewhere", "A B<A C<B E*<A", "B", Children, "A E*<A", "C B", ""),
            ("whole tree", "A B<A C*<B X", "A", Children, "X", "C B A", ""),
            ("leaf as a branch", "A B*<A", "B", Children, "A*", "B", ""),
            ("below, current below", "A B<A C*<B D<A", "A", ChildrenOnly, "A*", "D C B", ""),
            ("below, current here", "A* B<A", "A", ChildrenOnly, "A*", "B", ""),
            ("below, current elsewhere", "A B<A X*", "A", ChildrenOnly, "A X*", "B", ""),
            ("below a leaf", "A B*<A", "B", ChildrenOnly, "A B*<A", "", ""),
        ];
        for (case, before, name, mode, after, removed, moved) in cases {
            let mut tree = tree(before);
            let old = tree.clone();
            let id = tree.find(name).unwrap();
            let plan = tree.plan_delete(id, *mode).unwrap();
            assert_eq!(tree, old, "{case}: planning changes nothing");
            let done = tree.delete(id, *mode).unwrap();
            assert_eq!(done, plan, "{case}");
            assert_eq!(shown(&tree), *after, "{case}");
            let names =
                |ids: Vec<_>| ids.into_iter().map(|id| old[id].name.clone()).collect::<Vec<_>>().join(" ");
            assert_eq!(names(done.removed), *removed, "{case}");
            assert_eq!(names(done.reparented.iter().map(|&(id, _)| id).collect()), *moved, "{case}");
            assert_eq!(done.current, tree.current(), "{case}");
        }
    }

    #[test]
    fn children_keep_the_order_of_insertion() {
        let mut tree = tree("A B<A C<A D<B E<B F<C");
        tree.delete(tree.find("C").unwrap(), Single).unwrap();
        tree.delete(tree.find("B").unwrap(), Single).unwrap();
        let names: Vec<&str> = tree.depth_first().map(|(_, id)| tree[id].name.as_str()).collect();
        assert_eq!(names, ["A", "D", "E", "F"]);
    }

    #[test]
    fn a_removed_node_stays_removed() {
        let mut tree = tree("A B<A");
        let b = tree.find("B").unwrap();
        tree.delete(b, Single).unwrap();
        assert_eq!(tree.delete(b, Single), Err(LineageError::NoSuchNode { id: b }));
        let again = tree.insert(Node::new("B", Kind::Head)).unwrap();
        assert_ne!(again, b);
        assert_eq!((tree.get(b), tree.parent(b), tree.children(b)), (None, None, &[][..]));
    }
}
