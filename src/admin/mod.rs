//! For the people who run the node: health and metrics over HTTP, and the
//! command line's questions over the admin socket.

pub mod client;
pub mod health;
pub mod http;
pub mod metrics;
pub mod service;
mod store_metrics;
