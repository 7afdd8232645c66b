//! Plans of trees: complete, ordered lists of the nodes to create.
//!
//! A plan of a million names fits into a hundred mebibytes. The names of files and symbolic links,
//! and the targets and metadata of links, stay in the indexes of the layers. They are read there
//! again when the tree is made ([`EntryReader`]).

use std::borrow::Cow;
use std::io;

use super::archive_entry::{Entry, EntryKind, Metadata};
use super::permissions::Permissions;
use oci_types::Digest;

/// Plan of a whole tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreePlan {
    /// Metadata of the root folder.
    pub root: Metadata,
    /// All other names. Parents precede children, and the names of a folder are contiguous.
    pub nodes: Vec<PlannedNode>,
    /// Files that [`PlannedKind::File`] points at.
    pub files: Vec<PlannedFile>,
    /// Counts and sizes of the tree.
    pub totals: TreeTotals,
    /// Folders below the root, in their order in `nodes`.
    pub(super) folders: Vec<Metadata>,
    /// Symbolic links that the node's own record does not describe.
    pub(super) links: Vec<LinkSource>,
    /// Blobs that are single files.
    pub(super) blobs: Vec<(Digest, Permissions)>,
    /// Names that are not in a record, each after its length.
    pub(super) names: Vec<u8>,
}

/// One name in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedNode {
    /// Index of the folder in [`TreePlan::nodes`]; `None` for the root.
    pub parent: Option<u32>,
    /// Type of the node.
    pub kind: PlannedKind,
    /// Length of its name in bytes.
    pub name_bytes: u8,
    /// The layer of the record that has its name.
    pub(super) layer: u32,
    pub(super) name: NameRef,
}

/// The type of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlannedKind {
    /// A folder below the root.
    Directory(FolderNumber),
    /// A regular file, by its index in [`TreePlan::files`]; hard links share one index.
    File(u32),
    /// A symbolic link, with its target and metadata.
    SymbolicLink(LinkNumber),
}

/// Number of a folder in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderNumber(pub(super) u32);

/// Number of a symbolic link in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkNumber(pub(super) u32);

/// Number of the link that the node's own record describes.
pub(super) const OWN_RECORD: u32 = u32::MAX;

/// The place of a name: an offset in the plan's own names, or that of a record in a layer's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NameRef(u64);

/// The target and metadata of a symbolic link, or the place of the record that has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkSource {
    Held(Box<(Box<[u8]>, Metadata)>),
    Recorded { layer: u32, offset: u64 },
}

/// One inode of a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedFile {
    /// Size in bytes.
    pub size: u64,
    /// Number of names in the tree.
    pub links: u32,
    /// Index of the layer in the manifest; [`OF_A_BLOB`] for a file that is a blob.
    pub(super) layer: u32,
    /// The sink's number of the file, or the blob's index in the plan.
    pub(super) data: u32,
}

/// Layer number of a file that is a blob.
pub(super) const OF_A_BLOB: u32 = u32::MAX;

/// Place of the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileSource {
    /// A file of an unpacked layer.
    Archive {
        /// Index of the layer in the manifest.
        layer: u32,
        /// Number that the sink gave to the content.
        data: u32,
    },
    /// A blob that is a single file.
    Blob {
        /// Digest of the blob.
        digest: Digest,
        /// Mode and owner that it is shown with.
        permissions: Permissions,
    },
}

/// Counts and sizes of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeTotals {
    /// Total size of distinct files, in bytes.
    pub bytes: u64,
    /// Number of folders with the root, distinct files and symbolic links.
    pub inodes: u64,
    /// Number of distinct regular files.
    pub files: u64,
    /// Number of folders, the root included.
    pub directories: u64,
    /// Number of symbolic links.
    pub symbolic_links: u64,
}

/// Reader of entries that were merged before.
pub trait EntryReader {
    /// Reads the entry at an offset of a layer's index.
    fn read(&mut self, layer: u32, offset: u64) -> io::Result<Entry>;
}

/// A file or symbolic link of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedLeaf<'a> {
    /// File name: not empty, without `/`, and neither `.` nor `..`.
    pub name: Cow<'a, [u8]>,
    /// Target and metadata of a symbolic link; `None` for a file.
    pub link: Option<(Cow<'a, [u8]>, Cow<'a, Metadata>)>,
}

