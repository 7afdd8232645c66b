//! The kubelet's `CredentialProviderConfig`, YAML or JSON, with the kubelet's checks.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;

use crate::Repository;
use crate::credentials::keyring::ImagePattern;
use text::duration::GoDuration;
use text::printable::excerpt;

const CONFIG_VERSIONS: [&str; 3] =
    ["kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"];
const PROTOCOL_VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// A credential provider plugin with its configuration.
#[derive(Clone, Debug)]
pub struct CredentialProvider {
    /// Name of the executable in the folder of plugins.
    pub name: String,
    /// Version of the plugin protocol.
    pub api_version: String,
    patterns: Vec<ImagePattern>,
    /// Cache duration for responses that name none.
    pub default_cache_duration: Duration,
    /// Arguments of the plugin.
    pub args: Vec<String>,
    /// Variables that are added to the driver's own environment.
    pub env: Vec<(String, String)>,
    /// Service account token that the plugin wants, if any.
    pub token: Option<TokenAttributes>,
}

/// Attributes of the service account token that a plugin wants.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenAttributes {
    /// Audience of the token.
    pub service_account_token_audience: String,
    /// Cache key of responses.
    pub cache_type: Option<TokenCacheType>,
    /// True if the plugin needs a token in any case.
    pub require_service_account: bool,
    /// Annotations that the plugin needs.
    #[serde(default)]
    pub required_service_account_annotation_keys: Vec<String>,
    /// Annotations that the plugin can use.
    #[serde(default)]
    pub optional_service_account_annotation_keys: Vec<String>,
}

