//! `status`: the state of the node plugin.

use serde_json::json;

use super::admin_call::AdminCallArguments;
use super::{CommandError, OutputFormat, print, print_json, warm_list_status};
use crate::proto::admin::{GetStatusRequest, GetStatusResponse, ScrubStatus};
use text::human_units::Bytes;

pub(super) fn run(arguments: &AdminCallArguments) -> Result<(), CommandError> {
    let status = arguments.call(async |mut client| {
        client.get_status(GetStatusRequest {}).await.map(tonic::Response::into_inner)
    })?;
    match arguments.output {
        OutputFormat::Table => lines(&status).iter().for_each(|line| print(line)),
        OutputFormat::Json => print_json(&status, json!({"ready": status.not_ready.is_empty()})),
    }
    Ok(())
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
    let ready = match status.not_ready.as_str() {
        "" => "ready",
        reason => reason,
    };
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
        ("content", ready.to_owned()),
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
    if !status.warm.is_empty() {
        rows.push(("kept warm", warm_list_status::summary(&status.warm)));
    }
    let mut lines: Vec<_> = rows.iter().map(|(name, value)| format!("{name:<12}{value}")).collect();
    lines.extend(warm_list_status::lines(&status.warm));
    lines
}
