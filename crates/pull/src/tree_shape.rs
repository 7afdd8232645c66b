//! The shape of a tree, and the layers of a manifest that it shows.

use std::collections::BTreeMap;

use super::error::PullError;
use super::memory::BYTES_PER_PART;
use oci::Digest;
use oci::manifest::{Descriptor, ImageManifest};
use store::trees::{TreeRecord, View};
use store::{StoreError, TreeKey};
use unpack::layer_merge::TreePlan;
use unpack::layer_rule::{ArchiveRule, FileRule, LayerRule, check_sub_path, classify};
use unpack::permissions::{NodeType, Owner};
use unpack::volume_path::PathError;
use unpack::{
    Limits, Permissions, PermissionsRule, RelativePath, Selection, UnpackError, UnpackMode,
};

/// The settings of a volume that shape its tree, beside the manifest. The default shows the whole artifact.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// The `include` and `exclude` patterns.
    pub selection: Selection,
    /// The rule for modes and owners of files.
    pub permissions: PermissionsRule,
    /// The mode of single-file layers; `None` chooses it by content.
    pub file_mode: Option<u32>,
    /// The choice of layers that are unpacked.
    pub unpack: UnpackMode,
    /// The folder or file of the artifact that is shown; the root shows all of it.
    pub sub_path: RelativePath,
}

/// A layer that is shown.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) layer: usize,
    pub(super) descriptor: Descriptor,
    pub(super) rule: PartRule,
}

#[derive(Clone, Debug)]
pub(super) enum PartRule {
    File(FileRule, Option<Permissions>),
    Archive(ArchiveRule),
}

impl Shape {
    /// Reads the shape of a tree from its record.
    pub(super) fn of_view(view: &View) -> Result<Self, PullError> {
        let damaged = |what| StoreError::Damaged { path: "tree.json".into(), what };
        let selection = Selection::parse(&view.include, &view.exclude)
            .map_err(|error| damaged(error.to_string()))?;
        let sub_path =
            Self::parse_sub_path(&view.sub_path).map_err(|error| damaged(error.to_string()))?;
        let View { permissions, file_mode, unpack, .. } = *view;
        Ok(Self { selection, permissions, file_mode, unpack, sub_path })
    }

    /// Returns the shape in the form of volume attributes, for the record of the tree.
    pub(super) fn view(&self) -> View {
        let (include, exclude) = self.selection.attributes();
        let Self { permissions, file_mode, unpack, .. } = *self;
        View { include, exclude, permissions, file_mode, unpack, sub_path: self.sub_path_text() }
    }

    /// Parses the attribute `subPath`, of which an empty value shows everything.
    pub fn parse_sub_path(text: &str) -> Result<RelativePath, PathError> {
        match text {
            "" => Ok(RelativePath::root()),
            // Its own bounds: those of the configuration refuse what artifacts have.
            text => RelativePath::parse(text.as_bytes(), &Limits::largest()),
        }
    }

    /// Returns `subPath` in canonical form; empty for the root.
    pub fn sub_path_text(&self) -> String {
        String::from_utf8_lossy(self.sub_path.as_bytes()).into_owned()
    }

    /// Returns the record of a tree of this shape. Copies of files are counted when they are made.
    pub(super) fn record(
        &self,
        manifest: Digest,
        kind: String,
        compressed_bytes: u64,
        plan: &TreePlan,
    ) -> TreeRecord {
        TreeRecord {
            manifest,
            kind,
            bytes: plan.totals.bytes,
            inodes: plan.totals.inodes,
            compressed_bytes,
            own_inodes: plan.totals.directories + plan.totals.symbolic_links,
            own_bytes: 0,
            view: self.view(),
            parts: Vec::new(),
        }
    }

    pub(super) fn key(&self, manifest: Digest) -> TreeKey {
        let file_mode = self.file_mode.map(|mode| format!("{mode:04o}")).unwrap_or_default();
        let (selection, permissions) = (self.selection.canonical(), self.permissions.name());
        let key = TreeKey::new(manifest, &selection, permissions, &file_mode);
        let key = if self.unpack.is_auto() { key } else { key.with_unpack(self.unpack.name()) };
        if self.sub_path.is_root() { key } else { key.with_sub_path(&self.sub_path_text()) }
    }

    /// The layers that are shown, or may be: a title can prove that a layer is not.
    pub(super) fn parts(
        &self,
        manifest: &ImageManifest,
        limits: &unpack::Limits,
    ) -> Result<Vec<Part>, PullError> {
        let rules = classify(manifest, self.unpack, limits)?;
        // Links of an image may lead from `subPath` to any layer.
        let proves = !manifest.is_image();
        if proves {
            check_sub_path(&rules, &self.sub_path)?;
        }
        // Its patterns are compiled for this list alone.
        let selection = self.selection.clone();
        let layers = manifest.layers.iter().zip(rules).enumerate();
        let parts = layers.filter_map(|(layer, (descriptor, rule))| {
            if !rule.is_needed(&selection) || proves && !rule.may_have(&self.sub_path) {
                return None;
            }
            let rule = match rule {
                LayerRule::Skip => return None,
                LayerRule::File(rule) => match self.permissions_of(&rule) {
                    Ok(permissions) => PartRule::File(rule, permissions),
                    Err(error) => return Some(Err(error.into())),
                },
                LayerRule::Archive(rule) => PartRule::Archive(rule),
            };
            // The rule has been made from these annotations, which are not needed any more.
            let annotations = BTreeMap::new();
            let descriptor = Descriptor { annotations, platform: None, ..descriptor.clone() };
            Some(Ok(Part { layer, descriptor, rule }))
        });
        parts.collect()
    }

    /// Returns the permissions of a file: those recorded with it, else the attribute's, else by content.
    fn permissions_of(&self, rule: &FileRule) -> Result<Option<Permissions>, UnpackError> {
        let recorded = rule.recorded;
        let recorded = recorded.map(|recorded| self.permissions.apply(NodeType::File, recorded));
        if let Some(Permissions { uid, gid, .. }) = recorded.filter(|owned| !owned.has_owner()) {
            let [uid, gid] = [uid, gid].map(|number| Owner::Number(number.into()));
            return Err(UnpackError::Owner { path: rule.path.clone(), uid, gid });
        }
        let asked = self.file_mode.map(|mode| Permissions { mode: mode & 0o777, uid: 0, gid: 0 });
        Ok(recorded.or(asked))
    }
}

/// Returns the bytes of memory that a pull keeps for a list of parts.
pub(super) fn memory_of(parts: &[Part]) -> u64 {
    let of_part = |part: &Part| {
        let Part { descriptor, rule, .. } = part;
        let path = match rule {
            PartRule::File(rule, _) => Some(&rule.path),
            PartRule::Archive(rule) => rule.within.as_ref(),
        };
        let path = path.map_or(0, |path| path.as_bytes().len());
        let data = descriptor.data.as_ref().map_or(0, Vec::len);
        BYTES_PER_PART + (2 * path + data + descriptor.media_type.len()) as u64
    };
    parts.iter().map(of_part).fold(0, u64::saturating_add)
}

/// The blobs of these parts that the manifest does not carry itself.
pub(super) fn blobs_of_registry(parts: &[Part]) -> Vec<Digest> {
    let fetched = parts.iter().filter(|part| part.descriptor.data.is_none());
    fetched.map(|part| part.descriptor.digest).collect()
}
