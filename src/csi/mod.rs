//! The gRPC edge: sockets, requests, statuses, and the kubelet's plugin registration.
//!
//! tonic and prost stop here. A request is parsed into the types of `volume`, and an error becomes a status.

pub mod csi_request;
pub mod grpc_status;
pub mod identity_service;
pub mod node_service;
pub mod plugin_registration;
mod publish_events;
pub mod socket_endpoint;
pub mod unix_socket;

pub use socket_endpoint::UnixEndpoint;
