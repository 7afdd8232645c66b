//! Facts of the planner: preloads, nodes, and the objects of nodes.
//!
//! Texts that many nodes share are stored once: a cluster of thousands of nodes with hundreds of
//! preloads has millions of pairs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::node_status::NodeStatusRules;
use super::preload_status::ConditionState;
use crate::api::{
    ArtifactPreload, ArtifactPreloadSpec, ArtifactPreloadStatus, NodeArtifacts, Phase,
    ResolvedReference,
};
use oci::{Digest, Platform, Reference};
use text::duration::GoDuration;

pub use controller_runtime::object_watch::key_of;
pub use controller_runtime::{ResolutionFailure, Seconds};

/// Short identifier of `namespace/name` of a preload, valid in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PreloadId(u32);

/// Quota of the preloads of one namespace. The default has no limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceQuota {
    /// Maximum number of preloads.
    pub preloads: Option<usize>,
    /// Maximum bytes that their pins may hold together on each node.
    pub pinned_bytes: Option<u64>,
}

/// All facts of the planner.
#[derive(Debug, Default)]
pub struct ClusterState {
    /// Quota of each namespace.
    pub quota: NamespaceQuota,
    /// Labels and condition to write to Nodes.
    pub node_status: NodeStatusRules,
    /// Preloads by `namespace/name`.
    pub preloads: BTreeMap<Arc<str>, PreloadFacts>,
    /// Nodes by name.
    pub nodes: BTreeMap<Arc<str>, ClusterNode>,
    /// Objects of nodes, by name.
    pub objects: BTreeMap<Arc<str>, NodeObject>,
    ids: HashMap<Arc<str>, PreloadId>,
    keys: Vec<Arc<str>>,
    texts: HashSet<Arc<str>>,
}

/// Facts of a preload.
#[derive(Clone, Debug)]
pub struct PreloadFacts {
    /// Identifier of the preload.
    pub id: PreloadId,
    /// UID of the object.
    pub uid: String,
    /// Resource version of the object.
    pub version: String,
    /// Creation time of the object.
    pub created: Seconds,
    /// Generation of the spec.
    pub generation: i64,
    /// Spec of the object.
    pub spec: ArtifactPreloadSpec,
    /// Spec with parsed texts, or the reason why it is invalid.
    pub parsed: Result<ParsedSpec, String>,
    /// Status as it was last read or written.
    pub status: ArtifactPreloadStatus,
    /// Resolution of the reference.
    pub resolution: ReferenceResolution,
    /// Access to the registry.
    pub access: RegistryAccess,
    /// True after a new list began: its version counts, even if it is lower.
    pub relisted: bool,
}

/// A spec with parsed texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedSpec {
    /// Reference as it was written.
    pub reference: Reference,
    /// Platforms that the artifact must support.
    pub platforms: Vec<Platform>,
    /// Maximum number of nodes that pull at once.
    pub parallelism: NodeCount,
    /// Number of selected nodes that may be away while the preload counts as ready.
    pub tolerated: NodeCount,
    /// Duration over which the start of nodes is spread.
    pub spread: Duration,
}

/// A number of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeCount {
    /// An absolute number.
    Nodes(usize),
    /// A percentage of the selected nodes.
    Percent(usize),
}

/// Resolution of a reference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ReferenceResolution {
    /// Unresolved so far.
    #[default]
    Unknown,
    /// Resolved by the registry.
    Known(ResolvedArtifact),
    /// Failed with this reason.
    Refused(ResolutionFailure),
}

/// A digest that a reference resolved to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedArtifact {
    /// Value of `spec.reference` at that time.
    pub reference: String,
    /// Digest of a manifest or an index.
    pub digest: Digest,
    /// Platforms of an index; empty if it is not an index.
    pub platforms: Vec<Platform>,
    /// Bytes of the layers in the registry; for an index, those of the platform with the fewest.
    pub bytes: Option<u64>,
    /// Origin of the answer: the registry, or an earlier answer.
    pub origin: AnswerOrigin,
}

/// Origin of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerOrigin {
    /// Time of the request to the registry; `None` if unknown.
    pub resolved_at: Option<Seconds>,
    /// Names of the secrets of the request.
    pub pull_secrets: Vec<String>,
    /// Present if the registry did not answer, and this is its earlier answer to the preload.
    pub unavailable: Option<RegistryOutage>,
}

