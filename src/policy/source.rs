//! The policy of now: read again when the configuration or a key's file changes.
//!
//! At first a policy that cannot be read stops publishing. Later the last good
//! one stays in force, and the failure is told.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::Policy;
use crate::reread::Seen;

/// Makes a policy from files, and tells [`Seen`] which.
type Read = dyn Fn(&mut Seen) -> Result<Policy, String> + Send + Sync;
/// Is told whether the last reading failed.
type Tell = dyn Fn(bool) + Send + Sync;

/// The policy of now. Cheap to clone.
#[derive(Clone)]
pub struct PolicySource(Arc<Inner>);

struct Inner {
    read: Box<Read>,
    tell: Box<Tell>,
    state: Mutex<Option<State>>,
}

struct State {
    seen: Seen,
    policy: Result<Arc<Policy>, String>,
}

impl fmt::Debug for PolicySource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("PolicySource").finish_non_exhaustive()
    }
}

impl PolicySource {
    /// Reads nothing yet. `tell` is told after each reading whether it failed.
    pub fn new(
        read: impl Fn(&mut Seen) -> Result<Policy, String> + Send + Sync + 'static,
        tell: impl Fn(bool) + Send + Sync + 'static,
    ) -> Self {
        let (read, tell) = (Box::new(read), Box::new(tell));
        Self(Arc::new(Inner { read, tell, state: Mutex::new(None) }))
    }

    /// Everything may be mounted.
    #[must_use]
    pub fn permissive() -> Self {
        Self::new(|_| Ok(Policy::default()), |_| {})
    }

    /// The policy in force. Blocking.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn current(&self) -> Result<Arc<Policy>, String> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(State { seen, policy }) = state.as_ref()
            && seen.is_current()
        {
            return policy.clone();
        }
        let mut seen = Seen::new();
        let policy = match ((self.0.read)(&mut seen), state.take()) {
            (Ok(policy), _) => {
                (self.0.tell)(false);
                Ok(Arc::new(policy))
            }
            (Err(error), Some(State { policy: Ok(last), .. })) => {
                tracing::error!(error, "the policy cannot be read again: the last good one stays");
                (self.0.tell)(true);
                Ok(last)
            }
            (Err(error), _) => {
                tracing::error!(error, "the policy cannot be read: nothing is published");
                (self.0.tell)(true);
                Err(error)
            }
        };
        *state = Some(State { seen, policy: policy.clone() });
        policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Action;

    #[test]
    fn the_last_good_policy_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("policy");
        let at = path.clone();
        let source = PolicySource::new(
            move |seen| match seen.read(&at, 10).map_err(|error| error.to_string())?.as_slice() {
                b"deny" => Ok(Policy { default: Action::Deny, ..Policy::default() }),
                b"allow" => Ok(Policy::default()),
                _ => Err("neither".to_owned()),
            },
            |_| {},
        );
        let default = || source.current().map(|policy| policy.default);
        assert!(default().is_err());
        for (text, expected) in
            [("deny", Action::Deny), ("odd", Action::Deny), ("allow", Action::Allow)]
        {
            std::fs::write(&path, text).expect("written");
            assert_eq!(default(), Ok(expected), "{text}");
        }
        std::fs::remove_file(path).expect("removed");
        assert_eq!(default(), Ok(Action::Allow));
    }
}
