//! Operations of an administrator on a node's content.

use std::collections::BTreeSet;
use std::sync::Arc;

use oci::manifest::{Descriptor, Manifest};
use oci::{Digest, Platform, Reference};
use store::gc::Collected;
use store::object_catalog::Entry;
use store::pin_records::Pin;
use store::resolution_records::Resolution;
use store::{ObjectName, Store, StoreError, Tree};
use unpack::Limits;

/// The owner of pins that the command line makes.
pub const ADMIN: &str = "admin";

/// A failed operation of an administrator.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The artifact is not on this node.
    #[error("{0} is not on this node: warm it first, or look at `ls`")]
    NotHere(String),
    /// The reference is pinned.
    #[error("{reference} is pinned by {owners}: unpin it first")]
    Pinned {
        /// The pinned reference.
        reference: String,
        /// The owners of its pins, separated by commas.
        owners: String,
    },
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A tree, with its references, volumes and pins.
#[derive(Clone, Debug)]
pub struct CachedArtifact {
    /// The tree of one of its forms.
    pub tree: Tree,
    /// The references that last resolved to its manifest.
    pub references: Vec<String>,
    /// The volumes that show it: `namespace/pod`, or the volume id.
    pub volumes: Vec<String>,
    /// The owners of its pins.
    pub pins: Vec<String>,
    /// Seconds since 1970; 0 after a removal.
    pub last_used: i64,
    /// Damage was found. No further volume shows it.
    pub damaged: bool,
}

/// The outcome of removing a reference.
#[derive(Clone, Debug, Default)]
pub struct RemovedReference {
    /// Content that was deleted at once.
    pub collected: Collected,
    /// Volumes that still show the content.
    pub volumes: Vec<String>,
    /// Other references and pins that lead to the same content.
    pub references: Vec<String>,
}

/// The resolutions of a reference on this node, and their artifacts.
#[derive(Clone, Debug, Default)]
pub struct InspectedReference {
    /// The resolutions, one for each platform.
    pub meanings: Vec<PlatformResolution>,
    /// The trees of these manifests.
    pub artifacts: Vec<CachedArtifact>,
}

/// The resolution of a reference for one platform.
#[derive(Clone, Debug)]
pub struct PlatformResolution {
    /// The record of the resolution.
    pub resolution: Resolution,
    /// The layers of the manifest; empty if the store has no copy of the manifest.
    pub layers: Vec<Descriptor>,
}

/// Returns the resolutions and artifacts of one reference.
pub fn inspect(store: &Store, reference: &Reference) -> Result<InspectedReference, OperationError> {
    let mut inspected = InspectedReference::default();
    for resolution in store.resolutions().of_reference(reference)? {
        let bytes = store.documents().get(resolution.manifest)?.unwrap_or_default();
        // Accepted at its pull: shown whatever the limits are now.
        let parsed = Manifest::parse(&bytes, None, Limits::default().manifest());
        let layers = match parsed {
            Ok(Manifest::Image(image)) => image.layers,
            _ => Vec::new(),
        };
        inspected.meanings.push(PlatformResolution { resolution, layers });
    }
    let manifests: BTreeSet<_> =
        inspected.meanings.iter().map(|meaning| meaning.resolution.manifest).collect();
    let manifests = manifests.into_iter().chain(reference.digest());
    inspected.artifacts = artifacts_of(store, manifests.collect())?;
    if inspected.meanings.is_empty() && inspected.artifacts.is_empty() {
        return Err(OperationError::NotHere(reference.to_string()));
    }
    Ok(inspected)
}

/// Returns all trees, ordered by their references.
pub fn artifacts(store: &Store) -> Result<Vec<CachedArtifact>, OperationError> {
    describe(store, store.inventory().trees()?)
}

fn artifacts_of(
    store: &Store,
    manifests: BTreeSet<Digest>,
) -> Result<Vec<CachedArtifact>, OperationError> {
    let mut trees = Vec::new();
    for manifest in manifests {
        trees.extend(store.inventory().trees_of_manifest(manifest)?);
    }
    describe(store, trees)
}

