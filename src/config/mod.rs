//! The configuration file: its schema and its checks.
//!
//! Unknown keys are errors, so that a misspelt limit is not silently ignored. A section is the type that its crate uses
//! (`limits`, `cache`, `pull`, `warm`, `volumes`, `selinux`), or has a file here. That type says whether it is read again
//! without a restart.

pub mod policy_config;
mod registries_config;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use policy_config::PolicySection;
pub use registries_config::RegistriesSection;
pub use text::duration::GoDuration;
pub use text::quantity::Quantity;

use crate::volume::mount_form::VolumeOptions;
use crate::warming::WarmList;
use pull::PullOptions;
use store::{CacheOptions, SelinuxOptions};
use sys::reload::{FileVersions, Reloadable};
use text::printable::printable;
use unpack::Limits;

/// The maximum size of the file: that of a `ConfigMap`.
const MAXIMUM_FILE_BYTES: u64 = 1024 * 1024;

/// The document's `apiVersion`.
pub const API_VERSION: &str = "oci.custom.io/v1alpha1";
/// The document's `kind`.
pub const KIND: &str = "NodeConfiguration";

/// A node's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeConfiguration {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    /// The disk space of content.
    #[serde(default)]
    pub cache: CacheOptions,
    /// The concurrency, memory and timeouts of pulls.
    #[serde(default)]
    pub pull: PullOptions,
    /// Mirrors, credentials and permitted addresses of registries.
    #[serde(default)]
    pub registries: RegistriesSection,
    /// The rules on artifacts, namespaces and signatures.
    #[serde(default)]
    pub policy: PolicySection,
    /// The limits on untrusted input.
    #[serde(default)]
    pub limits: Limits,
    /// The references that stay on the node.
    #[serde(default)]
    pub warm: WarmList,
    /// The form of mounts.
    #[serde(default)]
    pub volumes: VolumeOptions,
    /// The label of content on nodes with SELinux.
    #[serde(default)]
    pub selinux: SelinuxOptions,
}

/// An error of the configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The file cannot be read.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: std::io::Error,
    },
    /// The content of the file is invalid.
    #[error("the configuration file {} is wrong: {reason}", path.display())]
    Wrong {
        /// The path of the file.
        path: PathBuf,
        /// The place and the reason.
        reason: String,
    },
}

impl NodeConfiguration {
    /// Returns the configuration of a node without a file.
    pub fn without_file() -> Self {
        Self { api_version: API_VERSION.to_owned(), kind: KIND.to_owned(), ..Self::default() }
    }

    /// Returns the configuration of a node with or without a file.
    pub fn of_file(path: Option<&Path>) -> Result<Self, ConfigurationError> {
        path.map_or_else(|| Ok(Self::without_file()), Self::read)
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigurationError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })?;
        Self::parse(&text)
            .map_err(|reason| ConfigurationError::Wrong { path: path.to_owned(), reason })
    }

    /// Reads a file again, for a part that may change while the driver runs.
    pub fn read_again(path: &Path, seen: &mut FileVersions) -> Result<Self, String> {
        let wrong = |reason: &dyn std::fmt::Display| {
            format!("the configuration file {} is wrong: {reason}", path.display())
        };
        let bytes = seen.read(path, MAXIMUM_FILE_BYTES).map_err(|error| wrong(&error))?;
        let text = String::from_utf8(bytes).map_err(|_| wrong(&"it is no text"))?;
        Self::parse(&text).map_err(|reason| wrong(&reason))
    }

    /// Parses a document. An error is one line that names the key and the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::parse_and_check(text).map_err(|reason| printable(&reason).into_owned())
    }

    fn parse_and_check(text: &str) -> Result<Self, String> {
        let configuration: Self = serde_saphyr::from_str(text).map_err(|error| one_line(&error))?;
        if configuration.api_version != API_VERSION || configuration.kind != KIND {
            return Err(format!(
                "it is {} {}: write apiVersion: {API_VERSION} and kind: {KIND}",
                configuration.api_version, configuration.kind
            ));
        }
        configuration.limits.check().map_err(|error| error.to_string())?;
        configuration.cache.check()?;
        configuration.pull.check()?;
        configuration.registries.check()?;
        configuration.policy.check()?;
        configuration.warm.check()?;
        Ok(configuration)
    }
}

