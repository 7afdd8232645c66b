//! A manifest to the tree that a volume shows.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::OwnedMutexGuard;

use super::artifact_totals::Sums;
use super::blob_objects::{LayerRequest, LayerStore, ReadyLayer};
use super::blob_origins::BlobOrigins;
use super::compute_budget::Computations;
use super::credential_offers::{Source, Sponsors};
use super::disk_space_claim::SpaceReserver;
use super::download_resources::Observer;
use super::error::PullError;
use super::keyed_locks::KeyedLocks;
use super::memory::BYTES_PER_MANIFEST_BYTE;
use super::pull_progress::Progress;
use super::pull_tenant::Caller;
use super::single_flight::{Flights, Outcome};
use super::tree_shape::{Part, PartRule, Shape, blobs_of_registry, memory_of};
use super::tree_sources::{Object, TreeSources};
use super::{Memory, ProgressView, blocking};
use oci::manifest::{ImageManifest, Manifest, ManifestError};
use oci::registry::ManifestName;
use oci::{Digest, Repository};
use store::layers::Layer;
use store::space_reservations::{Claim, Reservation};
use store::trees::{BuiltTree, Objects, TreeRecord};
use store::{Store, StoreError, Tree, TreeKey, give_memory_back};
use sys::background::Background;
use sys::weak_map::WeakMap;
use unpack::layer_merge::Merger;
use unpack::{Limits, PermissionsRule};

/// The most layers of one artifact that are fetched at once. The node's limit holds as well.
const LAYERS_AT_ONCE: usize = 4;
/// The size in bytes of a plan from which its memory is returned to the system afterwards.
pub(super) const LARGE_PLAN: u64 = 8 << 20;

/// Builds trees from the files and layers of the store.
pub(super) struct TreeAssembler {
    pub(super) store: Store,
    pub(super) origins: BlobOrigins,
    pub(super) limits: Limits,
    pub(super) layers: Arc<LayerStore>,
    pub(super) space: SpaceReserver,
    pub(super) computations: Computations,
    pub(super) background: Background,
    pub(super) observer: Arc<dyn Observer>,
    // A flight serves one repository, so that its failure is not reported to pods of another one.
    pub(super) flights: Flights<(Repository, TreeKey), Tree>,
    /// The sponsors of each tree, by repository.
    pub(super) sponsors: WeakMap<(Repository, TreeKey), Sponsors>,
    /// Held while a tree is built.
    pub(super) building: KeyedLocks<TreeKey>,
}

/// A tree that is wanted.
#[derive(Clone, Debug)]
pub(super) struct TreeRequest {
    pub(super) key: TreeKey,
    pub(super) manifest: Digest,
    pub(super) shape: Shape,
}

/// The layers of an artifact that a tree needs, and the memory that their list takes.
struct LayerList {
    kind: String,
    parts: Vec<Part>,
    _kept: Memory,
}

/// The order to build a tree of layers and files that are in the store.
struct TreeOrder {
    tree: TreeRequest,
    kind: String,
    compressed_bytes: u64,
    /// The blobs that the tree needs, for which disk space is reserved.
    blobs: HashSet<Digest>,
}

/// The outcome of one attempt to build a tree.
enum BuildOutcome {
    /// Another flight has built the tree meanwhile.
    There(Tree),
    New(Box<(BuiltTree, TreeRecord, Objects, Reservation)>),
    /// The reserved memory does not suffice. The number is the need in bytes as far as known.
    Short(TreeSources, u64),
}

impl TreeRequest {
    pub(super) fn new(manifest: Digest, shape: Shape) -> Self {
        Self { key: shape.key(manifest), manifest, shape }
    }
}

impl TreeAssembler {
    /// Returns a tree of the store whose content the repository has given.
    pub(super) async fn cached(
        &self,
        repository: &Repository,
        key: TreeKey,
    ) -> Outcome<Option<Tree>> {
        let (origins, repository) = (self.origins.clone(), repository.clone());
        let read = move || {
            if !origins.store.origins().tree_came_from(&origins.sources(&repository), key) {
                return Ok(None);
            }
            Ok(origins.store.trees().get(key)?)
        };
        blocking(read).await.map_err(Arc::new)
    }

