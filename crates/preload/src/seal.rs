//! Credentials that one process of one node can read, and nobody else.
//!
//! Each node plugin makes a key when it starts, keeps the private half in its memory alone, and publishes the public
//! half in its object's status. The controller seals to it, by HPKE (RFC 9180, base mode: X25519, HKDF-SHA256,
//! ChaCha20-Poly1305), what the secrets have for this one artifact's registry. What is sealed is bound to the node,
//! the preload and the reference: moved to another place, it cannot be opened.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{
    Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _, single_shot_open,
    single_shot_seal,
};
use serde::{Deserialize, Serialize};

use oci::credentials::Credential;

/// What it is for, so that nothing sealed for another purpose is ever opened here.
const PURPOSE: &[u8] = b"csi-driver-oci preload credentials v1";
/// Bytes of all credentials of one artifact: a token of a cloud's registry has two or three thousand, and sealed and
/// encoded they have to fit the object's field.
const MAXIMUM_BYTES: usize = 4096;

type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type Encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey;

/// Where sealed credentials stand.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The node's name.
    pub node: &'a str,
    /// `namespace/name` of the preload.
    pub preload: &'a str,
    /// The artifact, with its digest.
    pub reference: &'a str,
}

/// Credentials, ready to be sealed. `Debug` shows none of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Plain(Vec<u8>);

/// The key of this process.
pub struct NodeKey {
    private: PrivateKey,
    public: String,
}

/// Why credentials cannot be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Too many or too long ones.
    #[error(
        "the credentials for this registry have {0} bytes, the limit is {MAXIMUM_BYTES}: keep only those in use in the secrets"
    )]
    TooLarge(usize),
    /// A key that is none.
    #[error("the node's key is not one")]
    Key,
    /// Not for this process, not for this place, or damaged.
    #[error("the credentials were not sealed for this process")]
    NotForUs,
}

/// One credential as it is sealed.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Sealed {
    Basic { username: String, password: String },
    Identity { username: String, token: String },
    Registry { token: String },
}

impl fmt::Debug for Plain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Plain({} bytes)", self.0.len())
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "NodeKey({})", self.public)
    }
}

impl Plain {
    /// What the secrets have for a registry, in the order in which it is tried.
    pub fn new(credentials: &[Credential]) -> Result<Self, SealError> {
        let sealed: Vec<Sealed> = credentials
            .iter()
            .filter_map(|credential| match credential.clone() {
                Credential::Anonymous => None,
                Credential::Basic { username, password } => {
                    Some(Sealed::Basic { username, password })
                }
                Credential::IdentityToken { username, token } => {
                    Some(Sealed::Identity { username, token })
                }
                Credential::RegistryToken { token } => Some(Sealed::Registry { token }),
            })
            .collect();
        let bytes = serde_json::to_vec(&sealed).map_err(|_| SealError::TooLarge(0))?;
        match bytes.len() {
            size if size > MAXIMUM_BYTES => Err(SealError::TooLarge(size)),
            _ => Ok(Self(bytes)),
        }
    }

    /// Seals them to a node's key; two times are never equal.
    pub fn seal(&self, public_key: &str, place: Place<'_>) -> Result<String, SealError> {
        let key = BASE64.decode(public_key).map_err(|_| SealError::Key)?;
        let key = PublicKey::from_bytes(&key).map_err(|_| SealError::Key)?;
        let sealed = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeS::Base,
            &key,
            PURPOSE,
            &self.0,
            &place.bytes(),
        );
        let (encapsulated, sealed) = sealed.map_err(|_| SealError::Key)?;
        let mut bytes = encapsulated.to_bytes().to_vec();
        bytes.extend(sealed);
        Ok(BASE64.encode(bytes))
    }
}

impl Place<'_> {
    /// No two places have the same bytes: none of the texts has a line break.
    fn bytes(self) -> Vec<u8> {
        format!("{}\n{}\n{}", self.node, self.preload, self.reference).into_bytes()
    }
}

