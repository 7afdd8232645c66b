//! The names of a tree while it is merged: nodes in an array, and lists of them for folders.

use super::node_names::NameHash;
use super::symlink_walk::TreePlace;
use super::{Merger, number};
use crate::archive_entry::Metadata;
use crate::error::UnpackError;
use crate::path_selection::PatternMatch;
use crate::tree_plan::NameRef;
use crate::volume_path::RelativePath;

/// The node of the root folder, and the folder itself.
pub(super) const ROOT: u32 = 0;
/// The end of a list of nodes.
pub(super) const NONE: u32 = u32::MAX;

/// A name in a folder.
pub(super) struct MergeNode {
    pub(super) hash: NameHash,
    pub(super) name: NameRef,
    /// Its folder, by the number in [`Merger::folders`].
    pub(super) parent: u32,
    /// The next node of that folder.
    pub(super) next: u32,
    pub(super) kind: NodeKind,
    /// The layer that made or changed it. For a file or link, the record with its name is there.
    pub(super) layer: u32,
    pub(super) name_bytes: u8,
    /// True if it is a blob with a title.
    pub(super) is_title: bool,
    /// True if it is selected; meaningless for a folder, see [`Folder`].
    pub(super) is_shown: bool,
    /// True if it is in the list of its folder.
    pub(super) is_listed: bool,
}

/// The type of a node.
#[derive(Clone, Copy)]
pub(super) enum NodeKind {
    /// Hidden or removed by a higher layer.
    Removed,
    /// A folder, by its number in [`Merger::folders`], which is never reused.
    Directory(u32),
    /// A file, by its number in [`Merger::inodes`].
    File(u32),
    /// A symbolic link that the record with its name describes.
    OwnLink,
    /// A symbolic link, by its number in [`Merger::links`].
    Link(u32),
    /// A device node or fifo, which is in no plan.
    Special,
}

/// A node that is about to be inserted.
pub(super) enum NewNode {
    Directory(Metadata),
    File(u32),
    OwnLink,
    Link(u32),
    Special,
}

/// A folder with the list of its nodes.
pub(super) struct Folder {
    pub(super) metadata: Metadata,
    /// The node of the folder.
    pub(super) node: u32,
    pub(super) first: u32,
    pub(super) last: u32,
    /// Number of its nodes that are not removed.
    pub(super) live: u32,
    /// The last layer that hid the whole content of lower layers here.
    pub(super) swept: Option<u32>,
    /// True if it or a folder above it is selected.
    pub(super) is_selected: bool,
    /// True if it or a folder above it is excluded.
    pub(super) is_excluded: bool,
}

/// The name of a node that is about to be inserted.
pub(super) struct NodeName<'a> {
    pub(super) text: &'a [u8],
    /// The offset of the record that has the name.
    pub(super) record: Option<u64>,
    pub(super) is_title: bool,
}

impl MergeNode {
    pub(super) fn root() -> Self {
        Self {
            hash: NameHash::default(),
            name: NameRef::held_at(0),
            parent: NONE,
            next: NONE,
            kind: NodeKind::Directory(ROOT),
            layer: 0,
            name_bytes: 0,
            is_title: false,
            is_shown: true,
            is_listed: false,
        }
    }
}

impl Folder {
    pub(super) fn implied(node: u32) -> Self {
        Self {
            metadata: Metadata::of_implied_folder(),
            node,
            first: NONE,
            last: NONE,
            live: 0,
            swept: None,
            is_selected: false,
            is_excluded: false,
        }
    }
}

