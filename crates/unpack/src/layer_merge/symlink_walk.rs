//! Paths in the tree, through symbolic links and inside the root.

use std::sync::Arc;

use super::tree_nodes::{NewNode, NodeKind, NodeName, ROOT};
use super::{Merger, number};
use crate::archive_entry::{EntryKind, FOLDER_BYTES, Metadata};
use crate::error::{UnpackError, shown};
use crate::tree_plan::LinkSource;
use crate::volume_path::{PathError, RelativePath};

/// Symbolic links on one path, as the kernel bounds them.
pub(super) const LINKS_ON_A_PATH: usize = 40;
/// Steps through targets of symbolic links in one merge, for each entry that may be merged: one for
/// each link that is followed and for each name of its target. Images need three or four where they
/// need any. Without a bound, long targets that many entries pass through would take hours.
const LINK_STEPS_PER_ENTRY: u64 = 16;
/// Steps for reading a target from its record, which takes microseconds: a hostile archive may defeat
/// the cache of targets.
const LINK_STEPS_PER_READ: u64 = 16;
/// Targets of links that are cached: nearly all entries of an image that pass through links pass
/// through the same few.
const TARGETS_KEPT: usize = 32;

/// A node in the tree, and where it is.
#[derive(Clone, Copy)]
pub(super) struct TreePlace {
    pub(super) node: u32,
    depth: usize,
    path_bytes: usize,
}

/// The place of a symbolic link's record: the layer, and the offset in its index.
pub(super) type LinkPlace = (u32, u64);

/// Names of a path that nothing is at, outermost first.
type MissingNames = Vec<Box<[u8]>>;

impl TreePlace {
    pub(super) const fn root() -> Self {
        Self { node: ROOT, depth: 0, path_bytes: 0 }
    }

    pub(super) fn below(self, node: u32, name: &[u8]) -> Self {
        let path_bytes = self.path_bytes + name.len() + usize::from(self.depth > 0);
        Self { node, depth: self.depth + 1, path_bytes }
    }
}

impl Merger<'_> {
    /// Returns the node for a hard link: another name of a file, or a symbolic link like its target.
    pub(super) fn linked(
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
            (NodeKind::Special, _) => Ok(NewNode::Special),
            (NodeKind::OwnLink, Some(offset)) => {
                self.links.push(LinkSource::Recorded { layer: found.layer, offset });
                Ok(NewNode::Link(number(self.links.len() - 1)))
            }
            (NodeKind::OwnLink | NodeKind::Removed, _) => {
                Err(UnpackError::HardLinkMissing { path, layer, target })
            }
        }
    }

    /// Returns the folder that a path leads to, made where it is missing.
    pub(super) fn make_folder(
        &mut self,
        entry: &RelativePath,
        folder: &RelativePath,
    ) -> Result<TreePlace, UnpackError> {
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

    /// Walks a path through the links that may be followed. Returns how far it exists, which may be
    /// at a file, and the names that are missing from there.
    pub(super) fn walk(
        &mut self,
        entry: &RelativePath,
        folder: &RelativePath,
    ) -> Result<(TreePlace, MissingNames), UnpackError> {
        let root = TreePlace::root();
        let mut way = vec![root];
        let mut missing = Vec::new();
        let mut names = folder.components();
        // Names of links' targets, the next one last: they come before the rest of the path.
        let mut link_names: Vec<Box<[u8]>> = Vec::new();
        let mut links = 0;
        loop {
            let from_link = link_names.pop();
            let Some(name) = from_link.as_deref().or_else(|| names.next()) else {
                return Ok((*way.last().unwrap_or(&root), missing));
            };
            if name == b".." {
                // The folder above the root is the root.
                if missing.pop().is_none() && way.len() > 1 {
                    way.pop();
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
            if !self.input.follow_links {
                return Err(UnpackError::ThroughLink { path, layer, link: shown(name) });
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
            // A link to its own folder or to the root has no names, and takes a step all the same.
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

    /// Checks the limits of a place, since links may lead deeper than any entry's own path.
    pub(super) fn check_place(
        &self,
        path: &RelativePath,
        place: TreePlace,
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

    pub(super) fn not_a_folder(
        &self,
        entry: &RelativePath,
        place: TreePlace,
        folder: &RelativePath,
    ) -> UnpackError {
        // Without a link, the file is one of the path's own names.
        let names: Vec<_> = folder.components().take(place.depth).collect();
        UnpackError::NotAFolder {
            path: entry.clone(),
            layer: self.input.layer as usize,
            name: shown(&names.join(&b'/')),
        }
    }
}
