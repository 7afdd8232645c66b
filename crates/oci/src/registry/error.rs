//! Why a registry did not give what was asked for.
//!
//! Messages are made here from facts alone: hosts, names, numbers. A response's
//! body, a token, an `Authorization` header or an address's query never gets in.

use std::time::Duration;

use crate::{Digest, Repository};
use text::printable::shorten;

/// The longest name of a thing in a message: a repository may have 255 characters.
const MAXIMUM_WHAT: usize = 200;
/// The longest reason of a lower layer.
const MAXIMUM_REASON: usize = 100;
/// The longest host: names in DNS may have 253 characters.
const MAXIMUM_HOST: usize = 80;

/// Why a registry did not give what was asked for. `what` reads like
/// `manifest v1 of r.io/team/app`; `host` is who answered, or did not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// 404 or 410 of the registry itself.
    #[error("the registry has no {what}: check the reference and that it was pushed")]
    NotFound {
        /// The thing asked for.
        what: String,
    },
    /// 401 after everything that the credential allows was tried.
    #[error("{host} did not accept {} for {what} (401): {}",
        shown(*.anonymous), advice(*.anonymous))]
    Unauthorized {
        /// The registry or its token server.
        host: String,
        /// The thing asked for.
        what: String,
        /// Whether no credential was there to send.
        anonymous: bool,
    },
    /// 403 of the registry or of its token server.
    #[error("{host} does not allow {what} with {} (403): {}",
        shown(*.anonymous), advice(*.anonymous))]
    Forbidden {
        /// The registry or its token server.
        host: String,
        /// The thing asked for.
        what: String,
        /// Whether no credential was there to send.
        anonymous: bool,
    },
    /// 402, 412, 423 or 451, whatever the credential.
    #[error("{host} does not give {what}, the registry's policy refuses it ({status}): {}", look_at(*.status))]
    PolicyRefused {
        /// The host that answered.
        host: String,
        /// The thing asked for.
        what: String,
        /// The status.
        status: u16,
    },
    /// 429.
    #[error("{host} limits the rate of requests (429) for {what}: it is asked again later")]
    RateLimited {
        /// Who answered.
        host: String,
        /// The thing asked for.
        what: String,
        /// From `Retry-After`, at most an hour.
        retry_after: Option<Duration>,
    },
    /// 5xx, and 408 and 425, which say the same.
    #[error("{host} answered {status} for {what}: it is asked again later")]
    ServerError {
        /// Who answered.
        host: String,
        /// The thing asked for.
        what: String,
        /// The status.
        status: u16,
        /// From `Retry-After`, at most an hour.
        retry_after: Option<Duration>,
    },
    /// No connection, or a connection that broke.
    #[error("{host} cannot be reached for {what} ({reason}): check the network, DNS and proxy")]
    Unreachable {
        /// Who did not answer.
        host: String,
        /// The thing asked for.
        what: String,
        /// What the system says.
        reason: String,
    },
    /// A connection without a TLS session that can be trusted.
    #[error(
        "no trusted TLS connection to {host} for {what} ({reason}): check its certificate and the node's roots"
    )]
    Tls {
        /// Who was connected to.
        host: String,
        /// The thing asked for.
        what: String,
        /// What rustls says.
        reason: String,
    },
    /// Nothing came in time.
    #[error("{host} sent nothing for {} seconds while asked for {what}: it is asked again later",
        .waited.as_secs())]
    Timeout {
        /// Who was waited for.
        host: String,
        /// The thing asked for.
        what: String,
        /// For how long.
        waited: Duration,
    },
    /// More bytes than allowed.
    #[error("{what} is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The thing asked for.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// Other content than asked for or announced.
    #[error(
        "{what} has the digest {got} instead of {expected}: the registry or a proxy before it changed it"
    )]
    DigestMismatch {
        /// The thing asked for.
        what: String,
        /// The digest that was asked for or announced.
        expected: Digest,
        /// The digest of what came.
        got: Digest,
    },
    /// A 4xx or 5xx of the storage that the registry redirected to. Its addresses
    /// expire, so this is no verdict: the registry must be asked again.
    #[error(
        "the storage {host} behind the registry answered {status} for {what}: the registry is asked for a new address"
    )]
    Storage {
        /// The storage's host.
        host: String,
        /// The thing asked for.
        what: String,
        /// The status.
        status: u16,
        /// From `Retry-After`, at most an hour.
        retry_after: Option<Duration>,
    },
    /// An address that neither a pod's author nor a registry may aim the node at.
    #[error(
        "{host} is not asked: {what}, and nobody configured it; the administrator can name it in a hosts.toml or in registries.allowedAddresses"
    )]
    Address {
        /// The host that was named.
        host: String,
        /// What its address is.
        what: String,
    },
    /// The node's own configuration of this registry.
    #[error("the node's configuration of this registry cannot be used: {reason}")]
    Configuration {
        /// Which file, and what is wrong with it.
        reason: String,
    },
    /// An answer that makes no sense.
    #[error("{host} answered something unusable for {what}: {reason}")]
    Protocol {
        /// Who answered.
        host: String,
        /// The thing asked for.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The options given to the client.
    #[error("the registry client cannot be set up: {reason}")]
    Setup {
        /// What is wrong.
        reason: String,
    },
}

