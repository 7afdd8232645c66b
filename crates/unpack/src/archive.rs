//! Archives: compressed bytes to checked entries, in one pass and bounded memory.
//!
//! What an entry means for the tree (through which links it passes, what it
//! replaces) is decided when layers are merged; here it is checked by itself.

use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::io::{self, BufRead, Read};

use super::checksum::Checksum;
use super::content;
use super::entry::{Entry, EntryKind, ExtendedAttributes, Metadata};
use super::error::{UnpackError, shown};
use super::layer_rule::ArchiveRule;
use super::limits::Limits;
use super::path::{PathError, RelativePath};
use super::permissions::{NodeType, Owner, Permissions, PermissionsRule};
use super::tape::{Member, MemberKind, Tape};
use oci_types::Digest;

/// Hides a name of lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// What AUFS left in layers for itself, and the mark of an opaque folder.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Hides all that lower layers have in the folder.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Where a layer's entries and contents go, in the archive's order.
pub trait Sink {
    /// Stores a regular file's content and gives it a number. The content must be read
    /// to its end; what is left is skipped. The entry follows by [`Sink::entry`].
    fn file(&mut self, header: &FileHeader, content: &mut dyn BufRead) -> io::Result<StoredFile>;

    /// Records an entry.
    fn entry(&mut self, entry: Entry) -> io::Result<()>;
}

/// What is known of a file before its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHeader {
    /// Its name in the archive.
    pub path: RelativePath,
    /// With the permissions' rule applied.
    pub metadata: Metadata,
    /// Bytes of the content; fewer are an error of the reader.
    pub size: u64,
}

/// What a sink made of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// The sink's number for the content.
    pub data: u32,
    /// Of the content.
    pub checksum: Checksum,
}

/// Sums of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Entries given to the sink.
    pub entries: u64,
    /// Regular files among them.
    pub files: u64,
    /// Bytes of the regular files' contents.
    pub bytes: u64,
    /// Device nodes and fifos, which no volume shows, and hard links to them.
    pub special_files: u64,
    /// Bytes of the uncompressed archive.
    pub tar_bytes: u64,
    /// The digest of the uncompressed archive, of all its bytes, where the rule names one.
    pub tar_digest: Option<Digest>,
}

/// Unpacks a layer. `input` is the blob as the registry has it; it is read to its end.
pub fn unpack(
    input: impl Read + Send,
    rule: &ArchiveRule,
    permissions: PermissionsRule,
    limits: &Limits,
    sink: &mut impl Sink,
) -> Result<Totals, UnpackError> {
    let mut own_links = (!rule.whiteouts).then(OwnLinks::default);
    let check = |entry: &Entry| own_links.as_mut().map_or(Ok(()), |links| links.check(entry));
    record(input, rule, permissions, limits, sink, check)
}

/// Reads an archive, with a last word on each entry.
pub(super) fn record(
    input: impl Read + Send,
    rule: &ArchiveRule,
    permissions: PermissionsRule,
    limits: &Limits,
    sink: &mut impl Sink,
    check: impl FnMut(&Entry) -> Result<(), UnpackError>,
) -> Result<Totals, UnpackError> {
    content::decompress(input, limits, rule.tar_digest.is_some(), |content| {
        record_content(Tape::new(content, limits), rule, permissions, limits, sink, check)
    })
}

