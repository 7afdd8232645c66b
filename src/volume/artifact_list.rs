//! The attribute `artifacts`: a list of artifacts for one volume, in YAML or JSON.

use serde::Deserialize;
use serde_saphyr::from_str_with_options;

use super::error::VolumeError;
use super::volume_attributes::{VolumeArtifact, invalid, pull_policy_of};
use oci::Reference;
use pull::{PullPolicy, Shape};
use text::printable::{excerpt, printable};
use unpack::{RelativePath, Selection};

/// The most artifacts of one volume.
const MAXIMUM_ARTIFACTS: usize = 32;

/// The most nodes of its YAML. Each entry has up to eleven.
const MAXIMUM_NODES: usize = 1000;

/// One entry of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedArtifact {
    reference: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    include: String,
    #[serde(default)]
    exclude: String,
    #[serde(default)]
    strip: String,
}

/// Parses the list. `of_volume` has the attributes that hold for all artifacts.
///
/// # Errors
///
/// [`VolumeError::Invalid`] names the entry, counted from 1.
pub(super) fn parse(
    text: &str,
    pull_policy: Option<PullPolicy>,
    of_volume: &Shape,
) -> Result<Vec<VolumeArtifact>, VolumeError> {
    // No alias: a kilobyte of them stands for a list that takes seconds and 100 MB to read.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: MAXIMUM_NODES,
            max_aliases: 0,
            max_merge_keys: 0,
        },
    };
    let listed: Vec<ListedArtifact> = from_str_with_options(text, options).map_err(|error| {
        let reason = if let serde_saphyr::Error::Budget { .. } = error.without_snippet() {
            "it is too long or too deep, or has aliases".to_owned()
        } else {
            let error = error.without_snippet().to_string();
            let line = printable(error.lines().next().unwrap_or_default()).into_owned();
            excerpt(&line, 300)
        };
        invalid(
            "artifacts",
            &format!("is no list of reference, path, include, exclude and strip: {reason}"),
        )
    })?;
    if listed.is_empty() || listed.len() > MAXIMUM_ARTIFACTS {
        let count = listed.len();
        return Err(invalid(
            "artifacts",
            &format!("has {count} entries: list from 1 to {MAXIMUM_ARTIFACTS}"),
        ));
    }
    let mut artifacts = Vec::with_capacity(listed.len());
    for (number, listed) in (1..).zip(listed) {
        let artifact = listed.parse(pull_policy, of_volume);
        let wrong =
            |what: String| invalid("artifacts", &format!("is wrong in entry {number}: {what}"));
        artifacts.push(artifact.map_err(wrong)?);
    }
    refuse_paths_in_paths(&artifacts)?;
    Ok(artifacts)
}

impl ListedArtifact {
    fn parse(
        self,
        pull_policy: Option<PullPolicy>,
        of_volume: &Shape,
    ) -> Result<VolumeArtifact, String> {
        let reference: Reference =
            self.reference.parse().map_err(|error| format!("\"reference\": {error}"))?;
        let path =
            Shape::parse_sub_path(&self.path).map_err(|error| format!("\"path\": {error}"))?;
        let sub_path =
            Shape::parse_sub_path(&self.strip).map_err(|error| format!("\"strip\": {error}"))?;
        let selection = Selection::parse(&self.include, &self.exclude)
            .map_err(|error| format!("\"include\" or \"exclude\": {error}"))?;
        let pull_policy = pull_policy.unwrap_or_else(|| pull_policy_of(&reference));
        let shape = Shape { selection, sub_path, ..of_volume.clone() };
        Ok(VolumeArtifact { reference, pull_policy, path, shape })
    }
}

