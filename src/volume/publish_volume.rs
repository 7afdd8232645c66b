//! Attaches a tree at a target.
//!
//! ```text
//! form               bind or overlay, by `readOnly` and the node's configuration (see `mount_form`)
//! already mounted?   the kernel's mount table decides; a mount of the other form is mounted again
//! decided before?    after a reboot or a crash the same volume gets the same content
//! cached?            the node holds the content and has proof that this pod may see it
//! attach             record, create the directory, mount in one step
//! ```
//!
//! Up to here all is one job on one blocking thread, under the target's lock, which outlives the caller. If the
//! content has to be acquired, the call waits for the pull until its deadline, holding no lock. Then a second job
//! examines the target again and attaches.
//!
//! A final error leaves nothing at the target: the directory that the kubelet or an earlier boot left there is removed
//! as well, if it is empty.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::VolumeError;
use super::mount_form::AttachError;
use super::mount_reconcile::is_known_to_kubelet;
use super::publish_request::PublishRequest;
use super::target_lock::TargetTurn;
use super::volume_attributes::{VolumeArtifact, VolumeAttributes};
use super::{NodeContent, TargetPath, VolumeManager, VolumeMounter, unpublish_volume};
use oci::Digest;
use oci::signature::{SignatureMode, SignedObject};
use policy::{PolicyDemands, PolicyRequest};
use pull::{CompositeError, PlacedWant, PullError};
use store::gc::Want;
use store::object_name::ObjectName;
use store::publication_records::Publication;
use store::{FollowKey, MountedContent, MountedTree, SpaceAmount, Store, StoreError, Tree};
use sys::fault;
use sys::mount::{MountForm, MountTarget, TargetState};
use unpack::UnpackError;

/// The space that is freed for a record on a full disk: several times the size of one.
const RECORD_ROOM: u64 = 64 << 10;

/// The reason for an occupied target with a mount that is not this driver's.
const OTHER_MOUNT: &str = "has a mount that is not this driver's: unmount it";

/// The reason for an occupied target with another volume.
const OTHER_VOLUME: &str = "shows another volume: unpublish that first";

/// The result of a publish, for the log and the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedVolume {
    /// The source of the content.
    pub path: PublishPath,
    /// The manifest of the tree; `None` for an existing mount whose tree the store does not know.
    pub manifest: Option<Digest>,
    /// The bytes of the tree.
    pub bytes: u64,
}

/// The source of a published volume's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishPath {
    /// The mount existed.
    AlreadyMounted,
    /// The store had it. The registry was not needed.
    Hit,
    /// It was fetched, unpacked, or read back before the mount.
    Miss,
}

impl PublishedVolume {
    fn of(path: PublishPath, tree: &Tree) -> Self {
        Self { path, manifest: Some(tree.record.manifest), bytes: tree.record.bytes }
    }
}

/// A mount of the volume that exists at its target.
struct ExistingMount {
    published: PublishedVolume,
    form: MountForm,
}

/// The outcome of a publish without a pull.
enum CachedPublish {
    Published(PublishedVolume),
    /// The content has to be acquired, within these demands of the node's policy on each artifact.
    Missing(Vec<PolicyDemands>),
}

/// One publish, as its tasks see it.
#[derive(Clone)]
struct PublishAttempt {
    request: Arc<PublishRequest>,
    form: MountForm,
    target_turn: TargetTurn,
    /// Set when the caller has gone.
    is_abandoned: Arc<AtomicBool>,
}

/// Marks an attempt as abandoned when dropped.
struct CallerGuard(Arc<AtomicBool>);

