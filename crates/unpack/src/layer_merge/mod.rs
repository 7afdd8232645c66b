//! Merging: makes the tree that a pod sees from layers' entries and single files, in memory.
//!
//! Layers of images follow the rules of containerd's apply:
//!
//! - An entry goes where its folder's path leads in the tree so far. Symbolic links on the way are
//!   followed, whichever layer made them, and never leave the root: absolute targets start there,
//!   and `..` stays there, as in a container of the image.
//! - Folders that only a path names are made, see [`Metadata::of_implied_folder`].
//! - A folder over a folder changes its metadata; anything else replaces what was there.
//! - Whiteouts and opaque marks hide what lower layers have, wherever they stand in their own
//!   layer. A folder that its own layer still needs stays, as an implied one.
//! - Hard links share the inode that their target has at that moment.
//! - Device nodes and fifos replace what was there, and are not shown.
//!
//! Other artifacts have stricter rules, as in `oras pull`: no entry passes through a symbolic link,
//! the entries of an ORAS folder lie within its title, and a file's title never replaces anything
//! and is never replaced.

mod merged_plan;
mod node_names;
mod planned_parts;
mod sub_path;
mod symlink_walk;
mod tree_nodes;

use std::collections::HashMap;
use std::sync::Arc;

use super::archive_entry::{Entry, EntryKind, Metadata};
use super::error::UnpackError;
use super::layer_rule::{ArchiveRule, FileRule};
use super::path_selection::Selection;
use super::permissions::Permissions;
pub use super::tree_plan::{
    EntryReader, FileSource, PlannedFile, PlannedKind, PlannedLeaf, PlannedNode, TreePlan,
    TreeTotals,
};
use super::tree_plan::{LinkSource, OF_A_BLOB};
use super::unpack_limits::Limits;
use super::volume_path::RelativePath;
use node_names::NameTable;
use oci_types::Digest;
pub use planned_parts::{LAYERS_OF_A_PART, PlannedPart};
pub use sub_path::SubPathProblem;
use symlink_walk::LinkPlace;
use tree_nodes::{Folder, MergeNode, NewNode, NodeKind, NodeName, ROOT};

/// Merges layers in the manifest's order, lowest first.
///
/// For each layer: [`Merger::file`] once, or [`Merger::archive`] and then
/// [`Merger::entry`] or [`Merger::recorded`] for each entry in the order in which it was recorded.
///
/// Each name is matched with the selection when it is added. Names that are not selected are kept
/// only so that later entries can replace, hide or link to them.
pub struct Merger<'a> {
    limits: &'a Limits,
    selection: &'a Selection,
    is_everything: bool,
    /// The folder or file that the plan shows; the root shows everything. The selection matches paths
    /// of the whole tree.
    pub sub_path: RelativePath,
    /// True if a layer is one of an image.
    is_image: bool,
    /// Bytes of memory after which merging fails with [`UnpackError::Memory`].
    pub allowance: u64,
    /// The reader of recorded entries.
    pub records: Option<&'a mut dyn EntryReader>,
    /// Nodes by number. Removed nodes stay until the end.
    nodes: Vec<MergeNode>,
    folders: Vec<Folder>,
    table: NameTable,
    inodes: Vec<PlannedFile>,
    links: Vec<LinkSource>,
    /// Names that are not in a record, each after its length.
    names: Vec<u8>,
    /// Inodes by blob: all titles of one blob share one.
    blobs: HashMap<(Digest, Permissions), u32>,
    /// A cache of the targets of links that were followed.
    targets: Vec<(LinkPlace, Arc<[u8]>)>,
    /// The folder whose path was computed last, with that path.
    last_path: (u32, Vec<u8>),
    input: CurrentLayer,
    entries: u64,
    metadata_bytes: u64,
    link_steps: u64,
    /// Bytes on the heap that nodes and folders own.
    held_bytes: u64,
    /// Bytes of the planned part that is being added.
    part_bytes: u64,
    /// Names that may be part of the plan.
    shown: u64,
}

/// The layer that entries come from.
struct CurrentLayer {
    layer: u32,
    follow_links: bool,
    within: Option<RelativePath>,
}

