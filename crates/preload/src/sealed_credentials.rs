//! Sealed credentials, which only one process of one node can decrypt.
//!
//! Each node plugin generates a key at start, keeps the private half in memory only, and publishes
//! the public half in the status of its object. The controller seals the credentials of the
//! artifact's registry to it, by HPKE (RFC 9180, base mode: X25519, HKDF-SHA256,
//! ChaCha20-Poly1305). Sealed credentials are bound to the node, the preload and the reference: in
//! another context they cannot be opened.

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

/// HPKE `info`, which separates this use of the key from any other.
const PURPOSE: &[u8] = b"csi-driver-oci preload credentials v1";
/// Maximum bytes of all credentials of one artifact: a token of a cloud registry has two or three
/// thousand, and the sealed and encoded bytes have to fit into the field of the object.
const MAXIMUM_BYTES: usize = 4096;

type HpkePrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type HpkePublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type EncapsulatedKey = <X25519HkdfSha256 as Kem>::EncappedKey;

/// Context that sealed credentials are bound to.
#[derive(Clone, Copy, Debug)]
pub struct SealContext<'a> {
    /// Name of the node.
    pub node: &'a str,
    /// Preload as `namespace/name`.
    pub preload: &'a str,
    /// Artifact with its digest.
    pub reference: &'a str,
}

/// Encoded credentials before sealing. `Debug` prints their size only.
#[derive(Clone, PartialEq, Eq)]
pub struct PlainCredentials(Vec<u8>);

/// Key pair of this process.
pub struct NodeKey {
    private: HpkePrivateKey,
    public: String,
}

/// Reason why credentials cannot be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// More bytes of credentials than the limit.
    #[error(
        "the credentials for this registry have {0} bytes, the limit is {MAXIMUM_BYTES}: keep only those in use in the secrets"
    )]
    TooLarge(usize),
    /// An invalid public key.
    #[error("the node's key is not one")]
    Key,
    /// Sealed for another process or context, or damaged.
    #[error("the credentials were not sealed for this process")]
    NotForUs,
}

/// Encoding of one credential.
#[derive(Serialize, Deserialize)]
struct EncodedCredential(#[serde(with = "CredentialEncoding")] Credential);

/// Names of the kinds of credentials in their encoding.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Credential", rename_all = "camelCase")]
enum CredentialEncoding {
    #[serde(skip)]
    Anonymous,
    Basic {
        username: String,
        password: String,
    },
    #[serde(rename = "identity")]
    IdentityToken {
        username: String,
        token: String,
    },
    #[serde(rename = "registry")]
    RegistryToken {
        token: String,
    },
}

impl fmt::Debug for PlainCredentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PlainCredentials({} bytes)", self.0.len())
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "NodeKey({})", self.public)
    }
}

impl PlainCredentials {
    /// Encodes the credentials for a registry, in the order in which they are tried.
    pub fn new(credentials: &[Credential]) -> Result<Self, SealError> {
        let named = credentials.iter().filter(|credential| !credential.is_anonymous());
        let sealed: Vec<_> = named.cloned().map(EncodedCredential).collect();
        let bytes = serde_json::to_vec(&sealed).map_err(|_| SealError::TooLarge(0))?;
        match bytes.len() {
            size if size > MAXIMUM_BYTES => Err(SealError::TooLarge(size)),
            _ => Ok(Self(bytes)),
        }
    }

    /// Seals the credentials to the key of a node. The result differs each time.
    pub fn seal(&self, public_key: &str, place: SealContext<'_>) -> Result<String, SealError> {
        let key = BASE64.decode(public_key).map_err(|_| SealError::Key)?;
        let key = HpkePublicKey::from_bytes(&key).map_err(|_| SealError::Key)?;
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

impl SealContext<'_> {
    /// Returns the context as bytes. They are unambiguous, since none of the texts has a line
    /// break.
    fn bytes(self) -> Vec<u8> {
        format!("{}\n{}\n{}", self.node, self.preload, self.reference).into_bytes()
    }
}

impl NodeKey {
    /// Generates a new key pair.
    pub fn generate() -> Self {
        let (private, public) = X25519HkdfSha256::gen_keypair();
        Self { private, public: BASE64.encode(public.to_bytes()) }
    }

    /// Returns the public key in base64.
    pub fn public(&self) -> &str {
        &self.public
    }

    /// Opens credentials that were sealed to this key for this context.
    pub fn open(&self, sealed: &str, place: SealContext<'_>) -> Result<Vec<Credential>, SealError> {
        let bytes = BASE64.decode(sealed).map_err(|_| SealError::NotForUs)?;
        let (encapsulated, sealed) =
            bytes.split_at_checked(EncapsulatedKey::size()).ok_or(SealError::NotForUs)?;
        let encapsulated =
            EncapsulatedKey::from_bytes(encapsulated).map_err(|_| SealError::NotForUs)?;
        let opened = single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.private,
            &encapsulated,
            PURPOSE,
            sealed,
            &place.bytes(),
        );
        let opened = opened.map_err(|_| SealError::NotForUs)?;
        let sealed: Vec<EncodedCredential> =
            serde_json::from_slice(&opened).map_err(|_| SealError::NotForUs)?;
        Ok(sealed.into_iter().map(|EncodedCredential(credential)| credential).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: SealContext<'_> =
        SealContext { node: "worker-1", preload: "team/tool", reference: "r.io/tool:v1@sha256:00" };

    fn credentials() -> Vec<Credential> {
        vec![
            Credential::Basic { username: "robot".into(), password: "s3cret".into() },
            Credential::RegistryToken { token: "t0ken".into() },
        ]
    }

    #[test]
    fn what_is_sealed_is_opened_by_its_key_alone() {
        let (key, other) = (NodeKey::generate(), NodeKey::generate());
        let plain = PlainCredentials::new(&credentials()).expect("short");
        let sealed = plain.seal(key.public(), PLACE).expect("sealed");
        assert_eq!(key.open(&sealed, PLACE), Ok(credentials()));
        assert_eq!(other.open(&sealed, PLACE), Err(SealError::NotForUs));
        assert_ne!(plain.seal(key.public(), PLACE).expect("sealed"), sealed);
        assert!(!format!("{plain:?}{key:?}").contains("s3cret"));
    }

    #[test]
    fn what_is_sealed_cannot_be_moved_or_changed() {
        let key = NodeKey::generate();
        let plain = PlainCredentials::new(&credentials()).expect("short");
        let sealed = plain.seal(key.public(), PLACE).expect("sealed");
        for place in [
            SealContext { node: "worker-2", ..PLACE },
            SealContext { preload: "team/other", ..PLACE },
            SealContext { reference: "evil.org/tool:v1@sha256:00", ..PLACE },
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
        let of = |length: usize| {
            PlainCredentials::new(&[Credential::RegistryToken { token: "x".repeat(length) }])
        };
        let longest = (0..MAXIMUM_BYTES).rev().find_map(|length| of(length).ok()).expect("one");
        let sealed = longest.seal(NodeKey::generate().public(), PLACE).expect("sealed");
        assert!(sealed.len() <= 6144, "{}", sealed.len());
        assert!(matches!(of(MAXIMUM_BYTES), Err(SealError::TooLarge(_))));
    }
}
