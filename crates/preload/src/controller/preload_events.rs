//! Events of preloads: one for each transition of a preload, whatever the number of nodes.

use controller_runtime::object_events::ObjectEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Client, Resource as _};

use crate::api::{ArtifactPreload, ArtifactPreloadStatus};

/// Reasons of a preload that is neither ready nor stalled, and makes progress.
const UNDER_WAY: [&str; 4] = ["Resolving", "Preloading", "Paused", "NoNodes"];

/// A transition of a preload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PreloadTransition {
    reason: &'static str,
    message: String,
}

/// Returns the transitions between two statuses.
pub(super) fn transitions(
    before: &ArtifactPreloadStatus,
    after: &ArtifactPreloadStatus,
) -> Vec<PreloadTransition> {
    let mut transitions = Vec::new();
    let is_true = |condition: &&Condition| condition.status == "True";
    let was = |kind| condition(before, kind);
    let is = |kind| condition(after, kind);
    let same_digest = (&before.reference, &before.digest) == (&after.reference, &after.digest);
    if let Some(resolved) = is("Resolved").filter(is_true)
        && !(same_digest && was("Resolved").is_some_and(|before| is_true(&before)))
    {
        transitions
            .push(PreloadTransition { reason: "Resolved", message: resolved.message.clone() });
    }
    let same_ready = before.ready_reference == after.ready_reference;
    let ready = is("Ready");
    if let Some(ready) = ready.filter(is_true)
        && !(same_ready && was("Ready").is_some_and(|before| is_true(&before)))
    {
        transitions.push(PreloadTransition { reason: "Ready", message: ready.message.clone() });
    }
    let with_reason =
        |condition: &Condition| format!("{}: {}", condition.reason, condition.message);
    if let Some(stalled) = is("Stalled").filter(is_true) {
        if was("Stalled").is_none_or(|before| before.reason != stalled.reason) {
            transitions.push(PreloadTransition { reason: "Failed", message: with_reason(stalled) });
        }
    } else if let Some(held) = ready.filter(|ready| !is_true(ready))
        && !UNDER_WAY.contains(&held.reason.as_str())
        && was("Ready").is_none_or(|before| before.reason != held.reason)
    {
        transitions.push(PreloadTransition { reason: "Held", message: with_reason(held) });
    }
    transitions
}

fn condition<'a>(status: &'a ArtifactPreloadStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind)
}

/// Writes one event for each transition, in order. Failures are logged and not retried.
pub(super) async fn write(
    client: Client,
    preload: ArtifactPreload,
    transitions: Vec<PreloadTransition>,
) {
    let object = preload.object_ref(&());
    for PreloadTransition { reason, message } in transitions {
        let is_warning = !matches!(reason, "Resolved" | "Ready");
        let event = ObjectEvent { object: object.clone(), is_warning, reason, message };
        if let Err(error) = event.write(client.clone()).await {
            tracing::warn!(?error, "an event on a preload is not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn status(digest: &str, conditions: &[(&str, &str, &str)]) -> ArtifactPreloadStatus {
        let condition = |(kind, status, reason): &(&str, &str, &str)| Condition {
            type_: (*kind).to_owned(),
            status: (*status).to_owned(),
            reason: (*reason).to_owned(),
            message: "why".to_owned(),
            observed_generation: None,
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        };
        ArtifactPreloadStatus {
            digest: Some(digest.to_owned()),
            conditions: conditions.iter().map(condition).collect(),
            ..ArtifactPreloadStatus::default()
        }
    }

    fn events(before: &ArtifactPreloadStatus, after: &ArtifactPreloadStatus) -> Vec<String> {
        let transitions = transitions(before, after).into_iter();
        transitions
            .map(|transition| format!("{} {}", transition.reason, transition.message))
            .collect()
    }

    #[test]
    fn every_transition_has_one_event() {
        let nothing = ArtifactPreloadStatus::default();
        let resolving =
            status("", &[("Resolved", "Unknown", "Resolving"), ("Ready", "False", "Resolving")]);
        let fetched =
            status("1", &[("Resolved", "True", "Resolved"), ("Ready", "False", "Preloading")]);
        let ready = status("1", &[("Resolved", "True", "Resolved"), ("Ready", "True", "Ready")]);
        let moved =
            status("2", &[("Resolved", "True", "Resolved"), ("Ready", "False", "Preloading")]);
        let away = [
            ("Resolved", "False", "RegistryUnavailable"),
            ("Ready", "False", "RegistryUnavailable"),
        ];
        let held = status("", &away);
        let failed =
            status("1", &[("Ready", "False", "NodesFailed"), ("Stalled", "True", "NodesFailed")]);
        for (before, after, expected) in [
            (&nothing, &resolving, vec![]),
            (&resolving, &fetched, vec!["Resolved why"]),
            (&fetched, &ready, vec!["Ready why"]),
            (&ready, &ready, vec![]),
            (&ready, &moved, vec!["Resolved why"]),
            (&resolving, &held, vec!["Held RegistryUnavailable: why"]),
            (&held, &held, vec![]),
            (&held, &failed, vec!["Failed NodesFailed: why"]),
            (&failed, &failed, vec![]),
        ] {
            assert_eq!(events(before, after), expected, "{before:?} {after:?}");
        }
    }
}
