//! The `warm` section: what is kept on the node before anybody asks. Read again when the file changes.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{GoDuration, NodeConfiguration};
use crate::warming::WarmList;
use oci::Reference;
use sys::reload::{FileVersions, Reloadable};

/// References of one list: more than a node holds artifacts.
const MAXIMUM_REFERENCES: usize = 1000;

/// The `warm` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WarmSection {
    /// What is kept present and pinned.
    pub references: Vec<Listed>,
    /// Over how long nodes begin: each waits a part of it that its name decides.
    pub spread: GoDuration,
    /// How often a registry is asked what a tag means.
    pub interval: GoDuration,
    /// Whether pods with `IfNotPresent` get what a tag means by then.
    pub follow_tag: bool,
}

/// A reference of the list.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Listed(pub Reference);

impl TryFrom<String> for Listed {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.parse::<Reference>();
        parsed.map(Self).map_err(|error| format!("warm.references: {error}"))
    }
}

impl WarmSection {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.references.len() > MAXIMUM_REFERENCES {
            return Err(format!("warm.references: there are more than {MAXIMUM_REFERENCES}"));
        }
        let mut names = BTreeSet::new();
        for Listed(reference) in &self.references {
            if !names.insert(reference.to_string()) {
                return Err(format!("warm.references: {reference} is there twice"));
            }
        }
        if self.interval.0 < Duration::from_secs(1) {
            return Err("warm.interval must be at least 1s".to_owned());
        }
        Ok(())
    }

    fn list(self) -> WarmList {
        WarmList {
            references: self.references.into_iter().map(|Listed(reference)| reference).collect(),
            spread: self.spread.0,
            interval: self.interval.0,
            follow_tag: self.follow_tag,
        }
    }
}

impl Default for WarmSection {
    fn default() -> Self {
        let WarmList { spread, interval, follow_tag, .. } = WarmList::default();
        Self {
            references: Vec::new(),
            spread: GoDuration(spread),
            interval: GoDuration(interval),
            follow_tag,
        }
    }
}

/// The list of a node's configuration file; without a file, nothing is kept.
pub fn warm_source(
    path: Option<PathBuf>,
    tell: impl Fn(bool) + Send + Sync + 'static,
) -> Reloadable<WarmList> {
    let read = move |seen: &mut FileVersions| match &path {
        Some(path) => Ok(NodeConfiguration::read_again(path, seen)?.warm.list()),
        None => Ok(WarmList::default()),
    };
    Reloadable::new("the list of what is kept warm", read, tell)
}
