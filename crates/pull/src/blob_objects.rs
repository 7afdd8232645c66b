//! Blobs to objects of the store: a file, or an unpacked layer.

use std::fs::File;
use std::io::Cursor;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::blob_origins::BlobOrigins;
use super::blob_transfer::{BlobRequest, Download};
use super::content_repair::ContentReader;
use super::credential_offers::Sponsors;
use super::disk_space_claim::layer_key;
use super::downloader::{Attempt, DownloadTurn, Downloader, retry};
use super::error::PullError;
use super::keyed_locks::KeyedLocks;
use super::pull_progress::Progress;
use super::single_flight::{Flights, Outcome};
use super::streaming_unpack::{Job, Unpackers};
use super::{SizedBlob, blocking};
use oci::manifest::Descriptor;
use oci::{Digest, Repository};
use store::layers::{Layer, LayerTotals, LayerView, UnpackedLayer};
use store::partial_downloads::Purpose;
use store::single_files::{StoredFile, is_executable, starts_executable};
use store::{FileKey, LayerKey, ObjectName, Store, StoreError};
use sys::background::Background;
use sys::fault;
use unpack::layer_rule::ArchiveRule;
use unpack::{Permissions, PermissionsRule};

/// Mode of content that is meant to be executed, where nothing else says.
const EXECUTABLE: Permissions = Permissions { mode: 0o555, uid: 0, gid: 0 };
/// Mode of all other content, where nothing else says.
const PLAIN: Permissions = Permissions { mode: 0o444, uid: 0, gid: 0 };

/// A file that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileWant {
    /// The digest of the blob.
    pub(super) digest: Digest,
    /// Mode and owner; none means by content.
    pub(super) permissions: Option<Permissions>,
}

/// A layer that is complete, and may still have to be synced and named.
#[derive(Clone)]
pub(super) struct ReadyLayer {
    /// The content that trees link meanwhile.
    pub(super) view: LayerView,
    /// The totals of the layer.
    pub(super) totals: LayerTotals,
    /// Its name; a tree has none before all of its layers do.
    named: Naming,
    /// Set if it is being named in the background.
    behind: bool,
}

/// A task that names a layer, and continues without a caller.
type Naming = Shared<BoxFuture<'static, Outcome<Layer>>>;

impl ReadyLayer {
    /// Waits until it has its name.
    pub(super) async fn named(&self, background: &Background) -> Outcome<Layer> {
        let named = self.named.clone();
        if self.behind { background.boost_while(named).await } else { named.await }
    }
}

/// A layer of an artifact that a flight waits for.
#[derive(Clone, Copy)]
pub(super) struct LayerRequest<'a> {
    /// The layer in the manifest.
    pub(super) descriptor: &'a Descriptor,
    /// Its number in the manifest.
    pub(super) number: usize,
    /// The callers whose credentials the flight uses.
    pub(super) sponsors: &'a Arc<Sponsors>,
    /// The flight that waits.
    pub(super) progress: &'a Progress,
}

/// Makes files and layers of the store from blobs.
pub(super) struct LayerStore {
    pub(super) store: Store,
    pub(super) downloader: Arc<Downloader>,
    pub(super) unpackers: Unpackers,
    pub(super) reader: Arc<ContentReader>,
    pub(super) background: Background,
    // A flight serves one repository, so that its failure is not reported to pods of another one.
    pub(super) files: Flights<(Repository, FileWant), StoredFile>,
    pub(super) layers: Flights<(Repository, LayerKey), ReadyLayer>,
    /// Held while what was made of a blob gets its name.
    pub(super) naming: KeyedLocks<Digest>,
}

