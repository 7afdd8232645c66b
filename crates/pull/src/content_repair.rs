//! Reads everything back, and makes anew what was found damaged.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::artifact_request::{Priority, Want};
use super::artifact_tree::LARGE_PLAN;
use super::composite_tree::{PlacedTree, with_largest_part};
use super::compute_budget::Computations;
use super::credential_candidates::Candidates;
use super::disk_space_claim::layer_key;
use super::error::PullError;
use super::memory::BYTES_PER_MANIFEST_BYTE;
use super::pull_progress::Progress;
use super::pull_tenant::{Caller, Tenant};
use super::reference_resolution::Resolved;
use super::single_flight::{Flights, Outcome, Ticket};
use super::tree_shape::{Part, PartRule, Shape};
use super::tree_sources::{Object, TreeSources};
use super::{Memory, ProgressView, Puller, blocking};
use oci::manifest::Manifest;
use oci::{Digest, Platform, Reference};
use store::content_verification::{ExpectedTree, Finding, FindingKind, ReadPace, Reader, Verified};
use store::resolution_records::Resolution;
use store::trees::{Objects, TreePart, TreeRecord, View};
use store::{ObjectKind, ObjectName, Store, StoreError, Tree, TreeKey, give_memory_back};
use unpack::layer_merge::{LAYERS_OF_A_PART, Merger, PlannedPart, TreePlan};
use unpack::{Limits, PermissionsRule, RelativePath, Selection, UnpackError};

/// Files and layers of one tree that are read at once.
const READS_AT_ONCE: usize = 4;
/// Memory in bytes for each name of the directories that are open while a tree is compared.
const BYTES_PER_NAME: u64 = 18;

/// A tree that was found damaged.
#[derive(Clone, Debug)]
pub struct Damaged {
    /// The key of the tree.
    pub key: TreeKey,
    /// The digest of its manifest.
    pub manifest: Digest,
    /// The attributes that shaped it.
    pub view: View,
    /// The artifacts of a composite.
    pub parts: Vec<TreePart>,
}

/// A unit of reading back.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    /// All manifests, indexes and configurations.
    Blobs,
    /// A file, a layer, or the names of a tree.
    Object(ObjectName),
}

/// The result of reading one item back.
#[derive(Clone, Debug, Default)]
pub struct ReadBack {
    /// The objects and bytes that were read.
    pub verified: Verified,
    /// The number of damages.
    pub findings: u64,
    /// Trees that are to be made anew.
    pub damaged: Vec<Damaged>,
}

/// The result of repairing a damaged tree.
#[derive(Debug)]
pub enum Repaired {
    /// A new generation is in the store. Volumes that have the old one mounted keep it.
    Anew(Reference),
    /// It will be fetched by the next publish, with that pod's own credentials.
    Later(String),
}

/// Reads content back, and finds what is damaged.
pub(super) struct ContentReader {
    pub(super) store: Store,
    pub(super) computations: Computations,
    pub(super) flights: Flights<Item, ReadBack>,
}

impl Puller {
    /// Reads everything back. What is damaged is never shown anew.
    ///
    /// # Errors
    ///
    /// Only where the store itself cannot be read: damage is no error.
    pub async fn check_content(
        &self,
        found: impl FnMut(Finding) + Send + 'static,
    ) -> Result<(Verified, Vec<Damaged>), PullError> {
        let reader = Arc::clone(&self.0.reader);
        blocking(move || reader.check_content(found)).await
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
        if !self.0.reader.store.read_back().is_unread(&name) {
            return Ok(true);
        }
        let mut ticket = self.0.reader.read(Item::Object(name), caller);
        view.show(ticket.progress());
        ticket.outcome().await.map(|read| read.is_sound())
    }

    /// Reads one item back, when no pod wants the processor or the disk.
    ///
    /// # Errors
    ///
    /// Those of the node itself: damage is no error.
    pub async fn scrub(&self, item: Item) -> Outcome<ReadBack> {
        self.0.reader.read(item, Caller::new(Priority::Warm, Tenant::Config)).outcome().await
    }

