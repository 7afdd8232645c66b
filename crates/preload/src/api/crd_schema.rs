//! Parts of schemas that types alone cannot express.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// Returns the schema of a reference.
pub(super) fn reference(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "minLength": 1,
        "maxLength": 512,
        "pattern": "^[A-Za-z0-9\\[][A-Za-z0-9._:/@\\[\\]-]*$",
        "x-kubernetes-validations": [{
            "rule": "!self.contains('@') || self.matches('^[^@]+@sha256:[a-f0-9]{64}$')",
            "message": "a digest is written as @sha256: and 64 hexadecimal digits",
        }],
    })
}

/// Returns the schema of a duration of at most a day, in Go's syntax.
pub(super) fn spread(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 16,
        "pattern": "^([0-9]+(\\.[0-9]+)?(ms|s|m|h))+$",
        "x-kubernetes-validations": [{
            // The pattern reports an invalid duration. This rule must not report it again.
            "rule": "!self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') || duration(self) <= duration('24h')",
            "message": "nodes begin within a day: write at most 24h",
        }],
    })
}

/// Returns the schema of a number of nodes, or a percentage of them.
pub(super) fn parallelism(_: &mut SchemaGenerator) -> Schema {
    count_of_nodes("^([1-9][0-9]?|100)%$", 1, 10)
}

/// Returns the schema of a number of nodes, or a percentage of them, which may be zero.
pub(super) fn tolerated_nodes(_: &mut SchemaGenerator) -> Schema {
    count_of_nodes("^([0-9]|[1-9][0-9]|100)%$", 0, 0)
}

/// Returns the schema of a set of secret names.
pub(super) fn secrets(_: &mut SchemaGenerator) -> Schema {
    let name = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
    set(8, &json!({"type": "string", "maxLength": 253, "pattern": name}))
}

/// Returns the schema of a set of platforms.
pub(super) fn platforms(_: &mut SchemaGenerator) -> Schema {
    let platform = "^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$";
    set(16, &json!({"type": "string", "maxLength": 64, "pattern": platform}))
}

/// Returns the schema of a set of node names.
pub(super) fn node_names(_: &mut SchemaGenerator) -> Schema {
    set(500, &json!({"type": "string", "minLength": 1, "maxLength": 253}))
}

fn count_of_nodes(percentage: &str, least: u32, default: u32) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "nullable": false,
        "minimum": least,
        "maximum": 10000,
        "maxLength": 4,
        "pattern": percentage,
        "default": default,
    })
}

fn set(most: u32, items: &Value) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": most,
        "x-kubernetes-list-type": "set",
        "items": items,
    })
}

/// Returns the schema of required labels. The schema allows null and a rule refuses it: otherwise
/// the API server would drop a label with null, and a selector without labels selects every node.
pub(super) fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 63, "nullable": true},
        "x-kubernetes-validations": [{
            "rule": "self.all(name, dyn(self[name]) != null)",
            "message": "a label has a value, which may be \"\"",
        }],
    })
}

/// Returns the schema of an optional timestamp.
pub(super) fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "nullable": true})
}

/// Returns the schema of a required timestamp.
pub(super) fn required_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

/// Returns the schema of Kubernetes conditions, one of each type.
pub(super) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 8,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": {"type": "string", "maxLength": 316},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
                "lastTransitionTime": {"type": "string", "format": "date-time"},
                "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
                "message": {"type": "string", "maxLength": 32768},
            },
        },
    })
}
