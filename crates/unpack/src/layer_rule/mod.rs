//! Layer rules: the kind of each layer of a manifest, one file, an archive or nothing to show.
//!
//! The manifest alone decides, in this order:
//!
//! 1. `io.deis.oras.content.unpack` is `"true"`: a folder that ORAS packed.
//! 2. A tar by the media types of `ModelPack`, `KitOps` or Docker's models: unpacked. (`raw` is a
//!    file.)
//! 3. A title: a file of that name, whatever its media type (ORAS gives files the type of an image
//!    layer by default).
//! 4. An image layer in an image: unpacked, with whiteouts.
//! 5. Untitled layers beside titled ones, and the empty descriptor, are skipped, as `oras pull`
//!    does. So are layers that repeat the title and the content of another one. Without any title, Flux content is unpacked, and the rest are files: `chart.tgz` and
//!    `chart.tgz.prov` (Helm), `module.wasm`, otherwise `layer-<index in the manifest>` with an
//!    extension that the media type suggests. A second chart or module has its index too:
//!    `module-1.wasm`.
//!
//! The attribute `unpack` changes this for artifacts that are not images: see [`UnpackMode`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::{UnpackError, shown};
use super::layer_merge::SubPathProblem;
use super::path_selection::Selection;
use super::permissions::{Owner, Permissions};
use super::unpack_limits::Limits;
use super::volume_path::{PathError, RelativePath};
use oci_types::Digest;
use oci_types::manifest::{Descriptor, ImageManifest};
use oci_types::media_type::{self, is_image_layer};

const TITLE: &str = "org.opencontainers.image.title";
const ORAS_UNPACK: &str = "io.deis.oras.content.unpack";
const ORAS_DIGEST: &str = "io.deis.oras.content.digest";
/// Annotations of `ModelPack`, whose names began with cnai before the project moved to the CNCF.
const FILE_PATHS: [&str; 2] = ["org.cncf.model.filepath", "org.cnai.model.filepath"];
const FILE_METADATA: [&str; 2] =
    ["org.cncf.model.file.metadata+json", "org.cnai.model.file.metadata+json"];
const MODEL_TYPES: [&str; 2] = ["application/vnd.cncf.model.", "application/vnd.cnai.model."];
/// Prefixes of the media types of model layers of `KitOps`, of its older name and of Docker. Those
/// that end like the media type of a tar are unpacked.
const MODEL_ARCHIVES: [&str; 3] = [
    "application/vnd.kitops.modelkit.",
    "application/vnd.jozu.model.",
    "application/vnd.docker.ai.",
];

/// Suffixes of the media types of tars.
const TAR_TYPES: [&str; 12] = [
    "tar", "tar+gzip", "tar.gzip", "tar+gz", "tar.gz", "tar+zstd", "tar.zstd", "tgz", "x-tar",
    "x-tgz", "x-gtar", "x-ustar",
];
/// Suffixes of the names of tars.
const TAR_NAMES: [&str; 7] =
    [".tar", ".tar.gz", ".tgz", ".tar.gzip", ".tar.zst", ".tar.zstd", ".tzst"];

const FLUX_CONTENT: &str = "application/vnd.cncf.flux.content.v1.tar+gzip";
const HELM_CONFIG: &str = "application/vnd.cncf.helm.config.v1+json";
const HELM_CHART: &str = "application/vnd.cncf.helm.chart.content.v1.tar+gzip";
/// Media type of charts before Helm 3.7.
const HELM_OLD_CHART: &str = "application/tar+gzip";
const HELM_PROVENANCE: &str = "application/vnd.cncf.helm.chart.provenance.v1.prov";
const WASM_MODULES: [&str; 4] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/vnd.module.wasm.content.layer.v1+wasm",
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
];
/// Suffixes of media types, and the extension that a file of such a type gets.
const EXTENSIONS: [(&str, &str); 17] = [
    ("tar+gzip", ".tar.gz"),
    ("tar.gzip", ".tar.gz"),
    ("tar+zstd", ".tar.zst"),
    ("tar.zstd", ".tar.zst"),
    ("tar", ".tar"),
    ("gzip", ".gz"),
    ("zstd", ".zst"),
    ("zip", ".zip"),
    ("json", ".json"),
    ("yaml", ".yaml"),
    ("xml", ".xml"),
    ("wasm", ".wasm"),
    ("gguf", ".gguf"),
    ("gguf.v3", ".gguf"),
    ("safetensors", ".safetensors"),
    ("text/plain", ".txt"),
    ("pdf", ".pdf"),
];

