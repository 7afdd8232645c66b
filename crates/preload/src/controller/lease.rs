//! Which process leads: a `Lease` of `coordination.k8s.io`, by the rules of client-go.
//!
//! Nobody's clock is trusted: a lease is over when it has not changed for its duration by one's own clock. Whoever
//! leads stops a while before others may think so.

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

/// So long a lease lasts without being renewed, for others.
const DURATION: Duration = Duration::from_secs(15);
/// So long one leads without having renewed it.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two tries.
const INTERVAL: Duration = Duration::from_secs(2);
/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Takes part in the election.
#[derive(Clone)]
pub struct Elector(Arc<Inner>);

struct Inner {
    api: Api<Lease>,
    name: String,
    identity: String,
    seen: Mutex<Option<Seen>>,
}

/// A lease as it was last seen to change.
struct Seen {
    version: Option<String>,
    since: Instant,
}

/// Leading, until it is lost.
pub struct Leading {
    elector: Elector,
    lost: CancellationToken,
    renewing: JoinHandle<()>,
}

impl Elector {
    /// Takes part under this identity, which no other process has.
    #[must_use]
    pub fn new(client: &Client, namespace: &str, name: &str, identity: &str) -> Self {
        Self(Arc::new(Inner {
            api: Api::namespaced(client.clone(), namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            seen: Mutex::new(None),
        }))
    }

    /// Waits until this process leads; none at shutdown.
    pub async fn lead(&self, shutdown: &CancellationToken) -> Option<Leading> {
        let mut told = String::new();
        let renewed = loop {
            let asked = Instant::now();
            tokio::select! {
                taken = self.0.take() => match taken {
                    Ok(true) => break asked,
                    Ok(false) => told.clear(),
                    Err(error) => {
                        let error = error.to_string();
                        if error != told {
                            tracing::warn!(error, lease = self.0.name, "the lease cannot be had: trying again");
                            told = error;
                        }
                    }
                },
                () = shutdown.cancelled() => return None,
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = shutdown.cancelled() => return None,
            }
        };
        let lost = shutdown.child_token();
        let renewing = tokio::spawn(Arc::clone(&self.0).renew(renewed, lost.clone()));
        Some(Leading { elector: self.clone(), lost, renewing })
    }
}

impl Leading {
    /// Cancelled when it is lost, and at shutdown.
    #[must_use]
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Stops, and lets another one lead at once.
    pub async fn end(self) {
        self.lost.cancel();
        let _ = self.renewing.await;
        self.elector.0.give_up().await;
    }
}

impl Inner {
    async fn renew(self: Arc<Self>, mut renewed: Instant, lost: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = lost.cancelled() => return,
            }
            let left = DEADLINE.saturating_sub(renewed.elapsed());
            // Others count from when it was written, which an answer that takes long comes long after.
            let asked = Instant::now();
            match tokio::time::timeout(left, self.take()).await {
                Ok(Ok(true)) => renewed = asked,
                Ok(Ok(false)) => {
                    tracing::warn!("another process leads");
                    break;
                }
                Ok(Err(error)) => tracing::warn!(%error, "the lease was not renewed: trying again"),
                Err(_) => {}
            }
            if renewed.elapsed() >= DEADLINE {
                tracing::warn!("the lease could not be renewed in time");
                break;
            }
        }
        lost.cancel();
    }

    /// Takes the lease where it is free or over, renews it where it is ours; whether it is ours now.
    async fn take(&self) -> Result<bool, kube::Error> {
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
                    won(self.api.create(&PostParams::default(), &lease).await)
                }
                Some(lease) if self.may_take(&lease).await => {
                    let spec = self.spec(lease.spec.as_ref());
                    let lease = Lease { spec: Some(spec), ..lease };
                    won(self.api.replace(&self.name, &PostParams::default(), &lease).await)
                }
                Some(_) => Ok(false),
            }
        };
        match tokio::time::timeout(TIMEOUT, asked).await {
            Ok(taken) => taken,
            Err(_) => Err(kube::Error::Service("the API server did not answer in time".into())),
        }
    }

    /// Whether it is ours, free, or has not changed for as long as it lasts.
    async fn may_take(&self, lease: &Lease) -> bool {
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        let version = lease.metadata.resource_version.clone();
        let mut seen = self.seen.lock().await;
        let changed = seen.as_ref().is_none_or(|seen| seen.version != version);
        if changed {
            *seen = Some(Seen { version, since: Instant::now() });
        }
        let lasts = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        let lasts = lasts.and_then(|seconds| u64::try_from(seconds).ok());
        let lasts = lasts.map_or(DURATION, Duration::from_secs);
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
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: ours.map_or_else(|| now.clone(), |ours| ours.acquire_time.clone()),
            renew_time: now,
            lease_transitions: Some(transitions + i32::from(before.is_some() && ours.is_none())),
            ..LeaseSpec::default()
        }
    }

    /// Best effort: without it another one waits until the lease is over.
    async fn give_up(&self) {
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
        if let Ok(Err(error)) = tokio::time::timeout(TIMEOUT, freed).await {
            let error: kube::Error = error;
            tracing::info!(%error, "the lease was not given back: others wait until it is over");
        }
    }
}

/// Somebody was faster: no failure, and no win.
fn won(written: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}
