//! JSON whose objects have each field once, and no field that is not known.
//!
//! Two readers of a document with a duplicate field may see two different documents.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Checks a document. Any field is known if there is no list.
pub(crate) fn check(json: &[u8], known: Option<&[&str]>) -> Result<(), serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    StrictValue(known).deserialize(&mut reader)?;
    reader.end()
}

/// A value at any depth, with the fields that are known.
#[derive(Clone, Copy)]
struct StrictValue<'a>(Option<&'a [&'a str]>);

impl<'de> DeserializeSeed<'de> for StrictValue<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictValue<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let shown = text::printable::excerpt(&name, 40);
            if self.0.is_some_and(|known| !known.contains(&name.as_str())) {
                return Err(A::Error::custom(format_args!("the field \"{shown}\" is not known")));
            }
            if !names.insert(name) {
                return Err(A::Error::custom(format_args!("the field \"{shown}\" is there twice")));
            }
            map.next_value_seed(self)?;
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
