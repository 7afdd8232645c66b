//! The objects of the store, in memory: sizes, links, last uses, and what needs them.
//!
//! Content is found on the disk, by its name; the catalog only answers what may
//! go and how much that would free, without walking anything. It is filled from
//! the records when it is first needed, and every commit and every removal
//! keeps it true. A crash loses nothing: the disk says it all again.
//!
//! A **lease** is a hold on one object for as long as a task of this process
//! works with it: a publish between finding a tree and mounting it, a flight
//! between making a layer and linking it. Looking at an object starts with the
//! lease, so that it cannot go between the look and the use.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::object_name::{ObjectKind, ObjectName};
use super::record_index::remove_value;
use super::space_amount::SpaceAmount;
use oci_types::Digest;

/// Shared by all clones of a store, and by leases.
#[derive(Debug, Default)]
pub struct Catalog {
    state: Mutex<State>,
    /// Something that was leaving is gone, or has stayed.
    settled: Condvar,
}

#[derive(Debug, Default)]
struct State {
    objects: HashMap<ObjectName, Arc<Entry>>,
    /// Numbers of trees that link a file, a layer or a document.
    links: Tally<ObjectName>,
    leases: Tally<ObjectName>,
    /// The trees that records say are shown, by target.
    publications: HashMap<PathBuf, PublishedTree>,
    published: HashMap<ObjectName, HashSet<PathBuf>>,
    /// The manifests that pins hold, by the pin's file.
    pins: HashMap<PathBuf, Digest>,
    pinned: Tally<Digest>,
    /// Being removed at this moment.
    leaving: HashSet<ObjectName>,
    /// The space of all objects.
    space: SpaceAmount,
    /// Numbers of objects of each kind.
    counts: [u64; ObjectKind::ALL.len()],
    /// Trees by the manifest that they were made from.
    manifests: HashMap<Digest, HashSet<ObjectName>>,
    /// Disk space of proofs and resolutions.
    records: SpaceAmount,
    /// Disk space of the versions of followed volumes.
    followed: SpaceAmount,
}

/// A tree at a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedTree {
    /// The generation of the tree.
    pub tree: ObjectName,
    /// True if the kubelet's own record was beside the target at the publish.
    pub kubelet_knew: bool,
}

/// The catalog's record of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Bytes of its own on the disk, without those of the objects that it links.
    pub bytes: u64,
    /// Inodes of its own.
    pub inodes: u64,
    /// Seconds since 1970 of its last publish or unpublish, or of its making.
    pub last_used: i64,
    /// It is not shown anew.
    pub damaged: bool,
    /// The manifest of a tree; none for other objects.
    pub manifest: Option<Digest>,
    /// The files, layers and documents that a tree needs; empty for other objects.
    pub links: Vec<ObjectName>,
}

/// Keeps one object where it is; clones share it.
#[derive(Clone, Debug)]
pub struct Lease(#[expect(dead_code, reason = "its end is what counts")] Arc<Hold>);

#[derive(Debug)]
struct Hold {
    catalog: Arc<Catalog>,
    name: ObjectName,
}

/// The right to remove one object that nothing needs; until it is dropped,
/// a lease of the object waits.
pub struct Condemned {
    catalog: Arc<Catalog>,
    name: ObjectName,
}

/// A copy of what planning needs, taken at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Everything that the store holds.
    pub objects: HashMap<ObjectName, Arc<Entry>>,
    /// Objects with a lease.
    pub leased: HashSet<ObjectName>,
    /// Trees that records say are shown.
    pub published: HashSet<ObjectName>,
    /// Manifests that are pinned.
    pub pinned: HashSet<Digest>,
}

/// The number of objects, and the disk space that they take together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of objects, documents, records and downloads, each object once.
    pub bytes: u64,
    /// The number of inodes.
    pub inodes: u64,
    /// Files, layers and trees.
    pub objects: u64,
}