/// A registry that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegistryOutage {
    /// Time of the first request without an answer, in seconds since 1970.
    pub since: Seconds,
    /// Time of the next request, in seconds since 1970.
    pub retry_at: Seconds,
}

/// Access to the registry of an artifact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RegistryAccess {
    /// The secrets were not read yet.
    #[default]
    Unknown,
    /// No secrets are named, or none has a credential for the registry.
    Open,
    /// Credentials of the secrets.
    Sealed {
        /// Version of the secrets, which changes with them.
        version: Arc<str>,
        /// Time at which they are read again, if nodes still need them.
        until: Seconds,
    },
    /// The secrets are unusable for this reason.
    Refused(ResolutionFailure),
}

/// Facts of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNode {
    /// UID of the node.
    pub uid: String,
    /// Labels of the node.
    pub labels: BTreeMap<String, String>,
    /// Creation time of the node.
    pub created: Seconds,
    /// Position of the node in the order of starts. It is the same for all preloads, so that one
    /// write assigns several artifacts to a node.
    pub start_order: u64,
    /// Condition Ready of the node, if it was read from the API server.
    pub readiness: Option<NodeReadiness>,
    /// Condition of the node's artifacts, as this process last wrote it.
    pub condition: Option<ConditionState>,
}

/// Condition Ready of a node, as it was read from the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeReadiness {
    /// True unless the condition is False or Unknown.
    pub is_ready: bool,
    /// Time until which the value is used, in seconds since 1970.
    pub until: Seconds,
}

/// Facts of a `NodeArtifacts` object.
#[derive(Clone, Debug)]
pub struct NodeObject {
    /// Resource version of the object.
    pub version: String,
    /// UID of the node that the object was created for.
    pub owner: Option<String>,
    /// Creation time of the object.
    pub created: Seconds,
    /// Artifacts that the node has to hold, by preload.
    pub wanted: Vec<AssignedArtifact>,
    /// Bytes that the pins of one namespace may hold, as the node was told.
    pub pinned_bytes_per_namespace: Option<u64>,
    /// Status that the node reported.
    pub report: Option<NodeReport>,
    /// True after a new list began: its version counts, even if it is lower.
    pub relisted: bool,
}

/// An artifact that a node has to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedArtifact {
    /// Preload that wants it.
    pub preload: PreloadId,
    /// Reference with its digest.
    pub reference: Arc<str>,
    /// True if it is protected from eviction.
    pub pin: bool,
    /// Maximum duration of an attempt, in seconds.
    pub timeout: i32,
    /// Number of retries.
    pub backoff: i32,
    /// Time since which it is wanted.
    pub since: Seconds,
    /// Time at which the registry resolved the tag, if the node may serve pods by the tag.
    pub resolved_at: Option<Seconds>,
    /// Sealed credentials that the object has.
    pub sealed: Option<SealedVersion>,
}

/// Identity of sealed credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedVersion {
    /// Public key that they are sealed to.
    pub key: Arc<str>,
    /// Version of the secrets.
    pub version: Arc<str>,
}

/// Status that a node reported.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Platform of the node.
    pub platform: Option<Platform>,
    /// Bytes of artifacts that the node can hold at most, if it reports them.
    pub capacity: Option<u64>,
    /// Public key of its process.
    pub public_key: Arc<str>,
    /// Progress of each artifact, by preload.
    pub held: Vec<ArtifactProgress>,
}

/// Progress of one artifact on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArtifactProgress {
    /// Preload that wants it.
    pub preload: PreloadId,
    /// Reference; empty if the node does not report it.
    pub reference: Arc<str>,
    /// Digest of the artifact.
    pub digest: Arc<str>,
    /// Phase of the artifact.
    pub phase: Phase,
    /// Time since which it is pulled, if the node reports it.
    pub since: Option<Seconds>,
    /// Reason why it is not ready.
    pub reason: Arc<str>,
    /// Message with details of the reason.
    pub message: Arc<str>,
}

impl ClusterState {
    /// Returns the state before anything is known of the cluster.
    pub fn new(quota: NamespaceQuota, node_status: NodeStatusRules) -> Self {
        Self { quota, node_status, ..Self::default() }
    }

    /// Returns the identifier of `namespace/name`.
    pub fn id(&mut self, key: &str) -> PreloadId {
        if let Some(id) = self.ids.get(key) {
            return *id;
        }
        let key: Arc<str> = Arc::from(key);
        let id = PreloadId(u32::try_from(self.keys.len()).unwrap_or(u32::MAX));
        self.keys.push(Arc::clone(&key));
        self.ids.insert(key, id);
        id
    }

