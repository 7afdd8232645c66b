//! A walk over the values of a JSON document, which builds no tree of them.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Sees the values of a document, outer ones first.
pub(crate) trait JsonObserver {
    /// The state of one object, until its last field.
    type Object: Default;

    /// Sees the name of a field.
    ///
    /// # Errors
    ///
    /// The reason to end the walk.
    fn field(&mut self, object: &mut Self::Object, name: String) -> Result<(), String>;

    /// Sees a text that is no name.
    fn text(&mut self, _text: &str) {}

    /// Sees a list.
    fn list(&mut self) {}

    /// Sees a value within a list.
    fn list_value(&mut self) {}
}

/// Walks over a document.
///
/// # Errors
///
/// The document is malformed, or the observer ends the walk.
pub(crate) fn walk(json: &[u8], observer: &mut impl JsonObserver) -> Result<(), serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    WalkedValue(observer).deserialize(&mut reader)?;
    reader.end()
}

/// A value at any depth.
struct WalkedValue<'a, O>(&'a mut O);

impl<'de, O: JsonObserver> DeserializeSeed<'de> for WalkedValue<'_, O> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, O: JsonObserver> Visitor<'de> for WalkedValue<'_, O> {
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

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.text(text);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.0.list();
        while list.next_element_seed(WalkedValue(&mut *self.0))?.is_some() {
            self.0.list_value();
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut object = O::Object::default();
        while let Some(name) = map.next_key::<String>()? {
            self.0.field(&mut object, name).map_err(A::Error::custom)?;
            map.next_value_seed(WalkedValue(&mut *self.0))?;
        }
        Ok(())
    }
}