impl Drop for CallerGuard {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl PublishAttempt {
    /// Fails if mounts must not change for this call any more: its caller has gone, or an unpublish has begun since.
    fn check(&self) -> Result<(), VolumeError> {
        if !self.target_turn.is_current() || self.is_abandoned.load(Ordering::SeqCst) {
            return Err(VolumeError::Busy(self.request.target.full()));
        }
        Ok(())
    }
}

impl VolumeManager {
    /// Publishes a volume.
    pub async fn publish(&self, request: PublishRequest) -> Result<PublishedVolume, VolumeError> {
        // A volume that its pod could write to is refused before anything is fetched.
        let form = match request.attributes.follow {
            Some(_) => VolumeMounter::followed_form(request.readonly)?,
            None => self.0.mounter.form(request.readonly)?,
        };
        let _first = self.content().ok().map(|content| content.puller.goes_first());
        let attempt = PublishAttempt {
            target_turn: self.0.target_locks.begin_publish(&request.target.full()),
            request: Arc::new(request),
            form,
            is_abandoned: Arc::default(),
        };
        let _caller = CallerGuard(Arc::clone(&attempt.is_abandoned));
        let request = Arc::clone(&attempt.request);
        let busy = || VolumeError::Busy(request.target.full());
        let held = tokio::time::timeout_at(request.deadline, attempt.target_turn.lock());
        let held = held.await.map_err(|_| busy())?;
        let (volumes, of_job) = (self.clone(), attempt.clone());
        // A task of its own: it changes mounts also if the caller has gone.
        let cached = self.0.tracker.spawn_blocking(move || {
            let _held = held;
            volumes.publish_cached(&of_job)
        });
        let cached = tokio::time::timeout_at(request.deadline, cached).await.map_err(|_| busy())?;
        let demands = match cached.unwrap_or(Err(VolumeError::Crashed))? {
            CachedPublish::Published(published) => return Ok(published),
            CachedPublish::Missing(demands) => demands,
        };
        let content = self.content()?;
        let shutdown = self.0.shutdown.clone();
        let (tree, path) = tokio::select! {
            acquired = self.acquire(&content, &request, demands) => acquired?,
            () = shutdown.cancelled() => return Err(VolumeError::ShuttingDown),
        };
        // Mounts change from here on. A task does it, also if the caller has gone.
        let volumes = self.clone();
        let attach = self.0.tracker.spawn(async move {
            let held = attempt.target_turn.lock().await;
            let attach = move || {
                let _held = held;
                volumes.attach(&content, &attempt, &tree)?;
                Ok(PublishedVolume::of(path, &tree))
            };
            tokio::task::spawn_blocking(attach).await.unwrap_or(Err(VolumeError::Crashed))
        });
        match tokio::time::timeout_at(request.deadline, attach).await {
            Ok(attached) => attached.unwrap_or(Err(VolumeError::Crashed)),
            Err(_) => Err(VolumeError::Busy(request.target.full())),
        }
    }

    /// Publishes a volume whose content is on the node: the case of most calls. Waits for no pull. Blocking; under the
    /// lock.
    fn publish_cached(&self, attempt: &PublishAttempt) -> Result<CachedPublish, VolumeError> {
        let request = &attempt.request;
        let target = open(request)?;
        let existing = self.examine(request, &target)?;
        if let Some(ExistingMount { published, form }) = &existing
            && *form == attempt.form
        {
            return Ok(CachedPublish::Published(published.clone()));
        }
        let content = self.content()?;
        let (attributes, namespace) = (&request.attributes, request.pod.namespace.as_deref());
        let decide = |artifact| decide(&content, artifact, attributes.require_signature, namespace);
        let demands = attributes.artifacts.iter().map(decide).collect::<Result<Vec<_>, _>>()?;
        let Some(tree) = cached_tree(&content, request, &demands) else {
            return Ok(CachedPublish::Missing(demands));
        };
        self.attach_at(&content, attempt, &tree, &target, existing)?;
        Ok(CachedPublish::Published(PublishedVolume::of(PublishPath::Hit, &tree)))
    }

    /// Examines the mount at the target, and decides whether it is this volume's. Returns `None` if nothing is mounted.
    fn examine(
        &self,
        request: &PublishRequest,
        target: &MountTarget,
    ) -> Result<Option<ExistingMount>, VolumeError> {
        let occupied = |what| VolumeError::Occupied { target: request.target.full(), what };
        let origin = match target.state().map_err(|error| kernel("look at", request, error))? {
            TargetState::Mounted(origin) => origin,
            TargetState::Missing | TargetState::EmptyFolder => return Ok(None),
            TargetState::Occupied => {
                return Err(occupied("is not an empty folder: remove what is there"));
            }
        };
        let MountedTree { key, generation, form } = match MountedContent::of(&origin) {
            Some(MountedContent::Tree(tree)) if request.attributes.follow.is_none() => tree,
            Some(MountedContent::Followed(key)) if request.follow_key() == Some(key) => {
                return Ok(Some(self.examine_followed(request, key)));
            }
            Some(_) => return Err(occupied(OTHER_VOLUME)),
            None => return Err(occupied(OTHER_MOUNT)),
        };
        // Without a store there are no records, and the mount itself has to suffice.
        let store = self.content().ok().map(|content| content.store);
        let full = request.target.full();
        let record =
            store.as_ref().and_then(|store| store.publications().get(&full)).filter(|record| {
                !record.rebuilt && (record.tree, record.generation) == (key, generation)
            });
        let fingerprint = request.attributes.fingerprint(request.flags);
        if record.as_ref().is_some_and(|record| {
            record.fingerprint != fingerprint || record.volume_id != request.volume_id
        }) {
            return Err(occupied(OTHER_VOLUME));
        }
        let tree = store.as_ref().and_then(|store| store.trees().generation(key, generation));
        if record.is_none()
            && let (Some(store), Some(tree)) = (&store, &tree)
            && let Err(error) = store.publications().put(&self.record(request, tree))
        {
            // A mount whose record is lost is adopted. Here it stays without a record.
            tracing::warn!(%error, "the record of a mounted volume is still lost");
        }
        let recorded = record.map(|record| record.manifest);
        let published = PublishedVolume {
            path: PublishPath::AlreadyMounted,
            manifest: tree.as_ref().map(|tree| tree.record.manifest).or(recorded),
            bytes: tree.as_ref().map_or(0, |tree| tree.record.bytes),
        };
        Ok(Some(ExistingMount { published, form }))
    }

