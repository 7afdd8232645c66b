//! Health and metrics over HTTP.

mod exposition;
pub mod families;
pub mod http;
