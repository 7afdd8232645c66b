//! Durations in the syntax of Go and Kubernetes.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::printable::excerpt;

/// A duration in Go syntax: `1h30m`, `1.5h`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct GoDuration(pub Duration);

impl TryFrom<String> for GoDuration {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || {
            format!("\"{}\" is not a duration: write it as 30s, 5m or 1h30m", excerpt(&text, 40))
        };
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        if text.is_empty() {
            return Err(wrong());
        }
        let mut rest = text.as_str();
        let mut total = Duration::ZERO;
        let number = |c: char| c.is_ascii_digit() || c == '.';
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !number(c)).ok_or_else(wrong)?;
            let (whole, fraction) = rest[..digits].split_once('.').unwrap_or((&rest[..digits], ""));
            let value: u32 = whole.parse().map_err(|_| wrong())?;
            rest = &rest[digits..];
            let end = rest.find(number).unwrap_or(rest.len());
            let unit = match &rest[..end] {
                "ns" => Duration::from_nanos(1),
                "us" | "µs" | "μs" => Duration::from_micros(1),
                "ms" => Duration::from_millis(1),
                "s" => Duration::from_secs(1),
                "m" => Duration::from_mins(1),
                "h" => Duration::from_hours(1),
                _ => return Err(wrong()),
            };
            let part = match fraction {
                "" => Duration::ZERO,
                _ => unit.mul_f64(format!("0.{fraction}").parse().map_err(|_| wrong())?),
            };
            total = unit
                .checked_mul(value)
                .and_then(|whole| total.checked_add(whole)?.checked_add(part))
                .ok_or_else(wrong)?;
            rest = &rest[end..];
        }
        Ok(Self(total))
    }
}

/// Deserializes a duration in Go syntax, for `deserialize_with`.
pub fn go_duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    Ok(GoDuration::deserialize(from)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_go_are_parsed() {
        let parse = |text: &str| GoDuration::try_from(text.to_owned()).map(|duration| duration.0);
        assert_eq!(parse("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(parse("6h0m0s"), Ok(Duration::from_hours(6)));
        assert_eq!(parse("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse("250us"), Ok(Duration::from_micros(250)));
        assert_eq!(parse("0"), Ok(Duration::ZERO));
        for text in ["", "5", "-1s", "1x", "s", "1.2.3s", "99999999999h", ".s", "1h2"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
