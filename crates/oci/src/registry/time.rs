//! How long one exchange may take.

use std::time::Duration;

use tokio::time::Instant;

use super::error::RegistryError;

/// The time of one exchange, which runs while the host is waited for. It stands still while the
/// node's own room is: a registry is not to be said to have been slow for that.
pub(super) struct ExchangeTime<'a> {
    host: String,
    what: &'a str,
    all: Duration,
    left: Duration,
}

impl<'a> ExchangeTime<'a> {
    pub(super) fn new(host: String, what: &'a str, all: Duration) -> Self {
        Self { host, what, all, left: all }
    }

    /// A step of the exchange, within what the steps before it have left.
    pub(super) async fn of<T>(
        &mut self,
        step: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        let since = Instant::now();
        let done = tokio::time::timeout(self.left, Box::pin(step)).await;
        self.left = self.left.saturating_sub(since.elapsed());
        done.unwrap_or_else(|_| {
            let (host, what, waited) = (self.host.clone(), self.what.to_owned(), self.all);
            Err(RegistryError::Timeout { host, what, waited })
        })
    }
}
