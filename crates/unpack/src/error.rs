//! Errors of unpacking: every way in which a layer can be malformed, and its class.

use std::io;

use super::layer_merge::SubPathProblem;
use super::permissions::Owner;
use super::volume_path::{PathError, RelativePath, Shown};
use oci_types::Digest;

/// Class of a failure, from which the gRPC status is chosen in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Understood and refused: the artifact or the volume has to change.
    Refused,
    /// Malformed input: bytes that cannot be decoded, a wrong digest.
    Corrupt,
    /// A read or write failed on this node.
    Io,
}

/// Reason why layers do not become a tree. Entries are printed as [`Shown`] prints them.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// An unusable title or file path of a layer.
    #[error(
        "layer {layer}: the title \"{title}\" cannot be used: {reason}; push the artifact again from within its folder, with relative names"
    )]
    Title {
        /// Index of the layer in the manifest.
        layer: usize,
        /// Title, escaped for display.
        title: String,
        /// Property that the title violates.
        reason: PathError,
    },
    /// Two layers with the same title.
    #[error(
        "layers {first} and {second} both have the title \"{title}\": push the artifact again with one title for each"
    )]
    DuplicateTitle {
        /// Index of the lower layer.
        first: usize,
        /// Index of the upper layer.
        second: usize,
        /// Title of both layers.
        title: RelativePath,
    },
    /// A title that needs a folder where another title is a file.
    #[error(
        "layer {layer}: the title \"{title}\" lies below \"{file}\", which is a file of layer {other}: push the artifact again with titles that do not collide"
    )]
    TitleBelowFile {
        /// Index of the layer below the file.
        layer: usize,
        /// Title of that layer.
        title: RelativePath,
        /// Index of the layer that is the file.
        other: usize,
        /// Title of that file.
        file: RelativePath,
    },
    /// A title of a file where an archive has an entry.
    #[error(
        "the title \"{title}\" of layer {layer} collides with what layer {other} has there: push the artifact again with titles that do not collide"
    )]
    TitleCollides {
        /// Index of the file's layer.
        layer: usize,
        /// Title of the file.
        title: RelativePath,
        /// Index of the layer with the other entry.
        other: usize,
    },
    /// An annotation that cannot be parsed.
    #[error(
        "layer {layer}: the annotation \"{annotation}\" cannot be read ({reason}): push the artifact again with a correct one, or without it"
    )]
    Annotation {
        /// Index of the layer in the manifest.
        layer: usize,
        /// Name of the annotation.
        annotation: &'static str,
        /// Reason of the parser.
        reason: String,
    },
    /// A layer with an unknown media type.
    #[error(
        "layer {layer} has the media type \"{media_type}\", which is not supported: push it unencrypted, as tar, tar+gzip or tar+zstd"
    )]
    MediaType {
        /// Index of the layer in the manifest.
        layer: usize,
        /// Media type, escaped for display.
        media_type: String,
    },
    /// Compressed bytes that cannot be decoded.
    #[error("the layer cannot be decompressed: push the artifact again")]
    Decompress(#[source] io::Error),
    /// A malformed archive structure.
    #[error(
        "the layer is not a readable tar archive ({reason}, near byte {position}): push the artifact again"
    )]
    Archive {
        /// Defect of the archive.
        reason: &'static str,
        /// Offset in the uncompressed archive.
        position: u64,
    },
    /// A digest of the uncompressed archive that differs from the annotation.
    #[error(
        "the uncompressed layer has the digest {found}, its manifest says {expected}: push the artifact again"
    )]
    TarDigest {
        /// Digest in the annotation.
        expected: Digest,
        /// Digest of the content.
        found: Digest,
    },
    /// An invalid entry name.
    #[error(
        "the archive's entry \"{name}\" is refused: {reason}; make the archive again with relative names below its folder"
    )]
    Name {
        /// Name, escaped for display.
        name: String,
        /// Property that the name violates.
        reason: PathError,
    },
    /// A whiteout of a name that cannot exist.
    #[error(
        "the archive's entry \"{name}\" is refused: it is not a valid whiteout; build the image again"
    )]
    Whiteout {
        /// Name, escaped for display.
        name: String,
    },
    /// An invalid target of a hard link.
    #[error(
        "the hard link \"{path}\" to \"{target}\" is refused: {reason}; make the archive again with links that stay in it"
    )]
    HardLinkName {
        /// Path of the link.
        path: RelativePath,
        /// Target, escaped for display.
        target: String,
        /// Property that the target violates.
        reason: PathError,
    },
    /// An invalid target of a symbolic link.
    #[error(
        "the symbolic link \"{path}\" is refused: its target {reason}; make the archive again without it"
    )]
    SymbolicLinkTarget {
        /// Path of the link.
        path: RelativePath,
        /// Defect of the target.
        reason: &'static str,
    },
    /// A sparse file in an unsupported format.
    #[error(
        "the archive's entry \"{name}\" is a sparse file of an unknown form: make the archive again with GNU tar or bsdtar, or without --sparse"
    )]
    Sparse {
        /// Name of the entry, escaped for display.
        name: String,
    },
    /// An entry type that tar does not define.
    #[error(
        "the archive's entry \"{name}\" has the unknown type {kind}: make the archive again in the ustar, pax or gnu format"
    )]
    EntryType {
        /// Name of the entry, escaped for display.
        name: String,
        /// Type, escaped for display.
        kind: String,
    },
    /// An owner or group outside the range of Linux.
    #[error(
        "\"{path}\" has the owner {uid}:{gid}, and Linux has those from 0 to 4294967294: make the artifact again with another, or mount it with permissions: Readable"
    )]
    Owner {
        /// Path of the entry, or of a layer that is a file.
        path: RelativePath,
        /// Owner of the file.
        uid: Owner,
        /// Group of the file.
        gid: Owner,
    },
    /// Extended attributes over a limit.
    #[error(
        "the extended attributes of \"{path}\" are over the limit of {limit} ({key}): make the archive again without them"
    )]
    ExtendedAttributes {
        /// Path of the entry.
        path: RelativePath,
        /// Value of the limit.
        limit: usize,
        /// Configuration key of the limit.
        key: &'static str,
    },
    /// An extended header over the limit.
    #[error(
        "the archive has an extended header of {size} bytes, the limit is {limit} (limits.headerBytes): make the archive again without it, or raise the limit"
    )]
    HeaderTooLarge {
        /// Size that the header announces, in bytes.
        size: u64,
        /// Value of `limits.headerBytes`.
        limit: u64,
    },
    /// More entries than the limit.
    #[error(
        "the artifact has more than {limit} entries (limits.entries): split it, or raise the limit"
    )]
    TooManyEntries {
        /// Value of `limits.entries`.
        limit: u64,
    },
    /// More unpacked bytes than the limit.
    #[error(
        "the artifact unpacks to more than {limit} bytes (limits.unpackedBytes): split it, or raise the limit"
    )]
    TooManyBytes {
        /// Value of `limits.unpackedBytes`.
        limit: u64,
    },
    /// A compression ratio over the limit.
    #[error(
        "the layer unpacks to more than {limit} times its size (limits.decompressionRatio): push it less compressed, or raise the limit"
    )]
    Ratio {
        /// Value of `limits.decompressionRatio`.
        limit: u64,
    },
    /// More metadata in memory than the limit.
    #[error(
        "the folders, names, links and attributes of the artifact take more than {limit} bytes of memory (limits.metadataBytes): push fewer or shorter ones, or raise the limit"
    )]
    TooMuchMetadata {
        /// Value of `limits.metadataBytes`.
        limit: u64,
    },
    /// More memory for merging than the caller allows.
    #[error("merging the first {entries} entries takes {bytes} bytes of memory (pull.memory)")]
    Memory {
        /// Bytes that were needed so far.
        bytes: u64,
        /// Number of entries that were merged so far.
        entries: u64,
    },
    /// An entry whose path passes through a symbolic link that is not followed: a link of its own
    /// layer, or any link outside images.
    #[error(
        "the entry \"{path}\" of layer {layer} passes through the symbolic link \"{link}\": make the archive again with its real path"
    )]
    ThroughLink {
        /// Path of the entry.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
        /// Name of the link, escaped for display.
        link: String,
    },
    /// An entry that passes through a symbolic link of its own archive, found while the archive is
    /// read: such a layer fits into no tree.
    #[error(
        "the entry \"{path}\" passes through the symbolic link \"{link}\" of its own archive: make the archive again with its real path"
    )]
    ThroughOwnLink {
        /// Path of the entry.
        path: RelativePath,
        /// Path of the link.
        link: RelativePath,
    },
    /// An entry whose path leads through too many symbolic links.
    #[error(
        "the entry \"{path}\" of layer {layer} passes through too many symbolic links: build the image again with its real path"
    )]
    TooManyLinks {
        /// Path of the entry.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
    },
    /// An entry whose place, after links are followed, is over a limit.
    #[error(
        "the entry \"{path}\" of layer {layer} is refused where its links lead: {reason}; build the image again with a shorter path"
    )]
    Place {
        /// Path of the entry.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
        /// Property that its place violates.
        reason: PathError,
    },
    /// An entry below something that is not a folder.
    #[error(
        "the entry \"{path}\" of layer {layer} lies below \"{name}\", which is a file: make the archive again with a folder there"
    )]
    NotAFolder {
        /// Path of the entry.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
        /// Path of the file, escaped for display.
        name: String,
    },
    /// An entry that replaces the root by something that is not a folder.
    #[error(
        "layer {layer} makes the root of the volume something else than a folder: make the archive again"
    )]
    RootReplaced {
        /// Index of the layer.
        layer: usize,
    },
    /// An entry outside the title of its layer.
    #[error(
        "the entry \"{path}\" of layer {layer} lies outside the layer's title \"{title}\": push the artifact again, from within the folder"
    )]
    OutsideTitle {
        /// Path of the entry.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
        /// Title of the layer.
        title: RelativePath,
    },
    /// A hard link to a missing file.
    #[error(
        "the hard link \"{path}\" of layer {layer} leads to \"{target}\", which is not there, or was removed by a whiteout: build the archive again"
    )]
    HardLinkMissing {
        /// Path of the link.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
        /// Target of the link.
        target: RelativePath,
    },
    /// A hard link to a folder.
    #[error(
        "the hard link \"{path}\" of layer {layer} leads to the folder \"{target}\": build the archive again with a symbolic link"
    )]
    HardLinkToFolder {
        /// Path of the link.
        path: RelativePath,
        /// Index of its layer.
        layer: usize,
        /// Target of the link.
        target: RelativePath,
    },
    /// A selection by `include` and `exclude` that matches no entry.
    #[error(
        "nothing in the artifact is selected: change the attributes \"include\" and \"exclude\"; patterns match whole paths of the artifact, case-sensitively"
    )]
    NothingSelected,
    /// A `subPath` that cannot be shown.
    #[error("the attribute \"subPath\" is \"{path}\", {problem}")]
    SubPath {
        /// The attribute's path.
        path: RelativePath,
        /// Reason why it cannot be shown.
        problem: SubPathProblem,
    },
    /// Two artifacts of a volume with the same name.
    #[error("the artifacts {} and {} of the list both have \"{path}\"", one + 1, two + 1)]
    PartsCollide {
        /// The path in the volume.
        path: RelativePath,
        /// The number of the artifact that has it, from 0.
        one: usize,
        /// The number of the artifact that comes later in the list.
        two: usize,
    },
    /// A path of an artifact that is over a limit below the artifact's folder.
    #[error(
        "\"{path}\" of the list's artifact {} is refused: {reason}; choose a shorter \"path\"",
        part + 1
    )]
    PartPlace {
        /// The path in the volume.
        path: RelativePath,
        /// The number of the artifact, from 0.
        part: usize,
        /// Property that the path violates.
        reason: PathError,
    },
    /// An artifact without any file.
    #[error("the artifact holds no files: reference one that does")]
    Empty,
    /// A failure of the caller's reader.
    #[error("the layer cannot be read")]
    Read(#[source] io::Error),
    /// A failure of the caller's sink.
    #[error("the layer cannot be stored")]
    Store(#[source] io::Error),
}

impl UnpackError {
    /// Returns whether a larger zstd window would have been enough.
    pub fn is_about_window(&self) -> bool {
        // The library exposes the text of its error only, not its code.
        matches!(self, Self::Decompress(error) if error.to_string().contains("too much memory"))
    }

    /// Returns the class of the error. The match has no wildcard, so that a new variant must
    /// choose.
    pub const fn class(&self) -> Class {
        match self {
            Self::Title { .. }
            | Self::DuplicateTitle { .. }
            | Self::TitleBelowFile { .. }
            | Self::TitleCollides { .. }
            | Self::Annotation { .. }
            | Self::MediaType { .. }
            | Self::Name { .. }
            | Self::Whiteout { .. }
            | Self::HardLinkName { .. }
            | Self::SymbolicLinkTarget { .. }
            | Self::Sparse { .. }
            | Self::EntryType { .. }
            | Self::Owner { .. }
            | Self::ExtendedAttributes { .. }
            | Self::HeaderTooLarge { .. }
            | Self::TooManyEntries { .. }
            | Self::TooManyBytes { .. }
            | Self::Ratio { .. }
            | Self::TooMuchMetadata { .. }
            | Self::Memory { .. }
            | Self::ThroughLink { .. }
            | Self::ThroughOwnLink { .. }
            | Self::TooManyLinks { .. }
            | Self::Place { .. }
            | Self::NotAFolder { .. }
            | Self::RootReplaced { .. }
            | Self::OutsideTitle { .. }
            | Self::HardLinkMissing { .. }
            | Self::HardLinkToFolder { .. }
            | Self::NothingSelected
            | Self::SubPath { .. }
            | Self::PartsCollide { .. }
            | Self::PartPlace { .. }
            | Self::Empty => Class::Refused,
            Self::Decompress(_) | Self::Archive { .. } | Self::TarDigest { .. } => Class::Corrupt,
            Self::Read(_) | Self::Store(_) => Class::Io,
        }
    }
}

/// Escapes untrusted bytes for an error message.
pub(super) fn shown(bytes: &[u8]) -> String {
    Shown(bytes).to_string()
}
