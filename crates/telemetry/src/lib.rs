//! Health and metrics over HTTP.
//!
//! ```text
//! http_server        a server that clients cannot exhaust
//! metric_families    metrics, registered as they are made
//! metric_exposition  the two text formats of metrics
//! ```

pub mod http_server;
mod metric_exposition;
pub mod metric_families;
