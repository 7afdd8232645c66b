//! What can go wrong on the node's own disk.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The filesystem or a quota on it is full.
    #[error("no room on the node to {action} {}: free space on the state directory's filesystem", path.display())]
    NoSpace {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process uses the state directory.
    #[error("the state directory {} is in use by {holder}: stop that process or choose another --state-dir", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// What the other process wrote of itself.
        holder: String,
    },
    /// Written by a version that this one does not know.
    #[error("the state directory {} has the format \"{found}\", which this version does not know: install the newer version again, or empty the directory", path.display())]
    Format {
        /// The directory.
        path: PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// Content that was complete once and is not any more.
    #[error("{} is damaged ({what}): it will be fetched again", path.display())]
    Damaged {
        /// Which object.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}

impl StoreError {
    /// Tells a full disk from everything else.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { action, path }
            }
            _ => Self::Io { action, path, source },
        }
    }
}
