//! DNS lookups by the system's resolver.
//!
//! A lookup occupies a thread until the system's resolver gives up, which takes 10 s and more if
//! the name servers of a zone do not answer, even if its request has long ended. The author of a
//! pod chooses names, so lookups are bounded:
//!
//! - at most [`NEW_NAMES`] lookups at once are for names that were never found, and [`KNOWN_NAMES`]
//!   for others, so that names without an answer do not delay known registries;
//! - requests for one name share one lookup;
//! - a name whose lookup failed after more than [`SLOW`] fails at once for a while, which grows
//!   with each failure of a name that was never found.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use sys::lru_map::LruMap;

const NEW_NAMES: usize = 32;
const KNOWN_NAMES: usize = 32;
const SLOW: Duration = Duration::from_secs(2);
/// First and longest pause after a slow failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(1));
/// Maximum number of remembered names, of each kind.
const REMEMBERED: usize = 4096;

/// Addresses of a name, or the reason of the failure.
type LookupResult = Result<Arc<[SocketAddr]>, Arc<str>>;

/// The lookups of one process. Cheap to clone.
#[derive(Clone)]
pub(super) struct DnsLookups(Arc<LookupsInner>);

struct LookupsInner {
    resolver: Box<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>,
    of_new: Arc<Semaphore>,
    of_known: Arc<Semaphore>,
    state: Mutex<LookupState>,
}

struct LookupState {
    running: HashMap<String, Shared<BoxFuture<'static, LookupResult>>>,
    found: LruMap<String, ()>,
    paused: LruMap<String, LookupPause>,
}

/// Pause during which a name is not looked up.
#[derive(Clone, Copy)]
struct LookupPause {
    until: Instant,
    length: Duration,
}

impl Default for DnsLookups {
    fn default() -> Self {
        // Port 0 is replaced by the port of the URL.
        Self::with(|name| {
            async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }.boxed()
        })
    }
}

impl DnsLookups {
    fn with(
        resolver: impl Fn(String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self(Arc::new(LookupsInner {
            resolver: Box::new(resolver),
            of_new: Arc::new(Semaphore::new(NEW_NAMES)),
            of_known: Arc::new(Semaphore::new(KNOWN_NAMES)),
            state: Mutex::new(LookupState {
                running: HashMap::new(),
                found: LruMap::new(REMEMBERED),
                paused: LruMap::new(REMEMBERED),
            }),
        }))
    }

    /// Returns the addresses of a name. Safe to cancel: a running lookup continues for later
    /// requests.
    pub(super) async fn addresses(&self, name: &str) -> io::Result<Arc<[SocketAddr]>> {
        let name = name.to_ascii_lowercase();
        let permits = {
            let mut state = self.0.state.lock();
            if let Some(pause) = state.paused.get(&name)
                && let Some(left) = pause.until.checked_duration_since(Instant::now())
            {
                return Err(io::Error::other(format!(
                    "name servers did not answer; the name is looked up again in {} seconds",
                    left.as_secs() + 1
                )));
            }
            let is_known = state.found.get(&name).is_some();
            Arc::clone(if is_known { &self.0.of_known } else { &self.0.of_new })
        };
        let running = self.0.state.lock().running.get(&name).cloned();
        let lookup = if let Some(lookup) = running {
            lookup
        } else {
            let permit = permits.acquire_owned().await.map_err(io::Error::other)?;
            self.begin(name, permit)
        };
        lookup.await.map_err(|reason| io::Error::other(reason.to_string()))
    }

    /// Starts a lookup, unless one for this name was started meanwhile.
    fn begin(
        &self,
        name: String,
        permit: OwnedSemaphorePermit,
    ) -> Shared<BoxFuture<'static, LookupResult>> {
        let mut state = self.0.state.lock();
        if let Some(running) = state.running.get(&name) {
            return running.clone();
        }
        let (inner, wanted) = (Arc::clone(&self.0), name.clone());
        let task = tokio::spawn(async move {
            let started = Instant::now();
            let found = (inner.resolver)(wanted.clone()).await;
            inner.record(wanted, started.elapsed(), found.is_ok());
            drop(permit);
            found.map(Arc::from).map_err(|error| Arc::from(error.to_string()))
        });
        let (inner, wanted) = (Arc::clone(&self.0), name.clone());
        let lookup = task.map(move |ended| {
            ended.unwrap_or_else(|error| {
                // An aborted task has not recorded its result.
                inner.state.lock().running.remove(&wanted);
                Err(error.to_string().into())
            })
        });
        let lookup = lookup.boxed().shared();
        state.running.insert(name, lookup.clone());
        lookup
    }
}

