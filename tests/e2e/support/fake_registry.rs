//! A registry in this process with scripted responses, also ones that no registry should send.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use futures_util::{StreamExt as _, stream};

use super::{Gate, digest, proxy::Server};

/// A response of the registry.
#[derive(Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: AnswerBody,
}

/// The ways to send a body.
#[derive(Clone)]
pub enum AnswerBody {
    Whole(Bytes),
    /// These bytes, announced as more: the connection ends too early.
    Broken {
        announced: u64,
        bytes: Bytes,
    },
    /// Pieces of this many bytes, with pauses.
    Slow {
        announced: u64,
        bytes: Bytes,
        piece: usize,
        pause: Duration,
    },
    /// These bytes, announced as more, and then nothing, on a connection that stays open.
    Stalled {
        announced: u64,
        bytes: Bytes,
    },
    /// Half of it, and the rest once the gate opens.
    Gated {
        bytes: Bytes,
        gate: Arc<Gate>,
    },
    /// All of it, without an announced length.
    Unannounced(Bytes),
    /// Zeros without an end, and without an announced length.
    Endless,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: AnswerBody::Whole(Bytes::new()) }
    }

    pub fn bytes(bytes: impl Into<Bytes>) -> Self {
        Self { status: 200, headers: Vec::new(), body: AnswerBody::Whole(bytes.into()) }
    }

    /// Returns an error document of the distribution specification.
    pub fn error(status: u16, code: &str) -> Self {
        let document =
            serde_json::json!({"errors": [{"code": code, "message": "said by the test"}]});
        Self::bytes(document.to_string())
            .with_status(status)
            .with_header("content-type", "application/json")
    }

    pub fn body(body: AnswerBody) -> Self {
        Self { status: 200, headers: Vec::new(), body }
    }

    #[must_use]
    pub fn with_status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    #[must_use]
    pub fn with_header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A received request.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

type Script = Arc<dyn Fn(&Request) -> Option<Answer> + Send + Sync>;

/// The registry: contents that it serves correctly, and a script that overrides them.
pub struct FakeRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: Server,
}

#[derive(Default)]
struct Shared {
    /// Manifests by `name` of `/v2/<repository>/manifests/<name>`: media type and bytes.
    manifests: Mutex<BTreeMap<String, (String, Bytes)>>,
    blobs: Mutex<BTreeMap<String, Bytes>>,
    script: Mutex<Option<Script>>,
    requests: Mutex<Vec<Request>>,
}

