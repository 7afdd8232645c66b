//! Requests to the API server with the service account of the pod that this process is in.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;

/// Where the kubelet puts what a pod needs.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A request that takes longer is given up; the caller decides whether to ask again.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Objects of one page of a list: what kubectl asks for.
const PAGE: usize = 500;
/// Bytes of one answer, held in memory: a page of pods takes a few.
const MAXIMUM_ANSWER: usize = 64 << 20;

/// Why the API did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// This process is in no pod, or in one without a token.
    #[error(
        "there is no access to the Kubernetes API ({what}): run this in a pod with a service account's token"
    )]
    NoAccess {
        /// What is missing.
        what: String,
    },
    /// The server cannot be reached, or breaks off.
    #[error("the Kubernetes API at {server} cannot be asked for {path}: {reason}")]
    Unreachable {
        /// Which server.
        server: String,
        /// For what.
        path: String,
        /// Why.
        reason: String,
    },
    /// The server refuses.
    #[error("the Kubernetes API answers {method} {path} with {status}{}", hint(*status))]
    Refused {
        /// What was tried.
        method: Method,
        /// On what.
        path: String,
        /// The answer.
        status: StatusCode,
    },
    /// The answer is none.
    #[error("the Kubernetes API's answer to {path} is not understood")]
    Garbled {
        /// To what.
        path: String,
    },
}

/// What a reader can change.
fn hint(status: StatusCode) -> &'static str {
    match status {
        StatusCode::FORBIDDEN => {
            ": the service account lacks the right, or an admission policy refuses it"
        }
        StatusCode::UNAUTHORIZED => ": the token is not accepted",
        _ => "",
    }
}

/// A client of the API server.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    server: String,
    token: PathBuf,
}

impl Client {
    /// With what the kubelet has put into this pod.
    pub fn in_cluster() -> Result<Self, KubernetesError> {
        let missing = |what: String| KubernetesError::NoAccess { what };
        let variable = |name: &str| {
            std::env::var(name).map_err(|_| missing(format!("{name} is not in the environment")))
        };
        let (host, port) =
            (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let folder = Path::new(SERVICE_ACCOUNT);
        let authority = folder.join("ca.crt");
        let mut roots = rustls::RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(&authority)
            .map_err(|error| missing(format!("{}: {error}", authority.display())))?;
        roots.add_parsable_certificates(certificates.flatten());
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .map_err(|error| missing(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .timeout(TIMEOUT)
            // The API server is never behind a proxy that is meant for registries, and never elsewhere.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| missing(error.to_string()))?;
        Ok(Self { http, server: format!("https://{host}:{port}"), token: folder.join("token") })
    }

    /// One object, or none where there is none of this name.
    pub async fn get(&self, path: &str) -> Result<Option<Value>, KubernetesError> {
        match self.ask(Method::GET, path, self.request(Method::GET, path)).await {
            Err(KubernetesError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            answer => answer.map(Some),
        }
    }

    /// All objects of a list, page by page.
    pub async fn list(&self, path: &str) -> Result<Vec<Value>, KubernetesError> {
        let mut items = Vec::new();
        let mut next = String::new();
        loop {
            let url = format!("{path}?limit={PAGE}&continue={next}");
            let mut page = self.ask(Method::GET, path, self.request(Method::GET, &url)).await?;
            match page["items"].take() {
                Value::Array(found) => items.extend(found),
                _ => return Err(KubernetesError::Garbled { path: path.to_owned() }),
            }
            match page["metadata"]["continue"].as_str() {
                None | Some("") => return Ok(items),
                // The server makes it of characters that need no escape, or of some that do.
                Some(token) => next = escaped(token),
            }
        }
    }

    /// Changes an object by a JSON patch.
    pub async fn patch(&self, path: &str, change: &Value) -> Result<(), KubernetesError> {
        let request = self
            .request(Method::PATCH, path)
            .header("content-type", "application/json-patch+json")
            .body(change.to_string());
        self.ask(Method::PATCH, path, request).await.map(|_| ())
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.server))
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        request: RequestBuilder,
    ) -> Result<Value, KubernetesError> {
        let unreachable = |error: reqwest::Error| KubernetesError::Unreachable {
            server: self.server.clone(),
            path: path.to_owned(),
            reason: root_cause(&error),
        };
        // The kubelet replaces the token long before it ends.
        let token = std::fs::read_to_string(&self.token).map_err(|error| {
            KubernetesError::NoAccess { what: format!("{}: {error}", self.token.display()) }
        })?;
        let mut answer = request.bearer_auth(token.trim()).send().await.map_err(unreachable)?;
        let status = answer.status();
        if !status.is_success() {
            return Err(KubernetesError::Refused { method, path: path.to_owned(), status });
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAXIMUM_ANSWER {
                return Err(KubernetesError::Garbled { path: path.to_owned() });
            }
        }
        serde_json::from_slice(&body)
            .map_err(|_| KubernetesError::Garbled { path: path.to_owned() })
    }
}

/// For a query: everything but letters and digits.
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(escape).collect()
}

fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
