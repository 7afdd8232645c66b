//! Platforms: `os/arch[/variant]`, in the vocabulary of Go's GOOS and GOARCH.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use text::printable::excerpt;

/// The operating system and processor that an artifact was built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// The operating system, such as `linux`.
    pub os: String,
    /// The processor's architecture, such as `amd64` or `arm64`.
    pub architecture: String,
    /// The architecture's variant, such as `v8`. A request without one matches any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Features of the operating system that content needs, as `os.features` of an index's entry names them.
    /// Nodes and requests have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
}

/// The error of a text that is not a platform, with its start.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a platform: write os/architecture[/variant], as linux/arm64")]
pub struct PlatformError(String);

impl Platform {
    /// Returns the platform that this program was built for.
    pub fn of_this_node() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let (os, architecture) = ("linux".into(), architecture.into());
        Self { os, architecture, variant: None, features: Vec::new() }
    }

    /// Returns the platforms whose content can serve a request for this one on this node. If the request
    /// has the node's architecture and no variant, the processor's variant counts.
    pub fn order_on_this_node(&self) -> PlatformOrder {
        static VARIANT: OnceLock<Option<String>> = OnceLock::new();
        let node = Self::of_this_node().normalised();
        let variant = VARIANT.get_or_init(|| {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            variant_of(&node.architecture, &cpuinfo)
        });
        self.order_on(&Self { variant: variant.clone(), ..node })
    }

    /// Returns the platforms whose content can serve a request for this one on every node.
    pub fn order(&self) -> PlatformOrder {
        PlatformOrder::of(self.normalised(), self.variant.is_none())
    }

    /// Does as [`Platform::order_on_this_node`] for another node.
    fn order_on(&self, node: &Self) -> PlatformOrder {
        let is_of_node = self.variant.is_none()
            && (&self.normalised().os, &self.normalised().architecture)
                == (&node.os, &node.architecture);
        let node = || Self { features: self.features.clone(), ..node.normalised() };
        if is_of_node { PlatformOrder::of(node(), false) } else { self.order() }
    }

    /// Returns whether content for `offered` can serve a request for `self`.
    ///
    /// Names are normalised (`x86_64` is `amd64`, `aarch64` is `arm64`, an
    /// `arm64` without a variant is `v8`). A request without a variant accepts
    /// any variant, and none accepts features that it does not have.
    pub fn accepts(&self, offered: &Self) -> bool {
        let (wanted, offered) = (self.normalised(), offered.normalised());
        wanted.os == offered.os
            && wanted.architecture == offered.architecture
            && (self.variant.is_none() || wanted.variant == offered.variant)
            && wanted.has_features(&offered.features)
    }

    /// Returns whether content for `offered` may run on a node of this platform, whose processor is
    /// not known here: any variant of its architecture, and what such processors run of others.
    pub fn may_run(&self, offered: &Self) -> bool {
        self.accepts(offered) || self.order().rank(offered).is_some()
    }

    fn has_features(&self, features: &[String]) -> bool {
        features.iter().all(|feature| self.features.contains(feature))
    }

    /// Returns the platform with the names that containerd and Go use.
    fn normalised(&self) -> Self {
        let variant = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match self.architecture.to_ascii_lowercase().as_str() {
            "i386" => ("386".to_owned(), String::new()),
            "x86_64" | "x86-64" | "amd64" if variant == "v1" => ("amd64".to_owned(), String::new()),
            "x86_64" | "x86-64" => ("amd64".to_owned(), variant),
            "armhf" => ("arm".to_owned(), "v7".to_owned()),
            "armel" => ("arm".to_owned(), "v6".to_owned()),
            architecture @ ("aarch64" | "arm64" | "arm") => {
                let is_64_bit = architecture != "arm";
                let variant = match variant.as_str() {
                    "" | "8" | "v8" | "v8.0" if is_64_bit => "v8".to_owned(),
                    "9" | "9.0" | "v9.0" if is_64_bit => "v9".to_owned(),
                    "" => "v7".to_owned(),
                    "5" | "6" | "7" | "8" => format!("v{variant}"),
                    _ => variant,
                };
                (if is_64_bit { "arm64" } else { "arm" }.to_owned(), variant)
            }
            architecture => (architecture.to_owned(), variant),
        };
        let os = match self.os.to_ascii_lowercase().as_str() {
            "" => "linux".to_owned(),
            "macos" => "darwin".to_owned(),
            os => os.to_owned(),
        };
        // Containerd ignores the feature that images for Windows name.
        let is_ignored = |feature: &&String| os == "windows" && *feature == "win32k";
        let features = self.features.iter().filter(|feature| !is_ignored(feature)).cloned();
        let features = features.collect();
        let variant = Some(variant).filter(|variant| !variant.is_empty());
        Self { os, architecture, variant, features }
    }
}

