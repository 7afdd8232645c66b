//! Digests, references, platforms and manifests of the OCI specifications, without a network.
//!
//! Attributes of pods and responses of registries are parsed here: no type holds a malformed value.

pub mod digest;
pub mod manifest;
pub mod media_type;
pub mod platform;
pub mod reference;

pub use digest::Digest;
pub use platform::Platform;
pub use reference::{Reference, Repository};
