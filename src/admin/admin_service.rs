//! The gRPC service of the admin socket: parses requests, runs operations and converts their results.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::io::{StreamReader, SyncIoBridge};
use tokio_util::task::TaskTracker;
use tonic::{Code, Request, Response, Status, Streaming};

use super::admin_operations::{self, ADMIN, OperationError};
use super::health_probes::HealthProbes;
use super::{admin_messages, warm_request};
use crate::file_leases;
use crate::following::FollowState;
use crate::proto::admin::admin_server::Admin;
use crate::proto::admin::{
    CollectRequest, CollectResponse, GetStatusRequest, GetStatusResponse, ImportRequest,
    ImportResponse, InspectArtifactRequest, InspectArtifactResponse, ListArtifactsRequest,
    ListArtifactsResponse, PinRequest, PinResponse, Pull, RemoveRequest, RemoveResponse, Repair,
    UnpinRequest, UnpinResponse, VerifyEvent, VerifyRequest, VerifySummary, WarmEvent, WarmRequest,
    import_request, verify_event,
};
use crate::scrub::ScrubState;
use crate::volume::NodeContent;
use crate::warming::{ListedReference, Reconciler};
use oci::{Platform, Reference};
use pull::content_repair::Repaired;
use pull::image_layout::ImportError;
use store::gc::Want;
use store::{DiskSpace, Store, StoreError};

/// The capacity of a channel to a slow reader.
const EVENTS: usize = 64;

