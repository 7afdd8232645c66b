//! Entries: the records that a layer keeps of its archive's members, in the archive's order.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::checksum::Checksum;
use super::permissions::Permissions;
use super::volume_path::RelativePath;

/// One member of an archive, checked, with the permissions rule applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path in the volume; the root for metadata of the root folder. For a whiteout, the hidden
    /// path; for an opaque mark, the marked folder.
    pub path: RelativePath,
    /// Type of the member.
    pub kind: EntryKind,
    /// Metadata; without meaning for hard links, whiteouts and opaque marks.
    pub metadata: Metadata,
}

/// Type of an archive member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A folder below the root, or the root.
    Directory,
    /// A regular file.
    File {
        /// Size in bytes.
        size: u64,
        /// Number that the sink gave to its content.
        data: u32,
        /// Checksum of its content.
        checksum: Checksum,
    },
    /// A symbolic link. The target is plain text until an entry passes through it.
    SymbolicLink {
        /// Target as it is written in the archive.
        target: Box<[u8]>,
    },
    /// Another name of a file that was recorded before, in this layer or a lower one.
    HardLink {
        /// Path of the existing file.
        target: RelativePath,
    },
    /// A device node or fifo of an image. It replaces what was at its path, and no volume shows it.
    Special,
    /// Hides what lower layers have at this path.
    Whiteout,
    /// Hides what lower layers have in this folder.
    Opaque,
}

/// Mode, owner, time and extended attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Mode and owner, with the permissions rule applied.
    pub permissions: Permissions,
    /// Time of the last modification.
    pub modified: Timestamp,
    /// Attributes in the `user.` namespace.
    pub extended_attributes: ExtendedAttributes,
}

/// Timestamp as `utimensat` takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since 1970, negative before it.
    pub seconds: i64,
    /// Nanoseconds below 1,000,000,000, which count forwards also before 1970.
    pub nanoseconds: u32,
}

/// Names and values of extended attributes, each after its length, ordered by name. An archive
/// chooses how many there are and how short: the attributes of one entry share one allocation,
/// which clones share too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtendedAttributes(Option<Arc<[u8]>>);

/// Memory that a folder takes during a merge beyond that of any entry: the folder itself and the
/// start of its list of names.
pub(super) const FOLDER_BYTES: u64 = 320;

/// Overhead of an allocation: reference counts and the allocator's own bytes.
const PIECE_BYTES: usize = 32;

impl Entry {
    /// Returns the bytes of memory that the entry takes during a merge beyond the cost of any
    /// entry.
    pub fn metadata_bytes(&self) -> u64 {
        let kind = match &self.kind {
            EntryKind::Directory => FOLDER_BYTES,
            EntryKind::SymbolicLink { target } => target.len() as u64,
            EntryKind::HardLink { target } => target.as_bytes().len() as u64,
            EntryKind::File { .. }
            | EntryKind::Special
            | EntryKind::Whiteout
            | EntryKind::Opaque => 0,
        };
        let rest = self.path.as_bytes().len() + self.metadata.extended_attributes.memory();
        kind.saturating_add(rest as u64)
    }
}

impl Metadata {
    /// Returns the metadata of a folder that exists only as part of a path: 0755, owner 0:0, 1970,
    /// so that the same layers give the same tree on every node.
    pub const fn of_implied_folder() -> Self {
        Self {
            permissions: Permissions { mode: 0o755, uid: 0, gid: 0 },
            modified: Timestamp { seconds: 0, nanoseconds: 0 },
            extended_attributes: ExtendedAttributes(None),
        }
    }
}

impl ExtendedAttributes {
    /// Iterates over names and values, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = self.0.as_deref().unwrap_or_default();
        std::iter::from_fn(move || {
            let (name, after) = part(rest)?;
            let (value, after) = part(after)?;
            rest = after;
            Some((name, value))
        })
    }

    /// Returns the bytes of memory that the attributes take.
    pub(super) fn memory(&self) -> usize {
        self.0.as_ref().map_or(0, |packed| packed.len() + PIECE_BYTES)
    }

    /// Returns whether there are no attributes.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl FromIterator<(Box<[u8]>, Box<[u8]>)> for ExtendedAttributes {
    fn from_iter<T: IntoIterator<Item = (Box<[u8]>, Box<[u8]>)>>(iterator: T) -> Self {
        let map: BTreeMap<_, _> = iterator.into_iter().collect();
        let mut packed = Vec::new();
        for (name, value) in &map {
            for part in [name, value] {
                // Limits are far below `u32::MAX`. Longer values are cut, so that they are never
                // misread.
                let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
                packed.extend_from_slice(&length.to_ne_bytes());
                packed.extend_from_slice(&part[..length as usize]);
            }
        }
        Self((!map.is_empty()).then(|| packed.into()))
    }
}

/// Splits off the next name or value.
fn part(packed: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = packed.split_first_chunk()?;
    rest.split_at_checked(u32::from_ne_bytes(*length) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attributes(pairs: &[(Vec<u8>, Vec<u8>)]) -> ExtendedAttributes {
        pairs
            .iter()
            .map(|(name, value)| (name.as_slice().into(), value.as_slice().into()))
            .collect()
    }

    proptest! {
        #[test]
        fn attributes_are_what_a_map_of_them_is(
            pairs in proptest::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..8),
        ) {
            let map: BTreeMap<_, _> = pairs.iter().cloned().collect();
            let attributes = attributes(&pairs);
            let listed: Vec<_> =
                attributes.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
            prop_assert_eq!(listed, map.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(attributes.is_empty(), pairs.is_empty());
        }
    }

    #[test]
    fn short_attributes_count_as_what_they_take() {
        let pairs: Vec<_> = (0..128_u8).map(|name| (vec![b'u', name], vec![name])).collect();
        let attributes = attributes(&pairs);
        // Three bytes each, plus two lengths.
        let held = attributes.0.as_ref().map_or(0, |packed| size_of_val(&**packed));
        assert_eq!(held, 128 * (3 + 8));
        let metadata =
            Metadata { extended_attributes: attributes, ..Metadata::of_implied_folder() };
        let kind = EntryKind::Directory;
        let entry = Entry { path: RelativePath::root(), kind, metadata };
        assert!(entry.metadata_bytes() >= held as u64 + FOLDER_BYTES);
        // A clone shares the allocation.
        let copy = entry.metadata.extended_attributes.clone();
        let pieces = [&copy, &entry.metadata.extended_attributes].map(|attributes| &attributes.0);
        let [Some(one), Some(two)] = pieces else { panic!("there are some") };
        assert!(Arc::ptr_eq(one, two));
    }
}
