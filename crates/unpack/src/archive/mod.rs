//! Archives: reads compressed bytes as checked entries, in one pass and bounded memory.
//!
//! Each entry is checked by itself here. Its effect on the tree (the links that it passes through,
//! the entries that it replaces) is decided when layers are merged.

use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::io::{self, BufRead, Read};

use super::archive_entry::{Entry, EntryKind, ExtendedAttributes, Metadata};
use super::checksum::Checksum;
use super::decompressed_content;
use super::error::{UnpackError, shown};
use super::layer_rule::ArchiveRule;
use super::permissions::{NodeType, Owner, Permissions, PermissionsRule};
use super::tar_reader::{ArchiveMember, MemberKind, TarReader};
use super::unpack_limits::Limits;
use super::volume_path::RelativePath;
use oci_types::Digest;

/// Prefix of a whiteout, which hides a name of lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// Name of the opaque mark, which hides all that lower layers have in its folder.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Receiver of the entries and contents of a layer, in the archive's order.
pub trait Sink {
    /// Stores the content of a regular file and gives it a number. Unread content is skipped. The
    /// entry follows by [`Sink::entry`].
    fn file(&mut self, header: &FileHeader, content: &mut dyn BufRead)
    -> io::Result<StoredContent>;

    /// Records an entry.
    fn entry(&mut self, entry: Entry) -> io::Result<()>;
}

/// Header of a regular file, known before its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHeader {
    /// Name in the archive.
    pub path: RelativePath,
    /// Metadata with the permissions rule applied.
    pub metadata: Metadata,
    /// Size of the content in bytes. The reader fails if there are fewer.
    pub size: u64,
}

/// Result of storing a file in a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredContent {
    /// Number that the sink gave to the content.
    pub data: u32,
    /// Checksum of the content.
    pub checksum: Checksum,
}

/// Counts and sizes of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Entries given to the sink.
    pub entries: u64,
    /// Regular files among them.
    pub files: u64,
    /// Total size of the contents of regular files, in bytes.
    pub bytes: u64,
    /// Number of entries that no volume shows: device nodes, fifos, and entries other than a folder at the root.
    pub skipped: u64,
    /// Size of the uncompressed archive in bytes.
    pub tar_bytes: u64,
    /// Digest of the whole uncompressed archive, if the rule names an expected one.
    pub tar_digest: Option<Digest>,
}

/// Unpacks a layer. `input` is the compressed blob, which is read to its end.
pub fn unpack(
    input: impl Read + Send,
    rule: &ArchiveRule,
    permissions: PermissionsRule,
    limits: &Limits,
    sink: &mut impl Sink,
) -> Result<Totals, UnpackError> {
    let mut own_links = (!rule.whiteouts).then(OwnLinks::default);
    let check = |entry: &Entry| own_links.as_mut().map_or(Ok(()), |links| links.check(entry));
    decompressed_content::decompress(input, limits, rule.tar_digest.is_some(), |content| {
        record(TarReader::new(content, limits), rule, permissions, limits, sink, check)
    })
}

