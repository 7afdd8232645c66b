//! Blobs to objects of the store: a file, or an unpacked layer.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Cursor;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::Inner;
use super::error::PullError;
use super::flights::Outcome;
use super::origins::BlobOrigin;
use super::progress::Progress;
use super::resolve::blocking;
use super::room::layer_key;
use super::sponsors::Sponsors;
use super::transfer::{self, BlobGuard, Download, Order, TransferOutcome};
use super::unpacking::Job;
use oci::manifest::Descriptor;
use oci::{Digest, Repository};
use store::access::ProofSource;
use store::files::{StoredFile, is_executable, starts_executable};
use store::growth::Follower;
use store::layers::{Layer, LayerTotals, LayerView, UnpackedLayer};
use store::partial::Purpose;
use store::{FileKey, LayerKey, ObjectName, StoreError};
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

/// The outcome of one attempt to get a blob.
type Attempt<T> = Result<T, AttemptEnd>;

/// The reason why an attempt ended without the blob.
enum AttemptEnd {
    /// Another repository is the source now, or this one cannot continue the bytes of others. The
    /// next attempt finds the content in the store, or continues a download.
    Retry {
        /// The repository has to download the blob by itself from now on.
        isolated: bool,
    },
    Failed(PullError),
}

/// The right to work on a blob for one repository.
struct Turn {
    guard: BlobGuard,
    origin: BlobOrigin,
    /// Who has given it for the repository while others worked on it.
    given_by: BTreeSet<ProofSource>,
}

impl From<PullError> for AttemptEnd {
    fn from(error: PullError) -> Self {
        Self::Failed(error)
    }
}

/// Repeats an attempt until it has the blob or fails. The attempt is told whether the repository has
/// to download the blob by itself.
async fn retry<T, F>(attempt: impl Fn(bool) -> F) -> Result<T, PullError>
where
    F: Future<Output = Attempt<T>>,
{
    let mut is_isolated = false;
    loop {
        match attempt(is_isolated).await {
            Ok(done) => return Ok(done),
            Err(AttemptEnd::Retry { isolated }) => is_isolated |= isolated,
            Err(AttemptEnd::Failed(error)) => return Err(error),
        }
    }
}

impl ReadyLayer {
    /// Waits until it has its name.
    pub async fn named(&self, background: &Background) -> Outcome<Layer> {
        let named = self.named.clone();
        if self.behind { background.boost_while(named).await } else { named.await }
    }
}

impl Inner {
    /// Returns a file of the store, which it fetches if needed. A stored file that has another size than the manifest
    /// says is read back: if it is damaged, it is fetched again.
    pub(super) async fn file(
        self: &Arc<Self>,
        descriptor: &Descriptor,
        permissions: Option<Permissions>,
        sponsors: &Arc<Sponsors>,
        progress: &Progress,
        number: usize,
    ) -> Result<StoredFile, Arc<PullError>> {
        let (digest, expected) = (descriptor.digest, descriptor.size);
        let mut was_damaged = false;
        loop {
            let (got, file) =
                self.file_and_size(descriptor, permissions, sponsors, progress, number).await?;
            if got == expected {
                return Ok(file);
            }
            // A warm node must not believe what a cold one would refuse.
            let name = ObjectName::file(file.key, file.generation);
            drop(file);
            if was_damaged || self.read_before_use([name], progress).await.map_err(Arc::new)? {
                return Err(PullError::BlobSize { digest, expected, got }.into());
            }
            was_damaged = true;
        }
    }

