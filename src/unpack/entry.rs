//! What a layer records of its archive's members, in the archive's order.

use std::collections::BTreeMap;

use super::checksum::Checksum;
use super::path::RelativePath;
use super::permissions::Permissions;

/// One member of an archive, checked, with its permissions' rule applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where; the root itself for a folder's metadata alone. For a whiteout, what it
    /// hides; for an opaque mark, the folder that it marks.
    pub path: RelativePath,
    /// What.
    pub kind: EntryKind,
    /// Without meaning for hard links, whiteouts and opaque marks.
    pub metadata: Metadata,
}

/// What a member of an archive is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A folder.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// The number that the sink gave to its content.
        data: u32,
        /// Of its content.
        checksum: Checksum,
    },
    /// A symbolic link; the target is only text until an entry passes through it.
    SymbolicLink {
        /// As written.
        target: Box<[u8]>,
    },
    /// Another name of a file that was recorded before, in this layer or a lower one.
    HardLink {
        /// Its first name.
        target: RelativePath,
    },
    /// Hides what lower layers have at this path.
    Whiteout,
    /// Hides what lower layers have in this folder.
    Opaque,
}

/// Mode, owner, time and extended attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Mode and owner.
    pub permissions: Permissions,
    /// The last modification.
    pub modified: Timestamp,
    /// Names start with `user.`.
    pub extended_attributes: ExtendedAttributes,
}

/// A moment, as `utimensat` takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Since 1970, negative before it.
    pub seconds: i64,
    /// Below 1,000,000,000; counts forwards also before 1970.
    pub nanoseconds: u32,
}

/// Names and values of extended attributes. Nearly always empty, so one pointer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtendedAttributes(Option<Box<ByName>>);

type ByName = BTreeMap<Box<[u8]>, Box<[u8]>>;

impl Entry {
    /// Bytes that others chose the number of, and that memory holds.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        let link = match &self.kind {
            EntryKind::SymbolicLink { target } => target.len(),
            EntryKind::HardLink { target } => target.as_bytes().len(),
            EntryKind::Directory
            | EntryKind::File { .. }
            | EntryKind::Whiteout
            | EntryKind::Opaque => 0,
        };
        let attributes = self.metadata.extended_attributes.iter();
        let attributes: usize = attributes.map(|(name, value)| name.len() + value.len()).sum();
        (self.path.as_bytes().len() + link + attributes) as u64
    }
}

impl Metadata {
    /// Of a folder that only a path names: 0755, owner 0:0, 1970, so that the same
    /// layers give the same tree on every node.
    #[must_use]
    pub const fn of_implied_folder() -> Self {
        Self {
            permissions: Permissions { mode: 0o755, uid: 0, gid: 0 },
            modified: Timestamp { seconds: 0, nanoseconds: 0 },
            extended_attributes: ExtendedAttributes(None),
        }
    }
}

impl ExtendedAttributes {
    /// Sets one.
    pub fn insert(&mut self, name: Box<[u8]>, value: Box<[u8]>) {
        self.0.get_or_insert_default().insert(name, value);
    }

    /// In the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().flat_map(|map| map.iter()).map(|(name, value)| (&**name, &**value))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl FromIterator<(Box<[u8]>, Box<[u8]>)> for ExtendedAttributes {
    fn from_iter<T: IntoIterator<Item = (Box<[u8]>, Box<[u8]>)>>(iterator: T) -> Self {
        let map: ByName = iterator.into_iter().collect();
        Self((!map.is_empty()).then(|| Box::new(map)))
    }
}
