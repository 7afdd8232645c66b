//! The secret of `nodePublishSecretRef`: the kubelet sends all its keys, decoded.

use std::collections::HashMap;

use super::{Credential, Keyring, docker_config};

const DOCKER_CONFIG_JSON: &str = ".dockerconfigjson";
const DOCKER_CFG: &str = ".dockercfg";
const USERNAME: &str = "username";
const PASSWORD: &str = "password";
/// Put into the same map by the kubelet, service account tokens among them.
const KUBELET_PREFIX: &str = "csi.storage.k8s.io/";

/// What a secret may hold at most: Kubernetes itself stores no more than this.
pub(super) const MAXIMUM_BYTES: usize = 1024 * 1024;

/// Why a secret or a docker configuration gives no credentials. Messages name
/// keys and what to change, never content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// None of the known keys is there.
    #[error(
        "the secret has none of the keys .dockerconfigjson, .dockercfg, username with password: \
         use a secret of type kubernetes.io/dockerconfigjson or kubernetes.io/basic-auth"
    )]
    NoKnownKey,
    /// One half of a pair.
    #[error("the secret has the key {present} without {missing}: add {missing}")]
    HalfAPair {
        /// The key that is there.
        present: &'static str,
        /// The key that is not.
        missing: &'static str,
    },
    /// Not JSON, or JSON of another shape.
    #[error(
        "{key} is not a docker configuration ({reason}): \
         recreate it with kubectl create secret docker-registry"
    )]
    Malformed {
        /// The secret's key, or the file's role.
        key: &'static str,
        /// Where the parser stopped; it quotes nothing.
        reason: String,
    },
    /// An `auth` field that does not decode.
    #[error(
        "{key}: the field auth of \"{entry}\" {reason}: it must be base64 of <user>:<password>"
    )]
    Auth {
        /// The secret's key, or the file's role.
        key: &'static str,
        /// The registry that the entry is for, shortened.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A token that cannot be sent.
    #[error(
        "{key}: the field {field} of \"{entry}\" has characters that no HTTP header may carry: \
             paste the token without line breaks"
    )]
    Token {
        /// The secret's key, or the file's role.
        key: &'static str,
        /// `identitytoken` or `registrytoken`.
        field: &'static str,
        /// The registry that the entry is for, shortened.
        entry: String,
    },
    /// More than any honest configuration holds.
    #[error("{key} has {size} {unit}, the limit is {limit}: keep only the registries in use")]
    TooLarge {
        /// The secret's key, or the file's role.
        key: &'static str,
        /// How much there is.
        size: usize,
        /// Of what.
        unit: &'static str,
        /// How much is read.
        limit: usize,
    },
}

impl Keyring {
    /// Reads the secret that came with a publish. `username` and `password`
    /// count for `reference_host` (`host[:port]`) alone, as nothing else says
    /// whom they are for. An empty map is an empty keyring.
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
            // Beside a docker configuration, a stray half is somebody's note.
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