impl FakeRegistry {
    pub fn new() -> Self {
        let shared = Arc::new(Shared::default());
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let (server, address) = Server::start(SocketAddr::from(([127, 0, 0, 1], 0)), router);
        Self { address, shared, _server: server }
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Returns a reference to the one repository that tests use here.
    pub fn reference(&self, tag: &str) -> String {
        format!("{}/hostile:{tag}", self.address)
    }

    /// Sets a script. If it returns no answer, the contents decide.
    pub fn script(&self, script: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) {
        *self.shared.script.lock().expect("the script") = Some(Arc::new(script));
    }

    pub fn put_blob(&self, bytes: impl Into<Bytes>) -> String {
        let bytes = bytes.into();
        let digest = digest(&bytes);
        self.shared.blobs.lock().expect("the blobs").insert(digest.clone(), bytes);
        digest
    }

    /// Adds a blob whose digest does not match.
    pub fn put_lying_blob(&self, digest: &str, bytes: impl Into<Bytes>) {
        self.shared.blobs.lock().expect("the blobs").insert(digest.to_owned(), bytes.into());
    }

    /// Adds a manifest under its tag and its digest, which is returned.
    pub fn put_manifest(&self, tag: &str, media_type: &str, bytes: impl Into<Bytes>) -> String {
        let bytes = bytes.into();
        let digest = digest(&bytes);
        let mut manifests = self.shared.manifests.lock().expect("the manifests");
        manifests.insert(digest.clone(), (media_type.to_owned(), bytes.clone()));
        manifests.insert(tag.to_owned(), (media_type.to_owned(), bytes));
        digest
    }

    pub fn put_json(&self, tag: &str, manifest: &serde_json::Value) -> String {
        let media_type =
            manifest["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json");
        self.put_manifest(tag, media_type, manifest.to_string())
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().expect("the requests").clone()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: axum::extract::Request) -> Response {
    let (parts, body) = request.into_parts();
    let request = Request {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
        body: axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default(),
    };
    shared.requests.lock().expect("the requests").push(request.clone());
    let script = shared.script.lock().expect("the script").clone();
    let answer =
        script.and_then(|script| script(&request)).unwrap_or_else(|| shared.contents(&request));
    response(answer, request.method == "HEAD")
}

impl Shared {
    fn contents(&self, request: &Request) -> Answer {
        if request.path == "/v2/" {
            return Answer::bytes("{}");
        }
        let name = request.path.rsplit('/').next().unwrap_or_default();
        if request.path.contains("/manifests/") {
            return match self.manifests.lock().expect("the manifests").get(name) {
                Some((media_type, bytes)) => Answer::bytes(bytes.clone())
                    .with_header("content-type", media_type)
                    .with_header("docker-content-digest", &digest(bytes)),
                None => Answer::error(404, "MANIFEST_UNKNOWN"),
            };
        }
        if request.path.contains("/blobs/") {
            return match self.blobs.lock().expect("the blobs").get(name) {
                Some(bytes) => Answer::bytes(bytes.clone())
                    .with_header("content-type", "application/octet-stream"),
                None => Answer::error(404, "BLOB_UNKNOWN"),
            };
        }
        Answer::error(404, "UNSUPPORTED")
    }
}

fn response(answer: Answer, head: bool) -> Response {
    let mut response = Response::builder().status(answer.status);
    for (name, value) in &answer.headers {
        response = response.header(name, value);
    }
    let body = match answer.body {
        AnswerBody::Whole(bytes) if head => {
            response = response.header(header::CONTENT_LENGTH, bytes.len());
            Body::empty()
        }
        AnswerBody::Whole(bytes) => Body::from(bytes),
        AnswerBody::Broken { announced, bytes } => {
            response = response.header(header::CONTENT_LENGTH, announced);
            // The server drops unsent bytes when the body fails, so the bytes go first.
            let broken = stream::once(async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("the connection breaks here"))
            });
            Body::from_stream(stream::iter([Ok(bytes)]).chain(broken))
        }
        AnswerBody::Slow { announced, bytes, piece, pause } => {
            response = response.header(header::CONTENT_LENGTH, announced);
            Body::from_stream(stream::unfold(bytes, move |mut rest| async move {
                if rest.is_empty() {
                    return None;
                }
                tokio::time::sleep(pause).await;
                let next = rest.split_to(piece.min(rest.len()));
                Some((Ok::<_, std::io::Error>(next), rest))
            }))
        }
        AnswerBody::Stalled { announced, bytes } => {
            response = response.header(header::CONTENT_LENGTH, announced);
            Body::from_stream(
                stream::iter([Ok::<_, std::io::Error>(bytes)]).chain(stream::pending()),
            )
        }
        AnswerBody::Gated { mut bytes, gate } => {
            response = response.header(header::CONTENT_LENGTH, bytes.len());
            let first = bytes.split_to(bytes.len() / 2);
            let rest = stream::once(async move {
                gate.pass().await;
                Ok(bytes)
            });
            Body::from_stream(stream::iter([Ok::<_, std::io::Error>(first)]).chain(rest))
        }
        AnswerBody::Unannounced(bytes) => {
            Body::from_stream(stream::iter([Ok::<_, std::io::Error>(bytes)]))
        }
        AnswerBody::Endless => {
            let zeros = Bytes::from(vec![0; 64 << 10]);
            Body::from_stream(stream::repeat(zeros).map(Ok::<_, std::io::Error>))
        }
    };
    response.body(body).unwrap_or_else(|_| {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
}