/// The service of the admin socket.
#[derive(Clone)]
pub struct AdminService {
    /// The Node object's name.
    pub node_id: String,
    /// The CSI driver's name.
    pub driver_name: String,
    /// The state directory.
    pub state_dir: PathBuf,
    /// The readiness of the node, and the content that it depends on.
    pub health: HealthProbes,
    /// The references of the configuration's list.
    pub warming: Arc<Reconciler<ListedReference>>,
    /// The tags that mounted volumes follow.
    pub following: FollowState,
    /// The progress of the scrub.
    pub scrub: ScrubState,
    /// Runs work that continues after its caller has gone.
    pub tracker: TaskTracker,
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let content = self.health.content.borrow().clone();
        let ready = self.health.ready().await;
        let mut status = GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_id: self.node_id.clone(),
            driver_name: self.driver_name.clone(),
            state_dir: self.state_dir.display().to_string(),
            ready: ready.is_ok(),
            reason: ready.err().unwrap_or_default(),
            registered: self.health.registered.as_ref().map(|known| known.load(Ordering::SeqCst)),
            pulls: content.as_ref().map(pulls).unwrap_or_default(),
            file_leases_enabled: file_leases::are_enabled(),
            warm: self
                .warming
                .states()
                .into_iter()
                .map(|(listed, state)| admin_messages::warm_reference(&listed, state))
                .collect(),
            scrub: Some(admin_messages::scrub(self.scrub.snapshot())),
            ..GetStatusResponse::default()
        };
        let state_dir = self.state_dir.clone();
        let collect_status = move || {
            let room = DiskSpace::of(&state_dir).unwrap_or_default();
            (status.free_bytes, status.total_bytes) = (room.free_bytes, room.total_bytes);
            if let Ok(content) = content {
                add_numbers(&mut status, &content.store, &room);
            }
            status
        };
        Ok(Response::new(tokio::task::spawn_blocking(collect_status).await.map_err(crashed)?))
    }

    async fn list_artifacts(
        &self,
        _: Request<ListArtifactsRequest>,
    ) -> Result<Response<ListArtifactsResponse>, Status> {
        let artifacts = self.blocking(|store| admin_operations::artifacts(&store)).await?;
        let pulls = self.health.content.borrow().as_ref().map(pulls).unwrap_or_default();
        let followed = self.following.tags.states().into_iter();
        let followed = followed.map(|(tag, state)| admin_messages::followed(&tag, state)).collect();
        Ok(Response::new(ListArtifactsResponse { artifacts, pulls, followed }))
    }

    async fn inspect_artifact(
        &self,
        request: Request<InspectArtifactRequest>,
    ) -> Result<Response<InspectArtifactResponse>, Status> {
        let reference = parse_reference(&request.into_inner().reference)?;
        let warm = self.warming.get(&reference.to_string());
        let warm = warm.map(|(listed, state)| admin_messages::warm_reference(&listed, state));
        let is_listed = warm.is_some();
        let inspect = move |store: Store| match admin_operations::inspect(&store, &reference) {
            // Listed in the configuration and not fetched yet. Its state says why.
            Err(OperationError::NotHere(_)) if is_listed => Ok(InspectArtifactResponse {
                reference: reference.to_string(),
                ..Default::default()
            }),
            inspected => inspected,
        };
        let inspected = self.blocking(inspect).await?;
        Ok(Response::new(InspectArtifactResponse { warm, ..inspected }))
    }

    type WarmStream = EventStream<WarmEvent>;

    async fn warm(
        &self,
        request: Request<WarmRequest>,
    ) -> Result<Response<Self::WarmStream>, Status> {
        let content = self.content()?;
        let wants = warm_request::parse_request(request.into_inner())?;
        let (events, receiver) = mpsc::channel(EVENTS);
        // The pull continues if the caller goes.
        self.tracker.spawn(warm_request::run(content, wants, events));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok))))
    }

    async fn import(
        &self,
        request: Request<Streaming<ImportRequest>>,
    ) -> Result<Response<ImportResponse>, Status> {
        let content = self.content()?;
        let mut stream = request.into_inner();
        let Some(import_request::Part::Header(header)) =
            stream.message().await?.and_then(|message| message.part)
        else {
            return Err(Status::invalid_argument("the first message must be the header"));
        };
        let reference = parse_reference(&header.reference)?;
        let platform = parse_platform(&header.platform)?.unwrap_or_else(Platform::of_this_node);
        let chunks = stream.map(|message| match message {
            Ok(ImportRequest { part: Some(import_request::Part::Data(data)) }) => Ok(data.into()),
            Ok(_) => Ok(Bytes::new()),
            // An incomplete stream is not taken for a complete one.
            Err(error) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, error.message())),
        });
        let reader = SyncIoBridge::new(StreamReader::new(chunks));
        let named = reference.to_string();
        let import = self
            .tracker
            .spawn(async move { content.puller.import(reader, &reference, &platform).await });
        let tree = import.await.map_err(crashed)?.map_err(|error| import_status(&error))?;
        Ok(Response::new(ImportResponse {
            reference: named,
            digest: tree.record.manifest.to_string(),
            bytes: tree.record.bytes,
            inodes: tree.record.inodes,
        }))
    }

    async fn pin(&self, request: Request<PinRequest>) -> Result<Response<PinResponse>, Status> {
        let request = request.into_inner();
        let reference = parse_reference(&request.reference)?;
        let platform = parse_platform(&request.platform)?.unwrap_or_else(Platform::of_this_node);
        let pin = move |store: Store| admin_operations::pin(&store, &reference, &platform, ADMIN);
        let pin = self.blocking(pin).await?;
        let (reference, digest) = (pin.reference, pin.manifest.to_string());
        Ok(Response::new(PinResponse { digest, reference }))
    }

    async fn unpin(
        &self,
        request: Request<UnpinRequest>,
    ) -> Result<Response<UnpinResponse>, Status> {
        let request = request.into_inner();
        let reference = parse_reference(&request.reference)?;
        let (platform, named) = (parse_platform(&request.platform)?, reference.to_string());
        let unpin = move |store: Store| {
            admin_operations::unpin(&store, &reference, platform.as_ref(), ADMIN)
        };
        let (unpinned, pins) = self.blocking(unpin).await?;
        let unpinned = u32::try_from(unpinned).unwrap_or(u32::MAX);
        Ok(Response::new(UnpinResponse { unpinned, pins, reference: named }))
    }

    async fn remove(
        &self,
        request: Request<RemoveRequest>,
    ) -> Result<Response<RemoveResponse>, Status> {
        let reference = parse_reference(&request.into_inner().reference)?;
        let remove = move |store: Store| admin_operations::remove(&store, &reference);
        Ok(Response::new(self.blocking(remove).await?))
    }

    async fn collect(
        &self,
        request: Request<CollectRequest>,
    ) -> Result<Response<CollectResponse>, Status> {
        let CollectRequest { dry_run, target_bytes } = request.into_inner();
        let want = target_bytes.map_or(Want::Upkeep, Want::AtMost);
        let collect = move |store: Store| {
            let collected = if dry_run {
                store.collector().plan(&want)
            } else {
                store.collector().collect(&want)
            };
            Ok::<_, OperationError>((collected?, store.inventory().usage()?.bytes))
        };
        let (collected, cache_bytes) = self.blocking(collect).await?;
        Ok(Response::new(admin_messages::collected(&collected, cache_bytes, dry_run)))
    }

    type VerifyStream = EventStream<VerifyEvent>;

    async fn verify(
        &self,
        request: Request<VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let content = self.content()?;
        let repair = request.into_inner().repair;
        let (events, receiver) = mpsc::channel(EVENTS);
        self.tracker.spawn(verify(content, repair, events));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl AdminService {
    fn content(&self) -> Result<NodeContent, Status> {
        self.health.content.borrow().clone().map_err(Status::unavailable)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(Store) -> Result<T, OperationError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = self.content()?.store;
        let done = tokio::task::spawn_blocking(move || work(store)).await.map_err(crashed)?;
        done.map_err(|error| Status::new(operation_code(&error), error.to_string()))
    }
}

/// Verifies all content. Damage is logged and repaired also if the caller has gone.
async fn verify(
    content: NodeContent,
    repair: bool,
    events: mpsc::Sender<Result<VerifyEvent, Status>>,
) {
    let found = events.clone();
    let mut findings = 0;
    let (count, counted) = std::sync::mpsc::channel();
    let verified = content.puller.check_content(move |finding| {
        finding.log();
        let _ = count.send(());
        let event = verify_event::Event::Finding(admin_messages::finding(finding));
        let _ = found.blocking_send(Ok(VerifyEvent { event: Some(event) }));
    });
    let (verified, damaged) = match verified.await {
        Ok(verified) => verified,
        Err(error) => {
            let _ = events.send(Err(Status::internal(error.to_string()))).await;
            return;
        }
    };
    findings += counted.try_iter().count() as u64;
    let mut unrepaired = 0;
    for tree in &damaged {
        let outcome = if repair {
            content
                .puller
                .repair(tree)
                .await
                .unwrap_or_else(|error| Repaired::Later(error.to_string()))
        } else {
            Repaired::Later("the next publish or `verify --repair` fetches it again".to_owned())
        };
        let mut repair = Repair { digest: tree.manifest.to_string(), ..Repair::default() };
        match outcome {
            Repaired::Anew(reference) => {
                (repair.done, repair.reference) = (true, reference.to_string());
            }
            Repaired::Later(reason) => repair.reason = reason,
        }
        unrepaired += u64::from(!repair.done);
        let event = verify_event::Event::Repair(repair);
        let _ = events.send(Ok(VerifyEvent { event: Some(event) })).await;
    }
    let (objects, bytes) = (verified.objects, verified.bytes);
    let summary = VerifySummary { objects, bytes, findings, unrepaired };
    let event = Some(verify_event::Event::Summary(summary));
    let _ = events.send(Ok(VerifyEvent { event })).await;
}

fn pulls(content: &NodeContent) -> Vec<Pull> {
    content.puller.under_way().iter().map(admin_messages::pull).collect()
}

fn add_numbers(status: &mut GetStatusResponse, store: &Store, room: &DiskSpace) {
    status.published = store.publications().count() as u64;
    if let Ok(usage) = store.inventory().usage() {
        status.cache_bytes = usage.bytes;
        status.cache_objects = usage.objects;
    }
    if let Ok(pinned) = store.inventory().pinned_space() {
        status.pinned_bytes = pinned.bytes;
    }
    if let (Some(scrub), Ok(unread)) = (&mut status.scrub, store.inventory().unread_objects()) {
        scrub.unread_objects = unread.len() as u64;
    }
    status.floor_bytes = room.floor(store.space().options()).bytes;
    let evictions = &store.collector().evictions;
    status.evicted_objects = evictions.total();
    status.evicted_bytes = evictions.bytes();
}

/// Returns the status of a part of a request that cannot be parsed.
pub(super) fn invalid<E: std::fmt::Display>(error: E) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn parse_reference(text: &str) -> Result<Reference, Status> {
    text.parse().map_err(invalid::<oci::reference::ReferenceError>)
}

/// Parses an optional platform. An empty text is `None`.
pub(super) fn parse_platform(text: &str) -> Result<Option<Platform>, Status> {
    let given = (!text.is_empty()).then(|| text.parse());
    given.transpose().map_err(invalid::<oci::platform::PlatformError>)
}

fn operation_code(error: &OperationError) -> Code {
    match error {
        OperationError::NotHere(_) => Code::NotFound,
        OperationError::Pinned { .. } => Code::FailedPrecondition,
        OperationError::Store(error) => store_code(error),
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::NoSpace { .. }
        | StoreError::NoRoom(_)
        | StoreError::TooMuchPinned { .. }
        | StoreError::PinShareExceeded { .. } => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

/// Chooses a code that tells the caller to change the layout, unless the disk is full.
fn import_status(error: &ImportError) -> Status {
    let code = match error {
        ImportError::Pull(error) if error.is_full() => Code::ResourceExhausted,
        ImportError::Shared(error) if error.is_full() => Code::ResourceExhausted,
        _ => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}

fn crashed(_: tokio::task::JoinError) -> Status {
    Status::internal("the driver failed internally: please report it with the driver's log")
}
