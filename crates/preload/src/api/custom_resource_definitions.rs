//! CustomResourceDefinitions, generated from the types.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::Value;

use super::{ArtifactPreload, NodeArtifacts};

/// Returns both definitions, which the chart contains as files.
pub fn definitions() -> [CustomResourceDefinition; 2] {
    [ArtifactPreload::crd(), NodeArtifacts::crd()]
}

/// Returns both definitions as one YAML text.
///
/// # Errors
///
/// Errors of the serializer.
pub fn yaml() -> Result<String, String> {
    let documents: Result<Vec<_>, _> = definitions().iter().map(document).collect();
    Ok(documents?.join("---\n"))
}

fn document(definition: &CustomResourceDefinition) -> Result<String, String> {
    let mut value = serde_json::to_value(definition).map_err(|error| error.to_string())?;
    as_kept(&mut value);
    serde_saphyr::to_string(&value).map_err(|error| error.to_string())
}

/// Converts a definition to the form in which the API server stores it, so that a comparison finds
/// no difference: whole numbers for bounds, no `nullable: false` (which the type needs, since kube
/// makes fields without a type nullable), and descriptions on one line.
fn as_kept(value: &mut Value) {
    match value {
        Value::Number(number) => {
            let whole = number.as_f64().filter(|float| float.fract() == 0.0);
            if let Some(whole) = whole.filter(|_| number.is_f64()) {
                #[expect(clippy::cast_possible_truncation, reason = "bounds are small")]
                let whole = whole as i64;
                *value = Value::from(whole);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(as_kept),
        Value::Object(fields) => {
            fields.retain(|name, value| name != "nullable" || *value != Value::Bool(false));
            if let Some(Value::String(text)) = fields.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            fields.values_mut().for_each(as_kept);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Set it to have the chart's files written anew: `WRITE_DEFINITIONS=1 cargo test --lib definitions`.
    const WRITE: &str = "WRITE_DEFINITIONS";

    #[test]
    fn the_chart_has_the_definitions_of_the_types() {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/csi-driver-oci/files/crds");
        for definition in definitions() {
            let path = folder.join(format!("{}.yaml", definition.spec.names.plural));
            let text = document(&definition).expect("a document");
            if std::env::var_os(WRITE).is_some() {
                std::fs::create_dir_all(&folder).expect("the folder");
                std::fs::write(&path, &text).expect("written");
            }
            let kept = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                kept == text,
                "{} is not what the types say: write it with {WRITE}=1",
                path.display()
            );
        }
    }

    /// Checks the rules of the API server beyond validity: a type everywhere, no default or constraint twice, a bound on
    /// every list, map and text, and formats that it knows.
    #[test]
    fn schemas_are_structural_and_bounded() {
        let mut seen = 0;
        for definition in definitions() {
            let value = serde_json::to_value(&definition).expect("JSON");
            let schema = &value["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            for field in ["spec", "status"] {
                seen += structural(field, &schema["properties"][field]);
            }
            assert!(value["spec"]["versions"][0]["subresources"]["status"].is_object());
        }
        assert!(seen > 60, "only {seen} schemas were looked at");
    }

    fn structural(place: &str, schema: &Value) -> usize {
        let has = |key: &str| !schema[key].is_null();
        for banned in ["$ref", "allOf", "oneOf", "not", "additionalItems", "patternProperties"] {
            assert!(!has(banned), "{place} has {banned}");
        }
        let any = schema["x-kubernetes-int-or-string"] == true;
        assert!(!has("anyOf"), "{place} has anyOf");
        assert!(!any || schema["nullable"] == false, "{place} is a number, a text or nothing");
        let inner = |name: &str, schema: &Value| structural(&format!("{place}.{name}"), schema);
        let mut seen = 1;
        match schema["type"].as_str() {
            None => assert!(any, "{place} has no type"),
            Some("string") => {
                let bounded = has("maxLength") || has("enum") || schema["format"] == "date-time";
                assert!(bounded, "{place} is a text without bound");
            }
            Some("array") => {
                assert!(has("maxItems"), "{place} is a list without bound");
                seen += inner("items", &schema["items"]);
            }
            Some("object") => {
                if let Some(properties) = schema["properties"].as_object() {
                    assert!(!has("additionalProperties"), "{place} is an object and a map");
                    for (name, property) in properties {
                        seen += inner(name, property);
                    }
                } else {
                    assert!(has("maxProperties"), "{place} is a map without bound");
                    seen += inner("*", &schema["additionalProperties"]);
                }
            }
            Some("integer") => {
                let known = matches!(schema["format"].as_str(), None | Some("int32" | "int64"));
                assert!(known, "{place} has the format {}", schema["format"]);
            }
            Some("boolean") => {}
            Some(other) => panic!("{place} is a {other}"),
        }
        seen
    }
}
