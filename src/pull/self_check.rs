//! Reads everything back, and makes anew what was found damaged.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::artifact::{Object, Part, PartRule, Shape};
use super::candidates::Candidates;
use super::error::PullError;
use super::flights::{Outcome, Ticket};
use super::progress::Progress;
use super::resolve::{Resolved, blocking};
use super::room::layer_key;
use super::tenant::{Caller, Tenant};
use super::want::{IfUnavailable, Priority, PullPolicy, Want};
use super::{Inner, ProgressView, Puller};
use crate::oci::credentials::Keyring;
use crate::oci::manifest::{ImageManifest, Manifest};
use crate::oci::{Digest, Platform, Reference};
use crate::store::resolutions::Resolution;
use crate::store::trees::{Objects, View};
use crate::store::verify::{Finding, ReadPace, Reader, Verified};
use crate::store::{ObjectKind, ObjectName, StoreError, Tree, TreeKey};
use crate::unpack::merge::TreePlan;
use crate::unpack::{Limits, Selection};

/// Files and layers of one tree that are read at once.
const READS_AT_ONCE: usize = 4;

/// A tree that was found damaged.
#[derive(Clone, Debug)]
pub struct Damaged {
    /// Which.
    pub key: TreeKey,
    /// Its manifest.
    pub manifest: Digest,
    /// What shaped it.
    pub view: View,
}

/// What is read back at once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    /// All manifests, indexes and configurations.
    Blobs,
    /// A file, a layer, or the names of a tree.
    Object(ObjectName),
}

/// What reading one item back came to.
#[derive(Clone, Debug, Default)]
pub struct ReadBack {
    /// What was read.
    pub verified: Verified,
    /// How much of it is damaged.
    pub findings: u64,
    /// Trees that are to be made anew.
    pub damaged: Vec<Damaged>,
}

/// What became of a damaged tree.
#[derive(Debug)]
pub enum Repaired {
    /// A new generation is in the store; whoever has the old one mounted keeps it.
    Anew(Reference),
    /// It will be fetched by the next publish, with that pod's own credentials.
    Later(String),
}

impl Puller {
    /// Reads everything back. What is damaged is never shown anew.
    ///
    /// # Errors
    ///
    /// Only where the store itself cannot be read: damage is no error.
    pub async fn check_content(
        &self,
        mut found: impl FnMut(Finding) + Send + 'static,
    ) -> Result<(Verified, Vec<Damaged>), PullError> {
        let inner = Arc::clone(&self.0);
        blocking(move || {
            let mut reader = Reader::new(ReadPace::Full);
            let store = &inner.store;
            let before = store.sound_trees()?;
            store.verify_blobs(&mut reader, &mut found)?;
            store.verify_objects(&mut reader, &mut found)?;
            for tree in store.sound_trees()? {
                inner.verify_tree(&tree, &mut reader, &mut found)?;
            }
            let sound = store.sound_trees()?;
            let sound: HashSet<_> = sound.iter().map(|tree| (tree.key, tree.generation)).collect();
            let damaged =
                before.into_iter().filter(|tree| !sound.contains(&(tree.key, tree.generation)));
            let damaged = damaged.map(Damaged::from);
            Ok((reader.verified, damaged.collect()))
        })
        .await
    }

    /// Waits until a tree that is about to be shown has been read back, if it is of an earlier
    /// format. Returns whether it is sound; one that is not is marked, and is to be acquired again.
    ///
    /// # Errors
    ///
    /// Those of the node itself: damage is no error.
    pub async fn is_sound(
        &self,
        tree: &Tree,
        caller: Caller,
        view: &ProgressView,
    ) -> Outcome<bool> {
        let name = ObjectName::tree(tree.key, tree.generation);
        if !self.0.store.is_unread(&name) {
            return Ok(true);
        }
        let mut ticket = self.0.read(Item::Object(name), caller);
        view.show(ticket.progress());
        ticket.outcome().await.map(|read| read.is_sound())
    }

    /// Reads one item back, when no pod wants the processor or the disk.
    ///
    /// # Errors
    ///
    /// Those of the node itself: damage is no error.
    pub async fn scrub(&self, item: Item) -> Outcome<ReadBack> {
        self.0.read(item, Caller::new(Priority::Warm, Tenant::Config)).outcome().await
    }

