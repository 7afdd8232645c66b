//! An OCI image layout in place of a registry, for nodes without one.
//!
//! The layout comes as a tar, in any order. Its blobs are hashed as they arrive
//! and become complete downloads; from there on the artifact goes the way of any
//! other: the same checks, the same limits, the same commit. The reference it is
//! imported as means this artifact from then on, and who may see it is decided
//! as for preloaded images.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};
use std::sync::Arc;

use super::artifact_request::Want;
use super::credential_candidates::Candidates;
use super::downloader::Downloader;
use super::error::PullError;
use super::pull_tenant::Tenant;
use super::reference_resolution::{Resolved, ResolvedDigests};
use super::{ProgressView, Puller, blocking};
use oci::manifest::{
    ChoiceStep, ChosenManifest, Descriptor, ImageIndex, Manifest, ManifestChoice, ManifestError,
};
use oci::{Digest, Platform, Reference};
use store::access::ProofSource;
use store::blob_import::ImportedBlobs;
use store::resolution_records::Resolution;
use store::{Store, StoreError, Tree};
use unpack::tar_members::read_members;
use unpack::{Limits, UnpackError};

/// Files of a layout beside its blobs; ours are two, and other tools add a few.
const STRANGE_FILES: usize = 1000;
/// The annotation with a layout's name for a manifest: a tag, or a reference.
const NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation with the whole reference of a manifest, as containerd and Docker write it.
const FULL_NAME: &str = "io.containerd.image.name";

/// An import that failed.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The tar cannot be read.
    #[error(
        "the layout cannot be read: {0}: send a tar of an OCI image layout, as `oras copy --to-oci-layout` or `skopeo copy ... oci-archive:` make it"
    )]
    Read(String),
    /// A tar beyond a limit, or with members that are not read.
    #[error("the layout is refused: {0}")]
    Refused(UnpackError),
    /// The input is no layout.
    #[error("it is no OCI image layout: {0}")]
    NotALayout(String),
    /// An archive of `docker save` without a layout in it.
    #[error(
        "it is an archive of `docker save` before version 25, which has no OCI image layout: convert it with `skopeo copy docker-archive:FILE oci-archive:NEW`, and import NEW"
    )]
    DockerArchive,
    /// Several artifacts, and none with the reference's name.
    #[error(
        "the layout has {0} manifests and not exactly one is called \"{1}\": give the full name of one of them, add its digest to the reference, or ask for a platform that only one is for"
    )]
    Ambiguous(usize, String),
    /// A digest that is not the reference's.
    #[error("the layout holds {found}, and the reference names {wanted}")]
    OtherDigest {
        /// The digest of the manifest in the layout.
        found: Digest,
        /// The digest that the reference demands.
        wanted: Digest,
    },
    /// A blob whose content has another digest than its name.
    #[error(
        "the layout's blob {blob} is damaged (its content has the digest {found}): make the archive again"
    )]
    Damaged {
        /// The digest by the name of the file.
        blob: Digest,
        /// The digest of the content.
        found: Digest,
    },
    /// A blob that the manifest names.
    #[error("the layout lacks the blob {0}: export it again, complete")]
    Missing(Digest),
    /// Anything that can happen to a pull.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// The same, shared.
    #[error(transparent)]
    Shared(#[from] Arc<PullError>),
}

/// The content of a layout.
struct Layout {
    index: Vec<u8>,
    blobs: ImportedBlobs,
}

/// The manifest that a layout has for a reference and a platform.
struct Chosen {
    top: Digest,
    manifest: ChosenManifest,
    /// Manifests and the configuration, to be kept.
    small: BTreeMap<Digest, Vec<u8>>,
}

