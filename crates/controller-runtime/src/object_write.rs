//! Writes to the API server, and the meaning of their failures.

use std::time::Duration;

use kube::api::{PatchParams, PostParams};

/// Field manager of the writes.
const MANAGER: &str = "csi-driver-oci-controller";
/// Timeout of a write.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Reason why a write failed.
#[derive(Debug)]
pub enum ObjectWriteError {
    /// Conflict with a newer version, which the watch reports.
    Outdated,
    /// The API server is overloaded or unavailable, maybe with `Retry-After`.
    Busy(Option<Duration>, String),
    /// The API server refuses the write.
    Refused(String),
}

impl ObjectWriteError {
    /// Returns the label of the reason in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Outdated => "conflict",
            Self::Busy(..) => "busy",
            Self::Refused(_) => "refused",
        }
    }
}

impl From<kube::Error> for ObjectWriteError {
    fn from(error: kube::Error) -> Self {
        let text = error.to_string();
        match error {
            kube::Error::Api(status) => match status.code {
                404 | 409 | 410 => Self::Outdated,
                408 | 429 | 500..=599 => {
                    let seconds = status.details.map_or(0, |details| details.retry_after_seconds);
                    let wait = (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)));
                    Self::Busy(wait, status.message)
                }
                _ => Self::Refused(status.message),
            },
            _ => Self::Busy(None, text),
        }
    }
}

/// Returns the parameters of a new object.
pub fn post_parameters() -> PostParams {
    PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
}

/// Returns the parameters of a change.
pub fn patch_parameters() -> PatchParams {
    PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() }
}

/// Waits for the end of a write, but not for ever.
pub async fn with_timeout<T>(
    write: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ObjectWriteError> {
    match tokio::time::timeout(TIMEOUT, write).await {
        Ok(written) => written.map_err(ObjectWriteError::from),
        Err(_) => Err(ObjectWriteError::Busy(None, "it did not answer in time".to_owned())),
    }
}
