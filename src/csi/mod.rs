//! The gRPC edge: sockets, requests, statuses, and the kubelet's plugin registration.
//!
//! tonic and prost stop here: a request is parsed into the types of `volume`,
//! an error becomes a status, and in between there is nothing.

pub mod endpoint;
pub mod identity;
pub mod node;
pub mod registration;
pub mod request;
pub mod socket;
pub mod status;
mod told;

pub use endpoint::Endpoint;
