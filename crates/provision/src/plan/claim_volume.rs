//! The volume of a claim: its class' parameters, expanded and checked.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, ObjectReference, PersistentVolume, PersistentVolumeSpec,
    SecretReference,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use text::printable::excerpt;

use super::facts::{
    CheckedVolume, ClaimFacts, ClassFacts, FINALIZER, LookupKey, PROVISIONED_BY, ProvisionState,
    SecretName,
};
use crate::class_parameters::ClassParameters;
use crate::template::{ClaimTexts, Template};

/// Annotation of a claim with the reference of its artifact, for classes that name none.
pub const REFERENCE_ANNOTATION: &str = "oci.custom.io/reference";
/// The only access mode that an artifact needs.
const READ_ONLY_MANY: &str = "ReadOnlyMany";

/// Volume that a claim asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct ClaimVolume {
    /// Attributes of the volume.
    pub attributes: BTreeMap<String, String>,
    /// Secret for nodes.
    pub secret: Option<SecretName>,
    /// Lookups in registries that come before its creation.
    pub lookups: Vec<LookupKey>,
}

impl ClaimVolume {
    /// Expands the class for a claim. An error is the reason for the claim's author.
    pub(super) fn of(
        state: &ProvisionState,
        claim: &ClaimFacts,
        class: &ClassFacts,
    ) -> Result<Self, String> {
        let parameters = class.parameters.as_ref().map_err(String::clone)?;
        if let Some(reason) = claim.unsupported {
            return Err(reason.to_owned());
        }
        check_access_modes(claim, parameters)?;
        let volume_name = claim.volume_name();
        let texts = ClaimTexts {
            name: &claim.name,
            namespace: &claim.namespace,
            annotations: &claim.annotations,
            volume_name: &volume_name,
        };
        let expand = |key: &str, template: &Template| {
            let text = template.expand(texts);
            text.map_err(|error| format!("the parameter \"{key}\": {error}"))
        };
        let mut attributes = BTreeMap::new();
        for (key, template) in &parameters.attributes {
            if state.rules.yaml.contains(&key.as_str()) {
                let checked = template.check_in_yaml(texts);
                checked.map_err(|error| format!("the parameter \"{key}\": {error}"))?;
            }
            attributes.insert(key.clone(), expand(key, template)?);
        }
        if let Some(reference) = annotated_reference(state, claim, parameters)? {
            attributes.insert("reference".to_owned(), reference);
        }
        let context: HashMap<_, _> =
            attributes.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let CheckedVolume { references, asks_registry } =
            (state.rules.check)(&context, &class.mount_options)?;
        if let Some(allowed) = &parameters.allowed_repositories
            && let Some(reference) = references.iter().find(|reference| !allowed.allow(reference))
        {
            return Err(format!(
                "{} is in none of its allowedRepositories: {}",
                excerpt(&reference.to_string(), 200),
                excerpt(&allowed.to_string(), 400)
            ));
        }
        let secret = match &parameters.secret {
            None => None,
            Some(secret) => Some(SecretName {
                namespace: expand("node-publish-secret-namespace", &secret.namespace)?,
                name: expand("node-publish-secret-name", &secret.name)?,
            }),
        };
        let lookups = references.iter().filter(|_| asks_registry).map(|reference| LookupKey {
            namespace: claim.namespace.clone(),
            reference: reference.to_string(),
            secret: secret.clone(),
        });
        let lookups = lookups.collect();
        Ok(Self { attributes, secret, lookups })
    }

    /// Returns the object, as external-provisioner makes it.
    pub(super) fn object(
        self,
        state: &ProvisionState,
        claim: &ClaimFacts,
        class: &ClassFacts,
    ) -> PersistentVolume {
        let (driver, name) = (&state.driver, claim.volume_name());
        let is_deletable = class.reclaim_policy == "Delete";
        PersistentVolume {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                annotations: Some([(PROVISIONED_BY.to_owned(), driver.clone())].into()),
                finalizers: is_deletable.then(|| vec![FINALIZER.to_owned()]),
                ..ObjectMeta::default()
            },
            spec: Some(PersistentVolumeSpec {
                access_modes: Some(claim.access_modes.clone()),
                capacity: Some([("storage".to_owned(), claim.storage.clone())].into()),
                claim_ref: Some(ObjectReference {
                    resource_version: Some(claim.version.clone()),
                    ..claim_reference(claim)
                }),
                csi: Some(CSIPersistentVolumeSource {
                    driver: driver.clone(),
                    volume_handle: name,
                    read_only: Some(true),
                    volume_attributes: Some(self.attributes),
                    node_publish_secret_ref: self.secret.map(|secret| SecretReference {
                        name: Some(secret.name),
                        namespace: Some(secret.namespace),
                    }),
                    ..CSIPersistentVolumeSource::default()
                }),
                mount_options: Some(class.mount_options.clone())
                    .filter(|options| !options.is_empty()),
                persistent_volume_reclaim_policy: Some(class.reclaim_policy.clone()),
                storage_class_name: Some(claim.class.clone()),
                volume_mode: Some("Filesystem".to_owned()),
                ..PersistentVolumeSpec::default()
            }),
            status: None,
        }
    }
}

/// Returns the reference of a claim, for events and for its volume.
pub fn claim_reference(claim: &ClaimFacts) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("PersistentVolumeClaim".to_owned()),
        namespace: Some(claim.namespace.clone()),
        name: Some(claim.name.clone()),
        uid: Some(claim.uid.clone()),
        ..ObjectReference::default()
    }
}

fn check_access_modes(claim: &ClaimFacts, parameters: &ClassParameters) -> Result<(), String> {
    let other = claim.access_modes.iter().find(|mode| *mode != READ_ONLY_MANY);
    match other {
        Some(other) if !parameters.allows_any_access_mode => Err(format!(
            "the access mode {} is not {READ_ONLY_MANY}: no process can write to an artifact; ask for {READ_ONLY_MANY}, or have allowAnyAccessMode: \"true\" set in the class",
            excerpt(other, 40)
        )),
        _ => Ok(()),
    }
}

/// Returns the reference in the claim's annotation, if the class names no artifact.
fn annotated_reference(
    state: &ProvisionState,
    claim: &ClaimFacts,
    parameters: &ClassParameters,
) -> Result<Option<String>, String> {
    let annotated = claim.annotations.get(REFERENCE_ANNOTATION);
    match (annotated, parameters.names_artifact(state.rules.naming)) {
        (Some(reference), false) => Ok(Some(reference.clone())),
        (None, true) => Ok(None),
        (None, false) => Err(format!(
            "it names no artifact: set the parameter reference, or the annotation {REFERENCE_ANNOTATION} of the claim"
        )),
        (Some(_), true) if parameters.uses_annotation(REFERENCE_ANNOTATION) => Ok(None),
        (Some(_), true) => Err(format!(
            "it names the artifact itself: remove the annotation {REFERENCE_ANNOTATION} of the claim"
        )),
    }
}
