//! What the planner knows: preloads, nodes, and what is written about both.
//!
//! Names that many nodes share are kept once; a fleet of thousands with hundreds of preloads has millions of pairs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::api::{
    ArtifactPreload, ArtifactPreloadSpec, ArtifactPreloadStatus, NodeArtifacts, Phase,
    ResolvedReference,
};
use oci::{Digest, Platform, Reference};
use text::duration::GoDuration;

/// Seconds since 1970.
pub type Seconds = i64;

/// A preload as long as this process knows it: `namespace/name` in few bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PreloadId(u32);

/// What the preloads of one namespace may take. The default bounds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceQuota {
    /// How many there may be.
    pub preloads: Option<usize>,
    /// Bytes that their pins may hold together on each node.
    pub pinned_bytes: Option<u64>,
}

/// All that is known.
#[derive(Debug, Default)]
pub struct World {
    /// What one namespace may take.
    pub quota: NamespaceQuota,
    /// By `namespace/name`.
    pub preloads: BTreeMap<Arc<str>, Preload>,
    /// By name.
    pub nodes: BTreeMap<Arc<str>, Node>,
    /// What is written about nodes, by name.
    pub objects: HashMap<Arc<str>, Object>,
    ids: HashMap<Arc<str>, PreloadId>,
    keys: Vec<Arc<str>>,
    texts: HashSet<Arc<str>>,
}

/// What a user wants.
#[derive(Clone, Debug)]
pub struct Preload {
    /// Its short name.
    pub id: PreloadId,
    /// Of the API server.
    pub uid: String,
    /// Of the API server.
    pub version: String,
    /// When it was made.
    pub created: Seconds,
    /// Of the spec.
    pub generation: i64,
    /// The spec.
    pub spec: ArtifactPreloadSpec,
    /// The spec, understood.
    pub parsed: Result<Parsed, String>,
    /// As it was last read or written.
    pub status: ArtifactPreloadStatus,
    /// What the reference means.
    pub meaning: Meaning,
    /// With what it may be fetched.
    pub access: Access,
    /// A list has begun: what it has counts, whatever its version is.
    pub relisted: bool,
}

/// A spec whose texts are understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// As it was written.
    pub reference: Reference,
    /// Of the artifact.
    pub platforms: Vec<Platform>,
    /// How many at once.
    pub parallelism: NodeCount,
    /// The number of selected nodes that may stay away while the preload counts as ready.
    pub tolerated: NodeCount,
    /// Over how long.
    pub spread: Duration,
}

/// A number of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeCount {
    /// So many.
    Nodes(usize),
    /// So many in a hundred of those that are selected.
    Percent(usize),
}

/// What a reference means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Meaning {
    /// Not asked yet.
    #[default]
    Unknown,
    /// The registry said so.
    Known(Known),
    /// It cannot be said.
    Refused(Refusal),
}

/// What the registry said of a reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// `spec.reference` at that time.
    pub reference: String,
    /// A manifest or an index.
    pub digest: Digest,
    /// Of an index; empty where it is none.
    pub platforms: Vec<Platform>,
    /// Of its layers in the registry; of an index, for the platform with the fewest.
    pub bytes: Option<u64>,
    /// The origin of the answer: the registry, or an earlier answer.
    pub origin: Origin,
}

/// The origin of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// When the registry was asked; none where that is not known.
    pub resolved_at: Option<Seconds>,
    /// Names of the secrets that it was asked with.
    pub pull_secrets: Vec<String>,
    /// Present where the registry did not answer, and this is an answer that it gave to the preload before.
    pub unavailable: Option<Unavailable>,
}

/// A registry that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// The time of the first request without an answer, in seconds since 1970.
    pub since: Seconds,
    /// The time of the next request, in seconds since 1970.
    pub retry_at: Seconds,
}

/// With what an artifact may be fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// The secrets were not read yet.
    #[default]
    Unknown,
    /// No secret has anything for the registry, or none is named.
    Open,
    /// Secrets of this version.
    Sealed {
        /// Changes when a secret changes.
        version: Arc<str>,
        /// When they are read again, if nodes still need them.
        until: Seconds,
    },
    /// They cannot be used.
    Refused(Refusal),
}

