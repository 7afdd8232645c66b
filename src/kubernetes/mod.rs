//! The Kubernetes API, for the few tasks that the kubelet's calls do not cover.
//!
//! No publish needs it: a node plugin without a token, or with an API server that is down, serves its pods all the
//! same. All of it is off by default.

mod client;
mod events;
mod taint;
mod users;

pub use client::{KubernetesClient, KubernetesError};
pub use events::{PodEvents, PodReference};
pub use taint::take_taint;
pub use users::pods_that_use;
