//! Parses `volumeAttributes`, the settings of a volume's author.
//!
//! [`ATTRIBUTES`] is the schema, the list that errors print, and the table of `docs/attributes.md`. Every user who may create a pod sets attributes, so none of
//! them has an administrator's power.

use std::collections::HashMap;
use std::fmt::Display;

use serde::de::value::BorrowedStrDeserializer;
use serde::{Deserialize, Serialize};

use super::artifact_list;
use super::error::VolumeError;
use super::follow_attribute::Follow;
use oci::credentials::{Keyring, WorkloadIdentity};
use oci::digest::DigestError;
use oci::platform::PlatformError;
use oci::reference::ReferenceError;
use oci::{Digest, Platform, Reference};
use policy::PolicyDemands;
use pull::{IfUnavailable, PlacedWant, Priority, PullPolicy, Shape, Tenant, Want};
use sys::mount::MountFlags;
use text::printable::excerpt;
use unpack::{PermissionsRule, RelativePath, Selection, UnpackMode};

/// An attribute, as `docs/attributes.md` describes it. That page is made from [`ATTRIBUTES`].
#[derive(Debug)]
pub struct Attribute {
    /// The key in `volumeAttributes`.
    pub key: &'static str,
    /// The meaning of an absent or empty value, in Markdown.
    pub default: &'static str,
    /// The meaning and the permitted values, in Markdown.
    pub meaning: &'static str,
}

/// All attributes that a volume's author may set.
pub const ATTRIBUTES: [Attribute; 16] = [
    Attribute {
        key: "reference",
        default: "required, or `repository`",
        meaning: "`host[:port]/repository[:tag][@digest]`. If both are given, the digest decides and \
                  the tag informs the reader",
    },
    Attribute {
        key: "repository",
        default: "",
        meaning: "the reference without tag and digest, for templates that patch one field",
    },
    Attribute {
        key: "tag",
        default: "`latest` without a digest",
        meaning: "the tag, beside `repository`",
    },
    Attribute { key: "digest", default: "", meaning: "the digest, beside `repository`" },
    Attribute {
        key: "artifacts",
        default: "",
        meaning: "several artifacts in place of one: a list in YAML or JSON of up to 32 entries with \
                  `reference`, and as wanted `path`, `include`, `exclude` and `strip`, see [several \
                  artifacts](#several-artifacts)",
    },
    Attribute {
        key: "pullPolicy",
        default: "`Always` for `:latest` or neither tag nor digest, else `IfNotPresent`",
        meaning: "`Always`, `IfNotPresent` or `Never`, with the kubelet's meaning. With a digest, \
                  `Always` asks the registry only to prove the credentials",
    },
    Attribute {
        key: "ifUnavailable",
        default: "`Fail`",
        meaning: "what `Always` does when the registry cannot be reached and an earlier resolution is \
                  cached: `Fail` or `UseCached`",
    },
    Attribute {
        key: "platform",
        default: "the node's",
        meaning: "`os/arch[/variant]` to choose from an index. Without a variant, the best that the \
                  node's processor runs. A single image whose configuration names another platform is \
                  refused",
    },
    Attribute {
        key: "include",
        default: "all files",
        meaning: "the files to select: comma-separated globs, see [selecting \
                  files](#selecting-files)",
    },
    Attribute {
        key: "exclude",
        default: "",
        meaning: "the files to leave out of these: comma-separated globs",
    },
    Attribute {
        key: "permissions",
        default: "`Readable`",
        meaning: "`Readable`: owner 0:0, files `mode | 0444`, folders and executable files `| 0555`. \
                  `Preserve`: owner and `mode & 0777` of the archive or of ModelPack's metadata",
    },
    Attribute {
        key: "fileMode",
        default: "`0555` for content that starts as ELF or `#!`, else `0444`",
        meaning: "octal mode of single-file layers, which carry none",
    },
    Attribute {
        key: "unpack",
        default: "`Auto`",
        meaning: "which layers of an artifact are unpacked. `Auto`: folders of `oras push` and [known \
                  media types](artifacts.md#which-layer-becomes-what). `Always`: every other tar too. \
                  `Never`: none, each layer that is shown is a file. Ordinary images are always \
                  unpacked",
    },
    Attribute {
        key: "subPath",
        default: "the whole artifact",
        meaning: "a folder of the artifact to show as the root of the volume, or a file to show as its \
                  only content, see [parts](#parts)",
    },
    Attribute {
        key: "follow",
        default: "the content never changes",
        meaning: "an interval such as `5m`, `10s` to `720h`, at which the tag is resolved again and the \
                  content switched atomically, see [following a tag](how-to/follow-a-tag.md). Needs \
                  `readOnly: true` and a tag; goes with neither `pullPolicy: Never` nor `artifacts`",
    },
    Attribute {
        key: "requireSignature",
        default: "the node's policy",
        meaning: "`\"true\"`: refuse artifacts that no configured key or identity has signed, even if the node's \
                  policy does not demand a signature",
    },
];

