//! csi-driver-oci serves OCI artifacts as read-only Kubernetes pod volumes.
//!
//! One folder a room; dependencies point downwards only:
//!
//! ```text
//! main -> cli -> app -> config
//! csi     the gRPC edge: sockets, requests, statuses, self-registration
//! check   what a registry would serve, without a node
//! policy  what the administrator lets be mounted, and under which demands
//! warming artifacts that are fetched before a pod asks for them
//! scrub   all content read back in the background
//! volume  the use cases: publish, unpublish, stats, reconcile
//! pull    resolve, proofs, flights, transfer
//! oci     references, digests, manifests, platforms, credentials, the registry
//! unpack  media types, archives, merging, limits
//! fleet   preloads: many nodes warmed, by the controller and by the node plugin's part
//! store   the layout on disk: blobs, files, layers, trees, records, recovery
//! mount   bind mounts, the mount table, the few raw system calls
//! admin   health and metrics
//! background  threads that stand back behind all others: warming works there
//! printable  text of others, made safe for a terminal
//! reread  files that change while the driver runs, for all rooms; so are duration, node_addresses and
//!         process_group
//! file_leases  the node's `fs.leases-enable` setting
//! ```
//!
//! `tests/walls.rs` keeps the walls up.

pub mod admin;
pub mod app;
pub mod background;
pub mod check;
pub mod cli;
pub mod config;
pub mod csi;
pub mod duration;
pub mod fault;
pub mod file_leases;
pub mod fleet;
pub mod kubernetes;
pub mod mount;
pub mod node_addresses;
pub mod oci;
pub mod policy;
pub mod printable;
pub mod process_group;
pub mod proto;
pub mod pull;
pub mod reread;
pub mod scrub;
pub mod store;
pub mod units;
pub mod unpack;
pub mod upkeep;
pub mod volume;
pub mod warming;
