//! Manifests and indexes, as the OCI image specification and Docker's schema 2
//! define them, parsed from untrusted bytes.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use base64::Engine as _;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use text::printable::excerpt;

use super::digest::{Digest, DigestError};
use super::media_type;
use super::platform::{Platform, PlatformOrder};

/// A reference to content, with the metadata that the manifest gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The content's media type, without parameters, in lower case.
    pub media_type: String,
    /// The digest of the content.
    pub digest: Digest,
    /// The length of the content in bytes.
    pub size: u64,
    /// The annotations of [`KNOWN_ANNOTATIONS`]. Other annotations are not kept, since their number and
    /// length have no limit.
    pub annotations: BTreeMap<String, String>,
    /// The content itself, if the manifest has it inline.
    pub data: Option<Vec<u8>>,
    /// The platform of an index's entry.
    pub platform: Option<Platform>,
    /// The artifact type of an index's entry.
    pub artifact_type: Option<String>,
}

/// A document that a reference can resolve to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifest {
    /// The manifest of one image or artifact.
    Image(ImageManifest),
    /// An index of manifests for several platforms.
    Index(ImageIndex),
}

/// The manifest of one image or artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageManifest {
    /// `artifactType` as written; see [`ImageManifest::kind`].
    pub artifact_type: Option<String>,
    /// The configuration, which the old artifact manifest does not have.
    pub config: Option<Box<Descriptor>>,
    /// The layers, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// An index of manifests for several platforms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageIndex {
    /// The entries in the order of the index, without those of [`UnsupportedEntry`].
    pub manifests: Vec<Descriptor>,
    unsupported: Vec<UnsupportedEntry>,
}

/// An index's entry whose digest has an algorithm that is not supported. It matters only for requests that it
/// would serve.
#[derive(Clone, Debug, PartialEq, Eq)]
struct UnsupportedEntry {
    platform: Option<Platform>,
    error: DigestError,
}

/// The annotations that the driver reads.
pub const KNOWN_ANNOTATIONS: [&str; 14] = [
    // Titles of files, and names of manifests in an image layout: a tag, and the whole reference.
    "org.opencontainers.image.title",
    "org.opencontainers.image.ref.name",
    "io.containerd.image.name",
    // Folders that ORAS packs.
    "io.deis.oras.content.unpack",
    "io.deis.oras.content.digest",
    // Files of ModelPack, with its older name as well.
    "org.cncf.model.filepath",
    "org.cnai.model.filepath",
    "org.cncf.model.file.metadata+json",
    "org.cnai.model.file.metadata+json",
    // The mark of an index's entries that are attestations.
    "vnd.docker.reference.type",
    SIGNATURE_ANNOTATION,
    CERTIFICATE_ANNOTATION,
    LOG_ENTRY_ANNOTATION,
    TIMESTAMP_ANNOTATION,
];

/// The annotation in which the descriptor of a simple signature's layer carries the signature.
pub const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// The annotation with the certificate, if the signature is keyless.
pub const CERTIFICATE_ANNOTATION: &str = "dev.sigstore.cosign/certificate";
/// The annotation with the transparency log's entry.
pub const LOG_ENTRY_ANNOTATION: &str = "dev.sigstore.cosign/bundle";
/// The annotation with a timestamp authority's answer.
pub const TIMESTAMP_ANNOTATION: &str = "dev.sigstore.cosign/rfc3161timestamp";
/// The maximum length of an annotation in bytes, several times that of a path, a signature or a
/// record of a file.
const ANNOTATION_BYTES: usize = 64 << 10;
/// The maximum length of a media type or an artifact type in characters, several times that of any
/// registered one.
const TYPE_CHARACTERS: usize = 256;

/// The maximum number of levels of indexes. The referenced index is the first.
const INDEX_LEVELS: usize = 4;
/// The maximum number of indexes, the referenced one included. Each takes a request.
const MOST_INDEXES: usize = 32;
/// The maximum number of features of an operating system that are kept of a platform.
const MOST_FEATURES: usize = 4;
/// The maximum length of a part of a platform in characters, which messages show.
const PLATFORM_CHARACTERS: usize = 64;
/// The media type of a layer that names none, as ORAS reads it.
const UNKNOWN_CONTENT: &str = "application/octet-stream";

/// The bounds of a manifest.
#[derive(Clone, Copy, Debug)]
pub struct ManifestLimits {
    /// The maximum number of layers of a manifest, and of entries of an index.
    pub layers: usize,
    /// The maximum size in bytes that a descriptor may announce.
    pub blob_bytes: u64,
}

/// The reason that bytes are not a usable manifest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    /// The bytes are not JSON, or not of a manifest's structure.
    #[error("the manifest cannot be decoded: {0}")]
    Undecodable(String),
    /// A descriptor has a malformed or unsupported digest.
    #[error("a descriptor of the manifest: {0}")]
    Digest(DigestError),
    /// A descriptor has a size below zero.
    #[error("the manifest gives {digest} a size of {size} bytes")]
    NegativeSize {
        /// The digest of the descriptor.
        digest: Digest,
        /// The size in the descriptor.
        size: i64,
    },
    /// The configuration of an image cannot be decoded.
    #[error("the image's configuration cannot be decoded ({0}): push the image again")]
    Config(String),
    /// Inline data is not base64, or does not match its descriptor.
    #[error("the inline data of {0} does not match its descriptor")]
    Data(Digest),
    /// The document has a media type that holds nothing to mount.
    #[error("manifests of type \"{0}\" are not supported: push an OCI image manifest or index")]
    MediaType(String),
    /// The document has more layers or entries than the limit.
    #[error("the manifest has {count} layers or entries, the limit is {limit} (limits.layers)")]
    TooManyLayers {
        /// The number of layers or entries.
        count: usize,
        /// The maximum number.
        limit: usize,
    },
    /// A descriptor announces more bytes than the limit.
    #[error(
        "the manifest announces {size} bytes for {digest}, the limit is {limit} (limits.blobBytes)"
    )]
    BlobTooLarge {
        /// The digest of the blob.
        digest: Digest,
        /// The announced size in bytes.
        size: u64,
        /// The maximum size in bytes.
        limit: u64,
    },
    /// No entry of an index is for the requested platform.
    #[error(
        "the index has nothing for {wanted}; it has {offered}: set the attribute \"platform\" or push that platform"
    )]
    NoPlatform {
        /// The requested platform.
        wanted: String,
        /// The platforms of the entries.
        offered: String,
    },
    /// The configuration of a single manifest names another platform.
    #[error(
        "the artifact is for {found}, not for {wanted}: set the attribute \"platform\" to mount it all the same"
    )]
    OtherPlatform {
        /// The requested platform.
        wanted: String,
        /// The platform of the configuration.
        found: String,
    },
    /// Nested indexes exceed the bounds.
    #[error(
        "the index's entry {0} is one index too many, since at most {INDEX_LEVELS} levels of indexes and {MOST_INDEXES} indexes in total are read: reference that index by its own digest"
    )]
    NestedIndex(Digest),
}