    /// Returns `namespace/name` of an identifier.
    pub fn key(&self, id: PreloadId) -> Arc<str> {
        self.keys.get(id.0 as usize).cloned().unwrap_or_else(|| Arc::from(""))
    }

    /// Returns the shared copy of a text.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let text: Arc<str> = Arc::from(text);
        self.texts.insert(Arc::clone(&text));
        text
    }

    /// Drops texts that are no longer used.
    pub fn forget_texts(&mut self) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
    }

    /// Adds or updates a preload.
    pub fn put_preload(&mut self, object: &ArtifactPreload) {
        let Some(key) = key_of(object) else { return };
        if object.metadata.deletion_timestamp.is_some() {
            self.preloads.remove(key.as_str());
            return;
        }
        let id = self.id(&key);
        let key = self.key(id);
        let metadata = &object.metadata;
        let created = metadata.creation_timestamp.as_ref();
        let mut preload = PreloadFacts {
            id,
            uid: metadata.uid.clone().unwrap_or_default(),
            version: metadata.resource_version.clone().unwrap_or_default(),
            created: created.map_or(0, |time| time.0.as_second()),
            generation: metadata.generation.unwrap_or_default(),
            spec: object.spec.clone(),
            parsed: parse(&object.spec),
            status: object.status.clone().unwrap_or_default(),
            resolution: ReferenceResolution::Unknown,
            access: RegistryAccess::Unknown,
            relisted: false,
        };
        // Facts of a deleted preload do not apply to a new one of the same name.
        if let Some(known) = self.preloads.get_mut(&key).filter(|known| known.uid == preload.uid) {
            if !known.relisted && is_newer(&known.version, &preload.version) {
                return;
            }
            let other_reference = known.spec.reference != preload.spec.reference;
            let other_secrets = known.spec.pull_secrets != preload.spec.pull_secrets;
            if !other_reference && !other_secrets {
                preload.access = std::mem::take(&mut known.access);
            }
            // A refusal may not apply to other secrets, and an earlier answer applies only to
            // secrets of the same names.
            if !other_reference && (!other_secrets || known.resolution.is_answer()) {
                preload.resolution = std::mem::take(&mut known.resolution);
            }
        }
        preload.restore();
        self.preloads.insert(key, preload);
    }

    /// Adds or updates the object of a node.
    pub fn put_object(&mut self, object: &NodeArtifacts) {
        let name = self.text(object.metadata.name.as_deref().unwrap_or_default());
        let owners = object.metadata.owner_references.iter().flatten();
        let mut owners = owners.filter(|owner| owner.kind == "Node");
        let owner = owners.next().map(|owner| owner.uid.clone());
        let mut wanted: Vec<AssignedArtifact> = Vec::with_capacity(object.spec.artifacts.len());
        for artifact in &object.spec.artifacts {
            let sealed = artifact.credentials.as_ref().map(|sealed| SealedVersion {
                key: self.text(&sealed.key),
                version: self.text(&sealed.version),
            });
            wanted.push(AssignedArtifact {
                preload: self.id(&artifact.preload),
                reference: self.text(&artifact.reference),
                pin: artifact.pin,
                timeout: artifact.timeout_seconds,
                backoff: artifact.backoff_limit,
                since: artifact.since.0.as_second(),
                resolved_at: artifact.resolved_at.as_ref().map(|time| time.0.as_second()),
                sealed,
            });
        }
        wanted
            .sort_by(|one, two| (one.preload, &one.reference).cmp(&(two.preload, &two.reference)));
        let said = object.status.as_ref().filter(|status| !status.platform.is_empty());
        let report = said.map(|status| {
            let mut held: Vec<ArtifactProgress> = Vec::with_capacity(status.artifacts.len());
            for artifact in &status.artifacts {
                held.push(ArtifactProgress {
                    preload: self.id(&artifact.preload),
                    reference: self.text(&artifact.reference),
                    digest: self.text(&artifact.digest),
                    phase: artifact.phase,
                    since: artifact.since.as_ref().map(|time| time.0.as_second()),
                    reason: self.text(&artifact.reason),
                    message: self.text(&artifact.message),
                });
            }
            held.sort_by_key(|held| held.preload);
            NodeReport {
                platform: status.platform.parse().ok(),
                capacity: status.capacity_bytes.and_then(|bytes| u64::try_from(bytes).ok()),
                public_key: self.text(&status.public_key),
                held,
            }
        });
        let version = object.metadata.resource_version.clone().unwrap_or_default();
        let created = object.metadata.creation_timestamp.as_ref();
        let created = created.map_or(0, |time| time.0.as_second());
        let known = self.objects.get(&name).filter(|known| !known.relisted);
        if known.is_some_and(|known| is_newer(&known.version, &version)) {
            return;
        }
        let bound = object.spec.max_pinned_bytes_per_namespace;
        let pinned_bytes_per_namespace = bound.and_then(|bytes| u64::try_from(bytes).ok());
        let object = NodeObject {
            version,
            owner,
            created,
            wanted,
            pinned_bytes_per_namespace,
            report,
            relisted: false,
        };
        self.objects.insert(name, object);
    }
}

