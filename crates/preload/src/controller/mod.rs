//! The controller of preloads: assigns artifacts to nodes while its process leads.
//!
//! ```text
//! api_watch           watches of the API server -> facts of the planner
//! reference_resolver  resolution of references and of credentials
//! reconciler          the reconciliation loop: facts -> plan -> writes
//! api_write           one write
//! preload_events      events of preloads, one for each transition
//! preload_metrics     metrics of preloads
//! ```
//!
//! All facts are read from the API server and the registries: a restarted controller continues
//! where the last one ended. Writes carry the version of the object that they change, so that a
//! process that has lost leadership changes nothing.

mod api_watch;
mod api_write;
mod preload_events;
pub mod preload_metrics;
pub mod reconciler;
pub mod reference_resolver;

pub use crate::plan::cluster_facts::ClusterState;
pub use crate::plan::cluster_facts::NamespaceQuota;
pub use crate::plan::node_status::NodeStatusRules;
pub use preload_metrics::PreloadMetrics;
pub use reconciler::{ControllerPace, PreloadReconciler};
pub use reference_resolver::{ReferenceResolver, RegistryResolver};