/// Platforms whose content can serve a request, the best first, in the order of containerd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformOrder {
    /// The normalised platforms, the best first.
    platforms: Vec<Platform>,
    /// True if any variant of the first platform's architecture can serve. So it is for architectures
    /// whose variants have no known order.
    takes_any_variant: bool,
}

impl PlatformOrder {
    fn of(first: Platform, takes_any_variant: bool) -> Self {
        let of = |architecture: &str, variant: Option<String>| Platform {
            architecture: architecture.to_owned(),
            variant,
            ..first.clone()
        };
        let numbers = |variant: &str| -> Option<(u32, u32)> {
            let (major, minor) = variant
                .strip_prefix('v')
                .map(|text| text.split_once('.').unwrap_or((text, "0")))?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        };
        let variant = first.variant.as_deref().and_then(numbers);
        let of_arm = |most: u32| (5..=most).rev().map(move |number| format!("v{number}"));
        let (known, lower): (bool, Vec<Platform>) = match (first.architecture.as_str(), variant) {
            ("amd64", Some((level @ 2..=4, 0))) => {
                let levels = (2..level).rev().map(|level| of("amd64", Some(format!("v{level}"))));
                (true, levels.chain([of("amd64", None), of("386", None)]).collect())
            }
            ("amd64", _) => (true, vec![of("386", None)]),
            ("arm", Some((version @ 6..=8, 0))) => {
                (true, of_arm(version - 1).map(|variant| of("arm", Some(variant))).collect())
            }
            ("arm64", Some((major @ 8..=9, minor))) => {
                let versions = |major: u32, most: u32| {
                    (0..=most).rev().map(move |minor| match minor {
                        0 => format!("v{major}"),
                        minor => format!("v{major}.{minor}"),
                    })
                };
                // Version 9.x includes the features of version 8.(x + 5).
                let of_8 = if major == 9 { minor.saturating_add(5).min(9) } else { minor.min(9) };
                let of_9 = (major == 9).then(|| versions(9, minor.min(7))).into_iter().flatten();
                let of_64_bits =
                    of_9.chain(versions(8, of_8)).map(|variant| of("arm64", Some(variant)));
                let of_32_bits = of_arm(8).map(|variant| of("arm", Some(variant)));
                (true, of_64_bits.chain(of_32_bits).collect())
            }
            ("arm" | "arm64", _) => (true, Vec::new()),
            _ => (false, Vec::new()),
        };
        let mut platforms = vec![first];
        platforms
            .extend(lower.into_iter().filter(|lower| *lower != platforms[0]).collect::<Vec<_>>());
        Self { platforms, takes_any_variant: takes_any_variant && !known }
    }

    /// Returns the rank of content for a platform, the lowest being the best. Content without a rank does
    /// not run here. Of one platform, content for more features of the system is the better.
    pub fn rank(&self, offered: &Platform) -> Option<(usize, usize)> {
        let offered = offered.normalised();
        let first = &self.platforms[0];
        if !first.has_features(&offered.features) {
            return None;
        }
        let other_features = first.features.len().saturating_sub(offered.features.len());
        let offered = Platform { features: first.features.clone(), ..offered };
        let position = self.platforms.iter().position(|platform| *platform == offered);
        let is_of_first = (&first.os, &first.architecture) == (&offered.os, &offered.architecture);
        let position =
            position.or_else(|| (self.takes_any_variant && is_of_first).then_some(usize::MAX));
        position.map(|position| (position, other_features))
    }
}

