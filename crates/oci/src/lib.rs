//! Credentials, signatures and the client of OCI registries, with the types of the specifications.
//!
//! Secrets and answers of registries are parsed here, so that no type holds a malformed value.

pub mod backoff;
pub mod credentials;
pub mod registry;
pub mod signature;

pub use oci_types::*;