/// A manifest or an index without its descriptors, to bound their number before they are parsed.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a manifest")]
struct ManifestOutline {
    schema_version: Option<i64>,
    media_type: Option<String>,
    layers: Option<Vec<IgnoredAny>>,
    blobs: Option<Vec<IgnoredAny>>,
    manifests: Option<Vec<IgnoredAny>>,
}

/// A manifest or an index before it is checked, without unknown fields.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a manifest")]
struct ManifestFields {
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    blobs: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: Option<String>,
    digest: String,
    size: Option<i64>,
    annotations: Option<KnownAnnotations>,
    data: Option<String>,
    platform: Option<RawPlatform>,
    artifact_type: Option<String>,
}

/// The annotations of [`KNOWN_ANNOTATIONS`] that a descriptor has.
#[derive(Default)]
struct KnownAnnotations(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for KnownAnnotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(AnnotationReader)
    }
}

struct AnnotationReader;

impl<'de> Visitor<'de> for AnnotationReader {
    type Value = KnownAnnotations;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("annotations")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut known = KnownAnnotations::default();
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            // A value that is not a string is an error for unknown annotations as well.
            let Some(BorrowedText(value)) = map.next_value()? else { continue };
            if !KNOWN_ANNOTATIONS.contains(&&*key) {
                continue;
            }
            if value.len() > ANNOTATION_BYTES {
                return Err(serde::de::Error::custom(format_args!(
                    "the annotation {key} has {} bytes, the most is {ANNOTATION_BYTES}",
                    value.len()
                )));
            }
            known.0.insert(key.into_owned(), value.into_owned());
        }
        Ok(known)
    }
}

/// A string that borrows from the document unless it has escape sequences.
#[derive(Deserialize)]
struct BorrowedText<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
struct RawPlatform {
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
    #[serde(rename = "os.features")]
    features: Option<OsFeatures>,
}

/// The first features of an operating system that a platform names. Their number has no limit in a document.
#[derive(Default)]
struct OsFeatures(Vec<String>);

impl<'de> Deserialize<'de> for OsFeatures {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(OsFeaturesReader)
    }
}

struct OsFeaturesReader;

impl<'de> Visitor<'de> for OsFeaturesReader {
    type Value = OsFeatures;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of features")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut features: Vec<String> = Vec::new();
        while let Some(BorrowedText(feature)) = list.next_element()? {
            let feature: String = feature.chars().take(PLATFORM_CHARACTERS).collect();
            if features.len() < MOST_FEATURES && !features.contains(&feature) {
                features.push(feature);
            }
        }
        Ok(OsFeatures(features))
    }
}

impl Manifest {
    /// Parses a manifest. `content_type` is the registry's header. The document's
    /// own `mediaType` takes precedence, and its fields decide if neither is known.
    ///
    /// # Errors
    ///
    /// See [`ManifestError`]. No input is trusted before it is checked.
    pub fn parse(
        bytes: &[u8],
        content_type: Option<&str>,
        limits: ManifestLimits,
    ) -> Result<Self, ManifestError> {
        // The error may quote any part of the document.
        let undecodable =
            |error: serde_json::Error| ManifestError::Undecodable(excerpt(&error.to_string(), 300));
        let outline: ManifestOutline = serde_json::from_slice(bytes).map_err(undecodable)?;
        let declared = outline.media_type.as_deref().or(content_type).map(media_type::essence);
        let declared =
            declared.filter(|declared| media_type::MANIFESTS.contains(&declared.as_str()));
        // An error page or Docker's schema 1 gets another error than a broken manifest.
        if declared.is_none() {
            if let Some(other) = outline.media_type.as_deref() {
                return Err(ManifestError::MediaType(excerpt(other, 200)));
            }
            if outline.schema_version == Some(1) {
                return Err(ManifestError::MediaType("Docker schema 1".into()));
            }
        }
        let lists = [outline.layers, outline.blobs, outline.manifests].into_iter().flatten();
        let (count, limit) =
            (lists.map(|list| list.len()).max().unwrap_or_default(), limits.layers);
        if count > limit {
            return Err(ManifestError::TooManyLayers { count, limit });
        }
        let raw: ManifestFields = serde_json::from_slice(bytes).map_err(undecodable)?;
        // Registries differ in the types of the same document, so its fields decide once the type is supported.
        match (raw.layers, raw.manifests, raw.blobs) {
            (Some(_), Some(_), _) => {
                Err(ManifestError::Undecodable("it has both \"layers\" and \"manifests\"".into()))
            }
            (Some(layers), None, _) => Self::image(raw.artifact_type, raw.config, layers, limits),
            (None, Some(manifests), _) => ImageIndex::of(manifests, limits).map(Self::Index),
            (None, None, Some(blobs)) => Self::image(raw.artifact_type, None, blobs, limits),
            // An empty manifest or index may leave both out.
            (None, None, None) if outline.media_type.is_some() || raw.config.is_some() => {
                match declared.as_deref() {
                    Some(media_type::OCI_INDEX | media_type::DOCKER_INDEX) => {
                        Ok(Self::Index(ImageIndex::default()))
                    }
                    _ => Self::image(raw.artifact_type, raw.config, Vec::new(), limits),
                }
            }
            (None, None, None) => Err(ManifestError::Undecodable(
                "it has neither \"layers\" nor \"manifests\"".into(),
            )),
        }
    }

