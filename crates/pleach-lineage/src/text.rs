//! The tree as lines for a terminal.

use alloc::string::String;
use alloc::vec::Vec;

use crate::{Lineage, NodeId};

/// Down to this depth every child is one step to the right of its parent.
const STEPS: usize = 8;

/// Which characters the lines are drawn with.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Style {
    /// Box drawing characters.
    Unicode,
    /// `|-`, `` `- ``, `|`, `:`.
    Ascii,
}

/// One line of the picture: what comes before the label, and whose label it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Guides and connector; all its characters are one column wide.
    pub prefix: String,
    /// The node.
    pub id: NodeId,
}

/// Draws the forest, a line a node, each ending in a line break; nothing for an empty forest.
///
/// ```text
/// A
/// ├─ B
/// │  └─ D
/// └─ C
///    └─ E
/// ```
///
/// A chain of hundreds of snapshots is common, and a step to the right for each would leave the screen. So the
/// steps end after the eighth. From there on a node is followed, in its own column, by the largest of the
/// branches that stand on it (the last of equals), marked `╵` (`:` in ASCII); its other children come before
/// that, one step to the right. So **a marked node stands on the nearest node above it in the same column**,
/// and nothing is ambiguous:
///
/// ```text
/// └─ n8
///    ├─ a child of n8
///    └─ another
///  ╵ the child of n8 on which most stands
///  ╵ and its child
/// ```
///
/// Each step beyond the eighth leads into a branch of at most half the nodes, so n nodes never need more than
/// 8 + log₂ n steps of three columns, whatever their shape.
///
/// Labels are printed as they are: they must be one line, and names in them already made printable.
pub fn render(lineage: &Lineage, style: Style, label: impl Fn(NodeId) -> String) -> String {
    let mut text = String::new();
    for row in rows(lineage, style) {
        text.push_str(&row.prefix);
        text.push_str(&label(row.id));
        text.push('\n');
    }
    text
}

/// The lines of [`render`] before they get their labels, for those who align columns to the right of them.
pub fn rows(lineage: &Lineage, style: Style) -> Vec<Row> {
    let sizes = branch_sizes(lineage);
    let pens = style.pens();
    let mut rows = Vec::with_capacity(lineage.len());
    // Per step to the right, left to right: whether the line of siblings goes on below.
    let mut guides: Vec<bool> = Vec::new();
    // What is left to draw, the next one last.
    let mut left: Vec<Pending> = Vec::new();
    push_siblings(&mut left, lineage.roots().collect(), 0);

    while let Some(at) = left.pop() {
        guides.truncate(at.step.saturating_sub(1));
        let mut prefix: String = guides.iter().map(|&on| if on { pens.guide } else { pens.blank }).collect();
        if at.step > 0 {
            prefix.push_str(pens.connector(&at));
            guides.push(!at.last);
        }
        rows.push(Row { prefix, id: at.id });

        let mut children = lineage.children(at.id).to_vec();
        if at.step >= STEPS {
            let size = |id: &NodeId| sizes.get(id.index()).copied();
            let largest = children.iter().enumerate().max_by_key(|(_, id)| size(id)).map(|(place, _)| place);
            if let Some(place) = largest {
                left.push(Pending { id: children.remove(place), continues: true, ..at });
            }
        }
        push_siblings(&mut left, children, at.step + 1);
    }
    rows
}

#[derive(Copy, Clone)]
struct Pending {
    id: NodeId,
    /// How many steps to the right it is drawn.
    step: usize,
    /// Whether no sibling follows below in its column.
    last: bool,
    /// Whether it stands on the node above it in its own column.
    continues: bool,
}

fn push_siblings(left: &mut Vec<Pending>, siblings: Vec<NodeId>, step: usize) {
    let pending = |(place, id)| Pending { id, step, last: place == 0, continues: false };
    left.extend(siblings.into_iter().rev().enumerate().map(pending));
}

/// The number of nodes in each node's branch, by index.
fn branch_sizes(lineage: &Lineage) -> Vec<usize> {
    let order: Vec<NodeId> = lineage.depth_first().map(|(_, id)| id).collect();
    let len = order.iter().map(|id| id.index() + 1).max().unwrap_or(0);
    let mut sizes = alloc::vec![1; len];
    for &id in order.iter().rev() {
        let size = sizes.get(id.index()).copied().unwrap_or(0);
        if let Some(above) = lineage.parent(id).and_then(|parent| sizes.get_mut(parent.index())) {
            *above += size;
        }
    }
    sizes
}

/// What the lines are drawn with: three columns each.
struct Pens {
    child: &'static str,
    last_child: &'static str,
    guide: &'static str,
    blank: &'static str,
    continues: &'static str,
    last_continues: &'static str,
}

impl Pens {
    fn connector(&self, at: &Pending) -> &'static str {
        match (at.continues, at.last) {
            (false, false) => self.child,
            (false, true) => self.last_child,
            (true, false) => self.continues,
            (true, true) => self.last_continues,
        }
    }
}

