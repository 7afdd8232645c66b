//! Unpacking: turns layers from a registry into the plan of a tree. Pure and synchronous, without
//! network, store or mounts.
//!
//! ```text
//! layer_rule   manifest            -> the kind of each layer: one file, an archive, nothing
//! archive      compressed bytes    -> entries in order, contents given to a sink
//! tar_members  the same, for a tar that is not a layer, such as an image layout
//! layer_merge  entries and files   -> the tree that a pod sees, as a plan
//! ```
//!
//! A layer is unpacked once and completely. A tree is merged from entries alone, so that a
//! selection, or a layer that several artifacts share, causes no read of content.
//!
//! All input is untrusted: each way in which it can be malformed is a variant of [`UnpackError`]
//! with a test.

pub mod archive;
pub mod archive_entry;
pub mod checksum;
mod decompress;
mod decompressed_content;
pub mod error;
pub mod layer_merge;
pub mod layer_rule;
pub mod path_selection;
pub mod permissions;
pub mod tar_members;
mod tar_reader;
#[cfg(test)]
pub(crate) mod testing;
pub mod tree_plan;
pub mod unpack_limits;
pub mod volume_path;

pub use archive_entry::{Entry, EntryKind, Metadata};
pub use checksum::Checksum;
pub use error::{Class, UnpackError};
pub use layer_rule::UnpackMode;
pub use path_selection::Selection;
pub use permissions::{Permissions, PermissionsRule};
pub use unpack_limits::Limits;
pub use volume_path::RelativePath;
