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

use super::Happening;
use super::ledger::{Ledger, Writing};

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

pub(super) struct Writer {
    driver_name: String,
    node_id: String,
    ledger: Ledger,
    /// `None` until the first write.
    client: Option<Client>,
    /// The last failure, which is not logged again.
    told: String,
}

impl Writer {
    pub(super) fn new(driver_name: String, node_id: String) -> Self {
        let (ledger, client, told) = (Ledger::default(), None, String::new());
        Self { driver_name, node_id, ledger, client, told }
    }

    /// Runs until all senders are dropped.
    pub(super) async fn run(mut self, mut happenings: mpsc::Receiver<Happening>) {
        while let Some(happening) = happenings.recv().await {
            let noted = self.ledger.note(&happening, Instant::now(), Timestamp::now());
            let Some(writing) = noted else { continue };
            let written = tokio::time::timeout(TIMEOUT, self.write(&happening, &writing)).await;
            match written.unwrap_or(Err(WriteError::Timeout)) {
                Ok(()) => self.told.clear(),
                Err(error) => {
                    // An Event that was not created cannot be changed later.
                    self.ledger.forget(&writing.name);
                    let error = error.to_string();
                    if error != self.told {
                        tracing::warn!(error, "an event on a pod is not written");
                        self.told = error;
                    }
                }
            }
        }
    }

    async fn write(&mut self, happening: &Happening, writing: &Writing) -> Result<(), WriteError> {
        let events: Api<Event> = Api::namespaced(self.client()?, &happening.pod.namespace);
        if writing.is_new {
            events.create(&PostParams::default(), &self.event(happening, writing)).await?;
            return Ok(());
        }
        let change = json!({
            "message": writing.message,
            "count": writing.count,
            "lastTimestamp": Time(writing.last),
        });
        events.patch(&writing.name, &PatchParams::default(), &Patch::Merge(change)).await?;
        Ok(())
    }

    fn client(&mut self) -> Result<Client, WriteError> {
        if self.client.is_none() {
            let config = Config::incluster().map_err(|e| WriteError::NoAccess(e.to_string()))?;
            self.client = Some(Client::try_from(config)?);
        }
        self.client.clone().ok_or(WriteError::Timeout)
    }

    fn event(&self, happening: &Happening, writing: &Writing) -> Event {
        let pod = &happening.pod;
        let text = |text: &str| Some(text.to_owned());
        Event {
            metadata: ObjectMeta {
                namespace: text(&pod.namespace),
                name: text(&writing.name),
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
            reason: text(happening.reason.name()),
            message: text(&writing.message),
            type_: text(happening.reason.kind()),
            count: Some(writing.count),
            first_timestamp: Some(Time(writing.first)),
            last_timestamp: Some(Time(writing.last)),
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
