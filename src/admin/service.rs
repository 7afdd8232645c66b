//! The admin interface: what the command line may ask.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::proto::admin::admin_server::Admin;
use crate::proto::admin::{
    Artifact, GetStatusRequest, GetStatusResponse, ListArtifactsRequest, ListArtifactsResponse,
};
use crate::store::{Room, Store, StoreError};
use crate::volume::ContentState;

/// Answers the command line.
#[derive(Clone)]
pub struct AdminService {
    /// The Node object's name.
    pub node_id: String,
    /// The CSI driver's name.
    pub driver_name: String,
    /// Where content lies.
    pub state_dir: PathBuf,
    /// Whether content can be served.
    pub content: watch::Receiver<ContentState>,
    /// Set by the kubelet; none when somebody else registers the driver.
    pub registered: Option<Arc<AtomicBool>>,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let content = self.content.borrow().clone();
        let not_ready = content.as_ref().err().cloned().unwrap_or_default();
        let state_dir = self.state_dir.clone();
        let look = move || {
            let published = content.ok().and_then(|content| content.store.publications().ok());
            let room = Room::of(&state_dir).unwrap_or_default();
            (published.map_or(0, |list| list.len() as u64), room)
        };
        let (published, room) = tokio::task::spawn_blocking(look).await.map_err(crashed)?;
        Ok(Response::new(GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_id: self.node_id.clone(),
            driver_name: self.driver_name.clone(),
            state_dir: self.state_dir.display().to_string(),
            not_ready,
            registered: self.registered.as_ref().map(|known| known.load(Ordering::SeqCst)),
            published,
            free_bytes: room.free_bytes,
            total_bytes: room.total_bytes,
        }))
    }

    async fn list_artifacts(
        &self,
        _: Request<ListArtifactsRequest>,
    ) -> Result<Response<ListArtifactsResponse>, Status> {
        let content = self.content.borrow().clone();
        let store = content.map_err(Status::unavailable)?.store;
        let artifacts = tokio::task::spawn_blocking(move || list(&store))
            .await
            .map_err(crashed)?
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(ListArtifactsResponse { artifacts }))
    }
}

fn crashed(_: tokio::task::JoinError) -> Status {
    Status::internal("the driver failed internally: please report it with the driver's log")
}

fn list(store: &Store) -> Result<Vec<Artifact>, StoreError> {
    let mut references = BTreeMap::<_, Vec<String>>::new();
    for resolution in store.resolutions()? {
        references.entry(resolution.manifest).or_default().push(resolution.reference);
    }
    let mut volumes = BTreeMap::<_, Vec<String>>::new();
    for publication in store.publications()? {
        let name = publication.pod.unwrap_or(publication.volume_id);
        volumes.entry(publication.tree).or_default().push(name);
    }
    let artifact = |tree: crate::store::Tree| {
        let sorted = |mut names: Vec<String>| {
            names.sort();
            // A reference resolves once for each platform.
            names.dedup();
            names
        };
        Artifact {
            manifest: tree.record.manifest.to_string(),
            kind: tree.record.kind,
            bytes: tree.record.bytes,
            inodes: tree.record.inodes,
            references: sorted(references.get(&tree.record.manifest).cloned().unwrap_or_default()),
            volumes: sorted(volumes.remove(&tree.key).unwrap_or_default()),
        }
    };
    let mut artifacts: Vec<_> = store.trees()?.into_iter().map(artifact).collect();
    artifacts.sort_by(|one, two| one.references.cmp(&two.references));
    Ok(artifacts)
}
