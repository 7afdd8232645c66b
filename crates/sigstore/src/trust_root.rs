//! One Sigstore instance: its certificate authorities, logs and timestamp authorities.

use oci_types::Digest;
use serde::Deserialize;
use sigstore_verify::trust_root::TrustedRoot;
use sigstore_verify::{VerificationPolicy, Verifier};
use text::printable::shorten;

use super::{ring_provider, strict_json};

/// The maximum size of a `trusted_root.json` in bytes, many times that of the largest public one.
pub const MAXIMUM_TRUST_ROOT_BYTES: u64 = 1 << 20;
/// The start of the media type of any version.
const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.trustedroot";
/// The maximum length of a reason in a message in bytes.
const SHOWN_BYTES: usize = 300;

/// The transparency log of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum TransparencyLog {
    /// Each signature must be proven to be in a log of the instance.
    #[default]
    Required,
    /// The instance has no log. A timestamp authority alone says when a signature was made.
    None,
}

/// The trusted parts of one Sigstore instance.
///
/// A certificate must be proven to be in a certificate transparency log if the instance has one.
pub struct TrustRoot {
    id: Digest,
    pub(crate) verifier: Verifier,
    pub(crate) policy: VerificationPolicy,
}

/// The reason that a file is no usable trust root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustRootError {
    /// The file is larger than [`MAXIMUM_TRUST_ROOT_BYTES`].
    #[error("it has more than {MAXIMUM_TRUST_ROOT_BYTES} bytes")]
    Size,
    /// The file is no JSON of a trusted root, or a key or certificate of it is malformed.
    #[error("it is no trusted_root.json: {0}")]
    Malformed(String),
    /// A part is missing that each verification needs.
    #[error("it has no {0}")]
    Missing(&'static str),
}

impl TrustRoot {
    /// Parses a `trusted_root.json`. Fields of later versions are ignored.
    pub fn parse(json: &[u8], log: TransparencyLog) -> Result<Self, TrustRootError> {
        if json.len() as u64 > MAXIMUM_TRUST_ROOT_BYTES {
            return Err(TrustRootError::Size);
        }
        let malformed = |reason: String| TrustRootError::Malformed(shorten(&reason, SHOWN_BYTES));
        strict_json::check(json, None).map_err(|error| malformed(error.to_string()))?;
        let root: TrustedRoot =
            serde_json::from_slice(json).map_err(|error| malformed(error.to_string()))?;
        if !root.media_type.starts_with(MEDIA_TYPE) {
            return Err(malformed(format!("its media type is {}", root.media_type)));
        }
        let has_log = log == TransparencyLog::Required;
        for (part, is_missing) in [
            ("certificateAuthorities", root.certificate_authorities.is_empty()),
            (
                "tlogs: set transparencyLog: None if there is no log",
                has_log && root.tlogs.is_empty(),
            ),
            ("timestampAuthorities", !has_log && root.timestamp_authorities.is_empty()),
        ] {
            if is_missing {
                return Err(TrustRootError::Missing(part));
            }
        }
        ring_provider::install();
        let verifier = Verifier::new(&root).map_err(|error| malformed(error.to_string()))?;
        let mut policy = VerificationPolicy::any_identity();
        if !has_log {
            policy = policy.skip_tlog_unsafe();
        }
        if root.ctlogs.is_empty() {
            policy = policy.skip_sct();
        }
        let id = Digest::of(&[format!("{log:?} ").as_bytes(), json].concat());
        Ok(Self { id, verifier, policy })
    }

    /// Returns a hash of the file and of its demands. It changes with either.
    pub fn id(&self) -> Digest {
        self.id
    }
}

impl std::fmt::Debug for TrustRoot {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "TrustRoot({})", self.id)
    }
}
