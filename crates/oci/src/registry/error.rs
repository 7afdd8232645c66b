//! Errors of registries.
//!
//! Messages consist of facts only: hosts, names, numbers. They never contain a response body, a
//! token, an `Authorization` header or the query of a URL.

use std::time::Duration;

use crate::{Digest, Repository};
use text::printable::shorten;

/// Maximum bytes of an object's description in a message: a repository may have 255 characters.
const MAXIMUM_WHAT: usize = 200;
/// Maximum bytes of a lower layer's reason.
const MAXIMUM_REASON: usize = 100;
/// Maximum bytes of a host: DNS names may have 253 characters.
const MAXIMUM_HOST: usize = 80;

/// Advice in messages after a request without credentials. Commands replace it by their own.
pub const GIVE_SECRET: &str =
    "give credentials in nodePublishSecretRef, or check the repository's name";
/// Advice in messages after a request with credentials.
pub const CHECK_SECRET: &str = "check the secret and its right to pull";

/// Credential that a refused request had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShownCredential {
    /// No credential was given.
    Nothing,
    /// A credential was given, but not sent: no supported challenge asks for it.
    Withheld,
    /// The given credential, or a token that was made from it.
    Credential,
}

/// Reason why a request to a registry failed. `what` describes the requested object, such as
/// `manifest v1 of r.io/team/app`; `host` is the host that responded, or did not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// 404 or 410 from the registry itself.
    #[error("the registry has no {what}: check the reference and that it was pushed")]
    NotFound {
        /// Description of the requested object.
        what: String,
    },
    /// 401 after all uses of the credential were tried.
    #[error("{host} did not accept {} for {what} (401): {}",
        .shown.describe(), .shown.advice())]
    Unauthorized {
        /// Registry or token server.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Credential of the request.
        shown: ShownCredential,
    },
    /// 403 from the registry or its token server.
    #[error("{host} does not allow {what} with {} (403): {}",
        .shown.describe(), .shown.advice())]
    Forbidden {
        /// Registry or token server.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Credential of the request.
        shown: ShownCredential,
    },
    /// 402, 412, 423 or 451, which do not depend on the credential.
    #[error("{host} does not give {what}, the registry's policy refuses it ({status}): {}", where_to_look(*.status))]
    PolicyRefused {
        /// Host that responded.
        host: String,
        /// Description of the requested object.
        what: String,
        /// HTTP status code.
        status: u16,
    },
    /// 429: a rate limit.
    #[error("{host} limits the rate of requests (429) for {what}: it is asked again later")]
    RateLimited {
        /// Host that responded.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Delay of `Retry-After`, at most an hour.
        retry_after: Option<Duration>,
    },
    /// 5xx, 408 or 425: a temporary failure of the server.
    #[error("{host} answered {status} for {what}: it is asked again later")]
    ServerError {
        /// Host that responded.
        host: String,
        /// Description of the requested object.
        what: String,
        /// HTTP status code.
        status: u16,
        /// Delay of `Retry-After`, at most an hour.
        retry_after: Option<Duration>,
    },
    /// A connection that failed or broke.
    #[error("{host} cannot be reached for {what} ({reason}): check the network, DNS and proxy")]
    Unreachable {
        /// Host of the connection.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Error of the system.
        reason: String,
    },
    /// A TLS session that could not be established or verified.
    #[error(
        "no trusted TLS connection to {host} for {what} ({reason}): check its certificate and the node's roots"
    )]
    Tls {
        /// Host of the connection.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Error of rustls.
        reason: String,
    },
    /// A timeout without a response, or with one that is too slow.
    #[error("{host} sent nothing, or too little, for {} seconds while asked for {what}: it is asked again later",
        .waited.as_secs())]
    Timeout {
        /// Host of the connection.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Length of the timeout.
        waited: Duration,
    },
    /// A response over a size limit.
    #[error("{what} is larger than the limit of {limit} bytes")]
    TooLarge {
        /// Description of the requested object.
        what: String,
        /// Limit in bytes.
        limit: u64,
    },
    /// Content that differs from the requested or announced digest.
    #[error(
        "{what} has the digest {got} instead of {expected}: the registry or a proxy before it changed it"
    )]
    DigestMismatch {
        /// Description of the requested object.
        what: String,
        /// Requested or announced digest.
        expected: Digest,
        /// Digest of the received content.
        got: Digest,
    },
    /// 4xx or 5xx from the storage that the registry redirected to. Presigned URLs expire, so the
    /// registry has to be asked for a new one.
    #[error(
        "the storage {host} behind the registry answered {status} for {what}: the registry is asked for a new address"
    )]
    Storage {
        /// Host of the storage.
        host: String,
        /// Description of the requested object.
        what: String,
        /// HTTP status code.
        status: u16,
        /// Delay of `Retry-After`, at most an hour.
        retry_after: Option<Duration>,
    },
    /// An address that the address rules refuse.
    #[error(
        "{host} is not asked: {what}, and nobody configured it; the administrator can name it in a hosts.toml or in registries.allowedAddresses"
    )]
    Address {
        /// Host that resolves to the address.
        host: String,
        /// Class of the address.
        what: String,
    },
    /// A broken configuration of this registry on the node.
    #[error("the node's configuration of this registry cannot be used: {reason}")]
    Configuration {
        /// Path of the file and its defect.
        reason: String,
    },
    /// A response that violates the protocol.
    #[error("{host} answered something unusable for {what}: {reason}")]
    Protocol {
        /// Host that responded.
        host: String,
        /// Description of the requested object.
        what: String,
        /// Defect of the response.
        reason: String,
    },
    /// Unusable options of the client.
    #[error("the registry client cannot be set up: {reason}")]
    Setup {
        /// Defect of the options.
        reason: String,
    },
}

