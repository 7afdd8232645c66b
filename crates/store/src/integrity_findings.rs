//! Findings: what is not as it was written.

use std::path::{Path, PathBuf};

use super::object_name::ObjectName;
use oci_types::Digest;

/// Findings of one object that are kept; the rest is counted.
const MOST_FINDINGS: usize = 1000;

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The kind of content.
    pub kind: FindingKind,
    /// The digest of a blob or file, of a layer's blob, or of a tree's manifest.
    pub digest: Option<Digest>,
    /// The path below the state directory.
    pub path: PathBuf,
    /// The difference that was found.
    pub detail: String,
}

/// The kind of content that a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// A manifest, index or configuration.
    Blob,
    /// A single-file layer.
    File,
    /// An unpacked archive.
    Layer,
    /// A directory tree that pods see.
    Tree,
    /// Content of any kind that could not be read, so that its state is unknown.
    Unread,
}

impl Finding {
    /// Returns the finding for an object that could not be read back for a reason outside of it.
    pub fn of_unread(name: &ObjectName, error: &impl std::fmt::Display) -> Self {
        let (path, detail) = (PathBuf::from(name.as_str()), error.to_string());
        Self { kind: FindingKind::Unread, digest: None, path, detail }
    }

    /// Writes it to the log.
    pub fn log(&self) {
        let (kind, path) = (self.kind.name(), self.path.display());
        let detail = &self.detail;
        if self.kind == FindingKind::Unread {
            tracing::warn!(%path, detail, "content is not read back");
        } else {
            tracing::warn!(kind, %path, detail, "damaged content");
        }
    }
}

impl FindingKind {
    /// Returns its name in logs, metrics and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::File => "file",
            Self::Layer => "layer",
            Self::Tree => "tree",
            Self::Unread => "unread",
        }
    }
}

/// Differences of one object, each with its path below the object: the first [`MOST_FINDINGS`].
#[derive(Debug, Default)]
pub(super) struct DamageList {
    list: Vec<(PathBuf, String)>,
    more: u64,
}

impl DamageList {
    pub(super) fn push(&mut self, path: PathBuf, detail: String) {
        if self.list.len() < MOST_FINDINGS {
            self.list.push((path, detail));
        } else {
            self.more += 1;
        }
    }

    pub(super) fn extend(&mut self, below: &Path, details: impl IntoIterator<Item = String>) {
        for detail in details {
            self.push(below.to_owned(), detail);
        }
    }

    /// Prefixes all paths with a folder.
    pub(super) fn below(mut self, folder: &Path) -> Self {
        for (path, _) in &mut self.list {
            *path = folder.join(&path);
        }
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn into_list(mut self) -> Vec<(PathBuf, String)> {
        if self.more > 0 {
            self.list
                .push((PathBuf::new(), format!("{} more of its files are damaged", self.more)));
        }
        self.list
    }
}
