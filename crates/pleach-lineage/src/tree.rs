//! The forest itself: who stands on whom, by name and by id, and which node is current.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Index;
use core::{iter, mem, slice};

use crate::{LineageError, Node, NodeId};

/// A forest of named nodes, one of which may be current.
///
/// What always holds:
/// - every parent is a node of this forest, and following parents ends at a root;
/// - names are unique;
/// - the current node, if any, is a node of this forest;
/// - children, and roots, are in the order in which they were inserted, whoever's children they were then.
///
/// No operation is recursive, so depth is limited by memory only. Looking up a name takes O(log n).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// By id; `None` where a node was removed.
    slots: Vec<Option<Slot>>,
    names: BTreeMap<String, NodeId>,
    /// Ascending, as all lists of children are: that is insertion order.
    roots: Vec<NodeId>,
    pub(crate) current: Option<NodeId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) node: Node,
    pub(crate) children: Vec<NodeId>,
}

impl Lineage {
    /// A forest without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The forest of these nodes, whose ids are their places. Names are unique, and parents come before their children.
    pub(crate) fn of_parents_first(nodes: Vec<Node>) -> Self {
        let ids = || (0..).map(NodeId);
        let names = nodes.iter().zip(ids()).map(|(node, id)| (node.name.clone(), id)).collect();
        let mut tree = Self { slots: Vec::with_capacity(nodes.len()), names, ..Self::default() };
        for (node, id) in nodes.into_iter().zip(ids()) {
            tree.siblings_mut(node.parent).push(id);
            tree.slots.push(Some(Slot { node, children: Vec::new() }));
        }
        tree
    }

    /// The number of nodes.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Adds `node` as the last child of its parent, or as the last root. The current node stays what it is.
    ///
    /// # Errors
    /// [`LineageError::DuplicateName`]; [`LineageError::NoSuchParent`], hence parents come first;
    /// [`LineageError::Full`].
    pub fn insert(&mut self, node: Node) -> Result<NodeId, LineageError> {
        self.free_name(&node.name)?;
        if let Some(parent) = node.parent
            && !self.contains(parent)
        {
            return Err(LineageError::NoSuchParent { name: node.name, parent });
        }
        let id = NodeId(u32::try_from(self.slots.len()).map_err(|_| LineageError::Full)?);
        self.siblings_mut(node.parent).push(id);
        self.names.insert(node.name.clone(), id);
        self.slots.push(Some(Slot { node, children: Vec::new() }));
        Ok(id)
    }