/// Why something cannot be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Whether it may pass by itself.
    pub transient: bool,
    /// True if the registry answered no request, whatever the credential. 429 and 5xx are no answers.
    pub unanswered: bool,
    /// When it is tried again.
    pub retry_at: Seconds,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Of the API server.
    pub uid: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When it joined.
    pub created: Seconds,
    /// Where it stands when nodes take turns: the same for all preloads, so that what is new for a node comes in one
    /// write.
    pub turn: u64,
    /// The node's condition Ready, where it was read from the API server.
    pub readiness: Option<Readiness>,
}

/// A node's condition Ready, as it was read from the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// True unless the condition is False or Unknown.
    pub is_ready: bool,
    /// The time until which it counts, in seconds since 1970.
    pub until: Seconds,
}

/// What is written about a node.
#[derive(Clone, Debug)]
pub struct Object {
    /// Of the API server.
    pub version: String,
    /// The uid of the node that it was made for.
    pub owner: Option<String>,
    /// When it was made.
    pub created: Seconds,
    /// What it is to hold, by preload.
    pub wanted: Vec<Wanted>,
    /// Bytes that pins of one namespace may hold, as the node was told.
    pub pinned_bytes_per_namespace: Option<u64>,
    /// What it says.
    pub report: Option<Report>,
    /// A list has begun: what it has counts, whatever its version is.
    pub relisted: bool,
}

/// What a node is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// For whom.
    pub preload: PreloadId,
    /// With its digest.
    pub reference: Arc<str>,
    /// Whether it is kept.
    pub pin: bool,
    /// Seconds of a try.
    pub timeout: i32,
    /// Further tries.
    pub backoff: i32,
    /// Since when.
    pub since: Seconds,
    /// When the registry said that the tag means it, where the node may serve pods by the tag.
    pub resolved_at: Option<Seconds>,
    /// Credentials that are there.
    pub sealed: Option<Sealed>,
}

/// Which credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// To which key.
    pub key: Arc<str>,
    /// Of which version.
    pub version: Arc<str>,
}

/// What a node says.
#[derive(Clone, Debug)]
pub struct Report {
    /// What it is.
    pub platform: Option<Platform>,
    /// Bytes that it has room for at most, where it says so.
    pub capacity: Option<u64>,
    /// The key of its process.
    pub public_key: Arc<str>,
    /// How far it is, by preload.
    pub held: Vec<Held>,
}

/// How far one artifact is on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// For whom.
    pub preload: PreloadId,
    /// Which; empty where the node does not say it.
    pub reference: Arc<str>,
    /// What that means.
    pub digest: Arc<str>,
    /// How far.
    pub phase: Phase,
    /// Since when it is fetched, where it is and the node says it.
    pub since: Option<Seconds>,
    /// Why not ready.
    pub reason: Arc<str>,
    /// The same for people.
    pub message: Arc<str>,
}

impl World {
    /// The short name of `namespace/name`.
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

    /// The inverse.
    #[must_use]
    pub fn key(&self, id: PreloadId) -> Arc<str> {
        self.keys.get(id.0 as usize).cloned().unwrap_or_else(|| Arc::from(""))
    }

