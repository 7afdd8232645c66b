//! `mount` and `unmount`: publish and unpublish without a kubelet.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::artifact_commands::print_list;
use super::client_credentials::{for_person, keyring};
use super::logging::{self, LogFormat};
use super::output::OutputArguments;
use super::{CommandError, gc_command, runtime, wrong_usage};
use crate::admin::{admin_messages, admin_operations};
use crate::app::content_of;
use crate::config::NodeConfiguration;
use crate::config::policy_config::policy_source;
use crate::proto::admin::ListArtifactsResponse;
use crate::volume::mount_form::MountMode;
use crate::volume::volume_attributes::VolumeAttributes;
use crate::volume::{
    NodeContent, PodInfo, PublishRequest, TargetPath, VolumeManager, VolumeMounter,
};
use oci::credentials::Keyring;
use oci::{Digest, Platform, Reference};
use policy::PolicyDemands;
use pull::download_resources::Unobserved;
use pull::single_flight::Runway;
use pull::{PlacedWant, ProgressView, Tenant};
use store::gc::Want;
use store::state_lock::Lock;
use store::{CacheOptions, SelinuxOptions, Store, StoreError, StoreOptions};
use sys::background::Background;
use sys::mount::{AttachMethod, MountFlags, MountTable};
use text::human_units::Bytes;

/// The deadline of the command: it waits for the end of the pull.
const PULL_DEADLINE: Duration = Duration::from_hours(365 * 24);

const STOPPED: &str =
    "stopped before the end: what was fetched is kept, and the next try goes on there";

/// The interval of updates of the progress.
const REFRESH: Duration = Duration::from_millis(200);

/// Arguments of `mount`.
#[derive(Debug, Args)]
#[command(override_usage = "csi-driver-oci mount [OPTIONS] <REFERENCE> <DIR>
       csi-driver-oci mount [OPTIONS] --list
       csi-driver-oci mount [OPTIONS] --clear")]
#[command(after_help = "Examples:
  csi-driver-oci mount ghcr.io/team/tool:v1 /mnt/tool
  csi-driver-oci mount --include 'bin/**' localhost:5000/tool@sha256:... ./tool
  csi-driver-oci mount --list
  csi-driver-oci mount --clear

Needs root (CAP_SYS_ADMIN), or the root of a user namespace with a mount namespace of its own.")]
pub(super) struct MountArguments {
    /// The artifact: host[:port]/repository[:tag][@digest].
    #[arg(required_unless_present_any = ["list", "clear"])]
    reference: Option<Reference>,
    /// The target directory; created if it does not exist.
    #[arg(required_unless_present_any = ["list", "clear"])]
    dir: Option<PathBuf>,
    /// List the content of the cache, and where it is mounted.
    #[arg(long, conflicts_with_all = ["reference", "clear"])]
    list: bool,
    /// Remove the content of the cache that is not mounted in this mount namespace.
    #[arg(long, conflicts_with = "reference")]
    clear: bool,
    /// The platform to choose from an index, as os/architecture[/variant].
    #[arg(long)]
    platform: Option<Platform>,
    /// Comma-separated patterns of files to show.
    #[arg(long)]
    include: Option<String>,
    /// Comma-separated patterns of files to hide.
    #[arg(long)]
    exclude: Option<String>,
    /// The modes and owners of files.
    #[arg(long, value_parser = ["Readable", "Preserve"])]
    permissions: Option<String>,
    /// The octal mode of single-file layers.
    #[arg(long)]
    file_mode: Option<String>,
    /// The layers to unpack.
    #[arg(long, value_parser = ["Auto", "Always", "Never"])]
    unpack: Option<String>,
    /// The folder or file of the artifact to show.
    #[arg(long, value_name = "PATH")]
    sub_path: Option<String>,
    /// When to ask the registry [default: `Always` for a tag, `IfNotPresent` for a digest].
    #[arg(long, value_parser = ["Always", "IfNotPresent", "Never"])]
    pull_policy: Option<String>,
    /// The docker config.json with credentials [default: the files of docker and podman].
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
    #[command(flatten)]
    state: StateArguments,
    #[command(flatten)]
    output: OutputArguments,
}

