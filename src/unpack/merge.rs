//! The tree that a pod sees, from layers' entries and single files, in memory.
//!
//! The rules are those of containerd's apply, where an image's layers are concerned:
//!
//! - An entry goes where its folder's path leads in the tree so far. A symbolic link
//!   on the way is followed, inside the root, if a lower layer made it; a link of the
//!   entry's own layer, or one that leads above the root, is refused. (Absolute targets
//!   start at the root, as they do for whoever runs in the image.)
//! - Folders that only a path names are made, see [`Metadata::of_implied_folder`].
//! - A folder over a folder changes its metadata; anything else replaces what was there.
//! - Whiteouts and opaque marks hide what lower layers have, wherever they stand in
//!   their own layer; a folder that its own layer still needs stays, as an implied one.
//! - Hard links share the inode of what their target is at that moment.
//!
//! Artifacts that are not images are stricter, as `oras pull` is: nothing passes
//! through a symbolic link, the entries of an ORAS folder lie within its title, and a
//! file's title never replaces anything and is never replaced.

mod finish;
mod names;

use std::collections::HashMap;
use std::sync::Arc;

use super::entry::{Entry, EntryKind, FOLDER_BYTES, Metadata};
use super::error::{UnpackError, shown};
use super::layer_rule::{ArchiveRule, FileRule};
use super::limits::Limits;
use super::path::{PathError, RelativePath};
use super::permissions::Permissions;
pub use super::plan::{
    EntryReader, NoEntries, PlannedFile, PlannedKind, PlannedLeaf, PlannedNode, Source, TreePlan,
    TreeTotals,
};
use super::plan::{LinkSource, NameRef, OF_A_BLOB};
use super::selection::{Match, Selection};
use crate::oci::Digest;
use names::{NameHash, NameTable};

/// Symbolic links on one path, as the kernel bounds them.
const LINKS_ON_A_PATH: usize = 40;
/// Names of symbolic links' targets walked in one merge, for each entry that may be
/// merged: images need two or three where they need any. Without it, long targets
/// that many entries pass through would take hours.
const LINK_STEPS_PER_ENTRY: u64 = 16;
/// Steps that reading a target from its record counts as: it takes microseconds, and a hostile
/// archive may defeat the cache of targets.
const LINK_STEPS_PER_READ: u64 = 16;
/// Targets of links that are cached: nearly all entries of an image that pass through links pass
/// through the same few.
const TARGETS_KEPT: usize = 32;

const ROOT: u32 = 0;
/// The end of a list of nodes.
const NONE: u32 = u32::MAX;

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
    /// Bytes of memory that merging and planning may take.
    allowance: u64,
    records: Option<&'a mut dyn EntryReader>,
    /// Numbered by position; what was removed from the tree stays until the end.
    nodes: Vec<Node>,
    folders: Vec<Folder>,
    table: NameTable,
    inodes: Vec<PlannedFile>,
    links: Vec<LinkSource>,
    /// Names that are not in a record, each after its length.
    names: Vec<u8>,
    /// One inode for all titles of one blob.
    blobs: HashMap<(Digest, Permissions), u32>,
    /// A cache of the targets of links that were followed.
    targets: Vec<(LinkPlace, Arc<[u8]>)>,
    /// The folder whose path was computed last, with that path.
    last_path: (u32, Vec<u8>),
    input: Input,
    entries: u64,
    metadata_bytes: u64,
    link_steps: u64,
    /// Bytes on the heap that nodes and folders own.
    held_bytes: u64,
    /// Names that may be part of the plan.
    shown: u64,
}

/// The layer that entries come from.
struct Input {
    layer: u32,
    follow_links: bool,
    within: Option<RelativePath>,
}

