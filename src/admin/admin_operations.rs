//! Operations of an administrator on a node's content.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::admin_messages;
use crate::proto::admin::{Artifact, InspectArtifactResponse, RemoveResponse};
use oci::manifest::Manifest;
use oci::{Digest, Platform, Reference};
use store::object_catalog::Entry;
use store::pin_records::Pin;
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

/// A tree of one of its forms, and its description.
struct DescribedTree {
    tree: Tree,
    artifact: Artifact,
    /// True if a reference leads to each of its manifests.
    is_whole: bool,
}

/// Returns the resolutions and artifacts of one reference.
pub fn inspect(
    store: &Store,
    reference: &Reference,
) -> Result<InspectArtifactResponse, OperationError> {
    let mut manifests: BTreeSet<_> = reference.digest().into_iter().collect();
    let mut inspected =
        InspectArtifactResponse { reference: reference.to_string(), ..Default::default() };
    for resolution in store.resolutions().of_reference(reference)? {
        let bytes = store.documents().get(resolution.manifest)?.unwrap_or_default();
        // Accepted at its pull: shown whatever the limits are now.
        let parsed = Manifest::parse(&bytes, None, Limits::default().manifest());
        let layers = match parsed {
            Ok(Manifest::Image(image)) => image.layers,
            _ => Vec::new(),
        };
        manifests.insert(resolution.manifest);
        let signatures = store.verified_signatures();
        let signed_by = signatures.signers(reference.repository(), resolution.manifest)?;
        inspected.resolutions.push(admin_messages::resolution(resolution, layers, signed_by));
    }
    let described = artifacts_of(store, &manifests)?.into_iter();
    inspected.artifacts = described.map(|described| described.artifact).collect();
    if inspected.resolutions.is_empty() && inspected.artifacts.is_empty() {
        return Err(OperationError::NotHere(reference.to_string()));
    }
    Ok(inspected)
}

/// Returns all trees, ordered by their references.
pub fn artifacts(store: &Store) -> Result<Vec<Artifact>, OperationError> {
    let described = describe(store, store.inventory().trees()?)?.into_iter();
    Ok(described.map(|described| described.artifact).collect())
}

fn artifacts_of(
    store: &Store,
    manifests: &BTreeSet<Digest>,
) -> Result<Vec<DescribedTree>, OperationError> {
    let mut trees = Vec::new();
    for manifest in manifests {
        trees.extend(store.inventory().trees_of_manifest(*manifest)?);
    }
    // A tree of several artifacts is one of each of them.
    let composites = store.inventory().trees()?.into_iter().filter(|(_, entry)| {
        entry.is_composite() && entry.documents().any(|document| manifests.contains(&document))
    });
    trees.extend(composites);
    describe(store, trees)
}

fn describe(
    store: &Store,
    trees: Vec<(ObjectName, Arc<Entry>)>,
) -> Result<Vec<DescribedTree>, OperationError> {
    let mut artifacts = Vec::new();
    for (name, entry) in trees {
        let Some(tree) = store.trees().named(&name) else { continue };
        let (manifest, resolutions) = (tree.record.manifest, store.resolutions());
        let references = tree.record.manifests().map(|of| resolutions.references_of(of));
        let references = references.collect::<Result<Vec<_>, _>>()?;
        let is_whole = references.iter().all(|of| !of.is_empty());
        let references: BTreeSet<_> = references.into_iter().flatten().collect();
        let volumes: BTreeSet<_> = store
            .publications()
            .of_tree(&name)
            .into_iter()
            .map(|publication| publication.pod.unwrap_or(publication.volume_id))
            .collect();
        let pins: BTreeSet<_> =
            store.pins().of_manifest(manifest).into_iter().map(|pin| pin.owner).collect();
        let record = &tree.record;
        let artifact = Artifact {
            digest: manifest.to_string(),
            kind: record.kind.clone(),
            bytes: record.bytes,
            inodes: record.inodes,
            references: references.into_iter().collect(),
            volumes: volumes.into_iter().collect(),
            pins: pins.into_iter().collect(),
            last_used: entry.last_used,
            damaged: entry.damaged,
            view: Some(admin_messages::view(&record.view)),
            parts: record.parts.iter().map(admin_messages::part).collect(),
        };
        artifacts.push(DescribedTree { tree, artifact, is_whole });
    }
    artifacts.sort_by(|one, two| {
        let key = |of: &DescribedTree| (of.tree.key, of.tree.generation);
        let order = one.artifact.references.cmp(&two.artifact.references);
        order.then_with(|| key(one).cmp(&key(two)))
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
pub fn remove(store: &Store, reference: &Reference) -> Result<RemoveResponse, OperationError> {
    let owners = owners(store, reference);
    if !owners.is_empty() {
        let owners = owners.join(", ");
        return Err(OperationError::Pinned { reference: reference.to_string(), owners });
    }
    let forgotten = store.resolutions().remove(reference)?;
    let mut manifests: BTreeSet<Digest> =
        forgotten.iter().map(|resolution| resolution.manifest).collect();
    manifests.extend(reference.digest());
    let mut removed = RemoveResponse { reference: reference.to_string(), ..Default::default() };
    let mut was_here = !forgotten.is_empty();
    let mut forgotten = Vec::new();
    for DescribedTree { tree, artifact, is_whole } in artifacts_of(store, &manifests)? {
        was_here = true;
        if !is_whole && artifact.pins.is_empty() {
            store.trees().forget(&tree)?;
            forgotten.push(ObjectName::tree(tree.key, tree.generation));
            removed.volumes.extend(artifact.volumes);
        } else {
            removed.kept_by.extend(artifact.references);
            removed.kept_by.extend(artifact.pins.iter().map(|owner| format!("pin of {owner}")));
        }
    }
    if !was_here {
        return Err(OperationError::NotHere(reference.to_string()));
    }
    removed.kept_by.sort();
    removed.kept_by.dedup();
    let collected = store.collector().collect_trees(&forgotten)?;
    removed.freed_bytes = collected.bytes;
    Ok(removed)
}

fn owners(store: &Store, reference: &Reference) -> Vec<String> {
    let pins = store.pins().of_reference(&reference.to_string()).into_iter();
    let owners: BTreeSet<_> = pins.map(|pin| pin.owner).collect();
    owners.into_iter().collect()
}
