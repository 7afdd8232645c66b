//! The attribute `follow`: the interval at which a volume asks what its tag means.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::error::VolumeError;
use super::volume_attributes::{KUBELET_PREFIX, VolumeArtifact};
use pull::PullPolicy;
use sys::fault;
use text::duration::GoDuration;

/// The shortest interval: each volume asks the registry once in it.
const MINIMUM: Duration = Duration::from_secs(10);
/// The longest interval.
const MAXIMUM: Duration = Duration::from_hours(30 * 24);

/// The settings of a volume that follows its tag.
#[derive(Clone, Debug)]
pub struct Follow {
    /// The interval between two requests for the digest of the tag.
    pub interval: Duration,
    /// The volume's one artifact.
    pub artifact: VolumeArtifact,
    /// The attributes that the volume's author has set, for the volume's record. The kubelet's keys, which may hold
    /// tokens, are not among them.
    pub attributes: BTreeMap<String, String>,
}

impl Follow {
    /// Parses the attribute's value, and checks that the volume can be followed.
    pub(super) fn parse(
        value: &str,
        artifacts: &[VolumeArtifact],
        is_list: bool,
        context: &HashMap<String, String>,
    ) -> Result<Self, VolumeError> {
        let refused =
            |why: &str| VolumeError::Invalid(format!("the volume attribute \"follow\" {why}"));
        let artifact = match artifacts {
            [artifact] if !is_list => artifact.clone(),
            _ => {
                return Err(refused(
                    "follows the tag of one artifact, and \"artifacts\" is a list: remove one of them",
                ));
            }
        };
        let GoDuration(interval) = GoDuration::try_from(value.to_owned())
            .map_err(|error| refused(&format!("is no interval: {error}")))?;
        let minimum =
            fault::milliseconds("CSI_OCI_FOLLOW_MINIMUM").map_or(MINIMUM, Duration::from_millis);
        if interval < minimum {
            return Err(refused(&format!(
                "is below {}s: each volume asks the registry at this interval",
                minimum.as_secs()
            )));
        }
        if interval > MAXIMUM {
            return Err(refused(&format!("is above {}h", MAXIMUM.as_secs() / 3600)));
        }
        if artifact.reference.digest().is_some() {
            return Err(refused(
                "needs a tag, and the reference has a digest, which means the same for ever: remove one of them",
            ));
        }
        if artifact.pull_policy == PullPolicy::Never {
            return Err(refused("asks the registry, and pullPolicy is Never: remove one of them"));
        }
        let own = context.iter().filter(|(key, _)| !key.starts_with(KUBELET_PREFIX));
        let attributes = own.map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Self { interval, artifact, attributes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::volume_attributes::VolumeAttributes;

    fn parse(value: &str, reference: &str, policy: &str) -> Result<Follow, String> {
        let token = format!("{KUBELET_PREFIX}serviceAccount.tokens");
        parse_all(&[
            ("follow", value),
            ("reference", reference),
            ("pullPolicy", policy),
            (&token, "secret"),
        ])
    }

    fn parse_all(context: &[(&str, &str)]) -> Result<Follow, String> {
        let context = context.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
        let parsed = VolumeAttributes::parse(&context.collect());
        parsed.map_err(|error| error.to_string()).map(|parsed| parsed.follow.expect("it follows"))
    }

    #[test]
    fn an_interval_is_within_bounds_and_of_a_tag_that_may_be_asked_for() {
        let tag = |value| parse(value, "r.io/app:v1", "IfNotPresent");
        assert_eq!(tag("5m").expect("valid").interval, Duration::from_mins(5));
        assert_eq!(tag("10s").expect("valid").interval, MINIMUM);
        for value in ["0", "0s", "1s", "9.9s", "721h", "5", "often", "-5m"] {
            let refused = tag(value).expect_err(value);
            assert!(refused.contains("\"follow\""), "{refused}");
        }
        assert!(tag("1s").expect_err("short").contains("below 10s"));
        let digest = oci::Digest::of(b"");
        let refused = parse("5m", &format!("r.io/app:v1@{digest}"), "Always");
        assert!(refused.expect_err("a digest").contains("needs a tag"));
        let refused = parse("5m", "r.io/app:v1", "Never");
        assert!(refused.expect_err("never").contains("pullPolicy"));
    }

    #[test]
    fn a_part_is_followed_and_a_list_is_not() {
        let follow = ("follow", "5m");
        let part = parse_all(&[follow, ("reference", "r.io/app:v1"), ("subPath", "bin")]);
        assert_eq!(part.expect("valid").artifact.shape.sub_path_text(), "bin");
        let list = parse_all(&[follow, ("artifacts", "[{reference: r.io/app:v1}]")]);
        assert!(list.expect_err("a list").contains("\"artifacts\""));
    }

    #[test]
    fn the_record_of_a_volume_has_none_of_the_kubelets_keys() {
        let follow = parse("5m", "r.io/app:v1", "Always").expect("valid");
        let keys: Vec<_> = follow.attributes.keys().map(String::as_str).collect();
        assert_eq!(keys, ["follow", "pullPolicy", "reference"]);
    }
}
