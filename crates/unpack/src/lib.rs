//! From layers that others made to the plan of a tree: pure, synchronous, and
//! without network, store or mount.
//!
//! ```text
//! layer_rule   manifest            -> what each layer is: one file, an archive, nothing
//! archive      compressed bytes    -> entries in order, contents given to a sink
//! members      the same, of a tar that is no layer, such as an image layout
//! merge        entries and files   -> the tree that a pod sees, as a plan
//! ```
//!
//! A layer is unpacked once and completely; a tree is merged from entries alone,
//! so that selecting, or sharing a layer among artifacts, reads no content.
//! Everything here was written by somebody else: each way in which it can lie
//! is a variant of [`UnpackError`] and a test.

pub mod archive;
pub mod checksum;
mod content;
mod decompress;
pub mod entry;
pub mod error;
pub mod layer_rule;
pub mod limits;
pub mod members;
pub mod merge;
pub mod path;
pub mod permissions;
pub mod plan;
pub mod selection;
mod tape;
#[cfg(test)]
pub(crate) mod testing;

pub use checksum::Checksum;
pub use entry::{Entry, EntryKind, Metadata};
pub use error::{Class, UnpackError};
pub use layer_rule::UnpackMode;
pub use limits::Limits;
pub use path::RelativePath;
pub use permissions::{Permissions, PermissionsRule};
pub use selection::Selection;
