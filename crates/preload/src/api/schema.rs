//! Parts of schemas that types alone do not say.

use schemars::{Schema, SchemaGenerator, json_schema};

/// Where an artifact is.
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

/// A duration of at most a day, as Go writes it.
pub(super) fn spread(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 16,
        "pattern": "^([0-9]+(\\.[0-9]+)?(ms|s|m|h))+$",
        "x-kubernetes-validations": [{
            // What the pattern refuses is no duration: one message is enough.
            "rule": "!self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') || duration(self) <= duration('24h')",
            "message": "nodes begin within a day: write at most 24h",
        }],
    })
}

/// A number of nodes, or a part of them.
pub(super) fn parallelism(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "nullable": false,
        "minimum": 1,
        "maximum": 10000,
        "maxLength": 4,
        "pattern": "^([1-9][0-9]?|100)%$",
        "default": 10,
    })
}

/// A number of nodes, or a part of them, that may be none.
pub(super) fn tolerated_nodes(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "nullable": false,
        "minimum": 0,
        "maximum": 10000,
        "maxLength": 4,
        "pattern": "^([0-9]|[1-9][0-9]|100)%$",
        "default": 0,
    })
}

/// Names of secrets, each once.
pub(super) fn secrets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 8,
        "x-kubernetes-list-type": "set",
        "items": {
            "type": "string",
            "maxLength": 253,
            "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        },
    })
}

/// Platforms, each once.
pub(super) fn platforms(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "set",
        "items": {
            "type": "string",
            "maxLength": 64,
            "pattern": "^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$",
        },
    })
}

/// Names of nodes, each once.
pub(super) fn node_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 500,
        "x-kubernetes-list-type": "set",
        "items": {"type": "string", "minLength": 1, "maxLength": 253},
    })
}

/// Labels that a node must have. Where null is not allowed the API server drops it, label and all, and a selector
/// without labels selects every node: so it is allowed, and refused.
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

/// A moment.
pub(super) fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "nullable": true})
}

/// A moment that must be there.
pub(super) fn required_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

/// Kubernetes' own conditions, one of each type.
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