fn record_content(
    mut tape: Tape<'_>,
    rule: &ArchiveRule,
    permissions: PermissionsRule,
    limits: &Limits,
    sink: &mut impl Sink,
    mut check: impl FnMut(&Entry) -> Result<(), UnpackError>,
) -> Result<Totals, UnpackError> {
    let (mut entries, mut files, mut bytes) = (0, 0, 0_u64);
    let (mut members, mut special_files, mut metadata_bytes) = (0, 0, 0);
    while let Some(member) = tape.next()? {
        members += 1;
        if members > limits.entries {
            return Err(UnpackError::TooManyEntries { limit: limits.entries });
        }
        let Some((path, mark)) = place(&member.name, rule, limits)? else {
            continue;
        };
        let is_special = member.kind == MemberKind::Special && mark.is_none();
        special_files += u64::from(is_special);
        if is_special && !rule.whiteouts {
            continue;
        }
        let metadata = metadata(&member, &path, permissions, limits)?;
        // Marks and special files have no inode, and hard links that of their target.
        let has_inode = !is_special && member.kind != MemberKind::HardLink && mark.is_none();
        if has_inode && !metadata.permissions.has_owner() {
            return Err(UnpackError::Owner { path, uid: member.uid, gid: member.gid });
        }
        let entry = match (mark, member.kind) {
            (Some(kind), _) => Entry { path, kind, metadata },
            (None, MemberKind::Directory) => Entry { path, kind: EntryKind::Directory, metadata },
            (None, _) if path.is_root() => {
                let (name, reason) = (shown(&member.name), PathError::Root);
                return Err(UnpackError::Name { name, reason });
            }
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
                // Before the first byte of it is stored.
                if bytes > limits.unpacked_bytes {
                    return Err(UnpackError::TooManyBytes { limit: limits.unpacked_bytes });
                }
                store(FileHeader { path, metadata, size: member.size }, &mut tape, sink)?
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
    let content::Summary { bytes: tar_bytes, digest: tar_digest } = tape.into_content().finish()?;
    match (rule.tar_digest, tar_digest) {
        (Some(expected), Some(found)) if expected != found => {
            Err(UnpackError::TarDigest { expected, found })
        }
        _ => Ok(Totals { entries, files, bytes, special_files, tar_bytes, tar_digest }),
    }
}

/// Symbolic links of the archive so far, by keyed hashes of their paths, where no entry may pass
/// through one. Merging would refuse such entries too, but then the layer would be in the store already.
/// Only the first links of an archive with very many are checked here.
#[derive(Default)]
struct OwnLinks {
    key: RandomState,
    links: HashSet<u64>,
}

/// Symbolic links that are checked, at most: half a megabyte of hashes.
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

/// Where an entry goes, and what it means there if it is a mark of an image's
/// layer; none for what is to be ignored.
fn place(
    name: &[u8],
    rule: &ArchiveRule,
    limits: &Limits,
) -> Result<Option<(RelativePath, Option<EntryKind>)>, UnpackError> {
    let refused = |reason| UnpackError::Name { name: shown(name), reason };
    // A folder of ORAS has relative names, as `oras pull` demands it.
    let parse =
        if rule.within.is_some() { RelativePath::parse } else { RelativePath::parse_rooted };
    let path = parse(name, limits).map_err(refused)?;
    if !rule.whiteouts {
        return Ok(Some((path, None)));
    }
    let Some((folder, last)) = path.split() else {
        return Ok(Some((path, None)));
    };
    let is_meta = |name: &[u8]| name.starts_with(WHITEOUT_META);
    if folder.components().any(is_meta) {
        return Ok(None);
    }
    if last == OPAQUE {
        return Ok(Some((folder, Some(EntryKind::Opaque))));
    }
    if is_meta(last) {
        return Ok(None);
    }
    if folder.components().any(|name| name.starts_with(WHITEOUT)) {
        return Err(UnpackError::Whiteout { name: shown(name) });
    }
    match last.strip_prefix(WHITEOUT) {
        None => Ok(Some((path, None))),
        Some(b"" | b"." | b"..") => Err(UnpackError::Whiteout { name: shown(name) }),
        Some(hidden) => {
            let hidden = folder.join(hidden, limits).map_err(refused)?;
            Ok(Some((hidden, Some(EntryKind::Whiteout))))
        }
    }
}

fn store(
    header: FileHeader,
    tape: &mut Tape<'_>,
    sink: &mut impl Sink,
) -> Result<Entry, UnpackError> {
    let stored = sink.file(&header, tape);
    // The reader's own failure explains the sink's.
    if let Some(failure) = tape.failure() {
        return Err(failure);
    }
    let StoredFile { data, checksum } = stored.map_err(UnpackError::Store)?;
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
    member: &Member,
    path: &RelativePath,
    rule: PermissionsRule,
    limits: &Limits,
) -> Result<Metadata, UnpackError> {
    let node = match member.kind {
        MemberKind::Directory => NodeType::Directory,
        MemberKind::SymbolicLink => NodeType::SymbolicLink,
        MemberKind::File | MemberKind::HardLink | MemberKind::Special => NodeType::File,
    };
    let Member { mode, modified, .. } = *member;
    let [uid, gid] = [&member.uid, &member.gid].map(Owner::number);
    let permissions = rule.apply(node, Permissions { mode, uid, gid });
    let extended_attributes = match node {
        // The kernel has no user attributes on symbolic links.
        NodeType::SymbolicLink => ExtendedAttributes::default(),
        NodeType::Directory | NodeType::File => extended_attributes(member, path, limits)?,
    };
    Ok(Metadata { permissions, modified, extended_attributes })
}

/// Only `user.*`: other namespaces give rights, or belong to the node.
fn extended_attributes(
    member: &Member,
    path: &RelativePath,
    limits: &Limits,
) -> Result<ExtendedAttributes, UnpackError> {
    /// The kernel's bound (`XATTR_NAME_MAX`).
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
