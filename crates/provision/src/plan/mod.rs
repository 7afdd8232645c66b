//! The planner: facts in, decisions out. It sends no request and writes nothing.
//!
//! ```text
//! facts               claims, classes, volumes, and the answers of registries
//! claim_volume        claim and class -> volume, or the reason why there is none
//! ```

pub mod claim_volume;
pub mod facts;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use controller_runtime::Seconds;
use k8s_openapi::api::core::v1::PersistentVolume;

use claim_volume::ClaimVolume;
use facts::{ClaimFacts, FINALIZER, LookupKey, ProvisionState, VolumeFacts};

/// Decisions of the planner.
#[derive(Debug, Default, PartialEq)]
pub struct ProvisionPlan {
    /// Claims without a volume, by `namespace/name`, and how far each of them is.
    pub pending: BTreeMap<Arc<str>, PendingClaim>,
    /// Lookups that are needed now.
    pub lookups: BTreeSet<LookupKey>,
    /// Lookups whose answer is in use.
    pub used_lookups: BTreeSet<LookupKey>,
    /// Changes of volumes, by name.
    pub changes: BTreeMap<Arc<str>, VolumeChange>,
    /// Number of claims with a volume.
    pub provisioned: usize,
    /// Time of the next plan without any event.
    pub wake: Option<Seconds>,
}

/// State of a claim without a volume.
#[derive(Clone, Debug, PartialEq)]
pub enum PendingClaim {
    /// Waits for the scheduler to choose a node.
    WaitsForConsumer,
    /// Waits for the answer of a registry.
    WaitsForRegistry,
    /// Gets this volume. The text is present if the registry did not answer.
    Create(Box<PersistentVolume>, Option<String>),
    /// Cannot be served, for this reason.
    Refused(String),
}

/// Change of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeChange {
    /// Requests its deletion.
    Delete,
    /// Adds the finalizer.
    AddFinalizer,
    /// Removes the finalizer.
    RemoveFinalizer,
}

/// Plans what to do now.
pub fn plan(state: &ProvisionState, now: Seconds) -> ProvisionPlan {
    let mut plan = ProvisionPlan::default();
    let exceeding = exceeding_claims(state);
    for (key, claim) in &state.claims {
        if claim.is_done || state.volumes.contains_key(claim.volume_name().as_str()) {
            plan.provisioned += 1;
            continue;
        }
        let decided = match exceeding.get(&**key) {
            Some(reason) => PendingClaim::Refused(reason.clone()),
            None => plan.decide(state, claim, now),
        };
        plan.pending.insert(Arc::clone(key), decided);
    }
    for (name, volume) in &state.volumes {
        if let Some(change) = volume_change(volume) {
            plan.changes.insert(Arc::clone(name), change);
        }
    }
    plan
}

impl ProvisionPlan {
    fn decide(&mut self, state: &ProvisionState, claim: &ClaimFacts, now: Seconds) -> PendingClaim {
        let Some(class) = state.classes.get(claim.class.as_str()) else {
            return PendingClaim::Refused(format!(
                "there is no StorageClass \"{}\" of the provisioner {}",
                claim.class, state.driver
            ));
        };
        if class.waits_for_consumer && claim.selected_node.is_none() {
            return PendingClaim::WaitsForConsumer;
        }
        let volume = match ClaimVolume::of(state, claim, class) {
            Ok(volume) => volume,
            Err(reason) => return PendingClaim::Refused(reason),
        };
        if let Some(failed) = state.failed_writes.get(&claim.uid).filter(|f| f.retry_at > now) {
            self.wake_at(failed.retry_at);
            return PendingClaim::Refused(failed.message.clone());
        }
        let (mut is_whole, mut unanswered) = (true, None);
        for key in &volume.lookups {
            let known = state.lookups.get(key);
            self.used_lookups.insert(key.clone());
            let Some(known) = known.filter(|known| known.until > now) else {
                self.lookups.insert(key.clone());
                // An earlier refusal is shown until there is another answer.
                match known.map(|known| &known.outcome) {
                    Some(Err(failure)) if !failure.unanswered => {
                        return PendingClaim::Refused(failure.message.clone());
                    }
                    _ => is_whole = false,
                }
                continue;
            };
            match &known.outcome {
                Ok(()) => {}
                // Nodes may have it: whether a pod can start is for them to say.
                Err(failure) if failure.unanswered => unanswered = Some(failure.message.clone()),
                Err(failure) => {
                    self.wake_at(known.until);
                    return PendingClaim::Refused(failure.message.clone());
                }
            }
        }
        if is_whole {
            PendingClaim::Create(Box::new(volume.object(state, claim, class)), unanswered)
        } else {
            PendingClaim::WaitsForRegistry
        }
    }

    fn wake_at(&mut self, at: Seconds) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// Returns the claims beyond the number that a namespace may have, each with the reason.
///
/// The oldest claims count first, so that a new one takes nothing away from others.
fn exceeding_claims(state: &ProvisionState) -> HashMap<&str, String> {
    let Some(allowed) = state.claims_per_namespace else { return HashMap::new() };
    let mut namespaces: HashMap<&str, Vec<(&str, &ClaimFacts)>> = HashMap::new();
    for (key, claim) in &state.claims {
        namespaces.entry(&claim.namespace).or_default().push((key, claim));
    }
    let mut exceeding = HashMap::new();
    for (namespace, mut claims) in namespaces {
        let count = claims.len();
        if count <= allowed {
            continue;
        }
        claims.sort_by_key(|(key, claim)| (claim.created, *key));
        let reason = format!(
            "the namespace {namespace} has {count} claims of {}, of which the oldest {allowed} count: delete some, or have provisioner.maxClaimsPerNamespace of the chart raised",
            state.driver
        );
        exceeding.extend(claims[allowed..].iter().map(|&(key, _)| (key, reason.clone())));
    }
    exceeding
}

/// Returns the change that a volume needs. Nothing is behind a volume, so that its deletion frees
/// nothing else.
fn volume_change(volume: &VolumeFacts) -> Option<VolumeChange> {
    let has_finalizer = volume.finalizers.iter().any(|name| name == FINALIZER);
    let is_bound = volume.phase == "Bound";
    match (volume.is_deleted, volume.is_deletable) {
        (false, true) if volume.phase == "Released" => Some(VolumeChange::Delete),
        (false, true) if is_bound && !has_finalizer => Some(VolumeChange::AddFinalizer),
        // As external-provisioner does: a retained volume is its administrator's.
        (false, false) if has_finalizer => Some(VolumeChange::RemoveFinalizer),
        (true, _) if has_finalizer && !is_bound => Some(VolumeChange::RemoveFinalizer),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
