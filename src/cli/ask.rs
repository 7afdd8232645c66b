//! `status` and `ls`: questions to a running node plugin.

use clap::Args;

use super::{Failure, Output, print, runtime};
use crate::admin::client::connect;
use crate::csi::Endpoint;
use crate::proto::admin::{Artifact, GetStatusRequest, GetStatusResponse, ListArtifactsRequest};
use crate::units::Bytes;

/// Digits of a digest that tell artifacts apart.
const SHORT_DIGEST: usize = "sha256:".len() + 12;

/// Arguments of commands that ask the node plugin.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci status
  csi-driver-oci ls --output json
  kubectl exec -n csi-driver-oci ds/csi-driver-oci -- csi-driver-oci ls")]
pub(super) struct AskArguments {
    /// Where the node plugin is reached.
    #[arg(long, env = "ADMIN_ENDPOINT", default_value = "unix:///run/csi-driver-oci/admin.sock")]
    admin_endpoint: Endpoint,
    /// How the answer is printed.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

pub(super) fn status(arguments: &AskArguments) -> Result<(), Failure> {
    let status = runtime()?.block_on(async {
        let mut client = connect(arguments.path()?).await.map_err(|error| error.to_string())?;
        let answer = client.get_status(GetStatusRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
    })?;
    match arguments.output {
        Output::Table => status_lines(&status).iter().for_each(|line| print(line)),
        Output::Json => print(
            &serde_json::json!({
                "version": status.version,
                "nodeId": status.node_id,
                "driverName": status.driver_name,
                "stateDir": status.state_dir,
                "ready": status.not_ready.is_empty(),
                "reason": status.not_ready,
                "registered": status.registered,
                "published": status.published,
                "freeBytes": status.free_bytes,
                "totalBytes": status.total_bytes,
            })
            .to_string(),
        ),
    }
    Ok(())
}

pub(super) fn list(arguments: &AskArguments) -> Result<(), Failure> {
    let artifacts = runtime()?.block_on(async {
        let mut client = connect(arguments.path()?).await.map_err(|error| error.to_string())?;
        let answer = client.list_artifacts(ListArtifactsRequest {}).await;
        answer
            .map(|answer| answer.into_inner().artifacts)
            .map_err(|status| status.message().to_owned())
    })?;
    match arguments.output {
        Output::Table => artifact_lines(&artifacts).iter().for_each(|line| print(line)),
        Output::Json => {
            let artifact = |artifact: &Artifact| {
                serde_json::json!({
                    "manifest": artifact.manifest,
                    "kind": artifact.kind,
                    "bytes": artifact.bytes,
                    "inodes": artifact.inodes,
                    "references": artifact.references,
                    "volumes": artifact.volumes,
                })
            };
            let list: Vec<_> = artifacts.iter().map(artifact).collect();
            print(&serde_json::Value::from(list).to_string());
        }
    }
    Ok(())
}

impl AskArguments {
    fn path(&self) -> Result<&std::path::Path, Failure> {
        self.admin_endpoint
            .path()
            .ok_or_else(|| "--admin-endpoint is empty: set it to the node plugin's".to_owned())
    }
}

fn status_lines(status: &GetStatusResponse) -> Vec<String> {
    let ready = match status.not_ready.as_str() {
        "" => "ready",
        reason => reason,
    };
    let registered = match status.registered {
        Some(true) => "yes",
        Some(false) => "not yet",
        None => "by the sidecar",
    };
    let (free, total) = (Bytes(status.free_bytes), Bytes(status.total_bytes));
    [
        ("driver", format!("{} {}", status.driver_name, status.version)),
        ("node", status.node_id.clone()),
        ("content", ready.to_owned()),
        ("registered", registered.to_owned()),
        ("published", format!("{} volumes", status.published)),
        ("state", format!("{} ({free} of {total} free)", status.state_dir)),
    ]
    .iter()
    .map(|(name, value)| format!("{name:<12}{value}"))
    .collect()
}

fn artifact_lines(artifacts: &[Artifact]) -> Vec<String> {
    let row = |artifact: &Artifact| {
        let digest = artifact.manifest.get(..SHORT_DIGEST).unwrap_or(&artifact.manifest);
        let none = |list: &[String]| if list.is_empty() { "-".into() } else { list.join(",") };
        [
            none(&artifact.references),
            digest.to_owned(),
            Bytes(artifact.bytes).to_string(),
            artifact.inodes.to_string(),
            artifact.kind.clone(),
            none(&artifact.volumes),
        ]
    };
    let heads = ["REFERENCE", "DIGEST", "SIZE", "INODES", "KIND", "VOLUMES"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(heads).chain(artifacts.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<_> = (0..6).map(|column| width(column).unwrap_or_default()).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let artifact = Artifact {
            manifest: format!("sha256:{}", "a".repeat(64)),
            kind: "application/vnd.x".into(),
            bytes: 2048,
            inodes: 3,
            references: vec!["r.io/app:v1".into()],
            volumes: Vec::new(),
        };
        let lines = artifact_lines(&[artifact]);
        assert_eq!(
            lines,
            [
                "REFERENCE    DIGEST               SIZE     INODES  KIND               VOLUMES",
                "r.io/app:v1  sha256:aaaaaaaaaaaa  2.0 KiB  3       application/vnd.x  -",
            ]
        );
    }
}
