//! Refreshes one reference of the list: what is on the node, what the tag resolves to now, and what to keep.
//!
//! ```text
//! resolution of IfNotPresent   fetched first: it stays available while the registry is down
//! resolution of the tag now    requested and fetched in addition, for pods with Always
//! followTag                    the second replaces the first, once it is complete
//! ```

use std::sync::Arc;

use super::want::{want, with_demands};
use crate::volume::NodeContent;
use oci::credentials::Keyring;
use oci::{Digest, Platform, Reference};
use pull::{ProgressView, PullError, PullPolicy, Tenant, Want};
use store::resolution_records::Resolution;

/// The result of one refresh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RefreshOutcome {
    /// The manifest for pods with `IfNotPresent`, complete on this node.
    pub(super) manifest: Option<Digest>,
    /// The manifest that the tag resolves to now, complete on this node; `None` if it is the same.
    pub(super) newer: Option<Digest>,
    /// The resolution to record for `IfNotPresent`.
    pub(super) remember: Option<Resolution>,
    /// The first failure.
    pub(super) failure: Option<String>,
}

/// Returns what is on the node, without a request to the registry.
pub(super) async fn find_local(
    content: &NodeContent,
    reference: &Reference,
    platform: &Platform,
) -> RefreshOutcome {
    let view = ProgressView::default();
    let wanted = node_want(content, reference, platform, PullPolicy::Never).await;
    let tree = content.puller.acquire(&wanted, &view).await;
    RefreshOutcome {
        manifest: tree.ok().map(|tree| tree.record.manifest),
        ..RefreshOutcome::default()
    }
}

/// Asks the registry for the current manifest, and fetches what is missing.
pub(super) async fn refresh(
    content: &NodeContent,
    reference: &Reference,
    platform: &Platform,
    follow_tag: bool,
    view: &ProgressView,
) -> RefreshOutcome {
    let recorded = recorded(content, reference, platform).await;
    let mut outcome = RefreshOutcome::default();
    if reference.digest().is_some() || recorded.is_some() {
        // `follow_tag` resolves the tag below, so a missing recorded manifest is not fetched first.
        let fetches = reference.digest().is_some() || !follow_tag;
        let policy = if fetches { PullPolicy::IfNotPresent } else { PullPolicy::Never };
        let wanted = node_want(content, reference, platform, policy).await;
        match content.puller.acquire(&wanted, view).await {
            Ok(tree) => outcome.manifest = Some(tree.record.manifest),
            Err(error) if fetches => outcome.failure = Some(error_text(&error)),
            Err(_) => {}
        }
    }
    if reference.digest().is_some() {
        return outcome;
    }
    let wanted = node_want(content, reference, platform, PullPolicy::Always).await;
    match content.puller.acquire_unremembered(&wanted, view).await {
        Ok((tree, resolution)) => {
            outcome.set_current(recorded, tree.record.manifest, resolution, follow_tag);
        }
        Err(error) => {
            outcome.failure.get_or_insert(error_text(&error));
        }
    }
    outcome
}

impl RefreshOutcome {
    /// Adds the manifest that the tag resolves to now, which is complete on this node.
    fn set_current(
        &mut self,
        recorded: Option<Digest>,
        now: Digest,
        resolution: Resolution,
        follow_tag: bool,
    ) {
        if follow_tag || recorded.is_none_or(|recorded| recorded == now) {
            self.manifest = Some(now);
            self.remember = (recorded != Some(now)).then_some(resolution);
        } else {
            self.newer = Some(now);
        }
    }

    /// Returns the pins that the reference needs.
    pub(super) fn pins(&self, reference: &Reference) -> Vec<(Reference, Digest)> {
        let meant = self.manifest.map(|manifest| (reference.clone(), manifest));
        let newer = self.newer.map(|manifest| (reference.at(manifest), manifest));
        meant.into_iter().chain(newer).collect()
    }
}

async fn node_want(
    content: &NodeContent,
    reference: &Reference,
    platform: &Platform,
    policy: PullPolicy,
) -> Want {
    // The puller adds the node's docker configuration and credential plugins.
    let wanted =
        want(reference.clone(), platform.clone(), policy, Keyring::empty(), Tenant::Config);
    with_demands(content, wanted).await
}

async fn recorded(
    content: &NodeContent,
    reference: &Reference,
    platform: &Platform,
) -> Option<Digest> {
    let (store, reference, platform) = (content.store.clone(), reference.clone(), platform.clone());
    let read = move || store.resolutions().get(&reference, &platform).map(|known| known.manifest);
    tokio::task::spawn_blocking(read).await.ok().flatten()
}

fn error_text(error: &Arc<PullError>) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome_of(recorded: Option<Digest>, now: Digest, follow_tag: bool) -> RefreshOutcome {
        let resolution = Resolution {
            reference: "r.io/app:v1".to_owned(),
            resolved: now,
            manifest: now,
            platform: None,
        };
        let mut outcome = RefreshOutcome { manifest: recorded, ..RefreshOutcome::default() };
        outcome.set_current(recorded, now, resolution, follow_tag);
        outcome
    }

    #[test]
    fn a_tag_that_moved_is_kept_beside_what_pods_get_unless_it_is_followed() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let reference: Reference = "r.io/app:v1".parse().expect("a reference");
        let first = outcome_of(None, new, false);
        assert_eq!((first.manifest, first.remember.is_some()), (Some(new), true));
        let same = outcome_of(Some(new), new, false);
        assert_eq!((same.manifest, same.newer, same.remember), (Some(new), None, None));
        let beside = outcome_of(Some(old), new, false);
        assert_eq!((beside.manifest, beside.newer), (Some(old), Some(new)));
        assert_eq!(beside.remember, None, "IfNotPresent means what it meant");
        assert_eq!(beside.pins(&reference), [(reference.clone(), old), (reference.at(new), new)]);
        let followed = outcome_of(Some(old), new, true);
        assert_eq!((followed.manifest, followed.newer), (Some(new), None));
        assert!(followed.remember.is_some());
    }
}