    /// Returns a tree, which is built in a flight that all callers share.
    pub(super) async fn assemble(
        self: &Arc<Self>,
        request: &TreeRequest,
        source: &Source,
        caller: Caller,
        view: &ProgressView,
    ) -> Outcome<Tree> {
        let repository = &source.repository;
        let key = (repository.clone(), request.key);
        let sponsors = self.sponsors.get(key.clone(), || Sponsors::new(repository.clone()));
        let mut sponsorship = sponsors.offer(source.clone());
        let start = |progress: Arc<Progress>| {
            let (assembler, request) = (Arc::clone(self), request.clone());
            let sponsors = Arc::clone(&sponsors);
            progress.name(format!("{repository}@{}", request.manifest));
            async move {
                let since = Instant::now();
                let made = assembler.make_tree(request, &sponsors, &progress).await;
                let (result, reason) =
                    made.as_ref().map_or_else(PullError::outcome, |_| ("success", ""));
                assembler.observer.pulled(result, reason, since.elapsed());
                made
            }
        };
        let flight = self.flights.run(key, caller, |progress| view.show(progress), start);
        tokio::select! {
            // Ours first: then the flight's end is no news.
            biased;
            refused = sponsorship.refused() => Err(refused),
            outcome = flight => outcome,
        }
    }

    async fn make_tree(
        self: &Arc<Self>,
        request: TreeRequest,
        sponsors: &Arc<Sponsors>,
        progress: &Arc<Progress>,
    ) -> Result<Tree, PullError> {
        // No tree needs the manifest yet, so that only this lease keeps it from being evicted.
        let (store, manifest) = (self.store.clone(), request.manifest);
        let _manifest = blocking(move || Ok(store.documents().hold(manifest))).await?;
        match self.build_tree(request.clone(), sponsors, progress).await {
            // The estimate was short, or others fill the disk: once more with all that can be freed.
            Err(error) if error.is_full() => {
                let layers = |_: &Self, image: ImageManifest| {
                    Ok(image.layers.into_iter().map(|layer| layer.digest).collect())
                };
                let own = self.image(manifest, 0, sponsors, progress, layers).await;
                if !self.space.make_room(&error, own.unwrap_or_default()).await? {
                    return Err(error);
                }
                tracing::info!(%manifest, "the disk was full and has room again: trying once more");
                self.build_tree(request, sponsors, progress).await
            }
            built => built,
        }
    }

