//! Health and metrics over HTTP.
//!
//! ```text
//! http             a server that clients cannot exhaust
//! metric_families  metrics, registered as they are made
//! exposition       the two text formats of metrics
//! ```

mod exposition;
pub mod http;
pub mod metric_families;
