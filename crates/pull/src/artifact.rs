//! A manifest to the tree that a volume shows.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::OwnedMutexGuard;

use super::error::PullError;
use super::flights::Outcome;
use super::memory::{BYTES_PER_MANIFEST_BYTE, BYTES_PER_PART};
use super::objects::ReadyLayer;
use super::progress::Progress;
use super::resolve::{Resolved, blocking};
use super::sponsors::{Source, Sponsors};
use super::sums::Sums;
use super::tenant::Caller;
use super::want::{PullPolicy, Want};
use super::{Inner, Memory, ProgressView, Puller};
use oci::manifest::{Descriptor, ImageManifest, Manifest, ManifestError};
use oci::registry::ManifestName;
use oci::{Digest, Repository};
use store::files::StoredFile;
use store::layers::{Layer, LayerView};
use store::room::{Claim, Reservation};
use store::trees::{BuiltTree, Objects, TreeRecord, View};
use store::{FileKey, StoreError, Tree, TreeKey, give_memory_back};
use sys::background;
use unpack::layer_rule::{ArchiveRule, FileRule, LayerRule, classify};
use unpack::merge::{Merger, TreePlan};
use unpack::permissions::NodeType;
use unpack::{Entry, Limits, Permissions, PermissionsRule, Selection, UnpackError, UnpackMode};

/// How many layers of one artifact are fetched at once; the node's limit holds besides.
const LAYERS_AT_ONCE: usize = 4;

/// Who pays for which tree of which repository.
#[derive(Debug, Default)]
pub struct SponsorsByTree(Mutex<HashMap<(Repository, TreeKey), Weak<Sponsors>>>);

/// What shapes a tree beside its manifest.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) selection: Selection,
    pub(super) permissions: PermissionsRule,
    pub(super) file_mode: Option<u32>,
    pub(super) unpack: UnpackMode,
}

/// A layer that is shown.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) layer: usize,
    pub(super) descriptor: Descriptor,
    pub(super) rule: PartRule,
}

#[derive(Clone, Debug)]
pub(super) enum PartRule {
    File(FileRule, Option<Permissions>),
    Archive(ArchiveRule),
}

/// A part that is in the store. Of a layer, the last field is its number of entries.
pub(super) enum Object {
    File(usize, FileRule, u64, StoredFile),
    Layer(usize, ArchiveRule, LayerView, u64),
}

/// The parts that a tree is made of, bottom first.
pub(super) struct TreeSources {
    parts: Vec<(usize, SourceRule)>,
    objects: Objects,
    /// The number of entries of all layers and of single files.
    entries: u64,
}

enum SourceRule {
    File(FileRule, u64, FileKey),
    Archive(ArchiveRule),
}

/// The layers of an artifact that a tree needs, and the memory that their list takes.
struct LayerList {
    kind: String,
    parts: Vec<Part>,
    _kept: Memory,
}

/// The order to build a tree of layers and files that are in the store.
struct TreeOrder {
    key: TreeKey,
    manifest: Digest,
    kind: String,
    compressed_bytes: u64,
    shape: Shape,
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

/// The size in bytes of a plan from which its memory is returned to the system afterwards.
pub(super) const LARGE_PLAN: u64 = 8 << 20;

impl Object {
    /// Found by its name from now on: of many layers not each is held open until the last one has come.
    fn take_name(&mut self, named: &Layer) {
        if let Self::Layer(_, _, view, _) = self {
            *view = named.view();
        }
    }
}

impl SponsorsByTree {
    fn of(&self, repository: &Repository, tree: TreeKey) -> Arc<Sponsors> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, sponsors| sponsors.strong_count() > 0);
        let key = (repository.clone(), tree);
        let known = all.get(&key).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let sponsors = Arc::new(Sponsors::new(repository.clone()));
            all.insert(key, Arc::downgrade(&sponsors));
            sponsors
        })
    }
}

