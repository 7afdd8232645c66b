//! A manifest to the tree that a volume shows.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use super::error::PullError;
use super::flights::Outcome;
use super::objects::ReadyLayer;
use super::progress::Progress;
use super::resolve::{Resolved, blocking};
use super::sponsors::{Source, Sponsors};
use super::sums::Sums;
use super::tenant::Caller;
use super::want::{PullPolicy, Want};
use super::{Inner, ProgressView, Puller};
use crate::background;
use crate::oci::manifest::{Descriptor, ImageManifest, Manifest, ManifestError};
use crate::oci::registry::ManifestName;
use crate::oci::{Digest, Repository};
use crate::store::files::StoredFile;
use crate::store::layers::{Layer, LayerView};
use crate::store::room::Claim;
use crate::store::trees::{Objects, TreeRecord, View};
use crate::store::{FileKey, StoreError, Tree, TreeKey};
use crate::unpack::layer_rule::{ArchiveRule, FileRule, LayerRule, classify};
use crate::unpack::merge::{Merger, TreePlan};
use crate::unpack::permissions::NodeType;
use crate::unpack::{Entry, Limits, Permissions, PermissionsRule, Selection, UnpackError};

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

/// A part that is in the store.
pub(super) enum Object {
    File(usize, FileRule, u64, StoredFile),
    Layer(usize, ArchiveRule, LayerView),
}

