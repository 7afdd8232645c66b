//! Resolution of the references of preloads, and of the credentials for their registries.
//!
//! The registry is asked once for all nodes, with the secrets of the preload's namespace.

use std::sync::Arc;

use controller_runtime::reference_lookup::{SecretCredentials, permanent, transient};
use controller_runtime::{LookupRequest, ReferenceLookup};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

use crate::plan::cluster_facts::{
    AnswerOrigin, ReferenceResolution, RegistryAccess, ResolutionFailure, ResolvedArtifact, Seconds,
};
use crate::sealed_credentials::PlainCredentials;
use oci::Reference;
use oci::credentials::Credential;

/// Seconds after which secrets are read again, while nodes still need them.
const SECRETS_LIFETIME: Seconds = 120;

/// A request to the resolver.
#[derive(Clone, Debug)]
pub struct ResolveRequest {
    /// Namespace of the secrets.
    pub namespace: String,
    /// Reference of the artifact.
    pub reference: Reference,
    /// Reference as in `spec.reference`.
    pub written: String,
    /// Names of the secrets.
    pub pull_secrets: Vec<String>,
    /// True to ask the registry too, false to read the secrets only.
    pub resolves: bool,
}

/// A result of the resolver.
#[derive(Clone, Debug)]
pub struct ResolveResult {
    /// Result of the registry; `None` if it was not asked.
    pub resolution: Option<ReferenceResolution>,
    /// Access to the registry.
    pub access: RegistryAccess,
    /// Credentials to seal for nodes.
    pub plain: Option<PlainCredentials>,
}

impl ResolveResult {
    /// Returns a transient failure.
    pub(super) fn failed(message: &str) -> Self {
        let refusal = transient("Internal", message);
        let resolution = Some(ReferenceResolution::Refused(refusal.clone()));
        Self { resolution, access: RegistryAccess::Refused(refusal), plain: None }
    }
}

/// A resolver of references.
pub trait ReferenceResolver: Send + Sync {
    /// Resolves a reference. Failures are part of the result.
    fn resolve(&self, request: ResolveRequest) -> BoxFuture<'static, ResolveResult>;
}

/// Resolver that uses the API server and the registries.
#[derive(Clone)]
pub struct RegistryResolver(pub ReferenceLookup);

impl ReferenceResolver for RegistryResolver {
    fn resolve(&self, request: ResolveRequest) -> BoxFuture<'static, ResolveResult> {
        let resolver = self.clone();
        async move { resolver.resolve_request(request).await }.boxed()
    }
}

impl RegistryResolver {
    async fn resolve_request(&self, request: ResolveRequest) -> ResolveResult {
        let lookup = LookupRequest {
            secret_namespace: request.namespace.clone(),
            namespace: request.namespace,
            pull_secrets: request.pull_secrets,
            reference: request.reference,
            pins_digest: true,
        };
        let read = self.0.secrets(&lookup).await.and_then(SealableSecrets::of);
        let SealableSecrets { credentials, access, plain } = match read {
            Ok(secrets) => secrets,
            Err(refusal) => {
                let access = RegistryAccess::Refused(refusal);
                return ResolveResult { resolution: None, access, plain: None };
            }
        };
        let mut resolution = None;
        if request.resolves {
            let known = self.0.resolve(&lookup, credentials).await.map(|found| {
                let origin = AnswerOrigin {
                    resolved_at: Some(found.requested_at),
                    pull_secrets: lookup.pull_secrets,
                    unavailable: None,
                };
                ReferenceResolution::Known(ResolvedArtifact {
                    reference: request.written,
                    digest: found.digest,
                    platforms: found.platforms,
                    bytes: found.bytes,
                    origin,
                })
            });
            resolution = Some(known.unwrap_or_else(ReferenceResolution::Refused));
        }
        ResolveResult { resolution, access, plain }
    }
}

/// Credentials of the secrets, with the access that they give.
struct SealableSecrets {
    credentials: Vec<Credential>,
    access: RegistryAccess,
    plain: Option<PlainCredentials>,
}

impl SealableSecrets {
    fn of(secrets: SecretCredentials) -> Result<Self, ResolutionFailure> {
        let SecretCredentials { credentials, version } = secrets;
        let plain = PlainCredentials::new(&credentials);
        let plain = plain.map_err(|error| permanent("SecretUnusable", error))?;
        if credentials.is_empty() {
            return Ok(Self { credentials, access: RegistryAccess::Open, plain: None });
        }
        // The time at which the answer is there, since a request may take longer than it lasts.
        let until = Timestamp::now().as_second() + SECRETS_LIFETIME;
        let access = RegistryAccess::Sealed { version: Arc::from(version), until };
        Ok(Self { credentials, access, plain: Some(plain) })
    }
}
