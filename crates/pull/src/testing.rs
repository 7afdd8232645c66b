//! A registry on 127.0.0.1 and a node with a store in a temporary directory, for tests.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::Response;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::blob_transfer::{BlobRequest, Download};
use super::credential_offers::{Source, Sponsors};
use super::download_resources::Unobserved;
use super::downloader::retry;
use super::memory::MemoryPlan;
use super::single_flight::Runway;
use super::{
    Priority, ProgressView, PullError, PullOptions, Puller, SizedBlob, Sources, Tenant,
    Verification, Want,
};
use oci::credentials::providers::{NodeCredentials, ProviderFiles};
use oci::credentials::{Credential, Keyring};
use oci::registry::{Registry, RegistryOptions};
use oci::{Digest, Platform, Reference};
use store::partial_downloads::Purpose;
use store::{CacheOptions, Store, StoreOptions, Tree};
use sys::background::Background;
use unpack::Limits;

pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// A request for a manifest or a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) repository: String,
    /// `manifests/<name>` or `blobs/<digest>`.
    pub(super) object: String,
    /// The first byte of the wanted range.
    pub(super) start: Option<usize>,
    pub(super) authorization: Option<String>,
}

/// Answers in place of the registry.
type Hook = Box<dyn Fn(&Seen) -> Option<Response> + Send>;

#[derive(Default)]
struct Content {
    /// The objects by path below `/v2/`, with their media types.
    objects: HashMap<String, (String, Vec<u8>)>,
    seen: Vec<Seen>,
    hook: Option<Hook>,
}

/// A registry that keeps its content in memory, and counts requests.
pub(super) struct TestRegistry {
    address: String,
    content: Arc<Mutex<Content>>,
}

impl TestRegistry {
    pub(super) async fn start() -> Self {
        let content: Arc<Mutex<Content>> = Arc::default();
        let served = Arc::clone(&content);
        let serve = move |request: Request| {
            let answer = served.lock().answer(&request);
            async { answer }
        };
        let router = axum::Router::new().fallback(serve);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, content }
    }

    pub(super) fn answer_with(&self, hook: impl Fn(&Seen) -> Option<Response> + Send + 'static) {
        self.content.lock().hook = Some(Box::new(hook));
    }

    /// Returns all requests for objects whose path has this beginning.
    pub(super) fn seen(&self, object: &str) -> Vec<Seen> {
        let content = self.content.lock();
        content.seen.iter().filter(|seen| seen.object.starts_with(object)).cloned().collect()
    }

    pub(super) fn blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = format!("{repository}/blobs/{digest}");
        let kind = "application/octet-stream".to_owned();
        self.content.lock().objects.insert(path, (kind, bytes.to_vec()));
        digest
    }

    /// Adds a manifest or an index under its digest and under a tag.
    pub(super) fn manifest(&self, repository: &str, tag: &str, kind: &str, text: &str) -> Digest {
        let digest = Digest::of(text.as_bytes());
        for name in [tag.to_owned(), digest.to_string()] {
            let object = (kind.to_owned(), text.as_bytes().to_vec());
            self.content.lock().objects.insert(format!("{repository}/manifests/{name}"), object);
        }
        digest
    }

    /// Adds an artifact with one layer, and its blob.
    pub(super) fn artifact(&self, repository: &str, layer: &str, bytes: &[u8]) -> Digest {
        self.blob(repository, bytes);
        self.manifest(repository, "latest", MANIFEST, &image(&[layer.to_owned()]))
    }

    pub(super) fn reference(&self, repository: &str) -> Reference {
        format!("{}/{repository}:latest", self.address).parse().expect("a reference")
    }

    /// Returns the wish of a pod for an artifact of this registry.
    pub(super) fn want(&self, repository: &str) -> Want {
        let tenant = Tenant::Namespace("team".into());
        let platform = Platform::of_this_node();
        let priority = Priority::Pod;
        Want { priority, ..Want::of_node(self.reference(repository), platform, tenant) }
    }

    /// Returns credentials for this registry, each for a path and as `auth` of a docker configuration.
    pub(super) fn keyring(&self, entries: &[(&str, &str)]) -> Keyring {
        let entry = |(path, auth): &(&str, &str)| {
            format!(r#""{}{path}":{{"auth":"{auth}"}}"#, self.address)
        };
        let entries: Vec<_> = entries.iter().map(entry).collect();
        let config = format!(r#"{{"auths":{{{}}}}}"#, entries.join(","));
        Keyring::from_docker_config(config.as_bytes()).expect("a docker configuration")
    }
}

impl Content {
    fn answer(&mut self, request: &Request) -> Response {
        let path = request.uri().path().trim_start_matches("/v2/").to_owned();
        let place =
            ["/manifests/", "/blobs/", "/referrers/"].iter().find_map(|kind| path.find(kind));
        let Some(place) = place else { return empty(StatusCode::OK) };
        let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
        let range = header(header::RANGE).and_then(|range| range.strip_prefix("bytes="));
        let seen = Seen {
            repository: path[..place].to_owned(),
            object: path[place + 1..].to_owned(),
            start: range.and_then(|range| range.split('-').next()?.parse().ok()),
            authorization: header(header::AUTHORIZATION).map(str::to_owned),
        };
        self.seen.push(seen.clone());
        if let Some(answer) = self.hook.as_ref().and_then(|hook| hook(&seen)) {
            return answer;
        }
        match self.objects.get(&path) {
            None => empty(StatusCode::NOT_FOUND),
            Some((kind, bytes)) => {
                let start = seen.start.unwrap_or_default();
                let answer = Response::builder().header(header::CONTENT_TYPE, kind);
                let answer = match seen.start {
                    None => answer,
                    Some(start) => answer.status(StatusCode::PARTIAL_CONTENT).header(
                        header::CONTENT_RANGE,
                        format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()),
                    ),
                };
                answer.body(Body::from(bytes[start..].to_vec())).expect("an answer")
            }
        }
    }
}

