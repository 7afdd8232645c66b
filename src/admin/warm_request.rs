//! The `warm` command: fetches artifacts before a pod needs them.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tonic::Status;

use super::admin_operations::{self, ADMIN};
use super::admin_service::{invalid, parse_platform, parse_reference};
use crate::proto::admin::warm_event::State;
use crate::proto::admin::{WarmEvent, WarmRequest};
use crate::volume::NodeContent;
use crate::warming::with_demands;
use oci::Platform;
use oci::credentials::Keyring;
use pull::{ProgressView, PullPolicy, Tenant, Want};

/// The most references in one request.
const REFERENCES: usize = 10_000;
/// The most references that one request pulls at once. The node's own limits hold as well.
const AT_ONCE: usize = 4;
/// The time that the last event of a reference waits for space in the stream.
const READER_PATIENCE: Duration = Duration::from_secs(10);
/// The interval between two events of progress.
const INTERVAL: Duration = Duration::from_millis(500);

/// A parsed request: the artifacts to fetch, and whether to pin them.
#[derive(Debug)]
pub(super) struct WarmBatch {
    wants: Vec<Want>,
    pin: bool,
}

/// Parses a request.
pub(super) fn parse_request(request: WarmRequest) -> Result<WarmBatch, Status> {
    let WarmRequest { references, platform, pin, docker_config } = request;
    if references.is_empty() || references.len() > REFERENCES {
        let wrong = format!("there must be from 1 to {REFERENCES} references");
        return Err(Status::invalid_argument(wrong));
    }
    let platform = parse_platform(&platform)?.unwrap_or_else(Platform::of_this_node);
    let keyring = match docker_config.as_slice() {
        [] => Keyring::empty(),
        bytes => Keyring::from_docker_config(bytes).map_err(invalid)?,
    };
    let wanted = |reference: &String| {
        let reference = parse_reference(reference)?;
        // The tag may have moved since its last resolution.
        let want = Want::of_node(reference, platform.clone(), Tenant::Admin);
        Ok(Want { policy: PullPolicy::Always, keyring: keyring.clone(), ..want })
    };
    Ok(WarmBatch { wants: references.iter().map(wanted).collect::<Result<_, Status>>()?, pin })
}

/// Fetches the artifacts, a few at once. Continues if the caller goes.
pub(super) async fn run(content: NodeContent, wants: WarmBatch, events: mpsc::Sender<WarmEvent>) {
    let WarmBatch { wants, pin } = wants;
    let wants = stream::iter(wants);
    wants.for_each_concurrent(AT_ONCE, |want| warm(&content, want, pin, &events)).await;
    content.maintenance.notify_one();
}

async fn warm(content: &NodeContent, want: Want, pin: bool, events: &mpsc::Sender<WarmEvent>) {
    let want = with_demands(content, want).await;
    let reference = want.reference.to_string();
    let view = ProgressView::default();
    let event = |state: State| {
        let snapshot = view.snapshot();
        WarmEvent {
            reference: reference.clone(),
            state: state.into(),
            done_bytes: snapshot.done,
            total_bytes: snapshot.total,
            bytes_per_second: snapshot.rate,
            ..WarmEvent::default()
        }
    };
    let acquire = content.puller.acquire(&want, &view);
    tokio::pin!(acquire);
    let acquired = loop {
        tokio::select! {
            acquired = &mut acquire => break acquired,
            () = tokio::time::sleep(INTERVAL) => {
                // A slow reader sees fewer steps. It never slows the pull.
                let _ = events.try_send(event(State::Pulling));
            }
        }
    };
    let last = match acquired {
        Ok(tree) => match pin_if_asked(content, &want, pin).await {
            Ok(()) => WarmEvent {
                digest: tree.record.manifest.to_string(),
                total_bytes: tree.record.bytes,
                done_bytes: tree.record.bytes,
                ..event(State::Done)
            },
            Err(reason) => WarmEvent { reason, ..event(State::Failed) },
        },
        Err(error) => WarmEvent { reason: error.to_string(), ..event(State::Failed) },
    };
    // A reader that has stopped must not hold up the pulls. Its stream ends without this event.
    let _ = events.send_timeout(last, READER_PATIENCE).await;
}

async fn pin_if_asked(content: &NodeContent, want: &Want, pin: bool) -> Result<(), String> {
    if !pin {
        return Ok(());
    }
    let store = content.store.clone();
    let (reference, platform) = (want.reference.clone(), want.platform.clone());
    let pin = move || admin_operations::pin(&store, &reference, &platform, ADMIN);
    match tokio::task::spawn_blocking(pin).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("pinning failed internally".to_owned()),
    }
}
