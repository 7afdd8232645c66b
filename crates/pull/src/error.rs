//! Why content did not get onto the node.

use std::sync::Arc;

use super::memory::NeverFits;
use oci::Digest;
use oci::credentials::providers::ProviderError;
use oci::manifest::ManifestError;
use oci::registry::RegistryError;
use oci::signature::UnmetDemand;
use store::StoreError;
use unpack::UnpackError;

/// A pull that failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// `pullPolicy: Never`, and it is not cached, or these credentials have not been proven to open
    /// it. Which of both is not told: what others have cached is their own business.
    #[error(
        "it is not cached on this node for these credentials and pullPolicy is Never: warm the node with them, or use IfNotPresent"
    )]
    NotCached,
    /// The registry, by its own error.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// No signature that the policy demands.
    #[error("{unmet}: sign {signed}, or mount what is signed")]
    Signature {
        /// The digest that the reference names on this node: its tag may have moved since.
        signed: Digest,
        /// The demand that no signature meets.
        unmet: Box<UnmetDemand>,
    },
    /// More than the policy allows.
    #[error("it has {bytes} bytes, the node's policy allows {limit} (maxArtifactBytes)")]
    TooManyBytes {
        /// Bytes of its blobs, or of its unpacked tree.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A source of the node's own credentials, and nothing else opened it.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// The manifest or index.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A layer or what it unpacks to.
    #[error(transparent)]
    Unpack(UnpackError),
    /// A configuration beyond the limit.
    #[error("its configuration has {size} bytes, the limit is {limit} (limits.configBytes)")]
    ConfigTooLarge {
        /// The size that the manifest announces.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The registry sent more or fewer bytes than the manifest says, again and again.
    #[error(
        "the registry sent {got} bytes of {digest}{}, its manifest says {expected}: {}",
        encoded(.encoding.as_deref()), size_advice(.encoding.as_deref())
    )]
    BlobSize {
        /// The digest of the blob.
        digest: Digest,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes that came; one more stands for any more.
        got: u64,
        /// Announced `Content-Encoding` of the bytes.
        encoding: Option<String>,
    },
    /// The registry sent other content than the manifest names, twice.
    #[error(
        "the registry sent content with the digest {got} for {expected}: push the artifact again"
    )]
    BlobDigest {
        /// The expected digest.
        expected: Digest,
        /// The digest of the received bytes.
        got: Digest,
    },
    /// The artifact needs more memory than the node has for one.
    #[error(transparent)]
    Memory(#[from] NeverFits),
    /// The node's own disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The last caller stopped waiting for it.
    #[error("nobody waited for it any more")]
    Unwanted,
    /// The driver is stopping.
    #[error("the driver is shutting down: it goes on where it stopped after the restart")]
    ShuttingDown,
    /// The failure of a flight that others wait for too.
    #[error(transparent)]
    Shared(Arc<PullError>),
    /// A panic in the driver.
    #[error("the driver failed internally: please report it with the driver's log")]
    Crashed,
}

fn encoded(encoding: Option<&str>) -> String {
    encoding.map(|encoding| format!(" with Content-Encoding: {encoding}")).unwrap_or_default()
}

fn size_advice(encoding: Option<&str>) -> &'static str {
    match encoding {
        Some(_) => "keep the registry or the proxy before it from encoding blobs",
        None => "push the artifact again",
    }
}

impl PullError {
    /// The failure itself, however many share it.
    pub fn root(&self) -> &Self {
        match self {
            Self::Shared(error) => error.root(),
            error => error,
        }
    }

    /// Returns whether the source of the content is at fault: another source may have the same content.
    pub fn is_of_source(&self) -> bool {
        matches!(self.root(), Self::Registry(_) | Self::BlobSize { .. } | Self::BlobDigest { .. })
    }

    /// Returns whether the node's disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self.root(), Self::Store(StoreError::NoSpace { .. } | StoreError::NoRoom(_)))
    }

    /// Returns whether this content cannot be read back on this node now, while other content can. Either a process
    /// holds a lease on it, or comparing it takes more memory than the node may have.
    pub fn leaves_unread(&self) -> bool {
        matches!(self.root(), Self::Store(StoreError::Leased { .. }) | Self::Memory(_))
    }

    /// Returns the result and the reason of a failed pull, as labels of metrics.
    pub fn outcome(&self) -> (&'static str, &'static str) {
        let reason = match self.root() {
            Self::NotCached => "not_cached",
            Self::Registry(error) => error.kind(),
            Self::Manifest(_) | Self::ConfigTooLarge { .. } => "manifest",
            Self::Unpack(_) => "content",
            Self::Memory(_) => "memory",
            Self::BlobSize { .. } | Self::BlobDigest { .. } => "wrong_content",
            Self::Store(StoreError::NoSpace { .. } | StoreError::NoRoom(_)) => "no_space",
            Self::Store(_) => "disk",
            Self::Unwanted | Self::ShuttingDown => return ("cancelled", "unwanted"),
            Self::Provider(_) => "credential_provider",
            Self::Signature { .. } | Self::TooManyBytes { .. } => "policy",
            Self::Shared(_) | Self::Crashed => "internal",
        };
        ("failure", reason)
    }

    /// Returns whether the registry could not be reached at all.
    pub fn is_unavailable(&self) -> bool {
        match self.root() {
            Self::Registry(error) => error.is_transient(),
            Self::Provider(_) => true,
            _ => false,
        }
    }
}

impl From<UnpackError> for PullError {
    fn from(error: UnpackError) -> Self {
        let staging = std::path::Path::new("the unpacked layer");
        match error {
            // The archive is innocent of what the disk does.
            UnpackError::Store(source) => StoreError::io("write", staging, source).into(),
            UnpackError::Read(source) => StoreError::io("read", staging, source).into(),
            error => Self::Unpack(error),
        }
    }
}