/// The attribute `unpack`: which layers of an artifact are unpacked. Those of an image always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UnpackMode {
    /// Unpacks folders that ORAS packed, and archives of known media types.
    #[default]
    Auto,
    /// Also unpacks every tar, by its title or media type. A layer without a title, and without a
    /// media type of another format, is taken for a tar.
    Always,
    /// Unpacks nothing: each layer is a file.
    Never,
}

impl UnpackMode {
    /// Returns the value of the attribute.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::Always => "Always",
            Self::Never => "Never",
        }
    }

    /// Returns whether this is the default, which keys and records leave out.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// The kind of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerRule {
    /// The blob is a file.
    File(FileRule),
    /// The blob is an archive, compressed or not.
    Archive(ArchiveRule),
    /// The layer is not shown, and need not be fetched.
    Skip,
}

/// A blob that is a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRule {
    /// Path in the volume.
    pub path: RelativePath,
    /// Permissions that `ModelPack` records, before the permissions rule; other clients record
    /// none.
    pub recorded: Option<Permissions>,
}

/// A blob that is an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveRule {
    /// Enables the rules of images: `.wh.` names hide entries of lower layers, and symbolic links
    /// of lower layers are followed.
    pub whiteouts: bool,
    /// Digest that the uncompressed archive must have.
    pub tar_digest: Option<Digest>,
    /// Folder that all entries lie in (the title of an ORAS folder). Merging enforces it, so the
    /// title alone can prove that nothing is selected.
    pub within: Option<RelativePath>,
}

impl LayerRule {
    /// Returns whether a selection needs the layer. The title of a folder or a file may prove that
    /// it does not.
    pub fn is_needed(&self, selection: &Selection) -> bool {
        match self {
            Self::File(rule) => selection.selects(&rule.path),
            Self::Archive(rule) => {
                rule.within.as_ref().is_none_or(|title| selection.may_select_below(title))
            }
            Self::Skip => false,
        }
    }
}

impl LayerRule {
    /// Returns false only if the title proves that the layer has nothing at or below a path.
    pub fn may_have(&self, path: &RelativePath) -> bool {
        match self {
            Self::File(rule) => rule.path.is_within(path),
            Self::Archive(rule) => rule
                .within
                .as_ref()
                .is_none_or(|title| title.is_within(path) || path.is_within(title)),
            Self::Skip => false,
        }
    }

    /// Returns the title that all content of the layer is at or below.
    fn title(&self) -> Option<&RelativePath> {
        match self {
            Self::File(rule) => Some(&rule.path),
            Self::Archive(rule) => rule.within.as_ref(),
            Self::Skip => None,
        }
    }
}

/// Checks that a layer may have a `subPath`. Call it for artifacts that are not images: in these,
/// links may lead anywhere.
///
/// # Errors
///
/// [`UnpackError::SubPath`] if the titles of all layers prove that none has.
pub fn check_sub_path(rules: &[LayerRule], path: &RelativePath) -> Result<(), UnpackError> {
    if path.is_root() || rules.iter().any(|rule| rule.may_have(path)) {
        return Ok(());
    }
    let titles = rules.iter().filter_map(LayerRule::title);
    let problem = SubPathProblem::missing_among(path, titles);
    Err(UnpackError::SubPath { path: path.clone(), problem })
}

impl ArchiveRule {
    /// Returns the part of the rule that determines what is stored of the blob, for the layer's
    /// key. Compression is not part of it, since the content's first bytes determine it.
    pub const fn decoder(&self) -> &'static str {
        if self.whiteouts { "image-tar" } else { "tar" }
    }

    const fn plain() -> Self {
        Self { whiteouts: false, tar_digest: None, within: None }
    }
}

/// `ModelPack`'s record of a file, as far as a volume shows it. Modes are Go's, whose permission
/// bits are those of Unix.
#[derive(Default, Deserialize)]
#[serde(default)]
struct FileMetadata {
    mode: Option<u32>,
    uid: i64,
    gid: i64,
}

