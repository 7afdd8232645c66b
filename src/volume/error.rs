//! Why a use case failed. `csi::status` chooses the codes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use policy::PolicyError;
use pull::PullError;
use pull::progress::Snapshot;
use store::StoreError;

/// A use case that failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The request, an attribute, a secret or a reference is malformed.
    #[error("{0}")]
    Invalid(String),
    /// A well-formed reference that names what the driver does not support.
    #[error("{0}")]
    Unsupported(String),
    /// Something else is at the target.
    #[error("the target {} {what}", target.display())]
    Occupied {
        /// Where.
        target: PathBuf,
        /// What is there, and what to do.
        what: &'static str,
    },
    /// A mount of another program lies inside of the volume, and would be lost with it.
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
    /// Nothing of ours is there.
    #[error("no volume is published at {}", .0.display())]
    NotPublished(PathBuf),
    /// The node's policy.
    #[error("{reference}: {refusal}")]
    Policy {
        /// The artifact.
        reference: String,
        /// Why.
        refusal: PolicyError,
    },
    /// The artifact did not get onto the node.
    #[error("{reference}: {source}")]
    Pull {
        /// The artifact.
        reference: String,
        /// Why.
        source: Arc<PullError>,
    },
    /// The caller's time is up; the pull goes on.
    #[error("pulling {reference}: {progress}; the pull goes on, the next try joins it")]
    StillPulling {
        /// The artifact.
        reference: String,
        /// How far it is.
        progress: Box<Snapshot>,
    },
    /// Another call for this target is at work, or has overtaken this one.
    #[error("another call for the target {} is at work: try again", .0.display())]
    Busy(PathBuf),
    /// Not now: still starting, stopping, or something must be repaired first.
    #[error("the driver cannot publish now: {0}")]
    NotReady(String),
    /// The driver is stopping.
    #[error("the driver is shutting down; the kubelet tries again when it is back")]
    ShuttingDown,
    /// The node's disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The kernel refused.
    #[error("cannot {action} {}: {source}", target.display())]
    Kernel {
        /// What was being done.
        action: &'static str,
        /// To what.
        target: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A bug.
    #[error("the driver failed internally: please report it with the driver's log")]
    Crashed,
}
