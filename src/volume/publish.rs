//! Attach a tree at a target.
//!
//! ```text
//! already mounted?   the kernel says so: nothing else is asked
//! decided before?    after a reboot or a crash the same volume gets the same content
//! acquire            wait for the pull, holding nothing, until the caller's deadline
//! attach             under the target's guard, in a task that outlives the caller:
//!                    look again, record, make the folder, mount in one step
//! ```
//!
//! A final error leaves nothing at the target: the folder that the kubelet or an
//! earlier boot left there is removed as well, if it is empty.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::VolumeError;
use super::guard::Interest;
use super::reconcile::is_known_to_kubelet;
use super::request::PublishRequest;
use super::{Content, TargetPath, Volumes};
use crate::fault;
use crate::mount::{MountTable, Target, TargetState};
use crate::oci::signature::SignatureMode;
use crate::oci::{Digest, Reference};
use crate::policy::{Demands, Facts};
use crate::store::eviction::Goal;
use crate::store::gc::Want;
use crate::store::publications::Publication;
use crate::store::{Store, StoreError, Tree, TreeKey};

/// What is freed for a record on a full disk: several times what one takes.
const RECORD_ROOM: u64 = 64 << 10;

/// What a publish did, for the log and the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Where the content came from.
    pub path: PublishPath,
    /// What is shown; none when a mount was found whose tree the store cannot name.
    pub manifest: Option<Digest>,
    /// Its bytes.
    pub bytes: u64,
}

/// Where the content came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishPath {
    /// It was mounted already.
    AlreadyMounted,
    /// From the store, without the registry.
    Hit,
    /// Something was fetched or unpacked.
    Miss,
}