/// The keys of [`ATTRIBUTES`].
pub const KEYS: [&str; ATTRIBUTES.len()] = {
    let mut keys = [""; ATTRIBUTES.len()];
    let mut number = 0;
    while number < keys.len() {
        keys[number] = ATTRIBUTES[number].key;
        number += 1;
    }
    keys
};

/// The keys that name the artifact or artifacts. A volume has one of them.
pub const NAMING_KEYS: [&str; 3] = ["reference", "repository", "artifacts"];

/// The prefix of the keys that the kubelet adds. Unknown keys with it are ignored.
pub const KUBELET_PREFIX: &str = "csi.storage.k8s.io/";

/// The most bytes of a value, checked before parsing: a pod's whole specification may have 1.5 MiB.
const MAXIMUM_BYTES: usize = 64 * 1024;

/// The parsed attributes of a volume.
#[derive(Clone, Debug)]
pub struct VolumeAttributes {
    /// The artifacts in the volume's order, at least one.
    pub artifacts: Vec<VolumeArtifact>,
    /// True if they come from a list, also if that has one entry.
    pub is_list: bool,
    /// The behaviour of `Always` without a response of the registry.
    pub if_unavailable: IfUnavailable,
    /// The platform; `None` selects the node's.
    pub platform: Option<Platform>,
    /// Refuse an artifact without a signature of a configured key.
    pub require_signature: bool,
    /// Follow the tag.
    pub follow: Option<Follow>,
}

/// One of a volume's artifacts.
#[derive(Clone, Debug)]
pub struct VolumeArtifact {
    /// The artifact's reference.
    pub reference: Reference,
    /// When to use the registry.
    pub pull_policy: PullPolicy,
    /// The folder of the artifact's root.
    pub path: RelativePath,
    /// The settings that shape the tree.
    pub shape: Shape,
}

impl VolumeAttributes {
    /// Parses the volume context without the kubelet's keys. An empty value counts as absent.
    pub fn parse(context: &HashMap<String, String>) -> Result<Self, VolumeError> {
        let unknown =
            |key: &&String| !key.starts_with(KUBELET_PREFIX) && !KEYS.contains(&key.as_str());
        if let Some(key) = context.keys().filter(unknown).min() {
            return Err(VolumeError::Invalid(format!(
                "the volume attribute \"{}\" is not known: use {}",
                excerpt(key, 100),
                KEYS.join(", ")
            )));
        }
        let get =
            |key: &str| context.get(key).map(String::as_str).filter(|value| !value.is_empty());
        if let Some(key) =
            KEYS.iter().find(|key| get(key).is_some_and(|value| value.len() > MAXIMUM_BYTES))
        {
            return Err(invalid(key, &format!("is longer than {MAXIMUM_BYTES} bytes")));
        }
        let pull_policy = variant(get, "pullPolicy", "Always, IfNotPresent or Never")?;
        let if_unavailable =
            variant(get, "ifUnavailable", "Fail or UseCached")?.unwrap_or_default();
        let permissions = variant(get, "permissions", "Readable or Preserve")?.unwrap_or_default();
        let unpack = variant(get, "unpack", "Auto, Always or Never")?.unwrap_or_default();
        let require_signature = match get("requireSignature") {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => return Err(choice("requireSignature", other, "true or false")),
        };
        let platform = get("platform").map(str::parse).transpose();
        let platform = platform.map_err(|error: PlatformError| wrong("\"platform\"", error))?;
        let (include, exclude) = (get("include").unwrap_or(""), get("exclude").unwrap_or(""));
        let selection = Selection::parse(include, exclude);
        let selection = selection.map_err(|error| wrong("\"include\" or \"exclude\"", error))?;
        let file_mode = get("fileMode").map(file_mode).transpose()?;
        let sub_path = Shape::parse_sub_path(get("subPath").unwrap_or(""));
        let sub_path = sub_path.map_err(|error| wrong("\"subPath\"", error))?;
        let shape = Shape { selection, permissions, file_mode, unpack, sub_path };
        let list = get("artifacts");
        let artifacts = if let Some(list) = list {
            let of_one =
                ["reference", "repository", "tag", "digest", "include", "exclude", "subPath"];
            if let Some(key) = of_one.iter().find(|key| get(key).is_some()) {
                let elsewhere = "does not go with \"artifacts\": write it in the entries of that list (\"strip\" for \"subPath\")";
                return Err(invalid(key, elsewhere));
            }
            artifact_list::parse(list, pull_policy, &shape)?
        } else {
            let reference = reference(get)?;
            let pull_policy = pull_policy.unwrap_or_else(|| pull_policy_of(&reference));
            vec![VolumeArtifact { reference, pull_policy, path: RelativePath::root(), shape }]
        };
        let is_list = list.is_some();
        let follow = get("follow").map(|value| Follow::parse(value, &artifacts, is_list, context));
        let follow = follow.transpose()?;
        Ok(Self { artifacts, is_list, if_unavailable, platform, require_signature, follow })
    }

