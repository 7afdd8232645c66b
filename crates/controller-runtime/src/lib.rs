//! Parts that the controllers of one process share. It knows no object of its own.
//!
//! ```text
//! process             endpoints, and the tasks that run while this process leads
//! leader_election     leader election
//! object_watch        watches of the API server -> facts of a planner
//! write_rate          rate limit of all writes
//! object_write        the meaning of a failed write
//! object_events       events, which `kubectl describe` shows
//! reference_lookup    reference and secrets -> the answer of the registry
//! controller_metrics  metrics of the process
//! ```

pub mod controller_metrics;
pub mod leader_election;
pub mod object_events;
pub mod object_watch;
pub mod object_write;
pub mod process;
pub mod reference_lookup;
pub mod write_rate;

/// Seconds since 1970.
pub type Seconds = i64;

pub use controller_metrics::ControllerMetrics;
pub use reference_lookup::{LookupRequest, ReferenceLookup, ResolutionFailure};
pub use write_rate::WriteRate;
