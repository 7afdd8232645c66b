//! A TUF repository like those of Sigstore instances, signed here and served over HTTP.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use ring::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use serde_json::{Value, json};

use super::{Answer, AnswerBody, FakeRegistry, hexadecimal_sha256};

/// A time that no test sees.
pub const FAR: &str = "2999-01-01T00:00:00Z";
/// A time that every test is after.
pub const PAST: &str = "2020-01-01T00:00:00Z";

/// A key for all roles.
pub struct TufKey(Ed25519KeyPair);

/// A repository with one target, `trusted_root.json`.
pub struct TufRepository {
    server: FakeRegistry,
    files: Arc<Mutex<BTreeMap<String, Answer>>>,
    /// The key of the newest root.
    key: TufKey,
    root: u64,
}

/// A release of the target.
#[derive(Clone, Copy)]
pub struct Release<'a> {
    pub timestamp: u64,
    pub snapshot: u64,
    pub targets: u64,
    pub expires: &'a str,
    pub content: &'a [u8],
}

impl<'a> Release<'a> {
    /// Returns a release whose metadata all has this version.
    pub fn new(version: u64, content: &'a [u8]) -> Self {
        Self { timestamp: version, snapshot: version, targets: version, expires: FAR, content }
    }
}

impl TufKey {
    pub fn new() -> Self {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        Self(Ed25519KeyPair::from_pkcs8(key.as_ref()).expect("a key"))
    }

    fn public(&self) -> Value {
        let public = hex(self.0.public_key().as_ref());
        json!({"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public}})
    }

    fn id(&self) -> String {
        hexadecimal_sha256(self.public().to_string().as_bytes())
    }
}

impl TufRepository {
    /// Starts a repository with its first root and a first release.
    pub fn start(content: &[u8]) -> Self {
        let (server, key) = (FakeRegistry::new(), TufKey::new());
        let files = Arc::<Mutex<BTreeMap<String, Answer>>>::default();
        let shared = Arc::clone(&files);
        server.script(move |request| {
            let files = shared.lock().expect("the files");
            let missing = || Answer::status(404);
            Some(files.get(&request.path).cloned().unwrap_or_else(missing))
        });
        let mut repository = Self { server, files, key, root: 0 };
        repository.add_root(None);
        repository.release(&Release::new(1, content));
        repository
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.server.host())
    }

    /// Writes the first root into a folder, as an administrator gets it.
    pub fn first_root(&self, folder: &Path) -> PathBuf {
        let path = folder.join("root.json");
        let AnswerBody::Whole(bytes) = &self.files()["/1.root.json"].body else { panic!() };
        fs::write(&path, bytes).expect("the first root");
        path
    }

    /// Sets the answer for a path.
    pub fn serve(&self, path: &str, answer: Answer) {
        self.files.lock().expect("the files").insert(path.to_owned(), answer);
    }

    /// Returns all files, for [`restore`](Self::restore).
    pub fn files(&self) -> BTreeMap<String, Answer> {
        self.files.lock().expect("the files").clone()
    }

    pub fn restore(&self, files: BTreeMap<String, Answer>) {
        *self.files.lock().expect("the files") = files;
    }

    /// Returns the paths of all requests so far.
    pub fn requested(&self) -> Vec<String> {
        self.server.requests().into_iter().map(|request| request.path).collect()
    }

    /// Adds a root with a new key, which the previous key signs too.
    pub fn rotate(&mut self) {
        let previous = std::mem::replace(&mut self.key, TufKey::new());
        self.add_root(Some(&previous));
    }

    /// Adds a root with a new key that nothing else vouches for.
    pub fn rotate_without_the_previous_key(&mut self) {
        self.key = TufKey::new();
        self.add_root(None);
    }

    /// Adds a root with the present key.
    fn add_root(&mut self, previous: Option<&TufKey>) {
        self.root += 1;
        let (key, id) = (&self.key, self.key.id());
        let role = json!({"keyids": [id], "threshold": 1});
        let roles = ["root", "timestamp", "snapshot", "targets"];
        let root = json!({
            "_type": "root", "spec_version": "1.0.31", "version": self.root, "expires": FAR,
            "consistent_snapshot": true, "keys": {id: key.public()},
            "roles": roles.map(|name| (name, role.clone())).into_iter().collect::<BTreeMap<_, _>>(),
        });
        let keys: Vec<&TufKey> = previous.into_iter().chain([key]).collect();
        self.serve(&format!("/{}.root.json", self.root), Answer::bytes(signed(&root, &keys)));
    }

    /// Publishes a release.
    pub fn release(&self, release: &Release) {
        self.release_by(&self.key, release);
    }

    /// Publishes a release that this key signs.
    pub fn release_by(&self, key: &TufKey, release: &Release) {
        let Release { timestamp, snapshot, targets, expires, content } = *release;
        let hash = hexadecimal_sha256;
        let target = json!({"length": content.len(), "hashes": {"sha256": hash(content)}});
        let publish = |kind: &str, version: u64, more: (&str, Value), path: String| {
            let mut metadata = json!({
                "_type": kind, "spec_version": "1.0.31", "version": version, "expires": expires,
            });
            metadata[more.0] = more.1;
            let bytes = signed(&metadata, &[key]);
            let entry = json!({
                "version": version, "length": bytes.len(), "hashes": {"sha256": hash(bytes.as_bytes())},
            });
            self.serve(&path, Answer::bytes(bytes));
            entry
        };
        self.serve(
            &format!("/targets/{}.trusted_root.json", hash(content)),
            Answer::bytes(content.to_vec()),
        );
        let named = ("targets", json!({"trusted_root.json": target}));
        let entry = publish("targets", targets, named, format!("/{targets}.targets.json"));
        let named = ("meta", json!({"targets.json": entry}));
        let entry = publish("snapshot", snapshot, named, format!("/{snapshot}.snapshot.json"));
        let named = ("meta", json!({"snapshot.json": entry}));
        publish("timestamp", timestamp, named, "/timestamp.json".to_owned());
    }
}

/// Signs metadata. Its fields are sorted and its texts need no escapes, so it is canonical as it is.
fn signed(metadata: &Value, keys: &[&TufKey]) -> String {
    let sign = |key: &&TufKey| {
        let signature = key.0.sign(metadata.to_string().as_bytes());
        json!({"keyid": key.id(), "sig": hex(signature.as_ref())})
    };
    let signatures: Vec<Value> = keys.iter().map(sign).collect();
    json!({"signed": metadata, "signatures": signatures}).to_string()
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
