//! The `warm` section. Read again when the file changes.

use std::path::PathBuf;

use super::NodeConfiguration;
use crate::warming::WarmList;
use sys::reload::{FileVersions, Reloadable};

/// Returns the source of a configuration file's list. Without a file the list is empty.
pub fn warm_source(
    path: Option<PathBuf>,
    report: impl Fn(bool) + Send + Sync + 'static,
) -> Reloadable<WarmList> {
    let read = move |seen: &mut FileVersions| match &path {
        Some(path) => Ok(NodeConfiguration::read_again(path, seen)?.warm),
        None => Ok(WarmList::default()),
    };
    Reloadable::new("the list of what is kept warm", read, report)
}