/// Cache key of responses that were made with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum TokenCacheType {
    /// One response per token.
    Token,
    /// One response per service account.
    ServiceAccount,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigDocument {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<ProviderEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProviderEntry {
    name: String,
    api_version: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<GoDuration>,
    args: Option<Vec<String>>,
    env: Option<Vec<EnvironmentVariable>>,
    token_attributes: Option<TokenAttributes>,
}

#[derive(Deserialize)]
struct EnvironmentVariable {
    name: String,
    #[serde(default)]
    value: String,
}

/// Parses the document.
///
/// # Errors
///
/// One line with the defect and its place.
pub fn parse(text: &str) -> Result<Vec<CredentialProvider>, String> {
    let document: ConfigDocument = serde_saphyr::from_str(text).map_err(|error| {
        let line = error.location().map(|place| format!("line {}: ", place.line()));
        let text = error.without_snippet().to_string();
        line.unwrap_or_default() + text.lines().next().unwrap_or_default().trim()
    })?;
    if !CONFIG_VERSIONS.contains(&document.api_version.as_str())
        || document.kind != "CredentialProviderConfig"
    {
        return Err(format!(
            "it is {} {}: write apiVersion: {} and kind: CredentialProviderConfig",
            excerpt(&document.api_version, 80),
            excerpt(&document.kind, 80),
            CONFIG_VERSIONS[0]
        ));
    }
    if document.providers.is_empty() {
        return Err("it has no providers".to_owned());
    }
    let mut names = BTreeSet::new();
    let mut providers = Vec::new();
    for entry in document.providers {
        let name = excerpt(&entry.name, 80);
        let provider =
            provider(entry).map_err(|reason| format!("the provider \"{name}\": {reason}"))?;
        if !names.insert(provider.name.clone()) {
            return Err(format!("the provider \"{name}\" is there twice"));
        }
        providers.push(provider);
    }
    Ok(providers)
}

fn provider(entry: ProviderEntry) -> Result<CredentialProvider, String> {
    let name = entry.name;
    // The name becomes a component of a path.
    if name.is_empty() || name.contains(['/', ' ', '\0']) || name == "." || name == ".." {
        return Err("its name must be a file's name without spaces".to_owned());
    }
    if !PROTOCOL_VERSIONS.contains(&entry.api_version.as_str()) {
        return Err(format!("its apiVersion must be one of {}", PROTOCOL_VERSIONS.join(", ")));
    }
    if entry.match_images.is_empty() {
        return Err("it has no matchImages".to_owned());
    }
    let patterns = entry.match_images.iter().map(|text| {
        ImagePattern::parse(text)
            .ok_or_else(|| format!("matchImages: \"{}\" is no pattern", excerpt(text, 80)))
    });
    let patterns = patterns.collect::<Result<_, _>>()?;
    let default = entry.default_cache_duration.ok_or("it has no defaultCacheDuration")?;
    if let Some(token) = &entry.token_attributes {
        if entry.api_version != PROTOCOL_VERSIONS[0] {
            return Err(format!("tokenAttributes need apiVersion: {}", PROTOCOL_VERSIONS[0]));
        }
        if token.service_account_token_audience.is_empty() {
            return Err("tokenAttributes has no serviceAccountTokenAudience".to_owned());
        }
        let required = &token.required_service_account_annotation_keys;
        if !token.require_service_account && !required.is_empty() {
            return Err(
                "requiredServiceAccountAnnotationKeys need requireServiceAccount: true".to_owned()
            );
        }
    }
    let env = entry.env.unwrap_or_default().into_iter();
    Ok(CredentialProvider {
        name,
        api_version: entry.api_version,
        patterns,
        default_cache_duration: default.0,
        args: entry.args.unwrap_or_default(),
        env: env.map(|variable| (variable.name, variable.value)).collect(),
        token: entry.token_attributes,
    })
}

impl CredentialProvider {
    /// Returns whether the plugin is for a repository.
    pub fn matches(&self, repository: &Repository) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(repository))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    const YAML: &str = "
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: ecr-credential-provider
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ['*.dkr.ecr.*.amazonaws.com', 'registry.io:8080/path']
  defaultCacheDuration: 12h
  args: [get-credentials]
  env: [{name: AWS_PROFILE, value: x}]
  tokenAttributes:
    serviceAccountTokenAudience: sts.amazonaws.com
    cacheType: ServiceAccount
    requireServiceAccount: true
    requiredServiceAccountAnnotationKeys: [eks.amazonaws.com/role-arn]
";

    fn matches(provider: &CredentialProvider, reference: &str) -> bool {
        provider.matches(reference.parse::<Reference>().expect("a reference").repository())
    }

    #[test]
    fn the_kubelets_example_is_read() {
        let providers = parse(YAML).expect("valid");
        let provider = &providers[0];
        assert_eq!(provider.default_cache_duration, Duration::from_hours(12));
        assert_eq!(provider.env, [("AWS_PROFILE".to_owned(), "x".to_owned())]);
        assert!(matches(provider, "123.dkr.ecr.eu-west-1.amazonaws.com/app"));
        assert!(matches(provider, "registry.io:8080/path/app"));
        assert!(!matches(provider, "registry.io/path/app"));
        assert!(!matches(provider, "123.dkr.ecr.eu-west-1.amazonaws.com.evil.com/app"));
        let token = provider.token.as_ref().expect("token attributes");
        assert_eq!(token.cache_type, Some(TokenCacheType::ServiceAccount));
    }

    #[test]
    fn json_and_older_versions_are_read() {
        let json = r#"{"apiVersion":"kubelet.config.k8s.io/v1alpha1","kind":"CredentialProviderConfig",
            "providers":[{"name":"p","apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1",
            "matchImages":["r.io"],"defaultCacheDuration":"0s","args":null,"env":null}]}"#;
        assert_eq!(parse(json).expect("valid").len(), 1);
    }

    #[test]
    fn errors_name_the_defect_and_its_place() {
        for (from, to, named) in [
            ("kubelet.config.k8s.io/v1\n", "v9\n", "apiVersion"),
            ("name: ecr-credential-provider", "name: ../../bin/sh", "name"),
            (
                "  matchImages: ['*.dkr.ecr.*.amazonaws.com', 'registry.io:8080/path']\n",
                "",
                "matchImages",
            ),
            ("  defaultCacheDuration: 12h\n", "", "defaultCacheDuration"),
            ("12h", "soon", "soon"),
            (
                "credentialprovider.kubelet.k8s.io/v1\n",
                "credentialprovider.kubelet.k8s.io/v1beta1\n",
                "tokenAttributes",
            ),
            (
                "requireServiceAccount: true",
                "requireServiceAccount: false",
                "requireServiceAccount",
            ),
            ("sts.amazonaws.com", "''", "Audience"),
        ] {
            assert!(YAML.contains(from), "{from}");
            let error = parse(&YAML.replace(from, to)).expect_err(to);
            assert!(error.contains(named) && !error.contains('\n'), "{to}: {error}");
        }
        assert!(parse("").is_err() && parse("[").is_err());
    }
}