impl<'a> Merger<'a> {
    /// Creates an empty tree, of which the plan will have the selected part.
    pub fn new(limits: &'a Limits, selection: &'a Selection) -> Self {
        Self {
            limits,
            selection,
            is_everything: selection.is_everything(),
            sub_path: RelativePath::root(),
            is_image: false,
            allowance: u64::MAX,
            records: None,
            nodes: vec![MergeNode::root()],
            folders: vec![Folder::implied(ROOT)],
            table: NameTable::default(),
            inodes: Vec::new(),
            links: Vec::new(),
            names: vec![0],
            blobs: HashMap::new(),
            targets: Vec::new(),
            last_path: (ROOT, Vec::new()),
            input: CurrentLayer { layer: 0, follow_links: false, within: None },
            entries: 0,
            metadata_bytes: 0,
            link_steps: 0,
            held_bytes: 0,
            part_bytes: 0,
            shown: 0,
        }
    }

    /// Returns the bytes of memory that merging a tree of this many entries takes, if it has few
    /// folders. Includes the compiled selection.
    pub fn estimate(entries: u64, selection: &Selection) -> u64 {
        /// Memory for a few folders.
        const LEAST: u64 = 64 << 10;
        let of_name = size_of::<MergeNode>() + 3 * size_of::<u32>();
        let of_file = size_of::<PlannedFile>() + size_of::<u32>();
        let of_shown = if selection.is_everything() { size_of::<PlannedNode>() } else { 0 };
        let of_entries = entries.saturating_mul((of_name + of_file + of_shown) as u64);
        of_entries.saturating_add(LEAST).saturating_add(selection.compiled_bytes())
    }

    /// Adds a blob that is a file, shown with this mode and owner.
    pub fn file(
        &mut self,
        layer: usize,
        rule: &FileRule,
        digest: Digest,
        size: u64,
        permissions: Permissions,
    ) -> Result<(), UnpackError> {
        self.start(layer, false, None);
        self.count()?;
        let path = &rule.path;
        let Some((folder, name)) = path.split() else {
            return Err(UnpackError::RootReplaced { layer });
        };
        let place = self.make_folder(path, &folder)?;
        if let Some(existing) = self.child(place, name) {
            return Err(UnpackError::TitleCollides {
                layer,
                title: path.clone(),
                other: self.nodes[existing as usize].layer as usize,
            });
        }
        let (inodes, blob) = (&mut self.inodes, number(self.blobs.len()));
        let inode = *self.blobs.entry((digest, permissions)).or_insert_with(|| {
            inodes.push(PlannedFile { size, links: 0, layer: OF_A_BLOB, data: blob });
            number(inodes.len() - 1)
        });
        let name = NodeName { text: name, record: None, is_title: true };
        self.insert(path, place, &name, NewNode::File(inode))?;
        self.check_memory()
    }

    /// Starts an archive, above all layers before it.
    pub fn archive(&mut self, layer: usize, rule: &ArchiveRule) {
        self.is_image |= rule.whiteouts;
        self.start(layer, rule.whiteouts, rule.within.clone());
    }

