//! Warming: fetches artifacts before a pod needs them.
//!
//! ```text
//! want      the pull of an artifact, in the form of a volume without attributes
//! options   the section of the configuration
//! list      the configuration's list: each reference present, pinned and refreshed
//! refresh   refreshes one reference once
//! schedule  the times: a delay of this node's own, an interval, a backoff after each failure
//! states    the state of each reference, for the status and metrics
//! ```
//!
//! Pods come before warming wherever they need the same: connections go to pods first, and a pod that joins a pull of
//! warming makes it urgent.

mod list;
mod options;
mod refresh;
mod schedule;
mod states;
mod want;

pub use list::{OWNER, WarmKeeper};
pub use options::WarmList;
pub use schedule::initial_delay;
pub use states::{WarmPhase, WarmState, WarmStates};
pub use want::{DemandsError, demands, want, with_demands};