/// Reads an archive. `check` may refuse an entry before the sink gets it.
fn record(
    mut tar: TarReader<'_>,
    rule: &ArchiveRule,
    permissions: PermissionsRule,
    limits: &Limits,
    sink: &mut impl Sink,
    mut check: impl FnMut(&Entry) -> Result<(), UnpackError>,
) -> Result<Totals, UnpackError> {
    let (mut entries, mut files, mut bytes) = (0, 0, 0_u64);
    let (mut members, mut skipped, mut metadata_bytes) = (0, 0, 0);
    while let Some(member) = tar.next()? {
        members += 1;
        if members > limits.entries {
            return Err(UnpackError::TooManyEntries { limit: limits.entries });
        }
        let (path, mark) = place(&member.name, rule, limits)?;
        let is_special = member.kind == MemberKind::Special && mark.is_none();
        // As in containerd, nothing replaces the root.
        let is_at_root = path.is_root() && member.kind != MemberKind::Directory && mark.is_none();
        skipped += u64::from(is_special || is_at_root);
        if is_special && !rule.whiteouts || is_at_root {
            continue;
        }
        let metadata = metadata(&member, &path, permissions, limits)?;
        // Marks and special files have no inode, and hard links have that of their target.
        let has_inode = !is_special && member.kind != MemberKind::HardLink && mark.is_none();
        if has_inode && !metadata.permissions.has_owner() {
            return Err(UnpackError::Owner { path, uid: member.uid, gid: member.gid });
        }
        let entry = match (mark, member.kind) {
            (Some(kind), _) => Entry { path, kind, metadata },
            (None, MemberKind::Directory) => Entry { path, kind: EntryKind::Directory, metadata },
            (None, MemberKind::Special) => Entry { path, kind: EntryKind::Special, metadata },
            (None, MemberKind::HardLink) => {
                let kind = hard_link(&member.link, &path, limits)?;
                Entry { path, kind, metadata }
            }
            (None, MemberKind::SymbolicLink) => {
                let kind = symbolic_link(&member.link, &path, limits)?;
                Entry { path, kind, metadata }
            }
            (None, MemberKind::File) => {
                files += 1;
                bytes = bytes.saturating_add(member.size);
                // Fail before the first byte of the file is stored.
                if bytes > limits.unpacked_bytes {
                    return Err(UnpackError::TooManyBytes { limit: limits.unpacked_bytes });
                }
                store(FileHeader { path, metadata, size: member.size }, &mut tar, sink)?
            }
        };
        metadata_bytes += entry.metadata_bytes();
        if metadata_bytes > limits.metadata_bytes {
            return Err(UnpackError::TooMuchMetadata { limit: limits.metadata_bytes });
        }
        check(&entry)?;
        sink.entry(entry).map_err(UnpackError::Store)?;
        entries += 1;
    }
    let decompressed_content::ContentSummary { bytes: tar_bytes, digest: tar_digest } =
        tar.into_content().finish()?;
    match (rule.tar_digest, tar_digest) {
        (Some(expected), Some(found)) if expected != found => {
            Err(UnpackError::TarDigest { expected, found })
        }
        _ => Ok(Totals { entries, files, bytes, skipped, tar_bytes, tar_digest }),
    }
}

/// Symbolic links of the archive so far, as keyed hashes of their paths. Outside images, no entry
/// may pass through one. Merging would refuse such entries too, but only after the layer was
/// stored. Archives with very many links have only the first [`OWN_LINKS`] checked here.
#[derive(Default)]
struct OwnLinks {
    key: RandomState,
    links: HashSet<u64>,
}

/// Maximum number of symbolic links that are checked: half a megabyte of hashes.
const OWN_LINKS: usize = 1 << 15;

impl OwnLinks {
    fn check(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        let hash = |path: &RelativePath| self.key.hash_one(path);
        if !self.links.is_empty() {
            let is_link = |folder: &RelativePath| self.links.contains(&hash(folder));
            if let Some(link) = entry.path.ancestors().find(is_link) {
                return Err(UnpackError::ThroughOwnLink { path: entry.path.clone(), link });
            }
            self.links.remove(&hash(&entry.path));
        }
        let is_link = matches!(entry.kind, EntryKind::SymbolicLink { .. });
        if is_link && self.links.len() < OWN_LINKS {
            self.links.insert(hash(&entry.path));
        }
        Ok(())
    }
}

/// Returns the path of an entry, with its kind if it is a mark of an image layer. As in containerd, only the last
/// name makes a mark: AUFS has files below folders with such names.
fn place(
    name: &[u8],
    rule: &ArchiveRule,
    limits: &Limits,
) -> Result<(RelativePath, Option<EntryKind>), UnpackError> {
    let refused = |reason| UnpackError::Name { name: shown(name), reason };
    // A folder of ORAS has relative names: `oras pull` requires them.
    let parse =
        if rule.within.is_some() { RelativePath::parse } else { RelativePath::parse_rooted };
    let path = match name {
        b"" => RelativePath::root(),
        name => parse(name, limits).map_err(refused)?,
    };
    if !rule.whiteouts {
        return Ok((path, None));
    }
    let Some((folder, last)) = path.split() else {
        return Ok((path, None));
    };
    if last == OPAQUE {
        return Ok((folder, Some(EntryKind::Opaque)));
    }
    match last.strip_prefix(WHITEOUT) {
        None => Ok((path, None)),
        Some(b"" | b"." | b"..") => Err(UnpackError::Whiteout { name: shown(name) }),
        Some(hidden) => {
            let hidden = folder.join(hidden, limits).map_err(refused)?;
            Ok((hidden, Some(EntryKind::Whiteout)))
        }
    }
}

