//! Warming a fleet: `ArtifactPreload` objects, carried out on every node that they select.
//!
//! ```text
//! api         the two kinds of objects, and the definitions that are made of them
//! plan        facts in, decisions out: which node is to hold what, and what an object's status says
//! seal        credentials that one process of one node can read, and nobody else
//! controller  watches, asks registries what tags mean, writes what the plan decides; one leads
//! ```
//!
//! A preload is an `ArtifactPreload`, of which users apply one for each artifact. What a node is to hold and what it
//! holds is in one `NodeArtifacts` object for each node: its `spec` is written by the controller, its `status` by the
//! node, and nobody else writes either. Nothing else is remembered anywhere, so whoever is killed goes on from there.
//!
//! Nothing of it is on the way of a publish.

pub mod api;
pub mod controller;
pub mod plan;
pub mod seal;
