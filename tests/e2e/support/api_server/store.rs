//! Objects and their history.

use std::collections::{BTreeMap, HashMap, VecDeque};

use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::schema::Schemas;

/// The limit on the history in bytes. A watch from an older version has to start again.
const HISTORY: usize = 64 << 20;
/// The maximum size of an object in the API server.
const MAXIMUM_BYTES: usize = 1_500_000;

/// The supported kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Node,
    Secret,
    Lease,
    Preload,
    NodeArtifacts,
    Event,
    Claim,
    Class,
    Volume,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Node,
        Self::Secret,
        Self::Lease,
        Self::Preload,
        Self::NodeArtifacts,
        Self::Event,
        Self::Claim,
        Self::Class,
        Self::Volume,
    ];

    /// Returns group and version, plural, name of the kind, whether it has namespaces.
    pub fn about(self) -> (&'static str, &'static str, &'static str, bool) {
        match self {
            Self::Node => ("v1", "nodes", "Node", false),
            Self::Secret => ("v1", "secrets", "Secret", true),
            Self::Event => ("v1", "events", "Event", true),
            Self::Lease => ("coordination.k8s.io/v1", "leases", "Lease", true),
            Self::Claim => ("v1", "persistentvolumeclaims", "PersistentVolumeClaim", true),
            Self::Class => ("storage.k8s.io/v1", "storageclasses", "StorageClass", false),
            Self::Volume => ("v1", "persistentvolumes", "PersistentVolume", false),
            Self::Preload => {
                ("oci.custom.io/v1alpha1", "artifactpreloads", "ArtifactPreload", true)
            }
            Self::NodeArtifacts => {
                ("oci.custom.io/v1alpha1", "nodeartifacts", "NodeArtifacts", false)
            }
        }
    }

    fn of(object: &Value) -> Self {
        let is = |kind: &&Self| kind.about().2 == object["kind"];
        *Self::ALL.iter().find(is).expect("a known kind")
    }
}

/// Requests that fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The kind of the requests.
    pub kind: Kind,
    /// Fail writes; otherwise reads.
    pub writes: bool,
    /// The status of the responses.
    pub status: u16,
    /// The number of requests.
    pub times: usize,
}

/// Counts of writes and events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes of the controller and of nodes.
    pub writes: u64,
    /// Bytes of the bodies of writes.
    pub written_bytes: u64,
    /// Events to watches.
    pub events: u64,
    /// Bytes of the events.
    pub event_bytes: u64,
    /// Bytes of the largest object.
    pub largest: u64,
    /// Writes that were refused because of their version.
    pub conflicts: u64,
}

type Name = (Kind, String, String);

struct Watch {
    namespace: Option<String>,
    name: Option<String>,
    metadata_only: bool,
    sender: UnboundedSender<Bytes>,
}

struct Event {
    version: u64,
    kind: Kind,
    what: &'static str,
    object: Bytes,
}

pub(super) struct Store {
    version: u64,
    objects: BTreeMap<Name, Bytes>,
    history: VecDeque<Event>,
    history_bytes: usize,
    /// Versions up to this are expired.
    forgotten: u64,
    watches: HashMap<Kind, Vec<Watch>>,
    pub(super) schemas: Schemas,
    pub(super) listeners: Vec<(Kind, UnboundedSender<Value>)>,
    pub(super) faults: Vec<Fault>,
    pub(super) counts: Counts,
}

/// The refusal of a write: status and reason.
pub(super) type Refusal = (u16, String);