/// A name in the tree.
struct Node {
    hash: NameHash,
    name: NameRef,
    /// Its folder, by the number in [`Merger::folders`].
    parent: u32,
    /// The next node of that folder.
    next: u32,
    kind: NodeKind,
    /// The layer that made or changed it. For a file or link, the record with its name is there.
    layer: u32,
    name_bytes: u8,
    /// Whether it is a blob with a title.
    is_title: bool,
    /// True if it is selected; meaningless for a folder, see [`Folder`].
    is_shown: bool,
    /// True if it is in the list of its folder.
    is_listed: bool,
}

#[derive(Clone, Copy)]
enum NodeKind {
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
}

/// A node that is about to be inserted.
enum NewNode {
    Directory(Metadata),
    File(u32),
    OwnLink,
    Link(u32),
}

struct Folder {
    metadata: Metadata,
    /// The node of the folder.
    node: u32,
    first: u32,
    last: u32,
    /// Number of its nodes that are not removed.
    live: u32,
    /// The last layer that has hidden all that lower layers have here.
    swept: Option<u32>,
    /// True if it or a folder above it is selected.
    is_selected: bool,
    /// True if it or a folder above it is excluded.
    is_excluded: bool,
}

/// A node in the tree, and where it is.
#[derive(Clone, Copy)]
struct Place {
    node: u32,
    depth: usize,
    path_bytes: usize,
}

/// The place of a symbolic link's record: the layer, and the offset in its index.
type LinkPlace = (u32, u64);

/// Names of a path that nothing is at, outermost first.
type MissingNames = Vec<Box<[u8]>>;

impl<'a> Merger<'a> {
    /// Creates an empty tree, of which the plan will have the selected part.
    #[must_use]
    pub fn new(limits: &'a Limits, selection: &'a Selection) -> Self {
        let root = Node {
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
        };
        Self {
            limits,
            selection,
            is_everything: selection.is_everything(),
            allowance: u64::MAX,
            records: None,
            nodes: vec![root],
            folders: vec![Folder::implied(ROOT)],
            table: NameTable::default(),
            inodes: Vec::new(),
            links: Vec::new(),
            names: vec![0],
            blobs: HashMap::new(),
            targets: Vec::new(),
            last_path: (ROOT, Vec::new()),
            input: Input { layer: 0, follow_links: false, within: None },
            entries: 0,
            metadata_bytes: 0,
            link_steps: 0,
            held_bytes: 0,
            shown: 0,
        }
    }

    /// Sets the bytes of memory after which merging fails with [`UnpackError::Memory`].
    #[must_use]
    pub fn within(self, allowance: u64) -> Self {
        Self { allowance, ..self }
    }

    /// Sets the reader of recorded entries.
    #[must_use]
    pub fn reading(self, records: &'a mut dyn EntryReader) -> Self {
        Self { records: Some(records), ..self }
    }

    /// Returns the bytes of memory that merging a tree of so many entries takes, if it has few
    /// folders.
    #[must_use]
    pub fn estimate(entries: u64, selection: &Selection) -> u64 {
        /// Bytes for a few folders.
        const LEAST: u64 = 64 << 10;
        let of_name = size_of::<Node>() + 3 * size_of::<u32>();
        let of_file = size_of::<PlannedFile>() + size_of::<u32>();
        let of_shown = if selection.is_everything() { size_of::<PlannedNode>() } else { 0 };
        entries.saturating_mul((of_name + of_file + of_shown) as u64).saturating_add(LEAST)
    }

    /// Adds a blob that is a file, with the mode and owner that it is to be shown with.
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