    /// Makes a damaged tree anew, from a registry that a reference of it names.
    pub async fn repair(&self, damaged: &Damaged) -> Result<Repaired, PullError> {
        let (inner, manifest) = (Arc::clone(&self.0), damaged.manifest);
        let references = blocking(move || {
            let resolutions = inner.store.resolutions()?.into_iter();
            let of_manifest = resolutions.filter(|resolution| resolution.manifest == manifest);
            Ok(of_manifest
                .filter_map(|Resolution { reference, .. }| reference.parse().ok())
                .collect())
        });
        let references: Vec<Reference> = references.await?;
        let mut last = "no reference leads to it any more".to_owned();
        for reference in references {
            let want = damaged.want(&reference)?;
            let (inner, for_candidates) = (Arc::clone(&self.0), want.clone());
            let candidates = blocking(move || Ok(inner.candidates(&for_candidates))).await?;
            for candidate in candidates.all().iter().cloned().chain([Candidates::anonymous()]) {
                let resolved = Resolved::for_the_node(manifest, candidates.clone(), candidate);
                match self.tree(&want, &resolved, &ProgressView::default()).await {
                    Ok(_) => return Ok(Repaired::Anew(reference)),
                    Err(error) => last = format!("{reference}: {error}"),
                }
            }
        }
        Ok(Repaired::Later(last))
    }
}

impl Damaged {
    fn want(&self, reference: &Reference) -> Result<Want, PullError> {
        Ok(Want {
            reference: reference.clone(),
            platform: Platform::of_this_node(),
            policy: PullPolicy::IfNotPresent,
            if_unavailable: IfUnavailable::Fail,
            selection: shape(&self.view)?.selection,
            permissions: self.view.permissions,
            file_mode: self.view.file_mode,
            keyring: Keyring::default(),
            identity: None,
            priority: Priority::Warm,
            tenant: Tenant::Config,
            maximum_bytes: None,
            signature: None,
        })
    }
}

impl From<Tree> for Damaged {
    fn from(tree: Tree) -> Self {
        let Tree { key, record, .. } = tree;
        Self { key, manifest: record.manifest, view: record.view }
    }
}

impl ReadBack {
    /// Whether nothing is wrong with it.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.findings == 0
    }
}

