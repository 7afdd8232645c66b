//! Brings records and mounts together: at the start, and regularly afterwards.
//!
//! ```text
//! record, nothing mounted, pod's directory exists   kept: the same volume gets the same content
//! record, nothing mounted, pod's directory gone     dropped: also records from another machine
//! mount, no record                                  recorded again, so that it is not evicted
//! mount, the kubelet's vol_data.json gone           the kubelet will not unpublish it any more: unmounted
//! mount anywhere else                               counted only: its owner is unknown
//! ```

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::error::VolumeError;
use super::target_path::{TargetPath, pod_of_volume};
use super::unpublish_volume;
use super::{NodeContent, VolumeManager};
use oci::Digest;
use store::followed_volumes::shown_tree;
use store::publication_records::Publication;
use store::{FollowKey, MountedContent, MountedTree, Store, StoreError};
use sys::fault;
use sys::mount::{MountTable, TargetState};

/// The file that the kubelet writes beside a target before it publishes the volume, and removes after the unpublish.
const KUBELETS_FILE: &str = "vol_data.json";

/// The counts of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReconcileCounts {
    /// Records of targets that are mounted or may be published again.
    pub kept: usize,
    /// Records whose pod is gone.
    pub dropped: usize,
    /// Mounts whose record was lost.
    pub recorded: usize,
    /// Mounts that the kubelet had forgotten, and that were unmounted.
    pub unmounted: usize,
    /// Mounts of the driver whose owner is unknown.
    pub unknown: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct MountedVolume {
    /// The target's path, spelled as the kubelet spells it.
    target: PathBuf,
    content: MountedContent,
    /// The target has the form of a volume of the kubelet.
    is_kubelets: bool,
    /// The kubelet's file is beside the target, or may be: only a file that is certainly gone counts.
    is_known_to_kubelet: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RecordedVolume {
    target: PathBuf,
    /// The kubelet's file was beside the target at the publish.
    was_known_to_kubelet: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ReconcilePlan {
    keep: usize,
    drop: Vec<PathBuf>,
    record: Vec<MountedVolume>,
    unmount: Vec<PathBuf>,
    unknown: usize,
}

impl VolumeManager {
    /// Compares records and mounts, and carries out the decisions.
    pub async fn reconcile(
        &self,
        content: &NodeContent,
        kubelet_dir: &Path,
    ) -> Result<ReconcileCounts, VolumeError> {
        let store = content.store.clone();
        let (look, kubelet) = (store.clone(), kubelet_dir.to_owned());
        let decided = tokio::task::spawn_blocking(move || {
            // Reads the mounts first. A record is written before its mount, so a mount that appears in between is not
            // taken for one without a record.
            let mounts = mounted(&kubelet)?;
            let decisions = decide(&recorded(&look), &mounts, has_folder);
            if !decisions.drop.is_empty() {
                let _ = fault::point("reconcile.decided");
            }
            Ok::<_, StoreError>((decisions, followed(&mounts)))
        });
        let (decisions, followed) = decided.await.unwrap_or_else(|error| {
            let source = std::io::Error::other(error);
            Err(StoreError::io("reconcile", kubelet_dir, source))
        })?;
        let mut reconciled = ReconcileCounts {
            kept: decisions.keep,
            unknown: decisions.unknown,
            ..ReconcileCounts::default()
        };
        for (key, target) in followed {
            // A copy of the mount elsewhere is no volume.
            let Ok(target) = TargetPath::parse(kubelet_dir, &target.to_string_lossy()) else {
                continue;
            };
            let (volumes, content) = (self.clone(), content.clone());
            let follow = move || volumes.follow_again(&content, key, target);
            let _ = tokio::task::spawn_blocking(follow).await;
        }
        for target in decisions.drop {
            reconciled.dropped += usize::from(self.drop_stale(target, &store).await?);
        }
        for mount in decisions.record {
            let target = TargetPath::parse(kubelet_dir, &mount.target.to_string_lossy())?;
            reconciled.recorded += usize::from(self.record_again(mount, target, &store).await?);
        }
        for target in &decisions.unmount {
            let target = TargetPath::parse(kubelet_dir, &target.to_string_lossy())?;
            match self.unpublish_forgotten(target, &store).await {
                Ok(unmounted) => reconciled.unmounted += usize::from(unmounted),
                // A mount of another program may cover it. The others are still unmounted.
                Err(error) => tracing::warn!(%error, "a forgotten volume stays"),
            }
        }
        Ok(reconciled)
    }

    /// Removes the record of a pod that is gone, after another check under the lock.
    async fn drop_stale(&self, target: PathBuf, store: &Store) -> Result<bool, VolumeError> {
        let held = self.0.target_locks.begin_publish(&target).lock().await;
        let store = store.clone();
        let work = self.0.tracker.spawn_blocking(move || {
            let _held = held;
            let is_stale = !has_folder(&target);
            if is_stale {
                store.publications().remove(&target)?;
            }
            Ok(is_stale)
        });
        work.await.unwrap_or(Err(VolumeError::Crashed))
    }

    /// Writes a lost record again, after another check under the lock.
    async fn record_again(
        &self,
        mount: MountedVolume,
        target: TargetPath,
        store: &Store,
    ) -> Result<bool, VolumeError> {
        let held = self.0.target_locks.begin_publish(&mount.target).lock().await;
        let store = store.clone();
        let work = self.0.tracker.spawn_blocking(move || {
            let _held = held;
            let shown = shown_at(&target)
                .map_err(|error| StoreError::io("look at", &target.full(), error))?;
            let is_lost =
                shown == Some(mount.content) && store.publications().get(&mount.target).is_none();
            let record = is_lost.then(|| rebuilt(&store, &mount)).flatten();
            if let Some(record) = &record {
                store.publications().put(record)?;
            }
            Ok(record.is_some())
        });
        work.await.unwrap_or(Err(VolumeError::Crashed))
    }

    /// Unpublishes a volume that the kubelet has forgotten, after another check under the lock.
    async fn unpublish_forgotten(
        &self,
        target: TargetPath,
        store: &Store,
    ) -> Result<bool, VolumeError> {
        let held = self.0.target_locks.begin_publish(&target.full()).lock().await;
        let (store, volumes) = (store.clone(), self.clone());
        let work = self.0.tracker.spawn_blocking(move || {
            let _held = held;
            let was_known =
                store.publications().get(&target.full()).is_none_or(|record| record.kubelet_knew);
            if !was_known || is_known_to_kubelet(&target.full()) {
                return Ok(false);
            }
            tracing::warn!(%target, "the kubelet has forgotten this volume: unmounting it");
            let detached = unpublish_volume::detach(&target)?;
            unpublish_volume::remove(&target, &detached)?;
            volumes.followed().remove(&target.full());
            store.publications().remove(&target.full())?;
            Ok(true)
        });
        work.await.unwrap_or(Err(VolumeError::Crashed))
    }
}

/// Returns the content that is mounted at a target. Reads the state of this mount alone.
fn shown_at(target: &TargetPath) -> std::io::Result<Option<MountedContent>> {
    match target.open()?.state()? {
        TargetState::Mounted(origin) => Ok(MountedContent::of(&origin)),
        _ => Ok(None),
    }
}

/// Returns whether the kubelet's file is beside a target. A disk that cannot be read proves nothing: the volume may be
/// in use.
pub(super) fn is_known_to_kubelet(target: &Path) -> bool {
    !is_gone(&target.with_file_name(KUBELETS_FILE))
}

/// Returns whether the kernel reports that a path does not exist.
fn is_gone(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Returns whether the directory above a target exists, or may: only one that is certainly gone counts.
fn has_folder(target: &Path) -> bool {
    target.parent().is_some_and(|folder| !is_gone(folder))
}

/// Compares records with mounts. Looks up the directory of a target only if nothing is mounted there: on a node with
/// thousands of volumes each system call counts.
fn decide(
    records: &[RecordedVolume],
    mounts: &[MountedVolume],
    has_folder: impl Fn(&Path) -> bool,
) -> ReconcilePlan {
    let mut decisions = ReconcilePlan::default();
    let mounted: HashSet<_> = mounts.iter().map(|mount| &mount.target).collect();
    let recorded: HashMap<_, _> = records.iter().map(|record| (&record.target, record)).collect();
    for record in records {
        let is_mounted = mounted.contains(&record.target);
        // The kubelet removes the directory above the target with the volume, also after a reboot.
        if is_mounted || has_folder(&record.target) {
            decisions.keep += 1;
        } else {
            decisions.drop.push(record.target.clone());
        }
    }
    for mount in mounts {
        let record = recorded.get(&mount.target);
        // A caller other than the kubelet never writes that file, so its absence means nothing.
        let was_known = record.is_none_or(|record| record.was_known_to_kubelet);
        match (mount.is_kubelets, mount.is_known_to_kubelet) {
            (true, false) if was_known => decisions.unmount.push(mount.target.clone()),
            (false, false) if record.is_none() => decisions.unknown += 1,
            _ if record.is_none() => decisions.record.push(mount.clone()),
            _ => {}
        }
    }
    decisions
}

/// Returns the mounts of volumes that follow a tag.
fn followed(mounts: &[MountedVolume]) -> Vec<(FollowKey, PathBuf)> {
    let key = |mount: &MountedVolume| match mount.content {
        MountedContent::Followed(key) => Some((key, mount.target.clone())),
        MountedContent::Tree(_) => None,
    };
    mounts.iter().filter_map(key).collect()
}

fn recorded(store: &Store) -> Vec<RecordedVolume> {
    let records = store.publications().targets().into_iter();
    records
        .map(|(target, shown)| RecordedVolume { was_known_to_kubelet: shown.kubelet_knew, target })
        .collect()
}

fn mounted(kubelet_dir: &Path) -> Result<Vec<MountedVolume>, StoreError> {
    let table = mount_table()?;
    // The table has no symbolic links. Targets are spelled with the kubelet's name for its directory.
    let real = std::fs::canonicalize(kubelet_dir).unwrap_or_else(|_| kubelet_dir.to_owned());
    let ours = table.iter().filter_map(|entry| {
        let content = MountedContent::of(&entry.origin)?;
        let below = entry.mount_point.strip_prefix(&real).ok();
        let target = below.map_or_else(|| entry.mount_point.clone(), |path| kubelet_dir.join(path));
        Some(MountedVolume {
            is_kubelets: below.is_some_and(|path| pod_of_volume(path).is_some()),
            is_known_to_kubelet: is_known_to_kubelet(&target),
            target,
            content,
        })
    });
    Ok(ours.collect())
}

fn mount_table() -> Result<MountTable, StoreError> {
    let failed = |error| StoreError::io("read", Path::new("/proc/self/mountinfo"), error);
    MountTable::read().map_err(failed)
}

/// Returns a record of what is known without the lost one. The next publish of the volume completes it. Returns none
/// for a followed volume of which nothing is known.
fn rebuilt(store: &Store, mount: &MountedVolume) -> Option<Publication> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct VolumeData {
        volume_handle: String,
    }
    let data = std::fs::read(mount.target.with_file_name(KUBELETS_FILE)).ok();
    let data = data.and_then(|data| serde_json::from_slice::<VolumeData>(&data).ok());
    let (key, generation) = match mount.content {
        MountedContent::Tree(MountedTree { key, generation, .. }) => (key, generation),
        MountedContent::Followed(key) => shown_tree(store.root(), key)?,
    };
    let tree = store.trees().generation(key, generation);
    let unknown = Digest::of(b"");
    Some(Publication {
        volume_id: data.map(|data| data.volume_handle).unwrap_or_default(),
        target: mount.target.clone(),
        boot_id: store::publication_records::boot_id(),
        fingerprint: unknown,
        reference: String::new(),
        manifest: tree.map_or(unknown, |tree| tree.record.manifest),
        tree: key,
        generation,
        pod: None,
        kubelet_knew: mount.is_known_to_kubelet,
        rebuilt: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::TreeKey;
    use sys::mount::MountForm;

    const KUBELETS: &str = "/kubelet/pods/u/volumes/kubernetes.io~csi/v/mount";

    fn mount(target: &str, is_kubelets: bool, is_known_to_kubelet: bool) -> MountedVolume {
        let key = TreeKey::new(Digest::of(b""), "", "Readable", "");
        let tree = MountedTree { key, generation: 1, form: MountForm::Bind };
        let content = MountedContent::Tree(tree);
        MountedVolume { target: target.into(), content, is_kubelets, is_known_to_kubelet }
    }

    fn record(target: &str, was_known_to_kubelet: bool) -> RecordedVolume {
        RecordedVolume { target: target.into(), was_known_to_kubelet }
    }

    fn decide_with_folders(records: &[RecordedVolume], mounts: &[MountedVolume]) -> ReconcilePlan {
        decide(records, mounts, |_| true)
    }

    #[test]
    fn records_without_mounts_stay_as_long_as_their_pod() {
        let records = [record("/a", true), record("/b", true)];
        let decisions = decide(&records, &[], |target| target == Path::new("/a"));
        assert_eq!((decisions.keep, decisions.drop), (1, vec!["/b".into()]));
    }

    #[test]
    fn what_the_kubelet_has_forgotten_is_unmounted() {
        let known = [record(KUBELETS, true)];
        let forgotten = [mount(KUBELETS, true, false)];
        assert_eq!(decide_with_folders(&known, &forgotten).unmount, [PathBuf::from(KUBELETS)]);
        assert_eq!(decide_with_folders(&[], &forgotten).unmount, [PathBuf::from(KUBELETS)]);
        assert!(decide_with_folders(&known, &[mount(KUBELETS, true, true)]).unmount.is_empty());
        // Published by another caller, which never writes the kubelet's file.
        let others = [record(KUBELETS, false)];
        assert!(decide_with_folders(&others, &forgotten).unmount.is_empty());
    }

    #[test]
    fn lost_records_are_rebuilt_and_strange_mounts_counted() {
        let (ours, strange) = (mount(KUBELETS, true, true), mount("/mnt/x", false, false));
        let decisions = decide_with_folders(&[], &[ours.clone(), strange]);
        assert_eq!((decisions.record, decisions.unknown), (vec![ours], 1));
        assert!(decisions.unmount.is_empty());
    }
}
