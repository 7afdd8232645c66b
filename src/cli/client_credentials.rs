//! The credentials that a person's clients have: files of docker and podman, and the helpers that they name.
//!
//! The first file with an entry for a registry counts. Helpers run in this process, for the registries of the command
//! only: a node plugin that gets the result runs none.

use std::collections::BTreeMap;
use std::env::var_os;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::process::Command;

use super::CommandError;
use super::output::print_error;
use oci::Reference;
use oci::credentials::Keyring;
use oci::reference::DOCKER_HUB;
use oci::registry::{CHECK_SECRET, GIVE_SECRET};
use sys::process_group::ProcessGroup;

/// The name of Docker Hub in files and helpers.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The time that a helper gets: a person may have to unlock a key.
const HELPER_TIMEOUT: Duration = Duration::from_mins(1);
/// The most bytes that a helper may print: tokens of the clouds have a few KiB.
const HELPER_OUTPUT: u64 = 256 * 1024;
/// The user name of a helper's answer that is an identity token.
const TOKEN_USER: &str = "<token>";

/// A file of a client.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClientConfig {
    auths: Option<Map<String, Value>>,
    creds_store: Option<String>,
    cred_helpers: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Returns the credentials for these references.
pub(super) fn keyring(
    file: Option<&Path>,
    references: &[Reference],
) -> Result<Keyring, CommandError> {
    let config = docker_config(file, references)?;
    Keyring::from_docker_config(&config).map_err(|error| error.to_string())
}

/// Returns the credentials for these references as a docker configuration without helpers: of the given file, or of
/// the files that docker and podman use.
pub(super) fn docker_config(
    file: Option<&Path>,
    references: &[Reference],
) -> Result<Vec<u8>, CommandError> {
    let files = match file {
        Some(file) => vec![file.to_owned()],
        None => client_files().into_iter().filter(|file| file.exists()).collect(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let mut auths = Map::new();
    for file in files {
        tracing::debug!(file = %file.display(), "reading credentials");
        let config = ClientConfig::read(&file)?;
        for host in references.iter().map(|reference| reference.repository().host()) {
            let key = if host == DOCKER_HUB { DOCKER_HUB_KEY } else { host };
            let Some(helper) = config.helper(host).filter(|_| !auths.contains_key(key)) else {
                continue;
            };
            match runtime.block_on(ask(helper, key)) {
                Ok(Some(answer)) => drop(auths.insert(key.to_owned(), answer)),
                Ok(None) => {}
                Err(reason) => print_error(&format!(
                    "no credentials for {host} from docker-credential-{helper}, which {} names: {reason}",
                    file.display()
                )),
            }
        }
        for (key, entry) in config.auths.unwrap_or_default() {
            auths.entry(key).or_insert(entry);
        }
    }
    Ok(json!({"auths": auths}).to_string().into_bytes())
}

/// Returns the files of clients, in the order in which they count.
fn client_files() -> Vec<PathBuf> {
    let home = var_os("HOME").map(PathBuf::from);
    let at_home = |name: &str| home.as_ref().map(|home| home.join(name));
    let folder = |variable: &str| var_os(variable).map(PathBuf::from);
    let podman = |folder: PathBuf| folder.join("containers/auth.json");
    let user = nix::unistd::Uid::current();
    let files = [
        folder("REGISTRY_AUTH_FILE"),
        folder("DOCKER_CONFIG").or_else(|| at_home(".docker")).map(|at| at.join("config.json")),
        folder("XDG_RUNTIME_DIR").map(podman),
        Some(PathBuf::from(format!("/run/containers/{user}/auth.json"))),
        folder("XDG_CONFIG_HOME").or_else(|| at_home(".config")).map(podman),
        at_home(".dockercfg"),
    ];
    files.into_iter().flatten().collect()
}

impl ClientConfig {
    fn read(file: &Path) -> Result<Self, CommandError> {
        let shown = file.display();
        let bytes = std::fs::read(file)
            .map_err(|error| format!("the credentials {shown} cannot be read: {error}"))?;
        // The parser's text may quote a secret.
        let wrong = |error: serde_json::Error| {
            let (line, column) = (error.line(), error.column());
            format!(
                "the credentials {shown} are no docker configuration (line {line} column {column}): `docker login` writes one"
            )
        };
        // The oldest form has the entries alone.
        if file.file_name().is_some_and(|name| name == ".dockercfg") {
            let auths = serde_json::from_slice(&bytes).map_err(wrong)?;
            return Ok(Self { auths: Some(auths), ..Self::default() });
        }
        serde_json::from_slice(&bytes).map_err(wrong)
    }

    /// Returns the helper for a registry. One of its own counts, also an empty name, which means none.
    fn helper(&self, host: &str) -> Option<&str> {
        let helpers = self.cred_helpers.as_ref();
        let of = |key: &str| helpers.and_then(|helpers| helpers.get(key));
        let hub = || (host == DOCKER_HUB).then(|| of(DOCKER_HUB_KEY).or(of("index.docker.io")));
        let own = of(host).or_else(|| hub().flatten());
        own.or(self.creds_store.as_ref()).map(String::as_str).filter(|name| !name.is_empty())
    }
}

/// Asks a helper for the entry of a registry. Returns `None` if it has none.
async fn ask(helper: &str, server: &str) -> Result<Option<Value>, String> {
    if helper.contains('/') {
        return Err("its name has a slash".to_owned());
    }
    let running =
        ProcessGroup::spawn(Command::new(format!("docker-credential-{helper}")).arg("get"))
            .map_err(|error| format!("it cannot be started: {error}"))?;
    let (status, output) =
        running.exchange(server.as_bytes(), HELPER_OUTPUT, HELPER_TIMEOUT).await?;
    if !status.success() {
        let said = String::from_utf8_lossy(&output);
        return if said.contains("credentials not found") {
            Ok(None)
        } else {
            Err(format!("it ended with {status}"))
        };
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&output).map_err(|_| "its answer is no credential".to_owned())?;
    Ok(Some(if answer.username == TOKEN_USER {
        json!({"identitytoken": answer.secret})
    } else {
        json!({"username": answer.username, "password": answer.secret})
    }))
}

/// Replaces advice for the author of a pod by advice for a person who typed a command.
pub(super) fn for_person(message: &str, reference: &Reference) -> String {
    let login = match reference.repository().host() {
        DOCKER_HUB => "`docker login`".to_owned(),
        host => format!("`docker login {host}`"),
    };
    message
        .replace(GIVE_SECRET, &format!("log in with {login}, or check the repository's name"))
        .replace(CHECK_SECRET, &format!("log in again with {login}, or check the right to pull"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_own_helper_counts_before_the_store() {
        let config: ClientConfig = serde_json::from_value(json!({
            "credsStore": "store",
            "credHelpers": {"r.io": "own", "none.io": "", "index.docker.io": "hub"},
        }))
        .expect("a configuration");
        let hosts = ["r.io", "none.io", "docker.io", "other.io"];
        let expected = [Some("own"), None, Some("hub"), Some("store")];
        assert_eq!(hosts.map(|host| config.helper(host)), expected);
    }

    #[test]
    fn a_wrong_file_is_named_and_not_quoted() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("config.json");
        std::fs::write(&file, r#"{"auths": {"r.io": {"auth": "secret"}}"#).expect("written");
        let error = docker_config(Some(&file), &[]).expect_err("wrong");
        assert!(error.contains("config.json") && error.contains("line 1"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