    fn image(
        artifact_type: Option<String>,
        config: Option<RawDescriptor>,
        layers: Vec<RawDescriptor>,
        limits: ManifestLimits,
    ) -> Result<Self, ManifestError> {
        let layer = |mut raw: RawDescriptor| {
            raw.media_type.get_or_insert_with(|| UNKNOWN_CONTENT.to_owned());
            descriptor(raw, limits)
        };
        Ok(Self::Image(ImageManifest {
            artifact_type: artifact_type.filter(|kind| !kind.is_empty()).map(truncated),
            config: config.map(|config| config_descriptor(config, limits)).transpose()?,
            layers: layers.into_iter().map(layer).collect::<Result<_, _>>()?,
        }))
    }
}

impl ImageManifest {
    /// Returns the artifact's type for display: `artifactType`, else the configuration's media type.
    pub fn kind(&self) -> &str {
        let config = self.config.as_ref().map(|config| config.media_type.as_str());
        self.artifact_type.as_deref().or(config).unwrap_or("unknown")
    }

    /// Returns whether this is an ordinary runnable image, whose configuration names a platform. It is
    /// none if it has an `artifactType`, even beside an image's configuration, as `oras push
    /// --artifact-platform` writes it. Nor is it one if no layer is an image's, as in models.
    pub fn is_image(&self) -> bool {
        self.artifact_type.is_none()
            && self.has_image_config()
            && self.layers.iter().any(|layer| media_type::is_image_layer(&layer.media_type))
    }

    /// Returns whether a layer has a title, as files do.
    pub fn has_titles(&self) -> bool {
        let title = "org.opencontainers.image.title";
        self.layers.iter().any(|layer| layer.annotations.contains_key(title))
    }

    fn has_image_config(&self) -> bool {
        self.config.as_ref().is_some_and(|config| {
            [media_type::OCI_IMAGE_CONFIG, media_type::DOCKER_IMAGE_CONFIG]
                .contains(&config.media_type.as_str())
        })
    }
}

impl ImageIndex {
    fn of(entries: Vec<RawDescriptor>, limits: ManifestLimits) -> Result<Self, ManifestError> {
        let mut index = Self::default();
        for raw in entries {
            let Err(error @ DigestError::Algorithm(_)) = raw.digest.parse::<Digest>() else {
                index.manifests.push(descriptor(raw, limits)?);
                continue;
            };
            let platform = raw.platform.and_then(platform);
            if !is_attestation(platform.as_ref(), &raw.annotations.unwrap_or_default().0) {
                index.unsupported.push(UnsupportedEntry { platform, error });
            }
        }
        Ok(index)
    }

    /// Chooses the entry for a platform on this node: the best that its processor runs, else the only
    /// entry without a platform. Attestations (`unknown/unknown`) are never chosen.
    ///
    /// # Errors
    ///
    /// [`ManifestError::NoPlatform`], with the platforms of the entries. [`ManifestError::Digest`] if only an entry
    /// with a digest of another algorithm is for the platform, or the best one is.
    pub fn choose(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        self.choose_by(wanted, &wanted.order_on_this_node())
    }

    /// Chooses the entry for a platform on any node, as [`ImageIndex::choose`] does on this one.
    ///
    /// # Errors
    ///
    /// Those of [`ImageIndex::choose`].
    pub fn choose_for_any_node(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        self.choose_by(wanted, &wanted.order())
    }

    fn choose_by(
        &self,
        wanted: &Platform,
        order: &PlatformOrder,
    ) -> Result<&Descriptor, ManifestError> {
        let candidates: Vec<_> =
            self.manifests.iter().filter(|entry| !entry.is_attestation()).collect();
        let ranked = candidates.iter().filter_map(|entry| {
            let rank = entry.platform.as_ref().and_then(|platform| order.rank(platform))?;
            Some((rank, *entry))
        });
        // `min_by_key` returns the first of equal entries.
        let best = ranked.min_by_key(|(rank, _)| *rank);
        let unsupported = self.unsupported.iter().filter_map(|entry| {
            let rank = entry.platform.as_ref().and_then(|platform| order.rank(platform))?;
            Some((rank, &entry.error))
        });
        match (best, unsupported.min_by_key(|(rank, _)| *rank)) {
            (Some((rank, _)), Some((better, error))) if better < rank => {
                return Err(ManifestError::Digest(error.clone()));
            }
            (Some((_, entry)), _) => return Ok(entry),
            (None, Some((_, error))) => return Err(ManifestError::Digest(error.clone())),
            (None, None) => {}
        }
        // Artifact indexes often name no platforms. Then only a single entry leaves no wrong choice.
        let supported = candidates.iter().map(|entry| (entry.platform.as_ref(), Ok(*entry)));
        let unsupported = self.unsupported.iter();
        let unsupported = unsupported.map(|entry| (entry.platform.as_ref(), Err(&entry.error)));
        let all = || supported.clone().chain(unsupported.clone());
        let mut without = all().filter(|(platform, _)| platform.is_none());
        if let (Some((_, entry)), None) = (without.next(), without.next()) {
            return entry.map_err(|error| ManifestError::Digest(error.clone()));
        }
        let offered: Vec<_> = all()
            .take(20)
            .map(|(platform, _)| platform.map_or("no platform".into(), Platform::to_string))
            .collect();
        let offered = if offered.is_empty() { "no manifests".into() } else { offered.join(", ") };
        Err(ManifestError::NoPlatform { wanted: wanted.to_string(), offered })
    }
}