/// Refuses a path that another artifact of the list has, or that lies in one.
fn refuse_paths_in_paths(artifacts: &[VolumeArtifact]) -> Result<(), VolumeError> {
    let own = |artifact: &&VolumeArtifact| artifact.path != RelativePath::root();
    let placed: Vec<_> = artifacts.iter().filter(own).collect();
    for (number, one) in placed.iter().enumerate() {
        for two in &placed[number + 1..] {
            if one.path.is_within(&two.path) || two.path.is_within(&one.path) {
                return Err(invalid(
                    "artifacts",
                    &format!(
                        "has the paths \"{}\" of {} and \"{}\" of {}: give each artifact a folder of its own",
                        one.path, one.reference, two.path, two.reference
                    ),
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Vec<VolumeArtifact>, VolumeError> {
        parse(text, None, &Shape::default())
    }

    fn refused(text: &str) -> String {
        match list(text) {
            Err(VolumeError::Invalid(message)) => {
                assert!(message.len() < 1024, "{message}");
                message
            }
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn yaml_and_json_are_the_same_list() {
        let yaml = "- reference: r.io/a:v1\n- reference: r.io/b\n  path: b/c\n  include: '*.bin,x'\n  exclude: y\n  strip: d\n";
        let json = r#"[{"reference":"r.io/a:v1"},{"reference":"r.io/b","path":"./b//c/","include":"x,*.bin","exclude":"y","strip":"d"}]"#;
        for text in [yaml, json] {
            let artifacts = list(text).expect("a list");
            let texts: Vec<_> = artifacts
                .iter()
                .map(|artifact| {
                    let VolumeArtifact { reference, path, shape, .. } = artifact;
                    let (selection, strip) = (shape.selection.attributes(), shape.sub_path_text());
                    format!("{reference} {path} {selection:?} {strip}")
                })
                .collect();
            let second = r#"r.io/b:latest b/c ("*.bin,x", "y") d"#;
            assert_eq!(texts, [r#"r.io/a:v1 . ("", "") "#, second]);
            let policies = artifacts.iter().map(|artifact| artifact.pull_policy);
            let policies: Vec<_> = policies.collect();
            assert_eq!(policies, [PullPolicy::IfNotPresent, PullPolicy::Always], "by each tag");
        }
    }

    #[test]
    fn what_is_no_list_of_artifacts_is_refused() {
        for text in [
            "",
            "[]",
            "r.io/a",
            "{",
            "- r.io/a",
            "- {}",
            "- {reference: r.io/a, reference: r.io/b}",
            "- {reference: r.io/a, subPath: x}",
            "- {reference: [r.io/a]}",
            "reference: r.io/a",
            "- &a {reference: r.io/a, path: *a}",
        ] {
            refused(text);
        }
        assert!(refused("- {reference: r.io/a, pullPolicy: Always}").contains("pullPolicy"));
        let many = "- reference: r.io/a\n".repeat(33);
        assert!(refused(&many).contains("33 entries"));
        // Each alias stands for many others.
        let line = |number: u32| {
            let aliases = format!("*a{number},").repeat(9);
            format!("b{number}: &a{} [{aliases}]\n", number + 1)
        };
        let lines: Vec<_> = (0..30).map(line).collect();
        refused(&format!("a: &a0 [x]\n{}", lines.concat()));
        let merged = |number: u32| {
            let aliases = vec![format!("*m{number}"); 15].join(",");
            format!("- &m{} {{<<: [{aliases}]}}\n", number + 1)
        };
        let lines: Vec<_> = (0..11).map(merged).collect();
        let bomb = format!("- &m0 {{reference: r.io/a:v1}}\n{}", lines.concat());
        assert!(refused(&bomb).contains("aliases"));
        refused(&"[".repeat(60_000));
    }

    #[test]
    fn an_entry_that_is_wrong_is_named() {
        for (entry, what) in [
            ("reference: 'R.io/A B'", "reference"),
            ("reference: r.io/a\n  path: /x", "absolute"),
            ("reference: r.io/a\n  path: x/../y", "\"..\""),
            ("reference: r.io/a\n  strip: ..", "\"..\""),
            ("reference: r.io/a\n  include: '['", "include"),
        ] {
            let message = refused(&format!("- reference: r.io/good:v1\n- {entry}\n"));
            assert!(message.contains("entry 2") && message.contains(what), "{message}");
        }
    }

    #[test]
    fn each_path_belongs_to_one_artifact() {
        let two = |one: &str, two: &str| {
            format!("- {{reference: r.io/a, path: {one}}}\n- {{reference: r.io/b, path: {two}}}\n")
        };
        for (one, other) in [("x", "x"), ("x", "./x/"), ("x", "x/y"), ("x/y", "x")] {
            let message = refused(&two(one, other));
            assert!(message.contains("r.io/a") && message.contains("r.io/b"), "{message}");
        }
        list(&two("x/y", "x/z")).expect("folders of their own");
        list(&two("xy", "x")).expect("another name");
        list("- reference: r.io/a\n- reference: r.io/b\n").expect("both at the root");
        let one = "r.io/a, path";
        list(&format!("- {{reference: {one}: x}}\n- {{reference: {one}: y}}\n")).expect("twice");
    }
}
