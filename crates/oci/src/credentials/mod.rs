//! Credentials for registries, and their sources.
//!
//! ```text
//! publish_secret     the secret of a publish request -> Keyring, or the change that it needs
//! docker_config      the bytes of a .dockerconfigjson, .dockercfg or config.json -> entries
//! keyring            matching of entries with repositories, by the kubelet's rules
//! workload_identity  the service account of a pod, with the tokens that the kubelet requested
//! providers          credentials of the node: its docker configuration, and the kubelet's plugins
//! ```
//!
//! A credential is sent to the host that its entry names, and to no other. See [`crate::registry`]
//! for the effect on tokens and redirects.

mod docker_config;
mod keyring;
pub mod providers;
mod publish_secret;
pub mod workload_identity;

use std::fmt;

pub use keyring::Keyring;
pub use publish_secret::SecretError;
pub use workload_identity::WorkloadIdentity;

/// A credential for a registry. `Debug` and `Display` print its kind only.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub enum Credential {
    /// No credential, for public content.
    #[default]
    Anonymous,
    /// A user name and a password, or the name and key of a robot account.
    Basic {
        /// User name; may be empty.
        username: String,
        /// Password, sent as `Basic`.
        password: String,
    },
    /// An `OAuth2` refresh token (`identitytoken`), exchanged for access tokens.
    IdentityToken {
        /// User name of the entry, which some registries want beside the token; may be empty.
        username: String,
        /// Refresh token of `OAuth2`.
        token: String,
    },
    /// A bearer token that the registry accepts directly (`registrytoken`).
    RegistryToken {
        /// Token, sent as `Bearer`.
        token: String,
    },
}

impl Credential {
    /// Returns bytes that two credentials share only if they are equal, for a keyed hash. They
    /// contain the secret: hash them, then drop them.
    pub fn principal_material(&self) -> Vec<u8> {
        let (kind, fields): (u8, [&str; 2]) = match self {
            Self::Anonymous => (0, ["", ""]),
            Self::Basic { username, password } => (1, [username, password]),
            Self::IdentityToken { username, token } => (2, [username, token]),
            Self::RegistryToken { token } => (3, [token, ""]),
        };
        let mut material = vec![kind];
        for field in fields {
            // The length prefix distinguishes ("ab", "c") from ("a", "bc").
            material.extend_from_slice(&(field.len() as u64).to_be_bytes());
            material.extend_from_slice(field.as_bytes());
        }
        material
    }

    /// Returns the size of its texts in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Anonymous => 0,
            Self::Basic { username, password } => username.len() + password.len(),
            Self::IdentityToken { username, token } => username.len() + token.len(),
            Self::RegistryToken { token } => token.len(),
        }
    }

    /// Returns whether no credential is sent.
    pub fn is_anonymous(&self) -> bool {
        matches!(self, Self::Anonymous)
    }
}

impl fmt::Display for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Anonymous => "no credentials",
            Self::Basic { .. } => "a user name and password",
            Self::IdentityToken { .. } => "an identity token",
            Self::RegistryToken { .. } => "a registry token",
        })
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Credential({self})")
    }
}

#[cfg(test)]
mod tests;