    /// Makes a damaged tree anew, from a registry that a reference of it names.
    pub async fn repair(&self, damaged: &Damaged) -> Result<Repaired, PullError> {
        if !damaged.says_what_it_is() {
            return Ok(Repaired::Later(
                "its tree.json does not say any more what it is".to_owned(),
            ));
        }
        if damaged.parts.is_empty() {
            let made = self.make_anew(damaged.manifest, &damaged.view).await?;
            return Ok(
                made.map_or_else(Repaired::Later, |(reference, _)| Repaired::Anew(reference))
            );
        }
        let (mut trees, mut first) = (Vec::new(), None);
        for part in &damaged.parts {
            match self.make_anew(part.manifest, &part.view).await? {
                Ok((reference, tree)) => {
                    first.get_or_insert(reference);
                    trees.push(PlacedTree { path: path_of(part)?, tree });
                }
                Err(why) => return Ok(Repaired::Later(why)),
            }
        }
        let caller = Caller::new(Priority::Warm, Tenant::Config);
        self.0.composer.compose(trees, caller).await.map_err(PullError::Shared)?;
        let nothing = || Repaired::Later("it has no artifacts".to_owned());
        Ok(first.map_or_else(nothing, Repaired::Anew))
    }

    /// Returns a sound tree of a manifest with the reference that it comes from, or why there is none.
    async fn make_anew(
        &self,
        manifest: Digest,
        view: &View,
    ) -> Result<Result<(Reference, Tree), String>, PullError> {
        let store = self.0.reader.store.clone();
        let references = blocking(move || {
            let resolutions = store.resolutions().list()?.into_iter();
            let of_manifest = resolutions.filter(|resolution| resolution.manifest == manifest);
            Ok(of_manifest
                .filter_map(|Resolution { reference, .. }| reference.parse().ok())
                .collect())
        });
        let references: Vec<Reference> = references.await?;
        let mut last = "no reference leads to it any more".to_owned();
        for reference in references {
            let want = want_of_view(&reference, view)?;
            let candidates = self.0.resolver.read_candidates(&want).await?;
            for candidate in candidates.all.iter().cloned().chain([Candidates::anonymous()]) {
                let resolved = Resolved::for_the_node(manifest, candidates.clone(), candidate);
                match self.tree(&want, &resolved, &ProgressView::default()).await {
                    Ok(tree) => return Ok(Ok((reference, tree))),
                    Err(error) => last = format!("{reference}: {error}"),
                }
            }
        }
        Ok(Err(last))
    }
}

impl Damaged {
    /// Returns whether the tree's key is that of its manifest and its view.
    fn says_what_it_is(&self) -> bool {
        key_of(self.manifest, &self.view, &self.parts).is_ok_and(|key| key == self.key)
    }
}

fn want_of_view(reference: &Reference, view: &View) -> Result<Want, PullError> {
    Ok(Want {
        shape: Shape::of_view(view)?,
        ..Want::of_node(reference.clone(), Platform::of_this_node(), Tenant::Config)
    })
}

/// Returns the key that a tree with this record has.
fn key_of(manifest: Digest, view: &View, parts: &[TreePart]) -> Result<TreeKey, PullError> {
    if parts.is_empty() {
        return Ok(Shape::of_view(view)?.key(manifest));
    }
    let keys = parts
        .iter()
        .map(|part| Ok((part.path.clone(), Shape::of_view(&part.view)?.key(part.manifest))));
    Ok(TreeKey::of_parts(&keys.collect::<Result<Vec<_>, PullError>>()?))
}

fn path_of(part: &TreePart) -> Result<RelativePath, PullError> {
    Shape::parse_sub_path(&part.path).map_err(|error| {
        let what = error.to_string();
        StoreError::Damaged { path: "tree.json".into(), what }.into()
    })
}

impl ReadBack {
    /// Returns whether the item is intact.
    pub fn is_sound(&self) -> bool {
        self.findings == 0
    }
}

