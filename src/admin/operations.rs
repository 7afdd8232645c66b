//! What an administrator may do with a node's content.

use std::collections::BTreeSet;
use std::sync::Arc;

use oci::manifest::{Descriptor, Manifest};
use oci::{Digest, Platform, Reference};
use store::catalog::Entry;
use store::gc::Collected;
use store::pins::Pin;
use store::resolutions::Resolution;
use store::{ObjectName, Store, StoreError, Tree};
use unpack::Limits;

/// The owner of pins that the command line makes.
pub const ADMIN: &str = "admin";

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// Not on this node.
    #[error("{0} is not on this node: warm it first, or look at `ls`")]
    NotHere(String),
    /// It is to stay.
    #[error("{reference} is pinned by {owners}: unpin it first")]
    Pinned {
        /// What.
        reference: String,
        /// Who wants it.
        owners: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A tree with all that is known of it.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// The tree.
    pub tree: Tree,
    /// What last resolved to it.
    pub references: Vec<String>,
    /// Who shows it.
    pub volumes: Vec<String>,
    /// Who keeps it.
    pub pins: Vec<String>,
    /// Seconds since 1970; 0 once it was removed.
    pub last_used: i64,
    /// It is not shown anew.
    pub damaged: bool,
}

/// What became of a reference that was removed.
#[derive(Clone, Debug, Default)]
pub struct Removed {
    /// What went at once.
    pub collected: Collected,
    /// Who still shows it.
    pub volumes: Vec<String>,
    /// What else leads to the same content.
    pub references: Vec<String>,
}

/// What a reference means on this node, and what is here of it.
#[derive(Clone, Debug, Default)]
pub struct Inspected {
    /// By platform.
    pub meanings: Vec<Meaning>,
    /// The trees of those manifests.
    pub artifacts: Vec<Artifact>,
}

/// What a reference means for one platform.
#[derive(Clone, Debug)]
pub struct Meaning {
    /// As it was recorded.
    pub resolution: Resolution,
    /// The layers of the manifest, as far as it is kept.
    pub layers: Vec<Descriptor>,
}

/// All that is known of one reference.
pub fn inspect(store: &Store, reference: &Reference) -> Result<Inspected, OperationError> {
    let mut inspected = Inspected::default();
    for resolution in store.meanings(reference)? {
        let bytes = store.blob(resolution.manifest)?.unwrap_or_default();
        // It was accepted once: what it holds is shown whatever the limits are now.
        let parsed = Manifest::parse(&bytes, None, Limits::default().manifest());
        let layers = match parsed {
            Ok(Manifest::Image(image)) => image.layers,
            _ => Vec::new(),
        };
        inspected.meanings.push(Meaning { resolution, layers });
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

/// All trees, in the order of their references.
pub fn artifacts(store: &Store) -> Result<Vec<Artifact>, OperationError> {
    describe(store, store.all_trees()?)
}

/// The trees of some manifests.
fn artifacts_of(
    store: &Store,
    manifests: BTreeSet<Digest>,
) -> Result<Vec<Artifact>, OperationError> {
    let mut trees = Vec::new();
    for manifest in manifests {
        trees.extend(store.trees_of_manifest(manifest)?);
    }
    describe(store, trees)
}

fn describe(
    store: &Store,
    trees: Vec<(ObjectName, Arc<Entry>)>,
) -> Result<Vec<Artifact>, OperationError> {
    let mut artifacts = Vec::new();
    for (name, entry) in trees {
        let Some(tree) = store.named_tree(&name) else { continue };
        let manifest = tree.record.manifest;
        let volumes: BTreeSet<_> = store
            .publications_of(&name)
            .into_iter()
            .map(|publication| publication.pod.unwrap_or(publication.volume_id))
            .collect();
        let pins: BTreeSet<_> =
            store.pins_of_manifest(manifest).into_iter().map(|pin| pin.owner).collect();
        artifacts.push(Artifact {
            references: store.references_of(manifest)?.into_iter().collect(),
            volumes: volumes.into_iter().collect(),
            pins: pins.into_iter().collect(),
            last_used: entry.last_used,
            damaged: entry.damaged,
            tree,
        });
    }
    artifacts.sort_by(|one, two| {
        let key = |artifact: &Artifact| (artifact.tree.key, artifact.tree.generation);
        one.references.cmp(&two.references).then_with(|| key(one).cmp(&key(two)))
    });
    Ok(artifacts)
}

/// Keeps what the reference means for the platform now.
pub fn pin(
    store: &Store,
    reference: &Reference,
    platform: &Platform,
    owner: &str,
) -> Result<Pin, OperationError> {
    let known = store.resolution(reference, platform);
    let not_here = || OperationError::NotHere(reference.to_string());
    let manifest = known.map(|known| known.manifest).ok_or_else(not_here)?;
    if !store.has_sound_tree(manifest)? {
        return Err(not_here());
    }
    Ok(store.pin(reference, platform, manifest, owner)?)
}

/// Takes an owner's pins of a reference away; says how many, and whose stay.
pub fn unpin(
    store: &Store,
    reference: &Reference,
    platform: Option<&Platform>,
    owner: &str,
) -> Result<(usize, Vec<String>), OperationError> {
    let unpinned = store.unpin(reference, platform, owner)?;
    Ok((unpinned.len(), owners(store, reference)))
}

/// Forgets a reference. Content that nothing else leads to goes, what is shown with its
/// last unpublish.
pub fn remove(store: &Store, reference: &Reference) -> Result<Removed, OperationError> {
    let owners = owners(store, reference);
    if !owners.is_empty() {
        let owners = owners.join(", ");
        return Err(OperationError::Pinned { reference: reference.to_string(), owners });
    }
    let forgotten = store.remove_resolutions(reference)?;
    let mut manifests: BTreeSet<Digest> =
        forgotten.iter().map(|resolution| resolution.manifest).collect();
    manifests.extend(reference.digest());
    let mut removed = Removed::default();
    let mut was_here = !forgotten.is_empty();
    let mut forgotten = Vec::new();
    for artifact in artifacts_of(store, manifests)? {
        was_here = true;
        if artifact.references.is_empty() && artifact.pins.is_empty() {
            store.forget_tree(&artifact.tree)?;
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
    removed.collected = store.collect_trees(&forgotten)?;
    Ok(removed)
}

fn owners(store: &Store, reference: &Reference) -> Vec<String> {
    let pins = store.pins_of_reference(&reference.to_string()).into_iter();
    let owners: BTreeSet<_> = pins.map(|pin| pin.owner).collect();
    owners.into_iter().collect()
}