/// Arguments of `unmount`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  csi-driver-oci unmount /mnt/tool")]
pub(super) struct UnmountArguments {
    /// The target directory of `mount`, which stays.
    dir: PathBuf,
    #[command(flatten)]
    state: StateArguments,
}

#[derive(Debug, Args)]
struct StateArguments {
    /// The directory of the content [default: /var/lib/csi-driver-oci-cli for root, else the user's state directory].
    #[arg(long, env = "STATE_DIR")]
    state_dir: Option<PathBuf>,
}

pub(super) fn mount(arguments: &MountArguments) -> Result<(), CommandError> {
    arguments.output.start_log();
    let (Some(reference), Some(dir)) = (&arguments.reference, &arguments.dir) else {
        return arguments.manage_cache();
    };
    let attributes = arguments.attributes(reference);
    check_capability()?;
    let target = target(dir)?;
    let (state_dir, _lock, store) = arguments.state.open(developer_cache_options())?;
    // Else the volume would count as published, and show the same again.
    drop_unmounted(&store, |other| other == target.full()).map_err(|error| error.to_string())?;
    let keyring = keyring(arguments.docker_config.as_deref(), std::slice::from_ref(reference))?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let runway = Runway {
            tracker: tracker.clone(),
            shutdown: shutdown.clone(),
            background: Background::none(),
        };
        let (policy, configuration) =
            (policy_source(None, |_| ()), NodeConfiguration::without_file());
        let content = content_of(store, policy, &configuration, Arc::new(Unobserved), &runway)?;
        let fetched = arguments.fetch(&content, &attributes, &keyring).await.map_err(|error| {
            let hint = if arguments.pull_policy.is_none() && is_cached(&content, reference, &attributes) {
                "; `--pull-policy IfNotPresent` mounts what was pulled earlier"
            } else {
                ""
            };
            format!("{reference}: {}{hint}", for_person(&error, reference))
        })?;
        let (_sender, receiver) = watch::channel(Ok(content));
        let attach = AttachMethod::detect(&state_dir.join("mounts"));
        let mounter = VolumeMounter::new(attach, MountMode::Auto);
        // No container runtime copies this mount, so a read-only bind is safe if there is no overlayfs.
        let readonly = !mounter.has_overlay;
        let volumes = VolumeManager::new(state_dir.clone(), mounter, receiver, tracker, shutdown);
        let request = PublishRequest {
            volume_id: target.to_string(),
            target: target.clone(),
            attributes,
            readonly,
            flags: MountFlags::default(),
            pod: PodInfo::default(),
            keyring: Ok(keyring),
            identity: None,
            deadline: Instant::now() + PULL_DEADLINE,
            progress: ProgressView::default(),
        };
        let published = volumes.publish(request).await.map_err(|error| error.to_string())?;
        if let Some(earlier) = published.manifest.filter(|&digest| digest != fetched) {
            return Err(format!(
                "{target} shows {earlier} of an earlier mount, and {reference} is {fetched} now: unmount it first"
            ));
        }
        let digest = published.manifest.map(|digest| digest.to_string());
        let document = json!({
            "reference": reference.to_string(),
            "digest": digest,
            "bytes": published.bytes,
            "target": target.to_string(),
        });
        arguments.output.result(&document, || {
            let (digest, bytes) = (digest.as_deref().unwrap_or("digest unknown"), published.bytes);
            vec![format!("{reference} ({digest}, {}) is mounted at {target}", Bytes(bytes))]
        })
    })
}