impl ReferenceResolution {
    /// Returns whether the registry has answered since it was last asked.
    pub fn is_answer(&self) -> bool {
        matches!(
            self,
            Self::Known(ResolvedArtifact { origin: AnswerOrigin { unavailable: None, .. }, .. })
        )
    }
}

impl PreloadFacts {
    /// Applies the result of a resolution. If the registry does not answer, its earlier answer to
    /// this object is kept; if it refuses, it is not.
    pub fn apply_resolution(&mut self, found: ReferenceResolution, now: Seconds) {
        if self.resolution.is_answer() {
            return;
        }
        let before = match &self.resolution {
            ReferenceResolution::Known(known) => known.origin.unavailable,
            ReferenceResolution::Unknown | ReferenceResolution::Refused(_) => None,
        };
        self.resolution = match found {
            ReferenceResolution::Refused(refusal) if refusal.unanswered => {
                let since = before.map_or(now, |before| before.since);
                let unavailable = RegistryOutage { since, retry_at: refusal.retry_at };
                self.earlier_answer(unavailable)
                    .map_or(ReferenceResolution::Refused(refusal), ReferenceResolution::Known)
            }
            found => found,
        };
    }

    /// Records that the secrets could not be read: an earlier answer applies to present secrets
    /// only.
    pub fn lose_secrets(&mut self, refusal: &ResolutionFailure) {
        let ReferenceResolution::Known(known) = &mut self.resolution else { return };
        match &mut known.origin.unavailable {
            Some(unavailable) if refusal.transient => unavailable.retry_at = refusal.retry_at,
            Some(_) => self.resolution = ReferenceResolution::Unknown,
            None => {}
        }
    }

    /// Returns the last answer of the registry to this object about its reference, with secrets of
    /// the same names. For a digest, any tag of the repository that resolved to it is enough.
    fn earlier_answer(&self, unavailable: RegistryOutage) -> Option<ResolvedArtifact> {
        let wanted = &self.parsed.as_ref().ok()?.reference;
        let is_wanted = |answer: &&ResolvedReference| {
            let Ok(reference) = answer.reference.parse::<Reference>() else { return false };
            let same_tag = || reference.tag_or_latest() == wanted.tag_or_latest();
            reference.repository() == wanted.repository()
                && match wanted.digest() {
                    Some(digest) => answer.digest == digest.to_string(),
                    None => reference.digest().is_none() && same_tag(),
                }
        };
        let mut names = self.spec.pull_secrets.clone();
        names.sort();
        let has_names = |answer: &&ResolvedReference| {
            let mut asked_with = answer.pull_secrets.clone();
            asked_with.sort();
            asked_with == names
        };
        let mut answers = self.status.history.iter().filter(is_wanted);
        let answer = match wanted.digest() {
            Some(_) => answers.find(has_names),
            // An older answer about a tag does not count.
            None => answers.next().filter(has_names),
        };
        self.known(answer?, Some(unavailable))
    }

    fn known(
        &self,
        answer: &ResolvedReference,
        unavailable: Option<RegistryOutage>,
    ) -> Option<ResolvedArtifact> {
        Some(ResolvedArtifact {
            reference: self.spec.reference.clone(),
            digest: answer.digest.parse().ok()?,
            platforms: answer.platforms.iter().filter_map(|text| text.parse().ok()).collect(),
            bytes: answer.bytes.and_then(|bytes| u64::try_from(bytes).ok()),
            origin: AnswerOrigin {
                resolved_at: Some(answer.resolved_at.0.as_second()),
                pull_secrets: answer.pull_secrets.clone(),
                unavailable,
            },
        })
    }

