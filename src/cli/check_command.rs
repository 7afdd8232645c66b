//! `check`: checks what a registry would serve, for a job before a rollout.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::de::IgnoredAny;

use super::client_credentials::{for_person, keyring};
use super::output::OutputArguments;
use super::{CommandError, runtime};
use crate::check::{ArtifactChecker, CheckReport, CheckRequest, RequiredFile, SignatureStatus};
use crate::config::NodeConfiguration;
use oci::registry::Registry;
use oci::signature::{AcceptedSignature, NamedKey, PublicKey, SignatureDemand, Signers};
use oci::{Platform, Reference};
use policy::PolicyRequest;
use sys::reload::FileVersions;
use text::human_units::Bytes;

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci check ghcr.io/team/tool:v1
  csi-driver-oci check r.io/tool:v1 --platform linux/amd64 --platform linux/arm64 --key cosign.pub
  csi-driver-oci check r.io/tool:v1 --config node.yaml --policy
  csi-driver-oci check r.io/tool:v1 --config node.yaml --policy --bundle attestation.jsonl
  csi-driver-oci check r.io/tool:v1 --require-file bin/tool:exec --require-file etc/tool.yml -o json")]
pub(super) struct CheckArguments {
    /// The artifact: host[:port]/repository[:tag][@digest].
    reference: Reference,
    /// A platform that the artifact must have, as os/architecture[/variant] [default: all of its platforms].
    #[arg(long = "platform")]
    platforms: Vec<Platform>,
    /// The public key that must have signed the artifact: a PEM file, as cosign writes it.
    #[arg(long, value_name = "PUB", group = "signers")]
    key: Option<PathBuf>,
    /// Check the artifact as the policy of the configuration file demands it for a pod.
    #[arg(long, requires = "config", group = "signers")]
    policy: bool,
    /// The pod's namespace for --policy [default: no namespace].
    #[arg(long, requires = "policy")]
    namespace: Option<String>,
    /// A file with Sigstore bundles, one or one in each line, to verify instead of the registry's signatures.
    #[arg(long, value_name = "FILE", requires = "signers")]
    bundle: Option<PathBuf>,
    /// A file that the artifact must have; with :exec, it must be executable.
    #[arg(long = "require-file", value_name = "PATH[:exec]")]
    required: Vec<String>,
    /// The docker config.json with credentials [default: the files of docker and podman].
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
    /// The configuration file of a node, for its mirrors, certificates and limits.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArguments,
}

pub(super) fn run(arguments: &CheckArguments) -> Result<(), CommandError> {
    arguments.output.start_log();
    let configuration = NodeConfiguration::of_file(arguments.config.as_deref())
        .map_err(|error| error.to_string())?;
    let options = configuration.registries.options(&configuration.limits)?;
    let check = CheckRequest {
        reference: arguments.reference.clone(),
        platforms: arguments.platforms.clone(),
        signature: arguments.signature(&configuration)?,
        bundles: arguments.bundle.as_deref().map_or_else(|| Ok(Vec::new()), bundles)?,
        required: arguments.required.iter().map(|text| required(text)).collect(),
        keyring: keyring(
            arguments.docker_config.as_deref(),
            std::slice::from_ref(&arguments.reference),
        )?,
    };
    let mut report = runtime()?.block_on(async {
        let registry = Registry::new(options).map_err(|error| error.to_string())?;
        let checker = ArtifactChecker { registry, limits: configuration.limits };
        let report = checker.check(&check).await;
        let failed = |text: String| {
            format!("{0}: {1}", check.reference, for_person(&text, &check.reference))
        };
        report.map_err(|error| failed(error.to_string()))
    })?;
    for manifest in &mut report.manifests {
        if let SignatureStatus::Unknown { reason } = &mut manifest.signatures {
            *reason = for_person(reason, &arguments.reference);
        }
    }
    arguments.output.result(&report, || lines(&report))
}

impl CheckArguments {
    /// Returns the signatures that the key or the policy demands.
    fn signature(
        &self,
        configuration: &NodeConfiguration,
    ) -> Result<Option<SignatureDemand>, CommandError> {
        if let Some(path) = &self.key {
            let failed = |error: String| format!("the key {}: {error}", path.display());
            let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
            let key = PublicKey::from_pem(&pem).map_err(|error| failed(error.to_string()))?;
            let keys = [NamedKey { name: "the given key".to_owned(), key }].into();
            return Ok(Some(SignatureDemand::signed_by(Signers { keys, ..Signers::default() })));
        }
        if !self.policy {
            return Ok(None);
        }
        let policy = configuration.policy.policy(&mut FileVersions::new())?;
        let (reference, namespace) = (&self.reference, self.namespace.as_deref());
        let request = PolicyRequest { reference, namespace, require_signature: false };
        let refused = |refusal| format!("{reference}: {refusal}");
        Ok(policy.decide(request).map_err(refused)?.signature)
    }
}

/// Reads a file of one bundle, or of one in each line.
fn bundles(path: &Path) -> Result<Vec<bytes::Bytes>, CommandError> {
    let failed = |error| format!("the bundle {}: {error}", path.display());
    let content = bytes::Bytes::from(std::fs::read(path).map_err(failed)?);
    if serde_json::from_slice::<IgnoredAny>(&content).is_ok() {
        return Ok(vec![content]);
    }
    let lines = content.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    Ok(lines.map(|line| content.slice_ref(line)).collect())
}

fn required(text: &str) -> RequiredFile {
    let (path, executable) = match text.strip_suffix(":exec") {
        Some(path) => (path, true),
        None => (text, false),
    };
    RequiredFile { path: path.to_owned(), executable }
}

fn lines(report: &CheckReport) -> Vec<String> {
    let what = if report.index { "index" } else { "manifest" };
    let mut lines = vec![format!("{}  {what} {}", report.reference, report.digest)];
    for manifest in &report.manifests {
        let platform = manifest.platform.as_deref().unwrap_or("any platform");
        let signed = match &manifest.signatures {
            SignatureStatus::Verified { by } => {
                format!(
                    "signed by {}",
                    by.iter().map(AcceptedSignature::to_string).collect::<Vec<_>>().join("; ")
                )
            }
            SignatureStatus::Warned { reason } => format!("the policy only warns: {reason}"),
            SignatureStatus::Unverified { count: 0 } => "not signed".to_owned(),
            SignatureStatus::Unverified { count } => format!("{count} signatures, not verified"),
            SignatureStatus::Unknown { .. } => "signatures unknown".to_owned(),
        };
        lines.push(format!(
            "{platform}  {}  {}  {}  {signed}",
            manifest.digest,
            manifest.kind,
            Bytes(manifest.bytes)
        ));
        if let SignatureStatus::Unknown { reason } = &manifest.signatures {
            lines.push(format!("  signatures cannot be looked up: {reason}"));
        }
        for file in &manifest.files {
            let executable = if file.executable { "x" } else { "-" };
            lines.push(format!("  {executable} {:>12}  {}", file.bytes, file.path));
        }
        if !manifest.files_are_complete {
            lines.push("  archives are not looked into without --require-file".to_owned());
        }
    }
    lines
}
