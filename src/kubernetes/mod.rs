//! The Kubernetes API, for the few tasks that the kubelet's calls do not cover.
//!
//! No publish needs it: a node plugin without a token, or with an API server that is down, serves its pods all the
//! same. All of it is off by default.

mod api_client;
mod config_map;
mod driver_users;
mod events;
mod startup_taint;

pub use api_client::{KubernetesClient, KubernetesError};
pub use config_map::{ConfigMap, ConfigMapName};
pub use driver_users::pods_using_driver;
pub use events::{EventRecorder, PodReference};
pub use startup_taint::remove_startup_taint;
