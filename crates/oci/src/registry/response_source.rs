//! The source of a response: the registry itself, or one of its mirrors.

use std::sync::Arc;

use super::http_transport::HttpResponse;
use super::registry_endpoint::RegistryEndpoint;

/// Source of a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnsweredBy {
    /// The registry that the reference names.
    Registry,
    /// A mirror of the registry in a `hosts.toml`.
    Mirror {
        /// Root of its API, as configured.
        address: Arc<str>,
        /// True if the response was given for the caller's credential. Otherwise it is public.
        with_credential: bool,
    },
}

impl AnsweredBy {
    pub(super) fn of(endpoint: &RegistryEndpoint, answer: &HttpResponse) -> Self {
        if endpoint.is_registry() {
            return Self::Registry;
        }
        Self::Mirror { address: endpoint.address(), with_credential: answer.with_credential }
    }

    /// Returns the address of the mirror; `None` for the registry itself.
    pub fn mirror(&self) -> Option<&Arc<str>> {
        match self {
            Self::Registry => None,
            Self::Mirror { address, .. } => Some(address),
        }
    }
}
