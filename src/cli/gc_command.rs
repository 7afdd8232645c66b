//! `gc`: frees disk space.

use super::admin_call::AdminCallArguments;
use super::{CommandError, text_table};
use crate::config::Quantity;
use crate::proto::admin::{CollectRequest, CollectResponse, Victim};
use clap::Args;
use text::human_units::Bytes;

/// Arguments of `gc`.
#[derive(Debug, Args)]
#[command(
    after_help = "Without --target it runs the node plugin's own collection: it removes content that nothing refers
to, and evicts by the thresholds, the floor and the quota of the configuration. Content that is
mounted, pinned, in use or younger than cache.minimumAge is never removed.

Examples:
  csi-driver-oci gc --dry-run
  csi-driver-oci gc --target 20Gi
  csi-driver-oci gc --target 0"
)]
pub(super) struct CollectArguments {
    /// Print what would be removed, and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Evict until all content takes at most this size, such as 20Gi.
    #[arg(long, value_name = "SIZE")]
    target: Option<Quantity>,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn run(arguments: &CollectArguments) -> Result<(), CommandError> {
    let dry_run = arguments.dry_run;
    let target_bytes = arguments.target.map(|Quantity(bytes)| bytes);
    let collected = arguments.admin.call(async |mut client| {
        let answer = client.collect(CollectRequest { dry_run, target_bytes }).await?;
        Ok(answer.into_inner())
    })?;
    arguments.admin.output.result(&collected, || lines(&collected))
}

/// Describes a collection.
pub(super) fn lines(collected: &CollectResponse) -> Vec<String> {
    let row = |victim: &Victim| {
        let name = if victim.digest.is_empty() { &victim.path } else { &victim.digest };
        let kind = victim.path.split('s').next().unwrap_or_default();
        [
            kind.to_owned(),
            name.clone(),
            Bytes(victim.bytes).to_string(),
            text_table::age(victim.last_used),
            victim.reason.clone(),
        ]
    };
    let mut lines = Vec::new();
    if !collected.victims.is_empty() {
        let heads = ["KIND", "NAME", "SIZE", "USED", "REASON"];
        lines = text_table::lines(heads, collected.victims.iter().map(row));
    }
    let (freed, left) = (Bytes(collected.freed_bytes), Bytes(collected.cache_bytes));
    lines.push(if collected.dry_run {
        format!("{freed} would be freed; the cache has {left} now")
    } else {
        format!("{freed} freed; the cache has {left} now")
    });
    if collected.young_bytes > 0 {
        let young = Bytes(collected.young_bytes);
        lines
            .push(format!("{young} more stay only because they are younger than cache.minimumAge"));
    }
    lines
}
