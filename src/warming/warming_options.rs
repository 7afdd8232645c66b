//! The `warm` section of the configuration: references that stay on the node, whether a pod uses them or not.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use oci::Reference;
use text::duration::go_duration;

/// The maximum number of references, more than a node holds artifacts.
const MAXIMUM_REFERENCES: usize = 1000;

/// The `warm` section. Read again when the file changes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WarmList {
    /// References that stay present and pinned on the node.
    #[serde(deserialize_with = "references")]
    pub references: Vec<Reference>,
    /// The time over which nodes start to fetch: each waits for a part of it that its name decides.
    #[serde(deserialize_with = "go_duration")]
    pub spread: Duration,
    /// The time between two requests for the digest of a tag.
    #[serde(deserialize_with = "go_duration")]
    pub interval: Duration,
    /// Serve pods with `IfNotPresent` the digest that the tag had at the last request.
    pub follow_tag: bool,
}

impl Default for WarmList {
    fn default() -> Self {
        Self {
            references: Vec::new(),
            // A thousand nodes with a gigabyte each need 30 Gbit/s for this time.
            spread: Duration::from_mins(5),
            interval: Duration::from_hours(1),
            follow_tag: false,
        }
    }
}

impl WarmList {
    /// Checks the number of references, duplicates and the interval.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.references.len() > MAXIMUM_REFERENCES {
            return Err(format!("warm.references: there are more than {MAXIMUM_REFERENCES}"));
        }
        let mut names = BTreeSet::new();
        for reference in &self.references {
            if !names.insert(reference.to_string()) {
                return Err(format!("warm.references: {reference} is there twice"));
            }
        }
        if self.interval < Duration::from_secs(1) {
            return Err("warm.interval must be at least 1s".to_owned());
        }
        Ok(())
    }
}

/// A reference of the list, parsed one by one so that an error names its line.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct ListedReference(Reference);

impl TryFrom<String> for ListedReference {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.parse::<Reference>();
        parsed.map(Self).map_err(|error| format!("warm.references: {error}"))
    }
}

fn references<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Reference>, D::Error> {
    let listed = Vec::<ListedReference>::deserialize(from)?;
    Ok(listed.into_iter().map(|ListedReference(reference)| reference).collect())
}
