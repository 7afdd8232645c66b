//! The secret of `nodePublishSecretRef`: the kubelet sends all its keys, decoded.

use std::collections::HashMap;

use super::{Credential, Keyring, docker_config};

const DOCKER_CONFIG_JSON: &str = ".dockerconfigjson";
const DOCKER_CFG: &str = ".dockercfg";
const USERNAME: &str = "username";
const PASSWORD: &str = "password";
/// Prefix of the keys that the kubelet adds to the map, such as service account tokens.
const KUBELET_PREFIX: &str = "csi.storage.k8s.io/";

/// Maximum size of a secret in bytes, the limit of Kubernetes itself.
pub(super) const MAXIMUM_BYTES: usize = 1024 * 1024;

/// Reason why a secret or a docker configuration gives no credentials. Messages name keys and the
/// necessary change, never content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// A secret without any known key.
    #[error(
        "the secret has none of the keys .dockerconfigjson, .dockercfg, username with password: \
         use a secret of type kubernetes.io/dockerconfigjson or kubernetes.io/basic-auth"
    )]
    NoKnownKey,
    /// A user name without a password, or the reverse.
    #[error("the secret has the key {present} without {missing}: add {missing}")]
    HalfAPair {
        /// Name of the present key.
        present: &'static str,
        /// Name of the missing key.
        missing: &'static str,
    },
    /// Content that is not JSON, or JSON of another schema.
    #[error(
        "{key} is not a docker configuration ({reason}): \
         recreate it with kubectl create secret docker-registry"
    )]
    Malformed {
        /// Key in the secret, or a description of the file.
        key: &'static str,
        /// Position at which the parser stopped, without quoted content.
        reason: String,
    },
    /// An `auth` field that does not decode.
    #[error(
        "{key}: the field auth of \"{entry}\" {reason}: it must be base64 of <user>:<password>"
    )]
    Auth {
        /// Key in the secret, or a description of the file.
        key: &'static str,
        /// Registry of the entry, shortened.
        entry: String,
        /// Defect of the field.
        reason: &'static str,
    },
    /// A token that no HTTP header can carry.
    #[error(
        "{key}: the field {field} of \"{entry}\" has characters that no HTTP header may carry: \
             paste the token without line breaks"
    )]
    Token {
        /// Key in the secret, or a description of the file.
        key: &'static str,
        /// `identitytoken` or `registrytoken`, the field of the token.
        field: &'static str,
        /// Registry of the entry, shortened.
        entry: String,
    },
    /// More content than any real configuration has.
    #[error("{key} has {size} {unit}, the limit is {limit}: keep only the registries in use")]
    TooLarge {
        /// Key in the secret, or a description of the file.
        key: &'static str,
        /// Size that was found.
        size: usize,
        /// Unit of the size and the limit.
        unit: &'static str,
        /// Largest accepted size.
        limit: usize,
    },
}

impl Keyring {
    /// Reads the secret of a publish request. `username` and `password` apply to `reference_host`
    /// (`host[:port]`) only, since the secret names no other registry. An empty map gives an empty
    /// keyring.
    pub fn from_secrets(
        secrets: &HashMap<String, String>,
        reference_host: &str,
    ) -> Result<Self, SecretError> {
        let mut keys = secrets.keys().filter(|key| !key.starts_with(KUBELET_PREFIX)).peekable();
        if keys.peek().is_none() {
            return Ok(Self::empty());
        }
        let mut keyring = Self::empty();
        let mut known = false;
        if let Some(content) = secrets.get(DOCKER_CONFIG_JSON) {
            known = true;
            keyring
                .add_entries(docker_config::parse_config(DOCKER_CONFIG_JSON, content.as_bytes())?);
        }
        if let Some(content) = secrets.get(DOCKER_CFG) {
            known = true;
            keyring.add_entries(docker_config::parse_entries(DOCKER_CFG, content.as_bytes())?);
        }
        match (secrets.get(USERNAME), secrets.get(PASSWORD)) {
            (Some(username), Some(password)) => {
                known = true;
                for (key, value) in [(USERNAME, username), (PASSWORD, password)] {
                    docker_config::check_size(key, value.len(), "bytes", MAXIMUM_BYTES)?;
                }
                keyring.add_for_host(
                    reference_host,
                    Credential::Basic { username: username.clone(), password: password.clone() },
                );
            }
            // Beside a docker configuration, a user name or password alone is ignored.
            (Some(_), None) if !known => {
                return Err(SecretError::HalfAPair { present: USERNAME, missing: PASSWORD });
            }
            (None, Some(_)) if !known => {
                return Err(SecretError::HalfAPair { present: PASSWORD, missing: USERNAME });
            }
            _ => {}
        }
        if known { Ok(keyring) } else { Err(SecretError::NoKnownKey) }
    }

    /// Reads a docker `config.json`, of the node or of a command's `--docker-config`.
    pub fn from_docker_config(bytes: &[u8]) -> Result<Self, SecretError> {
        let mut keyring = Self::empty();
        keyring.add_entries(docker_config::parse_config("the docker configuration", bytes)?);
        Ok(keyring)
    }
}