impl Puller {
    /// The tree of a manifest that this volume may see, from the store or the registry.
    pub(super) async fn tree(
        &self,
        want: &Want,
        resolved: &Resolved,
        view: &ProgressView,
    ) -> Outcome<Tree> {
        let inner = &self.0;
        let shape = Shape::of(want);
        let (manifest, key) = (resolved.manifest, shape.key(resolved.manifest));
        let repository = want.reference.repository();
        if let Some(tree) = inner.cached_tree(repository, key).await? {
            return Ok(tree);
        }
        if want.policy == PullPolicy::Never {
            return Err(Arc::new(PullError::NotCached));
        }
        let credential = self.credential(resolved).await?;
        let source = Source { repository: repository.clone(), credential };
        self.fly(key, manifest, &shape, (&source, &want.caller()), view).await
    }

    async fn fly(
        &self,
        key: TreeKey,
        manifest: Digest,
        shape: &Shape,
        (source, caller): (&Source, &Caller),
        view: &ProgressView,
    ) -> Outcome<Tree> {
        let repository = &source.repository;
        let sponsors = self.0.sponsors.of(repository, key);
        let mut sponsorship = sponsors.offer(source.clone());
        loop {
            let mut started = false;
            let (inner, shape) = (Arc::clone(&self.0), shape.clone());
            let sponsors = Arc::clone(&sponsors);
            let flight = (repository.clone(), key);
            let mut ticket = self.0.trees.join(flight, caller.clone(), |progress| {
                started = true;
                progress.name(format!("{repository}@{manifest}"));
                async move {
                    let since = Instant::now();
                    let made = Arc::clone(&inner)
                        .make_tree(key, manifest, shape, &sponsors, &progress)
                        .await;
                    let (result, reason) =
                        made.as_ref().map_or_else(PullError::outcome, |_| ("success", ""));
                    inner.wire.observer.pulled(result, reason, since.elapsed());
                    made
                }
            });
            view.show(ticket.progress());
            let outcome = tokio::select! {
                // Ours first: then the flight's end is no news.
                biased;
                refused = sponsorship.refused() => return Err(refused),
                outcome = ticket.outcome() => outcome,
            };
            match outcome {
                Err(error) if !started && error.is_of_source() => {}
                outcome => return outcome,
            }
        }
    }
}

impl Shape {
    /// Returns the shape that a volume asks for.
    pub(super) fn of(want: &Want) -> Self {
        Self {
            selection: want.selection.clone(),
            permissions: want.permissions,
            file_mode: want.file_mode,
            unpack: want.unpack,
        }
    }

    /// As volume attributes say it, to be kept with the tree.
    fn view(&self) -> View {
        let (include, exclude) = self.selection.attributes();
        let Self { permissions, file_mode, unpack, .. } = *self;
        View { include, exclude, permissions, file_mode, unpack }
    }

    /// Returns the record of a tree of this shape. Copies of files are counted when they are made.
    pub(super) fn record(
        &self,
        manifest: Digest,
        kind: String,
        compressed_bytes: u64,
        plan: &TreePlan,
    ) -> TreeRecord {
        TreeRecord {
            manifest,
            kind,
            bytes: plan.totals.bytes,
            inodes: plan.totals.inodes,
            compressed_bytes,
            own_inodes: plan.totals.directories + plan.totals.symbolic_links,
            own_bytes: 0,
            view: self.view(),
        }
    }

    pub(super) fn key(&self, manifest: Digest) -> TreeKey {
        let file_mode = self.file_mode.map(|mode| format!("{mode:04o}")).unwrap_or_default();
        let (selection, permissions) = (self.selection.canonical(), self.permissions.name());
        let key = TreeKey::new(manifest, &selection, permissions, &file_mode);
        if self.unpack.is_auto() { key } else { key.with_unpack(self.unpack.name()) }
    }

    /// The layers that are shown, or may be: a title can prove that a layer is not.
    pub(super) fn parts(
        &self,
        manifest: &ImageManifest,
        limits: &unpack::Limits,
    ) -> Result<Vec<Part>, PullError> {
        let rules = classify(manifest, self.unpack, limits)?;
        // Its patterns are compiled for this list alone.
        let selection = self.selection.clone();
        let layers = manifest.layers.iter().zip(rules).enumerate();
        let parts = layers.filter_map(|(layer, (descriptor, rule))| {
            if !rule.is_needed(&selection) {
                return None;
            }
            let rule = match rule {
                LayerRule::Skip => return None,
                LayerRule::File(rule) => match self.permissions_of(&rule) {
                    Ok(permissions) => PartRule::File(rule, permissions),
                    Err(error) => return Some(Err(error.into())),
                },
                LayerRule::Archive(rule) => PartRule::Archive(rule),
            };
            // The rule has been made from these annotations, which are not needed any more.
            let annotations = BTreeMap::new();
            let descriptor = Descriptor { annotations, platform: None, ..descriptor.clone() };
            Some(Ok(Part { layer, descriptor, rule }))
        });
        parts.collect()
    }

