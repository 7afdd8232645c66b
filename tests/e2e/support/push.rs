//! Content for registries: pushed by the clients of users, and by hand if no client makes the shape.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use super::{
    FakeRegistry, Registry, block_on, digest, gzip, proxy::install_tls_provider, run, tool,
};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const OCI_TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const OCI_TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";
pub const TITLE: &str = "org.opencontainers.image.title";

/// The oras client in a directory of files.
pub struct Oras {
    folder: tempfile::TempDir,
}

impl Oras {
    /// Creates an empty directory.
    #[track_caller]
    pub fn new() -> Self {
        Self {
            folder: tempfile::Builder::new()
                .prefix("e2e-oras")
                .tempdir_in("/var/tmp")
                .expect("a folder"),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Adds a file to push, with its directories.
    #[must_use]
    #[track_caller]
    pub fn file(self, name: &str, mode: u32, content: impl AsRef<[u8]>) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder to push");
        fs::write(&path, content).expect("a file to push");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("the file's mode");
        self
    }

    #[must_use]
    #[track_caller]
    pub fn link(self, name: &str, target: &str) -> Self {
        std::os::unix::fs::symlink(target, self.path().join(name)).expect("a link to push");
        self
    }

    /// Runs `oras push`. Returns the manifest's digest.
    #[track_caller]
    pub fn push(&self, reference: &str, arguments: &[&str]) -> String {
        let printed = run(self
            .command()
            .args(["push", "--plain-http", "--no-tty", reference])
            .args(arguments));
        pushed_digest(&printed)
    }

    /// Runs any other command of oras.
    #[track_caller]
    pub fn call(&self, arguments: &[&str]) -> String {
        run(self.command().args(arguments))
    }

    /// Runs `oras pull` into a new directory.
    #[track_caller]
    pub fn pull(reference: &str, arguments: &[&str]) -> tempfile::TempDir {
        let oras = Self::new();
        run(oras.command().args(["pull", "--plain-http", "--no-tty", reference]).args(arguments));
        oras.folder
    }

    fn command(&self) -> Command {
        let mut command = tool("oras");
        command.current_dir(self.path()).env("HOME", self.path()).env_remove("ORAS_CACHE");
        command
    }
}

#[track_caller]
fn pushed_digest(printed: &str) -> String {
    let line = printed.lines().find_map(|line| line.strip_prefix("Digest: "));
    line.unwrap_or_else(|| panic!("no digest in what oras printed: {printed}")).trim().to_owned()
}

/// A target for blobs and manifests.
pub trait Contents {
    fn put_blob(&self, repository: &str, bytes: &[u8]) -> String;
    fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String;
}

impl Contents for Registry {
    #[track_caller]
    fn put_blob(&self, repository: &str, bytes: &[u8]) -> String {
        put_blob(self, None, repository, bytes)
    }

    #[track_caller]
    fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String {
        put_manifest(self, None, &format!("{repository}/manifests/{tag}"), media_type, bytes)
    }
}

/// A registry that requires a password, with these credentials.
pub struct AsUser<'a> {
    registry: &'a Registry,
    user: &'a str,
    password: &'a str,
}

impl Registry {
    pub fn as_user<'a>(&'a self, user: &'a str, password: &'a str) -> AsUser<'a> {
        AsUser { registry: self, user, password }
    }
}

impl Contents for AsUser<'_> {
    #[track_caller]
    fn put_blob(&self, repository: &str, bytes: &[u8]) -> String {
        put_blob(self.registry, Some((self.user, self.password)), repository, bytes)
    }

    #[track_caller]
    fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String {
        let path = format!("{repository}/manifests/{tag}");
        put_manifest(self.registry, Some((self.user, self.password)), &path, media_type, bytes)
    }
}

type Credentials<'a> = Option<(&'a str, &'a str)>;

fn authorized(
    request: reqwest::RequestBuilder,
    credentials: Credentials<'_>,
) -> reqwest::RequestBuilder {
    match credentials {
        Some((user, password)) => request.basic_auth(user, Some(password)),
        None => request,
    }
}