/// Returns one rule for each layer, in the manifest's order.
pub fn classify(
    manifest: &ImageManifest,
    unpack: UnpackMode,
    limits: &Limits,
) -> Result<Vec<LayerRule>, UnpackError> {
    let layers = || manifest.layers.iter().enumerate();
    let named = layers().any(|(_, layer)| name_of(layer).is_some());
    let is_image = manifest.is_image();
    let unpack = if is_image { UnpackMode::Auto } else { unpack };
    let is_helm = manifest.config.as_ref().is_some_and(|config| config.media_type == HELM_CONFIG);
    let mut fallbacks = FallbackNames { is_helm, taken: BTreeMap::new() };
    let mut rules = Vec::with_capacity(manifest.layers.len());
    for (number, layer) in layers() {
        let rule = if let Some(rule) = annotated(number, layer, unpack, limits)? {
            rule
        } else if is_image && is_image_layer(&layer.media_type) {
            LayerRule::Archive(ArchiveRule { whiteouts: true, ..ArchiveRule::plain() })
        } else if named || layer.media_type == media_type::OCI_EMPTY {
            LayerRule::Skip
        } else if is_image || is_encrypted(&layer.media_type) {
            // An image without one of its layers is another image, and ciphertext is not content.
            let media_type = shown(layer.media_type.as_bytes());
            return Err(UnpackError::MediaType { layer: number, media_type });
        } else if layer.media_type == FLUX_CONTENT && unpack != UnpackMode::Never {
            LayerRule::Archive(ArchiveRule::plain())
        } else {
            let name = fallbacks.name(number, layer);
            let recorded = recorded(number, layer)?;
            let path = title(number, &name, limits)?;
            LayerRule::File(FileRule { path, recorded })
        };
        rules.push(rule);
    }
    skip_repeated_titles(manifest, &mut rules);
    refuse_colliding_titles(&rules)?;
    Ok(rules)
}

/// Applies rules 1 to 3: the layer's own annotations and media type.
fn annotated(
    number: usize,
    layer: &Descriptor,
    unpack: UnpackMode,
    limits: &Limits,
) -> Result<Option<LayerRule>, UnpackError> {
    let path = name_of(layer).map(|name| title(number, name, limits)).transpose()?;
    let is_folder = layer.annotations.get(ORAS_UNPACK).is_some_and(|value| value == "true");
    if is_folder && unpack != UnpackMode::Never {
        let tar_digest = match layer.annotations.get(ORAS_DIGEST) {
            Some(text) if !text.is_empty() => Some(text.parse().map_err(|error| {
                let reason = format!("{error}");
                UnpackError::Annotation { layer: number, annotation: ORAS_DIGEST, reason }
            })?),
            _ => None,
        };
        let rule = ArchiveRule { whiteouts: false, tar_digest, within: path };
        return Ok(Some(LayerRule::Archive(rule)));
    }
    let is_archive = match unpack {
        UnpackMode::Auto => is_model_archive(&layer.media_type),
        UnpackMode::Always => is_model_archive(&layer.media_type) || is_archive(layer),
        UnpackMode::Never => false,
    };
    if is_archive {
        return Ok(Some(LayerRule::Archive(ArchiveRule::plain())));
    }
    let Some(path) = path else {
        return Ok(None);
    };
    if path.is_root() {
        return Err(UnpackError::Title {
            layer: number,
            title: shown(name_of(layer).unwrap_or_default().as_bytes()),
            reason: PathError::Root,
        });
    }
    Ok(Some(LayerRule::File(FileRule { path, recorded: recorded(number, layer)? })))
}

/// Returns the title, otherwise `ModelPack`'s file path. Empty names are ignored.
fn name_of(layer: &Descriptor) -> Option<&str> {
    let annotation = |key| layer.annotations.get(key).map(String::as_str);
    std::iter::once(TITLE).chain(FILE_PATHS).filter_map(annotation).find(|name| !name.is_empty())
}

fn title(layer: usize, name: &str, limits: &Limits) -> Result<RelativePath, UnpackError> {
    RelativePath::parse(name.as_bytes(), limits).map_err(|reason| UnpackError::Title {
        layer,
        title: shown(name.as_bytes()),
        reason,
    })
}

/// Returns `raw` or `tar...` for a media type of `ModelPack`.
fn model_suffix(media_type: &str) -> Option<&str> {
    let kind = MODEL_TYPES.iter().find_map(|prefix| media_type.strip_prefix(prefix))?;
    let (_, suffix) = kind.rsplit_once(".v1.")?;
    ["raw", "tar", "tar+gzip", "tar+zstd"].contains(&suffix).then_some(suffix)
}

/// Returns whether a media type is that of a model's archive.
fn is_model_archive(media_type: &str) -> bool {
    let is_of_vendor = MODEL_ARCHIVES.iter().any(|prefix| media_type.starts_with(prefix));
    model_suffix(media_type).is_some_and(|suffix| suffix.starts_with("tar"))
        || is_of_vendor && ends_as(media_type, &TAR_TYPES)
}

/// Returns whether the descriptor of a layer says that the layer is a tar.
fn is_archive(layer: &Descriptor) -> bool {
    let media_type = layer.media_type.as_str();
    if is_encrypted(media_type) || media_type == media_type::OCI_EMPTY {
        return false;
    }
    let is_tar = ends_as(media_type, &TAR_TYPES);
    match name_of(layer) {
        // ORAS gives files the media type of an image layer.
        Some(name) => {
            let name = name.to_ascii_lowercase();
            TAR_NAMES.iter().any(|ending| name.ends_with(ending))
                || is_tar && !is_image_layer(media_type)
        }
        None => is_tar || matches!(extension(media_type), "" | ".gz" | ".zst"),
    }
}

