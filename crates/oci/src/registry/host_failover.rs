//! Failover between the hosts of a registry.

use std::sync::Arc;

use super::Registry;
use super::error::RegistryError;
use super::exchange::Exchange;
use super::mirror_health::MirrorHealth;
use super::registry_endpoint::RegistryEndpoint;
use super::registry_request::RegistryRequest;

/// The hosts that can serve a request, in order: healthy mirrors, the registry itself, then mirrors
/// that are the last resort.
pub(super) struct HostFailover<'a> {
    registry: &'a Registry,
    request: &'a RegistryRequest<'a>,
    endpoints: Vec<Arc<RegistryEndpoint>>,
    /// Index of the registry itself.
    own: usize,
}

impl<'a> HostFailover<'a> {
    /// Creates the failover. The last endpoint is the registry itself; `None` if there is no
    /// endpoint.
    pub(super) fn new(
        registry: &'a Registry,
        request: &'a RegistryRequest<'a>,
        mut endpoints: Vec<Arc<RegistryEndpoint>>,
        health: impl Fn(&RegistryEndpoint) -> MirrorHealth,
    ) -> Option<Self> {
        let itself = endpoints.pop()?;
        let health: Vec<_> = endpoints.into_iter().map(|one| (health(&one), one)).collect();
        let of = |wanted| {
            let fitting = health.iter().filter(move |(health, _)| *health == wanted);
            fitting.map(|(_, endpoint)| Arc::clone(endpoint))
        };
        let mut endpoints: Vec<_> = of(MirrorHealth::Healthy).collect();
        let own = endpoints.len();
        endpoints.push(itself);
        endpoints.extend(of(MirrorHealth::LastResort));
        Some(Self { registry, request, endpoints, own })
    }

    /// Performs an exchange within its timeout with one host after another, see [`Self::try_each`].
    pub(super) async fn try_each_in_time<'b, T, F>(
        &'b self,
        exchange: impl Fn(Exchange<'b>) -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        self.try_each(|at| {
            let running = exchange(at);
            async move { at.timeout().run(running).await }
        })
        .await
    }

    /// Performs an exchange, which applies its timeout itself, with one host after another until
    /// one succeeds. If none does, the error of the registry itself counts. A response of it counts
    /// more than a later connection that fails: another entry for it may have other settings.
    pub(super) async fn try_each<'b, T, F>(
        &'b self,
        exchange: impl Fn(Exchange<'b>) -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        let mut registry_error: Option<RegistryError> = None;
        let mut turn = 0;
        loop {
            let endpoint = &*self.endpoints[turn];
            let is_mirror = turn != self.own;
            let at =
                Exchange { registry: self.registry, request: self.request, endpoint, is_mirror };
            let error = match at.with_backoff(Box::pin(exchange(at))).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let is_last = turn + 1 == self.endpoints.len();
            if self.is_registry_itself(endpoint) {
                let earlier = registry_error.take().filter(RegistryError::is_response);
                let error = earlier.unwrap_or(error);
                if is_last || (!is_mirror && !error.is_absence()) {
                    return Err(error);
                }
                registry_error = Some(error);
            } else {
                let mirror = endpoint.name();
                tracing::info!(%mirror, %error, "a mirror was of no use: the next host is asked");
                if is_last {
                    return Err(registry_error.unwrap_or(error));
                }
            }
            turn += 1;
        }
    }

    /// Returns whether a host is the registry itself, by its own entry or by another one.
    fn is_registry_itself(&self, endpoint: &RegistryEndpoint) -> bool {
        let (one, own) = (&endpoint.root, &self.endpoints[self.own].root);
        (one.host(), one.port(), one.path()) == (own.host(), own.port(), own.path())
    }
}
