//! Backoff: delays requests to registries that limit their rate, and remembers refusals.
//!
//! A rate limit (429, 503) holds for one repository and credential, since registries and the
//! proxies before them count by repository, too. Meanwhile the first request to each other
//! repository of the host with that credential is a probe request. Probe requests are
//! [`PROBE_INTERVAL`] apart. A repository that answers one has no delay. A rate limit of the token
//! endpoint or of `/v2/` holds for the whole host. All of this state is bounded, and ends with the
//! rate limit.
//!
//! The kubelet retries a pod that cannot start for ever, and so every pod of the same artifact. A
//! repeated refusal is cached, for half a second at first, and for twice as long with each that
//! follows: a late push is seen soon, and a permanent refusal costs two requests a minute. A
//! changed secret is another credential, which no cached refusal applies to.

use std::time::Duration;

use parking_lot::Mutex;
use sha2::Digest as _;
use tokio::time::Instant;

use super::error::{self, RegistryError};
use crate::Repository;
use crate::backoff::RetryBackoff;
use crate::credentials::Credential;
use sys::lru_map::LruMap;

/// Maximum number of entries of each map. Evicting one costs a request.
const MAXIMUM_REMEMBERED: usize = 4096;
/// Number of consecutive refusals that are not cached, since an administrator may be about to fix
/// the cause.
const UNCACHED_REFUSALS: u32 = 4;
/// Time without a refusal after which the count starts again.
const REFUSALS_RESET: Duration = Duration::from_mins(5);
/// First and longest duration for which a refusal is cached.
const REFUSAL_CACHED: RetryBackoff =
    RetryBackoff { first: Duration::from_millis(500), longest: Duration::from_secs(30) };
/// First and longest backoff for a rate limit without `Retry-After`.
const DEFAULT_BACKOFF: RetryBackoff =
    RetryBackoff { first: Duration::from_millis(250), longest: Duration::from_secs(30) };
/// Maximum delay that a request waits for. If the delay is longer, the request fails.
const MAXIMUM_WAIT: Duration = Duration::from_secs(5);
/// Time between two probe requests to a host that limits the rate of one of its repositories. A
/// host that limits all of them gets four requests a second, and each repository gets one.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// Backoff state of one process.
pub(super) struct RegistryBackoff {
    /// Salt of the keys, so that a memory dump does not reveal credentials.
    salt: [u8; 32],
    state: Mutex<BackoffState>,
}

/// A salted hash of a host and a credential, or of a repository and a credential.
type BackoffKey = [u8; 32];

struct BackoffState {
    refused: LruMap<(BackoffKey, String), BackoffEntry>,
    /// Backoff of rate-limited hosts and repositories.
    rate_limited: LruMap<BackoffKey, BackoffEntry>,
    /// Probe schedules of hosts that limit the rate of a repository.
    probes: LruMap<BackoffKey, ProbeSchedule>,
    /// Repositories of such hosts, with the time of the last answer without a rate limit.
    unlimited: LruMap<BackoffKey, Instant>,
}

/// The schedule of probe requests to a host while one of its repositories is rate-limited.
#[derive(Clone, Copy)]
struct ProbeSchedule {
    /// Time of the first rate limit. A repository that was answered later is not limited.
    since: Instant,
    /// End of the last rate limit.
    until: Instant,
    /// Earliest time of the next probe request.
    next: Instant,
}

/// A refusal or rate limit: its time, its end, and its number in a row.
#[derive(Clone)]
struct BackoffEntry {
    error: RegistryError,
    since: Instant,
    until: Instant,
    count: u32,
}

/// Key of a request, by which backoff and refusals are recorded.
pub(super) struct RequestKey {
    /// Hash of the registry and the credential.
    host_key: BackoffKey,
    /// Hash of the repository and the credential.
    repository: BackoffKey,
    host: String,
    /// Description of the requested object for errors.
    what: String,
    since: Instant,
}

/// Delay of one request.
enum RequestDelay {
    None,
    /// The rest of a backoff, with the rate limit that started it.
    Backoff(Duration, RegistryError),
    /// The time until the request may be sent as a probe request.
    Probe(Duration),
}

impl RegistryBackoff {
    pub(super) fn new() -> Result<Self, RegistryError> {
        let mut salt = [0; 32];
        getrandom::fill(&mut salt)
            .map_err(|error| RegistryError::Setup { reason: error::reason(&error.to_string()) })?;
        let state = BackoffState {
            refused: LruMap::new(MAXIMUM_REMEMBERED),
            rate_limited: LruMap::new(MAXIMUM_REMEMBERED),
            probes: LruMap::new(MAXIMUM_REMEMBERED),
            unlimited: LruMap::new(MAXIMUM_REMEMBERED),
        };
        Ok(Self { salt, state: Mutex::new(state) })
    }