pub(super) fn empty(status: StatusCode) -> Response {
    Response::builder().status(status).body(Body::empty()).expect("an answer")
}

/// Sends some bytes of a body, and breaks off.
pub(super) fn broken(sent: Vec<u8>, size: usize) -> Response {
    let sent = stream::once(async { Ok(Bytes::from(sent)) });
    let breaks = stream::once(async {
        // The server writes its buffer to the socket whenever the body has nothing ready.
        tokio::task::yield_now().await;
        Err(std::io::Error::other("broken"))
    });
    let body = Body::from_stream(sent.chain(breaks));
    Response::builder().header(header::CONTENT_LENGTH, size).body(body).expect("an answer")
}

/// Returns a descriptor with further fields.
pub(super) fn descriptor(kind: &str, bytes: &[u8], more: &str) -> String {
    let (digest, size) = (Digest::of(bytes), bytes.len());
    format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{size}{more}}}"#)
}

/// Returns the descriptor of a layer that is a file of this name.
pub(super) fn file_layer(name: &str, bytes: &[u8]) -> String {
    let title = format!(r#","annotations":{{"org.opencontainers.image.title":"{name}"}}"#);
    descriptor("application/octet-stream", bytes, &title)
}

/// Returns a manifest of layers.
pub(super) fn image(layers: &[String]) -> String {
    let config = descriptor("application/vnd.oci.empty.v1+json", b"{}", r#","data":"e30=""#);
    let layers = layers.join(",");
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"application/vnd.test","config":{config},"layers":[{layers}]}}"#
    )
}

pub(super) fn index(entries: &[String]) -> String {
    format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#, entries.join(","))
}

/// Returns a tar of files.
pub(super) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *content).expect("in memory");
    }
    archive.into_inner().expect("in memory")
}

/// Returns whether this process may give files to their owners, which names in the store need.
pub(super) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// A store that does not depend on how full the machine's disk is.
pub(super) fn store_in(folder: &std::path::Path) -> Store {
    let cache =
        CacheOptions { min_free_percent: 0, min_free_inodes_percent: 0, ..Default::default() };
    Store::open(folder, StoreOptions { cache, ..StoreOptions::default() }).expect("a store")
}

/// Returns an environment of flights that nothing stops.
pub(super) fn runway() -> Runway {
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    Runway { tracker, shutdown, background: Background::none() }
}

/// A node with an empty store.
pub(super) struct TestNode {
    pub(super) folder: TempDir,
    pub(super) puller: Puller,
}

impl TestNode {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = store_in(folder.path());
        let sources = Sources {
            registry: Registry::new(RegistryOptions::default()).expect("a client"),
            node_credentials: NodeCredentials::new(ProviderFiles {
                docker_config: None,
                plugins: None,
                timeout: Duration::ZERO,
                annotations: Vec::new(),
            }),
            verification: Verification::default(),
            limits: Limits::default(),
        };
        let options = PullOptions {
            attempts: 3,
            first_delay: Duration::from_millis(1),
            memory: Some(MemoryPlan::default_bytes(None)),
            ..PullOptions::default()
        };
        let puller = Puller::new(store, sources, options, Arc::new(Unobserved), &runway());
        Self { folder, puller }
    }

    /// Downloads a blob, and makes nothing of it.
    pub(super) async fn download(
        &self,
        registry: &TestRegistry,
        repository: &str,
        bytes: &[u8],
    ) -> Result<Download, PullError> {
        let repository = registry.reference(repository).repository().clone();
        let sponsors = Arc::new(Sponsors::new(repository.clone()));
        let _offer = sponsors.offer(Source { repository, credential: Credential::Anonymous });
        let request = BlobRequest {
            blob: SizedBlob { digest: Digest::of(bytes), size: bytes.len() as u64 },
            purpose: Purpose::Keep,
            sponsors: &sponsors,
            progress: &Arc::default(),
            follow: &|_| (),
        };
        let downloader = &self.puller.0.importer.downloader;
        retry(|isolated| async move {
            let turn = downloader.turn(request, isolated).await?;
            downloader.download(request, turn).await
        })
        .await
    }

    pub(super) async fn pull(&self, want: &Want) -> Result<Tree, Arc<PullError>> {
        self.puller.acquire(want, &ProgressView::default()).await
    }
}
