//! Docker's configuration file: `{"auths": {"<registry>": {..}}}`, and the older form without
//! `auths`.
//!
//! `auth` takes precedence over `username` and `password`, as in the kubelet. Unlike the kubelet,
//! `identitytoken` and `registrytoken` are honoured, and take precedence over both: Azure writes an
//! `auth` with an empty password beside its identity token. `credsStore` and `credHelpers` name
//! programs of the machine where the file was written, so they are ignored.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::publish_secret::MAXIMUM_BYTES;
use super::{Credential, SecretError};
use text::printable::excerpt;

/// Maximum number of registries, far above real configurations: a keyring is searched linearly at
/// every publish.
const MAXIMUM_ENTRIES: usize = 4096;

/// Accepts padded and unpadded texts, since clients write both.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Credentials by key, sorted, so that two entries for the same host keep one order.
pub(super) type ConfigEntries = Vec<(String, Credential)>;

#[derive(Deserialize)]
struct DockerConfig {
    auths: Option<BTreeMap<String, DockerEntry>>,
}

/// Entry of a registry. All fields may be null, and often are.
#[derive(Deserialize, Default)]
struct DockerEntry {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// Parses the form with `auths`. A configuration without it has no entries.
pub(super) fn parse_config(key: &'static str, bytes: &[u8]) -> Result<ConfigEntries, SecretError> {
    let config: DockerConfig = decode(key, bytes)?;
    credentials(key, config.auths.unwrap_or_default())
}

/// Parses the older form, which is the map alone.
pub(super) fn parse_entries(key: &'static str, bytes: &[u8]) -> Result<ConfigEntries, SecretError> {
    credentials(key, decode(key, bytes)?)
}

fn decode<T: DeserializeOwned>(key: &'static str, bytes: &[u8]) -> Result<T, SecretError> {
    check_size(key, bytes.len(), "bytes", MAXIMUM_BYTES)?;
    serde_json::from_slice(bytes).map_err(|error| shape(key, &error))
}

pub(super) fn check_size(
    key: &'static str,
    size: usize,
    unit: &'static str,
    limit: usize,
) -> Result<(), SecretError> {
    if size > limit { Err(SecretError::TooLarge { key, size, unit, limit }) } else { Ok(()) }
}

fn credentials(
    key: &'static str,
    entries: BTreeMap<String, DockerEntry>,
) -> Result<ConfigEntries, SecretError> {
    check_size(key, entries.len(), "registries", MAXIMUM_ENTRIES)?;
    let parsed = entries.into_iter().filter_map(|(name, entry)| {
        // docker leaves an empty entry behind when a credential helper holds the secret.
        let credential = credential(key, &name, entry).transpose()?;
        Some(credential.map(|credential| (name, credential)))
    });
    parsed.collect()
}

fn credential(
    key: &'static str,
    name: &str,
    entry: DockerEntry,
) -> Result<Option<Credential>, SecretError> {
    let given = |field: Option<String>| field.filter(|text| !text.is_empty());
    let mut username = given(entry.username).unwrap_or_default();
    let mut password = given(entry.password).unwrap_or_default();
    if let Some(auth) = given(entry.auth) {
        (username, password) = decode_auth(&auth).map_err(|reason| SecretError::Auth {
            key,
            entry: excerpt(name, 100),
            reason,
        })?;
    }
    let token = |field: &'static str, value: Option<String>| match given(value) {
        Some(text) if !text.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err(SecretError::Token { key, field, entry: excerpt(name, 100) })
        }
        value => Ok(value),
    };
    if let Some(token) = token("registrytoken", entry.registrytoken)? {
        return Ok(Some(Credential::RegistryToken { token }));
    }
    if let Some(token) = token("identitytoken", entry.identitytoken)? {
        return Ok(Some(Credential::IdentityToken { username, token }));
    }
    if username.is_empty() && password.is_empty() {
        return Ok(None);
    }
    Ok(Some(Credential::Basic { username, password }))
}

/// Splits at the first colon: a password may contain more of them, a user name none.
fn decode_auth(auth: &str) -> Result<(String, String), &'static str> {
    // Skips line breaks like Go's decoder, which other clients use.
    let compact: String = auth.trim().chars().filter(|&c| c != '\n' && c != '\r').collect();
    let bytes = BASE64.decode(compact).map_err(|_| "is not base64")?;
    let text = String::from_utf8(bytes).map_err(|_| "does not decode to text")?;
    let (username, password) = text.split_once(':').ok_or("decodes to a text without a colon")?;
    Ok((username.to_owned(), password.to_owned()))
}

/// Returns line and column only, since the parser's text may quote a value.
fn shape(key: &'static str, error: &serde_json::Error) -> SecretError {
    let what = match error.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Data => "a field has another type than expected",
        serde_json::error::Category::Syntax | serde_json::error::Category::Io => "it is not JSON",
    };
    SecretError::Malformed {
        key,
        reason: format!("{what} at line {} column {}", error.line(), error.column()),
    }
}
