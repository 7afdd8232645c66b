//! JSON whose objects have each field once, and no field that is not known.
//!
//! Two readers of a document with a duplicate field may see two different documents.

use std::collections::BTreeSet;

use super::json_walk::{JsonObserver, walk};

/// Checks a document. Any field is known if there is no list.
pub(crate) fn check(json: &[u8], known: Option<&[&str]>) -> Result<(), serde_json::Error> {
    walk(json, &mut FieldCheck(known))
}

/// Refuses duplicate fields, and those that are not in the list.
struct FieldCheck<'a>(Option<&'a [&'a str]>);

impl JsonObserver for FieldCheck<'_> {
    type Object = BTreeSet<String>;

    fn field(&mut self, names: &mut BTreeSet<String>, name: String) -> Result<(), String> {
        let shown = text::printable::excerpt(&name, 40);
        if self.0.is_some_and(|known| !known.contains(&name.as_str())) {
            return Err(format!("the field \"{shown}\" is not known"));
        }
        if !names.insert(name) {
            return Err(format!("the field \"{shown}\" is there twice"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_and_unknown_fields_are_refused_at_any_depth() {
        for (json, known, named) in [
            (r#"{"a":[{"b":1,"a":null},{"b":2.5,"a":true}]}"#, &["a", "b"][..], None),
            (r#"{"a":1,"\u0061":2}"#, &["a"], Some("\"a\" is there twice")),
            (r#"{"a":[[{"b":{},"b":{}}]]}"#, &["a", "b"], Some("\"b\" is there twice")),
            (r#"{"a":{"c\n":1}}"#, &["a"], Some("\"c\" is not known")),
            (r#"{"a":1} 2"#, &["a"], Some("trailing")),
            (r#"{"a":"#, &["a"], Some("EOF")),
        ] {
            let checked = check(json.as_bytes(), Some(known)).map_err(|error| error.to_string());
            match (checked, named) {
                (Ok(()), None) => {}
                (Err(error), Some(named)) if error.contains(named) => {}
                (other, _) => panic!("{json}: {other:?}"),
            }
        }
        assert!(check(br#"{"any":{"thing":1}}"#, None).is_ok());
        let deep = "[".repeat(100_000);
        assert!(check(deep.as_bytes(), None).is_err());
    }
}