impl Puller {
    /// Takes an artifact from a layout.
    pub async fn import(
        &self,
        layout: impl Read + Send + 'static,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Tree, ImportError> {
        let (importer, named, wanted) =
            (Arc::clone(&self.0.importer), reference.clone(), platform.clone());
        let taken = tokio::task::spawn_blocking(move || {
            let layout = importer.read_layout(layout)?;
            let resolution = importer.take(&layout, &named, &wanted)?;
            Ok::<_, ImportError>((resolution, layout.blobs))
        });
        let (resolution, blobs) = taken.await.map_err(|_| PullError::Crashed)??;
        let manifest = resolution.manifest;
        let want = Want::of_node(reference.clone(), platform.clone(), Tenant::Admin);
        let candidates = self.0.resolver.read_candidates(&want).await?;
        let resolved = Resolved::for_the_node(manifest, candidates, Candidates::anonymous());
        let tree = self.tree(&want, &resolved, &ProgressView::default()).await;
        let (store, Want { reference, platform, .. }) = (self.0.importer.store.clone(), want);
        let is_here = tree.is_ok();
        blocking(move || {
            // Not before: what they claim keeps others from taking their room, and them, away.
            drop(blobs);
            if is_here {
                store.imports().put(reference.repository(), manifest)?;
                // Last: what the reference meant before is better than what did not become a tree.
                store.resolutions().put(&reference, &platform, &resolution)?;
            }
            Ok(())
        })
        .await?;
        Ok(tree?)
    }
}

/// Reads layouts into the store.
pub(super) struct LayoutImporter {
    pub(super) store: Store,
    pub(super) limits: Limits,
    pub(super) downloader: Arc<Downloader>,
}

impl LayoutImporter {
    fn read_layout(&self, layout: impl Read + Send) -> Result<Layout, ImportError> {
        let mut blobs = self.store.import_blobs()?;
        let mut index = None;
        let (mut strange, mut is_docker_archive) = (0, false);
        read_members(layout, &self.limits, |member, content| {
            let size = member.size;
            let place = layout_entry(Path::new(OsStr::from_bytes(&member.name)));
            match place {
                LayoutEntry::Blob(digest) if member.is_file => {
                    if size > self.limits.blob_bytes {
                        let what = format!(
                            "{digest} has {size} bytes, the limit is {} (limits.blobBytes)",
                            self.limits.blob_bytes
                        );
                        return Err(ImportError::NotALayout(what));
                    }
                    let found = blobs.add(digest, size, content)?;
                    if found != digest {
                        return Err(ImportError::Damaged { blob: digest, found });
                    }
                }
                LayoutEntry::Blob(digest) => {
                    return Err(ImportError::NotALayout(format!("{digest} is no file")));
                }
                LayoutEntry::Index if member.is_file => {
                    index = Some(self.small(content, "index.json")?);
                }
                LayoutEntry::Index | LayoutEntry::Strange | LayoutEntry::DockerManifest => {
                    is_docker_archive |= matches!(place, LayoutEntry::DockerManifest);
                    strange += 1;
                    if strange > STRANGE_FILES {
                        let what = format!("it has more than {STRANGE_FILES} other files");
                        return Err(ImportError::NotALayout(what));
                    }
                }
            }
            Ok(())
        })?;
        let Some(index) = index else {
            return Err(if is_docker_archive {
                ImportError::DockerArchive
            } else {
                ImportError::NotALayout("it has no index.json".into())
            });
        };
        Ok(Layout { index, blobs })
    }

    fn small(&self, content: &mut dyn Read, what: &str) -> Result<Vec<u8>, ImportError> {
        let limit = self.limits.manifest_bytes;
        let mut bytes = Vec::new();
        let read = content.take(limit + 1).read_to_end(&mut bytes);
        read.map_err(|error| ImportError::Read(error.to_string()))?;
        if bytes.len() as u64 > limit {
            let what = format!("{what} has more than {limit} bytes (limits.manifestBytes)");
            return Err(ImportError::NotALayout(what));
        }
        Ok(bytes)
    }