/// Tells a task whether its caller still waits.
struct Caller(Arc<AtomicBool>);

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Volumes {
    /// Publishes a volume.
    pub async fn publish(&self, request: PublishRequest) -> Result<Published, VolumeError> {
        let request = Arc::new(request);
        let _first = self.content().ok().map(|content| content.puller.goes_first());
        let interest = self.0.guards.interest(&request.target.full());
        let gone = Arc::new(AtomicBool::new(false));
        let _caller = Caller(Arc::clone(&gone));
        let look = self.look(&request, &interest);
        let Ok(looked) = tokio::time::timeout_at(request.deadline, look).await else {
            return Err(VolumeError::Busy(request.target.full()));
        };
        if let Some(published) = looked? {
            return Ok(published);
        }
        let content = self.content()?;
        let shutdown = self.0.shutdown.clone();
        let (tree, path) = tokio::select! {
            acquired = self.acquire(&content, &request) => acquired?,
            () = shutdown.cancelled() => return Err(VolumeError::ShuttingDown),
        };
        // From here on mounts change: a task does it, whether its caller stays or not.
        let (volumes, request) = (self.clone(), Arc::clone(&request));
        let deadline = request.deadline;
        let target = request.target.full();
        let attach = self.0.tracker.spawn(async move {
            let held = interest.hold().await;
            let attach = move || {
                let _held = held;
                volumes.attach(&content, &request, &tree, &interest, &gone)?;
                Ok(Published {
                    path,
                    manifest: Some(tree.record.manifest),
                    bytes: tree.record.bytes,
                })
            };
            tokio::task::spawn_blocking(attach).await.unwrap_or(Err(VolumeError::Crashed))
        });
        match tokio::time::timeout_at(deadline, attach).await {
            Ok(attached) => attached.unwrap_or(Err(VolumeError::Crashed)),
            Err(_) => Err(VolumeError::Busy(target)),
        }
    }

    /// Whether a mount of ours is there already, and no unpublish is about to take it away.
    async fn look(
        &self,
        request: &Arc<PublishRequest>,
        interest: &Interest,
    ) -> Result<Option<Published>, VolumeError> {
        let (volumes, request) = (self.clone(), Arc::clone(request));
        let held = interest.hold().await;
        let look = move || {
            let _held = held;
            let target = open(&request)?;
            volumes.examine(&request, &target)
        };
        tokio::task::spawn_blocking(look).await.unwrap_or(Err(VolumeError::Crashed))
    }

    fn examine(
        &self,
        request: &PublishRequest,
        target: &Target,
    ) -> Result<Option<Published>, VolumeError> {
        let occupied = |what| VolumeError::Occupied { target: request.target.full(), what };
        let state = target.state().map_err(|error| kernel("look at", request, error))?;
        let TargetState::MountRoot(identity) = state else {
            return match state {
                TargetState::Occupied => {
                    Err(occupied("is not an empty folder: remove what is there"))
                }
                _ => Ok(None),
            };
        };
        let fingerprint = request.attributes.fingerprint(request.flags);
        // Without a store there are no records, and the mount itself has to be enough.
        let content = self.content().ok();
        let full = request.target.full();
        let record = content.as_ref().and_then(|content| content.store.publication(&full));
        let recorded_tree = record.as_ref().zip(content.as_ref()).and_then(|(record, content)| {
            let tree = content.store.tree_generation(record.tree, record.generation)?;
            (tree.identity().ok()? == identity).then_some(tree)
        });
        let mounted = if let Some(tree) = &recorded_tree {
            Some((tree.key, tree.generation))
        } else {
            let table =
                MountTable::read().map_err(|error| kernel("read the mounts at", request, error))?;
            let top =
                target.top_mount(&table).map_err(|error| kernel("look at", request, error))?;
            top.and_then(|top| TreeKey::of_mount_root(top.root_as_mounted()))
        };
        let Some((key, generation)) = mounted else {
            return Err(occupied("has a mount that is not this driver's: unmount it"));
        };
        let known = record.filter(|record| {
            !record.rebuilt && (record.tree, record.generation) == (key, generation)
        });
        match known {
            Some(record)
                if record.fingerprint != fingerprint || record.volume_id != request.volume_id =>
            {
                Err(occupied("shows another volume: unpublish that first"))
            }
            Some(record) => {
                let bytes = recorded_tree.map_or(0, |tree| tree.record.bytes);
                let manifest = Some(record.manifest);
                Ok(Some(Published { path: PublishPath::AlreadyMounted, manifest, bytes }))
            }
            None => {
                // A mount of ours whose record is lost is adopted.
                let tree = content
                    .as_ref()
                    .and_then(|content| content.store.tree_generation(key, generation));
                if let (Some(content), Some(tree)) = (content, &tree)
                    && let Err(error) = content.store.put_publication(&self.record(request, tree))
                {
                    // It is mounted: a record that cannot be written is no reason to fail.
                    tracing::warn!(%error, "the record of a mounted volume is still lost");
                }
                Ok(Some(Published {
                    path: PublishPath::AlreadyMounted,
                    manifest: tree.as_ref().map(|tree| tree.record.manifest),
                    bytes: tree.map_or(0, |tree| tree.record.bytes),
                }))
            }
        }
    }

    async fn acquire(
        &self,
        content: &Content,
        request: &Arc<PublishRequest>,
    ) -> Result<(Tree, PublishPath), VolumeError> {
        let attributes = &request.attributes;
        let reference = attributes.reference.to_string();
        let demands = decide(content, request).await?;
        if let Some(tree) = self.decided_before(content, request, &demands).await {
            return Ok((tree, PublishPath::Hit));
        }
        let keyring = match &request.keyring {
            Ok(keyring) => keyring.clone(),
            Err(error) => return Err(VolumeError::Invalid(error.to_string())),
        };
        let want = attributes.want(demands, keyring, request.identity.clone());
        let view = &request.progress;
        match tokio::time::timeout_at(request.deadline, content.puller.acquire(&want, view)).await {
            Ok(Ok(acquired)) if view.was_shown() => {
                content.upkeep.notify_one();
                Ok((acquired, PublishPath::Miss))
            }
            Ok(Ok(acquired)) => Ok((acquired, PublishPath::Hit)),
            Ok(Err(source)) => Err(VolumeError::Pull { reference, source }),
            Err(_) => Err(VolumeError::StillPulling { reference, progress: view.snapshot() }),
        }
    }

    /// The same volume after a reboot, or after a crash between record and mount: its
    /// mount is gone, its content decided, whatever the tag means by now.
    async fn decided_before(
        &self,
        content: &Content,
        request: &Arc<PublishRequest>,
        demands: &Demands,
    ) -> Option<Tree> {
        let (store, request) = (content.store.clone(), Arc::clone(request));
        let demands = demands.clone();
        let find = move || {
            let record = store.publication(&request.target.full())?;
            let same = !record.rebuilt
                && record.volume_id == request.volume_id
                && record.fingerprint == request.attributes.fingerprint(request.flags);
            if !same {
                return None;
            }
            // A generation that was found damaged since is not shown again.
            let tree = store.tree(record.tree).ok()??;
            let whole = tree.generation >= record.generation;
            let reference = &request.attributes.reference;
            (whole && still_fulfils(&store, &tree, reference, &demands)).then_some(tree)
        };
        tokio::task::spawn_blocking(find).await.ok()?
    }

    /// The only place where a volume's mount is made. Blocking; under the guard.
    fn attach(
        &self,
        content: &Content,
        request: &PublishRequest,
        tree: &Tree,
        interest: &Interest,
        gone: &AtomicBool,
    ) -> Result<(), VolumeError> {
        let full = request.target.full();
        if !interest.is_current() || gone.load(Ordering::SeqCst) {
            return Err(VolumeError::Busy(full));
        }
        let target = open(request)?;
        // Another publish of the same volume may have been faster.
        if self.examine(request, &target)?.is_some() {
            return Ok(());
        }
        let passed =
            |point| fault::point(point).map_err(|error| kernel("mount at", request, error));
        passed("publish.acquired")?;
        let earlier = content.store.publication(&full);
        put_record(&content.store, &self.record(request, tree))?;
        let attached = || -> Result<(), VolumeError> {
            passed("publish.recorded")?;
            let root = tree.open()?;
            target.create().map_err(|error| kernel("create", request, error))?;
            passed("publish.folder")?;
            self.0
                .attach
                .attach(root.as_fd(), &target, request.flags)
                .map_err(|error| kernel("mount at", request, error))?;
            content.store.tree_was_published(tree);
            Ok(())
        };
        let attached = attached();
        if attached.is_err() {
            // The caller removes the folder. What was decided for this volume before a reboot stays.
            let _ = match earlier {
                Some(earlier) => content.store.put_publication(&earlier),
                None => content.store.remove_publication(&full),
            };
        }
        attached?;
        // It is mounted: whatever fails from here on is found at the next call.
        let _ = fault::point("publish.mounted");
        Ok(())
    }

    /// After a final error nothing is left at the target: an empty folder goes,
    /// what is mounted or in use stays. Says whether something is mounted there.
    pub async fn clear(&self, target: TargetPath) -> bool {
        let interest = self.0.guards.interest(&target.full());
        let clear = self.0.tracker.spawn(async move {
            let held = interest.hold().await;
            tokio::task::spawn_blocking(move || {
                let _held = held;
                let target = Target::open(target.base(), target.relative())?;
                target.remove_if_empty()?;
                Ok::<_, std::io::Error>(matches!(target.state()?, TargetState::MountRoot(_)))
            })
            .await
        });
        // It goes on without us, should the caller be gone.
        matches!(clear.await, Ok(Ok(Ok(true))))
    }

    fn record(&self, request: &PublishRequest, tree: &Tree) -> Publication {
        Publication {
            volume_id: request.volume_id.clone(),
            target: request.target.full(),
            boot_id: self.0.boot_id.clone(),
            fingerprint: request.attributes.fingerprint(request.flags),
            reference: request.attributes.reference.to_string(),
            manifest: tree.record.manifest,
            tree: tree.key,
            generation: tree.generation,
            pod: request.pod.full_name(),
            kubelet_knew: is_known_to_kubelet(&request.target.full()),
            rebuilt: false,
        }
    }
}