    /// What is recorded with the file wins over the attribute, which is for files without; else the content decides.
    fn permissions_of(&self, rule: &FileRule) -> Result<Option<Permissions>, UnpackError> {
        let recorded = rule.recorded;
        let recorded = recorded.map(|recorded| self.permissions.apply(NodeType::File, recorded));
        if let Some(Permissions { uid, gid, .. }) = recorded.filter(|owned| !owned.has_owner()) {
            let (uid, gid) = (uid.into(), gid.into());
            return Err(UnpackError::Owner { path: rule.path.clone(), uid, gid });
        }
        let asked = self.file_mode.map(|mode| Permissions { mode: mode & 0o777, uid: 0, gid: 0 });
        Ok(recorded.or(asked))
    }
}

impl Inner {
    async fn cached_tree(
        self: &Arc<Self>,
        repository: &Repository,
        key: TreeKey,
    ) -> Outcome<Option<Tree>> {
        let (inner, repository) = (Arc::clone(self), repository.clone());
        let read = move || {
            let mirrors = inner.mirrors(&repository);
            if !inner.store.tree_came_from(&repository, key, &mirrors) {
                return Ok(None);
            }
            Ok(inner.store.tree(key)?)
        };
        blocking(read).await.map_err(Arc::new)
    }

    async fn make_tree(
        self: Arc<Self>,
        key: TreeKey,
        manifest: Digest,
        shape: Shape,
        sponsors: &Arc<Sponsors>,
        progress: &Arc<Progress>,
    ) -> Result<Tree, PullError> {
        // No tree needs the manifest yet, so that only this lease keeps it from being evicted.
        let (inner, of) = (Arc::clone(&self), manifest);
        let _manifest = blocking(move || Ok(inner.store.hold_blob(of))).await?;
        match self.build_tree(key, manifest, shape.clone(), sponsors, progress).await {
            // The estimate was short, or others fill the disk: once more with all that can be freed.
            Err(error) if error.is_full() => {
                let layers = |_: &Self, image: ImageManifest| {
                    Ok(image.layers.into_iter().map(|layer| layer.digest).collect())
                };
                let own = self.image(manifest, 0, sponsors, progress, layers).await;
                if !self.make_room(&error, own.unwrap_or_default()).await? {
                    return Err(error);
                }
                tracing::info!(%manifest, "the disk was full and has room again: trying once more");
                self.build_tree(key, manifest, shape, sponsors, progress).await
            }
            built => built,
        }
    }

