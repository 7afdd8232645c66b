//! Files below one URL, fetched without credentials: the metadata of a trust root.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Url;
use reqwest::header::HeaderMap;

use super::RegistryOptions;
use super::error::RegistryError;
use super::http_transport::{HttpRequest, Transport, authority};
use super::registry_endpoint::RegistryEndpoint;

/// Timeout of one file, redirects included.
const TIMEOUT: Duration = Duration::from_secs(30);

/// URL of a folder of files: `http` or `https`, without user name and query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebAddress(Url);

impl FromStr for WebAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut url = Url::parse(text).map_err(|error| error.to_string())?;
        let has_user = !url.username().is_empty() || url.password().is_some();
        let has_more = url.query().is_some() || url.fragment().is_some();
        if !matches!(url.scheme(), "http" | "https") || has_user || has_more {
            return Err("write it as https://HOST/PATH, without user name and query".to_owned());
        }
        if !url.path().ends_with('/') {
            url.set_path(&format!("{}/", url.path()));
        }
        Ok(Self(url))
    }
}

impl fmt::Display for WebAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Client of the files below one URL. It has the proxies of the environment, the system's
/// certificate authorities and the redirect rules of registries.
pub struct WebFiles {
    transport: Transport,
    endpoint: RegistryEndpoint,
}

impl WebFiles {
    /// Creates the client. Sends no request.
    pub fn new(address: &WebAddress) -> Result<Self, RegistryError> {
        let transport = Transport::new(&RegistryOptions::default())?;
        let endpoint = RegistryEndpoint {
            root: address.0.clone(),
            namespace: None,
            pull: false,
            resolve: false,
            takes_credentials: false,
            configured: true,
            headers: HeaderMap::new(),
            connection: transport.default_connection(),
        };
        Ok(Self { transport, endpoint })
    }

    /// Returns a file of at most `limit` bytes, or `None` if there is none. Object stores answer 403
    /// for missing files.
    ///
    /// # Errors
    ///
    /// Any other status, a file over the limit, a broken connection, or a file that takes longer
    /// than 30 seconds.
    pub async fn get(&self, path: &str, limit: u64) -> Result<Option<Bytes>, RegistryError> {
        let fetched = tokio::time::timeout(TIMEOUT, self.fetch(path, limit)).await;
        fetched.unwrap_or_else(|_| {
            let reason = format!("it takes longer than {} seconds", TIMEOUT.as_secs());
            Err(RegistryError::protocol(&authority(&self.endpoint.root), path, reason))
        })
    }

    async fn fetch(&self, path: &str, limit: u64) -> Result<Option<Bytes>, RegistryError> {
        let request = HttpRequest::get(&self.endpoint, self.endpoint.at(path), path);
        let response = self.transport.send(request).await?;
        match response.status().as_u16() {
            200 => response.document(path, limit).await.map(Some),
            403 | 404 | 410 => Ok(None),
            status => Err(response.protocol(path, format!("the status {status}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(address: &str) -> WebFiles {
        let _ = rustls::crypto::ring::default_provider().install_default();
        WebFiles::new(&address.parse().unwrap()).unwrap()
    }

    #[test]
    fn files_are_below_the_url_that_was_given() {
        for address in ["https://tuf.example/a", "https://tuf.example/a/"] {
            let url = |path: &str| files(address).endpoint.at(path).to_string();
            assert_eq!(url("targets/b%20c.json"), "https://tuf.example/a/targets/b%20c.json");
            assert!(url("//other/../x").starts_with("https://tuf.example/"));
        }
        for wrong in ["tuf.example", "ftp://tuf.example", "https://u:p@tuf.example", "https://t/?a"]
        {
            assert!(wrong.parse::<WebAddress>().is_err(), "{wrong}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_sends_nothing_is_not_waited_for_long() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let files = files(&format!("http://{}", listener.local_addr().unwrap()));
        let error = files.get("timestamp.json", 10).await.unwrap_err().to_string();
        assert!(error.contains("timestamp.json: it takes longer than 30 seconds"), "{error}");
    }
}