/// Writes a record; on a full disk once more after making room.
fn put_record(store: &Store, record: &Publication) -> Result<(), VolumeError> {
    match store.put_publication(record) {
        Err(error @ StoreError::NoSpace { .. }) => {
            let room = Goal { bytes: RECORD_ROOM, inodes: 1 };
            if store.collect(&Want::Room(room))?.is_nothing() {
                return Err(error.into());
            }
            Ok(store.put_publication(record)?)
        }
        written => Ok(written?),
    }
}

/// Whether the node's policy lets it be mounted, and what it demands.
async fn decide(content: &Content, request: &Arc<PublishRequest>) -> Result<Demands, VolumeError> {
    let (source, request) = (content.policy.clone(), Arc::clone(request));
    let decide = move || {
        let policy = source.current().map_err(VolumeError::NotReady)?;
        let facts = Facts {
            reference: &request.attributes.reference,
            namespace: request.pod.namespace.as_deref(),
            require_signature: request.attributes.require_signature,
        };
        let reference = || request.attributes.reference.to_string();
        policy
            .decide(facts)
            .map_err(|refusal| VolumeError::Policy { reference: reference(), refusal })
    };
    tokio::task::spawn_blocking(decide).await.unwrap_or(Err(VolumeError::Crashed))
}

/// Whether what was decided before still fulfils what is demanded now.
fn still_fulfils(store: &Store, tree: &Tree, reference: &Reference, demands: &Demands) -> bool {
    let fits = demands.maximum_bytes.is_none_or(|limit| tree.record.bytes <= limit);
    let signed = demands.signature.as_ref().is_none_or(|demand| {
        demand.mode == SignatureMode::Warn
            || store.is_verified(reference.repository(), tree.record.manifest, demand.id())
    });
    fits && signed
}

fn open(request: &PublishRequest) -> Result<Target, VolumeError> {
    Target::open(request.target.base(), request.target.relative()).map_err(|error| {
        match error.kind() {
            std::io::ErrorKind::NotFound => VolumeError::Invalid(format!(
                "the folder above the target path {} does not exist: the kubelet makes it",
                request.target
            )),
            _ => kernel("open the folder of", request, error),
        }
    })
}

fn kernel(action: &'static str, request: &PublishRequest, source: std::io::Error) -> VolumeError {
    VolumeError::Kernel { action, target: request.target.full(), source }
}
