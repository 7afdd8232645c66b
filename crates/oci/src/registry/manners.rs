//! How registries are spared: what one refused is not asked again at once, and one that
//! asks for patience gets it, from all of this node that show the same credential.
//!
//! A rate limit (429, 503) holds for one repository and credential, since registries and the proxies
//! before them count by repository, too. Meanwhile the first request to each other repository of the
//! host with that credential is a probe request. Probe requests are [`PROBE_INTERVAL`] apart. A
//! repository that answers one is asked without delay. A rate limit of the token endpoint or of
//! `/v2/` holds for the whole host. All of this state is bounded, and ends with the rate limit.
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
use crate::Repository;
use crate::backoff::RetryBackoff;
use crate::credentials::Credential;

/// Things that are remembered of each kind; forgetting one costs a request.
const MAXIMUM_REMEMBERED: usize = 4096;
/// Refusals in a row that are not remembered: somebody may be about to mend it.
const FREE: u32 = 4;
/// After this without a refusal the next one is the first again.
const FORGOTTEN: Duration = Duration::from_mins(5);
/// How long the first refusal after these is remembered, and how long any.
const REFUSED: RetryBackoff =
    RetryBackoff { first: Duration::from_millis(500), longest: Duration::from_secs(30) };
/// How long a registry is left alone that does not say for how long.
const SPARED: RetryBackoff =
    RetryBackoff { first: Duration::from_millis(250), longest: Duration::from_secs(30) };
/// Patience that is shorter is simply had; longer, the caller is told.
const WAITED: Duration = Duration::from_secs(5);
/// Time between two probe requests to a host that limits the rate of one of its repositories. A host
/// that limits all of them gets four requests a second, and each repository gets one.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// The memory of one process.
#[derive(Debug)]
pub(super) struct Manners {
    /// Keeps credentials from being recognised in memory dumps of this map.
    salt: [u8; 32],
    state: Mutex<State>,
}

/// A salted hash of a host and a credential, or of a repository and a credential.
type Key = [u8; 32];

#[derive(Debug)]
struct State {
    refused: Recent<(Key, String), Remembered>,
    /// The backoff of rate-limited hosts and repositories.
    spared: Recent<Key, Remembered>,
    /// The probe schedules of hosts that limit the rate of a repository.
    probes: Recent<Key, ProbeSchedule>,
    /// Repositories of such hosts, with the time of the last answer without a rate limit.
    unlimited: Recent<Key, Instant>,
}

/// The schedule of probe requests to a host while one of its repositories is rate-limited.
#[derive(Clone, Copy, Debug)]
struct ProbeSchedule {
    /// The time of the first rate limit. A repository that was answered later is not limited.
    since: Instant,
    /// The time at which the last rate limit ends.
    until: Instant,
    /// The earliest time of the next probe request.
    next: Instant,
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
    who: Key,
    /// Repository and credential.
    repository: Key,
    host: String,
    /// What for, as errors name it.
    what: String,
    since: Instant,
}

/// The delay of one request.
enum RequestDelay {
    None,
    /// The rest of a backoff, and the rate limit that began it.
    Backoff(Duration, RegistryError),
    /// The time until the request may be sent as a probe request.
    Probe(Duration),
}

impl Manners {
    pub(super) fn new() -> Result<Self, RegistryError> {
        let mut salt = [0; 32];
        getrandom::fill(&mut salt)
            .map_err(|error| RegistryError::Setup { reason: error::reason(&error.to_string()) })?;
        let state = State {
            refused: Recent::new(MAXIMUM_REMEMBERED),
            spared: Recent::new(MAXIMUM_REMEMBERED),
            probes: Recent::new(MAXIMUM_REMEMBERED),
            unlimited: Recent::new(MAXIMUM_REMEMBERED),
        };
        Ok(Self { salt, state: Mutex::new(state) })
    }

    pub(super) fn asker(
        &self,
        host: &str,
        repository: &Repository,
        credential: &Credential,
        what: &str,
    ) -> Asker {
        let mut hasher = sha2::Sha256::new();
        hasher.update(self.salt);
        hasher.update(host);
        hasher.update([0]);
        hasher.update(credential.principal_material());
        let who: Key = hasher.finalize().into();
        let mut hasher = sha2::Sha256::new();
        hasher.update(who);
        hasher.update(repository.to_string());
        let (repository, host) = (hasher.finalize().into(), host.to_owned());
        Asker { who, repository, host, what: what.to_owned(), since: Instant::now() }
    }