    pub(super) fn request_key(
        &self,
        host: &str,
        repository: &Repository,
        credential: &Credential,
        what: &str,
    ) -> RequestKey {
        let mut hasher = sha2::Sha256::new();
        hasher.update(self.salt);
        hasher.update(host);
        hasher.update([0]);
        hasher.update(credential.principal_material());
        let host_key: BackoffKey = hasher.finalize().into();
        let mut hasher = sha2::Sha256::new();
        hasher.update(host_key);
        hasher.update(repository.to_string());
        let (repository, host) = (hasher.finalize().into(), host.to_owned());
        RequestKey { host_key, repository, host, what: what.to_owned(), since: Instant::now() }
    }

    /// Waits until the request may be sent. Fails with a cached refusal, or if the delay is longer
    /// than [`MAXIMUM_WAIT`].
    pub(super) async fn wait(&self, request: &RequestKey) -> Result<(), RegistryError> {
        let delay = self.state.lock().delay(request)?;
        match delay {
            RequestDelay::None => {}
            RequestDelay::Backoff(left, error) if left > MAXIMUM_WAIT => {
                // The rate limit may have been the response to a request for another object.
                return Err(with_retry_after(error, left).about(&request.what));
            }
            RequestDelay::Probe(left) if left > MAXIMUM_WAIT => {
                let (host, what) = (request.host.clone(), request.what.clone());
                return Err(RegistryError::RateLimited { host, what, retry_after: Some(left) });
            }
            RequestDelay::Backoff(left, _) | RequestDelay::Probe(left) => {
                tokio::time::sleep(left).await;
            }
        }
        Ok(())
    }

    /// Records the outcome of a request to a repository.
    pub(super) fn record_outcome<T>(
        &self,
        request: &RequestKey,
        outcome: &Result<T, RegistryError>,
    ) {
        let mut state = self.state.lock();
        let key = (request.host_key, request.what.clone());
        match outcome {
            Err(error) if is_refusal(error) => {
                state.record_unlimited(request);
                let before = state.refused.get(&key);
                let lasts =
                    |count: u32| REFUSAL_CACHED.after(count.saturating_sub(UNCACHED_REFUSALS));
                if let Some(next) = next(before, request, error, lasts) {
                    state.refused.insert(key, next);
                }
            }
            Err(error) if is_rate_limit(error) => {
                if let Some(until) = state.back_off(request.repository, request, error) {
                    state.probe_host_until(request.host_key, until);
                }
                state.unlimited.remove(&request.repository);
            }
            Err(_) => {}
            Ok(_) => {
                state.refused.remove(&key);
                state.record_unlimited(request);
                for key in [request.host_key, request.repository] {
                    // A response to a request from before the rate limit does not end it.
                    let rate_limited = state.rate_limited.get(&key);
                    if rate_limited.is_some_and(|rate_limited| rate_limited.since < request.since) {
                        state.rate_limited.remove(&key);
                    }
                }
            }
        }
    }

    /// Records a failure of the token endpoint or of `/v2/`. A rate limit holds for the whole host.
    pub(super) fn record_host_failure(&self, request: &RequestKey, error: &RegistryError) {
        if is_rate_limit(error) {
            self.state.lock().back_off(request.host_key, request, error);
        }
    }
}

impl BackoffState {
    /// Returns the delay of a request, and reserves its place among the probe requests if it is
    /// one. Fails with a cached refusal.
    fn delay(&mut self, request: &RequestKey) -> Result<RequestDelay, RegistryError> {
        let now = Instant::now();
        let refused = self.refused.get(&(request.host_key, request.what.clone()));
        if let Some(refused) = refused.filter(|refused| refused.until > now) {
            return Err(refused.error);
        }
        let rate_limited =
            [request.host_key, request.repository].map(|key| self.rate_limited.get(&key));
        let longest =
            rate_limited.into_iter().flatten().max_by_key(|rate_limited| rate_limited.until);
        if let Some(BackoffEntry { error, until, .. }) =
            longest.filter(|rate_limited| rate_limited.until > now)
        {
            return Ok(RequestDelay::Backoff(until.duration_since(now), error));
        }
        let Some(probes) = self.probes.get(&request.host_key).filter(|probes| probes.until > now)
        else {
            return Ok(RequestDelay::None);
        };
        if self.unlimited.get(&request.repository).is_some_and(|time| time >= probes.since) {
            return Ok(RequestDelay::None);
        }
        let time = probes.next.max(now);
        let left = time.duration_since(now);
        if left <= MAXIMUM_WAIT {
            let next = time + PROBE_INTERVAL;
            self.probes.insert(request.host_key, ProbeSchedule { next, ..probes });
        }
        Ok(RequestDelay::Probe(left))
    }

