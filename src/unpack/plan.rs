//! A tree as a list of what to make, complete and in order.

use super::entry::Metadata;
use super::permissions::Permissions;
use crate::oci::Digest;

/// A whole tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreePlan {
    /// The root folder.
    pub root: Metadata,
    /// Everything else, parents before children, siblings by name: one order for one tree.
    pub nodes: Vec<PlannedNode>,
    /// What [`PlannedKind::File`] points at, in the order of first appearance in `nodes`.
    pub files: Vec<PlannedFile>,
    /// Sums.
    pub totals: TreeTotals,
}

/// One name in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedNode {
    /// The folder's index in [`TreePlan::nodes`]; none is the root.
    pub parent: Option<u32>,
    /// Neither empty nor with a `/`, neither `.` nor `..`.
    pub name: Box<[u8]>,
    /// What it is.
    pub kind: PlannedKind,
}

/// What a name in the tree is. Boxed, since most nodes are files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlannedKind {
    /// A folder.
    Directory(Box<Metadata>),
    /// A regular file, by its index in [`TreePlan::files`]; hard links share one.
    File(u32),
    /// A symbolic link.
    SymbolicLink {
        /// As written.
        target: Box<[u8]>,
        /// Of the link itself.
        metadata: Box<Metadata>,
    },
}

/// One inode of a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedFile {
    /// Where its content is.
    pub source: Source,
    /// Bytes.
    pub size: u64,
    /// Its names in the tree.
    pub links: u32,
}

/// Where a file's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A file of an unpacked layer.
    Archive {
        /// The layer's number in the manifest.
        layer: u32,
        /// What the sink called it.
        data: u32,
    },
    /// A blob that is a file.
    Blob {
        /// Its digest.
        digest: Digest,
        /// Mode and owner that it is shown with.
        permissions: Permissions,
    },
}

/// Sums of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeTotals {
    /// Of distinct files.
    pub bytes: u64,
    /// Folders with the root, distinct files, symbolic links.
    pub inodes: u64,
    /// Distinct regular files.
    pub files: u64,
    /// Folders, the root included.
    pub directories: u64,
    /// Symbolic links.
    pub symbolic_links: u64,
}
