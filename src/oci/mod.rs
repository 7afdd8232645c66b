//! What the OCI specifications define, and how a registry is spoken to.
//!
//! The types of this room cannot hold a malformed value: whatever comes from a
//! pod's attributes, a secret or a registry is parsed here, at the edge.

pub mod credentials;
pub mod digest;
pub mod manifest;
pub mod media_type;
pub mod platform;
pub mod reference;
pub mod registry;
pub mod signature;

pub use digest::Digest;
pub use platform::Platform;
pub use reference::{Reference, Repository};