fn describe(
    store: &Store,
    trees: Vec<(ObjectName, Arc<Entry>)>,
) -> Result<Vec<CachedArtifact>, OperationError> {
    let mut artifacts = Vec::new();
    for (name, entry) in trees {
        let Some(tree) = store.trees().named(&name) else { continue };
        let manifest = tree.record.manifest;
        let volumes: BTreeSet<_> = store
            .publications()
            .of_tree(&name)
            .into_iter()
            .map(|publication| publication.pod.unwrap_or(publication.volume_id))
            .collect();
        let pins: BTreeSet<_> =
            store.pins().of_manifest(manifest).into_iter().map(|pin| pin.owner).collect();
        artifacts.push(CachedArtifact {
            references: store.resolutions().references_of(manifest)?.into_iter().collect(),
            volumes: volumes.into_iter().collect(),
            pins: pins.into_iter().collect(),
            last_used: entry.last_used,
            damaged: entry.damaged,
            tree,
        });
    }
    artifacts.sort_by(|one, two| {
        let key = |artifact: &CachedArtifact| (artifact.tree.key, artifact.tree.generation);
        one.references.cmp(&two.references).then_with(|| key(one).cmp(&key(two)))
    });
    Ok(artifacts)
}

/// Pins the manifest that the reference resolves to for the platform now.
pub fn pin(
    store: &Store,
    reference: &Reference,
    platform: &Platform,
    owner: &str,
) -> Result<Pin, OperationError> {
    let known = store.resolutions().get(reference, platform);
    let not_here = || OperationError::NotHere(reference.to_string());
    let manifest = known.map(|known| known.manifest).ok_or_else(not_here)?;
    if !store.inventory().has_sound_tree(manifest)? {
        return Err(not_here());
    }
    Ok(store.pins().add(reference, platform, manifest, owner)?)
}

/// Removes an owner's pins of a reference. Returns their number, and the owners of the remaining pins.
pub fn unpin(
    store: &Store,
    reference: &Reference,
    platform: Option<&Platform>,
    owner: &str,
) -> Result<(usize, Vec<String>), OperationError> {
    let unpinned = store.pins().remove_all(reference, platform, owner)?;
    Ok((unpinned.len(), owners(store, reference)))
}

/// Removes a reference. Content without another reference or pin is deleted: at once, or after the last unpublish.
pub fn remove(store: &Store, reference: &Reference) -> Result<RemovedReference, OperationError> {
    let owners = owners(store, reference);
    if !owners.is_empty() {
        let owners = owners.join(", ");
        return Err(OperationError::Pinned { reference: reference.to_string(), owners });
    }
    let forgotten = store.resolutions().remove(reference)?;
    let mut manifests: BTreeSet<Digest> =
        forgotten.iter().map(|resolution| resolution.manifest).collect();
    manifests.extend(reference.digest());
    let mut removed = RemovedReference::default();
    let mut was_here = !forgotten.is_empty();
    let mut forgotten = Vec::new();
    for artifact in artifacts_of(store, manifests)? {
        was_here = true;
        if artifact.references.is_empty() && artifact.pins.is_empty() {
            store.trees().forget(&artifact.tree)?;
            forgotten.push(ObjectName::tree(artifact.tree.key, artifact.tree.generation));
            removed.volumes.extend(artifact.volumes);
        } else {
            removed.references.extend(artifact.references);
            removed.references.extend(artifact.pins.iter().map(|owner| format!("pin of {owner}")));
        }
    }
    if !was_here {
        return Err(OperationError::NotHere(reference.to_string()));
    }
    removed.references.sort();
    removed.references.dedup();
    removed.collected = store.collector().collect_trees(&forgotten)?;
    Ok(removed)
}

fn owners(store: &Store, reference: &Reference) -> Vec<String> {
    let pins = store.pins().of_reference(&reference.to_string()).into_iter();
    let owners: BTreeSet<_> = pins.map(|pin| pin.owner).collect();
    owners.into_iter().collect()
}
