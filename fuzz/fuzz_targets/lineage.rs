//! Random operations: the forest stays a forest, a refusal changes nothing, and a deletion is what its plan said.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pleach_lineage::{DeleteMode, Kind, Lineage, LineageError, Node, NodeId, text};

#[derive(Arbitrary, Debug)]
enum Operation {
    Insert { name: u8, parent: Option<u8>, head: bool },
    Delete { node: u8, mode: u8 },
    Reparent { node: u8, parent: Option<u8> },
    Rename { node: u8, name: u8 },
    Redefine { node: u8, name: u8, parent: Option<u8> },
    Current { node: Option<u8> },
}

fuzz_target!(|operations: Vec<Operation>| {
    let mut tree = Lineage::new();
    // Every id that was ever given out, those of removed nodes too.
    let mut ids: Vec<NodeId> = Vec::new();
    for operation in operations {
        let before = tree.clone();
        let result = apply(&mut tree, &mut ids, operation);
        if result.is_err() {
            assert_eq!(tree, before);
        }
        check(&tree);
    }
    let picture = text::render(&tree, text::Style::Ascii, |id| id.to_string());
    assert_eq!(picture.lines().count(), tree.len());
});

fn apply(tree: &mut Lineage, ids: &mut Vec<NodeId>, operation: Operation) -> Result<(), LineageError> {
    let Some(&first) = ids.first() else {
        ids.push(tree.insert(Node::new("first", Kind::Snapshot))?);
        return Ok(());
    };
    let id = |number: u8| ids.get(usize::from(number) % ids.len()).copied().unwrap_or(first);
    let named = |name: u8| format!("n{}", name % 32);
    match operation {
        Operation::Insert { name, parent, head } => {
            let kind = if head { Kind::Head } else { Kind::Snapshot };
            let new = tree.insert(Node { parent: parent.map(id), ..Node::new(named(name), kind) })?;
            assert!(!ids.contains(&new), "an id is given out once");
            ids.push(new);
        }
        Operation::Delete { node, mode } => {
            let modes =
                [DeleteMode::Single, DeleteMode::Metadata, DeleteMode::Children, DeleteMode::ChildrenOnly];
            let mode = modes.get(usize::from(mode) % 4).copied().unwrap_or(DeleteMode::Single);
            let plan = tree.plan_delete(id(node), mode)?;
            let len = tree.len();
            let done = tree.delete(id(node), mode)?;
            assert_eq!(done, plan);
            assert_eq!(tree.len() + done.removed.len(), len);
            assert!(done.removed.iter().all(|&gone| tree.get(gone).is_none()));
        }
        Operation::Reparent { node, parent } => tree.reparent(id(node), parent.map(id))?,
        Operation::Rename { node, name } => tree.rename(id(node), named(name))?,
        Operation::Redefine { node, name, parent } => {
            tree.redefine(
                id(node),
                Node { parent: parent.map(id), ..Node::new(named(name), Kind::Snapshot) },
            )?;
        }
        Operation::Current { node } => tree.set_current(node.map(id))?,
    }
    Ok(())
}

fn check(tree: &Lineage) {
    let walked: Vec<NodeId> = tree.depth_first().map(|(_, id)| id).collect();
    assert_eq!(walked.len(), tree.len(), "every node is below a root, once");
    for id in tree.ids() {
        assert_eq!(tree.find(&tree[id].name), Some(id), "names are unique");
        assert!(tree.ancestors(id).count() < tree.len(), "parents end at a root");
        match tree.parent(id) {
            Some(parent) => assert!(tree.children(parent).contains(&id)),
            None => assert!(tree.roots().any(|root| root == id)),
        }
        assert!(
            tree.children(id).windows(2).all(|pair| pair[0] < pair[1]),
            "children are in the order of insertion"
        );
    }
    assert!(tree.current().is_none_or(|current| tree.contains(current)));
}
