//! Which volume shows which tree where: hints that the mount table overrules.
//!
//! Records are written before a mount is attached and removed after it is gone.
//! They are not synced: a sync costs more than the rest of a publish, and after
//! a power loss no mount exists. A volume whose mount is gone while its record is
//! here (after a reboot, or a crash in between) gets the same content again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::catalog::PublishedTree;
use super::error::StoreError;
use super::{ObjectName, Store, TreeKey, keys, records};
use oci_types::Digest;

/// One volume at one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// The CSI volume id.
    pub volume_id: String,
    /// The target path.
    pub target: PathBuf,
    /// The kernel's boot id at that time.
    pub boot_id: String,
    /// A hash of the volume's own attributes and mount flags: equal ones are compatible.
    pub fingerprint: Digest,
    /// The reference, for people.
    pub reference: String,
    /// The manifest that is shown.
    pub manifest: Digest,
    /// The tree that is shown.
    pub tree: TreeKey,
    /// ... and which generation of it.
    pub generation: u32,
    /// `namespace/name` of the pod, where the kubelet told.
    pub pod: Option<String>,
    /// Whether the kubelet's own record lay beside the target: where it has gone since, the
    /// kubelet has forgotten the volume.
    #[serde(default)]
    pub kubelet_knew: bool,
    /// Made from the mount alone; what only the publish knew is missing.
    #[serde(default)]
    pub rebuilt: bool,
}

impl Publication {
    fn shown(&self) -> PublishedTree {
        let tree = ObjectName::tree(self.tree, self.generation);
        PublishedTree { tree, kubelet_knew: self.kubelet_knew }
    }
}

impl Store {
    /// The record of a target: it shows one volume at most.
    #[must_use]
    pub fn publication(&self, target: &Path) -> Option<Publication> {
        records::read(&self.publication_path(target))
    }

    /// Records a publication, and holds its tree from here on: also when the record cannot be
    /// written, since the mount does not depend on it.
    pub fn put_publication(&self, publication: &Publication) -> Result<(), StoreError> {
        let path = self.publication_path(&publication.target);
        // Held before it is written: nothing may evict what is about to be shown.
        self.catalog().publish(&publication.target, publication.shown());
        records::write_hint(&self.staging(), &path, publication)
    }

    /// Forgets a publication, and lets go of its tree: also when the record cannot be removed.
    pub fn remove_publication(&self, target: &Path) -> Result<(), StoreError> {
        let removed = records::remove(&self.publication_path(target));
        if let Some(tree) = self.catalog().unpublish(target) {
            self.tree_was_unpublished(&tree);
        }
        removed
    }

    /// Tells the catalog what the records say.
    pub(super) fn load_publications(&self) -> Result<(), StoreError> {
        for (_, publication) in records::list::<Publication>(&self.path("publications"))? {
            self.catalog().publish(&publication.target, publication.shown());
        }
        Ok(())
    }

    /// Returns all targets with the trees that they show, from memory.
    #[must_use]
    pub fn shown_targets(&self) -> Vec<(PathBuf, PublishedTree)> {
        self.catalog().publications()
    }

    /// Returns the number of targets that show a tree.
    #[must_use]
    pub fn count_publications(&self) -> usize {
        self.catalog().count_publications()
    }

    /// Returns the readable records of the targets that show a tree.
    #[must_use]
    pub fn publications_of(&self, tree: &ObjectName) -> Vec<Publication> {
        let targets = self.catalog().targets_of(tree);
        targets.iter().filter_map(|target| self.publication(target)).collect()
    }

    fn publication_path(&self, target: &Path) -> PathBuf {
        let key = keys::hash(&[&target.to_string_lossy()]);
        self.path("publications").join(records::name(key))
    }
}

/// The kernel's name for this boot.
#[must_use]
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
