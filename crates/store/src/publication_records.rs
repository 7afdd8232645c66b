//! Records of the tree that each volume shows: hints that the mount table overrules.
//!
//! Records are written before a mount is attached and removed after it is gone.
//! They are not synced: a sync costs more than the rest of a publish, and after
//! a power loss no mount exists. A volume whose mount is gone while its record is
//! here (after a reboot, or a crash in between) gets the same content again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::object_catalog::PublishedTree;
use super::state_directory::StateDirectory;
use super::trees::{Tree, Trees};
use super::{ObjectName, TreeKey, json_records, object_keys};
use oci_types::Digest;

/// Below the state directory.
pub(super) const FOLDER: &str = "publications";

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
    /// True if the kubelet's own record lay beside the target: where it has gone since, the
    /// kubelet has forgotten the volume.
    #[serde(default)]
    pub kubelet_knew: bool,
    /// Made from the mount alone; what only the publish knew is missing.
    #[serde(default)]
    pub rebuilt: bool,
}

impl Publication {
    /// Notes that the volume shows another tree.
    pub fn shows(&mut self, tree: &Tree) {
        self.manifest = tree.record.manifest;
        (self.tree, self.generation) = (tree.key, tree.generation);
    }

    fn shown(&self) -> PublishedTree {
        let tree = ObjectName::tree(self.tree, self.generation);
        PublishedTree { tree, kubelet_knew: self.kubelet_knew }
    }
}

/// The records of a store's publications.
pub struct Publications {
    directory: Arc<StateDirectory>,
    trees: Arc<Trees>,
}

impl Publications {
    /// Reads the records of earlier processes into the catalog.
    pub(super) fn open(
        directory: Arc<StateDirectory>,
        trees: Arc<Trees>,
    ) -> Result<Self, StoreError> {
        for (_, publication) in json_records::list::<Publication>(&directory.path(FOLDER))? {
            directory.catalog.publish(&publication.target, publication.shown());
        }
        Ok(Self { directory, trees })
    }

    /// The record of a target: it shows one volume at most.
    pub fn get(&self, target: &Path) -> Option<Publication> {
        json_records::read(&self.record_path(target))
    }

    /// Records a publication, and holds its tree from here on: also when the record cannot be
    /// written, since the mount does not depend on it.
    pub fn put(&self, publication: &Publication) -> Result<(), StoreError> {
        let path = self.record_path(&publication.target);
        // Held before it is written: nothing may evict what is about to be shown.
        self.directory.catalog.publish(&publication.target, publication.shown());
        json_records::write_hint(&self.directory.staging(), &path, publication)
    }

    /// Forgets a publication, and lets go of its tree: also when the record cannot be removed.
    pub fn remove(&self, target: &Path) -> Result<(), StoreError> {
        let removed = json_records::remove(&self.record_path(target));
        if let Some(tree) = self.directory.catalog.unpublish(target) {
            self.trees.mark_unpublished(&tree);
        }
        removed
    }

    /// Returns all targets with the trees that they show, from memory.
    pub fn targets(&self) -> Vec<(PathBuf, PublishedTree)> {
        self.directory.catalog.publications()
    }

    /// Returns the number of targets that show a tree.
    pub fn count(&self) -> usize {
        self.directory.catalog.count_publications()
    }

    /// Returns the readable records of the targets that show a tree.
    pub fn of_tree(&self, tree: &ObjectName) -> Vec<Publication> {
        let targets = self.directory.catalog.targets_of(tree);
        targets.iter().filter_map(|target| self.get(target)).collect()
    }

    fn record_path(&self, target: &Path) -> PathBuf {
        let key = object_keys::hash(&[&target.to_string_lossy()]);
        self.directory.path(FOLDER).join(json_records::name(key))
    }
}

/// The kernel's name for this boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