/// Returns the source of a section that is read again when the file changes. Without a file, the section is the default.
pub fn reloadable<T: Default>(
    name: &'static str,
    path: Option<PathBuf>,
    section: impl Fn(NodeConfiguration, &mut FileVersions) -> Result<T, String> + Send + Sync + 'static,
    report: impl Fn(bool) + Send + Sync + 'static,
) -> Reloadable<T> {
    let read = move |seen: &mut FileVersions| match &path {
        Some(path) => section(NodeConfiguration::read_again(path, seen)?, seen),
        None => Ok(T::default()),
    };
    Reloadable::new(name, read, report)
}

/// Returns a parser error as one line, for a status and a log. The parser itself draws several lines.
fn one_line(error: &serde_saphyr::Error) -> String {
    let place =
        error.location().map(|place| format!("line {}: ", place.line())).unwrap_or_default();
    let text = error.without_snippet().to_string();
    let first = text.lines().next().unwrap_or_default().trim();
    // Some errors repeat the place at the end.
    let said = first.rsplit_once(" at line ").filter(|_| !place.is_empty());
    format!("{place}{}", said.map_or(first, |(said, _)| said))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HEAD: &str = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";

    #[test]
    fn line_breaks_in_values_are_escaped_in_errors() {
        for text in [
            "apiVersion: \"v1\\nv2\"\nkind: NodeConfiguration\n".to_owned(),
            format!("{HEAD}policy: {{keys: [{{name: \"a\\nb\"}}]}}\n"),
        ] {
            let error = NodeConfiguration::parse(&text).expect_err("wrong");
            assert!(error.contains("\\n") && !error.contains('\n'), "{error:?}");
        }
    }

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
    fn a_bad_reference_is_named_with_its_line() {
        let text = format!("{HEAD}warm:\n  references:\n  - r.io/good:v1\n  - r.io/BAD:v1\n");
        let error = NodeConfiguration::parse(&text).expect_err("wrong");
        assert!(error.contains("r.io/BAD") && error.contains("line 6"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn values_are_checked() {
        let parse = |text: &str| NodeConfiguration::parse(&format!("{HEAD}{text}"));
        let parsed = parse("pull: {stallTimeout: 1m30s}\nlimits: {entries: 5}\n").expect("valid");
        assert_eq!(parsed.pull.stall_timeout, Duration::from_secs(90));
        assert_eq!(parsed.limits.entries, 5);
        let parsed = parse("cache: {maxBytes: 1.5Gi, minimumAge: 0s}\n").expect("valid");
        assert_eq!(parsed.cache.max_bytes, Some(3 << 29));
        assert_eq!(parsed.cache.scrub_interval(), Some(Duration::from_hours(168)));
        let off = parse("cache: {scrubInterval: 0}\n").expect("valid");
        assert_eq!(off.cache.scrub_interval(), None);
        assert_eq!(parse("cache: {maxBytes: 1000}\n").expect("valid").cache.max_bytes, Some(1000));
        for text in [
            "pull: {stallTimeout: 5}\n",
            "pull: {downloads: 0}\n",
            "pull: {attempts: 0}\n",
            "pull: {stallTimeout: 0s}\n",
            "limits: {depth: 99999}\n",
            "cache: {minFreePercent: 101}\n",
            "cache: {lowThresholdPercent: 90}\n",
            "cache: {maxBytes: 1Gi, maxPinnedBytes: 2Gi}\n",
            "cache: {maxBytes: many}\n",
            "cache: {scrubInterval: 10ms}\n",
            "cache: {scrubInterval: 100000h}\n",
            "cache: {scrubInterval: weekly}\n",
            "registries: {allowedAddresses: [here]}\n",
            "registries: {mirrorsWithCredentials: [\"http://mirror:5000\"]}\n",
            "registries: {plainHTTPRedirects: [\"https://storage:9000\"]}\n",
            "registries: {plainHTTPRedirects: [\"http://storage:9000/path\"]}\n",
            "registries: {plainHTTPRedirects: [\"storage:9000\"]}\n",
            "registries: {credentialProviderConfig: /a}\n",
            "registries: {loopback: Perhaps}\n",
            "registries: {proofTTL: soon}\n",
            "registries: {preloadedImagesVerificationAllowlist: [\"r.io/*/a\"]}\n",
            "warm: {references: [r.io/a, r.io/a:latest]}\n",
            "warm: {interval: 0s}\n",
            "warm: {spread: long}\n",
            "volumes: {mount: bind}\n",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(NodeConfiguration::parse("apiVersion: v1\nkind: Pod\n").is_err());
    }
}
