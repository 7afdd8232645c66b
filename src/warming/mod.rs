//! Warming: artifacts that are fetched before a pod asks for them.
//!
//! ```text
//! want      what is fetched: the artifact as a volume without attributes shows it
//! options   what the configuration says
//! list      the configuration's list: each reference present, pinned and looked after
//! bring     one reference, once: what is here, what the tag means now, what is to be kept
//! schedule  when: a delay of this node's own, an interval, a longer wait after each failure
//! states    how each reference is, for people and metrics
//! ```
//!
//! Warming goes after pods wherever they want the same: connections are given to pods first,
//! and a pod that comes for what is being warmed makes it urgent.

mod bring;
mod list;
mod options;
mod schedule;
mod states;
mod want;

pub use list::{OWNER, WarmKeeper};
pub use options::WarmList;
pub use schedule::share_of_spread;
pub use states::{Phase, WarmState, WarmStates};
pub use want::{DemandsError, demands, want, with_demands};
