//! The `registries` section. Read at the start. The files that it names are read again when they change.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::GoDuration;
use oci::credentials::providers::{ProviderFiles, ServiceAccountAnnotations};
use oci::registry::{AddressRules, Loopback, RegistryOptions};
use pull::{CredentialsVerification, Verification};
use unpack::Limits;

/// One day: longer than the life of rotating credentials, and short enough for a withdrawn right to take effect.
const DEFAULT_PROOF_TTL: Duration = Duration::from_hours(24);

/// The default of the kubelet.
const DEFAULT_PLUGIN_TIMEOUT: Duration = Duration::from_mins(1);

/// The `registries` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RegistriesSection {
    /// containerd's `config_path`: directories of `hosts.toml` files, separated by colons.
    pub hosts_dir: Option<String>,
    /// A docker `config.json` of the node, with credentials that any pod may use.
    pub docker_config: Option<PathBuf>,
    /// The kubelet's `CredentialProviderConfig`.
    pub credential_provider_config: Option<PathBuf>,
    /// The directory of the plugins.
    pub credential_provider_bin_dir: Option<PathBuf>,
    /// The timeout of a plugin.
    pub credential_provider_timeout: Option<GoDuration>,
    /// Annotations that plugins would read from `ServiceAccount` objects.
    pub service_account_annotations: Vec<ServiceAccountAnnotations>,
    /// The rule when cached content needs no proof.
    pub credentials_verification: CredentialsVerification,
    /// Repositories for `NeverVerifyAllowlistedImages`, in the kubelet's form: `host/path` or `host/path/*`.
    pub preloaded_images_verification_allowlist: Vec<String>,
    /// The time that a proof of the same service account counts while the registry cannot be reached.
    #[serde(rename = "proofTTL")]
    pub proof_ttl: Option<GoDuration>,
    /// Mirrors (`https://host[:port]`) that the registries' credentials may be sent to.
    pub mirrors_with_credentials: Vec<String>,
    /// Hosts (`http://host[:port]`) that registries may redirect to without TLS.
    #[serde(rename = "plainHTTPRedirects")]
    pub plain_http_redirects: Vec<String>,
    /// The rule for references with a loopback host.
    pub loopback: Loopback,
    /// Networks that references may use whatever they are, such as `10.0.0.1/32`.
    pub allowed_addresses: Vec<String>,
}

impl RegistriesSection {
    pub(super) fn check(&self) -> Result<(), String> {
        self.options(&Limits::default())?;
        if self.credential_provider_config.is_some() != self.credential_provider_bin_dir.is_some() {
            return Err("registries.credentialProviderConfig and registries.credentialProviderBinDir go together: set both".to_owned());
        }
        for pattern in &self.preloaded_images_verification_allowlist {
            // The kubelet's rule: a star stands at the end, as a whole path component.
            let path = pattern.strip_suffix("/*").unwrap_or(pattern);
            if path.is_empty() || path.contains('*') {
                return Err(format!(
                    "registries.preloadedImagesVerificationAllowlist: \"{pattern}\" must be host/path or host/path/*"
                ));
            }
        }
        Ok(())
    }

    /// Returns the options of the registry client.
    pub fn options(&self, limits: &Limits) -> Result<RegistryOptions, String> {
        let networks = self.allowed_addresses.iter().map(|text| {
            let single = || text.parse::<std::net::IpAddr>().map(ipnet::IpNet::from).ok();
            text.parse::<ipnet::IpNet>().ok().or_else(single).ok_or_else(|| {
                format!(
                    "registries.allowedAddresses: \"{text}\" is no network: write it as 10.0.0.1/32"
                )
            })
        });
        let mirrors = self.mirrors_with_credentials.iter().map(|text| {
            oci::registry::mirror_address(text)
                .map_err(|reason| format!("registries.mirrorsWithCredentials: {reason}"))
        });
        let plain_http = self.plain_http_redirects.iter().map(|text| {
            oci::registry::plain_http_address(text)
                .map_err(|reason| format!("registries.plainHTTPRedirects: {reason}"))
        });
        let roots = self.hosts_dir.iter().flat_map(|list| list.split(':'));
        Ok(RegistryOptions {
            manifest_bytes_limit: limits.manifest_bytes,
            addresses: AddressRules {
                loopback: self.loopback,
                allowed: networks.collect::<Result<_, _>>()?,
                own: crate::local_addresses::own,
            },
            hosts_dirs: roots.filter(|root| !root.is_empty()).map(PathBuf::from).collect(),
            mirrors_with_credentials: mirrors.collect::<Result<_, _>>()?,
            plain_http_redirects: plain_http.collect::<Result<_, _>>()?,
            ..RegistryOptions::default()
        })
    }

    /// Returns the sources of the node's own credentials.
    pub fn provider_files(&self) -> ProviderFiles {
        let config = self.credential_provider_config.clone();
        ProviderFiles {
            docker_config: self.docker_config.clone(),
            plugins: config.zip(self.credential_provider_bin_dir.clone()),
            timeout: self.credential_provider_timeout.map_or(DEFAULT_PLUGIN_TIMEOUT, |time| time.0),
            annotations: self.service_account_annotations.clone(),
        }
    }

    /// Returns the rules for access to cached content.
    pub fn verification(&self) -> Verification {
        Verification {
            policy: self.credentials_verification,
            allowlist: self.preloaded_images_verification_allowlist.clone(),
            proof_ttl: self.proof_ttl.map_or(DEFAULT_PROOF_TTL, |time| time.0),
        }
    }
}
