//! Resolutions of tags for the pods of one namespace, as the registry gave them to a preload of that namespace.
//!
//! Such a record lies beside those that hold for all pods. It goes as soon as this node asks the registry itself, for
//! any pod: a preload neither decides what a tag means for other namespaces nor takes it back to an older version.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{FOLDER, Resolution, Resolutions, name};
use crate::error::StoreError;
use crate::{json_records, object_keys};
use oci_types::{Platform, Reference};

/// The time of a record is renewed when it is older than this.
const RENEWAL: Duration = Duration::from_mins(1);

/// The resolution of a tag for a platform, as the registry gave it to a preload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceResolution {
    /// The digests of the tag at that time.
    #[serde(flatten)]
    pub resolution: Resolution,
    /// The namespace whose pods get it.
    pub namespace: String,
    /// The time of the registry's answer, in seconds since 1970.
    pub resolved_at: i64,
}

impl Resolutions {
    /// Returns what a reference means for pods of a namespace.
    pub fn for_namespace(
        &self,
        namespace: Option<&str>,
        reference: &Reference,
        platform: &Platform,
    ) -> Option<Resolution> {
        // A digest means the same for all.
        let namespace = namespace.filter(|_| reference.digest().is_none());
        let own = namespace.and_then(|namespace| {
            let path = self.namespace_path(namespace, reference, platform);
            let own = json_records::read::<NamespaceResolution>(&path)?;
            (own.namespace == namespace).then_some(own.resolution)
        });
        own.or_else(|| self.get(reference, platform))
    }

    /// Remembers what the registry has said of a tag, unless this node has a later answer. Unchanged, it costs no write.
    ///
    /// # Errors
    ///
    /// The filesystem's.
    pub fn put_for_namespace(
        &self,
        reference: &Reference,
        platform: &Platform,
        answer: &NamespaceResolution,
    ) -> Result<(), StoreError> {
        let shared = self.record_path(reference, platform);
        let is_older = || answered_at(&shared).is_some_and(|time| time >= answer.resolved_at);
        let path = self.namespace_path(&answer.namespace, reference, platform);
        let own = json_records::read::<NamespaceResolution>(&path);
        if is_older() || own.as_ref().is_some_and(|own| own.resolved_at >= answer.resolved_at) {
            return Ok(());
        }
        json_records::write_durable(&self.directory.staging(), &path, answer)?;
        self.index.insert(&path, &name(reference), answer.resolution.target());
        if own.is_none() {
            self.directory.count_record();
        }
        // An answer to this node that came meanwhile has not seen this record.
        if is_older() {
            self.remove_record(&path)?;
        }
        Ok(())
    }

    /// Forgets what namespaces were told of a reference: this node has asked the registry itself.
    pub(super) fn supersede_namespaces(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<(), StoreError> {
        if reference.digest().is_some() {
            return Ok(());
        }
        let shared = self.record_path(reference, platform);
        let wanted = platform.to_string();
        for (path, resolution) in self.records_of(reference)? {
            if *path != *shared
                && resolution.platform.as_deref() == Some(wanted.as_str())
                && json_records::read::<NamespaceResolution>(&path).is_some()
            {
                self.remove_record(&path)?;
            }
        }
        Ok(())
    }

    fn namespace_path(
        &self,
        namespace: &str,
        reference: &Reference,
        platform: &Platform,
    ) -> PathBuf {
        let key = object_keys::hash(&[&name(reference), &platform.to_string(), namespace]);
        self.directory.path(FOLDER).join(json_records::name(key))
    }
}

/// Returns when the registry last said what a record has, in seconds since 1970.
fn answered_at(path: &Path) -> Option<i64> {
    let changed = path.metadata().ok()?.modified().ok()?;
    i64::try_from(changed.duration_since(UNIX_EPOCH).ok()?.as_secs()).ok()
}

/// Notes that the registry has said again what a record has. Where that fails, the answer counts as older than it is.
pub(super) fn renew(path: &Path) {
    let now = SystemTime::now();
    let changed = path.metadata().and_then(|metadata| metadata.modified());
    let is_old = |changed| now.duration_since(changed).is_ok_and(|age| age > RENEWAL);
    if changed.is_ok_and(is_old)
        && let Ok(file) = std::fs::File::options().write(true).open(path)
    {
        let _ = file.set_modified(now);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::Store;
    use oci_types::Digest;

    const NOW: i64 = 4_000_000_000;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), crate::tests::options()).expect("a store");
        (folder, store)
    }

    fn tag() -> Reference {
        "r.io/tool:v1".parse().expect("a reference")
    }

    fn resolution(meaning: &str) -> Resolution {
        Resolution {
            reference: tag().to_string(),
            resolved: Digest::of(meaning.as_bytes()),
            manifest: Digest::of(meaning.as_bytes()),
            platform: Some(Platform::of_this_node().to_string()),
        }
    }

    impl Store {
        fn preload_says(&self, namespace: &str, meaning: &str, resolved_at: i64) {
            let resolution = resolution(meaning);
            let answer =
                NamespaceResolution { resolution, namespace: namespace.into(), resolved_at };
            let written =
                self.resolutions().put_for_namespace(&tag(), &Platform::of_this_node(), &answer);
            written.expect("written");
        }

        fn registry_says(&self, meaning: &str) {
            let written =
                self.resolutions().put(&tag(), &Platform::of_this_node(), &resolution(meaning));
            written.expect("written");
        }

        fn means(&self, namespace: &str, meaning: &str) -> bool {
            let found = self.resolutions().for_namespace(
                Some(namespace),
                &tag(),
                &Platform::of_this_node(),
            );
            found.is_some_and(|found| found.manifest == Digest::of(meaning.as_bytes()))
        }
    }

    #[test]
    fn a_preload_speaks_for_its_namespace_until_the_node_asks_itself() {
        let (folder, store) = store();
        store.preload_says("team", "new", NOW);
        assert!(store.means("team", "new"));
        assert_eq!(
            store.resolutions().for_namespace(Some("other"), &tag(), &Platform::of_this_node()),
            None
        );
        assert_eq!(
            store.resolutions().for_namespace(None, &tag(), &Platform::of_this_node()),
            None
        );
        store.preload_says("team", "old", NOW - 1);
        assert!(store.means("team", "new"), "an older answer after a newer one");
        store.preload_says("team", "newer", NOW + 1);
        store.preload_says("other", "theirs", NOW + 1);
        assert!(store.means("team", "newer") && store.means("other", "theirs"));
        drop(store);
        let store = Store::open(folder.path(), crate::tests::options()).expect("opened again");
        assert!(store.means("team", "newer"));
        store.registry_says("shared");
        assert!(store.means("team", "shared") && store.means("other", "shared"));
        assert_eq!(store.resolutions().of_reference(&tag()).expect("records").len(), 1);
    }

    #[test]
    fn an_answer_that_comes_again_is_later_than_what_a_preload_was_told_before() {
        let (_folder, store) = store();
        store.registry_says("shared");
        let path = store.resolutions().record_path(&tag(), &Platform::of_this_node());
        let old = SystemTime::now() - Duration::from_hours(1);
        File::open(&path).expect("a record").set_modified(old).expect("a time");
        let before = answered_at(&path).expect("a time");
        store.preload_says("team", "old", before - 1);
        assert!(store.means("team", "shared"));
        store.registry_says("shared");
        store.preload_says("team", "old", before + 1);
        assert!(store.means("team", "shared"), "the registry has said it again since");
        store.preload_says("team", "new", NOW);
        assert!(store.means("team", "new"));
        store.registry_says("shared");
        assert!(store.means("team", "shared"));
    }
}
