//! The fast path of a publish: a tree that is in the store and proven for its caller.
//!
//! Nearly every publish takes this path. It runs on one blocking thread and waits for no registry and
//! no flight. Everything else is left to [`Puller::acquire`], including the reason of a failure.

use super::Puller;
use super::artifact_request::{PullPolicy, Want};
use super::signature_verification;
use store::object_name::ObjectName;
use store::{Tree, TreeKey};

impl Puller {
    /// Returns the wanted tree if it is in the store, has been read back, and is proven for this
    /// caller. None means that it has to be acquired. Blocking.
    pub fn cached(&self, want: &Want) -> Option<Tree> {
        let store = &self.0.resolver.store;
        let tree = store.trees().get(self.cached_key(want)?).ok()??;
        let is_read = !store.read_back().is_unread(&ObjectName::tree(tree.key, tree.generation));
        (is_read && want.check_bytes(tree.record.bytes).is_ok()).then_some(tree)
    }

    /// Returns the key of the wanted tree if its content is proven for this caller and has the demanded
    /// signature, or is only warned of. Blocking.
    pub(super) fn cached_key(&self, want: &Want) -> Option<TreeKey> {
        if want.policy == PullPolicy::Always {
            return None;
        }
        let resolver = &self.0.resolver;
        let store = &resolver.store;
        let repository = want.reference.repository();
        let known = resolver.known.find(want, &resolver.candidates(want))?;
        known.proven?;
        let manifest = known.digests.manifest;
        let key = want.shape.key(manifest);
        if !store.origins().tree_came_from(&known.sources, key) {
            return None;
        }
        resolver.known.check_bytes(want, manifest).ok()?;
        if let Some(demand) = &want.signature
            && !signature_verification::is_verified(store, repository, known.digests, demand)
        {
            if !want.is_only_warned_of() {
                return None;
            }
            self.verify_later(want, known.digests, None);
        }
        Some(key)
    }
}
