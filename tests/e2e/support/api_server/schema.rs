//! Validates objects by the definitions: unknown fields are dropped, defaults are filled in, and values of the wrong
//! type, out of bounds or too long are refused. Patterns and rules are checked elsewhere.

use preload::api::custom_resource_definitions::definitions;
use serde_json::Value;

use super::store::Kind;

pub(super) struct Schemas {
    preload: Value,
    node: Value,
}

impl Schemas {
    pub(super) fn new() -> Self {
        let [preload, node] = definitions().map(|definition| {
            let value = serde_json::to_value(definition).expect("JSON");
            value["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
        });
        Self { preload, node }
    }

    /// Removes a field of the status, or of its list as `list.field`, as if the definition were of an older version.
    pub(super) fn forget(&mut self, kind: Kind, field: &str) {
        let definition = match kind {
            Kind::Preload => &mut self.preload,
            Kind::NodeArtifacts => &mut self.node,
            _ => panic!("{kind:?} has no definition"),
        };
        let status = &mut definition["properties"]["status"];
        let (schema, name) = match field.split_once('.') {
            Some((list, name)) => (&mut status["properties"][list]["items"], name),
            None => (status, field),
        };
        let fields = schema["properties"].as_object_mut();
        let known = fields.and_then(|fields| fields.remove(name));
        assert!(known.is_some(), "{kind:?} has no {field}");
    }

    fn of(&self, kind: Kind) -> Option<&Value> {
        match kind {
            Kind::Preload => Some(&self.preload),
            Kind::NodeArtifacts => Some(&self.node),
            _ => None,
        }
    }

    pub(super) fn shape(&self, kind: Kind, object: &mut Value) {
        let Some(schema) = self.of(kind) else { return };
        for part in ["spec", "status"] {
            if !object[part].is_null() {
                shape(&schema["properties"][part], &mut object[part]);
            } else if let Some(fields) = object.as_object_mut() {
                fields.remove(part);
            }
        }
    }

    pub(super) fn check(&self, kind: Kind, object: &Value) -> Result<(), String> {
        let Some(schema) = self.of(kind) else { return Ok(()) };
        for part in ["spec", "status"] {
            if !object[part].is_null() {
                check(part, &schema["properties"][part], &object[part])?;
            }
        }
        Ok(())
    }
}

fn shape(schema: &Value, value: &mut Value) {
    if let Some(items) = value.as_array_mut() {
        for item in items {
            shape(&schema["items"], item);
        }
    }
    let (Some(properties), Some(fields)) =
        (schema["properties"].as_object(), value.as_object_mut())
    else {
        return;
    };
    fields.retain(|name, value| {
        let nullable = properties.get(name).is_some_and(|known| known["nullable"] == true);
        properties.contains_key(name) && (nullable || !value.is_null())
    });
    for (name, schema) in properties {
        if !schema["default"].is_null() && !fields.contains_key(name) {
            fields.insert(name.clone(), schema["default"].clone());
        }
        if let Some(value) = fields.get_mut(name) {
            shape(schema, value);
        }
    }
}

fn check(place: &str, schema: &Value, value: &Value) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{place}: {what}"));
    if value.is_null() {
        return if schema["nullable"] == true { Ok(()) } else { wrong("it is null") };
    }
    let fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        Some("boolean") => value.is_boolean(),
        _ => value.is_i64() || value.is_string(),
    };
    if !fits {
        return wrong("it has the wrong type");
    }
    let within = |key: &str, size: i64, above: bool| {
        // Bounds are numbers of any kind; all are whole.
        let bound = schema[key].as_f64().and_then(|bound| format!("{bound:.0}").parse().ok());
        bound.is_none_or(|bound: i64| if above { size >= bound } else { size <= bound })
    };
    if let Some(text) = value.as_str() {
        let length = i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
        let listed = schema["enum"].as_array().is_none_or(|known| known.contains(value));
        if !within("minLength", length, true) || !within("maxLength", length, false) || !listed {
            return wrong(&format!("{text:?} is too long, too short, or not in the list"));
        }
        if schema["format"] == "date-time" && text.parse::<jiff::Timestamp>().is_err() {
            return wrong("it is no time");
        }
    }
    if let Some(number) = value.as_i64()
        && (!within("minimum", number, true) || !within("maximum", number, false))
    {
        return wrong(&format!("{number} is out of bounds"));
    }
    if let Some(items) = value.as_array() {
        let count = i64::try_from(items.len()).unwrap_or(i64::MAX);
        if !within("maxItems", count, false) {
            return wrong("there are too many");
        }
        let unique = schema["x-kubernetes-list-type"] != "set"
            || items.iter().enumerate().all(|(at, item)| !items[..at].contains(item));
        if !unique {
            return wrong("one is there twice");
        }
        for (index, item) in items.iter().enumerate() {
            check(&format!("{place}[{index}]"), &schema["items"], item)?;
        }
    }
    if let Some(fields) = value.as_object() {
        for name in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap_or_default()) {
                return wrong(&format!("{name} is missing"));
            }
        }
        for (name, field) in fields {
            let property = &schema["properties"][name];
            let known = if property.is_null() { &schema["additionalProperties"] } else { property };
            check(&format!("{place}.{name}"), known, field)?;
        }
    }
    Ok(())
}