impl Store {
    pub(super) fn new() -> Self {
        Self {
            version: 1,
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            history_bytes: 0,
            forgotten: 0,
            watches: HashMap::new(),
            schemas: Schemas::new(),
            listeners: Vec::new(),
            faults: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        let bytes = self.objects.get(&(kind, namespace.to_owned(), name.to_owned()))?;
        Some(serde_json::from_slice(bytes).expect("JSON"))
    }

    pub(super) fn list(&self, kind: Kind) -> Vec<Value> {
        self.raw(kind).map(|(_, bytes)| serde_json::from_slice(bytes).expect("JSON")).collect()
    }

    /// Returns all objects of a kind, in order.
    pub(super) fn raw(&self, kind: Kind) -> impl Iterator<Item = (&Name, &Bytes)> {
        let from = (kind, String::new(), String::new());
        self.objects.range(from..).take_while(move |((other, ..), _)| *other == kind)
    }

    /// Creates or replaces an object, as a user with all rights.
    pub(super) fn apply(&mut self, object: Value) -> Result<(), String> {
        let kind = Kind::of(&object);
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (text("namespace"), text("name"));
        let done = match self.get(kind, &namespace, &name) {
            None => self.create(kind, &namespace, object),
            Some(mut known) => {
                for (key, value) in object.as_object().expect("an object") {
                    match key.as_str() {
                        "status" => {}
                        "metadata" => {
                            for part in ["labels", "annotations"] {
                                known[key][part] = value[part].clone();
                            }
                        }
                        _ => known[key] = value.clone(),
                    }
                }
                self.replace(kind, &namespace, &name, known)
            }
        };
        done.map(|_| ()).map_err(|(_, reason)| reason)
    }

    pub(super) fn create(
        &mut self,
        kind: Kind,
        namespace: &str,
        mut object: Value,
    ) -> Result<Value, Refusal> {
        let (group, _, name_of_kind, namespaced) = kind.about();
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let key = (kind, namespace.to_owned(), name.clone());
        if self.objects.contains_key(&key) {
            return Err((409, format!("{name} already exists")));
        }
        object["apiVersion"] = group.into();
        object["kind"] = name_of_kind.into();
        if matches!(kind, Kind::Preload | Kind::NodeArtifacts) {
            object.as_object_mut().expect("an object").remove("status");
        }
        let metadata = &mut object["metadata"];
        if namespaced {
            metadata["namespace"] = namespace.into();
        }
        metadata["uid"] = format!("uid-{}", self.version + 1).into();
        metadata["generation"] = 1.into();
        metadata["creationTimestamp"] =
            jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
        self.put(key, object, "ADDED")
    }

    /// Replaces an object. A given version must be the current one.
    pub(super) fn replace(
        &mut self,
        kind: Kind,
        namespace: &str,
        name: &str,
        mut object: Value,
    ) -> Result<Value, Refusal> {
        let key = (kind, namespace.to_owned(), name.to_owned());
        let Some(known) = self.get(kind, namespace, name) else {
            return Err((404, format!("{name} not found")));
        };
        let version = &object["metadata"]["resourceVersion"];
        if !version.is_null() && *version != known["metadata"]["resourceVersion"] {
            self.counts.conflicts += 1;
            return Err((409, "the object has been modified".to_owned()));
        }
        self.schemas.shape(kind, &mut object);
        for field in ["uid", "creationTimestamp", "generation", "resourceVersion"] {
            object["metadata"][field] = known["metadata"][field].clone();
        }
        if object == known {
            return Ok(known);
        }
        if object["spec"] != known["spec"] {
            let generation = known["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
            object["metadata"]["generation"] = generation.into();
        }
        self.put(key, object, "MODIFIED")
    }

    pub(super) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        let object = self.get(kind, namespace, name)?;
        self.objects.remove(&(kind, namespace.to_owned(), name.to_owned()));
        self.version += 1;
        let mut last = object.clone();
        last["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.tell(kind, "DELETED", Bytes::from(last.to_string()), &last);
        // The garbage collector, without its delay.
        let uid = &object["metadata"]["uid"];
        let goes_too = |other: &Value| {
            let references = other["metadata"]["ownerReferences"].as_array();
            references.is_some_and(|all| all.iter().any(|reference| reference["uid"] == *uid))
        };
        if kind == Kind::Node {
            for other in self.list(Kind::NodeArtifacts).into_iter().filter(goes_too) {
                let name = other["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                self.delete(Kind::NodeArtifacts, "", &name);
            }
        }
        Some(object)
    }

    fn put(&mut self, key: Name, mut object: Value, what: &'static str) -> Result<Value, Refusal> {
        self.schemas.shape(key.0, &mut object);
        self.schemas.check(key.0, &object).map_err(|reason| (422, reason))?;
        object["metadata"]["resourceVersion"] = (self.version + 1).to_string().into();
        let bytes = Bytes::from(object.to_string());
        if bytes.len() > MAXIMUM_BYTES {
            return Err((413, "the object is too large".to_owned()));
        }
        self.version += 1;
        self.counts.largest = self.counts.largest.max(bytes.len() as u64);
        self.objects.insert(key.clone(), bytes.clone());
        self.tell(key.0, what, bytes, &object);
        Ok(object)
    }

    fn tell(&mut self, kind: Kind, what: &'static str, bytes: Bytes, object: &Value) {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let namespace = object["metadata"]["namespace"].as_str();
        let watches = self.watches.entry(kind).or_default();
        let (mut whole, mut metadata) = (None, None);
        watches.retain(|watch| {
            let wanted = watch.name.as_deref().is_none_or(|wanted| wanted == name)
                && watch.namespace.as_deref().is_none_or(|wanted| Some(wanted) == namespace);
            if !wanted {
                return !watch.sender.is_closed();
            }
            let made = if watch.metadata_only { &mut metadata } else { &mut whole };
            let line =
                made.get_or_insert_with(|| line(what, &shown(&bytes, watch.metadata_only))).clone();
            self.counts.events += 1;
            self.counts.event_bytes += line.len() as u64;
            watch.sender.send(line).is_ok()
        });
        if what != "DELETED" {
            for (_, listener) in self.listeners.iter().filter(|(wanted, _)| *wanted == kind) {
                let _ = listener.send(object.clone());
            }
        }
        let version = self.version;
        self.history.push_back(Event { version, kind, what, object: bytes.clone() });
        self.history_bytes += bytes.len();
        while self.history_bytes > HISTORY
            && let Some(event) = self.history.pop_front()
        {
            self.history_bytes -= event.object.len();
            self.forgotten = event.version;
        }
    }

    /// Starts a watch after a version. Returns `None` if that version has expired.
    pub(super) fn watch(
        &mut self,
        after: u64,
        wanted: WatchWanted,
    ) -> Option<UnboundedReceiver<Bytes>> {
        if after < self.forgotten {
            return None;
        }
        let (sender, receiver) = unbounded_channel();
        let WatchWanted { kind, namespace, name, metadata_only } = wanted;
        for event in self.history.iter().filter(|event| event.version > after && event.kind == kind)
        {
            let object: Value = serde_json::from_slice(&event.object).expect("JSON");
            let metadata = &object["metadata"];
            let is = |wanted: &Option<String>, field: &str| {
                wanted.as_deref().is_none_or(|wanted| metadata[field] == wanted)
            };
            if is(&namespace, "namespace") && is(&name, "name") {
                let _ = sender.send(line(event.what, &shown(&event.object, metadata_only)));
            }
        }
        // A bookmark, as servers send them from time to time.
        let (group, _, name_of_kind, _) = kind.about();
        let bookmark = json!({
            "apiVersion": group,
            "kind": name_of_kind,
            "metadata": {"resourceVersion": self.version.to_string(), "creationTimestamp": null},
            "spec": {"reference": "none"},
        });
        let _ = sender.send(line("BOOKMARK", &Bytes::from(bookmark.to_string())));
        self.watches.entry(kind).or_default().push(Watch {
            namespace,
            name,
            metadata_only,
            sender,
        });
        Some(receiver)
    }

    pub(super) fn break_watches(&mut self) {
        self.watches.clear();
    }

    pub(super) fn forget_history(&mut self) {
        self.history.clear();
        self.history_bytes = 0;
        self.forgotten = self.version;
    }

    /// Returns the status with which this request fails, if it does.
    pub(super) fn fault(&mut self, kind: Kind, writes: bool) -> Option<u16> {
        let fault = self
            .faults
            .iter_mut()
            .find(|fault| fault.kind == kind && fault.writes == writes && fault.times > 0)?;
        fault.times -= 1;
        Some(fault.status)
    }
}

/// The parameters of a watch.
pub(super) struct WatchWanted {
    pub(super) kind: Kind,
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
    pub(super) metadata_only: bool,
}

fn line(what: &str, object: &Bytes) -> Bytes {
    let mut line = format!("{{\"type\":\"{what}\",\"object\":").into_bytes();
    line.extend_from_slice(object);
    line.extend_from_slice(b"}\n");
    Bytes::from(line)
}

/// Returns an object, or its metadata alone.
pub(super) fn shown(bytes: &Bytes, metadata_only: bool) -> Bytes {
    if !metadata_only {
        return bytes.clone();
    }
    let object: Value = serde_json::from_slice(bytes).expect("JSON");
    let partial = json!({
        "apiVersion": "meta.k8s.io/v1",
        "kind": "PartialObjectMetadata",
        "metadata": object["metadata"],
    });
    Bytes::from(partial.to_string())
}