    async fn build_tree(
        self: &Arc<Self>,
        request: TreeRequest,
        sponsors: &Arc<Sponsors>,
        progress: &Arc<Progress>,
    ) -> Result<Tree, PullError> {
        let LayerList { kind, parts, _kept } = self.list(&request, sponsors, progress).await?;
        let (key, manifest) = (request.key, request.manifest);
        let permissions = request.shape.permissions;
        let sizes = parts.iter().map(|part| part.descriptor.size);
        let compressed_bytes = sizes.fold(0, u64::saturating_add);
        progress.expect(compressed_bytes);
        let reservation = self.space.reserve(&parts, permissions, sponsors).await?;
        let fetched = blobs_of_registry(&parts);
        let blobs: HashSet<_> = parts.iter().map(|part| part.descriptor.digest).collect();
        let mut waiting = parts.into_iter();
        let (mut under_way, mut unnamed) = (FuturesUnordered::new(), FuturesUnordered::new());
        let (mut objects, mut layers) = (Vec::new(), Vec::new());
        let mut sums = Sums::new(&self.limits);
        loop {
            while under_way.len() < LAYERS_AT_ONCE
                && unnamed.len() < LAYERS_AT_ONCE
                && let Some(part) = waiting.next()
            {
                let blob = part.descriptor.digest;
                let object = self.object(part, permissions, sponsors, progress);
                under_way.push(async move { (blob, object.await) });
            }
            if under_way.is_empty() && waiting.len() == 0 {
                break;
            }
            tokio::select! {
                Some((blob, object)) = under_way.next() => {
                    let (object, ready) = object.map_err(unshare)?;
                    let (entries, bytes) = object.amount();
                    sums.add(blob, entries, bytes)?;
                    match ready {
                        Some(ready) => {
                            let (place, background) = (objects.len(), &self.background);
                            unnamed.push(async move { (place, blob, ready.named(background).await) });
                        }
                        None => reservation.done(blob),
                    }
                    objects.push(object);
                }
                Some((place, blob, layer)) = unnamed.next() => {
                    let layer: Layer = layer.map_err(unshare)?;
                    reservation.done(blob);
                    objects[place].take_name(&layer);
                    layers.push(layer);
                }
                else => break,
            }
        }
        drop(under_way);
        // Verification compares a tree with its manifest, which may have been removed during a long pull. It is fetched
        // again before the lock is taken under which the tree is built: other flights wait for that lock.
        let built = async {
            self.keep_manifest(manifest, sponsors).await?;
            let order = TreeOrder { tree: request, kind, compressed_bytes, blobs };
            self.build_in_turn(order, TreeSources::new(objects), progress).await
        };
        let built = built.await;
        // Layers are synced and named while the tree is built of them; what keeps one from its
        // name is also why building fails.
        let mut named = Ok(());
        while let Some((_, blob, layer)) = unnamed.next().await {
            match layer {
                Ok(layer) => layers.push(layer),
                Err(error) => named = named.and(Err(error)),
            }
            reservation.done(blob);
        }
        let (origins, repository) = (self.origins.clone(), sponsors.repository.clone());
        blocking(move || {
            let store = &origins.store;
            // Here, since what was built for nothing is removed, which takes a while.
            named.map_err(unshare)?;
            let (built, building) = built?;
            if store.documents().size(manifest)?.is_none() {
                return Err(removed_while_in_use(manifest));
            }
            let tree = match built {
                BuildOutcome::New(new) => {
                    let (built, record, objects, _room) = *new;
                    let files: Vec<_> = objects.files.into_values().collect();
                    store.trees().commit(key, record, built, &layers, &files)?
                }
                BuildOutcome::There(tree) => tree,
                BuildOutcome::Short(..) => return Err(PullError::Crashed),
            };
            drop(building);
            record_tree_origin(&origins, &repository, key, &fetched)?;
            Ok(tree)
        })
        .await
    }

    /// Builds a tree as soon as there is memory to plan it, unless it has been built meanwhile.
    async fn build_in_turn(
        self: &Arc<Self>,
        order: TreeOrder,
        mut sources: TreeSources,
        progress: &Arc<Progress>,
    ) -> Result<(BuildOutcome, OwnedMutexGuard<()>), PullError> {
        let mut bytes = Merger::estimate(sources.entries, &order.tree.shape.selection);
        let order = Arc::new(order);
        loop {
            // Before the lock and the permit, so that no flight waits for a flight that waits for memory.
            let memory = self.computations.memory(bytes, progress).await?;
            // Flights of other repositories may build the same tree.
            let building = self.background.boost_while(self.building.lock(order.tree.key)).await;
            let permit = self.computations.permit(progress).await;
            let (assembler, order) = (Arc::clone(self), Arc::clone(&order));
            let build = move || {
                let _permit = permit;
                assembler.build_within(&order, sources, memory)
            };
            match blocking(build).await? {
                BuildOutcome::Short(again, needs) => {
                    bytes = self.computations.budget.bytes_of_next_try(bytes, needs);
                    sources = again;
                }
                done => return Ok((done, building)),
            }
        }
    }

    /// Builds a tree within the memory that is reserved for its plan. Blocking.
    fn build_within(
        &self,
        order: &TreeOrder,
        sources: TreeSources,
        mut memory: Memory,
    ) -> Result<BuildOutcome, PullError> {
        let TreeRequest { key, manifest, shape } = &order.tree;
        if let Some(tree) = self.store.trees().get(*key)? {
            return Ok(BuildOutcome::There(tree));
        }
        let plan = sources.plan(&self.store, shape, &self.limits, memory.bytes());
        if let Err(error) = &plan
            && let Some(needs) = sources.shortage(error)
        {
            return Ok(BuildOutcome::Short(sources, needs));
        }
        let plan = plan?;
        let takes = plan.memory_bytes();
        memory.shrink(takes);
        let (kind, compressed_bytes) = (order.kind.clone(), order.compressed_bytes);
        let record = shape.record(*manifest, kind, compressed_bytes, &plan);
        // Directories and symbolic links of the tree itself take disk space, too.
        let claim = Claim::of_tree(*key, &plan);
        let room = self.store.space().reserve_after(&[claim], &order.blobs)?;
        let built = self.store.trees().build(&plan, &sources.objects)?;
        drop(plan);
        if takes >= LARGE_PLAN {
            give_memory_back();
        }
        Ok(BuildOutcome::New(Box::new((built, record, sources.objects, room))))
    }