/// The entries of an index, and of the indexes in it as if their entries stood in their place.
#[derive(Debug)]
pub struct IndexEntries {
    /// Indexes for platforms that are not in it are not read.
    order: Option<PlatformOrder>,
    most: usize,
    entries: ImageIndex,
    /// Indexes that were not read yet, with their depth.
    nested: VecDeque<(Descriptor, usize)>,
    /// The number of indexes that were found, the referenced one included.
    found: usize,
    /// The depth of the index that is read now. That of the referenced one is 0.
    depth: usize,
}

impl IndexEntries {
    /// Starts with the index that is referenced, for all its platforms.
    ///
    /// # Errors
    ///
    /// Those of [`IndexEntries::insert`].
    pub fn for_all_platforms(
        index: ImageIndex,
        limits: ManifestLimits,
    ) -> Result<Self, ManifestError> {
        Self::new(index, None, limits)
    }

    fn new(
        index: ImageIndex,
        order: Option<PlatformOrder>,
        limits: ManifestLimits,
    ) -> Result<Self, ManifestError> {
        let mut this = Self {
            order,
            most: limits.layers,
            entries: ImageIndex::default(),
            nested: VecDeque::new(),
            found: 1,
            depth: 0,
        };
        this.add(index, None)?;
        Ok(this)
    }

    /// Returns the next index that has to be read, and then inserted.
    pub fn next_index(&mut self) -> Option<Descriptor> {
        let (index, depth) = self.nested.pop_front()?;
        self.depth = depth;
        Some(index)
    }

    /// Inserts what was read for the last [`IndexEntries::next_index`].
    ///
    /// # Errors
    ///
    /// More indexes or entries than the bounds.
    pub fn insert(&mut self, of: Descriptor, document: Manifest) -> Result<(), ManifestError> {
        match document {
            Manifest::Image(_) => self.entries.manifests.push(of),
            Manifest::Index(index) => self.add(index, of.platform.as_ref())?,
        }
        Ok(())
    }

    /// Returns all entries that were inserted, as an index without indexes.
    pub const fn index(&self) -> &ImageIndex {
        &self.entries
    }

    fn add(&mut self, index: ImageIndex, of: Option<&Platform>) -> Result<(), ManifestError> {
        for mut entry in index.manifests.into_iter().filter(|entry| !entry.is_attestation()) {
            entry.platform = entry.platform.or_else(|| of.cloned());
            // Several indexes are in memory at once, so that their entries keep the fields of the choice alone.
            entry.annotations.clear();
            entry.data = entry.data.filter(|_| self.depth == 0);
            let may_fit = match (&self.order, &entry.platform) {
                (Some(order), Some(platform)) => order.rank(platform).is_some(),
                _ => true,
            };
            if !entry.is_index() || !may_fit {
                self.entries.manifests.push(entry);
                continue;
            }
            self.found += 1;
            if self.depth + 1 == INDEX_LEVELS || self.found > MOST_INDEXES {
                return Err(ManifestError::NestedIndex(entry.digest));
            }
            self.nested.push_back((entry, self.depth + 1));
        }
        self.entries.unsupported.extend(index.unsupported.into_iter().map(|entry| {
            UnsupportedEntry { platform: entry.platform.or_else(|| of.cloned()), ..entry }
        }));
        let count = self.entries.manifests.len() + self.entries.unsupported.len();
        if count > self.most {
            return Err(ManifestError::TooManyLayers { count, limit: self.most });
        }
        Ok(())
    }
}

/// The way from the document that is referenced to the manifest for one platform on this node.
///
/// It reads nothing itself: its caller reads each document that [`ManifestChoice::step`] returns, and
/// inserts it. Nested indexes are read if they may have an entry for the platform.
#[derive(Debug)]
pub struct ManifestChoice {
    wanted: Platform,
    limits: ManifestLimits,
    entries: IndexEntries,
    /// All indexes were read: the next document is the chosen one.
    is_chosen: bool,
    chosen: Option<ChosenManifest>,
}

/// The next step of a choice.
#[derive(Debug)]
pub enum ChoiceStep {
    /// This document has to be read and inserted.
    Read(Descriptor),
    /// The choice is complete.
    Chosen(ChosenManifest),
}

/// The manifest for a platform.
#[derive(Debug)]
pub struct ChosenManifest {
    /// The digest of the manifest.
    pub digest: Digest,
    /// The parsed image manifest.
    pub image: ImageManifest,
    /// Set if an index names its platform. Otherwise its configuration may.
    pub has_platform: bool,
}

impl ManifestChoice {
    /// Starts with the document that is referenced, for a platform on this node.
    ///
    /// # Errors
    ///
    /// [`ManifestError::NoPlatform`] where no index has to be read to know it, and those of
    /// [`IndexEntries::insert`].
    pub fn new(
        digest: Digest,
        document: Manifest,
        wanted: &Platform,
        limits: ManifestLimits,
    ) -> Result<Self, ManifestError> {
        let (index, chosen) = match document {
            Manifest::Index(index) => (index, None),
            Manifest::Image(image) => {
                (ImageIndex::default(), Some(ChosenManifest { digest, image, has_platform: false }))
            }
        };
        let entries = IndexEntries::new(index, Some(wanted.order_on_this_node()), limits)?;
        if chosen.is_none() && entries.nested.is_empty() {
            entries.index().choose(wanted)?;
        }
        Ok(Self { wanted: wanted.clone(), limits, entries, is_chosen: false, chosen })
    }

    /// Returns the next document to read, or the manifest in the end.
    ///
    /// # Errors
    ///
    /// [`ManifestError::NoPlatform`], with the platforms of the entries.
    pub fn step(&mut self) -> Result<ChoiceStep, ManifestError> {
        if let Some(chosen) = self.chosen.take() {
            return Ok(ChoiceStep::Chosen(chosen));
        }
        if let Some(index) = self.entries.next_index() {
            return Ok(ChoiceStep::Read(index));
        }
        self.is_chosen = true;
        self.entries.index().choose(&self.wanted).cloned().map(ChoiceStep::Read)
    }

