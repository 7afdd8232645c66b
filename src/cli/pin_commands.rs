//! `pin`, `unpin` and `rm`: decide which artifacts stay on this node.

use clap::Args;

use super::CommandError;
use super::admin_call::{AdminCallArguments, platform_text};
use crate::proto::admin::{
    PinRequest, PinResponse, RemoveRequest, RemoveResponse, UnpinRequest, UnpinResponse,
};
use oci::{Platform, Reference};
use text::human_units::Bytes;

/// Arguments of `pin` and `unpin`.
#[derive(Debug, Args)]
pub(super) struct PinArguments {
    /// The references, as pods write them.
    #[arg(required = true)]
    references: Vec<Reference>,
    /// The platform of the resolution, such as `linux/arm64` [default: the node's for `pin`, all for `unpin`].
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    admin: AdminCallArguments,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
pub(super) struct RemoveArguments {
    /// The references, as pods write them.
    #[arg(required = true)]
    references: Vec<Reference>,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn pin(arguments: &PinArguments) -> Result<(), CommandError> {
    let (pinned, done) =
        arguments.admin.call_each(&arguments.references, async |client, reference| {
            let platform = platform_text(arguments.platform.as_ref());
            Ok(client.pin(PinRequest { reference, platform }).await?.into_inner())
        })?;
    let line = |pin: &PinResponse| format!("{} is pinned: {}", pin.reference, pin.digest);
    arguments.admin.output.result(&pinned, || pinned.iter().map(line).collect())?;
    done
}

pub(super) fn unpin(arguments: &PinArguments) -> Result<(), CommandError> {
    let (unpinned, done) =
        arguments.admin.call_each(&arguments.references, async |client, reference| {
            let platform = platform_text(arguments.platform.as_ref());
            Ok(client.unpin(UnpinRequest { reference, platform }).await?.into_inner())
        })?;
    arguments
        .admin
        .output
        .result(&unpinned, || unpinned.iter().flat_map(unpinned_lines).collect())?;
    let failure = |one: &UnpinResponse| match (one.unpinned, one.pins.join(", ").as_str()) {
        (0, "") => Some(format!("{} is not pinned: look at `ls`", one.reference)),
        (0, owners) => Some(format!("{} is not pinned by admin, but by {owners}", one.reference)),
        _ => None,
    };
    let failures: Vec<_> = unpinned.iter().filter_map(failure).chain(done.err()).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

fn unpinned_lines(unpinned: &UnpinResponse) -> Vec<String> {
    let UnpinResponse { unpinned, pins, reference } = unpinned;
    match (unpinned, pins.join(", ").as_str()) {
        (0, _) => Vec::new(),
        (_, "") => vec![format!("{reference} is no longer pinned by admin")],
        (_, owners) => {
            vec![format!("{reference} is no longer pinned by admin; it stays, pinned by {owners}")]
        }
    }
}

pub(super) fn remove(arguments: &RemoveArguments) -> Result<(), CommandError> {
    let (removed, done) =
        arguments.admin.call_each(&arguments.references, async |client, reference| {
            Ok(client.remove(RemoveRequest { reference }).await?.into_inner())
        })?;
    arguments.admin.output.result(&removed, || removed.iter().flat_map(removed_lines).collect())?;
    done
}

fn removed_lines(removed: &RemoveResponse) -> Vec<String> {
    let RemoveResponse { reference, freed_bytes, volumes, kept_by } = removed;
    let mut lines = vec![format!("{reference} is forgotten; {} freed", Bytes(*freed_bytes))];
    if !volumes.is_empty() {
        let volumes = volumes.join(", ");
        lines.push(format!("{volumes} still show it: it goes with the last unpublish"));
    }
    if !kept_by.is_empty() {
        lines.push(format!("its content stays for {}", kept_by.join(", ")));
    }
    lines
}