impl Catalog {
    /// Holds an object. Waits while it is being removed: then it is not there any more.
    #[must_use]
    pub fn lease(self: &Arc<Self>, name: ObjectName) -> Lease {
        let mut state = self.state.lock();
        while state.leaving.contains(&name) {
            self.settled.wait(&mut state);
        }
        state.leases.add(name.clone());
        drop(state);
        Lease(Arc::new(Hold { catalog: Arc::clone(self), name }))
    }

    /// Adds what was made, or was found at the start. What is known already stays.
    pub fn add(&self, name: ObjectName, entry: Entry) {
        let mut state = self.state.lock();
        if state.objects.contains_key(&name) {
            return;
        }
        state.space = state.space.plus(entry.space());
        for link in &entry.links {
            state.links.add(link.clone());
        }
        if let Some(manifest) = entry.manifest {
            state.manifests.entry(manifest).or_default().insert(name.clone());
        }
        state.counts[name.kind() as usize] += 1;
        state.objects.insert(name, Arc::new(entry));
    }

    /// Removes a document whose file is gone, even if it is leased.
    pub fn remove_document(&self, name: &ObjectName) {
        self.state.lock().forget(name);
    }

    /// Adds and subtracts disk space of proofs and resolutions.
    pub fn count_records(&self, added: SpaceAmount, removed: SpaceAmount) {
        let mut state = self.state.lock();
        state.records = state.records.plus(added).less(removed);
    }

    /// Adds and subtracts disk space of the versions of followed volumes.
    pub fn count_followed(&self, added: SpaceAmount, removed: SpaceAmount) {
        let mut state = self.state.lock();
        state.followed = state.followed.plus(added).less(removed);
    }

    /// Sets the disk space of proofs and resolutions, as it was counted on the disk.
    pub fn set_records(&self, records: SpaceAmount) {
        self.state.lock().records = records;
    }

    /// Returns the disk space of proofs and resolutions.
    pub fn records(&self) -> SpaceAmount {
        self.state.lock().records
    }

    /// Remembers that a tree was published or unpublished.
    pub fn used(&self, name: &ObjectName, now: i64) {
        if let Some(entry) = self.state.lock().objects.get_mut(name) {
            Arc::make_mut(entry).last_used = now;
        }
    }

    /// Remembers that an object is not shown anew.
    pub fn damaged(&self, name: &ObjectName) {
        if let Some(entry) = self.state.lock().objects.get_mut(name) {
            Arc::make_mut(entry).damaged = true;
        }
    }

    /// The trees that link an object, but for those that are damaged themselves.
    pub fn sound_trees_of(&self, object: &ObjectName) -> Vec<ObjectName> {
        let state = self.state.lock();
        if !state.links.has(object) {
            return Vec::new();
        }
        let links_it = |entry: &Entry| !entry.damaged && entry.links.contains(object);
        let trees = state.objects.iter().filter(|(_, entry)| links_it(entry));
        trees.map(|(name, _)| name.clone()).collect()
    }

    /// A target shows a tree from now on.
    pub fn publish(&self, target: &Path, shown: PublishedTree) {
        let mut state = self.state.lock();
        state.unpublish(target);
        state.published.entry(shown.tree.clone()).or_default().insert(target.to_owned());
        state.publications.insert(target.to_owned(), shown);
    }

    /// A target shows nothing of ours any more; says what it has shown.
    pub fn unpublish(&self, target: &Path) -> Option<ObjectName> {
        self.state.lock().unpublish(target)
    }

    /// Returns all targets with the trees that they show.
    pub fn publications(&self) -> Vec<(PathBuf, PublishedTree)> {
        let state = self.state.lock();
        state.publications.iter().map(|(target, shown)| (target.clone(), shown.clone())).collect()
    }

    /// Returns the entry of an object; none where it is not in the store.
    pub fn entry(&self, name: &ObjectName) -> Option<Arc<Entry>> {
        self.state.lock().objects.get(name).cloned()
    }

    /// Returns the number of objects of a kind.
    pub fn count(&self, kind: ObjectKind) -> u64 {
        self.state.lock().counts[kind as usize]
    }

    /// Returns the number of targets that show a tree.
    pub fn count_publications(&self) -> usize {
        self.state.lock().publications.len()
    }