impl TreePlan {
    /// Returns the metadata of a folder.
    pub fn folder(&self, number: FolderNumber) -> &Metadata {
        &self.folders[number.0 as usize]
    }

    /// Returns the name of a folder, or of a leaf whose name is not in a record.
    pub fn held_name(&self, node: &PlannedNode) -> &[u8] {
        node.name.held(&self.names).unwrap_or_default()
    }

    /// Returns the place of a file's content.
    pub fn source(&self, file: u32) -> FileSource {
        let PlannedFile { layer, data, .. } = self.files[file as usize];
        if layer != OF_A_BLOB {
            return FileSource::Archive { layer, data };
        }
        let (digest, permissions) = self.blobs[data as usize];
        FileSource::Blob { digest, permissions }
    }

    /// Returns the bytes of memory that the plan takes.
    pub fn memory_bytes(&self) -> u64 {
        let of_links: usize = self
            .links
            .iter()
            .map(|link| match link {
                LinkSource::Held(link) => link.0.len() + size_of::<(Box<[u8]>, Metadata)>(),
                LinkSource::Recorded { .. } => 0,
            })
            .sum();
        let of_folders: usize =
            self.folders.iter().map(|folder| folder.extended_attributes.memory()).sum();
        let bytes = self.nodes.len() * size_of::<PlannedNode>()
            + self.files.len() * size_of::<PlannedFile>()
            + self.folders.len() * size_of::<Metadata>()
            + self.links.len() * size_of::<LinkSource>()
            + self.blobs.len() * size_of::<(Digest, Permissions)>();
        (bytes + self.names.len() + of_links + of_folders) as u64
    }

    /// Reads the name of a file or symbolic link, and the link's target and metadata, from its
    /// record.
    ///
    /// # Errors
    ///
    /// Errors of the reader; [`io::ErrorKind::InvalidData`] if a record differs from the plan.
    pub fn leaf(
        &self,
        node: &PlannedNode,
        records: &mut dyn EntryReader,
    ) -> io::Result<PlannedLeaf<'_>> {
        let (name, own) = match node.name.0 {
            recorded if recorded & NameRef::RECORDED != 0 => {
                let entry = records.read(node.layer, recorded & !NameRef::RECORDED)?;
                let (_, name) = entry.path.split().ok_or(io::ErrorKind::InvalidData)?;
                if name.len() != usize::from(node.name_bytes) {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                (Cow::Owned(name.to_vec()), Some(entry))
            }
            _ => (Cow::Borrowed(self.held_name(node)), None),
        };
        let link = match node.kind {
            PlannedKind::Directory(_) | PlannedKind::File(_) => None,
            PlannedKind::SymbolicLink(LinkNumber(OWN_RECORD)) => {
                Some(link_of(own.ok_or(io::ErrorKind::InvalidData)?)?)
            }
            PlannedKind::SymbolicLink(LinkNumber(number)) => {
                Some(match &self.links[number as usize] {
                    LinkSource::Held(link) => (Cow::Borrowed(&*link.0), Cow::Borrowed(&link.1)),
                    &LinkSource::Recorded { layer, offset } => {
                        link_of(records.read(layer, offset)?)?
                    }
                })
            }
        };
        Ok(PlannedLeaf { name, link })
    }
}

fn link_of(entry: Entry) -> io::Result<(Cow<'static, [u8]>, Cow<'static, Metadata>)> {
    let EntryKind::SymbolicLink { target } = entry.kind else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    Ok((Cow::Owned(target.into_vec()), Cow::Owned(entry.metadata)))
}

impl NameRef {
    const RECORDED: u64 = 1 << 63;

    pub(super) fn held_at(offset: usize) -> Self {
        Self(offset as u64)
    }

    pub(super) fn recorded_at(offset: u64) -> Self {
        Self(offset | Self::RECORDED)
    }

    /// Returns the offset of the record that has the name.
    pub(super) fn record(self) -> Option<u64> {
        (self.0 & Self::RECORDED != 0).then_some(self.0 & !Self::RECORDED)
    }

    /// Returns the name if it is one of these.
    pub(super) fn held(self, names: &[u8]) -> Option<&[u8]> {
        if self.record().is_some() {
            return None;
        }
        let start = usize::try_from(self.0).ok()?;
        let (&length, rest) = names.get(start..)?.split_first()?;
        rest.get(..usize::from(length))
    }
}
