//! Marks of generations that were found damaged.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::durable_rename;
use super::error::StoreError;
use super::folder_listing::mark_of;
use super::object_catalog::Catalog;
use super::object_name::{ObjectKind, ObjectName};

/// Damaged trees that wait to be reported; a node has fewer that are shown.
const UNREPORTED: usize = 4096;

/// The marks below a state directory.
pub struct DamageMarks {
    root: PathBuf,
    catalog: Arc<Catalog>,
    count: AtomicU64,
    /// Trees that were found damaged and not reported yet.
    unreported: Mutex<Vec<ObjectName>>,
}

impl DamageMarks {
    pub(super) fn new(root: &Path, catalog: &Arc<Catalog>) -> Self {
        let (root, catalog) = (root.to_owned(), Arc::clone(catalog));
        Self { root, catalog, count: AtomicU64::default(), unreported: Mutex::default() }
    }

    /// Marks one generation of an object, and nothing that links it.
    pub(super) fn mark(&self, generation: &Path) -> Result<(), StoreError> {
        durable_rename::write(&self.root.join("staging"), &mark_of(generation), b"")?;
        self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(name) = ObjectName::at(&self.root, generation) {
            self.catalog.damaged(&name);
            let mut trees = self.unreported.lock();
            if name.kind() == ObjectKind::Tree && trees.len() < UNREPORTED {
                trees.push(name);
            }
        }
        Ok(())
    }

    /// Returns whether a generation was marked.
    pub fn is_marked(&self, object: &ObjectName) -> bool {
        mark_of(&self.root.join(object.as_str())).symlink_metadata().is_ok()
    }

    /// Returns how often content was found damaged since the process began.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Takes the trees that were found damaged since the last call.
    pub fn take_trees(&self) -> Vec<ObjectName> {
        std::mem::take(&mut *self.unreported.lock())
    }
}
