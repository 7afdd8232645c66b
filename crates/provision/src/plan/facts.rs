//! Facts of the planner: claims, classes, volumes, and the answers of registries.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use controller_runtime::{ResolutionFailure, Seconds};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use oci::Reference;

use crate::class_parameters::ClassParameters;

/// Annotations that name the provisioner of a claim, the first one of which counts. Kubernetes sets
/// them when the claim needs a volume.
const PROVISIONER_ANNOTATIONS: [&str; 2] =
    ["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];
/// Annotation of claims with their class, from before `storageClassName`.
const BETA_CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";
/// Annotation of claims with the node that the scheduler chose.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Annotation of volumes with the provisioner that made them.
pub const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Finalizer of volumes until their provisioner has deleted them.
pub const FINALIZER: &str = "external-provisioner.volume.kubernetes.io/finalizer";

/// Rules of the driver on what a volume may say.
#[derive(Clone, Copy)]
pub struct VolumeRules {
    /// Attributes that a volume may have.
    pub keys: &'static [&'static str],
    /// Those attributes that name its artifact.
    pub naming: &'static [&'static str],
    /// Those attributes whose values are YAML.
    pub yaml: &'static [&'static str],
    /// Checks the attributes and the mount options of a volume.
    pub check: VolumeCheck,
}

/// A check of attributes and mount options.
pub type VolumeCheck = fn(&HashMap<String, String>, &[String]) -> Result<CheckedVolume, String>;

/// A volume that the driver would publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedVolume {
    /// Artifacts of the volume.
    pub references: Vec<Reference>,
    /// False if nodes never ask the registry.
    pub asks_registry: bool,
}

/// All facts of the planner.
#[derive(Debug)]
pub struct ProvisionState {
    /// Name of the driver, which is that of the provisioner.
    pub driver: String,
    /// Rules of the driver.
    pub rules: VolumeRules,
    /// Maximum number of claims of one namespace.
    pub claims_per_namespace: Option<usize>,
    /// Claims of the provisioner, by `namespace/name`.
    pub claims: BTreeMap<Arc<str>, ClaimFacts>,
    /// Classes of the provisioner, by name.
    pub classes: BTreeMap<Arc<str>, ClassFacts>,
    /// Volumes that the provisioner made, by name.
    pub volumes: BTreeMap<Arc<str>, VolumeFacts>,
    /// Answers of registries.
    pub lookups: BTreeMap<LookupKey, LookupFacts>,
    /// Volumes that the API server refused, by UID of their claim.
    pub failed_writes: BTreeMap<String, FailedWrite>,
}

/// Facts of a claim.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClaimFacts {
    /// UID of the claim.
    pub uid: String,
    /// Namespace of the claim.
    pub namespace: String,
    /// Name of the claim.
    pub name: String,
    /// Resource version of the claim.
    pub version: String,
    /// Creation time of the claim.
    pub created: Seconds,
    /// True if the claim has a volume, or is being deleted.
    pub is_done: bool,
    /// Class of the claim.
    pub class: String,
    /// Node that the scheduler chose.
    pub selected_node: Option<String>,
    /// Annotations of a claim without a volume.
    pub annotations: BTreeMap<String, String>,
    /// Requested access modes.
    pub access_modes: Vec<String>,
    /// Requested number of bytes.
    pub storage: Quantity,
    /// Field of the spec that no artifact can serve, with the reason.
    pub unsupported: Option<&'static str>,
}

/// Facts of a class of this provisioner.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassFacts {
    /// Parsed parameters, or the reason why they cannot be used.
    pub parameters: Result<ClassParameters, String>,
    /// Reclaim policy of its volumes.
    pub reclaim_policy: String,
    /// Mount options of its volumes.
    pub mount_options: Vec<String>,
    /// True if a claim waits until the scheduler has chosen a node for its pod.
    pub waits_for_consumer: bool,
}

/// Facts of a volume that this provisioner made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeFacts {
    /// UID of the volume.
    pub uid: String,
    /// Resource version of the volume.
    pub version: String,
    /// Phase of the volume.
    pub phase: String,
    /// True if its reclaim policy is Delete.
    pub is_deletable: bool,
    /// True if its deletion was requested.
    pub is_deleted: bool,
    /// Finalizers of the volume.
    pub finalizers: Vec<String>,
}

/// A question to a registry: the same for all claims of a namespace with the same artifact.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LookupKey {
    /// Namespace of the claim, whose policy applies.
    pub namespace: String,
    /// Reference of the artifact.
    pub reference: String,
    /// Secret for the registry.
    pub secret: Option<SecretName>,
}

/// Name of a secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretName {
    /// Namespace of the secret.
    pub namespace: String,
    /// Name of the secret.
    pub name: String,
}

/// Last answer of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupFacts {
    /// The artifact exists, or the reason why it cannot be used.
    pub outcome: Result<(), ResolutionFailure>,
    /// Time until which the answer holds.
    pub until: Seconds,
    /// Number of failures in a row.
    pub failures: u32,
}

