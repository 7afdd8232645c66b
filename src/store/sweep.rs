//! Small records that nothing needs any more: what an evicted artifact leaves.
//!
//! Manifests, resolutions and proofs are small, but a node that lives for years
//! sees many. They go when no tree, no pin and no reference leads to them, and
//! not before they are old: a pull that is under way has written them just now.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use super::Store;
use super::error::StoreError;
use super::gc::Now;
use super::resolutions::Resolution;
use super::staging::names;
use super::{TreeKey, records};
use crate::oci::Digest;

/// Longer than any pull that is still wanted goes on between two of its records.
const AGE: Duration = Duration::from_hours(24);

impl Store {
    /// Removes records that lead nowhere; says how many. Blocking.
    pub fn sweep_records(&self, now: Now) -> Result<usize, StoreError> {
        let facts = self.facts(now)?;
        let entries = facts.store.objects.values();
        let mut manifests: HashSet<_> = entries.filter_map(|entry| entry.manifest).collect();
        manifests.extend(&facts.store.pinned);
        let is_old = |path: &Path| {
            let age = |metadata: fs::Metadata| now.unix_seconds.saturating_sub(metadata.mtime());
            let limit = i64::try_from(AGE.as_secs()).unwrap_or(i64::MAX);
            path.symlink_metadata().is_ok_and(|metadata| age(metadata) > limit)
        };
        let mut swept = 0;
        let mut kept_blobs = manifests.clone();
        for (path, resolution) in records::list::<Resolution>(&self.path("resolutions"))? {
            let manifest = resolution.manifest;
            // A manifest that was used just now is one of a pull that is under way.
            let is_young = !is_old(&path) || self.blob_is_young(manifest, &is_old);
            if manifests.contains(&manifest) || is_young {
                kept_blobs.extend([manifest, resolution.resolved]);
            } else {
                records::remove(&path)?;
                swept += 1;
            }
        }
        // A configuration is kept as long as the manifest that names it, and where blobs came from is
        // known as long: a node without its registry shows them in another way, too.
        let mut origins = kept_blobs.clone();
        for manifest in kept_blobs.clone() {
            let (configuration, layers) = self.named_by(manifest);
            kept_blobs.extend(configuration);
            origins.extend(configuration.into_iter().chain(layers));
        }
        let blobs = self.path("blobs");
        for name in names(&blobs)? {
            let Some(digest) = Digest::from_hex(&name) else { continue };
            let path = blobs.join(name);
            if !kept_blobs.contains(&digest) && self.remove_old_blob(&path, &is_old)? {
                swept += 1;
            }
        }
        Ok(swept + self.sweep_access((&kept_blobs, &origins), &is_old)?)
    }

    fn blob_is_young(&self, blob: Digest, is_old: &impl Fn(&Path) -> bool) -> bool {
        let path = self.blob_path(blob);
        path.is_file() && !is_old(&path)
    }

    /// Proofs of manifests and trees that are not here. Where a blob came from that no manifest names
    /// stays known only while it is young: asking again costs one request.
    fn sweep_access(
        &self,
        (manifests, origins): (&HashSet<Digest>, &HashSet<Digest>),
        is_old: &impl Fn(&Path) -> bool,
    ) -> Result<usize, StoreError> {
        let access = self.path("access");
        let mut swept = 0;
        for place in names(&access)? {
            let place = access.join(place);
            // What is behind a link is not the store's.
            if place.is_symlink() {
                continue;
            }
            let mut is_used = false;
            for name in names(&place)? {
                let key = |kind: &str| Some(name.strip_prefix(kind)?.get(..64)?.to_owned());
                let digest = |kind: &str| Digest::from_hex(&key(kind)?);
                let manifest = ["m-", "a-", "i-", "v-"].into_iter().find_map(digest);
                let tree = key("t-").and_then(|text| TreeKey::from_hex(&text));
                let needed = match (manifest, tree, digest("b-")) {
                    (Some(manifest), ..) => manifests.contains(&manifest),
                    (_, Some(tree), _) => self.path("trees").join(tree.to_string()).exists(),
                    (.., Some(blob)) => origins.contains(&blob),
                    // What is known of the repository itself goes with the last of the others.
                    _ if name == "refuses-anonymous.json" => continue,
                    _ => !name.starts_with("b-"),
                };
                if needed || !self.sweep_proof(&place.join(&name), is_old)? {
                    is_used = true;
                } else {
                    swept += 1;
                }
            }
            if !is_used {
                swept +=
                    usize::from(self.sweep_proof(&place.join("refuses-anonymous.json"), is_old)?);
            }
            let _turn = self.proofs().hold();
            // Empty ones go; the others refuse.
            let _ = fs::remove_dir(&place);
        }
        Ok(swept)
    }

    /// Removes a record if it is old. One that is being renewed at this moment is not.
    fn sweep_proof(
        &self,
        path: &Path,
        is_old: &impl Fn(&Path) -> bool,
    ) -> Result<bool, StoreError> {
        let _turn = self.proofs().hold();
        if !is_old(path) {
            return Ok(false);
        }
        records::remove(path)?;
        Ok(true)
    }

    /// The configuration and the layers that a manifest names, or the manifests of an index.
    fn named_by(&self, manifest: Digest) -> (Option<Digest>, Vec<Digest>) {
        let parse = || -> Option<serde_json::Value> {
            serde_json::from_slice(&self.blob(manifest).ok()??).ok()
        };
        let Some(json) = parse() else { return (None, Vec::new()) };
        let digest = |value: &serde_json::Value| value.get("digest")?.as_str()?.parse().ok();
        let layers = json.get("layers").and_then(serde_json::Value::as_array);
        let layers = layers.into_iter().flatten().filter_map(digest).collect();
        (json.get("config").and_then(digest), layers)
    }
}