    /// Returns the artifacts for people: the reference of the first, and the number of the others.
    pub fn names(&self) -> String {
        match self.artifacts.as_slice() {
            [] => String::new(),
            [one] => one.reference.to_string(),
            [first, others @ ..] => format!("{} and {} more", first.reference, others.len()),
        }
    }

    /// Returns the pulls that this volume needs, with the demands of the policy on each.
    pub fn wants(
        &self,
        demands: &[PolicyDemands],
        keyring: &Keyring,
        identity: Option<&WorkloadIdentity>,
        tenant: &Tenant,
    ) -> Vec<PlacedWant> {
        let placed = self.artifacts.iter().zip(demands).map(|(artifact, demands)| PlacedWant {
            path: artifact.path.clone(),
            want: self.want(artifact, demands, keyring, identity, tenant),
        });
        placed.collect()
    }

    /// Returns the pull of one of this volume's artifacts.
    pub fn want(
        &self,
        artifact: &VolumeArtifact,
        demands: &PolicyDemands,
        keyring: &Keyring,
        identity: Option<&WorkloadIdentity>,
        tenant: &Tenant,
    ) -> Want {
        Want {
            reference: artifact.reference.clone(),
            platform: self.platform.clone().unwrap_or_else(Platform::of_this_node),
            policy: artifact.pull_policy,
            if_unavailable: self.if_unavailable,
            shape: artifact.shape.clone(),
            maximum_bytes: demands.maximum_bytes,
            signature: demands.signature.clone(),
            keyring: keyring.clone(),
            identity: identity.cloned(),
            priority: Priority::Pod,
            tenant: tenant.clone(),
        }
    }

    /// Returns a digest that is equal for volumes that show the same. It decides whether a repeated publish is
    /// compatible.
    pub fn fingerprint(&self, flags: MountFlags) -> Digest {
        #[derive(Serialize)]
        struct CanonicalAttributes<'a> {
            reference: String,
            pull_policy: PullPolicy,
            if_unavailable: IfUnavailable,
            platform: &'a Option<Platform>,
            selection: String,
            permissions: PermissionsRule,
            file_mode: Option<u32>,
            /// Absent if it is the default: records of earlier versions do not have it.
            #[serde(skip_serializing_if = "UnpackMode::is_auto")]
            unpack: UnpackMode,
            #[serde(skip_serializing_if = "String::is_empty")]
            sub_path: String,
            /// The folder of an artifact of a list.
            #[serde(skip_serializing_if = "Option::is_none")]
            path: Option<String>,
            require_signature: bool,
            /// The interval in milliseconds, absent from volumes that do not follow.
            #[serde(skip_serializing_if = "Option::is_none")]
            follow: Option<u128>,
            noexec: bool,
            noatime: bool,
        }
        let canonical = |artifact: &VolumeArtifact| {
            let VolumeArtifact { reference, pull_policy, path, shape } = artifact;
            let canonical = CanonicalAttributes {
                reference: reference.to_string(),
                pull_policy: *pull_policy,
                if_unavailable: self.if_unavailable,
                platform: &self.platform,
                selection: shape.selection.canonical(),
                permissions: shape.permissions,
                file_mode: shape.file_mode,
                unpack: shape.unpack,
                sub_path: shape.sub_path_text(),
                path: self.is_list.then(|| String::from_utf8_lossy(path.as_bytes()).into_owned()),
                require_signature: self.require_signature,
                follow: self.follow.as_ref().map(|follow| follow.interval.as_millis()),
                noexec: flags.noexec,
                noatime: flags.noatime,
            };
            // Plain values with text keys always have a JSON form.
            serde_json::to_vec(&canonical).unwrap_or_default()
        };
        // A list is the concatenation of its entries, of which each ends where its braces do.
        let entries: Vec<_> = self.artifacts.iter().map(canonical).collect();
        Digest::of(&entries.concat())
    }
}