impl Object {
    /// Found by its name from now on: of many layers not each is held open until the last one has come.
    fn take_name(&mut self, named: &Layer) {
        if let Self::Layer(_, _, view) = self {
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
    /// Returns what a volume asks for.
    pub(super) fn of(want: &Want) -> Self {
        Self {
            selection: want.selection.clone(),
            permissions: want.permissions,
            file_mode: want.file_mode,
        }
    }

    /// As volume attributes say it, to be kept with the tree.
    fn view(&self) -> View {
        let (include, exclude) = self.selection.attributes();
        View { include, exclude, permissions: self.permissions, file_mode: self.file_mode }
    }

    /// Returns what is kept with a tree of this shape. Copies of files are counted when they are made.
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
        TreeKey::new(manifest, &self.selection.canonical(), self.permissions.name(), &file_mode)
    }

    /// The layers that are shown, or may be: a title can prove that a layer is not.
    pub(super) fn parts(
        &self,
        manifest: &ImageManifest,
        limits: &crate::unpack::Limits,
    ) -> Result<Vec<Part>, PullError> {
        let rules = classify(manifest, limits)?;
        let layers = manifest.layers.iter().zip(rules).enumerate();
        let parts = layers.filter_map(|(layer, (descriptor, rule))| {
            if !rule.is_needed(&self.selection) {
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
            Some(Ok(Part { layer, descriptor: descriptor.clone(), rule }))
        });
        parts.collect()
    }

    /// What is recorded with the file wins over the attribute, which is for files without; else the content decides.
    fn permissions_of(&self, rule: &FileRule) -> Result<Option<Permissions>, UnpackError> {
        let recorded = rule.recorded;
        let recorded = recorded.map(|recorded| self.permissions.apply(NodeType::File, recorded));
        if let Some(Permissions { uid, gid, .. }) = recorded.filter(|owned| !owned.has_owner()) {
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
        // Until a tree needs it, nothing else keeps it from being evicted.
        let (inner, of) = (Arc::clone(&self), manifest);
        let _manifest = blocking(move || Ok(inner.store.hold_blob(of))).await?;
        match self.build_tree(key, manifest, shape.clone(), sponsors, progress).await {
            // The estimate was short, or others fill the disk: once more with all that can be freed.
            Err(error) if error.is_full() => {
                let image = self.image(manifest, sponsors).await;
                let own = image.map_or_else(
                    |_| HashSet::new(),
                    |image| image.layers.iter().map(|layer| layer.digest).collect(),
                );
                if !self.make_room(&error, own).await? {
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
        let image = self.image(manifest, sponsors).await?;
        let parts = shape.parts(&image, &self.limits)?;
        let sizes = parts.iter().map(|part| part.descriptor.size);
        let compressed_bytes = sizes.fold(0, u64::saturating_add);
        progress.expect(compressed_bytes);
        let reservation = self.reserve(&parts, shape.permissions, sponsors).await?;
        let fetched = blobs_of_registry(&parts);
        let blobs = parts.iter().map(|part| part.descriptor.digest).collect();
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
        let inner = Arc::clone(self);
        let kind = image.kind().to_owned();
        // Those who show the same of another repository make the same tree.
        let building = self.background.hurried(self.building.lock(key)).await;
        // Merging holds all names of an artifact in memory: as few at once as layers are unpacked.
        let permit = self.unpackers.permit(progress).await;
        let built = blocking(move || {
            let _permit = permit;
            if let Some(tree) = inner.store.tree(key)? {
                return Ok(Err(tree));
            }
            let (plan, objects) = inner.plan(objects, &shape, &inner.limits)?;
            let record = shape.record(manifest, kind, compressed_bytes, &plan);
            // Folders and links of its own may be many, also of layers that are here.
            let claim = Claim::of_tree(key, &plan);
            let reserve = || inner.store.reserve_after(&[claim], &blobs);
            // With locks that publishes wait for.
            let room = background::as_ordinary(reserve)?;
            let built = inner.store.build_tree(&plan, &objects)?;
            Ok(Ok((built, record, objects, room)))
        })
        .await;
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
        // A tree is compared with its manifest for as long as it is kept. That of a long pull may have gone meanwhile.
        let kept = self.manifest_bytes_kept(manifest, sponsors).await;
        let (inner, repository) = (Arc::clone(self), sponsors.repository().clone());
        blocking(move || {
            // Here, since what was built for nothing is removed, which takes a while.
            named.map_err(unshare)?;
            drop(kept?);
            let tree = match built? {
                Ok((built, record, objects, _room)) => {
                    let files: Vec<_> = objects.files.into_values().collect();
                    inner.store.commit_tree(key, record, built, (&layers, &files))?
                }
                Err(tree) => tree,
            };
            drop(building);
            inner.remember_tree(&repository, key, &fetched)?;
            Ok(tree)
        })
        .await
    }

    /// The manifest, from the store; fetched again should it have been damaged there.
    async fn image(
        self: &Arc<Self>,
        manifest: Digest,
        sponsors: &Sponsors,
    ) -> Result<ImageManifest, PullError> {
        let bytes = self.manifest_bytes_kept(manifest, sponsors).await?;
        match Manifest::parse(&bytes, None, self.limits.manifest())? {
            Manifest::Image(image) => Ok(image),
            Manifest::Index(_) => Err(ManifestError::NestedIndex(manifest).into()),
        }
    }

    /// Returns the bytes of a manifest, which the store keeps for the next 24 hours at least; fetched where it does not
    /// have them.
    async fn manifest_bytes_kept(
        self: &Arc<Self>,
        manifest: Digest,
        sponsors: &Sponsors,
    ) -> Result<Vec<u8>, PullError> {
        let inner = Arc::clone(self);
        let kept = blocking(move || {
            inner.store.blob_is_used(manifest)?;
            Ok(inner.store.blob(manifest)?)
        });
        match (kept.await?, sponsors.current()) {
            (Some(bytes), _) => Ok(bytes),
            (None, None) => Err(PullError::Unwanted),
            (None, Some((_, Source { repository, credential }))) => {
                let name = ManifestName::Digest(manifest);
                let fetched = self.registry.manifest(&repository, &name, &credential).await?;
                let (inner, bytes) = (Arc::clone(self), fetched.bytes.to_vec());
                blocking(move || {
                    inner.store.put_blob(manifest, &bytes)?;
                    Ok(bytes)
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
                let file = self.file(&descriptor, mode, sponsors, (progress, layer)).await?;
                (Object::File(layer, rule, descriptor.size, file), None)
            }
            PartRule::Archive(rule) => {
                let ready = self
                    .layer(&descriptor, &rule, permissions, sponsors, (progress, layer))
                    .await?;
                (Object::Layer(layer, rule, ready.view.clone()), Some(ready))
            }
        })
    }

    /// What a volume of this shape shows of these parts.
    pub(super) fn plan(
        &self,
        mut parts: Vec<Object>,
        shape: &Shape,
        limits: &Limits,
    ) -> Result<(TreePlan, Objects), PullError> {
        parts.sort_by_key(|part| match part {
            Object::File(layer, ..) | Object::Layer(layer, ..) => *layer,
        });
        let mut merger = Merger::new(limits);
        let mut objects = Objects::default();
        for part in parts {
            match part {
                Object::File(layer, rule, size, file) => {
                    let FileKey { digest, permissions } = file.key;
                    merger.file(layer, &rule, digest, size, permissions)?;
                    objects.files.insert(file.key, file);
                }
                Object::Layer(layer, rule, unpacked) => {
                    merger.archive(layer, &rule);
                    self.each_entry(&unpacked, |entry| Ok(merger.entry(&entry)?))?;
                    objects.layers.insert(u32::try_from(layer).unwrap_or(u32::MAX), unpacked);
                }
            }
        }
        Ok((merger.finish(&shape.selection)?, objects))
    }

    /// A layer's entries. A damaged index condemns the layer: the next try fetches it again.
    fn each_entry(
        &self,
        layer: &LayerView,
        mut visit: impl FnMut(Entry) -> Result<(), PullError>,
    ) -> Result<(), PullError> {
        let mut read =
            || -> Result<(), PullError> { layer.entries()?.try_for_each(|entry| visit(entry?)) };
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

/// A failure that other flights may share becomes this flight's own.
fn unshare(error: Arc<PullError>) -> PullError {
    Arc::try_unwrap(error).unwrap_or_else(PullError::Shared)
}
