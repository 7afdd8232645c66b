//! Every way in which layers can lie, and what follows from each.

use std::io;

use super::path::{PathError, RelativePath, Shown};
use super::permissions::Owner;
use oci_types::Digest;

/// What kind of failure it is, for the one place that chooses a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Understood, and refused: the artifact or the volume must change.
    Refused,
    /// Not what it was said to be: bytes that cannot be decoded, a wrong digest.
    Corrupt,
    /// This node could not read or write.
    Io,
}

/// Why layers do not become a tree. Entries are named as [`Shown`] shows them.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// A title or file path of a layer.
    #[error(
        "layer {layer}: the title \"{title}\" cannot be used: {reason}; push the artifact again from within its folder, with relative names"
    )]
    Title {
        /// Which layer of the manifest, from 0.
        layer: usize,
        /// The title, shown.
        title: String,
        /// The property it violates.
        reason: PathError,
    },
    /// Two layers with one title.
    #[error(
        "layers {first} and {second} both have the title \"{title}\": push the artifact again with one title for each"
    )]
    DuplicateTitle {
        /// The lower layer.
        first: usize,
        /// The upper layer.
        second: usize,
        /// Their title.
        title: RelativePath,
    },
    /// A title that needs a folder where another title is a file.
    #[error(
        "layer {layer}: the title \"{title}\" lies below \"{file}\", which is a file of layer {other}: push the artifact again with titles that do not collide"
    )]
    TitleBelowFile {
        /// The layer below the file.
        layer: usize,
        /// Its title.
        title: RelativePath,
        /// The layer that is the file.
        other: usize,
        /// Its title.
        file: RelativePath,
    },
    /// A file's title where an archive has something.
    #[error(
        "the title \"{title}\" of layer {layer} collides with what layer {other} has there: push the artifact again with titles that do not collide"
    )]
    TitleCollides {
        /// The file's layer.
        layer: usize,
        /// Its title.
        title: RelativePath,
        /// The layer that has something else there.
        other: usize,
    },
    /// An annotation that cannot be read.
    #[error(
        "layer {layer}: the annotation \"{annotation}\" cannot be read ({reason}): push the artifact again with a correct one, or without it"
    )]
    Annotation {
        /// Which layer.
        layer: usize,
        /// Its name.
        annotation: &'static str,
        /// Why.
        reason: String,
    },
    /// A layer of a kind that is not known.
    #[error(
        "layer {layer} has the media type \"{media_type}\", which is not supported: push it unencrypted, as tar, tar+gzip or tar+zstd"
    )]
    MediaType {
        /// Which layer.
        layer: usize,
        /// Its type, shown.
        media_type: String,
    },
    /// The compressed bytes.
    #[error("the layer cannot be decompressed: push the artifact again")]
    Decompress(#[source] io::Error),
    /// The archive's structure.
    #[error(
        "the layer is not a readable tar archive ({reason}, near byte {position}): push the artifact again"
    )]
    Archive {
        /// What is wrong.
        reason: &'static str,
        /// Where in the uncompressed archive.
        position: u64,
    },
    /// The uncompressed archive's digest.
    #[error(
        "the uncompressed layer has the digest {found}, its manifest says {expected}: push the artifact again"
    )]
    TarDigest {
        /// The annotation's.
        expected: Digest,
        /// What the content has.
        found: Digest,
    },
    /// An entry's name.
    #[error(
        "the archive's entry \"{name}\" is refused: {reason}; make the archive again with relative names below its folder"
    )]
    Name {
        /// The name, shown.
        name: String,
        /// The property it violates.
        reason: PathError,
    },
    /// A whiteout that hides nothing that could exist.
    #[error(
        "the archive's entry \"{name}\" is refused: it is not a valid whiteout; build the image again"
    )]
    Whiteout {
        /// The name, shown.
        name: String,
    },
    /// A hard link's target.
    #[error(
        "the hard link \"{path}\" to \"{target}\" is refused: {reason}; make the archive again with links that stay in it"
    )]
    HardLinkName {
        /// The link.
        path: RelativePath,
        /// Its target, shown.
        target: String,
        /// The property it violates.
        reason: PathError,
    },
    /// A symbolic link's target.
    #[error(
        "the symbolic link \"{path}\" is refused: its target {reason}; make the archive again without it"
    )]
    SymbolicLinkTarget {
        /// The link.
        path: RelativePath,
        /// What is wrong with the target.
        reason: &'static str,
    },
    /// A sparse file in a form that is not read.
    #[error(
        "the archive's entry \"{name}\" is a sparse file of an unknown form: make the archive again with GNU tar or bsdtar, or without --sparse"
    )]
    Sparse {
        /// The entry, shown.
        name: String,
    },
    /// An entry of a kind that tar does not know.
    #[error(
        "the archive's entry \"{name}\" has the unknown type {kind}: make the archive again in the ustar, pax or gnu format"
    )]
    EntryType {
        /// The entry, shown.
        name: String,
        /// The type, shown.
        kind: String,
    },
    /// An owner or group that no file can have.
    #[error(
        "\"{path}\" has the owner {uid}:{gid}, and Linux has those from 0 to 4294967294: make the artifact again with another, or mount it with permissions: Readable"
    )]
    Owner {
        /// The entry, or the file of a layer.
        path: RelativePath,
        /// Its owner.
        uid: Owner,
        /// Its group.
        gid: Owner,
    },
    /// Extended attributes beyond a bound.
    #[error(
        "the extended attributes of \"{path}\" are over the limit of {limit} ({key}): make the archive again without them"
    )]
    ExtendedAttributes {
        /// The entry.
        path: RelativePath,
        /// The bound.
        limit: usize,
        /// Its key in the configuration.
        key: &'static str,
    },
    /// An extended header beyond the bound.
    #[error(
        "the archive has an extended header of {size} bytes, the limit is {limit} (limits.headerBytes): make the archive again without it, or raise the limit"
    )]
    HeaderTooLarge {
        /// What it announces.
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// Too many entries.
    #[error(
        "the artifact has more than {limit} entries (limits.entries): split it, or raise the limit"
    )]
    TooManyEntries {
        /// The bound.
        limit: u64,
    },
    /// Too many bytes.
    #[error(
        "the artifact unpacks to more than {limit} bytes (limits.unpackedBytes): split it, or raise the limit"
    )]
    TooManyBytes {
        /// The bound.
        limit: u64,
    },
    /// Too much from too little.
    #[error(
        "the layer unpacks to more than {limit} times its size (limits.decompressionRatio): push it less compressed, or raise the limit"
    )]
    Ratio {
        /// The bound.
        limit: u64,
    },
    /// More metadata than memory should hold.
    #[error(
        "the folders, names, links and attributes of the artifact take more than {limit} bytes of memory (limits.metadataBytes): push fewer or shorter ones, or raise the limit"
    )]
    TooMuchMetadata {
        /// The bound.
        limit: u64,
    },
    /// Merging needs more memory than it is allowed to take.
    #[error("merging the first {entries} entries takes {bytes} bytes of memory (pull.memory)")]
    Memory {
        /// Bytes that were needed so far.
        bytes: u64,
        /// Entries that were merged so far.
        entries: u64,
    },
    /// An entry whose folder is a symbolic link of its own layer, or of any layer
    /// where links are not followed.
    #[error(
        "the entry \"{path}\" of layer {layer} passes through the symbolic link \"{link}\": make the archive again with its real path"
    )]
    ThroughLink {
        /// The entry.
        path: RelativePath,
        /// Its layer.
        layer: usize,
        /// The name of the link, shown.
        link: String,
    },
    /// The same, seen while the archive is read: such a layer fits into no tree.
    #[error(
        "the entry \"{path}\" passes through the symbolic link \"{link}\" of its own archive: make the archive again with its real path"
    )]
    ThroughOwnLink {
        /// The entry.
        path: RelativePath,
        /// The link.
        link: RelativePath,
    },
    /// Symbolic links without end.
    #[error(
        "the entry \"{path}\" of layer {layer} passes through too many symbolic links: build the image again with its real path"
    )]
    TooManyLinks {
        /// The entry.
        path: RelativePath,
        /// Its layer.
        layer: usize,
    },
    /// An entry whose place, once links are followed, is beyond a limit.
    #[error(
        "the entry \"{path}\" of layer {layer} is refused where its links lead: {reason}; build the image again with a shorter path"
    )]
    Place {
        /// The entry.
        path: RelativePath,
        /// Its layer.
        layer: usize,
        /// The property that its place violates.
        reason: PathError,
    },
    /// An entry below something that is no folder.
    #[error(
        "the entry \"{path}\" of layer {layer} lies below \"{name}\", which is a file: make the archive again with a folder there"
    )]
    NotAFolder {
        /// The entry.
        path: RelativePath,
        /// Its layer.
        layer: usize,
        /// What is a file, shown.
        name: String,
    },
    /// The root as something that is no folder.
    #[error(
        "layer {layer} makes the root of the volume something else than a folder: make the archive again"
    )]
    RootReplaced {
        /// Which layer.
        layer: usize,
    },
    /// An entry outside the title of its layer.
    #[error(
        "the entry \"{path}\" of layer {layer} lies outside the layer's title \"{title}\": push the artifact again, from within the folder"
    )]
    OutsideTitle {
        /// The entry.
        path: RelativePath,
        /// Its layer.
        layer: usize,
        /// The layer's title.
        title: RelativePath,
    },
    /// A hard link to nothing.
    #[error(
        "the hard link \"{path}\" of layer {layer} leads to \"{target}\", which is not there, or was removed by a whiteout: build the archive again"
    )]
    HardLinkMissing {
        /// The link.
        path: RelativePath,
        /// Its layer.
        layer: usize,
        /// Its target.
        target: RelativePath,
    },
    /// A hard link to a folder.
    #[error(
        "the hard link \"{path}\" of layer {layer} leads to the folder \"{target}\": build the archive again with a symbolic link"
    )]
    HardLinkToFolder {
        /// The link.
        path: RelativePath,
        /// Its layer.
        layer: usize,
        /// Its target.
        target: RelativePath,
    },
    /// `include` and `exclude` leave nothing.
    #[error(
        "nothing in the artifact is selected: change the attributes \"include\" and \"exclude\"; patterns match whole paths in the volume, case-sensitively"
    )]
    NothingSelected,
    /// Nothing that could be mounted.
    #[error("the artifact holds no files: reference one that does")]
    Empty,
    /// The reader that the caller gave.
    #[error("the layer cannot be read")]
    Read(#[source] io::Error),
    /// The sink that the caller gave.
    #[error("the layer cannot be stored")]
    Store(#[source] io::Error),
}

impl UnpackError {
    /// Whether it would have unpacked with a larger zstd window.
    #[must_use]
    pub fn is_about_window(&self) -> bool {
        // The library has a number for it, and hands out its text only.
        matches!(self, Self::Decompress(error) if error.to_string().contains("too much memory"))
    }

    /// What follows from it. Without a wildcard: a new variant must decide.
    #[must_use]
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
            | Self::Empty => Class::Refused,
            Self::Decompress(_) | Self::Archive { .. } | Self::TarDigest { .. } => Class::Corrupt,
            Self::Read(_) | Self::Store(_) => Class::Io,
        }
    }
}

/// What others wrote, as an owned text for an error.
pub(super) fn shown(bytes: &[u8]) -> String {
    Shown(bytes).to_string()
}
