//! The tree of a volume, from what the node holds and knows alone.
//!
//! This is the path of nearly every publish: it runs on one blocking thread, asks no registry, and
//! waits for nothing. What it cannot decide is left to [`Puller::acquire`], which also says why a
//! volume cannot have its content.

use super::Puller;
use super::artifact::Shape;
use super::want::{PullPolicy, Want};
use crate::store::Tree;
use crate::store::object::ObjectName;

impl Puller {
    /// Returns the tree that is wanted, where the node holds it, has read it back, and knows that
    /// this caller may see it. None where it is to be acquired. Blocking.
    #[must_use]
    pub fn cached(&self, want: &Want) -> Option<Tree> {
        if want.policy == PullPolicy::Always {
            return None;
        }
        let inner = &self.0;
        let repository = want.reference.repository();
        let mirrors = inner.mirrors(repository);
        let candidates = inner.candidates(want);
        let known = inner.known(want, &candidates, &mirrors)?;
        known.proven?;
        let key = Shape::of(want).key(known.manifest);
        if !inner.store.tree_came_from(repository, key, &mirrors) {
            return None;
        }
        let tree = inner.store.tree(key).ok()??;
        let is_read = !inner.store.is_unread(&ObjectName::tree(tree.key, tree.generation));
        let is_verified = want
            .signature
            .as_ref()
            .is_none_or(|demand| inner.store.is_verified(repository, known.manifest, demand.id()));
        let fits = want.check_bytes(tree.record.bytes).is_ok()
            && inner.check_manifest_bytes(want, known.manifest).is_ok();
        (is_read && is_verified && fits).then_some(tree)
    }
}
