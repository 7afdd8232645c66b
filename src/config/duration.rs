//! Durations as Go and Kubernetes write them.

use std::time::Duration;

use serde::Deserialize;

/// A duration as Go writes it: `1h30m`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct GoDuration(pub Duration);

impl TryFrom<String> for GoDuration {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a duration: write it as 30s, 5m or 1h30m");
        if text.is_empty() {
            return Err(wrong());
        }
        let mut rest = text.as_str();
        let mut total = Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let value: u32 = rest[..digits].parse().map_err(|_| wrong())?;
            rest = &rest[digits..];
            let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let unit = match &rest[..end] {
                "ms" => Duration::from_millis(1),
                "s" => Duration::from_secs(1),
                "m" => Duration::from_mins(1),
                "h" => Duration::from_hours(1),
                _ => return Err(wrong()),
            };
            total = unit
                .checked_mul(value)
                .and_then(|part| total.checked_add(part))
                .ok_or_else(wrong)?;
            rest = &rest[end..];
        }
        Ok(Self(total))
    }
}
