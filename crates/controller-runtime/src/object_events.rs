//! Events on objects, like those of pods: `kubectl describe` shows them.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Client;
use kube::api::Api;
use text::printable::truncated;

use crate::object_write::{ObjectWriteError, post_parameters, with_timeout};

/// Source component of the events.
const COMPONENT: &str = "csi-driver-oci-controller";
/// Maximum bytes of a message; the API server accepts 1024.
pub const MAXIMUM_MESSAGE: usize = 1000;
/// Namespace of events on objects that have none, as in Kubernetes itself.
const CLUSTER_NAMESPACE: &str = "default";

/// An event on an object.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectEvent {
    /// Object that the event is about.
    pub object: ObjectReference,
    /// True for a warning, false for a normal event.
    pub is_warning: bool,
    /// Reason in one word.
    pub reason: &'static str,
    /// Message, which is cut to the size that the API server accepts.
    pub message: String,
}

impl ObjectEvent {
    /// Writes the event.
    pub async fn write(self, client: Client) -> Result<(), ObjectWriteError> {
        let event = self.at(Timestamp::now());
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(client, &namespace);
        with_timeout(api.create(&post_parameters(), &event)).await.map(drop)
    }

    /// Returns a core/v1 event.
    pub fn at(self, now: Timestamp) -> Event {
        let text = |text: &str| Some(text.to_owned());
        let name = self.object.name.clone().unwrap_or_default();
        let time = format!("{:x}", now.as_nanosecond());
        let short = truncated(&name, 252 - time.len());
        let namespace = self.object.namespace.clone();
        Event {
            metadata: ObjectMeta {
                namespace: namespace.or_else(|| text(CLUSTER_NAMESPACE)),
                name: Some(format!("{}.{time}", short.trim_end_matches(['.', '-']))),
                ..ObjectMeta::default()
            },
            involved_object: self.object,
            reason: text(self.reason),
            message: text(truncated(&self.message, MAXIMUM_MESSAGE)),
            type_: text(if self.is_warning { "Warning" } else { "Normal" }),
            count: Some(1),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            source: Some(EventSource { component: text(COMPONENT), host: None }),
            reporting_component: text(COMPONENT),
            ..Event::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_fits_the_api_server() {
        let event = ObjectEvent {
            object: ObjectReference { name: Some("a".repeat(253)), ..ObjectReference::default() },
            is_warning: true,
            reason: "Failed",
            message: "\u{e4}".repeat(2000),
        };
        let event = event.at(Timestamp::now());
        assert!(event.metadata.name.expect("a name").len() <= 253);
        assert!(event.message.expect("a message").len() <= MAXIMUM_MESSAGE);
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
    }
}