    /// Adds an entry of the archive that was started last.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        self.add(entry, None)
    }

    /// Adds an entry of the archive that was started last, which has a record at this offset of its
    /// layer's index. Neither its name nor a link's target is held in memory.
    pub fn recorded(&mut self, entry: &Entry, offset: u64) -> Result<(), UnpackError> {
        self.add(entry, Some(offset))
    }

    fn add(&mut self, entry: &Entry, record: Option<u64>) -> Result<(), UnpackError> {
        self.count()?;
        self.count_metadata(entry.metadata_bytes())?;
        let path = &entry.path;
        let layer = self.input.layer;
        self.check_within_title(entry)?;
        let Some((folder, name)) = path.split() else {
            match entry.kind {
                EntryKind::Directory => {
                    self.folders[ROOT as usize].metadata = entry.metadata.clone();
                }
                EntryKind::Opaque => self.sweep(ROOT),
                EntryKind::File { .. }
                | EntryKind::SymbolicLink { .. }
                | EntryKind::HardLink { .. }
                | EntryKind::Special
                | EntryKind::Whiteout => {
                    return Err(UnpackError::RootReplaced { layer: layer as usize });
                }
            }
            return Ok(());
        };
        if matches!(entry.kind, EntryKind::Opaque) {
            let place = self.make_folder(path, path)?;
            if let NodeKind::Directory(folder) = self.nodes[place.node as usize].kind {
                self.sweep(folder);
            }
            return self.check_memory();
        }
        let place = self.make_folder(path, &folder)?;
        let name = NodeName { text: name, record, is_title: false };
        let incoming = match &entry.kind {
            EntryKind::Directory => NewNode::Directory(entry.metadata.clone()),
            &EntryKind::File { size, data, checksum: _ } => {
                self.inodes.push(PlannedFile { size, links: 0, layer, data });
                NewNode::File(number(self.inodes.len() - 1))
            }
            EntryKind::SymbolicLink { .. } if record.is_some() => NewNode::OwnLink,
            EntryKind::SymbolicLink { target } => {
                self.held_bytes += (target.len() + size_of::<(Box<[u8]>, Metadata)>()) as u64;
                let link = LinkSource::Held(Box::new((target.clone(), entry.metadata.clone())));
                self.links.push(link);
                NewNode::Link(number(self.links.len() - 1))
            }
            EntryKind::HardLink { target } => self.linked(path, target)?,
            EntryKind::Special => NewNode::Special,
            EntryKind::Whiteout => {
                if let Some(hidden) = self.child(place, name.text)
                    && !self.outlasts_hiding(hidden)
                {
                    self.remove(hidden);
                }
                return self.check_memory();
            }
            EntryKind::Opaque => return Ok(()),
        };
        self.insert(path, place, &name, incoming)?;
        self.check_memory()
    }

    /// Returns the plan of the selected part of the tree.
    pub fn finish(self) -> Result<TreePlan, UnpackError> {
        merged_plan::plan(self)
    }

    fn start(&mut self, layer: usize, follow_links: bool, within: Option<RelativePath>) {
        self.input = CurrentLayer { layer: number(layer), follow_links, within };
    }

    /// Counts an entry or an implied folder: both take memory and an inode.
    fn count(&mut self) -> Result<(), UnpackError> {
        self.entries += 1;
        let limit = self.limits.entries;
        if self.entries > limit { Err(UnpackError::TooManyEntries { limit }) } else { Ok(()) }
    }

    fn count_metadata(&mut self, bytes: u64) -> Result<(), UnpackError> {
        self.metadata_bytes = self.metadata_bytes.saturating_add(bytes);
        let limit = self.limits.metadata_bytes;
        if self.metadata_bytes > limit {
            return Err(UnpackError::TooMuchMetadata { limit });
        }
        Ok(())
    }

    fn check_within_title(&self, entry: &Entry) -> Result<(), UnpackError> {
        let Some(title) = &self.input.within else {
            return Ok(());
        };
        let path = &entry.path;
        // Folders above the title need no metadata of their own.
        let leads_to_it = matches!(entry.kind, EntryKind::Directory) && title.is_within(path);
        let target_is_within = match &entry.kind {
            EntryKind::HardLink { target } => target.is_within(title),
            _ => true,
        };
        if (path.is_within(title) || leads_to_it) && target_is_within {
            return Ok(());
        }
        let (path, title) = (path.clone(), title.clone());
        Err(UnpackError::OutsideTitle { path, layer: self.input.layer as usize, title })
    }

    fn check_memory(&self) -> Result<(), UnpackError> {
        let bytes = self.memory_bytes();
        if bytes > self.allowance {
            return Err(UnpackError::Memory { bytes, entries: self.entries });
        }
        Ok(())
    }

    /// Returns the bytes of memory that may be taken beside the merge so far and a plan of it.
    pub fn memory_left(&self) -> u64 {
        self.allowance.saturating_sub(self.memory_bytes())
    }

    /// Returns the bytes of memory that the merge so far and a plan of it take.
    fn memory_bytes(&self) -> u64 {
        let of = |count: usize, size: usize| count as u64 * size as u64;
        of(self.nodes.len(), size_of::<MergeNode>())
            + of(self.inodes.len(), size_of::<PlannedFile>() + size_of::<u32>())
            + of(self.folders.len(), size_of::<Folder>() + size_of::<Metadata>())
            + of(self.links.len(), size_of::<LinkSource>())
            + of(self.blobs.len(), 2 * size_of::<(Digest, Permissions, u32)>())
            + self.shown * size_of::<PlannedNode>() as u64
            + self.table.memory_bytes()
            + self.names.len() as u64
            + self.held_bytes
            + self.part_bytes
    }
}

/// Converts an index. `limits.layers` and `limits.entries` keep layers, nodes and files far below
/// the maximum.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
