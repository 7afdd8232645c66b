//! Warming a fleet: `ArtifactPreload` objects, carried out on every node that they select.
//!
//! ```text
//! api         the two kinds of objects, and the definitions that are made of them
//! ```
//!
//! A preload is an `ArtifactPreload`, of which users apply one for each artifact. What a node is to hold and what it
//! holds is in one `NodeArtifacts` object for each node: its `spec` is written by the controller, its `status` by the
//! node, and nobody else writes either.

pub mod api;
