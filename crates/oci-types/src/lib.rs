//! Digests, references, platforms and manifests of the OCI specifications, without a network.
//!
//! No type holds a malformed value: what a pod's attributes or a registry say is parsed here.

pub mod digest;
pub mod manifest;
pub mod media_type;
pub mod platform;
pub mod reference;

pub use digest::Digest;
pub use platform::Platform;
pub use reference::{Reference, Repository};