    /// Returns whether a record says that a target shows something.
    pub fn is_published(&self, target: &Path) -> bool {
        self.state.lock().publications.contains_key(target)
    }

    /// Returns the targets that show a tree.
    pub fn targets_of(&self, tree: &ObjectName) -> Vec<PathBuf> {
        self.state.lock().published.get(tree).into_iter().flatten().cloned().collect()
    }

    /// Returns the trees of a manifest with their entries, damaged ones included.
    pub fn trees_of(&self, manifest: Digest) -> Vec<(ObjectName, Arc<Entry>)> {
        let state = self.state.lock();
        let names = state.manifests.get(&manifest).into_iter().flatten();
        names
            .filter_map(|name| Some((name.clone(), Arc::clone(state.objects.get(name)?))))
            .collect()
    }

    /// Returns all trees with their entries, damaged ones included.
    pub fn trees(&self) -> Vec<(ObjectName, Arc<Entry>)> {
        let state = self.state.lock();
        let trees = state.objects.iter().filter(|(name, _)| name.kind() == ObjectKind::Tree);
        trees.map(|(name, entry)| (name.clone(), Arc::clone(entry))).collect()
    }

    /// Returns the manifests that are pinned.
    pub fn pinned(&self) -> HashSet<Digest> {
        self.state.lock().pinned.keys()
    }

    /// Returns the disk space of the trees of some manifests and of the objects that they link, each
    /// object once.
    pub fn space_of_manifests(&self, manifests: &HashSet<Digest>) -> SpaceAmount {
        let (mut counted, mut space) = (HashSet::new(), SpaceAmount::default());
        for manifest in manifests {
            // Locked for each manifest alone, so that publishes do not wait for all of them.
            let state = self.state.lock();
            let trees = state.manifests.get(manifest).into_iter().flatten();
            for (name, tree) in trees.filter_map(|tree| state.objects.get_key_value(tree)) {
                for object in tree.links.iter().chain([name]) {
                    if counted.insert(object.clone())
                        && let Some(entry) = state.objects.get(object)
                    {
                        space = space.plus(entry.space());
                    }
                }
            }
        }
        space
    }

    /// A pin holds a manifest from now on.
    pub fn pin(&self, pin: &Path, manifest: Digest) {
        let mut state = self.state.lock();
        state.pinned.add(manifest);
        if let Some(earlier) = state.pins.insert(pin.to_owned(), manifest) {
            state.pinned.remove(&earlier);
        }
    }

    /// A pin is gone.
    pub fn unpin(&self, pin: &Path) {
        let mut state = self.state.lock();
        if let Some(manifest) = state.pins.remove(pin) {
            state.pinned.remove(&manifest);
        }
    }

    /// Returns the right to remove an object, if nothing needs it at this moment.
    pub fn condemn(self: &Arc<Self>, name: &ObjectName) -> Option<Condemned> {
        let mut state = self.state.lock();
        let entry = state.objects.get(name)?;
        let manifest = entry.manifest.or_else(|| name.document_digest());
        let pinned = manifest.is_some_and(|manifest| state.pinned.has(&manifest));
        // A pin keeps content that can be shown; a damaged generation cannot.
        let pinned = pinned && !entry.damaged;
        let needed = pinned
            || state.leases.has(name)
            || state.published.contains_key(name)
            || state.links.has(name)
            || state.leaving.contains(name);
        if needed {
            return None;
        }
        state.leaving.insert(name.clone());
        Some(Condemned { catalog: Arc::clone(self), name: name.clone() })
    }