    async fn build_tree(
        self: &Arc<Self>,
        key: TreeKey,
        manifest: Digest,
        shape: Shape,
        sponsors: &Arc<Sponsors>,
        progress: &Arc<Progress>,
    ) -> Result<Tree, PullError> {
        let LayerList { kind, parts, _kept } =
            self.list(manifest, &shape, sponsors, progress).await?;
        let sizes = parts.iter().map(|part| part.descriptor.size);
        let compressed_bytes = sizes.fold(0, u64::saturating_add);
        progress.expect(compressed_bytes);
        let reservation = self.reserve(&parts, shape.permissions, sponsors).await?;
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
                let object = self.object(part, shape.permissions, sponsors, progress);
                under_way.push(async move { (blob, object.await) });
            }
            if under_way.is_empty() && waiting.len() == 0 {
                break;
            }
            tokio::select! {
                Some((blob, object)) = under_way.next() => {
                    let (object, ready) = object.map_err(unshare)?;
                    let (entries, bytes) = amount(&object, ready.as_ref());
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
        let built = match self.keep_manifest(manifest, sponsors).await {
            Ok(_) => {
                let order = TreeOrder { key, manifest, kind, compressed_bytes, shape, blobs };
                self.build_in_turn(order, TreeSources::new(objects), progress).await
            }
            Err(error) => Err(error),
        };
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
        let (inner, repository) = (Arc::clone(self), sponsors.repository().clone());
        blocking(move || {
            // Here, since what was built for nothing is removed, which takes a while.
            named.map_err(unshare)?;
            let (built, building) = built?;
            if inner.store.blob_size(manifest)?.is_none() {
                return Err(removed_while_in_use(manifest));
            }
            let tree = match built {
                BuildOutcome::New(new) => {
                    let (built, record, objects, _room) = *new;
                    let files: Vec<_> = objects.files.into_values().collect();
                    inner.store.commit_tree(key, record, built, (&layers, &files))?
                }
                BuildOutcome::There(tree) => tree,
                BuildOutcome::Short(..) => return Err(PullError::Crashed),
            };
            drop(building);
            inner.remember_tree(&repository, key, &fetched)?;
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
        let mut bytes = Merger::estimate(sources.entries, &order.shape.selection);
        let order = Arc::new(order);
        loop {
            // Before the lock and the permit, so that no flight waits for a flight that waits for memory.
            let memory = self.compute_memory(bytes, progress).await?;
            // Flights of other repositories may build the same tree.
            let building = self.background.boost_while(self.building.lock(order.key)).await;
            let permit = self.unpackers.compute_permit(progress).await;
            let (inner, order) = (Arc::clone(self), Arc::clone(&order));
            let build = move || {
                let _permit = permit;
                inner.build_within(&order, sources, memory)
            };
            match blocking(build).await? {
                BuildOutcome::Short(again, needs) => {
                    bytes = self.memory.bytes_of_next_try(bytes, needs);
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
        if let Some(tree) = self.store.tree(order.key)? {
            return Ok(BuildOutcome::There(tree));
        }
        let plan = self.plan(&sources, &order.shape, &self.limits, memory.bytes());
        if let Err(error) = &plan
            && let Some(needs) = sources.shortage(error)
        {
            return Ok(BuildOutcome::Short(sources, needs));
        }
        let plan = plan?;
        let takes = plan.memory_bytes();
        memory.shrink(takes);
        let (kind, compressed_bytes) = (order.kind.clone(), order.compressed_bytes);
        let record = order.shape.record(order.manifest, kind, compressed_bytes, &plan);
        // Directories and symbolic links of the tree itself take disk space, too.
        let claim = Claim::of_tree(order.key, &plan);
        let reserve = || self.store.reserve_after(&[claim], &order.blobs);
        // Publishes wait for the locks that this takes.
        let room = background::at_normal_priority(reserve)?;
        let built = self.store.build_tree(&plan, &sources.objects)?;
        drop(plan);
        if takes >= LARGE_PLAN {
            give_memory_back();
        }
        Ok(BuildOutcome::New(Box::new((built, record, sources.objects, room))))
    }

    /// Waits for the memory of a computation of a flight.
    pub(super) async fn compute_memory(
        &self,
        bytes: u64,
        progress: &Progress,
    ) -> Result<Memory, PullError> {
        let waits = |wait| progress.waits_for_memory(wait);
        let reserve = self.memory.compute(progress.tenant(), bytes, waits);
        // Warming may hold the memory while it stands back.
        Ok(self.background.boost_while(reserve).await?)
    }

    /// Lists the layers that a tree needs. The manifest is not in memory while memory for the list is
    /// waited for: then it is parsed a second time.
    async fn list(
        self: &Arc<Self>,
        manifest: Digest,
        shape: &Shape,
        sponsors: &Sponsors,
        progress: &Progress,
    ) -> Result<LayerList, PullError> {
        let mut reserved = None;
        let patterns = shape.selection.compiled_bytes();
        loop {
            let (shape, tenant, reserved_before) =
                (shape.clone(), progress.tenant(), reserved.take());
            let list = move |inner: &Self, image: ImageManifest| {
                let parts = shape.parts(&image, &inner.limits)?;
                let bytes = memory_of(&parts);
                let kept = reserved_before.or_else(|| inner.memory.try_keep(tenant, bytes));
                let list = |kept| LayerList { kind: image.kind().to_owned(), parts, _kept: kept };
                Ok(kept.map(list).ok_or(bytes))
            };
            match self.image(manifest, patterns, sponsors, progress, list).await? {
                Ok(list) => return Ok(list),
                Err(bytes) => {
                    let waits = |wait| progress.waits_for_memory(wait);
                    let keep = self.memory.keep(progress.tenant(), bytes, waits);
                    reserved = Some(self.background.boost_while(keep).await?);
                }
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
            let memory = self.compute_memory(memory, progress).await?;
            let inner = Arc::clone(self);
            let done = blocking(move || {
                let _memory = memory;
                // The store has removed a damaged manifest, which the next try fetches.
                let Some(bytes) = inner.store.blob(manifest)? else { return Ok(Err(read)) };
                match Manifest::parse(&bytes, None, inner.limits.manifest())? {
                    Manifest::Image(image) => {
                        drop(bytes);
                        read(&inner, image).map(Ok)
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
    async fn keep_manifest(
        self: &Arc<Self>,
        manifest: Digest,
        sponsors: &Sponsors,
    ) -> Result<u64, PullError> {
        let inner = Arc::clone(self);
        let kept = blocking(move || {
            inner.store.blob_is_used(manifest)?;
            Ok(inner.store.blob_size(manifest)?)
        });
        match (kept.await?, sponsors.current()) {
            (Some(size), _) => Ok(size),
            (None, None) => Err(PullError::Unwanted),
            (None, Some((_, Source { repository, credential }))) => {
                let name = ManifestName::Digest(manifest);
                let fetched = self.registry.manifest(&repository, &name, &credential).await?;
                let inner = Arc::clone(self);
                blocking(move || {
                    inner.store.put_blob(manifest, &fetched.bytes)?;
                    Ok(fetched.bytes.len() as u64)
                })
                .await
            }
        }
    }

    async fn object(
        self: &Arc<Self>,
        part: Part,
        permissions: PermissionsRule,
        sponsors: &Arc<Sponsors>,
        progress: &Arc<Progress>,
    ) -> Result<(Object, Option<ReadyLayer>), Arc<PullError>> {
        let Part { layer, descriptor, rule } = part;
        Ok(match rule {
            PartRule::File(rule, mode) => {
                let file = self.file(&descriptor, mode, sponsors, progress, layer).await?;
                (Object::File(layer, rule, descriptor.size, file), None)
            }
            PartRule::Archive(rule) => {
                let ready = self
                    .layer(&descriptor, &rule, permissions, sponsors, (progress, layer))
                    .await?;
                let entries = ready.totals.entries;
                (Object::Layer(layer, rule, ready.view.clone(), entries), Some(ready))
            }
        })
    }

    /// Plans the tree of these parts in this shape, within `allowance` bytes of memory. Blocking.
    pub(super) fn plan(
        &self,
        sources: &TreeSources,
        shape: &Shape,
        limits: &Limits,
        allowance: u64,
    ) -> Result<TreePlan, PullError> {
        let mut records = sources.objects.records();
        // Its patterns are compiled for this plan alone.
        let selection = shape.selection.clone();
        let merger = Merger::new(limits, &selection);
        let mut merger = merger.within(allowance).reading(&mut records);
        for (layer, rule) in &sources.parts {
            match rule {
                SourceRule::File(rule, size, FileKey { digest, permissions }) => {
                    merger.file(*layer, rule, *digest, *size, *permissions)?;
                }
                SourceRule::Archive(rule) => {
                    let Some(view) = sources.objects.layers.get(&layer_number(*layer)) else {
                        return Err(PullError::Crashed);
                    };
                    merger.archive(*layer, rule);
                    self.each_entry(view, |entry, offset| Ok(merger.recorded(&entry, offset)?))?;
                }
            }
        }
        Ok(merger.finish()?)
    }

    /// Visits the entries of a layer, each with its offset in the index. A layer with a damaged index
    /// is marked as damaged, so that the next try fetches it again.
    fn each_entry(
        &self,
        layer: &LayerView,
        mut visit: impl FnMut(Entry, u64) -> Result<(), PullError>,
    ) -> Result<(), PullError> {
        let mut read = || -> Result<(), PullError> {
            let mut entries = layer.entries()?;
            while let Some(entry) = entries.next() {
                visit(entry?, entries.offset())?;
            }
            Ok(())
        };
        let done = read();
        if let Err(PullError::Store(StoreError::Damaged { .. })) = &done
            && let Some(path) = layer.path()
        {
            self.store.mark_damaged(path)?;
        }
        done
    }

    /// Remembers that every blob of a tree has been had from the repository. Blocking.
    fn remember_tree(
        &self,
        repository: &Repository,
        tree: TreeKey,
        blobs: &[Digest],
    ) -> Result<(), PullError> {
        let mirrors = self.mirrors(repository);
        let sources =
            blobs.iter().map(|&blob| self.store.blob_came_from(repository, blob, &mirrors));
        // A mirror that has gone meanwhile proves nothing any more.
        if let Some(sources) = sources.collect::<Option<BTreeSet<_>>>() {
            self.store.put_tree_origin(repository, tree, &sources)?;
        }
        Ok(())
    }
}

impl TreeSources {
    pub(super) fn new(mut from: Vec<Object>) -> Self {
        from.sort_by_key(|part| match part {
            Object::File(layer, ..) | Object::Layer(layer, ..) => *layer,
        });
        let mut sources =
            Self { parts: Vec::with_capacity(from.len()), objects: Objects::default(), entries: 0 };
        for part in from {
            match part {
                Object::File(layer, rule, size, file) => {
                    sources.entries = sources.entries.saturating_add(1);
                    sources.parts.push((layer, SourceRule::File(rule, size, file.key)));
                    sources.objects.files.insert(file.key, file);
                }
                Object::Layer(layer, rule, view, entries) => {
                    sources.entries = sources.entries.saturating_add(entries);
                    sources.parts.push((layer, SourceRule::Archive(rule)));
                    sources.objects.layers.insert(layer_number(layer), view);
                }
            }
        }
        sources
    }

    /// Returns the files and layers.
    pub(super) fn into_objects(self) -> Objects {
        self.objects
    }

    /// Returns the estimated bytes of memory for the whole plan, if it was stopped for memory.
    pub(super) fn shortage(&self, error: &PullError) -> Option<u64> {
        let PullError::Unpack(UnpackError::Memory { bytes, entries }) = error.root() else {
            return None;
        };
        // Assumes that the rest of the entries is like the first ones, and adds an eighth.
        let all = u128::from(*bytes) * u128::from(self.entries.max(*entries));
        let all = u64::try_from(all / u128::from((*entries).max(1))).unwrap_or(u64::MAX);
        Some(all.saturating_add(all / 8))
    }
}

fn layer_number(layer: usize) -> u32 {
    u32::try_from(layer).unwrap_or(u32::MAX)
}

/// Returns the bytes of memory that a pull keeps for a list of parts.
fn memory_of(parts: &[Part]) -> u64 {
    let of_part = |part: &Part| {
        let Part { descriptor, rule, .. } = part;
        let path = match rule {
            PartRule::File(rule, _) => Some(&rule.path),
            PartRule::Archive(rule) => rule.within.as_ref(),
        };
        let path = path.map_or(0, |path| path.as_bytes().len());
        let data = descriptor.data.as_ref().map_or(0, Vec::len);
        BYTES_PER_PART + (2 * path + data + descriptor.media_type.len()) as u64
    };
    parts.iter().map(of_part).fold(0, u64::saturating_add)
}

/// The blobs of these parts that the manifest does not carry itself.
fn blobs_of_registry(parts: &[Part]) -> Vec<Digest> {
    let fetched = parts.iter().filter(|part| part.descriptor.data.is_none());
    fetched.map(|part| part.descriptor.digest).collect()
}

/// Entries and bytes of a part.
fn amount(object: &Object, ready: Option<&ReadyLayer>) -> (u64, u64) {
    match (object, ready) {
        (Object::File(_, _, size, _), _) => (1, *size),
        (Object::Layer(..), Some(ready)) => (ready.totals.entries, ready.totals.bytes),
        (Object::Layer(..), None) => (0, 0),
    }
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
