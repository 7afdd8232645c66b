//! The configuration file: what it may say, and where it is wrong.
//!
//! Unknown keys are errors, so that a misspelt limit is not silently no limit.
//! Everything is read at start; no section is read again without a restart.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::pull::PullOptions;
use crate::pull::transfer::RetryPolicy;
use crate::unpack::Limits;

/// The document's `apiVersion`.
pub const API_VERSION: &str = "oci.custom.io/v1alpha1";
/// The document's `kind`.
pub const KIND: &str = "NodeConfiguration";

/// The label that containers may read, where nothing else is configured.
const DEFAULT_FILE_LABEL: &str = "system_u:object_r:container_file_t:s0";

/// A node's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeConfiguration {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    /// How much is pulled at once, and how patiently.
    #[serde(default)]
    pub pull: PullSection,
    /// Every bound on untrusted input.
    #[serde(default)]
    pub limits: Limits,
    /// For nodes with SELinux.
    #[serde(default)]
    pub selinux: SelinuxSection,
}

/// The `pull` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PullSection {
    /// Blobs that are downloaded at once on this node.
    pub downloads: usize,
    /// Layers that are unpacked at once on this node.
    pub unpacks: usize,
    /// Tries in a row that bring no byte, before a transfer fails.
    pub attempts: u32,
    /// A connection that brings nothing for so long is given up; a Go duration.
    pub stall_timeout: GoDuration,
}

/// The `selinux` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SelinuxSection {
    /// The label of content; used where SELinux is on.
    pub file_label: String,
}

/// A duration as Go writes it: `1h30m`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct GoDuration(pub Duration);

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The file.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Its content.
    #[error("the configuration file {} is wrong: {reason}", path.display())]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
}

impl NodeConfiguration {
    /// What holds without a file.
    #[must_use]
    pub fn without_file() -> Self {
        Self { api_version: API_VERSION.to_owned(), kind: KIND.to_owned(), ..Self::default() }
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigurationError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })?;
        Self::parse(&text)
            .map_err(|reason| ConfigurationError::Wrong { path: path.to_owned(), reason })
    }

    /// Parses a document; the error names key and line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let configuration: Self = serde_saphyr::from_str(text).map_err(|error| one_line(&error))?;
        if configuration.api_version != API_VERSION || configuration.kind != KIND {
            return Err(format!(
                "it is {} {}: write apiVersion: {API_VERSION} and kind: {KIND}",
                configuration.api_version, configuration.kind
            ));
        }
        configuration.limits.check().map_err(|error| error.to_string())?;
        let PullSection { downloads, unpacks, attempts, stall_timeout } = configuration.pull;
        if !(1..=1024).contains(&downloads) || !(1..=1024).contains(&unpacks) {
            return Err("pull.downloads and pull.unpacks must be from 1 to 1024".to_owned());
        }
        if !(1..=1000).contains(&attempts) {
            return Err("pull.attempts must be from 1 to 1000".to_owned());
        }
        if stall_timeout.0 < Duration::from_secs(1) {
            return Err("pull.stallTimeout must be at least 1s".to_owned());
        }
        Ok(configuration)
    }

    /// What pulling is built with.
    #[must_use]
    pub fn pull_options(&self) -> PullOptions {
        PullOptions {
            downloads: self.pull.downloads,
            unpacks: self.pull.unpacks,
            retry: RetryPolicy {
                attempts: self.pull.attempts,
                first_delay: Duration::from_millis(250),
            },
        }
    }
}

impl Default for PullSection {
    fn default() -> Self {
        let PullOptions { downloads, unpacks, retry } = PullOptions::default();
        let stall_timeout = GoDuration(Duration::from_secs(30));
        Self { downloads, unpacks, attempts: retry.attempts, stall_timeout }
    }
}

impl Default for SelinuxSection {
    fn default() -> Self {
        Self { file_label: DEFAULT_FILE_LABEL.to_owned() }
    }
}

impl TryFrom<String> for GoDuration {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a duration: write it as 30s, 5m or 1h30m");
        if text.is_empty() {
            return Err(wrong());
        }
        let mut rest = text.as_str();
        let mut total = Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let value: u32 = rest[..digits].parse().map_err(|_| wrong())?;
            rest = &rest[digits..];
            let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let unit = match &rest[..end] {
                "ms" => Duration::from_millis(1),
                "s" => Duration::from_secs(1),
                "m" => Duration::from_mins(1),
                "h" => Duration::from_hours(1),
                _ => return Err(wrong()),
            };
            total = unit
                .checked_mul(value)
                .and_then(|part| total.checked_add(part))
                .ok_or_else(wrong)?;
            rest = &rest[end..];
        }
        Ok(Self(total))
    }
}

/// The parser draws the place with several lines; a status and a log have one.
fn one_line(error: &serde_saphyr::Error) -> String {
    let place =
        error.location().map(|place| format!("line {}: ", place.line())).unwrap_or_default();
    let text = error.without_snippet().to_string();
    let first = text.lines().next().unwrap_or_default().trim();
    format!("{place}{first}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";

    #[test]
    fn a_document_without_sections_is_the_default() {
        let parsed = NodeConfiguration::parse(HEAD).expect("valid");
        assert_eq!(parsed, NodeConfiguration::without_file());
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let text = format!("{HEAD}pull:\n  downlaods: 3\n");
        let error = NodeConfiguration::parse(&text).expect_err("wrong");
        assert!(error.contains("downlaods") && error.contains("line 4"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn values_are_checked() {
        let parse = |text: &str| NodeConfiguration::parse(&format!("{HEAD}{text}"));
        let parsed = parse("pull: {stallTimeout: 1m30s}\nlimits: {entries: 5}\n").expect("valid");
        assert_eq!(parsed.pull.stall_timeout.0, Duration::from_secs(90));
        assert_eq!(parsed.limits.entries, 5);
        for text in [
            "pull: {stallTimeout: 5}\n",
            "pull: {downloads: 0}\n",
            "pull: {attempts: 0}\n",
            "pull: {stallTimeout: 0s}\n",
            "limits: {depth: 99999}\n",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(NodeConfiguration::parse("apiVersion: v1\nkind: Pod\n").is_err());
    }
}