/// A volume that the API server refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedWrite {
    /// Reason of the refusal.
    pub message: String,
    /// Time of the next attempt.
    pub retry_at: Seconds,
    /// Number of failures in a row.
    pub failures: u32,
}

impl fmt::Debug for VolumeRules {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("VolumeRules").field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl ProvisionState {
    /// Creates a state without any facts.
    pub fn new(driver: &str, rules: VolumeRules) -> Self {
        Self {
            driver: driver.to_owned(),
            rules,
            claims_per_namespace: None,
            claims: BTreeMap::new(),
            classes: BTreeMap::new(),
            volumes: BTreeMap::new(),
            lookups: BTreeMap::new(),
            failed_writes: BTreeMap::new(),
        }
    }

    /// Returns the facts of a claim, if this provisioner is to serve it.
    pub fn claim(&self, claim: &PersistentVolumeClaim) -> Option<ClaimFacts> {
        let metadata = &claim.metadata;
        let annotation = |key: &&str| metadata.annotations.as_ref()?.get(*key);
        let provisioner = PROVISIONER_ANNOTATIONS.iter().find_map(annotation);
        provisioner.filter(|provisioner| **provisioner == self.driver)?;
        let spec = claim.spec.as_ref()?;
        let has_volume = spec.volume_name.as_ref().is_some_and(|name| !name.is_empty());
        let is_done = has_volume || metadata.deletion_timestamp.is_some();
        let requests = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        let unsupported = [
            (
                spec.volume_mode.as_deref() == Some("Block"),
                "an artifact is a file system, not a block device: use volumeMode: Filesystem",
            ),
            (spec.selector.is_some(), "a selector chooses among existing volumes: remove it"),
            (
                spec.data_source.is_some() || spec.data_source_ref.is_some(),
                "the artifact is the content of the volume: remove dataSource and dataSourceRef",
            ),
            (
                spec.volume_attributes_class_name.as_ref().is_some_and(|name| !name.is_empty()),
                "a volume cannot be modified: remove volumeAttributesClassName",
            ),
        ];
        Some(ClaimFacts {
            uid: metadata.uid.clone()?,
            namespace: metadata.namespace.clone()?,
            name: metadata.name.clone()?,
            // Claims with a volume are only counted: their changes matter to no plan.
            version: match &metadata.resource_version {
                Some(version) if !is_done => version.clone(),
                _ => String::new(),
            },
            created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            is_done,
            class: annotation(&BETA_CLASS_ANNOTATION)
                .or(spec.storage_class_name.as_ref())
                .cloned()
                .unwrap_or_default(),
            selected_node: annotation(&SELECTED_NODE).filter(|node| !node.is_empty()).cloned(),
            annotations: match &metadata.annotations {
                Some(annotations) if !is_done => annotations.clone(),
                _ => BTreeMap::new(),
            },
            access_modes: spec.access_modes.clone().unwrap_or_default(),
            storage: requests
                .and_then(|requests| requests.get("storage"))
                .cloned()
                .unwrap_or_default(),
            unsupported: unsupported.iter().find(|(is_set, _)| *is_set).map(|&(_, reason)| reason),
        })
    }

    /// Returns the facts of a class, if it is of this provisioner.
    pub fn class(&self, class: &StorageClass) -> Option<ClassFacts> {
        if class.provisioner != self.driver {
            return None;
        }
        let (empty, rules) = (BTreeMap::new(), self.rules);
        let parameters = class.parameters.as_ref().unwrap_or(&empty);
        let parsed = ClassParameters::parse(parameters, rules.keys, rules.naming);
        Some(ClassFacts {
            parameters: parsed.map_err(|error| error.to_string()),
            reclaim_policy: class.reclaim_policy.clone().unwrap_or_else(|| "Delete".to_owned()),
            mount_options: class.mount_options.clone().unwrap_or_default(),
            waits_for_consumer: class.volume_binding_mode.as_deref()
                == Some("WaitForFirstConsumer"),
        })
    }

    /// Returns the facts of a volume, if this provisioner made it.
    pub fn volume(&self, volume: &PersistentVolume) -> Option<VolumeFacts> {
        let metadata = &volume.metadata;
        let made_by = metadata.annotations.as_ref()?.get(PROVISIONED_BY)?;
        let spec = volume.spec.as_ref()?;
        let driver = &spec.csi.as_ref()?.driver;
        if [made_by, driver] != [&self.driver; 2] {
            return None;
        }
        let status = volume.status.as_ref();
        Some(VolumeFacts {
            uid: metadata.uid.clone()?,
            version: metadata.resource_version.clone().unwrap_or_default(),
            phase: status.and_then(|status| status.phase.clone()).unwrap_or_default(),
            is_deletable: spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete"),
            is_deleted: metadata.deletion_timestamp.is_some(),
            finalizers: metadata.finalizers.clone().unwrap_or_default(),
        })
    }
}

impl ClaimFacts {
    /// Returns the name of the volume of the claim.
    pub fn volume_name(&self) -> String {
        format!("pvc-{}", self.uid)
    }
}
