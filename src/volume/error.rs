//! The errors of the use cases. `csi::grpc_status` chooses their gRPC codes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use policy::PolicyError;
use pull::PullError;
use pull::pull_progress::Snapshot;
use store::StoreError;
use unpack::RelativePath;

/// A failed use case.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The request, an attribute, a secret or a reference is malformed.
    #[error("{0}")]
    Invalid(String),
    /// A well-formed reference that names something that the driver does not support.
    #[error("{0}")]
    Unsupported(String),
    /// The target has another mount, or other content.
    #[error("the target {} {what}", target.display())]
    Occupied {
        /// The path of the target.
        target: PathBuf,
        /// The other content, and the way to resolve it.
        what: &'static str,
    },
    /// A mount of another program lies inside the volume, and would be lost with it.
    #[error("the volume at {} cannot be unmounted: another mount lies inside at {}: unmount that first", target.display(), nested.display())]
    Nested {
        /// The volume's target.
        target: PathBuf,
        /// The path of the other mount.
        nested: PathBuf,
    },
    /// A mount of another program lies on top of the volume's.
    #[error("the volume at {} cannot be unmounted: another mount covers it: unmount that first", .0.display())]
    Covered(PathBuf),
    /// The target has no mount of the driver.
    #[error("no volume is published at {}", .0.display())]
    NotPublished(PathBuf),
    /// The node's policy refuses the artifact.
    #[error("{reference}: {refusal}")]
    Policy {
        /// The artifact's reference.
        reference: String,
        /// The rule that refuses it.
        refusal: PolicyError,
    },
    /// The pull failed.
    #[error("{reference}: {source}")]
    Pull {
        /// The artifact's reference.
        reference: String,
        /// The failure, which all callers of the pull share.
        source: Arc<PullError>,
    },
    /// Two artifacts of one volume have the same path.
    #[error(
        "\"{path}\" is in {one} and in {two}: give one of them a \"path\" of its own, or exclude it from one"
    )]
    Collision {
        /// The path in the volume.
        path: RelativePath,
        /// The reference of the artifact that has it.
        one: String,
        /// The reference of the artifact that comes later in the list.
        two: String,
    },
    /// The caller's deadline comes before the end of the pull, which continues.
    #[error("pulling {reference}: {progress}; the pull goes on, the next try joins it")]
    StillPulling {
        /// The artifact's reference.
        reference: String,
        /// The progress of the pull.
        progress: Box<Snapshot>,
    },
    /// Another call for this target is running, or has overtaken this one.
    #[error("another call for the target {} is at work: try again", .0.display())]
    Busy(PathBuf),
    /// The driver is starting, or something must be repaired first.
    #[error("the driver cannot publish now: {0}")]
    NotReady(String),
    /// The driver is stopping.
    #[error("the driver is shutting down; the kubelet tries again when it is back")]
    ShuttingDown,
    /// The state directory failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A system call failed.
    #[error("cannot {action} {}: {source}", target.display())]
    Kernel {
        /// The attempted action, as an infinitive.
        action: &'static str,
        /// The path of the target.
        target: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A panic in the driver.
    #[error("the driver failed internally: please report it with the driver's log")]
    Crashed,
}