impl LookupsInner {
    /// Records the result of a lookup.
    fn record(&self, name: String, took: Duration, is_found: bool) {
        let mut state = self.state.lock();
        state.running.remove(&name);
        if is_found {
            state.paused.remove(&name);
            state.found.insert(name, ());
        } else if took > SLOW {
            let is_known = state.found.get(&name).is_some();
            let before = state.paused.get(&name).filter(|_| !is_known);
            let length = before.map_or(PAUSE.0, |pause| (pause.length * 2).min(PAUSE.1));
            state.paused.insert(name, LookupPause { until: Instant::now() + length, length });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Returns lookups whose resolver fails for `dead…` after 10 s, and resolves other names at once.
    fn lookups() -> (DnsLookups, Arc<AtomicUsize>, Arc<AtomicUsize>) {
        let (asked, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (count, highest) = (Arc::clone(&asked), Arc::clone(&most));
        let running = Arc::new(AtomicUsize::new(0));
        let lookups = DnsLookups::with(move |name| {
            count.fetch_add(1, Ordering::SeqCst);
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            highest.fetch_max(now, Ordering::SeqCst);
            let running = Arc::clone(&running);
            async move {
                let is_dead = name.starts_with("dead");
                if is_dead {
                    tokio::time::sleep(Duration::from_secs(10)).await;
                }
                running.fetch_sub(1, Ordering::SeqCst);
                if is_dead {
                    return Err(io::Error::other("no answer"));
                }
                Ok(vec![SocketAddr::from(([192, 0, 2, 1], 0))])
            }
            .boxed()
        });
        (lookups, asked, most)
    }

    /// Requests this name for a second. The clock of these tests is paused, so that no sleep takes real time.
    async fn request(lookups: &DnsLookups, name: String) -> bool {
        let addresses = lookups.addresses(&name);
        tokio::time::timeout(Duration::from_secs(1), addresses)
            .await
            .is_ok_and(|found| found.is_ok())
    }

    #[tokio::test(start_paused = true)]
    async fn names_without_an_answer_do_not_block_known_registries() {
        let (lookups, _, most) = lookups();
        assert!(request(&lookups, "registry.example".into()).await);
        let dead = (0..600).map(|number| request(&lookups, format!("dead{number}.example")));
        let (found, registry) = tokio::join!(
            futures_util::future::join_all(dead),
            request(&lookups, "REGISTRY.example".into())
        );
        assert!(registry && !found.contains(&true));
        assert!(most.load(Ordering::SeqCst) <= NEW_NAMES + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_goes_on_for_later_requests_and_its_failure_is_remembered() {
        let (lookups, asked, _) = lookups();
        for _ in 0..5 {
            assert!(!request(&lookups, "dead.example".into()).await);
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1, "one lookup");
        tokio::time::sleep(Duration::from_secs(6)).await;
        let refused = lookups.addresses("dead.example").await.expect_err("it is paused");
        assert!(refused.to_string().contains("again in"), "{refused}");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        tokio::time::sleep(PAUSE.0).await;
        assert!(!request(&lookups, "dead.example".into()).await);
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }
}