    /// Returns the state of a volume that follows a tag and is mounted. Its key says that it is this volume. Renews its
    /// credentials, and the records that it may have lost.
    fn examine_followed(&self, request: &PublishRequest, key: FollowKey) -> ExistingMount {
        let store = self.content().ok().map(|content| content.store);
        let tree = store.as_ref().and_then(|store| store.followed().current(key));
        if let (Some(store), Some(tree)) = (&store, &tree) {
            let publications = store.publications();
            let is_lost =
                publications.get(&request.target.full()).is_none_or(|record| record.rebuilt);
            let put = || match request.follow_record() {
                Some(record) if is_lost || store.followed().record(key).is_none() => {
                    publications.put(&self.record(request, tree))?;
                    store.followed().put_record(&record)
                }
                _ => Ok(()),
            };
            if let Err(error) = put() {
                tracing::warn!(%error, "the record of a mounted volume is still lost");
            }
        }
        self.follow(request);
        let published = PublishedVolume {
            path: PublishPath::AlreadyMounted,
            manifest: tree.as_ref().map(|tree| tree.record.manifest),
            bytes: tree.as_ref().map_or(0, |tree| tree.record.bytes),
        };
        ExistingMount { published, form: MountForm::Bind }
    }

    async fn acquire(
        &self,
        content: &NodeContent,
        request: &Arc<PublishRequest>,
        demands: Vec<PolicyDemands>,
    ) -> Result<(Tree, PublishPath), VolumeError> {
        let (before, of_job, demanded) = (content.clone(), Arc::clone(request), demands.clone());
        let before = move || recorded_tree(&before.store, &of_job, &demanded);
        let before = tokio::task::spawn_blocking(before).await.ok().flatten();
        let (puller, view) = (&content.puller, &request.progress);
        // A tree of an earlier format is read back first.
        if let Some(tree) = before
            && in_time(request, puller.is_sound(&tree, request.caller(), view)).await?
        {
            return Ok((tree, PublishPath::Hit));
        }
        let keyring = request.keyring.as_ref();
        let keyring = keyring.map_err(|error| VolumeError::Invalid(error.to_string()))?;
        let wants = request.wants(&demands, keyring);
        let tree = match wants.as_slice() {
            [PlacedWant { want, .. }] if !request.attributes.is_list => {
                in_time(request, puller.acquire(want, view)).await?
            }
            wants => in_time(request, puller.acquire_composite(wants, view)).await?,
        };
        if !view.was_shown() {
            return Ok((tree, PublishPath::Hit));
        }
        content.maintenance.notify_one();
        Ok((tree, PublishPath::Miss))
    }

    /// Attaches a tree for a volume that is not mounted yet, or in the other form. Blocking; under the lock.
    fn attach(
        &self,
        content: &NodeContent,
        attempt: &PublishAttempt,
        tree: &Tree,
    ) -> Result<(), VolumeError> {
        let target = open(&attempt.request)?;
        // Another publish of the same volume may have been faster.
        let existing = self.examine(&attempt.request, &target)?;
        self.attach_at(content, attempt, tree, &target, existing)
    }