#[track_caller]
fn put_blob(
    registry: &Registry,
    credentials: Credentials<'_>,
    repository: &str,
    bytes: &[u8],
) -> String {
    let name = digest(bytes);
    let start = format!("http://{}/v2/{repository}/blobs/uploads/", registry.address());
    block_on(async {
        let client = client();
        let started =
            authorized(client.post(start), credentials).send().await.expect("start an upload");
        assert!(started.status().is_success(), "starting an upload: {}", started.status());
        let location = started.headers()["location"].to_str().expect("a location").to_owned();
        let separator = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{separator}digest={name}");
        let put = authorized(client.put(url).body(bytes.to_vec()), credentials)
            .send()
            .await
            .expect("upload");
        assert!(put.status().is_success(), "uploading a blob: {}", put.status());
    });
    name
}

#[track_caller]
fn put_manifest(
    registry: &Registry,
    credentials: Credentials<'_>,
    path: &str,
    media_type: &str,
    bytes: &[u8],
) -> String {
    let url = format!("http://{}/v2/{path}", registry.address());
    block_on(async {
        let request = client().put(url).header("content-type", media_type).body(bytes.to_vec());
        let put = authorized(request, credentials).send().await.expect("put a manifest");
        let status = put.status();
        assert!(
            status.is_success(),
            "putting a manifest: {status}: {}",
            put.text().await.unwrap_or_default()
        );
    });
    digest(bytes)
}

impl Registry {
    /// Deletes a manifest with every tag of it. Its blobs stay.
    #[track_caller]
    pub fn delete_manifest(&self, repository: &str, digest: &str) {
        let url = format!("http://{}/v2/{repository}/manifests/{digest}", self.address());
        let status = block_on(async {
            client().delete(url).send().await.expect("delete a manifest").status()
        });
        assert!(status.is_success(), "deleting a manifest: {status}");
    }
}

impl Contents for FakeRegistry {
    fn put_blob(&self, _repository: &str, bytes: &[u8]) -> String {
        Self::put_blob(self, bytes.to_vec())
    }

    fn put_manifest(&self, _repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String {
        Self::put_manifest(self, tag, media_type, bytes.to_vec())
    }
}

fn client() -> reqwest::Client {
    install_tls_provider();
    reqwest::Client::builder().no_proxy().build().expect("an HTTP client")
}

/// A layer made by hand.
#[derive(Clone)]
pub struct Layer {
    pub media_type: String,
    pub bytes: Vec<u8>,
    pub annotations: Vec<(String, String)>,
    /// Put the content into the manifest, and nowhere else.
    pub inline: bool,
}

impl Layer {
    pub fn new(media_type: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            media_type: media_type.to_owned(),
            bytes: bytes.into(),
            annotations: Vec::new(),
            inline: false,
        }
    }

    /// Creates a file with its title.
    pub fn titled(title: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self::new("application/vnd.test.file.v1", bytes).annotation(TITLE, title)
    }

    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub fn inline(mut self) -> Self {
        self.inline = true;
        self
    }

    pub fn descriptor(&self) -> Value {
        let mut value = descriptor(&self.media_type, &self.bytes);
        for (key, text) in &self.annotations {
            value["annotations"][key] = json!(text);
        }
        if self.inline {
            use base64::Engine as _;
            value["data"] = json!(base64::engine::general_purpose::STANDARD.encode(&self.bytes));
        }
        value
    }
}

pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

/// Returns the empty configuration of OCI 1.1.
pub fn empty_config() -> Layer {
    Layer::new(EMPTY, "{}")
}

/// A manifest made by hand.
#[derive(Clone)]
pub struct Manifest {
    pub config: Layer,
    pub layers: Vec<Layer>,
    pub artifact_type: Option<String>,
}

impl Manifest {
    /// Creates an artifact of these layers.
    pub fn artifact(layers: impl IntoIterator<Item = Layer>) -> Self {
        Self {
            config: empty_config(),
            layers: layers.into_iter().collect(),
            artifact_type: Some("application/vnd.test.artifact.v1".to_owned()),
        }
    }

    /// Creates an artifact in the style of OCI 1.0: the configuration's type is the artifact's.
    pub fn with_config(config: Layer, layers: impl IntoIterator<Item = Layer>) -> Self {
        Self { config, layers: layers.into_iter().collect(), artifact_type: None }
    }

