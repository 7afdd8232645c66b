//! Where a repository's registry answers.

use reqwest::Url;

use super::error::{self, RegistryError};
use super::redirect;
use crate::oci::Repository;
use crate::oci::reference::DOCKER_HUB;

/// Docker Hub's registry does not answer at the name that references carry.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// A registry's root, `<scheme>://<host[:port]>/`.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    root: Url,
}

impl Endpoint {
    /// `https`, but for loopback, where registries of developers and of the
    /// node itself have no certificate; port 443 means TLS there too.
    pub(super) fn of(repository: &Repository) -> Result<Self, RegistryError> {
        let host = match repository.host() {
            DOCKER_HUB => DOCKER_HUB_HOST,
            host => host,
        };
        let unusable = || RegistryError::Protocol {
            host: error::host(host),
            what: error::describe("the registry", repository),
            reason: "its name is no host".to_owned(),
        };
        let mut root = Url::parse(&format!("https://{host}/")).map_err(|_| unusable())?;
        // The name must be all of the address: nothing in it may become a user or a path.
        if root.path() != "/" || root.query().is_some() || !root.username().is_empty() {
            return Err(unusable());
        }
        if redirect::is_loopback(&root) && !host.ends_with(":443") {
            root = Url::parse(&format!("http://{host}/")).map_err(|_| unusable())?;
        }
        Ok(Self { root })
    }

    /// The address of the API itself, which answers with the challenge.
    pub(super) fn api(&self) -> Url {
        self.at("v2/")
    }

    /// The address of one object of a repository; `object` is `manifests/..` or
    /// `blobs/..` with a checked name.
    pub(super) fn object(&self, repository: &Repository, object: &str) -> Url {
        self.at(&format!("v2/{}/{object}", repository.path()))
    }

    pub(super) fn root(&self) -> &Url {
        &self.root
    }

    fn at(&self, path: &str) -> Url {
        let mut url = self.root.clone();
        url.set_path(path);
        url
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Reference;

    fn address(reference: &str) -> String {
        let reference: Reference = reference.parse().unwrap();
        let endpoint = Endpoint::of(reference.repository()).unwrap();
        endpoint.object(reference.repository(), "manifests/v1").to_string()
    }

    #[test]
    fn docker_hub_answers_elsewhere() {
        assert_eq!(
            address("busybox"),
            "https://registry-1.docker.io/v2/library/busybox/manifests/v1"
        );
    }

    #[test]
    fn only_loopback_is_spoken_to_without_tls() {
        for plain in ["localhost/a", "localhost:5000/a", "127.0.0.1:5000/a", "127.8.8.8:80/a"] {
            assert!(address(plain).starts_with("http://"), "{plain}");
        }
        for tls in [
            "r.io/a",
            "r.io:5000/a",
            "localhost:443/a",
            "127.0.0.1:443/a",
            "127.0.0.1.r.io/a",
            "localhost.r.io/a",
            "10.0.0.1:5000/a",
            "0.0.0.0:5000/a",
        ] {
            assert!(address(tls).starts_with("https://"), "{tls}");
        }
    }
}