/// Fails without the capability to mount.
fn check_capability() -> Result<(), CommandError> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    match effective {
        Some(mask) if mask & CAP_SYS_ADMIN == 0 => Err(
            "mounts need root (CAP_SYS_ADMIN): use `sudo`, or `unshare --user --map-root-user --mount` for a shell whose mounts only it sees"
                .to_owned(),
        ),
        _ => Ok(()),
    }
}

pub(super) fn unmount(arguments: &UnmountArguments) -> Result<(), CommandError> {
    logging::start("warn", Some(LogFormat::Text));
    check_capability()?;
    let target = target(&arguments.dir)?;
    if target.is_kubelet_volume() {
        return Err(format!(
            "{target} is a pod's volume, which the node plugin unmounts: delete the pod"
        ));
    }
    match crate::volume::unpublish_volume::detach(&target) {
        Ok(detached) if detached.unmounted == 0 => {
            Err(format!("nothing of csi-driver-oci is mounted at {target}"))
        }
        Ok(_) => {
            forget(arguments, &target);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Returns limits for a developer's machine: its disk is often fuller than a node's may be, and no kubelet evicts
/// there.
fn developer_cache_options() -> CacheOptions {
    CacheOptions {
        min_free_percent: 2,
        min_free_inodes_percent: 2,
        high_threshold_percent: 100,
        low_threshold_percent: 100,
        ..CacheOptions::default()
    }
}

/// Removes the record. It is a hint: if another process has the state directory, that process drops the record at its
/// next start.
fn forget(arguments: &UnmountArguments, target: &TargetPath) {
    let Ok(state_dir) = arguments.state.folder() else { return };
    if !state_dir.join("format").exists() {
        return;
    }
    let Ok(_lock) = Lock::try_acquire(&state_dir) else { return };
    if let Ok(store) = Store::open(&state_dir, StoreOptions::default()) {
        let _ = store.publications().remove(&target.full());
    }
}

/// Returns whether an earlier pull of the reference is in the cache.
fn is_cached(content: &NodeContent, reference: &Reference, attributes: &VolumeAttributes) -> bool {
    let platform = attributes.platform.clone().unwrap_or_else(Platform::of_this_node);
    content.store.resolutions().get(reference, &platform).is_some()
}

impl MountArguments {
    /// Lists or clears the cache.
    fn manage_cache(&self) -> Result<(), CommandError> {
        let options = CacheOptions { minimum_age: Duration::ZERO, ..developer_cache_options() };
        let (_, _lock, store) = self.state.open(options)?;
        if self.list {
            let artifacts =
                admin_operations::artifacts(&store).map_err(|error| error.to_string())?;
            return print_list(
                &self.output,
                &ListArtifactsResponse { artifacts, ..Default::default() },
            );
        }
        let clear = || {
            drop_unmounted(&store, |_| true)?;
            let collected = store.collector().collect(&Want::AtMost(0))?;
            Ok::<_, StoreError>((collected, store.inventory().usage()?.bytes))
        };
        let (collected, left) = clear().map_err(|error| error.to_string())?;
        let collected = admin_messages::collected(&collected, left, false);
        self.output.result(&collected, || gc_command::lines(&collected))
    }

    /// Pulls the artifact and shows the progress. Returns its manifest. The publish afterwards finds all content in the
    /// store.
    async fn fetch(
        &self,
        content: &NodeContent,
        attributes: &VolumeAttributes,
        keyring: &Keyring,
    ) -> Result<Digest, CommandError> {
        let demands = [PolicyDemands::default()];
        let wants = attributes.wants(&demands, keyring, None, &Tenant::Admin);
        let [PlacedWant { want, .. }] = wants.as_slice() else {
            return Err("a mount is of one artifact".to_owned());
        };
        let view = ProgressView::default();
        let acquire = content.puller.acquire(want, &view);
        tokio::pin!(acquire);
        let shows = self.output.is_text() && std::io::stderr().is_terminal();
        let bar = shows.then(indicatif::ProgressBar::new_spinner);
        let mut interrupt = signal(SignalKind::interrupt())
            .map_err(|error| format!("cannot listen for signals: {error}"))?;
        loop {
            tokio::select! {
                acquired = &mut acquire => {
                    if let Some(bar) = bar {
                        bar.finish_and_clear();
                    }
                    return acquired.map(|tree| tree.record.manifest).map_err(|error| error.to_string());
                }
                _ = interrupt.recv() => return Err(STOPPED.to_owned()),
                () = tokio::time::sleep(REFRESH) => {
                    if let Some(bar) = &bar {
                        bar.set_message(view.snapshot().to_string());
                        bar.tick();
                    }
                }
            }
        }
    }

    fn attributes(&self, reference: &Reference) -> VolumeAttributes {
        // A tag may have been pushed again since the last mount.
        let always = || reference.digest().is_none().then(|| "Always".to_owned());
        let given = [
            ("reference", Some(reference.to_string())),
            ("platform", self.platform.as_ref().map(Platform::to_string)),
            ("include", self.include.clone()),
            ("exclude", self.exclude.clone()),
            ("permissions", self.permissions.clone()),
            ("fileMode", self.file_mode.clone()),
            ("unpack", self.unpack.clone()),
            ("subPath", self.sub_path.clone()),
            ("pullPolicy", self.pull_policy.clone().or_else(always)),
        ];
        let context: HashMap<_, _> =
            given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
        VolumeAttributes::parse(&context).unwrap_or_else(|error| wrong_usage(&error))
    }
}

/// Removes the records of targets that are not mounted any more, as after a reboot or `umount`.
fn drop_unmounted(store: &Store, chosen: impl Fn(&Path) -> bool) -> Result<(), StoreError> {
    let failed = |error| StoreError::io("read", Path::new("/proc/self/mountinfo"), error);
    let table = MountTable::read().map_err(failed)?;
    for (target, _) in store.publications().targets() {
        if chosen(&target) && !table.iter().any(|mount| mount.mount_point == target) {
            store.publications().remove(&target)?;
        }
    }
    Ok(())
}

/// Returns the target's absolute path, without symbolic links in its parent.
fn target(dir: &Path) -> Result<TargetPath, CommandError> {
    let shown = dir.display();
    let absolute = std::path::absolute(dir).map_err(|error| format!("{shown}: {error}"))?;
    let name = absolute.file_name().ok_or_else(|| format!("{shown} cannot be mounted on"))?;
    let above = absolute.parent().unwrap_or(Path::new("/"));
    let above = above
        .canonicalize()
        .map_err(|error| format!("the folder {} above it: {error}", above.display()))?;
    let full = above.join(name);
    let text = full.to_str().ok_or_else(|| format!("{shown} is not UTF-8"))?;
    TargetPath::parse(Path::new("/"), text).map_err(|error| error.to_string())
}

impl StateArguments {
    /// Opens the store. Returns its directory and its lock as well.
    fn open(&self, cache: CacheOptions) -> Result<(PathBuf, Lock, Store), CommandError> {
        let folder = self.folder()?;
        let open = || {
            let lock = Lock::try_acquire(&folder)?;
            let label = SelinuxOptions::default().label();
            Ok::<_, StoreError>((lock, Store::open(&folder, StoreOptions { label, cache })?))
        };
        let (lock, store) = open().map_err(|error| error.to_string())?;
        Ok((folder, lock, store))
    }

    fn folder(&self) -> Result<PathBuf, CommandError> {
        if let Some(folder) = &self.state_dir {
            return std::path::absolute(folder).map_err(|error| format!("--state-dir: {error}"));
        }
        if nix::unistd::Uid::effective().is_root() {
            return Ok(PathBuf::from("/var/lib/csi-driver-oci-cli"));
        }
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state"));
        std::env::var_os("XDG_STATE_HOME")
            .map(PathBuf::from)
            .or_else(home)
            .map(|folder| folder.join("csi-driver-oci"))
            .ok_or_else(|| "no state folder is known: set --state-dir".to_owned())
    }
}