    /// Copies the facts that planning needs.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        Snapshot {
            objects: state.objects.clone(),
            leased: state.leases.keys(),
            published: state.published.keys().cloned().collect(),
            pinned: state.pinned.keys(),
        }
    }

    /// Returns the names of all objects but documents, each with a flag that is set if it is damaged.
    pub fn names(&self) -> Vec<(ObjectName, bool)> {
        let state = self.state.lock();
        let objects = state.objects.iter().filter(|(name, _)| name.kind() != ObjectKind::Document);
        objects.map(|(name, entry)| (name.clone(), entry.damaged)).collect()
    }

    /// Returns the disk space of all objects and records, of which each takes `record`.
    pub fn usage(&self, record: SpaceAmount) -> Usage {
        let state = self.state.lock();
        let records = state.publications.len().saturating_add(state.pins.len()) as u64;
        let space =
            state.space.plus(state.records).plus(record.times(records)).plus(state.followed);
        let objects = (state.objects.len() as u64)
            .saturating_sub(state.counts[ObjectKind::Document as usize]);
        Usage { bytes: space.bytes, inodes: space.inodes, objects }
    }
}

impl State {
    fn unpublish(&mut self, target: &Path) -> Option<ObjectName> {
        let PublishedTree { tree, .. } = self.publications.remove(target)?;
        remove_value(&mut self.published, &tree, target);
        Some(tree)
    }

    fn forget(&mut self, name: &ObjectName) {
        let Some(entry) = self.objects.remove(name) else { return };
        let count = &mut self.counts[name.kind() as usize];
        *count = count.saturating_sub(1);
        self.space = self.space.less(entry.space());
        for link in &entry.links {
            self.links.remove(link);
        }
        if let Some(manifest) = entry.manifest {
            remove_value(&mut self.manifests, &manifest, name);
        }
    }
}

impl Snapshot {
    /// Returns the manifests that all trees were made from.
    pub fn manifests(&self) -> HashSet<Digest> {
        let of_tree = |entry: &Arc<Entry>| {
            let parts = entry.is_composite().then(|| entry.documents().collect::<Vec<_>>());
            entry.manifest.into_iter().chain(parts.into_iter().flatten()).collect::<Vec<_>>()
        };
        self.objects.values().flat_map(of_tree).collect()
    }
}

impl Entry {
    /// Returns whether it is a tree of several artifacts, whose own manifest is no document.
    pub fn is_composite(&self) -> bool {
        self.manifest.is_some_and(|manifest| self.documents().all(|document| document != manifest))
    }

    /// Returns the manifests and configurations that a tree needs.
    pub fn documents(&self) -> impl Iterator<Item = Digest> {
        self.links.iter().filter_map(ObjectName::document_digest)
    }

    /// Returns the entry of an object that is made now and links nothing.
    pub(super) fn new(bytes: u64, inodes: u64) -> Self {
        let last_used = jiff::Timestamp::now().as_second();
        Self { bytes, inodes, last_used, damaged: false, manifest: None, links: Vec::new() }
    }

    /// Returns the disk space of the object by itself.
    pub(super) fn space(&self) -> SpaceAmount {
        SpaceAmount { bytes: self.bytes, inodes: self.inodes }
    }
}

impl Condemned {
    /// The object has lost its name: what it linked is free of it.
    pub fn removed(self) {
        self.catalog.state.lock().forget(&self.name);
    }
}

impl Drop for Condemned {
    fn drop(&mut self) {
        self.catalog.state.lock().leaving.remove(&self.name);
        self.catalog.settled.notify_all();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.catalog.state.lock().leases.remove(&self.name);
    }
}

/// Two holds on one object are alike: what is held shows in the object that has the lease.
impl PartialEq for Lease {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Lease {}

/// The number of times that each key was added and not yet removed.
#[derive(Debug)]
struct Tally<K>(HashMap<K, usize>);

impl<K> Default for Tally<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Clone + Eq + Hash> Tally<K> {
    fn add(&mut self, key: K) {
        *self.0.entry(key).or_default() += 1;
    }