impl LayerStore {
    /// Returns a file of the store, which it fetches if needed. A stored file that has another size than the manifest
    /// says is read back: if it is damaged, it is fetched again.
    pub(super) async fn file(
        self: &Arc<Self>,
        request: LayerRequest<'_>,
        permissions: Option<Permissions>,
    ) -> Outcome<StoredFile> {
        let (digest, expected) = (request.descriptor.digest, request.descriptor.size);
        let mut was_damaged = false;
        loop {
            let file = self.any_file(request, permissions).await?;
            let look = move || {
                let path = &file.path;
                let metadata =
                    path.metadata().map_err(|error| StoreError::io("look at", path, error))?;
                Ok((metadata.len(), file))
            };
            let (got, file) = blocking(look).await.map_err(Arc::new)?;
            if got == expected {
                return Ok(file);
            }
            // A warm node must not believe what a cold one would refuse.
            let name = ObjectName::file(file.key, file.generation);
            drop(file);
            let read = self.reader.read_before_use([name], request.progress);
            if was_damaged || read.await.map_err(Arc::new)? {
                let encoding = None;
                return Err(PullError::BlobSize { digest, expected, got, encoding }.into());
            }
            was_damaged = true;
        }
    }

    /// Returns a file of the store, of whatever size it is.
    async fn any_file(
        self: &Arc<Self>,
        request: LayerRequest<'_>,
        permissions: Option<Permissions>,
    ) -> Outcome<StoredFile> {
        let LayerRequest { descriptor, number, sponsors, progress } = request;
        let want = FileWant { digest: descriptor.digest, permissions };
        let joined = |own: &Arc<Progress>| progress.wait_for(number, own);
        let start = |own: Arc<Progress>| {
            own.expect(descriptor.size);
            let (layers, descriptor) = (Arc::clone(self), descriptor.clone());
            let sponsors = Arc::clone(sponsors);
            async move { layers.make_file(&descriptor, want, &sponsors, &own).await }
        };
        let key = (sponsors.repository.clone(), want);
        self.files.run(key, progress.caller(), joined, start).await
    }

    /// Returns a layer of the store, which it fetches if needed.
    pub(super) async fn layer(
        self: &Arc<Self>,
        request: LayerRequest<'_>,
        rule: &ArchiveRule,
        permissions: PermissionsRule,
    ) -> Outcome<ReadyLayer> {
        let LayerRequest { descriptor, number, sponsors, progress } = request;
        let key = layer_key(descriptor.digest, rule, permissions);
        let joined = |own: &Arc<Progress>| progress.wait_for(number, own);
        let start = |own: Arc<Progress>| {
            own.expect(descriptor.size);
            let (layers, descriptor) = (Arc::clone(self), descriptor.clone());
            let job = self.unpackers.job(descriptor.digest, rule.clone(), permissions, &own);
            let sponsors = Arc::clone(sponsors);
            async move { layers.make_layer(&descriptor, job, key, &sponsors, &own).await }
        };
        let of = (sponsors.repository.clone(), key);
        self.layers.run(of, progress.caller(), joined, start).await
    }

    async fn make_file(
        self: Arc<Self>,
        descriptor: &Descriptor,
        want: FileWant,
        sponsors: &Sponsors,
        progress: &Arc<Progress>,
    ) -> Result<StoredFile, PullError> {
        if let Some(data) = descriptor.data.clone() {
            self.read_files_before_use(want.digest, progress).await?;
            let _naming = self.background.boost_while(self.naming.lock(want.digest)).await;
            progress.resumed(descriptor.size);
            let store = self.store.clone();
            return blocking(move || inline_file(&store, want, &data)).await;
        }
        let (blob, purpose) = (SizedBlob::of(descriptor), Purpose::Keep);
        let request = BlobRequest { blob, purpose, sponsors, progress, follow: &|_| () };
        retry(|isolated| self.fetch_file(request, want, isolated)).await
    }

