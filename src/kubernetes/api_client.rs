//! Requests to the API server with the service account of this process's pod.

use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use kube::Config;
use kube::api::ListParams;
use kube::client::{Body, ConfigExt as _};
use serde_json::Value;
use text::printable::excerpt;
use tower::{BoxError, ServiceBuilder};

/// The timeout of one request. The caller decides about retries.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The objects of one page of a list: the number that kubectl requests.
const PAGE: u32 = 500;
/// The maximum size of a response in bytes. A page of pods takes a few MiB, which their authors control.
const MAXIMUM_RESPONSE_BYTES: usize = 64 << 20;

/// An error of a request to the API server.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// This process is in no pod, or in one without a token.
    #[error(
        "there is no access to the Kubernetes API ({what}): run this in a pod with a service account's token"
    )]
    NoAccess {
        /// The missing part.
        what: String,
    },
    /// The server cannot be reached, or breaks off.
    #[error("the Kubernetes API at {server} cannot be asked for {path}: {reason}")]
    Unreachable {
        /// The server's URL.
        server: String,
        /// The path of the request.
        path: String,
        /// The root cause.
        reason: String,
    },
    /// The server refuses the request.
    #[error("the Kubernetes API answers {method} {path} with {status}{}{message}", hint(*status))]
    Refused {
        /// The method of the request.
        method: Method,
        /// The path of the request.
        path: String,
        /// The status of the response.
        status: StatusCode,
        /// The message of the response in parentheses, or nothing.
        message: String,
    },
    /// The response is not the expected JSON.
    #[error("the Kubernetes API's answer to {path} is not understood")]
    Garbled {
        /// The path of the request.
        path: String,
    },
}

/// Returns the advice for a refused request.
fn hint(status: StatusCode) -> &'static str {
    match status {
        StatusCode::FORBIDDEN => {
            ": the service account lacks the right, or an admission policy refuses it"
        }
        StatusCode::UNAUTHORIZED => ": the token is not accepted",
        _ => "",
    }
}

/// A client of the API server for a task of seconds: it reads the service account's files once.
#[derive(Clone)]
pub struct KubernetesClient {
    kube: kube::Client,
    server: String,
}

impl KubernetesClient {
    /// Creates a client with the credentials that the kubelet has mounted in this pod.
    pub fn in_cluster() -> Result<Self, KubernetesError> {
        let missing = |what: String| KubernetesError::NoAccess { what };
        let host = "KUBERNETES_SERVICE_HOST";
        if std::env::var_os(host).is_none() {
            return Err(missing(format!("{host} is not in the environment")));
        }
        let config = Config::incluster().map_err(|error| missing(error.to_string()))?;
        let unusable = |error: kube::Error| missing(root_cause(&error));
        let connector = config.rustls_https_connector().map_err(unusable)?;
        // Without kube's layers for retries and logs of failures: both are decisions of the caller.
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer().map_err(unusable)?)
            .map_err(BoxError::from)
            .service(Client::builder(TokioExecutor::new()).build(connector));
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        Ok(Self { kube: kube::Client::new(service, config.default_namespace), server })
    }

    /// Returns an object, or `None` if it does not exist.
    pub async fn get(&self, path: &str) -> Result<Option<Value>, KubernetesError> {
        match self.request(path, Request::get(path).body(Vec::new())).await {
            Err(KubernetesError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            response => response.map(Some),
        }
    }

    /// Returns all objects of a list, page by page.
    pub async fn list(&self, path: &str) -> Result<Vec<Value>, KubernetesError> {
        let mut items = Vec::new();
        let mut next = ListParams::default().limit(PAGE);
        loop {
            let mut page = self.request(path, kube::core::Request::new(path).list(&next)).await?;
            match page["items"].take() {
                Value::Array(found) => items.extend(found),
                _ => return Err(KubernetesError::Garbled { path: path.to_owned() }),
            }
            match page["metadata"]["continue"].as_str() {
                None | Some("") => return Ok(items),
                Some(token) => next = next.continue_token(token),
            }
        }
    }

    /// Changes an object by a JSON patch.
    pub async fn patch(&self, path: &str, change: &Value) -> Result<(), KubernetesError> {
        let request = Request::patch(path).header(CONTENT_TYPE, "application/json-patch+json");
        self.request(path, request.body(change.to_string().into_bytes())).await.map(|_| ())
    }

    async fn request(
        &self,
        path: &str,
        request: Result<Request<Vec<u8>>, impl std::error::Error>,
    ) -> Result<Value, KubernetesError> {
        let path = path.to_owned();
        let unreachable = |reason: String| {
            let (server, path) = (self.server.clone(), path.clone());
            KubernetesError::Unreachable { server, path, reason }
        };
        let request = request.map_err(|error| unreachable(error.to_string()))?;
        let method = request.method().clone();
        let received = async {
            let response = self.kube.send(request.map(Body::from)).await?;
            let (status, body) = (response.status(), axum::body::Body::new(response.into_body()));
            Ok::<_, BoxError>((status, axum::body::to_bytes(body, MAXIMUM_RESPONSE_BYTES).await?))
        };
        let received = tokio::time::timeout(TIMEOUT, received).await;
        let (status, body) = received
            .map_err(|_| unreachable("operation timed out".to_owned()))?
            .map_err(|error| unreachable(root_cause(error.as_ref())))?;
        if !status.is_success() {
            return Err(KubernetesError::Refused { method, path, status, message: message(&body) });
        }
        let object = serde_json::from_slice(&body).map(Value::Object);
        object.map_err(|_| KubernetesError::Garbled { path })
    }
}

/// Returns the message of a `Status` for an error, or nothing.
fn message(body: &[u8]) -> String {
    let status = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let message = status["message"].as_str().filter(|message| !message.is_empty());
    message.map(|message| format!(" ({})", excerpt(message, 300))).unwrap_or_default()
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers a request with this status and body.
    async fn answered(status: u16, body: String) -> Result<Option<Value>, String> {
        let service = tower::service_fn(move |_: Request<Body>| {
            let response = http::Response::builder().status(status);
            let response = response.body(Body::from(body.clone().into_bytes()));
            async move { response.map_err(BoxError::from) }
        });
        let server = "https://server".to_owned();
        let client = KubernetesClient { kube: kube::Client::new(service, "team"), server };
        client.get("/api/v1/pods").await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn an_answer_beyond_the_bound_is_not_read_into_memory() {
        let of = |bytes: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(bytes - 8));
        assert!(answered(200, of(MAXIMUM_RESPONSE_BYTES)).await.is_ok());
        let error = answered(200, of(MAXIMUM_RESPONSE_BYTES + 1)).await.expect_err("too long");
        assert!(error.contains("length limit exceeded"), "{error}");
    }

    #[tokio::test]
    async fn an_answer_that_is_no_object_is_refused() {
        for body in ["[1]", "1", "", "{"] {
            let error = answered(200, body.to_owned()).await.expect_err(body);
            assert!(error.contains("not understood"), "{error}");
        }
    }

    #[tokio::test]
    async fn the_message_of_a_refusal_is_shown() {
        let status = r#"{"kind": "Status", "message": "data: Too long\n"}"#;
        let error = answered(422, status.to_owned()).await.expect_err("refused");
        assert!(error.ends_with("with 422 Unprocessable Entity (data: Too long)"), "{error}");
        for body in ["", "[]", r#"{"message": 1}"#, r#"{"message": ""}"#] {
            let error = answered(422, body.to_owned()).await.expect_err("refused");
            assert!(error.ends_with("with 422 Unprocessable Entity"), "{error}");
        }
    }
}
