//! An index of the records in a folder by reference and by manifest, in memory.
//!
//! A lookup reads the records that the index names instead of the whole folder. The records on disk
//! are authoritative: one that is gone, or has another reference or manifest by now, is skipped.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::object_name::ObjectName;
use oci_types::Digest;

/// An index of the records in one folder.
#[derive(Default)]
pub(super) struct RecordIndex(Mutex<IndexState>);

#[derive(Default)]
struct IndexState {
    /// True once the records of earlier processes are indexed.
    is_loaded: bool,
    records: HashMap<Arc<Path>, RecordKey>,
    by_reference: HashMap<Arc<str>, HashSet<Arc<Path>>>,
    by_manifest: HashMap<Digest, HashSet<Arc<Path>>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RecordKey {
    reference: Arc<str>,
    target: RecordTarget,
}

/// The manifest that a record leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordTarget {
    pub(super) manifest: Digest,
    /// The index that the manifest was chosen from, where there is one.
    pub(super) index: Option<Digest>,
}

/// A record on the disk.
#[derive(Debug)]
pub(super) struct FoundRecord {
    pub(super) path: PathBuf,
    pub(super) reference: String,
    pub(super) target: RecordTarget,
}

impl RecordIndex {
    /// Adds a record, or replaces what was known of it.
    pub(super) fn insert(&self, record: &Path, reference: &str, target: RecordTarget) {
        self.0.lock().insert(record, reference, target);
    }

    /// Removes a record from the index.
    pub(super) fn remove(&self, record: &Path) {
        self.0.lock().remove(record);
    }

    /// Adds the records that `list` finds on the disk, at the first call. The index stays unlocked
    /// meanwhile, so that publishes go on.
    ///
    /// # Errors
    ///
    /// Those of `list`.
    pub(super) fn load<E>(
        &self,
        list: impl FnOnce() -> Result<Vec<FoundRecord>, E>,
    ) -> Result<(), E> {
        if self.0.lock().is_loaded {
            return Ok(());
        }
        let found = list()?;
        let mut state = self.0.lock();
        for FoundRecord { path, reference, target } in found {
            // A record that was written meanwhile is newer.
            if !state.records.contains_key(path.as_path()) {
                state.insert(&path, &reference, target);
            }
        }
        state.is_loaded = true;
        Ok(())
    }

    /// Returns the records of a reference.
    pub(super) fn of_reference(&self, reference: &str) -> Vec<Arc<Path>> {
        self.0.lock().by_reference.get(reference).into_iter().flatten().cloned().collect()
    }

    /// Returns the records that lead to a manifest.
    pub(super) fn of_manifest(&self, manifest: Digest) -> Vec<Arc<Path>> {
        self.0.lock().by_manifest.get(&manifest).into_iter().flatten().cloned().collect()
    }

    /// Returns the indexes that some manifests were chosen from.
    pub(super) fn indexes_of(&self, manifests: &HashSet<Digest>) -> HashSet<ObjectName> {
        let state = self.0.lock();
        let targets = state.records.values().map(|record| record.target);
        let wanted = targets.filter(|target| manifests.contains(&target.manifest));
        wanted.filter_map(|target| target.index).map(ObjectName::document).collect()
    }
}

impl IndexState {
    fn insert(&mut self, record: &Path, reference: &str, target: RecordTarget) {
        self.remove(record);
        let record: Arc<Path> = record.into();
        let known = self.by_reference.get_key_value(reference).map(|(known, _)| Arc::clone(known));
        let reference = known.unwrap_or_else(|| reference.into());
        self.by_reference.entry(Arc::clone(&reference)).or_default().insert(Arc::clone(&record));
        self.by_manifest.entry(target.manifest).or_default().insert(Arc::clone(&record));
        self.records.insert(record, RecordKey { reference, target });
    }

    fn remove(&mut self, record: &Path) {
        let Some(RecordKey { reference, target }) = self.records.remove(record) else { return };
        remove_value(&mut self.by_reference, &reference, record);
        remove_value(&mut self.by_manifest, &target.manifest, record);
    }
}

/// Removes one value of a key, and the key with its last value.
pub(super) fn remove_value<K, V, Q>(index: &mut HashMap<K, HashSet<V>>, key: &K, value: &Q)
where
    K: Eq + Hash,
    V: Eq + Hash + Borrow<Q>,
    Q: Eq + Hash + ?Sized,
{
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    fn target(manifest: &str) -> RecordTarget {
        RecordTarget { manifest: digest(manifest), index: Some(digest("index")) }
    }

    #[test]
    fn records_are_found_by_both_of_their_keys_until_they_are_removed() {
        let index = RecordIndex::default();
        let (one, two) = (Path::new("1"), Path::new("2"));
        index.insert(one, "r.io/a:v1", target("old"));
        index.insert(two, "r.io/a:v1", target("new"));
        assert_eq!(index.of_reference("r.io/a:v1").len(), 2);
        let indexes_of = |manifest| index.indexes_of(&HashSet::from([digest(manifest)]));
        assert_eq!(indexes_of("old"), HashSet::from([ObjectName::document(digest("index"))]));
        index.insert(one, "r.io/a:v1", target("new"));
        assert!(index.of_manifest(digest("old")).is_empty() && indexes_of("old").is_empty());
        assert_eq!(index.of_manifest(digest("new")).len(), 2);
        index.remove(one);
        index.remove(two);
        assert!(index.of_reference("r.io/a:v1").is_empty());
        assert!(index.0.lock().by_manifest.is_empty());
    }

    #[test]
    fn what_was_written_while_records_are_read_is_newer() {
        let index = RecordIndex::default();
        let record = PathBuf::from("1");
        let loaded = index.load(|| {
            index.insert(&record, "r.io/a:v1", target("new"));
            let (path, reference) = (record.clone(), "r.io/a:v1".to_owned());
            Ok::<_, ()>(vec![FoundRecord { path, reference, target: target("old") }])
        });
        assert!(loaded.is_ok());
        assert_eq!(index.of_manifest(digest("new")).len(), 1);
        assert!(index.load(|| Err(())).is_ok(), "they are read once");
    }
}