    /// Restores what is known without a request: access without secrets, and the resolution in the
    /// status.
    fn restore(&mut self) {
        if self.spec.pull_secrets.is_empty() {
            self.access = RegistryAccess::Open;
        }
        let status = &self.status;
        let known = matches!(self.resolution, ReferenceResolution::Known(_));
        if known || status.reference.as_deref() != Some(self.spec.reference.as_str()) {
            return;
        }
        if let Some(since) = &status.registry_unavailable_since {
            let since = since.0.as_second();
            let earlier = self.earlier_answer(RegistryOutage { since, retry_at: since });
            self.resolution =
                earlier.map_or(ReferenceResolution::Unknown, ReferenceResolution::Known);
            return;
        }
        let is_current = |answer: &&ResolvedReference| {
            (Some(&answer.reference), Some(&answer.digest))
                == (status.reference.as_ref(), status.digest.as_ref())
        };
        let answer = status.history.iter().find(is_current);
        if let Some(known) = answer.and_then(|answer| self.known(answer, None)) {
            self.resolution = ReferenceResolution::Known(known);
        } else if let Some(digest) = status.digest.as_deref().and_then(|text| text.parse().ok()) {
            self.resolution = ReferenceResolution::Known(ResolvedArtifact {
                reference: self.spec.reference.clone(),
                digest,
                platforms: status.platforms.iter().filter_map(|text| text.parse().ok()).collect(),
                bytes: status.bytes.and_then(|bytes| u64::try_from(bytes).ok()),
                origin: AnswerOrigin::default(),
            });
        }
    }
}

/// Returns whether the first version is newer. Versions are numbers; texts that are not are never
/// newer.
fn is_newer(one: &str, two: &str) -> bool {
    match (one.parse::<u128>(), two.parse::<u128>()) {
        (Ok(one), Ok(two)) => one > two,
        _ => false,
    }
}

/// Parses a spec. The error describes its defect.
fn parse(spec: &ArtifactPreloadSpec) -> Result<ParsedSpec, String> {
    let reference =
        spec.reference.parse::<Reference>().map_err(|error| format!("spec.reference: {error}"))?;
    let platform = |text: &String| {
        text.parse::<Platform>().map_err(|error| format!("spec.platforms: {error}"))
    };
    let spread = match &spec.spread {
        None => Duration::ZERO,
        Some(text) if text.is_empty() => Duration::ZERO,
        Some(text) => {
            let spread = GoDuration::try_from(text.clone());
            spread.map_err(|error| format!("spec.spread: {error}"))?.0
        }
    };
    let count = |field: &str, value: &IntOrString, least: usize| {
        NodeCount::parse(value, least).ok_or_else(|| {
            format!(
                "spec.{field}: write a number of nodes of at least {least}, or a percentage as 25%"
            )
        })
    };
    let parallelism = count("parallelism", &spec.parallelism, 1)?;
    let tolerated = count("toleratedNodes", &spec.tolerated_nodes, 0)?;
    let platforms = spec.platforms.iter().map(platform).collect::<Result<_, _>>()?;
    Ok(ParsedSpec { reference, platforms, parallelism, tolerated, spread })
}

impl NodeCount {
    fn parse(value: &IntOrString, least: usize) -> Option<Self> {
        match value {
            IntOrString::Int(nodes) => {
                let nodes = usize::try_from(*nodes).ok().filter(|nodes| *nodes >= least);
                nodes.map(Self::Nodes)
            }
            IntOrString::String(text) => {
                let percent = text.strip_suffix('%').and_then(|number| number.parse().ok());
                percent.filter(|percent| (least..=100).contains(percent)).map(Self::Percent)
            }
        }
    }

    /// Returns the number for `selected` nodes: a percentage is rounded up, and is one at least.
    pub fn of(self, selected: usize) -> usize {
        match self {
            Self::Nodes(nodes) => nodes,
            Self::Percent(percent) => (selected * percent).div_ceil(100).max(1),
        }
    }

    /// Returns the number for `selected` nodes: a percentage is rounded down.
    pub fn at_most(self, selected: usize) -> usize {
        match self {
            Self::Nodes(nodes) => nodes,
            Self::Percent(percent) => selected * percent / 100,
        }
    }
}

/// Returns the position of a node in the order of starts.
pub fn start_order(name: &str) -> u64 {
    mix(name, "")
}

/// Returns a pseudo-random number that depends on the two texts only: FNV-1a with a final mix.
pub fn mix(one: &str, two: &str) -> u64 {
    let bytes = one.bytes().chain([0xff]).chain(two.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 29)
}
