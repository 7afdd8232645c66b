//! `ls` and `inspect`: the artifacts on this node.

use clap::Args;
use serde_json::json;

use super::admin_call::AdminCallArguments;
use super::{CommandError, OutputFormat, print, print_json, text_table, warm_list_status};
use crate::proto::admin::{
    Artifact, InspectArtifactRequest, InspectArtifactResponse, ListArtifactsRequest,
};
use text::human_units::Bytes;

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    /// The reference, as pods write it.
    reference: String,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn list(arguments: &AdminCallArguments) -> Result<(), CommandError> {
    let artifacts = arguments.call(async |mut client| {
        let answer = client.list_artifacts(ListArtifactsRequest {}).await?;
        Ok(answer.into_inner().artifacts)
    })?;
    match arguments.output {
        OutputFormat::Table => lines(&artifacts).iter().for_each(|line| print(line)),
        OutputFormat::Json => print_json(&artifacts, json!({})),
    }
    Ok(())
}

pub(super) fn inspect(arguments: &InspectArguments) -> Result<(), CommandError> {
    let reference = arguments.reference.clone();
    let inspected = arguments.admin.call(async |mut client| {
        let answer = client.inspect_artifact(InspectArtifactRequest { reference }).await?;
        Ok(answer.into_inner())
    })?;
    match arguments.admin.output {
        OutputFormat::Table => inspected_lines(&inspected).iter().for_each(|line| print(line)),
        OutputFormat::Json => print_json(&inspected, json!({"reference": arguments.reference})),
    }
    Ok(())
}

fn lines(artifacts: &[Artifact]) -> Vec<String> {
    let row = |artifact: &Artifact| {
        let state = match (artifact.damaged, artifact.last_used) {
            (true, _) => "damaged".to_owned(),
            (false, 0) => "removed".to_owned(),
            (false, last_used) => text_table::age(last_used),
        };
        [
            text_table::list(&artifact.references),
            text_table::short(&artifact.manifest),
            Bytes(artifact.bytes).to_string(),
            artifact.inodes.to_string(),
            text_table::kind(&artifact.kind).to_owned(),
            state,
            text_table::list(&artifact.pins),
            text_table::list(&artifact.volumes),
        ]
    };
    let heads = ["REFERENCE", "DIGEST", "SIZE", "INODES", "KIND", "USED", "PINS", "VOLUMES"];
    text_table::lines(heads, &artifacts.iter().map(row).collect::<Vec<_>>())
}

fn inspected_lines(inspected: &InspectArtifactResponse) -> Vec<String> {
    let mut printed = Vec::new();
    if let Some(warm) = &inspected.warm {
        let description = warm_list_status::describe(warm).unwrap_or_else(|| "present".to_owned());
        printed.push(format!("kept warm by the configuration: {description}"));
    }
    for meaning in &inspected.meanings {
        let platform = if meaning.platform.is_empty() { "any" } else { &meaning.platform };
        printed.push(format!("{platform}: {}", meaning.manifest));
        if meaning.resolved != meaning.manifest {
            printed.push(format!("  index  {}", meaning.resolved));
        }
        for layer in &meaning.layers {
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
        let attributes = [
            attribute("include", &view.include),
            attribute("exclude", &view.exclude),
            attribute("permissions", &view.permissions),
            attribute("fileMode", &view.file_mode),
            attribute("unpack", &view.unpack),
        ];
        [
            text_table::short(&artifact.manifest),
            Bytes(artifact.bytes).to_string(),
            attributes.into_iter().flatten().collect::<Vec<_>>().join(" "),
            text_table::age(artifact.last_used),
            text_table::list(&artifact.pins),
            text_table::list(&artifact.volumes),
        ]
    };
    let heads = ["DIGEST", "SIZE", "ATTRIBUTES", "USED", "PINS", "VOLUMES"];
    printed
        .extend(text_table::lines(heads, &inspected.artifacts.iter().map(row).collect::<Vec<_>>()));
    printed
}