/// Stops a reader when no caller waits for it any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl ContentReader {
    /// Reads everything back. Returns what was read, and the damaged trees. Blocking.
    fn check_content(
        &self,
        mut found: impl FnMut(Finding),
    ) -> Result<(Verified, Vec<Damaged>), PullError> {
        let mut reader = Reader::new(ReadPace::Full);
        let store = &self.store;
        let before = store.inventory().sound_trees()?;
        store.verification().verify_blobs(&mut reader, &mut found)?;
        store.verification().verify_objects(&mut reader, &mut found)?;
        for tree in store.inventory().sound_trees()? {
            self.verify_tree_in_turn(&tree, &mut reader, &mut found)?;
        }
        let mut unknown = Vec::new();
        for name in store.inventory().trees_without_record()? {
            store.verification().verify_tree_record(&name, &mut found)?;
            unknown.extend(self.recognise(&name)?);
        }
        let sound = store.inventory().sound_trees()?;
        let sound: HashSet<_> = sound.iter().map(|tree| (tree.key, tree.generation)).collect();
        let damaged =
            before.into_iter().filter(|tree| !sound.contains(&(tree.key, tree.generation)));
        let damaged = damaged.map(|tree| self.damaged(tree));
        let mut damaged = damaged.collect::<Result<Vec<_>, _>>()?;
        damaged.extend(unknown);
        Ok((reader.verified, damaged))
    }

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
        self.flights
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
        let (reader, of) = (Arc::clone(&self), item.clone());
        let mut bytes = blocking(move || reader.memory_of_item(&of)).await?;
        loop {
            let memory = match bytes {
                Some(bytes) => Some(self.computations.memory(bytes, &progress).await?),
                None => None,
            };
            // The scrub reads one item at a time, and needs no permit.
            let (pace, mut permit) = match progress.priority() {
                Priority::Pod => {
                    (ReadPace::Urgent, Some(self.computations.permit(&progress).await))
                }
                Priority::Warm => (ReadPace::Gentle, None),
            };
            let stop = Arc::new(AtomicBool::new(false));
            let _stop = StopOnDrop(Arc::clone(&stop));
            let (content, item, progress) =
                (Arc::clone(&self), item.clone(), Arc::clone(&progress));
            let read = move || {
                let mut reader = Reader::new(pace);
                reader.stop = stop;
                reader.arrived = Box::new(move |bytes| progress.arrived(bytes));
                reader.waits = Box::new(move || drop(permit.take()));
                content.verify_item(&item, &mut reader, memory)
            };
            match blocking(read).await {
                Err(error) if is_shortage(&error) => {
                    bytes = Some(
                        self.computations.budget.bytes_of_next_try(bytes.unwrap_or_default(), 0),
                    );
                }
                read => return read,
            }
        }
    }

    /// Returns the bytes of memory that reading an item back takes, beside buffers. Blocking.
    fn memory_of_item(&self, item: &Item) -> Result<Option<u64>, PullError> {
        match item {
            Item::Object(name) if name.kind() == ObjectKind::Tree => {
                let tree = self.store.trees().named(name);
                tree.map(|tree| self.memory_of_tree(&tree)).transpose()
            }
            // Trees of damaged content reserve memory when they are compared.
            Item::Blobs | Item::Object(_) => Ok(None),
        }
    }

    /// Returns the bytes of memory that comparing a tree takes, unless it has very many directories. The numbers that it
    /// is computed from may be damaged, so that it is at most what can be reserved.
    pub(super) fn memory_of_tree(&self, tree: &Tree) -> Result<u64, PullError> {
        let links = match self.store.trees().links(tree) {
            Err(error) if error.is_of_this_node() => return Err(error.into()),
            links => links.unwrap_or_default(),
        };
        let layers = links.iter().filter_map(|name| self.store.layers().linked(name));
        let entries = layers.map(|layer| layer.totals().entries).fold(0, u64::saturating_add);
        let names = entries.max(tree.record.inodes);
        // A view that cannot be read is reported when the tree is compared.
        let patterns = |TreePart { view, .. }: TreePart| {
            Shape::of_view(&view).map_or(0, |shape| shape.selection.compiled_bytes())
        };
        let artifacts = tree.record.artifacts().into_iter();
        let patterns = artifacts.map(patterns).max().unwrap_or_default();
        let bytes = Merger::estimate(names, &Selection::default())
            .saturating_add(patterns)
            .saturating_add(names.saturating_mul(BYTES_PER_NAME))
            .saturating_add(self.memory_of_manifest(tree)?);
        let bytes =
            if tree.record.parts.is_empty() { bytes } else { with_largest_part(bytes, bytes) };
        Ok(bytes.min(self.computations.budget.most()))
    }

    fn memory_of_manifest(&self, tree: &Tree) -> Result<u64, PullError> {
        // The manifests of a composite are read one after the other.
        let sizes = tree.record.manifests().map(|manifest| self.store.documents().size(manifest));
        let sizes = sizes.collect::<Result<Vec<_>, _>>()?;
        let size = sizes.into_iter().flatten().max().unwrap_or_default();
        Ok(size.saturating_mul(BYTES_PER_MANIFEST_BYTE).min(self.computations.budget.most()))
    }

    /// Waits for memory while an item is read back. The reader first returns its permit, which holders of memory may
    /// wait for. Blocking.
    fn memory_in_turn(&self, bytes: u64, reader: &mut Reader) -> Result<Memory, PullError> {
        reader.is_about_to_wait();
        tokio::runtime::Handle::current()
            .block_on(self.computations.memory_of(&Tenant::Config, bytes))
    }

    /// Compares a tree once there is memory for it. A tree that cannot be read on this node now is a finding of the kind
    /// `Unread`. Blocking.
    fn verify_tree_in_turn(
        &self,
        tree: &Tree,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), PullError> {
        let mut verify = || {
            let mut bytes = self.memory_of_tree(tree)?;
            loop {
                let memory = self.memory_in_turn(bytes, reader)?;
                match self.verify_tree(tree, reader, found, memory) {
                    Err(error) if is_shortage(&error) => {
                        bytes = self.computations.budget.bytes_of_next_try(bytes, 0);
                    }
                    verified => return verified,
                }
            }
        };
        match verify() {
            Err(error) if error.leaves_unread() => {
                found(Finding::of_unread(&ObjectName::tree(tree.key, tree.generation), &error));
                Ok(())
            }
            verified => verified,
        }
    }

    /// The unread files and layers of an unread tree, and what all that it links takes.
    async fn unread_links(
        &self,
        name: &ObjectName,
    ) -> Result<Option<(Vec<ObjectName>, u64)>, PullError> {
        if name.kind() != ObjectKind::Tree || !self.store.read_back().is_unread(name) {
            return Ok(None);
        }
        let (store, name) = (self.store.clone(), name.clone());
        blocking(move || {
            let Some(tree) = store.trees().named(&name) else { return Ok(None) };
            let mut links = match store.trees().links(&tree) {
                Err(error) if error.is_of_this_node() => return Err(error.into()),
                // Comparing the tree reports this.
                links => links.unwrap_or_default(),
            };
            links.retain(|link| store.read_back().is_unread(link));
            Ok(Some((links, tree.record.bytes)))
        })
        .await
    }

    fn verify_item(
        &self,
        item: &Item,
        reader: &mut Reader,
        memory: Option<Memory>,
    ) -> Result<ReadBack, PullError> {
        let mut findings = 0;
        let mut found = |finding: Finding| {
            findings += u64::from(finding.kind != FindingKind::Unread);
            finding.log();
        };
        let store = &self.store;
        let trees = match item {
            Item::Blobs => {
                let mut damaged = HashSet::new();
                store.verification().verify_blobs(reader, &mut |finding| {
                    damaged.extend(finding.digest);
                    found(finding);
                })?;
                let of_them = |tree: &Tree, _: &mut Reader| {
                    Ok(tree.record.manifests().any(|manifest| damaged.contains(&manifest)))
                };
                self.verify_trees_of(of_them, reader, &mut found)?
            }
            Item::Object(name) if name.kind() == ObjectKind::Tree => {
                match store.trees().named(name) {
                    Some(tree) if !store.damage().is_marked(name) => {
                        let memory = match memory {
                            Some(memory) => memory,
                            // The tree was built after its memory was estimated.
                            None => self.memory_in_turn(self.memory_of_tree(&tree)?, reader)?,
                        };
                        self.verify_tree(&tree, reader, &mut found, memory)?;
                        if store.damage().is_marked(name) { vec![name.clone()] } else { Vec::new() }
                    }
                    // Made anew still, where that was not possible when it was found.
                    Some(tree) if store.trees().get(tree.key)?.is_none() => vec![name.clone()],
                    None if !store.damage().is_marked(name) => {
                        store.verification().verify_tree_record(name, &mut found)?;
                        if store.damage().is_marked(name) { vec![name.clone()] } else { Vec::new() }
                    }
                    _ => Vec::new(),
                }
            }
            Item::Object(name) => {
                let mut trees = store.verification().verify_object(name, reader, &mut found)?;
                if store.damage().is_marked(name) {
                    // Trees that link it without naming it in their record.
                    let of_it =
                        |tree: &Tree, reader: &mut Reader| self.may_link(tree, name, reader);
                    trees.extend(self.verify_trees_of(of_it, reader, &mut found)?);
                }
                trees
            }
        };
        let mut damaged = Vec::new();
        for name in trees {
            damaged.extend(match store.trees().named(&name) {
                Some(tree) => Some(self.damaged(tree)?),
                None => self.recognise(&name)?,
            });
        }
        Ok(ReadBack { verified: reader.verified, findings, damaged })
    }

    /// Returns the manifest and the view from which a damaged tree is to be built again.
    fn damaged(&self, tree: Tree) -> Result<Damaged, PullError> {
        let name = ObjectName::tree(tree.key, tree.generation);
        let Tree { key, record, .. } = tree;
        let TreeRecord { manifest, view, parts, .. } = record;
        let known = Damaged { key, manifest, view, parts };
        if known.says_what_it_is() {
            return Ok(known);
        }
        Ok(self.recognise(&name)?.unwrap_or(known))
    }

    /// Finds the manifest and the view of a tree whose record is lost, by its key. Tries the manifests of all references
    /// with the views of all other trees, and with the default view.
    fn recognise(&self, name: &ObjectName) -> Result<Option<Damaged>, PullError> {
        let Some(key) = name.as_str().split('/').nth(1).and_then(TreeKey::from_hex) else {
            return Ok(None);
        };
        let mut views = vec![View::default()];
        for tree in self.store.inventory().sound_trees()? {
            if !views.contains(&tree.record.view) {
                views.push(tree.record.view);
            }
        }
        let resolutions = self.store.resolutions().list()?;
        let known = resolutions.iter().flat_map(|Resolution { manifest, .. }| {
            let of_view = |view: &View| {
                let (manifest, view) = (*manifest, view.clone());
                Damaged { key, manifest, view, parts: Vec::new() }
            };
            views.iter().map(of_view)
        });
        Ok(known.into_iter().find(Damaged::says_what_it_is))
    }

    /// Compares a tree with its manifest, within the memory that is reserved for it. Blocking.
    fn verify_tree(
        &self,
        tree: &Tree,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
        mut memory: Memory,
    ) -> Result<(), PullError> {
        match self.expected_tree(tree, memory.bytes()) {
            Ok(expected) => {
                let takes = memory_of_comparison(&expected.plan);
                memory.shrink(takes);
                self.store.verification().verify_tree(tree, &expected, reader, found)?;
                drop(expected);
                if takes >= LARGE_PLAN {
                    give_memory_back();
                }
                Ok(())
            }
            Err(ComparisonError::Node(error)) => Err(error),
            Err(error) => {
                let why = match error {
                    ComparisonError::Node(error) | ComparisonError::Parts(error) => {
                        error.to_string()
                    }
                    ComparisonError::Tree(why) => why,
                };
                let why = format!("it cannot be compared with its manifest: {why}");
                Ok(self.store.verification().refuse_tree(tree, why, found)?)
            }
        }
    }

    /// Compares some of the trees that are not marked as damaged, each once there is memory for it. Returns those that
    /// are marked now.
    fn verify_trees_of(
        &self,
        is_meant: impl Fn(&Tree, &mut Reader) -> Result<bool, PullError>,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Vec<ObjectName>, PullError> {
        let mut damaged = Vec::new();
        for tree in self.store.inventory().sound_trees()? {
            if is_meant(&tree, reader)? {
                self.verify_tree_in_turn(&tree, reader, found)?;
                let name = ObjectName::tree(tree.key, tree.generation);
                damaged.extend(self.store.damage().is_marked(&name).then_some(name));
            }
        }
        Ok(damaged)
    }

    /// Returns whether a tree may link a file or a layer: its manifest names it or cannot be read.
    fn may_link(
        &self,
        tree: &Tree,
        object: &ObjectName,
        reader: &mut Reader,
    ) -> Result<bool, PullError> {
        let _memory = self.memory_in_turn(self.memory_of_manifest(tree)?, reader)?;
        let links_it = |PartsOfTree { parts, shape, .. }| {
            let folder = |part| folder_of(part, shape.permissions);
            parts.iter().any(|part| object.as_str().starts_with(&folder(part)))
        };
        for TreePart { manifest, view, .. } in tree.record.artifacts() {
            match self.parts_of(manifest, &view).map(links_it) {
                Ok(false) => {}
                Err(ComparisonError::Node(error)) => return Err(error),
                Ok(true) | Err(_) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Plans a tree from its manifest and the objects that its record links, within `allowance` bytes of memory.
    fn expected_tree(&self, tree: &Tree, allowance: u64) -> Result<ExpectedTree, ComparisonError> {
        let TreeRecord { manifest, view, parts, .. } = &tree.record;
        if key_of(*manifest, view, parts)? != tree.key {
            return Err(ComparisonError::Tree("its tree.json is that of another tree".to_owned()));
        }
        if parts.is_empty() {
            return self.expected_part(tree, *manifest, view, allowance);
        }
        let sources = parts.iter().map(|part| PartSource { tree, part });
        // Compares an accepted volume under any later limits.
        self.compose(sources, &Limits::largest(), allowance)
    }

    /// Plans a composite from its parts, within `allowance` bytes of memory.
    pub(super) fn compose<'a>(
        &self,
        sources: impl Iterator<Item = PartSource<'a>>,
        limits: &Limits,
        allowance: u64,
    ) -> Result<ExpectedTree, ComparisonError> {
        let everything = Selection::default();
        let mut merger = Merger::new(limits, &everything);
        merger.allowance = allowance;
        let (mut objects, mut parts, mut compressed_bytes) =
            (Objects::default(), Vec::new(), 0_u64);
        for (number, PartSource { tree, part }) in (0..).zip(sources) {
            let left = merger.memory_left();
            let expected = self.expected_part(tree, part.manifest, &part.view, left)?;
            let path = &path_of(part)?;
            let planned = PlannedPart { number, path, plan: &expected.plan };
            let added = merger.part(&planned, &mut expected.objects.records());
            added.map_err(ComparisonError::of_parts)?;
            compressed_bytes = compressed_bytes.saturating_add(expected.record.compressed_bytes);
            let first = number * LAYERS_OF_A_PART;
            let layers = expected.objects.layers.into_iter();
            objects.layers.extend(layers.map(|(layer, view)| (first + layer, view)));
            objects.files.extend(expected.objects.files);
            parts.push(part.clone());
        }
        let plan = merger.finish().map_err(ComparisonError::of_parts)?;
        let kind = format!("{} artifacts", parts.len());
        let manifest = TreePart::digest_of(&parts);
        let record = Shape::default().record(manifest, kind, compressed_bytes, &plan);
        Ok(ExpectedTree { plan, objects, record: TreeRecord { parts, ..record } })
    }

    /// Plans what a tree shows of one manifest, from objects that its record links.
    fn expected_part(
        &self,
        tree: &Tree,
        manifest: Digest,
        view: &View,
        allowance: u64,
    ) -> Result<ExpectedTree, ComparisonError> {
        let PartsOfTree { kind, parts, shape, limits } = self.parts_of(manifest, view)?;
        let sizes = parts.iter().map(|part| part.descriptor.size);
        let compressed_bytes = sizes.fold(0, u64::saturating_add);
        let sources = TreeSources::new(self.linked_objects(tree, parts, &shape)?);
        let plan = sources.plan(&self.store, &shape, &limits, allowance)?;
        let (bytes, entries) = (memory_of_comparison(&plan), plan.nodes.len() as u64);
        if bytes > allowance {
            return Err(PullError::from(UnpackError::Memory { bytes, entries }).into());
        }
        let record = shape.record(manifest, kind, compressed_bytes, &plan);
        Ok(ExpectedTree { plan, objects: sources.objects, record })
    }

    /// Returns the layers that are shown of a manifest.
    fn parts_of(&self, manifest: Digest, view: &View) -> Result<PartsOfTree, ComparisonError> {
        let shape = Shape::of_view(view)?;
        let Some(bytes) = self.store.documents().get(manifest)? else {
            return Err(ComparisonError::Tree(format!("{manifest} is not here")));
        };
        // Compares an accepted artifact under any later limits.
        let limits = Limits::largest();
        let parsed = Manifest::parse(&bytes, None, limits.manifest()).map_err(PullError::from)?;
        let Manifest::Image(image) = parsed else {
            return Err(ComparisonError::Tree(format!("{manifest} is an index")));
        };
        let parts = shape.parts(&image, &limits)?;
        Ok(PartsOfTree { kind: image.kind().to_owned(), parts, shape, limits })
    }

    /// Returns the files and layers that a tree was linked from, in the same generations.
    fn linked_objects(
        &self,
        tree: &Tree,
        parts: Vec<Part>,
        shape: &Shape,
    ) -> Result<Vec<Object>, ComparisonError> {
        let links = self.store.trees().links(tree)?;
        let mut objects = Vec::new();
        for part in parts {
            let folder = folder_of(&part, shape.permissions);
            let Part { layer, descriptor, rule } = part;
            let digest = descriptor.digest;
            let object = match rule {
                PartRule::File(rule, permissions) => self
                    .store
                    .verification()
                    .linked_file(digest, permissions, &links)?
                    .map(|file| Object::File(layer, rule, descriptor.size, file)),
                PartRule::Archive(rule) => {
                    let of_key = |name: &&ObjectName| name.as_str().starts_with(&folder);
                    let unpacked =
                        links.iter().find(of_key).and_then(|name| self.store.layers().linked(name));
                    unpacked.map(|unpacked| {
                        let totals = unpacked.totals();
                        Object::Layer(layer, rule, unpacked.view(), totals)
                    })
                }
            };
            objects.push(object.ok_or_else(|| {
                ComparisonError::Tree(format!(
                    "what it links of {digest} is not here, or objects.json does not name it"
                ))
            })?);
        }
        Ok(objects)
    }
}

/// The layers that a tree shows.
struct PartsOfTree {
    kind: String,
    parts: Vec<Part>,
    shape: Shape,
    limits: Limits,
}

/// A part of a composite, and the tree that links its files and layers.
pub(super) struct PartSource<'a> {
    pub(super) tree: &'a Tree,
    pub(super) part: &'a TreePart,
}

/// The reason why a tree cannot be compared.
pub(super) enum ComparisonError {
    /// The node lacks memory or another resource now.
    Node(PullError),
    /// The record or the content of the tree is incomplete or damaged.
    Tree(String),
    /// The parts of a composite do not make one tree.
    Parts(PullError),
}

impl ComparisonError {
    fn of_parts(error: UnpackError) -> Self {
        match PullError::from(error) {
            error @ PullError::Unpack(_) if !is_shortage(&error) => Self::Parts(error),
            error => error.into(),
        }
    }
}

impl From<PullError> for ComparisonError {
    fn from(error: PullError) -> Self {
        match error {
            PullError::Store(error) => error.into(),
            // Too small a budget does not mean that the tree is damaged.
            error if is_shortage(&error) => Self::Node(error),
            error => Self::Tree(error.to_string()),
        }
    }
}

impl From<StoreError> for ComparisonError {
    fn from(error: StoreError) -> Self {
        if error.is_of_this_node() {
            Self::Node(error.into())
        } else {
            Self::Tree(error.to_string())
        }
    }
}

/// Returns the directory of the store with the generations of a part.
fn folder_of(part: &Part, permissions: PermissionsRule) -> String {
    let digest = part.descriptor.digest;
    match &part.rule {
        PartRule::File(..) => format!("files/{}/", digest.hex()),
        PartRule::Archive(rule) => format!("layers/{}/", layer_key(digest, rule, permissions)),
    }
}

/// Returns the bytes of memory that comparing a tree with its plan takes.
fn memory_of_comparison(plan: &TreePlan) -> u64 {
    plan.memory_bytes().saturating_add(BYTES_PER_NAME.saturating_mul(plan.nodes.len() as u64))
}

/// Returns whether planning was stopped for memory.
pub(super) fn is_shortage(error: &PullError) -> bool {
    matches!(error.root(), PullError::Unpack(UnpackError::Memory { .. }))
}
