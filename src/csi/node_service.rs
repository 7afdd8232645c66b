//! The Node service of CSI. Each call writes one log line and returns one status.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::csi_request::RequestContext;
use super::grpc_status;
use super::publish_events::PublishReporter;
use crate::admin::node_metrics::NodeMetrics;
use crate::kubernetes::EventRecorder;
use crate::proto::csi::v1::node_server;
use crate::proto::csi::v1::node_service_capability::{self, rpc};
use crate::proto::csi::v1::volume_usage::Unit;
use crate::proto::csi::v1::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
    NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, VolumeUsage,
};
use crate::volume::publish_volume::PublishPath;
use crate::volume::volume_stats::ResourceUsage;
use crate::volume::{VolumeError, VolumeManager};

/// The Node service.
#[derive(Clone)]
pub struct NodeService {
    /// The Node object's name.
    pub node_id: String,
    /// The facts of the node that requests are checked against.
    pub node: RequestContext,
    /// Runs the use cases.
    pub volumes: VolumeManager,
    /// Counts their results.
    pub metrics: Arc<NodeMetrics>,
    /// Reports pulls as Events; `None` if they are off.
    pub events: Option<EventRecorder>,
}

#[tonic::async_trait]
impl node_server::Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let started = Instant::now();
        let (metadata, _, message) = request.into_parts();
        // Neither secrets nor the volume context, which may hold tokens, reach the log.
        let span = tracing::info_span!(
            "publish",
            request = next_request(),
            volume = message.volume_id,
            target = message.target_path,
            pod = tracing::field::Empty,
            reference = tracing::field::Empty,
            digest = tracing::field::Empty,
        );
        let result = self.publish(&metadata, message).instrument(span.clone()).await;
        let _entered = span.enter();
        let milliseconds = started.elapsed().as_secs_f64() * 1000.0;
        match result {
            Ok(published) => {
                self.metrics.published(published.path, started.elapsed());
                span.record("digest", published.manifest.map(|digest| digest.to_string()));
                let (path, bytes) = (path_name(published.path), published.bytes);
                tracing::info!(milliseconds, path, bytes, "published");
                Ok(Response::new(NodePublishVolumeResponse {}))
            }
            Err(error) => {
                let status = grpc_status::status(&error);
                self.metrics.publish_failed(status.code(), started.elapsed());
                let code = status.code().description();
                tracing::warn!(milliseconds, code, error = status.message(), "not published");
                Err(status)
            }
        }
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let started = Instant::now();
        let NodeUnpublishVolumeRequest { volume_id, target_path } = request.into_inner();
        let span = tracing::info_span!(
            "unpublish",
            request = next_request(),
            volume = volume_id,
            target = target_path
        );
        let unpublish = async {
            match self.node.unpublish(&volume_id, &target_path) {
                Ok(Some(target)) => self.volumes.unpublish(target).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            }
        };
        let done = unpublish.instrument(span.clone()).await;
        let _entered = span.enter();
        let milliseconds = started.elapsed().as_secs_f64() * 1000.0;
        match done {
            Ok(()) => {
                self.metrics.unpublished();
                tracing::info!(milliseconds, "unpublished");
                Ok(Response::new(NodeUnpublishVolumeResponse {}))
            }
            Err(error) => {
                let status = grpc_status::status(&error);
                tracing::error!(milliseconds, error = status.message(), "not unpublished");
                Err(status)
            }
        }
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let NodeGetVolumeStatsRequest { volume_id, volume_path, .. } = request.into_inner();
        let stats = match self.node.stats(&volume_id, &volume_path) {
            Ok(path) => self.volumes.stats(path).await,
            Err(error) => Err(error),
        };
        let stats = stats.map_err(|error| grpc_status::status(&error))?;
        let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let usage = |unit: Unit, usage: ResourceUsage| VolumeUsage {
            available: count(usage.available),
            total: count(usage.total),
            used: count(usage.used),
            unit: unit.into(),
        };
        let usage = vec![usage(Unit::Bytes, stats.bytes), usage(Unit::Inodes, stats.inodes)];
        Ok(Response::new(NodeGetVolumeStatsResponse { usage }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = node_service_capability::Rpc { r#type: rpc::Type::GetVolumeStats.into() };
        let capability =
            NodeServiceCapability { r#type: Some(node_service_capability::Type::Rpc(capability)) };
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node_id = self.node_id.clone();
        Ok(Response::new(NodeGetInfoResponse { node_id, ..NodeGetInfoResponse::default() }))
    }

    async fn node_stage_volume(
        &self,
        _: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        Err(not_offered("staging"))
    }

    async fn node_unstage_volume(
        &self,
        _: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        Err(not_offered("staging"))
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        Err(not_offered("expansion"))
    }
}

impl NodeService {
    async fn publish(
        &self,
        metadata: &tonic::metadata::MetadataMap,
        message: NodePublishVolumeRequest,
    ) -> Result<crate::volume::publish_volume::PublishedVolume, VolumeError> {
        let (volume_id, target_path) = (message.volume_id.clone(), message.target_path.clone());
        let request = match self.node.publish(metadata, message) {
            Ok(request) => request,
            Err(error) => {
                // A malformed request may still name the directory that must not be left behind.
                if let Ok(Some(target)) = self.node.unpublish(&volume_id, &target_path) {
                    self.volumes.clear(target).await;
                }
                return Err(error);
            }
        };
        let span = tracing::Span::current();
        span.record("pod", request.pod.full_name());
        span.record("reference", request.attributes.names());
        let target = request.target.clone();
        let reporter = PublishReporter::new(self.events.as_ref(), &request);
        // The future is large, and several layers of callers hold it.
        let publish = Box::pin(self.volumes.publish(request));
        let published = match reporter {
            Some(reporter) => reporter.report(publish).await,
            None => publish.await,
        };
        match published {
            Err(error) if grpc_status::is_final(grpc_status::code(&error)) => {
                let mounted = self.volumes.clear(target.clone()).await;
                // If something is mounted there, the error is about that mount, or another call has mounted it: then
                // the volume has not finally failed.
                match error {
                    VolumeError::Occupied { .. } => Err(error),
                    _ if mounted => Err(VolumeError::Busy(target.full())),
                    error => Err(error),
                }
            }
            published => published,
        }
    }
}

/// Numbers calls, so that log lines of two calls for one volume can be told apart.
fn next_request() -> u64 {
    static REQUESTS: AtomicU64 = AtomicU64::new(0);
    REQUESTS.fetch_add(1, Ordering::Relaxed) + 1
}

fn not_offered(what: &str) -> Status {
    Status::unimplemented(format!("{what} is not offered: ask NodeGetCapabilities"))
}

fn path_name(path: PublishPath) -> &'static str {
    match path {
        PublishPath::AlreadyMounted => "already mounted",
        PublishPath::Hit => "hit",
        PublishPath::Miss => "miss",
    }
}