impl RegistryError {
    /// Whether the same request may well succeed later without anybody
    /// changing anything on this node.
    #[must_use]
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

    /// The same failure, told of another thing: what one caller was told of a host says nothing of
    /// what that caller asked for.
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

    /// Whether nobody was there to answer, or nobody with the time for it.
    pub(super) fn is_absence(&self) -> bool {
        match self {
            Self::Storage { .. } => !self.is_expiry(),
            _ => self.is_transient(),
        }
    }

    /// Whether it may be a presigned address that has expired, which any other is not.
    #[must_use]
    pub fn is_expiry(&self) -> bool {
        matches!(self, Self::Storage { status: 400..=499, .. })
            && !matches!(self, Self::Storage { status: 408 | 425 | 429, .. })
    }

    /// What went wrong, in one word of a short list, for metrics.
    #[must_use]
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

    /// Returns whether another credential may succeed where this one did not. Registries that hide
    /// private repositories answer 404.
    #[must_use]
    pub fn may_depend_on_credential(&self) -> bool {
        matches!(self, Self::Unauthorized { .. } | Self::Forbidden { .. } | Self::NotFound { .. })
    }
}

/// Names a thing in messages.
pub(super) fn describe(object: &str, repository: &Repository) -> String {
    shorten(&format!("{object} of {repository}"), MAXIMUM_WHAT)
}

/// Bounds what a lower layer says. Bytes count, not characters: a status message has 1 KiB for everything.
pub(super) fn reason(text: &str) -> String {
    shorten(text, MAXIMUM_REASON)
}

/// Bounds what names a file.
pub(super) fn long_reason(text: &str) -> String {
    shorten(text, 3 * MAXIMUM_REASON)
}

/// Bounds a host's name.
pub(super) fn host(text: &str) -> String {
    shorten(text, MAXIMUM_HOST)
}

fn shown(anonymous: bool) -> &'static str {
    if anonymous { "an anonymous request" } else { "these credentials" }
}

fn advice(anonymous: bool) -> &'static str {
    if anonymous {
        "give credentials in nodePublishSecretRef, or check the repository's name"
    } else {
        "check the secret and its right to pull"
    }
}

/// Returns the place in the registry's settings that shows the reason of a refusal.
fn look_at(status: u16) -> &'static str {
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
        let anonymous = true;
        let status = 599;
        let all = [
            RegistryError::NotFound { what: what.clone() },
            RegistryError::Unauthorized { host: host.clone(), what: what.clone(), anonymous },
            RegistryError::Forbidden { host: host.clone(), what: what.clone(), anonymous },
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
