//! Platforms: `os/arch[/variant]`, in the vocabulary of Go's GOOS and GOARCH.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What an artifact was built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`.
    pub architecture: String,
    /// `v7`, `v8`; none matches any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is not a platform.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a platform: write os/architecture[/variant], as linux/arm64")]
pub struct PlatformError(String);

impl Platform {
    /// The platform this program was built for.
    #[must_use]
    pub fn of_this_node() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: None }
    }

    /// Whether content for `offered` may be shown where `self` is asked for.
    ///
    /// Names are normalised (`x86_64` is `amd64`, `aarch64` is `arm64`, an
    /// `arm64` without a variant is `v8`); a variant that was not asked for
    /// does not exclude.
    #[must_use]
    pub fn accepts(&self, offered: &Self) -> bool {
        let (wanted, offered) = (self.normalised(), offered.normalised());
        wanted.os == offered.os
            && wanted.architecture == offered.architecture
            && (self.variant.is_none() || wanted.variant == offered.variant)
    }

    fn normalised(&self) -> Self {
        let architecture = match self.architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            other => other.to_owned(),
        };
        let variant = match (architecture.as_str(), self.variant.as_deref()) {
            ("arm64", None | Some("8" | "")) => Some("v8".to_owned()),
            (_, None | Some("")) => None,
            (_, Some(variant)) => Some(variant.to_ascii_lowercase()),
        };
        Self { os: self.os.to_ascii_lowercase(), architecture, variant }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(formatter, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let parts: Vec<_> = text.split('/').collect();
        let word = |part: &&str| {
            !part.is_empty()
                && part.len() <= 64
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        if !(2..=3).contains(&parts.len()) || !parts.iter().all(word) {
            return Err(PlatformError(text.chars().take(100).collect()));
        }
        Ok(Self {
            os: parts[0].to_owned(),
            architecture: parts[1].to_owned(),
            variant: parts.get(2).map(|&part| part.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().expect("a platform")
    }

    #[test]
    fn variants() {
        assert!(platform("linux/arm64").accepts(&platform("linux/arm64/v8")));
        assert!(platform("linux/arm64/v8").accepts(&platform("linux/aarch64")));
        assert!(platform("linux/arm").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/amd64").accepts(&platform("linux/arm64")));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "linux", "linux/", "/amd64", "linux/a/b/c", "linux/am d64"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
