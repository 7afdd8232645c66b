//! `verify`: reads all content back.

use clap::Args;
use serde_json::json;

use super::CommandError;
use super::admin_call::{AdminCallArguments, ended_early, unless_interrupted};
use crate::proto::admin::verify_event::Event;
use crate::proto::admin::{Finding, Repair, VerifyRequest, VerifySummary};
use text::human_units::Bytes;

/// Arguments of `verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "No further volume shows damaged content; volumes that have it mounted keep it. The exit status
is 1 while damaged content has not been fetched again.

Examples:
  csi-driver-oci verify
  csi-driver-oci verify --repair -o json"
)]
pub(super) struct VerifyArguments {
    /// Fetch damaged content again, into a new generation.
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn run(arguments: &VerifyArguments) -> Result<(), CommandError> {
    let (repair, output) = (arguments.repair, &arguments.admin.output);
    let (mut findings, mut repairs) = (Vec::new(), Vec::new());
    let mut unread = 0;
    let summary = arguments.admin.call(async |mut client| {
        unless_interrupted(async {
            let mut events = client.verify(VerifyRequest { repair }).await?.into_inner();
            let mut summary = None;
            while let Some(event) = events.message().await? {
                match event.event {
                    Some(Event::Finding(finding)) => {
                        let is_unread = finding.kind == "unread";
                        unread += u64::from(is_unread);
                        let Finding { kind, path, detail, .. } = &finding;
                        let damaged = if is_unread { "" } else { "damaged " };
                        output.text(&format!("{damaged}{kind}  {path}: {detail}"));
                        findings.push(finding);
                    }
                    Some(Event::Repair(repair)) => {
                        let Repair { digest, reference, reason, .. } = &repair;
                        output.text(&if repair.done {
                            format!("{digest}  fetched again by {reference}")
                        } else {
                            format!("{digest}  not fetched: {reason}")
                        });
                        repairs.push(repair);
                    }
                    Some(Event::Summary(last)) => summary = Some(last),
                    None => {}
                }
            }
            summary.ok_or_else(ended_early)
        })
        .await
    })?;
    let VerifySummary { objects, bytes, findings: found, unrepaired } = summary;
    let document = json!({
        "objects": objects,
        "bytes": bytes,
        "findings": findings,
        "repairs": repairs,
        "unrepaired": unrepaired,
    });
    output.result(&document, || {
        vec![format!("{objects} objects and {} read back, {found} findings", Bytes(bytes))]
    })?;
    match (found.saturating_sub(unread), unrepaired) {
        (_, 0) if unread > 0 => Err(format!(
            "{unread} objects could not be read back: do what is said of them, and run `verify` again"
        )),
        (0, _) => Ok(()),
        (_, 0) if repair => Ok(()),
        (found, 0) => Err(format!("{found} findings; nothing that is shown links them any more")),
        (_, artifacts) => Err(format!(
            "{artifacts} artifacts are damaged: run `verify --repair`, or let the next publish fetch them"
        )),
    }
}
