//! `ls` and `inspect`: the artifacts on this node.

use clap::Args;

use super::admin_call::AdminCallArguments;
use super::output::{OutputArguments, print};
use super::{CommandError, text_table, warm_list_status};
use crate::proto::admin::{
    Artifact, FollowedVolume, InspectArtifactRequest, InspectArtifactResponse,
    ListArtifactsRequest, ListArtifactsResponse, Pull,
};
use oci::Reference;
use text::human_units::Bytes;

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    /// The reference, as pods write it.
    reference: Reference,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn list(arguments: &AdminCallArguments) -> Result<(), CommandError> {
    let listed = arguments.call(async |mut client| {
        Ok(client.list_artifacts(ListArtifactsRequest {}).await?.into_inner())
    })?;
    print_list(&arguments.output, &listed)
}

/// Prints artifacts and running pulls.
pub(super) fn print_list(
    output: &OutputArguments,
    listed: &ListArtifactsResponse,
) -> Result<(), CommandError> {
    if output.quiet {
        let references = listed.artifacts.iter().flat_map(|artifact| &artifact.references);
        let references: std::collections::BTreeSet<_> = references.collect();
        for reference in references {
            print(reference);
        }
        return Ok(());
    }
    output.result(listed, || lines(listed))
}

pub(super) fn inspect(arguments: &InspectArguments) -> Result<(), CommandError> {
    let reference = arguments.reference.to_string();
    let inspected = arguments.admin.call(async |mut client| {
        let answer = client.inspect_artifact(InspectArtifactRequest { reference }).await?;
        Ok(answer.into_inner())
    })?;
    arguments.admin.output.result(&inspected, || inspected_lines(&inspected))
}

fn lines(listed: &ListArtifactsResponse) -> Vec<String> {
    let artifact = |artifact: &Artifact| {
        let state = match (artifact.damaged, artifact.last_used) {
            (true, _) => "damaged".to_owned(),
            (false, 0) => "removed".to_owned(),
            (false, last_used) => text_table::age(last_used),
        };
        [
            text_table::list(&artifact.references),
            text_table::short(&artifact.digest),
            Bytes(artifact.bytes).to_string(),
            artifact.inodes.to_string(),
            text_table::kind(&artifact.kind).to_owned(),
            state,
            text_table::list(&artifact.pins),
            text_table::list(&artifact.volumes),
        ]
    };
    let pull = |pull: &Pull| {
        let nothing = || "-".to_owned();
        [
            pull.repository.clone(),
            text_table::short(&pull.digest),
            Bytes(pull.total_bytes).to_string(),
            nothing(),
            nothing(),
            format!("pulling {}%", pull.done_bytes * 100 / pull.total_bytes.max(1)),
            nothing(),
            nothing(),
        ]
    };
    let heads = ["REFERENCE", "DIGEST", "SIZE", "INODES", "KIND", "USED", "PINS", "VOLUMES"];
    let rows = listed.artifacts.iter().map(artifact).chain(listed.pulls.iter().map(pull));
    let mut printed = text_table::lines(heads, rows);
    printed.extend(followed_lines(&listed.followed));
    printed
}

/// Returns the table of volumes that follow a tag; nothing without one.
fn followed_lines(followed: &[FollowedVolume]) -> Vec<String> {
    if followed.is_empty() {
        return Vec::new();
    }
    let row = |volume: &FollowedVolume| {
        let next = volume.next_seconds.map_or("now".to_owned(), |seconds| format!("in {seconds}s"));
        let state = match volume.reason.as_str() {
            "" => "current".to_owned(),
            reason => format!("keeps earlier content: {reason}"),
        };
        [
            volume.volume.clone(),
            volume.reference.clone(),
            text_table::short(&volume.digest),
            volume.versions.to_string(),
            next,
            state,
        ]
    };
    let heads = ["FOLLOWED BY", "REFERENCE", "DIGEST", "VERSIONS", "NEXT", "STATE"];
    let mut printed = vec![String::new()];
    printed.extend(text_table::lines(heads, followed.iter().map(row)));
    printed
}

fn inspected_lines(inspected: &InspectArtifactResponse) -> Vec<String> {
    let mut printed = Vec::new();
    if let Some(warm) = &inspected.warm {
        let description = warm_list_status::describe(warm).unwrap_or_else(|| "present".to_owned());
        printed.push(format!("kept warm by the configuration: {description}"));
    }
    for resolution in &inspected.resolutions {
        let platform = if resolution.platform.is_empty() { "any" } else { &resolution.platform };
        printed.push(format!("{platform}: {}", resolution.digest));
        if resolution.resolved_digest != resolution.digest {
            printed.push(format!("  index  {}", resolution.resolved_digest));
        }
        for signer in &resolution.signed_by {
            printed.push(format!("  signed by {signer}"));
        }
        for layer in &resolution.layers {
            let title = if layer.title.is_empty() { &layer.media_type } else { &layer.title };
            let (digest, size) = (text_table::short(&layer.digest), Bytes(layer.bytes));
            printed.push(format!("  layer  {digest}  {size}  {title}"));
        }
    }
    if inspected.artifacts.is_empty() {
        return printed;
    }
    printed.push(String::new());
    let row = |artifact: &Artifact| {
        let view = artifact.view.clone().unwrap_or_default();
        let attribute =
            |name: &str, value: &str| (!value.is_empty()).then(|| format!("{name}={value}"));
        let parts = artifact.parts.len().to_string();
        let attributes = [
            (!artifact.parts.is_empty()).then(|| format!("artifacts={parts}")),
            attribute("include", &view.include),
            attribute("exclude", &view.exclude),
            attribute("permissions", &view.permissions),
            attribute("fileMode", &view.file_mode),
            attribute("unpack", &view.unpack),
            attribute("subPath", &view.sub_path),
        ];
        [
            text_table::short(&artifact.digest),
            Bytes(artifact.bytes).to_string(),
            attributes.into_iter().flatten().collect::<Vec<_>>().join(" "),
            text_table::age(artifact.last_used),
            text_table::list(&artifact.pins),
            text_table::list(&artifact.volumes),
        ]
    };
    let heads = ["DIGEST", "SIZE", "ATTRIBUTES", "USED", "PINS", "VOLUMES"];
    printed.extend(text_table::lines(heads, inspected.artifacts.iter().map(row)));
    printed
}
