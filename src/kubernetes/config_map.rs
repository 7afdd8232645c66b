//! Files of a `ConfigMap`, read and replaced as a whole.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize as _;
use serde_json::{Value, json};

use super::{KubernetesClient, KubernetesError};

/// The maximum length of a name in Kubernetes.
const NAME_BYTES: usize = 253;

/// The name of a `ConfigMap` with its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigMapName {
    namespace: String,
    name: String,
}

impl FromStr for ConfigMapName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_name = |name: &str| {
            let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            let inner = |byte: u8| alphanumeric(byte) || byte == b'-' || byte == b'.';
            let bytes = name.as_bytes();
            let ends = [bytes.first(), bytes.last()];
            bytes.len() <= NAME_BYTES
                && ends.iter().all(|end| end.is_some_and(|end| alphanumeric(*end)))
                && bytes.iter().all(|byte| inner(*byte))
        };
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("write it as NAMESPACE/NAME"),
        }
    }
}

impl fmt::Display for ConfigMapName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ConfigMap {}/{}", self.namespace, self.name)
    }
}

/// A `ConfigMap` as it was read.
#[derive(Clone, Debug)]
pub struct ConfigMap {
    path: String,
    version: Value,
    /// The texts by file name.
    pub data: BTreeMap<String, String>,
}

impl ConfigMap {
    /// Reads a `ConfigMap`, or returns `None` if it does not exist.
    pub async fn read(
        client: &KubernetesClient,
        name: &ConfigMapName,
    ) -> Result<Option<Self>, KubernetesError> {
        let ConfigMapName { namespace, name } = name;
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
        let Some(object) = client.get(&path).await? else { return Ok(None) };
        let data = Option::<BTreeMap<_, _>>::deserialize(&object["data"]);
        let data = data.map_err(|_| KubernetesError::Garbled { path: path.clone() })?;
        let version = object["metadata"]["resourceVersion"].clone();
        Ok(Some(Self { path, version, data: data.unwrap_or_default() }))
    }

    /// Replaces the files, unless the object has changed since it was read.
    pub async fn replace(&self, client: &KubernetesClient) -> Result<(), KubernetesError> {
        let version = "/metadata/resourceVersion";
        let change = json!([
            {"op": "test", "path": version, "value": self.version},
            {"op": "add", "path": "/data", "value": self.data},
        ]);
        client.patch(&self.path, &change).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_they_are_part_of_a_path() {
        let shown = |text: &str| text.parse::<ConfigMapName>().map(|name| name.to_string());
        assert_eq!(shown("team/trust.root-1"), Ok("ConfigMap team/trust.root-1".to_owned()));
        for wrong in ["", "a", "/a", "a/", "a/b/c", "a/..", "a/b?c", "A/b", "a/-b", "a/b%2f"] {
            assert!(shown(wrong).is_err(), "{wrong}");
        }
        assert!(shown(&format!("a/{}", "b".repeat(254))).is_err());
    }
}
