//! The files and layers that a tree is planned from.

use super::error::PullError;
use super::tree_shape::Shape;
use store::layers::{Layer, LayerTotals, LayerView};
use store::single_files::StoredFile;
use store::trees::Objects;
use store::{FileKey, Store, StoreError};
use unpack::layer_merge::{Merger, TreePlan};
use unpack::layer_rule::{ArchiveRule, FileRule};
use unpack::{Limits, UnpackError};

/// A part that is in the store, with its number in the manifest.
pub(super) enum Object {
    File(usize, FileRule, u64, StoredFile),
    Layer(usize, ArchiveRule, LayerView, LayerTotals),
}

/// The parts that a tree is made of, bottom first.
pub(super) struct TreeSources {
    parts: Vec<(usize, SourceRule)>,
    pub(super) objects: Objects,
    /// The number of entries of all layers and of single files.
    pub(super) entries: u64,
}

enum SourceRule {
    File(FileRule, u64, FileKey),
    Archive(ArchiveRule),
}

impl Object {
    /// Found by its name from now on: of many layers not each is held open until the last one has come.
    pub(super) fn take_name(&mut self, named: &Layer) {
        if let Self::Layer(_, _, view, _) = self {
            *view = named.view();
        }
    }

    /// Returns its entries and its bytes.
    pub(super) fn amount(&self) -> (u64, u64) {
        match self {
            Self::File(_, _, size, _) => (1, *size),
            Self::Layer(_, _, _, totals) => (totals.entries, totals.bytes),
        }
    }
}

impl TreeSources {
    pub(super) fn new(mut from: Vec<Object>) -> Self {
        from.sort_by_key(|part| match part {
            Object::File(layer, ..) | Object::Layer(layer, ..) => *layer,
        });
        let mut sources =
            Self { parts: Vec::with_capacity(from.len()), objects: Objects::default(), entries: 0 };
        for part in from {
            match part {
                Object::File(layer, rule, size, file) => {
                    sources.entries = sources.entries.saturating_add(1);
                    sources.parts.push((layer, SourceRule::File(rule, size, file.key)));
                    sources.objects.files.insert(file.key, file);
                }
                Object::Layer(layer, rule, view, totals) => {
                    sources.entries = sources.entries.saturating_add(totals.entries);
                    sources.parts.push((layer, SourceRule::Archive(rule)));
                    sources.objects.layers.insert(layer_number(layer), view);
                }
            }
        }
        sources
    }

    /// Plans the tree of these parts in this shape, within `allowance` bytes of memory. Blocking.
    pub(super) fn plan(
        &self,
        store: &Store,
        shape: &Shape,
        limits: &Limits,
        allowance: u64,
    ) -> Result<TreePlan, PullError> {
        let mut records = self.objects.records();
        // Its patterns are compiled for this plan alone.
        let selection = shape.selection.clone();
        let mut merger = Merger::new(limits, &selection);
        merger.sub_path = shape.sub_path.clone();
        merger.allowance = allowance;
        merger.records = Some(&mut records);
        for (layer, rule) in &self.parts {
            match rule {
                SourceRule::File(rule, size, FileKey { digest, permissions }) => {
                    merger.file(*layer, rule, *digest, *size, *permissions)?;
                }
                SourceRule::Archive(rule) => {
                    let Some(view) = self.objects.layers.get(&layer_number(*layer)) else {
                        return Err(PullError::Crashed);
                    };
                    merger.archive(*layer, rule);
                    add_entries(store, view, &mut merger)?;
                }
            }
        }
        Ok(merger.finish()?)
    }

    /// Returns the estimated bytes of memory for the whole plan, if it was stopped for memory.
    pub(super) fn shortage(&self, error: &PullError) -> Option<u64> {
        let PullError::Unpack(UnpackError::Memory { bytes, entries }) = error.root() else {
            return None;
        };
        // Assumes that the rest of the entries is like the first ones, and adds an eighth.
        let all = u128::from(*bytes) * u128::from(self.entries.max(*entries));
        let all = u64::try_from(all / u128::from((*entries).max(1))).unwrap_or(u64::MAX);
        Some(all.saturating_add(all / 8))
    }
}

/// Adds the entries of a layer, each with its offset in the index. A layer with a damaged index
/// is marked as damaged, so that the next try fetches it again.
fn add_entries(store: &Store, layer: &LayerView, merger: &mut Merger<'_>) -> Result<(), PullError> {
    let mut read = || -> Result<(), PullError> {
        let mut entries = layer.entries()?;
        while let Some(entry) = entries.next() {
            merger.recorded(&entry?, entries.offset)?;
        }
        Ok(())
    };
    let done = read();
    if let Err(PullError::Store(StoreError::Damaged { .. })) = &done
        && let Some(path) = layer.path()
    {
        store.inventory().mark_damaged(path)?;
    }
    done
}

fn layer_number(layer: usize) -> u32 {
    u32::try_from(layer).unwrap_or(u32::MAX)
}