    /// Inserts what was read for the last [`ManifestChoice::step`].
    ///
    /// # Errors
    ///
    /// Those of [`Manifest::parse`] and [`IndexEntries::insert`].
    pub fn insert(&mut self, of: Descriptor, bytes: &[u8]) -> Result<(), ManifestError> {
        let document = Manifest::parse(bytes, Some(&of.media_type), self.limits)?;
        match document {
            document if !self.is_chosen => self.entries.insert(of, document)?,
            Manifest::Index(_) => return Err(ManifestError::NestedIndex(of.digest)),
            Manifest::Image(image) => {
                let (digest, has_platform) = (of.digest, of.platform.is_some());
                self.chosen = Some(ChosenManifest { digest, image, has_platform });
            }
        }
        Ok(())
    }

    /// Returns the manifest, if it was just inserted.
    pub fn chosen(&self) -> Option<&ImageManifest> {
        self.chosen.as_ref().map(|chosen| &chosen.image)
    }
}

impl Descriptor {
    fn is_index(&self) -> bool {
        [media_type::OCI_INDEX, media_type::DOCKER_INDEX].contains(&self.media_type.as_str())
    }

    fn is_attestation(&self) -> bool {
        is_attestation(self.platform.as_ref(), &self.annotations)
    }
}

/// Returns whether an entry is an attestation of another entry, which cannot be chosen.
fn is_attestation(platform: Option<&Platform>, annotations: &BTreeMap<String, String>) -> bool {
    let is_unknown =
        |platform: &Platform| platform.os == "unknown" || platform.architecture == "unknown";
    platform.is_some_and(is_unknown) || annotations.contains_key("vnd.docker.reference.type")
}

/// Checks that an image's configuration names no platform, or one that can serve a request for
/// `wanted` on this node.
///
/// # Errors
///
/// [`ManifestError::OtherPlatform`], and [`ManifestError::Config`] for a malformed configuration.
pub fn check_config_platform(config: &[u8], wanted: &Platform) -> Result<(), ManifestError> {
    let Some(found) = config_platform(config)? else { return Ok(()) };
    if wanted.order_on_this_node().rank(&found).is_some() {
        return Ok(());
    }
    let (wanted, found) = (wanted.to_string(), found.to_string());
    Err(ManifestError::OtherPlatform { wanted, found })
}

/// Returns the platform that an image's configuration names, if it names any.
///
/// # Errors
///
/// [`ManifestError::Config`] for a malformed configuration.
pub fn config_platform(config: &[u8]) -> Result<Option<Platform>, ManifestError> {
    // The message of `serde_json` could quote the configuration, which may be secret.
    let undecodable = |error: serde_json::Error| {
        let (line, column) = (error.line(), error.column());
        let what = if error.is_data() { "a value of another type" } else { "no JSON" };
        ManifestError::Config(format!("{what} at line {line}, column {column}"))
    };
    // As in containerd, features of the system decide between entries of an index only.
    let raw: RawPlatform = serde_json::from_slice(config).map_err(undecodable)?;
    Ok(platform(RawPlatform { features: None, ..raw }))
}

/// Returns a platform with a bounded length, or none without an architecture.
fn platform(raw: RawPlatform) -> Option<Platform> {
    let named = |text: Option<String>| {
        let text = text.filter(|text| !text.is_empty());
        text.map(|text| text.chars().take(PLATFORM_CHARACTERS).collect::<String>())
    };
    Some(Platform {
        architecture: named(raw.architecture)?,
        os: named(raw.os).unwrap_or_else(|| "linux".to_owned()),
        variant: named(raw.variant),
        features: raw.features.unwrap_or_default().0,
    })
}

fn descriptor(raw: RawDescriptor, limits: ManifestLimits) -> Result<Descriptor, ManifestError> {
    let missing = |what| ManifestError::Undecodable(format!("a descriptor has no \"{what}\""));
    let digest: Digest = raw.digest.parse().map_err(ManifestError::Digest)?;
    let media_type = raw.media_type.ok_or_else(|| missing("mediaType"))?;
    let size = raw.size.ok_or_else(|| missing("size"))?;
    let size = u64::try_from(size).map_err(|_| ManifestError::NegativeSize { digest, size })?;
    if size > limits.blob_bytes {
        return Err(ManifestError::BlobTooLarge { digest, size, limit: limits.blob_bytes });
    }
    // Go leaves out what is empty, and other writers write it.
    let data = raw.data.filter(|data| size == 0 || !data.is_empty());
    let data = data.map(|data| inline(&data, digest, size)).transpose()?;
    Ok(Descriptor {
        media_type: truncated(media_type::essence(&media_type)),
        digest,
        size,
        annotations: raw.annotations.unwrap_or_default().0,
        data,
        platform: raw.platform.and_then(platform),
        artifact_type: raw.artifact_type.map(truncated),
    })
}

/// Converts the descriptor of a configuration. Few artifacts need more of it than the digest, so a
/// missing media type becomes empty, and a missing size 0 bytes.
fn config_descriptor(
    raw: RawDescriptor,
    limits: ManifestLimits,
) -> Result<Box<Descriptor>, ManifestError> {
    let media_type = Some(raw.media_type.unwrap_or_default());
    let size = Some(raw.size.unwrap_or_default());
    descriptor(RawDescriptor { media_type, size, ..raw }, limits).map(Box::new)
}

/// Truncates a type to [`TYPE_CHARACTERS`].
fn truncated(text: String) -> String {
    match text.char_indices().nth(TYPE_CHARACTERS) {
        Some((end, _)) => text[..end].to_owned(),
        None => text,
    }
}

