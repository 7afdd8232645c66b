//! Lookup of the artifact of a claim.

use controller_runtime::reference_lookup::permanent;
use controller_runtime::{LookupRequest, ReferenceLookup, ResolutionFailure};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::plan::facts::LookupKey;

/// A lookup of artifacts.
pub trait ClaimLookup: Send + Sync {
    /// Asks whether the artifact exists and may be used.
    fn look_up(&self, key: LookupKey) -> BoxFuture<'static, Result<(), ResolutionFailure>>;
}

impl ClaimLookup for ReferenceLookup {
    fn look_up(&self, key: LookupKey) -> BoxFuture<'static, Result<(), ResolutionFailure>> {
        let lookup = self.clone();
        async move {
            let reference =
                key.reference.parse().map_err(|error| permanent("InvalidReference", error))?;
            let (secret_namespace, pull_secrets) = match key.secret {
                Some(secret) => (secret.namespace, vec![secret.name]),
                None => (key.namespace.clone(), Vec::new()),
            };
            let request = LookupRequest {
                namespace: key.namespace,
                secret_namespace,
                pull_secrets,
                reference,
                pins_digest: false,
            };
            let secrets = lookup.secrets(&request).await?;
            lookup.resolve(&request, secrets.credentials).await.map(drop)
        }
        .boxed()
    }
}
