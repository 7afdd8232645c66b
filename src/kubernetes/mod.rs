//! The Kubernetes API, for the few things that no call of the kubelet carries.
//!
//! Nothing of it is on the way of a publish: a node plugin without a token, or with an API server that is down,
//! serves its pods all the same. What is here is off unless it is asked for.

mod client;
mod events;
mod taint;
mod users;

pub use client::{KubernetesClient, KubernetesError};
pub use events::{PodEvents, PodReference};
pub use taint::take_taint;
pub use users::pods_that_use;
