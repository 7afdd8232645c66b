//! Timeout of one exchange.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::error::RegistryError;

/// Remaining time of one exchange. It decreases only while the host is waited for, not while the
/// node's own memory budget is: that is not the registry's fault.
pub(super) struct ExchangeTimeout<'a> {
    host: Arc<str>,
    what: &'a str,
    all: Duration,
    left: Duration,
}

impl<'a> ExchangeTimeout<'a> {
    pub(super) fn new(host: Arc<str>, what: &'a str, all: Duration) -> Self {
        Self { host, what, all, left: all }
    }

    /// Runs a step of the exchange within the remaining time.
    pub(super) async fn run<T>(
        &mut self,
        step: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        let since = Instant::now();
        let done = tokio::time::timeout(self.left, Box::pin(step)).await;
        self.left = self.left.saturating_sub(since.elapsed());
        done.unwrap_or_else(|_| {
            let (host, what, waited) = (self.host.to_string(), self.what.to_owned(), self.all);
            Err(RegistryError::Timeout { host, what, waited })
        })
    }
}