    /// Lists the layers that a tree needs. The manifest is not in memory while memory for the list is
    /// waited for: then it is parsed a second time.
    async fn list(
        self: &Arc<Self>,
        request: &TreeRequest,
        sponsors: &Sponsors,
        progress: &Progress,
    ) -> Result<LayerList, PullError> {
        let mut reserved = None;
        let TreeRequest { manifest, shape, .. } = request;
        let patterns = shape.selection.compiled_bytes();
        loop {
            let (shape, tenant, reserved_before) =
                (shape.clone(), progress.tenant(), reserved.take());
            let list = move |assembler: &Self, image: ImageManifest| {
                let parts = shape.parts(&image, &assembler.limits)?;
                let bytes = memory_of(&parts);
                let kept = reserved_before
                    .or_else(|| assembler.computations.budget.try_keep(tenant, bytes));
                let list = |kept| LayerList { kind: image.kind().to_owned(), parts, _kept: kept };
                Ok(kept.map(list).ok_or(bytes))
            };
            match self.image(*manifest, patterns, sponsors, progress, list).await? {
                Ok(list) => return Ok(list),
                Err(bytes) => reserved = Some(self.computations.keep(bytes, progress).await?),
            }
        }
    }

    /// Parses the manifest from the store, within memory for it and `more` bytes. A damaged one is fetched again.
    async fn image<T: Send + 'static>(
        self: &Arc<Self>,
        manifest: Digest,
        more: u64,
        sponsors: &Sponsors,
        progress: &Progress,
        mut read: impl FnOnce(&Self, ImageManifest) -> Result<T, PullError> + Send + 'static,
    ) -> Result<T, PullError> {
        for _ in 0..2 {
            let size = self.keep_manifest(manifest, sponsors).await?;
            let memory = size.saturating_mul(BYTES_PER_MANIFEST_BYTE).saturating_add(more);
            let memory = self.computations.memory(memory, progress).await?;
            let assembler = Arc::clone(self);
            let done = blocking(move || {
                let _memory = memory;
                // The store has removed a damaged manifest, which the next try fetches.
                let Some(bytes) = assembler.store.documents().get(manifest)? else {
                    return Ok(Err(read));
                };
                match Manifest::parse(&bytes, None, assembler.limits.manifest())? {
                    Manifest::Image(image) => {
                        drop(bytes);
                        read(&assembler, image).map(Ok)
                    }
                    Manifest::Index(_) => Err(ManifestError::NestedIndex(manifest).into()),
                }
            });
            match done.await? {
                Ok(done) => return Ok(done),
                Err(again) => read = again,
            }
        }
        Err(removed_while_in_use(manifest))
    }

    /// Makes sure that the store keeps a manifest for at least 24 hours, and fetches it if it is not
    /// there. Returns its size.
    async fn keep_manifest(&self, manifest: Digest, sponsors: &Sponsors) -> Result<u64, PullError> {
        let store = self.store.clone();
        let kept = blocking(move || {
            store.documents().mark_used(manifest)?;
            Ok(store.documents().size(manifest)?)
        });
        match (kept.await?, sponsors.current()) {
            (Some(size), _) => Ok(size),
            (None, None) => Err(PullError::Unwanted),
            (None, Some((_, Source { repository, credential }))) => {
                let name = ManifestName::Digest(manifest);
                let registry = &self.origins.registry;
                let fetched = registry.at(&repository, &credential).manifest(&name).await?;
                let store = self.store.clone();
                blocking(move || {
                    store.documents().put(manifest, &fetched.bytes)?;
                    Ok(fetched.bytes.len() as u64)
                })
                .await
            }
        }
    }

    async fn object(
        &self,
        part: Part,
        permissions: PermissionsRule,
        sponsors: &Arc<Sponsors>,
        progress: &Arc<Progress>,
    ) -> Result<(Object, Option<ReadyLayer>), Arc<PullError>> {
        let Part { layer: number, descriptor, rule } = part;
        let request = LayerRequest { descriptor: &descriptor, number, sponsors, progress };
        Ok(match rule {
            PartRule::File(rule, mode) => {
                let file = self.layers.file(request, mode).await?;
                (Object::File(number, rule, descriptor.size, file), None)
            }
            PartRule::Archive(rule) => {
                let ready = self.layers.layer(request, &rule, permissions).await?;
                let totals = ready.totals;
                (Object::Layer(number, rule, ready.view.clone(), totals), Some(ready))
            }
        })
    }
}

