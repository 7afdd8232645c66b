//! The one place that chooses gRPC codes.
//!
//! The kubelet retries after any code. After ABORTED, UNAVAILABLE and `RESOURCE_EXHAUSTED` it takes the volume for
//! "uncertain". Every other code is final for this call, and promises that nothing is left at the target.

use tonic::{Code, Status};

use crate::volume::VolumeError;
use oci::digest::DigestError;
use oci::manifest::ManifestError;
use oci::registry::RegistryError;
use pull::PullError;
use store::StoreError;
use text::printable::shorten;
use unpack::Class;

/// The most bytes of a message. Events are cut at 1,024 characters, and the kubelet puts text of its own in front.
const MAXIMUM_BYTES: usize = 900;

/// Returns the status of a failed call: the code by cause, the whole chain of causes as one text.
pub fn status(error: &VolumeError) -> Status {
    Status::new(code(error), message(error))
}

/// Returns whether the kubelet takes the code for the end of this call.
pub fn is_final(code: Code) -> bool {
    !matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

/// Returns the code by cause.
pub fn code(error: &VolumeError) -> Code {
    match error {
        // The pod's author has to change something.
        VolumeError::Invalid(_) => Code::InvalidArgument,
        VolumeError::Occupied { .. } => Code::AlreadyExists,
        VolumeError::NotPublished(_) => Code::NotFound,
        VolumeError::Policy { .. }
        | VolumeError::Unsupported(_)
        | VolumeError::Collision { .. } => Code::FailedPrecondition,
        VolumeError::Pull { source, .. } => pull(source.root()),
        // The kubelet calls again. An unpublish follows when the pod is deleted.
        VolumeError::StillPulling { .. }
        | VolumeError::Busy(_)
        | VolumeError::Nested { .. }
        | VolumeError::Covered(_) => Code::Aborted,
        VolumeError::NotReady(_) | VolumeError::ShuttingDown => Code::Unavailable,
        VolumeError::Store(error) => store(error),
        VolumeError::Kernel { .. } | VolumeError::Crashed => Code::Internal,
    }
}

fn pull(error: &PullError) -> Code {
    match error {
        PullError::NotCached => Code::NotFound,
        PullError::Registry(error) => registry(error),
        PullError::Manifest(error) => manifest(error),
        PullError::Unpack(error) => match error.class() {
            Class::Refused => Code::FailedPrecondition,
            Class::Corrupt | Class::Io => Code::Internal,
        },
        PullError::ConfigTooLarge { .. }
        | PullError::Memory(_)
        | PullError::Signature { .. }
        | PullError::TooManyBytes { .. } => Code::FailedPrecondition,
        PullError::BlobSize { .. } | PullError::BlobDigest { .. } | PullError::Crashed => {
            Code::Internal
        }
        PullError::Store(error) => store(error),
        // The node's own credentials are repaired on the node, without a change of the pod.
        PullError::Provider(_) | PullError::ShuttingDown => Code::Unavailable,
        // Only a caller that no longer waits, or that joined at the moment of the end, can see this.
        PullError::Unwanted => Code::Aborted,
        PullError::Shared(error) => pull(error),
    }
}

fn registry(error: &RegistryError) -> Code {
    match error {
        RegistryError::NotFound { .. } => Code::NotFound,
        RegistryError::Unauthorized { .. } => Code::Unauthenticated,
        RegistryError::Forbidden { .. } | RegistryError::PolicyRefused { .. } => {
            Code::PermissionDenied
        }
        RegistryError::RateLimited { .. }
        | RegistryError::ServerError { .. }
        | RegistryError::Unreachable { .. }
        | RegistryError::Tls { .. }
        | RegistryError::Timeout { .. }
        | RegistryError::Storage { .. }
        | RegistryError::Configuration { .. }
        | RegistryError::Setup { .. } => Code::Unavailable,
        RegistryError::TooLarge { .. } | RegistryError::Address { .. } => Code::FailedPrecondition,
        RegistryError::DigestMismatch { .. } | RegistryError::Protocol { .. } => Code::Internal,
    }
}

fn manifest(error: &ManifestError) -> Code {
    match error {
        ManifestError::Undecodable(_)
        | ManifestError::Digest(DigestError::Malformed(_))
        | ManifestError::NegativeSize { .. }
        | ManifestError::Config(_)
        | ManifestError::Data(_) => Code::Internal,
        ManifestError::Digest(DigestError::Algorithm(_))
        | ManifestError::MediaType(_)
        | ManifestError::TooManyLayers { .. }
        | ManifestError::BlobTooLarge { .. }
        | ManifestError::NoPlatform { .. }
        | ManifestError::OtherPlatform { .. }
        | ManifestError::NestedIndex(_) => Code::FailedPrecondition,
    }
}

fn store(error: &StoreError) -> Code {
    match error {
        StoreError::NoSpace { .. }
        | StoreError::NoRoom(_)
        | StoreError::TooMuchPinned { .. }
        | StoreError::PinShareExceeded { .. } => Code::ResourceExhausted,
        StoreError::CannotFollow { .. } => Code::FailedPrecondition,
        StoreError::Io { .. } | StoreError::Damaged { .. } => Code::Internal,
        StoreError::Locked { .. }
        | StoreError::Format { .. }
        | StoreError::NotMounted { .. }
        // Retried until the leases are gone.
        | StoreError::Leased { .. }
        | StoreError::Foreign { .. } => Code::Unavailable,
    }
}

/// Formats the chain of causes as one line within the limit, without control characters, which may come from untrusted
/// input.
fn message(error: &VolumeError) -> String {
    let mut text = error.to_string();
    // A cause that the message quotes already is not repeated.
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let because = error.to_string();
        if !text.contains(&because) {
            text.push_str(": ");
            text.push_str(&because);
        }
        cause = error.source();
    }
    shorten(&text.replace(char::is_control, " "), MAXIMUM_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_bounded_line() {
        let error = VolumeError::Invalid("ä\n".repeat(5000));
        let status = status(&error);
        assert!(status.message().len() < 1024 && !status.message().contains('\n'));
    }

    #[test]
    fn what_may_still_be_running_is_never_final() {
        for error in [
            VolumeError::Busy("/t".into()),
            VolumeError::ShuttingDown,
            VolumeError::NotReady(String::new()),
            VolumeError::StillPulling {
                reference: String::new(),
                progress: Box::new(pull::ProgressView::default().snapshot()),
            },
        ] {
            assert!(!is_final(code(&error)), "{error}");
        }
        assert!(is_final(code(&VolumeError::Crashed)));
    }
}