/// Parses the mount options of a `PersistentVolume`. Each may be a list.
pub fn mount_flags(options: &[String]) -> Result<MountFlags, VolumeError> {
    let mut flags = MountFlags::default();
    for option in options.iter().flat_map(|options| options.split(',')) {
        match option.trim() {
            "noexec" => flags.noexec = true,
            "noatime" => flags.noatime = true,
            // Every mount of the driver is read-only.
            "ro" | "" => {}
            other => {
                return Err(VolumeError::Invalid(format!(
                    "the mount option \"{}\" cannot be honoured: use noexec, noatime or ro",
                    excerpt(other, 100)
                )));
            }
        }
    }
    Ok(flags)
}

fn reference<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<Reference, VolumeError> {
    let parts = [get("repository"), get("tag"), get("digest")];
    let refused = |attributes: &str, error: ReferenceError| {
        let text = format!("the volume {attributes}: {error}");
        match error {
            ReferenceError::Digest(DigestError::Algorithm(_)) => VolumeError::Unsupported(text),
            _ => VolumeError::Invalid(text),
        }
    };
    match (get("reference"), parts) {
        (Some(reference), [None, None, None]) => {
            reference.parse().map_err(|error| refused("attribute \"reference\"", error))
        }
        (Some(_), _) => Err(VolumeError::Invalid(
            "the volume attributes name the artifact twice: use either \"reference\" or \"repository\" with \"tag\" and \"digest\"".into(),
        )),
        (None, [Some(repository), tag, digest]) => {
            let attributes = "attributes \"repository\", \"tag\" and \"digest\"";
            Reference::from_parts(repository, tag, digest).map_err(|error| refused(attributes, error))
        }
        (None, [None, ..]) => Err(VolumeError::Invalid(
            "the volume attribute \"reference\" is missing: set it to host[:port]/repository[:tag][@digest], or list \"artifacts\"".into(),
        )),
    }
}

/// Returns the kubelet's default: `:latest`, or a reference with neither tag nor digest, may change at any time.
pub(super) fn pull_policy_of(reference: &Reference) -> PullPolicy {
    if reference.digest().is_none() && reference.tag_or_latest() == "latest" {
        PullPolicy::Always
    } else {
        PullPolicy::IfNotPresent
    }
}

fn file_mode(text: &str) -> Result<u32, VolumeError> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = (1..=4).contains(&digits.len())
        && digits.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if octal && mode <= 0o777 => Ok(mode),
        _ => Err(choice("fileMode", text, "an octal mode up to 0777, as 0555")),
    }
}

/// Parses a value that is the name of a variant.
fn variant<'a, T: Deserialize<'a>>(
    get: impl Fn(&str) -> Option<&'a str>,
    key: &str,
    known: &str,
) -> Result<Option<T>, VolumeError> {
    let Some(value) = get(key) else { return Ok(None) };
    let parsed = T::deserialize(BorrowedStrDeserializer::<serde::de::value::Error>::new(value));
    parsed.map(Some).map_err(|_| choice(key, value, known))
}

fn choice(key: &str, value: &str, known: &str) -> VolumeError {
    invalid(key, &format!("is \"{}\": use {known}", excerpt(value, 100)))
}

fn wrong(keys: &str, error: impl Display) -> VolumeError {
    VolumeError::Invalid(format!("the volume attribute {keys}: {error}"))
}

