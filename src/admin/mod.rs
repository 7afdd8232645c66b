//! The interfaces for administrators of the node: health and metrics over HTTP, and commands over the admin socket.

mod chunk_reader;
pub mod client;
pub mod health;
mod lease_metrics;
mod messages;
pub mod metrics;
pub mod operations;
mod scrub_metrics;
pub mod service;
mod store_metrics;
mod warm;
mod warm_metrics;