    /// Gets the blob of a file from the repository, in one attempt.
    async fn fetch_file(
        &self,
        request: BlobRequest<'_>,
        want: FileWant,
        isolated: bool,
    ) -> Attempt<StoredFile> {
        let mut turn = self.downloader.turn(request, isolated).await?;
        let store = self.store.clone();
        let held = blocking(move || Ok(store.files().any_of(want.digest)?)).await?;
        if held.is_some() {
            let guard = self.downloader.prove(request, turn).await?;
            self.read_files_before_use(want.digest, request.progress).await?;
            let _naming = self.background.boost_while(self.naming.lock(want.digest)).await;
            let store = self.store.clone();
            let known = blocking(move || {
                let known = known_file(&store, want)?;
                drop(held);
                Ok(known)
            })
            .await?;
            if let Some(file) = known {
                return Ok(file);
            }
            turn = DownloadTurn::proven(guard);
        }
        let Download { partial, guard, given_by } = self.downloader.download(request, turn).await?;
        let naming = self.background.boost_while(self.naming.lock(want.digest)).await;
        let (origins, repository) =
            (self.downloader.origins.clone(), request.sponsors.repository.clone());
        let named = blocking(move || {
            let store = &origins.store;
            verified(partial.path())?;
            // Whether it gets its name or not.
            origins.record(&repository, want.digest, &given_by)?;
            let key = file_key(want, &mut partial.reader()?)?;
            let file = match store.files().get(key)? {
                None => store.files().commit(key, &partial)?,
                // Another host has sent it meanwhile.
                Some(file) => {
                    partial.discard()?;
                    file
                }
            };
            drop((guard, naming));
            Ok(file)
        });
        Ok(named.await?)
    }

    async fn make_layer(
        self: Arc<Self>,
        descriptor: &Descriptor,
        job: Job,
        key: LayerKey,
        sponsors: &Sponsors,
        progress: &Arc<Progress>,
    ) -> Result<ReadyLayer, PullError> {
        let digest = descriptor.digest;
        if let Some(data) = descriptor.data.clone() {
            self.read_layer_before_use(key, progress).await?;
            let naming = self.background.boost_while(self.naming.lock(digest)).await;
            progress.resumed(descriptor.size);
            if let Some(layer) = self.stored_layer(key).await? {
                return ready(layer).await;
            }
            let writer = job.finish(move || Ok(Cursor::new(data.clone()))).await?;
            let store = self.store.clone();
            let unpacked = blocking(move || Ok(store.layers().finish(key, writer)?)).await?;
            return self.name_layer(unpacked, naming, |_| Ok(()));
        }
        let (blob, purpose) = (SizedBlob::of(descriptor), Purpose::Unpack);
        let follow = &|follower| job.follow(follower);
        let request = BlobRequest { blob, purpose, sponsors, progress, follow };
        retry(|isolated| self.fetch_layer(request, &job, key, isolated)).await
    }

    /// Gets the blob of a layer from the repository and unpacks it, in one attempt.
    async fn fetch_layer(
        &self,
        request: BlobRequest<'_>,
        job: &Job,
        key: LayerKey,
        isolated: bool,
    ) -> Attempt<ReadyLayer> {
        let mut turn = self.downloader.turn(request, isolated).await?;
        let held = self.stored_layer(key).await?;
        if held.is_some() {
            let guard = self.downloader.prove(request, turn).await?;
            self.read_layer_before_use(key, request.progress).await?;
            if let Some(layer) = self.stored_layer(key).await? {
                return Ok(ready(layer).await?);
            }
            // It was found damaged, and is fetched as if it were not here.
            turn = DownloadTurn::proven(guard);
        }
        let repository = &request.sponsors.repository;
        if let Some(refusal) = self.unpackers.refusal(&repository.to_string(), key) {
            return Err(PullError::Shared(refusal).into());
        }
        let download = self.downloader.download(request, turn).await?;
        Ok(self.unpack(download, job, key, repository).await?)
    }

    async fn stored_layer(&self, key: LayerKey) -> Result<Option<Layer>, PullError> {
        let store = self.store.clone();
        blocking(move || Ok(store.layers().get(key)?)).await
    }

