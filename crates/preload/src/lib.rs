//! Preloading: puts artifacts on nodes before a pod uses them, by `ArtifactPreload` objects.
//!
//! ```text
//! api                 both kinds of objects, and their CustomResourceDefinitions
//! plan                facts in, decisions out: assignments of nodes and statuses of preloads
//! sealed_credentials  credentials that only one process of one node can decrypt
//! controller          watches objects, resolves references, writes what the plan decides; one process leads
//! ```
//!
//! Users create an `ArtifactPreload` for each artifact. Each node has one `NodeArtifacts` object:
//! the controller writes its `spec`, the artifacts that the node has to hold, and the node plugin
//! writes its `status`. There is no other state, so a restarted process continues where the last
//! one ended.
//!
//! Publishing a volume never depends on this crate.

pub mod api;
pub mod controller;
pub mod plan;
pub mod sealed_credentials;
