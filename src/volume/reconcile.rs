//! At start: records of targets that no longer exist are dropped.
//!
//! Mounts need nothing: they are found by the kernel's table when the kubelet
//! asks, and a mount of ours without a record is adopted then.

use std::path::Path;

use crate::store::{Store, StoreError};

/// What the records came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Records of targets that may be published again.
    pub kept: usize,
    /// Records whose pod is gone.
    pub dropped: usize,
}

/// Compares the records with the folders of pods.
pub fn reconcile(store: &Store) -> Result<Reconciled, StoreError> {
    let mut reconciled = Reconciled::default();
    for publication in store.publications()? {
        // The kubelet removes the folder above the target with the volume, also after a reboot.
        if publication.target.parent().is_some_and(Path::exists) {
            reconciled.kept += 1;
        } else {
            store.remove_publication(&publication.target)?;
            reconciled.dropped += 1;
        }
    }
    Ok(reconciled)
}
