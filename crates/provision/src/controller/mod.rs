//! The controller: makes and deletes volumes while its process leads.
//!
//! ```text
//! claim_watch         watches of the API server -> facts of the planner
//! claim_lookup        lookup of an artifact with the secret of a class
//! reconciler          the reconciliation loop: facts -> plan -> writes and events
//! provision_metrics   metrics of claims
//! ```

pub mod claim_lookup;
mod claim_watch;
pub mod provision_metrics;
pub mod reconciler;

pub use claim_lookup::ClaimLookup;
pub use provision_metrics::ProvisionMetrics;
pub use reconciler::ClaimReconciler;