    fn remove(&mut self, key: &K) {
        if let Some(count) = self.0.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(key);
            }
        }
    }

    fn has(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    fn keys(&self) -> HashSet<K> {
        self.0.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "trees/a/1" with a key made of "a".
    fn name(text: &str) -> ObjectName {
        let [folder, key, generation] = text.split('/').collect::<Vec<_>>()[..] else {
            panic!("three parts");
        };
        let key = Digest::of(key.as_bytes()).hex();
        ObjectName::parse(&format!("{folder}/{key}/{generation}")).expect("a name")
    }

    fn shown(tree: &ObjectName) -> PublishedTree {
        PublishedTree { tree: tree.clone(), kubelet_knew: true }
    }

    fn entry(manifest: Option<Digest>, links: &[&ObjectName]) -> Entry {
        let links = links.iter().map(|&link| link.clone()).collect();
        Entry { bytes: 10, inodes: 1, last_used: 0, damaged: false, manifest, links }
    }

    #[test]
    fn an_object_in_use_cannot_be_condemned() {
        let catalog = Arc::new(Catalog::default());
        let (tree, layer) = (name("trees/a/1"), name("layers/b/1"));
        let manifest = Digest::of(b"manifest");
        catalog.add(layer.clone(), entry(None, &[]));
        catalog.add(tree.clone(), entry(Some(manifest), &[&layer]));
        assert_eq!(
            catalog.usage(SpaceAmount::default()),
            Usage { bytes: 20, inodes: 2, objects: 2 }
        );

        assert!(catalog.condemn(&layer).is_none(), "a tree links it");
        let lease = catalog.lease(tree.clone());
        assert!(catalog.condemn(&tree).is_none(), "it is leased");
        drop(lease);
        catalog.publish(Path::new("/target"), shown(&tree));
        assert!(catalog.condemn(&tree).is_none(), "it is shown");
        assert_eq!(catalog.unpublish(Path::new("/target")), Some(tree.clone()));
        catalog.pin(Path::new("pin"), manifest);
        assert!(catalog.condemn(&tree).is_none(), "it is pinned");
        catalog.unpin(Path::new("pin"));

        catalog.condemn(&tree).expect("nobody needs it").removed();
        catalog.condemn(&layer).expect("nobody links it").removed();
        assert_eq!(catalog.usage(SpaceAmount::default()), Usage::default());
    }

    #[test]
    fn a_lookup_waits_for_a_removal_to_end() {
        let catalog = Arc::new(Catalog::default());
        let tree = name("trees/a/1");
        catalog.add(tree.clone(), entry(None, &[]));
        let condemned = catalog.condemn(&tree).expect("nobody needs it");
        assert!(catalog.condemn(&tree).is_none(), "one removal at a time");
        let looking = std::thread::spawn({
            let (catalog, tree) = (Arc::clone(&catalog), tree.clone());
            move || catalog.lease(tree)
        });
        // Whether it waits already or comes later: it returns only after the removal.
        assert!(!looking.is_finished());
        condemned.removed();
        let _lease = looking.join().expect("a lease");
        assert!(catalog.condemn(&tree).is_none(), "it is gone");
    }

    #[test]
    fn what_manifests_take_together_counts_once() {
        let catalog = Arc::new(Catalog::default());
        let manifests = [b"one", b"two", b"six"].map(|text| Digest::of(text));
        let layer = name("layers/shared/1");
        catalog.add(layer.clone(), entry(None, &[]));
        for (number, &manifest) in (1..).zip(&manifests) {
            let tree = name(&format!("trees/{number}/1"));
            catalog.add(tree, entry(Some(manifest), &[&layer]));
        }
        let space =
            |manifests: &[Digest]| catalog.space_of_manifests(&manifests.iter().copied().collect());
        assert_eq!(space(&manifests[..2]), SpaceAmount { bytes: 30, inodes: 3 });
        assert_eq!(space(&[Digest::of(b"other")]), SpaceAmount::default());
    }

    #[test]
    fn a_target_shows_one_tree() {
        let catalog = Arc::new(Catalog::default());
        let (one, two) = (name("trees/a/1"), name("trees/a/2"));
        for tree in [&one, &two] {
            catalog.add(tree.clone(), entry(None, &[]));
            catalog.publish(Path::new("/target"), shown(tree));
        }
        catalog.publish(Path::new("/target"), shown(&two));
        assert!(catalog.condemn(&one).is_some());
        assert!(catalog.condemn(&two).is_none());
        catalog.unpublish(Path::new("/target"));
        assert!(catalog.condemn(&two).is_some());
    }
}
