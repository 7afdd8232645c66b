//! The policy of now: read again when the configuration or a key's file changes.

use super::Policy;
use crate::reread::LastGood;

/// The policy of now. Cheap to clone.
pub type PolicySource = LastGood<Policy>;

impl LastGood<Policy> {
    /// Everything may be mounted.
    #[must_use]
    pub fn permissive() -> Self {
        Self::new("the policy", |_| Ok(Policy::default()), |_| {})
    }
}