    /// The node, or `None` if it was removed. `tree[id]` where that cannot be.
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.slot(id).map(|slot| &slot.node)
    }

    /// Whether `id` is a node of this forest.
    pub fn contains(&self, id: NodeId) -> bool {
        self.slot(id).is_some()
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.names.get(name).copied()
    }

    /// All nodes in the order of insertion, in which a child may come before its parent once nodes have moved;
    /// [`Self::depth_first`] has parents first.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> {
        (0..).map(NodeId).zip(&self.slots).filter_map(|(id, slot)| slot.as_ref().map(|_| id))
    }

    /// The nodes that stand on nothing, in the order of insertion.
    pub fn roots(&self) -> impl Iterator<Item = NodeId> {
        self.roots.iter().copied()
    }

    /// The nodes that stand directly on `id`, in the order of insertion; empty if `id` was removed.
    pub fn children(&self, id: NodeId) -> &[NodeId] {
        self.slot(id).map_or(&[], |slot| &slot.children)
    }

    /// What `id` stands on; `None` if it is a root or was removed.
    pub fn parent(&self, id: NodeId) -> Option<NodeId> {
        self.get(id)?.parent
    }

    /// What `id` stands on, nearest first, up to its root; without `id` itself.
    pub fn ancestors(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        iter::successors(self.parent(id), |&at| self.parent(at))
    }

    /// Everything that stands on `id`, directly or not, parents before their children; without `id` itself.
    pub fn descendants(&self, id: NodeId) -> Vec<NodeId> {
        self.walk(self.children(id)).map(|(_, id)| id).collect()
    }

    /// All nodes with their depth (0 for a root): each one before its children, these in the order of insertion,
    /// each followed by what stands on it.
    pub fn depth_first(&self) -> impl Iterator<Item = (usize, NodeId)> {
        self.walk(&self.roots)
    }

    /// The snapshot that the machine's active heads stand on; `None` if that is none of them.
    pub fn current(&self) -> Option<NodeId> {
        self.current
    }

    /// Says which node is current.
    ///
    /// # Errors
    /// [`LineageError::NoSuchNode`].
    pub fn set_current(&mut self, current: Option<NodeId>) -> Result<(), LineageError> {
        if let Some(id) = current {
            self.existing(id)?;
        }
        self.current = current;
        Ok(())
    }

    /// Goes back to `id`: it becomes current, and nothing moves in the tree.
    ///
    /// # Errors
    /// [`LineageError::NoSuchNode`].
    pub fn revert(&mut self, id: NodeId) -> Result<(), LineageError> {
        self.set_current(Some(id))
    }

    /// Gives `id` another parent, or makes it a root. Its descendants come along; the link counts as known, no
    /// longer as guessed.
    ///
    /// # Errors
    /// [`LineageError::NoSuchNode`], [`LineageError::NoSuchParent`]; [`LineageError::OwnParent`] and
    /// [`LineageError::Cycle`] if `id` would come to stand on itself.
    pub fn reparent(&mut self, id: NodeId, parent: Option<NodeId>) -> Result<(), LineageError> {
        self.may_stand_on(id, parent)?;
        self.relink(id, parent);
        self.slot_mut(id).node.parent_guessed = false;
        Ok(())
    }

    /// Gives `id` another name; its own name is accepted, and changes nothing. Storage keeps the names it has.
    ///
    /// # Errors
    /// [`LineageError::NoSuchNode`], [`LineageError::DuplicateName`].
    pub fn rename(&mut self, id: NodeId, name: impl Into<String>) -> Result<(), LineageError> {
        let name = name.into();
        if self.existing(id)?.name != name {
            self.free_name(&name)?;
            self.relabel(id, name);
        }
        Ok(())
    }

    /// Replaces all that is said of `id`, parent and name included, and hands back what was said before.
    /// Children stay attached; the current node stays what it is.
    ///
    /// # Errors
    /// Those of [`Self::rename`] and [`Self::reparent`].
    pub fn redefine(&mut self, id: NodeId, node: Node) -> Result<Node, LineageError> {
        if self.existing(id)?.name != node.name {
            self.free_name(&node.name)?;
        }
        self.may_stand_on(id, node.parent)?;
        let before = self.existing(id)?.clone();
        if before.name != node.name {
            self.relabel(id, node.name.clone());
        }
        self.relink(id, node.parent);
        self.slot_mut(id).node = node;
        Ok(before)
    }

    fn free_name(&self, name: &str) -> Result<(), LineageError> {
        if self.names.contains_key(name) {
            return Err(LineageError::DuplicateName { name: name.into() });
        }
        Ok(())
    }

    pub(crate) fn existing(&self, id: NodeId) -> Result<&Node, LineageError> {
        self.get(id).ok_or(LineageError::NoSuchNode { id })
    }

    fn may_stand_on(&self, id: NodeId, parent: Option<NodeId>) -> Result<(), LineageError> {
        let name = &self.existing(id)?.name;
        let Some(parent) = parent else { return Ok(()) };
        let Some(on) = self.get(parent) else {
            return Err(LineageError::NoSuchParent { name: name.clone(), parent });
        };
        if parent == id {
            return Err(LineageError::OwnParent { name: name.clone() });
        }
        if self.ancestors(parent).any(|at| at == id) {
            return Err(LineageError::Cycle { name: name.clone(), parent: on.name.clone() });
        }
        Ok(())
    }

    fn relabel(&mut self, id: NodeId, name: String) {
        let before = mem::replace(&mut self.slot_mut(id).node.name, name.clone());
        self.names.remove(&before);
        self.names.insert(name, id);
    }

    /// Moves `id` below `parent`, to its place in the order of insertion.
    fn relink(&mut self, id: NodeId, parent: Option<NodeId>) {
        self.detach(id);
        let siblings = self.siblings_mut(parent);
        let place = siblings.partition_point(|&sibling| sibling < id);
        siblings.insert(place, id);
        self.slot_mut(id).node.parent = parent;
    }

    /// Takes `id` out of its parent's list of children.
    pub(crate) fn detach(&mut self, id: NodeId) {
        let siblings = self.siblings_mut(self.parent(id));
        if let Ok(place) = siblings.binary_search(&id) {
            siblings.remove(place);
        }
    }

    /// Empties the slot of `id` and frees its name; the lists that mention `id` are the caller's.
    pub(crate) fn take(&mut self, id: NodeId) -> Option<Slot> {
        let slot = self.slots.get_mut(id.index())?.take()?;
        self.names.remove(&slot.node.name);
        Some(slot)
    }

    pub(crate) fn siblings_mut(&mut self, parent: Option<NodeId>) -> &mut Vec<NodeId> {
        match parent {
            None => &mut self.roots,
            Some(parent) => &mut self.slot_mut(parent).children,
        }
    }

    /// Only for ids that have just been looked up, or that a node of this forest names as parent or child.
    pub(crate) fn slot_mut(&mut self, id: NodeId) -> &mut Slot {
        self.slots
            .get_mut(id.index())
            .and_then(Option::as_mut)
            .expect("parents and children are nodes of the forest")
    }

    fn slot(&self, id: NodeId) -> Option<&Slot> {
        self.slots.get(id.index())?.as_ref()
    }

    fn walk<'a>(&'a self, from: &'a [NodeId]) -> DepthFirst<'a> {
        DepthFirst { tree: self, left: alloc::vec![from.iter()] }
    }
}

impl Index<NodeId> for Lineage {
    type Output = Node;

    /// The node.
    ///
    /// # Panics
    /// If `id` was removed, or comes from another `Lineage` and is unknown here; [`Lineage::get`] does not.
    fn index(&self, id: NodeId) -> &Node {
        self.get(id).expect("the node is in this tree")
    }
}

struct DepthFirst<'a> {
    tree: &'a Lineage,
    /// What is left to visit, one list of siblings a level.
    left: Vec<slice::Iter<'a, NodeId>>,
}

impl Iterator for DepthFirst<'_> {
    type Item = (usize, NodeId);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let siblings = self.left.last_mut()?;
            if let Some(&id) = siblings.next() {
                let depth = self.left.len() - 1;
                self.left.push(self.tree.children(id).iter());
                return Some((depth, id));
            }
            self.left.pop();
        }
    }
}
