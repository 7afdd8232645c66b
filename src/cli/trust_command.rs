//! `trust fetch`: updates the `trusted_root.json` of a Sigstore instance.
//!
//! No publish needs it: nodes only read the file, see [`PolicySection`](crate::config::PolicySection).

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;
use serde::Serialize;

use super::output::{OutputArguments, print_text};
use super::{CommandError, runtime};
use crate::kubernetes::{ConfigMap, ConfigMapName, KubernetesClient};
use oci::Digest;
use oci::registry::{WebAddress, WebFiles};
use sigstore::trust_root::MAXIMUM_TRUST_ROOT_BYTES;
use sigstore::trust_update::{
    MAXIMUM_METADATA_BYTES, MAXIMUM_SEEN_BYTES, MetadataVersions, RepositoryFile, RepositoryFiles,
    SeenMetadata,
};
use sigstore::{SigstoreInstance, TrustUpdate, update_trust_root};

/// The timeout of an update, which needs some ten small files.
const TIMEOUT: Duration = Duration::from_mins(2);
/// The file of a `ConfigMap` with the trust root.
const TRUST_ROOT: &str = "trusted_root.json";
/// The end of the name of the file with the TUF metadata.
const STATE_SUFFIX: &str = ".tuf";

/// Commands on trust roots.
#[derive(Debug, Subcommand)]
pub(super) enum TrustCommand {
    /// Fetch the trusted root of a Sigstore instance by TUF, or update it.
    Fetch(FetchArguments),
}

/// Arguments of `trust fetch`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci trust fetch --to trusted_root.json
  csi-driver-oci trust fetch --instance github --to github.json
  csi-driver-oci trust fetch --url https://tuf.example.com --root root.json --to team.json
  csi-driver-oci trust fetch --config-map csi-driver-oci/sigstore-public

An update is refused if it is older than the one before, expired, or not signed as the update
before demands. The output then stays as it is. --config-map runs in a pod whose service account
may get and patch the ConfigMap, which must exist.")]
pub(super) struct FetchArguments {
    /// The Sigstore instance.
    #[arg(long, value_enum, default_value_t, conflicts_with = "url")]
    instance: Instance,
    /// The TUF repository of another instance.
    #[arg(long, requires = "root")]
    url: Option<WebAddress>,
    /// The `root.json` that the updates of --url start from. Get it from someone whom you trust.
    #[arg(long, value_name = "FILE", requires = "url")]
    root: Option<PathBuf>,
    /// The file to replace [default: standard output].
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// The file with the TUF metadata of the last update [default: that of --to with .tuf].
    #[arg(long, value_name = "FILE", conflicts_with = "config_map")]
    state: Option<PathBuf>,
    /// The `ConfigMap` to write to, as `trusted_root.json` and `trusted_root.json.tuf`.
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "to")]
    config_map: Option<ConfigMapName>,
    #[command(flatten)]
    output: OutputArguments,
}

/// The instances with a `root.json` in this program.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Instance {
    /// Sigstore's public instance.
    #[default]
    Public,
    /// GitHub's own, for attestations of private repositories.
    Github,
}

/// The result of `trust fetch`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FetchReport {
    url: String,
    digest: Digest,
    is_new: bool,
    versions: MetadataVersions,
}

pub(super) fn run(command: &TrustCommand) -> Result<(), CommandError> {
    let TrustCommand::Fetch(arguments) = command;
    arguments.output.start_log();
    runtime()?.block_on(arguments.fetch())
}

impl FetchArguments {
    async fn fetch(&self) -> Result<(), CommandError> {
        let instance = match self.instance {
            Instance::Public => SigstoreInstance::Public,
            Instance::Github => SigstoreInstance::GitHub,
        };
        let url = self.url.clone().map_or_else(|| instance.url().parse(), Ok)?;
        let files = WebFiles::new(&url).map_err(|error| error.to_string())?;
        let root = match &self.root {
            Some(path) => read(path, MAXIMUM_METADATA_BYTES)?.ok_or_else(|| missing(path))?,
            None => instance.root().to_vec(),
        };
        let destination = self.destination().await?;
        let seen = destination.seen(&url)?;
        let update = update_trust_root(WebRepository(files), &root, seen, Timestamp::now());
        let update = tokio::time::timeout(TIMEOUT, update)
            .await
            .map_err(|_| format!("it takes longer than {} seconds", TIMEOUT.as_secs()))
            .and_then(|update| update.map_err(|error| error.to_string()))
            .map_err(|reason| format!("the trust root of {url} is not updated: {reason}"))?;
        let is_new = destination.write(&update).await?;
        if matches!(destination, Destination::Output { .. }) {
            print_text(String::from_utf8_lossy(&update.trust_root).trim_end());
            return Ok(());
        }
        let (digest, versions) = (Digest::of(&update.trust_root), update.versions);
        let report = FetchReport { url: url.to_string(), digest, is_new, versions };
        self.output.result(&report, || {
            let MetadataVersions { root, timestamp, snapshot, targets } = versions;
            let state = if is_new { "a new trust root" } else { "no new trust root" };
            vec![format!(
                "{url}  {state}  root {root}, targets {targets}, snapshot {snapshot}, timestamp {timestamp}"
            )]
        })
    }