    /// Attaches a tree at a target with the mount `existing`. Blocking; under the lock.
    fn attach_at(
        &self,
        content: &NodeContent,
        attempt: &PublishAttempt,
        tree: &Tree,
        target: &MountTarget,
        existing: Option<ExistingMount>,
    ) -> Result<(), VolumeError> {
        attempt.check()?;
        let request = &attempt.request;
        let full = request.target.full();
        let passed =
            |point| fault::point(point).map_err(|error| kernel("mount at", request, error));
        // A mount of the other form is removed first. Its record leads to the same tree, so a crash in between loses
        // nothing.
        if let Some(existing) = existing {
            if existing.form == attempt.form {
                return Ok(());
            }
            tracing::info!(form = ?attempt.form, "mounting again, in the form that is asked for");
            if unpublish_volume::detach(&request.target)?.foreign {
                return Err(VolumeError::Occupied { target: full, what: OTHER_MOUNT });
            }
            passed("publish.detached")?;
        }
        passed("publish.acquired")?;
        let earlier = content.store.publications().get(&full);
        // The earlier record is restored if this fails. Its tree is held until then.
        let _earlier_tree = earlier
            .as_ref()
            .and_then(|earlier| content.store.trees().generation(earlier.tree, earlier.generation));
        if let Err(error) = put_record(&content.store, &self.record(request, tree)) {
            // A record is a hint: content on the node is mounted also while the disk accepts no writes.
            tracing::warn!(%error, "the record of this volume cannot be written");
        }
        let attached = || -> Result<(), VolumeError> {
            passed("publish.recorded")?;
            target.create().map_err(|error| kernel("create", request, error))?;
            passed("publish.folder")?;
            self.mount(content, attempt, tree, target)
        };
        let attached = attached();
        if attached.is_err() {
            // The caller removes the directory.
            let _ = match earlier {
                Some(earlier) => content.store.publications().put(&earlier),
                None => content.store.publications().remove(&full),
            };
        }
        attached?;
        // Mounted. The next call handles any failure from here on.
        let _ = fault::point("publish.mounted");
        Ok(())
    }

    /// Mounts a volume: the only place that does. Blocking; under the lock.
    fn mount(
        &self,
        content: &NodeContent,
        attempt: &PublishAttempt,
        tree: &Tree,
        target: &MountTarget,
    ) -> Result<(), VolumeError> {
        let PublishAttempt { request, form, .. } = attempt;
        let (mounter, store, flags) = (&self.0.mounter, &content.store, request.flags);
        let attached = match request.follow_record() {
            None => mounter.attach(*form, store, tree, target, flags),
            Some(record) => {
                let shown = store.followed().publish(&record, tree)?;
                mounter.attach_folder(&shown, target, flags)
            }
        };
        attached.map_err(|error| match error {
            AttachError::Store(error) => error.into(),
            AttachError::Kernel(error) => kernel("mount at", request, error),
        })?;
        content.store.trees().mark_published(tree);
        self.follow(request);
        Ok(())
    }

    /// Removes an empty directory at the target after a final error. A mount, or a directory in use, stays. Returns
    /// whether something is mounted there.
    pub async fn clear(&self, target: TargetPath) -> bool {
        let target_turn = self.0.target_locks.begin_publish(&target.full());
        let clear = self.0.tracker.spawn(async move {
            let held = target_turn.lock().await;
            tokio::task::spawn_blocking(move || {
                let _held = held;
                let target = target.open()?;
                target.remove_if_empty()?;
                Ok::<_, std::io::Error>(matches!(target.state()?, TargetState::Mounted(_)))
            })
            .await
        });
        // The task continues if the caller goes.
        matches!(clear.await, Ok(Ok(Ok(true))))
    }

