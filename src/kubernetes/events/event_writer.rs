//! The task that writes Events. Pods and publishes never depend on the API server.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Config};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::PodOccurrence;
use super::event_correlator::{EventCorrelator, EventWrite};

/// The timeout of one request. Occurrences in the queue are delayed or dropped meanwhile.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A failure to write an Event.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    /// This process is in no pod, or in one without a token.
    #[error("there is no access to the Kubernetes API: {0}")]
    NoAccess(String),
    /// The server refuses the request, or cannot be reached.
    #[error("the Kubernetes API: {0}")]
    Refused(#[from] kube::Error),
    /// The server does not respond.
    #[error("the Kubernetes API does not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

pub(super) struct EventWriter {
    driver_name: String,
    node_id: String,
    correlator: EventCorrelator,
    /// `None` until the first write.
    client: Option<Client>,
    /// The last failure, which is not logged again.
    logged: String,
}

impl EventWriter {
    pub(super) fn new(driver_name: String, node_id: String) -> Self {
        let (correlator, client, logged) = (EventCorrelator::default(), None, String::new());
        Self { driver_name, node_id, correlator, client, logged }
    }

    /// Runs until all senders are dropped.
    pub(super) async fn run(mut self, mut occurrences: mpsc::Receiver<PodOccurrence>) {
        while let Some(occurrence) = occurrences.recv().await {
            let noted = self.correlator.note(&occurrence, Instant::now(), Timestamp::now());
            let Some(write) = noted else { continue };
            let written = tokio::time::timeout(TIMEOUT, self.write(&occurrence, &write)).await;
            match written.unwrap_or(Err(WriteError::Timeout)) {
                Ok(()) => self.logged.clear(),
                Err(error) => {
                    // An Event that was not created cannot be changed later.
                    self.correlator.forget(&write.name);
                    let error = error.to_string();
                    if error != self.logged {
                        tracing::warn!(error, "an event on a pod is not written");
                        self.logged = error;
                    }
                }
            }
        }
    }

    async fn write(
        &mut self,
        occurrence: &PodOccurrence,
        write: &EventWrite,
    ) -> Result<(), WriteError> {
        let events: Api<Event> = Api::namespaced(self.client()?, &occurrence.pod.namespace);
        if write.is_new {
            events.create(&PostParams::default(), &self.event(occurrence, write)).await?;
            return Ok(());
        }
        let change = json!({
            "message": write.message,
            "count": write.count,
            "lastTimestamp": Time(write.last),
        });
        events.patch(&write.name, &PatchParams::default(), &Patch::Merge(change)).await?;
        Ok(())
    }

    fn client(&mut self) -> Result<Client, WriteError> {
        if self.client.is_none() {
            let config = Config::incluster().map_err(|e| WriteError::NoAccess(e.to_string()))?;
            self.client = Some(Client::try_from(config)?);
        }
        self.client.clone().ok_or(WriteError::Timeout)
    }

    fn event(&self, occurrence: &PodOccurrence, write: &EventWrite) -> Event {
        let pod = &occurrence.pod;
        let text = |text: &str| Some(text.to_owned());
        Event {
            metadata: ObjectMeta {
                namespace: text(&pod.namespace),
                name: text(&write.name),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: text("v1"),
                kind: text("Pod"),
                namespace: text(&pod.namespace),
                name: text(&pod.name),
                uid: text(&pod.uid),
                ..ObjectReference::default()
            },
            reason: text(occurrence.reason.name()),
            message: text(&write.message),
            type_: text(occurrence.reason.kind()),
            count: Some(write.count),
            first_timestamp: Some(Time(write.first)),
            last_timestamp: Some(Time(write.last)),
            source: Some(EventSource {
                component: text(&self.driver_name),
                host: text(&self.node_id),
            }),
            reporting_component: text(&self.driver_name),
            reporting_instance: text(&self.node_id),
            ..Event::default()
        }
    }
}