    /// Makes the chosen artifact's blobs complete downloads; says what the reference will mean.
    fn take(
        &self,
        layout: &Layout,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Resolution, ImportError> {
        let chosen = self.choose(layout, reference, platform)?;
        let store = &self.store;
        let repository = reference.repository();
        for descriptor in &chosen.manifest.image.layers {
            let digest = descriptor.digest;
            if descriptor.data.is_some() {
                continue;
            }
            if layout.blobs.has(digest) {
                layout.blobs.hand_on(repository.host(), digest)?;
                self.downloader.shared.share_again(repository.host(), digest);
            }
            // The caller of an import is trusted to name the source of the content.
            let by = ProofSource::Registry;
            store.origins().put_blob(repository, digest, &by)?;
        }
        for (digest, bytes) in &chosen.small {
            layout.blobs.keep(*digest, bytes)?;
            let by = ProofSource::Registry;
            store.origins().put_blob(repository, *digest, &by)?;
        }
        let digests = ResolvedDigests { top: chosen.top, manifest: chosen.manifest.digest };
        Ok(digests.resolution_of(reference))
    }

    fn choose(
        &self,
        layout: &Layout,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Chosen, ImportError> {
        let entry = named(&self.parse_index(&layout.index)?, reference, platform)?;
        let mut small = BTreeMap::new();
        let top = entry.digest;
        let limits = self.limits.manifest();
        let document = self.document(&layout.blobs, &entry, &mut small)?;
        let document = Manifest::parse(document, Some(&entry.media_type), limits);
        let choice = ManifestChoice::new(top, document.map_err(PullError::from)?, platform, limits);
        let mut choice = choice.map_err(PullError::from)?;
        let manifest = loop {
            match choice.step().map_err(PullError::from)? {
                ChoiceStep::Read(of) => {
                    let document = self.document(&layout.blobs, &of, &mut small)?;
                    choice.insert(of, document).map_err(PullError::from)?;
                }
                ChoiceStep::Chosen(chosen) => break chosen,
            }
        };
        let image = &manifest.image;
        if let Some(wanted) = reference.digest()
            && wanted != top
            && wanted != manifest.digest
        {
            return Err(ImportError::OtherDigest { found: top, wanted });
        }
        if let Some(config) = image.config.as_deref().filter(|config| config.data.is_none()) {
            let limit = self.limits.config_bytes;
            let found = layout.blobs.read(config.digest, limit)?;
            if let Some(bytes) = found.filter(|bytes| bytes.len() as u64 == config.size) {
                small.insert(config.digest, bytes);
            }
        }
        for layer in image.layers.iter().filter(|layer| layer.data.is_none()) {
            let here = layout.blobs.has(layer.digest)
                || self.store.files().any_of(layer.digest)?.is_some();
            if !here {
                return Err(ImportError::Missing(layer.digest));
            }
        }
        Ok(Chosen { top, manifest, small })
    }

    fn parse_index(&self, bytes: &[u8]) -> Result<ImageIndex, ImportError> {
        let parsed = Manifest::parse(bytes, None, self.limits.manifest());
        match parsed.map_err(|error| match error {
            // The reason may quote the file.
            ManifestError::Undecodable(_) | ManifestError::MediaType(_) => {
                ImportError::NotALayout("index.json cannot be decoded".into())
            }
            error => PullError::from(error).into(),
        })? {
            Manifest::Index(index) => Ok(index),
            Manifest::Image(_) => Err(ImportError::NotALayout("index.json is no index".into())),
        }
    }

    /// Returns a manifest or an index of a layout, and adds it to those that are kept.
    fn document<'a>(
        &self,
        blobs: &ImportedBlobs,
        entry: &Descriptor,
        small: &'a mut BTreeMap<Digest, Vec<u8>>,
    ) -> Result<&'a [u8], ImportError> {
        let limit = self.limits.manifest_bytes;
        let bytes = match &entry.data {
            Some(data) => Some(data.clone()),
            None => blobs.read(entry.digest, limit + 1)?,
        };
        let bytes = bytes.ok_or(ImportError::Missing(entry.digest))?;
        if bytes.len() as u64 > limit {
            let what =
                format!("{} has more than {limit} bytes (limits.manifestBytes)", entry.digest);
            return Err(ImportError::NotALayout(what));
        }
        let kept = small.entry(entry.digest).or_default();
        *kept = bytes;
        Ok(kept)
    }
}

/// The role of a file in a layout.
enum LayoutEntry {
    Blob(Digest),
    Index,
    /// The list of images of `docker save`.
    DockerManifest,
    Strange,
}

fn layout_entry(path: &Path) -> LayoutEntry {
    let names = path.components().filter(|part| *part != Component::CurDir);
    let names: Option<Vec<_>> = names
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    match names.as_deref() {
        Some(["index.json"]) => LayoutEntry::Index,
        Some(["manifest.json"]) => LayoutEntry::DockerManifest,
        Some(["blobs", "sha256", hex]) => {
            Digest::from_hex(hex).map_or(LayoutEntry::Strange, LayoutEntry::Blob)
        }
        _ => LayoutEntry::Strange,
    }
}

