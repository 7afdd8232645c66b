//! How registries are spared: what one refused is not asked again at once, and one that
//! asks for patience gets it, from all of this node that show the same credential.
//!
//! The kubelet brings a pod that cannot start back for ever, and every pod of the same
//! artifact with it. A refusal that keeps coming is remembered, for half a second at first,
//! and for twice as long with each that follows: a late push is seen at once or soon, and
//! what nobody mends costs two requests a minute. A mended secret is another credential.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::Digest as _;
use tokio::time::Instant;

use super::error::{self, RegistryError};
use super::recent::Recent;
use crate::oci::credentials::Credential;

/// Things that are remembered of each kind; forgetting one costs a request.
const MAXIMUM_REMEMBERED: usize = 4096;
/// Refusals in a row that are not remembered: somebody may be about to mend it.
const FREE: u32 = 4;
/// After this without a refusal the next one is the first again.
const FORGOTTEN: Duration = Duration::from_mins(5);
/// How long the first refusal after these is remembered, and how long any.
const REFUSED: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long a registry is left alone that does not say for how long.
const SPARED: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Patience that is shorter is simply had; longer, the caller is told.
const WAITED: Duration = Duration::from_secs(5);

/// The memory of one process.
#[derive(Debug)]
pub(super) struct Manners {
    /// Keeps credentials from being recognised in memory dumps of this map.
    salt: [u8; 32],
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    refused: Recent<([u8; 32], String), Remembered>,
    spared: Recent<[u8; 32], Remembered>,
}

/// What a registry said, when, for how long that holds, and for the how manieth time in a row.
#[derive(Clone, Debug)]
struct Remembered {
    error: RegistryError,
    since: Instant,
    until: Instant,
    count: u32,
}

/// Somebody who asks a registry for something.
pub(super) struct Asker {
    /// Registry and credential.
    who: [u8; 32],
    /// What for, as errors name it.
    what: String,
    since: Instant,
}

impl Manners {
    pub(super) fn new() -> Result<Self, RegistryError> {
        let mut salt = [0; 32];
        getrandom::fill(&mut salt)
            .map_err(|error| RegistryError::Setup { reason: error::reason(&error.to_string()) })?;
        let (refused, spared) = (Recent::new(MAXIMUM_REMEMBERED), Recent::new(MAXIMUM_REMEMBERED));
        Ok(Self { salt, state: Mutex::new(State { refused, spared }) })
    }

    pub(super) fn asker(&self, host: &str, credential: &Credential, what: &str) -> Asker {
        let mut hasher = sha2::Sha256::new();
        hasher.update(self.salt);
        hasher.update(host);
        hasher.update([0]);
        hasher.update(credential.principal_material());
        let (who, what) = (hasher.finalize().into(), what.to_owned());
        Asker { who, what, since: Instant::now() }
    }

    /// Returns when it may be asked, or what it has said just now.
    pub(super) async fn before(&self, asker: &Asker) -> Result<(), RegistryError> {
        let now = Instant::now();
        let patience = {
            let mut state = self.state();
            let refused = state.refused.get(&(asker.who, asker.what.clone()));
            if let Some(refused) = refused.filter(|refused| refused.until > now) {
                return Err(refused.error);
            }
            state.spared.get(&asker.who).filter(|spared| spared.until > now)
        };
        let Some(Remembered { error, until, .. }) = patience else { return Ok(()) };
        let left = until.duration_since(now);
        if left > WAITED {
            // It may have been told to another caller, of another thing.
            return Err(with_patience(error, left).about(&asker.what));
        }
        tokio::time::sleep(left).await;
        Ok(())
    }