    fn record(&self, request: &PublishRequest, tree: &Tree) -> Publication {
        Publication {
            volume_id: request.volume_id.clone(),
            target: request.target.full(),
            boot_id: self.0.boot_id.clone(),
            fingerprint: request.attributes.fingerprint(request.flags),
            reference: request.attributes.names(),
            manifest: tree.record.manifest,
            tree: tree.key,
            generation: tree.generation,
            pod: request.pod.full_name(),
            kubelet_knew: is_known_to_kubelet(&request.target.full()),
            rebuilt: false,
        }
    }
}

/// Writes a record. If the disk is full, frees space and tries once more.
fn put_record(store: &Store, record: &Publication) -> Result<(), VolumeError> {
    match store.publications().put(record) {
        Err(error @ StoreError::NoSpace { .. }) => {
            let room = SpaceAmount { bytes: RECORD_ROOM, inodes: 1 };
            if store.collector().collect(&Want::Room(room))?.is_nothing() {
                return Err(error.into());
            }
            Ok(store.publications().put(record)?)
        }
        written => Ok(written?),
    }
}

/// Returns the error of a failed pull, about the artifact that failed.
fn failure(attributes: &VolumeAttributes, error: CompositeError) -> VolumeError {
    let name = |number: usize| {
        let artifact = attributes.artifacts.get(number);
        artifact.map_or_else(|| attributes.names(), |artifact| artifact.reference.to_string())
    };
    let CompositeError { artifact, source } = error;
    match source.root() {
        PullError::Unpack(UnpackError::PartsCollide { path, one, two }) => {
            VolumeError::Collision { path: path.clone(), one: name(*one), two: name(*two) }
        }
        _ => VolumeError::Pull { reference: name(artifact.unwrap_or(usize::MAX)), source },
    }
}

/// Returns the demands of the node's policy on one of a volume's artifacts, if it allows it. Blocking.
pub(super) fn decide(
    content: &NodeContent,
    artifact: &VolumeArtifact,
    require_signature: bool,
    namespace: Option<&str>,
) -> Result<PolicyDemands, VolumeError> {
    let policy = content.policy.current().map_err(VolumeError::NotReady)?;
    let VolumeArtifact { reference, .. } = artifact;
    let decided = policy.decide(PolicyRequest { reference, namespace, require_signature });
    decided.map_err(|refusal| VolumeError::Policy { reference: reference.to_string(), refusal })
}

/// Returns the tree of a volume if the node may show it without waiting. Blocking.
fn cached_tree(
    content: &NodeContent,
    request: &PublishRequest,
    demands: &[PolicyDemands],
) -> Option<Tree> {
    if let Some(tree) = recorded_tree(&content.store, request, demands) {
        let name = ObjectName::tree(tree.key, tree.generation);
        return (!content.store.read_back().is_unread(&name)).then_some(tree);
    }
    // A malformed keyring matters only if something has to be fetched.
    let wants = request.wants(demands, request.keyring.as_ref().ok()?);
    match wants.as_slice() {
        [PlacedWant { want, .. }] if !request.attributes.is_list => content.puller.cached(want),
        wants => content.puller.cached_composite(wants),
    }
}

/// Returns the tree that was recorded for the same volume before a reboot, or before a crash between record and mount.
/// The volume keeps its content, also if its tag has moved. Blocking.
fn recorded_tree(
    store: &Store,
    request: &PublishRequest,
    demands: &[PolicyDemands],
) -> Option<Tree> {
    let record = store.publications().get(&request.target.full())?;
    let same = !record.rebuilt
        && record.volume_id == request.volume_id
        && record.fingerprint == request.attributes.fingerprint(request.flags);
    if !same {
        return None;
    }
    // A generation with damage found since is not shown again.
    let tree = store.trees().get(record.tree).ok()??;
    let whole = tree.generation >= record.generation;
    (whole && still_fulfils(store, &tree, &request.attributes, demands)).then_some(tree)
}

/// Waits until the deadline of a publish for content of its artifact.
async fn in_time<T>(
    request: &PublishRequest,
    pull: impl Future<Output = Result<T, impl Into<CompositeError>>>,
) -> Result<T, VolumeError> {
    let Ok(done) = tokio::time::timeout_at(request.deadline, pull).await else {
        let progress = Box::new(request.progress.snapshot());
        return Err(VolumeError::StillPulling { reference: request.attributes.names(), progress });
    };
    done.map_err(|error| failure(&request.attributes, error.into()))
}

/// Returns whether a recorded tree still fulfils the current demands of the policy.
fn still_fulfils(
    store: &Store,
    tree: &Tree,
    attributes: &VolumeAttributes,
    demands: &[PolicyDemands],
) -> bool {
    let shown = tree.record.artifacts();
    let signatures = store.verified_signatures();
    let wanted = attributes.artifacts.iter().zip(demands);
    let mut pairs = wanted.zip(&shown).map(|((wanted, demands), shown)| {
        let repository = wanted.reference.repository();
        demands.maximum_bytes.is_none_or(|limit| shown.bytes <= limit)
            && demands.signature.as_ref().is_none_or(|demand| {
                demand.mode == SignatureMode::Warn
                    || [SignedObject::Manifest, SignedObject::AnyIndex].iter().any(|signed| {
                        signatures.contains(repository, shown.manifest, demand.id(*signed))
                    })
            })
    });
    shown.len() == attributes.artifacts.len() && pairs.all(|fulfils| fulfils)
}

fn open(request: &PublishRequest) -> Result<MountTarget, VolumeError> {
    request.target.open().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => VolumeError::Invalid(format!(
            "the folder above the target path {} does not exist: the kubelet makes it",
            request.target
        )),
        _ => kernel("open the folder of", request, error),
    })
}

fn kernel(action: &'static str, request: &PublishRequest, source: std::io::Error) -> VolumeError {
    VolumeError::Kernel { action, target: request.target.full(), source }
}