/// Returns the entry that a layout calls by the whole reference, the entry that it calls by the tag, or the only
/// entry. Of several, the platform has to leave exactly one.
fn named(
    index: &ImageIndex,
    reference: &Reference,
    platform: &Platform,
) -> Result<Descriptor, ImportError> {
    let (whole, tag) = (reference.to_string(), reference.tag_or_latest());
    if let Some(entry) =
        index.manifests.iter().find(|entry| reference.digest() == Some(entry.digest))
    {
        return Ok(entry.clone());
    }
    let is_whole = |name: &String| {
        *name == whole
            || name.parse::<Reference>().is_ok_and(|name| {
                name.repository() == reference.repository() && name.tag_or_latest() == tag
            })
    };
    let is_named = |entry: &Descriptor| {
        [FULL_NAME, NAME].iter().filter_map(|key| entry.annotations.get(*key)).any(is_whole)
    };
    let is_tagged =
        |entry: &Descriptor| entry.annotations.get(NAME).is_some_and(|name| name == tag);
    let find = |is_meant: &dyn Fn(&Descriptor) -> bool| {
        let found: Vec<_> = index.manifests.iter().filter(|entry| is_meant(entry)).collect();
        (!found.is_empty()).then_some(found)
    };
    let found = find(&is_named).or_else(|| find(&is_tagged)).or_else(|| find(&|_| true));
    let ambiguous = || ImportError::Ambiguous(index.manifests.len(), whole.clone());
    let found = found.ok_or_else(ambiguous)?;
    let mut best: Vec<&Descriptor> = found.clone();
    if found.iter().any(|entry| entry.digest != found[0].digest) {
        let order = platform.order_on_this_node();
        let rank = |entry: &Descriptor| order.rank(entry.platform.as_ref()?);
        let least = found.iter().filter_map(|entry| rank(entry)).min().ok_or_else(ambiguous)?;
        best.retain(|entry| rank(entry) == Some(least));
    }
    if best.iter().any(|entry| entry.digest != best[0].digest) {
        return Err(ambiguous());
    }
    Ok(best[0].clone())
}

impl From<UnpackError> for ImportError {
    fn from(error: UnpackError) -> Self {
        match error {
            UnpackError::Read(error) | UnpackError::Decompress(error) => {
                Self::Read(error.to_string())
            }
            UnpackError::Archive { reason, position } => {
                Self::Read(format!("{reason}, near byte {position}"))
            }
            refused => Self::Refused(refused),
        }
    }
}

