//! The interfaces for administrators of the node: health and metrics over HTTP, and commands over the admin socket.

pub mod admin_client;
pub(crate) mod admin_messages;
pub mod admin_operations;
pub mod admin_service;
mod follow_metrics;
pub mod health_probes;
mod lease_metrics;
pub mod node_metrics;
mod scrub_metrics;
mod store_metrics;
mod warm_metrics;
mod warm_request;