    /// Starts an archive, above everything before it.
    pub fn archive(&mut self, layer: usize, rule: &ArchiveRule) {
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

    /// The plan of what is selected.
    pub fn finish(self) -> Result<TreePlan, UnpackError> {
        finish::plan(self)
    }

    fn start(&mut self, layer: usize, follow_links: bool, within: Option<RelativePath>) {
        self.input = Input { layer: number(layer), follow_links, within };
    }

    /// Entries and implied folders alike: both take memory and an inode.
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
        // The folders above it say nothing of their own.
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

    /// Returns the bytes of memory that merging so far and a plan of it take.
    fn memory_bytes(&self) -> u64 {
        let of = |count: usize, size: usize| count as u64 * size as u64;
        of(self.nodes.len(), size_of::<Node>())
            + of(self.inodes.len(), size_of::<PlannedFile>() + size_of::<u32>())
            + of(self.folders.len(), size_of::<Folder>() + size_of::<Metadata>())
            + of(self.links.len(), size_of::<LinkSource>())
            + of(self.blobs.len(), 2 * size_of::<(Digest, Permissions, u32)>())
            + self.shown * size_of::<PlannedNode>() as u64
            + self.table.memory_bytes()
            + self.names.len() as u64
            + self.held_bytes
    }

    /// Inserts a node, or replaces the one that has the name. Returns its number.
    fn insert(
        &mut self,
        path: &RelativePath,
        place: Place,
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
        };
        let is_shown = !found.excluded && (found.included || is_folder);
        self.shown += u64::from(is_shown);
        let reference = match name.record.filter(|_| !is_folder) {
            Some(offset) => NameRef::recorded_at(offset),
            // A name that is never shown is not held: its hash identifies it.
            None if !is_shown => NameRef::held_at(0),
            None => self.hold_name(name.text)?,
        };
        let node = Node {
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
            *old = Node { next: old.next, ..node };
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
    fn hold_name(&mut self, name: &[u8]) -> Result<NameRef, UnpackError> {
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
    fn remove(&mut self, node: u32) {
        let node = &mut self.nodes[node as usize];
        node.kind = NodeKind::Removed;
        self.folders[node.parent as usize].live -= 1;
    }

    /// Matches a name in a folder with the selection, and with what is known of the folder.
    fn selected(&mut self, folder: u32, name: &[u8]) -> Match {
        if self.is_everything {
            return Match { included: true, excluded: false };
        }
        let Folder { is_selected, is_excluded, .. } = self.folders[folder as usize];
        if is_excluded {
            return Match { included: is_selected, excluded: true };
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
        Match { included: is_selected || found.included, ..found }
    }

    fn path_of(&self, folder: u32) -> Vec<u8> {
        let (mut names, mut folder) = (Vec::new(), folder);
        while folder != ROOT {
            let node = &self.nodes[self.folders[folder as usize].node as usize];
            names.push(node.name.held(&self.names).unwrap_or_default());
            folder = node.parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// What a hard link becomes: another name of a file, or a symbolic link like its target.
    fn linked(
        &mut self,
        path: &RelativePath,
        target: &RelativePath,
    ) -> Result<NewNode, UnpackError> {
        let layer = self.input.layer as usize;
        let found = match target.split() {
            Some((folder, name)) => {
                let (place, missing) = self.walk(path, &folder)?;
                if missing.is_empty() { self.child(place, name) } else { None }
            }
            None => None,
        };
        let (path, target) = (path.clone(), target.clone());
        let Some(found) = found.map(|node| &self.nodes[node as usize]) else {
            return Err(UnpackError::HardLinkMissing { path, layer, target });
        };
        match (found.kind, found.name.record()) {
            (NodeKind::Directory(_), _) => {
                Err(UnpackError::HardLinkToFolder { path, layer, target })
            }
            (NodeKind::File(inode), _) => Ok(NewNode::File(inode)),
            (NodeKind::Link(link), _) => Ok(NewNode::Link(link)),
            (NodeKind::OwnLink, Some(offset)) => {
                self.links.push(LinkSource::Recorded { layer: found.layer, offset });
                Ok(NewNode::Link(number(self.links.len() - 1)))
            }
            (NodeKind::OwnLink | NodeKind::Removed, _) => {
                Err(UnpackError::HardLinkMissing { path, layer, target })
            }
        }
    }

    /// The folder that a path leads to, made where it is missing.
    fn make_folder(
        &mut self,
        entry: &RelativePath,
        folder: &RelativePath,
    ) -> Result<Place, UnpackError> {
        let (mut place, missing) = self.walk(entry, folder)?;
        for name in missing {
            if let NodeKind::File(_) = self.nodes[place.node as usize].kind {
                return Err(self.not_a_folder(entry, place, folder));
            }
            self.count()?;
            self.count_metadata(FOLDER_BYTES.saturating_add(name.len() as u64))?;
            let made = NodeName { text: &name, record: None, is_title: false };
            let implied = NewNode::Directory(Metadata::of_implied_folder());
            place = place.below(self.insert(entry, place, &made, implied)?, &name);
        }
        match self.nodes[place.node as usize].kind {
            NodeKind::Directory(_) => Ok(place),
            _ => Err(self.not_a_folder(entry, place, folder)),
        }
    }

    /// Walks a path through the links that may be followed: how far it exists, which
    /// may be at a file, and the names of what is missing from there.
    fn walk(
        &mut self,
        entry: &RelativePath,
        folder: &RelativePath,
    ) -> Result<(Place, MissingNames), UnpackError> {
        let root = Place { node: ROOT, depth: 0, path_bytes: 0 };
        let mut way = vec![root];
        let mut missing = Vec::new();
        let mut names = folder.components();
        // Names of links' targets, the next one last: they come before the rest of the path.
        let mut link_names: Vec<Box<[u8]>> = Vec::new();
        let mut links = 0;
        let mut last_link = String::new();
        loop {
            let from_link = link_names.pop();
            let Some(name) = from_link.as_deref().or_else(|| names.next()) else {
                return Ok((*way.last().unwrap_or(&root), missing));
            };
            if name == b".." {
                if missing.pop().is_none() {
                    way.pop();
                }
                if way.is_empty() {
                    return Err(UnpackError::LeavesRoot {
                        path: entry.clone(),
                        layer: self.input.layer as usize,
                        link: last_link,
                    });
                }
                continue;
            }
            let here = *way.last().unwrap_or(&root);
            let next = self.child(here, name).filter(|_| missing.is_empty());
            let Some(next) = next else {
                missing.push(name.into());
                continue;
            };
            let node = &self.nodes[next as usize];
            if !matches!(node.kind, NodeKind::OwnLink | NodeKind::Link(_)) {
                way.push(here.below(next, name));
                continue;
            }
            let (path, layer) = (entry.clone(), self.input.layer as usize);
            last_link = shown(name);
            if !self.input.follow_links || node.layer == self.input.layer {
                return Err(UnpackError::ThroughLink { path, layer, link: last_link });
            }
            let before = link_names.len();
            let target = self.target(next)?;
            let names_of_target = target.split(|&byte| byte == b'/').rev();
            let is_name = |name: &&[u8]| !name.is_empty() && *name != b".";
            link_names.extend(names_of_target.filter(is_name).map(Box::from));
            if target.starts_with(b"/") {
                way.truncate(1);
            }
            links += 1;
            // A link to its own folder or to the root has no names, and still takes a step.
            self.link_steps += 1 + (link_names.len() - before) as u64;
            let most = self.limits.entries.saturating_mul(LINK_STEPS_PER_ENTRY);
            if links > LINKS_ON_A_PATH || self.link_steps > most {
                return Err(UnpackError::TooManyLinks { path, layer });
            }
        }
    }

    /// Returns the target of a symbolic link, which is read from its record if it is not held.
    fn target(&mut self, node: u32) -> Result<Arc<[u8]>, UnpackError> {
        let node = &self.nodes[node as usize];
        let link = match node.kind {
            NodeKind::Link(link) => Some(&self.links[link as usize]),
            _ => None,
        };
        let (layer, offset) = match (link, node.name.record()) {
            (Some(LinkSource::Held(link)), _) => return Ok(Arc::from(&*link.0)),
            (Some(&LinkSource::Recorded { layer, offset }), _) => (layer, offset),
            (None, Some(offset)) => (node.layer, offset),
            (None, None) => return Err(UnpackError::Read(std::io::ErrorKind::NotFound.into())),
        };
        if let Some((_, target)) = self.targets.iter().find(|(of, _)| *of == (layer, offset)) {
            return Ok(Arc::clone(target));
        }
        self.link_steps += LINK_STEPS_PER_READ;
        let records = self.records.as_mut();
        let read = records.map(|records| records.read(layer, offset)).transpose();
        let target: Arc<[u8]> = match read.map_err(UnpackError::Read)?.map(|entry| entry.kind) {
            Some(EntryKind::SymbolicLink { target }) => target.into(),
            _ => return Err(UnpackError::Read(std::io::ErrorKind::InvalidData.into())),
        };
        if self.targets.len() == TARGETS_KEPT {
            self.targets.remove(0);
        }
        self.targets.push(((layer, offset), Arc::clone(&target)));
        Ok(target)
    }

    /// Following links may lead deeper than any entry's own path.
    fn check_place(
        &self,
        path: &RelativePath,
        place: Place,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let limits = self.limits;
        let length = place.below(ROOT, name).path_bytes;
        let reason = if place.depth >= limits.depth {
            PathError::TooDeep { limit: limits.depth }
        } else if length > limits.path_bytes {
            PathError::TooLong { length, limit: limits.path_bytes }
        } else if name.len() > limits.name_bytes {
            // A name of a link's target, which is only text until it is walked.
            PathError::NameTooLong { length: name.len(), limit: limits.name_bytes }
        } else {
            return Ok(());
        };
        let (path, layer) = (path.clone(), self.input.layer as usize);
        Err(UnpackError::Place { path, layer, reason })
    }

    fn not_a_folder(
        &self,
        entry: &RelativePath,
        place: Place,
        folder: &RelativePath,
    ) -> UnpackError {
        // Where no link was followed, the file is one of the path's own names.
        let names: Vec<_> = folder.components().take(place.depth).collect();
        UnpackError::NotAFolder {
            path: entry.clone(),
            layer: self.input.layer as usize,
            name: shown(&names.join(&b'/')),
        }
    }

    /// Hides what lower layers have in a folder.
    fn sweep(&mut self, folder: u32) {
        let layer = self.input.layer;
        let this = &mut self.folders[folder as usize];
        // Everything that came after is of this layer, however often it is marked.
        if this.swept.replace(layer) == Some(layer) {
            return;
        }
        let mut next = std::mem::replace(&mut this.first, NONE);
        this.last = NONE;
        while next != NONE {
            let child = next;
            let Node { next: after, kind, .. } = self.nodes[child as usize];
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

    /// Hides what lower layers have at a node; whether something of this layer remains.
    fn outlasts_hiding(&mut self, node: u32) -> bool {
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

    fn child(&self, place: Place, name: &[u8]) -> Option<u32> {
        let NodeKind::Directory(folder) = self.nodes[place.node as usize].kind else {
            return None;
        };
        let child = self.table.find(&self.nodes, self.table.hash(folder, name))?;
        let is_there = !matches!(self.nodes[child as usize].kind, NodeKind::Removed);
        is_there.then_some(child)
    }
}

/// The name of a node that is about to be inserted.
struct NodeName<'a> {
    text: &'a [u8],
    /// The offset of the record that has the name.
    record: Option<u64>,
    is_title: bool,
}

impl Place {
    fn below(self, node: u32, name: &[u8]) -> Self {
        let path_bytes = self.path_bytes + name.len() + usize::from(self.depth > 0);
        Self { node, depth: self.depth + 1, path_bytes }
    }
}

impl Folder {
    fn implied(node: u32) -> Self {
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

/// Layers, nodes and files fit by far: `limits.layers` and `limits.entries` see to it.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