/// Returns whether a media type ends in one of these words.
fn ends_as(media_type: &str, endings: &[&str]) -> bool {
    let is_word = |rest: &str| rest.is_empty() || rest.ends_with(['.', '+', '/', '-']);
    endings.iter().any(|ending| media_type.strip_suffix(ending).is_some_and(is_word))
}

/// Returns the extension that a file of a media type has, with its dot.
fn extension(media_type: &str) -> &'static str {
    let known = EXTENSIONS.iter().find(|(ending, _)| ends_as(media_type, &[*ending]));
    known.map_or("", |(_, extension)| extension)
}

fn recorded(number: usize, layer: &Descriptor) -> Result<Option<Permissions>, UnpackError> {
    let found = FILE_METADATA.iter().find_map(|&key| Some((key, layer.annotations.get(key)?)));
    let Some((annotation, text)) = found else {
        return Ok(None);
    };
    let FileMetadata { mode, uid, gid } = serde_json::from_str(text).map_err(|error| {
        // Messages of serde may quote the text: cut them to the length of a title.
        let reason = shown(error.to_string().as_bytes());
        UnpackError::Annotation { layer: number, annotation, reason }
    })?;
    let [uid, gid] = [uid, gid].map(|number| Owner::Number(number).number());
    Ok(mode.map(|mode| Permissions { mode, uid, gid }))
}

/// Returns whether this is a media type of ocicrypt, whose content cannot be shown without a key.
fn is_encrypted(media_type: &str) -> bool {
    media_type.ends_with("+encrypted")
}

/// Names for layers without a title.
struct FallbackNames {
    is_helm: bool,
    /// Number of layers of each known kind so far.
    taken: BTreeMap<&'static str, usize>,
}

impl FallbackNames {
    fn name(&mut self, number: usize, layer: &Descriptor) -> String {
        let media_type = layer.media_type.as_str();
        let known = if media_type == HELM_CHART || (self.is_helm && media_type == HELM_OLD_CHART) {
            Some(("chart", ".tgz"))
        } else if media_type == HELM_PROVENANCE {
            Some(("chart", ".tgz.prov"))
        } else if WASM_MODULES.contains(&media_type) {
            Some(("module", ".wasm"))
        } else {
            None
        };
        if let Some((stem, extension)) = known {
            let before = self.taken.entry(extension).or_default();
            *before += 1;
            return match *before {
                1 => format!("{stem}{extension}"),
                _ => format!("{stem}-{number}{extension}"),
            };
        }
        format!("layer-{number}{}", extension(media_type))
    }
}

/// Skips layers that repeat the title and the content of another one, as `oras pull` does.
fn skip_repeated_titles(manifest: &ImageManifest, rules: &mut [LayerRule]) {
    let mut first: BTreeMap<RelativePath, usize> = BTreeMap::new();
    for (number, layer) in manifest.layers.iter().enumerate() {
        let (LayerRule::File(FileRule { path: title, .. })
        | LayerRule::Archive(ArchiveRule { within: Some(title), .. })) = &rules[number]
        else {
            continue;
        };
        let first = *first.entry(title.clone()).or_insert(number);
        let is_same =
            manifest.layers[first].digest == layer.digest && rules[first] == rules[number];
        if first != number && is_same {
            rules[number] = LayerRule::Skip;
        }
    }
}

/// Refuses titles that cannot be in one tree, before any layer is fetched.
fn refuse_colliding_titles(rules: &[LayerRule]) -> Result<(), UnpackError> {
    let mut titles = BTreeMap::new();
    for (number, rule) in rules.iter().enumerate() {
        let (title, is_file) = match rule {
            LayerRule::File(rule) => (&rule.path, true),
            LayerRule::Archive(ArchiveRule { within: Some(title), .. }) => (title, false),
            LayerRule::Archive(_) | LayerRule::Skip => continue,
        };
        if let Some((first, _)) = titles.insert(title, (number, is_file)) {
            let title = title.clone();
            return Err(UnpackError::DuplicateTitle { first, second: number, title });
        }
    }
    for (title, &(layer, _)) in &titles {
        for above in title.ancestors() {
            if let Some(&(other, true)) = titles.get(&above) {
                let title = (*title).clone();
                return Err(UnpackError::TitleBelowFile { layer, title, other, file: above });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
