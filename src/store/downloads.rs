//! Which downloads somebody works on: they are nobody's to remove.
//!
//! Room for a blob is claimed before its first byte, and what is claimed stays. But a blob may be
//! fetched without a claim: once more, to prove where it is from, or because it went between the
//! look and the use.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::oci::Digest;

/// Blobs with an open download, and how many.
#[derive(Debug, Default)]
pub(super) struct Downloads(Mutex<HashMap<Digest, usize>>);

/// One open download.
#[derive(Debug)]
pub(super) struct Open {
    downloads: Arc<Downloads>,
    blob: Digest,
}

impl Downloads {
    /// Says that a download is about to be opened.
    pub(super) fn open(self: &Arc<Self>, blob: Digest) -> Open {
        *self.lock().entry(blob).or_default() += 1;
        Open { downloads: Arc::clone(self), blob }
    }

    /// Removes a download that nobody has open, and nobody opens meanwhile; says whether it did.
    pub(super) fn remove(&self, blob: Digest, path: &Path) -> std::io::Result<bool> {
        let open = self.lock();
        if open.contains_key(&blob) {
            return Ok(false);
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            removed => removed.map(|()| true),
        }
    }

    /// Whether somebody has it open.
    pub(super) fn has(&self, blob: Digest) -> bool {
        self.lock().contains_key(&blob)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut open = self.downloads.lock();
        if let Some(count) = open.get_mut(&self.blob) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.blob);
            }
        }
    }
}
