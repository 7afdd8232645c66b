//! Credentials, signatures and the client of OCI registries, with the types of the specifications.
//!
//! What a secret or a registry says is parsed at this edge; no type holds a malformed value.

pub mod credentials;
pub mod registry;
pub mod signature;

pub use oci_types::*;
