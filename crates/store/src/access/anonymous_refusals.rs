//! Repositories that their registry refuses to anonymous requests.
//!
//! ```text
//! access/<hash of repository>/refuses-anonymous.json   the registry refuses it to who shows nothing
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use super::{AccessFolder, AccessRecord, RecordSubject};
use crate::error::StoreError;
use oci_types::Repository;

const OF_REPOSITORY: AccessRecord =
    AccessRecord::new("refuses-anonymous", RecordSubject::Repository);
/// The kinds of records of this file.
pub(super) const KINDS: &[AccessRecord] = &[OF_REPOSITORY];

/// The records of refusals.
pub struct AnonymousRefusals(pub(crate) Arc<AccessFolder>);

impl AnonymousRefusals {
    /// Returns whether the registry itself has refused the repository to an anonymous request since it
    /// last answered one.
    pub fn contains(&self, repository: &Repository) -> bool {
        self.path(repository).exists()
    }

    /// Remembers whether the registry itself refuses the repository to an anonymous request.
    pub fn set(&self, repository: &Repository, refuses: bool) -> Result<(), StoreError> {
        let path = self.path(repository);
        if refuses {
            return self.0.put(&path);
        }
        let _turn = self.0.lock.lock();
        self.0.remove(&path).map(|_| ())
    }

    fn path(&self, repository: &Repository) -> PathBuf {
        self.0.path(&repository.to_string(), OF_REPOSITORY.prefix)
    }
}
