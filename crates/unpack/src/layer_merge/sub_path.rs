//! The attribute `subPath`: the folder or file of a merged tree that a volume shows.

use std::fmt;

use super::Merger;
use super::tree_nodes::{NONE, NodeKind, ROOT};
use crate::error::{UnpackError, shown};
use crate::tree_plan::NameRef;
use crate::volume_path::RelativePath;

/// Names of a folder in an error.
const NAMES_SHOWN: usize = 8;

/// The part of a tree that is planned.
pub(super) enum ShownPart {
    /// The content of a folder, by its number.
    Folder(u32),
    /// A file, by its number in [`Merger::inodes`], under this name.
    File(u32, NameRef),
}

/// Reason why a volume cannot show a `subPath`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SubPathProblem {
    /// Nothing has this path.
    Missing {
        /// The deepest folder on the way, escaped for display.
        folder: String,
        /// Some names in it, escaped for display.
        names: Vec<String>,
        /// The number of its other names.
        more: usize,
    },
    /// A name on the way is a file, or the path is that of a device.
    NotAFolder,
    /// A name of the path is a symbolic link that is not followed, escaped for display.
    Link(String),
    /// The path leads through too many symbolic links.
    TooManyLinks,
    /// The folder has no content.
    Empty,
}

impl fmt::Display for SubPathProblem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { folder, names, .. } if names.is_empty() => {
                write!(formatter, "which the artifact does not have: nothing is in \"{folder}\"")
            }
            Self::Missing { folder, names, more } => {
                let names = names.join(", ");
                write!(formatter, "which the artifact does not have: in \"{folder}\" is {names}")?;
                if *more > 0 { write!(formatter, " and {more} more") } else { Ok(()) }
            }
            Self::NotAFolder => formatter.write_str("which leads to or through what is no folder"),
            Self::Link(name) => write!(
                formatter,
                "and \"{name}\" is a symbolic link, which is followed in images only: write the path that it leads to"
            ),
            Self::TooManyLinks => {
                formatter.write_str("which leads through too many symbolic links")
            }
            Self::Empty => formatter.write_str("which is an empty folder"),
        }
    }
}

impl SubPathProblem {
    /// Returns the problem of a path that none of these paths is at or below.
    pub(crate) fn missing_among<'a>(
        path: &RelativePath,
        others: impl Iterator<Item = &'a RelativePath> + Clone,
    ) -> Self {
        let folders = path.ancestors().filter(|folder| {
            others.clone().any(|other| other != folder && other.is_within(folder))
        });
        let folder = folders.last().unwrap_or_default();
        let depth = folder.components().count();
        let below = others.filter(|other| other.is_within(&folder));
        let mut names: Vec<_> =
            below.filter_map(|other| other.components().nth(depth).map(shown)).collect();
        names.sort();
        names.dedup();
        Self::missing(&folder, names)
    }

    fn missing(folder: &RelativePath, mut names: Vec<String>) -> Self {
        let more = names.len().saturating_sub(NAMES_SHOWN);
        names.truncate(NAMES_SHOWN);
        let folder = if folder.is_root() { ".".to_owned() } else { shown(folder.as_bytes()) };
        Self::Missing { folder, names, more }
    }
}

impl Merger<'_> {
    /// Finds the part that is shown. Links are followed in images alone.
    pub(super) fn shown_part(&mut self) -> Result<ShownPart, UnpackError> {
        let path = self.sub_path.clone();
        let Some((_, name)) = path.split() else { return Ok(ShownPart::Folder(ROOT)) };
        if self.nodes.len() == 1 && !self.is_everything {
            // All layers were left out, and what they have is not known.
            return Err(UnpackError::NothingSelected);
        }
        self.input.follow_links = self.is_image;
        let refused = |problem| UnpackError::SubPath { path: path.clone(), problem };
        let (place, missing) = self.walk(&path, &path).map_err(|error| match error {
            UnpackError::ThroughLink { link, .. } => refused(SubPathProblem::Link(link)),
            UnpackError::TooManyLinks { .. } => refused(SubPathProblem::TooManyLinks),
            error => error,
        })?;
        let node = &self.nodes[place.node as usize];
        let is_shown = node.is_shown;
        match node.kind {
            NodeKind::Directory(folder) if missing.is_empty() => Ok(ShownPart::Folder(folder)),
            NodeKind::Directory(folder) => {
                let (path_of_folder, names) = (self.path_of(folder), self.names_in(folder)?);
                let folder = RelativePath::of_names(&[&path_of_folder]);
                Err(refused(SubPathProblem::missing(&folder, names)))
            }
            NodeKind::File(inode) if missing.is_empty() => {
                if !is_shown {
                    return Err(UnpackError::NothingSelected);
                }
                Ok(ShownPart::File(inode, self.hold_name(name)?))
            }
            _ => Err(refused(SubPathProblem::NotAFolder)),
        }
    }

    /// Returns the names in a folder, escaped for display.
    fn names_in(&mut self, folder: u32) -> Result<Vec<String>, UnpackError> {
        let mut names = Vec::new();
        let mut next = self.folders[folder as usize].first;
        while next != NONE {
            let node = &self.nodes[next as usize];
            next = node.next;
            if matches!(node.kind, NodeKind::Removed | NodeKind::Special) {
                continue;
            }
            // Names beyond these are only counted.
            let read = names.len() < NAMES_SHOWN;
            names.push(match (node.name.record(), &mut self.records) {
                (Some(offset), Some(records)) if read => {
                    let entry = records.read(node.layer, offset).map_err(UnpackError::Read)?;
                    entry.path.split().map(|(_, name)| shown(name)).unwrap_or_default()
                }
                _ => node.name.held(&self.names).map(shown).unwrap_or_default(),
            });
        }
        Ok(names)
    }
}