    /// Starts or extends the backoff of a host or a repository. Returns its end, unless a
    /// concurrent request has recorded it already.
    fn back_off(
        &mut self,
        key: BackoffKey,
        request: &RequestKey,
        error: &RegistryError,
    ) -> Option<Instant> {
        let (requested, before) = (requested_delay(error), self.rate_limited.get(&key));
        let lasts = |count: u32| requested.unwrap_or_else(|| DEFAULT_BACKOFF.after(count));
        let next = next(before, request, error, lasts)?;
        let until = next.until;
        self.rate_limited.insert(key, next);
        Some(until)
    }

    /// Makes requests to the other repositories of a host probe requests until then.
    fn probe_host_until(&mut self, host: BackoffKey, until: Instant) {
        let now = Instant::now();
        let begun = ProbeSchedule { since: now, until, next: now };
        let known = self.probes.get(&host).filter(|known| known.until > now);
        let until = known.map_or(until, |known| known.until.max(until));
        self.probes.insert(host, ProbeSchedule { until, ..known.unwrap_or(begun) });
    }

    /// Records that a repository was answered without a rate limit, while its host is probed.
    fn record_unlimited(&mut self, request: &RequestKey) {
        let probes = self.probes.get(&request.host_key);
        if probes
            .is_some_and(|probes| probes.until > request.since && probes.since <= request.since)
        {
            self.unlimited.insert(request.repository, Instant::now());
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

/// Returns whether the error is a rate limit: 429 or 503, not another failure of the server.
fn is_rate_limit(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::RateLimited { .. } | RegistryError::ServerError { status: 503, .. }
    )
}

fn requested_delay(error: &RegistryError) -> Option<Duration> {
    match error {
        RegistryError::RateLimited { retry_after, .. }
        | RegistryError::ServerError { retry_after, .. } => *retry_after,
        _ => None,
    }
}

fn with_retry_after(mut error: RegistryError, left: Duration) -> RegistryError {
    if let RegistryError::RateLimited { retry_after, .. }
    | RegistryError::ServerError { retry_after, .. } = &mut error
    {
        *retry_after = Some(left);
    }
    error
}

/// Returns the next entry; `None` if a concurrent request has recorded the same event.
fn next(
    before: Option<BackoffEntry>,
    request: &RequestKey,
    error: &RegistryError,
    lasts: impl Fn(u32) -> Duration,
) -> Option<BackoffEntry> {
    let now = Instant::now();
    let count = match before {
        Some(before) if before.since >= request.since && before.until >= now => return None,
        Some(before) if before.since >= request.since => before.count,
        Some(before) if before.until + REFUSALS_RESET > now => before.count.saturating_add(1),
        _ => 1,
    };
    Some(BackoffEntry { error: error.clone(), since: now, until: now + lasts(count), count })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request_key(backoff: &RegistryBackoff, password: &str, what: &str) -> RequestKey {
        let (username, password) = ("u".to_owned(), password.to_owned());
        let credential = Credential::Basic { username, password };
        backoff.request_key("r.io", &repository("a"), &credential, what)
    }

    fn repository(name: &str) -> Repository {
        let reference: crate::Reference = format!("r.io/{name}").parse().unwrap();
        reference.repository().clone()
    }

    /// Sends an anonymous request to a repository, which is answered. Returns its delay.
    async fn succeeds(backoff: &RegistryBackoff, name: &str) -> Result<Duration, RegistryError> {
        let (started, what) = (Instant::now(), format!("manifest of {name}"));
        let request = backoff.request_key("r.io", &repository(name), &Credential::Anonymous, &what);
        backoff.wait(&request).await?;
        backoff.record_outcome(&request, &Ok(()));
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
    async fn a_repeated_refusal_is_cached_longer_for_one_credential_and_object() {
        let backoff = RegistryBackoff::new().unwrap();
        let ours = || request_key(&backoff, "wrong", "manifest v1");
        for _ in 0..UNCACHED_REFUSALS {
            tokio::time::advance(Duration::from_millis(1)).await;
            let ours = ours();
            backoff.wait(&ours).await.unwrap();
            backoff.record_outcome(&ours, &gone());
        }
        for seconds in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] {
            tokio::time::advance(Duration::from_millis(1)).await;
            let (ours, meanwhile) = (ours(), ours());
            backoff.wait(&ours).await.unwrap();
            backoff.record_outcome(&ours, &gone());
            backoff.record_outcome(&meanwhile, &gone());
            assert_eq!(backoff.wait(&ours).await, gone());
            assert_eq!(backoff.wait(&request_key(&backoff, "mended", "manifest v1")).await, Ok(()));
            assert_eq!(backoff.wait(&request_key(&backoff, "wrong", "manifest v2")).await, Ok(()));
            tokio::time::advance(Duration::from_secs_f64(seconds - 0.01)).await;
            assert_eq!(backoff.wait(&ours).await, gone(), "after {seconds} s");
            tokio::time::advance(Duration::from_millis(20)).await;
        }
        backoff.record_outcome(&ours(), &Ok(()));
        backoff.record_outcome(&ours(), &gone());
        assert_eq!(backoff.wait(&ours()).await, Ok(()), "a success makes it the first again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_limit_holds_for_all_requests_of_a_credential_to_the_repository() {
        let backoff = RegistryBackoff::new().unwrap();
        backoff.record_outcome(&request_key(&backoff, "p", "blob 1"), &limited(Some(60)));
        let other = request_key(&backoff, "p", "blob 2");
        let told = limited(Some(60)).map_err(|error| error.about("blob 2"));
        assert_eq!(backoff.wait(&other).await, told, "nothing is said of the first");
        assert_eq!(backoff.wait(&request_key(&backoff, "other", "blob 2")).await, Ok(()));
        tokio::time::advance(Duration::from_secs(57)).await;
        let started = Instant::now();
        assert_eq!(backoff.wait(&other).await, Ok(()), "what is short is waited for");
        assert_eq!(started.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn other_repositories_of_a_rate_limited_host_are_probed() {
        let backoff = RegistryBackoff::new().unwrap();
        let limited_one =
            backoff.request_key("r.io", &repository("a"), &Credential::Anonymous, "manifest of a");
        backoff.record_outcome(&limited_one, &limited(Some(600)));
        tokio::time::advance(Duration::from_millis(1)).await;
        let told = backoff.wait(&limited_one).await.unwrap_err();
        assert!(told.to_string().contains("manifest of a"), "{told}");
        // Concurrent probe requests are sent one after the other, and those with too long a delay fail.
        let names: Vec<_> = (0..30).map(|number| format!("b{number}")).collect();
        let all = futures_util::future::join_all(names.iter().map(|name| succeeds(&backoff, name)));
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
            assert_eq!(succeeds(&backoff, "b0").await, Ok(Duration::ZERO), "it has been answered");
        }
        // After the rate limit has ended no request is delayed.
        tokio::time::advance(Duration::from_mins(10)).await;
        assert_eq!(succeeds(&backoff, "c").await, Ok(Duration::ZERO));
        assert_eq!(succeeds(&backoff, "d").await, Ok(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_limit_of_the_host_holds_for_all_its_repositories() {
        let backoff = RegistryBackoff::new().unwrap();
        let request =
            backoff.request_key("r.io", &repository("a"), &Credential::Anonymous, "manifest of a");
        backoff.record_host_failure(&request, &limited(Some(60)).unwrap_err());
        let told = succeeds(&backoff, "b").await.unwrap_err();
        assert!(told.to_string().contains("manifest of b"), "{told}");
        tokio::time::advance(Duration::from_secs(56)).await;
        assert_eq!(succeeds(&backoff, "b").await, Ok(Duration::from_secs(4)));
        assert_eq!(succeeds(&backoff, "c").await, Ok(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn backoff_without_retry_after_grows() {
        let backoff = RegistryBackoff::new().unwrap();
        let ours = || request_key(&backoff, "p", "blob");
        for milliseconds in [250, 500, 1000, 2000, 4000] {
            backoff.record_outcome(&ours(), &limited(None));
            let started = Instant::now();
            assert_eq!(backoff.wait(&ours()).await, Ok(()));
            assert_eq!(started.elapsed(), Duration::from_millis(milliseconds));
        }
        let meanwhile = ours();
        backoff.record_outcome(&ours(), &limited(None));
        backoff.record_outcome(&meanwhile, &Ok(()));
        let told = limited(Some(8)).map_err(|error| error.about("blob"));
        assert_eq!(backoff.wait(&ours()).await, told);
        tokio::time::advance(Duration::from_secs(8)).await;
        backoff.record_outcome(&ours(), &Ok(()));
        backoff.record_outcome(&ours(), &limited(None));
        let started = Instant::now();
        assert_eq!(backoff.wait(&ours()).await, Ok(()));
        assert_eq!(started.elapsed(), Duration::from_millis(250), "the first again");
    }
}
