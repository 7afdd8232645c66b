//! The gRPC edge: sockets, requests, statuses, and the kubelet's plugin registration.
//!
//! tonic and prost stop here. A request is parsed into the types of `volume`, and an error becomes a status.

pub mod endpoint;
pub mod identity;
pub mod node;
mod publish_events;
pub mod registration;
pub mod request;
pub mod socket;
pub mod status;

pub use endpoint::UnixEndpoint;