/// Records that every blob of a tree has been had from the repository. Blocking.
fn record_tree_origin(
    origins: &BlobOrigins,
    repository: &Repository,
    tree: TreeKey,
    blobs: &[Digest],
) -> Result<(), PullError> {
    let of = origins.sources(repository);
    let sources = blobs.iter().map(|&blob| origins.store.origins().blob_came_from(&of, blob));
    // A mirror that has gone meanwhile proves nothing any more.
    if let Some(sources) = sources.collect::<Option<BTreeSet<_>>>() {
        origins.store.origins().put_tree(repository, tree, &sources)?;
    }
    Ok(())
}

fn removed_while_in_use(manifest: Digest) -> PullError {
    let what = "it was removed as damaged while a pull used it; the next try fetches it".to_owned();
    let path = format!("blobs/{}", manifest.hex()).into();
    StoreError::Damaged { path, what }.into()
}

/// A failure that other flights may share becomes this flight's own.
fn unshare(error: Arc<PullError>) -> PullError {
    Arc::try_unwrap(error).unwrap_or_else(PullError::Shared)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        MANIFEST, TAR, TestNode, TestRegistry, descriptor, file_layer, image, is_root, tar,
    };
    use super::super::{PullPolicy, Want};
    use super::*;
    use oci::registry::RegistryError;
    use unpack::UnpackMode;

    #[tokio::test(flavor = "multi_thread")]
    async fn volumes_whose_blobs_are_missing_are_refused() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let layers = [file_layer("one", b"1"), file_layer("two", b"22")];
        registry.manifest("a", "latest", MANIFEST, &image(&layers));
        let want = registry.want("a");
        let (one, two) = tokio::join!(node.pull(&want), node.pull(&want));
        for error in [one, two].map(|refused| refused.expect_err("the blobs are missing")) {
            let error = error.root();
            assert!(
                matches!(error, PullError::Registry(RegistryError::NotFound { .. })),
                "{error}"
            );
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn volumes_that_want_one_tree_share_its_downloads() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let archive = tar(&[("folder/one", b"1"), ("two", b"22")]);
        for blob in [&archive[..], &b"333"[..]] {
            registry.blob("a", blob);
        }
        let layers = [descriptor(TAR, &archive, ""), file_layer("three", b"333")];
        let manifest = registry.manifest("a", "latest", MANIFEST, &image(&layers));
        let shape = Shape { unpack: UnpackMode::Always, ..Shape::default() };
        let want = Want { shape, ..registry.want("a") };
        let never = Want { policy: PullPolicy::Never, ..want.clone() };
        let refused = node.pull(&never).await.expect_err("nothing is here");
        assert!(matches!(*refused, PullError::NotCached), "{refused}");
        if !is_root() {
            return;
        }
        let (one, two) = tokio::join!(node.pull(&want), node.pull(&want));
        let (one, two) = (one.expect("a tree"), two.expect("a tree"));
        assert_eq!((one.key, one.generation), (two.key, two.generation));
        assert_eq!((one.record.manifest, one.record.bytes), (manifest, 6));
        assert_eq!(registry.seen("blobs/").len(), 2, "each blob is fetched once");
        let requests = registry.seen("").len();
        assert_eq!(node.pull(&never).await.expect("a cached tree").key, one.key);
        assert_eq!(registry.seen("").len(), requests, "the registry is not asked again");
    }
}
