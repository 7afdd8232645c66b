//! csi-driver-oci serves OCI artifacts as read-only Kubernetes pod volumes.
//!
//! The driver's own modules; what they build on are the crates under `crates/`, whose dependencies point one way:
//!
//! ```text
//! main -> cli -> app -> config
//! csi             the gRPC edge: sockets, requests, statuses, self-registration
//! volume          the use cases: publish, unpublish, stats, reconcile
//! warming         artifacts that are fetched before a pod asks for them
//! node_artifacts  the node's part of preloads: does what its `NodeArtifacts` object says
//! scrub           all content read back in the background
//! upkeep          records and mounts brought together, disk space kept free
//! admin           health and metrics, and the admin socket
//! kubernetes      the API server, for what no call of the kubelet carries
//! check           what a registry would serve, without a node
//! file_leases     the node's `fs.leases-enable` setting
//! node_addresses  which addresses belong to the node
//! proto           messages and services that the build generates from `proto/`
//!
//! preload -> policy -> oci      pull -> oci, store      store -> unpack, sys      unpack, oci -> oci-types
//! ```
//!
//! `tests/walls.rs` checks what the compiler cannot see.

pub mod admin;
pub mod app;
pub mod check;
pub mod cli;
pub mod config;
pub mod csi;
pub mod file_leases;
pub mod kubernetes;
pub mod node_addresses;
pub mod node_artifacts;
pub mod proto;
pub mod scrub;
pub mod upkeep;
pub mod volume;
pub mod warming;