    async fn destination(&self) -> Result<Destination, CommandError> {
        if let Some(name) = &self.config_map {
            let client = KubernetesClient::in_cluster().map_err(|error| error.to_string())?;
            let found = ConfigMap::read(&client, name).await.map_err(|error| error.to_string())?;
            let map = found.ok_or_else(|| format!("there is no {name}: create it first"))?;
            return Ok(Destination::ConfigMap { client, map });
        }
        let state = self.state.as_deref().map(to_replace).transpose()?;
        let Some(file) = &self.to else { return Ok(Destination::Output { state }) };
        let beside = || to_replace(&PathBuf::from(format!("{}{STATE_SUFFIX}", file.display())));
        let state = state.map_or_else(beside, Ok)?;
        Ok(Destination::File { file: to_replace(file)?, state })
    }
}

/// The place of the trust root and of the metadata that the next update needs.
enum Destination {
    File { file: PathBuf, state: PathBuf },
    ConfigMap { client: KubernetesClient, map: ConfigMap },
    Output { state: Option<PathBuf> },
}

impl Destination {
    /// Returns the metadata of the last update.
    fn seen(&self, url: &WebAddress) -> Result<SeenMetadata, CommandError> {
        let url = url.to_string();
        let (place, json) = match self {
            Self::File { state, .. } | Self::Output { state: Some(state) } => {
                (state.display().to_string(), read(state, MAXIMUM_SEEN_BYTES)?)
            }
            Self::ConfigMap { map, .. } => {
                let name = format!("{TRUST_ROOT}{STATE_SUFFIX}");
                let json = map.data.get(&name).map(|text| text.clone().into_bytes());
                (name, json)
            }
            Self::Output { state: None } => return Ok(SeenMetadata::new(&url)),
        };
        let Some(json) = json else { return Ok(SeenMetadata::new(&url)) };
        SeenMetadata::parse(&json, &url).map_err(|error| format!("{place}: {error}"))
    }

    /// Writes an update, the metadata first. Returns whether the trust root is new.
    async fn write(&self, update: &TrustUpdate) -> Result<bool, CommandError> {
        let seen = update.seen.to_json();
        match self {
            Self::File { file, state } => {
                let state = Replacement::prepare(state, seen.as_bytes())?;
                // A file that has not changed stays as it is, so that nodes need not read it again.
                let present = read(file, MAXIMUM_TRUST_ROOT_BYTES).ok().flatten();
                let is_new = present.as_ref() != Some(&update.trust_root);
                let file = is_new.then(|| Replacement::prepare(file, &update.trust_root));
                let file = file.transpose()?;
                state.apply()?;
                file.map_or(Ok(()), Replacement::apply).map(|()| is_new)
            }
            Self::ConfigMap { client, map } => {
                let mut next = map.clone();
                let text = String::from_utf8_lossy(&update.trust_root).into_owned();
                let is_new = map.data.get(TRUST_ROOT) != Some(&text);
                next.data.insert(TRUST_ROOT.to_owned(), text);
                next.data.insert(format!("{TRUST_ROOT}{STATE_SUFFIX}"), seen);
                if next.data != map.data {
                    next.replace(client).await.map_err(|error| error.to_string())?;
                }
                Ok(is_new)
            }
            Self::Output { state } => {
                if let Some(state) = state {
                    Replacement::prepare(state, seen.as_bytes())?.apply()?;
                }
                Ok(true)
            }
        }
    }
}

/// The files of a TUF repository on a web server.
struct WebRepository(WebFiles);

impl RepositoryFiles for WebRepository {
    fn fetch<'a>(&'a self, path: &'a str, limit: u64) -> RepositoryFile<'a> {
        Box::pin(async move {
            let file = self.0.get(path, limit).await.map_err(|error| error.to_string())?;
            Ok(file.map(Vec::from))
        })
    }
}

/// Reads a file of at most `limit` bytes, or returns `None` if it does not exist.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, CommandError> {
    let failed = |error: io::Error| format!("{} cannot be read: {error}", path.display());
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(Some(bytes))
}

fn missing(path: &Path) -> CommandError {
    format!("{} does not exist", path.display())
}

/// Returns the file that a path names, through links. It need not exist.
fn to_replace(path: &Path) -> Result<PathBuf, CommandError> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() => {
            fs::canonicalize(path).map_err(|error| not_written(path, &error))
        }
        Ok(_) => Err(not_written(path, &"it is no regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(path) {
            Ok(target) => to_replace(&path.parent().unwrap_or(Path::new("")).join(target)),
            Err(_) => Ok(path.to_owned()),
        },
        Err(error) => Err(not_written(path, &error)),
    }
}

/// The next content of a file, beside it.
struct Replacement<'a> {
    path: &'a Path,
    next: tempfile::NamedTempFile,
}

impl<'a> Replacement<'a> {
    fn prepare(path: &'a Path, content: &[u8]) -> Result<Self, CommandError> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let written: io::Result<_> = (|| {
            let mut next = tempfile::Builder::new()
                .permissions(fs::Permissions::from_mode(0o644))
                .tempfile_in(folder.unwrap_or(Path::new(".")))?;
            next.write_all(content)?;
            next.as_file().sync_all()?;
            Ok(next)
        })();
        written.map(|next| Self { path, next }).map_err(|error| not_written(path, &error))
    }

    /// Replaces the file. A reader sees the old or the new content, also after a crash.
    fn apply(self) -> Result<(), CommandError> {
        let Self { path, next } = self;
        next.persist(path).map(drop).map_err(|error| not_written(path, &error.error))
    }
}

fn not_written(path: &Path, reason: &dyn std::fmt::Display) -> CommandError {
    format!("{} cannot be written: {reason}", path.display())
}
