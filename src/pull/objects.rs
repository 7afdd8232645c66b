//! Blobs to objects of the store: a file, or an unpacked layer.

use std::collections::HashMap;
use std::fs::File;
use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::Inner;
use super::error::PullError;
use super::flights::Outcome;
use super::progress::Progress;
use super::resolve::blocking;
use super::room::layer_key;
use super::sponsors::Sponsors;
use super::transfer::{self, BlobGuard, Download, Order};
use super::unpacking::Job;
use crate::background::Background;
use crate::fault;
use crate::oci::manifest::Descriptor;
use crate::oci::{Digest, Repository};
use crate::store::files::{StoredFile, is_executable, starts_executable};
use crate::store::growth::Follower;
use crate::store::layers::{Layer, LayerTotals, LayerView, UnpackedLayer};
use crate::store::partial::Purpose;
use crate::store::{FileKey, LayerKey, StoreError};
use crate::unpack::layer_rule::ArchiveRule;
use crate::unpack::{Permissions, PermissionsRule};

/// Mode of content that is meant to be executed, where nothing else says.
const EXECUTABLE: Permissions = Permissions { mode: 0o555, uid: 0, gid: 0 };
/// Mode of all other content, where nothing else says.
const PLAIN: Permissions = Permissions { mode: 0o444, uid: 0, gid: 0 };

/// A file that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileWant {
    /// The blob.
    pub digest: Digest,
    /// Mode and owner; none means by content.
    pub permissions: Option<Permissions>,
}

/// A layer that is complete, and may still have to be synced and named.
#[derive(Clone)]
pub struct ReadyLayer {
    /// What trees link meanwhile.
    pub view: LayerView,
    /// What it adds up to.
    pub totals: LayerTotals,
    /// Its name; a tree has none before all of its layers do.
    named: Naming,
    /// Whether it is being named in the background.
    behind: bool,
}

/// Goes on whether anybody waits or not.
type Naming = Shared<BoxFuture<'static, Outcome<Layer>>>;

/// Who may work on a blob: one flight at a time, whatever it makes of it.
#[derive(Debug, Default)]
pub struct BlobLocks(Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>);

impl ReadyLayer {
    /// Waits until it has its name.
    pub async fn named(&self, background: &Background) -> Outcome<Layer> {
        let named = self.named.clone();
        if self.behind { background.hurried(named).await } else { named.await }
    }
}

