//! Content from before the current format, until it has been read back.
//!
//! ```text
//! <state>/read-back/         exists while some content of an earlier format may be unread
//! <state>/read-back/<name>   an object that needs no reading any more: it was found sound, or made since
//! ```
//!
//! A file is named like its object, with dots for slashes. Everything that is not named is unread:
//! it is compared with its digest or checksums before a volume shows it or a tree links it. So an
//! upgrade makes one folder, however much the store holds, and whatever a crash loses of the folder
//! costs one more reading and nothing else. Nothing in it is synced. The folder goes, in one step,
//! when nothing is unread; from then on the question costs one load of a flag.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::error::{IoContext as _, StoreError};
use super::folder_listing::{current_generation, names};
use super::{LayerKey, ObjectName, durable_rename};
use oci_types::Digest;

/// Below the state directory.
const FOLDER: &str = "read-back";

/// The objects that need no reading any more, while others do.
pub struct ReadBack {
    root: PathBuf,
    is_under_way: AtomicBool,
    done: Mutex<HashSet<ObjectName>>,
}

impl ReadBack {
    /// Marks all content of a state directory as unread. Durable when it returns.
    pub(super) fn begin(root: &Path) -> Result<(), StoreError> {
        let folder = root.join(FOLDER);
        // What was sound before an earlier build came back to the store may have changed since.
        let grave = root.join("staging").join(durable_rename::temporary_name());
        fs::rename(&folder, &grave).if_there("rename", &folder)?;
        // The next start sweeps what stays.
        let _ = fs::remove_dir_all(&grave);
        durable_rename::create_folder(&folder).map(|_| ())
    }

    /// Reads how far an earlier process has come.
    pub(super) fn load(root: &Path) -> Result<Self, StoreError> {
        let folder = root.join(FOLDER);
        let is_under_way = folder.symlink_metadata().if_there("look at", &folder)?.is_some();
        if is_under_way {
            super::state_ownership::check(root, &[FOLDER])?;
        }
        let done = names(&folder)?;
        let done = done.iter().filter_map(|name| ObjectName::parse(&name.replace('.', "/")));
        Ok(Self {
            root: root.to_owned(),
            is_under_way: AtomicBool::new(is_under_way),
            done: Mutex::new(done.collect()),
        })
    }

    /// Returns whether an object must be read back before it is shown or linked.
    pub fn is_unread(&self, object: &ObjectName) -> bool {
        self.is_under_way() && !self.done.lock().contains(object)
    }

    /// Returns the current generation of a layer, if it is unread.
    pub fn unread_layer(&self, key: LayerKey) -> Result<Option<ObjectName>, StoreError> {
        if !self.is_under_way() {
            return Ok(None);
        }
        let folder = self.root.join("layers").join(key.to_string());
        let name = current_generation(&folder)?.map(|number| ObjectName::layer(key, number));
        Ok(name.filter(|name| self.is_unread(name)))
    }

    /// Returns the files of a blob that are unread, whatever their modes.
    pub fn unread_files(&self, digest: Digest) -> Result<Vec<ObjectName>, StoreError> {
        if !self.is_under_way() {
            return Ok(Vec::new());
        }
        let below = format!("files/{}", digest.hex());
        let folder = self.root.join(&below);
        let mut unread = Vec::new();
        for variant in names(&folder)? {
            let Some(generation) = current_generation(&folder.join(&variant))? else { continue };
            let name = ObjectName::parse(&format!("{below}/{variant}/{generation}"));
            unread.extend(name.filter(|name| self.is_unread(name)));
        }
        Ok(unread)
    }

    /// Notes that an object needs no reading any more.
    pub(super) fn was_read(&self, object: &ObjectName) {
        if !self.is_under_way() || !self.done.lock().insert(object.clone()) {
            return;
        }
        let path = self.root.join(FOLDER).join(object.as_str().replace('/', "."));
        if let Err(error) = File::create(&path) {
            tracing::debug!(path = %path.display(), %error, "it will be read back once more");
        }
    }

    /// Returns whether some content may be unread.
    pub(super) fn is_under_way(&self) -> bool {
        self.is_under_way.load(Ordering::Relaxed)
    }

    /// Ends the reading: nothing is unread any more.
    pub(super) fn end(&self) -> Result<(), StoreError> {
        let folder = self.root.join(FOLDER);
        let grave = self.root.join("staging").join(durable_rename::temporary_name());
        fs::rename(&folder, &grave).io_context("rename", &folder)?;
        self.is_under_way.store(false, Ordering::Relaxed);
        self.done.lock().clear();
        tracing::info!("all content of an earlier format has been read back");
        // The next start sweeps what stays.
        let _ = fs::remove_dir_all(&grave);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    const EARLIER: &str = "csi-driver-oci 1\n";

    fn open(root: &Path) -> Store {
        Store::open(root, crate::tests::options()).expect("a store")
    }

    fn layer(root: &Path, seed: &str) -> ObjectName {
        let name = ObjectName::layer(LayerKey::new(Digest::of(seed.as_bytes()), "", ""), 1);
        fs::create_dir_all(root.join(name.as_str())).expect("a folder");
        name
    }

    #[test]
    fn content_of_an_earlier_format_is_unread_until_it_was_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        drop(open(root));
        let [one, two] = ["one", "two"].map(|seed| layer(root, seed));
        assert!(!open(root).read_back().is_unread(&one), "this build has made it");
        fs::write(root.join("format"), EARLIER).expect("written");
        let store = open(root);
        assert_eq!(fs::read(root.join("format")).expect("readable"), b"csi-driver-oci 2\n");
        assert!(store.read_back().is_unread(&one) && store.read_back().is_unread(&two));
        store.read_back().was_read(&one);
        drop(store);
        let store = open(root);
        assert!(!store.read_back().is_unread(&one), "a restart forgets nothing");
        assert_eq!(
            store.inventory().unread_objects().expect("readable"),
            std::slice::from_ref(&two)
        );
        store.inventory().finish_reading_back().expect("not yet");
        assert!(store.read_back().is_unread(&two) && root.join(FOLDER).exists());
        store.read_back().was_read(&two);
        store.inventory().finish_reading_back().expect("ended");
        assert!(!store.read_back().is_unread(&layer(root, "three")) && !root.join(FOLDER).exists());
        assert_eq!(names(&root.join("staging")).expect("readable"), Vec::<String>::new());
    }

    #[test]
    fn an_upgrade_that_ends_early_begins_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        drop(open(root));
        let old = layer(root, "old");
        fs::write(root.join("format"), EARLIER).expect("written");
        ReadBack::begin(root).expect("begun");
        // The process ends here; an earlier build may serve the store once more.
        let between = layer(root, "between");
        let store = open(root);
        assert!(store.read_back().is_unread(&old) && store.read_back().is_unread(&between));
        // Also when it was brought back by hand, after some of it had been read.
        store.read_back().was_read(&old);
        drop(store);
        fs::write(root.join("format"), EARLIER).expect("written");
        assert!(open(root).read_back().is_unread(&old));
    }

    #[test]
    fn content_without_a_format_is_unread_and_an_empty_folder_is_not_asked() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        drop(open(root));
        assert!(!root.join(FOLDER).exists());
        let name = layer(root, "old");
        fs::remove_file(root.join("format")).expect("removed");
        assert!(open(root).read_back().is_unread(&name));
    }
}
