//! Quantities of Kubernetes: `10Gi`, `500M`, `1.5Ti`, `1e9`.

use serde::{Deserialize, Deserializer};

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "QuantityValue")]
pub struct Quantity(pub u64);

/// A value in YAML, where `1000` is a number and `10Gi` a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum QuantityValue {
    Number(u64),
    Text(String),
}

const SUFFIXES: [(&str, u64); 13] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("", 1),
];

impl TryFrom<QuantityValue> for Quantity {
    type Error = String;

    fn try_from(written: QuantityValue) -> Result<Self, String> {
        match written {
            QuantityValue::Number(number) => Ok(Self(number)),
            QuantityValue::Text(text) => text.parse(),
        }
    }
}

impl std::str::FromStr for Quantity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a quantity: write it as 500M, 10Gi or 1.5Ti");
        let (number, unit) = SUFFIXES
            .iter()
            .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
            .ok_or_else(wrong)?;
        // "E" alone is exa; in "1e9" and "1E9", with digits after it, it is an exponent.
        let (number, exponent) = match number.split_once(['e', 'E']) {
            Some((number, exponent)) if unit == 1 => {
                (number, exponent.parse::<u32>().map_err(|_| wrong())?)
            }
            Some(_) => return Err(wrong()),
            None => (number, 0),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |text: &str| text.chars().all(|char| char.is_ascii_digit());
        let no_digit = whole.is_empty() && fraction.is_empty();
        if no_digit || !digits(whole) || !digits(fraction) || fraction.len() > 9 {
            return Err(wrong());
        }
        let power = 10u128.checked_pow(exponent).ok_or_else(wrong)?;
        let scale = 10u128.pow(u32::try_from(fraction.len()).unwrap_or_default());
        let value: u128 = format!("{whole}{fraction}").parse().map_err(|_| wrong())?;
        let bytes = value
            .checked_mul(u128::from(unit))
            .and_then(|value| value.checked_mul(power))
            .ok_or_else(wrong)?;
        // A part of a byte counts as one, as the API server rounds.
        u64::try_from(bytes.div_ceil(scale)).map(Self).map_err(|_| wrong())
    }
}

/// Deserializes a number of bytes that may be absent, for `deserialize_with`.
pub fn optional_bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<Quantity>::deserialize(from)?.map(|quantity| quantity.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_kubernetes() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("10Gi", 10 << 30),
            ("500M", 500_000_000),
            ("1.5Ki", 1536),
            (".5k", 500),
            ("1e3", 1000),
            ("1E3", 1000),
            ("1E", 1_000_000_000_000_000_000),
            ("0.0001k", 1),
        ] {
            assert_eq!(text.parse(), Ok(Quantity(bytes)), "{text}");
        }
        for text in ["", "Gi", "-1", "1GB", "1 Gi", "ten", "1.2.3", "99Ei", "1e40", "1eGi", "."] {
            assert!(text.parse::<Quantity>().is_err(), "{text}");
        }
    }
}
