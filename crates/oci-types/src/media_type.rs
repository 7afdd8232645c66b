//! Media types of manifests, configurations and layers.

/// The manifest of OCI images and artifacts.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// The artifact manifest of OCI 1.1's release candidates: `blobs` instead of `layers`.
pub const OCI_ARTIFACT_MANIFEST: &str = "application/vnd.oci.artifact.manifest.v1+json";
/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker's manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// All media types that a manifest request accepts, the preferred one first.
pub const MANIFESTS: [&str; 5] =
    [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX, OCI_ARTIFACT_MANIFEST];

/// The configuration of a runnable OCI image.
pub const OCI_IMAGE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// The configuration of a runnable Docker image.
pub const DOCKER_IMAGE_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// The empty JSON object that artifacts without a configuration point to.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// The media types of images' layers, without the suffix of their compression.
const IMAGE_LAYERS: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];
const COMPRESSIONS: [&str; 5] = ["", "+gzip", ".gzip", "+zstd", ".zstd"];

/// Returns whether a media type is that of an image's layer.
pub fn is_image_layer(media_type: &str) -> bool {
    let mut rests = IMAGE_LAYERS.iter().filter_map(|prefix| media_type.strip_prefix(prefix));
    rests.any(|rest| COMPRESSIONS.contains(&rest))
}

/// Removes parameters and folds case: `Type/Sub; charset=x` becomes `type/sub`.
pub fn essence(media_type: &str) -> String {
    media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}
