//! The last step of a merge: what is selected of the tree, in order.

use super::{Children, Folder, Merger, NodeKind, ROOT, SymbolicLink, number};
use crate::unpack::error::UnpackError;
use crate::unpack::limits::Limits;
use crate::unpack::plan::{PlannedFile, PlannedKind, PlannedNode, TreePlan, TreeTotals};
use crate::unpack::selection::{Match, Selection};

/// Marks a file that no selected name has led to yet.
const UNPLANNED: u32 = u32::MAX;

struct Planner<'a> {
    nodes: Vec<super::Node>,
    inodes: Vec<PlannedFile>,
    /// The number in the plan, by inode.
    planned: Vec<u32>,
    selection: &'a Selection,
    is_everything: bool,
    /// The folder that is planned, for matching.
    path: Vec<u8>,
    plan: TreePlan,
}

pub(super) fn plan(merger: Merger<'_>, selection: &Selection) -> Result<TreePlan, UnpackError> {
    let Merger { limits, mut nodes, inodes, .. } = merger;
    let NodeKind::Directory(root) = taken(&mut nodes[ROOT as usize].kind) else {
        unreachable!("nothing replaces the root");
    };
    let Folder { metadata, children, .. } = *root;
    let plan = TreePlan {
        root: metadata,
        nodes: Vec::with_capacity(nodes.len()),
        files: Vec::with_capacity(inodes.len()),
        totals: TreeTotals::default(),
    };
    let mut planner = Planner {
        planned: vec![UNPLANNED; inodes.len()],
        nodes,
        inodes,
        selection,
        is_everything: selection.is_everything(),
        path: Vec::new(),
        plan,
    };
    planner.folder(children, None, false);
    let mut plan = planner.plan;
    if plan.nodes.is_empty() {
        let is_everything = selection.is_everything();
        return Err(if is_everything { UnpackError::Empty } else { UnpackError::NothingSelected });
    }
    plan.totals = totals(&plan, limits)?;
    Ok(plan)
}

impl Planner<'_> {
    /// Plans what is in a folder. `selected` says that the folder itself, or one above
    /// it, is selected, and all that is in it with it.
    fn folder(&mut self, children: Children, parent: Option<u32>, selected: bool) {
        for (name, child) in children {
            let length = self.path.len();
            if length > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&name);
            let found = if self.is_everything {
                Match { included: true, excluded: false }
            } else {
                self.selection.matches(&self.path)
            };
            if !found.excluded {
                self.node(name, child, parent, selected || found.included);
            }
            self.path.truncate(length);
        }
    }

    fn node(&mut self, name: Box<[u8]>, node: u32, parent: Option<u32>, selected: bool) {
        let kind = match taken(&mut self.nodes[node as usize].kind) {
            NodeKind::Directory(folder) => {
                let Folder { metadata, children, .. } = *folder;
                let kind = PlannedKind::Directory(Box::new(metadata));
                let index = self.plan.nodes.len();
                self.plan.nodes.push(PlannedNode { parent, name, kind });
                self.folder(children, Some(number(index)), selected);
                // A folder that nothing selects is there for what is in it.
                if !selected && self.plan.nodes.len() == index + 1 {
                    self.plan.nodes.pop();
                }
                return;
            }
            _ if !selected => return,
            NodeKind::File(inode) => {
                let planned = &mut self.planned[inode as usize];
                if *planned == UNPLANNED {
                    *planned = number(self.plan.files.len());
                    self.plan.files.push(self.inodes[inode as usize]);
                }
                self.plan.files[*planned as usize].links += 1;
                PlannedKind::File(*planned)
            }
            NodeKind::SymbolicLink(link) => {
                let SymbolicLink { target, metadata } = *link;
                PlannedKind::SymbolicLink { target, metadata: Box::new(metadata) }
            }
        };
        self.plan.nodes.push(PlannedNode { parent, name, kind });
    }
}

/// A node has one name, and goes into the plan with it: what it holds is not there twice.
fn taken(kind: &mut NodeKind) -> NodeKind {
    std::mem::replace(kind, NodeKind::File(UNPLANNED))
}

fn totals(plan: &TreePlan, limits: &Limits) -> Result<TreeTotals, UnpackError> {
    let mut totals = TreeTotals { directories: 1, ..TreeTotals::default() };
    for node in &plan.nodes {
        match node.kind {
            PlannedKind::Directory(_) => totals.directories += 1,
            PlannedKind::SymbolicLink { .. } => totals.symbolic_links += 1,
            PlannedKind::File(_) => {}
        }
    }
    totals.files = plan.files.len() as u64;
    totals.inodes = totals.directories + totals.symbolic_links + totals.files;
    totals.bytes = plan.files.iter().fold(0, |bytes, file| bytes.saturating_add(file.size));
    if totals.bytes > limits.unpacked_bytes {
        return Err(UnpackError::TooManyBytes { limit: limits.unpacked_bytes });
    }
    Ok(totals)
}
