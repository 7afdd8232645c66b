//! `status`: the state of the node plugin.

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::Args;

use super::admin_call::AdminCallArguments;
use super::output::{is_closed, print_text};
use super::{CommandError, text_table, warm_list_status};
use crate::proto::admin::{GetStatusRequest, GetStatusResponse, Pull, ScrubStatus};
use text::human_units::Bytes;

/// The interval of `--watch`.
const INTERVAL: Duration = Duration::from_secs(2);
/// The escape sequence that clears a terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci status
  csi-driver-oci status --watch
  csi-driver-oci status -o json")]
pub(super) struct StatusArguments {
    /// Print the status again every two seconds if it has changed, until Ctrl-C.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn run(arguments: &StatusArguments) -> Result<(), CommandError> {
    let output = &arguments.admin.output;
    let is_terminal = std::io::stdout().is_terminal();
    let mut last = None;
    loop {
        let status = arguments.admin.call(async |mut client| {
            client.get_status(GetStatusRequest {}).await.map(tonic::Response::into_inner)
        })?;
        if last.as_ref() != Some(&status) {
            if arguments.watch && is_terminal && output.is_text() {
                print_text(CLEAR);
            } else if last.is_some() {
                output.text("");
            }
            output.result(&status, || lines(&status))?;
        }
        if !arguments.watch || is_closed() {
            return Ok(());
        }
        last = Some(status);
        std::thread::sleep(INTERVAL);
    }
}

/// Returns a line such as `r.io/app  sha256:...  45% (1.0 GiB of 2.2 GiB), ... for namespace default`.
fn pull_line(pull: &Pull) -> String {
    let (digest, tenants) = (text_table::short(&pull.digest), pull.tenants.join(", "));
    format!("            {}  {digest}  {}; for {tenants}", pull.repository, pull.progress)
}

/// Returns a summary such as `3.4 GiB in 12 objects since the start, 0 damaged; 5 h behind`.
fn scrub_summary(scrub: &ScrubStatus) -> String {
    if scrub.interval_seconds == 0 {
        return "off (cache.scrubInterval)".to_owned();
    }
    let (bytes, objects, damaged) = (Bytes(scrub.bytes), scrub.objects, scrub.findings);
    let pace = match (scrub.lag_seconds.unwrap_or_default(), scrub.interval_seconds) {
        (lag @ 3600.., _) => format!("{} h behind", lag / 3600),
        (_, interval @ 7200..) => format!("all of it within {} h", interval / 3600),
        (_, interval) => format!("all of it within {interval} s"),
    };
    format!("{bytes} in {objects} objects since the start, {damaged} damaged; {pace}")
}

fn lines(status: &GetStatusResponse) -> Vec<String> {
    let ready = if status.ready { "yes".to_owned() } else { format!("no: {}", status.reason) };
    let registered = match status.registered {
        Some(true) => "yes",
        Some(false) => "not yet",
        None => "by the sidecar",
    };
    let leases = match status.file_leases_enabled {
        Some(false) => "disabled",
        Some(true) => "enabled: a pod can delay opens of shared files (fs.leases-enable)",
        None => "unknown",
    };
    let (free, total) = (Bytes(status.free_bytes), Bytes(status.total_bytes));
    let (cached, pinned) = (Bytes(status.cache_bytes), Bytes(status.pinned_bytes));
    let (objects, evicted) = (status.cache_objects, Bytes(status.evicted_bytes));
    let mut rows = vec![
        ("driver", format!("{} {}", status.driver_name, status.version)),
        ("node", status.node_id.clone()),
        ("ready", ready),
        ("registered", registered.to_owned()),
        ("published", format!("{} volumes", status.published)),
        ("cache", format!("{cached} in {objects} objects, {pinned} pinned")),
        ("evicted", format!("{evicted} in {} objects since the start", status.evicted_objects)),
        (
            "state",
            format!(
                "{} ({free} of {total} free, {} stay free)",
                status.state_dir,
                Bytes(status.floor_bytes)
            ),
        ),
        ("file leases", leases.to_owned()),
    ];
    let scrub = status.scrub.clone().unwrap_or_default();
    rows.push(("read back", scrub_summary(&scrub)));
    if scrub.unread_objects > 0 {
        let count = scrub.unread_objects;
        rows.push((
            "unread",
            format!("{count} objects of an earlier format, read back before they are shown"),
        ));
    }
    let mut lines: Vec<_> = rows.iter().map(|(name, value)| format!("{name:<12}{value}")).collect();
    if !status.pulls.is_empty() {
        lines.push(format!("pulling     {} artifacts", status.pulls.len()));
        lines.extend(status.pulls.iter().map(pull_line));
    }
    if !status.warm.is_empty() {
        lines.push(format!("kept warm   {}", warm_list_status::summary(&status.warm)));
        lines.extend(warm_list_status::lines(&status.warm));
    }
    lines
}
