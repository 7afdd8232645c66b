//! What a registry is shown to prove who asks, and where it comes from.
//!
//! ```text
//! secret         the map that the kubelet sends with a publish -> Keyring, or what to change
//! docker_config  the bytes of a .dockerconfigjson, .dockercfg or config.json -> entries
//! keyring        which entries fit which repository, by the kubelet's rules
//! identity       whom a volume is for, and the tokens that the kubelet got for it
//! providers      the node's own: its docker configuration, and the kubelet's plugins
//! ```
//!
//! A credential goes to the host that its entry names and to no other; see
//! [`crate::registry`] for what that means with tokens and redirects.

mod docker_config;
pub mod identity;
mod keyring;
pub mod providers;
mod secret;

use std::fmt;

pub use identity::WorkloadIdentity;
pub use keyring::Keyring;
pub use secret::SecretError;

/// What is sent to a registry. `Debug` and `Display` show the kind alone.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub enum Credential {
    /// Nothing: what anybody may fetch.
    #[default]
    Anonymous,
    /// A user name and a password, or a robot's name and key.
    Basic {
        /// The user's name; may be empty.
        username: String,
        /// The password.
        password: String,
    },
    /// An `OAuth2` refresh token (`identitytoken`), exchanged for access tokens.
    IdentityToken {
        /// The entry's user name, which some registries want beside the token; may be empty.
        username: String,
        /// The refresh token.
        token: String,
    },
    /// A bearer token that the registry takes as it is (`registrytoken`).
    RegistryToken {
        /// The token.
        token: String,
    },
}

impl Credential {
    /// Bytes that two credentials share only when they are equal, for a keyed
    /// hash computed elsewhere. They contain the secret: hash them, drop them.
    #[must_use]
    pub fn principal_material(&self) -> Vec<u8> {
        let (kind, fields): (u8, [&str; 2]) = match self {
            Self::Anonymous => (0, ["", ""]),
            Self::Basic { username, password } => (1, [username, password]),
            Self::IdentityToken { username, token } => (2, [username, token]),
            Self::RegistryToken { token } => (3, [token, ""]),
        };
        let mut material = vec![kind];
        for field in fields {
            // The length in front keeps ("ab", "c") and ("a", "bc") apart.
            material.extend_from_slice(&(field.len() as u64).to_be_bytes());
            material.extend_from_slice(field.as_bytes());
        }
        material
    }

    /// Whether nothing is sent.
    #[must_use]
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
