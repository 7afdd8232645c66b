//! `mount` and `unmount`: publish and unpublish without a kubelet.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{CommandError, OutputFormat, logging, print, runtime};
use crate::app::content_of;
use crate::config::NodeConfiguration;
use crate::config::policy_config::policy_source;
use crate::volume::mount_form::MountMode;
use crate::volume::volume_attributes::VolumeAttributes;
use crate::volume::{
    NodeContent, PodInfo, PublishRequest, TargetPath, VolumeManager, VolumeMounter,
};
use oci::credentials::Keyring;
use policy::PolicyDemands;
use pull::download_resources::Unobserved;
use pull::single_flight::Runway;
use pull::{ProgressView, Tenant};
use store::state_lock::Lock;
use store::{CacheOptions, SelinuxOptions, Store, StoreOptions};
use sys::background::Background;
use sys::mount::{AttachMethod, MountFlags};

/// The deadline of the command: it waits for the end of the pull.
const PULL_DEADLINE: Duration = Duration::from_hours(365 * 24);

const STOPPED: &str =
    "stopped before the end: what was fetched is kept, and the next try goes on there";

/// The interval of updates of the progress.
const REFRESH: Duration = Duration::from_millis(200);

/// Arguments of `mount`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci mount ghcr.io/team/tool:v1 /mnt/tool
  csi-driver-oci mount --include 'bin/**' localhost:5000/tool@sha256:... ./tool")]
pub(super) struct MountArguments {
    /// The artifact: host[:port]/repository[:tag][@digest].
    reference: String,
    /// The target directory; created if it does not exist.
    dir: PathBuf,
    /// The platform to choose from an index, as os/architecture[/variant].
    #[arg(long)]
    platform: Option<String>,
    /// Comma-separated patterns of files to show.
    #[arg(long)]
    include: Option<String>,
    /// Comma-separated patterns of files to hide.
    #[arg(long)]
    exclude: Option<String>,
    /// The modes and owners of files: Readable or Preserve.
    #[arg(long)]
    permissions: Option<String>,
    /// The octal mode of single-file layers.
    #[arg(long)]
    file_mode: Option<String>,
    /// The layers to unpack: Auto, Always or Never.
    #[arg(long)]
    unpack: Option<String>,
    /// When to use the registry: Always, `IfNotPresent` or Never.
    #[arg(long)]
    pull_policy: Option<String>,
    /// The docker config.json with credentials [default: the one that docker uses].
    #[arg(long)]
    docker_config: Option<PathBuf>,
    #[command(flatten)]
    state: StateArguments,
    /// The output format.
    #[arg(long, value_enum, default_value_t)]
    output: OutputFormat,
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
    logging::start("warn", None)?;
    let attributes = attributes(arguments)?;
    let keyring = keyring(arguments.docker_config.as_deref())?;
    let state_dir = arguments.state.folder()?;
    let target = target(&arguments.dir)?;
    let _lock = Lock::try_acquire(&state_dir).map_err(|error| error.to_string())?;
    let (label, cache) = (SelinuxOptions::default().label(), developer_cache_options());
    let store = Store::open(&state_dir, StoreOptions { label, cache })
        .map_err(|error| error.to_string())?;
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
        let reference = attributes.reference.to_string();
        fetch(&content, &attributes, &keyring)
            .await
            .map_err(|error| format!("{reference}: {error}"))?;
        let (_sender, receiver) = watch::channel(Ok(content));
        let attach = AttachMethod::detect(&state_dir.join("mounts"));
        let mounter = VolumeMounter::new(attach, MountMode::Auto);
        // No container runtime copies this mount, so a read-only bind is safe if there is no overlayfs.
        let readonly = !mounter.has_overlay();
        let volumes = VolumeManager::new(state_dir.clone(), mounter, receiver, tracker, shutdown);
        let request = PublishRequest {
            volume_id: format!("cli:{target}"),
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
        let digest = published.manifest.map(|digest| digest.to_string());
        match arguments.output {
            OutputFormat::Table => print(&format!(
                "{reference} ({}, {}) is mounted at {target}",
                digest.as_deref().unwrap_or("digest unknown"),
                text::human_units::Bytes(published.bytes),
            )),
            OutputFormat::Json => print(
                &serde_json::json!({
                    "reference": reference,
                    "digest": digest,
                    "bytes": published.bytes,
                    "target": target.to_string(),
                })
                .to_string(),
            ),
        }
        Ok(())
    })
}

pub(super) fn unmount(arguments: &UnmountArguments) -> Result<(), CommandError> {
    logging::start("warn", None)?;
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

/// Pulls the artifact and shows the progress. The publish afterwards finds all content in the store.
async fn fetch(
    content: &NodeContent,
    attributes: &VolumeAttributes,
    keyring: &Keyring,
) -> Result<(), CommandError> {
    let want = attributes.want(PolicyDemands::default(), keyring.clone(), None, Tenant::Admin);
    let view = ProgressView::default();
    let acquire = content.puller.acquire(&want, &view);
    tokio::pin!(acquire);
    let bar = std::io::stderr().is_terminal().then(indicatif::ProgressBar::new_spinner);
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
        .map_err(|error| format!("cannot listen for signals: {error}"))?;
    loop {
        tokio::select! {
            acquired = &mut acquire => {
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
                return acquired.map(drop).map_err(|error| error.to_string());
            }
            _ = interrupt.recv() => {
                return Err(STOPPED.to_owned());
            }
            () = tokio::time::sleep(REFRESH) => {
                if let Some(bar) = &bar {
                    bar.set_message(view.snapshot().to_string());
                    bar.tick();
                }
            }
        }
    }
}

fn attributes(arguments: &MountArguments) -> Result<VolumeAttributes, CommandError> {
    let given = [
        ("reference", Some(&arguments.reference)),
        ("platform", arguments.platform.as_ref()),
        ("include", arguments.include.as_ref()),
        ("exclude", arguments.exclude.as_ref()),
        ("permissions", arguments.permissions.as_ref()),
        ("fileMode", arguments.file_mode.as_ref()),
        ("unpack", arguments.unpack.as_ref()),
        ("pullPolicy", arguments.pull_policy.as_ref()),
    ];
    let context: HashMap<_, _> = given
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?.clone())))
        .collect();
    VolumeAttributes::parse(&context).map_err(|error| error.to_string())
}

pub(super) fn keyring(file: Option<&Path>) -> Result<Keyring, CommandError> {
    let folder = || {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
        std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home)
    };
    let path = match file {
        Some(path) => path.to_owned(),
        None => match folder().map(|folder| folder.join("config.json")) {
            Some(path) if path.exists() => path,
            _ => return Ok(Keyring::empty()),
        },
    };
    let bytes = std::fs::read(&path)
        .map_err(|error| format!("the credentials {} cannot be read: {error}", path.display()))?;
    Keyring::from_docker_config(&bytes)
        .map_err(|error| format!("the credentials {}: {error}", path.display()))
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
