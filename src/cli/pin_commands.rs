//! `pin`, `unpin` and `rm`: decide which artifacts stay on this node.

use clap::Args;
use serde_json::json;

use super::admin_call::AdminCallArguments;
use super::{CommandError, OutputFormat, print, print_json};
use crate::proto::admin::{PinRequest, RemoveRequest, UnpinRequest};
use text::human_units::Bytes;

/// Arguments of `pin` and `unpin`.
#[derive(Debug, Args)]
pub(super) struct PinArguments {
    /// The reference, as pods write it.
    reference: String,
    /// The platform of the resolution, such as `linux/arm64` [default: the node's for `pin`, all for `unpin`].
    #[arg(long, default_value = "")]
    platform: String,
    #[command(flatten)]
    admin: AdminCallArguments,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
pub(super) struct RemoveArguments {
    /// The reference, as pods write it.
    reference: String,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn pin(arguments: &PinArguments) -> Result<(), CommandError> {
    let (reference, platform) = (arguments.reference.clone(), arguments.platform.clone());
    let pinned = arguments.admin.call(async |mut client| {
        let answer = client.pin(PinRequest { reference, platform }).await?;
        Ok(answer.into_inner())
    })?;
    match arguments.admin.output {
        OutputFormat::Table => {
            print(&format!("{} is pinned: {}", arguments.reference, pinned.manifest));
        }
        OutputFormat::Json => print_json(&pinned, json!({"reference": arguments.reference})),
    }
    Ok(())
}

pub(super) fn unpin(arguments: &PinArguments) -> Result<(), CommandError> {
    let (reference, platform) = (arguments.reference.clone(), arguments.platform.clone());
    let unpinned = arguments.admin.call(async |mut client| {
        let answer = client.unpin(UnpinRequest { reference, platform }).await?;
        Ok(answer.into_inner())
    })?;
    let reference = &arguments.reference;
    match arguments.admin.output {
        OutputFormat::Json => print_json(&unpinned, json!({"reference": reference})),
        OutputFormat::Table if unpinned.unpinned == 0 => {}
        OutputFormat::Table => print(&format!("{reference} is no longer pinned by admin")),
    }
    let others = unpinned.others.join(", ");
    match (unpinned.unpinned, others.as_str()) {
        (0, "") => Err(format!("{reference} is not pinned: look at `ls`")),
        (0, others) => Err(format!("{reference} is not pinned by admin, but by {others}")),
        (_, "") => Ok(()),
        (_, others) => {
            if arguments.admin.output == OutputFormat::Table {
                print(&format!("it stays, pinned by {others}"));
            }
            Ok(())
        }
    }
}

pub(super) fn remove(arguments: &RemoveArguments) -> Result<(), CommandError> {
    let reference = arguments.reference.clone();
    let removed = arguments.admin.call(async |mut client| {
        Ok(client.remove(RemoveRequest { reference }).await?.into_inner())
    })?;
    let bytes = removed.victims.iter().map(|victim| victim.bytes).sum();
    let reference = &arguments.reference;
    match arguments.admin.output {
        OutputFormat::Json => print(
            &serde_json::json!({
                "reference": reference,
                "freedBytes": bytes,
                "shownBy": removed.volumes,
                "keptBy": removed.references,
            })
            .to_string(),
        ),
        OutputFormat::Table => {
            print(&format!("{reference} is forgotten; {} freed", Bytes(bytes)));
            if !removed.volumes.is_empty() {
                let volumes = removed.volumes.join(", ");
                print(&format!("{volumes} still show it: it goes with the last unpublish"));
            }
            if !removed.references.is_empty() {
                print(&format!("its content stays for {}", removed.references.join(", ")));
            }
        }
    }
    Ok(())
}
