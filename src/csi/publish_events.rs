//! Reports the progress and the end of a publish as Events of its pod, if they are on.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::Instant;

use super::grpc_status;
use crate::kubernetes::{EventRecorder, PodReference};
use crate::volume::publish_volume::{PublishPath, PublishedVolume};
use crate::volume::{PublishRequest, VolumeError};
use pull::ProgressView;
use text::human_units::Bytes;

/// The delay before the first report. A publish that ends earlier reports only its end.
const FIRST_REPORT: Duration = Duration::from_millis(250);
/// The interval between two reports of progress.
const INTERVAL: Duration = Duration::from_secs(30);

/// The reporter of one publish.
pub(super) struct PublishReporter<'a> {
    events: &'a EventRecorder,
    pod: PodReference,
    reference: String,
    progress: ProgressView,
    started: Instant,
}

impl<'a> PublishReporter<'a> {
    /// Returns `None` if the request does not identify the pod.
    pub(super) fn new(events: Option<&'a EventRecorder>, request: &PublishRequest) -> Option<Self> {
        let (pod, events) = (&request.pod, events?);
        let (namespace, name) = (pod.namespace.clone()?, pod.name.clone()?);
        let pod = PodReference { namespace, name, uid: pod.uid.clone()? };
        let reference = request.attributes.names();
        let (progress, started) = (request.progress.clone(), Instant::now());
        Some(Self { events, pod, reference, progress, started })
    }

    /// Reports the progress of the pull until `publish` ends, and then its end.
    pub(super) async fn report(
        self,
        mut publish: Pin<Box<impl Future<Output = Result<PublishedVolume, VolumeError>>>>,
    ) -> Result<PublishedVolume, VolumeError> {
        let mut wait = FIRST_REPORT;
        let published = loop {
            tokio::select! {
                published = &mut publish => break published,
                () = tokio::time::sleep(wait) => {
                    if self.progress.was_shown() {
                        let progress = self.progress.snapshot().to_string();
                        self.events.pulling(&self.pod, &self.reference, progress);
                    }
                    wait = INTERVAL;
                }
            }
        };
        self.report_end(&published);
        published
    }

    fn report_end(&self, published: &Result<PublishedVolume, VolumeError>) {
        let (pod, reference) = (&self.pod, &self.reference);
        match published {
            Ok(PublishedVolume { path: PublishPath::AlreadyMounted, .. }) => {}
            Ok(PublishedVolume { path, manifest, bytes }) => {
                let digest = manifest.map(|digest| digest.to_string()).unwrap_or_default();
                let what = format!("{digest}, {}", Bytes(*bytes));
                let took = self.started.elapsed();
                let was_found = *path != PublishPath::Miss;
                self.events.pulled(pod, reference, what, took, was_found);
            }
            Err(error) => {
                let status = grpc_status::status(error);
                // The pull continues, or another call works on the volume.
                if status.code() != tonic::Code::Aborted {
                    self.events.failed(pod, reference, status.message().to_owned());
                }
            }
        }
    }
}