    /// Remembers what it said.
    pub(super) fn after<T>(&self, asker: &Asker, outcome: &Result<T, RegistryError>) {
        let mut state = self.state();
        let key = (asker.who, asker.what.clone());
        match outcome {
            Err(error) if is_refusal(error) => {
                let before = state.refused.get(&key);
                if let Some(next) = next(before, asker, error, |count| {
                    doubled(REFUSED, count.checked_sub(FREE + 1))
                }) {
                    state.refused.insert(key, next);
                }
            }
            Err(error) if is_plea(error) => {
                let (wish, before) = (asked_patience(error), state.spared.get(&asker.who));
                let lasts =
                    |count: u32| wish.unwrap_or_else(|| doubled(SPARED, count.checked_sub(1)));
                if let Some(next) = next(before, asker, error, lasts) {
                    state.spared.insert(asker.who, next);
                }
            }
            Err(_) => {}
            Ok(_) => {
                state.refused.remove(&key);
                // Whoever was asked before the plea proves nothing.
                let spared = state.spared.get(&asker.who);
                if spared.is_some_and(|spared| spared.since < asker.since) {
                    state.spared.remove(&asker.who);
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_refusal(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::NotFound { .. }
            | RegistryError::Unauthorized { .. }
            | RegistryError::Forbidden { .. }
    )
}

/// Whether the registry wants to be left alone: 429 and 503, not a fault of its own.
fn is_plea(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::RateLimited { .. } | RegistryError::ServerError { status: 503, .. }
    )
}

fn asked_patience(error: &RegistryError) -> Option<Duration> {
    match error {
        RegistryError::RateLimited { retry_after, .. }
        | RegistryError::ServerError { retry_after, .. } => *retry_after,
        _ => None,
    }
}

fn with_patience(mut error: RegistryError, left: Duration) -> RegistryError {
    if let RegistryError::RateLimited { retry_after, .. }
    | RegistryError::ServerError { retry_after, .. } = &mut error
    {
        *retry_after = Some(left);
    }
    error
}

/// What is remembered from now on; nothing new when it was said to somebody else meanwhile.
fn next(
    before: Option<Remembered>,
    asker: &Asker,
    error: &RegistryError,
    lasts: impl Fn(u32) -> Duration,
) -> Option<Remembered> {
    let now = Instant::now();
    let count = match before {
        Some(before) if before.since >= asker.since && before.until >= now => return None,
        Some(before) if before.since >= asker.since => before.count,
        Some(before) if before.until + FORGOTTEN > now => before.count.saturating_add(1),
        _ => 1,
    };
    Some(Remembered { error: error.clone(), since: now, until: now + lasts(count), count })
}

/// The first time, doubled so often, at most the longest; nothing at all before that.
fn doubled((first, longest): (Duration, Duration), times: Option<u32>) -> Duration {
    times.map_or(Duration::ZERO, |times| first.saturating_mul(1 << times.min(16)).min(longest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(manners: &Manners, password: &str, what: &str) -> Asker {
        let (username, password) = ("u".to_owned(), password.to_owned());
        let credential = Credential::Basic { username, password };
        manners.asker("r.io", &credential, what)
    }

    fn gone() -> Result<(), RegistryError> {
        Err(RegistryError::NotFound { what: "manifest".to_owned() })
    }

    fn limited(seconds: Option<u64>) -> Result<(), RegistryError> {
        let retry_after = seconds.map(Duration::from_secs);
        let (host, what) = ("r.io".to_owned(), "manifest".to_owned());
        Err(RegistryError::RateLimited { host, what, retry_after })
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_holds_for_longer_each_time_and_for_its_credential_and_thing_alone() {
        let manners = Manners::new().unwrap();
        let ours = || asker(&manners, "wrong", "manifest v1");
        for _ in 0..FREE {
            tokio::time::advance(Duration::from_millis(1)).await;
            let ours = ours();
            manners.before(&ours).await.unwrap();
            manners.after(&ours, &gone());
        }
        for seconds in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] {
            tokio::time::advance(Duration::from_millis(1)).await;
            let (ours, meanwhile) = (ours(), ours());
            manners.before(&ours).await.unwrap();
            manners.after(&ours, &gone());
            manners.after(&meanwhile, &gone());
            assert_eq!(manners.before(&ours).await, gone());
            assert_eq!(manners.before(&asker(&manners, "mended", "manifest v1")).await, Ok(()));
            assert_eq!(manners.before(&asker(&manners, "wrong", "manifest v2")).await, Ok(()));
            tokio::time::advance(Duration::from_secs_f64(seconds - 0.01)).await;
            assert_eq!(manners.before(&ours).await, gone(), "after {seconds} s");
            tokio::time::advance(Duration::from_millis(20)).await;
        }
        manners.after(&ours(), &Ok(()));
        manners.after(&ours(), &gone());
        assert_eq!(manners.before(&ours()).await, Ok(()), "a success makes it the first again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_plea_holds_for_everything_that_the_credential_asks_for() {
        let manners = Manners::new().unwrap();
        manners.after(&asker(&manners, "p", "blob 1"), &limited(Some(60)));
        let other = asker(&manners, "p", "blob 2");
        let told = limited(Some(60)).map_err(|error| error.about("blob 2"));
        assert_eq!(manners.before(&other).await, told, "nothing is said of the first");
        assert_eq!(manners.before(&asker(&manners, "other", "blob 2")).await, Ok(()));
        tokio::time::advance(Duration::from_secs(57)).await;
        let started = Instant::now();
        assert_eq!(manners.before(&other).await, Ok(()), "what is short is waited for");
        assert_eq!(started.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_say_how_long_is_left_alone_for_longer_each_time() {
        let manners = Manners::new().unwrap();
        let ours = || asker(&manners, "p", "blob");
        for milliseconds in [250, 500, 1000, 2000, 4000] {
            manners.after(&ours(), &limited(None));
            let started = Instant::now();
            assert_eq!(manners.before(&ours()).await, Ok(()));
            assert_eq!(started.elapsed(), Duration::from_millis(milliseconds));
        }
        let meanwhile = ours();
        manners.after(&ours(), &limited(None));
        manners.after(&meanwhile, &Ok(()));
        let told = limited(Some(8)).map_err(|error| error.about("blob"));
        assert_eq!(manners.before(&ours()).await, told);
        tokio::time::advance(Duration::from_secs(8)).await;
        manners.after(&ours(), &Ok(()));
        manners.after(&ours(), &limited(None));
        let started = Instant::now();
        assert_eq!(manners.before(&ours()).await, Ok(()));
        assert_eq!(started.elapsed(), Duration::from_millis(250), "the first again");
    }
}
