//! Merging trees that are planned already: the artifacts of one volume, each below its own folder.
//!
//! Folders of the same name are merged, and the later one's metadata counts. No other name is ever
//! replaced. The folder of a part's path belongs to that part alone.

use super::symlink_walk::TreePlace;
use super::tree_nodes::{NewNode, NodeKind, NodeName, ROOT};
use super::{Merger, number};
use crate::archive_entry::{FOLDER_BYTES, Metadata};
use crate::error::UnpackError;
use crate::tree_plan::{
    EntryReader, LinkSource, OF_A_BLOB, OWN_RECORD, PlannedFile, PlannedKind, PlannedLeaf,
    PlannedNode, TreePlan,
};
use crate::volume_path::RelativePath;

/// The layers of a part have numbers from its own number times this: `limits.layers` is not larger.
pub const LAYERS_OF_A_PART: u32 = 1 << 20;

/// A planned tree that becomes part of another one.
pub struct PlannedPart<'a> {
    /// Number of the part, from 0.
    pub number: u32,
    /// Folder of its root.
    pub path: &'a RelativePath,
    /// The planned tree of the part.
    pub plan: &'a TreePlan,
}

impl Merger<'_> {
    /// Adds a part.
    pub fn part(
        &mut self,
        part: &PlannedPart<'_>,
        records: &mut dyn EntryReader,
    ) -> Result<(), UnpackError> {
        let PlannedPart { number: part, path, plan } = *part;
        let first = part * LAYERS_OF_A_PART;
        self.part_bytes =
            plan.memory_bytes() + (plan.files.len() * size_of::<Option<u32>>()) as u64;
        let mut inodes = vec![None; plan.files.len()];
        let mut way = vec![(None, self.root_of_part(first, path, &plan.root)?)];
        for (number, node) in (0..).zip(&plan.nodes) {
            self.count()?;
            while way.len() > 1 && way.last().is_some_and(|(folder, _)| *folder != node.parent) {
                way.pop();
            }
            let Some(&(_, place)) = way.last() else { break };
            if let PlannedKind::Directory(folder) = node.kind {
                let name = plan.held_name(node);
                let metadata = plan.folder(folder);
                let bytes = FOLDER_BYTES + metadata.extended_attributes.memory() as u64;
                self.count_metadata(bytes + name.len() as u64)?;
                let made = NewNode::Directory(metadata.clone());
                let name = NodeName { text: name, record: None, is_title: false };
                let folder = self.add_name(first + node.layer, place, &name, made)?;
                way.push((Some(number), place.below(folder, name.text)));
            } else {
                let PlannedLeaf { name, .. } =
                    plan.leaf(node, records).map_err(UnpackError::Read)?;
                let leaf = self.leaf_of_part(first, plan, node, &mut inodes);
                let name = NodeName { text: &name, record: node.name.record(), is_title: true };
                self.refuse_child(first, place, name.text)?;
                self.add_name(first + node.layer, place, &name, leaf)?;
            }
            self.check_memory()?;
        }
        self.part_bytes = 0;
        Ok(())
    }

    /// Returns the folder of a part's root, made with the folders above it.
    fn root_of_part(
        &mut self,
        first: u32,
        path: &RelativePath,
        metadata: &Metadata,
    ) -> Result<TreePlace, UnpackError> {
        let mut place = TreePlace::root();
        let Some((above, name)) = path.split() else {
            self.folders[ROOT as usize].metadata = metadata.clone();
            return Ok(place);
        };
        for name in above.components() {
            let existing = self.child(place, name);
            let existing = existing.filter(|&child| {
                let node = &self.nodes[child as usize];
                matches!(node.kind, NodeKind::Directory(_)) && !node.is_title
            });
            let folder = if let Some(folder) = existing {
                folder
            } else {
                self.refuse_child(first, place, name)?;
                let name = NodeName { text: name, record: None, is_title: false };
                let implied = NewNode::Directory(Metadata::of_implied_folder());
                self.count()?;
                self.add_name(first, place, &name, implied)?
            };
            place = place.below(folder, name);
        }
        self.refuse_child(first, place, name)?;
        // Nothing may replace it, and no other part has anything in it.
        let made = NodeName { text: name, record: None, is_title: true };
        self.count()?;
        let folder = self.add_name(first, place, &made, NewNode::Directory(metadata.clone()))?;
        Ok(place.below(folder, name))
    }

    /// Returns the node of a file or symbolic link. All names of a file share one inode.
    fn leaf_of_part(
        &mut self,
        first: u32,
        plan: &TreePlan,
        node: &PlannedNode,
        inodes: &mut [Option<u32>],
    ) -> NewNode {
        match node.kind {
            PlannedKind::File(file) => {
                NewNode::File(*inodes[file as usize].get_or_insert_with(|| {
                    let PlannedFile { size, layer, data, .. } = plan.files[file as usize];
                    let mut add = |layer, data| {
                        self.inodes.push(PlannedFile { size, links: 0, layer, data });
                        number(self.inodes.len() - 1)
                    };
                    if layer != OF_A_BLOB {
                        return add(first + layer, data);
                    }
                    let next = number(self.blobs.len());
                    *self
                        .blobs
                        .entry(plan.blobs[data as usize])
                        .or_insert_with(|| add(OF_A_BLOB, next))
                }))
            }
            PlannedKind::SymbolicLink(link) if link.0 == OWN_RECORD => NewNode::OwnLink,
            PlannedKind::SymbolicLink(link) => {
                let link = match &plan.links[link.0 as usize] {
                    LinkSource::Held(link) => {
                        self.held_bytes += (link.0.len() + size_of::<Metadata>()) as u64;
                        LinkSource::Held(link.clone())
                    }
                    &LinkSource::Recorded { layer, offset } => {
                        LinkSource::Recorded { layer: first + layer, offset }
                    }
                };
                self.links.push(link);
                NewNode::Link(number(self.links.len() - 1))
            }
            PlannedKind::Directory(_) => NewNode::Special,
        }
    }

    fn add_name(
        &mut self,
        layer: u32,
        place: TreePlace,
        name: &NodeName<'_>,
        node: NewNode,
    ) -> Result<u32, UnpackError> {
        self.input.layer = layer;
        // Its path is needed for errors alone.
        let added = self.insert(&RelativePath::root(), place, name, node);
        added.map_err(|error| match error {
            UnpackError::TitleCollides { layer: other, .. } => {
                self.collision(number(other), layer, place, name.text)
            }
            UnpackError::Place { reason, .. } => {
                let path = self.shown_path(place, name.text);
                UnpackError::PartPlace { path, part: part_of(layer), reason }
            }
            error => error,
        })
    }

    /// Refuses a name that a part would give to what has it already.
    fn refuse_child(&self, layer: u32, place: TreePlace, name: &[u8]) -> Result<(), UnpackError> {
        match self.child(place, name) {
            None => Ok(()),
            Some(child) => {
                Err(self.collision(self.nodes[child as usize].layer, layer, place, name))
            }
        }
    }

    fn collision(&self, one: u32, two: u32, place: TreePlace, name: &[u8]) -> UnpackError {
        let path = self.shown_path(place, name);
        UnpackError::PartsCollide { path, one: part_of(one), two: part_of(two) }
    }

    fn shown_path(&self, place: TreePlace, name: &[u8]) -> RelativePath {
        let folder = match self.nodes[place.node as usize].kind {
            NodeKind::Directory(folder) => self.path_of(folder),
            _ => Vec::new(),
        };
        RelativePath::of_names(&[&folder, name])
    }
}

fn part_of(layer: u32) -> usize {
    (layer / LAYERS_OF_A_PART) as usize
}