    /// Returns when it may be asked, or what it has said just now.
    pub(super) async fn before(&self, asker: &Asker) -> Result<(), RegistryError> {
        let delay = self.state().delay(asker)?;
        match delay {
            RequestDelay::None => {}
            RequestDelay::Backoff(left, error) if left > WAITED => {
                // The rate limit may have been the answer to a request for something else.
                return Err(with_patience(error, left).about(&asker.what));
            }
            RequestDelay::Probe(left) if left > WAITED => {
                let (host, what) = (asker.host.clone(), asker.what.clone());
                return Err(RegistryError::RateLimited { host, what, retry_after: Some(left) });
            }
            RequestDelay::Backoff(left, _) | RequestDelay::Probe(left) => {
                tokio::time::sleep(left).await;
            }
        }
        Ok(())
    }

    /// Records the outcome of a request to a repository.
    pub(super) fn after<T>(&self, asker: &Asker, outcome: &Result<T, RegistryError>) {
        let mut state = self.state();
        let key = (asker.who, asker.what.clone());
        match outcome {
            Err(error) if is_refusal(error) => {
                state.record_unlimited(asker);
                let before = state.refused.get(&key);
                let lasts = |count: u32| REFUSED.after(count.saturating_sub(FREE));
                if let Some(next) = next(before, asker, error, lasts) {
                    state.refused.insert(key, next);
                }
            }
            Err(error) if is_plea(error) => {
                if let Some(until) = state.back_off(asker.repository, asker, error) {
                    state.probe_host_until(asker.who, until);
                }
                state.unlimited.remove(&asker.repository);
            }
            Err(_) => {}
            Ok(_) => {
                state.refused.remove(&key);
                state.record_unlimited(asker);
                for key in [asker.who, asker.repository] {
                    // An answer to a request that was sent before the rate limit does not end it.
                    let spared = state.spared.get(&key);
                    if spared.is_some_and(|spared| spared.since < asker.since) {
                        state.spared.remove(&key);
                    }
                }
            }
        }
    }

