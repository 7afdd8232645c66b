//! Warming: keeps artifacts on the node before a pod needs them.
//!
//! ```text
//! reference_reconciler  keeps the references of one source present: a task for each fetches, refreshes and retries it
//! source_pins           adds and removes the pins of one source
//! policy_demands        what the node's policy demands of an artifact that belongs to no volume
//! warm_list_keeper      the source that the configuration lists; the other one is `node_artifacts`
//! warming_options       the section of the configuration
//! ```
//!
//! Pods come before warming wherever they need the same: connections go to pods first, and a pod that joins a pull of
//! warming makes it urgent.

mod policy_demands;
mod reference_reconciler;
mod source_pins;
mod warm_list_keeper;
mod warming_options;

pub use policy_demands::{DemandsError, demands, with_demands};
pub use reference_reconciler::{
    Attempt, DesiredReference, Reconciler, ReferenceState, RefreshError, RefreshOutcome, Schedule,
    blocking,
};
pub use source_pins::{SourcePins, WantedPins};
pub use warm_list_keeper::{ListKeeper, ListedReference};
pub use warming_options::WarmList;
