//! Events of preloads: one for each transition of a preload, whatever the number of nodes.

use std::time::Duration;
use text::printable::truncated;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use kube::api::{Api, PostParams};
use kube::{Client, Resource as _};

use crate::api::{ArtifactPreload, ArtifactPreloadStatus};

/// Source component of the events.
const COMPONENT: &str = "csi-driver-oci-controller";
/// Timeout of a write. A failed event is dropped, since it is a hint only.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum bytes of a message; the API server accepts 1024.
const MAXIMUM_MESSAGE: usize = 1000;
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
    let namespace = preload.metadata.namespace.clone().unwrap_or_default();
    let api: Api<Event> = Api::namespaced(client, &namespace);
    for transition in transitions {
        let event = event(&preload, transition, Timestamp::now());
        let parameters = PostParams::default();
        match tokio::time::timeout(TIMEOUT, api.create(&parameters, &event)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "an event on a preload is not written"),
            Err(_) => tracing::warn!("an event on a preload is not written in time"),
        }
    }
}

/// Returns a core/v1 event, like those of pods: `kubectl describe` shows both.
fn event(preload: &ArtifactPreload, transition: PreloadTransition, now: Timestamp) -> Event {
    let text = |text: &str| Some(text.to_owned());
    let name = preload.metadata.name.clone().unwrap_or_default();
    let time = format!("{:x}", now.as_nanosecond());
    let short = truncated(&name, 252 - time.len());
    let kind = if matches!(transition.reason, "Resolved" | "Ready") { "Normal" } else { "Warning" };
    let mut message = transition.message;
    message.truncate(message.floor_char_boundary(MAXIMUM_MESSAGE));
    Event {
        metadata: ObjectMeta {
            namespace: preload.metadata.namespace.clone(),
            name: Some(format!("{}.{time}", short.trim_end_matches(['.', '-']))),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some(ArtifactPreload::api_version(&()).into_owned()),
            kind: Some(ArtifactPreload::kind(&()).into_owned()),
            namespace: preload.metadata.namespace.clone(),
            name: Some(name),
            uid: preload.metadata.uid.clone(),
            ..ObjectReference::default()
        },
        reason: text(transition.reason),
        message: Some(message),
        type_: text(kind),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource { component: text(COMPONENT), host: None }),
        reporting_component: text(COMPONENT),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn an_event_fits_the_api_server() {
        let mut preload = ArtifactPreload::new(
            &"a".repeat(253),
            serde_json::from_value(serde_json::json!({"reference": "r.io/a:v1"})).expect("a spec"),
        );
        preload.metadata.uid = Some("1".to_owned());
        let transition = PreloadTransition { reason: "Failed", message: "\u{e4}".repeat(2000) };
        let event = event(&preload, transition, Timestamp::now());
        assert!(event.metadata.name.expect("a name").len() <= 253);
        assert!(event.message.expect("a message").len() <= MAXIMUM_MESSAGE);
        assert_eq!(event.involved_object.kind.as_deref(), Some("ArtifactPreload"));
    }
}