fn inline(data: &str, digest: Digest, size: u64) -> Result<Vec<u8>, ManifestError> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(data)
        .map_err(|_| ManifestError::Data(digest))?;
    let matches = bytes.len() as u64 == size && Digest::of(&bytes) == digest;
    matches.then_some(bytes).ok_or(ManifestError::Data(digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ManifestLimits = ManifestLimits { layers: 3, blob_bytes: 1 << 40 };
    const EMPTY: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse(text.as_bytes(), None, LIMITS)
    }

    fn layer(size: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"a/b","digest":"{EMPTY}","size":{size}{more}}}"#)
    }

    fn with_layers(layers: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","layers":[{layers}]}}"#,
            media_type::OCI_MANIFEST
        )
    }

    fn entry(os: &str, architecture: &str) -> String {
        layer("2", &format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#))
    }

    fn index(entries: &[String]) -> ImageIndex {
        match parse(&format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))) {
            Ok(Manifest::Index(index)) => index,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn inline_data_is_checked() {
        assert!(parse(&with_layers(&layer("2", r#","data":"e30=""#))).is_ok());
        for data in ["e30", "W10=", "%%%"] {
            let text = with_layers(&layer("2", &format!(r#","data":"{data}""#)));
            assert!(matches!(parse(&text), Err(ManifestError::Data(_))), "{data}");
        }
    }

    #[test]
    fn empty_inline_data_is_absent_unless_the_content_is_empty() {
        let text = with_layers(&layer("2", r#","data":"""#));
        let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
        assert_eq!(image.layers[0].data, None);
        let empty =
            format!(r#"{{"mediaType":"a/b","digest":"{}","size":0,"data":""}}"#, Digest::of(b""));
        let text = with_layers(&empty);
        let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
        assert_eq!(image.layers[0].data, Some(Vec::new()));
    }

    #[test]
    fn a_layer_without_a_media_type_is_of_unknown_content() {
        for media_type in ["", r#""mediaType":null,"#] {
            let layer = format!(r#"{{{media_type}"digest":"{EMPTY}","size":2}}"#);
            let text = with_layers(&layer);
            let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
            assert_eq!(image.layers[0].media_type, "application/octet-stream");
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{layer}]}}"#);
            assert!(matches!(parse(&text), Err(ManifestError::Undecodable(_))), "{text}");
        }
    }

    #[test]
    fn sizes_are_checked() {
        let negative = parse(&with_layers(&layer("-1", "")));
        assert!(matches!(negative, Err(ManifestError::NegativeSize { .. })));
        let absurd = parse(&with_layers(&layer("9223372036854775807", "")));
        assert!(matches!(absurd, Err(ManifestError::BlobTooLarge { .. })));
        let huge = parse(&with_layers(&layer("99999999999999999999", "")));
        assert!(matches!(huge, Err(ManifestError::Undecodable(_))));
    }

    #[test]
    fn too_many_layers_are_refused() {
        let layers = vec![layer("2", ""); 4].join(",");
        assert_eq!(
            parse(&with_layers(&layers)),
            Err(ManifestError::TooManyLayers { count: 4, limit: 3 })
        );
    }

    #[test]
    fn documents_that_are_no_manifests_are_named() {
        assert!(matches!(parse("<html>"), Err(ManifestError::Undecodable(_))));
        assert!(matches!(parse("{}"), Err(ManifestError::Undecodable(_))));
        let helm = r#"{"schemaVersion":2,"mediaType":"application/x","layers":[]}"#;
        assert!(matches!(parse(helm), Err(ManifestError::MediaType(_))));
        let schema1 = r#"{"schemaVersion":1,"fsLayers":[]}"#;
        assert!(matches!(parse(schema1), Err(ManifestError::MediaType(_))));
    }

    #[test]
    fn unknown_fields_and_annotations_are_not_kept() {
        let many: Vec<_> = (0..1000).map(|n| format!(r#""a{n}":"{n}","#)).collect();
        let many = many.concat();
        let annotations = format!(
            r#","annotations":{{{many}"org.opencontainers.image.title":"t","escap\u0065d":"\u0041"}},"more":[[{{}}]]"#
        );
        let text = with_layers(&layer("2", &annotations));
        let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
        let kept: Vec<_> = image.layers[0].annotations.iter().collect();
        assert_eq!(kept, [(&KNOWN_ANNOTATIONS[0].to_owned(), &"t".to_owned())]);
        let null = with_layers(&layer("2", r#","annotations":null"#));
        assert!(parse(&null).is_ok());
        for wrong in [r#","annotations":{"a":1}"#, r#","annotations":[]"#] {
            let refused = parse(&with_layers(&layer("2", wrong)));
            assert!(matches!(refused, Err(ManifestError::Undecodable(_))), "{wrong}");
        }
    }

    #[test]
    fn annotations_and_types_have_a_maximum_length() {
        let title = "t".repeat(ANNOTATION_BYTES + 1);
        let title = format!(r#","annotations":{{"{}":"{title}"}}"#, KNOWN_ANNOTATIONS[0]);
        let error = parse(&with_layers(&layer("2", &title))).expect_err("too long").to_string();
        assert!(error.contains("has 65537 bytes") && error.len() < 300, "{error}");
        let kind = "k".repeat(100_000);
        let text = format!(r#"{{"schemaVersion":2,"artifactType":"{kind}","layers":[]}}"#);
        let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
        assert_eq!(image.kind().len(), TYPE_CHARACTERS);
        let twice = r#"{"schemaVersion":2,"layers":[],"layers":[]}"#;
        assert!(matches!(parse(twice), Err(ManifestError::Undecodable(_))));
        assert!(matches!(parse(r#"{"layers":[]} x"#), Err(ManifestError::Undecodable(_))));
    }

    #[test]
    fn empty_documents_may_leave_their_lists_out() {
        let config = layer("2", "");
        for list in ["", r#","layers":null"#, r#","layers":[]"#] {
            let text = format!(r#"{{"schemaVersion":2,"config":{config}{list}}}"#);
            let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
            assert!(image.layers.is_empty());
        }
        for list in ["", r#","manifests":null"#] {
            let kind = media_type::OCI_INDEX;
            let text = format!(r#"{{"schemaVersion":2,"mediaType":"{kind}"{list}}}"#);
            assert_eq!(parse(&text), Ok(Manifest::Index(ImageIndex::default())));
        }
        assert!(matches!(parse(r#"{"schemaVersion":2}"#), Err(ManifestError::Undecodable(_))));
    }

    #[test]
    fn a_configuration_may_lack_its_size_and_an_annotation_its_value() {
        for size in ["", r#","size":null"#] {
            let config = format!(r#"{{"mediaType":"a/b","digest":"{EMPTY}"{size}}}"#);
            let text = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
            assert!(parse(&text).is_ok(), "{:?}", parse(&text));
            let as_layer = with_layers(&config);
            assert!(matches!(parse(&as_layer), Err(ManifestError::Undecodable(_))));
        }
        let title = KNOWN_ANNOTATIONS[0];
        let text =
            with_layers(&layer("2", &format!(r#","annotations":{{"{title}":null,"a":null}}"#)));
        let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
        assert!(image.layers[0].annotations.is_empty());
    }

    #[test]
    fn only_images_have_a_platform() {
        let image = |config: &str, kind: &str, more: &str| {
            let descriptor =
                |kind: &str| format!(r#"{{"mediaType":"{kind}","digest":"{EMPTY}","size":2}}"#);
            let (config, layer) = (descriptor(config), descriptor(kind));
            let text =
                format!(r#"{{"schemaVersion":2{more},"config":{config},"layers":[{layer}]}}"#);
            let Ok(Manifest::Image(image)) = parse(&text) else { panic!("{:?}", parse(&text)) };
            image.is_image()
        };
        let docker = media_type::DOCKER_IMAGE_CONFIG;
        assert!(image(docker, "application/vnd.docker.image.rootfs.diff.tar.gzip", ""));
        assert!(!image(docker, "application/vnd.ollama.image.model", ""));
        let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
        assert!(image(media_type::OCI_IMAGE_CONFIG, layer, ""));
        assert!(!image(media_type::OCI_IMAGE_CONFIG, layer, r#","artifactType":"a/b""#));
        assert!(!image("a/b", layer, ""));
    }

    #[test]
    fn a_malformed_configuration_is_not_quoted() {
        let platform: Platform = "linux/amd64".parse().expect("a platform");
        for config in ["secret", r#"{"os":["secret"]}"#, "{\"os\":\"secret", ""] {
            let error = check_config_platform(config.as_bytes(), &platform).expect_err("none");
            assert!(matches!(error, ManifestError::Config(_)), "{error:?}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        for config in ["{}", r#"{"os":null,"architecture":""}"#, r#"{"architecture":"amd64"}"#] {
            assert_eq!(check_config_platform(config.as_bytes(), &platform), Ok(()), "{config}");
        }
        let other = check_config_platform(br#"{"architecture":"s390x"}"#, &platform);
        assert!(matches!(other, Err(ManifestError::OtherPlatform { .. })));
    }

    /// Returns an entry that is an index, with a number in its digest.
    fn nested(number: usize, platform: &str) -> String {
        let (kind, digest) = (media_type::OCI_INDEX, Digest::of(number.to_string().as_bytes()));
        format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":2{platform}}}"#)
    }

    /// Chooses through nested indexes, whose entries the function returns.
    fn choose_through(
        top: &[String],
        of: impl Fn(&Descriptor) -> Vec<String>,
    ) -> Result<Descriptor, ManifestError> {
        let wanted: Platform = "linux/s390x".parse().expect("a platform");
        let limits = ManifestLimits { layers: 100, ..LIMITS };
        let with = |entries: &[String]| {
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
            text.into_bytes()
        };
        let document = Manifest::parse(&with(top), None, limits)?;
        let mut choice = ManifestChoice::new(Digest::of(b""), document, &wanted, limits)?;
        loop {
            match choice.step()? {
                ChoiceStep::Read(chosen) if choice.is_chosen => return Ok(chosen),
                ChoiceStep::Read(nested) => choice.insert(nested.clone(), &with(&of(&nested)))?,
                ChoiceStep::Chosen(_) => panic!("no index"),
            }
        }
    }

    #[test]
    fn the_best_entry_of_all_nested_indexes_is_chosen() {
        let s390x = entry("linux", "s390x");
        let other = [entry("linux", "amd64")];
        let chosen = choose_through(&[nested(0, ""), other[0].clone()], |_| vec![s390x.clone()]);
        assert_eq!(
            chosen.expect("an entry").platform.map(|p| p.architecture),
            Some("s390x".into())
        );
        let refused = choose_through(&[nested(0, "")], |_| other.to_vec());
        assert!(matches!(refused, Err(ManifestError::NoPlatform { .. })), "{refused:?}");
        // An entry without a platform inherits its index's platform.
        let arm = nested(1, r#","platform":{"os":"linux","architecture":"arm64"}"#);
        let ours = nested(2, r#","platform":{"os":"linux","architecture":"s390x"}"#);
        let two = choose_through(&[arm, ours, layer("2", "")], |of| {
            assert_eq!(of.digest, Digest::of(b"2"), "others are not read");
            vec![layer("2", "")]
        });
        assert!(two.expect("an entry").platform.is_some());
    }

    #[test]
    fn nested_indexes_are_bounded() {
        let depth = std::cell::Cell::new(0);
        let chain = |most: usize| {
            depth.set(0);
            choose_through(&[nested(0, "")], |_| {
                depth.set(depth.get() + 1);
                let last = depth.get() == most;
                vec![if last { entry("linux", "s390x") } else { nested(depth.get(), "") }]
            })
        };
        // The referenced index is the first level, and the first index.
        assert!(chain(3).is_ok());
        assert!(matches!(chain(4), Err(ManifestError::NestedIndex(_))));
        let many = |count| (0..count).map(|number| nested(number, "")).collect::<Vec<_>>();
        assert!(choose_through(&many(31), |_| vec![entry("linux", "s390x")]).is_ok());
        let refused = choose_through(&many(32), |_| Vec::new());
        assert!(matches!(refused, Err(ManifestError::NestedIndex(_))), "{refused:?}");
        let refused = choose_through(&many(10), |_| vec![layer("2", ""); 11]);
        assert!(matches!(refused, Err(ManifestError::TooManyLayers { .. })), "{refused:?}");
    }

    /// Returns an entry for a platform that requires features of the operating system.
    fn with_features(architecture: &str, features: &str) -> String {
        let platform = format!(
            r#","platform":{{"os":"linux","architecture":"{architecture}","os.features":{features}}}"#
        );
        layer("3", &platform)
    }

    #[test]
    fn an_entry_that_requires_features_of_the_system_is_never_chosen() {
        let node: Platform = "linux/amd64".parse().expect("a platform");
        let (erofs, plain) = (with_features("amd64", r#"["erofs"]"#), entry("linux", "amd64"));
        for entries in [[erofs.clone(), plain.clone()], [plain, erofs.clone()]] {
            assert_eq!(index(&entries).choose(&node).expect("an entry").size, 2);
        }
        let many = format!("[{}]", vec![r#""erofs\u0000""#; 1000].join(","));
        for features in [r#"["erofs"]"#, &many] {
            let refused = index(&[with_features("amd64", features)]).choose(&node).cloned();
            let error = refused.expect_err("none").to_string();
            assert!(error.contains("linux(+erofs") && error.len() < 300, "{error}");
        }
        let older = index(&[erofs, entry("linux", "386")]);
        assert_eq!(older.choose(&node).expect("an entry").size, 2);
        for features in ["null", "[]"] {
            assert!(index(&[with_features("amd64", features)]).choose(&node).is_ok());
        }
        // Containerd ignores the one feature that images for Windows name.
        let windows: Platform = "windows/amd64".parse().expect("a platform");
        let of_windows = with_features("amd64", r#"["win32k"]"#).replace("linux", "windows");
        assert!(index(&[of_windows]).choose(&windows).is_ok());
        let nested_one =
            nested(1, r#","platform":{"architecture":"s390x","os.features":["erofs"]}"#);
        let chosen = choose_through(&[nested_one, entry("linux", "s390x")], |of| panic!("{of:?}"));
        assert!(!chosen.expect("an entry").is_index());
    }

    #[test]
    fn an_entry_with_a_digest_of_another_algorithm_matters_only_where_it_is_chosen() {
        let node: Platform = "linux/amd64".parse().expect("a platform");
        let foreign = |architecture: &str| {
            let long = format!("sha512:{}", "0".repeat(128));
            entry("linux", architecture).replace(EMPTY, &long)
        };
        let ours = entry("linux", "amd64");
        for entries in [[foreign("arm64"), ours.clone()], [ours.clone(), foreign("arm64")]] {
            assert!(index(&entries).choose(&node).is_ok());
        }
        assert!(index(&[foreign("amd64"), ours.clone()]).choose(&node).is_ok());
        assert!(index(&[ours.clone(), foreign("unknown")]).choose(&node).is_ok());
        let unnamed = layer("2", "").replace(EMPTY, &format!("sha512:{}", "0".repeat(128)));
        for entries in [
            vec![foreign("amd64"), entry("linux", "386")],
            vec![foreign("amd64")],
            vec![unnamed.clone()],
        ] {
            let refused = index(&entries).choose(&node).cloned();
            assert!(matches!(refused, Err(ManifestError::Digest(_))), "{entries:?}: {refused:?}");
        }
        let refused = index(&[unnamed, layer("2", "")]).choose(&node).cloned();
        assert!(matches!(refused, Err(ManifestError::NoPlatform { .. })), "{refused:?}");
        let named = index(&[foreign("arm64")]).choose(&node).expect_err("none").to_string();
        assert!(named.contains("it has linux/arm64"), "{named}");
        // Flattened as if the entries stood in the place of their index.
        let s390x = || vec![foreign("s390x")];
        let refused = choose_through(&[nested(0, "")], |_| s390x());
        assert!(matches!(refused, Err(ManifestError::Digest(_))), "{refused:?}");
        let found =
            choose_through(&[nested(0, "")], |_| vec![foreign("arm64"), entry("linux", "s390x")]);
        assert!(found.is_ok(), "{found:?}");
    }

    #[test]
    fn an_empty_platform_is_none() {
        let node: Platform = "linux/amd64".parse().expect("a platform");
        let empty = |platform: &str| layer("2", &format!(r#","platform":{platform}"#));
        for platform in ["{}", r#"{"os":"","architecture":""}"#, r#"{"os":"linux"}"#, "null"] {
            assert!(index(&[empty(platform)]).choose(&node).is_ok(), "{platform}");
            assert!(index(&[empty(platform), entry("unknown", "unknown")]).choose(&node).is_ok());
            assert!(index(&[empty(platform), empty(platform)]).choose(&node).is_err());
        }
        assert!(index(&[empty(r#"{"architecture":"amd64"}"#)]).choose(&node).is_ok());
    }

    #[test]
    fn attestations_are_never_chosen() {
        let node: Platform = "linux/amd64".parse().expect("a platform");
        let choice = index(&[entry("unknown", "unknown"), entry("linux", "amd64")]);
        let chosen = choice.choose(&node).expect("an entry");
        assert_eq!(chosen.platform.as_ref().map(|p| p.os.as_str()), Some("linux"));
        let refused =
            index(&[entry("unknown", "unknown"), entry("linux", "arm64")]).choose(&node).cloned();
        assert!(
            matches!(refused, Err(ManifestError::NoPlatform { offered, .. }) if offered == "linux/arm64")
        );
    }

    #[test]
    fn an_entry_without_platform_is_the_fallback() {
        let node: Platform = "linux/amd64".parse().expect("a platform");
        assert!(index(&[layer("2", "")]).choose(&node).is_ok());
        assert!(index(&[layer("2", ""), layer("2", "")]).choose(&node).is_err());
    }
}