/// Returns the variant of a processor of this architecture, from the text of `/proc/cpuinfo`.
fn variant_of(architecture: &str, cpuinfo: &str) -> Option<String> {
    /// The processor flags of each level of amd64 from the second on, with the kernel's names.
    const LEVELS: [&[&str]; 3] = [
        &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"],
        &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
        &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
    ];
    let field = |name: &str| {
        let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        let mut named = fields.filter(|(field, _)| field.trim().eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.trim().to_ascii_lowercase())
    };
    match architecture {
        "amd64" => {
            let flags = field("flags")?;
            let has = |flag: &&str| flags.split_whitespace().any(|known| known == *flag);
            let levels = LEVELS.iter().take_while(|level| level.iter().all(has)).count();
            (levels > 0).then(|| format!("v{}", levels + 1))
        }
        "arm" => {
            let version = field("CPU architecture")?;
            let version = match version.as_str() {
                "aarch64" => '8',
                // The kernel reports version 7 for some processors of version 6.
                _ if field("model name").is_some_and(|name| name.starts_with("armv6")) => '6',
                other => other.chars().next()?,
            };
            ('5'..='8').contains(&version).then(|| format!("v{version}"))
        }
        _ => None,
    }
}

/// Prints `os/architecture[/variant]`, and features of the system as containerd does:
/// `os(+feature)/architecture`.
impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.os)?;
        if !self.features.is_empty() {
            write!(formatter, "(+{})", self.features.join("+"))?;
        }
        write!(formatter, "/{}", self.architecture)?;
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
            return Err(PlatformError(excerpt(text, 100)));
        }
        Ok(Self {
            os: parts[0].to_owned(),
            architecture: parts[1].to_owned(),
            variant: parts.get(2).map(|&part| part.to_owned()),
            features: Vec::new(),
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
    fn a_node_may_run_any_variant_and_what_such_processors_run_of_others() {
        for (node, offered, may) in [
            ("linux/amd64", "linux/amd64/v3", true),
            ("linux/amd64", "linux/386", true),
            ("linux/arm64", "linux/arm/v7", true),
            ("linux/arm64", "linux/amd64", false),
            ("linux/386", "linux/amd64", false),
            ("linux/arm/v6", "linux/arm/v7", false),
        ] {
            let [node, of_index] = [node, offered].map(|text| text.parse::<Platform>().unwrap());
            assert_eq!(node.may_run(&of_index), may, "{node}: {offered}");
        }
    }

    #[test]
    fn variants_are_compared_after_normalisation() {
        assert!(platform("linux/arm64").accepts(&platform("linux/arm64/v8")));
        assert!(platform("linux/arm64/v8").accepts(&platform("linux/aarch64")));
        assert!(platform("linux/arm").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/amd64").accepts(&platform("linux/arm64")));
    }

    /// Returns the best offered platform for a request on a node.
    fn best<'a>(node: &str, wanted: &str, offered: &[&'a str]) -> Option<&'a str> {
        let order = platform(wanted).order_on(&platform(node).normalised());
        let ranked = offered.iter().filter_map(|text| Some((order.rank(&platform(text))?, *text)));
        ranked.min_by_key(|(rank, _)| *rank).map(|(_, text)| text)
    }

    #[test]
    fn the_best_that_the_processor_runs_is_chosen() {
        let amd64 =
            ["linux/amd64/v4", "linux/386", "linux/amd64/v2", "linux/amd64", "linux/amd64/v3"];
        for (node, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/amd64/v2", "linux/amd64/v2"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/amd64/v4", "linux/amd64/v4"),
        ] {
            assert_eq!(best(node, "linux/amd64", &amd64), Some(expected), "{node}");
        }
        let (node, wanted) = ("linux/amd64/v2", "linux/amd64");
        assert_eq!(best(node, wanted, &["linux/amd64/v3", "linux/arm64"]), None);
        assert_eq!(best(node, wanted, &["linux/amd64/v3", "linux/i386"]), Some("linux/i386"));
        assert_eq!(best("linux/amd64/v4", wanted, &["linux/x86_64/v1"]), Some("linux/x86_64/v1"));
        // A requested variant counts, even if the node runs another.
        assert_eq!(best(node, "linux/amd64/v3", &amd64), Some("linux/amd64/v3"));
        assert_eq!(
            best(node, "linux/amd64/v3", &["linux/amd64/v4", "linux/amd64"]),
            Some("linux/amd64")
        );
        // The node's variant does not count for another architecture.
        assert_eq!(best("linux/arm64", wanted, &amd64), Some("linux/amd64"));
    }

    #[test]
    fn arm_processors_run_older_versions() {
        let arm = ["linux/arm/v8", "linux/arm/v5", "linux/arm/v7", "linux/arm/v6"];
        for (node, expected) in [
            ("linux/arm/v6", "linux/arm/v6"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/arm/v8", "linux/arm/v8"),
        ] {
            assert_eq!(best(node, "linux/arm", &arm), Some(expected), "{node}");
        }
        assert_eq!(best("linux/arm/v6", "linux/arm", &["linux/arm/v7", "linux/armhf"]), None);
        assert_eq!(best("linux/arm/v6", "linux/arm", &["linux/armel"]), Some("linux/armel"));
        let on_arm64 = |offered| best("linux/arm64", "linux/arm64", offered);
        assert_eq!(on_arm64(&arm), Some("linux/arm/v8"));
        let mixed = ["linux/arm/v7", "linux/arm64/v8.2", "linux/arm64"];
        assert_eq!(on_arm64(&mixed), Some("linux/arm64"));
        assert_eq!(on_arm64(&["linux/arm64/v9", "linux/arm64/v8.1", "linux/amd64"]), None);
        assert_eq!(best("linux/amd64", "linux/arm64/v9.1", &mixed), Some("linux/arm64/v8.2"));
    }

    #[test]
    fn variants_without_an_order_do_not_exclude() {
        let (node, offered) = ("linux/amd64", ["linux/riscv64/rva22", "linux/riscv64/rva20"]);
        assert_eq!(best(node, "linux/riscv64", &offered), Some("linux/riscv64/rva22"));
        assert_eq!(best(node, "linux/riscv64/rva20", &offered), Some("linux/riscv64/rva20"));
        assert_eq!(best(node, "linux/riscv64/rva23", &offered), None);
    }

    #[test]
    fn the_processors_variant_is_read_from_cpuinfo() {
        let v2 = "fpu sse2 cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
        let v3 = format!("{v2} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave");
        let v4 = format!("{v3} avx512f avx512bw avx512cd avx512dq avx512vl");
        let amd64 = |flags: &str| {
            variant_of("amd64", &format!("processor\t: 0\nflags\t\t: {flags}\n\nflags: other\n"))
        };
        assert_eq!(amd64("fpu sse2 avx2"), None);
        assert_eq!(amd64(v2).as_deref(), Some("v2"));
        assert_eq!(amd64(&v3).as_deref(), Some("v3"));
        assert_eq!(amd64(&v4).as_deref(), Some("v4"));
        assert_eq!(amd64(&v4.replace("avx512vl", "")).as_deref(), Some("v3"));
        assert_eq!(amd64(&v4.replace("movbe", "")).as_deref(), Some("v2"));
        let arm = |text: &str| variant_of("arm", text);
        assert_eq!(arm("CPU architecture: 7\n").as_deref(), Some("v7"));
        assert_eq!(arm("CPU architecture: AArch64\n").as_deref(), Some("v8"));
        let model = "model name\t: ARMv6-compatible processor\nCPU architecture: 7\n";
        assert_eq!(arm(model).as_deref(), Some("v6"));
        assert_eq!(arm("CPU architecture: 5TEJ\n").as_deref(), Some("v5"));
        assert_eq!(arm("nothing\n"), None);
        assert_eq!(variant_of("arm64", "CPU architecture: 8\n"), None);
    }

    #[test]
    fn malformed_platforms_are_refused() {
        for text in ["", "linux", "linux/", "/amd64", "linux/a/b/c", "linux/am d64"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