    /// Records a failure of the token endpoint or of `/v2/`. A rate limit holds for the whole host.
    pub(super) fn record_host_failure(&self, asker: &Asker, error: &RegistryError) {
        if is_plea(error) {
            self.state().back_off(asker.who, asker, error);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the delay of a request, and reserves its place among the probe requests if it is one.
    /// Fails with a refusal that is still remembered.
    fn delay(&mut self, asker: &Asker) -> Result<RequestDelay, RegistryError> {
        let now = Instant::now();
        let refused = self.refused.get(&(asker.who, asker.what.clone()));
        if let Some(refused) = refused.filter(|refused| refused.until > now) {
            return Err(refused.error);
        }
        let spared = [asker.who, asker.repository].map(|key| self.spared.get(&key));
        let longest = spared.into_iter().flatten().max_by_key(|spared| spared.until);
        if let Some(Remembered { error, until, .. }) = longest.filter(|spared| spared.until > now) {
            return Ok(RequestDelay::Backoff(until.duration_since(now), error));
        }
        let Some(probes) = self.probes.get(&asker.who).filter(|probes| probes.until > now) else {
            return Ok(RequestDelay::None);
        };
        if self.unlimited.get(&asker.repository).is_some_and(|time| time >= probes.since) {
            return Ok(RequestDelay::None);
        }
        let time = probes.next.max(now);
        let left = time.duration_since(now);
        if left <= WAITED {
            let next = time + PROBE_INTERVAL;
            self.probes.insert(asker.who, ProbeSchedule { next, ..probes });
        }
        Ok(RequestDelay::Probe(left))
    }

    /// Begins or extends the backoff of a host or a repository. Returns its end, unless a later
    /// request has recorded one already.
    fn back_off(&mut self, key: Key, asker: &Asker, error: &RegistryError) -> Option<Instant> {
        let (wish, before) = (asked_patience(error), self.spared.get(&key));
        let lasts = |count: u32| wish.unwrap_or_else(|| SPARED.after(count));
        let next = next(before, asker, error, lasts)?;
        let until = next.until;
        self.spared.insert(key, next);
        Some(until)
    }

    /// Makes requests to the other repositories of a host probe requests until then.
    fn probe_host_until(&mut self, host: Key, until: Instant) {
        let now = Instant::now();
        let begun = ProbeSchedule { since: now, until, next: now };
        let known = self.probes.get(&host).filter(|known| known.until > now);
        let until = known.map_or(until, |known| known.until.max(until));
        self.probes.insert(host, ProbeSchedule { until, ..known.unwrap_or(begun) });
    }

    /// Records that a repository was answered without a rate limit, while its host is probed.
    fn record_unlimited(&mut self, asker: &Asker) {
        let probes = self.probes.get(&asker.who);
        if probes.is_some_and(|probes| probes.until > asker.since && probes.since <= asker.since) {
            self.unlimited.insert(asker.repository, Instant::now());
        }
    }
}

fn is_refusal(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::NotFound { .. }
            | RegistryError::Unauthorized { .. }
            | RegistryError::Forbidden { .. }
            | RegistryError::PolicyRefused { .. }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(manners: &Manners, password: &str, what: &str) -> Asker {
        let (username, password) = ("u".to_owned(), password.to_owned());
        let credential = Credential::Basic { username, password };
        manners.asker("r.io", &repository("a"), &credential, what)
    }

    fn repository(name: &str) -> Repository {
        let reference: crate::Reference = format!("r.io/{name}").parse().unwrap();
        reference.repository().clone()
    }

    /// Sends an anonymous request to a repository, which is answered. Returns its delay.
    async fn succeeds(manners: &Manners, name: &str) -> Result<Duration, RegistryError> {
        let (started, what) = (Instant::now(), format!("manifest of {name}"));
        let asker = manners.asker("r.io", &repository(name), &Credential::Anonymous, &what);
        manners.before(&asker).await?;
        manners.after(&asker, &Ok(()));
        Ok(started.elapsed())
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
    async fn a_rate_limit_holds_for_everything_that_the_credential_asks_of_the_repository() {
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
    async fn other_repositories_of_a_rate_limited_host_are_probed() {
        let manners = Manners::new().unwrap();
        let limited_one =
            manners.asker("r.io", &repository("a"), &Credential::Anonymous, "manifest of a");
        manners.after(&limited_one, &limited(Some(600)));
        tokio::time::advance(Duration::from_millis(1)).await;
        let told = manners.before(&limited_one).await.unwrap_err();
        assert!(told.to_string().contains("manifest of a"), "{told}");
        // All at once: they are sent one after the other, and no more than can be waited for.
        let names: Vec<_> = (0..30).map(|number| format!("b{number}")).collect();
        let all = futures_util::future::join_all(names.iter().map(|name| succeeds(&manners, name)));
        let mut waits = Vec::new();
        for (outcome, name) in all.await.into_iter().zip(&names) {
            match outcome {
                Ok(waited) => waits.push(waited),
                Err(error) => assert!(error.to_string().contains(&format!("of {name}:"))),
            }
        }
        let expected: Vec<_> = (0..=20).map(|turn| PROBE_INTERVAL * turn).collect();
        assert_eq!(waits, expected);
        for _ in 0..100 {
            assert_eq!(succeeds(&manners, "b0").await, Ok(Duration::ZERO), "it has been answered");
        }
        // After the rate limit has ended no request is delayed.
        tokio::time::advance(Duration::from_mins(10)).await;
        assert_eq!(succeeds(&manners, "c").await, Ok(Duration::ZERO));
        assert_eq!(succeeds(&manners, "d").await, Ok(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_of_the_host_holds_for_all_its_repositories_and_names_none() {
        let manners = Manners::new().unwrap();
        let asker =
            manners.asker("r.io", &repository("a"), &Credential::Anonymous, "manifest of a");
        manners.record_host_failure(&asker, &limited(Some(60)).unwrap_err());
        let told = succeeds(&manners, "b").await.unwrap_err();
        assert!(told.to_string().contains("manifest of b"), "{told}");
        tokio::time::advance(Duration::from_secs(56)).await;
        assert_eq!(succeeds(&manners, "b").await, Ok(Duration::from_secs(4)));
        assert_eq!(succeeds(&manners, "c").await, Ok(Duration::ZERO));
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