    /// One copy of a text.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let text: Arc<str> = Arc::from(text);
        self.texts.insert(Arc::clone(&text));
        text
    }

    /// Forgets texts that nobody has any more.
    pub fn forget_texts(&mut self) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
    }

    /// A preload was made or changed.
    pub fn put_preload(&mut self, object: &ArtifactPreload) {
        let Some(key) = key_of(object) else { return };
        if object.metadata.deletion_timestamp.is_some() {
            self.preloads.remove(key.as_str());
            return;
        }
        let id = self.id(&key);
        let key = self.key(id);
        let status = object.status.clone().unwrap_or_default();
        let uid = object.metadata.uid.clone().unwrap_or_default();
        let version = object.metadata.resource_version.clone().unwrap_or_default();
        let generation = object.metadata.generation.unwrap_or_default();
        let created = object.metadata.creation_timestamp.as_ref();
        let created = created.map_or(0, |time| time.0.as_second());
        match self.preloads.get_mut(&key) {
            Some(known)
                if known.uid == uid && !known.relisted && is_newer(&known.version, &version) => {}
            // What is known of one is of no use for another one of the same name.
            Some(known) if known.uid == uid => {
                let other_reference = known.spec.reference != object.spec.reference;
                let other_secrets = known.spec.pull_secrets != object.spec.pull_secrets;
                if other_reference || other_secrets {
                    known.access = Access::Unknown;
                }
                // A refusal may not hold for other secrets, and an earlier answer holds for secrets of the same names alone.
                if other_reference || (other_secrets && !known.meaning.is_answer()) {
                    known.meaning = Meaning::Unknown;
                }
                known.parsed = parse(&object.spec);
                known.spec = object.spec.clone();
                known.version = version;
                known.relisted = false;
                known.generation = generation;
                known.status = status;
                known.recall();
            }
            _ => {
                let mut preload = Preload {
                    id,
                    uid,
                    version,
                    created,
                    generation,
                    spec: object.spec.clone(),
                    parsed: parse(&object.spec),
                    status,
                    meaning: Meaning::Unknown,
                    access: Access::Unknown,
                    relisted: false,
                };
                preload.recall();
                self.preloads.insert(key, preload);
            }
        }
    }

    /// What is written about a node, read.
    pub fn put_object(&mut self, object: &NodeArtifacts) {
        let name = self.text(object.metadata.name.as_deref().unwrap_or_default());
        let owners = object.metadata.owner_references.iter().flatten();
        let mut owners = owners.filter(|owner| owner.kind == "Node");
        let owner = owners.next().map(|owner| owner.uid.clone());
        let mut wanted: Vec<Wanted> = Vec::with_capacity(object.spec.artifacts.len());
        for artifact in &object.spec.artifacts {
            let sealed = artifact.credentials.as_ref().map(|sealed| Sealed {
                key: self.text(&sealed.key),
                version: self.text(&sealed.version),
            });
            wanted.push(Wanted {
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
            let mut held: Vec<Held> = Vec::with_capacity(status.artifacts.len());
            for artifact in &status.artifacts {
                held.push(Held {
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
            Report {
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
        let object = Object {
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

impl Meaning {
    /// Returns whether the registry has said so since it was last asked.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Known(Known { origin: Origin { unavailable: None, .. }, .. }))
    }
}

impl Preload {
    /// Takes in what came of asking the registry. A registry that does not answer leaves what it has answered before to
    /// this very object; one that refuses does not.
    pub fn learn(&mut self, found: Meaning, now: Seconds) {
        if self.meaning.is_answer() {
            return;
        }
        let before = match &self.meaning {
            Meaning::Known(known) => known.origin.unavailable,
            Meaning::Unknown | Meaning::Refused(_) => None,
        };
        self.meaning = match found {
            Meaning::Refused(refusal) if refusal.unanswered => {
                let since = before.map_or(now, |before| before.since);
                let unavailable = Unavailable { since, retry_at: refusal.retry_at };
                self.earlier_answer(unavailable).map_or(Meaning::Refused(refusal), Meaning::Known)
            }
            found => found,
        };
    }

    /// Takes in that the secrets could not be read: an earlier answer is for secrets that are there.
    pub fn lose_secrets(&mut self, refusal: &Refusal) {
        let Meaning::Known(known) = &mut self.meaning else { return };
        match &mut known.origin.unavailable {
            Some(unavailable) if refusal.transient => unavailable.retry_at = refusal.retry_at,
            Some(_) => self.meaning = Meaning::Unknown,
            None => {}
        }
    }

    /// Returns what the registry last answered to this object about its reference, with secrets of the same names. Of a
    /// digest, it is enough that any tag of the repository has meant it.
    fn earlier_answer(&self, unavailable: Unavailable) -> Option<Known> {
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
            // An older answer about a tag is no answer.
            None => answers.next().filter(has_names),
        };
        self.known(answer?, Some(unavailable))
    }

    fn known(&self, answer: &ResolvedReference, unavailable: Option<Unavailable>) -> Option<Known> {
        Some(Known {
            reference: self.spec.reference.clone(),
            digest: answer.digest.parse().ok()?,
            platforms: answer.platforms.iter().filter_map(|text| text.parse().ok()).collect(),
            bytes: answer.bytes.and_then(|bytes| u64::try_from(bytes).ok()),
            origin: Origin {
                resolved_at: Some(answer.resolved_at.0.as_second()),
                pull_secrets: answer.pull_secrets.clone(),
                unavailable,
            },
        })
    }

    /// What is known without asking: nothing is to be read, or its status says what was found out before.
    fn recall(&mut self) {
        if self.spec.pull_secrets.is_empty() {
            self.access = Access::Open;
        }
        let status = &self.status;
        let known = matches!(self.meaning, Meaning::Known(_));
        if known || status.reference.as_deref() != Some(self.spec.reference.as_str()) {
            return;
        }
        if let Some(since) = &status.registry_unavailable_since {
            let since = since.0.as_second();
            let earlier = self.earlier_answer(Unavailable { since, retry_at: since });
            self.meaning = earlier.map_or(Meaning::Unknown, Meaning::Known);
            return;
        }
        let is_current = |answer: &&ResolvedReference| {
            (Some(&answer.reference), Some(&answer.digest))
                == (status.reference.as_ref(), status.digest.as_ref())
        };
        let answer = status.history.iter().find(is_current);
        if let Some(known) = answer.and_then(|answer| self.known(answer, None)) {
            self.meaning = Meaning::Known(known);
        } else if let Some(digest) = status.digest.as_deref().and_then(|text| text.parse().ok()) {
            self.meaning = Meaning::Known(Known {
                reference: self.spec.reference.clone(),
                digest,
                platforms: status.platforms.iter().filter_map(|text| text.parse().ok()).collect(),
                bytes: status.bytes.and_then(|bytes| u64::try_from(bytes).ok()),
                origin: Origin::default(),
            });
        }
    }
}

/// `namespace/name`.
#[must_use]
pub fn key_of(object: &ArtifactPreload) -> Option<String> {
    let metadata = &object.metadata;
    Some(format!("{}/{}", metadata.namespace.as_deref()?, metadata.name.as_deref()?))
}

/// Whether the first version is after the second: they are numbers, and one that is none is never newer.
fn is_newer(one: &str, two: &str) -> bool {
    match (one.parse::<u128>(), two.parse::<u128>()) {
        (Ok(one), Ok(two)) => one > two,
        _ => false,
    }
}

/// Understands a spec; the error says what is wrong with it.
fn parse(spec: &ArtifactPreloadSpec) -> Result<Parsed, String> {
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
    Ok(Parsed { reference, platforms, parallelism, tolerated, spread })
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
    #[must_use]
    pub fn of(self, selected: usize) -> usize {
        match self {
            Self::Nodes(nodes) => nodes,
            Self::Percent(percent) => (selected * percent).div_ceil(100).max(1),
        }
    }

    /// Returns the number for `selected` nodes: a percentage is rounded down.
    #[must_use]
    pub fn at_most(self, selected: usize) -> usize {
        match self {
            Self::Nodes(nodes) => nodes,
            Self::Percent(percent) => selected * percent / 100,
        }
    }
}

/// Where a node stands when nodes take turns.
#[must_use]
pub fn turn(name: &str) -> u64 {
    mix(name, "")
}

/// A number that looks drawn by chance, and is always the same for the same two texts: FNV-1a, and a last mixing.
#[must_use]
pub fn mix(one: &str, two: &str) -> u64 {
    let bytes = one.bytes().chain([0xff]).chain(two.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 29)
}
