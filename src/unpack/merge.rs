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

use std::collections::{BTreeMap, HashMap};

use super::entry::{Entry, EntryKind, FOLDER_BYTES, Metadata};
use super::error::{UnpackError, shown};
use super::layer_rule::{ArchiveRule, FileRule};
use super::limits::Limits;
use super::path::{PathError, RelativePath};
use super::permissions::Permissions;
pub use super::plan::{PlannedFile, PlannedKind, PlannedNode, Source, TreePlan, TreeTotals};
use super::selection::Selection;
use crate::oci::Digest;

/// Symbolic links on one path, as the kernel bounds them.
const LINKS_ON_A_PATH: usize = 40;
/// Names of symbolic links' targets walked in one merge, for each entry that may be
/// merged: images need two or three where they need any. Without it, long targets
/// that many entries pass through would take hours.
const LINK_STEPS_PER_ENTRY: u64 = 16;

const ROOT: u32 = 0;

/// Merges layers in the manifest's order, lowest first.
///
/// For each layer: [`Merger::file`] once, or [`Merger::archive`] and then
/// [`Merger::entry`] for each entry in the order in which it was recorded.
pub struct Merger<'a> {
    limits: &'a Limits,
    /// Numbered by position; what was removed from the tree stays until the end.
    nodes: Vec<Node>,
    inodes: Vec<PlannedFile>,
    /// One inode for all titles of one blob.
    blobs: HashMap<Source, u32>,
    input: Input,
    entries: u64,
    metadata_bytes: u64,
    link_steps: u64,
}

/// The layer that entries come from.
struct Input {
    layer: u32,
    follow_links: bool,
    within: Option<RelativePath>,
}

struct Node {
    /// The layer that made it what it is.
    layer: u32,
    /// Whether it is a blob with a title.
    is_title: bool,
    kind: NodeKind,
}

/// Boxed, so that a million files stay small.
enum NodeKind {
    Directory(Box<Folder>),
    File(u32),
    SymbolicLink(Box<SymbolicLink>),
}

/// Nodes by name.
type Children = BTreeMap<Box<[u8]>, u32>;

struct Folder {
    metadata: Metadata,
    children: Children,
    /// The last layer that has hidden all that lower layers have here.
    swept: Option<u32>,
}

#[derive(Clone)]
struct SymbolicLink {
    target: Box<[u8]>,
    metadata: Metadata,
}

/// A node in the tree, and where it is.
#[derive(Clone, Copy)]
struct Place {
    node: u32,
    depth: usize,
    path_bytes: usize,
}

/// Names of a path that nothing is at, outermost first.
type MissingNames = Vec<Box<[u8]>>;

impl<'a> Merger<'a> {
    /// An empty tree.
    #[must_use]
    pub fn new(limits: &'a Limits) -> Self {
        let input = Input { layer: 0, follow_links: false, within: None };
        let kind = NodeKind::Directory(Box::new(Folder::implied()));
        let nodes = vec![Node { layer: 0, is_title: false, kind }];
        Self {
            limits,
            nodes,
            inodes: Vec::new(),
            blobs: HashMap::new(),
            input,
            entries: 0,
            metadata_bytes: 0,
            link_steps: 0,
        }
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
        let source = Source::Blob { digest, permissions };
        let inodes = &mut self.inodes;
        let inode = *self.blobs.entry(source).or_insert_with(|| {
            inodes.push(PlannedFile { source, size, links: 0 });
            number(inodes.len() - 1)
        });
        self.insert(path, place, name, NodeKind::File(inode), true)
    }

    /// Starts an archive, above everything before it.
    pub fn archive(&mut self, layer: usize, rule: &ArchiveRule) {
        self.start(layer, rule.whiteouts, rule.within.clone());
    }

    /// Adds an entry of the archive that was started last.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        self.count()?;
        self.count_memory(entry.metadata_bytes())?;
        let path = &entry.path;
        let layer = self.input.layer;
        self.check_within_title(entry)?;
        let metadata = || entry.metadata.clone();
        let Some((folder, name)) = path.split() else {
            match entry.kind {
                EntryKind::Directory => self.folder_mut(ROOT).metadata = metadata(),
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
            self.sweep(place.node);
            return Ok(());
        }
        let place = self.make_folder(path, &folder)?;
        let kind = match &entry.kind {
            EntryKind::Directory => {
                let folder = Folder { metadata: metadata(), ..Folder::implied() };
                NodeKind::Directory(Box::new(folder))
            }
            &EntryKind::File { size, data, checksum: _ } => {
                let source = Source::Archive { layer, data };
                self.inodes.push(PlannedFile { source, size, links: 0 });
                NodeKind::File(number(self.inodes.len() - 1))
            }
            EntryKind::SymbolicLink { target } => {
                let (target, metadata) = (target.clone(), metadata());
                NodeKind::SymbolicLink(Box::new(SymbolicLink { target, metadata }))
            }
            EntryKind::HardLink { target } => self.linked(path, target)?,
            EntryKind::Whiteout => {
                if let Some(hidden) = self.child(place, name)
                    && !self.outlasts_hiding(hidden)
                {
                    self.folder_mut(place.node).children.remove(name);
                }
                return Ok(());
            }
            EntryKind::Opaque => return Ok(()),
        };
        self.insert(path, place, name, kind, false)
    }

