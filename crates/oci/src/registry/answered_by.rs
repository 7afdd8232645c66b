//! Who answered a request: the registry itself, or one of its mirrors.

use std::sync::Arc;

use super::endpoint::Endpoint;
use super::transport::Answer;

/// Who answered a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnsweredBy {
    /// The registry that the reference names.
    Registry,
    /// A host that stands for it in a `hosts.toml`.
    Mirror {
        /// The root of its API, as configured.
        address: Arc<str>,
        /// Whether it gave its answer for the caller's credential. Without, it gives it to everyone.
        with_credential: bool,
    },
}

impl AnsweredBy {
    pub(super) fn of(endpoint: &Endpoint, answer: &Answer) -> Self {
        if endpoint.is_registry() {
            return Self::Registry;
        }
        Self::Mirror { address: endpoint.address(), with_credential: answer.with_credential }
    }

    /// The mirror's address; none for the registry itself.
    #[must_use]
    pub fn mirror(&self) -> Option<&Arc<str>> {
        match self {
            Self::Registry => None,
            Self::Mirror { address, .. } => Some(address),
        }
    }
}