    pub fn json(&self) -> Value {
        let mut value = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.config.descriptor(),
            "layers": self.layers.iter().map(Layer::descriptor).collect::<Vec<_>>(),
        });
        if let Some(artifact_type) = &self.artifact_type {
            value["artifactType"] = json!(artifact_type);
        }
        value
    }

    /// Pushes blobs and manifest. Returns the manifest's digest.
    #[track_caller]
    pub fn push(&self, contents: &impl Contents, repository: &str, tag: &str) -> String {
        self.push_blobs(contents, repository);
        contents.put_manifest(repository, tag, OCI_MANIFEST, self.json().to_string().as_bytes())
    }

    #[track_caller]
    pub fn push_blobs(&self, contents: &impl Contents, repository: &str) {
        for blob in self.layers.iter().chain([&self.config]).filter(|blob| !blob.inline) {
            contents.put_blob(repository, &blob.bytes);
        }
    }
}

/// An ordinary image made by hand from uncompressed archives.
pub struct Image {
    layers: Vec<(Layer, String)>,
    platform: (String, String),
}

impl Image {
    pub fn new() -> Self {
        Self { layers: Vec::new(), platform: ("linux".to_owned(), node_architecture().to_owned()) }
    }

    #[must_use]
    pub fn platform(mut self, os: &str, architecture: &str) -> Self {
        self.platform = (os.to_owned(), architecture.to_owned());
        self
    }

    /// Adds a layer of this archive, compressed with gzip.
    #[must_use]
    pub fn layer(self, archive: Vec<u8>) -> Self {
        let compressed = gzip(&archive);
        self.packed_layer(OCI_TAR_GZIP, compressed, &archive)
    }

    /// Adds a layer of these bytes, which unpack to this archive.
    #[must_use]
    pub fn packed_layer(mut self, media_type: &str, bytes: Vec<u8>, archive: &[u8]) -> Self {
        self.layers.push((Layer::new(media_type, bytes), digest(archive)));
        self
    }

    pub fn manifest(&self) -> Manifest {
        let config = json!({
            "os": self.platform.0,
            "architecture": self.platform.1,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": self.layers.iter().map(|(_, id)| id).collect::<Vec<_>>()},
        });
        Manifest::with_config(
            Layer::new(OCI_CONFIG, config.to_string()),
            self.layers.iter().map(|(layer, _)| layer.clone()),
        )
    }

    #[track_caller]
    pub fn push(&self, contents: &impl Contents, repository: &str, tag: &str) -> String {
        self.manifest().push(contents, repository, tag)
    }
}

/// Pushes an index of these entries.
#[track_caller]
pub fn push_index(
    contents: &impl Contents,
    repository: &str,
    tag: &str,
    entries: &[Value],
) -> String {
    put_json(
        contents,
        repository,
        tag,
        &json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}),
    )
}

/// Pushes a manifest of any kind under the media type that it names.
#[track_caller]
pub fn put_json(contents: &impl Contents, repository: &str, tag: &str, manifest: &Value) -> String {
    let media_type = manifest["mediaType"].as_str().unwrap_or(OCI_MANIFEST);
    contents.put_manifest(repository, tag, media_type, manifest.to_string().as_bytes())
}

/// Returns this machine's architecture in OCI's spelling.
pub fn node_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Pushes an image of an OCI layout with skopeo.
#[track_caller]
pub fn copy_layout(layout: &Path, tag: &str, reference: &str, arguments: &[&str]) {
    run(skopeo()
        .args(["copy", "--quiet", "--dest-tls-verify=false"])
        .args(arguments)
        .arg(format!("oci:{}:{tag}", layout.display()))
        .arg(format!("docker://{reference}")));
}

/// Unpacks an image with umoci. Returns the directory of its files, and a value that keeps it.
#[track_caller]
pub fn umoci_unpack(reference: &str) -> (PathBuf, tempfile::TempDir) {
    let folder =
        tempfile::Builder::new().prefix("e2e-umoci").tempdir_in("/var/tmp").expect("a folder");
    let layout = folder.path().join("layout");
    run(skopeo()
        .args(["copy", "--quiet", "--src-tls-verify=false"])
        .arg(format!("docker://{reference}"))
        .arg(format!("oci:{}:image", layout.display())));
    let bundle = folder.path().join("bundle");
    run(tool("umoci")
        .arg("unpack")
        .arg("--image")
        .arg(format!("{}:image", layout.display()))
        .arg(&bundle));
    (bundle.join("rootfs"), folder)
}

fn skopeo() -> Command {
    let mut command = tool("skopeo");
    command.args(["--insecure-policy", "--tmpdir", "/var/tmp"]);
    command
}