impl NodeKey {
    /// A new one.
    #[must_use]
    pub fn generate() -> Self {
        let (private, public) = X25519HkdfSha256::gen_keypair();
        Self { private, public: BASE64.encode(public.to_bytes()) }
    }

    /// What others seal to.
    #[must_use]
    pub fn public(&self) -> &str {
        &self.public
    }

    /// Opens what was sealed to this key for this place.
    pub fn open(&self, sealed: &str, place: Place<'_>) -> Result<Vec<Credential>, SealError> {
        let bytes = BASE64.decode(sealed).map_err(|_| SealError::NotForUs)?;
        let (encapsulated, sealed) =
            bytes.split_at_checked(Encapsulated::size()).ok_or(SealError::NotForUs)?;
        let encapsulated =
            Encapsulated::from_bytes(encapsulated).map_err(|_| SealError::NotForUs)?;
        let opened = single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.private,
            &encapsulated,
            PURPOSE,
            sealed,
            &place.bytes(),
        );
        let opened = opened.map_err(|_| SealError::NotForUs)?;
        let sealed: Vec<Sealed> =
            serde_json::from_slice(&opened).map_err(|_| SealError::NotForUs)?;
        let credentials = sealed.into_iter().map(|credential| match credential {
            Sealed::Basic { username, password } => Credential::Basic { username, password },
            Sealed::Identity { username, token } => Credential::IdentityToken { username, token },
            Sealed::Registry { token } => Credential::RegistryToken { token },
        });
        Ok(credentials.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'_> =
        Place { node: "worker-1", preload: "team/tool", reference: "r.io/tool:v1@sha256:00" };

    fn credentials() -> Vec<Credential> {
        vec![
            Credential::Basic { username: "robot".into(), password: "s3cret".into() },
            Credential::RegistryToken { token: "t0ken".into() },
        ]
    }

    #[test]
    fn what_is_sealed_is_opened_by_its_key_alone() {
        let (key, other) = (NodeKey::generate(), NodeKey::generate());
        let plain = Plain::new(&credentials()).expect("short");
        let sealed = plain.seal(key.public(), PLACE).expect("sealed");
        assert_eq!(key.open(&sealed, PLACE), Ok(credentials()));
        assert_eq!(other.open(&sealed, PLACE), Err(SealError::NotForUs));
        assert_ne!(plain.seal(key.public(), PLACE).expect("sealed"), sealed);
        assert!(!format!("{plain:?}{key:?}").contains("s3cret"));
    }

    #[test]
    fn what_is_sealed_cannot_be_moved_or_changed() {
        let key = NodeKey::generate();
        let plain = Plain::new(&credentials()).expect("short");
        let sealed = plain.seal(key.public(), PLACE).expect("sealed");
        for place in [
            Place { node: "worker-2", ..PLACE },
            Place { preload: "team/other", ..PLACE },
            Place { reference: "evil.org/tool:v1@sha256:00", ..PLACE },
        ] {
            assert_eq!(key.open(&sealed, place), Err(SealError::NotForUs));
        }
        for wrong in ["", "AAAA", "?", &sealed[4..], &sealed.replace('A', "B")] {
            if wrong != sealed {
                assert_eq!(key.open(wrong, PLACE), Err(SealError::NotForUs), "{wrong}");
            }
        }
        assert_eq!(plain.seal("AAAA", PLACE), Err(SealError::Key));
        assert_eq!(plain.seal(&BASE64.encode([0; 32]), PLACE), Err(SealError::Key));
    }

    #[test]
    fn the_longest_credentials_fit_the_objects_field() {
        let of =
            |length: usize| Plain::new(&[Credential::RegistryToken { token: "x".repeat(length) }]);
        let longest = (0..MAXIMUM_BYTES).rev().find_map(|length| of(length).ok()).expect("one");
        let sealed = longest.seal(NodeKey::generate().public(), PLACE).expect("sealed");
        assert!(sealed.len() <= 6144, "{}", sealed.len());
        assert!(matches!(of(MAXIMUM_BYTES), Err(SealError::TooLarge(_))));
    }
}