    /// The plan of what is selected.
    pub fn finish(self, selection: &Selection) -> Result<TreePlan, UnpackError> {
        finish::plan(self, selection)
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

    fn count_memory(&mut self, bytes: u64) -> Result<(), UnpackError> {
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

    /// Puts a node at a name, where an earlier one may be.
    fn insert(
        &mut self,
        path: &RelativePath,
        place: Place,
        name: &[u8],
        kind: NodeKind,
        is_title: bool,
    ) -> Result<(), UnpackError> {
        self.check_place(path, place, name)?;
        let layer = self.input.layer;
        let Some(existing) = self.child(place, name) else {
            self.nodes.push(Node { layer, is_title, kind });
            let new = number(self.nodes.len() - 1);
            self.folder_mut(place.node).children.insert(name.into(), new);
            return Ok(());
        };
        let node = &mut self.nodes[existing as usize];
        if node.is_title {
            return Err(UnpackError::TitleCollides {
                layer: node.layer as usize,
                title: path.clone(),
                other: layer as usize,
            });
        }
        node.layer = layer;
        match (&mut node.kind, kind) {
            (NodeKind::Directory(old), NodeKind::Directory(new)) => old.metadata = new.metadata,
            (old, new) => *old = new,
        }
        Ok(())
    }

    /// What a hard link becomes: another name of a file, or a symbolic link like its target.
    fn linked(
        &mut self,
        path: &RelativePath,
        target: &RelativePath,
    ) -> Result<NodeKind, UnpackError> {
        let layer = self.input.layer as usize;
        let found = match target.split() {
            Some((folder, name)) => {
                let (place, missing) = self.walk(path, &folder)?;
                if missing.is_empty() { self.child(place, name) } else { None }
            }
            None => None,
        };
        let (path, target) = (path.clone(), target.clone());
        match found.map(|node| &self.nodes[node as usize].kind) {
            None => Err(UnpackError::HardLinkMissing { path, layer, target }),
            Some(NodeKind::Directory(_)) => {
                Err(UnpackError::HardLinkToFolder { path, layer, target })
            }
            Some(&NodeKind::File(inode)) => Ok(NodeKind::File(inode)),
            Some(NodeKind::SymbolicLink(link)) => Ok(NodeKind::SymbolicLink(link.clone())),
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
            self.count_memory(FOLDER_BYTES.saturating_add(name.len() as u64))?;
            let kind = NodeKind::Directory(Box::new(Folder::implied()));
            self.insert(entry, place, &name, kind, false)?;
            place = place.below(number(self.nodes.len() - 1), &name);
        }
        match self.nodes[place.node as usize].kind {
            NodeKind::Directory(_) => Ok(place),
            NodeKind::File(_) | NodeKind::SymbolicLink(_) => {
                Err(self.not_a_folder(entry, place, folder))
            }
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
            let NodeKind::SymbolicLink(link) = &node.kind else {
                way.push(here.below(next, name));
                continue;
            };
            let (path, layer) = (entry.clone(), self.input.layer as usize);
            last_link = shown(name);
            if !self.input.follow_links || node.layer == self.input.layer {
                return Err(UnpackError::ThroughLink { path, layer, link: last_link });
            }
            let before = link_names.len();
            let target = link.target.split(|&byte| byte == b'/').rev();
            let is_name = |name: &&[u8]| !name.is_empty() && *name != b".";
            link_names.extend(target.filter(is_name).map(Box::from));
            if link.target.starts_with(b"/") {
                way.truncate(1);
            }
            links += 1;
            self.link_steps += (link_names.len() - before) as u64;
            let most = self.limits.entries.saturating_mul(LINK_STEPS_PER_ENTRY);
            if links > LINKS_ON_A_PATH || self.link_steps > most {
                return Err(UnpackError::TooManyLinks { path, layer });
            }
        }
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
        let this = self.folder_mut(folder);
        // Everything that came after is of this layer, however often it is marked.
        if this.swept.replace(layer) == Some(layer) {
            return;
        }
        let mut children = std::mem::take(&mut this.children);
        children.retain(|_, child| self.outlasts_hiding(*child));
        self.folder_mut(folder).children = children;
    }

    /// Hides what lower layers have at a node; whether something of this layer remains.
    fn outlasts_hiding(&mut self, node: u32) -> bool {
        let layer = self.input.layer;
        let is_own = self.nodes[node as usize].layer == layer;
        if !matches!(self.nodes[node as usize].kind, NodeKind::Directory(_)) {
            return is_own;
        }
        self.sweep(node);
        if is_own {
            return true;
        }
        let folder = self.folder_mut(node);
        if folder.children.is_empty() {
            return false;
        }
        folder.metadata = Metadata::of_implied_folder();
        self.nodes[node as usize].layer = layer;
        true
    }

    fn child(&self, place: Place, name: &[u8]) -> Option<u32> {
        match &self.nodes[place.node as usize].kind {
            NodeKind::Directory(folder) => folder.children.get(name).copied(),
            NodeKind::File(_) | NodeKind::SymbolicLink(_) => None,
        }
    }

    fn folder_mut(&mut self, node: u32) -> &mut Folder {
        match &mut self.nodes[node as usize].kind {
            NodeKind::Directory(folder) => folder,
            NodeKind::File(_) | NodeKind::SymbolicLink(_) => unreachable!("places are folders"),
        }
    }
}

impl Place {
    fn below(self, node: u32, name: &[u8]) -> Self {
        let path_bytes = self.path_bytes + name.len() + usize::from(self.depth > 0);
        Self { node, depth: self.depth + 1, path_bytes }
    }
}

impl Folder {
    fn implied() -> Self {
        let metadata = Metadata::of_implied_folder();
        Self { metadata, children: BTreeMap::new(), swept: None }
    }
}

/// Layers, nodes and files fit by far: `limits.layers` and `limits.entries` see to it.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
