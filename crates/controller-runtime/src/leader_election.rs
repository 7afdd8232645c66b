//! Leader election with a `Lease` of `coordination.k8s.io`, by the rules of client-go.
//!
//! Clocks of other processes are not trusted: a lease has expired when it did not change for its
//! duration on the local clock. The leader stops some time before others consider its lease
//! expired.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Duration after which others consider a lease expired that was not renewed.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// Duration after which the leader stops if it could not renew the lease.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Timeout of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Candidate of the election.
pub struct LeaderElection {
    api: Api<Lease>,
    name: String,
    identity: String,
    seen: Mutex<Option<ObservedLease>>,
}

/// Last observed change of the lease.
struct ObservedLease {
    version: Option<String>,
    since: Instant,
}

/// Leadership, held until it is lost or given up.
pub struct LeadershipGuard {
    election: Arc<LeaderElection>,
    /// Is cancelled when leadership is lost, and at shutdown.
    pub lost: CancellationToken,
    renewing: JoinHandle<()>,
}

impl LeaderElection {
    /// Creates a candidate. The identity must be unique among all processes.
    pub fn new(client: &Client, namespace: &str, name: &str, identity: &str) -> Self {
        Self {
            api: Api::namespaced(client.clone(), namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            seen: Mutex::new(None),
        }
    }

    /// Waits until this process leads; `None` at shutdown.
    pub async fn lead(self: &Arc<Self>, shutdown: &CancellationToken) -> Option<LeadershipGuard> {
        let mut logged = String::new();
        let renewed = loop {
            let asked = Instant::now();
            tokio::select! {
                taken = self.acquire() => match taken {
                    Ok(true) => break asked,
                    Ok(false) => logged.clear(),
                    Err(error) => {
                        let error = error.to_string();
                        if error != logged {
                            tracing::warn!(error, lease = self.name, "the lease cannot be had: trying again");
                            logged = error;
                        }
                    }
                },
                () = shutdown.cancelled() => return None,
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY_INTERVAL) => {}
                () = shutdown.cancelled() => return None,
            }
        };
        let lost = shutdown.child_token();
        let renewing = tokio::spawn(Arc::clone(self).renew(renewed, lost.clone()));
        Some(LeadershipGuard { election: Arc::clone(self), lost, renewing })
    }

    async fn renew(self: Arc<Self>, mut renewed: Instant, lost: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(RETRY_INTERVAL) => {}
                () = lost.cancelled() => return,
            }
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            // Others count from the time of the write, so this counts from before the request, not
            // from its response.
            let asked = Instant::now();
            match tokio::time::timeout(left, self.acquire()).await {
                Ok(Ok(true)) => renewed = asked,
                Ok(Ok(false)) => {
                    tracing::warn!("another process leads");
                    break;
                }
                Ok(Err(error)) => tracing::warn!(%error, "the lease was not renewed: trying again"),
                Err(_) => {}
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                tracing::warn!("the lease could not be renewed in time");
                break;
            }
        }
        lost.cancel();
    }

    /// Acquires or renews the lease. Returns whether this process holds it now.
    async fn acquire(&self) -> Result<bool, kube::Error> {
        let asked = async {
            match self.api.get_opt(&self.name).await? {
                None => {
                    let lease = Lease {
                        metadata: ObjectMeta {
                            name: Some(self.name.clone()),
                            ..ObjectMeta::default()
                        },
                        spec: Some(self.spec(None)),
                    };
                    is_acquired(self.api.create(&PostParams::default(), &lease).await)
                }
                Some(lease) if self.may_take(&lease).await => {
                    let spec = self.spec(lease.spec.as_ref());
                    let lease = Lease { spec: Some(spec), ..lease };
                    is_acquired(self.api.replace(&self.name, &PostParams::default(), &lease).await)
                }
                Some(_) => Ok(false),
            }
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
            Ok(taken) => taken,
            Err(_) => Err(kube::Error::Service("the API server did not answer in time".into())),
        }
    }

    /// Returns whether the lease is held by this process, free, or expired.
    async fn may_take(&self, lease: &Lease) -> bool {
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        let version = lease.metadata.resource_version.clone();
        let mut seen = self.seen.lock().await;
        let changed = seen.as_ref().is_none_or(|seen| seen.version != version);
        if changed {
            *seen = Some(ObservedLease { version, since: Instant::now() });
        }
        let lasts = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        let lasts = lasts.and_then(|seconds| u64::try_from(seconds).ok());
        let lasts = lasts.map_or(LEASE_DURATION, Duration::from_secs);
        match holder {
            None | Some("") => true,
            Some(holder) if holder == self.identity => true,
            Some(_) => seen.as_ref().is_some_and(|seen| seen.since.elapsed() >= lasts),
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        let ours = before
            .filter(|before| before.holder_identity.as_deref() == Some(self.identity.as_str()));
        let transitions = before.and_then(|before| before.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
            acquire_time: ours.map_or_else(|| now.clone(), |ours| ours.acquire_time.clone()),
            renew_time: now,
            lease_transitions: Some(transitions + i32::from(before.is_some() && ours.is_none())),
            ..LeaseSpec::default()
        }
    }

    /// Releases the lease. If this fails, another process has to wait for its expiry.
    async fn release(&self) {
        let freed = async {
            let Some(lease) = self.api.get_opt(&self.name).await? else { return Ok(()) };
            let Some(spec) = lease.spec.clone() else { return Ok(()) };
            if spec.holder_identity.as_deref() != Some(self.identity.as_str()) {
                return Ok(());
            }
            let spec = LeaseSpec {
                holder_identity: Some(String::new()),
                lease_duration_seconds: Some(1),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..spec
            };
            let lease = Lease { spec: Some(spec), ..lease };
            self.api.replace(&self.name, &PostParams::default(), &lease).await.map(|_| ())
        };
        if let Ok(Err(error)) = tokio::time::timeout(REQUEST_TIMEOUT, freed).await {
            let error: kube::Error = error;
            tracing::info!(%error, "the lease was not given back: others wait until it is over");
        }
    }
}

impl LeadershipGuard {
    /// Gives up leadership, so that another process can lead at once.
    pub async fn end(self) {
        self.lost.cancel();
        let _ = self.renewing.await;
        self.election.release().await;
    }
}

/// Returns false for a conflict: another process was faster.
fn is_acquired(written: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}