pub(super) fn invalid(key: &str, what: &str) -> VolumeError {
    VolumeError::Invalid(format!("the volume attribute \"{key}\" {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<VolumeAttributes, VolumeError> {
        let context =
            pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        VolumeAttributes::parse(&context)
    }

    fn refused(pairs: &[(&str, &str)]) -> String {
        match parse(pairs) {
            Err(VolumeError::Invalid(text)) => text,
            other => panic!("{pairs:?}: {other:?}"),
        }
    }

    const REFERENCE: (&str, &str) = ("reference", "r.io/app:v1");

    #[test]
    fn the_defaults_are_the_kubelets() {
        let policy = |reference: &str| {
            parse(&[("reference", reference)]).expect("valid").artifacts[0].pull_policy
        };
        assert_eq!(policy("r.io/app:v1"), PullPolicy::IfNotPresent);
        assert_eq!(policy("r.io/app:latest"), PullPolicy::Always);
        assert_eq!(policy("r.io/app"), PullPolicy::Always);
        let digest = Digest::of(b"");
        assert_eq!(policy(&format!("r.io/app@{digest}")), PullPolicy::IfNotPresent);
        assert_eq!(policy(&format!("r.io/app:latest@{digest}")), PullPolicy::IfNotPresent);
    }

    #[test]
    fn an_unknown_key_lists_the_known_ones() {
        let text = refused(&[REFERENCE, ("pullpolicy", "Always")]);
        assert!(text.contains("\"pullpolicy\"") && text.contains("requireSignature"), "{text}");
        parse(&[REFERENCE, ("csi.storage.k8s.io/something.new", "x")]).expect("the kubelet's own");
    }

    #[test]
    fn an_empty_value_is_an_absent_one() {
        parse(&[REFERENCE, ("tag", ""), ("platform", ""), ("fileMode", "")]).expect("valid");
        refused(&[("reference", "")]);
    }

    #[test]
    fn the_artifact_is_named_once() {
        assert!(refused(&[REFERENCE, ("tag", "v2")]).contains("twice"));
        let parts = [("repository", "r.io/app"), ("tag", "v2")];
        assert_eq!(parse(&parts).expect("valid").names(), "r.io/app:v2");
        refused(&[("tag", "v2")]);
        refused(&[]);
    }

    #[test]
    fn a_list_stands_in_place_of_one_artifact() {
        let list = ("artifacts", "- reference: r.io/a:v1\n- reference: r.io/b:v1\n  path: b\n");
        let attributes = parse(&[list, ("permissions", "Preserve"), ("fileMode", "0500")]);
        let attributes = attributes.expect("valid");
        assert_eq!(attributes.names(), "r.io/a:v1 and 1 more");
        let of_all = |of: &VolumeArtifact| {
            of.shape.permissions == PermissionsRule::Preserve && of.shape.file_mode == Some(0o500)
        };
        assert!(attributes.artifacts.iter().all(of_all));
        for other in ["reference", "repository", "tag", "digest", "include", "exclude", "subPath"] {
            let text = refused(&[list, (other, "x")]);
            assert!(text.contains(other) && text.contains("artifacts"), "{text}");
        }
        let flags = MountFlags::default();
        let print = |pairs: &[(&str, &str)]| parse(pairs).expect("valid").fingerprint(flags);
        let one = ("artifacts", "[{reference: 'r.io/a:v1'}]");
        assert_ne!(print(&[one]), print(&[("reference", "r.io/a:v1")]), "another tree");
        let json = r#"[{"reference":"r.io/a:v1"},{"path":"b/","reference":"r.io/b:v1"}]"#;
        assert_eq!(print(&[list]), print(&[("artifacts", json)]));
        let turned = "- reference: r.io/b:v1\n  path: b\n- reference: r.io/a:v1\n";
        assert_ne!(print(&[list]), print(&[("artifacts", turned)]), "the later one counts");
    }

    #[test]
    fn values_are_checked() {
        for (key, value) in [
            ("pullPolicy", "always"),
            ("ifUnavailable", "Yes"),
            ("platform", "linux"),
            ("permissions", "0777"),
            ("fileMode", "888"),
            ("fileMode", "4755"),
            ("fileMode", "+55"),
            ("unpack", "auto"),
            ("unpack", "true"),
            ("subPath", "/etc"),
            ("subPath", "a/../b"),
            ("subPath", "a\0b"),
            ("requireSignature", "TRUE"),
        ] {
            let text = refused(&[REFERENCE, (key, value)]);
            assert!(text.contains(key), "{text}");
        }
    }

    #[test]
    fn spelling_does_not_make_another_volume() {
        let flags = MountFlags::default();
        let print = |pairs: &[(&str, &str)]| parse(pairs).expect("valid").fingerprint(flags);
        let plain = print(&[REFERENCE]);
        assert_eq!(plain, print(&[REFERENCE, ("permissions", "Readable"), ("include", "")]));
        assert_eq!(plain, print(&[("repository", "r.io/app"), ("tag", "v1")]));
        assert_eq!(plain, print(&[REFERENCE, ("unpack", "Auto")]));
        assert_ne!(plain, print(&[REFERENCE, ("unpack", "Never")]));
        assert_eq!(plain, print(&[REFERENCE, ("subPath", "./")]));
        let part = print(&[REFERENCE, ("subPath", "a/b")]);
        assert_ne!(plain, part);
        assert_eq!(part, print(&[REFERENCE, ("subPath", "./a//b/")]));
        assert_ne!(plain, print(&[REFERENCE, ("fileMode", "0555")]));
        assert_ne!(plain, print(&[("reference", "r.io/app:v2")]));
        assert_ne!(plain, print(&[REFERENCE, ("follow", "5m")]));
        assert_eq!(print(&[REFERENCE, ("follow", "5m")]), print(&[REFERENCE, ("follow", "300s")]));
    }
}