impl Style {
    fn pens(self) -> Pens {
        match self {
            Self::Unicode => Pens {
                child: "├─ ",
                last_child: "└─ ",
                guide: "│  ",
                blank: "   ",
                continues: "│╵ ",
                last_continues: " ╵ ",
            },
            Self::Ascii => Pens {
                child: "|- ",
                last_child: "`- ",
                guide: "|  ",
                blank: "   ",
                continues: "|: ",
                last_continues: " : ",
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;
    use alloc::string::String;
    use alloc::vec::Vec;

    use super::{STEPS, Style, render, rows};
    use crate::model::Lcg;
    use crate::{Kind, Lineage, Node, NodeId};

    /// `"A B<A"`: A, and B on A.
    fn tree(text: &str) -> Lineage {
        let mut tree = Lineage::new();
        for word in text.split_whitespace() {
            let (name, parent) = word.split_once('<').unwrap_or((word, ""));
            tree.insert(Node { parent: tree.find(parent), ..Node::new(name, Kind::Snapshot) }).unwrap();
        }
        tree
    }

    fn drawn(tree: &Lineage, style: Style) -> String {
        render(tree, style, |id| tree[id].name.clone())
    }

    #[test]
    fn pictures() {
        let cases: &[(&str, &str, Style, &str)] = &[
            ("nothing", "", Style::Unicode, ""),
            ("one node", "A", Style::Unicode, "A\n"),
            ("the usual one", "A B<A C<A D<B E<C", Style::Unicode, "A\n├─ B\n│  └─ D\n└─ C\n   └─ E\n"),
            ("in ASCII", "A B<A C<A D<B E<C", Style::Ascii, "A\n|- B\n|  `- D\n`- C\n   `- E\n"),
            ("several roots", "A B C<A D<B E<B", Style::Unicode, "A\n└─ C\nB\n├─ D\n└─ E\n"),
            (
                "a guide over two levels",
                "A B<A C<A D<B E<D",
                Style::Ascii,
                "A\n|- B\n|  `- D\n|     `- E\n`- C\n",
            ),
        ];
        for (case, nodes, style, want) in cases {
            assert_eq!(drawn(&tree(nodes), *style), *want, "{case}");
        }
    }

    #[test]
    fn steps_end_and_branches_beyond_are_still_seen() {
        let deep = tree("0 1<0 z<0 2<1 3<2 4<3 5<4 6<5 7<6 8<7 y<7 9<8 x<8 10<9 v<x w<9 11<10 u<z");
        let want = "\
0
|- 1
|  `- 2
|     `- 3
|        `- 4
|           `- 5
|              `- 6
|                 `- 7
|                    |- 8
|                    |  `- x
|                    |   : v
|                    |: 9
|                    |  `- w
|                    |: 10
|                    |: 11
|                    `- y
`- z
   `- u
";
        assert_eq!(drawn(&deep, Style::Ascii), want);
        let unicode = drawn(&deep, Style::Unicode);
        assert!(unicode.contains("\n│                    │╵ 11\n"), "{unicode}");
    }

    /// Reads the parents back from the picture, by the rule in the documentation.
    fn parents(tree: &Lineage, style: Style) -> Vec<(NodeId, Option<NodeId>)> {
        let mut last_at: Vec<Option<NodeId>> = Vec::new();
        let mut found = Vec::new();
        for row in rows(tree, style) {
            let column = row.prefix.chars().count() / 3;
            let marked = row.prefix.trim_end().ends_with(['╵', ':']);
            last_at.resize(column + 1, None);
            let above = if marked { Some(column) } else { column.checked_sub(1) };
            found.push((row.id, above.and_then(|column| last_at[column])));
            last_at[column] = Some(row.id);
        }
        found.sort();
        found
    }

    #[test]
    fn any_shape_is_narrow_and_can_be_read_back() {
        let mut dice = Lcg::new(7);
        // How far back a parent may be: 1 makes chains, 2 combs, many make bushes.
        for reach in [1, 2, 3, 5, 40, 2000] {
            let mut tree = Lineage::new();
            let mut ids: Vec<NodeId> = Vec::new();
            for n in 0..2000 {
                let back = 1 + dice.below(reach);
                let parent = ids.len().checked_sub(back).map(|place| ids[place]);
                let node = Node { parent, ..Node::new(format!("{n}"), Kind::Snapshot) };
                ids.push(tree.insert(node).unwrap());
            }
            let want: Vec<_> = tree.ids().map(|id| (id, tree.parent(id))).collect();
            for style in [Style::Unicode, Style::Ascii] {
                assert_eq!(parents(&tree, style), want, "parents up to {reach} back");
            }
            let widest = rows(&tree, Style::Unicode).iter().map(|row| row.prefix.chars().count()).max();
            assert!(widest <= Some(3 * (STEPS + 11)), "2000 nodes, parents up to {reach} back: {widest:?}");
        }
    }
}