impl From<StoreError> for ImportError {
    fn from(error: StoreError) -> Self {
        PullError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::testing::{
        INDEX, MANIFEST, TestNode, TestRegistry, descriptor, file_layer, image, index, is_root, tar,
    };
    use super::*;

    /// Returns a layout of an artifact with one file, which an index in the layout leads to.
    fn layout(blobs: &[&[u8]]) -> Cursor<Vec<u8>> {
        let text = image(&[file_layer("file", b"content")]);
        let nested = index(&[descriptor(MANIFEST, text.as_bytes(), "")]);
        let top = index(&[descriptor(INDEX, nested.as_bytes(), "")]);
        let mut files = vec![("index.json".to_owned(), top.as_bytes())];
        for blob in [text.as_bytes(), nested.as_bytes()].iter().chain(blobs) {
            files.push((format!("blobs/sha256/{}", Digest::of(blob).hex()), blob));
        }
        let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        Cursor::new(tar(&files))
    }

    #[tokio::test]
    async fn a_layout_stands_in_for_a_registry() {
        if !is_root() {
            return;
        }
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let (want, platform) = (registry.want("a"), Platform::of_this_node());
        let layout = layout(&[b"content"]);
        let tree = node.puller.import(layout, &want.reference, &platform).await.expect("a tree");
        assert_eq!(tree.record.bytes, 7);
        assert_eq!(node.pull(&want).await.expect("the same").key, tree.key);
        assert!(registry.seen("").is_empty(), "the registry is not asked");
    }

    /// Returns the entries of a layout: digit, whole name, tag and platform of each.
    fn entries(entries: &[(&str, &str, &str, &str)]) -> ImageIndex {
        let entry = |(content, full, tag, platform): &(&str, &str, &str, &str)| {
            let platform = platform.split_once('/').map_or(String::new(), |(os, architecture)| {
                format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
            });
            let names =
                [(FULL_NAME, full), (NAME, tag)].into_iter().filter(|(_, name)| !name.is_empty());
            let names: Vec<_> = names.map(|(key, name)| format!(r#""{key}":"{name}""#)).collect();
            let more = format!(r#","annotations":{{{}}}{platform}"#, names.join(","));
            descriptor(MANIFEST, content.as_bytes(), &more)
        };
        let text = index(&entries.iter().map(entry).collect::<Vec<_>>());
        match Manifest::parse(text.as_bytes(), None, Limits::default().manifest()) {
            Ok(Manifest::Index(index)) => index,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_entry_of_a_layout_is_chosen_by_its_whole_name_and_never_by_its_place() {
        let platform: Platform = "linux/amd64".parse().expect("a platform");
        let chosen = |entries: &ImageIndex, reference: &str| {
            let reference = reference.parse().expect("a reference");
            named(entries, &reference, &platform).ok().map(|entry| entry.digest)
        };
        let (a, b) = (Some(Digest::of(b"a")), Some(Digest::of(b"b")));
        // As `ctr images export` and Docker 25 write it.
        let of_ctr =
            entries(&[("a", "r.invalid/a:v1", "v1", ""), ("b", "r.invalid/b:v1", "v1", "")]);
        assert_eq!(chosen(&of_ctr, "r.invalid/a:v1"), a);
        assert_eq!(chosen(&of_ctr, "r.invalid/b:v1"), b);
        assert_eq!(chosen(&of_ctr, "other.invalid/b:v1"), None);
        assert_eq!(chosen(&of_ctr, &format!("other.invalid/b:v1@{}", Digest::of(b"b"))), b);
        let of_hub = entries(&[
            ("a", "docker.io/library/a:v1", "v1", ""),
            ("b", "docker.io/library/b:v1", "v1", ""),
        ]);
        assert_eq!(chosen(&of_hub, "docker.io/b:v1"), b);
        // Two entries for one platform are as ambiguous as two for none.
        for platform in ["", "linux/amd64"] {
            let same = entries(&[("a", "", "v1", platform), ("b", "", "v1", platform)]);
            assert_eq!(chosen(&same, "r.invalid/a:v1"), None);
            assert_eq!(chosen(&same, "r.invalid/a:v2"), None);
        }
        let of_two = entries(&[("a", "", "v1", "linux/arm64"), ("b", "", "v1", "linux/amd64")]);
        assert_eq!(chosen(&of_two, "r.invalid/a:v1"), b);
        // A tag that only one has, two names of one manifest, and an archive of one image.
        let tags = entries(&[("a", "", "v1", ""), ("b", "", "v2", "")]);
        assert_eq!((chosen(&tags, "r.invalid/a:v2"), chosen(&tags, "r.invalid/a:v3")), (b, None));
        let twice = entries(&[("a", "", "v1", ""), ("a", "", "latest", "")]);
        assert_eq!(chosen(&twice, "r.invalid/a:v3"), a);
        assert_eq!(chosen(&entries(&[("a", "r.invalid/a:v1", "v1", "")]), "r.invalid/b:v2"), a);
        assert_eq!(chosen(&entries(&[]), "r.invalid/b:v2"), None);
    }

    #[tokio::test]
    async fn an_incomplete_layout_is_refused_with_what_it_lacks() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let (reference, platform) = (registry.reference("a"), Platform::of_this_node());
        let import = |layout| node.puller.import(layout, &reference, &platform);
        let error = import(layout(&[])).await.expect_err("a blob is missing");
        assert!(
            matches!(error, ImportError::Missing(digest) if digest == Digest::of(b"content")),
            "{error}"
        );
        let error = import(Cursor::new(tar(&[("manifest.json", b"[]")]))).await;
        assert!(matches!(error, Err(ImportError::DockerArchive)), "{error:?}");
    }
}
