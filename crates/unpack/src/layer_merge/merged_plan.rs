//! The last step of a merge: the selected part of the tree, in order.

use super::sub_path::{ShownPart, SubPathProblem};
use super::tree_nodes::{Folder, MergeNode, NONE, NodeKind};
use super::{Merger, number};
use crate::archive_entry::Metadata;
use crate::error::UnpackError;
use crate::permissions::Permissions;
use crate::tree_plan::{
    FolderNumber, LinkNumber, NameRef, OWN_RECORD, PlannedKind, PlannedNode, TreePlan, TreeTotals,
};
use crate::unpack_limits::Limits;
use oci_types::Digest;

struct PlanBuilder {
    nodes: Vec<MergeNode>,
    folders: Vec<Folder>,
    plan: TreePlan,
}

pub(super) fn plan(mut merger: Merger<'_>) -> Result<TreePlan, UnpackError> {
    let part = merger.shown_part()?;
    let Merger { limits, is_everything, sub_path, nodes, mut folders, inodes, .. } = merger;
    let Merger { links, names, blobs, shown, table, .. } = merger;
    drop(table);
    let root = match part {
        ShownPart::Folder(folder) => {
            std::mem::replace(&mut folders[folder as usize].metadata, Metadata::of_implied_folder())
        }
        ShownPart::File(..) => Metadata::of_implied_folder(),
    };
    let mut numbered: Vec<_> = blobs.into_iter().collect();
    numbered.sort_unstable_by_key(|&(_, inode)| inodes[inode as usize].data);
    let blobs: Vec<(Digest, Permissions)> = numbered.into_iter().map(|(blob, _)| blob).collect();
    let plan = TreePlan {
        root,
        nodes: Vec::with_capacity(usize::try_from(shown).unwrap_or_default().min(nodes.len())),
        files: inodes,
        totals: TreeTotals::default(),
        folders: Vec::new(),
        links,
        blobs,
        names,
    };
    let mut planner = PlanBuilder { nodes, folders, plan };
    match part {
        ShownPart::Folder(folder) => planner.folder(folder, None),
        ShownPart::File(inode, name) => planner.file(inode, name),
    }
    let mut plan = planner.plan;
    if plan.nodes.is_empty() {
        return Err(match (is_everything, sub_path.is_root()) {
            (true, true) => UnpackError::Empty,
            (true, false) => {
                UnpackError::SubPath { path: sub_path, problem: SubPathProblem::Empty }
            }
            (false, _) => UnpackError::NothingSelected,
        });
    }
    drop_unlinked(&mut plan);
    plan.totals = totals(&plan, limits)?;
    Ok(plan)
}

impl PlanBuilder {
    /// Plans the content of a folder.
    fn folder(&mut self, folder: u32, parent: Option<u32>) {
        let mut next = self.folders[folder as usize].first;
        while next != NONE {
            let node = &self.nodes[next as usize];
            let MergeNode { name, layer, name_bytes, is_shown, kind, .. } = *node;
            next = node.next;
            let planned = |kind| PlannedNode { parent, kind, name_bytes, layer, name };
            let kind = match kind {
                NodeKind::Directory(number) => {
                    self.node_of_folder(number, planned);
                    continue;
                }
                NodeKind::Removed | NodeKind::Special => continue,
                _ if !is_shown => continue,
                NodeKind::File(inode) => {
                    self.plan.files[inode as usize].links += 1;
                    PlannedKind::File(inode)
                }
                NodeKind::OwnLink => PlannedKind::SymbolicLink(LinkNumber(OWN_RECORD)),
                NodeKind::Link(link) => PlannedKind::SymbolicLink(LinkNumber(link)),
            };
            self.plan.nodes.push(planned(kind));
        }
    }

    /// Plans a file under a name that the plan holds.
    fn file(&mut self, inode: u32, name: NameRef) {
        let held = name.held(&self.plan.names).unwrap_or_default();
        let name_bytes = u8::try_from(held.len()).unwrap_or(u8::MAX);
        self.plan.files[inode as usize].links = 1;
        let kind = PlannedKind::File(inode);
        self.plan.nodes.push(PlannedNode { parent: None, kind, name_bytes, layer: 0, name });
    }

    /// Plans a folder and its content.
    fn node_of_folder(&mut self, folder: u32, planned: impl Fn(PlannedKind) -> PlannedNode) {
        let this = &mut self.folders[folder as usize];
        if this.is_excluded {
            return;
        }
        let is_selected = this.is_selected;
        let metadata = std::mem::replace(&mut this.metadata, Metadata::of_implied_folder());
        let (index, of_folder) = (self.plan.nodes.len(), self.plan.folders.len());
        self.plan.folders.push(metadata);
        let kind = PlannedKind::Directory(FolderNumber(number(of_folder)));
        self.plan.nodes.push(planned(kind));
        self.folder(folder, Some(number(index)));
        // A folder that is not selected itself is shown only for its content.
        if !is_selected && self.plan.nodes.len() == index + 1 {
            self.plan.nodes.pop();
            self.plan.folders.pop();
        }
    }
}

/// Drops files without a selected name.
fn drop_unlinked(plan: &mut TreePlan) {
    if plan.files.iter().all(|file| file.links > 0) {
        return;
    }
    let mut kept = 0;
    let numbers: Vec<u32> = plan
        .files
        .iter()
        .map(|file| {
            let number = kept;
            kept += u32::from(file.links > 0);
            number
        })
        .collect();
    plan.files.retain(|file| file.links > 0);
    plan.files.shrink_to_fit();
    for node in &mut plan.nodes {
        if let PlannedKind::File(file) = &mut node.kind {
            *file = numbers[*file as usize];
        }
    }
}

fn totals(plan: &TreePlan, limits: &Limits) -> Result<TreeTotals, UnpackError> {
    let mut totals = TreeTotals { directories: 1, ..TreeTotals::default() };
    for node in &plan.nodes {
        match node.kind {
            PlannedKind::Directory(_) => totals.directories += 1,
            PlannedKind::SymbolicLink(_) => totals.symbolic_links += 1,
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