impl RegistryError {
    /// Returns the error for an answer that cannot be used.
    pub(super) fn protocol(host: &str, what: &str, reason: impl Into<String>) -> Self {
        Self::Protocol { host: host.to_owned(), what: what.to_owned(), reason: reason.into() }
    }

    /// Returns whether the same request may succeed later without a change on this node.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::ServerError { .. }
            | Self::Unreachable { .. }
            | Self::Tls { .. }
            | Self::Timeout { .. }
            | Self::Storage { .. } => true,
            Self::NotFound { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::PolicyRefused { .. }
            | Self::TooLarge { .. }
            | Self::DigestMismatch { .. }
            | Self::Address { .. }
            | Self::Configuration { .. }
            | Self::Protocol { .. }
            | Self::Setup { .. } => false,
        }
    }

    /// Returns the same failure with the description of another object, for requests that share one
    /// failure of a host: they must not reveal each other's objects.
    #[must_use]
    pub fn about(mut self, thing: &str) -> Self {
        match &mut self {
            Self::NotFound { what }
            | Self::Unauthorized { what, .. }
            | Self::Forbidden { what, .. }
            | Self::PolicyRefused { what, .. }
            | Self::RateLimited { what, .. }
            | Self::ServerError { what, .. }
            | Self::Unreachable { what, .. }
            | Self::Tls { what, .. }
            | Self::Timeout { what, .. }
            | Self::TooLarge { what, .. }
            | Self::DigestMismatch { what, .. }
            | Self::Storage { what, .. }
            | Self::Protocol { what, .. } => thing.clone_into(what),
            Self::Address { .. } | Self::Configuration { .. } | Self::Setup { .. } => {}
        }
        self
    }

    /// Returns whether the host was not available, or too busy to respond.
    pub(super) fn is_absence(&self) -> bool {
        match self {
            Self::Storage { .. } => !self.is_expiry(),
            _ => self.is_transient(),
        }
    }

    /// Returns whether the host responded, whatever it said.
    pub(super) fn is_response(&self) -> bool {
        !matches!(self, Self::Unreachable { .. } | Self::Tls { .. } | Self::Timeout { .. })
    }

    /// Returns whether a presigned URL may have expired, so that a new one may work.
    pub fn is_expiry(&self) -> bool {
        matches!(self, Self::Storage { status: 400..=499, .. })
            && !matches!(self, Self::Storage { status: 408 | 425 | 429, .. })
    }

    /// Returns the kind of the error for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Unauthorized { .. } => "unauthorized",
            Self::Forbidden { .. } => "forbidden",
            Self::PolicyRefused { .. } => "policy_refused",
            Self::RateLimited { .. } => "rate_limited",
            Self::ServerError { .. } => "server_error",
            Self::Unreachable { .. } => "unreachable",
            Self::Tls { .. } => "tls",
            Self::Timeout { .. } => "timeout",
            Self::Storage { .. } => "storage",
            Self::TooLarge { .. } | Self::DigestMismatch { .. } => "wrong_content",
            Self::Protocol { .. } => "protocol",
            Self::Setup { .. } | Self::Configuration { .. } => "configuration",
            Self::Address { .. } => "address",
        }
    }

    /// Returns whether another credential may succeed. Registries that hide private repositories
    /// answer 404.
    pub fn may_depend_on_credential(&self) -> bool {
        matches!(self, Self::Unauthorized { .. } | Self::Forbidden { .. } | Self::NotFound { .. })
    }
}

