//! Endpoints of unix sockets in options, such as `unix:///csi/csi.sock`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The path of a unix socket. An empty text turns the endpoint off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixEndpoint(Option<PathBuf>);

/// An error for a text that is no endpoint.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not an endpoint: write unix:///path/to/name.sock, or nothing to turn it off")]
pub struct EndpointError(String);

impl UnixEndpoint {
    /// Returns the socket's path, or `None` if the endpoint is off.
    pub fn path(&self) -> Option<&Path> {
        self.0.as_deref()
    }
}

impl FromStr for UnixEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:"));
        match path.unwrap_or(text) {
            path if path.starts_with('/') && !path.ends_with('/') => Ok(Self(Some(path.into()))),
            _ => Err(EndpointError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let path = |text: &str| text.parse::<UnixEndpoint>().map(|endpoint| endpoint.0);
        assert_eq!(path("unix:///csi/csi.sock"), Ok(Some("/csi/csi.sock".into())));
        assert_eq!(path("unix:/csi/csi.sock"), Ok(Some("/csi/csi.sock".into())));
        assert_eq!(path("/csi/csi.sock"), Ok(Some("/csi/csi.sock".into())));
        assert_eq!(path(""), Ok(None));
        for text in ["tcp://127.0.0.1:1", "unix://relative", "csi.sock", "unix:///csi/"] {
            assert!(path(text).is_err(), "{text}");
        }
    }
}