/// Stops a reader when nobody waits for it any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Inner {
    /// Reads objects of an earlier format back before they are linked. Damaged ones are marked, so
    /// that they are not found any more.
    pub(super) async fn read_before_use(
        self: &Arc<Self>,
        objects: impl IntoIterator<Item = ObjectName, IntoIter: Send>,
        progress: &Progress,
    ) -> Result<bool, PullError> {
        let mut are_sound = true;
        let mut tickets = objects.into_iter().enumerate().map(|(number, name)| {
            let ticket = self.read(Item::Object(name), progress.caller());
            progress.wait_for(number, ticket.progress());
            ticket
        });
        loop {
            let mut some: Vec<_> = tickets.by_ref().take(READS_AT_ONCE).collect();
            if some.is_empty() {
                return Ok(are_sound);
            }
            for ticket in &mut some {
                are_sound &= ticket.outcome().await.map_err(PullError::Shared)?.is_sound();
            }
        }
    }

    /// Joins the reading of an item, or begins it.
    fn read(self: &Arc<Self>, item: Item, caller: Caller) -> Ticket<ReadBack> {
        self.readings
            .join(item.clone(), caller, |progress| Arc::clone(self).read_item(item, progress))
    }

    async fn read_item(
        self: Arc<Self>,
        item: Item,
        progress: Arc<Progress>,
    ) -> Result<ReadBack, PullError> {
        progress.reads_back();
        if let Item::Object(name) = &item
            && let Some((links, bytes)) = self.unread_links(name).await?
        {
            progress.expect(bytes);
            // What is wrong with them is said of them, and their trees are marked.
            if !self.read_before_use(links, &progress).await? {
                return Ok(ReadBack { findings: 1, ..ReadBack::default() });
            }
        }
        // As few at once as layers are unpacked; what nobody waits for is one at a time.
        let permit = match progress.priority() {
            Priority::Pod => Some(self.unpackers.permit(&progress).await?),
            Priority::Warm => None,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let _stop = StopOnDrop(Arc::clone(&stop));
        let pace = match progress.priority() {
            Priority::Pod => ReadPace::Urgent,
            Priority::Warm => ReadPace::Gentle,
        };
        blocking(move || {
            let _permit = permit;
            let mut reader =
                Reader::new(pace).stopped_by(stop).telling(move |bytes| progress.arrived(bytes));
            self.verify_item(&item, &mut reader)
        })
        .await
    }

    /// The unread files and layers of an unread tree, and what all that it links takes.
    async fn unread_links(
        self: &Arc<Self>,
        name: &ObjectName,
    ) -> Result<Option<(Vec<ObjectName>, u64)>, PullError> {
        if name.kind() != ObjectKind::Tree || !self.store.is_unread(name) {
            return Ok(None);
        }
        let (inner, name) = (Arc::clone(self), name.clone());
        blocking(move || {
            let Some(tree) = inner.store.named_tree(&name) else { return Ok(None) };
            let mut links = inner.store.links(&tree);
            links.retain(|link| inner.store.is_unread(link));
            Ok(Some((links, tree.record.bytes)))
        })
        .await
    }

    fn verify_item(&self, item: &Item, reader: &mut Reader) -> Result<ReadBack, PullError> {
        let mut findings = 0;
        let mut found = |finding: Finding| {
            findings += 1;
            finding.log();
        };
        let store = &self.store;
        let trees = match item {
            Item::Blobs => {
                store.verify_blobs(reader, &mut found)?;
                Vec::new()
            }
            Item::Object(name) if name.kind() == ObjectKind::Tree => match store.named_tree(name) {
                Some(tree) if !store.is_damaged(name) => {
                    self.verify_tree(&tree, reader, &mut found)?;
                    if store.is_damaged(name) { vec![name.clone()] } else { Vec::new() }
                }
                // Made anew still, where that was not possible when it was found.
                Some(tree) if store.tree(tree.key)?.is_none() => vec![name.clone()],
                _ => Vec::new(),
            },
            Item::Object(name) => store.verify_object(name, reader, &mut found)?,
        };
        let damaged = trees.iter().filter_map(|name| store.named_tree(name)).map(Damaged::from);
        Ok(ReadBack { verified: reader.verified, findings, damaged: damaged.collect() })
    }

    fn verify_tree(
        &self,
        tree: &Tree,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), PullError> {
        match self.plan_of(tree) {
            Ok(Some((plan, objects))) => {
                self.store.verify_tree(tree, (&plan, &objects), reader, found)?;
                Ok(())
            }
            Ok(None) => {
                self.tree_is_unknown(tree, "its manifest, or what it links, is not here", found)
            }
            Err(PullError::Store(error @ StoreError::Io { .. })) => Err(error.into()),
            Err(error) => self.tree_is_unknown(tree, &error.to_string(), found),
        }
    }

    /// A tree cannot be compared with its layers. Of the current format its files are known to be
    /// good, and its names were when it was made.
    fn tree_is_unknown(
        &self,
        tree: &Tree,
        why: &str,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), PullError> {
        if self.store.is_unread(&ObjectName::tree(tree.key, tree.generation)) {
            return Ok(self.store.refuse_tree(tree, why, found)?);
        }
        tracing::warn!(tree = %tree.key, why, "a tree cannot be compared with its layers");
        Ok(())
    }

    /// What a tree should be, by its manifest and what it links.
    fn plan_of(&self, tree: &Tree) -> Result<Option<(TreePlan, Objects)>, PullError> {
        let Some(bytes) = self.store.blob(tree.record.manifest)? else { return Ok(None) };
        // What was accepted once is compared whatever the limits are now.
        let limits = Limits::largest();
        let Manifest::Image(image) = Manifest::parse(&bytes, None, limits.manifest())? else {
            return Ok(None);
        };
        let shape = shape(&tree.record.view)?;
        let Some(parts) = self.linked_parts(tree, (&image, &limits), &shape)? else {
            return Ok(None);
        };
        self.plan(parts, &shape, &limits).map(Some)
    }

    /// The very generations of files and layers that a tree was linked from.
    fn linked_parts(
        &self,
        tree: &Tree,
        (image, limits): (&ImageManifest, &Limits),
        shape: &Shape,
    ) -> Result<Option<Vec<Object>>, PullError> {
        let links = self.store.links(tree);
        let mut objects = Vec::new();
        for Part { layer, descriptor, rule } in shape.parts(image, limits)? {
            let digest = descriptor.digest;
            let object = match rule {
                PartRule::File(rule, permissions) => self
                    .store
                    .linked_file(digest, permissions, &links)
                    .map(|file| Object::File(layer, rule, descriptor.size, file)),
                PartRule::Archive(rule) => {
                    let folder = format!("layers/{}/", layer_key(digest, &rule, shape.permissions));
                    let of_key = |name: &&ObjectName| name.as_str().starts_with(&folder);
                    let unpacked =
                        links.iter().find(of_key).and_then(|name| self.store.linked_layer(name));
                    unpacked.map(|unpacked| Object::Layer(layer, rule, unpacked.view()))
                }
            };
            let Some(object) = object else { return Ok(None) };
            objects.push(object);
        }
        Ok(Some(objects))
    }
}

fn shape(view: &View) -> Result<Shape, PullError> {
    let selection = Selection::parse(&view.include, &view.exclude).map_err(|error| {
        let what = error.to_string();
        StoreError::Damaged { path: "tree.json".into(), what }
    })?;
    Ok(Shape { selection, permissions: view.permissions, file_mode: view.file_mode })
}
