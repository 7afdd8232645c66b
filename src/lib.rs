//! csi-driver-oci serves OCI artifacts as read-only Kubernetes pod volumes.
//!
//! This crate has the driver's own modules. They build on the crates under `crates/`, whose dependencies point one way:
//!
//! ```text
//! main -> cli -> app -> config
//! csi               the gRPC edge: sockets, requests, statuses, self-registration
//! volume            the use cases: publish, unpublish, stats, reconcile
//! warming           keeps artifacts present and pinned: the engine, and those that the configuration lists
//! following         the tags of mounted volumes, asked for by `warming`
//! node_artifacts    those of the node's `NodeArtifacts` object, kept by `warming`; its status
//! scrub             reads all content back in the background
//! node_maintenance  brings records and mounts together, keeps disk space free
//! admin             health, metrics and the admin socket
//! kubernetes        requests to the API server, for data that no call of the kubelet carries
//! check             what a registry would serve, without a node
//! file_leases       the node's `fs.leases-enable` setting
//! local_addresses   which addresses belong to the node
//! proto             messages and services that the build generates from `proto/`
//!
//! preload -> policy -> oci      pull -> oci, store      store -> unpack, sys      unpack, oci -> oci-types
//! ```
//!
//! `tests/layering.rs` checks the rules that the compiler cannot see.

pub mod admin;
pub mod app;
pub mod check;
pub mod cli;
pub mod config;
pub mod csi;
pub mod file_leases;
pub mod following;
pub mod kubernetes;
pub mod local_addresses;
pub mod node_artifacts;
pub mod node_maintenance;
pub mod proto;
pub mod scrub;
pub mod volume;
pub mod warming;