impl BlobLocks {
    async fn lock(&self, digest: Digest) -> BlobGuard {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(&digest).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::new(tokio::sync::Mutex::new(()));
                locks.insert(digest, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

impl Inner {
    /// The file's key and inode, from the store or the registry.
    pub(super) async fn file(
        self: &Arc<Self>,
        descriptor: &Descriptor,
        permissions: Option<Permissions>,
        sponsors: &Arc<Sponsors>,
        (progress, number): (&Progress, usize),
    ) -> Result<StoredFile, Arc<PullError>> {
        let want = FileWant { digest: descriptor.digest, permissions };
        let file = loop {
            let mut started = false;
            let mut ticket = self.files.join(want, progress.priority(), |own| {
                started = true;
                own.expect(descriptor.size);
                let (inner, descriptor) = (Arc::clone(self), descriptor.clone());
                let sponsors = Arc::clone(sponsors);
                async move { inner.make_file(&descriptor, want, &sponsors, &own).await }
            });
            progress.wait_for(number, ticket.progress());
            match ticket.outcome().await {
                // Somebody else's source was of no use; ours may be.
                Err(error) if !started && error.is_of_source() => {}
                outcome => break outcome?,
            }
        };
        let (digest, expected) = (descriptor.digest, descriptor.size);
        let look = move || {
            let path = &file.path;
            let metadata =
                path.metadata().map_err(|error| StoreError::io("look at", path, error))?;
            // A warm node must not believe what a cold one would refuse.
            match metadata.len() {
                got if got != expected => Err(PullError::BlobSize { digest, expected, got }),
                _ => Ok(file),
            }
        };
        blocking(look).await.map_err(Arc::new)
    }

    /// The layer, from the store or the registry.
    pub(super) async fn layer(
        self: &Arc<Self>,
        descriptor: &Descriptor,
        rule: &ArchiveRule,
        permissions: PermissionsRule,
        sponsors: &Arc<Sponsors>,
        (progress, number): (&Progress, usize),
    ) -> Result<ReadyLayer, Arc<PullError>> {
        let key = layer_key(descriptor.digest, rule, permissions);
        loop {
            let mut started = false;
            let mut ticket = self.layers.join(key, progress.priority(), |own| {
                started = true;
                own.expect(descriptor.size);
                let (inner, descriptor) = (Arc::clone(self), descriptor.clone());
                let (job, sponsors) = (
                    self.unpackers.job(descriptor.digest, rule.clone(), permissions, &own),
                    Arc::clone(sponsors),
                );
                async move { inner.make_layer(&descriptor, job, key, &sponsors, &own).await }
            });
            progress.wait_for(number, ticket.progress());
            match ticket.outcome().await {
                // Somebody else's source was of no use; ours may be.
                Err(error) if !started && error.is_of_source() => {}
                outcome => return outcome,
            }
        }
    }

    async fn make_file(
        self: Arc<Self>,
        descriptor: &Descriptor,
        want: FileWant,
        sponsors: &Sponsors,
        progress: &Arc<Progress>,
    ) -> Result<StoredFile, PullError> {
        let guard = self.background.hurried(self.blobs.lock(want.digest)).await;
        let (inner, digest) = (Arc::clone(&self), want.digest);
        let unread = blocking(move || Ok(inner.store.unread_files(digest)?)).await?;
        self.read_before_use(unread, progress).await?;
        let inner = Arc::clone(&self);
        let data = descriptor.data.clone();
        let (known, guard) = blocking(move || {
            let known = inner.known_file(want, data.as_deref())?;
            Ok((known, guard))
        })
        .await?;
        if let Some(file) = known {
            progress.resumed(descriptor.size);
            return Ok(file);
        }
        let Download { partial, guard, repository, asked } =
            self.download((descriptor, Purpose::Keep), sponsors, progress, &|_| (), guard).await?;
        let inner = Arc::clone(&self);
        blocking(move || {
            verified(partial.path())?;
            let key = file_key(want, &mut partial.reader()?)?;
            let file = inner.store.commit_file(key, &partial)?;
            inner.remember_origin(&repository, asked, want.digest)?;
            drop(guard);
            Ok(file)
        })
        .await
    }

    /// What can be had without the registry: the file itself, a copy of the
    /// same content with another mode, or content that the manifest carries.
    fn known_file(
        &self,
        want: FileWant,
        data: Option<&[u8]>,
    ) -> Result<Option<StoredFile>, PullError> {
        let key = |permissions| FileKey { digest: want.digest, permissions };
        if let Some(data) = data {
            let by_content = if starts_executable(data) { EXECUTABLE } else { PLAIN };
            let key = key(want.permissions.unwrap_or(by_content));
            return match self.store.file(key)? {
                Some(file) => Ok(Some(file)),
                None => Ok(Some(self.store.commit_inline_file(key, data)?)),
            };
        }
        // Without a mode the content decides, and not what another volume has asked for.
        let Some(source) = self.store.any_file_of(want.digest)? else { return Ok(None) };
        let key = key_of(want, &source)?;
        if let Some(file) = self.store.file(key)? {
            return Ok(Some(file));
        }
        match self.store.copy_file(key, &source.path) {
            Ok(file) => Ok(Some(file)),
            // Then the registry is asked, as if it were not here.
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(%error, "a file of the store is damaged");
                self.store.mark_damaged(&source.path)?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn make_layer(
        self: Arc<Self>,
        descriptor: &Descriptor,
        job: Job,
        key: LayerKey,
        sponsors: &Sponsors,
        progress: &Arc<Progress>,
    ) -> Result<ReadyLayer, PullError> {
        let guard = self.background.hurried(self.blobs.lock(descriptor.digest)).await;
        let inner = Arc::clone(&self);
        let unread = blocking(move || Ok(inner.store.unread_layer(key)?)).await?;
        self.read_before_use(unread, progress).await?;
        let inner = Arc::clone(&self);
        let (known, guard) = blocking(move || {
            let known = inner.store.layer(key)?.map(|layer| (layer.totals(), layer));
            Ok((known, guard))
        })
        .await?;
        if let Some((totals, layer)) = known {
            progress.resumed(descriptor.size);
            let view = layer.view();
            let named = std::future::ready(Ok(layer)).boxed().shared();
            return Ok(ReadyLayer { view, totals, named, behind: false });
        }
        if let Some(data) = descriptor.data.clone() {
            progress.resumed(descriptor.size);
            let writer = job.finish(move || Ok(Cursor::new(data.clone()))).await?;
            let inner = Arc::clone(&self);
            let unpacked = blocking(move || Ok(inner.store.finish_layer(key, writer)?)).await?;
            return self.name_layer(unpacked, guard, |_| Ok(()));
        }
        if let Some((_, source)) = sponsors.current()
            && let Some(refusal) = self.unpackers.refusal(&source.repository.to_string(), key)
        {
            return Err(PullError::Shared(refusal));
        }
        let follow = |follower| job.follow(follower);
        let Download { partial, guard, repository, asked } = self
            .download((descriptor, Purpose::Unpack), sponsors, progress, &follow, guard)
            .await?;
        let path = partial.path().to_owned();
        let open = move || File::open(&path).map_err(|error| StoreError::io("open", &path, error));
        let unpacked = job.finish(open).await;
        let (inner, from) = (Arc::clone(&self), repository.clone());
        let unpacked = blocking(move || {
            verified(partial.path())?;
            match unpacked {
                Ok(writer) => {
                    let unpacked = inner.store.finish_layer(key, writer)?;
                    // Before the sync, which would only write it. Where that fails nothing says
                    // that these bytes, which were never synced, are any better.
                    partial.discard()?;
                    Ok(unpacked)
                }
                // What was refused would be refused again: nothing of it is kept.
                Err(error) if matches!(error.root(), PullError::Unpack(_)) => {
                    partial.discard()?;
                    Err(inner.remember_refusal(&from, key, error))
                }
                // The blob is right, and only the disk was not: it need not be fetched again, and
                // what was imported cannot be. Where the disk is full it is in nobody's way: a
                // download that nobody works on is the first to go for whoever wants room.
                Err(error) => Err(error),
            }
        })
        .await;
        let digest = descriptor.digest;
        let named = move |inner: &Self| inner.remember_origin(&repository, asked, digest);
        match unpacked {
            Ok(unpacked) => self.name_layer(unpacked, guard, named),
            Err(error) => {
                // It did come from there.
                let inner = Arc::clone(&self);
                blocking(move || named(&inner)).await?;
                Err(error)
            }
        }
    }

    /// Begins to sync and name a layer, and does not wait for it. The blob is free again when that
    /// has ended: whoever wants it then finds the layer.
    fn name_layer(
        self: &Arc<Self>,
        unpacked: UnpackedLayer,
        guard: BlobGuard,
        named: impl FnOnce(&Self) -> Result<(), PullError> + Send + 'static,
    ) -> Result<ReadyLayer, PullError> {
        let (view, totals, inner) = (unpacked.view()?, unpacked.totals(), Arc::clone(self));
        let naming = tokio::task::spawn_blocking(move || {
            let layer = inner.store.commit_layer(unpacked)?;
            named(&inner)?;
            drop(guard);
            Ok(layer)
        });
        let outcome = async move {
            let named = naming.await.unwrap_or(Err(PullError::Crashed));
            named.map_err(Arc::new)
        };
        let (named, behind) = (outcome.boxed().shared(), Background::is_here());
        Ok(ReadyLayer { view, totals, named, behind })
    }

    /// What the content's bytes are refused for they are refused for again: they need not be fetched for it.
    fn remember_refusal(
        &self,
        repository: &Repository,
        key: LayerKey,
        error: PullError,
    ) -> PullError {
        let error = Arc::new(error);
        self.unpackers.refuse(&repository.to_string(), key, &error);
        PullError::Shared(error)
    }

    fn remember_origin(
        &self,
        repository: &Repository,
        asked: bool,
        digest: Digest,
    ) -> Result<(), PullError> {
        if asked {
            self.store.put_blob_origin(repository, digest)?;
        } else {
            self.store.put_host_origin(repository.host(), digest)?;
        }
        Ok(())
    }

    async fn download(
        &self,
        (descriptor, purpose): (&Descriptor, Purpose),
        sponsors: &Sponsors,
        progress: &Arc<Progress>,
        follow: &(dyn Fn(Follower) + Send + Sync),
        guard: BlobGuard,
    ) -> Result<Download, PullError> {
        let blob = (descriptor.digest, descriptor.size);
        let order = Order { blob, purpose, sponsors, progress, follow };
        transfer::fetch(&self.store, &self.wire, &order, guard).await
    }
}

/// A download is complete, and its content about to get a name.
fn verified(download: &std::path::Path) -> Result<(), PullError> {
    let passed = fault::point("download.verified");
    Ok(passed.map_err(|error| StoreError::io("finish", download, error))?)
}

/// What is wanted, where its content is here with this mode or another.
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