fn store(
    header: FileHeader,
    tar: &mut TarReader<'_>,
    sink: &mut impl Sink,
) -> Result<Entry, UnpackError> {
    let stored = sink.file(&header, tar);
    // A failure of the reader is the cause of the sink's error.
    if let Some(failure) = tar.failure() {
        return Err(failure);
    }
    let StoredContent { data, checksum } = stored.map_err(UnpackError::Store)?;
    let FileHeader { path, metadata, size } = header;
    Ok(Entry { path, kind: EntryKind::File { size, data, checksum }, metadata })
}

fn hard_link(link: &[u8], path: &RelativePath, limits: &Limits) -> Result<EntryKind, UnpackError> {
    let refused =
        |reason| UnpackError::HardLinkName { path: path.clone(), target: shown(link), reason };
    let target = RelativePath::parse_rooted_name(link, limits).map_err(refused)?;
    Ok(EntryKind::HardLink { target })
}

fn symbolic_link(
    target: &[u8],
    path: &RelativePath,
    limits: &Limits,
) -> Result<EntryKind, UnpackError> {
    let reason = if target.is_empty() {
        "is empty"
    } else if target.contains(&0) {
        "contains a NUL byte"
    } else if target.len() > limits.link_target_bytes {
        "is longer than the limit (limits.linkTargetBytes)"
    } else {
        return Ok(EntryKind::SymbolicLink { target: target.into() });
    };
    Err(UnpackError::SymbolicLinkTarget { path: path.clone(), reason })
}

fn metadata(
    member: &ArchiveMember,
    path: &RelativePath,
    rule: PermissionsRule,
    limits: &Limits,
) -> Result<Metadata, UnpackError> {
    let node = match member.kind {
        MemberKind::Directory => NodeType::Directory,
        MemberKind::SymbolicLink => NodeType::SymbolicLink,
        MemberKind::File | MemberKind::HardLink | MemberKind::Special => NodeType::File,
    };
    let ArchiveMember { mode, modified, .. } = *member;
    let [uid, gid] = [&member.uid, &member.gid].map(Owner::number);
    let permissions = rule.apply(node, Permissions { mode, uid, gid });
    let extended_attributes = match node {
        // Linux has no user attributes on symbolic links.
        NodeType::SymbolicLink => ExtendedAttributes::default(),
        NodeType::Directory | NodeType::File => extended_attributes(member, path, limits)?,
    };
    Ok(Metadata { permissions, modified, extended_attributes })
}

/// Keeps the attributes in `user.*`. Other namespaces grant rights or belong to the node.
fn extended_attributes(
    member: &ArchiveMember,
    path: &RelativePath,
    limits: &Limits,
) -> Result<ExtendedAttributes, UnpackError> {
    /// `XATTR_NAME_MAX` of Linux.
    const NAME_BYTES: usize = 255;
    let refused =
        |limit, key| Err(UnpackError::ExtendedAttributes { path: path.clone(), limit, key });
    let (mut kept, mut bytes) = (Vec::new(), 0);
    for (name, value) in &member.extended_attributes {
        if !name.starts_with(b"user.") || name.len() == b"user.".len() {
            continue;
        }
        bytes += name.len() + value.len();
        if name.len() > NAME_BYTES || name.contains(&0) {
            return refused(NAME_BYTES, "bytes of a name, without NUL");
        }
        if kept.len() == limits.extended_attributes {
            return refused(limits.extended_attributes, "limits.extendedAttributes");
        }
        if bytes > limits.extended_attribute_bytes {
            return refused(limits.extended_attribute_bytes, "limits.extendedAttributeBytes");
        }
        kept.push((name.clone(), value.clone()));
    }
    Ok(kept.into_iter().collect())
}

#[cfg(test)]
mod tests;