impl Merger<'_> {
    /// Inserts a node, or replaces the one that has the name. Returns its number.
    pub(super) fn insert(
        &mut self,
        path: &RelativePath,
        place: TreePlace,
        name: &NodeName<'_>,
        incoming: NewNode,
    ) -> Result<u32, UnpackError> {
        self.check_place(path, place, name.text)?;
        let NodeKind::Directory(parent) = self.nodes[place.node as usize].kind else {
            return Err(self.not_a_folder(path, place, path));
        };
        let layer = self.input.layer;
        let hash = self.table.hash(parent, name.text);
        let existing = self.table.find(&self.nodes, hash);
        if let Some(existing) = existing
            && let node = &self.nodes[existing as usize]
            && node.is_title
            && !matches!(node.kind, NodeKind::Removed)
        {
            return Err(UnpackError::TitleCollides {
                layer: node.layer as usize,
                title: path.clone(),
                other: layer as usize,
            });
        }
        let is_folder = matches!(incoming, NewNode::Directory(_));
        let found = self.selected(parent, name.text);
        let index = existing.unwrap_or(number(self.nodes.len()));
        let old = existing.map_or(NodeKind::Removed, |old| self.nodes[old as usize].kind);
        let kind = match (old, incoming) {
            (NodeKind::Directory(folder), NewNode::Directory(metadata)) => {
                self.held_bytes += metadata.extended_attributes.memory() as u64;
                self.folders[folder as usize].metadata = metadata;
                self.nodes[index as usize].layer = layer;
                return Ok(index);
            }
            (_, NewNode::Directory(metadata)) => {
                self.held_bytes += metadata.extended_attributes.memory() as u64;
                let folder = Folder {
                    metadata,
                    is_selected: found.included,
                    is_excluded: found.excluded,
                    ..Folder::implied(index)
                };
                self.folders.push(folder);
                NodeKind::Directory(number(self.folders.len() - 1))
            }
            (_, NewNode::File(inode)) => NodeKind::File(inode),
            (_, NewNode::OwnLink) => NodeKind::OwnLink,
            (_, NewNode::Link(link)) => NodeKind::Link(link),
            (_, NewNode::Special) => NodeKind::Special,
        };
        let is_shown = !found.excluded && (found.included || is_folder);
        self.shown += u64::from(is_shown);
        let reference = match name.record.filter(|_| !is_folder) {
            Some(offset) => NameRef::recorded_at(offset),
            // A name that is never shown is not held: its hash identifies it.
            None if !is_shown => NameRef::held_at(0),
            None => self.hold_name(name.text)?,
        };
        let node = MergeNode {
            hash,
            name: reference,
            parent,
            next: NONE,
            kind,
            layer,
            name_bytes: u8::try_from(name.text.len()).unwrap_or(u8::MAX),
            is_title: name.is_title,
            is_shown,
            is_listed: true,
        };
        let (was_removed, was_listed) = if existing.is_some() {
            let old = &mut self.nodes[index as usize];
            let was = (matches!(old.kind, NodeKind::Removed), old.is_listed);
            *old = MergeNode { next: old.next, ..node };
            was
        } else {
            self.nodes.push(node);
            self.table.insert(&self.nodes, index);
            (true, false)
        };
        self.folders[parent as usize].live += u32::from(was_removed);
        if !was_listed {
            self.append(parent, index);
        }
        Ok(index)
    }

    /// Copies a name into memory.
    pub(super) fn hold_name(&mut self, name: &[u8]) -> Result<NameRef, UnpackError> {
        let too_long = || UnpackError::TooMuchMetadata { limit: self.limits.metadata_bytes };
        let length = u8::try_from(name.len()).map_err(|_| too_long())?;
        let reference = NameRef::held_at(self.names.len());
        self.names.push(length);
        self.names.extend_from_slice(name);
        Ok(reference)
    }

    /// Appends a node to the list of its folder.
    fn append(&mut self, folder: u32, node: u32) {
        let folder = &mut self.folders[folder as usize];
        self.nodes[node as usize].next = NONE;
        match folder.last {
            NONE => folder.first = node,
            last => self.nodes[last as usize].next = node,
        }
        folder.last = node;
    }

    /// Hides a node, which stays in the list of its folder.
    pub(super) fn remove(&mut self, node: u32) {
        let node = &mut self.nodes[node as usize];
        node.kind = NodeKind::Removed;
        self.folders[node.parent as usize].live -= 1;
    }

    /// Matches a name in a folder with the selection, and with what is known of the folder.
    fn selected(&mut self, folder: u32, name: &[u8]) -> PatternMatch {
        if self.is_everything {
            return PatternMatch { included: true, excluded: false };
        }
        let Folder { is_selected, is_excluded, .. } = self.folders[folder as usize];
        if is_excluded {
            return PatternMatch { included: is_selected, excluded: true };
        }
        if self.last_path.0 != folder {
            self.last_path = (folder, self.path_of(folder));
        }
        let path = &mut self.last_path.1;
        let length = path.len();
        if length > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        let found = self.selection.matches(path);
        path.truncate(length);
        PatternMatch { included: is_selected || found.included, ..found }
    }

    pub(super) fn path_of(&self, folder: u32) -> Vec<u8> {
        let (mut names, mut folder) = (Vec::new(), folder);
        while folder != ROOT {
            let node = &self.nodes[self.folders[folder as usize].node as usize];
            names.push(node.name.held(&self.names).unwrap_or_default());
            folder = node.parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// Hides the content that lower layers have in a folder.
    pub(super) fn sweep(&mut self, folder: u32) {
        let layer = self.input.layer;
        let this = &mut self.folders[folder as usize];
        // After the first mark of a layer only its own entries are left.
        if this.swept.replace(layer) == Some(layer) {
            return;
        }
        let mut next = std::mem::replace(&mut this.first, NONE);
        this.last = NONE;
        while next != NONE {
            let child = next;
            let MergeNode { next: after, kind, .. } = self.nodes[child as usize];
            next = after;
            self.nodes[child as usize].is_listed = false;
            if matches!(kind, NodeKind::Removed) {
                continue;
            }
            if self.outlasts_hiding(child) {
                self.nodes[child as usize].is_listed = true;
                self.append(folder, child);
            } else {
                self.remove(child);
            }
        }
    }

    /// Hides what lower layers have at a node. Returns whether something of this layer remains.
    pub(super) fn outlasts_hiding(&mut self, node: u32) -> bool {
        let layer = self.input.layer;
        let is_own = self.nodes[node as usize].layer == layer;
        let NodeKind::Directory(folder) = self.nodes[node as usize].kind else {
            return is_own;
        };
        self.sweep(folder);
        if is_own {
            return true;
        }
        let folder = &mut self.folders[folder as usize];
        if folder.live == 0 {
            return false;
        }
        folder.metadata = Metadata::of_implied_folder();
        self.nodes[node as usize].layer = layer;
        true
    }

    pub(super) fn child(&self, place: TreePlace, name: &[u8]) -> Option<u32> {
        let NodeKind::Directory(folder) = self.nodes[place.node as usize].kind else {
            return None;
        };
        let child = self.table.find(&self.nodes, self.table.hash(folder, name))?;
        let is_there = !matches!(self.nodes[child as usize].kind, NodeKind::Removed);
        is_there.then_some(child)
    }
}