    /// Unpacks a verified download, and begins to name the layer.
    async fn unpack(
        &self,
        download: Download,
        job: &Job,
        key: LayerKey,
        repository: &Repository,
    ) -> Result<ReadyLayer, PullError> {
        let Download { partial, guard, given_by } = download;
        let (repository, digest) = (repository.clone(), job.blob);
        let path = partial.path().to_owned();
        let open = move || File::open(&path).map_err(|error| StoreError::io("open", &path, error));
        let unpacked = job.finish(open).await;
        let naming = self.background.boost_while(self.naming.lock(digest)).await;
        let (store, unpackers, from) =
            (self.store.clone(), self.unpackers.clone(), repository.to_string());
        let unpacked = blocking(move || {
            verified(partial.path())?;
            match unpacked {
                Ok(writer) => {
                    let unpacked = store.layers().finish(key, writer)?;
                    // Before the sync, which would only write it. Where that fails nothing says
                    // that these bytes, which were never synced, are any better.
                    partial.discard()?;
                    Ok(unpacked)
                }
                // What was refused would be refused again: nothing of it is kept.
                Err(error) if matches!(error.root(), PullError::Unpack(_)) => {
                    partial.discard()?;
                    let error = Arc::new(error);
                    unpackers.refuse(&from, key, &error);
                    Err(PullError::Shared(error))
                }
                // The blob is intact, and only the disk failed: the blob need not be fetched again, and imported
                // content cannot be. It does not block a full disk: a download without a task is evicted first.
                Err(error) => Err(error),
            }
        })
        .await;
        // Blobs that are refused did come from there, too.
        let record = move |origins: &BlobOrigins| origins.record(&repository, digest, &given_by);
        let stored = match &unpacked {
            Ok(_) => self.stored_layer(key).await?,
            Err(_) => None,
        };
        match (unpacked, stored) {
            (Ok(unpacked), None) => self.name_layer(unpacked, (guard, naming), record),
            // Another host has sent it meanwhile, or it was refused.
            (unpacked, stored) => {
                let origins = self.downloader.origins.clone();
                let unpacked = blocking(move || {
                    let unpacked = unpacked.map(drop);
                    record(&origins).and(unpacked)
                });
                unpacked.await?;
                ready(stored.ok_or(PullError::Crashed)?).await
            }
        }
    }

    /// Reads back what an earlier format has left of a file once, before the first use. A damaged one
    /// is marked, and is not found any more.
    async fn read_files_before_use(
        &self,
        blob: Digest,
        progress: &Arc<Progress>,
    ) -> Result<(), PullError> {
        let store = self.store.clone();
        let unread = blocking(move || Ok(store.read_back().unread_files(blob)?)).await?;
        self.reader.read_before_use(unread, progress).await.map(|_| ())
    }

    /// As [`Self::read_files_before_use`], of a layer.
    async fn read_layer_before_use(
        &self,
        key: LayerKey,
        progress: &Arc<Progress>,
    ) -> Result<(), PullError> {
        let store = self.store.clone();
        let unread = blocking(move || Ok(store.read_back().unread_layer(key)?)).await?;
        self.reader.read_before_use(unread, progress).await.map(|_| ())
    }

    /// Starts to sync and name a layer, without waiting for it. The blob is released when that has ended, and later
    /// callers find the layer.
    fn name_layer(
        &self,
        unpacked: UnpackedLayer,
        guards: impl Send + 'static,
        record: impl FnOnce(&BlobOrigins) -> Result<(), PullError> + Send + 'static,
    ) -> Result<ReadyLayer, PullError> {
        let (view, totals) = (unpacked.view()?, unpacked.totals());
        let origins = self.downloader.origins.clone();
        let naming = tokio::task::spawn_blocking(move || {
            let layer = origins.store.layers().commit(unpacked)?;
            record(&origins)?;
            drop(guards);
            Ok(layer)
        });
        let outcome = async move {
            let named = naming.await.unwrap_or(Err(PullError::Crashed));
            named.map_err(Arc::new)
        };
        let (named, behind) = (outcome.boxed().shared(), Background::is_here());
        Ok(ReadyLayer { view, totals, named, behind })
    }
}

/// Content that the manifest carries.
fn inline_file(store: &Store, want: FileWant, data: &[u8]) -> Result<StoredFile, PullError> {
    let by_content = if starts_executable(data) { EXECUTABLE } else { PLAIN };
    let permissions = want.permissions.unwrap_or(by_content);
    let key = FileKey { digest: want.digest, permissions };
    Ok(match store.files().get(key)? {
        Some(file) => file,
        None => store.files().commit_inline(key, data)?,
    })
}

