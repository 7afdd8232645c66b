//! Reads everything back, and makes anew what was found damaged.

use std::collections::HashSet;
use std::sync::Arc;

use super::artifact::{Object, Part, PartRule, Shape};
use super::candidates::Candidates;
use super::error::PullError;
use super::resolve::{Resolved, blocking};
use super::room::layer_key;
use super::want::{IfUnavailable, Priority, PullPolicy, Want};
use super::{Inner, ProgressView, Puller};
use crate::oci::credentials::Keyring;
use crate::oci::manifest::{ImageManifest, Manifest};
use crate::oci::{Digest, Platform, Reference};
use crate::store::resolutions::Resolution;
use crate::store::trees::View;
use crate::store::verify::{Finding, Verified};
use crate::store::{ObjectName, StoreError, Tree, TreeKey};
use crate::unpack::Selection;

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
            let mut verified = Verified::default();
            let store = &inner.store;
            let before = store.sound_trees()?;
            store.verify_blobs(&mut verified, &mut found)?;
            store.verify_objects(&mut verified, &mut found)?;
            for tree in store.sound_trees()? {
                verified.objects += 1;
                inner.verify_tree(&tree, &mut found)?;
            }
            let sound = store.sound_trees()?;
            let sound: HashSet<_> = sound.iter().map(|tree| (tree.key, tree.generation)).collect();
            let damaged =
                before.into_iter().filter(|tree| !sound.contains(&(tree.key, tree.generation)));
            let damaged = damaged.map(|Tree { key, record, .. }| Damaged {
                key,
                manifest: record.manifest,
                view: record.view,
            });
            Ok((verified, damaged.collect()))
        })
        .await
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
            maximum_bytes: None,
            signature: None,
        })
    }
}

impl Inner {
    fn verify_tree(&self, tree: &Tree, found: &mut dyn FnMut(Finding)) -> Result<(), PullError> {
        // Without its manifest a tree's files are known to be good, and their names are not.
        let Some(bytes) = self.store.blob(tree.record.manifest)? else { return Ok(()) };
        let Ok(Manifest::Image(image)) = Manifest::parse(&bytes, None, self.limits.manifest())
        else {
            return Ok(());
        };
        let shape = shape(&tree.record.view)?;
        let Some(parts) = self.linked_parts(tree, &image, &shape)? else { return Ok(()) };
        match self.plan(parts, &shape) {
            Ok((plan, objects)) => Ok(self.store.verify_tree(tree, &plan, &objects, found)?),
            // Limits that are lower now than they were then say nothing about the disk.
            Err(error) => {
                tracing::warn!(tree = %tree.key, %error, "a tree cannot be compared with its layers");
                Ok(())
            }
        }
    }

    /// The very generations of files and layers that a tree was linked from.
    fn linked_parts(
        &self,
        tree: &Tree,
        image: &ImageManifest,
        shape: &Shape,
    ) -> Result<Option<Vec<Object>>, PullError> {
        let links = self.store.links(tree);
        let mut objects = Vec::new();
        for Part { layer, descriptor, rule } in shape.parts(image, &self.limits)? {
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