    /// Returns a file of the store and its size.
    async fn file_and_size(
        self: &Arc<Self>,
        descriptor: &Descriptor,
        permissions: Option<Permissions>,
        sponsors: &Arc<Sponsors>,
        progress: &Progress,
        number: usize,
    ) -> Result<(u64, StoredFile), Arc<PullError>> {
        let want = FileWant { digest: descriptor.digest, permissions };
        let file = loop {
            let mut started = false;
            let key = (sponsors.repository().clone(), want);
            let mut ticket = self.files.join(key, progress.caller(), |own| {
                started = true;
                own.expect(descriptor.size);
                let (inner, descriptor) = (Arc::clone(self), descriptor.clone());
                let sponsors = Arc::clone(sponsors);
                async move { inner.make_file(&descriptor, want, &sponsors, &own).await }
            });
            progress.wait_for(number, ticket.progress());
            match ticket.outcome().await {
                // Somebody else's source was of no use; ours may be.
                // The source of a flight that had begun before failed. That of this call may not.
                Err(error) if !started && error.is_of_source() => {}
                outcome => break outcome?,
            }
        };
        let look = move || {
            let path = &file.path;
            let metadata =
                path.metadata().map_err(|error| StoreError::io("look at", path, error))?;
            Ok((metadata.len(), file))
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
            let of = (sponsors.repository().clone(), key);
            let mut ticket = self.layers.join(of, progress.caller(), |own| {
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
        if let Some(data) = descriptor.data.clone() {
            self.read_files_before_use(want.digest, progress).await?;
            let _naming = self.background.boost_while(self.blobs.lock(want.digest)).await;
            progress.resumed(descriptor.size);
            let inner = Arc::clone(&self);
            return blocking(move || inner.inline_file(want, &data)).await;
        }
        let work = (descriptor, Purpose::Keep, sponsors, progress);
        retry(|isolated| self.fetch_file(work, want, isolated)).await
    }

    /// Gets the blob of a file from the repository, in one attempt.
    async fn fetch_file(
        self: &Arc<Self>,
        work: Work<'_>,
        want: FileWant,
        isolated: bool,
    ) -> Attempt<StoredFile> {
        let (_, _, sponsors, progress) = work;
        let mut turn = self.turn(work, isolated).await?;
        let inner = Arc::clone(self);
        let held = blocking(move || Ok(inner.store.any_file_of(want.digest)?)).await?;
        if held.is_some() {
            let guard = self.prove(work, turn).await?;
            self.read_files_before_use(want.digest, progress).await?;
            let _naming = self.background.boost_while(self.blobs.lock(want.digest)).await;
            let inner = Arc::clone(self);
            let known = blocking(move || {
                let known = inner.known_file(want)?;
                drop(held);
                Ok(known)
            })
            .await?;
            if let Some(file) = known {
                return Ok(file);
            }
            turn = Turn { guard, origin: BlobOrigin::Repository, given_by: BTreeSet::new() };
        }
        let Download { partial, guard, given_by } = self.download(work, &|_| (), turn).await?;
        let naming = self.background.boost_while(self.blobs.lock(want.digest)).await;
        let (inner, repository) = (Arc::clone(self), sponsors.repository().clone());
        let named = blocking(move || {
            verified(partial.path())?;
            // Whether it gets its name or not.
            inner.remember_origin(&repository, want.digest, &given_by)?;
            let key = file_key(want, &mut partial.reader()?)?;
            let file = match inner.store.file(key)? {
                None => inner.store.commit_file(key, &partial)?,
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

    /// Content that the manifest carries.
    fn inline_file(&self, want: FileWant, data: &[u8]) -> Result<StoredFile, PullError> {
        let by_content = if starts_executable(data) { EXECUTABLE } else { PLAIN };
        let permissions = want.permissions.unwrap_or(by_content);
        let key = FileKey { digest: want.digest, permissions };
        Ok(match self.store.file(key)? {
            Some(file) => file,
            None => self.store.commit_inline_file(key, data)?,
        })
    }

    /// What can be made of content that is here: the file itself, or a copy with another mode.
    fn known_file(&self, want: FileWant) -> Result<Option<StoredFile>, PullError> {
        let Some(source) = self.store.any_file_of(want.digest)? else { return Ok(None) };
        // Without a mode the content decides, and not what another volume has asked for.
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
        let digest = descriptor.digest;
        if let Some(data) = descriptor.data.clone() {
            self.read_layer_before_use(key, progress).await?;
            let naming = self.background.boost_while(self.blobs.lock(digest)).await;
            progress.resumed(descriptor.size);
            let inner = Arc::clone(&self);
            if let Some(layer) = blocking(move || Ok(inner.store.layer(key)?)).await? {
                return ready(layer).await;
            }
            let writer = job.finish(move || Ok(Cursor::new(data.clone()))).await?;
            let inner = Arc::clone(&self);
            let unpacked = blocking(move || Ok(inner.store.finish_layer(key, writer)?)).await?;
            return self.name_layer(unpacked, naming, |_| Ok(()));
        }
        let work = (descriptor, Purpose::Unpack, sponsors, progress);
        retry(|isolated| self.fetch_layer(work, &job, key, isolated)).await
    }

    /// Gets the blob of a layer from the repository and unpacks it, in one attempt.
    async fn fetch_layer(
        self: &Arc<Self>,
        work: Work<'_>,
        job: &Job,
        key: LayerKey,
        isolated: bool,
    ) -> Attempt<ReadyLayer> {
        let (_, _, sponsors, progress) = work;
        let mut turn = self.turn(work, isolated).await?;
        let inner = Arc::clone(self);
        let held = blocking(move || Ok(inner.store.layer(key)?)).await?;
        if held.is_some() {
            let guard = self.prove(work, turn).await?;
            self.read_layer_before_use(key, progress).await?;
            let inner = Arc::clone(self);
            if let Some(layer) = blocking(move || Ok(inner.store.layer(key)?)).await? {
                return Ok(ready(layer).await?);
            }
            // It was found damaged, and is fetched as if it were not here.
            turn = Turn { guard, origin: BlobOrigin::Repository, given_by: BTreeSet::new() };
        }
        let repository = sponsors.repository();
        if let Some(refusal) = self.unpackers.refusal(&repository.to_string(), key) {
            return Err(PullError::Shared(refusal).into());
        }
        let follow = |follower| job.follow(follower);
        let download = self.download(work, &follow, turn).await?;
        Ok(self.unpack(download, job, key, repository).await?)
    }

    /// Unpacks a verified download, and begins to name the layer.
    async fn unpack(
        self: &Arc<Self>,
        download: Download,
        job: &Job,
        key: LayerKey,
        repository: &Repository,
    ) -> Result<ReadyLayer, PullError> {
        let Download { partial, guard, given_by } = download;
        let (repository, digest) = (repository.clone(), job.blob());
        let path = partial.path().to_owned();
        let open = move || File::open(&path).map_err(|error| StoreError::io("open", &path, error));
        let unpacked = job.finish(open).await;
        let naming = self.background.boost_while(self.blobs.lock(digest)).await;
        let (inner, from) = (Arc::clone(self), repository.clone());
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
        let named = move |inner: &Self| inner.remember_origin(&repository, digest, &given_by);
        match unpacked {
            Ok(unpacked) => {
                let inner = Arc::clone(self);
                let Some(layer) = blocking(move || Ok(inner.store.layer(key)?)).await? else {
                    return self.name_layer(unpacked, (guard, naming), named);
                };
                // Another host has sent it meanwhile.
                let inner = Arc::clone(self);
                blocking(move || {
                    drop(unpacked);
                    named(&inner)
                })
                .await?;
                ready(layer).await
            }
            Err(error) => {
                // It did come from there.
                let inner = Arc::clone(self);
                blocking(move || named(&inner)).await?;
                Err(error)
            }
        }
    }

    /// What an earlier format has left of a file is read back once, before the first use.
    async fn read_files_before_use(
        self: &Arc<Self>,
        blob: Digest,
        progress: &Arc<Progress>,
    ) -> Result<(), PullError> {
        let inner = Arc::clone(self);
        let unread = blocking(move || Ok(inner.store.unread_files(blob)?)).await?;
        // One that is damaged has been marked: the next look does not find it.
        self.read_before_use(unread, progress).await.map(|_| ())
    }

    /// As [`Self::read_files_before_use`], of a layer.
    async fn read_layer_before_use(
        self: &Arc<Self>,
        key: LayerKey,
        progress: &Arc<Progress>,
    ) -> Result<(), PullError> {
        let inner = Arc::clone(self);
        let unread = blocking(move || Ok(inner.store.unread_layer(key)?)).await?;
        // One that is damaged has been marked: the next look does not find it.
        self.read_before_use(unread, progress).await.map(|_| ())
    }

    /// Begins to sync and name a layer, and does not wait for it. The blob is free again when that
    /// has ended: whoever wants it then finds the layer.
    fn name_layer(
        self: &Arc<Self>,
        unpacked: UnpackedLayer,
        guards: impl Send + 'static,
        named: impl FnOnce(&Self) -> Result<(), PullError> + Send + 'static,
    ) -> Result<ReadyLayer, PullError> {
        let (view, totals, inner) = (unpacked.view()?, unpacked.totals(), Arc::clone(self));
        let naming = tokio::task::spawn_blocking(move || {
            let layer = inner.store.commit_layer(unpacked)?;
            named(&inner)?;
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

    /// Waits for the right to work on a blob. While a flight of another repository of the host has
    /// it, waits only after this repository has given the blob, too. So a caller without access is
    /// refused at once, whether the blob is under way or not. With `isolated` the download is the
    /// repository's own.
    async fn turn(self: &Arc<Self>, work: Work<'_>, isolated: bool) -> Result<Turn, PullError> {
        let (descriptor, _, sponsors, progress) = work;
        let (repository, digest) = (sponsors.repository(), descriptor.digest);
        let host = repository.host();
        let mut given_by = BTreeSet::new();
        let of_repository = self.proving.lock((repository.clone(), digest));
        let of_repository = self.background.boost_while(of_repository).await;
        let shared = self.downloads.of(host, digest);
        let mut turn = None;
        if !isolated && !self.downloads.is_isolated(host, digest) {
            turn = shared.try_take(progress);
            if turn.is_none() {
                if self.look_up_origin(repository, digest).await? != BlobOrigin::Repository {
                    given_by = self.ask_for(work).await?;
                }
                let waits = shared.wait(repository, progress);
                turn = Some(self.background.boost_while(waits).await);
            }
            // The sources may have been isolated meanwhile.
            turn = turn.filter(|_| !self.downloads.is_isolated(host, digest));
        }
        let origin = self.look_up_origin(repository, digest).await?;
        let guard = BlobGuard { _repository: of_repository, turn };
        Ok(Turn { guard, origin, given_by })
    }

    /// Sees to it that the repository gives a blob that is in the store (see [`super::origins`]),
    /// and remembers who has given it.
    async fn prove(self: &Arc<Self>, work: Work<'_>, turn: Turn) -> Attempt<BlobGuard> {
        let (descriptor, _, sponsors, progress) = work;
        let (guard, given_by) = match turn {
            Turn { guard, origin: BlobOrigin::Repository, .. } => {
                progress.resumed(descriptor.size);
                return Ok(guard);
            }
            Turn { guard, origin: BlobOrigin::Host, given_by } => {
                let is_given = !given_by.is_empty();
                let given_by = if is_given { given_by } else { self.ask_for(work).await? };
                progress.resumed(descriptor.size);
                (guard, given_by)
            }
            // Another host has to send the bytes themselves: naming a digest proves nothing.
            turn => {
                let download = self.download(work, &|_| (), turn).await?;
                let Download { partial, guard, given_by } = download;
                blocking(move || Ok(partial.discard()?)).await?;
                (guard, given_by)
            }
        };
        let (inner, repository) = (Arc::clone(self), sponsors.repository().clone());
        let digest = descriptor.digest;
        blocking(move || inner.remember_origin(&repository, digest, &given_by)).await?;
        Ok(guard)
    }

    /// Asks the repository for a blob; says who has given it.
    async fn ask_for(&self, work: Work<'_>) -> Result<BTreeSet<ProofSource>, PullError> {
        let (descriptor, _, sponsors, progress) = work;
        let blob = (descriptor.digest, descriptor.size);
        let mut last = PullError::Unwanted;
        while let Some((number, source)) = sponsors.current() {
            let of = (blob, sponsors.number());
            match transfer::ask(&self.wire, &source, of, progress).await {
                Err(error) if error.is_of_source() => last = sponsors.refused(number, error),
                done => return done,
            }
        }
        Err(last)
    }

    async fn download(
        &self,
        work: Work<'_>,
        follow: &(dyn Fn(Follower) + Send + Sync),
        turn: Turn,
    ) -> Attempt<Download> {
        let (descriptor, purpose, sponsors, progress) = work;
        let Turn { guard, origin, given_by } = turn;
        let blob = (descriptor.digest, descriptor.size);
        let order = Order { blob, purpose, sponsors, progress, follow };
        let mut download = match transfer::fetch(&self.store, &self.wire, &order, guard).await? {
            TransferOutcome::Complete(download) => *download,
            TransferOutcome::TurnLost => return Err(AttemptEnd::Retry { isolated: false }),
            TransferOutcome::Isolated { is_wrong } => {
                if is_wrong {
                    self.downloads.isolate(sponsors.repository().host(), descriptor.digest);
                }
                return Err(AttemptEnd::Retry { isolated: true });
            }
        };
        if download.given_by.is_empty() {
            // All bytes were here from an earlier try, of whichever repository of the host.
            download.given_by = match origin {
                BlobOrigin::Repository => given_by,
                _ if !given_by.is_empty() => given_by,
                _ => self.ask_for(work).await?,
            };
            progress.resumed(descriptor.size);
        }
        Ok(download)
    }
}

/// A blob, what becomes of it, whose credentials pay, and how far it is.
type Work<'a> = (&'a Descriptor, Purpose, &'a Sponsors, &'a Arc<Progress>);

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
