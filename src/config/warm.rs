//! The list of what is kept warm. Read again when the file changes.

use std::path::PathBuf;

use super::NodeConfiguration;
use crate::warming::WarmList;
use sys::reload::{FileVersions, Reloadable};

/// The list of a node's configuration file; without a file, nothing is kept.
pub fn warm_source(
    path: Option<PathBuf>,
    tell: impl Fn(bool) + Send + Sync + 'static,
) -> Reloadable<WarmList> {
    let read = move |seen: &mut FileVersions| match &path {
        Some(path) => Ok(NodeConfiguration::read_again(path, seen)?.warm),
        None => Ok(WarmList::default()),
    };
    Reloadable::new("the list of what is kept warm", read, tell)
}