/// Describes an object for messages.
pub(super) fn describe(object: &str, repository: &Repository) -> String {
    shorten(&format!("{object} of {repository}"), MAXIMUM_WHAT)
}

/// Shortens the reason of a lower layer. The limit is in bytes, since a status message has 1 KiB in
/// all.
pub(super) fn reason(text: &str) -> String {
    shorten(text, MAXIMUM_REASON)
}

/// Shortens a reason that contains a path.
pub(super) fn long_reason(text: &str) -> String {
    shorten(text, 3 * MAXIMUM_REASON)
}

/// Shortens the name of a host.
pub(super) fn host(text: &str) -> String {
    shorten(text, MAXIMUM_HOST)
}

impl ShownCredential {
    /// Returns the description of a request with or without credentials.
    pub(super) fn of(anonymous: bool) -> Self {
        if anonymous { Self::Nothing } else { Self::Credential }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Nothing => "an anonymous request",
            Self::Withheld => "a request without credentials",
            Self::Credential => "these credentials",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Nothing => GIVE_SECRET,
            Self::Withheld => {
                "it asks for no supported scheme (Basic, Bearer), so the credentials were not sent: check its authentication, or a proxy before it"
            }
            Self::Credential => CHECK_SECRET,
        }
    }
}

/// Returns advice on where to look in the registry's settings after a refusal.
fn where_to_look(status: u16) -> &'static str {
    match status {
        402 => "look at the registry's quota and subscription",
        412 => "look at the artifact's scan, signature and the project's rules in the registry",
        423 => "look at whether the repository or the artifact is locked in the registry",
        _ => "it may not be given for legal reasons, ask the registry's administrator",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    #[test]
    fn no_message_is_longer_than_500_bytes() {
        let label = "a".repeat(60);
        let long = format!("{label}.{label}.{label}.{label}:65535/{}", "b/".repeat(80));
        let reference: Reference = format!("{long}b").parse().unwrap();
        let digest = Digest::of(b"");
        let what = describe(&format!("manifest {digest}"), reference.repository());
        let host = host(reference.repository().host());
        let reason = reason(&"ö\n".repeat(1000));
        let waited = Duration::from_hours(1);
        let shown = ShownCredential::Withheld;
        let status = 599;
        let all = [
            RegistryError::NotFound { what: what.clone() },
            RegistryError::Unauthorized { host: host.clone(), what: what.clone(), shown },
            RegistryError::Forbidden { host: host.clone(), what: what.clone(), shown },
            RegistryError::PolicyRefused { host: host.clone(), what: what.clone(), status: 412 },
            RegistryError::RateLimited {
                host: host.clone(),
                what: what.clone(),
                retry_after: Some(waited),
            },
            RegistryError::ServerError {
                host: host.clone(),
                what: what.clone(),
                status,
                retry_after: Some(waited),
            },
            RegistryError::Unreachable {
                host: host.clone(),
                what: what.clone(),
                reason: reason.clone(),
            },
            RegistryError::Tls { host: host.clone(), what: what.clone(), reason: reason.clone() },
            RegistryError::Timeout { host: host.clone(), what: what.clone(), waited },
            RegistryError::TooLarge { what: what.clone(), limit: u64::MAX },
            RegistryError::DigestMismatch { what: what.clone(), expected: digest, got: digest },
            RegistryError::Storage {
                host: host.clone(),
                what: what.clone(),
                status,
                retry_after: Some(waited),
            },
            RegistryError::Address { host: host.clone(), what: reason.clone() },
            RegistryError::Configuration { reason: long_reason(&"x".repeat(1000)) },
            RegistryError::Protocol { host, what, reason: reason.clone() },
            RegistryError::Setup { reason },
        ];
        for error in all {
            let text = error.to_string();
            assert!(text.len() < 500, "{} bytes: {text}", text.len());
            assert!(!text.contains('\n'));
        }
    }
}