/// Returns the file if its content is in the store: the file itself, or a copy with another mode.
fn known_file(store: &Store, want: FileWant) -> Result<Option<StoredFile>, PullError> {
    let Some(source) = store.files().any_of(want.digest)? else { return Ok(None) };
    // Without a mode the content decides, and not what another volume has asked for.
    let key = key_of(want, &source)?;
    if let Some(file) = store.files().get(key)? {
        return Ok(Some(file));
    }
    match store.files().copy(key, &source.path) {
        Ok(file) => Ok(Some(file)),
        // Then the registry is asked, as if it were not here.
        Err(error @ StoreError::Damaged { .. }) => {
            tracing::warn!(%error, "a file of the store is damaged");
            store.inventory().mark_damaged(&source.path)?;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// A layer that has its name.
async fn ready(layer: Layer) -> Result<ReadyLayer, PullError> {
    let (layer, totals) = blocking(move || {
        let totals = layer.totals();
        Ok((layer, totals))
    })
    .await?;
    let view = layer.view();
    let named = std::future::ready(Ok(layer)).boxed().shared();
    Ok(ReadyLayer { view, totals, named, behind: false })
}

/// A download is complete, and its content about to get a name.
fn verified(download: &std::path::Path) -> Result<(), PullError> {
    let passed = fault::point("download.verified");
    Ok(passed.map_err(|error| StoreError::io("finish", download, error))?)
}

/// Returns the key of a file whose content is in the store with this mode or another.
pub(super) fn key_of(want: FileWant, content: &StoredFile) -> Result<FileKey, PullError> {
    let file = File::open(&content.path);
    let mut file = file.map_err(|error| StoreError::io("open", &content.path, error))?;
    file_key(want, &mut file)
}

fn file_key(want: FileWant, content: &mut File) -> Result<FileKey, PullError> {
    let permissions = if let Some(permissions) = want.permissions {
        permissions
    } else {
        let executable = is_executable(content)
            .map_err(|error| StoreError::io("read", std::path::Path::new("the download"), error))?;
        if executable { EXECUTABLE } else { PLAIN }
    };
    Ok(FileKey { digest: want.digest, permissions })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TAR, TestNode, TestRegistry, descriptor, file_layer, is_root};
    use super::super::{Shape, Want};
    use super::*;
    use unpack::UnpackMode;

    #[tokio::test]
    async fn a_layer_that_was_refused_is_not_fetched_again() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let garbage = [b'x'; 2048];
        registry.artifact("a", &descriptor(TAR, &garbage, ""), &garbage);
        let shape = Shape { unpack: UnpackMode::Always, ..Shape::default() };
        let want = Want { shape, ..registry.want("a") };
        let mut messages = Vec::new();
        for _ in 0..2 {
            let error = node.pull(&want).await.expect_err("it is no tar");
            assert!(matches!(error.root(), PullError::Unpack(_)), "{error}");
            messages.push(error.to_string());
        }
        assert_eq!(messages[0], messages[1]);
        assert_eq!(registry.seen("blobs/").len(), 1);
    }

    #[tokio::test]
    async fn a_file_with_another_mode_is_copied_and_not_fetched_again() {
        if !is_root() {
            return;
        }
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        registry.artifact("a", &file_layer("file", b"text"), b"text");
        let want = registry.want("a");
        let plain = node.pull(&want).await.expect("a tree");
        let other = node
            .pull(&Want { shape: Shape { file_mode: Some(0o755), ..Shape::default() }, ..want })
            .await
            .expect("a tree");
        assert_ne!(plain.key, other.key);
        let files = node.folder.path().join("files");
        let stored = std::fs::read_dir(files).expect("files").flatten();
        let generations = stored.flat_map(|blob| std::fs::read_dir(blob.path()).expect("a folder"));
        assert_eq!(generations.count(), 2, "one of each mode");
        assert_eq!(registry.seen("blobs/").len(), 1);
    }
}
